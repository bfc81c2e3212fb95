"""What rules say of a runtime is what the runtime does: with the fault, and without."""

import importlib.util

import onnx
import pytest
from planted_onnx import CLEAN, FAULTS
from runtimes import RUNTIMES

from effc.lint import run
from effc.lint.on_tensorrt import CONTRIB, REFUSED

NEEDS = {"ort": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt_rtx_bindings"}
EXACT = {
    "QDQ004", "QDQ005", "ORT001", "ORT002", "ORT003", "ORT004", "ORT005", "ORT009", "ORT010", "ORT011", "ORT016",
    "OV001", "TRT001", "TRT002",
}  # fmt: skip
"""Rules that have places that can be put right."""
LAYERLESS = ("float", "infinity", "attention", "reshape", "operator")
"""Clean files that are in float from the start."""


def seen(target: str, path) -> str:
    if importlib.util.find_spec(NEEDS[target]) is None:
        pytest.skip(f"{NEEDS[target]} is not installed")
    return RUNTIMES[target](path)


@pytest.mark.parametrize("title", [t for t, fault in FAULTS.items() if fault.seen])
def test_a_runtime_makes_of_a_fault_what_the_rule_says(title, tmp_path):
    fault = FAULTS[title]
    assert seen(fault.target, fault.build().save(tmp_path / "m.onnx")) == fault.seen


@pytest.mark.parametrize("title", CLEAN)
def test_a_clean_file_opens_and_keeps_its_integers(title, tmp_path):
    target, build = CLEAN[title]
    found = seen(target, build().save(tmp_path / "m.onnx"))
    if any(word in title for word in LAYERLESS):
        assert found in ("fine", "float")
    else:
        assert found == "fine"


@pytest.mark.parametrize("title", [t for t, fault in FAULTS.items() if fault.ids & EXACT])
def test_what_is_put_right_is_no_fault_any_more_and_gives_the_same(title, tmp_path):
    fault = FAULTS[title]
    path, place = fault.build().save(tmp_path / "m.onnx"), tmp_path / "fixed.onnx"
    before = run.check(path, run.chosen(fault.target))
    if not any(one.is_fixable for one in before):
        assert run.repair(path, place, run.chosen(fault.target)).done == []
        assert not place.exists()
        return
    content = path.read_bytes()
    repaired = run.repair(path, place, run.chosen(fault.target))
    assert repaired.done and path.read_bytes() == content
    assert repaired.gap <= run.SAME
    onnx.checker.check_model(str(place), full_check=True)
    left = run.check(place, run.chosen(fault.target))
    assert {one.id for one in left} == {one.id for one in before if not one.is_fixable}
    if not left:
        assert seen(fault.target, place) == "fine"


def test_every_rule_that_is_said_to_be_exact_puts_something_right(tmp_path):
    found = set()
    for title, fault in FAULTS.items():
        file = fault.build().save(tmp_path / f"{len(title)}.onnx")
        rules = run.chosen(fault.target)
        found |= {one.id for one in run.check(file, rules) if one.is_fixable}
    assert found == EXACT


def test_the_parser_of_tensorrt_takes_what_is_not_listed():
    pytest.importorskip("tensorrt_rtx_bindings")
    from effc.backends import tensorrt_build as build

    trt, log = build.library(), build.Log()
    logger = log.logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    words = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    assert {word for word in words if not parser.supports_operator(word)} == REFUSED
    assert all(parser.supports_operator(word) for word in CONTRIB)
