"""Experts in fewer products compute the same; for one kind of request they fold, exactly where gates stand still."""

import itertools

import numpy as np
import pytest
import torch
from gated import (
    BOTH,
    DIMS,
    FORMS,
    GATES,
    SIZES,
    Told,
    X,
    run,
    scores,
    stirred,
    traced,
    with_experts,
)
from graphs import Call, distance, engine, normal, ops
from torch import nn

import effc
from effc.calib.data import Batch
from effc.errors import CalibrationError, PreconditionError
from effc.ir.check import problems
from effc.ir.edit import rebind
from effc.nn import rank1
from effc.passes.rank1 import AttachRank1
from effc.passes.rank1_fold import BatchRank1, FoldStatic

KINDS = list(itertools.product(FORMS, GATES))


def projections():
    """Three layers that read one value, and one that reads what they give."""
    torch.manual_seed(0)
    parts = {name: nn.Linear(12, 12) for name in "qkvo"}

    def forward(self, x):
        return self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))

    return effc.trace(Call(forward, **parts).eval(), {"x": X}, dims=DIMS)


def gates_of(form):
    return rank1.experts(form, SIZES)


def feeds(count, rows=4):
    return {"x": X[:rows], "intuition": scores(rows, count)}


def in_double(program):
    made = program.clone()
    for name, tensor in made.only().tensors().items():
        rebind(made.only(), name, tensor.double(), "in float64")
    return made


@pytest.mark.parametrize(("form", "gates"), KINDS)
def test_one_product_for_layers_that_read_one_value(form, gates):
    program = stirred(with_experts(projections(), form=form, gates=gates)[1])
    made = program.clone()
    given = feeds(gates_of(form))
    record = effc.apply(BatchRank1(), made, probes={"main": [given]})
    assert record.sites == 4 and record.notes["main/products"] == {"layers": 4, "are": 2}
    assert record.effect == "exact" and record.drift.rel_l2 < 1e-6
    assert problems(made.only()) == []
    assert ops(made).count("softmax") == (2 if gates in ("both", "router") else 0)
    assert ops(made).count("sigmoid") == 0 and ops(made).count("linear") == 4 + 2 + 4
    for rows, length in ((1, 1), (3, 7)):
        x, s = normal(rows, length, 12), scores(rows, gates_of(form))
        torch.testing.assert_close(run(made, x, s), run(program, x, s), rtol=1e-5, atol=1e-6)


def test_numbers_far_from_their_beginning_are_folded_as_well():
    """w so far to either side that one part of the gate is 0 in float32."""
    for value in (-1.0, -0.2, 0.2, 1.0):
        program = stirred(with_experts(projections())[1])
        for name in program.only().tensors():
            if name.endswith(rank1.MIX):
                rebind(program.only(), name, torch.tensor(value), "set")
        made = program.clone()
        record = effc.apply(BatchRank1(), made, probes={"main": [feeds(6)]})
        assert record.drift.rel_l2 < 1e-6 and bool(torch.isfinite(run(made)).all())


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize("form", FORMS)
def test_engines_of_fewer_products_agree_with_torch(form, target, tmp_path):
    program = stirred(with_experts(projections(), form=form)[1])
    made = program.clone()
    effc.apply(BatchRank1(), made)
    with engine(made, tmp_path, target) as ran:
        for rows, length in ((1, 1), (3, 7)):
            x, s = normal(rows, length, 12), scores(rows, gates_of(form))
            found = ran({"x": x.numpy(), "intuition": s.numpy()})["output"]
            np.testing.assert_allclose(found, run(program, x, s).numpy(), atol=1e-5)


def test_no_einsum_is_left_in_an_engine(tmp_path):
    import onnx

    program = stirred(with_experts(projections())[1])
    effc.apply(BatchRank1(), program)
    with engine(program, tmp_path):
        found = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert "Einsum" not in {node.op_type for node in found.graph.node}
    assert [value.name for value in found.graph.input] == ["x", "intuition"]


