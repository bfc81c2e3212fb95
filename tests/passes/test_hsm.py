"""Modules behind every writer of a stream change nothing at first, and fold away with the width that they mask."""

import dataclasses
import json
import logging
import random
from collections import Counter
from pathlib import Path

import architectures
import numpy as np
import pytest
import torch
import yaml
from architectures import CONVERTED, FAMILIES, program_of
from graphs import assert_graph, engine, ops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import effc
from effc.errors import CalibrationError, PostconditionError, PreconditionError, TuneError
from effc.ir import axes
from effc.ir.check import drift
from effc.ir.edit import rebind, tensor_of
from effc.ir.splice import attached
from effc.ir.values import Values
from effc.nn.hsm import HARD, Gate, Hybrid, centred, gate, hard, kept
from effc.passes import hsm_fold, prune_dims
from effc.passes.coupling import coupled_dims
from effc.passes.hsm import HardenHsm, InsertHsm
from effc.passes.hsm_fold import FoldHsm
from effc.passes.layernorm import LayerNormToRMSNorm
from effc.passes.lora import AttachLora, MergeLora
from effc.passes.prune_dims import PruneDims
from effc.passes.quantize import Quantize
from effc.passes.rank1 import AttachRank1
from effc.passes.rank1_fold import BatchRank1
from effc.passes.tune import Tune
from effc.train.hsm import Hsm, schedule, sides
from kit import assert_letter, cli

WORDS = 23


class Stream(nn.Module):
    """A table, one layer with attention of grouped queries, a gated one, and the words again."""

    def __init__(
        self, width: int = 16, *, heads: int = 2, kv: int = 1, tied: bool = False, bias: bool = False,
        eps: float = 1e-2, scale: float = 1.0, position: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv, self.scale = heads, kv, scale
        self.table = nn.Embedding(WORDS, width)
        self.place = nn.Parameter(torch.randn(1, 5, width)) if position else None
        self.q = nn.Linear(width, heads * 4, bias=bias)
        self.k, self.v = (nn.Linear(width, kv * 4, bias=bias) for _ in range(2))
        self.o = nn.Linear(heads * 4, width, bias=bias)
        self.up, self.side = (nn.Linear(width, 12, bias=bias) for _ in range(2))
        self.down = nn.Linear(12, width, bias=bias)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps) for _ in range(3))
        self.head = nn.Linear(width, WORDS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * self.scale
        if self.place is not None:
            x = x + self.place
        batch, length, _ = x.shape
        y = self.norms[0](x)
        q, k, v = (
            p(y).view(batch, length, -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, -1))
        y = self.norms[1](x)
        x = x + self.down(torch.nn.functional.silu(self.up(y)) * self.side(y))
        return self.head(self.norms[2](x))


IDS = torch.arange(15).reshape(3, 5) % WORDS
FEEDS = {"ids": IDS}


def stream(dtype: torch.dtype = torch.float32, seed: int = 0, **options):
    torch.manual_seed(seed)
    module = architectures.shaken(Stream(**options), seed).to(dtype)
    return effc.trace(module, FEEDS)


def inserted(program, **options):
    effc.apply(InsertHsm(**{"ratio": 0.25, **options}), program)
    return program


def stirred(program, seed=1, by=0.3):
    """Every trained tensor of the modules somewhere else."""
    graph = program.only()
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in graph.tensors().items():
        if name.startswith("hsm.") and name not in ("hsm.tau", "hsm.beta"):
            noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
            rebind(graph, name, (tensor.double() + by * noise).to(tensor.dtype), "stirred")
    return program


def hardened(program, **options):
    effc.apply(HardenHsm(), stirred(inserted(program, **options)))
    return program


def folded(program, feeds=FEEDS):
    """How far the folded graph is from the masked one, and the masked one from nothing at all."""
    wanted = program.run(feeds)
    effc.apply(FoldHsm(), program, probes={"main": [feeds]})
    return drift(wanted, program.run(feeds)).rel_l2


def shapes(program):
    return {name: tuple(t.shape) for name, t in program.only().tensors().items()}


# -- what is put in


def test_one_gate_and_one_module_behind_every_writer():
    class Short(Stream):
        def forward(self, ids):
            x = self.table(ids)
            return self.head(self.norms[1](x + self.o(self.q(self.norms[0](x)))))

    program = inserted(effc.trace(Short(), FEEDS), rank=2)
    assert_graph(
        program,
        """
        %ids: i64[batch, 5] = input
        %mul: f32[16] = mul(@hsm.tau, @hsm.mask)
        %sigmoid: f32[16] = sigmoid(%mul)
        %add_1: f32[16] = add(%sigmoid, @hsm.beta)
        %embedding: f32[batch, 5, 16] = embedding(@table.weight, %ids)
        %mul_1: f32[16] = mul(@hsm.table.scale, %add_1)
        %linear_3: f32[batch, 5, 2] = linear(%embedding, @hsm.table.down)
        %unsqueeze: f32[16, 1] = unsqueeze(%mul_1, 1)
        %mul_2: f32[16, 2] = mul(%unsqueeze, @hsm.table.up)
        %linear_4: f32[batch, 5, 16] = linear(%linear_3, %mul_2)
        %addcmul: f32[batch, 5, 16] = addcmul(%linear_4, %embedding, %mul_1)
        %rms_norm: f32[batch, 5, 16] = rms_norm(%addcmul, [16], @norms.0.weight, 0.01)
        %linear: f32[batch, 5, 8] = linear(%rms_norm, @q.weight)
        %linear_1: f32[batch, 5, 16] = linear(%linear, @o.weight)
        %mul_3: f32[16] = mul(@hsm.o.scale, %add_1)
        %linear_5: f32[batch, 5, 2] = linear(%linear_1, @hsm.o.down)
        %unsqueeze_1: f32[16, 1] = unsqueeze(%mul_3, 1)
        %mul_4: f32[16, 2] = mul(%unsqueeze_1, @hsm.o.up)
        %linear_6: f32[batch, 5, 16] = linear(%linear_5, %mul_4)
        %addcmul_1: f32[batch, 5, 16] = addcmul(%linear_6, %linear_1, %mul_3)
        %add: f32[batch, 5, 16] = add(%addcmul, %addcmul_1)
        %rms_norm_1: f32[batch, 5, 16] = rms_norm(%add, [16], @norms.1.weight, 0.01)
        %linear_2: f32[batch, 5, 23] = linear(%rms_norm_1, @head.weight)
        return output=%linear_2
        """,
    )


def test_each_place_is_known_by_the_layer_that_writes_it():
    program = inserted(stream(), rank=2)
    found = {n: s for n, s in shapes(program).items() if n.startswith("hsm.")}
    assert found == {
        "hsm.mask": (16,), "hsm.tau": (), "hsm.beta": (),
        **{f"hsm.{place}.{part}": shape for place in ("table", "o", "down")
           for part, shape in (("down", (2, 16)), ("up", (16, 2)), ("scale", (16,)))},
    }  # fmt: skip
    assert program.only().pending["hsm"]["places"] == ["table", "o", "down"]


MODES = [
    {"mode": mode, "mask": mask, "identity": identity}
    for mode in ("paper", "released", "effc")
    for mask in ("trained", "frozen", "random")
    for identity in (True, False)
]


@pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(map(str, o.values())))
def test_what_was_put_in_changes_no_bit(options):
    program = stream(bias=True, tied=True)
    before = program.run(FEEDS)["output"]
    inserted(program, **options)
    assert torch.equal(program.run(FEEDS)["output"], before)


