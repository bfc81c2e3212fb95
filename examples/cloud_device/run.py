"""A model on a device is kept fresh: it sends up what it is unsure of, a larger one teaches it, and a delta comes down.

    python examples/cloud_device/run.py [--smoke | --fast] [--json FILE]     # minutes
    python examples/cloud_device/run.py --state DIR [--arms …] [--seeds N]    # hours, in units that can be stopped

The device runs an int8 engine of effc from a store; every accuracy here is that engine's. `world.py` draws pictures
and questions, `models.py` trains encoder, student and teacher, `arms.py` says what is compared. One round: the engine
answers a stream of pictures of a domain that it was not trained for; of those above a calibrated threshold it queues
the tokens of the highest scores; the cloud trains adapters of the student on them towards the teacher, compiles with
frozen calibration, and sends a signed delta of bounded size, which the device takes in a transaction.

Units (arm × domain × seed) that are finished lie in `--state` and are not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import arms as made_of  # noqa: E402
import models  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import world  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from effc.delta import device, make, packet, uplink  # noqa: E402
from effc.errors import DeltaError  # noqa: E402

Json = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
SHOWN, WHOLE = "akd", "labels"
RANK = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is drawn, trained and tested, and which arms."""

    crowded: int
    """Pictures that the encoder is trained on, and how often."""
    epochs: float
    day: int
    """Pictures of the source domain that the student is trained on, and of every domain for the teacher."""
    passes: int
    stream: int
    """Pictures that a device meets in a round."""
    test: int
    rounds: int = 3
    steps: int = 150
    batch: int = 32
    share: float = 0.2
    """Of pictures by day that may be above the threshold."""
    calibrated: int = 100
    seeds: int = 5
    arms: tuple[str, ...] = tuple(made_of.ARMS)
    domains: tuple[str, ...] = ("dusk", "ink", "frost")


PLANS = {
    "smoke": Plan(
        crowded=32, epochs=2, day=32, passes=128, stream=16, test=8, rounds=1, steps=2, batch=8, seeds=1,
        calibrated=20, arms=(SHOWN, WHOLE), domains=("dusk",),
    ),
    "fast": Plan(
        crowded=1500, epochs=3, day=600, passes=30000, stream=100, test=80, rounds=2, steps=100, seeds=1,
        calibrated=60, arms=(SHOWN, WHOLE, "energy", "mcdrop", "random"), domains=("dusk",),
    ),
    "full": Plan(crowded=3000, epochs=4, day=1500, passes=60000, stream=200, test=250),
}  # fmt: skip


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Known:
    """Tokens of scenes, and their queries and answers."""

    tokens: torch.Tensor
    queries: torch.Tensor
    answers: torch.Tensor
    shapes: torch.Tensor

    def told(self) -> dict[str, torch.Tensor]:
        return {"queries": self.queries, "answers": self.answers, "shapes": self.shapes}


