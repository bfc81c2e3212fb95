"""Directories that vanish with the process that made them, however it ends.

A killed process cannot clean up. So each directory is locked (`flock`) for as long as its maker lives, and whoever
makes the next one beside it removes those that nobody holds any more.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effc.errors import PackageError

try:
    import fcntl
except ImportError:  # pragma: no cover - a system without flock: a killed run's directory stays
    fcntl = None  # type: ignore[assignment]

NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
PREFIX = "effc-scratch-"
MARK = ".effc-scratch"
"""A file that says that a directory is one of these: nothing else is swept, whatever it is called."""


@contextmanager
def held(parent: Path | None = None, prefix: str = PREFIX) -> Iterator[Path]:
    """A new directory below `parent` (the system's place for temporary files where None), gone when the block ends.

    Those of the same prefix that a killed process left are removed first. Raises PackageError where the system's
    place is full.
    """
    is_systems = parent is None
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    sweep(parent, prefix)
    made: tuple[Path, int] | None = None
    try:
        with _uninterrupted():
            made = _make(parent, prefix)
        yield made[0]
    except OSError as error:
        if is_systems and error.errno in NO_ROOM:
            raise PackageError(
                f"no room for temporary files in {parent}: {error.strerror}",
                hint="free some disk space, or set TMPDIR to a directory that has some",
            ) from error
        raise
    finally:
        if made is not None:
            with _uninterrupted():
                _remove(made[0])
                os.close(made[1])


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A signal to stop waits until the block ends: what is half made or half gone would be left behind."""
    usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread() or None in usual.values():
        yield  # signals are the main thread's, or those of somebody who is not Python
        return
    came: list[int] = []
    for each in usual:
        signal.signal(each, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for each, handler in usual.items():
            signal.signal(each, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    """A locked directory: made, locked, and still there, since a sweep may come between the two."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(place, os.O_RDONLY)
            take(lock, wait=True)
            if place.exists():
                (place / MARK).touch()
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
        if (place / MARK).is_file():
            _remove(place)
        else:  # somebody's own, or one that was made and no more
            place.rmdir()
        return not place.exists()
    except OSError:
        return False
    finally:
        os.close(lock)


def _remove(place: Path) -> None:
    """Everything in it, then its mark, then itself: cut short anywhere, it is still known for what it is."""
    with contextlib.suppress(OSError):
        for entry in place.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != MARK:
                entry.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


def take(file: int, *, wait: bool = False) -> bool:
    """Lock an open file for this process; False where another holds it. True where the system has no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
