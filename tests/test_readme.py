"""The code of the README runs as it stands, and its numbers are those of the results."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from effc.passes import PASSES

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


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "docs/recipes.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
