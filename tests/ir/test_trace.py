"""From a module to a program: names, free dimensions, and what is refused."""

import pytest
import torch
from graphs import Call, assert_graph, normal, ops
from torch import nn

import effc
from effc.errors import TraceError
from effc.ir.trace import refuse_chance
from effc.passes.cleanup import DropNoops


def test_a_linear_layer():
    program = effc.trace(nn.Linear(4, 2), normal(3, 4))
    assert_graph(
        program,
        """
        %input: f32[batch, 4] = input
        %linear: f32[batch, 2] = linear(%input, @weight, @bias)
        return output=%linear
        """,
    )


def test_free_dimensions_carry_their_names():
    twice = Call(lambda self, x: torch.cat([x, x], 1))
    program = effc.trace(twice, {"x": normal(2, 5, 3)}, dims={"x": {0: "batch", 1: "sequence"}})
    assert_graph(
        program,
        """
        %x: f32[batch, sequence, 3] = input
        %cat: f32[batch, 2*sequence, 3] = cat([%x, %x], 1)
        return output=%cat
        """,
    )


def test_without_names_the_first_dimension_is_the_batch():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    same = effc.trace(Sum(), [normal(2, 3), normal(2, 3)])
    assert "%a: f32[batch, 3]" in effc.show(same)
    assert "%b: f32[batch, 3]" in effc.show(same)
    differing = effc.trace(Sum(), [normal(2, 3), normal(1, 3)])
    assert "%a: f32[2, 3]" in effc.show(differing)


def test_traced_with_two_samples_it_runs_one():
    layer = nn.Linear(4, 2)
    program = effc.trace(layer, normal(2, 4))
    x = normal(1, 4)
    assert torch.equal(program.run(input=x)["output"], layer(x).detach())


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda self, x: x + 1, ("output",)),
        (lambda self, x: (x + 1, x + 2), ("output_0", "output_1")),
        (lambda self, x: {"sum": x + 1, "twice": x * 2}, ("sum", "twice")),
        (lambda self, x: {"one": x + 1, "more": (x * 2, x * 3)}, ("one", "more.0", "more.1")),
    ],
)
def test_outputs_are_named_by_what_the_model_returns(function, names):
    program = effc.trace(Call(function), normal(2, 3))
    assert program.only().outputs == names
    assert tuple(program.run(x=normal(2, 3))) == names


def test_inputs_may_be_called_what_python_calls_its_own():
    class Builtins(nn.Module):
        def forward(self, input, id):
            return input * id

    program = effc.trace(Builtins(), {"input": normal(2, 3), "id": normal(2, 3, seed=1)})
    assert program.only().inputs == ("input", "id")
    again = program.clone()
    assert effc.show(again) == effc.show(program)
    x = normal(1, 3)
    assert torch.equal(again.run(input=x, id=x)["output"], x * x)


def test_writes_into_tensors_become_new_tensors():
    def forward(self, x):
        y = x * 2
        y.add_(1)
        y[:, 0] = 0.0
        return y.relu_()

    program = effc.trace(Call(forward), normal(2, 3))
    assert not [n for n in program.only().nodes if n.target._schema.is_mutable]
    x = normal(4, 3)
    kept = x.clone()
    assert torch.equal(program.run(x=x)["output"], forward(None, x.clone()))
    assert torch.equal(x, kept)


def test_every_value_knows_its_readers_even_those_that_nobody_wants():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.pool = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                table = torch.arange(8.0)
            normed = self.norm(x + table)
            torch.tanh(self.pool(normed[:, 0]))  # as a model whose second output is dropped
            return normed

    program = effc.trace(Pooled(), normal(2, 3, 8))
    nodes = list(program.only().fx.nodes)
    assert all(node in source.users for node in nodes for source in node.all_input_nodes)
    effc.apply(DropNoops(), program)
    assert "tanh" not in ops(program)


