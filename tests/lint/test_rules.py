"""Every rule finds what was planted, on its target and nowhere else, and is silent where nothing is wrong."""

import pytest
from planted_onnx import CLEAN, FAULTS

from effc.errors import UsageError
from effc.lint import run
from effc.lint.rule import RULES


def ids(path, target) -> set[str]:
    return {one.id for one in run.check(path, run.chosen(target))}


@pytest.mark.parametrize("title", FAULTS)
def test_what_is_planted_is_found_and_nothing_else(title, tmp_path):
    fault = FAULTS[title]
    assert ids(fault.build().save(tmp_path / "m.onnx"), fault.target) == fault.ids


@pytest.mark.parametrize("title", CLEAN)
def test_nothing_is_said_of_a_clean_file(title, tmp_path):
    target, build = CLEAN[title]
    assert ids(build().save(tmp_path / "m.onnx"), target) == set()


def test_the_corpus_is_as_large_as_is_said_and_tries_every_rule():
    assert len(FAULTS) >= 30
    assert len({build for _, build in CLEAN.values()}) >= 20
    assert {id for fault in FAULTS.values() for id in fault.ids} == RULES.keys()


def test_a_finding_names_the_node_and_the_tensor(tmp_path):
    found = run.check(
        FAULTS["int8 and a bias, fixed sizes"].build().save(tmp_path / "m.onnx"), run.chosen("ort")
    )
    assert [(one.node, one.op, one.tensor) for one in found] == [
        ("Add_4", "Add", "dequantizelinear_2")
    ]
    assert "[4, 16, 64] of int8" in found[0].evidence


def test_rules_are_chosen_by_id():
    assert [rule.id for rule in run.chosen("ort", only=["ORT002"])] == ["ORT002"]
    assert "ORT002" not in [rule.id for rule in run.chosen("ort", without=["ORT002"])]
    assert run.chosen("tensorrt", only=["ORT002"]) == []
    with pytest.raises(UsageError, match="did you mean 'ORT"):
        run.chosen("ort", only=["ORT01"])
    with pytest.raises(UsageError, match="unknown target"):
        run.chosen("abacus")