FAMILY = ["llama", "llama with cache", "gemma", "gpt2", "siglip text", "vit"]


@pytest.mark.parametrize("family", FAMILY)
def test_families_take_modules_and_give_them_back(family):
    program, feeds = program_of(FAMILIES[family](random.Random(3)))
    if family in CONVERTED:
        with pytest.raises(PreconditionError, match="LayerNorm") as refused:
            inserted(program, rank=2)
        assert "layernorm-to-rmsnorm" in str(refused.value.hint)
        effc.apply(LayerNormToRMSNorm(), program)
    dense, before = program.clone(), program.run(feeds)
    inserted(program, rank=2)
    after = program.run(feeds)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    state = program.only().pending["hsm"]
    assert len(state["places"]) == 5  # two layers
    effc.apply(HardenHsm(), stirred(program))
    assert drift(before, program.run(feeds)).rel_l2 > 1e-2
    assert folded(program, feeds) <= 1e-5
    assert Counter(ops(program)) == Counter(ops(dense))
    assert linears(program) * state["width"] == linears(dense) * state["kept"]
    assert not any(name.startswith("hsm.") for name in shapes(program))


def linears(program):
    """Numbers in weights of linear layers."""
    graph = program.only()
    tensors = graph.tensors()
    names = {
        effc.ir.edit.tensor_name(graph, n.args[1])
        for n in graph.nodes if n.target is torch.ops.aten.linear.default
    }  # fmt: skip
    return sum(tensors[name].numel() for name in names)


def test_gemma_keeps_the_number_that_its_table_is_multiplied_with():
    program, feeds = program_of(FAMILIES["gemma"](random.Random(3)))

    def factors(of):
        graph = of.only()
        constants = {n: t for n, t in graph.tensors().items() if t.numel() == 1}
        literals = [a for n in graph.nodes for a in n.args if type(a) is float]
        return sorted([*literals, *(float(t) for t in constants.values())])

    before = factors(program)
    effc.apply(HardenHsm(), stirred(inserted(program, rank=2)))
    assert folded(program, feeds) <= 1e-5
    eps = 1e-3
    changed = [a for a, b in zip(before, factors(program), strict=True) if a != b]
    assert changed == [eps] * len(changed)


def test_an_encoder_with_positions_has_one_place_in_front_of_its_layers():
    program = inserted(stream(position=True), rank=2)
    assert program.only().pending["hsm"]["places"] == ["table", "o", "down"]
    effc.apply(HardenHsm(), stirred(program))
    assert folded(program) <= 1e-5
    assert shapes(program)["place"] == (1, 5, 8)


# -- masked and folded are one


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000), ratio=st.floats(0.05, 0.95), kv=st.sampled_from([1, 2]),
    flags=st.tuples(*[st.booleans()] * 4), mode=st.sampled_from(["paper", "released", "effc"]),
    dtype=st.sampled_from([torch.float32, torch.float64]), table=st.sampled_from(["full", "mask-only"]),
)  # fmt: skip
def test_masked_and_folded_are_one(seed, ratio, kv, flags, mode, dtype, table):
    tied, bias, identity, position = flags
    program = stream(
        dtype, seed, kv=kv, tied=tied, bias=bias, position=position, scale=1 if seed % 2 else 4.0
    )
    options = {"align": 1, "rank": 3, "mode": mode, "identity": identity, "embedding": table}
    try:
        inserted(program, ratio=ratio, seed=seed, **options)
    except PreconditionError:
        assert round(16 * (1 - ratio)) in (0, 16)
        return
    effc.apply(HardenHsm(), stirred(program, seed))
    assert folded(program) <= (1e-5 if dtype is torch.float32 else 1e-12)
    shape = shapes(program)
    assert shape["o.weight"][0] == shape["norms.2.weight"][0] == round(16 * (1 - ratio))


