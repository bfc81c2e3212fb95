"""Edits keep a graph honest, and never touch a tensor that somebody else may hold."""

import pytest
import torch
from graphs import Call, assert_graph, node_of, normal, ops
from torch import nn
from torch.export.graph_signature import TensorArgument

import effc
from effc.ir import edit
from effc.ir.check import problems
from effc.ir.edit import (
    insert,
    insert_after,
    is_constant,
    keep_outputs,
    lift,
    rebind,
    refresh,
    replace,
    tensor_name,
    tensor_of,
)
from effc.ir.program import Origin

aten = torch.ops.aten


@pytest.fixture
def program():
    torch.manual_seed(0)
    return effc.trace(
        Call(lambda self, x: torch.relu(self.fc(x)), fc=nn.Linear(4, 2)), normal(3, 4)
    )


def test_a_lifted_tensor_is_a_constant_like_any_other(program):
    graph = program.only()
    relu = node_of(graph, "relu")
    shift = lift(graph, "shift", torch.ones(2), Origin("shift", ("made",)))
    replace(graph, relu, insert(graph, relu, aten.add.Tensor, (relu.args[0], shift)))
    refresh(graph)
    assert_graph(
        program,
        """
        %x: f32[batch, 4] = input
        %linear: f32[batch, 2] = linear(%x, @fc.weight, @fc.bias)
        %add_tensor: f32[batch, 2] = add(%linear, @shift)
        return output=%add_tensor
        """,
    )
    assert is_constant(graph, shift)
    assert tensor_name(graph, shift) == "shift"
    assert torch.equal(tensor_of(graph, shift), torch.ones(2))
    assert graph.origins["shift"] == Origin("shift", ("made",))
    assert problems(graph) == []


def test_a_taken_name_gets_a_number(program):
    graph = program.only()
    names = [tensor_name(graph, lift(graph, "fc.bias", torch.ones(2), Origin("b"))) for _ in "ab"]
    assert names == ["fc.bias_1", "fc.bias_2"]


def test_only_constants_have_a_tensor(program):
    graph = program.only()
    linear = node_of(graph, "linear")
    assert not is_constant(graph, linear)
    assert not is_constant(graph, linear.args[0])
    with pytest.raises(ValueError, match="not a constant"):
        tensor_of(graph, linear)


def test_rebind_leaves_the_clone_its_tensor_and_records_what_was_done(program):
    clone, graph = program.clone(), program.only()
    old = graph.tensors()["fc.weight"].clone()
    rebind(graph, "fc.weight", old * 2, "times 2")
    rebind(graph, "fc.weight", old * 3, "times 1.5")
    assert torch.equal(graph.tensors()["fc.weight"], old * 3)
    assert torch.equal(clone.only().tensors()["fc.weight"], old)
    assert graph.origins["fc.weight"] == Origin("fc.weight", ("times 2", "times 1.5"))
    assert clone.only().origins["fc.weight"] == Origin("fc.weight")


def test_rebind_to_another_shape_is_seen_after_a_refresh(program):
    graph = program.only()
    rebind(graph, "fc.weight", torch.ones(5, 4), "wider")
    rebind(graph, "fc.bias", torch.ones(5), "wider")
    refresh(graph)
    assert "%relu: f32[batch, 5]" in effc.show(program)
    assert program.run(x=normal(1, 4))["output"].shape == (1, 5)


def test_rebind_knows_its_tensors(program):
    with pytest.raises(KeyError, match=r"no tensor 'fc\.wieght'"):
        rebind(program.only(), "fc.wieght", torch.ones(2), "typo")


def test_a_clone_shares_tensors_and_not_edits(program):
    clone = program.clone()
    mine, theirs = program.only().tensors(), clone.only().tensors()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    replace(clone.only(), relu := node_of(clone, "relu"), relu.args[0])
    refresh(clone.only())
    assert ops(clone) == ["linear"]
    assert ops(program) == ["linear", "relu"]


def test_replacing_an_output_keeps_its_name(program):
    graph = program.only()
    relu = node_of(graph, "relu")
    replace(graph, relu, relu.args[0])
    refresh(graph)
    assert graph.outputs == ("output",)
    assert list(program.run(x=normal(1, 4))) == ["output"]


def test_a_node_behind_another_belongs_to_the_same_module(program):
    graph = program.only()
    linear = node_of(graph, "linear")
    new = insert_after(graph, linear, aten.neg.default, (linear,))
    assert new.meta["nn_module_stack"] == linear.meta["nn_module_stack"]
    assert new.meta["val"].shape == linear.meta["val"].shape
    assert linear.next is new


def test_dropped_outputs_take_their_weights_along():
    two = Call(
        lambda self, x: {"a": self.left(x), "b": self.right(x)},
        left=nn.Linear(4, 2),
        right=nn.Linear(4, 2),
    )
    program = effc.trace(two, normal(2, 4))
    keep_outputs(program.only(), ["b"])
    assert program.only().outputs == ("b",)
    assert sorted(program.only().tensors()) == ["right.bias", "right.weight"]
    assert list(program.only().exported.state_dict) == ["right.weight", "right.bias"]
    x = normal(1, 4)
    assert torch.equal(program.run(x=x)["b"], two.right(x).detach())
    assert len(program.module()(x=x)) == 1


