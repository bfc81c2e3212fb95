"""What the joint model of lexical fusions is held against: arms with several seeds each, on the published paragraphs.

    joint       tags and links of one model over the graph of sememes
    published   the same, trained on the published paragraphs and what is cut from them alone
    words       sememes only of words of two characters or more
    apart       nothing says where the same character stands elsewhere
    off         no sememes              shuffled    every word with the sememes of another one
    rule        the words of joint, joined by their characters alone
    crf         LSTM and conditional random field, its words joined by the same rule
    pipeline    words of a model of tags alone, joined by a second model

A unit is an arm and a seed; what it counted on every paragraph stays in the state folder, and is never counted twice.
Scores are means over seeds with the interval of Student, differences to `joint` have the 95 % interval of a bootstrap
over fusion words, whose paragraphs hang together: counts are added over the seeds, and words drawn again in pairs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import task_runs  # noqa: E402  the folder above has what examples of tasks share

Json = dict[str, Any]
SEEDS = 5
TUNED: dict[str, Json] = {
    "joint": {},
    "published": {},
    "words": {"singles": False},
    "apart": {"same": False},
    "off": {"sememes": "off"},
    "shuffled": {"sememes": "shuffled"},
}
"""Arms that `effc tune` trains, by what they change in the source's options."""
FILES = {"published": "published.jsonl"}
"""What arms are trained on where that is not `train.jsonl`."""
TAGS_ALONE = {"link_weight": 0}
"""What the first model of the pipeline is."""
QUIET = 0.6
"""Of this share of the paragraphs for training one without a fusion is cut, where one can be."""
EXCHANGED = 4
"""Paragraphs with other words of each published one."""
JUDGES = 56
"""Published paragraphs that judge, and the rest of those of the last of their words."""
PARTS = ("pairs", "tuples", "mentions", "fusions", "separations", "characters")


def prepared(work: Path) -> tuple[Path, Path]:
    """Folder of the published paragraphs with exchanged and cut ones among them, and of the encoder.

    Words stand together, in an order that is drawn, and the last of `train.jsonl`, which judge, are of words of their
    own, none of them exchanged; `published.jsonl` has no exchanged ones at all. `quiet.jsonl` has paragraphs without a
    fusion that are cut from `valid.jsonl`.
    """
    root = task_runs.data_root(HERE)
    if root is None or not (root / "lexfusion").is_dir():
        raise SystemExit("there is no lexfusion in $EFFC_DATA")
    quiet = task_runs.beside(HERE, "quiet")
    for name in ("valid.jsonl", "hownet.txt", "sememe_vector.txt"):
        shutil.copyfile(root / "lexfusion" / name, work / name)
    by_word: dict[str, list[Json]] = {}
    for row in quiet.rows_of(root / "lexfusion" / "train.jsonl"):
        by_word.setdefault(row["fusion"][2], []).append(row)
    words = sorted(by_word)
    random.Random(0).shuffle(words)
    judges: list[Json] = []
    while len(judges) < JUDGES:
        judges += by_word[words.pop()]
    first = [row for word in words for row in by_word[word]]
    avoid = {row["fusion"][2] for row in (*judges, *quiet.rows_of(work / "valid.jsonl"))}
    exchange = task_runs.beside(HERE, "exchange").Exchange(work / "hownet.txt", avoid)
    draw = random.Random(0)
    more = [
        made for row in first for i in range(EXCHANGED)
        if (made := exchange(row, draw, f"{row['id']}-{i}")) is not None
    ]  # fmt: skip
    judges += quiet.cuts(judges, 2, QUIET)
    for name, rows in (("published", first), ("train", [*first, *more])):
        quiet.write(work / f"{name}.jsonl", [*rows, *quiet.cuts(rows, 3, QUIET), *judges])
    quiet.write(work / "quiet.jsonl", quiet.cuts(quiet.rows_of(work / "valid.jsonl"), 1))
    encoder = work / "encoder"
    if not (encoder / "model.safetensors").is_file():
        task_runs.beside(HERE, "encoder").write(encoder, root / "encoders")
    return work, encoder


def measured(
    data: Path, encoder: Path, state: Path, sets: Sequence[str] = (), seeds: int = SEEDS
) -> Json:
    """All arms, by name, and how far they are from the joint model."""
    units: dict[str, list[Json]] = {}
    runs = {name: partial(_tuned, name) for name in TUNED} | {"crf": _crf, "pipeline": _pipeline}
    for seed in range(seeds):
        for name, run in runs.items():
            unit = _once(state, name, seed, partial(run, data, encoder, state, seed, sets))
            units.setdefault(name, []).append(unit["said"])
            if name == "joint":
                units.setdefault("rule", []).append(unit["rule"])
    words = _words(data / "valid.jsonl")
    return {
        "arms": {name: _summary(found) for name, found in units.items()},
        "compared": {
            name: _compared(units["joint"], found, words)
            for name, found in units.items() if name != "joint"
        },
        "seeds": seeds, "words": len(set(words)),
    }  # fmt: skip