@pytest.mark.parametrize("part", ["gain", "epsilon", "scale", "basis"])
def test_nothing_of_the_fold_can_be_left_out(part, monkeypatch):
    program = hardened(stream(torch.float64), rank=3)
    wanted = program.run(FEEDS)
    monkeypatch.setattr(FoldHsm, "tolerance", 10.0)
    if part == "gain":
        monkeypatch.setattr(prune_dims, "_gains", lambda coupling, sizes: {})
    if part == "epsilon":
        write = prune_dims.write
        monkeypatch.setattr(
            prune_dims, "write",
            lambda node, path, value: None if type(value) is float else write(node, path, value),
        )  # fmt: skip
    if part in ("scale", "basis"):
        matrix = hsm_fold.matrix
        monkeypatch.setattr(
            hsm_fold, "matrix",
            lambda down, up, values, scale, width: matrix(
                *((down, up, values, None) if part == "scale" else (None, None, None, scale)),
                width=width,
            ),
        )  # fmt: skip
    effc.apply(FoldHsm(), program)
    assert drift(wanted, program.run(FEEDS)).rel_l2 > 1e-3


def test_the_fold_holds_itself_to_the_masked_graph(monkeypatch):
    program = hardened(stream(), rank=3)
    monkeypatch.setattr(prune_dims, "_gains", lambda coupling, sizes: {})
    with pytest.raises(PostconditionError, match="moved the outputs"):
        effc.apply(FoldHsm(), program, probes={"main": [FEEDS]})


@pytest.mark.parametrize("table", ["full", "mask-only"])
def test_dropped_channels_are_exactly_0_in_the_whole_stream(table):
    program = hardened(stream(bias=True, position=True), rank=3, embedding=table)
    graph = program.only()
    dropped = ~(graph.tensors()["hsm.keep"] > 0)
    assert int(dropped.sum()) == 8
    values = Values(graph, FEEDS, more=Counter(dict.fromkeys(graph.nodes, 1)))
    sums = [n for n in graph.nodes if ops_of(n) == "add" and n.meta["val"].dim() == 3]
    behind = [n for n in sums if any(ops_of(a) == "addcmul" for a in n.args[:2])]
    assert len(behind) == 2
    for node in behind:
        seen = values(node)
        assert bool((seen[..., dropped] == 0).all()) and bool((seen[..., ~dropped] != 0).all())


def ops_of(node):
    return effc.ir.select.op_name(node) if hasattr(node, "target") else ""


@pytest.mark.parametrize("table", ["full", "mask-only"])
def test_a_tied_table_is_untied_by_a_change_of_basis_alone(table):
    program = stream(tied=True)
    bytes_before = program.weight_bytes()
    effc.apply(HardenHsm(), stirred(inserted(program, rank=2, embedding=table)))
    wanted = program.run(FEEDS)
    record = effc.apply(FoldHsm(), program, probes={"main": [FEEDS]})
    assert drift(wanted, program.run(FEEDS)).rel_l2 <= 1e-5
    graph = program.only()
    (embedding,) = [n for n in graph.nodes if ops_of(n) == "embedding"]
    (head,) = [n for n in graph.nodes if effc.ir.select.module_path(n) == "head"]
    one = (
        tensor_of(graph, embedding.args[0]).data_ptr() == tensor_of(graph, head.args[1]).data_ptr()
    )
    assert one == (table == "mask-only")
    assert record.notes.get("main/untied") == (None if one else {"bytes": WORDS * 16 * 4})
    assert (program.weight_bytes() < 0.6 * bytes_before) == one


def test_the_engine_computes_what_the_folded_graph_does(tmp_path):
    program = hardened(stream(bias=True), rank=2)
    folded(program)
    wanted = program.run(FEEDS)["output"]
    with engine(program, tmp_path) as opened:
        found = opened({"ids": IDS.numpy()})["output"]
    assert np.linalg.norm(found - wanted.numpy()) <= 1e-4 * np.linalg.norm(wanted)


def test_recorded_channels_are_taken_again():
    program = stirred(inserted(stream(), rank=2))
    other = stirred(inserted(stream(seed=5), rank=2), seed=9)
    record = effc.apply(HardenHsm(), program)
    assert record.decisions == {
        "main/table@1": torch.where(program.only().tensors()["hsm.keep"] > 0)[0].tolist()
    }
    again = effc.apply(HardenHsm(), other, recorded=record.decisions)
    assert again.decisions == record.decisions
    for wrong in ([0, 1], [0] * 8, list(range(9, 17)), "all"):
        third = stirred(inserted(stream(), rank=2))
        with pytest.raises(CalibrationError, match="recorded channels"):
            effc.apply(HardenHsm(), third, recorded={"main/table@1": wrong})


# -- the numbers of it


def numbers(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("mode", "count"), [("effc", 106_766_336), ("released", 106_766_336), ("paper", 106_513_096)]
)
def test_trainable_numbers_of_a_llama_of_seven_billion(mode, count):
    """The recipe says them by mode, beside adapters of rank 20 on seven layers of 32 blocks."""
    with torch.device("meta"):
        behind = [Hybrid(4096, 200, mode=mode, identity=True) for _ in range(2 * 32 + 1)]
        shared = Gate(torch.zeros(4096), is_trained=True)
    assert numbers(*behind, shared) == count
    adapters = 32 * 20 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    text = (Path(__file__).parents[2] / "examples/pat/llama2-7b.yaml").read_text(encoding="utf-8")
    if mode != "effc":
        line = next(line for line in text.splitlines() if f"mode: {mode} " in line)
        assert f" {numbers(*behind):,} " in line and f" {count + adapters:,} " in line
    assert f" {adapters:,}," in text and f" {adapters // 20 * 64:,}." in text


@pytest.mark.parametrize(
    ("width", "rank", "share"), [(4096, 200, 0.0979), (4096, 204, 0.0999), (576, 28, 0.0990), (64, 3, 0.1094)]
)  # fmt: skip
def test_a_module_has_a_tenth_of_a_square_layer_where_the_width_is_not_small(width, rank, share):
    """Of 64 channels the scale of each is a sixtieth of a square layer, and rank 3 is above a tenth with it."""
    found = numbers(Hybrid(width, rank, mode="effc", identity=True)) / width**2
    assert found == pytest.approx(share, abs=5e-5) and (found <= 0.1) == (width > 64)
    assert found == pytest.approx((2 * rank + 1) / width)
    if rank != 200:
        assert InsertHsm(ratio=0.25).rank_of(width) == rank


