"""Timings of another machine are joined to the report of the package that they are of, and to no other."""

import json
import shutil

import pytest

from effc import elsewhere, package, report
from effc.errors import PackageError, UsageError
from effc.package import check
from kit import assert_letter, cli, made


@pytest.fixture
def out(tmp_path):
    place = tmp_path / "out"
    shutil.copytree(made().out, place)
    return place


def bench_of(out, **changes):
    """What `effc bench` on a machine with a GPU would write."""
    known = package.read_json(out, report.REPORT)
    (entry,) = known["manifest"]["engines"]
    shape = {
        "batch": 1, "length": 16, "engine_ms": 0.25, "p95_ms": 0.3, "n": 400, "reference": "float",
        "reference_ms": 0.75, "ratio": 3.0, "low": 2.8, "high": 3.2, "sessions": 16, "openings": 16,
        "against": {"float": {"ms": 0.75, "p95_ms": 0.8, "n": 400, "ratio": 3.0, "low": 2.8, "high": 3.2}},
        "quantiles_ms": {"engine": [0.25], "float": [0.75]},
    }  # fmt: skip
    return {
        "target": entry["target"], "sha256": entry["sha256"], "shapes": [shape], "threads": 8, "streams": 1,
        "cpu": "Some Processor, 8 cores", "gpu": "Some GPU", "load_ms": {"engine": 5.0, "float": 9.0},
        "first_run_ms": {}, "peak_rss_mb": {}, "reference": ["float"], "metric": None,
        "outputs": {"last_hidden_state": {"max_abs": 0.1, "rel_l2": 0.0123, "cosine": 0.999, "n": 77}},
        "model_bytes": 1, "versions": {}, **changes,
    }  # fmt: skip


def test_the_report_has_them_and_the_package_is_whole(out, tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(bench_of(out)))
    for _ in range(2):  # again changes nothing
        ran = cli("report", out, "--bench", file)
        assert ran.code == 0 and "Some GPU" in ran.out
        assert check(out) == []
        text = (out / "report.txt").read_text()
        assert "3.00× [2.80, 3.20] better" in text and "8 threads, Some GPU beside Some" in text
        assert "on Some GPU: last_hidden_state" in text
        assert "Some GPU" in (out / "report.html").read_text()
        assert package.read_json(out, report.REPORT)["bench"]["gpu"] == "Some GPU"
    assert cli("verify", out).code == 0


def test_a_killed_join_is_done_again(out):
    found, before = bench_of(out), (out / package.VOLATILE).read_bytes()
    elsewhere.join(out, found, "gpu.json")
    (out / package.VOLATILE).write_bytes(before)
    assert check(out)
    elsewhere.join(out, found, "gpu.json")
    assert check(out) == []


def test_a_report_that_somebody_changed_is_not_made_whole(out):
    found = bench_of(out)
    known = package.read_json(out, report.REPORT)
    known["source_bytes"] += 1
    (out / report.REPORT).write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(PackageError, match=r"report\.json differs"):
        elsewhere.join(out, found, "gpu.json")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: {**b, "sha256": "0" * 64},
        lambda b: {k: v for k, v in b.items() if k != "sha256"},
        lambda b: [b],
        lambda b: None,
    ],
)
def test_a_bench_of_another_engine_is_refused(out, spoil):
    before = (out / report.REPORT).read_bytes()
    with pytest.raises(UsageError, match=r"gpu\.json times no engine of"):
        elsewhere.join(out, spoil(bench_of(out)), "gpu.json")
    assert (out / report.REPORT).read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [{"shapes": [{"batch": -1}]}, {"shapes": None}, {"gpu": 7}, {"outputs": []}, {"metric": {"name": 1}}],
)  # fmt: skip
def test_what_is_no_bench_is_refused(out, changes):
    before = (out / report.REPORT).read_bytes()
    with pytest.raises(UsageError, match=r"gpu\.json"):
        elsewhere.join(out, bench_of(out, **changes), "gpu.json")
    assert (out / report.REPORT).read_bytes() == before and check(out) == []


def test_a_file_that_is_no_json_is_a_letter(out, tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text("{")
    assert_letter(cli("report", out, "--bench", file), "UsageError", 2, "gpu.json")
    assert_letter(cli("report", out, "--bench", tmp_path / "none.json"), "UsageError", 2, "none")
