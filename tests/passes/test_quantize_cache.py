"""Keys and values go into the cache as integers, and every engine of a model reads them as the same numbers."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import effc
from effc import package
from effc.backends.dialect import DIALECTS
from effc.calib.collectors import Heads
from effc.calib.data import Batch
from effc.causal import PAST, ROLES, carried, complete, in_steps, typed
from effc.compiler import trace_source
from effc.errors import PreconditionError
from effc.passes.quantize import Quantize
from effc.passes.quantize_cache import HEADROOM, QuantizeCache, places, turned
from effc.source import load
from kit import assert_letter, cli

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_generate import FAMILIES, PROMPTS, saved

TEXT = (
    "the cat sat on the mat\na bird saw them go home\nit was warm and then rain\nthe mat was warm\n"
    * 4
)
SIZES = [(2, 8)] * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small llama whose numbers are tame, and the text that it is calibrated on."""
    place = tmp_path_factory.mktemp("cache")
    saved(place / "model")
    (place / "text.txt").write_text(TEXT)
    return place


def traced(place):
    source = load({"transformers": str(place / "model")})
    return source, trace_source(source)


def batches(seed=0, rows=2, length=12):
    """Batches of ids without padding, and one that is padded at the left with what would widen every range."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(4, 60, (rows, length))
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    for found in (np.ones_like(ids), mask):
        yield complete({"input_ids": ids, "attention_mask": found}, SIZES)


def as_batches(made):
    return [Batch(inputs=feeds) for feeds in made]


def test_new_keys_and_values_are_rounded_and_old_ones_are_not(model):
    _, program = traced(model)
    before = program.clone()
    record = effc.apply(QuantizeCache(), program, as_batches(batches()))
    graph = program.only()
    assert record.sites == 4
    ports = {
        name: node.meta["val"].dtype for name, node in zip(graph.inputs, users(graph), strict=True)
    }
    assert {d for n, d in ports.items() if n.startswith(PAST)} == {torch.int8}
    feeds = {n: torch.from_numpy(v) for n, v in next(batches()).items()}
    first = graph.run(feeds)
    exact = before.run(feeds)
    for name, steps in record.decisions.items():
        port = name.removeprefix("main/").replace(PAST, "present")
        assert first[port].dtype == torch.int8
        scale = torch.tensor(steps)[:, None, :]
        if ".0." in port:  # what the next layer sees is rounded
            assert bool(((first[port] * scale - exact[port]).abs() <= 0.501 * scale).all())
    later = {n: torch.from_numpy(v) for n, v in next(batches(2, length=1)).items()}
    later["attention_mask"] = torch.ones(2, 13, dtype=torch.int64)
    later["position_ids"] = torch.full((2, 1), 12)
    second = graph.run({**later, **carried(first)})
    for name, codes in first.items():
        if name != "logits":
            assert torch.equal(second[name][:, :, :12], codes)


def users(graph):
    placeholders = graph.placeholders()
    return [placeholders[str(n)] for n in graph.exported.graph_signature.user_inputs]


def test_numbers_are_taken_for_codes_that_mean_them(model):
    _, program = traced(model)
    effc.apply(QuantizeCache(), program, as_batches(batches()))
    graph = program.only()
    feeds = next(batches(3))
    tensors = {n: torch.from_numpy(v) for n, v in feeds.items()}
    codes = carried(graph.run(tensors))
    scale = {n: graph.tensors()[graph.codes[n]] for n in codes}
    numbers = {n: c * scale[n] for n, c in codes.items()}
    more = {n: torch.from_numpy(v) for n, v in complete(
        {"input_ids": feeds["input_ids"][:, :1], "attention_mask": np.ones((2, 1), np.int64)}, SIZES, 12
    ).items()}  # fmt: skip
    by_codes, by_numbers = graph.run({**more, **codes}), graph.run({**more, **numbers})
    assert torch.equal(by_codes["logits"], by_numbers["logits"])


def test_padding_does_not_widen_a_range():
    seen = Heads()
    values = torch.ones(2, 3, 4, 8)
    values[0, :, :2] = 100
    mask = torch.ones(2, 4)
    mask[0, :2] = 0
    seen.update(values, mask)
    assert seen.most.max() == 1
    seen.update(values)
    assert seen.most.shape == (3, 8) and seen.most.max() == 100


def test_channels_that_are_turned_into_each_other_have_the_size_of_both():
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 5, 8, generator=draw)
    keys[..., 4:] *= 0.01
    seen = Heads(turned=8)
    seen.update(keys)
    angle = torch.linspace(0, 7, 300)[:, None, None, None, None]  # whatever the position is
    left, right = keys.chunk(2, -1)
    now = torch.cat(
        [left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1
    )
    most = now.abs().amax((0, 1, 3))
    assert bool((most <= torch.from_numpy(seen.most) * (1 + 1e-5)).all())
    plain = Heads()
    plain.update(keys)
    assert bool((most[:, 4:] > torch.from_numpy(plain.most)[:, 4:]).all())


def test_half_the_data_each_make_the_whole():
    x = torch.randn(4, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    for channels in (0, 4, 8):
        left, right, whole = (Heads(turned=channels) for _ in range(3))
        left.update(x[:1])
        right.update(x[1:])
        whole.update(x)
        assert np.array_equal(left.merge(right).most, whole.most)
        assert np.array_equal(Heads(turned=channels).merge(whole).most, whole.most)
    assert whole.range(None) == (-whole.most.max(), whole.most.max())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_places(tmp_path, family):
    saved(tmp_path / "model", family)
    _, program = traced(tmp_path)
    found = places(program.only())
    assert len(found) == 4
    channels = {turned(place.new) for place in found if place.port.endswith(".key")}
    assert channels == {0 if family == "gpt2" else 8}
    assert not any(turned(place.new) for place in found if place.port.endswith(".value"))


def test_it_is_refused_behind_what_rounds(model):
    _, program = traced(model)
    effc.apply(Quantize(activation_bits=16), program)
    with pytest.raises(PreconditionError, match="something is rounded already"):
        effc.apply(QuantizeCache(), program, as_batches(batches()))
    _, program = traced(model)
    effc.apply(QuantizeCache(), program, as_batches(batches()))
    with pytest.raises(PreconditionError, match="something is rounded already"):
        effc.apply(QuantizeCache(), program, as_batches(batches()))


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(PreconditionError, match="takes no cache"):
        effc.apply(QuantizeCache(), effc.trace(torch.nn.Linear(4, 2), torch.ones(1, 4)))


@pytest.fixture(scope="module")
def packages(model):
    """One engine, and two of other bits each, with a cache of integers."""
    words = ("--calib", model / "text.txt", "--no-bench", "--kv-cache", "int8")
    ran = cli("compile", model / "model", "-o", model / "one", *words)
    assert ran.code == 0, ran.err
    bits = ("--quantize", "prefill=w8a16,decode=w8a16")
    ran = cli("compile", model / "model", "-o", model / "two", *bits, *words)
    assert ran.code == 0, ran.err
    return model


@pytest.mark.slow
def test_two_engines_read_each_others_cache(packages):
    manifest = package.read(packages / "two")
    grids = {p.grid for e in manifest.engines for p in e.inputs if p.name == f"{PAST}.0.key"}
    assert len(grids) == 1 and grids != {""}
    assert {(link.dtype, len(link.grid)) for link in manifest.links} == {("int8", 64)}
    ids = np.array([[2, 9, 17, 30, 11, 25, 40, 8]])
    feeds = typed(complete({"input_ids": ids, "attention_mask": np.ones_like(ids)}, SIZES), dict.fromkeys(
        [f"{PAST}.{n}.{s}" for n in (0, 1) for s in ("key", "value")], "int8"
    ))  # fmt: skip
    with (
        effc.Engine.open(packages / "two", "prefill", threads=1) as prefill,
        effc.Engine.open(packages / "two", "decode", threads=1) as decode,
    ):
        apart = in_steps(
            lambda given: (decode if given["input_ids"].shape[1] == 1 else prefill)(given), 7
        )
        together = prefill(feeds)["logits"][:, -1:]
        assert np.abs(apart(feeds)["logits"] - together).max() < 0.05 * np.abs(together).max()


@pytest.mark.slow
def test_the_engine_that_writes_attends_on_integers(packages):
    import onnx

    ops = {
        role: {n.op_type for n in onnx.load(packages / "two" / role / "model.onnx").graph.node}
        for role in ROLES
    }
    assert "GroupQueryAttention" in ops["decode"] and "Attention" not in ops["decode"]
    assert "Attention" in ops["prefill"]  # slower on codes, benchmarks/cache.py


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "two"])
def test_commands_take_it(packages, name, tmp_path):
    words = [w for p in PROMPTS for w in ("--prompt", p)]
    ran = cli("run", packages / name, *words, "--max-tokens", 8, "--json", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    assert [len(row) for row in json.loads((tmp_path / "r.json").read_text())["tokens"]] == [
        8,
        8,
        8,
    ]
    model_ = ("--model", packages / "model")
    ran = cli("verify", packages / name, *model_)
    assert ran.code == 0 and "1x3 behind 17" in ran.out, ran.err
    ran = cli("bench", packages / name, *model_, "--shapes", "1x1+8", "--budget", "0.3")
    assert ran.code == 0, ran.err
    ran = cli("explain", packages / name, *model_)
    assert ran.code == 0, ran.err
    for layout in ("onnxruntime-genai", "transformers.js"):
        ran = cli("package", packages / name, "--layout", layout, "-o", tmp_path / layout)
        assert_letter(ran, "UsageError", 2, "a cache of integers")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [({"grid": "0" * 64}, "mean other numbers"), ({"dtype": "float32", "grid": ""}, "is given")],
    ids=["other codes", "floats"],
)
def test_an_engine_of_another_cache_is_no_link(packages, change, told):
    made = package.read(packages / "two")
    ports = [
        replace(p, **change) if p.name == f"{PAST}.0.key" else p for p in made.engines[1].inputs
    ]
    engines = (made.engines[0], replace(made.engines[1], inputs=tuple(ports)))
    found = package.broken_links(replace(made, engines=engines))
    assert found and all(told in line for line in found)


def test_a_word_that_is_no_cache_is_refused(tmp_path):
    ran = cli("compile", tmp_path, "-o", tmp_path / "out", "--kv-cache", "int4")
    assert_letter(ran, "UsageError", 2, "int4")


def test_no_target_gets_what_it_does_not_take(model):
    _, program = traced(model)
    with pytest.raises(PreconditionError, match="tensorrt takes no cache of integers"):
        effc.apply(QuantizeCache(), program, as_batches(batches()), dialect=DIALECTS["tensorrt"])


def test_codes_reach_further_than_what_was_seen(model):
    _, program = traced(model)
    record = effc.apply(QuantizeCache(), program, as_batches(batches()))
    graph = program.only()
    feeds = next(batches())
    present = graph.run({n: torch.from_numpy(v) for n, v in feeds.items()})
    assert record.decisions and HEADROOM > 1
    first = [v for n, v in present.items() if ".0." in n]
    assert all(127 / HEADROOM - 40 < int(v.abs().max()) <= 127 / HEADROOM + 1 for v in first)
