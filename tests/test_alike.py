"""Two engines of a model that go on with each other's cache: pruned, trained and rounded there alike, or not at all."""

import json

import pytest
from test_generate import saved

from effc import compiler, package, recipe, tuning
from effc.alike import partners, refuse_unlike, shared
from effc.causal import DECODE, PREFILL, ROLES
from effc.errors import GateRefused, PreconditionError, RecipeError
from effc.passes import pipeline
from effc.progress import Progress
from effc.source import load
from effc.timing import Clock
from effc.trial import Lab
from kit import cli

TEXT = (
    "the cat sat on the mat\na bird saw them go home\nit was warm and then rain\nthe mat was warm\n"
    * 4
)
NEVER = '''
import numpy as np


def never(run, processor, file):
    """Right for the model, which is asked first, and wrong for every engine."""
    never.asked += 1
    return {"score": np.full(100, float(never.asked == 1))}


never.asked = 0
'''
PRUNE = {"pass": "prune-dims", "ratio": 0.25, "groups": "*mlp*"}
TUNE = {"pass": "tune", "steps": 2, "batch": 4, "held": 2, "samples": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small llama with its text."""
    found = tmp_path_factory.mktemp("alike")
    saved(found / "model")
    (found / "text.txt").write_text(TEXT)
    return found


def made(place, *passes, **changes):
    return recipe.build({
        "source": {"transformers": str(place / "model"), "roles": list(ROLES)}, "bench": False,
        "calib": {"file": str(place / "text.txt"), "samples": 8}, "gate": False,
        "passes": list(passes), **changes,
    })  # fmt: skip


def on(role, pass_):
    named = {"pass": pass_} if isinstance(pass_, str) else pass_
    return {**named, "graphs": [role]}


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ([on(DECODE, PRUNE)], "passes[0]: prune-dims for decode alone"),
        ([on(PREFILL, TUNE)], "passes[0]: tune for prefill alone"),
        (["drop-noops", on(PREFILL, "quantize-cache")], "passes[1]: quantize-cache for prefill"),
        ([on(PREFILL, PRUNE), on(DECODE, {**PRUNE, "ratio": 0.5})], "prune-dims for prefill alone"),
    ],
    ids=["prune", "tune", "cache", "two options"],
)
def test_what_makes_another_model_of_one_engine_is_refused_before_any_work(place, passes, told):
    progress = Progress()
    with pytest.raises(RecipeError) as letter:
        compiler.run(made(place, *passes), place / "none", progress=progress)
    assert told in str(letter.value) and "leave `graphs` out" in str(letter.value)
    assert set(progress.stages) == {"load"} and not (place / "none").exists()


def test_what_is_for_one_engine_alone_stands_behind_what_both_have_alike(place):
    smooth, cache = on(PREFILL, "smooth"), "quantize-cache"
    source = load(made(place).source.as_mapping())
    with pytest.raises(RecipeError, match="find the same graph in prefill and decode") as letter:
        refuse_unlike(made(place, smooth, cache).passes, source)
    assert "put `smooth` behind `quantize-cache`" in str(letter.value)
    refuse_unlike(made(place, cache, smooth).passes, source)


def test_partners_are_of_one_graph_and_linked(place):
    source = load(made(place).source.as_mapping())
    passes = made(place, "drop-noops", PRUNE, on(PREFILL, "quantize")).passes
    assert partners(source, PREFILL) == partners(source, DECODE) == list(ROLES)
    assert shared(passes, source, DECODE) == {1}
    alone = load({"transformers": str(place / "model")})
    assert partners(alone, "main") == ["main"] and not shared(passes, alone, "main")


def test_heads_of_a_cache_are_no_group_that_can_be_pruned(place):
    heads = {"pass": "prune-dims", "ratio": 0.5, "groups": "*self_attn.q_proj:0"}
    with pytest.raises(PreconditionError, match="can lose a unit") as letter:
        compiler.run(made(place, heads), place / "none")
    assert "the input 'past_key_values.0.key' has it" in str(letter.value)


@pytest.mark.slow
def test_the_first_engine_decides_and_the_second_takes_it_over(place, tmp_path, monkeypatch):
    calibrated, trained, timed = [], [], []
    collect, fit = pipeline.collect, tuning.fit

    def collected(graph, *given, **options):
        calibrated.append(graph.role)
        return collect(graph, *given, **options)

    def fitted(*given, **options):
        trained.append(1)
        return fit(*given, **options)

    monkeypatch.setattr(pipeline, "collect", collected)
    monkeypatch.setattr(tuning, "fit", fitted)
    monkeypatch.setattr(Clock, "__call__", lambda self, graphs: _times(graphs, timed))
    prune = {**PRUNE, "importance": "taylor", "align": "auto"}
    passes = [prune, TUNE, "quantize-cache", on(PREFILL, {"pass": "quantize", "bits": 8})]
    compiler.run(made(place, *passes), tmp_path / "out")

    decided = json.loads((tmp_path / "out" / "decisions.json").read_text())
    for step in ("0:prune-dims", "1:tune", "2:quantize-cache"):
        mine, theirs = (
            {key.removeprefix(f"{role}/"): v for key, v in decided[f"{role}/{step}"].items()}
            for role in ROLES
        )
        assert mine == theirs and mine
    assert calibrated == [PREFILL] * 3  # prune-dims, quantize-cache, and quantize of its own
    assert len(trained) == 1 and set(timed) == {PREFILL}
    assert not package.check(tmp_path / "out")
    ran = cli("run", tmp_path / "out", "--prompt", "the cat sat", "--max-tokens", 4)
    assert ran.code == 0, ran.err


def _times(graphs, seen):
    roles = [graph.role for graph in graphs]
    seen += roles
    return [[1.0 + number / 100] * 5 for number in range(len(roles))]


@pytest.mark.slow
def test_a_checkpoint_is_for_both_engines(place, tmp_path):
    asked = made(place, PRUNE, TUNE)
    compiler.tune(asked, tmp_path / "ck")
    names = {file.name for file in (tmp_path / "ck").glob("*.safetensors")}
    assert names == {"1.prefill.safetensors", "1.decode.safetensors"}
    compiler.run(asked, tmp_path / "out", tuned=tmp_path / "ck")
    decided = json.loads((tmp_path / "out" / "decisions.json").read_text())
    assert (
        decided["prefill/1:tune"]["prefill/tensors"] == decided["decode/1:tune"]["decode/tensors"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "alike"),
    [([PRUNE, "quantize-cache", "quantize"], 2), (["mixed-precision", PRUNE], 2)],
    ids=["behind", "in front"],
)
def test_no_search_takes_back_for_one_engine_what_both_have(
    place, tmp_path, monkeypatch, passes, alike
):
    """What stands in front of a pass that both have stays too: the pass is to find one graph in both."""
    tried, attempt = [], Lab.attempt

    def watched(lab, built, rollback, **options):
        tried.append(rollback)
        return attempt(lab, built, rollback, **options)

    monkeypatch.setattr(Lab, "attempt", watched)
    (tmp_path / "never.py").write_text(
        NEVER
    )  # a metric that no engine meets, of this test alone: it counts
    asked = made(
        place, *passes, gate={"latency": False},
        metric={f"{tmp_path}/never.py:never": str(place / "text.txt")},
    )  # fmt: skip
    with pytest.raises(GateRefused) as letter:
        compiler.run(asked, tmp_path / "out")
    for pass_ in passes[:alike]:
        name = pass_ if isinstance(pass_, str) else pass_["pass"]
        assert f"{name} is not taken back for one engine alone" in str(letter.value)
    assert not (tmp_path / "out").exists()
    assert bool(tried) == (len(passes) > alike)
    assert all(min({*t.dropped, *t.excluded}) >= alike for t in tried)


@pytest.mark.slow
def test_a_plan_counts_once_what_is_done_once(place, tmp_path):
    words = ("--quantize", "prefill=w8a8,decode=w8a8", "--ratio", 0.25, "--no-bench", "--plan")
    ran = cli(
        "compile", place / "model", "-o", tmp_path / "out", *words, "--calib", place / "text.txt"
    )
    assert ran.code == 0, ran.err
    assert ran.out.count("prune-dims") == 1 and ran.out.count("quantize") == 2
