"""Units are removed from every tensor that holds them, and what is left computes what the masked graph does."""

import importlib.util
import random
from collections import Counter
from functools import cache

import architectures
import pytest
import torch
from graphs import Attention, assert_graph, normal, ops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import effc
from effc import recipe
from effc.errors import CalibrationError, PreconditionError, RecipeError
from effc.ir import axes
from effc.ir.check import drift, problems
from effc.passes.coupling import coupled_dims, masked_run
from effc.passes.layernorm import LayerNormToRMSNorm
from effc.passes.prune_dims import PruneDims
from kit import Perceptron

X = normal(3, 8)


def pruned(module, x, **options):
    program = effc.trace(module.eval(), x)
    feeds = dict(zip(program.only().inputs, [x], strict=True))
    record = effc.apply(PruneDims(**options), program, probes={"main": [feeds]})
    return record, program


def test_a_hidden_width_shrinks_in_both_layers():
    record, program = pruned(Perceptron(), X, keep={"up": (0, 3, 5)})
    assert record.sites == 1 and record.effect == "lossy"
    assert record.decisions == {"main/up": [0, 3, 5]}
    shapes = {name: tuple(t.shape) for name, t in program.only().tensors().items()}
    assert shapes["up.weight"] == (3, 8) and shapes["down.weight"] == (4, 3)
    assert_graph(
        program,
        """
        %x: f32[batch, 8] = input
        %linear: f32[batch, 3] = linear(%x, @up.weight, @up.bias)
        %relu: f32[batch, 3] = relu(%linear)
        %linear_1: f32[batch, 4] = linear(%relu, @down.weight, @down.bias)
        return output=%linear_1
        """,
    )


def test_removed_heads_change_the_sizes_that_stand_in_views():
    module = nn.Sequential(nn.Linear(32, 32), Attention(), nn.Linear(32, 32))
    _, program = pruned(module, normal(2, 5, 32), keep={"1.q:0": (1, 3)})
    views = [n for n in program.only().nodes if n.target is torch.ops.aten.view.default]
    assert {tuple(v.meta["val"].shape[2:]) for v in views} == {(2, 8)}
    assert problems(program.only()) == []


class Stream(nn.Module):
    """A residual stream under RMSNorm."""

    def __init__(self, eps=1e-2):
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm, self.last, self.head = nn.RMSNorm(16, eps), nn.RMSNorm(16, eps), nn.Linear(16, 4)

    def forward(self, x):
        y = self.embed(x)
        y = y + self.down(torch.relu(self.up(self.norm(y))))
        return self.head(self.last(y))


KEPT = (0, 2, 3, 7, 9, 11)


def gap(program, feeds, keep):
    """How far the pruned graph is from the masked one, and the masked from the whole."""
    coupling = coupled_dims(program.only())
    wanted = masked_run(coupling, keep, feeds)
    whole = program.run(feeds)
    effc.apply(PruneDims(keep={name: tuple(units) for name, units in keep.items()}), program)
    return drift(wanted, program.run(feeds)).rel_l2, drift(whole, wanted).rel_l2


def stream(eps=1e-2):
    torch.manual_seed(0)
    program = effc.trace(architectures.shaken(Stream(eps)).double(), X.double() / 8)
    return program, {"x": X.double() / 8}


@pytest.mark.parametrize("eps", [1e-2, None])
def test_the_width_under_rmsnorm_is_exact(eps):
    error, moved = gap(*stream(eps), {"embed": KEPT})
    assert error < 1e-12 < 1e-2 < moved


@pytest.mark.parametrize("part", ["gain", "epsilon"])
def test_the_width_is_not_exact_without(part):
    program, feeds = stream()
    wanted = masked_run(coupled_dims(program.only()), {"embed": KEPT}, feeds)
    before = program.clone()
    effc.apply(PruneDims(keep={"embed": KEPT}), program)
    graph = program.only()
    if part == "gain":
        for name in ("norm.weight", "last.weight"):
            old = before.only().tensors()[name][list(KEPT)]
            effc.ir.edit.rebind(graph, name, old, "test")
    else:
        for node in graph.nodes:
            if node.target is torch.ops.aten.rms_norm.default:
                node.args = (*node.args[:3], 1e-2)
        effc.ir.edit.refresh(graph)
    assert drift(wanted, program.run(feeds)).rel_l2 > 1e-3


def test_attention_keeps_the_scale_that_it_had():
    module = nn.Sequential(nn.Linear(32, 32), Attention(), nn.Linear(32, 32)).double()
    x = normal(2, 5, 32).double()
    program = effc.trace(module.eval(), x)
    keep = {"1.q:1": (0, 2, 5), "1.v:1": (1, 2, 3, 4), "1.q:0": (1, 2, 3)}
    error, _ = gap(program, {"input": x}, keep)
    assert error < 1e-12


