"""Memory that was freed, given back to the system."""

from __future__ import annotations

import functools
import sys
from typing import Any


def trim() -> None:
    """Give the heap's free memory back where the C library is glibc.

    It keeps the holes that tensors of ever new sizes leave behind: a thousand batches of different lengths took 100 MB
    more than one did (benchmarks/memory.py).
    """
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes  # takes a tenth of what `effc --help` does

    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
