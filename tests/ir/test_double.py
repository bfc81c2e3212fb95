"""A graph in float64 is the same graph, and its rounding is gone."""

import random

import pytest
import torch
from architectures import FAMILIES, program_of

from effc.ir.check import drift
from effc.ir.double import doubled, in_double

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_runs_in_float64(family):
    program, feeds = program_of(FAMILIES[family](random.Random(0)))
    graph = program.only()
    made = in_double(graph)
    found = made.run(doubled(feeds))
    assert all(v.dtype == torch.float64 for v in found.values() if v.is_floating_point())
    assert drift(graph.run(feeds), found).rel_l2 < 1e-5
