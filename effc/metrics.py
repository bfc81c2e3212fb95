"""Task metrics, each with a paired interval: the same samples through the model and through the engine.

The interval of the difference comes from resampling the samples, so that what both find hard cancels out. Where every
sample is right or wrong, an exact test of the samples that only one of the two gets right must agree with it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from effc import stats
from effc.backends.base import Engine
from effc.calib import data
from effc.errors import CalibrationError, EffcError, RecipeError
from effc.source import Source, import_code
from effc.table import Table, unknown
from effc.task import Task
from effc.tasks import TASKS

Array = np.ndarray[Any, np.dtype[Any]]
LONGEST = 128
WINDOW = 1024
"""Tokens of a window of perplexity at most: attention over many thousands takes its square of memory."""
ONE_OR_MORE = "give one or more"
A_SCORE_EACH = "let it return one number for each sample"


@dataclass(frozen=True)
class Samples:
    """Per-sample results of one engine; every column has the samples along its first axis."""

    columns: dict[str, Array]
    unit: str = "sample"
    """What a sample is: what the interval draws again."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @cached_property
    def orders(self) -> dict[str, Array]:
        """Place of every value among the different values of its column, found once: a draw then sorts nothing."""
        return {n: np.unique(c, return_inverse=True)[1] for n, c in self.columns.items()}


class Metric(Protocol):
    """One task metric over one file."""

    @property
    def name(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def relative(self) -> bool:
        """Whether `drop` is a share of the reference."""

    @property
    def file(self) -> Path: ...

    def check(self, source: Source) -> None:
        """Raise where the source cannot feed the metric or the file is none, before anything long is done."""

    def measure(self, run: Engine, processor: Any) -> Samples:
        """Per-sample results of an engine; `processor` is the source's, and may be None."""

    def value(self, samples: Samples, index: Array | None = None) -> float:
        """The metric over all samples, or over those drawn."""

    def drop(self, reference: float, engine: float) -> float:
        """What the engine loses, above 0 where it is worse: the number that a limit is set on."""


class _Absolute:
    """A metric of which more is better; a loss is counted in its own unit."""

    higher_is_better: ClassVar[bool] = True
    relative: ClassVar[bool] = False

    def drop(self, reference: float, engine: float) -> float:
        return reference - engine


class _Mean(_Absolute):
    """The mean of one column, which holds right and wrong where every value is 1 or 0."""

    column: ClassVar[str]

    def value(self, samples: Samples, index: Array | None = None) -> float:
        column = samples.columns[self.column]
        return float(column.mean() if index is None else column[index].mean())


def _check_text(metric: Metric, source: Source) -> None:
    (inputs,) = source.inputs.values()
    if source.processor is None:
        raise CalibrationError(
            f"metric {metric.name} reads text, for which this model has no tokenizer",
            hint="leave the metric out, give the Source a processor, or write a metric: file.py:function:FILE",
        )
    if "input_ids" not in inputs:
        raise CalibrationError(
            f"metric {metric.name} reads text, the model takes {', '.join(inputs)}",
            hint="choose a metric for what the model takes: docs/recipes.md lists them",
        )
    _ = source.processor.tokenizer  # raises where it does not load


def _check_vectors(metric: Metric, source: Source) -> None:
    _check_text(metric, source)
    if ("logits",) in source.outputs.values():
        raise CalibrationError(
            f"metric {metric.name} pools token vectors, the model gives logits",
            hint="use accuracy or span_f1, or load the model without its head",
        )
    if source.processor is not None:
        _ = source.processor.pooling  # raises where the directory asks for more than is done


@dataclass(frozen=True, kw_only=True)
class SpearmanCosine(_Absolute):
    """Rank correlation of the cosine of two sentences with a human score.

    File: CSV, `.gz` or not, rows `sentence1,sentence2,score` without a header, as of the STS benchmark (Cer et al.
    2017). Sentences are cut to 128 tokens.
    """

    name: ClassVar[str] = "spearman_cosine"
    file: Path

    def check(self, source: Source) -> None:
        _check_vectors(self, source)
        self.rows()

    def rows(self) -> list[tuple[str, str, float]]:
        found = []
        for number, row in data.rows(self.file):
            try:
                score = float(row[2])
            except (IndexError, ValueError):
                score = math.nan
            if not math.isfinite(score):
                raise CalibrationError(
                    f"{self.file} line {number} is not sentence1,sentence2,score",
                    hint="a CSV without a header, the score a number",
                )
            found.append((row[0], row[1], score))
        if not found:
            raise CalibrationError(f"{self.file} holds no samples", hint=ONE_OR_MORE)
        return found

    def measure(self, run: Engine, processor: Any) -> Samples:
        left, right, gold = zip(*self.rows(), strict=True)
        cosine = (embed(run, processor, left) * embed(run, processor, right)).sum(axis=1)
        return Samples({"cosine": cosine, "gold": np.array(gold)})

    def value(self, samples: Samples, index: Array | None = None) -> float:
        chosen = slice(None) if index is None else index
        left, right = (_centred_ranks(samples.orders[n][chosen]) for n in ("cosine", "gold"))
        spread = math.sqrt((left @ left) * (right @ right))
        return float(left @ right / spread) if spread else math.nan


def _centred_ranks(order: Array) -> Array:
    """Ranks less their mean; equal values share the mean of their ranks (Spearman's convention)."""
    counts = np.bincount(order)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[order] - (len(order) + 1) / 2)


