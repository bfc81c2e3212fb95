"""Directories that vanish with the process that made them, however it ends.

A killed process cannot clean up. So each directory is locked (`flock`) for as long as its maker lives, and whoever
makes the next one beside it removes those that nobody holds any more.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - a system without flock: a killed run's directory stays
    fcntl = None  # type: ignore[assignment]

PREFIX = "effc-scratch-"


@contextmanager
def held(parent: Path | None = None, prefix: str = PREFIX) -> Iterator[Path]:
    """A new directory below `parent` (the system's place for temporary files where None), gone when the block ends.

    Those of the same prefix that a killed process left are removed first.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    sweep(parent, prefix)
    place, lock = _make(parent, prefix)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    """A locked directory: made, locked, and still there, since a sweep may come between the two."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(place, os.O_RDONLY)
            take(lock, wait=True)
            if place.exists():
                return place, lock
            os.close(lock)


def sweep(parent: Path, prefix: str = PREFIX) -> int:
    """Remove this user's directories of that prefix that no living process holds; gives how many there were."""
    gone = 0
    if fcntl is None:
        return gone  # nobody can say who lives
    with contextlib.suppress(OSError):
        for place in sorted(parent.glob(f"{glob.escape(prefix)}*")):
            gone += _remove_abandoned(place)
    return gone


def _remove_abandoned(place: Path) -> bool:
    try:
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if os.fstat(lock).st_uid != os.getuid() or not take(lock):
            return False
        shutil.rmtree(place, ignore_errors=True)
        return True
    finally:
        os.close(lock)


def take(file: int, *, wait: bool = False) -> bool:
    """Lock an open file for this process; False where another holds it. True where the system has no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
