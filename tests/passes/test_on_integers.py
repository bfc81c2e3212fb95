"""Adapters are trained beside weights that are integers, and compute what they do beside what those stand for."""

import numpy as np
import pytest
import torch
from gated import DIMS, Block, X, scores, stirred
from graphs import distance, engine, normal, quantize

import effc
from effc.calib.data import Batch
from effc.errors import PreconditionError
from effc.ir.edit import insert, rebind, tensor_name
from effc.ir.program import Program
from effc.ir.splice import attached
from effc.passes.lora import AttachLora, MergeLora, sites, weight_of
from effc.passes.rank1 import AttachRank1, experts_of
from effc.passes.rank1_fold import BatchRank1
from effc.passes.tune import Tune
from effc.quant.ops import QUANTIZE
from effc.train.graph import InGraph

WAYS = (
    AttachLora(rank=3), AttachLora(rank=3, form="dora"),
    AttachRank1(sizes=(2, 3)), AttachRank1(sizes=(2, 3), form="single", gates="router"),
)  # fmt: skip
FEEDS = {"x": X, "intuition": scores(len(X))}
NARROW = ({"bits": 8}, {"bits": 4, "group": 4})


def on_integers(**options):
    program = effc.trace(Block().eval(), {"x": X}, dims=DIMS)
    quantize(program, activation_bits=16, **options)
    return program


def stood_for(program):
    """The float model whose weights are what the integers stand for."""
    graph = program.only()
    made = effc.trace(Block().eval(), {"x": X}, dims=DIMS)
    for site in sites(graph, effc.Select()):
        rebind(made.only(), f"{site.name}.weight", weight_of(graph, site.layers[0]), "rounded")
    return made


def given(program):
    return {name: FEEDS[name] for name in program.only().inputs}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("options", NARROW, ids=str)
def test_beside_integers_it_computes_what_it_does_beside_what_they_stand_for(options, way):
    program = on_integers(**options)
    reference = stood_for(program)
    base = program.run({"x": X})["output"]
    assert distance(reference.run({"x": X})["output"], base) < 1e-6
    for made in (program, reference):
        assert effc.apply(way, made, probes={"main": [{"x": X}]}).sites == 2
    assert torch.equal(program.run(given(program))["output"], base)  # to the last bit
    found, wanted = (stirred(made).run(given(made))["output"] for made in (program, reference))
    assert distance(wanted, found) < 1e-5 < 1e-2 < distance(base, found)


def by_engine(program, place):
    """How far an engine is from its graph."""
    with engine(program, place) as ran:
        found = ran({n: t.numpy() for n, t in given(program).items()})["output"]
    return distance(program.run(given(program))["output"], found)


def learner(seed=0, steps=60):
    """Who trains towards the float model with other weights, on batches of inputs."""
    draw = np.random.default_rng(seed)
    teacher = stirred(effc.trace(Block().eval(), {"x": X}, dims=DIMS))
    graph = teacher.only()
    for name in ("up.weight", "down.weight"):
        tensor = graph.tensors()[name]
        change = torch.from_numpy(draw.normal(size=(2, *tensor.shape)).astype(np.float32)).mean(0)
        rebind(graph, name, tensor + 0.05 * change, "elsewhere")
    batches = [
        {"x": draw.normal(size=(8, 5, 12)).astype(np.float32), "intuition": np.ones((8, 6), np.float32)}
        for _ in range(4)
    ]  # fmt: skip
    return teacher, effc.trainer(teacher, batches), Tune(steps=steps, lr=1e-2)


@pytest.mark.parametrize("way", WAYS[1:3], ids=str)
@pytest.mark.parametrize("options", NARROW, ids=str)
def test_they_learn_there_and_the_integers_stay(options, way, tmp_path):
    program = on_integers(**options)
    kernels = by_engine(program, tmp_path / "base")  # those of integers may round what they read
    codes = {n: t.clone() for n, t in program.only().tensors().items()}
    effc.apply(way, program)
    teacher, train, tune = learner()
    far = distance(teacher.run({"x": X})["output"], program.run(given(program))["output"])
    record = effc.apply(tune, program, train=train)
    assert record.sites == len(attached(program.only()))
    near = distance(teacher.run({"x": X})["output"], program.run(given(program))["output"])
    assert near < 0.8 * far
    assert all(torch.equal(t, program.only().tensors()[n]) for n, t in codes.items())
    if way.name == "attach-rank1":
        assert set(experts_of(program.only()).layers) == {"up", "down"}
        before = program.clone()
        effc.apply(BatchRank1(), program, probes={"main": [given(program)]})
        assert (
            distance(before.run(given(before))["output"], program.run(given(program))["output"])
            < 1e-6
        )
    assert by_engine(program, tmp_path / "engine") < 1e-5 + 2 * kernels < 0.02


