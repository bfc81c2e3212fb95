"""A device and its cloud, for one arm and seed: rounds of answering, sending up, learning, and taking what comes down.

The device is a store with an int8 engine, and takes every release in a transaction. Of an arm that is `open` it is not:
a delta that was made against anything but what the device holds is refused at its door, so it is played beside a store,
value by value, what such deltas would make of the engine.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import arms as made_of
import models
import numpy as np
import onnx
import spoiled
import world
from cloud import Cloud, Tuned, apart, zipped
from lessons import Lessons

from effc.delta import device, make, uplink

if TYPE_CHECKING:
    from study import Study

Json = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
STREAMS = 5000
"""Where seeds of what devices meet begin, a hundred for each seed of a student."""
CALIBRATED = 6000
DRIFTED = 32
"""Pictures that a device and its cloud are compared on."""
Answers = Callable[[dict[str, Array]], dict[str, Array]]


def feeds_of(scenes: world.Scenes) -> Iterator[dict[str, Array]]:
    for first in range(0, len(scenes), 16):
        part = slice(first, first + 16)
        yield {
            "pictures": models.seen(scenes.pictures[part]).numpy(),
            "queries": scenes.queries[part],
        }


class Unit:
    """`course` is the domain of every round."""

    def __init__(
        self, study: Study, arm: made_of.Arm, course: Sequence[str], seed: int, place: Path
    ) -> None:
        self.study, self.plan, self.arm, self.seed, self.place = study, study.plan, arm, seed, place
        self.course, self.tested = tuple(course), (world.SOURCE, *dict.fromkeys(course))
        lessons = Lessons(arm, study.day(), study.plan.batch, seed)
        self.cloud = Cloud(arm, study.student(seed), study.teacher, lessons, study.plan.steps)
        word = f"base-{study.word}-{seed}-{arm.score}-{arm.keep}-{arm.sent}"
        self.base = study.compiled(self.cloud.answerer, arm, study.state / word, None)
        self.held = self.before = self.base
        self.store = place / "store"
        device.init(self.store, self.base, [study.trusted])
        self.live = device.Live(self.store)
        self.answers: Answers = self.live
        self.engine = device.record_of(self.store).id
        self.queue = uplink.Queue(place / "queue")
        self.queue.opt_in(uplink.Limits(bytes_a_day=64 << 20, bytes_waiting=64 << 20))
        self.releases: list[Path] = []

    def run(self) -> Json:
        tests = {d: self.study.scenes(d) for d in self.tested}
        begun = {d: self.accuracy(s) for d, s in tests.items()}
        far = self._apart()
        rounds, before = [], begun
        for number, domain in enumerate(self.course):
            told = self.round(number)
            after = {d: self.accuracy(s) for d, s in tests.items()}
            rounds.append({
                **told, "domain": domain, "accuracy_before": before[domain]["all"],
                "accuracy_after": after[domain]["all"], "accuracy": after,
                "source_accuracy": after[world.SOURCE]["all"],
            })  # fmt: skip
            before = after
        taken = [] if self.arm.is_open else self.releases
        return {
            "rounds": rounds, "begun": begun, "apart": {"before": far, "after": self._apart()},
            "faults": spoiled.tried(self, taken) if taken else {"injected": 0, "survived": 0, "reasons": {}},
            "mirror_equal": self.arm.is_open or all(r["mirror_equal"] for r in rounds),
        }  # fmt: skip

    def _apart(self) -> Json:
        return apart(self.study.teacher, self.cloud.answerer, self.study.test(self.course[-1]))

    def outputs(self, scenes: world.Scenes) -> dict[str, Array]:
        """What the engine that serves gives for scenes."""
        made = [self.answers(feeds) for feeds in feeds_of(scenes)]
        return {name: np.concatenate([m[name] for m in made]) for name in made[0]}

    def accuracy(self, scenes: world.Scenes) -> dict[str, float]:
        """Of the engine that serves: over all queries, over questions, and over the words of captions."""
        right = self.outputs(scenes)["logits"].argmax(-1) == scenes.answers
        parts = {
            "all": right,
            "questions": right[:, : world.ASKED],
            "captions": right[:, world.ASKED :],
        }
        return {name: float(part.mean()) for name, part in parts.items()}

    def round(self, number: int) -> Json:
        """Device, cloud, device; gives bytes of both ways and what happened."""
        domain = self.course[number]
        scenes = world.drawn(
            world.DOMAINS[domain], self.plan.stream, STREAMS + 100 * self.seed + number
        )
        up = self.up(scenes)
        tuned = self.cloud.train(self.study.test(domain))
        new = self.study.compiled(
            self.cloud.answerer, self.arm, self.place / f"new{number}", self.base
        )
        began = time.process_time()
        made, mirror = self.down(new, number)
        return {
            **up, "bytes_down": 0 if self.arm.alone else len(made.content),
            "full_bytes": made.numbers["full_bytes"], "left": made.numbers["error"],
            "encodings": made.numbers["encodings"], "make_s": round(time.process_time() - began, 2),
            "mirror_equal": self.is_mirrored(mirror, domain), "drift": self.drift(new, domain), **_of(tuned),
        }  # fmt: skip

    # down

    def down(self, new: Path, number: int) -> tuple[make.Made, Path]:
        """Make the release of a round and have the device take it; gives what the cloud thinks that it holds then."""
        arm, mirror = self.arm, self.place / f"held{number}"
        weighted = arm.weighted and arm.budget and len(self.cloud.lessons)
        made = make.make(
            self.before if arm.is_open else self.held, new, key=self.study.key, counter=number + 1,
            budget=arm.budget or None, inputs=_probe(), mirror=mirror, encodings=arm.encodings or None,
            importance=self.cloud.importance(new) if weighted else None,
        )  # fmt: skip
        if arm.is_open:
            added(self.held, self.before, mirror, self.place / f"open{number}")
            self.held, self.before = self.place / f"open{number}", new
            (engine,) = device.manifest_of(self.held)["engines"]
            self.answers = device.session(self.held, engine)
            return made, new
        file = self.place / f"{number}.effd"
        file.write_bytes(made.content)
        self.live.update(file)
        device.confirm(self.store)
        self.engine = device.record_of(self.store).id
        self.releases.append(file)
        self.held = mirror
        return made, mirror

    def is_mirrored(self, mirror: Path, domain: str) -> bool:
        """Whether the device holds what the cloud thinks that it holds, to the byte, and answers the same."""
        slot = self.store / "slots" / device.record_of(self.store).slot
        root = self.held if self.arm.is_open else slot
        names = device.manifest_of(mirror)["files"]
        same = all((root / n).read_bytes() == (mirror / n).read_bytes() for n in names)
        feeds = next(feeds_of(world.drawn(world.DOMAINS[domain], 4, 77)))
        (engine,) = device.manifest_of(mirror)["engines"]
        own, theirs = self.answers(feeds), device.session(mirror, engine)(feeds)
        return same and all(np.array_equal(own[n], theirs[n]) for n in own)

    def drift(self, new: Path, domain: str) -> float:
        """How far the device's logits are from those of the engine that the cloud compiled, relative L2."""
        (engine,) = device.manifest_of(new)["engines"]
        run, off, size = device.session(new, engine), 0.0, 0.0
        for feeds in feeds_of(world.drawn(world.DOMAINS[domain], DRIFTED, 79)):
            own, wanted = (answers(feeds)["logits"] for answers in (self.answers, run))
            off += float(np.square(own - wanted).sum())
            size += float(np.square(wanted).sum())
        return float((off / size) ** 0.5)

    # up

    def up(self, scenes: world.Scenes) -> Json:
        """What the device sends of a stream."""
        day = world.drawn(world.DOMAINS[world.SOURCE], self.plan.calibrated, CALIBRATED)
        threshold = uplink.calibrate(
            self.outputs(day)["uts_sample_score"],
            self.plan.share,
            score="doubt",
            engine=self.engine,
        )
        file = self.place / "threshold.json"
        uplink.write_threshold(threshold, file)
        found = self.outputs(scenes)
        chosen = uplink.read_threshold(file, engine=self.engine).takes(found["uts_sample_score"])
        jpeg = [world.jpeg_bytes(picture) for picture in scenes.pictures]
        told: Json = {"taken": int(chosen.sum()), "of": len(chosen), "jpeg_bytes": sum(jpeg),
                      "least_jpeg": min(jpeg), "threshold": threshold.value, "bytes_up": 0, "refused": 0}  # fmt: skip
        index, tokens = found["uts_index"], found["uts_tokens"]
        if self.arm.every or self.arm.alone:
            known = self.study.seen([scenes])
            self.cloud.lessons.truths.append(known)
            index = np.tile(np.arange(world.PLACES), (len(scenes), 1))
            tokens = known.tokens.numpy()
        if self.arm.truth:  # for comparison: nothing is chosen, and all is known
            chosen = np.ones_like(chosen)
        if self.arm.alone or not chosen.any():
            return told
        who = {**self.study.who, "engine": self.engine}
        kept = uplink.Tokens(
            length=world.PLACES, index=index[chosen], tokens=tokens[chosen],
            score=found["uts_sample_score"][chosen], beside={"queries": scenes.queries[chosen]},
        )  # fmt: skip
        self.queue.put(uplink.pack(kept, who))
        received: list[bytes] = []
        self.queue.send(received.append)
        self.cloud.lessons.received += [uplink.read(content, who) for content in received]
        told["bytes_up"] = sum(map(len, received))
        return {**told, "refused": spoiled.refused(received[0], who)}


