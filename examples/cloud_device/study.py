"""One encoder and one teacher, a student a seed, and the units that are measured: each an arm, a domain and a seed.

What is trained and every unit that is finished lies in a folder, under a name that has a digest of what it hangs on,
and is not done again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import arms as made_of
import models
import numpy as np
import torch
import world
from lessons import Known
from plans import Plan
from safetensors.torch import load_file, save_file

from effc.delta import device, packet

HERE = Path(__file__).resolve().parent
TESTED = 9000
"""The seed of test pictures."""
Json = dict[str, Any]
Units = dict[str, dict[str, list[Json]]]
"""Results by domain and arm, one a seed."""


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


class Study:
    def __init__(self, plan: Plan, state: Path) -> None:
        self.plan, self.state = plan, state
        state.mkdir(parents=True, exist_ok=True)
        self.word = digest(plan.trained())[:12]
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
        self.day = cache(lambda: self.known((world.SOURCE,), plan.day, 2000))
        self.scenes = cache(lambda domain: world.drawn(world.DOMAINS[domain], plan.test, TESTED))
        self.test = cache(lambda domain: self.known((domain,), plan.test, TESTED))

    def _trained(
        self, name: str, module: torch.nn.Module, train: Callable[[], torch.nn.Module]
    ) -> None:
        """Weights from the state, or trained and put there."""
        file = self.state / f"{name}-{self.word}.safetensors"
        if not file.exists():
            began = time.process_time()
            made = train()
            save_file({n: t.contiguous() for n, t in made.state_dict().items()}, f"{file}.part")
            Path(f"{file}.part").rename(file)
            print(f"{name}: trained in {time.process_time() - began:.0f} s of a processor", flush=True)  # fmt: skip
        module.load_state_dict(load_file(file))
        module.eval()

    def known(self, domains: tuple[str, ...], count: int, seed: int) -> Known:
        """What the encoder makes of scenes."""
        drawn = [world.drawn(world.DOMAINS[d], count, seed + i) for i, d in enumerate(domains)]
        return self.seen(drawn)

    def seen(self, drawn: list[world.Scenes]) -> Known:
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

        def train() -> models.Answerer:
            known = self.day()
            return models.answerer(
                models.STUDENT, known.tokens, known.told(), passes=self.plan.passes, seed=100 + seed
            )

        self._trained(f"student{seed}", made, train)
        return made

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
            "ratio": arm.sent / world.PLACES, "logits": "logits", "dropout": 0.5,
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

    def units(self) -> Units:
        """Every unit of the plan, in its order; those of this very plan that are there already as they are."""
        found: Units = {}
        asked = dict.fromkeys(unit for stage in self.plan.stages for unit in stage.units())
        for number, (domain, name, seed) in enumerate(asked, 1):
            arm = made_of.EVERY[name]
            word = digest([self.plan.measured(), dataclasses.asdict(arm)])[:12]
            file = self.state / f"{name.replace(' ', '-')}-{domain}-{seed}-{word}.json"
            if not file.exists():
                made = self._measured(arm, domain, seed)
                file.with_suffix(".part").write_text(json.dumps(made), encoding="utf-8")
                file.with_suffix(".part").rename(file)
                first, *_, last = [made["rounds"][0], *made["rounds"]]
                print(
                    f"{number} of {len(asked)}: {name}, {domain}, seed {seed}: {first['accuracy_before']:.3f} → "
                    f"{last['accuracy_after']:.3f}, {made['cpu_s']:.0f} s of a processor", flush=True,
                )  # fmt: skip
            told = json.loads(file.read_text(encoding="utf-8"))
            found.setdefault(domain, {}).setdefault(name, []).append({"seed": seed, **told})
        return found

    def _measured(self, arm: made_of.Arm, domain: str, seed: int) -> Json:
        from unit import Unit

        began = time.process_time()
        with tempfile.TemporaryDirectory(prefix="effc-") as place:
            made = Unit(self, arm, self.plan.courses(domain), seed, Path(place)).run()
        return {**made, "cpu_s": round(time.process_time() - began, 1)}
