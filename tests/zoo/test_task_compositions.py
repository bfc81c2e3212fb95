"""Passes that know no task, on models of tasks: pruned and taught again, in few bits, with the gate's verdict."""

import importlib.util
import json
from pathlib import Path

import pytest

from effc import compiler, package, recipe, solving
from effc.source import guess, load

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow
SHORT = [
    "bench=false", "targets=[ort]", "calib.samples=8", "passes.0.samples=24", "passes.0.held=8",
    "passes.0.steps=6", "passes.0.every=3", "passes.0.lr=0.01",
]  # fmt: skip


def script(folder):
    spec = importlib.util.spec_from_file_location(f"{folder}_of", EXAMPLES / folder / "made.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def tuned(root, folder, changes):
    """A checkpoint of an example's recipe, after few steps."""
    asked = [f"source.encoder={root / 'encoder'}", *SHORT, *changes]
    compiler.tune(
        recipe.read(EXAMPLES / folder / "recipe.yaml", asked, data_place=root), root / "checkpoint"
    )
    return root


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("cer"), script("cer")
    made.write(root / "train.csv", 32, 0)
    made.write(root / "valid.csv", 8, 1)
    made.encoder(root / "encoder", 16)
    return tuned(root, "cer", ["source.options={size: 16}", "passes.0.precision=f32"])


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("fusion"), script("lexical_fusion")
    made.write(root / "train.jsonl", 32, 0)
    made.write(root / "valid.jsonl", 8, 1, "valid")
    made.dictionary(root)
    made.encoder(root / "encoder", 16)
    sizes = {"sememe_size": 16, "heads": 2, "size": 8, "inner": 16}
    return tuned(root, "lexical_fusion", [f"source.options.{k}={v}" for k, v in sizes.items()])


def compiled(root, file, out, *changes, **options):
    asked = [f"source.checkpoint={root / 'checkpoint'}", "bench=false", "targets=[ort]", *changes]
    read = recipe.read(EXAMPLES / file, [*asked, "calib.samples=8"], data_place=root)
    return compiler.run(read, out, threads=1, **options)


def test_a_task_is_pruned_taught_again_and_rounded_by_what_it_costs(conversations, tmp_path):
    few = ["passes.1.align=null", "passes.2.samples=24", "passes.2.held=8", "passes.2.steps=4",
           "passes.2.every=2", "passes.2.precision=f32"]  # fmt: skip
    made = compiled(conversations, "cer/pruned.yaml", tmp_path / "out", *few, allow_worse=True)
    gate = made.report["gate"]
    assert gate["verdict"] and any(check["name"] == "metric cer" for check in gate["checks"])
    decisions = json.loads((tmp_path / "out" / "decisions.json").read_text(encoding="utf-8"))
    (pruned,) = (value for key, value in decisions.items() if key.endswith("prune-dims"))
    assert "intermediate" in json.dumps(pruned)
    whole = load(guess(str(conversations / "checkpoint"))).module
    widths = [len(p) for n, p in whole.named_parameters() if n.endswith("intermediate.dense.bias")]
    assert widths == [32]
    found = solving.solve(tmp_path / "out", conversations / "valid.csv", "cer", threads=1)
    assert len(found.answers) == 8
    assert package.read(tmp_path / "out").kind == "task:cer"


def test_a_task_in_few_bits_is_held_to_its_own_score(paragraphs, tmp_path):
    made = compiled(
        paragraphs, "lexical_fusion/noisyquant.yaml", tmp_path / "out", allow_worse=True
    )
    checks = {check["name"]: check for check in made.report["gate"]["checks"]}
    assert "metric lexical-fusion" in checks
    assert set(made.report["metric"]["parts"]) >= {"mentions", "tuples"}
    found = solving.solve(tmp_path / "out", paragraphs / "valid.jsonl", "lexical-fusion", threads=1)
    assert len(found.answers) == 8