def test_refresh_takes_dead_code_and_its_tensors_out(program):
    graph = program.only()
    relu = node_of(graph, "relu")
    shift = lift(graph, "shift", torch.ones(2), Origin("shift"))
    insert(graph, relu, aten.add.Tensor, (relu.args[0], shift))
    lift(graph, "unused", torch.ones(7), Origin("unused"))
    refresh(graph)
    assert ops(graph) == ["linear", "relu"]
    assert sorted(graph.tensors()) == sorted(graph.origins) == ["fc.bias", "fc.weight"]


def test_a_sound_graph_has_no_problems(program):
    assert problems(program.only()) == []


def _no_place(graph):
    with graph.fx.inserting_before(next(iter(graph.fx.nodes))):
        graph.fx.placeholder("stray").meta["val"] = torch.ones(1)


def _not_in_the_graph(graph):
    graph.exported.graph_signature.input_specs[0].arg = TensorArgument("ghost")


def _no_tensor(graph):
    del graph.exported.state_dict["fc.weight"]


def _no_origin(graph):
    del graph.origins["fc.weight"]


def _inputs(graph):
    graph.inputs = ("x", "y")


def _outputs(graph):
    graph.outputs = ()


def _no_shape(graph):
    del node_of(graph, "relu").meta["val"]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (_no_place, "input stray has no place in the signature"),
        (_not_in_the_graph, "signature names ghost, which is not in the graph"),
        (_no_tensor, "fc.weight has no tensor"),
        (_no_origin, "fc.weight has no origin"),
        (_inputs, "2 inputs are named but the graph has 1"),
        (_outputs, "outputs and their names differ in number"),
        (_no_shape, "relu has no shape"),
    ],
)
def test_every_kind_of_break_is_named(program, break_it, words):
    break_it(program.only())
    assert words in problems(program.only())


def test_a_missing_input_is_named(program):
    with pytest.raises(KeyError, match="main needs the inputs x"):
        program.run(y=normal(1, 4))


def test_a_refresh_works_out_what_an_edit_touched_and_no_more(program, monkeypatch):
    graph = program.only()
    seen = []
    real = edit.fake_run
    monkeypatch.setattr(edit, "fake_run", lambda g, n: seen.append(n.name) or real(g, n))
    refresh(graph)
    assert seen == []
    linear = next(n for n in graph.nodes if n.target is torch.ops.aten.linear.default)
    doubled = edit.insert_after(graph, linear, torch.ops.aten.mul.Tensor, (linear, 2.0))
    linear.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    seen.clear()
    refresh(graph)
    readers = {n.name for n in doubled.users if n.op == "call_function"}
    assert set(seen) == {doubled.name} | readers
    seen.clear()
    refresh(graph)
    assert seen == []


def cumulative(call):
    call.target, call.args = aten.cumsum.default, (call.args[0], -1)


@pytest.mark.parametrize(
    ("forward", "change", "shape"),
    [
        (lambda self, x: x.sum(-1) * 1, lambda n: n.update_arg(1, [0]), (4,)),
        (lambda self, x: x.sum(-1, keepdim=True) * 1, lambda n: n.update_arg(2, False), (3,)),
        (lambda self, x: x.sum(-1) * 1, cumulative, (3, 4)),
    ],
    ids=["literal", "flag", "operator"],
)
def test_a_call_changed_in_place_is_worked_out_again_with_its_readers(forward, change, shape):
    program = effc.trace(Call(forward), normal(3, 4), dims={})
    graph = program.only()
    call = next(iter(graph.nodes))
    change(call)
    refresh(graph)
    last = list(graph.nodes)[-1]
    assert tuple(call.meta["val"].shape) == tuple(last.meta["val"].shape) == shape


def test_another_type_is_seen_behind_it():
    forward = lambda self, x: torch.sum(x, -1, dtype=torch.float64) * 1  # noqa: E731
    graph = effc.trace(Call(forward), normal(3, 4)).only()
    call = next(iter(graph.nodes))
    call.kwargs = {"dtype": torch.float32}
    refresh(graph)
    assert list(graph.nodes)[-1].meta["val"].dtype is torch.float32


def test_a_branch_is_refreshed_with_what_feeds_it():
    def forward(self, x):
        y = x + 1
        return torch.cond(y.sum() > 0, lambda v: v * 2, lambda v: v - 1, (y,))

    program = effc.trace(Call(forward), normal(3, 4), dims={})
    graph = program.only()
    add = next(n for n in graph.nodes if n.target is aten.add.Tensor)
    replace(graph, add, insert(graph, add, aten.sub.Tensor, add.args))
    refresh(graph)
    assert tuple(list(graph.nodes)[-1].meta["val"].shape) == (3, 4)


def test_views_of_attention_that_is_called_anew_may_copy():
    def forward(self, x):
        q = x.view(2, 5, 3, 4).transpose(1, 2)
        made = nn.functional.scaled_dot_product_attention(q, q, q)
        return made.transpose(1, 2).contiguous().view(2, 5, 12)

    program = effc.trace(Call(forward), {"x": normal(2, 5, 12)}, dims={})
    graph = program.only()
    wanted = program.run(x=normal(2, 5, 12))["output"]
    (attention,) = [n for n in graph.nodes if n.name.startswith("scaled")]
    for copy in [n for n in graph.nodes if n.name.startswith("contiguous")]:
        replace(graph, copy, copy.args[0])
    again = insert(graph, attention, torch.ops.aten.mul.Tensor, (attention.args[0], 1.0))
    attention.args = (again, *attention.args[1:])
    refresh(graph)
    assert ops(program).count("reshape") == 1
    assert torch.allclose(program.run(x=normal(2, 5, 12))["output"], wanted, atol=1e-6)
