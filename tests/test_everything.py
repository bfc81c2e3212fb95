"""Pruning, NoisyQuant, integers and trained experts in one recipe, on one decoder, for three runtimes, all compose."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from effc.backends.ort_engine import OrtEngine
from kit import cli

pytest.importorskip("openvino")
pytest.importorskip("tensorrt_rtx_bindings")
pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[1] / "examples" / "everything" / "recipe.yaml"
DATA = Path(os.environ.get("EFFC_DATA", Path(__file__).parents[2] / "shared" / "data"))
STORIES = DATA / "stories260k-llama"
TARGETS = ("ort", "openvino", "tensorrt")
FEW = {"samples": 32, "held": 8, "batch": 4, "max_length": 64}
LOSSY = {"tune": 1.0, "harden-hsm": 0.3, "noisyquant": 0.12, "quantize": 0.12, "experts": 0.1}
"""The most that the outputs may move by a pass (relative L2); the first training has few steps for a quarter less."""
LOWERED = {"ort": 0.05, "openvino": 0.15, "tensorrt": 1e-5}
"""How far an engine may be from its own graph: kernels of integers round what lies on a border otherwise."""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The recipe as it is documented, on the first two layers of stories260K, with few samples and steps."""
    if not STORIES.is_dir():
        pytest.skip("no stories260K")
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("everything")
    model = AutoModelForCausalLM.from_pretrained(STORIES, num_hidden_layers=2)
    model.save_pretrained(place / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / name, place / "model")
    content = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    content["source"]["transformers"] = str(place / "model")
    content["calib"] = {
        "file": str(DATA / "tinystories" / "train_head.txt"),
        "samples": 16,
        "max_length": 64,
    }
    passes = {p["pass"] if isinstance(p, dict) else p: p for p in content["passes"]}
    pruning, experts = (p for p in content["passes"] if isinstance(p, dict) and p["pass"] == "tune")
    pruning.update(FEW, steps=20)
    experts.update(FEW, steps=8)
    passes["noisyquant"]["rows"] = 256
    passes["attach-rank1"]["select"] = {"module": "*.layers.1.mlp.*"}
    content["bench"] = False
    (place / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    ran = cli("compile", place / "recipe.yaml", "-o", place / "out")
    assert ran.code == 0, ran.err
    return place / "out"


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def steps(report, target):
    """Passes of a target that did something, by name; the second training is that of experts."""
    found = {}
    for step in report["passes"]:
        if step["target"] == target and step["sites"]:
            found["experts" if step["name"] in found else step["name"]] = step
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_pass_keeps_what_it_claims(report, target):
    found = steps(report, target)
    wanted = [
        "insert-hsm",
        "tune",
        "harden-hsm",
        "fold-hsm",
        "noisyquant",
        "quantize",
        "attach-rank1",
        "experts",
    ]
    assert [name for name in found if name in (*wanted, "batch-rank1")] == [*wanted, "batch-rank1"]
    for name, step in found.items():
        assert step["drift"] is not None, name
        most = LOSSY[name] if step["effect"] == "lossy" else 1e-5
        assert step["drift"]["rel_l2"] <= most, name
    moved = {name for name, step in found.items() if step["drift"]["rel_l2"] > 1e-3}
    assert moved >= {"tune", "noisyquant", "quantize", "experts"}


@pytest.mark.parametrize("target", TARGETS)
def test_the_engine_computes_its_graph(report, target):
    assert report["lowering"][target]["rel_l2"] <= LOWERED[target]


def test_layers_are_narrower_and_on_integers(out, report):
    folded = steps(report, "ort")["fold-hsm"]["bytes"]
    assert (
        folded[1] < 0.95 * folded[0]
    )  # with the table, which was the output layer's weight too, written twice
    engines = {
        e["target"]: e
        for e in json.loads((out / "manifest.json").read_text(encoding="utf-8"))["engines"]
    }
    for target in ("ort", "openvino"):
        assert engines[target]["int8_sites"] == engines[target]["total_sites"] == 16
    assert (out / "tensorrt" / "model.engine").read_bytes()[1:4] == b"trt"


def test_it_writes_and_is_whole(out):
    ran = cli("verify", out)
    assert ran.code == 0, ran.err
    ran = cli("run", out, "--prompt", "Once upon a time", "--max-tokens", 4, "--temperature", 0)
    assert ran.code == 0, ran.err
    with OrtEngine(out / "ort" / "model.onnx") as engine:
        assert {p.name for p in engine.inputs} >= {"input_ids", "past_key_values.0.key"}
