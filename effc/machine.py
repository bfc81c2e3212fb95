"""What this machine is: how many cores a process may use, and which instructions its processor has."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)


def cpu_features() -> list[str]:
    """The instruction sets that decide which integer kernels are fast here."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            flags = next(
                (
                    ln.split(":", 1)[1].split()
                    for ln in stream
                    if ln.startswith(("flags", "Features"))
                ),
                [],
            )
    except OSError:
        return []
    return [name for name in FEATURES if name in flags]


@functools.cache
def _heap() -> Any:
    """The C library where it is glibc, else None."""
    import ctypes  # takes a tenth of what `effc --help` does

    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


def trim_heap() -> None:
    """Give free memory back to the system: glibc keeps the holes that tensors of ever new sizes leave behind."""
    if (heap := _heap()) is not None:
        heap.malloc_trim(0)


def default_threads() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
