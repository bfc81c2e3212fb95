"""A small module is grafted into a graph, and trains there."""

import pytest
import torch
from graphs import Call, assert_graph, node_of, normal
from torch import nn

import effc
from effc.ir.check import problems
from effc.ir.edit import redirect, refresh, replace
from effc.ir.select import module_path
from effc.ir.splice import attached, is_spliced, matched, small_graph, splice


def grafted(module, *, name="adapter"):
    """`relu(fc(x))` with `module` between the two."""
    torch.manual_seed(0)
    model = Call(lambda self, x: torch.relu(self.fc(x)), fc=nn.Linear(4, 4))
    program = effc.trace(model, {"x": normal(2, 3, 4)}, dims={"x": {0: "batch", 1: "sequence"}})
    graph = program.only()
    linear, relu = node_of(graph, "linear"), node_of(graph, "relu")
    (new,) = splice(graph, relu, module, [linear], name)
    relu.replace_input_with(linear, new)
    refresh(graph)
    return model, program


def test_a_linear_layer_is_grafted_with_free_dimensions():
    layer = nn.Linear(4, 4)
    model, program = grafted(layer)
    assert_graph(
        program,
        """
        %x: f32[batch, sequence, 4] = input
        %linear: f32[batch, sequence, 4] = linear(%x, @fc.weight, @fc.bias)
        %linear_1: f32[batch, sequence, 4] = linear(%linear, @adapter.weight, @adapter.bias)
        %relu: f32[batch, sequence, 4] = relu(%linear_1)
        return output=%relu
        """,
    )
    assert problems(program.only()) == []
    x = normal(1, 5, 4)
    torch.testing.assert_close(program.run(x=x)["output"], torch.relu(layer(model.fc(x))).detach())


def test_what_is_grafted_trains_in_the_graph_and_leaves_the_module_alone():
    layer = nn.Linear(4, 4)
    kept = layer.weight.detach().clone()
    _, program = grafted(layer)
    module = program.module()
    parameters = dict(module.named_parameters())
    assert {"adapter.weight", "adapter.bias"} <= set(parameters)
    x, target = normal(2, 3, 4), torch.zeros(2, 3, 4)
    optimizer = torch.optim.SGD(
        [p for n, p in parameters.items() if n.startswith("adapter")], lr=0.1
    )
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(module(x=x), target)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert torch.equal(layer.weight, kept)


def test_frozen_parameters_stay_frozen():
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    _, program = grafted(layer)
    parameters = dict(program.module().named_parameters())
    assert parameters["adapter.weight"].requires_grad
    assert not parameters["adapter.bias"].requires_grad


def test_a_name_may_be_used_twice():
    torch.manual_seed(0)
    program = effc.trace(Call(lambda self, x: torch.relu(x)), normal(2, 4))
    graph = program.only()
    for _ in range(2):
        relu = node_of(graph, "relu")
        (new,) = splice(graph, relu, nn.Linear(4, 4, bias=False), [relu.args[0]], "adapter")
        relu.update_arg(0, new)
    refresh(graph)
    assert sorted(graph.tensors()) == ["adapter.weight", "adapter.weight_1"]


def test_several_inputs_and_outputs():
    class Swap(nn.Module):
        def forward(self, a, b):
            return b * 2, a - b

    program = effc.trace(Call(lambda self, x: (x + 1) * (x * 3)), normal(2, 4))
    graph = program.only()
    add = node_of(graph, "add")
    last = list(graph.nodes)[-1]
    first, second = splice(graph, last, Swap(), list(last.args), "swap")
    replace(graph, last, second)
    graph.fx.output_node().args = ((first,),)
    graph.exported.graph_signature.output_specs[0].arg.name = first.name
    refresh(graph)
    x = normal(1, 4)
    torch.testing.assert_close(program.run(x=x)["output"], x * 3 * 2)
    assert add.users == {} or add not in list(graph.nodes)


def test_more_than_four_inputs_are_refused():
    program = effc.trace(Call(lambda self, x: x + 1), normal(2, 4))
    add = node_of(program, "add")
    with pytest.raises(ValueError, match="up to four inputs, not 5"):
        splice(program.only(), add, nn.Identity(), [add.args[0]] * 5, "many")


