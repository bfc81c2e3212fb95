"""What the examples of tasks have in common: a model is trained, compiled to int8 for two runtimes, and measured.

    metrics          the task's score of the float model in torch and of the int8 engines
    compared         the same with the paired interval of every difference
    decoded_equal    whether torch and the float engines say the same of every sample
    speedup          int8 against the plain float export on ONNX Runtime, over samples at five lengths of the measured
                     file, every length weighted by its time; its ends take those of all lengths at once, which is wider
                     than need be

An example gives its folder, what its kinds of run change in the recipe, and who prepares the data (`Example`).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
"""What tokenizers of the examples have beside words."""
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Which samples are timed: at these places of their lengths."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A task's example; its `kinds` are smoke, fast and full, each with what it sets in the recipe and `budget_s`."""

    task: str
    score: str
    folder: Path
    kinds: Mapping[str, Json]
    prepared: Callable[[str, Path], tuple[Path, Path]]
    """Folder of the data, and of the encoder, for a kind and a place for what is made up."""
    valid: str
    more: Callable[[str, Path, Path, Path], Json] | None = None
    """What else is measured: for a kind, folder of the data, encoder, and place for what is made."""


def data_root(example: Path) -> Path | None:
    """Where the published data lie."""
    places = [os.environ.get("EFFC_DATA"), example.parents[2] / "shared" / "data"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def beside(folder: Path, name: str) -> Any:
    """A script of an example as a module."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_encoder(place: Path, phrases: Sequence[str], hidden: int) -> Path:
    """A transformers directory of a BERT of random numbers, one layer deep, with a tokenizer that knows the words."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import BertConfig, BertModel

    words = [*MARKS, *sorted({word for phrase in phrases for word in phrase.split()})]
    tokenizer(place, words, pre_tokenizers.Whitespace())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=2 * hidden, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(place)
    return place


def tokenizer(place: Path, words: Sequence[str], cut: Any) -> None:
    """The files of a tokenizer with a piece for each word, `MARKS` the first of them; `cut` makes words of texts."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = cut
    names = {f"{mark[1:-1].lower()}_token": mark for mark in MARKS}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(place)


def measured(
    example: Example, kind: str, data: Path, encoder: Path, seed: int, work: Path, threads: int
) -> Json:
    """All that is measured of one training."""
    from effc import compiler, recipe
    from effc.progress import Progress

    asked_of = example.kinds[kind]
    seeds = [f"source.options.seed={seed}", f"passes.0.seed={seed}"]
    asked = [f"source.encoder={encoder}", *asked_of["set"], *seeds, "bench=false"]
    file, progress = example.folder / "recipe.yaml", Progress()
    checkpoint = work / f"checkpoint-{seed}"
    if not checkpoint.is_dir():
        compiler.tune(recipe.read(file, asked, data_place=data), checkpoint, progress=progress)
    made = compiler.run(
        recipe.read(file, asked, data_place=data), work / f"int8-{seed}", tuned=checkpoint,
        threads=threads, allow_worse=True, progress=progress,
    )  # fmt: skip
    first, other = made.report["metric"], made.report["others"]["openvino"]["metric"]
    curve = json.loads((checkpoint / "tune.json").read_text(encoding="utf-8"))["curves"]["0.main"]
    return {
        "metrics": {"float": first["reference"], "ort": first["engine"], "openvino": other["engine"]},
        "compared": {"ort": first, "openvino": other},
        "gate": {
            "ort": made.report["gate"]["verdict"],
            "openvino": made.report["others"]["openvino"]["gate"]["verdict"],
        },
        **engines(
            example.task, checkpoint, work / f"int8-{seed}", data / example.valid, threads,
            asked_of["budget_s"],
        ),
        "curve": curve,
        "seconds": {name: round(stage.seconds, 1) for name, stage in progress.stages.items()},
    }  # fmt: skip


def engines(
    task: str, checkpoint: Path, package: Path, file: Path, threads: int, budget_s: float
) -> Json:
    """Whether float engines say what torch says, and how much faster those of a package are than the plain export."""
    import effc
    from effc import compiler, measure
    from effc.backends import BACKENDS
    from effc.backends.dialect import DIALECTS
    from effc.passes import CANONICAL, PASSES
    from effc.source import from_checkpoint

    source = from_checkpoint(checkpoint, task)
    program = compiler.trace_source(source)
    items = source.processor.read(file)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory(prefix="effc-") as place:
        floats = []
        for target in ("ort", "openvino"):
            (Path(place) / target).mkdir()
            cleaned = program.clone()
            for word in CANONICAL:
                effc.apply(PASSES[word](), cleaned, dialect=DIALECTS[target])
            floats.append(BACKENDS[target]().lower(cleaned.only(), Path(place) / target))
        (Path(place) / "plain").mkdir()
        plain = measure.plain_export(program.only(), Path(place) / "plain", "ort")
        return {
            "n": len(items),
            "decoded_equal": decoded_equal(source, floats, items, threads),
            "speedup": speedup(source, plain, package, "ort", items, threads, budget_s),
            "speedup_openvino": speedup(
                source, plain, package, "openvino", items, threads, budget_s
            ),
        }


def decoded_equal(source: Any, floats: list[Any], items: list[Any], threads: int) -> bool:
    """Whether torch and the float engines say the same of every sample."""
    import torch

    from effc import measure

    task = source.processor

    def in_torch(feeds: Any) -> Any:
        with torch.no_grad():
            made = source.module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        return {name: value.numpy() for name, value in made.items()}

    wanted = [task.said(in_torch, item) for item in items]
    for lowered in floats:
        with measure.opened(lowered, threads) as engine:
            if [task.said(engine, item) for item in items] != wanted:
                return False
    return True


def speedup(
    source: Any, plain: Any, out: Path, target: str, items: list[Any], threads: int, budget_s: float
) -> Json:
    """Time of the plain float export on ONNX Runtime ÷ that of an int8 engine, over samples at several lengths."""
    from effc import bench, measure, package
    from effc.engine import entry_of, lowered

    ordered = sorted(items, key=lambda item: int(item.length))
    chosen = [ordered[round(share * (len(items) - 1))] for share in SHARES]
    cases = [
        bench.Case(batch=1, length=i.length, feeds=source.processor.feeds([i])) for i in chosen
    ]
    engine = lowered(out, entry_of(out, package.read(out), target))
    openers = {"engine": measure.opener(engine, threads), "float": measure.opener(plain, threads)}
    timed = bench.compare(openers, cases, threads=threads, budget_s=budget_s)
    found = [s.ratios["float"] for s in timed.shapes]
    took = [float(s.timings["float"].median_ms) for s in timed.shapes]

    def of(end: str) -> float:
        return sum(took) / sum(ms / getattr(r, end) for ms, r in zip(took, found, strict=True))

    return {
        "ratio": of("ratio"), "low": of("low"), "high": of("high"),
        "lengths": [case.length for case in cases], "float_ms": took,
    }  # fmt: skip


def main(example: Example, about: str) -> int:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--smoke", action="store_true", help="few made-up samples")
    parser.add_argument(
        "--fast", action="store_true", help="what runs where nothing is said: minutes"
    )
    parser.add_argument("--full", action="store_true", help="the published data: hours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", "--state", type=Path, help="where what was made is kept")
    parser.add_argument("--encoder", type=Path, help="another one than the example's own")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured as JSON")
    given = parser.parse_args()
    kind = "smoke" if given.smoke else "full" if given.full else "fast"
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="effc-") as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        place, encoder = example.prepared(kind, work)
        encoder = given.encoder.resolve() if given.encoder else encoder
        found = measured(example, kind, place, encoder, given.seed, work, given.threads)
        if example.more is not None:
            found |= example.more(kind, place, encoder, work)
        data = place / example.valid
        found |= {
            "example": example.folder.name, "kind": kind, "seed": given.seed,
            "wall_s": round(time.perf_counter() - started, 1),
            "data": {"name": data.name, "n": found.pop("n"),
                     "sha256": hashlib.sha256(data.read_bytes()).hexdigest()},
        }  # fmt: skip
    told = ", ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items())
    ratio = found["speedup"]
    print(f"{example.score}: {told}; decoded alike: {found['decoded_equal']}")
    print(
        f"int8 on ort {ratio['ratio']:.2f}× [{ratio['low']:.2f}, {ratio['high']:.2f}] the plain export"
    )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0
