"""Task metrics, each with a paired interval: the same samples through the model and through the engine.

The interval of the difference comes from resampling the samples, so that what both find hard cancels out.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from effc.calib import data
from effc.errors import CalibrationError, RecipeError
from effc.table import Table

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]
DRAWS = 2000
LONGEST = 128


class Processor(Protocol):
    """What a metric needs of a model directory."""

    input_names: tuple[str, ...]

    @property
    def bos_id(self) -> int | None: ...

    @property
    def max_length(self) -> int | None: ...

    def encode(
        self, texts: Sequence[str], *, max_length: int | None = None
    ) -> dict[str, Array]: ...

    def pool(self, hidden: Array, mask: Array) -> Array: ...

    def images(self, pixels: Array) -> dict[str, Array]: ...


@dataclass(frozen=True)
class Samples:
    """Per-sample results of one engine; every column has the samples along its first axis."""

    columns: dict[str, Array]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


class Metric(Protocol):
    """One task metric over one file."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]
    file: Path

    def measure(self, run: Run, processor: Any) -> Samples: ...

    def value(self, samples: Samples, index: Array | None = None) -> float: ...


@dataclass(frozen=True, kw_only=True)
class SpearmanCosine:
    """Rank correlation of cosine similarity with human scores, on `sentence1,sentence2,score` rows (STS)."""

    name: ClassVar[str] = "spearman_cosine"
    higher_is_better: ClassVar[bool] = True
    file: Path

    def measure(self, run: Run, processor: Any) -> Samples:
        rows = [r for r in _csv(self.file) if r]
        try:
            gold = np.array([float(r[2]) for r in rows])
        except (IndexError, ValueError) as error:
            raise CalibrationError(
                f"{self.file} wants rows of sentence1,sentence2,score"
            ) from error
        left = embed(run, processor, [r[0] for r in rows])
        right = embed(run, processor, [r[1] for r in rows])
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        return Samples({"cosine": (left * right).sum(axis=1) / lengths, "gold": gold})

    def value(self, samples: Samples, index: Array | None = None) -> float:
        from scipy.stats import spearmanr

        chosen = slice(None) if index is None else index
        return float(
            spearmanr(samples.columns["cosine"][chosen], samples.columns["gold"][chosen]).statistic
        )


