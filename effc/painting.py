"""`effc run`: pictures from the package of a diffusion pipeline, by its own engines.

A picture hangs on its seed alone: of several, each is what its own seed gives by itself. A file is written once all of
them are whole, and exchanged by one rename, so a run that was cancelled leaves none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from effc import bounded, correction, diffusion, package
from effc.diffusion import Rows
from effc.engine import Engine, entry_of
from effc.errors import BackendUnavailable, PackageError, UsageError, VerifyError
from effc.progress import Progress, peak_mb
from effc.sampling import Feeds, Pipeline, Wish
from effc.schedule import sampler

Array = np.ndarray[Any, np.dtype[Any]]
Json = dict[str, Any]


def paint(
    out: Path,
    *,
    steps: int,
    seed: int = 0,
    count: int = 1,
    wish: Wish | None = None,
    kind: str | None = None,
    target: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Array, Json]:
    """Pictures uint8 [count, height, width, channels] of the seeds from `seed` on, and what they took.

    `kind` is another sampler than the package's own. Raises UsageError for a package or a wish that does not fit,
    VerifyError for a package that is not whole or gives no numbers.
    """
    progress = progress or Progress()
    with opened(out, target=target, threads=threads) as pipeline:
        made = sampler(pipeline.scheduler, steps, kind)
        _check_times(out, made.times)
        started = time.perf_counter()
        guide = pipeline.guide(wish or Wish(), count)
        rows, x = Rows(range(seed, seed + count), pipeline.shape), np.empty(0)
        with progress.stage("sample") as step:
            for index, x in pipeline.steps(made, rows, guide):  # noqa: B007  # the last is what is wanted
                step(index + 1, len(made.times))
        x = pipeline.decoded(x)
    if not np.isfinite(x).all():
        raise VerifyError(
            f"the engines of {out} give values that are not numbers",
            hint="find where they begin with `effc explain OUT`",
        )
    return diffusion.pixels(x), {
        "steps": steps,
        "sampler": type(made).__name__,
        "times": [float(at) for at in made.times],
        "seeds": list(range(seed, seed + count)),
        "guidance": guide.scale,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_mb": peak_mb(),
    }


TABLES = ("timestep-table", "step-gain")
"""Passes behind which an engine knows some times and no others."""


def _check_times(out: Path, times: Array) -> None:
    """Raises UsageError for a time that an engine of the package has no row for."""
    manifest = package.read(out)
    if not any(entry.name in TABLES for entry in manifest.passes):
        return
    record = package.read_json(out, manifest.decisions, package.MOST_RECORD_BYTES)
    for word, decided in record.items():
        if not word.endswith(tuple(f":{name}" for name in TABLES)):
            continue
        for known in filter(None, decided.values()):
            if odd := sorted(set(times.tolist()) - set(map(float, known))):
                raise UsageError(
                    f"the engine knows {len(known)} times, and {odd[0]:g} is none of them",
                    hint="take the steps and the sampler that it was compiled for, or compile it for these: "
                    f"calib: {{trajectories: 16, steps: {len(times)}}}",
                )


@contextmanager
def opened(
    out: Path, *, target: str | None = None, threads: int | None = None
) -> Iterator[Pipeline]:
    """A package of a diffusion pipeline; each of its engines is opened when it is first run.

    Raises UsageError for a package of another kind.
    """
    manifest = package.read(out)
    if manifest.kind != diffusion.KIND:
        raise UsageError(
            f"{out} holds a model of kind {manifest.kind}, which makes no pictures",
            hint="compile a pipeline directory of diffusers, or a factory that gives a scheduler",
        )
    entry = entry_of(out, manifest, target)
    entries = {e.role: e for e in manifest.engines if e.target == entry.target}
    with ExitStack() as stack:
        engines: dict[str, Any] = {}

        def run(role: str, feeds: Feeds) -> Feeds:
            if role not in engines:
                word = manifest.label(entries[role])
                engines[role] = stack.enter_context(Engine.open(out, word, threads=threads))
            found: Feeds = engines[role](feeds)
            return found

        yield Pipeline(
            run=run,
            ports={role: e.inputs for role, e in entries.items()},
            scheduler=bounded.read_json(out / diffusion.SCHEDULER, PackageError),
            root=out,
            correction=correction.read(out, entry.target),
        )


def line(found: Json) -> str:
    """What a run took, in one line."""
    count, times = len(found["seeds"]), len(found["times"])
    return f"{count} picture{'s' * (count > 1)} in {times} steps, {found['seconds']:.1f} s" + (
        f"; peak memory {found['peak_mb']:.0f} MB" if found["peak_mb"] else ""
    )


def check_places(place: Path, count: int) -> list[Path]:
    """Where pictures will lie: `place`, or of several `place-1.png` and so on. Raises UsageError before any work."""
    if place.suffix.lower() != ".png":
        raise UsageError(f"-o {place} is no picture", hint=f"-o {place.name or 'image'}.png")
    found = [place]
    if count > 1:
        found = [place.with_stem(f"{place.stem}-{number}") for number in range(1, count + 1)]
    for each in found:
        parent = Path(os.path.realpath(each)).parent
        is_odd = os.path.lexists(each) and not os.path.isfile(each)
        if is_odd or not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UsageError(
                f"-o {each} cannot be written", hint="name a file in a directory that is there"
            )
    return found


def write(places: Sequence[Path], pictures: Array) -> None:
    """PNG files, each exchanged as a whole once all of them are made."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BackendUnavailable(
            "pictures are written by Pillow", hint="pip install 'effc[diffusion]'"
        ) from error
    parts = []
    try:
        for place, picture in zip(places, pictures, strict=True):
            path = Path(os.path.realpath(place))
            part = path.with_name(f".{path.name}.part")
            parts.append((part, path))
            grey = picture.shape[-1] == 1
            Image.fromarray(picture[..., 0] if grey else picture[..., :3]).save(part, format="png")
        for part, path in parts:
            os.replace(part, path)
    except OSError as error:
        raise UsageError(
            f"-o {places[0]} cannot be written: {error.strerror}",
            hint="name a file that can be written",
        ) from error
    finally:
        for part, _ in parts:
            part.unlink(missing_ok=True)