@pytest.mark.parametrize(
    ("width", "options", "stay"),
    [
        (4096, {"ratio": 0.25}, 3072), (4096, {"ratio": 0.3}, 2880), (576, {"ratio": 0.25}, 432),
        (64, {"ratio": 0.25}, 48), (16, {"ratio": 0.25, "align": 1}, 12), (100, {"ratio": 0.5}, 48),
    ],
)  # fmt: skip
def test_what_stays_is_a_multiple(width, options, stay):
    assert InsertHsm(**options).count(width) == stay


@pytest.mark.parametrize(
    "options", [{"ratio": 0.01}, {"ratio": 0.99}, {"ratio": 0.25, "align": 16}]
)
def test_a_ratio_that_leaves_no_multiple_is_refused(options):
    with pytest.raises(PreconditionError, match="no multiple") as refused:
        effc.apply(InsertHsm(**options), stream())
    assert "align" in refused.value.hint


def test_a_ratio_is_not_guessed():
    with pytest.raises(PreconditionError, match="needs the part of the width"):
        effc.apply(InsertHsm(), stream())


def test_a_rank_is_below_the_width():
    assert InsertHsm(ratio=0.25).rank_of(4096) == 204 and InsertHsm(ratio=0.25).rank_of(8) == 1
    with pytest.raises(PreconditionError, match="rank 16 is not below"):
        effc.apply(InsertHsm(ratio=0.5, rank=16), stream())


# -- where it is refused


def test_a_stream_that_norms_write_is_refused():
    program, _ = program_of(FAMILIES["bert"](random.Random(0)))
    with pytest.raises(PreconditionError, match="post-LN") as refused:
        inserted(program)
    assert "width cannot be pruned" in refused.value.hint


def test_what_makes_something_of_0_is_named():
    class Shifted(Stream):
        def forward(self, ids):
            x = self.table(ids)
            x = torch.cos(x + self.o(self.q(self.norms[0](x))))
            return self.head(self.norms[1](x))

    program = effc.trace(Shifted(), FEEDS)
    with pytest.raises(PreconditionError, match="nobody knows whether cos"):
        inserted(program)


def test_a_width_that_an_output_has_is_refused():
    class Hidden(Stream):
        def forward(self, ids):
            return self.norms[0](self.table(ids) + self.o(self.q(self.norms[1](self.table(ids)))))

    with pytest.raises(PreconditionError, match="the output 'output' has it"):
        inserted(effc.trace(Hidden(), FEEDS))


def test_a_graph_without_norms_is_refused():
    from kit import Perceptron

    with pytest.raises(PreconditionError, match="no norm reads"):
        inserted(effc.trace(Perceptron(), torch.ones(2, 8)))
    with pytest.raises(PreconditionError, match="unknown group 'tabel@1'; did you mean 'table@1'"):
        inserted(stream(), group="tabel@1")


def test_the_steps_come_in_their_order():
    with pytest.raises(PreconditionError, match="no hybrid sparsification modules") as refused:
        effc.apply(HardenHsm(), stream())
    assert "insert-hsm" in refused.value.hint
    with pytest.raises(PreconditionError, match="no hybrid sparsification modules"):
        effc.apply(FoldHsm(), stream())
    program = inserted(stream())
    with pytest.raises(PreconditionError, match="already"):
        inserted(program)
    with pytest.raises(PreconditionError, match="soft yet") as refused:
        effc.apply(FoldHsm(), program)
    assert "harden-hsm" in refused.value.hint
    effc.apply(HardenHsm(), stirred(program))
    with pytest.raises(PreconditionError, match="hard already"):
        effc.apply(HardenHsm(), program)
    folded(program)
    inserted(program, align=2)  # what was folded may be pruned again
    assert program.only().pending["hsm"]["width"] == 8


def test_a_weight_that_is_computed_is_not_folded_into():
    program = hardened(stream(), rank=2)
    effc.apply(Quantize(activation_bits=16, select=effc.Select(module="o")), program)
    with pytest.raises(PreconditionError, match="cannot be folded: the weight of o is computed"):
        effc.apply(FoldHsm(), program)


def with_adapters(pass_):
    """A hard stream whose layers all have something beside them that is not 0."""
    program = inserted(stream(bias=True), rank=2)
    effc.apply(pass_, program)
    graph = program.only()
    assert not any(name.startswith("hsm.") and "lora" in name for name in graph.tensors())
    draw = torch.Generator().manual_seed(2)
    for name in attached(graph):
        tensor = graph.tensors()[name]
        rebind(graph, name, tensor + 0.2 * torch.randn(tensor.shape, generator=draw), "stirred")
    effc.apply(HardenHsm(), program)
    return program


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_adapters_beside_the_modules_are_merged_in_front_of_the_fold(form):
    program = with_adapters(AttachLora(rank=2, form=form))
    if form == "dora":  # sizes of rows are none of D W
        with pytest.raises(PreconditionError, match="cannot be folded") as refused:
            effc.apply(FoldHsm(), program.clone())
        assert "merge-lora" in refused.value.hint
    wanted = program.run(FEEDS)
    effc.apply(MergeLora(), program, probes={"main": [FEEDS]})
    assert folded(program) <= 1e-5
    assert drift(wanted, program.run(FEEDS)).rel_l2 <= 1e-5


