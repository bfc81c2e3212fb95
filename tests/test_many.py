"""Several processes that do one piece of work have the numbers that one has alone."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from effc import many
from effc.cli import _without
from effc.errors import TuneError
from effc.train.loop import Schedule, fit
from kit import assert_letter, cli

FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    class Net(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x)}
    return Net(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), {"x": torch.ones(2, 6)}
"""
CALIBRATES = """
import sys, json
import numpy as np, torch
import effc
from effc import many
from effc.calib import collectors, probe
from effc.calib.calibrator import collect
from effc.calib.data import Batch
from effc.nn.lora import Lora  # noqa: F401
sys.path.insert(0, sys.argv[1])
from nets import net

many.start()
module, given = net()
program = effc.trace(module, given, dims={"x": {0: "batch"}})
graph = program.only()
node = next(n for n in graph.nodes if "linear" in str(n.target))
draw = np.random.default_rng(0)
batches = [Batch(inputs={"x": draw.standard_normal((8, 6)).astype(np.float32)}) for _ in range(7)]
kinds = {"minmax": collectors.MinMax, "mse": collectors.LeastSquares, "percentile": collectors.Percentile,
         "channels": collectors.Channels, "gram": collectors.Gram, "moments": collectors.Moments}
probes = [probe.Probe(key=word, node=node, collector=kind()) for word, kind in kinds.items()]
found = collect(graph, probes, batches)
from effc.quant.scheme import Scheme
scheme = Scheme(bits=8)
said = {w: found[w].range(scheme) for w in ("minmax", "mse", "percentile", "channels")}
said["gram"] = found["gram"].matrix().flatten().tolist()
said["moments"] = np.asarray(found["moments"].whole().variance).ravel().tolist()
if many.rank() == 0:
    print(json.dumps(said))
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "nets.py").write_text(FACTORY)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((64, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, label=(x[:, 0] > 0).astype(np.int64))
    recipe = {
        "source": {"python": "nets.py:net"}, "calib": {"file": "data.npz", "samples": 32},
        "passes": [
            {"pass": "tune", "task": "labels", "distill": 0.5, "steps": 12, "batch": 4, "lr": 0.01,
             "accumulate": 2, "held": 16, "samples": 48, "every": 4},
        ], "gate": False, "bench": False,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def run(*words, **own):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "EFFC_CACHE": "off", **own}
    return subprocess.run(
        [sys.executable, *map(str, words)], env=env, capture_output=True, text=True, timeout=300
    )


def together(count, *words):
    """A script as so many processes, and what the first says."""
    port = str(many._free_port())
    own = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, *map(str, words)]
    running = [
        subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1", **own, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in running]
    assert not any(process.returncode for process in running), said
    return said[0][0]


@pytest.mark.slow
def test_what_is_counted_hangs_on_no_number_of_processes(place):
    (place / "calibrates.py").write_text(CALIBRATES)
    one, two, three = (json.loads(together(n, place / "calibrates.py", place)) for n in (1, 2, 3))
    for other in (two, three):
        assert other["minmax"] == one["minmax"]
        for word, values in one.items():
            np.testing.assert_allclose(other[word], values, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(place):
    curves = []
    for words in ((), ("--processes", "2")):
        out = place / f"ck{len(curves)}"
        ran = run(
            "-m", "effc", "tune", place / "r.yaml", "-o", out, *words, "--json", place / "t.json"
        )
        assert ran.returncode == 0, ran.stderr
        curves.append(json.loads((place / "t.json").read_text())["curves"]["0.main"])
        assert (out / "0.main.safetensors").is_file()
    assert len(curves[0]) == len(curves[1]) > 2
    for a, b in zip(*curves, strict=True):
        assert b["held"] == pytest.approx(a["held"], abs=1e-4)
        assert a["loss"] is None or b["loss"] == pytest.approx(a["loss"], abs=1e-4)
    assert curves[0][-1]["held"] < curves[0][0]["held"]


@pytest.mark.slow
def test_batches_that_cannot_be_shared_are_refused_and_all_end(place):
    ran = run("-m", "effc", "tune", place / "r.yaml", "-o", place / "ck", "--processes", "2", "--set",
              "passes.0.accumulate=3")  # fmt: skip
    assert ran.returncode == 13 and "cannot share the 3 batches" in ran.stderr
    assert not (place / "ck").exists()


def test_an_environment_of_half_a_group_is_refused(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    ran = cli("tune", place / "r.yaml", "-o", place / "ck")
    assert_letter(ran, "UsageError", 2, "RANK is not set", "--processes")


def test_alone_nothing_is_shared():
    assert many.count() == 1 and many.rank() == 0 and many.gathered(3) == [3]


def test_a_command_line_without_an_option():
    words = [
        "tune",
        "r.yaml",
        "--processes",
        "2",
        "-o",
        "x",
        "--processes=3",
        "--set",
        "a=--processes",
    ]
    assert _without(words, "--processes") == ["tune", "r.yaml", "-o", "x", "--set", "a=--processes"]


def test_a_step_of_no_whole_share_is_refused(monkeypatch):
    import torch

    monkeypatch.setitem(many._state, "count", 2)
    with pytest.raises(TuneError, match="cannot share"):
        fit(
            torch.nn.Linear(1, 1),
            lambda m, b: m(b).sum(),
            lambda n: torch.ones(1, 1),
            Schedule(steps=1, lr=1.0),
        )
