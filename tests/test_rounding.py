"""What rounding by data is for: 4-bit weights that cost a language model less than rounded to the nearest."""

import os
from pathlib import Path

import pytest

from effc import measure
from effc.build import Builder
from effc.cache import Cache
from effc.compiler import trace_source
from effc.metrics import Perplexity
from effc.progress import Progress
from effc.recipe import build
from effc.samples import Samples
from effc.source import load

DATA = Path(os.environ.get("EFFC_DATA", Path(__file__).parents[2] / "shared" / "data"))
MODEL, TEXT = DATA / "stories260k-llama", DATA / "tinystories" / "train_head.txt"
GRID = {"bits": 4, "group": 32, "weight_symmetric": False}
NEAREST = {"pass": "quantize", "activation_bits": 16, "weight_range": "mse", **GRID}
ARMS = {
    "nearest": [NEAREST],
    "awq": [{"pass": "awq", **GRID}, NEAREST],
    "gptq": [{**NEAREST, "rounding": "gptq"}],
}


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL.is_dir() and TEXT.is_file()), reason="the data set is not here")
def test_gptq_and_awq_cost_less_perplexity_than_nearest_rounding(tmp_path):
    """Calibrated on the first half of a text, measured on its last eighth."""
    lines = TEXT.read_text(encoding="utf-8").splitlines(keepends=True)
    seen, unseen = tmp_path / "seen.txt", tmp_path / "unseen.txt"
    seen.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    unseen.write_text("".join(lines[-len(lines) // 8 :]), encoding="utf-8")
    source, found = load({"transformers": str(MODEL)}), {}
    original, metric = trace_source(source), Perplexity(file=unseen)
    for name, passes in ARMS.items():
        asked = build({
            "source": {"transformers": str(MODEL)}, "calib": {"file": str(seen)}, "passes": passes,
        })  # fmt: skip
        builder = Builder(
            recipe=asked, source=source, samples=Samples(source, asked.calib), original=original,
            progress=Progress(), cache=Cache(None),
        )  # fmt: skip
        lowered = builder.build("ort", tmp_path / name).first
        assert {site.kernel for site in lowered.sites if "proj" in site.name} == {"MatMulNBits"}
        found[name] = metric.value(measure.of_engine(source, lowered, metric, 1))
    plain = metric.value(measure.of_model(source, original.only(), metric, 1))
    assert plain < min(found["gptq"], found["awq"])
    assert max(found["gptq"], found["awq"]) < found["nearest"]
