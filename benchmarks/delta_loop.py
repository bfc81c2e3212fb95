"""A device and its cloud as processes over a slow line that breaks: how long every stage of a round takes, both ways.

    python benchmarks/delta_loop.py [--state DIR] [--rounds N] [--smoke]   # 8 min; writes results/delta_loop.json

World, models and training are those of examples/cloud_device, in little: its plan `fast`, the arm `akd` by `dusk`. The
cloud trains, compiles and makes releases in a process of its own, beside `effc delta serve --uplink`; the device, which
has no torch, answers a stream of pictures, queues the tokens that it is unsure of, pushes them, asks for a release and
takes it. Between them lies the line of `delta_link.py`, as slow and as bad both ways. While a release is fetched and
taken the device answers a picture every 50 ms, and has done so for some seconds before, when the cloud is done: what
answers wait for is that of one machine. Stages are of the wall. Ends with 1 where a call failed, or the device did not
hold what the cloud thought.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import delta_link
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "cloud_device"))

Json = dict[str, Any]
ROUNDS = 5
ARM, DOMAIN, SEED = "akd", "dusk", 0
STREAMS, DAY, TESTED = 8000, 8500, 9000
"""Seeds of what is drawn: streams by their round, pictures to calibrate with, and test pictures."""
EVERY_S = 0.05
BATCH = 16
LOOKS_S = 0.25
"""Between two looks for a release, or for what came up."""
PATIENCE_S = 900
ON_DEVICE = ("answer", "calibrate", "pack", "up", "wait", "fetch", "take")
IN_CLOUD = ("train", "compile", "weigh", "make")


# the cloud


def cloud(state: Path, place: Path, kind: str, count: int) -> None:
    """Provide a store, say so, and make a release of all that came up, as often as asked; seconds go into a file."""
    import arms
    import unit
    from cloud import Cloud
    from lessons import Lessons
    from plans import PLANS
    from study import Study

    from effc.delta import device as store_of
    from effc.delta import make, uplink
    from effc.delta.inbox import Inbox

    plan, arm = PLANS[kind], arms.EVERY[ARM]
    study = Study(plan, state)
    lessons = Lessons(arm, study.day(), plan.batch, SEED)
    mind = Cloud(arm, study.student(SEED), study.teacher, lessons, plan.steps)
    base = held = study.compiled(mind.answerer, arm, state / f"base-{study.word}-loop", None)
    who = {**study.who, "engine": store_of.init(place / "store", base, [study.trusted]).id}
    inbox, releases, test = Inbox(place / "inbox"), place / "releases", study.test(DOMAIN)
    inbox.expect(who)
    releases.mkdir()
    given = {name: getattr(plan, name) for name in ("stream", "calibrated", "share", "test")}
    (place / "given.json").write_text(json.dumps({"who": who, **given}))
    print("ready", flush=True)
    rows: list[Json] = []
    for number in range(1, count + 1):
        while not inbox.waiting():
            time.sleep(LOOKS_S)
        clock = Clock()
        for file in inbox.waiting():
            lessons.received.append(uplink.read(file.read_bytes(), who))
            file.unlink()
        mind.train(test)
        clock.lap("train")
        new = study.compiled(mind.answerer, arm, place / f"new{number}", base)
        clock.lap("compile")
        matters = mind.importance(new)
        clock.lap("weigh")
        mirror = place / f"held{number}"
        made = make.make(
            held, new, key=study.key, counter=number, budget=arm.budget, inputs=unit._probe(),
            mirror=mirror, importance=matters,
        )  # fmt: skip
        clock.lap("make")
        held, who = mirror, {**who, "engine": made.packet.target}
        inbox.expect(who)
        (releases / f"{number}.part").write_bytes(made.content)
        (releases / f"{number}.part").rename(releases / f"{number}.effd")
        rows.append({**clock.laps, "bytes_down": len(made.content), "id": made.packet.target})
    (place / "cloud.json").write_text(json.dumps(rows))


class Clock:
    """Seconds of the wall between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._began = now - self._began, now


# the device