@dataclass(frozen=True, kw_only=True)
class Recall(_Mean):
    """Share of texts a whose text b is among the k nearest, by cosine, of all texts b (recall at k, one right answer).

    File: CSV, `.gz` or not, rows `text_a,text_b` without a header; every b belongs to its a alone. What is as near as
    the right answer counts before it. Texts are cut to 128 tokens.
    """

    column: ClassVar[str] = "hit"
    k: int
    file: Path

    @property
    def name(self) -> str:
        return f"recall@{self.k}"

    def check(self, source: Source) -> None:
        _check_vectors(self, source)
        self.rows()

    def rows(self) -> list[tuple[str, str]]:
        found = []
        for number, row in data.rows(self.file):
            if len(row) != 2:
                raise CalibrationError(
                    f"{self.file} line {number} has {len(row)} columns, not text_a,text_b",
                    hint="put quotes around a text that has a comma",
                )
            found.append((row[0], row[1]))
        if not found:
            raise CalibrationError(f"{self.file} holds no samples", hint=ONE_OR_MORE)
        return found

    def measure(self, run: Engine, processor: Any) -> Samples:
        asked, answers = (embed(run, processor, side) for side in zip(*self.rows(), strict=True))
        hits = []
        for start in range(0, len(asked), 256):
            near = asked[start : start + 256] @ answers.T
            right = near[np.arange(len(near)), np.arange(start, start + len(near))]
            hits.append((near >= right[:, None]).sum(axis=1) <= self.k)
        return Samples({"hit": np.concatenate(hits).astype(np.float64)})


def embed(run: Engine, processor: Any, texts: Sequence[str], size: int = 32) -> Array:
    """Sentence vectors of length one [n, hidden], batched by length so that little is padded."""
    vectors: list[Array] = [np.empty(0)] * len(texts)
    for chosen in _by_length([len(t) for t in texts], size):
        rows = processor.token_ids([texts[i] for i in chosen], max_length=LONGEST)
        lengths = np.array([len(row) for row in rows])
        outputs = run(processor.told(processor.pad(rows), [texts[i] for i in chosen]))
        hidden = outputs.get("last_hidden_state")
        if hidden is None:
            hidden = next((v for n, v in outputs.items() if v.ndim == 3 and n != "logits"), None)
        if hidden is None:
            raise CalibrationError(
                "the engine has no output [batch, length, hidden] to pool",
                hint="use a model that gives token vectors, or a metric for what this one gives",
            )
        mask = np.arange(lengths.max()) < lengths[:, None]
        for i, vector in zip(chosen, processor.pool(hidden, mask), strict=True):
            vectors[i] = vector
    found = np.stack(vectors)
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise CalibrationError(
            "the engine gives sentence vectors that are zero or not numbers",
            hint="find where they begin with `effc explain OUT`",
        )
    return np.asarray(found / norms)


