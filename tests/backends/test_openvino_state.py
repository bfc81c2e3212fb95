"""A language model whose cache OpenVINO holds: the same text, the fused kernel, and what does not fit is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_generate import FAMILIES, PROMPTS, expected, saved

import effc
from effc import bench, recipe
from effc.backends.openvino import OpenVino
from effc.backends.openvino_state import Held, StatefulEngine, pairs
from effc.backends.options import OpenVinoOptions
from effc.causal import KEEP, PAST, ROLES, complete, positions, shapes
from effc.compiler import trace_source
from effc.errors import UsageError
from effc.generate import Sampling, tokens
from effc.source import load
from kit import assert_letter, cli

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _plain_processor(monkeypatch):
    monkeypatch.setenv("EFFC_CPU", "avx2")


class Model:
    """A tiny random model of a family, lowered once for each way to keep its cache."""

    def __init__(self, place, family):
        self.place = place
        self.source = load({"transformers": str(saved(place / "model", family))})
        self.graph = trace_source(self.source).only()
        self.cache = shapes(self.source.module.config)
        self.lowered = {}

    def open(self, cache="inside"):
        if cache not in self.lowered:
            asked = OpenVinoOptions(cache=cache)
            self.lowered[cache] = OpenVino(asked).lower(self.graph, self.place / cache)
        return OpenVino().open(self.lowered[cache], threads=1)

    def feeds(self, rows=2, length=5, past=0):
        ids = np.random.default_rng(length).integers(4, 60, (rows, length))
        return complete({"input_ids": ids, "attention_mask": np.ones_like(ids)}, self.cache, past)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def make(family="llama"):
        if family not in made:
            made[family] = Model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


@pytest.fixture
def llama(models):
    return models()


def kinds(engine):
    """Of every layer of a compiled model."""
    nodes = engine.compiled.get_runtime_model().get_ops()
    return [node.get_rt_info()["layerType"].astype(str) for node in nodes]


def next_feeds(feeds, found, token=7):
    """One token more, behind what a run gave."""
    mask = np.concatenate(
        [feeds["attention_mask"], np.ones((len(feeds["input_ids"]), 1), np.int64)], 1
    )
    past = {name: found[present] for name, present in pairs(feeds).items()}
    return {
        "input_ids": np.full((len(mask), 1), token), "attention_mask": mask,
        "position_ids": positions(mask, 1), KEEP: np.array([0]), **past,
    }  # fmt: skip


def distance(wanted, found):
    return float(np.linalg.norm(wanted - found) / np.linalg.norm(wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(models, family):
    """Rows of unequal length, padded at the left, and one alone after them in the same engine."""
    import transformers

    model = models(family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.place / "model")
    with model.open() as engine:
        assert isinstance(engine, StatefulEngine)
        for prompts in (PROMPTS, PROMPTS[:1], PROMPTS):
            ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
            steps = tokens(
                lambda feeds: engine.carry(feeds, ("logits",)), model.cache, ids,
                sampling=Sampling(max_tokens=24), ends=[3], pad=0, context=96,
            )  # fmt: skip
            rows = [[t for t in row if t is not None] for row in zip(*steps, strict=True)]
            assert rows == expected(model.place, prompts, 24)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_attention_and_the_growing_of_its_cache_are_one_layer(models, family):
    """But for Gemma 2, which bends the scores of its attention, so that it is no whole operator."""
    with models(family).open() as engine:
        found = kinds(engine)
    assert found.count("ScaledDotProductAttention") == 2 and found.count("MemoryInput") == 4
    with models(family).open("ports") as engine:
        assert not {"ScaledDotProductAttention", "MemoryInput"} & set(kinds(engine))


def test_the_manifest_says_where_the_cache_is_and_in_which_type(llama):
    for asked, told in (("auto", "ports"), ("inside", "f32"), ("u8", "u8"), ("ports", "ports")):
        llama.open(asked).close()
        assert llama.lowered[asked].options == {
            "precision": "f32",
            "hint": "latency",
            "cache": told,
        }
        assert llama.lowered[asked].is_float == (asked != "u8")
        assert [p.name for p in llama.lowered[asked].inputs][-1] == f"{PAST}.1.value"


def test_a_cache_of_arrays_goes_in_and_out_as_from_ports(llama):
    with llama.open() as held, llama.open("ports") as ported:
        for feeds in (llama.feeds(), llama.feeds(past=9), llama.feeds(1, 1, 31), llama.feeds(3, 4)):
            found, wanted = held(feeds), ported(feeds)
            assert found.keys() == wanted.keys()
            assert all(distance(wanted[name], found[name]) < 1e-5 for name in wanted)


def test_a_cache_in_8_bit_is_near_and_not_the_same(llama):
    with llama.open("u8") as rough, llama.open() as exact:
        first = llama.feeds(2, 20)
        found = [engine(next_feeds(first, engine(first)))["logits"] for engine in (exact, rough)]
    assert 1e-5 < distance(*found) < 0.1


def test_a_cache_goes_from_one_engine_to_another(llama):
    """From ports into variables, and from one that holds it to another that will."""
    feeds = llama.feeds()
    with llama.open("ports") as ported, llama.open() as first, llama.open() as second:
        given = ported(feeds)
        wanted = ported(next_feeds(feeds, given))["logits"]
        assert distance(wanted, second.carry(next_feeds(feeds, given), ())["logits"]) < 1e-5
        held = first.carry(feeds, ("logits",))
        assert isinstance(held["present.0.key"], Held)
        assert distance(wanted, second.carry(next_feeds(feeds, held), ())["logits"]) < 1e-5


def test_what_is_held_no_more_cannot_be_carried_on(llama):
    feeds = llama.feeds()
    with llama.open() as engine:
        old = engine.carry(feeds, ("logits",))
        new = engine.carry(next_feeds(feeds, old), ("logits",))
        for stale in (old, {**new, "present.1.value": old["present.1.value"]}):
            with pytest.raises(UsageError, match="holds no more"):
                engine.carry(next_feeds(feeds, stale), ("logits",))
        longer = {**feeds, "attention_mask": np.ones((2, 6), np.int64)}
        engine.carry(next_feeds(longer, new), ("logits",))  # the last one is held still


TOKENS = ("input_ids", "attention_mask", "position_ids")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda feeds: {name: feeds[name][:1] for name in TOKENS}, "2 rows"),
        (lambda feeds: {"attention_mask": feeds["attention_mask"][:, 1:]}, "5 positions"),
        (lambda feeds: {f"{PAST}.1.key": np.zeros((2, 2, 3, 8), np.float32)}, "other rows"),
    ],
)
def test_another_batch_or_mask_half_way_is_refused(llama, change, part):
    feeds = llama.feeds()
    with llama.open() as engine:
        found = engine.carry(feeds, ("logits",))
        following = next_feeds(feeds, found)
        with pytest.raises(UsageError, match=part):
            engine.carry({**following, **change(following)}, ("logits",))


def test_layers_of_unequal_length_are_refused(llama):
    feeds = {**llama.feeds(past=3), f"{PAST}.1.key": np.zeros((2, 2, 4, 8), np.float32)}
    with llama.open() as engine, pytest.raises(UsageError, match="other rows or positions"):
        engine(feeds)


def test_a_clock_sees_steps_behind_the_past_that_was_asked_for(llama):
    feeds = llama.feeds(1, 1, 12)
    with llama.open() as engine:
        lengths = []
        for _ in range(40):
            given = engine.ready(feeds)
            lengths.append(given["attention_mask"].shape[1])
            assert isinstance(engine(given)["present.0.key"], Held)
        assert min(lengths) == 14 and max(lengths) == 12 + 32 + 1
        assert lengths.count(14) == 2  # begun anew once
        first = engine(engine.ready(llama.feeds(1, 6)))["logits"]
        assert np.array_equal(first, engine(engine.ready(llama.feeds(1, 6)))["logits"])
        case = bench.Case(batch=1, length=1, past=12, feeds=feeds)
        timed = bench.compare({"engine": lambda: llama.open()}, [case], threads=1, budget_s=0.2)
        assert timed.shapes[0].timings["engine"].median_ms > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", ["ports", "inside"])
def test_an_engine_opened_again_gives_the_same(models, family, cache, tmp_path, monkeypatch):
    """Whether it comes from the cache of compiled models or is compiled anew."""
    model = models(family)
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "cache"))
    feeds, found = model.feeds(past=4), []
    for _ in range(2):
        with model.open(cache) as engine:
            found.append(engine(feeds))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


# Packages


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Packages for openvino: of one engine, and of one that reads and one that writes."""
    found = tmp_path_factory.mktemp("packages")
    source = {"transformers": str(saved(found / "model", eos_token_id=None))}
    held = {"openvino": {"cache": "inside"}}
    for name, more, target in (("one", {}, held), ("two", {"roles": list(ROLES)}, "openvino")):
        content = {"source": {**source, **more}, "targets": [target], "bench": False}
        effc.compile(recipe.build(content), found / name)
    return found


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_package_writes_what_transformers_writes_up_to_the_context(place, name, tmp_path):
    words = [w for p in PROMPTS for w in ("--prompt", p)]
    ran = cli("run", place / name, *words, "--max-tokens", 500, "--json", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "r.json").read_text())["tokens"]
    wanted = expected(place, PROMPTS, len(found[0]))
    assert found == wanted and len(found[0]) == 96 - 13


