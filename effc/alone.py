"""Timing while nothing else of a sweep computes on this machine, whatever is shared beyond it.

Who computes holds a lock of the machine with others; who times has it alone for as long as that takes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - a system without flock: trials are timed beside each other
    fcntl = None  # type: ignore[assignment]

_held: list[int] = []


def place() -> Path:
    """The lock of this user's sweeps on this machine."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"effc-sweep-{user}.lock"


@contextmanager
def computing(lock: Path | None = None) -> Iterator[None]:
    """A block that others may compute beside, and that waits while somebody times."""
    if fcntl is None:  # pragma: no cover
        yield
        return
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(lock or place(), flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _held.append(descriptor)
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
        os.close(descriptor)


def waiting() -> AbstractContextManager[None]:
    """A block that waits for somebody else, who may want to time meanwhile."""
    return _as("LOCK_UN")


def timing() -> AbstractContextManager[None]:
    """A block that nobody else of a sweep computes beside; in a process that is of none it is any block."""
    return _as("LOCK_EX")


@contextmanager
def _as(operation: str) -> Iterator[None]:
    """A block in which the lock of this process, where it has one, is held in another way."""
    if not _held or fcntl is None:
        yield
        return
    fcntl.flock(_held[-1], getattr(fcntl, operation))
    try:
        yield
    finally:
        fcntl.flock(_held[-1], fcntl.LOCK_SH)