def test_an_adapter_that_stays_has_the_module_on_its_left():
    program = with_adapters(AttachLora(rank=2))
    tensors = program.only().tensors()
    b = tensors["o.lora_B"].double()
    down, up, scale = (tensors[f"hsm.o.{word}"] for word in ("down", "up", "scale"))
    d = hsm_fold.matrix(down, up, None, scale, width=16)
    d *= tensors["hsm.keep"].double()[:, None]
    merged = program.clone()
    effc.apply(MergeLora(), merged)
    assert folded(merged) <= 1e-5
    assert folded(program) <= 1e-5
    assert drift(merged.run(FEEDS), program.run(FEEDS)).rel_l2 <= 1e-5
    kept = d.abs().sum(1) > 0
    torch.testing.assert_close(
        program.only().tensors()["o.lora_B"].double(), (d @ b)[kept], atol=1e-6, rtol=1e-5
    )
    assert shapes(program)["o.lora_A"][1] == shapes(merged)["o.weight"][1]
    assert shapes(program)["up.lora_A"][1] == shapes(merged)["up.weight"][1] == kept.sum()


def test_gated_experts_beside_a_pruned_stream_compute_what_they_did():
    program = with_adapters(AttachRank1(sizes=(2, 3), gates="router"))
    assert folded(program) <= 1e-5
    before = program.run(FEEDS)
    assert effc.apply(BatchRank1(), program, probes={"main": [FEEDS]}).drift.rel_l2 <= 1e-5
    assert drift(before, program.run(FEEDS)).rel_l2 <= 1e-5


def test_modules_go_in_behind_adapters_that_are_there():
    program = stream()
    effc.apply(AttachLora(rank=2), program)
    assert inserted(program, rank=2).only().pending["hsm"]["places"] == ["table", "o", "down"]
    program = stream()
    effc.apply(AttachLora(rank=2, form="dora"), program)
    with pytest.raises(PreconditionError, match="writes the stream by itself") as refused:
        inserted(program)
    assert "in front of attach-lora" in refused.value.hint


# -- how it is trained


def windows(count=10, rows=6, seed=0):
    draw = np.random.default_rng(seed)
    start = draw.integers(0, WORDS, (count, rows, 1))
    return [{"ids": (s + 3 * np.arange(5)) % WORDS} for s in start]


def tuned(program, teacher, steps=60, terms=None, rows=None, **options):
    pass_ = Tune(
        **{"steps": steps, "lr": 5e-3, "tensors": "hsm.*", "terms": terms or (Hsm(),), **options}
    )
    return effc.apply(pass_, program, train=effc.trainer(teacher, rows or windows()))


