"""What lint says: on the terminal, as JSON, as SARIF, by its exit code, and on its page in the docs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from planted_onnx import CLEAN, FAULTS
from typer.testing import CliRunner

from effc.cli import app
from effc.errors import LintError, SourceError, UsageError
from effc.lint import run

ROOT = Path(__file__).resolve().parent.parent.parent


def lint(*words: object):
    return CliRunner().invoke(app, ["lint", *map(str, words)], standalone_mode=False)


@pytest.fixture
def faulty(tmp_path) -> Path:
    return FAULTS["int8 and a bias, fixed sizes"].build().save(tmp_path / "m.onnx")


@pytest.fixture
def fine(tmp_path) -> Path:
    return CLEAN["plain float on ort"][1]().save(tmp_path / "fine.onnx")


def test_a_finding_ends_with_its_own_code(faulty):
    ended = lint(faulty)
    assert isinstance(ended.exception, LintError) and ended.exception.exit_code == 15
    assert "error ORT002 Add Add_4" in ended.output and "fix, by --fix" in ended.output
    assert "1 error, 1 of them by --fix for ort" in ended.output


def test_nothing_found_ends_with_nothing(fine):
    ended = lint(fine, "--target", "openvino")
    assert ended.exit_code == 0 and ended.exception is None
    assert ended.output.strip() == f"{fine}: nothing was found for openvino"


def test_json_says_what_was_found(faulty, tmp_path):
    lint(faulty, "--target", "ort", "--target", "tensorrt", "--json", tmp_path / "l.json")
    runs = json.loads((tmp_path / "l.json").read_text())["runs"]
    assert [r["target"] for r in runs] == ["ort", "tensorrt"]
    assert runs[0]["counts"] == {"ORT002": 1} and runs[1]["findings"] == []
    first = runs[0]["findings"][0]
    assert (first["id"], first["node"], first["fixable"]) == ("ORT002", "Add_4", True)
    assert first["cost"] and first["fix"] and first["evidence"]


def test_sarif_has_what_the_standard_asks_for(faulty, tmp_path):
    lint(faulty, "--sarif", tmp_path / "l.sarif")
    found = json.loads((tmp_path / "l.sarif").read_text())
    assert found["version"] == "2.1.0" and found["$schema"].endswith("sarif-schema-2.1.0.json")
    (one,) = found["runs"]
    rules = one["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules)
    for result in one["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning") and result["message"]["text"]
        (place,) = result["locations"]
        assert not os.path.isabs(place["physicalLocation"]["artifactLocation"]["uri"])
        assert place["logicalLocations"][0]["name"]


def test_json_on_stdout_is_nothing_but_json(faulty):
    ended = subprocess.run(
        [sys.executable, "-m", "effc", "lint", faulty, "--json", "-"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 15 and json.loads(ended.stdout)["runs"]
    assert "LintError: 1 finding in" in ended.stderr and "ORT002" in ended.stderr


def test_a_file_is_put_right_in_another(faulty):
    before = faulty.read_bytes()
    ended = lint(faulty, "--fix")
    assert ended.exit_code == 0 and "fixed ORT002" in ended.output
    assert faulty.read_bytes() == before
    assert run.check(faulty.with_name("m.fixed.onnx"), run.chosen("ort")) == []
    assert sorted(p.name for p in faulty.parent.iterdir()) == ["m.fixed.onnx", "m.onnx"]


def test_it_is_put_right_in_place_where_that_is_asked_for(faulty):
    assert lint(faulty, "--fix", "-o", faulty).exit_code == 0
    assert run.check(faulty, run.chosen("ort")) == []
    assert [p.name for p in faulty.parent.iterdir()] == ["m.onnx"]


def test_a_fix_that_moves_numbers_is_not_written(faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "difference", lambda one, other: 0.5)
    ended = lint(faulty, "--fix")
    assert "gives other numbers when it is put right" in str(ended.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_what_cannot_be_written_is_said(faulty, tmp_path):
    (tmp_path / "taken").mkdir()
    ended = lint(faulty, "--fix", "-o", tmp_path / "taken")
    assert "cannot be written" in str(ended.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "taken"]


def test_wrong_calls_are_refused(faulty, tmp_path):
    both = lint(faulty, "--fix", "--target", "ort", "--target", "tensorrt")
    for ended in (
        lint(faulty, "-o", "x.onnx"),
        both,
        lint(faulty, "--select", "ORT999"),
        lint(faulty, "--target", "x"),
    ):
        assert isinstance(ended.exception, UsageError) and ended.exception.hint
    (tmp_path / "cut.onnx").write_bytes(faulty.read_bytes()[:-9])
    assert isinstance(lint(tmp_path / "cut.onnx").exception, SourceError)


def test_the_page_says_what_the_rules_say():
    ended = subprocess.run(
        [sys.executable, ROOT / "tools" / "lint_rules.py", "--check"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
