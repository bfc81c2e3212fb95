"""Sizes as people write them."""

from __future__ import annotations

UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {f"{u}b": n for u, n in UNITS.items() if u not in ("", "b")}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """`4GB`, `512MiB`, `1000000` in bytes. Raises ValueError for anything else."""
    word = text.strip().lower()
    number = word.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = word[len(number) :].strip()
    try:
        found = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        found = 0.0
    if not 1 <= found < 2**63:
        raise ValueError(f"{text!r} is no size such as 4GB or 512MiB")
    return int(found)