def _of(tuned: Tuned | None) -> Json:
    """What a training took, and in 16 bits what else could have been sent of it, as it is and through zlib."""
    if tuned is None:
        return {"cloud_s": 0.0, "curve": [], "trained_fp16_bytes": 0, "trained_zlib_bytes": 0}
    return {
        "cloud_s": tuned.cpu_s, "curve": tuned.curve, "trained_fp16_bytes": len(tuned.trained_fp16),
        "trained_zlib_bytes": zipped(tuned.trained_fp16),
    }  # fmt: skip


def _probe() -> dict[str, Array]:
    """A picture of plain places and some queries, for tests that travel with a release and should be small."""
    draw = np.random.default_rng(3)
    plain = draw.integers(-2, 3, (1, 3, world.GRID, world.GRID)).astype(np.float32)
    pictures = plain.repeat(world.CELL, 2).repeat(world.CELL, 3)
    return {"pictures": pictures, "queries": world.drawn(world.DOMAINS[world.SOURCE], 1, 4).queries}


def added(held: Path, old: Path, new: Path, out: Path) -> None:
    """In `out` a package that is `held` and the change from `old` to `new` of every weight; integers stay in range."""
    shutil.copytree(held, out)
    mine, before, after = (onnx.load(root / "model.onnx") for root in (held, old, new))
    known = [{t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer} for m in (before, after)]  # fmt: skip
    for tensor in mine.graph.initializer:
        first, last = (each[tensor.name] for each in known)
        if first.tobytes() == last.tobytes():
            continue
        own = onnx.numpy_helper.to_array(tensor)
        made = own.astype(np.float64) + last.astype(np.float64) - first.astype(np.float64)
        if np.issubdtype(own.dtype, np.integer):
            limits = np.iinfo(own.dtype)
            made = np.clip(made, limits.min, limits.max)
        tensor.CopyFrom(onnx.numpy_helper.from_array(made.astype(own.dtype), tensor.name))
    onnx.save(mine, out / "model.onnx")
