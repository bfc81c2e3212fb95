"""A round of benchmarks/delta_loop.py, device and cloud as processes over a line, and that its check can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_round_goes_up_and_comes_down_over_a_line_that_breaks(tmp_path, monkeypatch):
    ran = subprocess.run(
        [sys.executable, str(SCRIPTS / "delta_loop.py"), "--smoke"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["mirror_equal"] and not found["has_torch"] and found["failed_calls"] == 0
    assert found["bytes_up"] > 500 and 10_000 < found["bytes_down"] <= 60_000
    assert all(
        found["seconds"][name] > 0 for name in ("up", "train", "compile", "make", "fetch", "take")
    )
    device = ("answer", "calibrate", "pack", "up", "wait", "fetch", "take")
    assert found["seconds"]["round"] == pytest.approx(sum(found["seconds"][n] for n in device))

    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tables

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    beside = {"cpu": "a", "features": [], "python": "3", "versions": {}, "loss": 0.02, "piece": 9}
    told = {**beside, "every_s": 0.05, "lines": [found, found]}
    (tmp_path / "delta_loop.json").write_text(json.dumps(told), encoding="utf-8")
    lines = tables.looped()
    assert f"| bytes up | {found['bytes_up']:,} | {found['bytes_up']:,} |" in lines
    assert sum(line.startswith("| fetch |") for line in lines) == 1


def test_its_check_notices_what_must_not_be(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import delta_loop

    good = {"mbit": 1.0, "mirror_equal": True, "failed_calls": 0, "has_torch": False, "rounds": 5,
            "p99_ratio": {"high": 1.5}}  # fmt: skip
    assert delta_loop.missed([good]) == []
    for bad in (
        {"mirror_equal": False},
        {"failed_calls": 1},
        {"has_torch": True},
        {"p99_ratio": {"high": 2.5}},
        {"p99_ratio": {"high": float("nan")}},
    ):
        assert len(delta_loop.missed([good, {**good, **bad}])) == 1
    assert delta_loop.missed([{**good, "rounds": 1, "p99_ratio": {"high": 9.0}}]) == []