def _once(state: Path, name: str, seed: int, run: Callable[[], Json]) -> Json:
    """What a unit counted, from its file where it is finished."""
    file = state / f"unit-{name}-{seed}.json"
    if not file.is_file():
        part = file.with_suffix(".part")
        part.write_text(json.dumps(run()), "utf-8")
        os.replace(part, file)
        print(f"{file.name} is finished", file=sys.stderr)
    found: Json = json.loads(file.read_text("utf-8"))
    return found


def _recipe(
    data: Path,
    encoder: Path,
    options: Json,
    seed: int,
    sets: Sequence[str],
    file: str = "train.jsonl",
) -> Any:
    from effc import recipe

    files = {"dictionary": "hownet.txt", "vectors": "sememe_vector.txt"}
    chosen = {**files, **options, "seed": seed}
    asked = [f"source.encoder={encoder}", "bench=false", *sets, f"passes.0.seed={seed}"]
    asked.append(f"passes.0.file={file}")
    asked += [f"source.options.{name}={json.dumps(value)}" for name, value in chosen.items()]
    return recipe.read(HERE / "recipe.yaml", asked, data_place=data)


def _checkpoint(place: Path, made: Any) -> Any:
    """The source that a recipe trains, which stays in `place`."""
    from effc import compiler
    from effc.progress import Progress
    from effc.source import from_checkpoint

    if not place.is_dir():
        compiler.tune(made, place, progress=Progress())
    return from_checkpoint(place, "lexical-fusion")


def _tuned(
    name: str, data: Path, encoder: Path, state: Path, seed: int, sets: Sequence[str]
) -> Json:
    from effc.zoo import fusion_tags as tags
    from effc.zoo.fusion_baseline import by_rule

    place = state / (f"checkpoint-{seed}" if name == "joint" else f"checkpoint-{name}-{seed}")
    file = FILES.get(name, "train.jsonl")
    source = _checkpoint(place, _recipe(data, encoder, TUNED[name], seed, sets, file))
    task, run = source.processor, _in_torch(source.module)

    def by_characters(item: Any) -> Any:
        said = task.said(run, item)
        kinds = dict.fromkeys(said.fusions, tags.FUSION)
        kinds |= dict.fromkeys(said.separations, tags.SEPARATION)
        return by_rule(item.paragraph.text, kinds)

    return {
        "said": _counted(task, data, lambda item: task.said(run, item)),
        "rule": _counted(task, data, by_characters),
    }


def _crf(data: Path, encoder: Path, state: Path, seed: int, sets: Sequence[str]) -> Json:
    import torch

    from effc.zoo.fusion_baseline import Tagger

    source, made = _untrained(data, encoder, seed, sets)
    torch.manual_seed(seed)
    tagger = Tagger(source.module.encoder.get_input_embeddings().weight.detach())

    def said(module: Any, item: Any) -> Any:
        feeds = _tensors(source.processor.feeds([item]), ("input_ids", "attention_mask"))
        return module.said(module(**feeds)[0].numpy(), item)

    def loss(module: Any, items: Sequence[Any]) -> Any:
        module.train(torch.is_grad_enabled())  # held-out samples are judged as others are
        feeds = _tensors(source.processor.feeds(items), ("input_ids", "attention_mask"))
        wanted = torch.from_numpy(source.processor.wanted(items)["tags"])
        return module.loss(module(**feeds), wanted)

    _fitted(tagger, loss, said, source.processor, data, made, state / f"crf-{seed}")
    return {"said": _counted(source.processor, data, lambda item: said(tagger, item))}


def _pipeline(data: Path, encoder: Path, state: Path, seed: int, sets: Sequence[str]) -> Json:
    import numpy as np
    import torch

    from effc.zoo.fusion_baseline import PairScorer, pair_loss, questions

    first = _checkpoint(
        state / f"checkpoint-tags-{seed}", _recipe(data, encoder, TAGS_ALONE, seed, sets)
    )
    source, made = _untrained(data, encoder, seed, sets)
    task, run = source.processor, _in_torch(first.module)
    torch.manual_seed(seed)
    scorer = PairScorer(source.module.encoder)

    def asked(item: Any) -> Any:
        return _tensors(task.feeds([item]), ("input_ids", "attention_mask"))

    def loss(module: Any, items: Sequence[Any]) -> Any:
        module.train(torch.is_grad_enabled())
        feeds = _tensors(task.feeds(items), ("input_ids", "attention_mask"))
        ends, wanted = questions(items, np.random.default_rng([seed, len(items), items[0].length]))
        return pair_loss(module(**feeds, ends=ends), wanted)

    def said(module: Any, item: Any) -> Any:
        """Of words that are right, which is what the scorer is judged by."""
        return module.said(asked(item), item.paragraph.truth)

    _fitted(scorer, loss, said, task, data, made, state / f"pairs-{seed}")
    return {
        "said": _counted(task, data, lambda item: scorer.said(asked(item), task.said(run, item)))
    }


