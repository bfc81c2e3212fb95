"""What a compile will take is said before; what it may take at most is kept to."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import effc
from effc import compiler, plan, recipe
from effc.cache import Cache
from effc.calib.probe import held_bytes
from effc.errors import CalibrationError, PreconditionError, SourceError
from effc.ir.memory import peak_bytes
from effc.passes.quantize import Quantize
from effc.progress import Progress, peak_mb, resident_mb
from effc.room import KERNELS, Room, within
from kit import assert_letter, cli, made, save_tokenizer


class Chain(nn.Module):
    """[batch, 8] → [batch, 32] → [batch, 2]."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 2)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def graph():
    return effc.trace(Chain(), torch.randn(4, 8)).only()


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_peak_is_that_of_the_two_largest_neighbours(batch):
    assert peak_bytes(graph(), {"batch": batch}) == batch * (32 + 32) * 4


def test_a_view_needs_no_memory_but_keeps_what_it_looks_at():
    class Views(nn.Module):
        def forward(self, x):
            y = x * 2  # 32 values, alive until the last line
            z = y.view(-1).unsqueeze(0)
            return (x + 1).sum() + z.sum()

    found = peak_bytes(effc.trace(Views(), torch.randn(4, 8), dims={}).only(), {})
    assert found == (32 + 32) * 4 or found == (32 + 32 + 1) * 4


def room(left_bytes, count=8):
    return Room(graph(), {"x": {0: "batch"}}, left_bytes, int(left_bytes) or 1)


def test_rows_are_halved_until_they_fit():
    feeds = {"x": np.arange(64, dtype=np.float32).reshape(8, 8)}
    needed = KERNELS * 8 * 64 * 4
    assert [p["x"].shape[0] for p in room(needed).pieces(feeds)] == [8]
    pieces = list(room(needed / 2).pieces(feeds))
    assert [p["x"].shape[0] for p in pieces] == [4, 4]
    assert np.array_equal(np.concatenate([p["x"] for p in pieces]), feeds["x"])
    assert [p["x"].shape[0] for p in room(needed / 8).pieces(feeds)] == [1] * 8


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(CalibrationError, match="one sample of shape batch 1 needs about"):
        list(room(100).pieces({"x": np.zeros((8, 8), np.float32)}))


def spec(**changes):
    data = {
        "source": {"transformers": str(made().model)},
        "calib": {"file": str(made().sentences), "samples": 16},
        "passes": ["quantize"],
        "bench": False,
    }
    return recipe.build({**data, **changes})


@pytest.fixture
def bare(tmp_path):
    """A Llama of two layers in a directory that has no weights, and a recipe that tunes it by adapters."""
    place = tmp_path / "model"
    place.mkdir()
    save_tokenizer(place)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 80, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 160, "dtype": "float16",
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    data = {
        "source": {"transformers": str(place)}, "calib": {"file": str(made().sentences), "samples": 16},
        "passes": [
            {"pass": "attach-lora", "rank": 3}, {"pass": "tune", "task": "tokens", "distill": 0, "steps": 70},
            "merge-lora", "smooth", {"pass": "prune-dims", "ratio": 0.5, "groups": "*.gate_proj"},
            {"pass": "quantize", "activation_bits": 16, "weight_range": "mse"},
        ],
    }  # fmt: skip
    return data, config, place


def test_a_model_without_weights_is_planned_by_its_shapes(bare, tmp_path):
    data, _, _ = bare
    found = plan.plan(recipe.build(data), tmp_path / "out", progress=Progress())
    stages = {s["name"]: s for s in found["stages"]}
    layer = [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)]
    trained = 2 * sum(3 * (out + inner) for out, inner in layer)
    assert stages["tune"]["note"] == f"{trained:,} numbers are trained"
    how = {name: stages[name]["how"] for name in ("attach-lora", "tune", "merge-lora", "quantize")}
    assert how == {
        "attach-lora": "probed", "tune": "estimated", "merge-lora": "probed", "quantize": "probed",
    }  # fmt: skip
    assert stages["verify"]["how"] == "estimated"
    for name in ("smooth", "prune-dims"):
        assert stages[name]["how"] == "estimated" and stages[name]["note"].startswith("not tried")
    codes = 2 * 80 * 16 + 2 * sum(out * inner for out, inner in layer)
    assert codes < found["model_bytes"] < 2 * codes  # a byte each, their scales, and the norms
    assert all(s["seconds"] >= 0 for s in found["stages"]) and not (tmp_path / "out").exists()
    assert any("not tried: it looks at values" in line for line in plan.lines(found))


