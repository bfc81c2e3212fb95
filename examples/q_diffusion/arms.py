"""How far a quantised diffusion model is from its float sampler: the same noise through both, picture by picture.

    error of a picture = ‖x̂_0 − x_0‖ / ‖x_0‖

The noise is common, so that what one picture differs from another cancels out, and few pictures tell arms apart.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import effc
from effc import compiler, painting, stats
from effc.delta import weights
from effc.diffusion import Guide, Rows
from effc.recipe import build
from effc.sampling import Pipeline
from effc.schedule import sampler
from effc.trajectories import Trajectories

Array = np.ndarray[Any, np.dtype[Any]]
Json = dict[str, Any]
Feeds = Mapping[str, Array]


def samples(pipeline: Pipeline, seeds: Sequence[int], steps: int, batch: int = 32) -> Array:
    """The last sample of every seed [seeds, channels, height, width]."""
    found = []
    for start in range(0, len(seeds), batch):
        rows = Rows(seeds[start : start + batch], pipeline.shape)
        made = sampler(pipeline.scheduler, steps)
        *_, (_, x) = pipeline.steps(made, rows, Guide())
        found.append(x)
    return np.concatenate(found)


def of_source(source: effc.Source, seeds: Sequence[int], steps: int) -> Array:
    """Of the model as it is, in torch."""
    made = Trajectories(source=source, count=len(seeds), steps=steps)
    return samples(made.pipeline, seeds, steps)


def of_package(out: Path, seeds: Sequence[int], steps: int, *, corrected: bool = False) -> Array:
    """Of a package's engine, with its table of corrections or without."""
    with painting.opened(out, threads=1) as pipeline:
        if not corrected:
            pipeline = dataclasses.replace(pipeline, correction=None)
        return samples(pipeline, seeds, steps)


def speedup(first: Path, second: Path, steps: int, rounds: int = 8, batch: int = 4) -> Json:
    """How many times faster the second package samples than the first: they take turns, one thread each.

    The ratio is the mean over rounds of log(first ÷ second), its 95 % interval Student's.
    """
    seeds, logs = range(batch), []
    with painting.opened(first, threads=1) as slow, painting.opened(second, threads=1) as fast:
        for number in range(rounds + 1):
            took = {}
            for which in ("slow", "fast") if number % 2 else ("fast", "slow"):
                started = time.perf_counter()
                samples(slow if which == "slow" else fast, seeds, steps)
                took[which] = time.perf_counter() - started
            if number:  # the first opens the engines
                logs.append(np.log(took["slow"] / took["fast"]))
    found = stats.student(np.array(logs))
    return {
        "ratio": float(np.exp(np.mean(logs))), "low": float(np.exp(found.low)), "high": float(np.exp(found.high)),
        "rounds": rounds, "batch": batch,
    }  # fmt: skip


def coded_ratio(path: Path) -> float | None:
    """Bytes of the weights that an engine has in codes, with their scales, over what they take in float32.

    None where it has none. Norms, biases and tables, which no layer multiplies by, are not in it.
    """
    found = weights.read(path.parent, path.name)
    kept = wide = 0
    for coded in found.coded:
        shape = found.tensors[coded.codes].shape
        if len(shape) < 2:
            continue  # the codes of a bias
        kept += sum(found.tensors[name].length for name in coded.names if name in found.tensors)
        wide += 4 * math.prod(shape)
    return kept / wide if wide else None


def shown(source: effc.Source, seeds: Sequence[int], steps: int, times: int = 3) -> list[Feeds]:
    """What the float sampler feeds its model at some steps, spread over all of them."""
    runs = Trajectories(
        source=source, count=len(seeds), steps=steps, keep=times, seed=seeds[0], batch=len(seeds)
    )
    return [batch.inputs for batch in runs(runs.pipeline.role)]


def compiled(data: Mapping[str, Any], out: Path) -> Json:
    """Compile a recipe and give the manifest of what came out."""
    compiler.run(build({"bench": False, "gate": False, **data}), out, threads=1)
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def errors(found: Array, wanted: Array) -> Array:
    """Relative L2 of every picture."""
    axes = tuple(range(1, wanted.ndim))
    lost = np.sqrt(((found - wanted) ** 2).sum(axes))
    return lost / np.sqrt((wanted**2).sum(axes))


def ratio(values: Array, others: Array, draws: int = 2000) -> Json:
    """The mean of `values` over that of `others` of the same pictures, with a paired 95 % bootstrap interval."""
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    drawn = values[chosen].mean(axis=1) / others[chosen].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"ratio": float(values.mean() / others.mean()), "low": float(low), "high": float(high)}


def mean(values: Array, draws: int = 2000) -> Json:
    """A mean with its 95 % bootstrap interval over pictures."""
    draw = np.random.default_rng(0)
    chosen = draw.integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}
