"""The example of a device and its cloud: what a student is shown, what is asked for, and what numbers are made into."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from effc.delta.uplink import Tokens
from kit import example_modules

PLACE = Path(__file__).resolve().parent.parent / "examples" / "cloud_device"
BENCHMARKS = PLACE.parent.parent / "benchmarks"


@pytest.fixture
def example(monkeypatch):
    yield from example_modules(monkeypatch, PLACE)


def lessons_of(example, **how):
    world, arms, lessons = (example(name) for name in ("world", "arms", "lessons"))
    draw = torch.Generator().manual_seed(0)
    day = lessons.Known(
        tokens=torch.randn(4, world.PLACES, 3, generator=draw), queries=torch.ones(4, 2, 3, dtype=torch.long),
        answers=torch.zeros(4, 2, dtype=torch.long), shapes=torch.zeros(4, world.PLACES),
    )  # fmt: skip
    made = lessons.Lessons(arms.Arm(**how), day, 64, 0)
    index = np.array([[5, 9, 30, 2], [0, 48, 7, 8]])
    tokens = np.arange(1, 25, dtype=np.float32).reshape(2, 4, 3)
    made.received.append(
        Tokens(length=world.PLACES, index=index, tokens=tokens, score=np.zeros(2),
               beside={"queries": np.arange(12).reshape(2, 2, 3)})
    )  # fmt: skip
    return made, index, tokens


def test_half_of_the_pictures_are_whole_and_made_of_the_last_that_were_sent(example):
    made, index, tokens = lessons_of(example)
    feeds = made.taught(0).feeds
    which = feeds["queries"][:, 0, 0].numpy() // 6
    whole = feeds["sent"].bool().all(1)
    assert 16 < int(whole.sum()) < 48
    for row, of in enumerate(which):
        real = np.isin(np.arange(49), index[of])
        assert (feeds["real"][row].numpy() == real).all()
        found = feeds["tokens"][row].numpy()
        assert (found[index[of]] == tokens[of]).all()
        rest = {tuple(token) for token in found[~real]}
        assert rest == ({tuple(t) for t in tokens[of, 2:]} if whole[row] else {(0.0, 0.0, 0.0)})
        assert (feeds["sent"][row].numpy() == (real | bool(whole[row]))).all()


def test_nothing_is_made_up_where_it_is_not_asked_for_and_the_same_step_is_the_same_batch(example):
    made, *_ = lessons_of(example, filled=False)
    feeds = made.taught(3).feeds
    assert not feeds["sent"].bool().all(1).any() and (feeds["sent"] == feeds["real"]).all()
    made, *_ = lessons_of(example)
    first, again, other = (made.taught(step).feeds["tokens"] for step in (3, 3, 4))
    assert (first == again).all() and not (first == other).all()


def test_the_teacher_is_asked_about_what_was_sent_alone(example):
    made, *_ = lessons_of(example)
    asked = {}
    cloud = example("cloud").Cloud(
        made.arm, None, lambda **feeds: asked.update(feeds) or {}, made, 1
    )
    feeds = made.taught(0).feeds
    cloud.taught_by(feeds)
    assert set(asked) == {"tokens", "queries", "sent"} and (asked["sent"] == feeds["real"]).all()


def model(place, weight, codes):
    make, info = onnx.helper, onnx.helper.make_tensor_value_info
    held = [onnx.numpy_helper.from_array(np.array(v, t), n) for n, v, t in
            (("w", weight, "f4"), ("c", codes, "i1"), ("same", [7], "i8"))]  # fmt: skip
    graph = make.make_graph(
        [make.make_node("Identity", ["x"], ["y"])],
        "g",
        [info("x", 1, [1])],
        [info("y", 1, [1])],
        held,
    )
    place.mkdir()
    onnx.save(make.make_model(graph), place / "model.onnx")
    return place


def test_an_open_loop_adds_changes_to_whatever_is_held(example, tmp_path):
    held = model(tmp_path / "held", [1.0, 2.0], [120, -3])
    old, new = (
        model(tmp_path / "old", [0.0, 5.0], [0, 4]),
        model(tmp_path / "new", [0.5, 5.0], [20, 3]),
    )
    example("unit").added(held, old, new, tmp_path / "out")
    found = {
        t.name: onnx.numpy_helper.to_array(t).tolist()
        for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    }
    assert found == {"w": [1.5, 2.0], "c": [127, -4], "same": [7]}


def unit(seed, before, *after, curve=(), domain="dusk"):
    rounds = [
        {"accuracy_before": b, "accuracy_after": a, "domain": domain, "curve": curve,
         "accuracy": {domain: {"all": a, "questions": a - 0.1}}}
        for b, a in zip((before, *after), after, strict=False)
    ]  # fmt: skip
    begun = {domain: {"all": before, "questions": before - 0.2}}
    return {"seed": seed, "rounds": rounds, "begun": begun}


def test_what_is_recovered_is_over_seeds_that_both_have(example):
    summary = example("summary")
    units = {"dusk": {
        "akd": [unit(0, 0.3, 0.6, 0.8), unit(1, 0.4, 0.8), unit(2, 0.2, 0.7)],
        "labels": [unit(0, 0.3, 0.9), unit(1, 0.4, 0.9)],
    }}  # fmt: skip
    assert summary.recovered(units, "akd") == pytest.approx((0.5 + 0.4) / (0.6 + 0.5))
    assert summary.recovered(units, "akd", "questions") == pytest.approx((0.6 + 0.5) / (0.7 + 0.6))
    assert summary.recovered(units, "random") is None
    assert "low" not in summary.recovery(units, "akd")  # two seeds tell no interval
    units["dusk"]["labels"].append(unit(2, 0.2, 0.8))
    found = summary.recovery(units, "akd")
    assert found["share"] == pytest.approx(1.4 / 1.7)
    assert found["low"] < found["share"] < found["high"]
    nothing = {"dusk": {"akd": [unit(0, 0.3, 0.6)], "labels": [unit(0, 0.3, 0.3)]}}
    assert summary.recovered(nothing, "akd") is None


def test_how_soon_counts_the_seconds_of_rounds_that_were_not_enough(example):
    summary = example("summary")
    whole = unit(0, 0.5, 1.0, curve=[(0, 0.0, 0.5), (25, 3.0, 1.0)])
    slow = unit(0, 0.5, 0.8, 0.97, curve=[(0, 0.0, 0.5), (25, 2.0, 0.8)])
    slow["rounds"][1]["curve"] = [(0, 0.0, 0.8), (25, 4.0, 0.96), (50, 8.0, 0.97)]
    assert summary.until(whole, whole) == 3.0
    assert summary.until(slow, whole) == 6.0
    slow["rounds"].pop()
    assert summary.until(slow, whole) is None
    assert summary.until(unit(0, 0.5, 0.5), whole) is None


def test_backward_transfer_is_what_later_domains_did_to_earlier_ones(example):
    summary = example("summary")

    def rounds(*rows):
        names = ("dusk", "dusk", "ink")
        return {"rounds": [
            {"domain": n, "accuracy": {"day": {"all": 0.9}, "dusk": {"all": d}, "ink": {"all": i}}}
            for n, (d, i) in zip(names, rows, strict=True)
        ]}  # fmt: skip

    assert summary._backward(rounds((0.5, 0.1), (0.8, 0.1), (0.6, 0.9))) == pytest.approx(-0.2)
    assert summary._backward({"rounds": rounds((0.5, 0), (0.8, 0), (0.6, 1))["rounds"][:2]}) == 0.0


def test_features_of_a_model_are_no_way_from_its_own_and_some_from_anothers(example):
    cloud, models, lessons, world = (example(n) for n in ("cloud", "models", "lessons", "world"))
    scenes = world.drawn(world.DOMAINS["dusk"], 4, 0)
    torch.manual_seed(0)
    known = lessons.Known(
        tokens=torch.randn(4, 49, models.FEATURES), answers=torch.from_numpy(scenes.answers),
        queries=torch.from_numpy(scenes.queries), shapes=torch.from_numpy(scenes.shapes),
    )  # fmt: skip
    own, other = models.Answerer(32, 1).eval(), models.Answerer(48, 1).eval()
    same, far = cloud.apart(own, own, known), cloud.apart(own, other, known)
    assert same["features"] == pytest.approx(0, abs=1e-6) and same["answers"] == pytest.approx(
        0, abs=1e-6
    )
    assert far["features"] > 0.05 and far["answers"] > 0.001


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--arms akdd", "invalid choice"),
        ("--domains day", "invalid choice"),
        ("--seeds 0", "1 or more"),
        ("--stages 9", "--stages: 1 to"),
        ("--stages 1 --arms akd", "of their own"),
    ],
)
def test_what_cannot_be_measured_is_refused(example, capsys, words, what):
    with pytest.raises(SystemExit):
        example("run").parsed(words.split())
    assert what in capsys.readouterr().err


def test_what_is_asked_for_is_what_is_measured_and_units_are_named_once(example):
    run, plans, arms = (example(n) for n in ("run", "plans", "arms"))
    full = plans.PLANS["full"]
    given, kind = run.parsed(["--arms", "akd", "open", "--domains", "shifts", "--seeds", "2"])
    assert kind == "full"
    (stage,) = run.asked(given, full).stages
    assert [*stage.units()] == [("shifts", a, s) for s in (0, 1) for a in ("akd", "open")]
    assert run.asked(run.parsed(["--stages", "3"])[0], full).stages == full.stages[2:3]
    assert run.asked(run.parsed([])[0], full) == full
    assert full.measured() == run.asked(given, full).measured()
    assert len(full.courses("shifts")) == 10 and full.courses("ink") == ("ink",) * 3
    measured = {arm for stage in full.stages for arm in stage.arms}
    assert measured == set(arms.EVERY)


def measured(seed, course, gained, tested):
    """A unit as it lies in a state, whose accuracies rise by `gained` in the domain of every round."""
    now, rounds = dict.fromkeys(tested, 0.4), []
    for domain in course:
        before, now = now[domain], {**now, domain: now[domain] + gained}
        rounds.append({
            "domain": domain, "accuracy_before": before, "accuracy_after": now[domain], "source_accuracy": now["day"],
            "accuracy": {d: {"all": a, "questions": a, "captions": a} for d, a in now.items()},
            "taken": 5, "of": 10, "bytes_up": 40, "refused": 4, "jpeg_bytes": 1000, "bytes_down": 9,
            "full_bytes": 1000, "left": 0.2,
            "trained_fp16_bytes": 8, "trained_zlib_bytes": 7, "cloud_s": 3.0, "drift": 0.1 * (len(rounds) + 1),
            "curve": [[0, 0.0, before], [25, 3.0, now[domain]]],
        })  # fmt: skip
    far = {"features": 0.5, "answers": 1.0}
    return {
        "seed": seed, "rounds": rounds, "cpu_s": 60.0,
        "begun": {d: {"all": 0.4, "questions": 0.4, "captions": 0.4} for d in tested},
        "apart": {"before": far, "after": far}, "faults": {"injected": 5, "survived": 5}, "mirror_equal": True,
    }  # fmt: skip


def test_what_was_measured_is_told_shown_and_tabled(example, tmp_path, monkeypatch):
    summary, page, plans = (example(n) for n in ("summary", "page", "plans"))
    full = plans.PLANS["full"]
    gains = {
        "akd": 0.18,
        "labels": 0.2,
        "random": 0.1,
        "all tokens": 0.19,
        "maha high 8": 0.18,
        "random high 8": 0.1,
    }
    units = {
        "dusk": {
            arm: [measured(s, full.courses("dusk"), g + 0.01 * s, ("day", "dusk")) for s in range(3)]
            for arm, g in gains.items()
        },
        "shifts": {
            arm: [measured(s, full.courses("shifts"), g, ("day", *plans.UNSEEN)) for s in range(2)]
            for arm, g in (("akd", 0.1), ("open", 0.05))
        },
    }  # fmt: skip
    found = summary.told(units)
    assert found["recovered_fraction"] == pytest.approx((0.18 + 0.01) / (0.2 + 0.01))
    assert found["above_chance"]["dusk"]["akd"]["mean"] == pytest.approx(3 * 0.08)
    assert found["above_chance"]["dusk"]["maha high 8"]["mean"] == pytest.approx(3 * 0.08)
    assert found["uplink"] == pytest.approx({"maha": 0.97, "random": 0.73})
    assert (found["bytes_up"], found["bytes_down"], found["full_bytes"]) == (360, 81, 9000)
    assert found["soon"]["dusk"]["all tokens"] == {"seeds": 3, "reached": 3, "seconds": 9.0}
    assert found["soon"]["dusk"]["random"]["seconds"] is None
    assert found["closed_less_open"]["mean"] == pytest.approx((0.3 + 0.3 + 0.4) / 4 / 2)
    assert found["shifts"]["akd"]["drift"] == pytest.approx([0.1 * i for i in range(1, 11)])
    shown = page.drawn({**found, "plan": full.measured()})
    assert shown.count('role="img"') == 1 + 3 + 2 + 1 + 2 and "Backward transfer" in shown
    down = shown.partition('id="dusk-bought-down-desc"')[2].partition("</svg>")[0]
    for name in ("akd", "adapters, fp16", "adapters, fp16, zlib"):
        assert down.count(f">{name}</text>") == 1
    up = shown.partition('id="dusk-bought-up-desc"')[2].partition("</svg>")[0]
    assert all(f">{n}</text>" in up for n in ("akd", "random", "all tokens", "maha high 8"))

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert len(tables.kept_fresh()) == 2  # a heading and nothing below it
    beside = {
        "cpu": "a",
        "features": [],
        "python": "3",
        "versions": {},
        "parameters": 5e6,
        "data": {"n": 8},
    }
    text = json.dumps({**found, **beside, "plan": full.measured()})
    (tmp_path / "cloud_device.json").write_text(text, encoding="utf-8")
    lines = "\n".join(tables.kept_fresh())
    assert "| random | 3 | 0.400 → 0.730 | 0.524 |" in lines and "akd recovered 0.905 [" in lines
    assert "| 10, frost | 0.400 | 0.700 | 0.700 | 0.800 | 1.000 |" in lines
    assert "+0.1250 [+0.1250, +0.1250] ahead of the open one" in lines


@pytest.mark.slow
def test_shifts_one_after_the_other_and_arms_of_every_kind_are_measured_and_shown(tmp_path):
    state, file, html = tmp_path / "state", tmp_path / "found.json", tmp_path / "found.html"
    words = ["--smoke", "--state", state, "--json", file, "--html", html]
    run = [sys.executable, PLACE / "run.py", *words]

    def run_on(*more):
        ran = subprocess.run([*run, *more], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return json.loads(file.read_text(encoding="utf-8")), ran.stdout

    found, _ = run_on("--arms", "akd", "open", "--domains", "shifts")
    closed, opened = (found["shifts"][arm] for arm in ("akd", "open"))
    assert closed["course"] == ["dusk", "ink", "frost"] and set(closed["before"]) == {
        "day",
        *closed["course"],
    }
    assert len(closed["matrix"]) == len(closed["drift"]) == len(opened["drift"]) == 3
    assert found["closed_less_open"]["seeds"] == 1
    assert found["faults"] == {"injected": 5, "survived": 5} and found["mirror_equal"]
    found, said = run_on(
        "--arms", "akd", "tent", "prompt", "top-k", "all tokens", "--domains", "ink"
    )
    arms = found["arms"]["ink"]
    assert (
        arms["tent"]["up_share"] == arms["tent"]["down_share"] == 0 < arms["prompt"]["down_share"]
    )
    assert arms["all tokens"]["taken"] == arms["akd"]["taken"] > 0
    assert arms["all tokens"]["up_share"] > 3 * arms["akd"]["up_share"] > 0
    page = html.read_text(encoding="utf-8")
    assert page.count("<svg") >= 3 and "top-k" in page and "<script" not in page
    _, again = run_on("--arms", "akd", "--domains", "ink")
    assert "akd, ink" in said and "akd, ink" not in again  # it was there
