"""Whether an engine is worth shipping, decided from intervals and never from one number.

    latency   engine ÷ reference of every shape at most 1.02, and engine ÷ the same unpruned where that was timed
    metric    what the task metric loses at most `max_drop`
    size      engine ÷ plain float export below 1

A check passes where the whole interval lies within its bound, and fails where the whole interval lies beyond it. What
lies across the bound the sample is too small to tell: that is a warning, or a refusal where the gate is strict.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from effc.bench import word_of
from effc.errors import GateRefused
from effc.recipe import GateSpec

Json = dict[str, Any]
Verdict = Literal["pass", "fail", "undecided"]

NOT_SLOWER = 1.02
UNPRUNED = "unpruned"
"""What a pruned engine is timed beside: the engine of the same recipe without what prunes and trains."""
MAX_DROP = 0.005
MAX_RELATIVE_DROP = 0.02
"""What a metric may lose where a recipe does not say: half a point of a share, 2 % of a perplexity."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question to an engine: a value with its interval, the bound, and what follows from them."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    bound: float
    verdict: Verdict
    text: str

    @property
    def is_beyond(self) -> bool:
        """Whether the value itself is not within the bound, whatever its interval allows."""
        return self.value is not None and self.value > self.bound

    @property
    def excess(self) -> float:
        """How far the value is beyond its bound; 0 within it."""
        return max(0.0, self.value - self.bound) if self.value is not None else 0.0


def checks(
    spec: GateSpec, *, bench: Mapping[str, Any] | None, metric: Mapping[str, Any] | None,
    sizes: tuple[int, int] | None, asked: Collection[str],
) -> tuple[Check, ...]:  # fmt: skip
    """Every question of a gate, answered from what was measured; `sizes` are bytes of engine and float export.

    What was not measured is undecided where it was `asked` for by name, and no question else.
    """
    found: list[Check] = []
    if spec.latency and (bench is not None or "latency" in asked):
        found += _latency(bench)
    if spec.metric and (metric is not None or "metric" in asked):
        found.append(_metric(spec.metric.max_drop, metric))
    if spec.size:
        found.append(_size(sizes))
    return tuple(found)


def _latency(bench: Mapping[str, Any] | None) -> list[Check]:
    if bench is None:
        return [_unmeasured("latency", NOT_SLOWER)]
    found = []
    for shape in bench["shapes"]:
        asked = {f"engine ÷ {shape['reference']}": shape}
        if whole := shape.get("against", {}).get(UNPRUNED):
            asked["engine ÷ the same unpruned"] = whole
        found += [
            _judged(
                f"latency {word_of(shape)}", 1 / of["ratio"], 1 / of["high"], 1 / of["low"],
                NOT_SLOWER, what, 3,
            )
            for what, of in asked.items() if of["ratio"] is not None
        ]  # fmt: skip
    return found


def _metric(wanted: float | None, metric: Mapping[str, Any] | None) -> Check:
    relative = metric is not None and bool(metric["relative"])
    usual = MAX_RELATIVE_DROP if relative else MAX_DROP
    bound = usual if wanted is None else wanted
    if metric is None:
        return _unmeasured("metric", bound)
    return _judged(
        f"metric {metric['name']}", metric["drop"], metric["drop_low"], metric["drop_high"],
        bound, "relative loss" if relative else "loss", 4, are_few=metric["are_few"],
    )  # fmt: skip


def _size(sizes: tuple[int, int] | None) -> Check:
    if sizes is None:
        return _unmeasured("size", 1.0)
    ratio = sizes[0] / max(sizes[1], 1)
    verdict: Verdict = "pass" if ratio < 1 else "fail"
    text = f"size: engine ÷ float export {ratio:.3f}, below 1 is asked: {verdict}"
    return Check(
        name="size", value=ratio, low=ratio, high=ratio, bound=1.0, verdict=verdict, text=text
    )


def _judged(
    name: str, value: float, low: float, high: float, bound: float, what: str, digits: int,
    *, are_few: bool = False,
) -> Check:  # fmt: skip
    verdict: Verdict = "pass" if high <= bound else "fail" if low > bound else "undecided"
    if are_few:
        verdict = "undecided"
    word = {"undecided": "too few samples to tell"}.get(verdict, verdict)
    numbers = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    text = f"{name}: {what} {numbers}, at most {bound:g} is asked: {word}"
    return Check(
        name=name, value=value, low=low, high=high, bound=bound, verdict=verdict, text=text
    )


def _unmeasured(name: str, bound: float) -> Check:
    text = f"{name}: asked for and not measured"
    return Check(
        name=name, value=None, low=None, high=None, bound=bound, verdict="undecided", text=text
    )


def fails(spec: GateSpec, found: Sequence[Check]) -> list[Check]:
    """The checks that refuse an engine."""
    bad = ("fail", "undecided") if spec.strict else ("fail",)
    return [check for check in found if check.verdict in bad]


def is_content(spec: GateSpec, found: Sequence[Check]) -> bool:
    """Whether nothing is left to improve: of what was measured no check refuses, and no value is beyond its bound."""
    measured = [check for check in found if check.value is not None]
    return not fails(spec, measured) and not any(check.is_beyond for check in measured)


def rank(spec: GateSpec, found: Sequence[Check]) -> tuple[int, int, float]:
    """The less the better: checks that refuse, values beyond their bounds, how far beyond they are in all."""
    return (
        len(fails(spec, found)),
        sum(check.is_beyond for check in found),
        sum(check.excess for check in found),
    )


def verdict(spec: GateSpec | None, found: Sequence[Check]) -> str:
    """`passed`, `passed with warnings`, `refused`, or `off` where nothing was asked."""
    if spec is None or not found:
        return "off"
    if fails(spec, found):
        return "refused"
    warned = any(check.verdict == "undecided" for check in found)
    return "passed with warnings" if warned else "passed"


def refusal(
    spec: GateSpec, found: Sequence[Check], *, tried: int, ran_out: bool = False,
    target: str | None = None, stays: Sequence[str] = (),
) -> GateRefused:  # fmt: skip
    """The letter of a compile that cannot meet its gate: what was reached, and why no search takes some passes back."""
    bad = fails(spec, found)
    others = [check.text for check in found if check not in bad]
    others += stays
    reached = "; ".join(check.text for check in bad)
    of = f" for {target}" if target is not None else ""
    tries = f", the best of {tried} tried" if tried > 1 else ""
    tries += ", and the time for the search is up" if ran_out else ""
    return GateRefused(
        f"the engine{of} does not meet its gate{tries}: {reached}",
        where="; ".join(others) or None,
        hint="nothing was written; --allow-worse writes it all the same, and the recipe's section `gate` "
        "says what is asked",
    )


def to_json(
    spec: GateSpec | None, found: Sequence[Check], *, rolled_back: Sequence[Json], tried: int,
    seconds: float, ran_out: bool, target: str,
) -> Json:  # fmt: skip
    """What the report says of the gate."""
    return {
        "verdict": verdict(spec, found),
        "strict": bool(spec and spec.strict),
        "target": target,
        "checks": [asdict(check) for check in found],
        "rolled_back": list(rolled_back),
        "tried": tried,
        "seconds": round(seconds, 1),
        "ran_out_of_time": ran_out,
    }
