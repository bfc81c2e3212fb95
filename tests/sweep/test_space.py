"""What a sweep tries is named once each, and a file that says something else is refused."""

import json

import pytest

from effc.errors import RecipeError
from effc.sweep import front, space
from effc.sweep.space import Spec
from effc.sweep.work import values


def spec(**words):
    return Spec.model_validate({"base": "base.yaml", **words})


def test_a_grid_is_every_choice_once_under_its_own_name():
    made = space.grid(spec(space={"passes.0.bits": [4, 8], "targets": [["ort"], ["openvino"]]}))
    names = [trial.name for trial in made]
    assert len(set(names)) == len(made) == 4
    assert names[0].startswith("bits=4+targets=ort-") and "/" not in "".join(names)
    assert made[3].overrides == ["passes.0.bits=8", 'targets=["openvino"]']
    again = space.grid(spec(space={"passes.0.bits": [4, 8], "targets": [["ort"], ["openvino"]]}))
    assert [trial.name for trial in again] == names


def test_names_hold_no_way_out_of_a_folder():
    made = space.named({"source.python": "../../etc/passwd:x", "calib.file": ".\u202e hidden"})
    assert set(made.name) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=+-"
    )
    assert not made.name.startswith(".")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({}, "nothing to try"),
        ({"spase": {}}, "did you mean 'space'"),
        ({"space": {"passes.0.bits": []}}, "space.passes.0.bits"),
        ({"space": {"passes.0.bits": {"low": 2, "high": 8}}}, "a grid has no end"),
        ({"space": {"passes.0.lr": {"low": 0, "high": 1, "log": True}}, "search": "tpe", "trials": 3}, "above 0"),
        ({"space": {"passes.0.bits": [8]}, "search": "tpe"}, "no end of its own"),
        ({"points": [{"name": "a", "set": {}}], "search": "tpe", "trials": 2}, "needs a space"),
        ({"space": {"gate": [False]}}, "leaves that as it is"),
        ({"space": {"x": [1]}, "memory": "lots"}, "memory"),
        ({"space": {"x": [1]}, "cpus": 0}, "cpus"),
        ({"points": [{"name": "../up", "set": {}}]}, "points"),
    ],
)  # fmt: skip
def test_a_file_that_says_something_else_is_refused(write, words, reason):
    with pytest.raises(RecipeError, match=reason):
        space.grid(space.read(write(**words))[0])


def test_trials_of_one_name_or_of_one_meaning_are_refused():
    two = [{"name": "a", "set": {"passes.0.bits": bits}} for bits in (4, 8)]
    with pytest.raises(RecipeError, match="two trials are called a"):
        space.grid(spec(points=two))
    with pytest.raises(RecipeError, match="are one trial"):
        space.grid(spec(space={"passes.0.bits": [4, 4]}))
    same = [{"name": name, "set": {"passes.0.bits": 4}} for name in "ab"]
    with pytest.raises(RecipeError, match="b and a are one trial"):
        space.grid(spec(points=same))
    with pytest.raises(RecipeError, match="at most"):
        space.grid(spec(space={f"passes.{n}.bits": list(range(30)) for n in range(4)}))


def record(name, cpu="one", **values):
    found = {o: v if isinstance(v, dict) else {"value": v} for o, v in values.items()}
    machine = {"cpu": cpu, "features": [], "threads": 1}
    return {"name": name, "state": "done", "values": found, "machine": machine}


def test_a_front_holds_what_nothing_beats():
    given = [
        record("good", accuracy=0.1, size=10), record("small", accuracy=0.4, size=3),
        record("worse", accuracy=0.5, size=10), record("same", accuracy=0.1, size=10),
        record("none", size=1),
    ]  # fmt: skip
    (found,) = front.fronts(given, ("accuracy", "size"))
    assert [r["name"] for r in found.best] == ["good", "same", "small"]
    assert [r["name"] for r in found.rest] == ["worse"] and not found.near


def test_what_intervals_do_not_tell_apart_is_near():
    def timed(name, ms, half):
        return record(name, latency={"value": ms, "low": ms - half, "high": ms + half}, size=1)

    (found,) = front.fronts(
        [timed("a", 10, 1), timed("b", 11, 1), timed("c", 20, 1)], ("latency", "size")
    )
    assert [[r["name"] for r in g] for g in (found.best, found.near, found.rest)] == [
        ["a"],
        ["b"],
        ["c"],
    ]


def test_times_of_unlike_machines_are_never_compared():
    given = [record("slow", "one", latency=9, size=1), record("fast", "two", latency=1, size=1)]
    found = front.fronts(given, ("latency", "size"))
    assert [[r["name"] for r in f.best] for f in found] == [["slow"], ["fast"]]
    (alike,) = front.fronts(given, ("size",))
    assert len(alike.best) == 2


def test_a_page_shows_all_and_loads_nothing():
    given = [record("<b>a</b>", accuracy=0.1, size=10), record("b", accuracy=0.4, size=3)]
    given.append({"name": "c", "state": "failed", "error": {"what": "<script>", "hint": None}})
    page = front.page(front.fronts(given, ("accuracy", "size")), given, ("accuracy", "size"))
    assert "&lt;script&gt;" in page and "<script" not in page and "<b>" not in page
    assert "http" not in page.replace("http-equiv", "") and page.count("<circle") == 2
    made = front.to_json(front.fronts(given, ("accuracy", "size")), given, ("accuracy", "size"))
    assert made["failed"][0]["name"] == "c" and json.loads(json.dumps(made)) == made


def test_less_is_better_in_every_number():
    report = {
        "model_bytes": 5, "bench": {"shapes": [
            {"engine_ms": 2.0, "ratio": 2.0, "low": 1.0, "high": 4.0}, {"engine_ms": 8.0, "ratio": None},
        ]}, "verify": {"ort": {"1x4": {"y": {"rel_l2": 0.25}}}},
        "metric": {"engine": 0.75, "low": -0.25, "high": 0.25, "higher_is_better": True, "name": "f1"},
    }  # fmt: skip
    found = values(report)
    assert found["accuracy"] == {
        "value": -0.75,
        "low": -1.0,
        "high": -0.5,
        "shown": 0.75,
        "name": "f1",
    }
    assert found["latency"]["value"] == pytest.approx(4.0)
    assert found["latency"]["low"] < 4.0 < found["latency"]["high"]
    assert values({**report, "metric": None, "bench": None})["accuracy"]["value"] == 0.25
