"""A sweep on two workers gives what a serial one gives, and loses nothing when somebody is killed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from effc import cache
from effc.errors import PackageError, RecipeError, UsageError
from effc.sweep import drive, space, work
from kit import assert_letter, cli

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)
TWELVE = {
    "source.python": ["nets.py:small", "nets.py:large"],
    "passes.0.bits": [8, 6, 4], "targets": [["ort"], ["openvino"]],
}  # fmt: skip


def serial(file, out):
    """What the trials of a grid give one after the other, without Ray."""
    spec, base = space.read(file)
    (out / "trials").mkdir(parents=True)
    jobs = [drive._job(trial, spec, base, base.read_text(), out, 1) for trial in space.grid(spec)]
    return [work.run(job) for job in jobs]


@pytest.mark.slow
@needs_ray
def test_two_workers_give_the_front_of_one_and_share_their_stages(write, place, monkeypatch):
    file = write(space=TWELVE)
    ran = cli("sweep", file, "-o", place / "out", "--workers", "2", "--json", place / "found.json")
    assert ran.code == 0, ran.err
    found = json.loads((place / "found.json").read_text())
    assert found == json.loads((place / "out" / "front.json").read_text())
    records = found["trials"].values()
    assert {r["state"] for r in records} == {"done"} and len(records) == 12
    monkeypatch.setenv("EFFC_CACHE", str(place / "another"))
    alone = serial(file, place / "serial")
    spec, _ = space.read(file)
    known = drive.front.to_json(drive.front.fronts(alone, spec.objectives), alone, spec.objectives)
    assert known["fronts"] == found["fronts"]
    for record in alone:
        other = found["trials"][record["name"]]
        assert record["values"]["size"] == other["values"]["size"]
        assert record["values"]["accuracy"]["value"] == pytest.approx(
            other["values"]["accuracy"]["value"]
        )
    count = {
        which: sum(r["stages"]["quantize"]["cached"] for r in of)
        for which, of in (("two", records), ("one", alone))
    }
    assert count["two"] == count["one"]  # every stage was made once, whoever made it
    again = cli("sweep", file, "-o", place / "out", "--workers", "2")
    assert again.code == 0 and again.out.count("done before") == 12 + again.out.count(
        "stages done before"
    )


@pytest.mark.slow
@needs_ray
def test_a_worker_that_is_killed_loses_at_most_its_own_trial(write, place):
    points = [
        {"name": "dies-once", "set": {"source.python": "nets.py:once"}},
        {"name": "dies-always", "set": {"source.python": "nets.py:always"}},
        {"name": "lives", "set": {}},
    ]  # fmt: skip
    ran = cli("sweep", write(points=points, attempts=2), "-o", place / "out", "--workers", "1")
    assert ran.code == 0, ran.err
    found = json.loads((place / "out" / "front.json").read_text())["trials"]
    assert {n: r["state"] for n, r in found.items()} == {
        "dies-once": "done", "lives": "done", "dies-always": "lost",
    }  # fmt: skip
    assert "its worker died 2 times" in ran.out


@pytest.mark.slow
@needs_ray
def test_a_driver_that_is_killed_goes_on(write, place):
    file, out = write(space={"passes.0.bits": [8, 7, 6, 5, 4]}), place / "out"
    command = [sys.executable, "-m", "effc", "sweep", str(file), "-o", str(out), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + 180
        while not list(out.glob("trials/*/trial.json")) and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = len(list(out.glob("trials/*/trial.json")))
    assert 1 <= done < 5
    ran = cli("sweep", file, "-o", out, "--workers", "1")
    assert ran.code == 0, ran.err
    assert ran.out.count(": done before") >= done
    assert len(json.loads((out / "front.json").read_text())["trials"]) == 5


@pytest.mark.slow
@needs_ray
def test_a_search_asks_as_often_as_it_was_told(write, place):
    pytest.importorskip("optuna")
    words = {
        "space": {"passes.0.bits": {"low": 4, "high": 8, "whole": True}},
        "search": "tpe",
        "trials": 6,
    }
    ran = cli("sweep", write(**words), "-o", place / "out", "--workers", "1")
    assert ran.code == 0, ran.err
    found = json.loads((place / "out" / "front.json").read_text())["trials"]
    assert 2 <= len(found) <= 5 and {r["state"] for r in found.values()} == {"done"}


def test_an_address_that_nobody_answers_at_is_said(write, place):
    ran = cli(
        "sweep",
        write(space={"passes.0.bits": [8]}),
        "-o",
        place / "out",
        "--address",
        "127.0.0.1:9",
    )
    assert_letter(ran, "UsageError", 2, "nobody answers at 127.0.0.1:9")
    assert not list((place / "out").glob("trials/*"))


def job(place, **changes):
    words = {
        "name": "a", "base": str(place / "base.yaml"), "overrides": (), "settings": {}, "key": "k",
        "folder": str(place / "trials" / "a"), "code": cache.code_digest(), "threads": 1,
    }  # fmt: skip
    return work.Job(**{**words, **changes})


def test_a_worker_with_another_effc_or_another_disk_is_refused(place):
    with pytest.raises(UsageError, match="another effc"):
        work.run(job(place, code="0" * 64))
    with pytest.raises(PackageError, match="does not see"):
        work.run(job(place))
    assert not (place / "trials").exists()


def test_a_full_disk_is_the_trials_own_failure(place, monkeypatch):
    (place / "trials").mkdir()

    def full(*_, **__):
        raise OSError(28, "No space left on device", "engine")

    monkeypatch.setattr(work.compiler, "run", full)
    record = work.run(job(place))
    assert record["state"] == "lost" and "No space left" in record["error"]["what"]
    assert json.loads((place / "trials" / "a" / "trial.json").read_text()) == record


def test_what_goes_wrong_in_a_trial_is_its_own(place, monkeypatch):
    (place / "trials").mkdir()
    states = {}
    for error in (PermissionError(13, "no"), ValueError("odd"), MemoryError(), KeyError("k")):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(work.compiler, "run", fails)
        states[type(error).__name__] = work.run(job(place))["state"]
    assert states == {
        "PermissionError": "failed", "ValueError": "failed", "MemoryError": "lost", "KeyError": "failed",
    }  # fmt: skip


def test_a_record_that_cannot_be_kept_is_tried_again(place, monkeypatch):
    (place / "trials").mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(work, "write", full)
    record = work.run(job(place))
    assert record["state"] == "lost" and "cannot keep its record" in record["error"]["what"]


def test_a_file_that_changed_makes_another_trial(write, place):
    file, out = write(space={"passes.0.bits": [8]}), place / "out"
    spec, base = space.read(file)
    (trial,) = space.grid(spec)

    def key():
        return drive._job(trial, spec, base, base.read_text(), out, 1).key

    first = key()
    assert key() == first
    with (place / "nets.py").open("a") as stream:
        stream.write("\n")
    second = key()
    (place / "data.npz").write_bytes((place / "data.npz").read_bytes() + b"0")
    assert len({first, second, key()}) == 3


def test_a_search_that_goes_on_knows_what_was_tried(write, place):
    pytest.importorskip("optuna")
    words = {
        "space": {
            "passes.0.bits": [4, 5, 6, 7, 8],
            "calib.samples": {"low": 8, "high": 32, "whole": True},
        }
    }
    spec, base = space.read(write(**words, search="tpe", trials=12))
    text, out = base.read_text(), place / "out"

    def asks():
        return drive._Asks(spec, [], lambda t: drive._job(t, spec, base, text, out, 1))

    first, told = asks(), []
    running = [first.next() for _ in range(3)]  # three at once, of which the last never ends
    for _ in range(6):
        job = running.pop(0)
        bits = job.settings["passes.0.bits"]
        record = {
            "name": job.name, "settings": dict(job.settings), "key": job.key, "state": "done",
            "values": {"accuracy": {"value": 1 / bits}, "size": {"value": bits}},
        }  # fmt: skip
        os.makedirs(job.folder)
        work.write(drive.Path(job.folder) / work.FILE, record)
        first.tell(record)
        told.append(job.name)
        running.append(first.next())
    second = asks()
    assert sorted(r["name"] for r in second.known()) == sorted(told)
    left = 0
    while (job := second.next()) is not None:
        assert job.name not in told
        left += 1
        second.tell({"name": job.name, "state": "failed"})
    assert 1 <= left <= 12 - len(told)


def test_nothing_computes_while_somebody_times(place):
    script = """
