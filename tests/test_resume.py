"""A compile that was ended takes up what it had finished, and comes to the same bytes."""

import dataclasses
import json
import random
from contextlib import contextmanager

import pytest

from effc import cache, compiler, recipe
from effc.cache import Cache
from effc.errors import CalibrationError
from effc.package import UNHASHED
from effc.progress import Progress
from kit import content, leftovers, made

TIMED = set(UNHASHED)


class Ended(BaseException):
    """As a signal would: nobody catches it."""


class Ending(Progress):
    """Ends the run before, or in, the `number`th stage."""

    def __init__(self, number, *, within=False):
        super().__init__()
        self.number, self.within, self.seen = number, within, []

    @contextmanager
    def draw(self, name):
        self.seen.append(name)
        if len(self.seen) == self.number and not self.within:
            raise Ended
        with super().draw(name) as step:
            yield step
        if len(self.seen) == self.number:
            raise Ended


def spec(**changes):
    data = {
        "source": {"transformers": str(made().model)},
        "calib": {"file": str(made().sentences), "samples": 16},
        "passes": ["quantize"],
        "bench": {"shapes": [[1, 8]], "budget_s": 0.2},
        "gate": False,
    }
    return recipe.build({**data, **changes})


def stable(out):
    return {name: digest for name, digest in content(out).items() if name not in TIMED}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A compile that nothing disturbed, without any cache."""
    place = tmp_path_factory.mktemp("whole")
    watched = Ending(0)
    compiler.run(spec(), place / "OUT", kept=Cache(None), progress=watched)
    return stable(place / "OUT"), watched.seen


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 19, 2))
def test_it_goes_on_wherever_it_was_ended(number, whole, tmp_path):
    expected, stages = whole
    kept = Cache(tmp_path / "cache")
    if number > len(stages):
        pytest.skip(f"there are {len(stages)} stages")
    ending = Ending(number, within=number % 4 == 1)
    with pytest.raises(Ended):
        compiler.run(spec(), tmp_path / "place" / "OUT", kept=kept, progress=ending)
    assert leftovers(tmp_path / "place") == [] if (tmp_path / "place").exists() else True
    assert not (tmp_path / "place" / "OUT").exists()
    compiler.run(spec(), tmp_path / "place" / "OUT", kept=kept)
    assert stable(tmp_path / "place" / "OUT") == expected
    assert cache.check(kept.root) == []


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A recipe whose gate asks for more than 4 bits can give, and what an undisturbed compile makes of it."""
    place = tmp_path_factory.mktemp("searched")
    draw = random.Random(0)
    lines = made().sentences.read_text(encoding="utf-8").splitlines()
    rows = [f"{draw.choice(lines)},{draw.choice(lines)},{draw.random():.2f}" for _ in range(60)]
    (place / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    asked = spec(
        passes=[{"pass": "quantize", "bits": 4, "activation_bits": 4}],
        metric={"sts": str(place / "pairs.csv")}, bench=False,
        gate={"latency": False, "metric": {"max_drop": 0}},
    )  # fmt: skip
    watched = Ending(0)
    compiler.run(asked, place / "OUT", kept=Cache(None), progress=watched, allow_worse=True)
    return asked, stable(place / "OUT"), watched.seen


@pytest.mark.slow
@pytest.mark.parametrize(("after", "within"), [(0, True), (1, False), (3, True), (6, False)])
def test_a_search_goes_on_wherever_it_was_ended(after, within, searched, tmp_path):
    asked, expected, stages = searched
    kept = Cache(tmp_path / "cache")
    number = stages.index("sensitivity") + 1 + after
    assert number <= len(stages)
    progress = Ending(number, within=within)
    with pytest.raises(Ended):
        compiler.run(asked, tmp_path / "OUT", kept=kept, progress=progress, allow_worse=True)
    assert not (tmp_path / "OUT").exists()
    compiler.run(asked, tmp_path / "OUT", kept=kept, allow_worse=True)
    assert stable(tmp_path / "OUT") == expected
    assert cache.check(kept.root) == []


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(whole, tmp_path):
    expected, stages = whole
    kept = Cache(tmp_path / "cache")
    ending = Ending(len(stages))  # in the last stage, the bench
    with pytest.raises(Ended):
        compiler.run(spec(), tmp_path / "OUT", kept=kept, progress=ending)
    again = Ending(0)
    compiler.run(spec(), tmp_path / "OUT", kept=kept, progress=again)
    assert {"lower", "verify"}.isdisjoint(again.seen)
    assert again.stages["quantize"].cached == 1 and again.stages["lower"].cached >= 1
    assert stable(tmp_path / "OUT") == expected


@pytest.mark.slow
def test_a_timing_is_taken_up_only_by_the_compile_that_was_ended(tmp_path):
    kept = Cache(tmp_path / "cache")
    compiler.run(spec(), tmp_path / "A", kept=kept)
    again = Ending(0)
    compiler.run(spec(), tmp_path / "B", kept=kept, progress=again)
    assert "bench" in again.seen
    stages = {
        s["name"]: s for s in json.loads((tmp_path / "B" / "report.json").read_text())["stages"]
    }
    assert stages["lower"]["cached"] >= 1 and stages["bench"]["cached"] == 0


@pytest.mark.slow
def test_other_data_is_other_work(tmp_path):
    kept = Cache(tmp_path / "cache")
    compiler.run(spec(bench=False), tmp_path / "A", kept=kept)
    again = Ending(0)
    other = {"file": str(made().sentences), "samples": 16, "seed": 1}
    compiler.run(spec(bench=False, calib=other), tmp_path / "B", kept=kept, progress=again)
    assert again.stages["quantize"].cached == 0


@pytest.mark.slow
def test_an_entry_that_was_harmed_is_made_anew(whole, tmp_path):
    expected, _ = whole
    kept = Cache(tmp_path / "cache")
    compiler.run(spec(bench=False), tmp_path / "A", kept=kept)
    for file in kept.root.glob("entries/??/*/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 4
        file.write_bytes(data)
    compiler.run(spec(), tmp_path / "B", kept=kept)
    assert stable(tmp_path / "B") == expected


def by_gptq():
    return spec(passes=[{"pass": "quantize", "rounding": "gptq"}], bench=False)


@pytest.mark.slow
def test_codes_that_look_at_data_are_chosen_once(tmp_path, monkeypatch):
    kept = Cache(tmp_path / "cache")
    compiler.run(by_gptq(), tmp_path / "first", kept=kept)

    def refuse(*args, **kwargs):
        raise AssertionError("the codes lie in the cache")

    monkeypatch.setattr("effc.passes.quantize.gptq", refuse)
    compiler.run(by_gptq(), tmp_path / "second", kept=kept)
    assert stable(tmp_path / "first") == stable(tmp_path / "second")


@pytest.mark.slow
def test_a_replay_chooses_codes_again_and_refuses_others(tmp_path):
    compiler.run(by_gptq(), tmp_path / "first", kept=Cache(None))
    text = (tmp_path / "first" / "decisions.json").read_text(encoding="utf-8")
    recorded = json.loads(text)
    compiler.run(by_gptq(), tmp_path / "again", kept=Cache(None), decisions=recorded)
    assert stable(tmp_path / "first") == stable(tmp_path / "again")
    other = by_gptq()
    fewer = dataclasses.replace(other, calib=dataclasses.replace(other.calib, samples=3))
    with pytest.raises(CalibrationError, match="comes out differently") as told:
        compiler.run(fewer, tmp_path / "other", kept=Cache(None), decisions=recorded)
    assert "compile again without --decisions" in told.value.hint
    assert not (tmp_path / "other").exists()
