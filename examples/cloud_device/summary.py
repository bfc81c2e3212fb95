"""What units say together: how much is recovered, for which bytes, how soon, and what is ahead of what.

Gains are those of the engine on test pictures of the new domain. Differences are paired over seeds, with Student's
interval of 95 %; a share of what labels give has one by a bootstrap over seeds, in every domain at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import arms as made_of
import numpy as np
import spoiled
import world
from plans import CHANCE, SHIFTS, SHOWN, WHOLE
from study import Units

from effc import stats

Json = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
ENOUGH = 0.9
"""Of what labels give, for how soon it is reached."""
DRAWS = 2000
TASKS = ("questions", "captions")
"""What accuracy is taken of apart, beside all."""


def told(units: Units) -> Json:
    """All that was measured; `rounds` and `uplink` are of the first domain."""
    plain = {domain: found for domain, found in units.items() if domain != SHIFTS}
    domain = next(iter(plain), None)
    every = [unit for found in units.values() for each in found.values() for unit in each]
    shown = [unit for found in plain.values() for unit in found.get(SHOWN, [])]
    total = {
        k: sum(r[k] for unit in shown for r in unit["rounds"])
        for k in ("bytes_up", "bytes_down", "full_bytes", "jpeg_bytes")
    }  # fmt: skip
    found = plain[domain] if domain else {}
    return {
        "rounds": _rounds(found.get(SHOWN, [])),
        "uplink": {
            ("maha" if arm == SHOWN else arm): final(found[arm])
            for arm in made_of.UPLINK if arm in found
        },
        "recovered_fraction": recovered(plain, SHOWN), **total,
        "mirror_equal": all(
            unit["mirror_equal"]
            for found in units.values() for arm, each in found.items() if not made_of.EVERY[arm].is_open
            for unit in each
        ),
        "faults": {k: sum(unit["faults"][k] for unit in every) for k in ("injected", "survived")},
        "payloads": _payloads(every),
        "arms": {
            d: {arm: arm_told(each, found.get(WHOLE, [])) for arm, each in found.items()}
            for d, found in plain.items()
        },
        "recovered": {
            arm: recovery(plain, arm) for arm in _arms(plain) if arm not in made_of.GRID
        },
        "recovered_by_task": {task: recovery(plain, SHOWN, task) for task in TASKS},
        "ahead": {d: _ahead(found, SHOWN) for d, found in plain.items()},
        "above_chance": {d: _above(found) for d, found in plain.items()},
        "soon": {d: _soon(found) for d, found in plain.items() if WHOLE in found},
        "shifts": {arm: _successive(each) for arm, each in units.get(SHIFTS, {}).items()},
        "closed_less_open": _paired(units.get(SHIFTS, {}), SHOWN, "open", _mean_of_last),
    }  # fmt: skip


def _payloads(units: Sequence[Json]) -> Json:
    """Spoiled payloads at the cloud's door, and how many it refused."""
    sent = [r for unit in units for r in unit["rounds"] if r["bytes_up"]]
    return {"injected": spoiled.PAYLOADS * len(sent), "refused": sum(r["refused"] for r in sent)}


def _arms(units: Units) -> list[str]:
    return [*dict.fromkeys(arm for found in units.values() for arm in found)]


def _rounds(units: Sequence[Json]) -> list[Json]:
    keys = ("accuracy_before", "accuracy_after", "source_accuracy", "bytes_up", "bytes_down")
    return [
        {k: float(np.mean([unit["rounds"][i][k] for unit in units])) for k in keys}
        for i in range(len(units[0]["rounds"]) if units else 0)
    ]


def final(units: Sequence[Json]) -> float:
    return float(np.mean([unit["rounds"][-1]["accuracy_after"] for unit in units]))


def gain(unit: Json, task: str = "all") -> float:
    """Of the engine's accuracy in the domain of the last round: behind that round, less before the first."""
    last = unit["rounds"][-1]
    return float(last["accuracy"][last["domain"]][task] - unit["begun"][last["domain"]][task])


