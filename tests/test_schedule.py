"""Samplers in numpy against those of diffusers, whose settings they read."""

import numpy as np
import pytest
import torch

from effc.errors import SourceError, UsageError
from effc.schedule import SAMPLERS, sampler

diffusers = pytest.importorskip("diffusers")
SHAPE = (2, 3, 4, 5)


def predicted(x, time, channels=3):
    """A smooth function of x and time in the place of a model."""
    made = np.tanh(0.3 * x + np.sin(time / 300.0))
    return np.concatenate([made, np.cos(made)], axis=1) if channels > 3 else made


def noises(count=2000):
    draw = np.random.default_rng(1)
    return [draw.standard_normal(SHAPE).astype(np.float32) for _ in range(count)]


def ours(made, channels):
    drawn = iter(noises(made.steps + 2))
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) * made.scale
    for index, time in enumerate(made.times):
        given = predicted(made.input(index, x), time, channels)
        x = made.step(index, x, given, lambda shape: next(drawn))
    return x


def theirs(monkeypatch, scheduler, steps, channels):
    drawn = iter(noises(steps + 2))
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(drawn)))
    scheduler.set_timesteps(steps)
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    x = torch.from_numpy(x) * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        given = predicted(scheduler.scale_model_input(x, time).numpy(), float(time), channels)
        x = scheduler.step(torch.from_numpy(given).float(), time, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDPMScheduler", {}),
        ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}),
        ("DDPMScheduler", {"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2"}),
        ("DDPMScheduler", {"prediction_type": "v_prediction", "clip_sample": False}),
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"prediction_type": "sample", "timestep_spacing": "linspace"}),
        ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
        ("DDIMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "beta_schedule": "scaled_linear"}),
        ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
        ("EulerAncestralDiscreteScheduler", {}),
    ],
)  # fmt: skip
def test_a_run_is_that_of_diffusers(monkeypatch, name, settings, steps):
    scheduler = getattr(diffusers, name)(**settings)
    made = sampler({"_class_name": name, **scheduler.config}, steps)
    channels = 6 if settings.get("variance_type") == "learned_range" else 3
    wanted = theirs(monkeypatch, scheduler, steps, channels)
    assert np.allclose(made.times, scheduler.timesteps.numpy(), atol=1e-3)
    found = ours(made, channels)
    assert np.linalg.norm(found - wanted) <= 2e-4 * np.linalg.norm(wanted)


def test_settings_that_say_nothing_are_those_of_diffusers(monkeypatch):
    for name in SAMPLERS:
        scheduler = getattr(diffusers, name)()
        if name == "PNDMScheduler":
            with pytest.raises(SourceError, match="skip_prk_steps"):
                sampler({"_class_name": name}, 10)
            continue
        assert np.allclose(
            ours(sampler({"_class_name": name}, 10), 3),
            theirs(monkeypatch, scheduler, 10, 3), rtol=1e-3, atol=1e-3,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"_class_name": "DDIMSheduler"}, "did you mean 'DDIMScheduler'"),
        ({}, "names no sampler"),
        ([], "names no sampler"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "velocity"}, "prediction_type: velocity"),
        ({"_class_name": "DDIMScheduler", "beta_start": "low"}, "beta_start: low"),
        ({"_class_name": "DDIMScheduler", "beta_end": 2.0}, "beta_start and beta_end"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding: True"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas: True"),
    ],
)  # fmt: skip
def test_settings_that_are_none_are_refused(settings, part):
    with pytest.raises(SourceError, match=part) as found:
        sampler(settings, 10)
    assert found.value.hint


def test_more_steps_than_the_model_knows_are_refused():
    for steps in (0, 1001):
        with pytest.raises(UsageError, match="trained on 1000 steps"):
            sampler({"_class_name": "DDIMScheduler"}, steps)
    with pytest.raises(UsageError, match="did you mean 'DDIMScheduler'"):
        sampler({"_class_name": "DDPMScheduler"}, 10, "DDIMSchedule")
