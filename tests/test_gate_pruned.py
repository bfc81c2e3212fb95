"""What a gate does with a pruned engine: pruning is taken back as a whole, and what does not pay is never shipped."""

import json

import numpy as np
import onnx_ir as ir
import pytest

from effc import compiler, recipe, report, search
from effc.build import pruning, revocable
from effc.errors import GateRefused, VerifyError
from effc.trial import Lab

pytestmark = pytest.mark.slow
MODEL = '''
import numpy as np
import torch
from torch import nn
import effc


def module():
    """Its four outputs are the largest about as often as each other."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        made[2].bias -= made(torch.randn(600, 16)).mean(0)
    return made


def batches():
    draw = np.random.default_rng(0)
    for _ in range(4):
        yield {"input": draw.standard_normal((16, 16)).astype(np.float32)}


def net():
    return effc.Source(
        modules={"main": module()}, inputs={"main": {"input": torch.ones(2, 16)}}, batches=batches
    )


class Stream(nn.Module):
    """A residual stream of 24 channels."""

    def __init__(self):
        super().__init__()
        self.table, self.up = nn.Linear(16, 24), nn.Linear(24, 32)
        self.down, self.head = nn.Linear(32, 24), nn.Linear(24, 4)
        self.norms = nn.ModuleList(nn.RMSNorm(24, 1e-5) for _ in range(2))

    def forward(self, input):
        x = self.table(input)
        x = x + self.down(self.up(self.norms[0](x)).relu())
        return self.head(self.norms[1](x))


def stream():
    torch.manual_seed(0)
    inputs = {"main": {"input": torch.ones(2, 16)}}
    return effc.Source(modules={"main": Stream().eval()}, inputs=inputs, batches=batches)


def agreement(run, processor, file):
    """How often the largest output is that of the model."""
    x = np.load(file)["x"]
    truth = module()(torch.from_numpy(x)).argmax(-1).numpy()
    return {"score": (run({"input": x})["output"].argmax(-1) == truth).astype(float)}
'''
PRUNE = {"pass": "prune-dims", "keep": {"0": list(range(16))}}
TUNE = {"pass": "tune", "steps": 1, "lr": 1e-6}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("pruned")
    (place / "net.py").write_text(MODEL)
    x = np.random.default_rng(7).standard_normal((600, 16)).astype(np.float32)
    np.savez(place / "test.npz", x=x)
    return place


def made(place, *passes, **changes):
    data = {
        "source": {"python": f"{place}/net.py:net"}, "passes": list(passes), "bench": False,
        "metric": {f"{place}/net.py:agreement": f"{place}/test.npz"},
        "gate": {"latency": False, "metric": {"max_drop": 0.1}},
    }  # fmt: skip
    return recipe.build({**data, **changes})


def sha256(out):
    return json.loads((out / "manifest.json").read_text())["engines"][0]["sha256"]


@pytest.mark.parametrize("front", [[PRUNE], [PRUNE, TUNE]], ids=["pruned", "pruned and trained"])
def test_pruning_that_costs_too_much_is_taken_back_and_quantisation_stays(place, tmp_path, front):
    found = compiler.run(made(place, *front, "quantize"), tmp_path / "out")
    gate = found.report["gate"]
    assert gate["verdict"].startswith("passed")
    assert [(t["pass"], t["sites"]) for t in gate["rolled_back"]] == [
        (f"{i}:{pass_['pass']}", ["all"]) for i, pass_ in enumerate(front)
    ]
    assert all("at most 0.1 is asked: fail" in taken["why"] for taken in gate["rolled_back"])
    assert "rolled back 0:prune-dims" in found.text()
    # as if nobody had thought of pruning: ranges are those of the whole model
    compiler.run(made(place, "quantize"), tmp_path / "alone")
    assert sha256(tmp_path / "out") == sha256(tmp_path / "alone")
    decisions = json.loads((tmp_path / "out" / "decisions.json").read_text())
    assert decisions["gate"]["0:prune-dims"] == {"dropped": True}
    asked = made(place, *front, "quantize")
    compiler.run(asked, tmp_path / "again", decisions=decisions)
    assert sha256(tmp_path / "again") == sha256(tmp_path / "out")


def test_what_prunes_is_taken_back_before_what_rounds(place):
    passes = made(place, PRUNE, TUNE, "quantize-cache", "quantize").passes
    assert search.wholes(passes, {0, 1, 2, 3}) == [{0, 1}, {0, 1, 2}, {0, 1, 2, 3}]
    assert search.wholes(passes, {3}) == [{3}]
    assert search.wholes(passes, {0}) == [{0}] and search.wholes(passes, set()) == []


