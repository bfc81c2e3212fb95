"""Samplers of diffusion models in numpy: from noise to a sample, one prediction of a model at a time.

    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε

A model is asked for ε (or x_0, or v = √ᾱ·ε − √(1 − ᾱ)·x_0) at falling times t, and every sampler has its own way from
there to the next x: DDPM draws from the posterior (Ho et al. 2020, equations 6 and 7), DDIM follows the noise that was
predicted (Song et al. 2021, equation 12), Euler takes it for a slope in σ = √((1 − ᾱ)/ᾱ) (Karras et al. 2022, algorithm
1), and PNDM extrapolates from the last four (Liu et al. 2022, equation 12). Settings are those of diffusers'
scheduler_config.json, and so are the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from effc.errors import SourceError, UsageError
from effc.table import unknown

Array = np.ndarray[Any, np.dtype[Any]]
Draw = Callable[[tuple[int, ...]], Array]
"""Normal numbers of a shape."""

MOST_STEPS = 10_000
SETTINGS = "scheduler_config.json"


class Sampler:
    """One run from noise to a sample.

    `times` [steps] falls; `scale` is what noise of unit variance is multiplied by first.
    """

    spacings: ClassVar[tuple[str, ...]] = ("linspace", "leading", "trailing")
    spacing: ClassVar[str] = "leading"
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Settings of which only some values are known, the first being that of a file which says nothing."""
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction")
    scale: float = 1.0

    def __init__(self, settings: Mapping[str, Any], steps: int) -> None:
        self.settings, self.steps = settings, steps
        self.count = _whole(settings, "num_train_timesteps", 1000, most=MOST_STEPS)
        if not 1 <= steps <= self.count:
            raise UsageError(
                f"the model was trained on {self.count} steps, and {steps} cannot be taken of them",
                hint=f"--steps {min(50, self.count)}",
            )
        self.prediction = self._word("prediction_type", self.predictions)
        self._word("thresholding", (False,))
        for key, known in self.fixed.items():
            self._word(key, known)
        self.alphas = np.cumprod(1.0 - self._betas())
        self.times = self._times()

    def input(self, index: int, x: Array) -> Array:
        """What the model is given at a step for x."""
        return x

    def step(self, index: int, x: Array, predicted: Array, draw: Draw) -> Array:
        """The next x, from what the model predicted at step `index`."""
        raise NotImplementedError

    def _betas(self) -> Array:
        settings = self.settings
        low, high = (
            _number(settings, *pair) for pair in (("beta_start", 1e-4), ("beta_end", 0.02))
        )
        if not 0 < low <= high < 1:
            raise _odd("beta_start and beta_end", [low, high])
        if settings.get("trained_betas") is not None:
            raise _odd("trained_betas", "a list")
        kind = self._word("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))
        if kind == "linear":
            betas = np.linspace(low, high, self.count)
        elif kind == "scaled_linear":
            betas = np.linspace(low**0.5, high**0.5, self.count) ** 2
        else:  # Nichol and Dhariwal 2021, equation 17
            bar = np.cos((np.arange(self.count + 1) / self.count + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        self._word("rescale_betas_zero_snr", (False,))
        return np.asarray(betas)

    def _times(self) -> Array:
        """Falling times, as Lin et al. 2024, table 2, name the ways to space them."""
        spacing = self._word("timestep_spacing", (self.spacing, *self.spacings))
        if spacing == "linspace":
            return np.asarray(np.linspace(0, self.count - 1, self.steps).round()[::-1])
        if spacing == "trailing":
            return np.asarray(
                np.round(np.arange(self.count, 0, -self.count / self.steps))[: self.steps] - 1
            )
        offset = _whole(self.settings, "steps_offset", 0, most=self.count)
        times = np.arange(self.steps)[::-1] * (self.count // self.steps) + offset
        return np.asarray(np.minimum(times, self.count - 1).astype(np.float64))

    def _word(self, key: str, known: tuple[Any, ...]) -> Any:
        """A setting that is one of the `known`; the first where the file says nothing."""
        value = self.settings.get(key)
        if value is None:
            return known[0]
        if not any(value is word or (isinstance(value, str) and value == word) for word in known):
            raise _odd(key, value, known)
        return value

    def _bar(self, time: float, end: float = 1.0) -> float:
        """ᾱ of a time; `end` before the first."""
        return float(self.alphas[int(time)]) if time >= 0 else end

    def _parts(self, x: Array, predicted: Array, bar: float) -> tuple[Array, Array]:
        """x_0 and ε as a prediction at x says them."""
        signal, noise = bar**0.5, (1 - bar) ** 0.5
        if self.prediction == "sample":
            return predicted, (x - signal * predicted) / noise
        if self.prediction == "v_prediction":
            return signal * x - noise * predicted, signal * predicted + noise * x
        return (x - noise * predicted) / signal, predicted

    def _clipped(self, x: Array) -> Array:
        if not self._word("clip_sample", (True, False)):
            return x
        most = _number(self.settings, "clip_sample_range", 1.0)
        return np.clip(x, -most, most)


class DDPM(Sampler):
    """Draws from the posterior of x given the x_0 that was predicted."""

    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range", "learned"),
    }  # fmt: skip

    def step(self, index: int, x: Array, predicted: Array, draw: Draw) -> Array:
        time = self.times[index]
        bar = self._bar(time)
        before = self._bar(self.times[index + 1]) if index + 1 < self.steps else 1.0
        beta = 1 - bar / before
        kind = self._word("variance_type", self.fixed["variance_type"])
        spread: Any = (1 - before) / (1 - bar) * beta
        learned = None
        if predicted.shape[1] == 2 * x.shape[1]:
            predicted, learned = np.split(predicted, 2, axis=1)
        start = self._clipped(self._parts(x, predicted, bar)[0])
        mean = (before**0.5 * beta * start + (bar / before) ** 0.5 * (1 - before) * x) / (1 - bar)
        if time <= 0:
            return np.asarray(mean)
        spread = max(spread, 1e-20)
        if kind == "fixed_large":
            spread = beta
        elif kind == "learned" and learned is not None:
            spread = learned
        elif (
            kind == "learned_range" and learned is not None
        ):  # Nichol and Dhariwal 2021, equation 15
            share = (learned + 1) / 2
            spread = np.exp(share * np.log(beta) + (1 - share) * np.log(spread))
        elif kind.startswith("learned"):
            raise _odd("variance_type", kind)
        return np.asarray(mean + np.sqrt(spread) * draw(x.shape))


class DDIM(Sampler):
    """Follows the noise that was predicted, and draws nothing (η = 0)."""

    def __init__(self, settings: Mapping[str, Any], steps: int) -> None:
        super().__init__(settings, steps)
        self.end = 1.0 if self._word("set_alpha_to_one", (True, False)) else float(self.alphas[0])

    def step(self, index: int, x: Array, predicted: Array, draw: Draw) -> Array:
        time = self.times[index]
        bar, before = self._bar(time), self._bar(time - self.count // self.steps, self.end)
        start, noise = self._parts(x, predicted[:, : x.shape[1]], bar)
        return np.asarray(before**0.5 * self._clipped(start) + (1 - before) ** 0.5 * noise)


class PNDM(Sampler):
    """DDIM with the noise extrapolated from the last four predictions; the second step is taken twice."""

    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {"skip_prk_steps": (False, True)}
    weights: ClassVar[tuple[tuple[float, ...], ...]] = (
        (1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )  # fmt: skip

    def __init__(self, settings: Mapping[str, Any], steps: int) -> None:
        super().__init__(settings, steps)
        if not self._word("skip_prk_steps", (False, True)):
            raise _odd("skip_prk_steps", False, (True,))
        self.end = 1.0 if self._word("set_alpha_to_one", (False, True)) else float(self.alphas[0])
        rising = self.times[::-1]
        self.times = np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])[::-1].copy()
        self._noises: list[Array] = []
        self._first: Array | None = None

    def step(self, index: int, x: Array, predicted: Array, draw: Draw) -> Array:
        stride = self.count // self.steps
        time, before = self.times[index], self.times[index] - stride
        if index == 1:  # again from where the first step began, with the mean of both
            assert self._first is not None
            time, before, x = time + stride, time, self._first
            noise = (predicted + self._noises[-1]) / 2
        else:
            self._noises = [predicted, *self._noises[:3]]
            self._first = x
            chosen = self.weights[len(self._noises) - 1]
            noise = sum(w * n for w, n in zip(chosen, self._noises, strict=True))  # type: ignore[assignment]
        bar, end = self._bar(time), self._bar(before, self.end)
        if self.prediction == "v_prediction":
            noise = bar**0.5 * noise + (1 - bar) ** 0.5 * x
        below = bar * (1 - end) ** 0.5 + (bar * (1 - bar) * end) ** 0.5
        return np.asarray((end / bar) ** 0.5 * x - (end - bar) * noise / below)


class Euler(Sampler):
    """Steps along the slope of x in σ, where x = x_0 + σ·ε."""

    spacing: ClassVar[str] = "linspace"
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "interpolation_type": ("linear",), "timestep_type": ("discrete",), "final_sigmas_type": ("zero",),
        "use_karras_sigmas": (False,), "use_exponential_sigmas": (False,), "use_beta_sigmas": (False,),
    }  # fmt: skip

    def __init__(self, settings: Mapping[str, Any], steps: int) -> None:
        super().__init__(settings, steps)
        every = np.sqrt((1 - self.alphas) / self.alphas)
        sigmas = np.interp(self.times, np.arange(self.count), every)
        self.sigmas = np.append(sigmas, 0.0)
        most = float(self.sigmas.max())
        is_wide = self._word("timestep_spacing", (self.spacing, *self.spacings)) in (
            "linspace",
            "trailing",
        )
        self.scale = most if is_wide else (most**2 + 1) ** 0.5

    def _times(self) -> Array:
        if self._word("timestep_spacing", (self.spacing, *self.spacings)) != "linspace":
            return super()._times()
        return np.linspace(0, self.count - 1, self.steps)[::-1]

    def input(self, index: int, x: Array) -> Array:
        return np.asarray(x / (self.sigmas[index] ** 2 + 1) ** 0.5)

    def step(self, index: int, x: Array, predicted: Array, draw: Draw) -> Array:
        sigma = self.sigmas[index]
        return np.asarray(x + self._slope(x, predicted, sigma) * (self.sigmas[index + 1] - sigma))

    def _slope(self, x: Array, predicted: Array, sigma: float) -> Array:
        """dx/dσ = (x − x_0) / σ"""
        if self.prediction == "epsilon":
            return predicted
        if self.prediction == "sample":
            return np.asarray((x - predicted) / sigma)
        below = sigma**2 + 1
        return np.asarray((x - (x / below - predicted * sigma / below**0.5)) / sigma)


class EulerAncestral(Euler):
    """Euler's step to less noise than is wanted, and what is lacking drawn anew."""

    def step(self, index: int, x: Array, predicted: Array, draw: Draw) -> Array:
        sigma, end = self.sigmas[index], self.sigmas[index + 1]
        new = end * (max(sigma**2 - end**2, 0.0)) ** 0.5 / sigma
        down = (end**2 - new**2) ** 0.5
        return np.asarray(
            x + self._slope(x, predicted, sigma) * (down - sigma) + new * draw(x.shape)
        )


SAMPLERS: dict[str, type[Sampler]] = {
    "DDPMScheduler": DDPM,
    "DDIMScheduler": DDIM,
    "PNDMScheduler": PNDM,
    "EulerDiscreteScheduler": Euler,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
}


def sampler(settings: Mapping[str, Any], steps: int, kind: str | None = None) -> Sampler:
    """A run of `steps` steps as settings say, or by another sampler of the same noise (`kind`, a word of `SAMPLERS`).

    Raises SourceError for settings that are none or ask for what is not done here, UsageError for a kind that is none
    and for a number of steps that the model was not trained for.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("_class_name"), str):
        raise SourceError(
            f"{SETTINGS} names no sampler (_class_name)",
            hint="take the one that diffusers wrote beside the model",
        )
    if kind is not None:
        if kind not in SAMPLERS:
            raise UsageError(unknown("sampler", kind, SAMPLERS))
        return SAMPLERS[kind](settings, steps)
    name = settings["_class_name"]
    if name not in SAMPLERS:
        raise SourceError(
            unknown("sampler", name, SAMPLERS),
            where=SETTINGS,
            hint="--sampler DDIMScheduler takes the same noise another way",
        )
    return SAMPLERS[name](settings, steps)


def _number(settings: Mapping[str, Any], key: str, absent: float) -> float:
    value = settings.get(key, absent)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise _odd(key, value)
    return float(value)


def _whole(settings: Mapping[str, Any], key: str, absent: int, *, most: int) -> int:
    value = settings.get(key, absent)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise _odd(key, value)
    return value


def _odd(key: str, value: Any, known: tuple[Any, ...] = ()) -> SourceError:
    told = f"; known are {', '.join(str(word).lower() for word in known)}" if known else ""
    return SourceError(
        f"{key}: {str(value)[:40]} is nothing that this sampler does{told}",
        where=SETTINGS,
        hint="change it there, or take another sampler: --sampler DDIMScheduler",
    )