import sys, time
from pathlib import Path
from effc import alone, cache
lock, log, which = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def say(word):
    with log.open("a") as stream:
        stream.write(f"{which} {word}\\n")
store = cache.Cache(lock.parent / "store")
with alone.computing(lock):
    for _ in range(5):
        with store.alone("k"):  # who waits for this lets the other time
            say("computes")
            time.sleep(0.01)
            say("rests")
            if which == "a":
                with alone.timing():
                    say("times")
                    time.sleep(0.03)
                    say("rests")
"""
    (place / "times.py").write_text(script)
    words = [place / "times.py", place / "lock", place / "log"]
    running = [subprocess.Popen([sys.executable, *map(str, words), which]) for which in "ab"]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    lines = (place / "log").read_text().splitlines()
    assert len(lines) == 30 and set(lines[1::2]) == {"a rests", "b rests"}
    assert all(a.split()[0] == b.split()[0] for a, b in zip(lines[::2], lines[1::2], strict=True))


def test_a_trial_that_is_no_recipe_is_refused_before_any_work(write, place):
    with pytest.raises(RecipeError, match="bits"):
        drive.run(write(space={"passes.0.bits": [8, "many"]}), place / "out", drive.Settings())
    assert not (place / "out").exists()


def test_a_folder_of_something_else_is_left_alone(write, place):
    file, out = write(space={"passes.0.bits": [8]}), place / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(PackageError, match="something else"):
        drive.run(file, out, drive.Settings())
    (out / "mine.txt").unlink()
    spec, base = space.read(file)
    with drive._mine(out, spec, base.read_text()), pytest.raises(PackageError, match="at work"):
        drive.run(file, out, drive.Settings())
    with pytest.raises(PackageError, match="another sweep"):
        drive.run(write(space={"passes.0.bits": [4]}), out, drive.Settings())


def test_records_of_another_recipe_are_not_taken(write, place):
    file, out = write(space={"passes.0.bits": [8]}), place / "out"
    spec, base = space.read(file)
    (trial,) = space.grid(spec)
    (out / "trials" / trial.name).mkdir(parents=True)
    mine = drive._job(trial, spec, base, base.read_text(), out, 1)
    other = drive._job(trial, spec, base, yaml.safe_dump({}), out, 1)
    work.write(
        out / "trials" / trial.name / "trial.json", {"key": mine.key, "state": "done", "name": "a"}
    )
    assert drive._record(mine) is not None and drive._record(other) is None
