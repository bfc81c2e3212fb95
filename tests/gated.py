"""A small model with gated experts of low rank beside its layers, and what requests are about."""

from functools import cache

import torch
from graphs import normal
from torch import nn

import effc
from effc.ir.edit import rebind
from effc.ir.splice import attached
from effc.nn import rank1
from effc.passes.rank1 import AttachRank1

FORMS, GATES = ("pairs", "single", "groups"), ("both", "router", "intuition", "uniform")
SIZES = (2, 3)
X = normal(4, 5, 12)


class Block(nn.Module):
    """Two linear layers with a ReLU between, wide enough for a few experts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Told(nn.Module):
    """A model whose forward has the score among its inputs, and leaves it to the experts."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x, intuition):
        return self.fc(x)


DIMS = {"x": {0: "batch", 1: "sequence"}}
BOTH = {**DIMS, "intuition": {0: "batch"}}


@cache
def _block():
    return effc.trace(Block().eval(), {"x": X}, dims=DIMS)


def traced(module=None):
    return _block().clone() if module is None else effc.trace(module.eval(), {"x": X}, dims=DIMS)


def with_experts(program=None, **options):
    made = (program or traced()).clone()
    record = effc.apply(
        AttachRank1(**{"sizes": SIZES, **options}), made, probes={"main": [{"x": X}]}
    )
    return record, made


def stirred(program, by=0.3):
    """The program with other values in what was attached, as training leaves them; scalars move little."""
    made = program.clone()
    draw = torch.Generator().manual_seed(7)
    for graph in made:
        for name in attached(graph):
            old = graph.tensors()[name]
            scale = by if old.dim() else by / rank1.SLOPE
            noise = torch.randn(old.shape, generator=draw, dtype=old.dtype)
            rebind(graph, name, old + scale * noise, "tuned")
    return made


def scores(rows, count=6, seed=1):
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(seed))


def run(program, x=X, s=None):
    s = scores(len(x)) if s is None else s
    return program.run({"x": x, "intuition": s})["output"]
