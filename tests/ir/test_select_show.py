"""Sites are chosen by words; graphs are shown as text."""

import pytest
import torch
from graphs import Call, assert_graph, normal
from torch import nn

import effc
from effc.ir.program import Program
from effc.ir.select import module_path, module_type, module_types, op_name, site_names


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return x + torch.relu(self.norm(self.dense(x)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.layer:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return effc.trace(Encoder(), normal(2, 4)).only()


def sites(graph, **words):
    return [node.name for node in effc.Select(**words).sites(graph)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ({"op": "linear"}, ["linear", "linear_1", "linear_2"]),
        ({"op": "l*", "module": "layer.0.*"}, ["linear", "layer_norm"]),
        ({"op": ("relu", "add"), "module": "layer.1"}, ["relu_1", "add_1"]),
        ({"module": ("head", "layer.0.norm")}, ["layer_norm", "linear_2"]),
        ({"type": "LayerNorm"}, ["layer_norm", "layer_norm_1"]),
        ({"type": "Block", "op": "linear"}, ["linear", "linear_1"]),
        ({"op": "linear", "exclude": "head"}, ["linear", "linear_1"]),
        ({"op": "linear", "exclude": ("head", "layer.1.*")}, ["linear"]),
        ({"op": "conv2d"}, []),
    ],
)
def test_every_word_must_match_and_a_list_matches_by_any(graph, words, found):
    assert sites(graph, **words) == found


def test_nothing_said_is_everything_but_inputs(graph):
    assert sites(graph) == [node.name for node in graph.nodes]


def test_a_node_knows_where_it_was_traced(graph):
    node = effc.Select(module="layer.1.dense").sites(graph)[0]
    assert op_name(node) == "linear"
    assert module_path(node) == "layer.1.dense"
    assert module_type(node) == "Linear"
    assert module_types(node)[0] == "Encoder"
    assert module_types(node)[-2:] == ["Block", "Linear"]


def test_sites_have_names_that_outlive_the_trace(graph):
    again = effc.trace(Encoder(), normal(3, 4)).only()
    names = list(site_names(graph).values())
    assert names == list(site_names(again).values())
    assert len(set(names)) == len(names)
    assert names[:4] == ["layer.0.dense", "layer.0.norm:layer_norm", "layer.0:relu", "layer.0:add"]


def test_a_layer_used_twice_has_a_number(graph):
    twice = Call(lambda self, x: self.fc(self.fc(x)), fc=nn.Linear(4, 4))
    names = site_names(effc.trace(twice, normal(2, 4)).only())
    assert list(names.values()) == ["fc", "fc.1"]


def test_types_numbers_and_lists_are_shown_as_one_would_write_them():
    def forward(self, x):
        return {
            "codes": torch.clamp(x * 0.1, max=3),
            "part": x.reshape(-1, 2, 2).mean([1, 2], keepdim=True),
            "is_large": x > 1e-20,
        }

    assert_graph(
        effc.trace(Call(forward), normal(2, 4)),
        """
        %x: f32[batch, 4] = input
        %mul: f32[batch, 4] = mul(%x, 0.1)
        %clamp: f32[batch, 4] = clamp(%mul, None, 3)
        %reshape: f32[batch, 2, 2] = reshape(%x, [-1, 2, 2])
        %mean: f32[batch, 1, 1] = mean(%reshape, [1, 2], True)
        %gt: bool[batch, 4] = gt(%x, 1e-20)
        return codes=%clamp, part=%mean, is_large=%gt
        """,
    )


def test_a_system_shows_every_graph_under_its_role():
    graphs = {
        role: effc.trace(Call(lambda self, x: x + 1), normal(2, 3), role=role).only()
        for role in ("encode", "decode")
    }
    text = effc.show(Program(graphs))
    assert text.startswith("# encode\n%x: f32[batch, 3] = input\n")
    assert "\n\n# decode\n" in text