def test_a_training_is_planned_with_its_own_batch(bare, tmp_path, monkeypatch):
    """Every activation of a step is kept until the gradients are there, of as many rows as the pass has."""
    monkeypatch.setattr(plan, "resident_mb", lambda: 0.0)
    data, config, place = bare
    wide = 4096
    (place / "config.json").write_text(json.dumps({**config, "intermediate_size": wide}))

    def of(batch, others):
        tune = {"pass": "tune", "task": "tokens", "distill": 0, "batch": batch}
        calib = {**data["calib"], "batch": others}
        given = {**data, "calib": calib, "passes": [{"pass": "attach-lora", "rank": 3}, tune]}
        found = plan.plan(recipe.build(given), tmp_path / "out", progress=Progress())
        stages = {s["name"]: s for s in found["stages"]}
        return stages["tune"]["memory_mb"] - stages["attach-lora"]["memory_mb"]

    held_mb = 4 * 3 * 2 * (3 * (16 + wide) + 4 * (16 + 16)) * 4 / 1e6  # what is trained, four times
    few, many = of(2, 24) - held_mb, of(24, 2) - held_mb
    assert 6 < many / few < 24  # twelve times the rows, and the longest of more is longer
    values = 2 * 5 * wide  # five of that width, in two layers
    assert few > 2 * 4 * values * 4 / 1e6  # two samples of four tokens and more


def test_the_engine_that_a_pruned_one_is_timed_beside_is_planned_too(tmp_path):
    def stages(gate, *passes):
        asked = spec(passes=list(passes), bench={"shapes": [[1, 8]], "budget_s": 0.1}, gate=gate)
        found = plan.plan(asked, tmp_path / "out", progress=Progress())
        return {s["name"]: s["seconds"] for s in found["stages"]}

    prune = {"pass": "prune-dims", "ratio": 0.5, "groups": "*.intermediate.dense"}
    assert "the same unpruned" in stages({}, prune, "quantize")
    assert "the same unpruned" in stages({}, prune)
    for gate, passes in ((False, [prune, "quantize"]), ({}, ["quantize"])):
        assert "the same unpruned" not in stages(gate, *passes)
    assert "the same unpruned" not in stages({"latency": False}, prune, "quantize")


def test_pruning_while_tuning_is_planned_by_shapes_too(bare, tmp_path):
    data, _, _ = bare
    passes = [
        {"pass": "insert-hsm", "ratio": 0.25, "align": 4, "rank": 2},
        {"pass": "attach-lora", "rank": 3},
        {"pass": "tune", "task": "tokens", "distill": 0, "steps": 70, "terms": ["hsm"]},
        "harden-hsm", "merge-lora", "fold-hsm",
    ]  # fmt: skip
    found = plan.plan(
        recipe.build({**data, "passes": passes}), tmp_path / "out", progress=Progress()
    )
    stages = {s["name"]: s for s in found["stages"]}
    adapters = 2 * sum(3 * n for n in (32, 24, 24, 32, 40, 40, 40))
    modules = 5 * (2 * 16 * 2 + 16) + 16
    assert stages["tune"]["note"] == f"{adapters + modules:,} numbers are trained"
    for word in ("insert-hsm", "harden-hsm", "merge-lora", "fold-hsm"):
        assert stages[word]["how"] == "probed"
    whole = plan.plan(
        recipe.build({**data, "passes": ["drop-noops"]}), tmp_path / "out", progress=Progress()
    )
    assert found["model_bytes"] == pytest.approx(0.75 * whole["model_bytes"], rel=0.01)