@pytest.mark.parametrize("cut", ["chunk", "split"])
def test_parts_that_become_unequal_are_cut_by_their_sizes(cut):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.a, self.b = nn.Linear(8, 12), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            y = self.both(x)
            a, b = y.chunk(2, -1) if cut == "chunk" else y.split(6, -1)
            return self.a(torch.relu(a)) + self.b(torch.tanh(b))

    program = effc.trace(Parts().eval(), X)
    error, _ = gap(program, {"x": X}, {"both:0": (0, 1), "both:1": (0, 2, 3, 5)})
    assert error < 1e-6
    assert "split_with_sizes" in ops(program)


def test_a_view_that_hung_on_the_strides_of_attention_becomes_a_reshape():
    """Kernels lay heads side by side where queries and values have one size, and else one after the other."""

    class Turned(Attention):
        def forward(self, x):
            batch, length, size = x.shape
            q, k, v = (
                f(x).view(batch, length, self.heads, -1).transpose(1, 2)
                for f in (self.q, self.k, self.v)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return self.o(torch.ops.aten.view.default(y, [batch, length, size]))

    module = nn.Sequential(nn.Linear(32, 32), Turned())
    x = normal(2, 5, 32)
    keep = {"1.q:1": tuple(range(4)), "1.v:1": tuple(range(5))}
    error, _ = gap(effc.trace(module.eval(), x), {"input": x}, keep)
    assert error < 1e-6


def test_names_of_one_tensor_stay_one_tensor():
    built = architectures.llama(random.Random(1))
    built[0].body.tie_weights()
    program, _ = architectures.program_of(built)
    bytes_before = program.weight_bytes()
    effc.apply(PruneDims(ratio=0.5, groups="*embed_tokens*"), program)
    assert 0.4 < program.weight_bytes() / bytes_before < 0.6


def test_a_ratio_removes_the_units_with_the_smallest_weights():
    module = Perceptron()
    with torch.no_grad():
        for unit in (2, 5, 11, 12):
            module.up.weight[unit] *= 1e-3
            module.down.weight[:, unit] *= 1e-3
    record, _ = pruned(module, X, ratio=0.25)
    assert record.decisions["main/up"] == [u for u in range(16) if u not in (2, 5, 11, 12)]
    assert record.drift.rel_l2 < 0.1


def test_recorded_units_are_removed_again_from_other_weights():
    record, _ = pruned(Perceptron(), X, ratio=0.5)
    other = effc.trace(Perceptron().eval(), X)
    again = effc.apply(PruneDims(ratio=0.5), other, recorded=record.decisions)
    assert again.decisions == record.decisions


def test_groups_are_chosen_by_pattern():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    record, _ = pruned(module, X, ratio=0.5, groups="2*")
    assert list(record.decisions) == ["main/2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either a keep-set or a ratio"),
        ({"keep": {"up": (0,)}, "ratio": 0.5}, "either a keep-set or a ratio"),
        ({"keep": {"upp": (0,)}}, "did you mean 'up'"),
        ({"keep": {"up": ()}}, "is empty"),
        ({"keep": {"up": (0, 16)}}, "is of another model: it has 16 units"),
        ({"ratio": 0.95, "budget": "global"}, "leaves a tenth of every group"),
        ({"keep": {"up": (3, 3)}}, "each once"),
        ({"keep": {"up": (-1, 2)}}, "numbers from 0 to 15"),
        ({"keep": {"down": (0,)}}, "cannot lose a unit: the output 'output' has it"),
        ({"ratio": 0.5, "groups": "down"}, "the output 'output' has it"),
        ({"ratio": 0.5, "groups": "nowhere"}, "no group of 'nowhere'"),
        ({"ratio": 0.01}, "less than one unit of every group; the largest has 16"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(options, words):
    with pytest.raises(PreconditionError) as error:
        pruned(Perceptron(), X, **options)
    assert words in str(error.value) and error.value.hint


def test_a_layer_norm_is_refused_with_the_pass_that_helps():
    module = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    with pytest.raises(PreconditionError) as error:
        pruned(module, X, keep={"0": (0, 1)})
    assert "layernorm-to-rmsnorm" in str(error.value)


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.5])
def test_a_ratio_of_nothing_or_everything_is_no_recipe(ratio):
    with pytest.raises(RecipeError, match=r"passes\[0\].ratio: should be (less|greater) than"):
        recipe.parse(f"source: {{transformers: d}}\npasses: [{{pass: prune-dims, ratio: {ratio}}}]")


def test_a_ratio_of_nearly_everything_leaves_a_unit():
    _, program = pruned(Perceptron(), X, ratio=0.999)
    assert program.only().tensors()["up.weight"].shape == (1, 8)


