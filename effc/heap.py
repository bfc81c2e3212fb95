"""Memory that was freed, given back to the system."""

from __future__ import annotations

import functools
import sys
from typing import Any


def trim() -> None:
    """Give the heap's free memory back where the C library is glibc.

    It keeps the holes that tensors of ever new sizes leave behind (benchmarks/memory.py measures calibration).
    """
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes  # not when effc starts

    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None
