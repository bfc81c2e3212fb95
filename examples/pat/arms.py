"""What is compared: ways to a language model with a quarter less residual width, as recipes of passes.

    lora                 adapters on the whole model, which is not pruned: what every other arm is held against
    magnitude then lora  channels with the smallest weights are removed, then adapters are trained
    pca then lora        the smallest principal directions are removed (as SliceGPT does), then adapters
    lora then pca        adapters first, then the smallest directions go
    pca then pat         the same as the next, on principal directions, whose gates start in their order
    …, random mask       a fixed set of principal directions drawn by the seed: what choosing them is worth
    pat                  gates on all writers of the residual stream learn with the adapters which channels go
    pat, frozen mask     the gates of a fixed set of channels are closed along a schedule
    pat, random mask     a fixed set of channels drawn by the seed: what learning the gates is worth
    pat, no identity     without the loss that keeps the modules near an isometry

All have the same samples, steps, rates and seeds. The rank of an arm's adapters is the one with which it trains nearest
to as many parameters as PAT does, counted on the graph that is trained: the pruned one where pruning comes first.
"""

from __future__ import annotations

from typing import Any

Pass = dict[str, Any]
RATIO = 0.25


def tune(seed: int, options: Pass, *, terms: list[Any] | None = None) -> Pass:
    """The training of every arm."""
    made = {"pass": "tune", "seed": seed, "task": "tokens", "distill": 0.0, **options}
    return {**made, "terms": terms} if terms else made


def arms(
    group: str, rank: int, alone: tuple[int, int], hsm_rank: int | float, align: int, seed: int, training: Pass,
) -> dict[str, list[Any]]:  # fmt: skip
    """Passes by arm.

    `group` names the residual stream, `rank` is of PAT's adapters, `alone` of others on the whole and the pruned graph.
    """
    smaller = {"pass": "prune-dims", "ratio": RATIO, "align": align, "groups": group}
    pca = ["pca-rotate", {**smaller, "importance": "first"}]
    lora, behind = (
        [
            {"pass": "attach-lora", "rank": rank, "alpha": 2 * rank, "seed": seed},
            tune(seed, training),
            {"pass": "merge-lora"},
        ]
        for rank in alone
    )
    sizes = rank, hsm_rank, align, seed, training
    return {
        "lora": lora,
        "magnitude then lora": [{**smaller, "importance": "magnitude"}, *behind],
        "pca then lora": [*pca, *behind],
        "lora then pca": [*lora, *pca],
        "pca then pat": ["pca-rotate", *pat(*sizes, importance="first")],
        "pca then pat, random mask": ["pca-rotate", *pat(*sizes, mask="random")],
        "pat": pat(*sizes),
        "pat, frozen mask": pat(*sizes, mask="frozen"),
        "pat, random mask": pat(*sizes, mask="random"),
        "pat, no identity": pat(*sizes, identity=False),
    }


def pat(
    rank: int, hsm_rank: int | float, align: int, seed: int, training: Pass, **options: Any
) -> list[Any]:
    """Insert, tune together, make hard, fold."""
    insert = {
        "pass": "insert-hsm", "ratio": RATIO, "align": align, "rank": hsm_rank, "seed": seed,
        "embedding": "mask-only", **options,
    }  # fmt: skip
    return [
        insert,
        {"pass": "attach-lora", "rank": rank, "alpha": 2 * rank, "seed": seed},
        tune(seed, training, terms=["hsm"]),
        {"pass": "harden-hsm"},
        {"pass": "merge-lora"},
        {"pass": "fold-hsm"},
    ]