def _both(first: Sequence[Json], other: Sequence[Json]) -> list[tuple[Json, Json]]:
    """Units of two arms that have a seed in common."""
    by_seed = {unit["seed"]: unit for unit in other}
    return [(unit, by_seed[unit["seed"]]) for unit in first if unit["seed"] in by_seed]


def recovered(units: Units, arm: str, task: str = "all") -> float | None:
    """The arm's gain over that of labels, both summed over domains and seeds; None where labels gain nothing."""
    pairs = [
        pair for found in units.values() for pair in _both(found.get(arm, []), found.get(WHOLE, []))
    ]
    own, whole = (
        (sum(gain(unit, task) for unit in side) for side in zip(*pairs, strict=True))
        if pairs
        else (0.0, 0.0)
    )
    return own / whole if whole > 0 else None


def recovery(units: Units, arm: str, task: str = "all") -> Json:
    """`recovered`, and an interval of 95 %: seeds are drawn again, in every domain those of the same numbers."""
    found: Json = {"share": recovered(units, arm, task)}
    by_seed: dict[int, Array] = {}
    for each in units.values():
        for own, whole in _both(each.get(arm, []), each.get(WHOLE, [])):
            sums = by_seed.setdefault(own["seed"], np.zeros(2))
            sums += gain(own, task), gain(whole, task)
    if found["share"] is None or len(by_seed) < 3:
        return found
    every = np.stack([*by_seed.values()])  # a student is the same in every domain
    draws = np.random.default_rng(0).integers(0, len(every), (DRAWS, len(every)))
    sums = every[draws].sum(1)
    shares = sums[:, 0] / sums[:, 1]
    low, high = np.quantile(shares, (0.025, 0.975))
    return {**found, "low": float(low), "high": float(high)}


def arm_told(units: Sequence[Json], whole: Sequence[Json]) -> Json:
    rounds = [r for unit in units for r in unit["rounds"]]
    full = sum(r["full_bytes"] for r in rounds)
    return {
        "seeds": len(units),
        "accuracy": [unit["rounds"][-1]["accuracy_after"] for unit in units],
        "by_round": [
            float(np.mean([unit["rounds"][i]["accuracy_after"] for unit in units]))
            for i in range(len(units[0]["rounds"]))
        ],
        "before": [unit["rounds"][0]["accuracy_before"] for unit in units],
        "recovered": recovered({"": {"arm": list(units), WHOLE: list(whole)}}, "arm"),
        "source_before": float(np.mean([u["begun"][world.SOURCE]["all"] for u in units])),
        "source_after": float(np.mean([u["rounds"][-1]["source_accuracy"] for u in units])),
        "tasks": {
            task: float(np.mean([r["accuracy"][r["domain"]][task] for r in [u["rounds"][-1] for u in units]]))
            for task in TASKS
        },
        "taken": sum(r["taken"] for r in rounds) / sum(r["of"] for r in rounds),
        "up_share": sum(r["bytes_up"] for r in rounds) / sum(r["jpeg_bytes"] for r in rounds),
        "up_share_most": max(r["bytes_up"] / r["jpeg_bytes"] for r in rounds),
        "down_share": sum(r["bytes_down"] for r in rounds) / full,
        "down_share_most": max(r["bytes_down"] / r["full_bytes"] for r in rounds),
        "fp16_share": sum(r["trained_fp16_bytes"] for r in rounds) / full,
        "zlib_share": sum(r["trained_zlib_bytes"] for r in rounds) / full,
        "left": float(np.mean([r["left"] for r in rounds])),
        "cloud_s": float(np.mean([r["cloud_s"] for r in rounds])),
        "cpu_s": float(np.mean([unit["cpu_s"] for unit in units])),
        "apart": {
            when: {k: float(np.mean([u["apart"][when][k] for u in units])) for k in ("features", "answers")}
            for when in ("before", "after")
        },
    }  # fmt: skip


def interval(values: Sequence[float]) -> Json:
    """The mean, and Student's interval of 95 % where there are two and more."""
    found: Json = {"mean": float(np.mean(values)), "seeds": len(values)}
    if len(values) > 1:
        ends = stats.student(np.asarray(values), 0.95)
        found |= {"low": ends.low, "high": ends.high}
    return found