def test_training_behaviour_is_not_traced_and_the_module_is_left_as_it_was():
    module = Call(lambda self, x: nn.functional.dropout(x, 0.5, self.training)).train()
    program = effc.trace(module, normal(2, 3))
    x = normal(2, 3)
    assert torch.equal(program.run(x=x)["output"], x)
    assert module.training


def test_tied_weights_are_one_tensor():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    program = effc.trace(nn.Sequential(first, second), normal(2, 4))
    assert program.weight_bytes() == 4 * (16 + 4 + 4)


def test_a_free_dimension_of_one_is_refused():
    with pytest.raises(TraceError, match="dimension 'batch' of input 'x' is 1") as caught:
        effc.trace(Call(lambda self, x: x), {"x": normal(1, 3)}, dims={"x": {0: "batch"}})
    assert "size 2 or more" in caught.value.hint


def test_a_branch_on_the_data_is_refused_in_one_line():
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(TraceError, match=r"torch\.export refused Call: ") as caught:
        effc.trace(Call(forward), normal(2, 3))
    assert "\n" not in caught.value.what
    assert caught.value.__cause__ is not None


def test_an_output_that_is_no_tensor_is_refused():
    with pytest.raises(TraceError, match="output 'size' is not a tensor"):
        effc.trace(Call(lambda self, x: {"y": x * 2, "size": 3}), normal(2, 3))


def test_more_examples_than_inputs_are_refused():
    with pytest.raises(TraceError, match="takes 1 inputs but 2 examples"):
        effc.trace(nn.Linear(4, 2), [normal(2, 4), normal(2, 4)])


def test_operators_stay_whole():
    program = effc.trace(nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)), normal(2, 4))
    assert ops(program) == ["layer_norm", "gelu", "linear"]


def test_what_export_refuses_is_placed_in_the_models_own_code():
    def forward(self, x):
        y = x + 1
        return y * 2 if y.sum() > 0 else y

    with pytest.raises(TraceError, match="Could not guard on data-dependent") as caught:
        effc.trace(Call(forward), normal(2, 3))
    line = forward.__code__.co_firstlineno + 2
    assert caught.value.where == f"forward, {__file__} line {line}"


def test_torch_says_nothing_of_its_own_beside_the_error(caplog):
    with pytest.raises(TraceError, match="must have same reduction dim"):
        effc.trace(Call(lambda self, x: x @ x), normal(2, 3))
    assert [r for r in caplog.records if r.levelname == "ERROR"] == []


def test_a_part_of_a_module_that_is_frozen_stays_so():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    module[1].eval()
    effc.trace(module, normal(2, 4))
    assert [part.training for part in module.modules()] == [True, True, False]


def test_a_model_that_draws_numbers_is_refused_with_the_node():
    program = effc.trace(Call(lambda self, x: x + torch.randn_like(x)), {"x": normal(3, 4)})
    with pytest.raises(TraceError, match="randn_like draws random numbers") as caught:
        refuse_chance(program.only())
    assert "input of the model" in caught.value.hint


@pytest.mark.parametrize(
    "compute",
    [
        lambda self, x: torch.empty_like(x).uniform_() + x,
        lambda self, x: nn.functional.dropout(x, 0.5, training=True),
        lambda self, x: nn.functional.rrelu(x, training=True),
        lambda self, x: torch.empty_like(x).exponential_() + x,
    ],
)
def test_whatever_draws_is_refused(compute):
    program = effc.trace(Call(compute), {"x": normal(3, 4)})
    with pytest.raises(TraceError, match="draws random numbers"):
        refuse_chance(program.only())


def test_what_is_told_not_to_draw_is_taken():
    given = {"x": normal(3, 4)}
    for compute in (
        lambda self, x: nn.functional.rrelu(x, training=False),
        lambda self, x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]),
    ):
        refuse_chance(effc.trace(Call(compute), given).only())


def test_dropout_that_is_off_draws_nothing():
    refuse_chance(effc.trace(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), normal(3, 4)).only())
