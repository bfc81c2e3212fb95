"""Adapters of low rank change nothing until they are trained, and are folded into the weights without a trace."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from gated import stirred
from graphs import (
    Attention,
    Call,
    Tied,
    assert_graph,
    distance,
    engine,
    node_of,
    normal,
    ops,
    quantize,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import effc
from effc.errors import PreconditionError, RecipeError, TuneError
from effc.ir.edit import rebind, refresh, tensor_name
from effc.ir.program import Program
from effc.ir.splice import attached
from effc.nn import lora
from effc.passes.lora import AttachLora, MergeLora, adapter_of, sites
from effc.passes.prune_dims import PruneDims
from effc.passes.quantize import Quantize
from effc.passes.tune import Tune
from effc.recipe import build
from effc.train.graph import InGraph
from kit import Perceptron

X = normal(5, 8)
FORMS = ("lora", "rslora", "dora")


def perceptron(bias=True):
    torch.manual_seed(0)
    return Perceptron() if bias else nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)
    )  # fmt: skip


def traced(module=None):
    return effc.trace((module or perceptron()).eval(), {"x": X} if module is None else X)


def with_adapter(program, **options):
    made = program.clone()
    record = effc.apply(AttachLora(**options), made)
    return record, made


def run(program, x=X):
    graph = program.only()
    return program.run({graph.inputs[0]: x})[graph.outputs[0]]


def test_an_adapter_stands_beside_its_layer():
    record, program = with_adapter(traced(), rank=2, select=effc.Select(module="up"))
    assert record.sites == 1 and record.effect == "exact"
    assert_graph(
        program,
        """
        %x: f32[batch, 8] = input
        %linear: f32[batch, 16] = linear(%x, @up.weight, @up.bias)
        %linear_2: f32[batch, 2] = linear(%x, @up.lora_A)
        %mul: f32[batch, 2] = mul(%linear_2, 1)
        %linear_3: f32[batch, 16] = linear(%mul, @up.lora_B)
        %add: f32[batch, 16] = add(%linear, %linear_3)
        %relu: f32[batch, 16] = relu(%add)
        %linear_1: f32[batch, 4] = linear(%relu, @down.weight, @down.bias)
        return output=%linear_1
        """,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_one_changes_no_bit(form, bias):
    """DoRA's too: m and ‖W‖ are worked out alike, and their ratio less 1 is 0."""
    program = traced(perceptron(bias))
    record, made = with_adapter(program, rank=3, alpha=5, form=form)
    assert record.sites == 2
    assert torch.equal(run(program), run(made))
    x = normal(2, 3, 8)
    assert torch.equal(run(program, x[0]), run(made, x[0]))
    assert not torch.equal(run(program), run(stirred(made)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_merged_it_computes_the_same_with_the_operators_of_before(form, bias):
    program = traced(perceptron(bias))
    _, made = with_adapter(program, rank=3, alpha=5, form=form)
    trained = stirred(made)
    merged = trained.clone()
    record = effc.apply(MergeLora(), merged, probes={"main": [{merged.only().inputs[0]: X}]})
    assert record.sites == 2 and record.drift.rel_l2 < 1e-6
    assert effc.show(merged, exact=True) == effc.show(program, exact=True)
    assert merged.only().tensors().keys() == program.only().tensors().keys()
    assert distance(run(trained), run(merged)) < 1e-6 < 1e-2 < distance(run(program), run(merged))


@given(
    form=st.sampled_from(FORMS), out=st.integers(1, 7), inner=st.integers(1, 7), rank=st.integers(1, 3),
    alpha=st.floats(0.1, 50), seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_fold_is_what_the_papers_write(form, out, inner, rank, alpha, seed):
    draw = np.random.default_rng(seed)
    w, a, b = (
        draw.normal(size=(out, inner)),
        draw.normal(size=(rank, inner)),
        draw.normal(size=(out, rank)),
    )
    m = np.abs(draw.normal(size=out)) if form == "dora" else None
    scale = lora.scale_of(alpha, rank, rooted=form == "rslora")
    expected = np.zeros_like(w)
    for i in range(out):
        row = [
            w[i, j] + alpha / (math.sqrt(rank) if form == "rslora" else rank)
            * sum(b[i, k] * a[k, j] for k in range(rank))
            for j in range(inner)
        ]  # fmt: skip
        size = math.sqrt(sum(v * v for v in row))
        expected[i] = [v if m is None else m[i] * v / size for v in row]
    made = lora.merged(
        *map(torch.from_numpy, (w, a, b)), scale, None if m is None else torch.from_numpy(m)
    )
    np.testing.assert_allclose(made.numpy(), expected, rtol=1e-9, atol=1e-12)
    module = lora.Lora(*map(torch.from_numpy, (a, b)), scale)
    if m is not None:
        module = lora.Dora(*map(torch.from_numpy, (a, b)), scale, torch.from_numpy(m))
    x, bias = (
        torch.from_numpy(draw.normal(size=(4, inner))),
        torch.from_numpy(draw.normal(size=out)),
    )
    weight = torch.from_numpy(w)
    inputs = [x, nn.functional.linear(x, weight, bias)] + ([weight, bias] if m is not None else [])
    torch.testing.assert_close(
        module(*inputs), nn.functional.linear(x, made, bias), rtol=1e-9, atol=1e-9
    )


def test_alpha_comes_back_from_its_scale():
    for rooted in (True, False):
        for alpha, rank in ((16, 8), (0.3, 3), (4, 20), (7, 7)):
            scale = lora.scale_of(alpha, rank, rooted=rooted)
            found = lora.alpha_of(scale, rank, rooted=rooted)
            assert found == pytest.approx(alpha) and isinstance(found, int) == (alpha != 0.3)


def test_a_row_of_zeros_stays_one_under_dora():
    module = perceptron()
    module.up.weight.data[3] = 0
    program = traced(module)
    _, made = with_adapter(program, rank=2, form="dora")
    assert torch.equal(run(program), run(made))
    effc.apply(MergeLora(), made)
    assert bool(torch.isfinite(made.only().tensors()["up.weight"]).all())


def test_only_adapters_are_trained_and_the_base_is_neither_copied_nor_given_gradients():
    program = traced()
    record, made = with_adapter(program, rank=2)
    graph = made.only()
    names = Tune().trained(graph)
    assert names == ["up.lora_A", "up.lora_B", "down.lora_A", "down.lora_B"]
    trained = sum(graph.tensors()[n].numel() for n in names)
    assert trained == 2 * (8 + 16) + 2 * (16 + 4) == record.notes["main/parameters"]
    module = InGraph(graph, names)
    assert [p.numel() for p in module.parameters()] == [16, 32, 32, 8]
    module({"x": X})["output"].square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    base = {n: t for n, t in graph.exported.state_dict.items() if n not in names}
    assert base and all(t.grad is None for t in base.values())
    assert all(t.data_ptr() == program.only().tensors()[n].data_ptr() for n, t in base.items())
    assert Tune(tensors="up.*").trained(graph) == ["up.weight", "up.bias", "up.lora_A", "up.lora_B"]
    assert Tune().trained(program.only()) == list(program.only().tensors())


def test_training_moves_the_adapters_alone():
    program = traced()
    wanted = traced(Perceptron())  # other weights
    _, made = with_adapter(program, rank=4)
    batches = [{"x": normal(32, 8, seed=s).numpy()} for s in range(6)]
    record = effc.apply(Tune(steps=60, lr=0.02), made, train=effc.trainer(wanted, batches))
    curve = record.notes["main/curve"]
    assert min(p["held"] for p in curve) < 0.6 * curve[0]["held"]
    before, after = program.only().tensors(), made.only().tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    effc.apply(MergeLora(), made, probes={"main": [{"x": X}]})
    assert effc.show(made) == effc.show(program)


def test_the_same_seed_makes_the_same_adapter_whatever_else_has_one():
    program = traced()
    _, both = with_adapter(program, rank=2)
    _, one = with_adapter(program, rank=2, select=effc.Select(module="down"))
    _, other = with_adapter(program, rank=2, seed=1)
    a, b, c = (p.only().tensors()["down.lora_A"] for p in (both, one, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert float(a.abs().max()) <= 1 / math.sqrt(16) < 1.2 * float(a.abs().max())
    assert not torch.equal(both.only().tensors()["up.lora_A"][:, :4], a[:, :4])


def test_a_layer_that_runs_twice_has_one_adapter():
    module = Call(lambda self, x: self.fc(torch.relu(self.fc(x))), fc=nn.Linear(8, 8))
    program = traced(module)
    record, made = with_adapter(program, rank=2)
    assert record.sites == 2 and record.notes["main/parameters"] == 2 * 16
    assert attached(made.only()) == ["fc.lora_A", "fc.lora_B"]
    trained = stirred(made)
    merged = trained.clone()
    effc.apply(MergeLora(), merged)
    assert distance(run(trained), run(merged)) < 1e-6
    assert effc.show(merged) == effc.show(program)


def test_graphs_of_one_model_get_the_same_adapter():
    graph = traced().only()
    roles = {role: dataclasses.replace(graph.clone(), role=role) for role in ("prefill", "decode")}
    program = Program(roles)
    effc.apply(AttachLora(rank=2), program)
    a, b = (program[role].tensors() for role in roles)
    assert all(torch.equal(a[name], b[name]) for name in a) and "up.lora_A" in a


def test_a_graph_without_adapters_beside_one_with_some_is_left_as_it_is():
    graph = traced().only()
    program = Program({role: dataclasses.replace(graph.clone(), role=role) for role in ("a", "b")})
    effc.apply(AttachLora(rank=2, graphs=("b",)), program)
    assert effc.apply(MergeLora(), program).sites == 2
    assert effc.show(program["a"]) == effc.show(program["b"]) == effc.show(graph)


class Head(nn.Module):
    """A language model of two layers and a head of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, ids):
        return {"logits": self.head(self.fc(self.embed(ids)))[:, -1:].to(torch.float32)}


IDS = torch.arange(6).reshape(2, 3)


def test_the_layer_of_the_logits_is_left_alone_unless_asked_for():
    program = effc.trace(Head(), {"ids": IDS})
    names = [s.name for s in sites(program.only(), effc.Select())]
    assert names == ["fc"]
    assert [s.name for s in sites(program.only(), effc.Select(), output=True)] == ["fc", "head"]
    with pytest.raises(PreconditionError, match="but head, which gives the logits") as error:
        effc.apply(AttachLora(rank=2, select=effc.Select(module="head")), program)
    assert "output: true" in error.value.hint


def test_a_head_that_shares_the_embedding_gets_a_weight_of_its_own_when_merged():
    program = effc.trace(Tied(), {"ids": IDS})
    assert sites(program.only(), effc.Select()) == []
    _, made = with_adapter(program, rank=2, output=True)
    assert attached(made.only()) == ["head.lora_A", "head.lora_B"]
    trained = stirred(made)
    merged = trained.clone()
    effc.apply(MergeLora(), merged)
    assert ops(merged) == ["embedding", "linear"]
    assert distance(run(trained, IDS), run(merged, IDS)) < 1e-6
    before, after = made.only().tensors(), merged.only().tensors()
    table = tensor_name(merged.only(), node_of(merged, "embedding").args[0])
    assert torch.equal(after[table], before[table])
    (own,) = after.keys() - {table}
    assert merged.only().origins[own].transforms[-1] == "merge-lora"


@pytest.mark.parametrize("form", ["lora", "rslora"])
def test_dimensions_may_be_pruned_between_attaching_and_merging(form):
    program = traced()
    trained = stirred(with_adapter(program, rank=2, form=form)[1])
    first, last = trained.clone(), trained.clone()
    effc.apply(MergeLora(), first)
    prune = PruneDims(keep={"up": (0, 3, 5)})
    effc.apply(prune, first)
    effc.apply(prune, last)
    effc.apply(MergeLora(), last)
    assert distance(run(first), run(last)) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_that_is_not_merged_is_written_too(form, tmp_path):
    program = traced()
    trained = stirred(with_adapter(program, rank=2, form=form)[1])
    with engine(trained, tmp_path) as opened:
        assert distance(run(trained), opened({"x": X.numpy()})["output"]) < 1e-6


def test_a_layer_that_was_a_product_is_one_by_then():
    from effc.passes.fuse import FuseLinear

    weight, bias = nn.Parameter(normal(8, 6)), nn.Parameter(normal(6))
    program = traced(
        Call(lambda self, x: torch.addmm(self.bias, x, self.weight), weight=weight, bias=bias)
    )
    with pytest.raises(PreconditionError, match="no linear layer"):
        with_adapter(program)
    effc.apply(FuseLinear(), program)
    _, made = with_adapter(program, rank=2)
    assert adapter_of(stirred(made).only()).turned


def test_what_cannot_have_an_adapter_is_said():
    program = traced()
    with pytest.raises(
        PreconditionError, match=r"rank 5 is more than down has, which is \[4, 16\]"
    ):
        effc.apply(AttachLora(rank=5), program)
    with pytest.raises(PreconditionError, match="no linear layer of 'main' is selected") as error:
        effc.apply(AttachLora(select=effc.Select(module="nobody.*")), program)
    assert "effc inspect" in error.value.hint
    assert effc.show(program) == effc.show(traced())  # as it was
    effc.apply(AttachLora(rank=2), program)
    with pytest.raises(PreconditionError, match="up has an adapter already"):
        effc.apply(AttachLora(rank=2), program)
    effc.apply(MergeLora(), program)
    with pytest.raises(PreconditionError, match="no adapter is attached to 'main'"):
        effc.apply(MergeLora(), program)
    effc.apply(AttachLora(rank=2), program)
    with pytest.raises(TuneError, match="nothing to train"):
        effc.apply(
            Tune(tensors="none.*"), program, train=effc.trainer(traced(), [{"x": X.numpy()}] * 2)
        )


def test_nothing_is_merged_into_integers():
    for first in (AttachLora(rank=2), Quantize(activation_bits=16)):
        program = traced()
        effc.apply(first, program)
        quantize(program, activation_bits=16) if first.name == "attach-lora" else effc.apply(
            AttachLora(rank=2), program
        )
        with pytest.raises(PreconditionError, match="the adapter of down is integers") as error:
            effc.apply(MergeLora(), program)
        assert "in front of `quantize`" in error.value.hint


def test_an_adapter_that_another_pass_took_apart_is_not_merged_in_part():
    from effc.passes.fuse import FuseProjections

    program = effc.trace(Attention(8, 2), normal(2, 3, 8))
    effc.apply(AttachLora(rank=2), program)
    effc.apply(FuseProjections(), program)
    before = effc.show(program)
    with pytest.raises(PreconditionError, match="has changed the operators between"):
        effc.apply(MergeLora(), program)
    assert effc.show(program) == before


def test_values_that_are_no_numbers_are_not_merged():
    program = traced()
    effc.apply(AttachLora(rank=2), program)
    rebind(program.only(), "up.lora_B", torch.full((16, 2), math.nan), "spoilt")
    with pytest.raises(PreconditionError, match="adapter of up makes values that are no numbers"):
        effc.apply(MergeLora(), program)


def test_options_that_an_adapter_answers_itself_are_refused_when_the_recipe_is_read():
    source = {"python": "kit:nobody"}
    with pytest.raises(
        RecipeError, match=r"passes\[0\]: attach-lora: the adapter itself says its rank and form"
    ):
        build(
            {
                "source": source,
                "passes": [{"pass": "attach-lora", "adapter": "DIR", "rank": 2, "form": "lora"}],
            }
        )
    with pytest.raises(RecipeError, match="rank"):
        build({"source": source, "passes": [{"pass": "attach-lora", "rank": 0}]})
    made = build({"source": source, "passes": [{"pass": "attach-lora", "rank": 3}, "merge-lora"]})
    assert made.passes == (AttachLora(rank=3), MergeLora())


def llama(layers, **sizes):
    """A Llama of shapes alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).eval()
        ids = torch.zeros(2, 16, dtype=torch.long)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return {"logits": self.model(input_ids=input_ids, use_cache=False).logits}

    dims = {"input_ids": {0: "batch", 1: "sequence"}}
    return effc.trace(Logits(), {"input_ids": ids}, dims=dims)


def test_layers_of_one_shape_are_traced_once(monkeypatch):
    from effc.passes import lora as pass_

    program, seen = (
        llama(3, vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=4),
        [],
    )
    real = pass_.small_graph
    monkeypatch.setattr(pass_, "small_graph", lambda *args: seen.append(args) or real(*args))
    record, _ = with_adapter(program, rank=2)
    assert record.sites == 3 * 7 and len(seen) == 3  # 16 → 16, 16 → 24, 24 → 16


SEVEN_B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
    "num_key_value_heads": 32,
}  # fmt: skip


@pytest.mark.slow
def test_llama2_7b_has_as_many_trainables_as_the_formula_says():
    """Σ r (in + out) over 7 layers of 32 blocks, on shapes alone."""
    program = llama(32, **SEVEN_B)
    weights = [t for name, t in program.only().tensors().items() if name.endswith(".weight")]
    assert sum(t.numel() for t in weights) == 6_738_415_616
    for rank, trainables in ((20, 49_971_200), (64, 159_907_840)):
        made = program.clone()
        record = effc.apply(AttachLora(rank=rank, alpha=4), made)
        tensors = made.only().tensors()
        assert record.sites == 7 * 32
        assert sum(tensors[name].numel() for name in Tune().trained(made.only())) == trainables
        shapes = [tuple(s.shape) for s in sites(program.only(), effc.Select())]
        assert sum(rank * sum(shape) for shape in shapes) == trainables
    effc.apply(MergeLora(), made)
    refresh(program.only())
    assert effc.show(made) == effc.show(program)
    assert made.weight_bytes() == program.weight_bytes()
