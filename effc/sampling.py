"""A diffusion pipeline at work: what its denoiser is told, its steps from noise to a sample, and the picture behind it.

It knows graphs as functions by role, so engines of a package and modules of a source are sampled by the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from effc import bounded, diffusion
from effc.backends.base import Port
from effc.correction import Correction
from effc.diffusion import (
    HIDDEN,
    LABELS,
    LATENT,
    OUT_SAMPLE,
    POOLED,
    SAMPLE,
    SIZES,
    TIMESTEP,
    Guide,
    Rows,
)
from effc.errors import SourceError, UsageError, first_line, is_failure
from effc.processor import whole
from effc.schedule import Sampler

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Mapping[str, Array]

GUIDANCE = 7.5
"""Where text or a class says what is wanted and nobody says how much."""
LARGEST = 4096
"""A side of a sample at most."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is wanted of each sample: a text or a class, how much of it, and what is not wanted.

    A `guidance` of 1 or less asks the denoiser once a step, for what is wanted alone.
    """

    prompts: tuple[str, ...] | None = None
    negative: str | None = None
    labels: tuple[int, ...] | None = None
    guidance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Graphs of a pipeline by role, with their input ports, and the directory of its settings and tokenizers."""

    run: Callable[[str, Feeds], Feeds]
    ports: Mapping[str, Sequence[Port]]
    scheduler: Mapping[str, Any]
    root: Path | None = None
    correction: Correction | None = None
    """What is put right of every prediction."""

    @cached_property
    def role(self) -> str:
        return diffusion.denoiser(list(self.ports))

    @cached_property
    def inputs(self) -> dict[str, Port]:
        """What the denoiser takes, by name."""
        return {port.name: port for port in self.ports[self.role]}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of one sample [channels, height, width]; sizes that are free are those of the settings."""
        found = self.inputs[SAMPLE].shape[1:]
        if not any(isinstance(size, str) for size in found):
            return tuple(int(size) for size in found)
        size = self._settings(f"{self.role}/config.json").get("sample_size")
        sides = [size, size] if isinstance(size, int) else size
        if not isinstance(sides, list) or len(sides) != 2 or not all(_is_side(s) for s in sides):
            raise SourceError(
                f"{self.role}/config.json says sample_size: {str(size)[:40]}", hint=bounded.HINT
            )
        return (int(found[0]), *sides)

    def guide(self, wish: Wish, rows: int) -> Guide:
        """What the denoiser is told beside sample and time. Raises UsageError for what it cannot be told."""
        if HIDDEN in self.inputs:
            if wish.labels is not None:
                raise UsageError("this pipeline is told texts, not classes", hint="--prompt TEXT")
            return self._of_text(wish, rows)
        if wish.prompts is not None or wish.negative is not None:
            raise UsageError(
                "this pipeline is told no text", hint="leave --prompt and --negative out"
            )
        if LABELS in self.inputs:
            return self._of_class(wish, rows)
        if wish.labels is not None or wish.guidance is not None:
            raise UsageError(
                "this pipeline is told nothing but the time",
                hint="leave --label and --guidance out",
            )
        if strange := sorted(set(self.inputs) - {SAMPLE, TIMESTEP}):
            raise UsageError(
                f"the denoiser takes {strange[0]!r}, which is nothing that effc can tell it",
                hint="sample it by a program of your own: docs/deploy.md",
            )
        return Guide()

    def steps(
        self,
        sampler: Sampler,
        rows: Rows,
        guide: Guide,
        seen: Callable[[int, Feeds], None] = lambda i, f: None,
    ) -> Iterator[tuple[int, Array]]:
        """The number of each step and the sample behind it; `seen` is given what the denoiser is fed."""
        port = self.inputs[TIMESTEP]
        if "int" in port.dtype and (sampler.times % 1).any():
            raise UsageError(
                f"{type(sampler).__name__} asks for times between two steps, and the model takes whole ones",
                hint="--sampler DDIMScheduler",
            )

        def ask(index: int, feeds: Feeds) -> Array:
            time = float(sampler.times[index])
            at = diffusion.timed(time, len(feeds[SAMPLE]), port.shape, port.dtype)
            given = {**feeds, TIMESTEP: at}
            seen(index, given)
            found = predicted(self.run(self.role, given))
            return found if self.correction is None else self.correction(time, found)

        return diffusion.trajectory(ask, sampler, rows, guide)

    def decoded(self, x: Array) -> Array:
        """Latents as a picture in −1 … 1; a sample that is one already stays."""
        if diffusion.DECODER not in self.ports:
            return x
        return next(iter(self.run(diffusion.DECODER, {LATENT: self.latent(x)}).values()))

    def latent(self, x: Array) -> Array:
        """What the decoder takes of a sample."""
        assert self.root is not None
        scaled = diffusion.latents(self.root, SourceError)
        return np.asarray(x / scaled.scale + scaled.shift, np.float32)

    def ids(self, role: str, texts: Sequence[str]) -> Array:
        """Tokens of texts as a text encoder takes them, cut and filled to its length."""
        (port,) = self.ports[role]
        folder = role.replace("text_encoder", "tokenizer")
        tokenizer = _tokenizer(self.root, folder)
        made = tokenizer(
            list(texts), padding="max_length", max_length=port.shape[1], truncation=True
        )
        return np.array(made["input_ids"], port.dtype)

    def _of_text(self, wish: Wish, rows: int) -> Guide:
        prompts = wish.prompts or ("",)
        scale = GUIDANCE if wish.guidance is None else wish.guidance
        wanted = self._told(prompts)
        if scale <= 1:
            return Guide(feeds=self._sized(_filled(wanted, rows), rows))
        is_zero = wish.negative is None and self._settings(diffusion.INDEX).get(
            "force_zeros_for_empty_prompt", False
        )
        away = (
            {name: np.zeros_like(value) for name, value in wanted.items()}
            if is_zero
            else self._told((wish.negative or "",))
        )
        pair = (_filled(away, rows), _filled(wanted, rows))
        feeds = {name: np.concatenate([part[name] for part in pair]) for name in wanted}
        return Guide(feeds=self._sized(feeds, 2 * rows), scale=scale)

    def _sized(self, feeds: dict[str, Array], rows: int) -> dict[str, Array]:
        if SIZES not in self.inputs:
            return feeds
        blocks = self._settings(diffusion.VAE).get("block_out_channels")
        factor = 2 ** (len(blocks) - 1) if isinstance(blocks, list) and len(blocks) < 8 else 8
        return {
            **feeds,
            SIZES: diffusion.sizes(self.shape[1] * factor, self.shape[2] * factor, rows),
        }

    def _told(self, texts: Sequence[str]) -> dict[str, Array]:
        """The vectors of all text encoders side by side, and the summary of the one that has it."""
        roles = [role for role in diffusion.TEXTS if role in self.ports]
        if not roles:
            raise UsageError(
                "this package has no text encoder", hint="compile the whole pipeline directory"
            )
        hidden, more = [], {}
        for role in roles:
            (port,) = self.ports[role]
            made = self.run(role, {port.name: self.ids(role, texts)})
            early = made.get(diffusion.PENULTIMATE)
            hidden.append(made[diffusion.LAST] if early is None else early)
            if POOLED in made and POOLED in self.inputs:
                more[POOLED] = made[POOLED]
        return {HIDDEN: np.concatenate(hidden, axis=-1), **more}

    def _of_class(self, wish: Wish, rows: int) -> Guide:
        settings = self._settings(f"{self.role}/config.json")
        known = whole(settings, "num_embeds_ada_norm", 0) or whole(settings, "num_class_embeds", 0)
        labels = wish.labels or tuple(range(min(rows, known or rows)))
        if known and not all(0 <= label < known for label in labels):
            raise UsageError(f"the model knows classes 0 to {known - 1}", hint="--label 0")
        wanted = np.resize(np.array(labels), rows).astype(self.inputs[LABELS].dtype)
        has_none = "num_embeds_ada_norm" in settings  # it has one more for no class at all
        scale = wish.guidance if wish.guidance is not None else GUIDANCE if has_none else 1.0
        if scale <= 1:
            return Guide(feeds={LABELS: wanted})
        if not has_none:
            raise UsageError("the model knows no class for nothing", hint="leave --guidance out")
        return Guide(
            feeds={LABELS: np.concatenate([np.full_like(wanted, known), wanted])}, scale=scale
        )

    def _settings(self, name: str) -> dict[str, Any]:
        if self.root is None or not (self.root / name).is_file():
            return {}
        found = bounded.read_json(self.root / name, SourceError)
        return found if isinstance(found, dict) else {}


def predicted(made: Feeds) -> Array:
    """What a denoiser gives: `out_sample`, or its first output."""
    return made[OUT_SAMPLE] if OUT_SAMPLE in made else next(iter(made.values()))


def _is_side(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST


def _filled(feeds: Mapping[str, Array], rows: int) -> dict[str, Array]:
    """As many rows as are wanted, from the first on again where there are fewer."""
    return {name: value[np.arange(rows) % len(value)] for name, value in feeds.items()}


def _tokenizer(root: Path | None, folder: str) -> Any:
    if root is None or not (root / folder).is_dir():
        raise UsageError(
            f"there is no folder {folder} with a tokenizer",
            hint="compile the whole pipeline directory",
        )
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(root / folder), local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:
        if not is_failure(error):
            raise
        raise SourceError(
            f"the tokenizer in {root / folder} does not load: {first_line(error)}",
            hint="repair the tokenizer files",
        ) from error