def device(place: Path, url: str, count: int) -> Json:
    """Answer, send up and take what comes down, as often as asked."""
    import world

    from effc.delta import device as store_of
    from effc.delta import push, uplink

    store, given = place / "store", json.loads((place / "given.json").read_text())
    who, live = given["who"], store_of.Live(store)
    queue = uplink.Queue(place / "queue")
    queue.opt_in(uplink.Limits(bytes_a_day=64 << 20, bytes_waiting=64 << 20))
    day = world.drawn(world.DOMAINS[world.SOURCE], given["calibrated"], DAY)
    test = world.drawn(world.DOMAINS[DOMAIN], given["test"], TESTED)
    (one, *_) = feeds_of(world.drawn(world.DOMAINS[DOMAIN], 1, TESTED))
    begun, rows = accuracy(live, test), []
    for number in range(count):
        scenes = world.drawn(world.DOMAINS[DOMAIN], given["stream"], STREAMS + number)
        engine = store_of.record_of(store).id
        clock = Clock()
        found = outputs(live, scenes)
        clock.lap("answer")
        sure = outputs(live, day)["uts_sample_score"]
        threshold = uplink.calibrate(sure, given["share"], score="doubt", engine=engine)
        clock.lap("calibrate")
        scores = found["uts_sample_score"]
        chosen = threshold.takes(scores) | (scores == scores.max())  # one at least, for a round
        kept = uplink.Tokens(
            length=world.PLACES, index=found["uts_index"][chosen], tokens=found["uts_tokens"][chosen],
            score=scores[chosen], beside={"queries": scenes.queries[chosen]},
        )  # fmt: skip
        packed = uplink.pack(kept, {**who, "engine": engine})
        assert queue.put(packed)
        clock.lap("pack")
        sent = push.push(url, queue)
        assert (sent.taken, sent.refused) == (1, ()), sent
        clock.lap("up")
        _wait_for_release(url, store_of.record_of(store))
        clock.lap("wait")
        row = delta_link.updated(live, store, one, url, EVERY_S)
        rows.append({**clock.laps, **row, "bytes_up": len(packed), "samples": int(chosen.sum())})
    return {
        "rounds": rows, "accuracy": [begun, accuracy(live, test)], "has_torch": "torch" in sys.modules,
    }  # fmt: skip