def _by_length(lengths: Sequence[int], size: int) -> Iterator[Array]:
    """Places in batches of `size`, short ones first."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _check_labelled(metric: Metric, source: Source) -> None:
    (inputs,) = source.inputs.values()
    first = next(data.read(metric.file, labelled=True))
    if first.arrays is not None:
        for name in inputs:
            if name not in first.arrays:
                raise _lacks(name, first.arrays)
    elif source.processor is None:
        raise CalibrationError(
            f"metric {metric.name} reads text or pictures, for which this model has no processor",
            hint="measure on an .npz: arrays named as the inputs, and `label`",
        )
    elif first.pixels is None:
        _check_text(metric, source)
    elif "pixel_values" not in inputs:
        raise CalibrationError(
            f"{metric.file} holds pictures, the model takes {', '.join(inputs)}",
            hint="give a file of what the model takes",
        )


@dataclass(frozen=True, kw_only=True)
class Accuracy(_Mean):
    """Share of samples whose largest logit is the label, a number from 0.

    File: CSV or TSV with a column `label`, or without a header text, label; .npz with `label`; a folder of pictures in
    folders of their classes; idx.
    """

    name: ClassVar[str] = "accuracy"
    column: ClassVar[str] = "correct"
    file: Path

    def check(self, source: Source) -> None:
        _check_labelled(self, source)

    def measure(self, run: Engine, processor: Any) -> Samples:
        predicted, gold = classify(run, processor, self.file)
        return Samples({"correct": (predicted == gold).astype(np.float64)})


@dataclass(frozen=True, kw_only=True)
class F1(_Absolute):
    """Mean over classes of the harmonic mean of precision and recall (macro F1). File: as of `accuracy`."""

    name: ClassVar[str] = "f1"
    file: Path

    def check(self, source: Source) -> None:
        _check_labelled(self, source)

    def measure(self, run: Engine, processor: Any) -> Samples:
        predicted, gold = classify(run, processor, self.file)
        return Samples({"predicted": predicted, "gold": gold})

    def value(self, samples: Samples, index: Array | None = None) -> float:
        predicted, gold = samples.columns["predicted"], samples.columns["gold"]
        classes = int(max(predicted.max(), gold.max())) + 1
        seen = np.bincount(predicted, minlength=classes) + np.bincount(gold, minlength=classes) > 0
        if index is not None:
            predicted, gold = predicted[index], gold[index]
        hits = np.bincount(gold[predicted == gold], minlength=classes)
        total = np.bincount(predicted, minlength=classes) + np.bincount(gold, minlength=classes)
        return float((2 * hits / np.maximum(total, 1))[seen].mean())


def classify(run: Engine, processor: Any, file: Path, size: int = 64) -> tuple[Array, Array]:
    """Predicted and true labels of every sample of a labelled file."""
    predicted: list[Array] = []
    gold: list[int] = []
    classes = 0
    for chunk in _chunks(data.read(file, labelled=True), size):
        if chunk[0].pixels is not None:
            feeds = processor.images([r.pixels for r in chunk])
        elif chunk[0].arrays is not None:
            feeds = _ready([r.arrays or {} for r in chunk], run)
        else:
            feeds = processor.encode([r.text for r in chunk])
        outputs = run(feeds)
        logits = outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))
        if logits.ndim < 2 or logits.size != len(chunk) * logits.shape[1]:
            raise CalibrationError(
                f"a label needs logits [batch, classes], the engine gives {list(logits.shape)}",
                hint="choose a metric for what the model gives",
            )
        classes = logits.shape[1]
        predicted.append(logits.reshape(len(chunk), classes).argmax(axis=1))
        gold += [int(r.label) for r in chunk if r.label is not None]
    labels = np.array(gold)
    if labels.min() < 0 or labels.max() >= classes:
        raise CalibrationError(
            f"{file} has labels from {labels.min()} to {labels.max()}, the model knows 0 to {classes - 1}",
            hint="number the labels as id2label of config.json does",
        )
    return np.concatenate(predicted), labels


def _ready(arrays: Sequence[Mapping[str, Array]], run: Engine) -> dict[str, Array]:
    """Samples of ready arrays as one batch, in the types that the engine takes."""
    feeds = {}
    for port in run.inputs:
        if port.name not in arrays[0]:
            raise _lacks(port.name, arrays[0])
        given = np.stack([sample[port.name] for sample in arrays])
        fits = len(given.shape) == len(port.shape) and all(
            isinstance(want, str) or want == have
            for want, have in zip(port.shape, given.shape, strict=True)
        )
        if not fits or not np.can_cast(given.dtype, port.dtype, "same_kind"):
            raise CalibrationError(
                f"array {port.name!r} of the metric is {given.dtype} {list(given.shape)}, "
                f"the model takes {port.dtype} [{', '.join(map(str, port.shape))}]",
                hint="write the array as the model takes it",
            )
        feeds[port.name] = given.astype(port.dtype, copy=False)
    return feeds


def _lacks(name: str, arrays: Mapping[str, Array]) -> CalibrationError:
    return CalibrationError(
        f"the metric's file has no array {name!r} that the model takes",
        hint=f"it has {', '.join(sorted(arrays)) or 'none'}",
    )


def _chunks(records: Iterable[data.Record], size: int) -> Iterator[list[data.Record]]:
    chunk: list[data.Record] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass(frozen=True, kw_only=True)
class EntityF1(_Absolute):
    """F1 over all entities of a token classifier (micro): right where type, first and last word are.

    File: a token and its tag on a line, first and last of what tabs or else blanks separate; an empty line between
    sentences (CoNLL 2003, Tjong Kim Sang and De Meulder). Tags are BIO or BIOES, read as by seqeval's default mode
    (Nakayama 2018). The first token of a word speaks for it; words behind the model's length are predicted O.
    """

    name: ClassVar[str] = "entity_f1"
    file: Path

    def check(self, source: Source) -> None:
        _check_text(self, source)
        assert source.processor is not None
        self.sentences(_tags_of(source.processor.config))

    def sentences(self, known: Mapping[int, str]) -> list[tuple[list[str], list[str]]]:
        """Words and tags of every sentence. Raises CalibrationError for a tag of a type that nobody predicts."""
        types = {"", *(_split(tag)[1] for tag in known.values())}
        found: list[tuple[list[str], list[str]]] = [([], [])]
        for number, line in enumerate(data.lines(self.file), 1):
            fields = line.strip("\r\n").split("\t") if "\t" in line else line.split()
            if not "".join(fields).strip():
                found.append(([], []))
                continue
            if fields[0] == "-DOCSTART-":
                continue
            if len(fields) < 2 or not TAG.fullmatch(fields[-1].strip()):
                raise CalibrationError(
                    f"{self.file} line {number} is not a token and its tag",
                    hint="tags are O, B-TYPE, I-TYPE, E-TYPE, S-TYPE",
                )
            tag = fields[-1].strip()
            if _split(tag)[1] not in types:
                raise CalibrationError(
                    f"{self.file} line {number}: the model predicts no {tag}",
                    hint=f"its id2label has {', '.join(sorted(set(known.values())))}",
                )
            found[-1][0].append(fields[0])
            found[-1][1].append(tag)
        sentences = [sentence for sentence in found if sentence[0]]
        if not sentences:
            raise CalibrationError(f"{self.file} holds no samples", hint=ONE_OR_MORE)
        return sentences

    def measure(self, run: Engine, processor: Any) -> Samples:
        known = _tags_of(processor.config)
        sentences = self.sentences(known)
        counts = np.zeros((len(sentences), 3))
        for chosen in _by_length([len(words) for words, _ in sentences], 32):
            feeds, places = processor.words([sentences[i][0] for i in chosen])
            logits = _logits(run(feeds))
            if logits.shape[2] != len(known):
                raise CalibrationError(
                    f"the engine has {logits.shape[2]} classes, id2label of config.json {len(known)}",
                    hint="correct id2label of config.json",
                )
            for i, best, place in zip(chosen, logits.argmax(axis=-1), places, strict=True):
                tags = sentences[i][1]
                said = [known[int(best[place[w]])] if w in place else "O" for w in range(len(tags))]
                predicted, gold = entities(said), entities(tags)
                counts[i] = len(predicted & gold), len(predicted), len(gold)
        return Samples(dict(zip(("tp", "pred", "gold"), counts.T, strict=True)))

    def value(self, samples: Samples, index: Array | None = None) -> float:
        chosen = slice(None) if index is None else index
        tp, predicted, gold = (samples.columns[n][chosen].sum() for n in ("tp", "pred", "gold"))
        return float(2 * tp / (predicted + gold)) if predicted + gold else 0.0


TAG = re.compile(r"O|[BIES](-.+)?")


def _tags_of(config: Mapping[str, Any]) -> dict[int, str]:
    """Tag of every class, from `id2label`. Raises CalibrationError where they are no tags."""
    labels = {int(i): str(tag) for i, tag in (config.get("id2label") or {}).items()}
    strange = [tag for tag in labels.values() if not TAG.fullmatch(tag)]
    if strange or not labels:
        raise CalibrationError(
            f"id2label of config.json has {strange[0]!r}, which is no BIO or BIOES tag"
            if strange
            else "config.json has no id2label, so the model's classes are no tags",
            hint="entity_f1 is for token classifiers with labels such as B-PER",
        )
    return labels


def _split(tag: str) -> tuple[str, str]:
    mark, _, kind = tag.partition("-")
    return mark, kind


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first and last place of every entity, as seqeval's default mode finds them.

    An entity need not begin with B: I or E behind O, behind another type or behind an end begins one too.
    """
    found = set()
    before, kind_before, first = "O", "", 0
    for place, (mark, kind) in enumerate(map(_split, [*tags, "O"])):
        breaks = before in "ESO" or kind != kind_before
        if before != "O" and (breaks or mark in "BSO"):
            found.add((kind_before, first, place - 1))
        if mark in "BS" or (mark in "IE" and breaks):
            first = place
        before, kind_before = mark, kind
    return found