@pytest.mark.parametrize("mode", ["paper", "released", "effc"])
@pytest.mark.parametrize("mask", ["trained", "frozen", "random"])
def test_every_mode_trains_hardens_and_folds(mode, mask):
    teacher = stream()
    program = inserted(teacher.clone(), rank=3, mode=mode, mask=mask)
    record = tuned(program, teacher, terms=(Hsm(mask_lr=0.05),))
    curve = record.notes["main/curve"]
    milestone = 6 if mode == "effc" else 20
    ready = 16 if (mode, mask) == ("released", "trained") else milestone
    assert curve[-1]["step"] == 60 and {milestone // 2, milestone} <= {p["step"] for p in curve}
    assert all(p["counts"] == (p["step"] >= ready) for p in curve)
    assert all(sum(p["told"]["hsm"]["gates"]) == 16 for p in curve)
    best = min((p for p in curve if p["counts"]), key=lambda p: p["held"])
    frozen = program.only().tensors()
    assert torch.equal(frozen["o.weight"], teacher.only().tensors()["o.weight"])
    effc.apply(HardenHsm(), program)
    # what was judged is what comes out: the loss of the hard graph is the least held-out one that counts
    feeds = {name: torch.from_numpy(v) for name, v in windows()[-1].items()}
    from effc.train.losses import distillation

    gap = distillation(program.run(feeds), teacher.run(feeds))
    assert float(gap) == pytest.approx(best["held"], rel=1e-4)
    folded(program)


def test_training_takes_the_gap_between_soft_and_hard_away():
    teacher = stream()
    program = inserted(teacher.clone(), rank=3)
    curve = tuned(program, teacher, steps=90).notes["main/curve"]
    assert any(p["soft"] is not None and p["soft"] != p["held"] for p in curve[1:4])
    assert curve[-1]["soft"] is None and curve[-1]["told"]["hsm"]["undecided"] == 0
    assert all(p["told"]["hsm"]["kept"] == 8 for p in curve if p["counts"])
    record = effc.apply(HardenHsm(), program, probes={"main": [FEEDS]})
    assert record.drift.rel_l2 == 0 and record.notes["main/gates"]["gap"] == 0


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    from effc.train import loop, losses, terms
    from effc.train.graph import InGraph

    monkeypatch.setattr(loop, "SAVE_S", 0.0)
    teacher = stream()
    data = [{"ids": torch.from_numpy(w["ids"])} for w in windows()]
    schedule_ = loop.Schedule(steps=24, lr=0.01, check_every=4)

    def run(folder, die_at=None):
        graph = inserted(teacher.clone(), rank=3, mode="released").only()
        module = InGraph(graph, Tune(tensors="hsm.*").trained(graph))
        courses = terms.begin((Hsm(mask_lr=0.05),), graph, 24, schedule_.rate)

        def progress(done, of):
            if done == die_at:
                raise KeyboardInterrupt

        try:
            made = loop.fit(
                module, lambda m, x: losses.distillation(m(x), teacher.run(x)), lambda s: data[s % 9],
                schedule_, held=data[9:], folder=folder, progress=progress, courses=courses,
            )  # fmt: skip
        except KeyboardInterrupt:
            return None
        points = [dataclasses.replace(p, seconds=0) for p in made.points]
        return points, module.tensors()

    points, wanted = run(tmp_path / "a")
    assert run(tmp_path / "b", die_at=7) is None  # the mask is soft
    assert run(tmp_path / "b", die_at=17) is None  # and now it stands still
    again, found = run(tmp_path / "b")
    assert again == points and set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_mask_of_its_own_has_its_own_rate():
    program = inserted(stream(), rank=3)
    graph = program.only()
    course = Hsm(travel=0.6).begin(graph, 30, lambda step: 1.0)
    (own,) = course.owns().values()
    assert sum(own.rate(step) for step in range(30)) == pytest.approx(0.6)
    assert own.rate(10) == 0 and own.weight_decay == 0
    level = inserted(stream(), rank=3, importance="none").only()
    for graph_, travel in ((level, 1.0), (graph, 0.1)):
        (own,) = Hsm().begin(graph_, 30, lambda step: 1.0).owns().values()
        assert sum(own.rate(step) for step in range(30)) == pytest.approx(travel)
    paper = inserted(stream(), rank=3, mode="paper").only()
    assert Hsm().begin(paper, 30, lambda step: 1.0).owns() == {}
    assert list(Hsm(mask_lr=0.1).begin(paper, 30, lambda step: 1.0).owns()) == ["hsm.mask"]
    assert Hsm().begin(inserted(stream(), mask="random").only(), 30, lambda step: 1.0).owns() == {}


@pytest.mark.parametrize(("milestone", "tau"), [(300, 25.6), (1000, 31.0), (10_000, 41.3)])
def test_the_gate_closes_as_the_paper_says(milestone, tau):
    assert schedule(0, milestone) == (0.0, 0.5)
    assert schedule(0.8 * milestone, milestone)[0] == pytest.approx(tau, abs=0.05)
    assert schedule(milestone, milestone) == (HARD, 0.0)
    temperatures = [schedule(step, milestone)[0] for step in range(milestone)]
    assert temperatures == sorted(temperatures)
    above = gate(torch.tensor([0.5]), *map(torch.tensor, schedule(2500, 10_000)))
    if milestone == 10_000:
        assert float(above) == pytest.approx(1.215, abs=1e-3)  # β is added outside


def test_ours_fades_on_a_line_what_lies_below_the_kth():
    graph = inserted(stream(), rank=3, importance="none").only()
    course = Hsm(milestone=1).begin(graph, 20, lambda step: 1.0)
    mask = torch.linspace(1, -1, 16).requires_grad_()
    for step in range(21):
        standing = course.stands(step, {"hsm.mask": mask})
        values = gate(standing.get("hsm.mask", mask), standing["hsm.tau"], standing["hsm.beta"])
        share = step / 20
        wanted = [1.0] * 8 + [1 - share] * 8
        assert values.tolist() == pytest.approx(wanted, abs=2e-3)
        if step != 10:
            assert course.told(step, {"hsm.mask": mask})["kept"] == (16 if share < 0.5 else 8)
    near = (mask.detach() / 50).requires_grad_()  # who is near θ is who still learns
    course.stands(10, {"hsm.mask": near})["hsm.beta"].sum().backward()
    assert bool((near.grad > 0).all())


def test_the_first_step_of_the_released_code_is_a_number():
    assert float(sides(torch.zeros(4))) == 0.25 and float(sides(torch.ones(4))) == 0.25
    graph = inserted(stream(), mode="released").only()
    course = Hsm().begin(graph, 30, lambda step: 1.0)
    live = {n: t.clone().requires_grad_() for n, t in graph.tensors().items() if t.dim()}
    found = course.losses(0, live)
    total = torch.stack(list(found.values())).sum()
    total.backward()
    assert set(found) == {"identity", "count", "sides"} and bool(
        live["hsm.mask"].grad.isfinite().all()
    )
    assert found["count"].item() == pytest.approx(10 * (16 - 8) / 8)
    # too many stay, so all are pushed down alike, and towards −½ besides
    assert bool((live["hsm.mask"].grad > 0).all())


@pytest.mark.parametrize(
    ("mode", "counts"), [("paper", [True] * 5), ("effc", [True] * 5), ("released", [True, False, False, True, True])]
)  # fmt: skip
def test_the_identity_loss_is_of_the_places_that_each_mode_names(mode, counts):
    graph = inserted(program_of(FAMILIES["llama"](random.Random(3)))[0], mode=mode, rank=2).only()
    course = Hsm().begin(graph, 30, lambda step: 1.0)
    plain = float(course.losses(0, graph.tensors())["identity"])
    found = []
    for place in graph.pending["hsm"]["places"]:
        name = f"hsm.{place}.down"
        live = {**graph.tensors(), name: 3 * graph.tensors()[name]}
        found.append(abs(float(course.losses(0, live)["identity"]) - plain) > 1e-3)
    assert found == counts
    without = inserted(stream(), mode=mode, identity=False).only()
    assert "identity" not in Hsm().begin(without, 30, lambda step: 1.0).losses(0, without.tensors())


def test_a_mask_is_cut_where_as_many_stay_as_shall():
    mask = torch.tensor([0.3, -0.2, 0.3, 0.1, 0.0])
    assert kept(mask, 3).tolist() == [0, 2, 3] and kept(mask, 1).tolist() == [0]
    for count in (1, 2, 3, 4):
        values = gate(hard(mask, count), torch.tensor(HARD), torch.tensor(0.0))
        assert values.tolist() == [float(i in kept(mask, count)) for i in range(5)]
    assert centred(mask, 3).tolist() == pytest.approx([0.25, -0.25, 0.25, 0.05, -0.05])


def test_a_mask_that_fades_goes_from_1_to_0():
    graph = inserted(stream(), mask="frozen", importance="none").only()
    course = Hsm(milestone=0.5).begin(graph, 20, lambda step: 1.0)

    def values(step):
        standing = course.stands(step, {})
        return gate(graph.tensors()["hsm.mask"], standing["hsm.tau"], standing["hsm.beta"])

    for step in range(11):
        wanted = [1.0] * 8 + [1 - step / 10] * 8
        assert values(step).tolist() == pytest.approx(wanted, abs=1e-5)
    assert values(20).tolist() == [1.0] * 8 + [0.0] * 8
    paper = inserted(stream(), mask="frozen", mode="paper").only().tensors()["hsm.mask"]
    assert paper.tolist() == [-1.0] * 8 + [1.0] * 8


# -- what goes wrong


def test_a_mask_that_nobody_trained_is_said(caplog):
    program = inserted(stream())
    with caplog.at_level(logging.WARNING):
        record = effc.apply(HardenHsm(), program, probes={"main": [FEEDS]})
    assert "all gates are open" in caplog.text and "terms: [hsm]" in caplog.text
    assert record.notes["main/gates"]["crossed"] == 8 and record.drift.rel_l2 > 0.1


@pytest.mark.parametrize("at", [-2.0, 2.0])
def test_a_mask_that_is_stuck_on_one_side_is_said(at, caplog):
    program = inserted(stream(), mode="released")
    graph = program.only()
    rebind(graph, "hsm.mask", at + 0.01 * torch.arange(16.0), "stuck")
    rebind(graph, "hsm.tau", torch.tensor(10.0), "stuck")
    rebind(graph, "hsm.beta", torch.tensor(0.0), "stuck")
    with caplog.at_level(logging.WARNING):
        record = effc.apply(HardenHsm(), program)
    assert (
        record.notes["main/gates"]["crossed"] == 8
        and "8 of 16 gates are on the other side" in caplog.text
    )


def test_gates_that_have_not_decided_are_said(caplog):
    program = inserted(stream(), mode="released")
    graph = program.only()
    rebind(graph, "hsm.mask", torch.linspace(-0.05, 0.05, 16), "soft")
    rebind(graph, "hsm.tau", torch.tensor(10.0), "soft")
    rebind(graph, "hsm.beta", torch.tensor(0.0), "soft")
    with caplog.at_level(logging.WARNING):
        effc.apply(HardenHsm(), program)
    assert "16 of 16 gates had not decided" in caplog.text


def test_a_mask_of_values_that_are_no_numbers_is_refused():
    program = inserted(stream())
    rebind(program.only(), "hsm.mask", torch.full((16,), float("nan")), "bad")
    with pytest.raises(PreconditionError, match="the mask holds values that are no numbers"):
        effc.apply(HardenHsm(), program)


def test_a_loss_that_is_no_number_is_said_with_its_step():
    teacher = stream()
    program = inserted(teacher.clone())
    graph = program.only()
    rebind(graph, "hsm.o.up", graph.tensors()["hsm.o.up"] * float("nan"), "bad")
    with pytest.raises(TuneError, match="nan at step 0"):
        tuned(program, teacher)


def test_the_term_is_for_a_soft_mask():
    teacher = stream()
    with pytest.raises(TuneError, match="the term hsm is for") as refused:
        tuned(teacher.clone(), teacher, tensors="*")
    assert "insert-hsm" in refused.value.hint
    with pytest.raises(TuneError, match="the term hsm is for"):
        tuned(hardened(teacher.clone()), teacher)


def recipe(*passes):
    from effc import recipe as recipes

    return recipes.build({"source": {"transformers": "x"}, "passes": list(passes)})


INSERT = {"pass": "insert-hsm", "ratio": 0.25}
TUNE = {"pass": "tune", "task": "tokens", "terms": ["hsm"]}


def test_a_recipe_says_its_terms_by_word_or_with_options():
    made = recipe(INSERT, TUNE, "harden-hsm", "fold-hsm")
    assert made.passes[1].terms == (Hsm(),)
    made = recipe(INSERT, {**TUNE, "terms": [{"term": "hsm", "milestone": 0.2}]}, "harden-hsm")
    assert made.passes[1].terms == (Hsm(milestone=0.2),)
    options = effc.passes.pipeline.options_of(made.passes[1])
    assert json.loads(json.dumps(options))["terms"][0]["term"] == "hsm"


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ([INSERT, "harden-hsm"], r"passes\[0\]: the mask of insert-hsm is to be trained"),
        ([INSERT, {**TUNE, "terms": []}, "harden-hsm"], "nothing behind it trains it"),
        ([INSERT, {**TUNE, "terms": ["hms"]}], r"passes\[1\].terms\[0\]: 'hms' is not one of hsm, l2-sp"),
        ([INSERT, {**TUNE, "terms": [{"term": "hsm", "milestones": 1}]}], "unknown key 'milestones'"),
        ([INSERT, {**TUNE, "terms": [{"term": "hsm", "milestone": 2}]}], r"terms\[0\].hsm.milestone"),
        ([{**INSERT, "mode": "papper"}], "did you mean 'paper'"),
        ([{**INSERT, "rank": 1.5}], "rank"),
        ([{**INSERT, "rank": 0}], "rank"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused(passes, words):
    from effc.errors import RecipeError

    with pytest.raises(RecipeError, match=words):
        recipe(*passes)


def test_a_random_mask_is_that_of_its_seed():
    def chosen(seed):
        program = stream()
        record = effc.apply(InsertHsm(ratio=0.25, mask="random", seed=seed), program)
        stay = kept(program.only().tensors()["hsm.mask"], 8).tolist()
        assert stay == sorted(record.decisions["main/table@1"][:8])
        return stay

    assert chosen(0) == chosen(0) != chosen(1)
    with pytest.raises(PreconditionError, match="asks no importance"):
        inserted(stream(), mask="random", importance="magnitude")


@pytest.mark.parametrize("importance", ["magnitude", "activation", "wanda", "taylor", "first"])
def test_a_mask_may_start_in_an_order_of_importance(importance):
    def made(pass_, program, **options):
        data = [effc.Batch(inputs=window) for window in windows()]
        return effc.apply(pass_, program, data, **options)

    program, fixed = stream(), stream()
    pass_ = InsertHsm(ratio=0.25, importance=importance)
    assert pass_.measures == (importance in ("activation", "wanda", "taylor"))
    record = made(pass_, program)
    assert record.drift.rel_l2 == 0
    mask = program.only().tensors()["hsm.mask"]
    order = record.decisions["main/table@1"]
    assert mask[order].tolist() == pytest.approx(np.linspace(0.5, -0.5, 16).tolist())
    made(dataclasses.replace(pass_, mask="frozen"), fixed)
    assert kept(fixed.only().tensors()["hsm.mask"], 8).tolist() == sorted(order[:8])
    pruned = stream()  # the least important go here as there
    removed = made(PruneDims(ratio=0.5, importance=importance, groups="table@1"), pruned)
    assert removed.decisions["main/table@1"] == sorted(order[:8])
    again = stream()
    effc.apply(pass_, again, recorded=record.decisions)
    assert torch.equal(again.only().tensors()["hsm.mask"], mask)


def test_the_width_may_be_pruned_alone_as_before():
    program = stream()
    effc.apply(PruneDims(ratio=0.25, groups="table@1"), program)
    assert shapes(program)["table.weight"] == (WORDS, 12)
    assert coupled_dims(program.only()).groups["table@1"].size == 12
    assert axes.size_of(coupled_dims(program.only()).groups["table@1"].unit, {}) == 12


# -- as a recipe


FACTORY = """
import sys
sys.path[:0] = [{tests!r}, {passes!r}]
import torch
from test_hsm import FEEDS, Stream

def net():
    torch.manual_seed(0)
    class Net(Stream):
        def forward(self, ids):
            return {{"logits": super().forward(ids)}}
    return Net(), FEEDS
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A factory, words, and a recipe from the inserted modules to integers."""
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "cache"))
    here = Path(__file__).parent
    text = FACTORY.format(tests=str(here.parent), passes=str(here))
    (tmp_path / "model.py").write_text(text)
    ids = np.concatenate([w["ids"] for w in windows(40)])
    np.savez(tmp_path / "data.npz", ids=ids.astype(np.int64))
    passes = [
        {**INSERT, "rank": 2}, {"pass": "attach-lora", "rank": 2},
        {"pass": "tune", "steps": 30, "lr": 0.01, "samples": 128, "held": 32, "terms": ["hsm"]},
        "merge-lora", "harden-hsm", "fold-hsm",
    ]  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.dump({
        "source": {"python": f"{tmp_path / 'model.py'}:net"}, "passes": passes,
        "calib": {"file": str(tmp_path / "data.npz"), "samples": 32}, "bench": False, "gate": False,
    }))  # fmt: skip
    return tmp_path


