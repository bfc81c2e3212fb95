"""Sizes that hang on tables of a model's own are known while it is traced, and stand in the graph as numbers."""

import pytest
import torch
from graphs import Call, assert_graph, normal, ops
from torch import nn

import effc
from effc.errors import TraceError


def in_parts(lengths):
    """A module that works on stretches of its input whose lengths come out of a function."""

    def forward(self, x):
        return torch.cat([part.softmax(0) for part in x.split(lengths().tolist())])

    return Call(forward)


def grid():
    """As vision towers have it: patches of every picture, from a grid of frames, rows and columns."""
    frames, rows, columns = torch.tensor([[1, 2, 2], [2, 1, 3]]).unbind(1)
    ends = torch.repeat_interleave(rows * columns, frames).cumsum(0)
    ends = nn.functional.pad(ends, (1, 0))
    return ends[1:] - ends[:-1]


def windows():
    """Of places that are left when the padding is out, which torch cannot know beforehand."""
    places = nn.functional.pad(torch.arange(7), (0, 2), value=-1).reshape(3, 3)
    return (places != -1).sum(1)


@pytest.mark.parametrize(("lengths", "wanted"), [(grid, [4, 3, 3]), (windows, [3, 3, 1])])
def test_lengths_of_stretches_are_numbers_of_the_graph(lengths, wanted):
    x = normal(sum(wanted), 5)
    program = effc.trace(in_parts(lengths), {"x": x}, dims={})
    assert ops(program) == ["split_with_sizes", *["getitem"] * 3, *["softmax"] * 3, "cat"]
    split = next(n for n in program.only().nodes if n.name.startswith("split"))
    assert split.args[1] == wanted
    found = program.run(x=x)["output"]
    assert torch.equal(found, torch.cat([part.softmax(0) for part in x.split(wanted)]))


def test_what_was_computed_is_a_constant_where_the_graph_reads_it():
    def forward(self, x):
        lengths = grid()
        return torch.cat([part.softmax(0) for part in x.split(lengths.tolist())]) * lengths.sum()

    program = effc.trace(Call(forward), {"x": normal(10, 2)}, dims={})
    assert "repeat_interleave" not in ops(program)
    (constant,) = [t for t in program.only().tensors().values() if t.numel() == 1]
    assert int(constant) == 10


def test_a_graph_whose_sizes_hang_on_nothing_stays_as_it_is():
    program = effc.trace(Call(lambda self, x: x + torch.tensor([1, 2])), {"x": normal(3, 2)})
    assert_graph(
        program,
        """
        %x: f32[batch, 2] = input
        %clone: i64[2] = clone(@lifted_tensor_0)
        %add: f32[batch, 2] = add(%x, %clone)
        return output=%add
        """,
    )


class Chooses(nn.Module):
    def forward(self, x, lengths):
        return x * 2 if lengths.sum() > 3 else x


def test_what_hangs_on_the_values_of_an_input_is_refused_with_the_line_and_a_way_out():
    feeds = {"x": normal(10, 5), "lengths": torch.tensor([4, 6])}
    with pytest.raises(TraceError) as caught:
        effc.trace(Chooses(), feeds, dims={})
    assert "test_known.py line" in caught.value.where
    assert "hangs on the values of an input" in caught.value.hint
