"""ONNX's operators in torch's words, those of the elements and of shapes.

Each takes its step and its inputs, None where one is left out: tensors, or numbers as `numbers` has them. Sizes in a
message of torch are enough to find a fault: the caller puts the node's name in front.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.foreign.numbers import DTYPES, bounds_of, is_numbers, listed, one, tensor
from effc.foreign.steps import Step

aten: Any = torch.ops.aten
Operator = Callable[..., Any]


def _number(value: Any) -> Any:
    """A number by itself where a tensor takes one, and everything else as a tensor."""
    if not is_numbers(value):
        return value
    return one(value) if value.size == 1 else tensor(value)


def unary(function: Callable[[Tensor], Any]) -> Operator:
    return lambda step, x: function(tensor(x))


def binary(function: Callable[[Any, Any], Any]) -> Operator:
    def run(step: Step, a: Any, b: Any) -> Any:
        a, b = _number(a), _number(b)
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            a = torch.scalar_tensor(a)
        return function(a, b)

    return run


def both(function: Callable[[Tensor, Tensor], Any]) -> Operator:
    """An operator that torch has for two tensors alone."""
    return lambda step, a, b: function(tensor(a), tensor(b))


def many(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(step: Step, *given: Any) -> Any:
        found, *others = map(tensor, given)
        for other in others:
            found = function(found, other)
        return found

    return run


def _divided(a: Any, b: Any) -> Any:
    kinds = [v for v in (a, b) if isinstance(v, Tensor)]
    if any(v.is_floating_point() for v in kinds):
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _mod(step: Step, a: Any, b: Any) -> Any:
    a, b = tensor(a), _number(b)
    return torch.fmod(a, b) if step.get("fmod", 0) else torch.remainder(a, b)


def _pow(a: Any, b: Any) -> Any:
    return torch.pow(a, b)


def _clip(step: Step, x: Any, low: Any = None, high: Any = None) -> Any:
    low = one(low) if low is not None and is_numbers(low) else low
    high = one(high) if high is not None and is_numbers(high) else high
    low = step.get("min") if low is None else low
    high = step.get("max") if high is None else high
    x = tensor(x)
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        x = x if low is None else torch.maximum(x, torch.as_tensor(low))
        return x if high is None else torch.minimum(x, torch.as_tensor(high))
    return torch.relu(x) if (low, high) == (0, None) else torch.clamp(x, low, high)


def _cast(step: Step, x: Any, like: Any = None) -> Any:
    x = tensor(x)
    return x.to(DTYPES[step.get("to")] if like is None else like.dtype)


def _where(step: Step, chosen: Any, a: Any, b: Any) -> Any:
    both_numbers = is_numbers(a) and is_numbers(b)
    return torch.where(tensor(chosen), tensor(a) if both_numbers else _number(a), _number(b))


def _gelu(step: Step, x: Any) -> Any:
    kind = step.get("approximate", "none")
    return F.gelu(tensor(x), approximate=kind if isinstance(kind, str) else kind.decode())


def _hard_sigmoid(step: Step, x: Any) -> Any:
    return torch.clamp(tensor(x) * step.get("alpha", 0.2) + step.get("beta", 0.5), 0.0, 1.0)


def _prelu(step: Step, x: Any, slope: Any) -> Any:
    x, slope = tensor(x), tensor(slope)
    return torch.where(x < 0, x * slope, x)


def shape_of(step: Step, x: Any) -> Any:
    """A shape as numbers; symbols where a dimension is free."""
    import numpy as np

    sizes = list(x.shape)[slice(step.get("start", 0), step.get("end"))]
    found = np.empty(len(sizes), object)
    found[:] = sizes
    return found.astype(np.int64) if all(type(s) is int for s in sizes) else found


def _size(step: Step, x: Any) -> Any:
    import numpy as np

    found = np.empty((), object)
    found[()] = math.prod(x.shape)
    return found.astype(np.int64) if isinstance(found.item(), int) else found


def _reshape(step: Step, x: Any, shape: Any = None) -> Any:
    x = tensor(x)
    sizes = listed(shape) if shape is not None else list(step.get("shape"))
    if not step.get("allowzero", 0):
        sizes = [x.shape[i] if type(s) is int and s == 0 else s for i, s in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(step: Step, x: Any) -> Any:
    axis = step.get("axis", 1)
    x = tensor(x)
    axis = axis + x.dim() if axis < 0 else axis
    if axis in (0, x.dim()):
        return x.reshape((1, -1) if axis == 0 else (-1, 1))
    return torch.flatten(x, axis) if axis == 1 else torch.flatten(x, axis).flatten(0, axis - 1)


def axes_of(step: Step, given: Any) -> list[int] | None:
    """Axes as an attribute or as an input; None where they are left out."""
    if given is not None:
        return listed(given)
    axes = step.get("axes")
    return None if axes is None else list(axes)


def _squeeze(step: Step, x: Any, axes: Any = None) -> Any:
    chosen = axes_of(step, axes)
    return tensor(x).squeeze() if chosen is None else tensor(x).squeeze(tuple(chosen))


def _unsqueeze(step: Step, x: Any, axes: Any = None) -> Any:
    x = tensor(x)
    chosen = axes_of(step, axes) or []
    rank = x.dim() + len(chosen)
    for axis in sorted(a % rank for a in chosen):
        x = x.unsqueeze(axis)
    return x


def _transpose(step: Step, x: Any) -> Any:
    x = tensor(x)
    order = step.get("perm") or list(range(x.dim()))[::-1]
    return x.permute(list(order))


def _concat(step: Step, *parts: Any) -> Any:
    return torch.cat([tensor(p) for p in parts], dim=step.get("axis"))


def _split(step: Step, x: Any, sizes: Any = None) -> Any:
    x, axis = tensor(x), step.get("axis", 0)
    if sizes is not None or step.get("split") is not None:
        parts = listed(sizes) if sizes is not None else list(step.get("split"))
    else:
        count = len(step.outputs)
        each = -(-x.shape[axis] // count)
        parts = [each] * (count - 1) + [x.shape[axis] - each * (count - 1)]
    return tuple(torch.split(x, parts, dim=axis))


def _slice(step: Step, x: Any, *given: Any) -> Any:
    x = tensor(x)
    if given:
        starts, ends, axes, steps = bounds_of(given)
    else:
        starts, ends, axes, steps = step.get("starts"), step.get("ends"), step.get("axes"), None
    axes = axes or list(range(len(starts)))
    for place, axis in enumerate(axes):
        by = steps[place] if steps else 1
        if by < 0:
            x = _backwards(x, axis, starts[place], ends[place], by)
        else:
            x = aten.slice(x, axis, starts[place], _end(ends[place]), by)
    return x


def _end(end: Any) -> Any:
    return min(end, sys.maxsize) if isinstance(end, int) else end


def _backwards(x: Tensor, axis: int, start: int, end: int, by: int) -> Any:
    """A slice from its end: what is turned round first is read forwards."""
    size = x.shape[axis]
    start = start + size if start < 0 else min(start, size - 1)
    end = -1 if end < -size else end + size if end < 0 else end
    return aten.slice(x.flip(axis), axis, size - 1 - start, size - 1 - end, -by)


def _expand(step: Step, x: Any, shape: Any) -> Any:
    x, sizes = tensor(x), listed(shape)
    have = [1] * (len(sizes) - x.dim()) + list(x.shape)
    sizes = [1] * (len(have) - len(sizes)) + sizes
    wanted = [
        old if type(new) is int and new == 1 else new for old, new in zip(have, sizes, strict=True)
    ]
    return x.expand(wanted)


def _tile(step: Step, x: Any, times: Any) -> Any:
    return tensor(x).repeat(listed(times))


def _gather(step: Step, x: Any, places: Any) -> Any:
    x, axis = tensor(x), step.get("axis", 0)
    if is_numbers(places) and places.ndim == 0:
        return torch.select(x, axis, one(places))
    places = tensor(places)
    if x.is_floating_point() and axis == 0 and x.dim() == 2 and step.get("is_table"):
        return F.embedding(places, x)
    axis = axis % x.dim()
    if places.dim() == 1:
        return torch.index_select(x, axis, _wrapped(places, x.shape[axis]))
    return x[(*[slice(None)] * axis, places)]


def _wrapped(places: Tensor, size: Any) -> Tensor:
    return torch.where(places < 0, places + size, places)


def _gather_elements(step: Step, x: Any, places: Any) -> Any:
    x, axis = tensor(x), step.get("axis", 0)
    return torch.gather(x, axis, _wrapped(tensor(places), x.shape[axis]))


def _gather_nd(step: Step, x: Any, places: Any) -> Any:
    x, places = tensor(x), tensor(places)
    first = step.get("batch_dims", 0)
    if first:
        raise ValueError("batch_dims other than 0 are not read")
    return x[tuple(places.unbind(-1))]


def _scatter_elements(step: Step, x: Any, places: Any, values: Any) -> Any:
    if step.get("reduction", "none") not in ("none", b"none"):
        raise ValueError("a scatter that adds up is not read")
    return torch.scatter(tensor(x), step.get("axis", 0), tensor(places), tensor(values))


def _scatter_nd(step: Step, x: Any, places: Any, values: Any) -> Any:
    if step.get("reduction", "none") not in ("none", b"none"):
        raise ValueError("a scatter that adds up is not read")
    return torch.index_put(tensor(x), tuple(tensor(places).unbind(-1)), tensor(values))


def _pad(step: Step, x: Any, pads: Any = None, fill: Any = None, axes: Any = None) -> Any:
    x = tensor(x)
    amounts = listed(pads) if pads is not None else list(step.get("pads"))
    value = one(fill) if fill is not None else step.get("value", 0.0)
    chosen = listed(axes) if axes is not None else list(range(x.dim()))
    half = len(chosen)
    sides = {axis % x.dim(): (amounts[i], amounts[half + i]) for i, axis in enumerate(chosen)}
    mode = step.get("mode", "constant")
    flat = [side for axis in reversed(range(x.dim())) for side in sides.get(axis, (0, 0))]
    if mode == "constant":
        return F.pad(x, flat, value=value)
    words = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    while flat[-2:] == [0, 0] and len(flat) > 2 * (x.dim() - 2):
        flat = flat[:-2]
    return F.pad(x, flat, mode=words[mode])


def _constant_of_shape(step: Step, shape: Any) -> Any:
    fill = step.get("value")
    value = fill.reshape(-1)[0].item() if fill is not None else 0.0
    kind = getattr(torch, str(fill.dtype)) if fill is not None else torch.float32
    return torch.full(listed(shape), value, dtype=kind)


def _range(step: Step, start: Any, limit: Any, by: Any) -> Any:
    values = [one(v) for v in (start, limit, by)]
    return torch.arange(*values)


def _one_hot(step: Step, places: Any, depth: Any, values: Any) -> Any:
    off, on = tensor(values).unbind(0)
    hot = torch.arange(one(depth)) == tensor(places).unsqueeze(-1)
    found = torch.where(hot, on, off)
    axis = step.get("axis", -1)
    return found if axis == -1 else found.movedim(-1, axis)


def _trilu(step: Step, x: Any, diagonal: Any = None) -> Any:
    k = 0 if diagonal is None else one(diagonal)
    return torch.triu(tensor(x), k) if step.get("upper", 1) else torch.tril(tensor(x), k)


def _cumsum(step: Step, x: Any, axis: Any) -> Any:
    if step.get("exclusive", 0) or step.get("reverse", 0):
        raise ValueError("a running sum that is exclusive or backwards is not read")
    x = tensor(x)
    return torch.cumsum(x, one(axis), dtype=x.dtype)


def _top_k(step: Step, x: Any, k: Any) -> Any:
    largest = bool(step.get("largest", 1))
    found = torch.topk(
        tensor(x), one(k), step.get("axis", -1), largest, bool(step.get("sorted", 1))
    )
    return found.values, found.indices


def _arg(function: Any) -> Operator:
    def run(step: Step, x: Any) -> Any:
        if step.get("select_last_index", 0):
            raise ValueError("the last of equal values is not read")
        return function(tensor(x), dim=step.get("axis", 0), keepdim=bool(step.get("keepdims", 1)))

    return run


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(step: Step, x: Any, axes: Any = None) -> Any:
        x, chosen = tensor(x), axes_of(step, axes)
        if not chosen:
            if step.get("noop_with_empty_axes", 0):
                return x
            chosen = list(range(x.dim()))
        return function(x, chosen, bool(step.get("keepdims", 1)))

    return run


def _product(x: Tensor, axes: list[int], keeps: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keeps)
    return x


def _softmax(function: Any) -> Operator:
    def run(step: Step, x: Any) -> Any:
        x = tensor(x)
        if step.get("opset") >= 13:
            return function(x, dim=step.get("axis", -1))
        axis = step.get("axis", 1) % x.dim()
        if axis == x.dim() - 1:
            return function(x, dim=axis)
        return function(x.flatten(axis), dim=-1).reshape(x.shape)

    return run


def _depth_to_space(step: Step, x: Any) -> Any:
    x, block = tensor(x), step.get("blocksize")
    if step.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    b, c, h, w = x.shape
    parts = x.reshape(b, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(b, c // block**2, h * block, w * block)


def _space_to_depth(step: Step, x: Any) -> Any:
    x, block = tensor(x), step.get("blocksize")
    b, c, h, w = x.shape
    parts = x.reshape(b, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(b, c * block**2, h // block, w // block)


ELEMENTS: dict[str, Operator] = {
    "Abs": unary(torch.abs),
    "Add": binary(lambda a, b: a + b),
    "And": both(torch.logical_and),
    "Cast": _cast,
    "CastLike": _cast,
    "Ceil": unary(torch.ceil),
    "Celu": lambda step, x: F.celu(tensor(x), step.get("alpha", 1.0)),
    "Clip": _clip,
    "Cos": unary(torch.cos),
    "Div": binary(_divided),
    "Dropout": lambda step, x, *_: tensor(x),
    "Elu": lambda step, x: F.elu(tensor(x), step.get("alpha", 1.0)),
    "Equal": binary(lambda a, b: torch.eq(a, b)),
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "Floor": unary(torch.floor),
    "Gelu": _gelu,
    "Greater": binary(lambda a, b: a > b),
    "GreaterOrEqual": binary(lambda a, b: a >= b),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": unary(F.hardswish),
    "Identity": unary(lambda x: x),
    "IsInf": unary(torch.isinf),
    "IsNaN": unary(torch.isnan),
    "LeakyRelu": lambda step, x: F.leaky_relu(tensor(x), step.get("alpha", 0.01)),
    "Less": binary(lambda a, b: a < b),
    "LessOrEqual": binary(lambda a, b: a <= b),
    "Log": unary(torch.log),
    "Max": many(torch.maximum),
    "Min": many(torch.minimum),
    "Mish": unary(F.mish),
    "Mod": _mod,
    "Mul": binary(lambda a, b: a * b),
    "Neg": unary(torch.neg),
    "Not": unary(torch.logical_not),
    "Or": both(torch.logical_or),
    "Pow": binary(_pow),
    "PRelu": _prelu,
    "Reciprocal": unary(torch.reciprocal),
    "Relu": unary(torch.relu),
    "Round": unary(torch.round),
    "Selu": unary(F.selu),
    "Sigmoid": unary(torch.sigmoid),
    "Sign": unary(torch.sign),
    "Silu": unary(F.silu),
    "Sin": unary(torch.sin),
    "Softplus": unary(F.softplus),
    "Softsign": unary(F.softsign),
    "Sqrt": unary(torch.sqrt),
    "Sub": binary(lambda a, b: a - b),
    "Sum": many(lambda a, b: a + b),
    "Swish": lambda step, x: tensor(x) * torch.sigmoid(tensor(x) * step.get("alpha", 1.0)),
    "Tan": unary(torch.tan),
    "Tanh": unary(torch.tanh),
    "Where": _where,
    "Xor": both(torch.logical_xor),
}

SHAPES: dict[str, Operator] = {
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumsum,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "ReduceL1": _reduced(lambda x, a, k: x.abs().sum(a, keepdim=k)),
    "ReduceL2": _reduced(lambda x, a, k: torch.linalg.vector_norm(x, 2, a, k)),
    "ReduceLogSumExp": _reduced(lambda x, a, k: torch.logsumexp(x, a, k)),
    "ReduceMax": _reduced(lambda x, a, k: torch.amax(x, a, k)),
    "ReduceMean": _reduced(lambda x, a, k: x.mean(a, k)),
    "ReduceMin": _reduced(lambda x, a, k: torch.amin(x, a, k)),
    "ReduceProd": _reduced(_product),
    "ReduceSum": _reduced(lambda x, a, k: x.sum(a, k, dtype=x.dtype)),
    "ReduceSumSquare": _reduced(lambda x, a, k: (x * x).sum(a, k)),
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": shape_of,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "LogSoftmax": _softmax(torch.log_softmax),
    "Softmax": _softmax(torch.softmax),
}