def test_what_one_pass_puts_in_and_others_fold_is_taken_back_together(place):
    tune = {**TUNE, "terms": ["hsm"]}
    front, behind = (
        ["pca-rotate", "insert-hsm", "attach-lora"],
        ["harden-hsm", "merge-lora", "fold-hsm"],
    )
    passes = made(place, *front, tune, *behind, "quantize").passes
    lossy = {3, 4, 7}  # insert and fold are exact, and neither is of use alone
    assert search.wholes(passes, lossy) == [{1, 3, 4, 6}, {1, 3, 4, 6, 7}]
    assert pruning(passes, lossy) == pruning(passes, {3, 4}) == {1, 3, 4, 6}
    assert not pruning(passes, {7}) and revocable(passes, lossy) == lossy


def test_what_makes_the_model_that_is_meant_is_never_taken_back(place):
    """An adapter of the user's, and a training that no pruning stands in front of."""
    task = {**TUNE, "task": "labels", "distill": 0}
    own = {"pass": "attach-lora", "adapter": "mine"}
    passes = made(place, own, "merge-lora", task, PRUNE, TUNE, "quantize").passes
    assert revocable(passes, {0, 2, 3, 4, 5}) == {3, 4, 5}
    assert search.wholes(passes, {3, 4, 5}) == [{3, 4}, {3, 4, 5}]
    assert revocable(passes, {0, 2, 5}) == {5} and not pruning(passes, {0, 2, 5})


def test_a_training_that_loses_too_much_is_refused_and_not_undone(place, tmp_path):
    astray = {"pass": "tune", "steps": 30, "lr": 0.9, "weight_decay": 1.0, "held": 0}
    asked = made(place, astray)
    with pytest.raises(GateRefused) as error:
        compiler.run(asked, tmp_path / "out")
    assert "tune makes the model that is meant" in error.value.where


def test_a_search_without_time_ships_nothing_that_was_pruned_too_far(place, tmp_path):
    with pytest.raises(GateRefused, match="the time for the search is up"):
        compiler.run(made(place, PRUNE), tmp_path / "out", time_budget_s=0.0)
    assert not (tmp_path / "out").exists()


def test_a_pruned_engine_that_is_slower_is_not_shipped(place, tmp_path, monkeypatch):
    """Fifty channels of sixty-four take twice the time, as they may where kernels work in tiles."""

    monkeypatch.setattr(Lab, "bench", times(lambda low: 8.0 if is_pruned(low) else 4.0))
    monkeypatch.setattr(report, "write", lambda *_: None)
    few = {"pass": "prune-dims", "keep": {"0": list(range(50))}}
    asked = made(place, few, bench={"shapes": [[1, 1]], "budget_s": 0.5}, gate={"metric": False})
    gate = compiler.run(asked, tmp_path / "out").report["gate"]
    ((taken),) = gate["rolled_back"]
    assert gate["verdict"] == "passed" and taken["pass"] == "0:prune-dims"
    assert "engine ÷ float 2.000" in taken["why"] and "engine ÷ the same unpruned" in taken["why"]
    with pytest.raises(GateRefused, match=r"engine ÷ float 2\.000"):
        compiler.run(asked, tmp_path / "none", time_budget_s=0.0)
    assert not (tmp_path / "none").exists()


def test_a_pruned_int8_engine_is_asked_to_be_no_slower_than_the_whole_one(
    place, tmp_path, monkeypatch
):
    """Twice as fast as the model in float, and yet slower than int8 alone: pruning is what does not pay."""
    took = {(False, False): 4.0, (True, False): 3.0, (False, True): 1.0, (True, True): 2.0}
    monkeypatch.setattr(Lab, "bench", times(lambda low: took[is_pruned(low), is_int8(low)]))
    monkeypatch.setattr(report, "write", lambda *_: None)
    asked = made(
        place, PRUNE, "quantize", bench={"shapes": [[1, 1]], "budget_s": 0.5}, gate={"metric": False}
    )  # fmt: skip
    gate = compiler.run(asked, tmp_path / "out").report["gate"]
    assert [taken["pass"] for taken in gate["rolled_back"]] == ["0:prune-dims"]
    assert "engine ÷ the same unpruned 2.000" in gate["rolled_back"][0]["why"]
    with pytest.raises(GateRefused, match=r"engine ÷ the same unpruned 2\.000"):
        compiler.run(asked, tmp_path / "none", time_budget_s=0.0)
    took[True, True] = 0.5
    gate = compiler.run(asked, tmp_path / "faster").report["gate"]
    assert not gate["rolled_back"] and gate["verdict"] == "passed"


