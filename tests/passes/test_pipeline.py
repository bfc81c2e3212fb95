"""The pipeline holds passes to their word, and gives the program back where one breaks it."""

from dataclasses import dataclass, field

import pytest
import torch
from graphs import Call, batches, node_of, normal, ops
from torch import nn

import effc
from effc.calib.collectors import MinMax
from effc.calib.probe import Probe
from effc.dialect import Dialect
from effc.errors import CalibrationError, PassError, PostconditionError, PreconditionError
from effc.ir.check import Drift
from effc.ir.edit import (
    add_output,
    insert,
    is_constant,
    rebind,
    refresh,
    replace,
    tensor_name,
    tensor_of,
)
from effc.passes.base import Pass, PassRecord
from effc.passes.pipeline import apply, run
from effc.quant.scheme import Scheme

aten = torch.ops.aten


def scale_weights(graph, factor):
    for node in effc.Select(op="linear").sites(graph):
        name = tensor_name(graph, node.args[1])
        rebind(graph, name, tensor_of(graph, node.args[1]) * factor, f"times {factor}")


@dataclass(frozen=True, kw_only=True)
class DropRelu(Pass):
    """Says that it is exact, which holds only where nothing is negative."""

    name = "drop-relu"

    def rewrite(self, graph, stats):
        nodes = effc.Select(op="relu").sites(graph)
        for node in nodes:
            replace(graph, node, node.args[0])
        return len(nodes)


@dataclass(frozen=True, kw_only=True)
class Clip(Pass):
    """Clips the inputs of linear layers to what was measured: lossy, and decided from data."""

    name = "clip"
    effect = "lossy"
    limit: float | None = None

    def resolve(self, dialect):
        return Clip(graphs=self.graphs, limit=self.limit or float(dialect.activation.high))

    def probes(self, graph):
        for node in effc.Select(op="linear").sites(graph):
            yield Probe(key=node.name, node=node.args[0], collector=MinMax())

    def rewrite(self, graph, stats):
        nodes = effc.Select(op="linear").sites(graph)
        for node in nodes:
            low, high = stats.decide(node.name, lambda n=node: list(stats[n.name].range(Scheme())))
            node.update_arg(0, insert(graph, node, aten.clamp.default, (node.args[0], low, high)))
        return len(nodes)


@pytest.fixture
def program():
    torch.manual_seed(0)
    module = Call(lambda self, x: torch.relu(self.fc(x)), fc=nn.Linear(4, 4))
    return effc.trace(module, normal(2, 4))


def probes(*shape):
    return {"main": [{"x": normal(*shape)}]}


def test_an_exact_pass_that_lies_is_caught_and_undone(program):
    before = effc.show(program)
    with pytest.raises(
        PostconditionError, match=r"drop-relu is exact but moved the outputs by [0-9.]+ "
    ):
        apply(DropRelu(), program, probes=probes(8, 4))
    assert effc.show(program) == before


@dataclass(frozen=True, kw_only=True)
class DropShift(Pass):
    """Leaves out what is added and taken away again."""

    name = "drop-shift"

    def rewrite(self, graph, stats):
        nodes = [*effc.Select(op="add").sites(graph), *effc.Select(op="sub").sites(graph)]
        for node in nodes:
            replace(graph, node, node.args[0])
        return len(nodes)


@pytest.mark.parametrize("back", [1e4, 1.0002e4])
def test_rounding_is_told_from_a_fault_in_float64(back, caplog):
    parts = {"fc": nn.Linear(4, 4)}
    program = effc.trace(Call(lambda self, x: self.fc(x) + 1e4 - back, **parts), normal(2, 4))
    caplog.set_level("INFO", logger="effc")
    if back == 1e4:
        record = apply(DropShift(), program, probes=probes(8, 4))
        assert record.drift.rel_l2 > 1e-4  # a float32 of 10,000 has steps of 0.001
        assert "drop-shift moved the outputs by" in caplog.text and "in float64" in caplog.text
    else:
        with pytest.raises(PostconditionError, match="drop-shift is exact but moved"):
            apply(DropShift(), program, probes=probes(8, 4))
        assert ops(program) == ["linear", "add", "sub"]


