"""What a diffusion model is calibrated on: the inputs that its own float sampler gives it, from noise and no data.

A denoiser sees other ranges early and late (Li et al. 2023, figure 4), so the steps that are kept are spread over all
of them; the first, the middle or the last alone are there to compare with. Trajectories are run a batch at a time and
nothing is held but that batch, so each reading costs the float sampler once more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch.utils import _pytree as pytree

from effc import diffusion
from effc.backends.base import Port
from effc.calib.data import Batch
from effc.diffusion import LATENT, SAMPLE, Rows
from effc.errors import CalibrationError, RecipeError
from effc.ir.trace import evaluating, output_names
from effc.sampling import Feeds, Pipeline, Wish
from effc.schedule import Sampler, sampler
from effc.source import Source

Where = Literal["uniform", "first", "middle", "last"]


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """So many runs of a source's own sampler; of its steps `keep` are shown, spread as `at` says."""

    source: Source
    count: int
    steps: int
    keep: int | None = None
    at: Where = "uniform"
    guidance: float | None = None
    seed: int = 0
    batch: int = 16
    prompts: tuple[str, ...] = ()

    def __call__(self, role: str, first: int = 0) -> Iterator[Batch]:
        """Inputs of a graph, a batch a step that is kept, its time the tag; from the `first` trajectory on."""
        for start in range(first, first + self.count, self.batch):
            rows = min(self.batch, first + self.count - start)
            if role in diffusion.TEXTS:
                yield from self._texts(role, start, rows)
            else:
                yield from self._run(role, start, rows)

    def spread(self, role: str, batches: int) -> list[Batch]:
        """Batches of trajectories behind these, spread over the steps."""
        fresh = dataclasses.replace(
            self,
            count=min(self.count, self.batch),
            keep=min(batches, len(self.sampler.times)),
            at="uniform",
        )
        return list(fresh(role, first=self.count))

    @cached_property
    def sampler(self) -> Sampler:
        """As the source's scheduler says.

        Raises CalibrationError where it has none, RecipeError where more steps are kept than there are.
        """
        if self.source.scheduler is None:
            raise CalibrationError(
                f"{self.source.name} has no sampler, so there are no trajectories to calibrate on",
                hint="calib: {file: FILE}; or give the factory's Source a scheduler",
            )
        found = sampler(self.source.scheduler, self.steps)
        if self.keep is not None and self.keep > len(found.times):
            raise RecipeError(
                f"calib keeps {self.keep} of {len(found.times)} steps",
                hint=f"keep: {len(found.times)}",
            )
        return found

    @cached_property
    def kept(self) -> list[int]:
        """The numbers of the steps that are shown, rising."""
        most = len(self.sampler.times)
        keep = self.keep or most
        if self.at == "uniform":
            return sorted({round(place) for place in np.linspace(0, most - 1, keep)})
        start = {"first": 0, "middle": (most - keep) // 2, "last": most - keep}[self.at]
        return list(range(start, start + keep))

    def batches(self, role: str) -> int:
        """How many there are for a graph."""
        groups = math.ceil(self.count / self.batch)
        return groups * len(self.kept) if role == self.pipeline.role else groups

    def description(self) -> dict[str, Any]:
        """What decides every trajectory, for the manifest."""
        made = self.sampler
        return {
            "trajectories": self.count, "steps": self.steps, "at": self.at, "seed": self.seed,
            "times": [float(made.times[index]) for index in self.kept],
            "sampler": type(made).__name__, "guidance": self.guidance,
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest() if self.prompts else None,
        }  # fmt: skip

    @cached_property
    def pipeline(self) -> Pipeline:
        source = self.source

        def run(role: str, feeds: Feeds) -> Feeds:
            module = source.modules[role]
            named = {
                n: torch.from_numpy(np.ascontiguousarray(feeds[n])) for n in source.inputs[role]
            }
            with evaluating(module), torch.no_grad():
                leaves, spec = pytree.tree_flatten(module(**named))
            return {n: leaf.numpy() for n, leaf in zip(output_names(spec), leaves, strict=True)}

        ports = {
            role: _ports(inputs, source.dims.get(role)) for role, inputs in source.inputs.items()
        }
        return Pipeline(
            run=run, ports=ports, scheduler=source.scheduler or {}, root=source.directory
        )

    def _texts(self, role: str, start: int, rows: int) -> Iterator[Batch]:
        (port,) = self.pipeline.ports[role]
        texts = [*self._prompts(start, rows), ""]
        yield Batch(inputs={port.name: self.pipeline.ids(role, texts)})

    def _prompts(self, start: int, rows: int) -> tuple[str, ...]:
        return tuple(
            self.prompts[(start + row) % len(self.prompts)] for row in range(rows) if self.prompts
        )

    def _run(self, role: str, start: int, rows: int) -> Iterator[Batch]:
        pipeline, kept = self.pipeline, set(self.kept)
        made = sampler(
            self.source.scheduler or {}, self.steps
        )  # one with a past has it for one run
        wish = Wish(prompts=self._prompts(start, rows) or None, guidance=self.guidance)
        guide = pipeline.guide(wish, rows)
        seeds = range(self.seed + start, self.seed + start + rows)
        fed: dict[int, Feeds] = {}

        def seen(index: int, feeds: Feeds) -> None:
            if index in kept:
                fed[index] = feeds

        is_denoiser, last = role == pipeline.role, max(kept)
        x = np.empty(0)
        runs = pipeline.steps(made, Rows(seeds, pipeline.shape), guide, seen)
        for index, x in runs:  # noqa: B007  # the last is what a decoder takes
            if is_denoiser and index in fed:
                yield Batch(inputs=dict(fed.pop(index)), tag=int(made.times[index]))
            if is_denoiser and index == last:
                return
        if role == diffusion.DECODER:
            yield Batch(inputs={LATENT: pipeline.latent(x)})
        elif role == diffusion.ENCODER:
            yield Batch(inputs={SAMPLE: np.clip(pipeline.decoded(x), -1, 1)})
        elif not is_denoiser:
            raise CalibrationError(
                f"a sampler gives the graph {role!r} nothing",
                hint="calib: {file: FILE} for it alone",
            )


def _ports(inputs: Mapping[str, torch.Tensor], dims: Any) -> Sequence[Port]:
    found = []
    for name, value in inputs.items():
        free = (dims or {}).get(name, {0: "batch"} if value.dim() else {})
        shape = tuple(free.get(axis, size) for axis, size in enumerate(value.shape))
        found.append(Port(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape))
    return found


def at_a_time(source: Source, times: Sequence[float]) -> Source:
    """A source whose denoiser has one of its sampler's times for an example: a graph may know no others."""
    role = diffusion.denoiser(list(source.inputs))
    example = source.inputs[role][diffusion.TIMESTEP]
    known = torch.full_like(example, times[len(times) // 2])
    inputs = {**source.inputs, role: {**source.inputs[role], diffusion.TIMESTEP: known}}
    return dataclasses.replace(source, inputs=inputs)
