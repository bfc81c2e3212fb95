"""Which dimensions move together, what the groups are called, and who stops those that cannot lose anything."""

import random
import time

import architectures
import pytest
import torch
from graphs import Attention, Call, LlamaNorm, Tied, normal
from torch import nn

import effc
from effc.ir.check import drift
from effc.ir.edit import rebind
from effc.passes.coupling import coupled_dims, masked_run
from effc.passes.fuse import FuseRMSNorm
from effc.passes.prune_dims import PruneDims
from kit import Perceptron, write_factories


def coupling(module, x, **options):
    return coupled_dims(effc.trace(module.eval(), x).only(), **options)


def prunable(found):
    return {group.name: group.size for group in found.prunable()}


def stopped(found):
    return {g.name: str(g.stop) for g in found.groups.values() if not g.is_prunable}


def test_a_hidden_width_is_a_group_and_ports_are_not():
    found = coupling(Perceptron(), normal(2, 8))
    assert prunable(found) == {"up": 16}
    assert stopped(found) == {"up@1": "the input 'x' has it", "down": "the output 'output' has it"}
    group = found.groups["up"]
    assert [(m.tensor, m.dim) for m in group.members] == [
        ("up.weight", 0), ("up.bias", 0), ("down.weight", 1),
    ]  # fmt: skip
    assert (group.writers, group.readers) == (("up",), ("down",))
    assert group.parameters == 8 + 1 + 4 and group.macs == 8 + 4


def test_an_output_may_shrink_where_the_caller_says_so():
    found = coupling(Perceptron(), normal(2, 8), may_shrink=("output",))
    assert prunable(found) == {"up": 16, "down": 4}


def test_heads_and_their_size_are_two_groups_of_one_dimension():
    found = coupling(nn.Sequential(nn.Linear(32, 32), Attention()), normal(2, 5, 32))
    heads = found.groups["1.q:0"]
    assert heads.size == 4
    assert {(m.tensor, m.dim, m.per_unit()) for m in heads.members} == {
        *((f"1.{w}.weight", 0, 8) for w in "qkv"),
        *((f"1.{w}.bias", 0, 8) for w in "qkv"),
        ("1.o.weight", 1, 8),
    }
    assert heads.rewritten == ("1:view", "1:view.1", "1:view.2", "1:reshape")
    assert found.groups["1.q:1"].size == found.groups["1.v:1"].size == 8
    assert {m.tensor for m in found.groups["1.v:1"].members} == {"1.v.weight", "1.v.bias", "1.o.weight"}  # fmt: skip


def test_heads_that_share_keys_are_removed_with_them():
    built = llama(kv=2, again=3)
    found = coupled_dims(architectures.program_of(built)[0].only())
    name = "body.model.layers.0.self_attn.{}"
    assert found.groups[name.format("q_proj:0")].size == 2
    again = found.groups[name.format("q_proj:1")]
    assert again.size == 3
    assert {m.tensor.split(".")[-2] for m in again.members} == {"q_proj", "o_proj"}
    pairs = found.groups[name.format("q_proj:2")]
    assert pairs.size == 4  # rotation turns two at a time, in every layer alike
    assert "body.model.rotary_emb.inv_freq" in {m.tensor for m in pairs.members}


def llama(kv, again, layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=40, num_hidden_layers=layers,
        num_attention_heads=kv * again, num_key_value_heads=kv, head_dim=8,
    )  # fmt: skip
    model = architectures.Text(LlamaForCausalLM(config), "logits", use_cache=False)
    return model.eval(), architectures.tokens(), architectures.TEXT


@pytest.mark.parametrize("order", ["three first", "heads first"])
def test_fused_projections_are_told_apart(order):
    def attend(self, x):
        sizes = (3, 4, 8) if order == "three first" else (4, 3, 8)
        y = self.qkv(x).reshape(2, 5, *sizes).movedim(2 if order == "three first" else 3, 0)
        q, k, v = (z.transpose(1, 2) for z in y.unbind(0))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(2, 5, 32))

    module = Call(attend, qkv=nn.Linear(32, 96), o=nn.Linear(32, 6))
    found = coupled_dims(effc.trace(module.eval(), normal(2, 5, 32), dims={}).only())
    assert set(prunable(found).values()) == {4, 8}
    heads = next(g for g in found.prunable() if g.size == 4)
    assert [m.per_unit() for m in heads.members] == [24, 24, 8]


def test_parts_of_a_concatenation_are_groups_of_their_own():
    def both(self, x):
        return self.last(torch.cat([self.a(x), self.b(x)], -1))

    module = Call(both, a=nn.Linear(4, 6), b=nn.Linear(4, 10), last=nn.Linear(16, 2))
    found = coupling(module, normal(2, 4))
    assert prunable(found) == {"a": 6, "b": 10}
    places = found.groups["b"].members[-1].places.tolist()
    assert places == [-1] * 6 + list(range(10))


def test_a_norm_group_over_two_parts_of_a_concatenation_is_stopped():
    def both(self, x):
        return self.last(self.norm(torch.cat([self.a(x), self.b(x)], 1)))

    parts = {"a": nn.Conv2d(3, 10, 1), "b": nn.Conv2d(3, 6, 1), "norm": nn.GroupNorm(4, 16)}
    module = Call(both, **parts, last=nn.Conv2d(16, 2, 1))
    found = coupled_dims(effc.trace(module.eval(), {"x": normal(2, 3, 4, 4)}).only())
    assert prunable(found) == {"a:0": 2}  # two groups of four; the third has two of each part
    assert any("shares a group of group_norm" in why for why in stopped(found).values())