@pytest.mark.slow
def test_from_a_recipe_to_an_engine_and_again(place):
    ran = cli("compile", place / "r.yaml", "-o", place / "one")
    assert ran.code == 0, ran.err
    report = json.loads((place / "one" / "report.json").read_text())
    by_name = {p["name"]: p for p in report["passes"]}
    last = by_name["tune"]["notes"]["main/curve"][-1]
    assert last["told"]["hsm"]["kept"] == 8 and sum(last["told"]["hsm"]["gates"]) == 16
    assert by_name["harden-hsm"]["notes"]["main/gates"]["kept"] == 8
    assert by_name["fold-hsm"]["drift"]["rel_l2"] <= 1e-5
    assert "8 of 16 channels stay; their gates were within 0 of 0 and 1" in ran.out
    assert "hsm: gates" in (place / "one" / "report.html").read_text()
    decisions = json.loads((place / "one" / "decisions.json").read_text())
    assert len(decisions["4:harden-hsm"]["main/table@1"]) == 8

    def engine_of(out):
        return json.loads((place / out / "manifest.json").read_text())["engines"][0]["sha256"]

    ran = cli("tune", place / "r.yaml", "-o", place / "ck", "--json", place / "t.json")
    assert ran.code == 0, ran.err
    assert json.loads((place / "t.json").read_text())["curves"]["2.main"][-1]["told"]["hsm"]
    for out, words in (
        ("two", ("--tuned", place / "ck")),
        ("three", ("--decisions", place / "one" / "decisions.json")),
    ):
        ran = cli("compile", place / "r.yaml", "-o", place / out, *words)
        assert ran.code == 0, ran.err
        assert engine_of(out) == engine_of("one")
    model = ("--trust-code", "--model", f"{place / 'model.py'}:net")
    ran = cli("verify", place / "one", *model)
    assert ran.code == 0, ran.err
    words = ("--tuned", place / "ck", "--calib", place / "data.npz")
    ran = cli("explain", place / "one", *model[1:], *words)
    assert ran.code == 0 and "a node is off" not in ran.out and "harden-hsm" in ran.out, ran.err


@pytest.mark.slow
def test_a_plan_of_it_is_made_without_training(place):
    ran = cli("compile", place / "r.yaml", "-o", place / "out", "--plan")
    assert ran.code == 0 and "fold-hsm" in ran.out, ran.err
    assert not (place / "out").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_mask_is_refused(place):
    assert cli("tune", place / "r.yaml", "-o", place / "ck").code == 0
    words = ("--tuned", place / "ck", "-o", place / "out")
    ran = cli("compile", place / "r.yaml", *words, "--set", "passes.0.ratio=0.6")
    assert_letter(ran, "TuneError", 13, "trained by other passes")


@pytest.mark.slow
def test_a_model_whose_width_cannot_go_is_refused_by_a_recipe(place):
    from kit import save_encoder, write_sentences

    save_encoder(place / "bert")
    write_sentences(place / "lines.txt")
    words = ("--set", f"source={{transformers: {place / 'bert'}}}",
             "--set", f"calib={{file: {place / 'lines.txt'}}}")  # fmt: skip
    ran = cli("compile", place / "r.yaml", "-o", place / "out", *words)
    assert_letter(ran, "PreconditionError", 6, "post-LN")
