"""A compile has a clock of its own target: sizes that pay, their record, and what the report says of them."""

import json

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import effc
from effc.backends.ort import Ort
from effc.compiler import from_flags
from effc.errors import PreconditionError
from effc.passes.mixed_precision import MixedPrecision
from effc.passes.quantize import Quantize
from effc.passes.tune import Tune
from effc.timing import clock, deciding
from kit import cli

FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = [nn.Linear(64, 600), nn.ReLU(), nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 4)]
    return nn.Sequential(*layers), torch.ones(2, 64)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.py").write_text(FACTORY)
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", input=draw.standard_normal((64, 64)).astype(np.float32))
    return tmp_path


def recipe(place, *passes):
    (place / "r.yaml").write_text(yaml.dump({
        "source": {"python": f"{place / 'model.py'}:net"},
        "calib": {"file": str(place / "data.npz"), "samples": 32},
        "passes": list(passes), "bench": False, "gate": False,
    }))  # fmt: skip
    return place / "r.yaml"


def files(out):
    return json.loads((out / "manifest.json").read_text())["files"]


@pytest.mark.slow
def test_sizes_are_timed_once_reported_and_replayed(place):
    pruning = {"pass": "prune-dims", "ratio": 0.3, "align": "auto"}
    file = recipe(place, pruning, {"pass": "quantize"})
    ran = cli("compile", file, "-o", place / "one", "--threads", "1")
    assert ran.code == 0, ran.err
    assert "0: 600 → " in ran.out and "the sum of the lines is" in ran.out
    assert "what every kind of group bought" in (place / "one" / "report.html").read_text()
    decided = json.loads((place / "one" / "decisions.json").read_text())["0:prune-dims"]
    assert set(decided["main/sizes"]["counts"]) == {"0", "2"}
    report = json.loads((place / "one" / "report.json").read_text())
    assert len(report["layers"]["ort"]) == 3  # beside the pruned graph

    explained = cli("explain", place / "one", "--trust-code")
    assert explained.code == 0 and "goes wrong in prune-dims" not in explained.out, explained.err

    again = cli("compile", file, "-o", place / "two", "--threads", "1")
    assert again.code == 0 and files(place / "two") == files(place / "one")  # from the cache
    (place / "cache").rename(place / "gone")
    replay = cli(
        "compile", file, "-o", place / "three", "--decisions", place / "one" / "decisions.json"
    )
    assert replay.code == 0, replay.err
    assert files(place / "three") == files(place / "one")


@pytest.mark.slow
def test_a_latency_budget_is_met_by_the_engine(place):
    file = recipe(place, {"pass": "prune-dims", "latency_budget": 0.8}, {"pass": "quantize"})
    assert cli("compile", file, "-o", place / "out", "--threads", "1").code == 0
    decided = json.loads((place / "out" / "decisions.json").read_text())["0:prune-dims"]
    found = decided["main/sizes"]
    assert found["together"]["low"] <= 0.8 * found["whole_ms"]
    assert 0 < found["ratio"] <= 0.9 and max(found["counts"].values()) < 600
    ran = cli(
        "compile",
        recipe(place, {"pass": "prune-dims", "latency_budget": 0.001}),
        "-o",
        place / "no",
    )
    assert ran.code == 6 and "cannot be met" in ran.err and not (place / "no").exists()


@pytest.mark.slow
def test_a_plan_times_nothing(place):
    file = recipe(place, {"pass": "prune-dims", "latency_budget": 0.6, "align": "auto"})
    ran = cli("compile", file, "-o", place / "out", "--plan", "--json", place / "plan.json")
    assert ran.code == 0, ran.err
    stages = json.loads((place / "plan.json").read_text())["stages"]
    assert next(s for s in stages if s["name"] == "prune-dims")["seconds"] > 12


def test_only_what_decides_kernels_is_put_behind():
    quantize = Quantize(rounding="gptq", bias_correction=True, weight_range="mse")
    found = deciding([Tune(), quantize, MixedPrecision(check_range=True)])
    assert found == [Quantize(range="minmax"), MixedPrecision()]
    assert not any(pass_.measures_again for pass_ in found)


def test_a_target_that_cannot_run_here_has_no_clock(monkeypatch):
    monkeypatch.setattr(Ort, "obstacle", lambda self, lowered=None: "it has no wheels")
    program = effc.trace(nn.Linear(4, 2).eval(), torch.ones(3, 4))
    with pytest.raises(PreconditionError, match="cannot be measured here: it has no wheels"):
        clock("ort", {"input": np.ones((3, 4), np.float32)})([program.only()])


@pytest.mark.slow
def test_a_budget_and_an_alignment_are_flags_too(place):
    words = ("--latency-budget", "0.6", "--align", "8", "--calib", place / "data.npz", "--no-bench")
    ran = cli("compile", f"{place / 'model.py'}:net", "-o", place / "out", "--threads", "1", *words)
    assert ran.code == 0, ran.err
    (step,) = yaml.safe_load((place / "out" / "recipe.yaml").read_text())["passes"]
    assert step == {
        "pass": "prune-dims", "latency_budget": 0.6, "align": 8, "importance": "taylor"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--align", "8"), "nothing is pruned"),
        (("--ratio", "0.2", "--latency-budget", "0.7"), "both say how much"),
        (("--ratio", "0.2", "--align", "wide"), "neither a number nor auto"),
        (("--ratio", "0.2", "--align", "0"), "neither a number nor auto"),
    ],
)
def test_flags_of_pruning_that_say_nothing(place, words, told):
    ran = cli("compile", f"{place / 'model.py'}:net", "-o", place / "out", *words)
    assert ran.code == 2 and told in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize(
    "words", [("--latency-budget", "0.7"), ("--align", "8"), ("--ratio", "0.2")]
)
def test_flags_of_pruning_do_not_go_with_a_recipe(place, words):
    file = recipe(place, {"pass": "prune-dims", "ratio": 0.25})
    ran = cli("compile", file, "-o", place / "out", *words)
    assert ran.code == 2 and "a recipe says itself what to do" in ran.err
    assert not (place / "out").exists()


def test_a_multiple_is_a_number_in_python():
    (step,) = from_flags("model.py:net", ratio=0.25, align=8)["passes"]
    assert step["align"] == 8
