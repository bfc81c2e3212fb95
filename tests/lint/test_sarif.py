"""SARIF of lint is valid by the standard's own schema, where that is at hand, and by classes made of it."""

import json
import os
from pathlib import Path

import jsonschema
import pytest
from planted_onnx import CLEAN, FAULTS
from typer.testing import CliRunner

from effc.cli import app
from effc.lint.rule import TARGETS

SCHEMA = "EFFC_SARIF_SCHEMA"
"""Names sarif-2.1.0-rtm.5.json of the npm package @microsoft/jest-sarif: `npm pack @microsoft/jest-sarif`."""
TITLES = ("int8 and a bias, fixed sizes", *list(FAULTS)[:3])


def report(place: Path, *files: Path) -> list[dict]:
    """What lint writes of each file for all targets."""
    found = []
    for file in files:
        targets = [word for target in TARGETS for word in ("--target", target)]
        words = ["lint", str(file), *targets, "--sarif", str(place / "l.sarif")]
        CliRunner().invoke(app, words, standalone_mode=False)
        found.append(json.loads((place / "l.sarif").read_text(encoding="utf-8")))
    return found


@pytest.fixture
def reports(tmp_path):
    """Of files with findings of every target, of one without, and of one whose name is no URI."""
    files = [
        FAULTS[t].build().save(tmp_path / f"{n}.onnx") for n, t in enumerate(dict.fromkeys(TITLES))
    ]
    files.append(CLEAN["plain float on ort"][1]().save(tmp_path / "a file [ä#%].onnx"))
    files.append(FAULTS[TITLES[0]].build().save(tmp_path / "b file [ä#%].onnx"))
    found = report(tmp_path, *files)
    assert any(one["runs"][0]["results"] for one in found)
    assert not all(one["runs"][0]["results"] for one in found)
    return found


def test_it_fits_the_schema_of_the_standard(reports):
    place = os.environ.get(SCHEMA)
    if not place:
        pytest.skip(f"{SCHEMA} names no schema; npm pack @microsoft/jest-sarif has it")
    schema = json.loads(Path(place).read_text(encoding="utf-8"))
    kind = jsonschema.validators.validator_for(schema)
    check = kind(schema, format_checker=jsonschema.FormatChecker())
    for one in reports:
        assert [error.message for error in check.iter_errors(one)] == []
    del reports[0]["runs"][0]["tool"]
    assert list(check.iter_errors(reports[0]))


def test_it_fits_classes_that_were_made_of_the_schema(reports):
    model = pytest.importorskip("pydantic_sarif.model")
    (kind,) = (k for n, k in vars(model).items() if n.startswith("StaticAnalysisResultsFormat"))
    for one in reports:
        kind.model_validate(one)
    reports[0]["runs"][0]["results"] = [{"ruleId": "X"}]
    with pytest.raises(ValueError, match="message"):
        kind.model_validate(reports[0])


def test_what_the_schema_cannot_say_holds_too(reports):
    """Sections 3.14.15, 3.19.23, 3.27.5 and 3.4.3 of the standard."""
    for one in reports:
        (run,) = one["runs"]
        rules = run["tool"]["driver"]["rules"]
        assert len({rule["id"] for rule in rules}) == len(rules)
        for result in run["results"]:
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
            (place,) = result["locations"]
            uri = place["physicalLocation"]["artifactLocation"]["uri"]
            assert uri.isascii() and not {*uri} & {*" []#\\"} and ":" not in uri.split("/")[0]
            assert result["message"]["text"].endswith(".")
