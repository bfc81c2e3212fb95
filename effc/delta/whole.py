"""A file that is written whole or not at all: beside its place, synced, and put there by one rename."""

from __future__ import annotations

import os
from pathlib import Path


def write(place: Path, content: str | bytes) -> None:
    """Put a file in its place, an older one in its stead until then. Raises OSError, and then the older one stays."""
    part = place.with_name(f".{place.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, place)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync(place.parent)


def sync(place: Path) -> None:
    """Let a file or the names in a directory reach the disk."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
