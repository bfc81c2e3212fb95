"""Gated experts change nothing until they are trained, read what a request is about, and never another request's."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from gated import BOTH, FORMS, GATES, SIZES, Told, X, run, scores, stirred, traced, with_experts
from graphs import Call, assert_graph, distance, engine, normal
from torch import nn

import effc
from effc.errors import CalibrationError, PreconditionError
from effc.ir.check import problems
from effc.ir.program import Program
from effc.ir.splice import attached
from effc.nn import rank1
from effc.nn.rank1 import Rank1
from effc.passes.lora import AttachLora
from effc.passes.rank1 import AttachRank1, places
from effc.passes.tune import Tune
from effc.train.graph import InGraph


def of_kind(form, gates):
    """How many gates experts of a form have, with `SIZES`."""
    return rank1.experts(form, SIZES)


KINDS = list(itertools.product(FORMS, GATES))


@pytest.mark.parametrize(("form", "gates"), KINDS)
def test_fresh_experts_change_no_bit(form, gates):
    program = traced()
    record, made = with_experts(program, form=form, gates=gates)
    assert record.sites == 2 and record.drift.max_abs == 0 and problems(made.only()) == []
    s = scores(4, of_kind(form, gates))
    assert torch.equal(run(program), run(made, s=s))
    assert torch.equal(run(program, X[:1, :3]), run(made, X[:1, :3], s[:1]))
    assert distance(run(program), run(stirred(made), s=s)) > 1e-3
    assert ("intuition" in made.only().inputs) == (gates in ("both", "intuition"))
    assert len(places(made.only())) == len(places(stirred(made).only())) == 2


def test_experts_stand_beside_their_layer():
    _, program = with_experts(sizes=(2, 3), select=effc.Select(module="up"))
    assert_graph(
        program,
        """
        %x: f32[batch, sequence, 12] = input
        %intuition: f32[batch, 6] = input
        %linear: f32[batch, sequence, 16] = linear(%x, @up.weight, @up.bias)
        %sym_size_int_5 = sym_size(%linear, 1)
        %sym_size_int_6 = sym_size(%intuition, 0)
        %linear_2: f32[batch, sequence, 2] = linear(%x, @up.rank1_A)
        %unsqueeze: f32[batch, 1, 6] = unsqueeze(%intuition, 1)
        %linear_3: f32[batch, sequence, 6] = linear(%x, @up.rank1_R)
        %softmax: f32[batch, sequence, 6] = softmax(%linear_3, -1)
        %mul: f32[] = mul(@up.rank1_w, 100)
        %sigmoid: f32[] = sigmoid(%mul)
        %mul_1: f32[] = mul(%sigmoid, 6)
        %mul_2: f32[batch, sequence, 6] = mul(%softmax, %mul_1)
        %rsub: f32[] = rsub(%sigmoid, 1)
        %mul_3: f32[] = mul(%rsub, 4)
        %mul_4: f32[batch, 1, 6] = mul(%unsqueeze, %mul_3)
        %add: f32[batch, sequence, 6] = add(%mul_2, %mul_4)
        %unsqueeze_1: f32[batch, sequence, 2, 1] = unsqueeze(%linear_2, -1)
        %reshape: f32[batch, sequence, 2, 3] = reshape(%add, [%sym_size_int_6, %sym_size_int_5, 2, 3])
        %mul_5: f32[batch, sequence, 2, 3] = mul(%unsqueeze_1, %reshape)
        %sum_1: f32[batch, sequence, 3] = sum(%mul_5, [-2])
        %mul_6: f32[] = mul(@up.rank1_v, 100)
        %sigmoid_1: f32[] = sigmoid(%mul_6)
        %mul_7: f32[] = mul(%sigmoid_1, 1)
        %mul_8: f32[batch, sequence, 3] = mul(%sum_1, %mul_7)
        %linear_4: f32[batch, sequence, 16] = linear(%mul_8, @up.rank1_B)
        %add_1: f32[batch, sequence, 16] = add(%linear, %linear_4)
        %relu: f32[batch, sequence, 16] = relu(%add_1)
        %linear_1: f32[batch, sequence, 12] = linear(%relu, @down.weight, @down.bias)
        return output=%linear_1
        """,
    )


def explicit(tensors, x, s, form, gates, coefficient=4.0, gain=1.0):
    """The change of one layer as the sum of its experts, in loops over float64: x [batch, length, in]."""
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    x, s = x.double().numpy(), s.double().numpy()
    m = SIZES[1]
    count = rank1.experts(form, SIZES)

    def sigmoid(value):
        return 1 / (1 + np.exp(-100 * value))

    made = np.zeros((*x.shape[:2], len(t[rank1.B])))
    for row, place in itertools.product(range(x.shape[0]), range(x.shape[1])):
        token = x[row, place]
        gate = np.ones(count)
        if gates in ("both", "router"):
            logits = t[rank1.ROUTER] @ token
            share = np.exp(logits) / np.exp(logits).sum() * (1 if form == "groups" else count)
            gate = share
        if gates == "intuition":
            gate = coefficient * s[row]
        if gates == "both":
            omega = sigmoid(t[rank1.MIX])
            gate = omega * share + (1 - omega) * coefficient * s[row]
        beta = gain * (1 if form == "groups" else sigmoid(t[rank1.SIZE]))
        for e in range(count):
            if form == "pairs":
                i, j = divmod(e, m)
                made[row, place] += beta * gate[e] * t[rank1.B][:, j] * (t[rank1.A][i] @ token)
            elif form == "single":
                made[row, place] += beta * gate[e] * t[rank1.B][:, e] * (t[rank1.A][e] @ token)
            else:
                for k in range(e * m, (e + 1) * m):
                    made[row, place] += beta * gate[e] * t[rank1.B][:, k] * (t[rank1.A][k] @ token)
    return made


def drawn(form, gates, seed=0, layer=(7, 5)):
    draw = torch.Generator().manual_seed(seed)
    shapes = rank1.shapes(form, gates, SIZES, layer)
    return {
        name: torch.randn(shape, generator=draw, dtype=torch.float64) * (1 if shape else 0.01)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("form", "gates"), KINDS)
def test_the_module_is_the_sum_of_its_experts(form, gates):
    tensors, x = drawn(form, gates), normal(2, 3, 5).double()
    s = scores(2, of_kind(form, gates)).double()
    module = Rank1(tensors, SIZES, form=form, gates=gates, coefficient=3.0, gain=0.5)
    found = module(x, torch.zeros(2, 3, 7, dtype=torch.float64), s).detach().numpy()
    np.testing.assert_allclose(found, explicit(tensors, x, s, form, gates, 3.0, 0.5), atol=1e-12)


@pytest.mark.parametrize("gates", GATES)
def test_a_tokens_update_has_the_rank_of_the_smaller_side_however_many_experts(gates):
    """Of pairs at most min(n, m); one to one, the same number of experts have the rank of their number."""
    tensors, x = drawn("pairs", gates, layer=(30, 20)), normal(1, 1, 20).double()
    module = Rank1(tensors, SIZES, gates=gates)
    s = scores(1).double()
    gate = torch.ones(6) if gates == "uniform" else module.gate(x, s)[0, 0].detach()
    made = rank1.update(tensors[rank1.A], tensors[rank1.B], gate, "pairs", SIZES, 1.0)
    ranks = np.linalg.matrix_rank(made.numpy())
    assert ranks == (1 if gates == "uniform" else min(SIZES))
    one = drawn("single", gates, layer=(30, 20))
    gate = torch.rand(6) + 0.1
    each = rank1.update(one[rank1.A], one[rank1.B], gate, "single", SIZES, 1.0)
    assert np.linalg.matrix_rank(each.numpy()) == 6


@pytest.mark.parametrize(("form", "gates"), [k for k in KINDS if k[1] in ("intuition", "uniform")])
def test_gates_that_do_not_read_the_token_are_a_change_of_the_weight(form, gates):
    tensors, x = drawn(form, gates), normal(1, 3, 5).double()
    s = scores(1, of_kind(form, gates)).double()
    module = Rank1(tensors, SIZES, form=form, gates=gates)
    gate = 4 * s[0] if gates == "intuition" else torch.ones(of_kind(form, gates))
    beta = 1.0 if form == "groups" else float(torch.sigmoid(100 * tensors[rank1.SIZE]))
    made = rank1.update(tensors[rank1.A], tensors[rank1.B], gate, form, SIZES, beta)
    found = module(x, torch.zeros(1, 3, 7, dtype=torch.float64), s)
    torch.testing.assert_close(found.detach(), x @ made.T, rtol=0, atol=1e-12)


def test_experts_may_stand_in_any_order():
    """Rows of A, columns of B, rows of the router and clusters permuted together compute the same."""
    tensors, x = drawn("pairs", "both"), normal(2, 3, 5).double()
    s, zero = scores(2).double(), torch.zeros(2, 3, 7, dtype=torch.float64)
    rows, columns = torch.tensor([1, 0]), torch.tensor([2, 0, 1])
    both = (rows[:, None] * SIZES[1] + columns).reshape(-1)
    moved = {
        **tensors, rank1.A: tensors[rank1.A][rows], rank1.B: tensors[rank1.B][:, columns],
        rank1.ROUTER: tensors[rank1.ROUTER][both],
    }  # fmt: skip
    found = Rank1(moved, SIZES)(x, zero, s[:, both])
    wanted = Rank1(tensors, SIZES)(x, zero, s)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    alone = Rank1(moved, SIZES)(x, zero, s)
    assert distance(wanted.detach(), alone.detach()) > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_what_a_request_is_about_changes_its_own_row_and_no_other(form):
    _, program = with_experts(form=form)
    trained = stirred(program)
    s = scores(4, of_kind(form, "both"))
    other = s.clone()
    other[2] = other[2].flip(0)
    before, after = run(trained, s=s), run(trained, s=other)
    assert distance(before[2], after[2]) > 1e-4
    keep = [0, 1, 3]
    assert torch.equal(before[keep], after[keep])
    alone = run(trained, X[2:3], other[2:3])
    torch.testing.assert_close(alone[0], after[2], rtol=1e-5, atol=1e-6)


class Stale(nn.Module):
    """Two kinds of requests look alike and want opposite answers: the true score learns both, another does not."""

    def __init__(self, module):
        super().__init__()
        self.inner, self.layer, self.score = module, nn.Linear(12, 12), scores(4)

    def forward(self, x):
        base = self.layer(x)
        return self.inner(x, base, self.score)


def follows(program, set_score):
    """Whether a program answers otherwise when a request is about something else."""
    answers = []
    for seed in (1, 2):
        feeds = {"x": X, **set_score(scores(4, seed=seed))}
        answers.append(program.run(feeds)["output"])
    return not torch.equal(*answers)


def test_a_score_that_an_export_has_baked_in_is_found_and_ours_is_none():
    torch.manual_seed(0)
    tensors = {n: t.float() for n, t in drawn("pairs", "both", layer=(12, 12)).items()}
    stale = Stale(Rank1(tensors, SIZES))
    baked = effc.trace(stale, {"x": X})

    def by_attribute(score):
        stale.score = score
        return {}

    assert not follows(baked, by_attribute) and baked.only().inputs == ("x",)
    _, program = with_experts()
    assert follows(stirred(program), lambda score: {"intuition": score})


def test_trainables_are_those_of_the_papers_formula():
    """Llama2-7B: seven layers in each of 32 blocks, the head without."""
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]

    def count(form, gates, sizes):
        return 32 * sum(
            int(np.prod(shape)) for each in layer for shape in rank1.shapes(form, gates, sizes, each).values()
        )  # fmt: skip

    assert count("pairs", "both", (4, 8)) == 51_872_192
    lora = 32 * sum(32 * (out + inner) for out, inner in layer)
    assert lora == 79_953_920
    assert count("groups", "router", (8, 4)) == lora + 32 * 8 * (6 * 4096 + 11008) == 89_063_424
    assert count("single", "both", (4, 8)) == lora + 32 * 32 * (6 * 4096 + 11008) + 2 * 7 * 32


def test_only_experts_are_trained():
    record, made = with_experts()
    graph = made.only()
    found = Tune().trained(graph)
    assert found == attached(graph) and len(found) == 2 * 5
    assert sum(graph.tensors()[n].numel() for n in found) == record.notes["main/parameters"]
    module = InGraph(graph, found)
    module({"x": X, "intuition": scores(4)})["output"].square().sum().backward()
    grads = {n: module.weights[place].grad for n, place in module.places.items()}
    assert all(g is not None for g in grads.values())
    assert float(grads["up.rank1_B"].abs().max()) > 0 == float(grads["up.rank1_R"].abs().max())


@pytest.mark.parametrize(("router", "rank"), [("zero", 1), ("drawn", 3)])
def test_columns_are_one_for_ever_unless_the_router_tells_them_apart(router, rank):
    _, made = with_experts(sizes=(2, 3), gates="router", router=router)
    module = InGraph(made.only(), Tune().trained(made.only()))
    assert torch.equal(module({"x": X})["output"], run(traced(), X))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (module({"x": X})["output"] - X.sum(-1, keepdim=True)).square().mean().backward()
        optimizer.step()
    b = module.weights[module.places["up.rank1_B"]]
    assert int(torch.linalg.matrix_rank(b.detach(), rtol=1e-3)) == rank


def test_training_follows_what_requests_are_about():
    """Requests of two kinds look alike and want opposite answers: the true score learns both, another does not."""
    _, made = with_experts()
    kind = torch.arange(64) % 2
    told = nn.functional.one_hot(kind * 3, 6).float()
    x = normal(64, 5, 12, seed=3)
    sign = 1.0 - 2.0 * kind[:, None, None]
    lost = {}
    for word, s in (("true", told), ("shuffled", told[torch.tensor([0, 0, 1, 1] * 16)])):
        module = InGraph(made.only(), Tune().trained(made.only()))
        optimizer = torch.optim.Adam(module.parameters(), lr=0.005)
        base = run(traced(), x)
        for _ in range(200):
            loss = (
                (module({"x": x, "intuition": s})["output"] - base - sign * x[..., :1])
                .square()
                .mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        lost[word] = float(loss.detach())
    assert lost["true"] < 0.6 * lost["shuffled"]


def test_a_missing_score_is_named():
    _, program = with_experts()
    with pytest.raises(CalibrationError, match="no input 'intuition'"):
        effc.apply(Tune(steps=1), program.clone(), train=effc.trainer(traced(), [{"x": X.numpy()}]))
    with pytest.raises(KeyError, match="intuition"):
        program.run({"x": X})


def test_an_input_of_the_model_itself_serves_where_it_has_one():
    program = effc.trace(Told(), {"x": X, "intuition": scores(4)}, dims=BOTH)
    made = program.clone()
    effc.apply(AttachRank1(sizes=SIZES), made)
    assert made.only().inputs == ("x", "intuition")
    assert not torch.equal(run(stirred(made)), run(stirred(made), s=scores(4, seed=3)))
    with pytest.raises(PreconditionError, match=r"'intuition' is .*, and the gates read .*8"):
        effc.apply(AttachRank1(sizes=(2, 4)), program)


def test_layers_that_do_not_read_a_row_for_every_request_are_refused():
    module = Call(lambda self, x: self.fc(x.reshape(-1, 12)), fc=nn.Linear(12, 12))
    program = traced(module)
    with pytest.raises(
        PreconditionError, match="fc does not read a row for every request"
    ) as error:
        effc.apply(AttachRank1(sizes=SIZES), program)
    assert "gates: router" in error.value.hint
    assert effc.apply(AttachRank1(sizes=SIZES, gates="router"), program).sites == 1


def test_a_layer_that_runs_twice_has_one_set_of_experts():
    module = Call(lambda self, x: self.fc(torch.relu(self.fc(x))), fc=nn.Linear(12, 12))
    record, made = with_experts(traced(module))
    assert record.sites == 2 and len(attached(made.only())) == 5
    assert len(places(made.only())) == 2


def test_what_cannot_be_attached_is_refused():
    _, made = with_experts()
    with pytest.raises(PreconditionError, match="has experts already"):
        effc.apply(AttachRank1(sizes=SIZES), made)
    with pytest.raises(PreconditionError, match="no linear layer"):
        effc.apply(AttachRank1(sizes=SIZES, select=effc.Select(module="nowhere")), traced())
    with pytest.raises(PreconditionError, match="ranks are more than up has"):
        effc.apply(AttachRank1(sizes=(4, 8), form="single"), traced())


def test_graphs_of_one_model_get_the_same_experts():
    graph = traced().only()
    roles = {role: dataclasses.replace(graph.clone(), role=role) for role in ("a", "b")}
    program = Program(roles)
    effc.apply(AttachRank1(sizes=SIZES), program)
    a, b = (program[role].tensors() for role in roles)
    assert all(torch.equal(a[name], b[name]) for name in a) and "up.rank1_A" in a


def test_they_stand_beside_low_rank_adapters():
    _, made = with_experts()
    assert effc.apply(AttachLora(rank=2), made).sites == 2
    assert torch.equal(run(traced()), run(made))


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize("form", FORMS)
def test_engines_agree_with_torch_for_any_batch_and_length(form, target, tmp_path):
    _, program = with_experts(form=form)
    trained = stirred(program)
    with engine(trained, tmp_path, target) as ran:
        assert [port.name for port in ran.inputs] == ["x", "intuition"]
        for rows, length in ((1, 1), (3, 7), (4, 5)):
            x, s = normal(rows, length, 12), scores(rows, of_kind(form, "both"))
            found = ran({"x": x.numpy(), "intuition": s.numpy()})["output"]
            np.testing.assert_allclose(found, run(trained, x, s).numpy(), atol=1e-5)


def test_a_curve_tells_how_gates_are_shared_and_how_much_experts_count():
    _, program = with_experts()
    draw = np.random.default_rng(0)
    batches = [
        {"x": draw.normal(size=(4, 5, 12)).astype("f4"), "intuition": draw.random((4, 6), "f4")}
        for _ in range(4)
    ]
    target = stirred(program)
    record = effc.apply(Tune(steps=6, lr=1e-3), program, train=effc.trainer(target, batches))
    first, last = (record.notes["main/curve"][i]["told"]["gates"] for i in (0, -1))
    assert first["share of the router, mean"] == first["strength, mean"] == 0.5
    assert last["strength, mean"] != 0.5
    assert sum(last["share of the router"]) == sum(last["strength"]) == 2  # beside each layer
    lora = traced()
    effc.apply(AttachLora(rank=2), lora)
    other = effc.apply(Tune(steps=2), lora, train=effc.trainer(traced(), [{"x": X.numpy()}]))
    assert other.notes["main/curve"][-1]["told"] == {}
