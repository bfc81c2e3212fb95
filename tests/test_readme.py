"""The code of the README runs as it stands, and its numbers are those of the results."""

import importlib.util
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from effc.passes import PASSES
from effc.stats import student

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_run_one_after_another(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "examples" / "own_pass" / "model.py", tmp_path)
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).normal(size=(32, 16)).astype("f4"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "model", raising=False)
    words = {word: kind for word, kind in PASSES._words.items() if word != "fold-scale"}
    monkeypatch.setattr(PASSES, "_words", words)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    out = capsys.readouterr().out
    assert "2/2 linear fused (MatMulIntegerToFloat)" in out
    assert "fold-scale: 2 sites" in out
    assert (tmp_path / "OUT" / "manifest.json").is_file()


def test_a_pass_of_ones_own_takes_about_twenty_lines():
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class" in b]
    lines = block[block.index("    def rewrite") : block.index("program =")].strip().splitlines()
    assert len(lines) <= 20


def test_the_tables_are_what_the_results_say(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "tables.py"), run_name="__main__")
    assert stop.value.code == 0, capsys.readouterr().out


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """The script of the tables, over results in an empty folder."""
    place = ROOT / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", place)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    monkeypatch.setattr(made, "RESULTS", tmp_path)
    return made


def test_what_arms_of_encoders_train_is_told_where_it_was_counted(tables, tmp_path):
    name = "pat-encoders.json"
    found = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
    for arms in (
        case["arms"] for case in found.values() if isinstance(case, dict) and "arms" in case
    ):
        for arm in arms.values():
            arm["trainables"] = [53_760] * 3
    (tmp_path / name).write_text(json.dumps(found), encoding="utf-8")
    lines = tables.narrow_encoders()
    assert sum("| 53,760 |" in line for line in lines) == 10
    del arm["trainables"]
    (tmp_path / name).write_text(json.dumps(found), encoding="utf-8")
    assert sum("| 53,760 |" in line for line in tables.narrow_encoders()) == 5


def test_a_ranking_is_held_against_all_that_were_looked_at(tables, tmp_path):
    units, gains = {}, np.array([0.004, 0.012, 0.006, 0.010])
    for name in ("net", "net, align 16"):
        units[f"{name} whole"] = {"accuracy": 0.9}
        units[f"{name} latency 0.3"] = {
            "int8": {"against": {"whole": {"ratio": 1.2, "low": 1.1, "high": 1.3, "n": 9}}}
        }
        for ranking, by in (("random", 0), ("magnitude", -gains), ("wanda", gains)):
            for seed, value in enumerate(0.8 + by * np.ones(4)):
                units[f"{name}: {ranking}, 0.3, {seed}"] = {"int8": value, "share": 0.4}
    (tmp_path / "pruning.json").write_text(json.dumps({"units": units}), encoding="utf-8")
    assert student(gains, 1 - 0.05 / 2).low > 0  # above chance among the two of its own table
    assert student(gains, 1 - 0.05 / 4).low < 0  # and not among the four of the network
    assert "wanda" not in tables.best_rankings()
    gains += 0.01
    for name in ("net", "net, align 16"):
        for seed, value in enumerate(0.8 + gains):
            units[f"{name}: wanda, 0.3, {seed}"]["int8"] = value
    (tmp_path / "pruning.json").write_text(json.dumps({"units": units}), encoding="utf-8")
    gap = student(gains, 1 - 0.05 / 4)
    assert tables.best_rankings().count(f"{gap.low:+.4f}, {gap.high:+.4f}") == 2


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/recipes.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
