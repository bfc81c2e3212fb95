"""Diffusion pipelines as several graphs, in the folders and names that diffusers and optimum give their ONNX files.

    text_encoder    input_ids                                        →  last_hidden_state, pooler_output
    unet            sample, timestep [1], encoder_hidden_states      →  out_sample
    vae_decoder     latent_sample                                    →  sample
    vae_encoder     sample                                           →  latent_parameters

A pipeline without text has no text encoder, one on pixels has the denoiser alone; where that is a transformer, its
folder is `transformer`. Whoever samples asks the denoiser once a step for all rows at one time, and beside it what is
not wanted, where there is guidance (Ho and Salimans 2022, equation 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from effc import bounded
from effc.errors import EffcError, SourceError
from effc.schedule import SETTINGS, Sampler

Array = np.ndarray[Any, np.dtype[Any]]
Json = dict[str, Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]

KIND = "diffusion"
DENOISERS = UNET, TRANSFORMER = "unet", "transformer"
TEXTS = TEXT, TEXT_2 = "text_encoder", "text_encoder_2"
DECODER, ENCODER = "vae_decoder", "vae_encoder"
SAMPLE, TIMESTEP, OUT_SAMPLE = "sample", "timestep", "out_sample"
LATENT, HIDDEN, LABELS = "latent_sample", "encoder_hidden_states", "class_labels"
POOLED, SIZES = "text_embeds", "time_ids"
LAST, PENULTIMATE = "last_hidden_state", "penultimate_hidden_state"
LAYOUT = "batch, tokens, features"

INDEX = "model_index.json"
SCHEDULER = f"scheduler/{SETTINGS}"
VAE = "vae/config.json"


def denoiser(roles: Sequence[str]) -> str:
    """The role that predicts noise. Raises SourceError where there is none, or more than one."""
    found = [role for role in roles if role in DENOISERS]
    if len(roles) == 1:
        return roles[0]
    if len(found) != 1:
        raise SourceError(
            f"of the graphs {', '.join(roles)} none is the one denoiser of a diffusion pipeline",
            hint=f"call it {UNET} or {TRANSFORMER}",
        )
    return found[0]


@dataclass(frozen=True, kw_only=True)
class Latents:
    """How the decoder's latents are scaled: it takes z / scale + shift."""

    scale: float = 1.0
    shift: float = 0.0


def latents(root: Path, error: type[EffcError]) -> Latents:
    """As vae/config.json says. Raises `error` where it says no numbers."""
    settings = bounded.read_json(root / VAE, error)
    found = {}
    for word, key, absent in (("scale", "scaling_factor", 0.18215), ("shift", "shift_factor", 0.0)):
        value = settings.get(key) if isinstance(settings, dict) else None
        value = absent if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
            raise error(f"{root / VAE} says {key}: {str(value)[:40]}", hint=bounded.HINT)
        found[word] = float(value)
    if found["scale"] == 0:
        raise error(f"{root / VAE} says scaling_factor: 0", hint=bounded.HINT)
    return Latents(**found)


@dataclass(frozen=True, kw_only=True)
class Guide:
    """What a denoiser is told beside the sample and the time.

    With a `scale` every array of `feeds` has two rows for each of the sample: those that are not wanted, and behind
    them those that are.
    """

    feeds: Mapping[str, Array] = field(default_factory=dict)
    scale: float | None = None


def trajectory(
    ask: Callable[[int, Mapping[str, Array]], Array], sampler: Sampler, rows: Rows, guide: Guide
) -> Iterator[tuple[int, Array]]:
    """The number of each step and the sample behind it, from noise to the end.

    `ask` is given the number of a step, sample and guide, and gives what the denoiser predicts.
    """
    x = rows.normal() * np.float32(sampler.scale)
    for index in range(len(sampler.times)):
        given = np.asarray(sampler.input(index, x), np.float32)
        if guide.scale is not None:
            given = np.concatenate([given, given])
        predicted = ask(index, {SAMPLE: given, **guide.feeds})
        if guide.scale is not None:
            predicted = _guided(predicted, x.shape[1], guide.scale)
        x = np.asarray(sampler.step(index, x, predicted, lambda _: rows.normal()), np.float32)
        yield index, x


def _guided(predicted: Array, channels: int, scale: float) -> Array:
    """ε + s·(ε_wanted − ε); channels behind the sample's, which are of variance, are those of what is wanted."""
    away, wanted = np.split(predicted, 2)
    noise = away[:, :channels] + scale * (wanted[:, :channels] - away[:, :channels])
    return np.concatenate([noise, wanted[:, channels:]], axis=1)


class Rows:
    """Normal numbers for some samples, of which each has a seed of its own: it is the same whoever is beside it."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._draws = [np.random.default_rng(seed) for seed in seeds]

    def normal(self) -> Array:
        return np.stack([draw.standard_normal(self.shape, np.float32) for draw in self._draws])


def timed(time: float, rows: int, shape: Sequence[int | str], dtype: str) -> Array:
    """A time as a denoiser takes it: one number [1] or [], or the same for every row [batch]."""
    if len(shape) == 0:
        return np.asarray(time, dtype)
    return np.full((rows if isinstance(shape[0], str) else shape[0],), time, dtype)


def sizes(height: int, width: int, rows: int) -> Array:
    """`time_ids` of SDXL [rows, 6]: the size of the picture, where it was cut, and the size that is wanted."""
    return np.tile(np.array([height, width, 0, 0, height, width], np.float32), (rows, 1))


def pixels(sample: Array) -> Array:
    """[n, channels, height, width] in −1 … 1 → uint8 [n, height, width, channels]"""
    found = np.clip(sample / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    return np.asarray(np.round(found * 255), np.uint8)
