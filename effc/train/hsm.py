"""Trains hybrid sparsification modules: a mask that closes by a schedule, and modules that stay near a change of basis.

The paper's gate, for s of `milestone` steps s₀ (PAT, AAAI 2025, eq. 6 to 12), and what is added to the loss:

    M = sigmoid(τ m) + β       τ = 1 / (1 − ln s / ln s₀)       β = max(0, ½ − s/s₀)       from s₀ on 0 or 1

    mode        gate                              count                        identity
    paper       as above                          |k − #{m > 0}|               ‖L Lᵀ − I‖ + ‖Uᵀ U − I‖, all
    released    as above, and stands still from   10 |#{m ≥ 0} − k| / k,       mean (L Lᵀ − I)², of the embedding
                0.8 s₀ on                         and m near ±½                and of the last layer
    effc        1 − s/s₀ (1 − sigmoid((m − θ) c))  none: k of them lie above θ  mean (L Lᵀ − I)², mean over all

In ours a channel fades on a line, and which ones do is decided all along: θ lies between the k-th and the next m at
every step, and c is large, so that none is left half open. Its mask has a rate of its own, by which an entry can go as
far as `travel`. Counts are stepped through in the gradient. A mask that is not trained fades as 1 − s/s₀, or in the
released code as exp(−2.77 s/s₀). Held-out samples judge the graph with exactly k channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from effc.errors import TuneError
from effc.ir.program import Graph
from effc.nn.hsm import EDGE, HARD, WORD, centred, gate, hard
from effc.train.terms import Live, Own

Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FROZEN = 0.8
"""The share of s₀ after which the released code holds the gate still."""
FADE = 2.77
SHARP = 100
"""c, over the travel."""
SOON = 0.1
"""The part of the steps in which our mask closes: the rest is for what it left."""
NEAR = 0.1
"""How far a mask goes that starts in an order of importance, from ½ to −½: a tenth of the ranks."""
BINS = 10


@dataclass(frozen=True, kw_only=True)
class Hsm:
    """The schedule of a mask and the losses of its modules; the mode is that of `insert-hsm`.

    `milestone` is the share of the steps in which the mask closes, 0.1 in the mode effc and 1/3 else. `mask_lr` is the
    mask's own rate; without one it is `travel` over the steps of the milestone in the mode effc, and the rate of all
    others else. `travel` is 1, or 0.1 for a mask that starts in an order of importance. `identity` and `count` weigh
    losses.
    """

    term: Literal["hsm"] = "hsm"
    milestone: Annotated[float, Field(gt=0, le=1)] | None = None
    mask_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    travel: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    identity: Share = 1.0
    count: Share = 1.0

    def begin(self, graph: Graph, steps: int, rate: Callable[[int], float]) -> HsmCourse:
        state = graph.pending.get(WORD)
        if state is None or state.get("is_hard"):
            raise TuneError(
                "the term hsm is for a graph with hybrid sparsification modules whose mask is soft",
                hint="put insert-hsm in front of tune, and harden-hsm behind it",
            )
        return HsmCourse(self, state, graph.tensors(), steps)


class HsmCourse:
    """One training of one graph."""

    word = WORD

    def __init__(
        self, term: Hsm, state: dict[str, Any], tensors: dict[str, Tensor], steps: int
    ) -> None:
        self.term, self.mode, self.count = term, state["mode"], int(state["kept"])
        self.is_trained = state["mask"] == "trained"
        self.start = tensors[f"{WORD}.mask"]
        self.places = [
            name for place in state["places"] if (name := f"{WORD}.{place}") + ".down" in tensors
        ]
        self.has_identity = any(
            n.endswith((".scale", ".values")) for n in tensors if n.startswith(f"{WORD}.")
        )
        share = term.milestone or (SOON if self.mode == "effc" else 1 / 3)
        self.milestone = max(1, round(share * steps))
        self.travel = term.travel or (NEAR if state.get("importance") else 1.0)

    def owns(self) -> dict[str, Own]:
        own = self.term.mask_lr
        if not self.is_trained or (own is None and self.mode != "effc"):
            return {}
        until = math.inf if self.mode == "released" else self.milestone
        rate = own if own is not None else self.travel / self.milestone
        return {f"{WORD}.mask": Own(rate=lambda step: rate if step < until else 0.0)}

    def stands(self, step: int, live: Live) -> dict[str, Tensor]:
        mask = live.get(f"{WORD}.mask", self.start)
        if not self.is_trained:
            tau, beta = self._fading(step)
            return self._gate(None, tau, beta)
        if self.mode == "released":
            still = step >= FROZEN * self.milestone
            tau, beta = schedule(min(step, FROZEN * self.milestone), self.milestone)
            return self._gate(mask.detach() if still else mask, tau, beta)
        if step >= self.milestone:
            closed = hard(mask, self.count) if self.mode == "effc" else mask.detach()
            return self._gate(closed, HARD, 0.0)
        if self.mode == "effc":
            stays = torch.sigmoid(centred(mask, self.count) * SHARP / self.travel)
            made = 1 - step / self.milestone * (1 - stays)
            return {f"{WORD}.tau": self.start.new_zeros(()), f"{WORD}.beta": made - 0.5}
        return self._gate(mask, *schedule(step, self.milestone))

    def judged(self, step: int, live: Live) -> dict[str, Tensor]:
        if self.mode == "effc" and step >= self.milestone:
            return {}  # it is hard, and of as many channels, already
        mask = live.get(f"{WORD}.mask", self.start).detach()
        return self._gate(hard(mask, self.count), HARD, 0.0)

    def is_ready(self, step: int) -> bool:
        """From where on the mask is closed: before, nobody has trained what channels will be without the others."""
        return (
            step >= (FROZEN if self.mode == "released" and self.is_trained else 1) * self.milestone
        )

    def marks(self) -> set[int]:
        """Quarters of the way to the milestone: there a mask changes most."""
        return {round(self.milestone * part / 4) for part in range(1, 5)}

    def losses(self, step: int, live: Live) -> dict[str, Tensor]:
        found = {}
        if self.has_identity and self.term.identity and self.places:
            found["identity"] = self.term.identity * self._identity(live)
        mask = live.get(f"{WORD}.mask")
        if mask is not None and self.is_trained and self.term.count and self.mode != "effc":
            found["count"] = self.term.count * self._count(mask)
            if self.mode == "released":
                found["sides"] = sides(mask)
        return found

    def told(self, step: int, live: Live) -> dict[str, Any]:
        mask = live.get(f"{WORD}.mask", self.start).detach()
        standing = self.stands(step, live)
        values = gate(
            standing.get(f"{WORD}.mask", mask), standing[f"{WORD}.tau"], standing[f"{WORD}.beta"]
        )
        inside = values.detach().clamp(0, 1)
        return {
            "kept": int((values > 0.5).sum()),
            "undecided": int(((inside > EDGE) & (inside < 1 - EDGE)).sum()),
            "gates": torch.histc(inside.to(torch.float32), BINS, 0, 1).int().tolist(),
            **{name: round(float(value), 6) for name, value in self.losses(step, live).items()},
        }

    def _gate(self, mask: Tensor | None, tau: float, beta: float) -> dict[str, Tensor]:
        found = {
            f"{WORD}.tau": self.start.new_tensor(tau),
            f"{WORD}.beta": self.start.new_tensor(beta),
        }
        return found if mask is None else {**found, f"{WORD}.mask": mask}

    def _fading(self, step: int) -> tuple[float, float]:
        """τ and β of a gate that is 1 for m = 1, and `left` for m = −1."""
        share = step / self.milestone
        left = max(0.0, 1 - share)
        if self.mode == "released":
            left = math.exp(-FADE * (share if share < 1 else 1 + 4 * (share - 1)))
        if left <= 0:
            return HARD, 0.0
        return min(HARD, math.log((2 - left) / left)), left / 2

    def _identity(self, live: Live) -> Tensor:
        """How far the small factors are from orthonormal ones."""
        names = dict.fromkeys(self.places)
        if self.mode == "released":
            names = dict.fromkeys([self.places[0], *self.places[-2:]])
        terms = []
        for name in names:
            down, up = live.get(f"{name}.down"), live.get(f"{name}.up")
            if down is None or up is None:
                continue
            if self.mode == "paper":
                terms.append(_far(down @ down.T).norm() + _far(up.T @ up).norm())
            else:
                terms.append(_far(down @ down.T).square().mean())
        if not terms:
            return self.start.new_zeros(())
        total = torch.stack(terms)
        return total.mean() if self.mode == "effc" else total.sum()

    def _count(self, mask: Tensor) -> Tensor:
        on = (mask >= 0 if self.mode == "released" else mask > 0).to(mask.dtype)
        on = on + mask - mask.detach()
        gap = (on.sum() - self.count).abs()
        return 10 * gap / self.count if self.mode == "released" else gap


def schedule(step: float, milestone: int) -> tuple[float, float]:
    """τ and β. The gate of a milestone of one step is hard from the first step behind it."""
    if step <= 0:
        return 0.0, 0.5
    left = 1 - math.log(step) / math.log(milestone) if milestone > 1 else 0.0
    return (min(HARD, 1 / left) if left > 0 else HARD), max(0.0, 0.5 - step / milestone)


def sides(mask: Tensor) -> Tensor:
    """How far m is from ½ where it is above 0, and from −½ elsewhere; 0 of a side that has none."""
    parts = [
        (mask[where] - at).square().mean()
        for where, at in ((mask > 0, 0.5), (mask <= 0, -0.5)) if bool(where.any())
    ]  # fmt: skip
    return torch.stack(parts).sum()


def _far(product: Tensor) -> Tensor:
    return product - torch.eye(len(product), dtype=product.dtype)