@dataclass(frozen=True, kw_only=True)
class AddShift(Pass):
    """Adds a number and takes it away again, which float64 does not notice."""

    name = "add-shift"
    shift: float

    def rewrite(self, graph, stats):
        (node,) = effc.Select(op="relu").sites(graph)
        added = insert(graph, node, aten.add.Scalar, (node.args[0], self.shift))
        node.update_arg(0, insert(graph, node, aten.sub.Scalar, (added, self.shift)))
        return 1


@pytest.mark.parametrize("shift", [1e8, 1e300])
def test_rounding_that_a_pass_brings_is_a_fault(program, shift):
    """The outputs are all 0, or no numbers; in float64 the first are right."""
    with pytest.raises(PostconditionError, match="add-shift is exact but moved"):
        apply(AddShift(shift=shift), program, probes=probes(8, 4))


def test_an_exact_pass_is_believed_where_it_tells_the_truth(program):
    graph = program.only()
    rebind(graph, "fc.bias", torch.full((4,), 100.0), "never negative")
    record = apply(DropRelu(), program, probes=probes(8, 4))
    assert (record.sites, record.nodes, record.drift.rel_l2) == (1, (2, 1), 0.0)
    assert ops(program) == ["linear"]


def test_the_first_batch_of_the_data_serves_where_no_probes_are_given(program):
    with pytest.raises(PostconditionError):
        apply(DropRelu(), program, batches("x", 8, 4))


def test_a_value_that_is_no_number_on_one_side_counts_as_moved(program):
    @dataclass(frozen=True, kw_only=True)
    class Spoil(Pass):
        name = "spoil"

        def rewrite(self, graph, stats):
            scale_weights(graph, float("nan"))
            return 1

    with pytest.raises(PostconditionError, match="by inf"):
        apply(Spoil(), program, probes=probes(8, 4))


def test_an_edit_that_is_not_counted_is_caught(program):
    @dataclass(frozen=True, kw_only=True)
    class Silent(DropRelu):
        def rewrite(self, graph, stats):
            super().rewrite(graph, stats)
            return 0

    with pytest.raises(PassError, match="says it changed nothing but edited graph 'main'"):
        apply(Silent(), program)
    assert ops(program) == ["linear", "relu"]


def test_an_output_that_a_pass_does_not_say_it_adds_or_drops_is_caught(program):
    """What one side gives alone cannot be compared, so nobody would notice that it is gone."""

    @dataclass(frozen=True, kw_only=True)
    class Adds(Pass):
        name = "adds"
        told: bool = False

        def gives(self, outputs):
            return (*outputs, "more") if self.told else super().gives(outputs)

        def rewrite(self, graph, stats):
            add_output(graph, "more", next(n for n in graph.nodes if n.op == "call_function"))
            return 1

    with pytest.raises(
        PassError, match="adds left graph 'main' with outputs output, more, and says output"
    ) as refused:
        apply(Adds(), program, probes=probes(8, 4))
    assert "`gives`" in refused.value.hint and program.only().outputs == ("output",)
    apply(Adds(told=True), program, probes=probes(8, 4))
    assert program.only().outputs == ("output", "more")


def test_a_changed_weight_that_is_not_counted_is_caught(program):
    @dataclass(frozen=True, kw_only=True)
    class Silent(Pass):
        name = "silent"

        def rewrite(self, graph, stats):
            scale_weights(graph, 2.0)
            return 0

    kept = program.only().tensors()["fc.weight"]
    with pytest.raises(PassError, match="says it changed nothing"):
        apply(Silent(), program)
    assert torch.equal(program.only().tensors()["fc.weight"], kept)


def test_a_pass_with_nothing_to_do_leaves_the_program_alone(program):
    apply(DropRelu(), program)
    record = apply(DropRelu(), program, probes=probes(8, 4))
    assert (record.sites, record.drift) == (0, None)


def test_an_error_inside_a_pass_becomes_a_pass_error_and_is_undone(program):
    @dataclass(frozen=True, kw_only=True)
    class Stumble(DropRelu):
        name = "stumble"

        def rewrite(self, graph, stats):
            super().rewrite(graph, stats)
            scale_weights(graph, 3.0)
            raise ZeroDivisionError("no such thing")

    x, before = normal(3, 4), effc.show(program)
    wanted = program.run(x=x)["output"]
    with pytest.raises(
        PassError, match="stumble failed: ZeroDivisionError: no such thing"
    ) as caught:
        apply(Stumble(), program)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert effc.show(program) == before
    assert torch.equal(program.run(x=x)["output"], wanted)