def test_the_documented_program_writes_the_same(place):
    import transformers

    text = (Path(__file__).parents[2] / "docs/deploy.md").read_text()
    code = text.partition("<!-- run by tests/backends/test_openvino_state.py")[2]
    found = {}
    exec(code.partition("```python\n")[2].partition("```")[0], found)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    ids = tokenizer(PROMPTS[0])["input_ids"]
    assert [found["write"](place / "one", ids, 24)] == expected(place, PROMPTS[:1], 24)


def test_the_engine_that_only_reads_has_ports(place):
    options = {
        entry["role"]: entry["options"]["cache"]
        for entry in json.loads((place / "two" / "manifest.json").read_text())["engines"]
    }
    assert options == {"prefill": "ports", "decode": "f32"}


@pytest.mark.parametrize(("name", "target"), [("one", "openvino"), ("two", "decode")])
def test_a_package_is_timed_and_verified_as_it_runs(place, name, target, tmp_path):
    model = ("--model", place / "model", "--target", target)
    ran = cli(
        "bench", place / name, *model, "--shapes", "1x1+8,1x1+300", "--budget", "0.3",
        "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    (shape,) = json.loads((tmp_path / "b.json").read_text())["shapes"]
    assert (shape["length"], shape["past"]) == (1, 8)
    ran = cli("verify", place / name, "--model", place / "model")
    assert ran.code == 0, ran.err


def test_a_place_for_the_cache_that_there_is_not_is_a_letter(place, tmp_path):
    content = {
        "source": {"transformers": str(place / "model")}, "targets": [{"openvino": {"cache": "u2"}}],
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(content))
    assert_letter(
        cli("compile", tmp_path / "r.yaml", "-o", tmp_path / "out"), "RecipeError", 3, "u8"
    )