def feeds_of(scenes: Any) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Pictures as the encoder takes them, around 0, and what is asked of them."""
    for first in range(0, len(scenes), BATCH):
        part = slice(first, first + BATCH)
        pictures = scenes.pictures[part].transpose(0, 3, 1, 2).astype(np.float32) / 64 - 2
        yield {"pictures": pictures, "queries": scenes.queries[part]}


def outputs(live: Any, scenes: Any) -> dict[str, np.ndarray[Any, Any]]:
    made = [live(feeds) for feeds in feeds_of(scenes)]
    return {name: np.concatenate([m[name] for m in made]) for name in made[0]}


def accuracy(live: Any, scenes: Any) -> float:
    return float((outputs(live, scenes)["logits"].argmax(-1) == scenes.answers).mean())


def _wait_for_release(url: str, record: Any) -> None:
    """Ask whether there is a release behind what serves, until there is one."""
    import urllib3

    pool = urllib3.PoolManager(retries=False, timeout=10)
    for _ in range(int(PATIENCE_S / LOOKS_S)):
        try:
            asked = f"{url}/{record.id}.effd?above={record.highest}"
            if pool.request("HEAD", asked).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            pass  # the line broke
        time.sleep(LOOKS_S)
    raise SystemExit("no release came")


# both, and the line between them


def over(state: Path, place: Path, kind: str, mbit: float, count: int) -> Json:
    """Rounds over one line."""
    me = Path(__file__)
    with (
        (place / "line.txt").open("w", encoding="utf-8") as broken,
        delta_link.process(
            me, "--cloud", state, place, "--plan", kind, "--rounds", count
        ) as teacher,
    ):
        _line_of(teacher, "ready")
        words = ("-m", "effc", "delta", "serve", place / "releases", "--uplink", place / "inbox")
        with delta_link.process(*words, "--port", 0) as server:
            port = int(_line_of(server, "http://").partition(",")[0].rpartition(":")[2])
            link = (delta_link.__file__, "--line", port, "--mbit", mbit)
            with delta_link.process(*link, err=broken) as carrier:
                url = f"http://127.0.0.1:{int(_line_of(carrier, ''))}"
                asked = [sys.executable, me, "--device", place, url, "--rounds", count]
                told = subprocess.run([*map(str, asked)], stdout=subprocess.PIPE, check=True)
            teacher.wait(PATIENCE_S)
    found = json.loads(told.stdout)
    both = zip(found["rounds"], json.loads((place / "cloud.json").read_text()), strict=True)
    lost = (place / "line.txt").read_text(encoding="utf-8").count("broken")
    return {
        "mbit": mbit, **summed([{**own, **its, "is_mirror": own["id"] == its["id"]} for own, its in both]),
        "broken": lost, "accuracy": found["accuracy"], "has_torch": found["has_torch"],
    }  # fmt: skip


def _line_of(process: subprocess.Popen[str], word: str) -> str:
    """The first line of a process with that in it."""
    assert process.stdout is not None
    for text in process.stdout:
        if word in text:
            return text
    raise SystemExit(f"a process ended before it said {word!r}")


def summed(rows: list[Json]) -> Json:
    """Medians over rounds; `round` is of whole rounds."""
    for row in rows:
        row["round"] = sum(row[name] for name in ON_DEVICE)
    sizes = delta_link.medians(rows, ("bytes_up", "bytes_down", "samples"))
    return {
        "rounds": len(rows), **{name: int(value) for name, value in sizes.items()},
        "seconds": delta_link.medians(rows, (*ON_DEVICE, *IN_CLOUD, "round")),
        "mirror_equal": all(row["is_mirror"] for row in rows), **delta_link.waits(rows),
    }  # fmt: skip


def missed(lines: list[Json]) -> list[str]:
    """What does not hold, in words; that of waiting only where rounds are enough for an interval."""
    found = []
    for each in lines:
        where = f"at {each['mbit']:g} Mbit/s"
        if not each["mirror_equal"]:
            found.append(f"{where}: the device holds something else than its cloud thinks")
        if each["failed_calls"]:
            found.append(f"{where}: {each['failed_calls']} calls failed")
        if each["has_torch"]:
            found.append(f"{where}: the device has torch")
        if each["rounds"] > 2 and not each["p99_ratio"]["high"] <= delta_link.MOST_RATIO:
            found.append(f"{where}: p99 up to {each['p99_ratio']['high']:.2f} times idle")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, help="where trained models are kept")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--smoke", action="store_true", help="one round of a few steps, no result")
    parser.add_argument("--plan", default="fast", help=argparse.SUPPRESS)
    parser.add_argument("--cloud", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cloud is not None:
        cloud(*args.cloud, args.plan, args.rounds)
        return 0
    if args.device is not None:
        print(json.dumps(device(Path(args.device[0]), args.device[1], args.rounds)))
        return 0
    lines = []
    with tempfile.TemporaryDirectory(prefix="effc-loop-") as scratch:
        state = args.state or Path(scratch) / "state"
        for mbit in delta_link.SPEEDS[1:] if args.smoke else delta_link.SPEEDS:
            (place := Path(scratch) / f"{mbit:g}").mkdir()
            kind, count = ("smoke", 1) if args.smoke else ("fast", args.rounds)
            lines.append(over(state, place, kind, mbit, count))
            print(json.dumps(lines[-1]), flush=True)
    if not args.smoke:
        told = {
            "loss": delta_link.LOSS,
            "piece": delta_link.PIECE,
            "every_s": EVERY_S,
            "lines": lines,
        }
        import common  # torch with it, which no device has

        print(common.write("delta_loop", {"name": "delta_loop", **told}))
    for text in (texts := missed(lines)):
        print(f"MISSED: {text}")
    return 1 if texts else 0


if __name__ == "__main__":
    sys.exit(main())
