"""Every example runs as its first lines say, and writes what was measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(file.parent.name for file in ROOT.glob("examples/*/run.py"))
KEYS = {
    "cer": {"metrics", "decoded_equal", "speedup"},
    "cloud_device": {
        "rounds",
        "uplink",
        "recovered_fraction",
        "bytes_up",
        "bytes_down",
        "full_bytes",
        "mirror_equal",
        "faults",
    },
    "diaasq": {"metrics", "decoded_equal", "speedup"},
    "lexical_fusion": {"metrics", "decoded_equal", "speedup"},
    "minilm": {"shapes", "outputs", "metric", "model_bytes", "int8_sites", "total_sites"},
    "mor1e": {
        "arms",
        "export_max_abs",
        "fused_max_abs",
        "static_fold_err",
        "adapter_overhead",
        "mixed_batch_max_abs",
        "about",
    },
    "noisyquant": {
        "arms",
        "fold_max_abs",
        "extra_nodes",
        "engine_steps_off",
        "latency_ratio",
        "theorem",
    },
    "pat": {
        "arms",
        "fold_rel_err_fp32",
        "fold_rel_err_fp64",
        "linear_param_ratio",
        "engine_rel_l2",
        "prefill_speedup",
    },
    "q_diffusion": {
        "arms",
        "compared",
        "disk_ratio",
        "coded_ratio",
        "loop_speedup",
        "engine_steps_off",
        "steps",
        "is_trained",
    },
    "own_pass": {"before", "after", "sites", "max_abs", "recipe"},
}
CAUSAL_KEYS = {"arms", "ahead", "untrained", "left_out", "about", "data"}


def test_every_example_is_known():
    assert sorted(KEYS) == EXAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, ROOT / "examples" / name / "run.py", "--smoke", "--json", file]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["example"] == name
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert set(found) >= KEYS[name]
    assert set(found["data"]) >= {"name", "n", "sha256"}


@pytest.mark.slow
def test_a_language_model_answers_ten_tasks_and_more(tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, ROOT / "examples/mor1e/causal.py", "--smoke", "--json", file]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["example"] == "mor1e causal"
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert set(found) >= CAUSAL_KEYS
    tasks = set(found["untrained"])
    assert len(tasks) >= 10
    assert all(set(arm["score"]) == tasks for arm in found["arms"].values())
    for name, left in found["left_out"].items():
        assert name in tasks and set(left) == {"score", "untrained"}
    about = found["about"]
    assert len(about["purity_of_clusters"]) == len(about["clusters"]) == 16
    assert all(0 < share <= 1 for share in about["purity_of_clusters"])


@pytest.mark.slow
def test_encoders_are_pruned_while_they_are_tuned_beside_adapters_that_train_as_much(tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, ROOT / "examples/pat/encoders.py", "--smoke", "--json", file]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["example"] == "pat-encoders" and "post-LN" in found["refused"]
    if "skipped" in found:
        pytest.skip(found["skipped"])
    for name, square, rank_one in (
        ("vision transformer", 6 * 8 * 128**2, 6 * 14 * 128),
        ("sentence encoder", 3 * 12 * 64**2, 3 * 16 * 64),
    ):  # numbers of the layers in all blocks, and of adapters of rank 1: the layer that gives the classes has none
        lora, pat = (found[name]["arms"][arm] for arm in ("lora", "pca then pat"))
        assert (lora["linear_parameters"], pat["linear_parameters"]) == (
            [square],
            [square * 3 // 4],
        )
        assert lora["trainables"] == [round(pat["trainables"][0] / rank_one) * rank_one]


def test_numbers_that_were_taken_before_have_the_revision_of_then(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("pat", ROOT / "benchmarks" / "pat.py")
    pat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pat)
    monkeypatch.setattr(pat.common, "RESULTS", tmp_path)
    file, kept = tmp_path / "found.json", tmp_path / "pat-encoders.json"
    file.write_text('{"example": "pat-encoders"}', encoding="utf-8")

    def take(*words):
        monkeypatch.setattr(sys, "argv", ["pat.py", "encoders", *words])
        return pat.main()

    with pytest.raises(SystemExit):
        take("--taken", str(file))
    assert "does not say which it is of" in capsys.readouterr().err and not kept.exists()
    assert take("--taken", str(file), "--revision", "1234567") == 0
    assert json.loads(kept.read_text(encoding="utf-8"))["revision"] == "1234567"
    file.write_text('{"revision": "89abcde"}', encoding="utf-8")
    assert take("--taken", str(file)) == 0
    assert json.loads(kept.read_text(encoding="utf-8"))["revision"] == "89abcde"
    with pytest.raises(SystemExit):
        take("--revision", "1234567")


@pytest.mark.parametrize("name", ["day", "dusk", "ink", "frost"])
def test_pictures_of_shapes_are_not_small_and_their_answers_are_true(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "cloud_device"))
    world = importlib.import_module("world")
    domain = world.DOMAINS[name]
    scenes = world.drawn(domain, 8, 3)
    assert scenes.pictures.shape[1:] == (224, 224, 3)
    assert min(world.jpeg_bytes(picture) for picture in scenes.pictures) >= 8192
    shapes, colours = len(world.SHAPES), len(world.COLOURS)
    for i in range(8):
        there = scenes.shapes[i] < shapes
        kinds = scenes.shapes[i][there].tolist()
        hues = (scenes.hues[i][there] + 0.5) * 360 / world.HUES
        names = (((hues - domain.turn) / 60).round().astype(int) % colours).tolist()
        things = list(zip(kinds, names, strict=True))
        assert len(things) == world.THINGS
        for (kind, first, second), answer in zip(scenes.queries[i], scenes.answers[i], strict=True):
            shape, colour = first - 1 - len(world.KINDS), first - 1 - len(world.KINDS) - shapes
            match world.KINDS[kind - 1]:
                case "colour of":
                    assert [n for k, n in things if k == shape] == [answer]
                case "shape of":
                    assert [colours + k for k, n in things if n == colour] == [answer]
                case "count shape":
                    assert answer == world.COUNTS + kinds.count(shape)
                case "count colour":
                    assert answer == world.COUNTS + names.count(colour)
                case "is there":
                    other = second - 1 - len(world.KINDS) - shapes
                    assert answer == world.YES + ((shape, other) not in things)
                case "caption":
                    thing, is_shape = divmod(colour - colours, 2)
                    assert answer == (colours + kinds[thing] if is_shape else names[thing])
    assert not (scenes.pictures == world.drawn(domain, 8, 4).pictures).all()