def test_pruning_while_tuning_is_taken_back_as_a_whole(place, tmp_path, monkeypatch):
    """A narrow stream that is as good and twice as slow as the wide one: the engine is int8 alone."""
    monkeypatch.setattr(Lab, "bench", times(lambda low: 2.0 if is_narrow(low) else 1.0))
    monkeypatch.setattr(report, "write", lambda *_: None)
    tune = {
        "pass": "tune",
        "steps": 4,
        "lr": 1e-4,
        "samples": 32,
        "batch": 8,
        "held": 8,
        "terms": ["hsm"],
    }
    pat = [{"pass": "insert-hsm", "ratio": 0.5, "rank": 2}, tune, "harden-hsm", "fold-hsm"]
    asked = made(
        place, *pat, "quantize", source={"python": f"{place}/net.py:stream"},
        bench={"shapes": [[1, 1]], "budget_s": 0.5}, gate={"metric": False}, metric=None,
    )  # fmt: skip
    gate = compiler.run(asked, tmp_path / "out").report["gate"]
    assert [taken["pass"] for taken in gate["rolled_back"]] == [
        "0:insert-hsm", "1:tune", "2:harden-hsm", "3:fold-hsm"
    ]  # fmt: skip
    assert "engine ÷ the same unpruned 2.000" in gate["rolled_back"][0]["why"]
    monkeypatch.setattr(Lab, "bench", times(lambda low: 1.0 if is_narrow(low) else 2.0))
    gate = compiler.run(asked, tmp_path / "faster").report["gate"]
    assert not gate["rolled_back"] and gate["verdict"] == "passed"


def test_where_the_unpruned_engine_cannot_be_made_the_pruned_one_is_judged_alone(
    place, tmp_path, monkeypatch, caplog
):
    def drifts(lab, built):
        if not built.rollback.dropped:
            return found(lab, built)
        raise VerifyError("it is far from the model", hint="none")

    found = Lab.drifts
    monkeypatch.setattr(Lab, "drifts", drifts)
    monkeypatch.setattr(Lab, "bench", times(lambda low: 1.0))
    monkeypatch.setattr(report, "write", lambda *_: None)
    asked = made(
        place, PRUNE, "quantize", bench={"shapes": [[1, 1]], "budget_s": 0.5}, gate={"metric": False}
    )  # fmt: skip
    gate = compiler.run(asked, tmp_path / "out").report["gate"]
    assert gate["verdict"] == "passed" and len(gate["checks"]) == 1
    assert "not timed beside the same unpruned: it is far from the model" in caplog.text


def test_nothing_is_built_for_a_comparison_that_nobody_asks_for(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "bench", times(lambda low: 1.0))
    monkeypatch.setattr(Lab, "narrowed", lambda *_: pytest.fail("it was built"))
    monkeypatch.setattr(report, "write", lambda *_: None)
    for number, gate in enumerate((False, {"latency": False, "metric": False, "size": "smaller"})):
        asked = made(
            place, PRUNE, "quantize", bench={"shapes": [[1, 1]], "budget_s": 0.5}, gate=gate
        )
        compiler.run(asked, tmp_path / str(number))


def times(of):
    """Timings in which an engine takes as long as `of` says, and so do those beside it."""

    def timed(lab, lowered, spec, against=None):
        me = of(lowered)
        others = {"float": 4.0, **{name: of(low) for name, low in (against or {}).items()}}
        ratios = {
            n: {"ratio": ms / me, "low": ms / me, "high": ms / me} for n, ms in others.items()
        }
        shape = {"batch": 1, "length": 1, "reference": "float", **ratios["float"]}
        return {"shapes": [{**shape, "against": ratios}], "peak_rss_mb": {}, "load_ms": {}}

    return timed


def is_narrow(lowered):
    model = ir.load(lowered.directory / lowered.files[0])
    return all(24 not in value.shape for value in model.graph.initializers.values())


def is_pruned(lowered):
    model = ir.load(lowered.directory / lowered.files[0])
    return all(64 not in value.shape for value in model.graph.initializers.values())


def is_int8(lowered):
    model = ir.load(lowered.directory / lowered.files[0])
    return any(node.op_type == "MatMulIntegerToFloat" for node in model.graph)