def test_only_a_plan_does_without_weights(bare, tmp_path):
    data, config, place = bare
    with pytest.raises(SourceError, match="has no weights") as error:
        compiler.run(recipe.build(data), tmp_path / "out")
    assert "--plan" in error.value.hint
    too_wide = {**data, "passes": [{"pass": "attach-lora", "rank": 99}]}
    with pytest.raises(PreconditionError, match="rank 99 is more than"):
        plan.plan(recipe.build(too_wide), tmp_path / "out", progress=Progress())
    (place / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    with pytest.raises(SourceError, match="without weights 1024 are the most"):
        plan.plan(recipe.build(data), tmp_path / "out", progress=Progress())
    (place / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))
    with pytest.raises(SourceError, match="describes no model"):
        plan.plan(recipe.build(data), tmp_path / "out", progress=Progress())
    (place / "config.json").write_text(json.dumps(config))
    (place / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError, match="only as pickle"):
        plan.plan(recipe.build(data), tmp_path / "out", progress=Progress())


@pytest.mark.slow
def test_bounded_memory_changes_no_byte(tmp_path, monkeypatch):
    """Rows at a time, down to one, through calibration and verification."""
    compiler.run(spec(), tmp_path / "A", kept=Cache(None))
    seen = []
    real = Room.rows

    def tight(self, feeds):
        rows = min(real(self, feeds), 3)
        seen.append(rows)
        return rows

    monkeypatch.setattr(Room, "rows", tight)
    compiler.run(spec(), tmp_path / "B", kept=Cache(None), max_ram_bytes=64 << 30)
    assert 3 in seen and max(seen) == 3
    for name in ("model.onnx", "decisions.json", "manifest.json"):
        assert (tmp_path / "A" / name).read_bytes() == (tmp_path / "B" / name).read_bytes()


@pytest.mark.slow
def test_too_little_memory_is_said_at_once(tmp_path):
    ran = cli(
        "compile", made().model, "-o", tmp_path / "OUT", "--quantize", "int8", "--calib",
        made().sentences, "--no-bench", "--max-ram", "1MB",
    )  # fmt: skip
    assert_letter(ran, "CalibrationError", 7, "--max-ram 1 MB", "hold more than that already")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["little", "-1GB", "0"])
def test_a_memory_bound_is_a_size(word):
    assert_letter(cli("compile", "x", "-o", "y", "--max-ram", word), "UsageError", 2, "--max-ram")


@pytest.mark.slow
def test_a_plan_names_every_stage_and_writes_nothing(tmp_path):
    file, pairs = tmp_path / "plan.json", tmp_path / "pairs.csv"
    pairs.write_text("the cat,the cat,5\nthe cat sat,a dog,1\nthe cat sat,the cat ran,3\n")
    ran = cli(
        "compile", made().model, "-o", tmp_path / "OUT", "--quantize", "int8", "--calib",
        made().sentences, "--metric", f"sts:{pairs}", "--plan", "--json", file,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads(file.read_text())
    names = [s["name"] for s in found["stages"]]
    assert names == [
        "load", "trace", "exact passes", "smooth", "quantize", "lower", "verify", "metric",
        "lower (float reference)", "bench",
    ]  # fmt: skip
    assert all(s["seconds"] >= 0 and s["memory_mb"] > 0 for s in found["stages"])
    assert found["seconds"] == pytest.approx(sum(s["seconds"] for s in found["stages"]), abs=0.1)
    assert "in all" in ran.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.csv", "plan.json"]


@pytest.mark.slow
def test_a_plan_says_how_large_the_engine_will_be(tmp_path):
    found = plan.plan(spec(), tmp_path / "OUT", progress=Progress())
    made_ = compiler.run(spec(), tmp_path / "OUT", kept=Cache(None))
    graph_bytes = 60_000  # a small model is mostly graph
    assert 0 <= made_.report["model_bytes"] - found["model_bytes"] < graph_bytes


@pytest.mark.slow
def test_a_plan_of_recorded_decisions_needs_no_data(tmp_path):
    decisions = json.loads((made().out / "decisions.json").read_text())
    data = {
        "source": {"transformers": str(made().model)},
        "passes": ["smooth", "quantize"],
        "bench": False,
    }
    replayed = recipe.build(data, replayed=True)
    found = plan.plan(replayed, tmp_path / "OUT", progress=Progress(), decisions=decisions)
    assert [s["name"] for s in found["stages"]][3:5] == ["smooth", "quantize"]


@pytest.mark.slow
def test_a_plan_keeps_to_the_memory_that_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "resident_mb", lambda: 100.0)
    monkeypatch.setattr(plan._Probe, "_activations_mb", lambda *_: 500.0)
    for bound, mb in ((None, 1100), (1, 100)):
        found = plan.plan(spec(), tmp_path / "OUT", progress=Progress(), max_ram_bytes=bound)
        assert [s["memory_mb"] for s in found["stages"] if s["name"] == "verify"] == [mb]


