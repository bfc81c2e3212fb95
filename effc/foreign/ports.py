"""Inputs of an ONNX file: examples of them, and the names of their free dimensions in effc's words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from effc.errors import SourceError
from effc.foreign.numbers import DTYPES
from effc.foreign.steps import Steps

BATCH = ("batch", "batch_size", "n", "b", "bs", "unk__0")
SEQUENCE = (
    "sequence",
    "sequence_length",
    "seq",
    "seq_len",
    "seq_length",
    "length",
    "max_seq_len",
    "tokens",
)
WORDS = {**dict.fromkeys(BATCH, "batch"), **dict.fromkeys(SEQUENCE, "sequence")}
"""What exporters call the dimensions that effc knows."""
TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
SIZES = {"batch": 2, "sequence": 16}
PICTURE, OTHER = 64, 8


def example(model: ir.Model, steps: Steps) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """An example of every input, and its free dimensions. Raises SourceError for a type that effc has not."""
    draw = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    dims: dict[str, dict[int, str]] = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name not in steps.inputs:
            continue
        kind = DTYPES.get(int(value.dtype) if value.dtype is not None else 0)
        if kind is None or value.shape is None:
            said = value.dtype.name.lower() if value.dtype is not None else "no type"
            raise SourceError(
                f"input {name!r} is {said}, or has no shape, and effc cannot feed it",
                hint="export the model with inputs in float32, int64 or bool, and their shapes",
            )
        words = [_word(name, axis, size) for axis, size in enumerate(value.shape)]
        shape = [
            w if isinstance(w, int) else _size(w, axis, len(words)) for axis, w in enumerate(words)
        ]
        dims[name] = {axis: w for axis, w in enumerate(words) if isinstance(w, str)}
        inputs[name] = _values(name, shape, kind, _rows(steps, name), draw)
    return inputs, dims


def _word(name: str, axis: int, size: Any) -> int | str:
    """A size, or the name of a free dimension; one without a name is the batch where it comes first."""
    if isinstance(size, int) and size > 0:
        return size
    said = str(getattr(size, "value", None) or "")
    word = WORDS.get(said.lower().strip(), re.sub(r"\W+", "_", said).strip("_"))
    if name in TEXT and axis < 2 and not re.search(r"past|total|\+", said):
        return ("batch", "sequence")[axis]
    return word or ("batch" if axis == 0 else f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}_{axis}")


def _size(word: str, axis: int, rank: int) -> int:
    return SIZES.get(word, PICTURE if axis > 1 and rank > 3 else OTHER)


def _rows(steps: Steps, name: str) -> int | None:
    """How many rows a table has that is read at the places of an input; None where there is none."""
    sizes = [
        steps.constants[step.inputs[0]].shape[0] for step in steps.steps
        if step.op == "Gather" and step.inputs[1] == name and step.inputs[0] in steps.constants
    ]  # fmt: skip
    return min(sizes, default=None)


def _values(
    name: str, shape: list[int], kind: torch.dtype, rows: int | None, draw: torch.Generator
) -> Tensor:
    if kind.is_floating_point:
        return (torch.rand(shape, generator=draw, dtype=torch.float64) * 2 - 1).to(kind)
    if name == "token_type_ids":
        return torch.zeros(shape, dtype=kind)
    if rows is not None:
        return torch.randint(min(3, rows - 1), rows, shape, generator=draw).to(kind)
    return torch.ones(shape, dtype=kind)


def limits(steps: Steps, names: Mapping[str, Any]) -> dict[str, int]:
    """What a model's settings would say: how many words it knows."""
    rows = _rows(steps, "input_ids") if "input_ids" in names else None
    return {"vocab_size": rows} if rows is not None else {}
