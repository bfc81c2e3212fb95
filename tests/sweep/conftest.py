"""A small net with data, and a sweep over it."""

import numpy as np
import pytest
import yaml

FACTORY = """
import os, signal, time
from pathlib import Path
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x):
        return {"logits": self.layers(x)}

def small():
    return Net(32), {"x": torch.ones(2, 16)}

def large():
    return Net(96), {"x": torch.ones(2, 16)}

def once():
    '''Kills its own process the first time.'''
    mark = Path(__file__).with_name("killed")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return small()

def always():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a base recipe, and a cache of its own."""
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "nets.py").write_text(FACTORY)
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=draw.standard_normal((64, 16)).astype(np.float32))
    base = {
        "source": {"python": "nets.py:small"}, "calib": {"file": "data.npz", "samples": 32},
        "passes": [{"pass": "quantize", "bits": 8}], "bench": False,
    }  # fmt: skip
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    return tmp_path


@pytest.fixture
def write(place):
    """Writes a sweep's file and gives its path."""

    def write(**words):
        file = place / "sweep.yaml"
        content = {"base": "base.yaml", "objectives": ["accuracy", "size"], **words}
        file.write_text(yaml.safe_dump(content))
        return file

    return write