def test_a_broken_graph_is_named_and_undone(program):
    @dataclass(frozen=True, kw_only=True)
    class Forget(Pass):
        name = "forget"

        def rewrite(self, graph, stats):
            del graph.origins["fc.weight"]
            return 1

    with pytest.raises(PassError, match=r"forget left a broken graph: fc.weight has no origin"):
        apply(Forget(), program)
    assert "fc.weight" in program.only().origins


def test_conditions_before_and_after_are_asked(program):
    @dataclass(frozen=True, kw_only=True)
    class Picky(DropRelu):
        first: bool = False

        def requires(self, program):
            if self.first:
                raise PreconditionError("not yet", hint="put `drop-noops` before `picky`")

        def ensures(self, program):
            raise PostconditionError("not done")

    with pytest.raises(PreconditionError, match="drop-noops"):
        apply(Picky(first=True), program)
    with pytest.raises(PostconditionError, match="not done"):
        apply(Picky(), program)
    assert ops(program) == ["linear", "relu"]


def test_decisions_are_recorded_and_replay_on_new_weights_without_data(program):
    other = program.clone()
    rebind(other.only(), "fc.weight", normal(4, 4, seed=9), "new")
    made = apply(Clip(), program, batches("x", 8, 4))
    assert made.drift is not None
    low, high = made.decisions["linear"]
    assert low < 0 < high
    again = apply(Clip(), other, recorded=made.decisions)
    assert again.decisions == made.decisions
    clamp = node_of(other, "clamp")
    assert list(clamp.args[1:]) == [low, high]


def test_a_decision_that_was_not_recorded_is_an_error(program):
    with pytest.raises(CalibrationError, match="say nothing about 'linear'") as caught:
        apply(Clip(), program, recorded={"somewhere else": [0.0, 1.0]})
    assert "calibrate again" in caught.value.hint
    assert ops(program) == ["linear", "relu"]


def test_a_pass_that_measures_must_have_data(program):
    with pytest.raises(CalibrationError, match="there is no calibration data"):
        apply(Clip(), program)


def test_the_dialect_fills_in_what_was_left_to_it(program):
    record = apply(Clip(), program, batches("x", 8, 4), dialect=Dialect(name="t", opset=0))
    assert record.options == {"limit": 255.0}


def test_a_pass_keeps_to_its_roles():
    graphs = {
        role: effc.trace(Call(lambda self, x: torch.relu(x)), normal(2, 3), role=role).only()
        for role in ("encode", "decode")
    }
    program = effc.Program(graphs)
    assert apply(DropRelu(graphs=("decode",)), program).sites == 1
    assert ops(program["encode"]) == ["relu"]
    assert ops(program["decode"]) == []


def test_run_leaves_the_callers_program_alone(program):
    made, records = run([DropRelu(), DropRelu()], program)
    assert [record.sites for record in records] == [1, 0]
    assert ops(made) == ["linear"]
    assert ops(program) == ["linear", "relu"]


def test_one_line_says_what_was_done():
    record = PassRecord(
        name="fold-batchnorm",
        options={},
        effect="exact",
        sites=53,
        seconds=0.42,
        nodes=(1204, 1151),
        bytes=(1000, 1000),
    )
    assert (
        record.line()
        == "fold-batchnorm: 53 sites, 1 204 → 1 151 nodes, not verified: no probes, 0.4 s"
    )
    smaller = PassRecord(
        name="quantize",
        options={},
        effect="lossy",
        sites=37,
        seconds=1.0,
        nodes=(10, 20),
        bytes=(90_900_000, 22_800_000),
        drift=Drift(max_abs=0.5, rel_l2=0.0123),
    )
    wanted = "quantize: 37 sites, 10 → 20 nodes, 90.9 → 22.8 MB, drift 0.012, 1.0 s"
    assert smaller.line() == wanted


@dataclass(frozen=True, kw_only=True)
class _Options(DropRelu):
    word: str | None = None
    many: tuple[str, ...] = ()
    select: effc.Select = field(default_factory=effc.Select)


def test_options_that_were_left_out_are_left_out(program):
    refresh(program.only())
    options = apply(_Options(), program, probes=None).options
    assert "word" not in options
    assert "many" not in options
    assert options["select"] == {"op": "*", "module": "*", "type": "*", "exclude": ()}
    assert is_constant(program.only(), node_of(program, "linear").args[1])