def _logits(outputs: Mapping[str, Array]) -> Array:
    logits = outputs.get("logits")
    if logits is None or logits.ndim != 3:
        has = ", ".join(f"{n} {list(v.shape)}" for n, v in outputs.items())
        raise CalibrationError(
            f"the metric needs an output `logits` [batch, length, classes], the engine has {has}",
            hint="choose a metric for what the model gives",
        )
    return logits


MARK = "<|endoftext|>"
HEADING = re.compile(r"^ ?= (?!=)[^\n]*(?<!=) = *$", re.MULTILINE)
"""The title of an article of WikiText; a section has two marks or more on either side."""


def documents(text: str) -> list[str]:
    """The texts that a file holds: those between marks `<|endoftext|>`, which are taken out.

    Where there is no mark, each from one heading ` = Title = ` to the next; else one. Blank ones are the end of the
    text before.
    """
    pieces = text.split(MARK)
    if len(pieces) == 1:
        starts = [found.start() for found in HEADING.finditer(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *starts, len(text)])]
    found: list[str] = []
    for piece in pieces:
        if found and not (piece.strip() and found[-1].strip()):
            found[-1] += piece
        else:
            found.append(piece)
    return found


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean negative log-likelihood per token, over windows that begin with the start token, no overlap.

    File: UTF-8 text, read as one stream. Its interval resamples the documents in it, because the tokens of one are not
    independent: what lies between marks `<|endoftext|>`, which are taken out, or begins with a heading ` = Title = `.
    Where there is but one, the interval is over windows.
    """

    name: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    relative: ClassVar[bool] = True
    file: Path

    def check(self, source: Source) -> None:
        _check_text(self, source)
        assert source.processor is not None
        if source.processor.kind != "causal-lm":
            raise CalibrationError(
                "metric perplexity is for models that predict the next token, "
                f"and config.json names a {source.processor.kind}",
                hint="choose a metric for what the model gives",
            )
        self.documents()

    def documents(self) -> list[str]:
        return documents("".join(data.lines(self.file)))

    def measure(self, run: Engine, processor: Any) -> Samples:
        losses: list[Array] = []
        owners: list[Array] = []
        for ids, documents in self.windows(processor):
            feeds = processor.pad([ids])
            if processor.teller is not None:
                text = processor.tokenizer.decode(ids, skip_special_tokens=True)
                feeds = processor.told(feeds, [text])
            scores = _logits(run(feeds))[0, :-1].astype(np.float64)
            top = scores.max(axis=-1)
            total = np.log(np.exp(scores - top[:, None]).sum(axis=-1)) + top
            losses.append(total - scores[np.arange(len(ids) - 1), ids[1:]])
            owners.append(documents[1:])
        if not losses:
            raise CalibrationError(
                f"{self.file} holds no text to predict", hint="give texts of two tokens or more"
            )
        places, unit = np.concatenate(owners), "document"
        if places[0] == places[-1]:
            places, unit = (
                np.repeat(np.arange(len(losses)), [len(each) for each in losses]),
                "window",
            )
        tokens = np.bincount(places).astype(np.float64)
        loss = np.bincount(places, weights=np.concatenate(losses))
        return Samples({"loss": loss[tokens > 0], "tokens": tokens[tokens > 0]}, unit)

    def windows(self, processor: Any) -> Iterator[tuple[list[int], Array]]:
        """Token windows of the length that the model takes, and the number of the document that each token is of."""
        begin = processor.bos_id
        room = min(processor.max_length or 512, WINDOW) - (begin is not None)
        ids, owners = self._tokens(processor.tokenizer)
        for start in range(0, len(ids), room):
            window, owner = ids[start : start + room], owners[start : start + room]
            if begin is not None:
                window, owner = [begin, *window], np.insert(owner, 0, owner[0])
            if len(window) > 1:
                yield window, owner

    def _tokens(self, tokenizer: Any) -> tuple[list[int], Array]:
        """The tokens of the stream, and the document that each begins in; one where the tokenizer does not tell."""
        texts = self.documents()
        knows = bool(getattr(tokenizer, "is_fast", False))
        encoded = tokenizer(
            "".join(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=knows
        )
        ids = list(encoded["input_ids"])
        if not knows:
            return ids, np.zeros(len(ids), np.int64)
        begins = np.array([begin for begin, _ in encoded["offset_mapping"]], np.int64)
        ends = np.cumsum([len(text) for text in texts])[:-1]
        return ids, np.searchsorted(ends, begins, side="right")

    def value(self, samples: Samples, index: Array | None = None) -> float:
        chosen = slice(None) if index is None else index
        loss, tokens = samples.columns["loss"][chosen], samples.columns["tokens"][chosen]
        with np.errstate(over="ignore"):
            return float(np.exp(loss.sum() / tokens.sum()))

    def drop(self, reference: float, engine: float) -> float:
        return (engine - reference) / reference


@dataclass(frozen=True, kw_only=True)
class OfTask(_Absolute):
    """The score of a task over a labelled file of its own format, as the task defines it."""

    task: type[Task]
    file: Path

    @property
    def name(self) -> str:
        return self.task.word

    @property
    def parts(self) -> tuple[str, ...]:
        """What is told beside the first score, each with an interval of its own."""
        return self.task.parts

    def check(self, source: Source) -> None:
        self._of(source.processor).read(self.file)

    def _of(self, processor: Any) -> Task:
        if not isinstance(processor, self.task):
            raise CalibrationError(
                f"metric {self.name} is for models of the task {self.name}, and this is none",
                hint=f"source: {{task: {self.name}, checkpoint: CKPT}}",
            )
        return processor

    def measure(self, run: Engine, processor: Any) -> Samples:
        task = self._of(processor)
        return Samples(task.counts(run, task.read(self.file)))

    def value(self, samples: Samples, index: Array | None = None, part: str | None = None) -> float:
        chosen = slice(None) if index is None else index
        return self.task.value({n: c[chosen] for n, c in samples.columns.items()}, part)


@dataclass(frozen=True, kw_only=True)
class Own(_Mean):
    """The user's own metric: `function(run, processor, file)` gives a mapping of arrays with one number a sample.

    `run(feeds)` is the model or the engine, arrays by name in and out; `processor` is None for a model without one. The
    metric is the mean of the array `score`, higher is better.
    """

    column: ClassVar[str] = "score"
    name: str
    function: Callable[[Engine, Any, Path], Mapping[str, Any]]
    file: Path

    def check(self, source: Source) -> None:
        """Only its own code knows what it takes."""

    def measure(self, run: Engine, processor: Any) -> Samples:
        try:
            made = self.function(run, processor, self.file)
            is_mapping = isinstance(made, Mapping)
            columns = {n: np.asarray(c) for n, c in made.items()} if is_mapping else {}
        except EffcError:
            raise
        except Exception as error:
            raise CalibrationError(
                f"metric {self.name} failed: {type(error).__name__}: {error}",
                hint="correct the function that it names",
            ) from error
        if "score" not in columns:
            has = f"a mapping of {list(columns)}" if is_mapping else f"a {type(made).__name__}"
            raise CalibrationError(
                f"metric {self.name} returned {has}, not a mapping with an array `score`",
                hint="return {'score': array}, one number a sample",
            )
        shapes = {name: column.shape for name, column in columns.items()}
        if len(set(shapes.values())) > 1 or len(shapes["score"]) != 1 or not len(columns["score"]):
            raise CalibrationError(
                f"metric {self.name} returned arrays of shapes {shapes}, not one number a sample",
                hint=A_SCORE_EACH,
            )
        score = columns["score"]
        if score.dtype.kind not in "biuf" or not np.isfinite(score).all():
            raise CalibrationError(
                f"metric {self.name} returned scores that are not numbers", hint=A_SCORE_EACH
            )
        return Samples({**columns, "score": score.astype(np.float64)})


METRICS = Table(
    "metric",
    {
        "spearman_cosine": "effc.metrics:SpearmanCosine",
        "sts": "effc.metrics:SpearmanCosine",
        "accuracy": "effc.metrics:Accuracy",
        "f1": "effc.metrics:F1",
        "entity_f1": "effc.metrics:EntityF1",
        "recall@1": "effc.metrics:Recall",
        "perplexity": "effc.metrics:Perplexity",
        **dict.fromkeys(TASKS, "effc.metrics:OfTask"),
    },
    error=RecipeError,
)


RECALL = re.compile(r"recall@([1-9]\d*)")


def is_known(name: str) -> bool:
    """Whether a metric is one of ours, or has the form of one's own, `module:function`."""
    return name in METRICS or RECALL.fullmatch(name) is not None or ":" in name