def test_the_weights_of_an_engine_count_to_what_is_held():
    here, there = (
        within(1 << 40, g, {}) for g in (graph(), effc.trace(Wide(), torch.randn(1, 512)).only())
    )
    assert here.left_bytes - there.left_bytes > 512 * 4096 * 4 / 2


def test_what_a_pass_measures_counts_to_what_is_held():
    program = effc.trace(Chain(), {"x": torch.randn(4, 8)}, dims={"x": {0: "batch"}})
    probes = list(Quantize(rounding="gptq", activation_bits=16).probes(program.only()))
    grams = [(8 * 8 + 8) * 8, (32 * 32 + 32) * 8]
    assert held_bytes([*probes, *probes]) == sum(grams) + max(grams)
    whole = Room(program.only(), {}, 3000.0 + sum(grams), 1 << 20)
    feeds = {"x": np.zeros((4, 8), np.float32)}
    assert (whole.rows(feeds), whole.beside(sum(grams)).rows(feeds)) == (4, 4)
    assert whole.beside(sum(grams) + 1500).rows(feeds) == 2
    with pytest.raises(CalibrationError, match="beside 0 MB of statistics") as caught:
        whole.beside(sum(grams) + 2900).rows(feeds)
    assert "select" in (caught.value.hint or "")


@pytest.mark.slow
def test_a_compile_leaves_room_for_what_its_passes_measure(tmp_path, monkeypatch):
    seen, real = [], Room.beside

    def beside(self, statistics_bytes, **options):
        seen.append(statistics_bytes)
        return real(self, statistics_bytes, **options)

    monkeypatch.setattr(Room, "beside", beside)
    weight_only = Quantize(rounding="gptq", activation_bits=16)
    found = dataclasses.replace(spec(), passes=(weight_only,))
    compiler.run(found, tmp_path / "A", kept=Cache(None), max_ram_bytes=64 << 30)
    assert min(seen) > 1000


class Wide(nn.Linear):
    def __init__(self):
        super().__init__(512, 4096)


def test_a_plan_refuses_what_the_compile_would(tmp_path):
    ran = cli("compile", tmp_path / "none", "-o", tmp_path / "OUT", "--plan")
    assert_letter(ran, "SourceError", 4)


def test_a_stage_remembers_its_time_and_memory():
    progress = Progress()
    with progress.stage("a"):
        held = np.ones(40_000_000, np.uint8)
    with progress.stage("a"):
        pass
    progress.reuse("b")
    assert list(progress.stages) == ["a", "b"]
    if peak_mb() is not None:
        assert progress.stages["a"].peak_mb >= resident_mb() - 1
    assert progress.stages["b"].cached == 1 and held[0] == 1
