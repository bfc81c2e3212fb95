"""What is compared: ways to adapt one encoder to several tasks at once, as passes, all with as many trainables.

    lora                 one adapter of rank 12 beside every linear layer: what every other arm is held against
    lora-moe             eight adapters of rank 1, weighed by a router that reads the token
    one-to-one           eight experts of rank 1, each with a row and a column of its own, gates of both kinds
    mor1e                four rows and four columns, every pair of them an expert, gates of both kinds
    no intuition         the same with the router alone
    no router            the same with the intuition alone; more columns, for as many trainables
    shuffled intuition   mor1e, told what another request is about: what the intuition itself is worth
    uniform              mor1e, told the same of every request
    mor1e, drawn         its router begins as A does, so that columns are told apart from the first step on
    …, told apart        scores that are a softmax of the cosines, in place of the cosines

Beside a layer of so many inputs and outputs every arm trains 12 (in + out) numbers, but for a scalar or two. All begin
with the same strength: what one expert's product of row and column counts for is 1, as an adapter's of alpha = rank is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from effc.nn import rank1

Pass = dict[str, Any]
TEMPERATURE = 0.05


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How adapters are attached, what the gates are told, and what follows the training."""

    attach: Pass
    behind: str
    experts: int = 0
    """Clusters that are told of; 0 where nothing is."""
    told: Literal["as it is", "shuffled", "the same"] = "as it is"
    temperature: float | None = None


def _gated(
    form: str, sizes: tuple[int, int], gates: str = "both", told: Any = "as it is", temperature: float | None = None,
    **options: Any,
) -> Arm:  # fmt: skip
    attach: Pass = {
        "pass": "attach-rank1",
        "form": form,
        "sizes": list(sizes),
        "gates": gates,
        **options,
    }
    experts = rank1.experts(form, sizes) if gates in ("both", "intuition") else 0  # type: ignore[arg-type]
    if temperature is not None:
        attach["coefficient"] = float(experts)  # scores are 1 ÷ experts in the mean
    return Arm(
        attach=attach, behind="batch-rank1", experts=experts, told=told, temperature=temperature
    )


ARMS = {
    "lora": Arm(attach={"pass": "attach-lora", "rank": 12}, behind="merge-lora"),
    "lora-moe": _gated("groups", (8, 1), "router"),
    "one-to-one": _gated("single", (2, 4)),
    "mor1e": _gated("pairs", (4, 4)),
    "no intuition": _gated("pairs", (4, 4), "router"),
    "no router": _gated("pairs", (4, 20), "intuition"),
    "shuffled intuition": _gated("pairs", (4, 4), told="shuffled"),
    "uniform": _gated("pairs", (4, 4), told="the same"),
    "mor1e, drawn": _gated("pairs", (4, 4), router="drawn"),
    "mor1e, told apart": _gated("pairs", (4, 4), temperature=TEMPERATURE),
    "shuffled, told apart": _gated("pairs", (4, 4), told="shuffled", temperature=TEMPERATURE),
}


def passes(arm: Arm, score: float, seed: int, training: Pass) -> list[Any]:
    """Attach, train, and write for an engine; `score` is the mean of what the gates are told in training."""
    attach = {**arm.attach, "seed": seed, "select": {"exclude": "*pooler*"}}
    if attach["pass"] == "attach-rank1":
        form, gates = attach["form"], attach["gates"]
        begun = rank1.begun_gain(
            form, gates, score, coefficient=attach.get("coefficient", rank1.COEFFICIENT)
        )
        each = attach["sizes"][0] if form == "groups" else 1
        attach["gain"] = each / begun
    tune = {"pass": "tune", "seed": seed, "task": "labels", "distill": 0.0, **training}
    return [attach, tune, arm.behind]