def test_a_tied_table_gives_width_and_keeps_words():
    class Model(Tied):
        def forward(self, ids):
            return self.head(torch.tanh(self.embed(ids)))

    found = coupled_dims(effc.trace(Model().eval(), {"ids": torch.tensor([[1, 2], [3, 4]])}).only())
    assert set(prunable(found).values()) == {16}
    assert any("looked up by number" in why for why in stopped(found).values())


def test_flattened_channels_take_their_pictures_with_them():
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 2))
    found = coupling(module, normal(2, 3, 4, 4))
    assert prunable(found) == {"0": 6}
    assert found.groups["0"].members[-1].per_unit() == 4


def test_an_unknown_operator_stops_what_it_touches_and_is_named(tmp_path):
    import runpy

    made = runpy.run_path(str(write_factories(tmp_path / "factories.py")))
    module = nn.Sequential(
        nn.Linear(4, 6), made["Odd"](), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    found = coupling(module, normal(2, 4))
    assert prunable(found) == {"2": 8}
    assert stopped(found)["0"] == "nothing is known of odd at 1:odd"


def test_a_softmax_over_channels_stops_them():
    module = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 2))
    assert stopped(coupling(module, normal(2, 4)))["0"] == "a softmax runs over it at 1:softmax"


def test_a_layer_norm_over_the_width_names_the_pass_that_helps():
    module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    group = coupling(module, normal(2, 4)).groups["0"]
    assert group.stop.hint.startswith("put layernorm-to-rmsnorm first")


def test_an_rmsnorm_in_parts_names_the_pass_that_fuses_it():
    module = nn.Sequential(nn.Linear(4, 8), LlamaNorm(8), nn.Linear(8, 2))
    program = effc.trace(module.eval(), normal(2, 4))
    assert "fuse-rmsnorm" in coupled_dims(program.only()).groups["0"].stop.hint
    effc.apply(FuseRMSNorm(), program)
    assert coupled_dims(program.only()).groups["0"].is_prunable


def test_a_free_dimension_is_never_a_group():
    found = coupling(
        Call(lambda self, x: self.a(x).transpose(1, 2), a=nn.Linear(4, 6)), normal(2, 3, 4)
    )
    assert prunable(found) == {}


def test_a_gain_that_something_else_reads_stops_the_norm():
    def norm(self, x):
        y = self.a(x)
        return self.b(nn.functional.rms_norm(y, (6,), self.g, 1e-6) + self.g)

    module = Call(norm, a=nn.Linear(4, 6), b=nn.Linear(6, 2), g=nn.Parameter(torch.rand(6)))
    assert "no gain of its own" in stopped(coupling(module, normal(2, 4)))["a"]


@pytest.mark.parametrize(
    ("function", "free"),
    [
        (lambda y: nn.functional.hardswish(y), True),
        (lambda y: nn.functional.normalize(y, dim=-1), True),
        (lambda y: torch.where(y > 0, y, 0.5), True),
        (lambda y: y - y.amax(-1, keepdim=True), False),
        (lambda y: y - y.mean(-1, keepdim=True), False),
        (lambda y: y.roll(1, -1), False),
        (lambda y: y[:, [0, 2, 1, 3, 4, 5]], False),
        (lambda y: y.cumsum(-1), False),
        (lambda y: torch.stack([y, 2 * y], 1).sum(1), True),
        (lambda y: y.repeat(1, 2)[:, :6], True),
        (lambda y: y.repeat_interleave(2, -1)[:, ::2], True),
        (lambda y: y.movedim(-1, 0).t(), True),
        (lambda y: torch.einsum("bi,bi->b", y, y)[:, None] * y, True),
        (lambda y: torch.einsum("bi,bj->bij", y, y).amax(1), False),
        (lambda y: y.gather(0, torch.zeros_like(y, dtype=torch.long)), True),
    ],
    ids=[
        "hardswish",
        "normalize",
        "where",
        "amax",
        "mean",
        "roll",
        "index",
        "cumsum",
        "stack",
        "repeat",
        "interleave",
        "movedim",
        "einsum",
        "outer",
        "gather",
    ],
)
def test_an_operator_frees_or_stops_a_width(function, free):
    """And where it is freed, what is left computes what the masked graph does."""
    module = Call(lambda self, x: self.b(function(self.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    x = normal(3, 4)
    program = effc.trace(module.eval(), x, dims={})
    found = coupled_dims(program.only())
    assert ("a" in prunable(found)) == free
    if free:
        wanted = masked_run(found, {"a": (0, 2, 3)}, {"x": x})
        effc.apply(PruneDims(keep={"a": (0, 2, 3)}), program)
        assert drift(wanted, program.run(x=x)).rel_l2 < 1e-6


def test_names_of_one_tensor_lose_the_same_units():
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    graph = effc.trace(module.eval(), normal(2, 4)).only()
    assert len(coupled_dims(graph).prunable()) == 3
    rebind(graph, "2.weight", graph.tensors()["1.weight"], "tie")
    assert len(coupled_dims(graph).prunable()) == 1


def test_names_are_the_same_in_another_trace():
    first, second = (
        coupled_dims(architectures.program_of(architectures.vit(random.Random(0)))[0].only())
        for _ in range(2)
    )
    assert list(first.groups) == list(second.groups)


def test_thirty_layers_take_less_than_a_second():
    program, _ = architectures.program_of(llama(kv=2, again=2, layers=30))
    started = time.perf_counter()
    found = coupled_dims(program.only())
    assert time.perf_counter() - started < 1
    assert len(found.prunable()) > 90