def _untrained(data: Path, encoder: Path, seed: int, sets: Sequence[str]) -> tuple[Any, Any]:
    """A source over the encoder as it is, and the recipe."""
    from effc.source import load

    made = _recipe(data, encoder, {"sememes": "off"}, seed, sets)
    return load(made.source.as_mapping()), made


def _fitted(
    module: Any, loss: Any, said: Any, task: Any, data: Path, made: Any, folder: Path
) -> None:
    """Train by the samples, steps and score that the recipe has for others."""
    import numpy as np
    import torch

    from effc.train.loop import Schedule, fit

    tune = made.passes[0]
    seed = tune.seed
    items = task.read(data / "train.jsonl")
    count = min(tune.held, len(items) // 8)
    train, held = items[:-count], items[-count:]

    def batch(step: int) -> list[Any]:
        order = np.random.default_rng([seed, step]).permutation(len(train))
        return [train[i] for i in order[: tune.batch]]

    def score(module: Any) -> float:
        module.eval()
        with torch.no_grad():
            return float(task.value(task.tally(held, [said(module, item) for item in held])))

    schedule = Schedule(
        steps=tune.steps, lr=tune.lr, weight_decay=tune.weight_decay, seed=seed, check_every=tune.every
    )  # fmt: skip
    judges = [held[i : i + tune.batch] for i in range(0, len(held), tune.batch)]
    fit(module, loss, batch, schedule, held=judges, folder=folder, score=score)
    module.eval()


def _in_torch(module: Any) -> Callable[[Mapping[str, Any]], Json]:
    import torch

    def run(feeds: Mapping[str, Any]) -> Json:
        with torch.no_grad():
            return {n: v.numpy() for n, v in module(**_tensors(feeds, tuple(feeds))).items()}

    return run


def _tensors(feeds: Mapping[str, Any], names: Sequence[str]) -> Json:
    import torch

    return {name: torch.from_numpy(feeds[name]) for name in names}


def _counted(task: Any, data: Path, said: Callable[[Any], Any]) -> Json:
    """Counts of every paragraph of the file for validation, and of those that are cut from it."""
    import torch

    found = {}
    for name in ("valid", "quiet"):
        items = task.read(data / f"{name}.jsonl")
        with torch.no_grad():
            columns = task.tally(items, [said(item) for item in items])
        found[name] = {n: column.astype(int).tolist() for n, column in columns.items()}
    return found


def _words(file: Path) -> list[str]:
    """The fusion word of every paragraph."""
    return [json.loads(line)["fusion"][2] for line in file.read_text("utf-8").splitlines() if line]


def _f1(counts: Any) -> float:
    from effc.zoo.dialogue_scores import f1

    return f1(*(float(x) for x in counts))


def _summary(units: list[Json]) -> Json:
    """Means over seeds with their interval, and counts of false alarms and errors over all of them."""
    import numpy as np

    from effc.stats import student
    from effc.zoo.fusion_scores import ERRORS

    made: Json = {}
    for part in PARTS:
        values = [_f1(np.sum(unit["valid"][part], axis=0)) for unit in units]
        made[part] = {"values": values, "mean": sum(values) / len(values)}
        if len(values) > 1:
            interval = student(np.array(values))
            made[part] |= {"low": interval.low, "high": interval.high}
    alarms = np.sum([unit["quiet"]["alarms"] for unit in units], axis=(0, 1))
    made["alarms"] = dict(zip(("without", "said", "whole"), map(int, alarms), strict=True))
    errors = np.sum([unit["valid"]["errors"] for unit in units], axis=(0, 1))
    made["errors"] = {name: int(n) for name, n in zip(ERRORS, errors, strict=True) if n}
    return made


def _compared(first: list[Json], second: list[Json], words: list[str]) -> Json:
    """What the second arm has more than the first, in F1, with an interval over fusion words."""
    import numpy as np

    known = sorted(set(words))
    places = np.array([known.index(word) for word in words])
    made = {}
    draws = np.random.default_rng(0).integers(0, len(known), (2000, len(known)))
    for part in ("pairs", "mentions", "characters"):
        by_word = []
        for units in (first, second):
            total = np.zeros((len(known), 3))
            np.add.at(total, places, np.sum([unit["valid"][part] for unit in units], axis=0))
            by_word.append(total)
        ahead = [_f1(by_word[1][d].sum(0)) - _f1(by_word[0][d].sum(0)) for d in draws]
        low, high = np.percentile(ahead, (2.5, 97.5))
        made[part] = {
            "difference": _f1(by_word[1].sum(0)) - _f1(by_word[0].sum(0)), "low": float(low), "high": float(high),
        }  # fmt: skip
    return made
