"""The batches that a compile measures on: calibration, held-out, and batches of a wished shape.

Held-out samples come from the same file and were not calibrated on; batches of a wished shape are filled with real
tokens where there are any. Everything is read again when it is needed, so nothing is kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from effc import causal
from effc.cache import key_of, sha256
from effc.calib import data
from effc.calib.calibrator import fitted
from effc.calib.data import Batch, Record
from effc.errors import CalibrationError, EffcError
from effc.intuition import INPUT
from effc.processor import stack
from effc.recipe import CalibSpec
from effc.room import Room
from effc.source import Source, import_code
from effc.task import Task
from effc.trajectories import Trajectories

Array = np.ndarray[Any, np.dtype[Any]]


class Samples:
    """Batches of one source under one calibration spec."""

    def __init__(self, source: Source, spec: CalibSpec | None, room: Room | None = None) -> None:
        if source.centroids is not None and spec is not None and _holds_arrays(spec):
            spec = None  # they are of the model, which reads what this graph gives
        self.source, self.spec, self.room = source, spec, room
        self._tokens: Array | None = None

    def __call__(self, role: str) -> Iterator[Batch]:
        """Calibration batches in the model's own types. Raises CalibrationError where one does not fit."""
        for batch in self._drawn(role):
            for inputs in self.pieces(self._fitting(role, batch.inputs)):
                yield dataclasses.replace(batch, inputs=inputs)

    def beside(self, statistics_bytes: int, *, keeps_all: bool = False) -> Samples:
        """The same, in pieces that leave so much of a bounded memory to what a pass measures."""
        if self.room is None:
            return self
        return Samples(
            self.source, self.spec, self.room.beside(statistics_bytes, keeps_all=keeps_all)
        )

    def pieces(self, feeds: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        """Inputs in as many pieces as the memory asks for; one where it was not bounded."""
        if self.room is None:
            yield dict(feeds)
        else:
            yield from self.room.pieces(feeds)

    def _drawn(self, role: str) -> Iterator[Batch]:
        if self.trajectories is not None:
            yield from self.trajectories(role)
        elif self.spec is None:
            if self.source.batches is not None:
                yield from _given(f"batches of the source {self.source.name}", self.source.batches)
        elif self.spec.callable is not None:
            yield from _given(self.spec.callable, _function(self.spec.callable))
        else:
            yield from self._batched(self.records())

    @cached_property
    def trajectories(self) -> Trajectories | None:
        """What the source's own sampler gives, where that is asked for."""
        spec = self.spec
        if spec is None or spec.trajectories is None:
            return None
        prompts: list[str] = []
        if spec.file is not None:
            records = itertools.islice(self.records(), spec.trajectories)
            prompts = [record.text or "" for record in records]
        return Trajectories(
            source=self.source.whole or self.source, count=spec.trajectories, steps=spec.steps,
            keep=spec.keep, at=spec.at, guidance=spec.guidance, seed=spec.seed, batch=spec.batch,
            prompts=tuple(prompts),
        )  # fmt: skip

    def batches(self, role: str) -> int | None:
        """How many calibration batches there are, of one size; None where nobody knows."""
        if self.trajectories is not None:
            return self.trajectories.batches(role)
        return math.ceil(self.spec.samples / self.spec.batch) if self.spec is not None else None

    def _fitting(self, role: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs that the model takes, cast where nothing is lost but width."""
        dims = self.source.dims.get(role, {})
        processor = self.source.processor
        if processor is not None and processor.cache and "input_ids" in inputs:
            ids = inputs["input_ids"]
            mask = inputs.get("attention_mask", np.ones_like(ids))
            found = {"input_ids": ids, "attention_mask": mask}
            inputs = {**causal.complete(found, processor.cache), **inputs}
        wanted = {}
        for name, example in self.source.inputs[role].items():
            free = dims.get(name, {0: "batch"})
            sizes = [free.get(axis, size) for axis, size in enumerate(example.shape)]
            wanted[name] = example.numpy().dtype, sizes
        made = fitted(inputs, wanted)
        self._check_ids(made.get("input_ids"))
        return made

    def _check_ids(self, ids: Array | None) -> None:
        processor = self.source.processor
        if ids is None or processor is None or not ids.size:
            return
        words, longest = processor.config.get("vocab_size"), processor.max_length
        if ids.min() < 0 or (isinstance(words, int) and ids.max() >= words):
            raise CalibrationError(
                f"calibration input 'input_ids' has ids from {ids.min()} to {ids.max()}, "
                f"the model's vocabulary has {words}",
                hint="was it made with another tokenizer?",
            )
        if ids.ndim == 2 and longest is not None and ids.shape[1] > longest:
            raise CalibrationError(
                f"calibration input 'input_ids' is {ids.shape[1]} long, the model takes at most {longest}",
                hint="cut the rows",
            )

    def held_out(self, batches: int = 4) -> list[Batch]:
        """Up to `batches` batches of the same file that were not calibrated on."""
        (role,) = self.source.inputs
        if self.trajectories is not None:
            spread = self.trajectories.spread(role, batches)
            return [dataclasses.replace(b, inputs=self._fitting(role, b.inputs)) for b in spread]
        if self.spec is None or self.spec.file is None:
            return []
        fresh = itertools.islice(self.records(left=True), batches * self.spec.batch)
        found = self._batched(fresh)
        return [dataclasses.replace(b, inputs=self._fitting(role, b.inputs)) for b in found]

    def shaped(self, batch: int, length: int, past: int = 0) -> dict[str, Array]:
        """Inputs of [batch, length] without padding; `length` falls away where the model has none.

        `past` is how many positions are in the cache of a model that takes one.
        """
        processor = self.source.processor
        if processor is not None and processor.cache:
            ids = np.resize(self.tokens(), (batch, length)).astype(np.int64)
            found = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            more = {
                n: np.resize(a, (batch, *a.shape[1:]))
                for n, a in self.example().items()
                if n == INPUT
            }
            return {**causal.complete(found, processor.cache, past), **more}
        if isinstance(processor, Task):
            return processor.shaped(batch, length, self.tokens())
        feeds: dict[str, Array] = {}
        (role,) = self.source.inputs
        dims = self.source.dims.get(role, {})
        for name, example in self.source.inputs[role].items():
            array = example.numpy()
            axes = dims.get(name, {0: "batch"} if array.ndim else {})
            for axis, word in axes.items():
                size = (
                    batch if word == "batch" else length if word in LENGTHS else array.shape[axis]
                )
                array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
            if name == "input_ids" and array.ndim == 2:
                array = np.resize(self.tokens(), array.shape).astype(array.dtype)
            feeds[name] = np.ascontiguousarray(array)
        return feeds

    def example(self) -> dict[str, Array]:
        """The source's own example inputs."""
        (role,) = self.source.inputs
        return {name: tensor.numpy() for name, tensor in self.source.inputs[role].items()}

    def shape_of(self, feeds: Mapping[str, Array]) -> tuple[int, int | None]:
        """Batch and length of inputs; where no dimension is named `batch`, the first of the first input counts."""
        (role,) = self.source.inputs
        sizes: dict[str, int] = {}
        for name, axes in self.source.dims.get(role, {}).items():
            for axis, word in axes.items():
                sizes.setdefault("length" if word in LENGTHS else word, feeds[name].shape[axis])
        first = next(iter(feeds.values()))
        batch = sizes.get("batch", first.shape[0] if first.ndim else 1)
        return batch, sizes.get("length")

    def has_length(self) -> bool:
        return self.shape_of(self.example())[1] is not None

    def tokens(self) -> Array:
        """Real token ids in the order of the calibration text; the example's where there is none."""
        if self._tokens is None:
            (role,) = self.source.inputs
            rows = [self.source.inputs[role]["input_ids"].numpy().reshape(-1)]
            first = list(itertools.islice(self(role), 8)) if self.spec is not None else []
            if first and "input_ids" in first[0].inputs:
                masks = [
                    b.inputs.get("attention_mask", np.ones_like(b.inputs["input_ids"]))
                    for b in first
                ]
                rows = [b.inputs["input_ids"][m > 0] for b, m in zip(first, masks, strict=True)]
            self._tokens = np.concatenate(rows)
        return self._tokens

    def key(self) -> str | None:
        """What decides every sample, files and their draw; None where somebody's code has a part in them."""
        spec, source = self.spec, self.source
        if self.trajectories is not None:
            made = self.trajectories
            found = {"scheduler": source.scheduler, "source": source.digest, "batch": made.batch}
            return key_of("samples", **found, **made.description())
        if source.processor is not None and source.directory is None:
            return None
        files = [sha256(source.directory / n) for n in source.files] if source.directory else []
        if source.processor is not None and source.processor.teller is not None:
            files.append(source.processor.teller.digest)
        if isinstance(source.processor, Task):
            files.append(source.digest)  # of its settings too
        if spec is None or spec.file is None:
            is_code = source.batches is not None or spec is not None
            return None if is_code else key_of("samples", files=files)
        path, column = data.parse(spec.file)
        found = {"data": data.digest(path), "spec": {**dataclasses.asdict(spec), "file": column}}
        return key_of("samples", files=files, **found)

    @cached_property
    def _fixed_rows(self) -> int | None:
        """How many rows a batch has, where an ONNX file was written for that many alone; None where it is free."""
        if self.source.file is None:
            return None
        (role,) = self.source.inputs
        dims, inputs = self.source.dims[role], self.source.inputs[role]
        sizes = {len(x) for x in inputs.values() if x.dim()}
        is_free = any(0 in axes for axes in dims.values())
        return None if is_free or len(sizes) != 1 else sizes.pop()

    def description(self) -> dict[str, Any] | None:
        """Name, size and sha256 of the file, for the manifest."""
        if self.trajectories is not None:
            return self.trajectories.description()
        if self.spec is None or self.spec.file is None:
            return None
        path, _ = data.parse(self.spec.file)
        return {**data.digest(path), "samples": self.spec.samples, "seed": self.spec.seed}

    def records(self, *, left: bool = False, labelled: bool = False) -> Iterator[Record]:
        """The samples that are drawn, or those that the same draw leaves. Raises CalibrationError."""
        assert self.spec is not None and self.spec.file is not None
        path, column = data.parse(self.spec.file)
        column = self.spec.column if self.spec.column is not None else column
        if isinstance(self.source.processor, Task):
            items = self.source.processor.read(path, labelled=labelled)
            chosen = data.drawn(items, self.spec.samples, self.spec.seed, left=left)
            return (Record(item=item) for item in chosen)
        return data.read(
            path, column=column, samples=self.spec.samples, seed=self.spec.seed, left=left,
            labelled=labelled,
        )  # fmt: skip

    def of_records(self, role: str, records: Sequence[Record]) -> dict[str, Array]:
        """Samples as one batch of inputs, in the model's own types. Raises CalibrationError where they are none."""
        (batch,) = self._batched(records, size=len(records))
        return self._fitting(role, batch.inputs)

    def _batched(self, records: Iterable[Record], size: int | None = None) -> Iterator[Batch]:
        assert self.spec is not None
        size = size or self.spec.batch
        if (fixed := self._fixed_rows) is not None:
            size, records = fixed, _full(records, fixed)
        processor = self.source.processor
        if processor is not None:
            yield from processor.batches(records, size=size, max_length=self.spec.max_length)
            return
        records = iter(records)
        while chunk := list(itertools.islice(records, size)):
            if chunk[0].arrays is None:
                raise CalibrationError(
                    "this model comes from a factory and takes ready arrays",
                    hint="calibrate with an .npz whose arrays are named as the inputs, or `calib: {callable: …}`",
                )
            yield stack(chunk)


def _full(records: Iterable[Record], rows: int) -> Iterator[Record]:
    """Samples as long as they fill batches of so many rows."""
    records = iter(records)
    while len(chunk := list(itertools.islice(records, rows))) == rows:
        yield from chunk


def _holds_arrays(spec: CalibSpec) -> bool:
    return spec.file is None or data.parse(spec.file)[0].suffix == ".npz"


def _function(word: str) -> Any:
    place, _, attribute = word.rpartition(":")
    function = getattr(import_code(place), attribute, None)
    if function is None:
        raise CalibrationError(f"{place} has no {attribute}", hint="callable: module:function")
    return function


def _given(what: str, function: Callable[[], Iterable[Any]]) -> Iterator[Batch]:
    """Batches of the user's own code. What it raises, or gives that is no batch, is a CalibrationError."""
    try:
        made = function()
        if not isinstance(made, Iterable):
            raise CalibrationError(
                f"{what} gave {type(made).__name__}, which holds no batches", hint=EXPECTED
            )
        for item in made:
            yield _batch(what, item)
    except EffcError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"{what} failed: {type(error).__name__}: {error}",
            hint="--debug shows where in your code",
        ) from error


EXPECTED = "yield mappings of arrays by the names of the model's inputs"


def _batch(what: str, item: Any) -> Batch:
    batch = item if isinstance(item, Batch) else Batch(inputs=item)
    if not isinstance(batch.inputs, Mapping):
        raise CalibrationError(
            f"a batch of {what} is {type(batch.inputs).__name__}, not a mapping of arrays",
            hint=EXPECTED,
        )
    made = {}
    for name, value in batch.inputs.items():
        try:
            made[name] = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        except Exception as error:
            raise CalibrationError(
                f"input {name!r} of {what} is no array: {error}", hint=EXPECTED
            ) from error
    return dataclasses.replace(batch, inputs=made)


LENGTHS = ("sequence", "length", "time")
"""Names of the dimension that a bench's `length` sets."""
