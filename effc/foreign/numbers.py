"""Sizes and settings as plain numbers: what an ONNX graph computes with small tensors, done in Python.

Exporters write `x.view(b, s, 4, 8)` as a dozen nodes that take a shape apart and put it together again. Here such a
value is an array of numbers, of which those that a free dimension decides are torch's symbols, so that the trace sees
sizes and no tensors.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effc.foreign.steps import Step

Numbers = np.ndarray[Any, np.dtype[Any]]
MOST = 64
"""A constant of more values is data and no size."""


def is_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def numbers_of(tensor: Tensor) -> Numbers | None:
    """A small constant as numbers: whole ones in a row, or one alone. None for any other."""
    if tensor.numel() == 1 and tensor.dim() < 2:
        return tensor.numpy()
    is_whole = not tensor.is_floating_point() and tensor.dim() < 2 and tensor.numel() <= MOST
    return tensor.numpy() if is_whole else None


def tensor(value: Any) -> Tensor:
    """A value as a tensor, symbols in it as sizes that the graph works out.

    Numbers are written into the graph and are no constants of it: torch takes a graph with constants of its own apart,
    and reshapes in it become views, which a value of another layout breaks.
    """
    if isinstance(value, Tensor):
        return value
    parts = [v.item() if isinstance(v, np.generic) else v for v in value.reshape(-1)]
    is_float = any(isinstance(v, float | torch.SymFloat) for v in parts)
    kind = torch.float32 if is_float else torch.int64
    if value.dtype != object:
        kind = getattr(torch, str(value.dtype))
        if value.ndim and len(set(parts)) == 1:
            return torch.full(value.shape, parts[0], dtype=kind)
    made = [torch.scalar_tensor(v, dtype=kind) for v in parts]
    return torch.stack(made).reshape(value.shape) if value.ndim else made[0]


def listed(value: Any) -> list[Any]:
    """Numbers in a row as a list of Python's. Raises ValueError for a tensor that data decide."""
    if isinstance(value, Tensor):
        raise ValueError(
            "a size or an axis hangs on data here, and effc reads graphs of fixed axes"
        )
    return [v.item() if isinstance(v, np.generic) else v for v in value.reshape(-1)]


def one(value: Any) -> Any:
    """A number by itself."""
    (found,) = listed(value)
    return found


def _map(function: Callable[..., Any], *values: Any, dtype: Any = object) -> Any:
    arrays = np.broadcast_arrays(*values) if len(values) > 1 else [np.asarray(values[0])]
    made = [
        function(*(v.item() if isinstance(v, np.generic) else v for v in row))
        for row in zip(*(a.reshape(-1) for a in arrays), strict=True)
    ]
    found: Any = np.empty(len(made), object)
    found[:] = made
    found = found.reshape(arrays[0].shape)
    if any(isinstance(v, torch.SymInt | torch.SymFloat | torch.SymBool) for v in made):
        return found
    if dtype is object:
        dtype = bool if made and all(isinstance(v, bool) for v in made) else (
            np.float32 if any(isinstance(v, float) for v in made) else np.int64
        )  # fmt: skip
    return found.astype(dtype)


def _divided(a: Any, b: Any) -> Any:
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    return a // b  # sizes are never negative


def _cast(step: Step, value: Any) -> Any:
    kind = DTYPES[step.get("to")]
    if kind.is_floating_point:
        return _map(lambda v: torch.sym_float(v), value, dtype=str(kind)[6:])
    if kind is torch.bool:
        return _map(bool, value)
    return _map(lambda v: torch.sym_int(v), value, dtype=str(kind)[6:])


def _slice(step: Step, value: Any, *given: Any) -> Numbers:
    if given:
        starts, ends, axes, steps = bounds_of(given)
    else:
        starts, ends, axes, steps = step.get("starts"), step.get("ends"), step.get("axes"), None
    axes = axes or list(range(len(starts)))
    cut: list[Any] = [slice(None)] * value.ndim
    for place, axis in enumerate(axes):
        by = steps[place] if steps else 1
        low, high = starts[place], ends[place]
        if by < 0:
            high = None if high <= -value.shape[axis] - 1 else high
        cut[axis] = slice(low, high, by)
    return np.asarray(value[tuple(cut)])


def bounds_of(given: Sequence[Any]) -> list[Any]:
    """Starts, ends, axes and steps of a slice as lists; None for what is left out."""
    found: list[Any] = [None if value is None else listed(value) for value in given]
    return [*found, None, None, None, None][:4]


def _axes(step: Step, given: Any) -> list[int]:
    return listed(given) if given is not None else list(step.get("axes", ()))