class Scaled(nn.Module):
    """A layer beside its input, three tenths of it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x + nn.functional.linear(x, self.weight) * 0.3


def chain():
    """`relu(x) + sigmoid(x)`"""
    program = effc.trace(Call(lambda self, x: torch.relu(x) + torch.sigmoid(x)), normal(2, 4))
    graph = program.only()
    return program, node_of(graph, "relu"), node_of(graph, "sigmoid")


def test_one_trace_serves_modules_that_differ_in_values(monkeypatch):
    from effc.ir import splice as spliced

    program, *sites = chain()
    graph = program.only()
    last = list(graph.nodes)[-1]
    modules = [Scaled(normal(4, 4, seed=s)) for s in (1, 2)]
    small = small_graph(modules[0], [sites[0].meta["val"]])
    monkeypatch.setattr(spliced, "trace", None)  # nothing is traced any more
    for site, module, name in zip(sites, modules, "ab", strict=True):
        (new,) = splice(graph, site.next, module, [site], name, like=small)
        redirect(graph, site, new, [last])
    refresh(graph)
    assert problems(graph) == [] and attached(graph) == ["a.weight", "b.weight"]
    for module, name in zip(modules, "ab", strict=True):
        assert torch.equal(graph.tensors()[f"{name}.weight"], module.weight)


def test_a_tensor_of_the_graph_may_stand_for_a_parameter_and_the_module_is_that_of_the_scope():
    program = effc.trace(
        Call(lambda self, x: torch.relu(self.fc(x)), fc=nn.Linear(4, 4)), normal(2, 4)
    )
    graph = program.only()
    linear, relu = node_of(graph, "linear"), node_of(graph, "relu")
    module = Scaled(normal(4, 4))
    (first,) = splice(graph, relu, module, [linear], "a", scope=linear)
    relu.replace_input_with(linear, first)
    small = small_graph(module, [linear.meta["val"]])
    shared = {"weight": matched(small, first)["weight"]}
    (second,) = splice(graph, relu, module, [first], "a", like=small, shared=shared)
    relu.replace_input_with(first, second)
    refresh(graph)
    assert attached(graph) == ["a.weight"]
    assert module_path(first) == "fc" and module_path(second) == ""
    assert is_spliced(graph, "a.weight") and not is_spliced(graph, "fc.weight")


def test_what_was_spliced_in_is_found_again_whatever_its_literal_is():
    program, relu, _ = chain()
    graph = program.only()
    (new,) = splice(graph, relu.next, Scaled(normal(4, 4)), [relu], "a")
    small = small_graph(Scaled(torch.zeros(4, 4)), [torch.zeros(2, 4)])
    found = matched(small, new)
    assert found["a"] is relu and found["weight"].name == "b_a_weight"
    assert matched(small, relu) is None and matched(small, new.args[1]) is None

    class Other(Scaled):
        def forward(self, x):
            return x + nn.functional.linear(x, self.weight) * 0.7

    other = small_graph(Other(torch.zeros(4, 4)), [torch.zeros(2, 4)])
    assert matched(other, new) is None
    assert matched(other, new, free=0.7)["free"] == 0.3

    class Twice(Scaled):
        def forward(self, x):
            return x * 2 + nn.functional.linear(x, self.weight) * 0.3

    assert matched(small_graph(Twice(torch.zeros(4, 4)), [torch.zeros(2, 4)]), new) is None


def test_an_input_of_a_match_is_one_and_the_same_everywhere():
    class Sum(nn.Module):
        def forward(self, a):
            return a + a * 2

    program = effc.trace(Call(lambda self, x: torch.relu(x) + torch.sigmoid(x) * 2), normal(2, 4))
    small = small_graph(Sum(), [torch.zeros(2, 4)])
    assert matched(small, node_of(program, "add")) is None
    same = effc.trace(Call(lambda self, x: torch.relu(x) + torch.relu(x) * 2), normal(2, 4))
    assert matched(small, node_of(same, "add")) is None  # equal, and two nodes
    one = effc.trace(Call(lambda self, x: (lambda y: y + y * 2)(torch.relu(x))), normal(2, 4))
    assert matched(small, node_of(one, "add"))["a"] is node_of(one, "relu")
