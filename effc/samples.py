"""The batches that a compile measures on: calibration, held-out, and batches of a wished shape.

Held-out samples come from the same file and were not calibrated on; batches of a wished shape are filled with real
tokens where there are any. Everything is read again when it is needed, so nothing is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effc.calib import data
from effc.calib.data import Batch, Record
from effc.errors import CalibrationError
from effc.processor import stack
from effc.recipe import CalibSpec
from effc.source import Source, import_code

Array = np.ndarray[Any, np.dtype[Any]]


class Samples:
    """Batches of one source under one calibration spec."""

    def __init__(self, source: Source, spec: CalibSpec | None) -> None:
        self.source, self.spec = source, spec
        self._tokens: Array | None = None

    def __call__(self, role: str) -> Iterator[Batch]:
        """Calibration batches."""
        if self.spec is None:
            yield from self.source.batches() if self.source.batches else ()
        elif self.spec.callable is not None:
            yield from self._called(self.spec.callable)
        else:
            yield from self._batched(self._records(self.spec.samples))

    def held_out(self, batches: int = 4) -> list[Batch]:
        """Up to `batches` batches of the same file that were not calibrated on."""
        if self.spec is None or self.spec.file is None:
            return []
        seen = {_key(record) for record in self._records(self.spec.samples)}
        fresh = (record for record in self._records(None) if _key(record) not in seen)
        return list(self._batched(itertools.islice(fresh, batches * self.spec.batch)))

    def shaped(self, batch: int, length: int) -> dict[str, Array]:
        """Inputs of [batch, length] without padding; `length` falls away where the model has none."""
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

    def has_length(self) -> bool:
        dims = self.source.dims
        return any(
            w in LENGTHS for role in dims.values() for a in role.values() for w in a.values()
        )

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

    def description(self) -> dict[str, Any] | None:
        """Name, size and sha256 of the file, for the manifest."""
        if self.spec is None or self.spec.file is None:
            return None
        path, _ = data.parse(self.spec.file)
        return {**data.digest(path), "samples": self.spec.samples, "seed": self.spec.seed}

    def _records(self, samples: int | None) -> Iterator[Record]:
        assert self.spec is not None and self.spec.file is not None
        path, column = data.parse(self.spec.file)
        column = self.spec.column if self.spec.column is not None else column
        return data.read(path, column=column, samples=samples, seed=self.spec.seed)

    def _batched(self, records: Iterable[Record]) -> Iterator[Batch]:
        assert self.spec is not None
        processor = self.source.processor
        if processor is not None:
            yield from processor.batches(
                records, size=self.spec.batch, max_length=self.spec.max_length
            )
            return
        records = iter(records)
        while chunk := list(itertools.islice(records, self.spec.batch)):
            if chunk[0].arrays is None:
                raise CalibrationError(
                    "this model comes from a factory and takes ready arrays",
                    hint="calibrate with an .npz whose arrays are named as the inputs, or `calib: {callable: …}`",
                )
            yield stack(chunk)

    def _called(self, word: str) -> Iterator[Batch]:
        place, _, attribute = word.rpartition(":")
        function = getattr(import_code(place), attribute, None)
        if function is None:
            raise CalibrationError(f"{place} has no {attribute}", hint="callable: module:function")
        for item in function():
            yield item if isinstance(item, Batch) else Batch(inputs=_arrays(item))


def _arrays(item: Mapping[str, Any]) -> dict[str, Array]:
    if not isinstance(item, Mapping):
        raise CalibrationError(
            f"a calibration batch is a mapping of arrays, not {type(item).__name__}"
        )
    return {name: np.asarray(value) for name, value in item.items()}


def _key(record: Record) -> int:
    parts: list[Any] = [record.text, record.text_pair]
    parts += [None if record.pixels is None else record.pixels.tobytes()]
    parts += [(n, a.tobytes()) for n, a in sorted((record.arrays or {}).items())]
    return hash(tuple(parts))


LENGTHS = ("sequence", "length", "time")
"""Names of the dimension that a bench's `length` sets."""


def data_path(text: str) -> Path:
    """The file part of `FILE#column`."""
    return data.parse(text)[0]
