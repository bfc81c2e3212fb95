"""An engine of a package, opened after its bytes were compared with what the manifest says of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from effc import package, paths
from effc.backends import BACKENDS, OPENERS
from effc.backends.base import Engine as OpenEngine
from effc.backends.base import Lowered
from effc.errors import UsageError, VerifyError
from effc.machine import default_threads


class Engine:
    """The engines of packages: `with effc.Engine.open("OUT") as engine: outputs = engine(feeds)`."""

    @staticmethod
    def open(
        out: str | os.PathLike[str], target: str | None = None, *, threads: int | None = None
    ) -> OpenEngine:
        """The engine for `target`, the first where None, which takes and gives numpy arrays by name.

        Raises VerifyError where the package is not what its manifest says, UsageError where it has no such engine,
        and BackendUnavailable where this machine cannot run it, with the reason.
        """
        place = Path(out)
        manifest = package.read(place)
        refuse(place, package.check(place))
        low = lowered(place, entry_of(place, manifest, target))
        target = low.target
        opened = OPENERS[target] if target in OPENERS else BACKENDS[target]().open
        found: OpenEngine = opened(low, threads=threads or default_threads())
        return found


def refuse(what: Path, broken: Sequence[str]) -> None:
    """Raise VerifyError where anything is broken."""
    if broken:
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise VerifyError(
            f"{what} is not what it is said to be: {'; '.join(broken[:5])}{more}",
            hint=package.UNHARMED,
        )


def entry_of(out: Path, manifest: package.Manifest, target: str | None) -> package.EngineEntry:
    """The engine of a target, a role or both, as `decode/ort`; the first where None. Raises UsageError for none."""
    for entry in manifest.engines:
        if target in (None, entry.target, entry.role, manifest.label(entry)):
            return entry
    known = ", ".join(map(manifest.label, manifest.engines))
    raise UsageError(f"{out} has no engine for {target!r}", hint=f"it has {known}")


def lowered(out: Path, entry: package.EngineEntry) -> Lowered:
    """The files of an engine, ready to be opened."""
    path = paths.inside(out, entry.path)
    return Lowered(
        role=entry.role,
        target=entry.target,
        directory=path.parent,
        files=(path.name,),
        opset=entry.opset,
        inputs=entry.inputs,
        outputs=entry.outputs,
        options=entry.options,
    )