def embed(run: Run, processor: Any, texts: Sequence[str], size: int = 32) -> Array:
    """Sentence vectors [n, hidden], batched by length so that little is padded."""
    order = np.argsort([len(t) for t in texts], kind="stable")
    vectors: list[Array] = [np.empty(0)] * len(texts)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        feeds = processor.encode([texts[i] for i in chosen], max_length=LONGEST)
        outputs = run(feeds)
        hidden = outputs.get("last_hidden_state")
        if hidden is None:
            hidden = next((v for v in outputs.values() if v.ndim == 3), None)
        if hidden is None:
            raise CalibrationError("the engine has no output [batch, length, hidden] to pool")
        for i, vector in zip(chosen, processor.pool(hidden, feeds["attention_mask"]), strict=True):
            vectors[i] = vector
    return np.stack(vectors)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of samples whose largest logit is the label: `text<TAB>label` rows, `text,label` CSV, or a folder."""

    name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    file: Path

    def measure(self, run: Run, processor: Any) -> Samples:
        predicted, gold = classify(run, processor, self.file)
        return Samples({"correct": (predicted == gold).astype(np.float64)})

    def value(self, samples: Samples, index: Array | None = None) -> float:
        correct = samples.columns["correct"]
        return float(correct.mean() if index is None else correct[index].mean())


@dataclass(frozen=True, kw_only=True)
class F1:
    """Mean over classes of the harmonic mean of precision and recall (macro F1)."""

    name: ClassVar[str] = "f1"
    higher_is_better: ClassVar[bool] = True
    file: Path

    def measure(self, run: Run, processor: Any) -> Samples:
        predicted, gold = classify(run, processor, self.file)
        return Samples({"predicted": predicted, "gold": gold})

    def value(self, samples: Samples, index: Array | None = None) -> float:
        chosen = slice(None) if index is None else index
        predicted, gold = samples.columns["predicted"][chosen], samples.columns["gold"][chosen]
        scores = []
        for label in np.unique(
            np.concatenate([samples.columns["gold"], samples.columns["predicted"]])
        ):
            hits = float(((predicted == label) & (gold == label)).sum())
            total = float((predicted == label).sum() + (gold == label).sum())
            scores.append(2 * hits / total if total else 0.0)
        return float(np.mean(scores))


def classify(run: Run, processor: Any, file: Path, size: int = 64) -> tuple[Array, Array]:
    """Predicted and true labels of every sample of a labelled file."""
    predicted: list[Array] = []
    gold: list[int] = []
    for chunk in _chunks(_labelled(file), size):
        if chunk[0].pixels is not None:
            feeds = processor.images(np.stack([r.pixels for r in chunk if r.pixels is not None]))
        elif chunk[0].arrays is not None:
            feeds = {
                n: np.stack([(r.arrays or {})[n] for r in chunk]) for n in processor.input_names
            }
        else:
            feeds = processor.encode([r.text or "" for r in chunk])
        outputs = run(feeds)
        logits = outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))
        predicted.append(logits.reshape(len(chunk), -1).argmax(axis=1))
        gold += [int(r.label) for r in chunk if r.label is not None]
    if not gold:
        raise CalibrationError(f"{file} holds no labelled samples")
    return np.concatenate(predicted), np.array(gold)


def _labelled(file: Path) -> Iterator[data.Record]:
    if file.suffix == ".tsv":
        for number, row in enumerate(_csv(file, "\t"), 1):
            try:
                yield data.Record(text=row[0], label=int(row[1]))
            except (IndexError, ValueError) as error:
                raise CalibrationError(f"{file} line {number} is not text<TAB>label") from error
        return
    for record in data.read(file):
        if record.label is None:
            raise CalibrationError(f"{file} has samples without a label")
        yield record


def _chunks(records: Iterator[data.Record], size: int) -> Iterator[list[data.Record]]:
    chunk: list[data.Record] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _csv(file: Path, delimiter: str = ",") -> Iterator[list[str]]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8", newline="") as stream:
        if delimiter == "\t":
            yield from csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            yield from csv.reader(stream)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean negative log-likelihood per token, over windows that begin with the start token, no overlap.

    The text is one stream; marks `<|endoftext|>` are taken out. Its interval resamples blocks of 32 tokens, because
    neighbouring tokens are not independent.
    """

    name: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    block: ClassVar[int] = 32
    file: Path

    def measure(self, run: Run, processor: Any) -> Samples:
        losses: list[Array] = []
        for ids in self.windows(processor):
            feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
            logits = run({n: v for n, v in feeds.items() if n in processor.input_names})["logits"]
            scores = logits[0, :-1].astype(np.float64)
            top = scores.max(axis=-1)
            total = np.log(np.exp(scores - top[:, None]).sum(axis=-1)) + top
            losses.append(total - scores[np.arange(len(ids) - 1), ids[1:]])
        if not losses:
            raise CalibrationError(f"{self.file} holds no text to predict")
        flat = np.concatenate(losses)
        starts = np.arange(0, len(flat), self.block)
        counts = np.diff(np.append(starts, len(flat))).astype(np.float64)
        return Samples({"loss": np.add.reduceat(flat, starts), "tokens": counts})

    def windows(self, processor: Any) -> Iterator[Array]:
        """Token windows of the length that the model takes."""
        try:
            text = self.file.read_text(encoding="utf-8").replace("<|endoftext|>", "")
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{self.file} cannot be read as text: {error}") from error
        begin = processor.bos_id
        room = (processor.max_length or 512) - (begin is not None)
        ids = processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), room):
            window = ids[start : start + room]
            if begin is not None:
                window = [begin, *window]
            if len(window) > 1:
                yield np.array(window, np.int64)

    def value(self, samples: Samples, index: Array | None = None) -> float:
        chosen = slice(None) if index is None else index
        loss, tokens = samples.columns["loss"][chosen], samples.columns["tokens"][chosen]
        return float(math.exp(loss.sum() / tokens.sum()))


METRICS = Table(
    "metric",
    {
        "spearman_cosine": "effc.metrics:SpearmanCosine",
        "sts": "effc.metrics:SpearmanCosine",
        "accuracy": "effc.metrics:Accuracy",
        "f1": "effc.metrics:F1",
        "perplexity": "effc.metrics:Perplexity",
    },
    error=RecipeError,
)


def parse(word: str) -> Any:
    """The metric that `NAME:FILE` names. Raises RecipeError for the name, CalibrationError for the file."""
    name, _, file = word.partition(":")
    kind = METRICS[name]
    path = Path(file)
    if not file or not path.exists():
        raise CalibrationError(
            f"metric {name}: there is no file {file or '(none given)'}", hint="NAME:FILE"
        )
    return kind(file=path)


def describe(file: Path) -> dict[str, Any]:
    """Name and sha256 of a metric's file or folder."""
    return data.digest(file)


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """Model and engine on the same `n` samples; `low` and `high` bound engine − reference (paired bootstrap, 95 %)."""

    name: str
    reference: float
    engine: float
    n: int
    low: float
    high: float
    higher_is_better: bool


def compare(metric: Any, reference: Samples, engine: Samples, seed: int = 0) -> MetricResult:
    """The metric of both, with the interval of the difference."""
    n = len(reference)
    rng = np.random.default_rng(seed)
    gaps = np.empty(DRAWS)
    for draw in range(DRAWS):
        index = rng.integers(0, n, n)
        gaps[draw] = metric.value(engine, index) - metric.value(reference, index)
    low, high = np.nanpercentile(gaps, [2.5, 97.5])
    return MetricResult(
        name=metric.name,
        reference=metric.value(reference),
        engine=metric.value(engine),
        n=int(reference.columns["tokens"].sum()) if "tokens" in reference.columns else n,
        low=float(low),
        high=float(high),
        higher_is_better=metric.higher_is_better,
    )


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