def _unsqueeze(step: Step, value: Any, axes: Any = None) -> Numbers:
    return np.expand_dims(value, tuple(_axes(step, axes)))


def _squeeze(step: Step, value: Any, axes: Any = None) -> Any:
    chosen = _axes(step, axes)
    return np.squeeze(value, tuple(chosen) if chosen else None)


def _constant_of_shape(step: Step, shape: Any) -> Any:
    fill = step.get("value")
    value = fill.reshape(-1)[0] if fill is not None else np.float32(0)
    sizes = listed(shape)
    if not all(isinstance(s, int) for s in sizes) or math.prod(sizes) > MOST:
        raise NotNumbers
    return np.full(sizes, value)


def _reduced(fold: Callable[[Any, Any], Any]) -> Callable[..., Numbers]:
    def run(step: Step, value: Any, axes: Any = None) -> Any:
        parts = listed(value)
        if not parts:
            raise NotNumbers
        found = parts[0]
        for part in parts[1:]:
            found = fold(found, part)
        keeps = bool(step.get("keepdims", 1)) and value.ndim == 1
        return _map(lambda v: v, np.array([found], object)).reshape((1,) if keeps else ())

    return run


def _range(step: Step, *given: Any) -> Numbers:
    start, limit, by = map(one, given)
    if not all(isinstance(v, int) for v in (start, limit, by)) or abs(limit - start) > MOST:
        raise NotNumbers
    return np.arange(start, limit, by)


def _gather(step: Step, value: Any, places: Any) -> Numbers:
    if places.dtype == object:
        raise NotNumbers
    return np.asarray(np.take(value, places, axis=step.get("axis", 0)), value.dtype)


def _reshape(step: Step, value: Any, shape: Any) -> Any:
    return value.reshape(listed(shape))


def _expand(step: Step, value: Any, shape: Any) -> Numbers:
    sizes = listed(shape)
    if not all(isinstance(s, int) for s in sizes):
        raise NotNumbers
    return np.broadcast_to(value, np.broadcast_shapes(value.shape, tuple(sizes)))


class NotNumbers(Exception):
    """The value is no small row of numbers after all; tensors will do."""


def _pairs(function: Callable[[Any, Any], Any]) -> Callable[..., Numbers]:
    return lambda step, a, b: _map(function, a, b)


def _alone(function: Callable[[Any], Any]) -> Callable[..., Numbers]:
    return lambda step, a: _map(function, a)


ON_NUMBERS: Mapping[str, Callable[..., Any]] = {
    "Add": _pairs(operator.add),
    "Sub": _pairs(operator.sub),
    "Mul": _pairs(operator.mul),
    "Div": _pairs(_divided),
    "Mod": _pairs(operator.mod),
    "Pow": _pairs(operator.pow),
    "Max": lambda step, *v: _map(torch.sym_max, *v) if len(v) == 2 else v[0],
    "Min": lambda step, *v: _map(torch.sym_min, *v) if len(v) == 2 else v[0],
    "Equal": _pairs(lambda a, b: bool(a == b)),
    "Less": _pairs(lambda a, b: bool(a < b)),
    "LessOrEqual": _pairs(lambda a, b: bool(a <= b)),
    "Greater": _pairs(lambda a, b: bool(a > b)),
    "GreaterOrEqual": _pairs(lambda a, b: bool(a >= b)),
    "And": _pairs(lambda a, b: bool(a and b)),
    "Or": _pairs(lambda a, b: bool(a or b)),
    "Not": _alone(lambda a: not a),
    "Where": lambda step, c, a, b: _map(lambda x, y, z: y if x else z, c, a, b),
    "Neg": _alone(operator.neg),
    "Abs": _alone(abs),
    "Sqrt": _alone(lambda v: torch.sym_sqrt(v) if isinstance(v, torch.SymFloat) else math.sqrt(v)),
    "Reciprocal": _alone(lambda v: 1.0 / v),
    "Floor": _alone(lambda v: torch.sym_float(torch.sym_int(v))),
    "Ceil": _alone(lambda v: float(math.ceil(v))),
    "Cast": _cast,
    "Identity": lambda step, v: v,
    "Gather": _gather,
    "Concat": lambda step, *v: np.concatenate(v, axis=step.get("axis", 0)),
    "Slice": _slice,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "ReduceProd": _reduced(operator.mul),
    "ReduceSum": _reduced(operator.add),
    "Range": _range,
}
"""What is done to numbers as numbers."""

DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    11: torch.float64,
}
"""Types of ONNX that effc has."""