def one_kind(program, count, rows=3):
    """Batches in which every request is about the same, and that score."""
    s = scores(1, count, seed=9)
    names = program.only().inputs
    every = [
        {"x": normal(rows, 5, 12, seed=seed), "intuition": s.repeat(rows, 1)} for seed in (1, 2)
    ]
    return [Batch(inputs={n: f[n].numpy() for n in names}) for f in every], s


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gates", ["intuition", "uniform"])
def test_gates_that_read_no_token_fold_exactly_for_one_kind_of_request(form, gates):
    program = stirred(with_experts(form=form, gates=gates)[1])
    data, s = one_kind(program, gates_of(form))
    made = program.clone()
    record = effc.apply(FoldStatic(), made, data)
    assert record.sites == 2 and record.notes["main/gates"]["exact"]
    assert record.drift.rel_l2 < 1e-6
    assert effc.show(made, exact=True) == effc.show(traced(), exact=True)
    assert made.only().inputs == ("x",) and problems(made.only()) == []
    found, wanted = run(made), run(program, s=s.repeat(4, 1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert distance(found, run(traced())) > 1e-3


def test_a_fold_of_gates_that_read_tokens_says_how_far_it_is():
    program = stirred(with_experts()[1], by=1.0)
    data, s = one_kind(program, 6)
    made = program.clone()
    record = effc.apply(FoldStatic(), made, data)
    note = record.notes["main/gates"]
    assert not note["exact"] and note["moved by"] > 0.01
    x = torch.from_numpy(data[0].inputs["x"])
    gap = distance(run(program, x, s.repeat(3, 1)), run(made, x))
    assert record.drift.rel_l2 == pytest.approx(gap, rel=1e-3) and gap > 1e-3
    assert gap < distance(run(program, x, s.repeat(3, 1)), run(traced(), x))


def test_a_replay_folds_without_data():
    program = stirred(with_experts()[1])
    data, _ = one_kind(program, 6)
    first, again = program.clone(), program.clone()
    record = effc.apply(FoldStatic(), first, data)
    effc.apply(FoldStatic(), again, recorded=record.decisions)
    assert torch.equal(run(first), run(again))
    broken = {key: {**value, "mean": [1.0]} for key, value in record.decisions.items()}
    with pytest.raises(CalibrationError, match="are not 6 numbers"):
        effc.apply(FoldStatic(), program, recorded=broken)


def test_what_has_no_experts_as_they_were_attached_is_refused():
    for pass_ in (BatchRank1(), FoldStatic()):
        with pytest.raises(PreconditionError, match="has no experts"):
            effc.apply(pass_, traced(), one_kind(traced(), 6)[0])
    _, program = with_experts()
    effc.apply(BatchRank1(), program)
    with pytest.raises(PreconditionError, match="has no experts"):
        effc.apply(FoldStatic(), program, one_kind(program, 6)[0])


def test_folding_needs_what_requests_are_about():
    _, program = with_experts()
    with pytest.raises(CalibrationError, match="no input 'intuition'"):
        effc.apply(FoldStatic(), program, [Batch(inputs={"x": X.numpy()})])


def test_an_input_of_the_model_itself_stays_behind_a_fold():
    program = effc.trace(Told().eval(), {"x": X, "intuition": scores(4)}, dims=BOTH)
    effc.apply(AttachRank1(sizes=SIZES), program)
    effc.apply(FoldStatic(), program, one_kind(program, 6)[0])
    assert program.only().inputs == ("x", "intuition")


def test_samples_without_what_requests_are_about_have_the_example_of_it():
    """As a compile has them, whose samples are those of the model as it came."""
    program = stirred(with_experts()[1])
    record = effc.apply(BatchRank1(), program, probes={"main": [{"x": X}]})
    assert record.drift is not None and record.drift.rel_l2 < 1e-6
