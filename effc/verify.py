"""How far an engine's numbers are from the model's, before anything is timed.

Padded positions are left out: they are nobody's answer. A value that is not a number where the model has one is an
error at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effc.causal import PRESENT
from effc.errors import VerifyError

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]
AT_ONCE = 1 << 20
"""Values that are compared at once."""


@dataclass(frozen=True, kw_only=True)
class OutputDrift:
    """Drift of one output: largest difference, ‖a − b‖ / ‖a‖ over everything, mean cosine over samples."""

    max_abs: float
    rel_l2: float
    cosine: float
    n: int


@dataclass
class _Sums:
    max_abs: float = 0.0
    gap: float = 0.0
    norm: float = 0.0
    cosine: float = 0.0
    n: int = 0

    def add(self, a: Array, b: Array) -> None:
        """a, b [samples, values]"""
        if not a.size:
            return
        x, y = a.astype(np.float64), b.astype(np.float64)
        both = np.isfinite(x) & np.isfinite(y)
        x, y = np.where(both, x, 0.0), np.where(both, y, 0.0)
        self.max_abs = max(self.max_abs, float(np.abs(x - y).max()))
        self.gap += float(((x - y) ** 2).sum())
        self.norm += float((x**2).sum())
        lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        dots = (x * y).sum(axis=1)
        same = np.where(
            lengths > 0, dots / np.where(lengths > 0, lengths, 1.0), (x == y).all(axis=1)
        )
        self.cosine += float(same.sum())
        self.n += len(x)

    def drift(self) -> OutputDrift:
        rel = (self.gap / self.norm) ** 0.5 if self.norm else self.gap**0.5
        cosine = self.cosine / self.n if self.n else 1.0
        return OutputDrift(max_abs=self.max_abs, rel_l2=rel, cosine=cosine, n=self.n)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What an engine that is meant to be exact may differ by."""

    rel_l2: float = 1e-3

    def check(self, drifts: Mapping[str, OutputDrift], *, where: str) -> None:
        """Raise VerifyError naming every output that is further away."""
        bad = {n: d for n, d in drifts.items() if not d.rel_l2 <= self.rel_l2}
        if bad:
            words = ", ".join(f"{n} by {d.rel_l2:.2g}" for n, d in sorted(bad.items()))
            raise VerifyError(
                f"the engine differs from the model: {words} (relative L2, at most {self.rel_l2:g})",
                where=where,
                hint="nothing was quantised, so this is a fault of the lowering; please report the model",
            )


def parity(
    reference: Run,
    engine: Run,
    batches: Iterable[Mapping[str, Array]],
    *,
    mask: str | None = "attention_mask",
) -> dict[str, OutputDrift]:
    """Drift per output over all batches, in memory of one batch.

    A cache of codes where the reference has numbers is not compared.
    An output [batch, length, …] beside a mask input [batch, length] is compared where the mask is set. Raises
    VerifyError where shapes differ or the engine gives a value that is not a number.
    """
    sums: dict[str, _Sums] = {}
    for feeds in batches:
        left, right = reference(feeds), engine(feeds)
        for name, a in left.items():
            if name not in right:
                raise VerifyError(
                    f"the engine has no output {name!r}", hint="it was made from another model"
                )
            b = right[name]
            if name.startswith(f"{PRESENT}.") and (a.dtype.kind, b.dtype.kind) == ("f", "i"):
                continue  # codes of a cache: what they are worth shows in what is read behind them
            total = sums.setdefault(name, _Sums())
            if a.shape != b.shape:
                raise VerifyError(
                    f"output {name!r} is {list(b.shape)} where the model gives {list(a.shape)}",
                    hint="it was made from another model",
                )
            seen = feeds.get(mask) if mask is not None else None
            for x, y in _pieces(a, b, seen):
                if a.dtype.kind == "f" and bool((~np.isfinite(y) & np.isfinite(x)).any()):
                    raise VerifyError(
                        f"output {name!r} of the engine holds values that are not numbers",
                        hint="try wider ranges (range: minmax), or leave out sites by `select`",
                    )
                total.add(x, y)
    return {name: total.drift() for name, total in sums.items()}


def _pieces(a: Array, b: Array, mask: Array | None) -> Iterator[tuple[Array, Array]]:
    """Two arrays as [samples, values], padded positions gone, not many samples at a time: logits are large."""
    if mask is not None and a.ndim >= 3 and a.shape[:2] == mask.shape:
        kept = np.flatnonzero(mask > 0)
        a, b = (value.reshape(mask.size, math.prod(value.shape[2:])) for value in (a, b))
    else:
        kept = np.arange(len(a) if a.ndim else 1)
        a, b = (value.reshape(len(kept), math.prod(value.shape[1:])) for value in (a, b))
    step = max(1, AT_ONCE // max(1, a.shape[1]))
    for start in range(0, len(kept), step):
        part = kept[start : start + step]
        yield a[part], b[part]


def invariance(
    run: Run, alone: Sequence[Mapping[str, Array]], together: Mapping[str, Array]
) -> float:
    """Largest difference between a sample's outputs by itself and as a row of a padded batch.

    `alone[i]` holds the sample of row i without padding.
    """
    worst = 0.0
    batched = run(together)
    for row, feeds in enumerate(alone):
        for name, value in run(feeds).items():
            other = batched[name][row : row + 1]
            other = other[tuple(slice(0, size) for size in value.shape)]
            worst = max(worst, float(np.abs(value.astype(np.float64) - other).max()))
    return worst
