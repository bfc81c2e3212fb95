"""Calibration by timestep: what a model's own float sampler gives it, and no data."""

import json

import numpy as np
import pytest
import torch
from pipelines import FACTORY, save_sd

from effc import package
from effc.errors import CalibrationError, RecipeError
from effc.recipe import CalibSpec, build
from effc.samples import Samples
from effc.source import from_factory, from_pipeline
from effc.trajectories import Trajectories
from kit import assert_letter, cli


@pytest.fixture
def word(tmp_path):
    (tmp_path / "mine.py").write_text(FACTORY)
    return f"{tmp_path / 'mine.py'}:make"


@pytest.fixture
def source(word):
    return from_factory(word)


def drawn(source, role="unet", **changes):
    made = Trajectories(source=source, **{"count": 6, "steps": 10, "batch": 4, **changes})
    return list(made(role))


def test_every_batch_is_a_step_of_some_trajectories(source):
    found = drawn(source)
    assert [b.tag for b in found] == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0] * 2
    assert [len(b.inputs["sample"]) for b in found] == [4] * 10 + [2] * 10
    assert all((b.inputs["timestep"] == b.tag).all() for b in found)
    assert np.allclose(
        found[0].inputs["sample"][2],
        np.random.default_rng(2).standard_normal((1, 6, 6), np.float32),
    )


def test_they_are_those_of_diffusers(source):
    diffusers = pytest.importorskip("diffusers")
    found = drawn(source, count=1)
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(10)
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.standard_normal((1, 1, 6, 6), np.float32))
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            module,
            "randn_tensor",
            lambda *_, **__: torch.from_numpy(draw.standard_normal((1, 1, 6, 6), np.float32)),
        )
        for time, batch in zip(scheduler.timesteps, found, strict=True):
            assert np.allclose(batch.inputs["sample"], x.numpy(), atol=1e-4)
            x = scheduler.step(source.module(x, time[None]), time, x).prev_sample


@pytest.mark.parametrize(
    ("at", "times"),
    [
        ("uniform", [900, 600, 300, 0]), ("first", [900, 800, 700, 600]),
        ("middle", [600, 500, 400, 300]), ("last", [300, 200, 100, 0]),
    ],
)  # fmt: skip
def test_steps_are_kept_where_they_are_asked_for(source, at, times):
    assert [b.tag for b in drawn(source, count=2, keep=4, at=at)] == times


def test_the_same_seed_gives_the_same_batches_and_another_others(source):
    first, again, other = (drawn(source, seed=seed) for seed in (0, 0, 100))
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a.inputs["sample"], b.inputs["sample"])
        assert not np.allclose(a.inputs["sample"], c.inputs["sample"])


def test_held_out_samples_are_other_trajectories_over_all_steps(source):
    samples = Samples(source.only("unet"), CalibSpec(trajectories=4, steps=10, batch=4))
    held = samples.held_out(3)
    assert [b.tag for b in held] == [900, 500, 0]
    known = np.stack([b.inputs["sample"] for b in samples("unet") if b.tag == 900])
    assert not any(np.allclose(held[0].inputs["sample"][0], row[0]) for row in known)
    assert samples.batches("unet") == 10 == len(list(samples("unet")))


def test_one_batch_is_held_at_a_time(source):
    reading = Trajectories(source=source, count=10**9, steps=10, batch=2)("unet")
    assert [next(reading).tag for _ in range(3)] == [900, 800, 700]


@pytest.mark.slow
def test_each_part_of_a_pipeline_has_what_the_sampler_gives_it(tmp_path):
    pytest.importorskip("diffusers")
    source = from_pipeline(save_sd(tmp_path / "sd"))
    how = {"count": 2, "steps": 4, "prompts": ("a cat", "dog"), "guidance": 3.0}
    found = {role: drawn(source, role, **how) for role in source.modules}
    assert [b.inputs["sample"].shape for b in found["unet"]] == [
        (4, 4, 8, 8)
    ] * 5  # both halves; PNDM has one more
    hidden = found["unet"][0].inputs["encoder_hidden_states"]
    assert np.array_equal(hidden[0], hidden[1]) and not np.array_equal(hidden[2], hidden[3])
    assert found["text_encoder"][0].inputs["input_ids"].shape == (3, 12)
    assert found["vae_decoder"][0].inputs["latent_sample"].shape == (2, 4, 8, 8)
    (picture,) = (b.inputs["sample"] for b in found["vae_encoder"])
    assert picture.shape == (2, 3, 16, 16) and np.abs(picture).max() <= 1
    alone = drawn(source, "unet", **{**how, "guidance": 1.0})
    assert len(alone[0].inputs["sample"]) == 2


@pytest.mark.slow
def test_a_compile_records_seed_and_steps_and_repeats(word, tmp_path):
    recipe = {
        "source": {"python": word}, "passes": ["quantize"], "bench": False, "gate": False,
        "calib": {"trajectories": 6, "steps": 10, "keep": 5, "seed": 3, "batch": 4},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    for name in ("a", "b"):
        ran = cli("compile", tmp_path / "r.yaml", "-o", tmp_path / name)
        assert ran.code == 0, ran.err
    first, second = (package.read(tmp_path / name) for name in ("a", "b"))
    assert first.digest == second.digest
    assert first.data == {
        "trajectories": 6, "steps": 10, "at": "uniform", "seed": 3, "guidance": None, "prompts": None,
        "sampler": "DDPM", "times": [900.0, 700.0, 500.0, 200.0, 0.0],
    }  # fmt: skip
    ran = cli("compile", tmp_path / "r.yaml", "-o", tmp_path / "c", "--plan")
    assert ran.code == 0, ran.err
    words = ("--set", "calib.seed=4", "--max-ram", "64GB")
    assert cli("compile", tmp_path / "r.yaml", "-o", tmp_path / "d", *words).code == 0
    assert package.read(tmp_path / "d").engines[0].sha256 != first.engines[0].sha256


@pytest.mark.parametrize(
    ("calib", "part"),
    [
        ({}, "one of file, callable, trajectories"),
        ({"trajectories": 4, "callable": "mine:batches"}, "drawn by the sampler"),
        ({"file": "x.npz", "at": "first"}, "is for trajectories"),
        ({"trajectories": 4, "at": "end"}, "'end' is not one of uniform, first, middle, last"),
        ({"trajectories": 0}, "greater than or equal to 1"),
    ],
)
def test_wishes_that_are_none_are_refused(calib, part):
    with pytest.raises(RecipeError, match=part):
        build({"source": {"python": "mine:make"}, "calib": calib})


def test_a_model_without_a_sampler_has_no_trajectories(tmp_path, source):
    from kit import write_factories

    word = f"{write_factories(tmp_path / 'f.py')}:perceptron"
    recipe = {"source": {"python": word}, "passes": ["quantize"], "calib": {"trajectories": 4}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    ran = cli("compile", tmp_path / "r.yaml", "-o", tmp_path / "out", "--no-bench")
    assert_letter(ran, "CalibrationError", 7, "has no sampler")
    with pytest.raises(RecipeError, match="keeps 11 of 10 steps"):
        drawn(source, keep=11)
    with pytest.raises(CalibrationError, match="gives the graph 'main' nothing"):
        drawn(source, "main")