class Study:
    """One encoder and one teacher, a student a seed, and the units that are measured."""

    def __init__(self, plan: Plan, state: Path) -> None:
        self.plan, self.state = plan, state
        state.mkdir(parents=True, exist_ok=True)
        kept = ("crowded", "epochs", "day", "passes")
        self.word = digest({k: v for k, v in dataclasses.asdict(plan).items() if k in kept})[:12]
        self.key = state / "release.key"
        if not self.key.exists():
            packet.keygen(self.key, self.key.with_suffix(".pub"))
        self.trusted = packet.public_word(self.key.with_suffix(".pub"))
        self.encoder = models.Encoder()
        self._trained("encoder", self.encoder, lambda: models.encoder(plan.crowded, plan.epochs))
        self.teacher = models.Answerer(*models.TEACHER)
        self._trained("teacher", self.teacher, self._teacher)
        self.who = {
            "encoder": digest_of(self.encoder.state_dict()),
            "tokenizer": digest([world.KINDS, world.SHAPES, world.COLOURS]),
        }

    def _trained(self, name: str, module: torch.nn.Module, train: Any) -> None:
        """Weights from the state, or trained and put there."""
        file = self.state / f"{name}-{self.word}.safetensors"
        if not file.exists():
            began = time.perf_counter()
            made = train()
            save_file({n: t.contiguous() for n, t in made.state_dict().items()}, f"{file}.part")
            Path(f"{file}.part").rename(file)
            print(f"{name}: trained in {time.perf_counter() - began:.0f} s", flush=True)
        module.load_state_dict(load_file(file))
        module.eval()

    def known(self, domains: tuple[str, ...], count: int, seed: int) -> Known:
        """What the encoder makes of scenes."""
        drawn = [world.drawn(world.DOMAINS[d], count, seed + i) for i, d in enumerate(domains)]
        parts = {
            name: torch.from_numpy(np.concatenate([getattr(s, name) for s in drawn]))
            for name in ("queries", "answers", "shapes")
        }  # fmt: skip
        tokens = [models.tokens_of(self.encoder, s.pictures) for s in drawn]
        return Known(tokens=torch.cat(tokens), **parts)

    def _teacher(self) -> models.Answerer:
        known = self.known(tuple(world.DOMAINS), self.plan.day, 1000)
        return models.answerer(
            models.TEACHER, known.tokens, known.told(), passes=2 * self.plan.passes, seed=1
        )

    def student(self, seed: int) -> models.Answerer:
        made = models.Answerer(*models.STUDENT)
        known = self.day()

        def train() -> models.Answerer:
            return models.answerer(
                models.STUDENT, known.tokens, known.told(), passes=self.plan.passes, seed=100 + seed
            )

        self._trained(f"student{seed}", made, train)
        return made

    def day(self) -> Known:
        if not hasattr(self, "_day"):
            self._day = self.known((world.SOURCE,), self.plan.day, 2000)
        return self._day

    # engines

    def compiled(
        self, answerer: models.Answerer, arm: made_of.Arm, out: Path, frozen: Path | None
    ) -> Path:
        """A package of the student with that answerer; calibrated by day, or as `frozen` was."""
        import effc
        from effc import recipe

        if (out / device.MANIFEST).exists():
            return out
        weights = out.with_name(f"{out.name}.safetensors")
        student = models.Student(self.encoder, answerer)
        save_file({n: t.contiguous() for n, t in student.state_dict().items()}, weights)
        scored: Json = {
            "pass": "uncertain-tokens", "at": "encoder.bridge", "score": arm.score, "keep": arm.keep,
            "ratio": models.SENT / world.PLACES, "logits": "logits", "dropout": 0.5,
        }  # fmt: skip
        if arm.score == "mcdrop":
            scored["inside"] = f"encoder.blocks.{models.BLOCKS - 1}"
        asked = recipe.build({
            "source": {"python": f"{HERE / 'models.py'}:device", "options": {"weights": str(weights)}},
 "passes": [{"pass": "quantize"}, scored], "bench": False, "gate": False,
        })  # fmt: skip
        decisions = json.loads((frozen / "decisions.json").read_text()) if frozen else None
        effc.compile(asked, out, decisions=decisions)
        weights.unlink()
        return out

    # a unit

    def units(self) -> dict[str, dict[str, list[Json]]]:
        """Results by domain and arm, one a seed; those of this very plan that are there already as they are."""
        found: dict[str, dict[str, list[Json]]] = {}
        free = ("seeds", "arms", "domains")
        plan = {k: v for k, v in dataclasses.asdict(self.plan).items() if k not in free}
        for domain in self.plan.domains:
            for seed in range(self.plan.seeds):
                for name in self.plan.arms:
                    arm = made_of.ARMS[name]
                    word = digest([plan, dataclasses.asdict(arm)])[:12]
                    file = self.state / f"{name.replace(' ', '-')}-{domain}-{seed}-{word}.json"
                    if not file.exists():
                        began = time.perf_counter()
                        with tempfile.TemporaryDirectory(prefix="effc-") as place:
                            unit = Unit(self, arm, domain, seed, Path(place))
                            made = unit.run()
                        made["wall_s"] = time.perf_counter() - began
                        file.with_suffix(".part").write_text(json.dumps(made), encoding="utf-8")
                        file.with_suffix(".part").rename(file)
                        last = made["rounds"][-1]
                        print(
                            f"{name}, {domain}, seed {seed}: {made['rounds'][0]['accuracy_before']:.3f} → "
                            f"{last['accuracy_after']:.3f}, {made['wall_s']:.0f} s", flush=True,
                        )  # fmt: skip
                    told = json.loads(file.read_text(encoding="utf-8"))
                    found.setdefault(domain, {}).setdefault(name, []).append(told)
        return found