def split(word: str) -> tuple[str, str]:
    """Name and file of `NAME:FILE`; a metric of one's own has a colon in its name."""
    name, _, file = word.partition(":")
    if not is_known(name) and ":" in file:
        name, _, file = word.rpartition(":")
    return name, file


def parse(word: str) -> Metric:
    """The metric that `NAME:FILE`, `module:function:FILE` or `file.py:function:FILE` names.

    Imports the user's code, and nothing else. Raises RecipeError for the name, CalibrationError for the file.
    """
    name, file = split(word)
    make = _maker(name)
    if not file or not Path(file).exists():
        raise CalibrationError(
            f"metric {name}: there is no file {file or '(none given)'}", hint="NAME:FILE"
        )
    return make(file=Path(file))


def _maker(name: str) -> Callable[..., Metric]:
    if found := RECALL.fullmatch(name):
        return partial(Recall, k=int(found[1]))
    place, _, attribute = name.rpartition(":")
    if not place:
        kind: Callable[..., Metric] = METRICS[name]
        return partial(OfTask, task=TASKS[name]) if name in TASKS else kind
    module = import_code(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RecipeError(unknown(f"function in {place}", attribute, known))
    return partial(Own, name=f"{Path(place).name}:{attribute}", function=function)


def describe(file: Path) -> dict[str, Any]:
    """Name and sha256 of a metric's file or folder."""
    return data.digest(file)


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """Model and engine on the same `n` samples.

    `low` and `high` bound engine − reference, `drop_low` and `drop_high` the `drop` (paired bootstrap at `level`, which
    draws `drawn` of `unit` again; `n` is of tokens where those are what is counted).
    Where samples are right or wrong, `wilson` bounds either share, and `mcnemar` has the samples that only one of the
    two gets right with the chance `p` of so uneven a split.
    """

    name: str
    reference: float
    engine: float
    n: int
    low: float
    high: float
    level: float
    verdict: str
    drop: float
    drop_low: float
    drop_high: float
    relative: bool
    higher_is_better: bool
    drawn: int = 0
    unit: str = "sample"
    are_few: bool = False
    """Whether there are too few samples for any interval to be believed."""
    wilson: dict[str, list[float]] | None = None
    mcnemar: dict[str, float] | None = None
    parts: dict[str, dict[str, float]] | None = None
    """Further scores of the same samples: `reference`, `engine`, and `low` and `high` of engine − reference."""


ROUNDING = 1e-6
"""Share of a metric below which a difference is that of the last bits of float32, which no interval is about."""


def compare(
    metric: Metric, reference: Samples, engine: Samples, *, seed: int = 0, level: float = 0.95
) -> MetricResult:
    """The metric of both, with the interval of the difference and what that says.

    `better` and `worse` need an interval that leaves out 0, and, because a bootstrap of a handful of samples is too
    sure, enough of them; where samples are right or wrong, McNemar's test too.
    """
    n = len(reference)
    if len(engine) != n:
        raise CalibrationError(
            f"metric {metric.name} gave {n} samples of the model and {len(engine)} of the engine",
            hint="let it return one score for each sample of its data, whatever runs it",
        )
    values = metric.value(reference), metric.value(engine)
    if not np.isfinite(values).all():
        raise CalibrationError(
            f"metric {metric.name} over {n} samples is {values[0]} of the model, {values[1]} of the engine",
            hint=f"{metric.file} may hold too few samples, or ones that are all alike",
        )

    def changes(index: Array) -> tuple[float, float]:
        a, b = metric.value(reference, index), metric.value(engine, index)
        return b - a, metric.drop(a, b)

    right = _right(metric, reference, engine)
    if right is not None:
        gap = stats.paired_shares(right[0], right[1], level)
        drop = stats.Interval(-gap.high, -gap.low, level)
    else:
        drawn = stats.resample(changes, n, seed=seed)
        gap, drop = (stats.percentiles(column, n, level) for column in drawn.T)
        gap, drop = (_widened(each, reference, engine) for each in (gap, drop))
    verdict = gap.verdict(higher_is_better=metric.higher_is_better)
    are_few = n < stats.fewest(level)
    if are_few or abs(values[1] - values[0]) <= ROUNDING * max(map(abs, values)):
        verdict = stats.SAME
    wilson = mcnemar = None
    if right is not None:
        shares = [stats.wilson(int(column.sum()), n, level) for column in right]
        wilson = {
            name: [share.low, share.high]
            for name, share in zip(("reference", "engine"), shares, strict=True)
        }
        test = stats.mcnemar(*right)
        mcnemar = {"only_reference": test.only_first, "only_engine": test.only_second, "p": test.p}
        if test.p > 1 - level:
            verdict = stats.SAME
    return MetricResult(
        name=metric.name,
        reference=values[0],
        engine=values[1],
        n=int(reference.columns["tokens"].sum()) if "tokens" in reference.columns else n,
        low=gap.low,
        high=gap.high,
        level=level,
        verdict=verdict,
        drop=metric.drop(*values),
        drop_low=drop.low,
        drop_high=drop.high,
        relative=metric.relative,
        higher_is_better=metric.higher_is_better,
        drawn=n,
        unit=reference.unit,
        are_few=are_few,
        wilson=wilson,
        mcnemar=mcnemar,
        parts=_parts(metric, reference, engine, seed, level)
        if isinstance(metric, OfTask)
        else None,
    )


def _parts(
    metric: OfTask, reference: Samples, engine: Samples, seed: int, level: float
) -> dict[str, dict[str, float]]:
    n, found = len(reference), {}

    def changes(index: Array) -> tuple[float, ...]:
        return tuple(
            metric.value(engine, index, part) - metric.value(reference, index, part)
            for part in metric.parts
        )

    for part, column in zip(metric.parts, stats.resample(changes, n, seed=seed).T, strict=True):
        gap = stats.percentiles(column, n, level)
        found[part] = {
            "reference": metric.value(reference, part=part), "engine": metric.value(engine, part=part),
            "low": gap.low, "high": gap.high,
        }  # fmt: skip
    return found


def _widened(interval: stats.Interval, reference: Samples, engine: Samples) -> stats.Interval:
    """The interval, and where labels or counts differ in a few samples at most, the share that may differ in others.

    Drawing samples again makes nothing of differences that none of them shows.
    """
    columns = reference.columns
    if any(column.dtype.kind not in "biu" for column in columns.values()):
        return interval  # scores of two engines always differ
    differ = np.zeros(len(reference), bool)
    for name, column in columns.items():
        differ |= (column != engine.columns[name]).reshape(len(column), -1).any(axis=1)
    if (count := int(differ.sum())) >= stats.fewest(interval.level):
        return interval
    most = stats.wilson(count, len(differ), interval.level).high
    return stats.Interval(min(interval.low, -most), max(interval.high, most), interval.level)


def _right(metric: Metric, *both: Samples) -> list[Array] | None:
    """Which samples either gets right, where a metric is a share of right ones."""
    if not isinstance(metric, _Mean):
        return None
    columns = [samples.columns[metric.column] for samples in both]
    if any(((column != 0) & (column != 1)).any() for column in columns):
        return None
    return [column > 0 for column in columns]
