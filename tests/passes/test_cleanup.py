"""What an export carries and an engine does not need goes; what means something stays."""

import pytest
import torch
from graphs import Call, assert_graph, batches, normal, ops, quantize
from torch import nn

import effc
from effc.ir.program import Origin
from effc.passes.cleanup import DropNoops, FoldConstants, SimplifyMask


def applied(pass_, function, x, **parts):
    program = effc.trace(Call(function, **parts), x)
    record = effc.apply(pass_, program, probes={"main": [{"x": x}]})
    return record, program


def test_dropout_full_slices_casts_and_asserts_go():
    def forward(self, x):
        x = nn.functional.dropout(x, 0.1, self.training)
        x = x.to(torch.float32)[:, :].contiguous()
        return (torch.relu(x.reshape(x.shape) + 0) * 1).type_as(x)

    program = effc.trace(Call(forward), normal(2, 4))
    gone = {"dropout", "_assert_tensor_metadata", "to", "slice", "type_as"}
    assert gone <= set(ops(program))
    record = effc.apply(DropNoops(), program, probes={"main": [{"x": normal(2, 4)}]})
    assert_graph(
        program,
        """
        %x: f32[batch, 4] = input
        %relu: f32[batch, 4] = relu(%x)
        return output=%relu
        """,
    )
    assert record.sites >= 6
    assert record.drift.max_abs == 0.0


@pytest.mark.parametrize(
    ("kept", "function"),
    [
        ("to", lambda self, x: x.to(torch.float64) + 1),
        ("slice", lambda self, x: x[:, 1:] + 1),
        ("slice", lambda self, x: x[:, ::2] + 1),
        ("slice", lambda self, x: x[:, :-1] + 1),
        ("reshape", lambda self, x: x.reshape(-1, 2, 2) + 1),
        ("expand", lambda self, x: x.unsqueeze(1).expand(-1, 3, -1) + 1),
        ("dropout", lambda self, x: nn.functional.dropout(x, 0.5, True) + 1),
        ("rsub", lambda self, x: (1 - x) * 2),
        ("mul", lambda self, x: x * 2),
    ],
)
def test_what_changes_something_stays(kept, function):
    program = effc.trace(Call(function), normal(2, 4))
    assert kept in ops(program)
    effc.apply(DropNoops(), program)
    assert kept in ops(program)


def test_a_model_that_does_nothing_still_has_an_output():
    _, program = applied(
        DropNoops(), lambda self, x: nn.functional.dropout(x, 0.5, False), normal(2, 4)
    )
    x = normal(3, 4)
    assert torch.equal(program.run(x=x)["output"], x)


def test_a_mask_indexed_by_whole_ranges_is_reshaped():
    def forward(self, x):
        batch = torch.arange(x.shape[0])[:, None, None, None]
        place = torch.arange(x.shape[1])
        return x[batch, place]

    program = effc.trace(
        Call(forward), {"x": normal(2, 5)}, dims={"x": {0: "batch", 1: "sequence"}}
    )
    x = normal(3, 7)
    wanted = program.run(x=x)["output"]
    effc.apply(DropNoops(), program)
    assert effc.apply(SimplifyMask(), program, probes={"main": [{"x": x}]}).sites == 1
    assert_graph(
        program,
        """
        %x: f32[batch, sequence] = input
        %unsqueeze_default: f32[batch, 1, sequence] = unsqueeze(%x, 1)
        %unsqueeze_default_1: f32[batch, 1, 1, sequence] = unsqueeze(%unsqueeze_default, 2)
        return output=%unsqueeze_default_1
        """,
    )
    assert torch.equal(program.run(x=x)["output"], wanted)


def test_a_mask_indexed_by_part_of_a_range_is_left_alone():
    def forward(self, x):
        return x[torch.arange(x.shape[0])[:, None], torch.arange(3)]

    record, program = applied(SimplifyMask(), forward, normal(2, 4))
    assert record.sites == 0
    assert "index" in ops(program)


def test_what_depends_on_weights_alone_is_computed_once():
    scale = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return x * torch.exp(self.scale * 2)

    record, program = applied(FoldConstants(), forward, normal(2, 4), scale=scale)
    assert record.sites == 2
    assert_graph(
        program,
        """
        %x: f32[batch, 4] = input
        %mul_1: f32[batch, 4] = mul(%x, @scale.mul.exp)
        return output=%mul_1
        """,
    )
    folded = program.only().origins["scale.mul.exp"]
    assert folded == Origin("scale", ("mul", "exp"))


def test_what_would_grow_is_left_to_run_time():
    column = nn.Parameter(torch.rand(600, 1))

    def forward(self, x):
        return x + (self.column @ self.column.T).sum()

    _, program = applied(FoldConstants(), forward, normal(2, 4), column=column)
    assert ops(program) == ["matmul", "sum", "add"]
    small, _ = applied(
        FoldConstants(max_growth_bytes=1 << 24), forward, normal(2, 4), column=column
    )
    assert small.sites == 3


def test_random_numbers_are_not_folded():
    scale = nn.Parameter(torch.rand(4))
    record, program = applied(
        FoldConstants(),
        lambda self, x: x + 0 * torch.rand_like(self.scale),
        normal(2, 4),
        scale=scale,
    )
    assert "rand_like" in ops(program)
    assert "rand_like" not in " ".join(program.only().origins)
    assert record.sites == 0


def test_a_quantised_weight_is_never_folded_back_to_float():
    program = effc.trace(nn.Linear(4, 4), normal(2, 4))
    quantize(program, batches("input", 8, 4))
    before = effc.show(program)
    assert effc.apply(FoldConstants(), program).sites == 0
    assert effc.show(program) == before
    assert program.only().tensors()["weight_int8"].dtype == torch.int8


def test_a_table_that_is_looked_up_at_constant_places_stays_in_codes():
    def look_up(self, x):
        return x + self.table(self.places)

    places = torch.arange(3)
    table = nn.Embedding(8, 4)
    program = effc.trace(Call(look_up, table=table, places=places), normal(3, 4))
    quantize(program, activation_bits=16)
    effc.apply(FoldConstants(), program)
    assert any(t.dtype == torch.int8 for t in program.only().tensors().values())
