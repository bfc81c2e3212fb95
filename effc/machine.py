"""What this machine is: how many cores a process may use, and which instructions its processor has."""

from __future__ import annotations

import os

from effc.errors import UsageError
from effc.table import unknown

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
    """The instruction sets that decide which integer kernels are fast here; with `$EFFC_CPU` those that it lists.

    Raises UsageError where that has a word that is none of `FEATURES`.
    """
    given = os.environ.get("EFFC_CPU")
    if given is not None:
        words = [word.strip() for word in given.split(",") if word.strip()]
        for word in words:
            if word not in FEATURES:
                raise UsageError(unknown("instruction set in EFFC_CPU", word, FEATURES))
        return [name for name in FEATURES if name in words]
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


def default_threads() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def installed(distribution: str) -> str | None:
    """The version of a distribution that is installed; None where it is not."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
