"""The calibrator computes what the watched nodes hang on, and nothing else."""

import torch
from graphs import node_of, normal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import effc
from effc.calib.calibrator import collect
from effc.calib.collectors import MinMax
from effc.calib.data import Batch
from effc.calib.probe import Probe


class Ran(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def watched(module, op, x):
    program = effc.trace(module, {"x": x})
    probe = Probe(key="k", node=node_of(program, op), collector=MinMax())
    with Ran() as ran:
        found = collect(program.only(), [probe], [Batch(inputs={"x": x.numpy()})])
    return found["k"], ran.names


def test_what_no_watched_node_hangs_on_is_not_computed():
    class Net(nn.Module):
        def forward(self, x):
            beside = torch.cos(x)  # as keys and values that are given
            watched = torch.tanh(torch.exp(-x))
            return beside, torch.sin(watched)  # as logits

    x = normal(2, 3)
    seen, names = watched(Net(), "tanh", x)
    assert (seen.low, seen.high) == tuple(
        float(v) for v in torch.aminmax(torch.tanh(torch.exp(-x)))
    )
    assert {"exp", "tanh"} <= set(names)
    assert not {"cos", "sin"} & set(names)


def test_a_value_that_is_written_into_is_watched_as_the_model_has_it():
    class Net(nn.Module):
        def forward(self, x):
            y = torch.exp(x)
            y.add_(10)
            return torch.tanh(y / 20)

    x = normal(2, 3)
    seen, _ = watched(Net(), "tanh", x)
    assert seen.high == float(torch.tanh((torch.exp(x) + 10) / 20).max())