class Unit:
    """A device and its cloud, for one arm, domain and seed."""

    def __init__(self, study: Study, arm: made_of.Arm, domain: str, seed: int, place: Path) -> None:
        self.study, self.plan, self.arm, self.seed, self.place = study, study.plan, arm, seed, place
        self.domain = world.DOMAINS[domain]
        self.answerer = study.student(seed)
        word = f"base-{study.word}-{seed}-{arm.score}-{arm.keep}"
        self.held = self.base = study.compiled(self.answerer, arm, study.state / word, None)
        self.store = place / "store"
        device.init(self.store, self.base, [study.trusted])
        self.live = device.Live(self.store)
        self.queue = uplink.Queue(place / "queue")
        self.queue.opt_in(uplink.Limits(bytes_a_day=64 << 20, bytes_waiting=64 << 20))
        self.releases: list[Path] = []
        self.lessons: list[uplink.Tokens] = []
        self.truths: list[Known] = []

    def run(self) -> Json:
        plan = self.plan
        tests = {
            d: world.drawn(world.DOMAINS[d], plan.test, 9000) for d in (self.domain.name, world.SOURCE)
        }  # fmt: skip
        begun = {d: self.accuracy(s) for d, s in tests.items()}
        rounds, before = [], begun
        for number in range(plan.rounds):
            told = self.round(number)
            after = {d: self.accuracy(s) for d, s in tests.items()}
            rounds.append({
                **told, "accuracy_before": before[self.domain.name]["all"],
                "accuracy_after": after[self.domain.name]["all"], "tasks": after[self.domain.name],
                "source_accuracy": after[world.SOURCE]["all"],
            })  # fmt: skip
            before = after
        faults = self.faults()
        return {
            "rounds": rounds, "begun": begun, "faults": faults,
            "mirror_equal": all(r["mirror_equal"] for r in rounds),
        }  # fmt: skip

    def feeds(self, scenes: world.Scenes) -> Iterator[tuple[slice, dict[str, Array]]]:
        for first in range(0, len(scenes), 16):
            part = slice(first, first + 16)
            pictures = models.seen(scenes.pictures[part]).numpy()
            yield part, {"pictures": pictures, "queries": scenes.queries[part]}

    def outputs(self, scenes: world.Scenes) -> dict[str, Array]:
        """What the engine that serves gives for scenes."""
        made = [self.live(feeds) for _, feeds in self.feeds(scenes)]
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
        scenes = world.drawn(self.domain, self.plan.stream, 5000 + 100 * self.seed + number)
        up = self.up(scenes)
        began = time.perf_counter()
        tuned = self.adapted()
        seconds = time.perf_counter() - began
        if tuned:
            self.answerer.load_state_dict(tuned)
        new = self.study.compiled(self.answerer, self.arm, self.place / f"new{number}", self.base)
        mirror, file = self.place / f"held{number}", self.place / f"{number}.effd"
        made = make.make(
            self.held, new, key=self.study.key, counter=number + 1, mirror=mirror,
            budget=self.arm.budget or None, inputs=_probe(),
        )  # fmt: skip
        file.write_bytes(made.content)
        self.live.update(file)
        device.confirm(self.store)
        self.held = mirror
        self.releases.append(file)
        return {
            **up, "bytes_down": file.stat().st_size, "full_bytes": made.numbers["full_bytes"],
            "left": made.numbers["error"], "encodings": made.numbers["encodings"],
            "mirror_equal": self.is_mirrored(mirror), "cloud_s": seconds,
            **_adapter_bytes(tuned),
        }  # fmt: skip

    def is_mirrored(self, mirror: Path) -> bool:
        """Whether the device holds what the cloud thinks that it holds, to the byte, and answers the same."""
        record = device.record_of(self.store)
        slot = self.store / "slots" / record.slot
        names = device.manifest_of(slot)["files"]
        same = all((slot / n).read_bytes() == (mirror / n).read_bytes() for n in names)
        scenes = world.drawn(self.domain, 4, 77)
        (_, feeds), *_ = self.feeds(scenes)
        (engine,) = device.manifest_of(mirror)["engines"]
        own, theirs = self.live(feeds), device.session(mirror, engine)(feeds)
        return same and all(np.array_equal(own[n], theirs[n]) for n in own)

    def up(self, scenes: world.Scenes) -> Json:
        """What the device sends of a stream."""
        engine = device.record_of(self.store).id
        who = {**self.study.who, "engine": engine}
        day = world.drawn(world.DOMAINS[world.SOURCE], self.plan.calibrated, 6000)
        threshold = uplink.calibrate(
            self.outputs(day)["uts_sample_score"], self.plan.share, score="doubt", engine=engine
        )
        file = self.place / "threshold.json"
        uplink.write_threshold(threshold, file)
        found = self.outputs(scenes)
        chosen = uplink.read_threshold(file, engine=engine).takes(found["uts_sample_score"])
        jpeg = [world.jpeg_bytes(picture) for picture in scenes.pictures]
        told: Json = {"taken": int(chosen.sum()), "of": len(chosen), "jpeg_bytes": sum(jpeg),
                      "least_jpeg": min(jpeg), "threshold": threshold.value}  # fmt: skip
        if self.arm.every:  # for comparison: nothing is chosen, and all is known
            tokens = models.tokens_of(self.study.encoder, scenes.pictures)
            parts = {n: torch.from_numpy(getattr(scenes, n)) for n in ("queries", "answers", "shapes")}  # fmt: skip
            known = Known(tokens=tokens, **parts)
            self.truths.append(known)
            index = np.tile(np.arange(world.PLACES), (len(scenes), 1))
            kept = uplink.Tokens(
                length=world.PLACES, index=index, tokens=tokens.numpy(), score=found["uts_sample_score"],
                beside={"queries": scenes.queries},
            )  # fmt: skip
        else:
            if not chosen.any():
                return {**told, "bytes_up": 0}
            kept = uplink.Tokens(
                length=world.PLACES, index=found["uts_index"][chosen], tokens=found["uts_tokens"][chosen],
                score=found["uts_sample_score"][chosen], beside={"queries": scenes.queries[chosen]},
            )  # fmt: skip
        self.queue.put(uplink.pack(kept, who))
        received: list[bytes] = []
        self.queue.send(received.append)
        self.lessons += [uplink.read(content, who) for content in received]
        return {**told, "bytes_up": sum(map(len, received)), "refused": _refusals(received[0], who)}

    # the cloud

    def adapted(self) -> dict[str, torch.Tensor]:
        """Tensors of the answerer after training on all that came up so far."""
        import effc
        from effc.ir.edit import rebind
        from effc.ir.splice import attached
        from effc.passes.lora import AttachLora, MergeLora
        from effc.train import akd
        from effc.train.anchor import Anchor
        from effc.train.graph import InGraph
        from effc.train.loop import Schedule, fit

        plan, arm = self.plan, self.arm
        if not self.lessons:
            return {}
        day = self.study.day()
        example = {"tokens": day.tokens[:2], "queries": day.queries[:2]}
        example |= {"sent": torch.ones(2, world.PLACES)}
        program = effc.trace(self.answerer, example, dims={n: {0: "batch"} for n in example})
        graph = program.only()
        own = set(graph.tensors())
        if arm.truth:
            names = [
                n for n in own if isinstance(graph.exported.state_dict.get(n), torch.nn.Parameter)
            ]
        else:
            effc.apply(AttachLora(rank=RANK, output=True, seed=self.seed), program)
            names = [*attached(graph), *(n for n in own if "norm" in n or n.endswith("bias"))]
        small, large = models.STUDENT[0], models.TEACHER[0]
        taught = akd.Taught(
            InGraph(graph, names),
            {"image": (small, large), "last": (small, large)} if arm.how.features else {},
        )
        schedule = Schedule(steps=plan.steps, lr=arm.lr, seed=self.seed)
        courses = [Anchor(weight=arm.anchor).begin(graph, plan.steps, schedule.rate)] if arm.anchor else []  # fmt: skip
        how = akd.Distillation(answers=0.0, replay=1.0) if arm.truth else arm.how
        fit(
            taught, akd.loss(how, self.taught_by), self.truth if arm.truth else self.lesson, schedule,
            courses=courses, precision="bf16",
        )  # fmt: skip
        for name, tensor in taught.student.tensors().items():
            rebind(graph, name, tensor, "tuned")
        if not arm.truth:
            effc.apply(MergeLora(), program)
        held = self.answerer.state_dict()  # a graph has constants of its own beside these
        return {n: t.detach().clone() for n, t in graph.tensors().items() if n in held}

    def taught_by(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.arm.teacher != "own":  # answers to the same queries of another picture
            feeds = {
                **feeds,
                "tokens": feeds["tokens"].roll(1, 0),
                "sent": feeds["sent"].roll(1, 0),
            }
        found: dict[str, torch.Tensor] = self.study.teacher(**feeds)
        return found

    def _rows(self, step: int, count: int, of: int) -> Array:
        return np.random.default_rng([23, self.seed, step, of]).integers(0, count, self.plan.batch)

    def _replayed(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        day = self.study.day()
        rows = self._rows(step, len(day.tokens), 1)
        sent = torch.ones(len(rows), world.PLACES)
        feeds = {"tokens": day.tokens[rows], "queries": day.queries[rows], "sent": sent}
        return feeds, day.answers[rows]

    def lesson(self, step: int) -> Any:
        from effc.train.akd import Lesson

        wide = [each.spread() for each in self.lessons]
        tokens, sent = (np.concatenate(side) for side in zip(*wide, strict=True))
        queries = np.concatenate([each.beside["queries"] for each in self.lessons])
        rows = self._rows(step, len(tokens), 0)
        real = torch.from_numpy(sent[rows])
        feeds = {
            "tokens": torch.from_numpy(tokens[rows]), "queries": torch.from_numpy(queries[rows]),
            "sent": real.float(),
        }  # fmt: skip
        replay, labels = self._replayed(step)
        return Lesson(feeds=feeds, real=real, replay=replay, labels=labels)

    def truth(self, step: int) -> Any:
        from effc.train.akd import Lesson

        tokens, queries, answers = (
            torch.cat([getattr(k, n) for k in self.truths]) for n in ("tokens", "queries", "answers")
        )  # fmt: skip
        rows = self._rows(step, len(tokens), 0)
        replay, labels = self._replayed(step)
        feeds = {
            "tokens": torch.cat([tokens[rows], replay["tokens"]]),
            "queries": torch.cat([queries[rows], replay["queries"]]),
            "sent": torch.cat([replay["sent"], replay["sent"]]),
        }
        return Lesson(feeds=feeds, replay=feeds, labels=torch.cat([answers[rows], labels]))

    # faults

    def faults(self) -> Json:
        """Spoiled releases at the device's door: each must be refused, and the engine must answer as before."""
        last = self.releases[-1].read_bytes()
        other, other_key = self.place / "other.effd", self.place / "other.key"
        packet.keygen(other_key, other_key.with_suffix(".pub"))
        spoiled = {
            "flipped bit": bytes([*last[:99], last[99] ^ 4, *last[100:]]),
            "truncated": last[: len(last) // 2],
            "signed by another": packet.written(packet.parsed(last), packet.private_key(other_key)),
            "wrong base": packet.written(
                dataclasses.replace(packet.parsed(last), counter=99, base="0" * 64, target="1" * 64),
                packet.private_key(self.study.key),
            ),
            "older release": packet.written(
                dataclasses.replace(packet.parsed(last), counter=1, target="1" * 64),
                packet.private_key(self.study.key),
            ),
        }  # fmt: skip
        scenes = world.drawn(self.domain, 2, 78)
        (_, feeds), *_ = self.feeds(scenes)
        wanted, record = self.live(feeds), device.record_of(self.store)
        reasons, survived = {}, 0
        for name, content in spoiled.items():
            other.write_bytes(content)
            try:
                self.live.update(other)
                reasons[name] = "taken"
            except DeltaError as error:
                reasons[name] = error.what
            again = device.Live(self.store)(feeds)
            same = all(np.array_equal(wanted[n], again[n]) for n in wanted)
            survived += reasons[name] != "taken" and same and device.record_of(self.store) == record
        return {"injected": len(spoiled), "survived": survived, "reasons": reasons}


def _refusals(content: bytes, who: Mapping[str, str]) -> int:
    """How many of four spoiled payloads are refused: of another engine or tokenizer, cut, and with a bit flipped."""
    tries = [
        (content, {**who, "engine": "0" * 64}), (content, {**who, "tokenizer": "0" * 64}),
        (content[:-9], who), (content[:-20] + bytes([content[-20] ^ 1]) + content[-19:], who),
    ]  # fmt: skip
    refused = 0
    for given, asked in tries:
        try:
            uplink.read(given, asked)
        except DeltaError:
            refused += 1
    return refused


def _probe() -> dict[str, Array]:
    """A picture of plain places and some queries, for tests that travel with a release and should be small."""
    draw = np.random.default_rng(3)
    plain = draw.integers(-2, 3, (1, 3, world.GRID, world.GRID)).astype(np.float32)
    pictures = plain.repeat(world.CELL, 2).repeat(world.CELL, 3)
    return {"pictures": pictures, "queries": world.drawn(world.DOMAINS[world.SOURCE], 1, 4).queries}


def _adapter_bytes(tensors: Mapping[str, torch.Tensor]) -> Json:
    """What was trained, in 16 bits, whole and through zlib: other ways down."""
    plain = b"".join(
        t.to(torch.float16).numpy().tobytes() for t in tensors.values() if t.is_floating_point()
    )
    return {"answerer_fp16_bytes": len(plain), "answerer_zlib_bytes": len(zlib.compress(plain, 9))}


def told(units: dict[str, dict[str, list[Json]]]) -> Json:
    """What was measured: the rounds of the shown arm, all arms, and how far each is from what labels give."""
    domain = next(iter(units))
    shown = units[domain][SHOWN]
    keys = ("accuracy_before", "accuracy_after", "source_accuracy", "bytes_up", "bytes_down")
    rounds = [
        {k: float(np.mean([unit["rounds"][i][k] for unit in shown])) for k in keys}
        for i in range(len(shown[0]["rounds"]))
    ]  # fmt: skip
    every = [unit for found in units.values() for unit in found[SHOWN]]
    total = {
        k: sum(r[k] for unit in every for r in unit["rounds"])
        for k in ("bytes_up", "bytes_down", "full_bytes", "jpeg_bytes")
    }  # fmt: skip
    return {
        "rounds": rounds,
        "uplink": {
            ("maha" if arm == SHOWN else arm): final(units[domain][arm])
            for arm in made_of.UPLINK if arm in units[domain]
        },
        "recovered_fraction": recovered(units, SHOWN), **total,
        "mirror_equal": all(u["mirror_equal"] for d in units.values() for f in d.values() for u in f),
        "faults": {
            k: sum(u["faults"][k] for d in units.values() for f in d.values() for u in f)
            for k in ("injected", "survived")
        },
        "arms": {
            d: {arm: arm_told(found, arm) for arm in found} for d, found in units.items()
        },
        "ahead": {d: ahead(found) for d, found in units.items()},
    }  # fmt: skip


def final(found: list[Json]) -> float:
    return float(np.mean([unit["rounds"][-1]["accuracy_after"] for unit in found]))


def gains(found: list[Json]) -> Array:
    return np.array(
        [u["rounds"][-1]["accuracy_after"] - u["rounds"][0]["accuracy_before"] for u in found]
    )


def recovered(units: dict[str, dict[str, list[Json]]], arm: str) -> float | None:
    """The arm's gain over that of labels, means over domains and seeds; None where labels gain nothing."""
    both = [
        (gains(found[arm]).mean(), gains(found[WHOLE]).mean())
        for found in units.values() if WHOLE in found and arm in found
    ]  # fmt: skip
    own, whole = (float(np.mean(side)) for side in zip(*both, strict=True)) if both else (0.0, 0.0)
    return own / whole if whole > 0 else None


def arm_told(found: dict[str, list[Json]], arm: str) -> Json:
    rounds = [r for unit in found[arm] for r in unit["rounds"]]
    begun = np.mean([u["begun"][world.SOURCE]["all"] for u in found[arm]])
    return {
        "accuracy": [u["rounds"][-1]["accuracy_after"] for u in found[arm]],
        "before": [u["rounds"][0]["accuracy_before"] for u in found[arm]],
        "source_before": float(begun),
        "source_after": float(np.mean([u["rounds"][-1]["source_accuracy"] for u in found[arm]])),
        "tasks": {
            task: float(np.mean([u["rounds"][-1]["tasks"][task] for u in found[arm]]))
            for task in ("questions", "captions")
        },
        "taken": sum(r["taken"] for r in rounds) / sum(r["of"] for r in rounds),
        "up_share": sum(r["bytes_up"] for r in rounds) / sum(r["jpeg_bytes"] for r in rounds),
        "down_share": sum(r["bytes_down"] for r in rounds) / sum(r["full_bytes"] for r in rounds),
        "cloud_s": float(np.mean([r["cloud_s"] for r in rounds])),
        "fp16_share": float(np.mean([r["answerer_fp16_bytes"] / r["full_bytes"] for r in rounds])),
        "zlib_share": float(np.mean([r["answerer_zlib_bytes"] / r["full_bytes"] for r in rounds])),
    }  # fmt: skip


def ahead(found: dict[str, list[Json]]) -> Json:
    """How far the shown arm's gain is above every other's, paired over seeds, with Student's interval of 95 %."""
    from effc import stats

    made = {}
    for arm in found:
        if arm == SHOWN:
            continue
        count = min(len(found[arm]), len(found[SHOWN]))
        off = gains(found[SHOWN][:count]) - gains(found[arm][:count])
        made[arm] = {"mean": float(off.mean()), "seeds": count}
        if count > 1:
            interval = stats.student(off, 0.95)
            made[arm] |= {"low": interval.low, "high": interval.high}
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description="A device's model is kept fresh from a cloud.")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--fast", action="store_true", help="short training, one seed, one domain")
    parser.add_argument("--arms", nargs="+", choices=tuple(made_of.ARMS))
    parser.add_argument("--domains", nargs="+", choices=[d for d in world.DOMAINS if d != world.SOURCE])  # fmt: skip
    parser.add_argument("--seeds", type=int)
    parser.add_argument(
        "--state", type=Path, help="where finished units lie; thrown away where not given"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured as JSON")
    given = parser.parse_args()
    began = time.perf_counter()
    kind = "smoke" if given.smoke else "fast" if given.fast else "full"
    plan = PLANS[kind]
    changes: Json = {
        "seeds": given.seeds or plan.seeds, "arms": tuple(given.arms or plan.arms),
        "domains": tuple(given.domains or plan.domains),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        state = given.state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effc-")))  # fmt: skip
        study = Study(dataclasses.replace(plan, **changes), state)
        units = study.units()
        found = {
            "example": "cloud_device", "kind": kind, **told(units),
            "parameters": sum(p.numel() for m in (study.encoder, study.student(0)) for p in m.parameters()),
            "data": {
                "name": "shapes, drawn", "n": plan.test,
                "sha256": hashlib.sha256(world.drawn(world.DOMAINS["dusk"], 4, 9000).pictures.tobytes()).hexdigest(),
            },
        }  # fmt: skip
    found["wall_s"] = round(time.perf_counter() - began, 1)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {k: found[k] for k in ("rounds", "uplink", "recovered_fraction", "faults")}, indent=1
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