def _paired(
    found: Mapping[str, Sequence[Json]], arm: str, other: str, of: Callable[[Json], float] = gain
) -> Json | None:
    """How far an arm is ahead of another, seed by seed; None where they have none in common."""
    pairs = _both(found.get(arm, []), found.get(other, []))
    return interval([of(a) - of(b) for a, b in pairs]) if pairs else None


def _ahead(found: Mapping[str, Sequence[Json]], arm: str) -> Json:
    """How far an arm is ahead of every other."""
    made = {other: _paired(found, arm, other) for other in found if other != arm}
    return {other: each for other, each in made.items() if each}


def _above(found: Mapping[str, Sequence[Json]]) -> Json:
    """How far each way of choosing tokens is above choosing them by chance, at the same ratio."""
    made = {arm: _paired(found, arm, CHANCE) for arm in made_of.UPLINK if arm != CHANCE}
    for arm in found:
        of = made_of.GRID.get(arm)
        if of is not None and of.score != CHANCE:
            made[arm] = _paired(found, arm, f"{CHANCE} high {of.sent}")
    return {arm: each for arm, each in made.items() if each}


def _soon(found: Mapping[str, Sequence[Json]]) -> Json:
    """Seconds of a processor until the float student had 90 % of what labels gave it, for arms that came so far.

    Rounds are put one behind the other; None where a seed never came so far.
    """
    made = {}
    for arm, units in found.items():
        pairs = _both(units, found[WHOLE])
        seconds = [until(unit, whole) for unit, whole in pairs]
        reached = [s for s in seconds if s is not None]
        made[arm] = {
            "seeds": len(pairs), "reached": len(reached),
            "seconds": float(np.mean(reached)) if reached and len(reached) == len(pairs) else None,
        }  # fmt: skip
    return made


def until(unit: Json, whole: Json) -> float | None:
    """Seconds of training until `ENOUGH` of the gain of another unit was there."""
    curves = [[r["curve"] for r in each["rounds"] if r["curve"]] for each in (unit, whole)]
    if not all(curves):
        return None
    begun, best = curves[1][0][0][2], curves[1][-1][-1][2]
    before = 0.0
    for curve in curves[0]:
        for _, seconds, accuracy in curve:
            if accuracy >= begun + ENOUGH * (best - begun):
                return before + float(seconds)
        before += float(curve[-1][1])
    return None


def _successive(units: Sequence[Json]) -> Json:
    """Accuracy by round and domain, and what later shifts did to earlier ones, means over seeds.

    Backward transfer is the mean over all domains but the last of the last accuracy less that when the domain was left.
    """
    domains = [*units[0]["begun"]]
    course = [r["domain"] for r in units[0]["rounds"]]
    matrix = [
        {d: float(np.mean([u["rounds"][i]["accuracy"][d]["all"] for u in units])) for d in domains}
        for i in range(len(course))
    ]
    drifts = [[r.get("drift") for r in u["rounds"]] for u in units]  # units of long ago have none
    return {
        "course": course, "matrix": matrix, "seeds": len(units),
        "before": {d: float(np.mean([u["begun"][d]["all"] for u in units])) for d in domains},
        "backward_transfer": interval([_backward(unit) for unit in units]),
        "last": interval([_mean_of_last(unit) for unit in units]),
        "drift": None if any(None in each for each in drifts) else np.mean(drifts, 0).tolist(),
        "left": [float(np.mean([u["rounds"][i]["left"] for u in units])) for i in range(len(course))],
    }  # fmt: skip


def _backward(unit: Json) -> float:
    rounds = unit["rounds"]
    left = {r["domain"]: r["accuracy"][r["domain"]]["all"] for r in rounds}
    earlier = [d for d in left if d != rounds[-1]["domain"]]
    last = rounds[-1]["accuracy"]
    return float(np.mean([last[d]["all"] - left[d] for d in earlier])) if earlier else 0.0


def _mean_of_last(unit: Json) -> float:
    last = unit["rounds"][-1]["accuracy"]
    return float(np.mean([each["all"] for each in last.values()]))