@pytest.mark.slow
def test_a_post_norm_encoder_keeps_its_width_and_loses_heads_and_feed_forward_width():
    program, feeds = program_of("bert", 0, False)
    width = "body.embeddings.word_embeddings@1"
    with pytest.raises(PreconditionError) as error:
        effc.apply(PruneDims(keep={width: (0, 1)}), program.clone())
    assert "mean and variance over it at body.embeddings.LayerNorm" in str(error.value)
    assert "a pre-LN model" in error.value.hint
    smaller = program.clone()
    words = ("*word_embeddings@1", "*.query:0", "*.intermediate.dense")
    record = effc.apply(PruneDims(ratio=0.5, groups=words), smaller)
    assert len(record.decisions) == 4 and not any(width in key for key in record.decisions)
    keep = {key.removeprefix("main/"): units for key, units in record.decisions.items()}
    wanted = masked_run(coupled_dims(program.only()), keep, feeds)
    assert drift(wanted, smaller.run(feeds)).rel_l2 <= 1e-5


def test_an_unknown_importance_is_refused():
    with pytest.raises(RecipeError, match="magnitude"):
        pruned(Perceptron(), X, ratio=0.5, importance="magnitud")


@pytest.mark.parametrize("units", [[0, 99], [], [1, 1], ["a"]])
def test_a_record_of_another_model_is_refused(units):
    program = effc.trace(Perceptron().eval(), X)
    before = program.weight_bytes()
    with pytest.raises(CalibrationError, match="another model"):
        effc.apply(PruneDims(ratio=0.5), program, recorded={"main/up": units})
    assert program.weight_bytes() == before


# -- every family


@cache
def program_of(family, seed, converted):
    torch.manual_seed(seed)
    program, feeds = architectures.program_of(architectures.FAMILIES[family](random.Random(seed)))
    if converted:
        effc.apply(LayerNormToRMSNorm(), program, probes={"main": [feeds]})
    return program, feeds


def families():
    for name in architectures.FAMILIES:
        need = architectures.NEEDS.get(name)
        absent = need is not None and importlib.util.find_spec(need) is None
        yield pytest.param(name, marks=pytest.mark.skipif(absent, reason=f"{need} is not here"))


@pytest.mark.slow
@pytest.mark.parametrize("family", list(families()))
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_removed_is_masked(family, data):
    """For random keep-sets of random groups: same operators, smaller constants, the outputs of the masked graph."""
    converted = family in architectures.CONVERTED and data.draw(st.booleans())
    program, feeds = program_of(family, data.draw(st.integers(0, 1)), converted)
    coupling = coupled_dims(program.only())
    groups = coupling.prunable()
    chosen = data.draw(st.lists(st.sampled_from(groups), min_size=1, unique_by=lambda g: g.name))
    keep = {}
    for group in chosen:
        flags = data.draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size))
        keep[group.name] = tuple(u for u, flag in enumerate(flags) if flag) or (0,)
    wanted = masked_run(coupling, keep, feeds)
    smaller = program.clone()
    record = effc.apply(PruneDims(keep=keep), smaller)
    assert drift(wanted, smaller.run(feeds)).rel_l2 <= 1e-5
    assert record.sites == sum(len(keep[g.name]) < g.size for g in chosen)
    assert problems(smaller.only()) == []
    before, after = (Counter(_kind(op) for op in ops(p)) for p in (program, smaller))
    assert before == after
    _has_smaller_constants(coupling, smaller.only(), keep)


def _kind(op):
    """What a part or a shape is called does not matter."""
    return {"chunk": "split", "split_with_sizes": "split", "view": "reshape"}.get(op, op)


def _has_smaller_constants(coupling, graph, keep):
    sizes = {axis: int(flags.sum()) for axis, flags in coupling.keep(keep).items()}
    for name, tensor in graph.tensors().items():
        dims = coupling.reading.of(coupling.constants[name])
        assert tuple(tensor.shape) == tuple(axes.size_of(axis, sizes) for axis in dims)


def test_recorded_units_that_are_none_are_refused():
    program = effc.trace(
        torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)),
        torch.ones(2, 4),
    )
    (name,) = [group.name for group in coupled_dims(program.only()).prunable()]
    for units in (5, [True, False], [0, 0], [7], None, ["0"]):
        with pytest.raises(effc.errors.CalibrationError, match="none of this model's"):
            effc.apply(PruneDims(ratio=0.5), program.clone(), recorded={f"main/{name}": units})
    with pytest.raises(effc.errors.PreconditionError, match="nothing to importance"):
        effc.apply(PruneDims(keep={name: (0,)}, importance="taylor"), program.clone())
    with pytest.raises(effc.errors.PreconditionError, match="name no group"):
        effc.apply(PruneDims(keep={}), program.clone())
    with pytest.raises(effc.errors.PreconditionError, match="less than one unit"):
        effc.apply(PruneDims(ratio=0.001), program.clone())
