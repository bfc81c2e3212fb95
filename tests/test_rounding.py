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
from effc.recipe import build, passes_of
from effc.samples import Samples
from effc.source import load

DATA = Path(os.environ.get("EFFC_DATA", Path(__file__).parents[2] / "shared" / "data"))
MODEL, TEXTS = DATA / "stories260k-llama", DATA / "tinystories"


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL.is_dir() and TEXTS.is_dir()), reason="the data set is not here")
def test_gptq_and_awq_cost_less_perplexity_than_nearest_rounding(tmp_path):
    source = load({"transformers": str(MODEL)})
    original, metric = trace_source(source), Perplexity(file=TEXTS / "valid_sample.txt")
    found = {}
    for word in ("w4a16", "w4a16-awq", "w4a16-gptq"):
        asked = build({
            "source": {"transformers": str(MODEL)},
            "calib": {"file": str(TEXTS / "train_head.txt")},
            "passes": passes_of(word, ["ort"]),
        })  # fmt: skip
        builder = Builder(
            recipe=asked, source=source, samples=Samples(source, asked.calib), original=original,
            progress=Progress(), cache=Cache(None),
        )  # fmt: skip
        lowered = builder.build("ort", tmp_path / word).first
        assert {site.kernel for site in lowered.sites if "proj" in site.name} == {"MatMulNBits"}
        found[word] = metric.value(measure.of_engine(source, lowered, metric, 1))
    plain = metric.value(measure.of_model(source, original.only(), metric, 1))
    assert plain < found["w4a16-gptq"] < found["w4a16-awq"] < found["w4a16"]
