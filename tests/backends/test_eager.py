"""The reference runs the user's own module, whatever it returns, and leaves it as it was."""

import torch
from graphs import normal
from torch import nn

import effc
from effc.backends.eager import ModuleEngine
from effc.ir.edit import keep_outputs


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        return {"first": y, "more": (y + 1, [y + 2])}


class Tuple(Nested):
    def forward(self, x):
        y = self.layer(x)
        return y, (y + 1, y + 2)


def test_nested_outputs_have_the_names_of_the_graph():
    module, x = Nested(), normal(2, 4)
    graph = effc.trace(module, x).only()
    found = ModuleEngine(module, graph)({"x": x.numpy()})
    wanted = graph.run({"x": x})
    assert list(found) == list(graph.outputs) and len(found) == 3
    for name, value in wanted.items():
        assert torch.allclose(value, torch.from_numpy(found[name]))


def test_the_second_of_three_outputs_is_the_second():
    module, x = Tuple(), normal(2, 4)
    graph = effc.trace(module, x).only()
    (_, second, _) = graph.outputs
    keep_outputs(graph, [second])
    found = ModuleEngine(module, graph)({"x": x.numpy()})
    assert torch.allclose(module(x)[1][0], torch.from_numpy(found[second]))


def test_a_module_in_training_is_put_back_into_training():
    module = Nested().train()
    with ModuleEngine(module, effc.trace(module, normal(2, 4)).only()):
        assert not module.training
    assert module.training