def test_what_was_trained_on_integers_stands_beside_floats_too():
    """Within what rounding the base moves: the adapter itself is the same."""
    program = on_integers(bits=8)
    effc.apply(AttachLora(rank=3), program)
    _, train, tune = learner()
    effc.apply(tune, program, train=train)
    plain = effc.trace(Block().eval(), {"x": X}, dims=DIMS)
    rounded = distance(plain.run({"x": X})["output"], on_integers(bits=8).run({"x": X})["output"])
    effc.apply(AttachLora(rank=3), plain)
    for name in attached(program.only()):
        rebind(plain.only(), name, program.only().tensors()[name], "tuned")
    effc.apply(MergeLora(), plain)
    moved = distance(plain.run({"x": X})["output"], program.run({"x": X})["output"])
    assert moved < 3 * rounded < 0.05


def test_rounded_activations_have_adapters_that_read_floats():
    program = effc.trace(Block().eval(), {"x": X}, dims=DIMS)
    quantize(program, [Batch(inputs={"x": X.numpy()})])
    base = program.run({"x": X})["output"]
    effc.apply(AttachLora(rank=2), program)
    assert torch.equal(base, program.run({"x": X})["output"])
    graph = program.only()
    (first,) = [
        n for n in graph.nodes if tensor_name(graph, n.args[1:2] and n.args[1]) == "up.lora_A"
    ]
    assert first.args[0].op == "placeholder"


@pytest.mark.parametrize("way", WAYS[1:3], ids=str)
def test_they_learn_beside_rounded_activations_too(way, tmp_path):
    program = effc.trace(Block().eval(), {"x": X}, dims=DIMS)
    quantize(program, [Batch(inputs={"x": X.numpy()})])
    kernels = by_engine(program, tmp_path / "base")
    codes = {n: t.clone() for n, t in program.only().tensors().items()}
    effc.apply(way, program)
    teacher, train, tune = learner()
    far = distance(teacher.run({"x": X})["output"], program.run(given(program))["output"])
    effc.apply(tune, program, train=train)
    near = distance(teacher.run({"x": X})["output"], program.run(given(program))["output"])
    assert near < 0.8 * far
    assert all(torch.equal(t, program.only().tensors()[n]) for n, t in codes.items())
    assert by_engine(program, tmp_path / "engine") < 1e-5 + 2 * kernels < 0.02


def test_a_rounded_value_has_the_gradient_of_what_it_was():
    """The same in front of a rounding as behind it, and the value is the rounded one to the last bit."""
    program = effc.trace(Block().eval(), {"x": X}, dims=DIMS)
    quantize(program, [Batch(inputs={"x": X.numpy()})])
    effc.apply(AttachLora(rank=2), program)
    program = stirred(program)
    graph = program.only()
    module = InGraph(graph, attached(graph))
    found = module({"x": X})["output"]
    assert torch.equal(found, program.run({"x": X})["output"])
    found.square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in module.weights)


def test_codes_that_something_else_reads_are_not_trained_through():
    program = effc.trace(Block().eval(), {"x": X}, dims=DIMS)
    quantize(program, [Batch(inputs={"x": X.numpy()})])
    effc.apply(AttachLora(rank=2), program)
    graph = program.only()
    code = next(n for n in graph.nodes if n.target is QUANTIZE)
    (grid,) = code.users
    insert(graph, grid, torch.ops.aten.neg.default, (code,))
    with pytest.raises(PreconditionError, match="no gradient passes those") as error:
        effc.apply(Tune(steps=2), program, train=learner()[1])
    assert "activation_bits: 16" in error.value.hint


def test_integers_alone_are_not_trained():
    with pytest.raises(PreconditionError, match="on integers already") as error:
        effc.apply(Tune(steps=2), on_integers(bits=8), train=learner()[1])
    assert "attach-lora" in error.value.hint


def test_the_order_does_not_matter_to_what_is_computed():
    first, last = on_integers(bits=8), effc.trace(Block().eval(), {"x": X}, dims=DIMS)
    effc.apply(AttachLora(rank=2), first)
    effc.apply(AttachLora(rank=2), last)
    quantize(last, activation_bits=16, bits=8)
    a, b = (stirred(Program({"main": p.only()})).run({"x": X})["output"] for p in (first, last))
    assert distance(a, b) < 1e-6
    assert distance(a, normal(*a.shape)) > 0.1
