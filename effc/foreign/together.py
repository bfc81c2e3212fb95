"""What exporters take apart, put together again: layers, norms, activations and attention as the operators they were.

Engines have kernels for the whole, and passes look for it: a linear layer is quantised and pruned, a product with an
addition behind it is not. Each function here looks at one kind of step, and changes the list where the pattern holds
to the letter; what is a little different stays as it is, which is slower and never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from effc.foreign.steps import Step, Steps, renamed


class _Sheet:
    """A list of steps that is looked at from both ends of a value."""

    def __init__(self, steps: Steps) -> None:
        self.of = steps
        self.makers, self.readers = steps.makers(), steps.readers()

    def maker(self, name: str, *ops: str) -> Step | None:
        """What makes a value, where that is one of `ops`."""
        step = self.makers.get(name)
        return step if step is not None and step.op in ops else None

    def only(self, name: str, *ops: str) -> Step | None:
        """The only reader of a value that is no output, where it is one of `ops`."""
        found = self.readers.get(name, [])
        return found[0] if len(found) == 1 and found[0] is not None and found[0].op in ops else None

    def number(self, name: str) -> float | None:
        tensor = self.of.constants.get(name)
        return float(tensor) if tensor is not None and tensor.numel() == 1 else None

    def near(self, name: str, value: float) -> bool:
        found = self.number(name)
        return found is not None and math.isclose(found, value, rel_tol=1e-5)

    def beside(self, step: Step, name: str) -> str:
        """The other input of a step of two."""
        return step.inputs[1] if step.inputs[0] == name else step.inputs[0]

    def axes(self, step: Step) -> list[int] | None:
        """Axes of a reduction, where they are known."""
        given = step.get("axes")
        if given is None and len(step.inputs) > 1:
            tensor = self.of.constants.get(step.inputs[1])
            given = tensor.tolist() if tensor is not None else None
        return None if given is None else list(given)

    def put(self, last: Step, *made: Step) -> None:
        """Steps in the place of the last of a pattern; what only that pattern read goes with `prune`."""
        place = next(i for i, step in enumerate(self.of.steps) if step is last)
        self.of.steps[place : place + 1] = made
        self.of.prune()
        self.makers, self.readers = self.of.makers(), self.of.readers()


def together(steps: Steps) -> None:
    """Put together all that is known, in place."""
    sheet = _Sheet(steps)
    for op, rule in RULES:
        for step in [s for s in steps.steps if s.op == op]:
            if any(step is s for s in steps.steps):
                rule(sheet, step)


def _layer_norm(sheet: _Sheet, root: Step) -> None:
    """(x − mean) / √(mean((x − mean)²) + ε) · gain + bias, from its root on."""
    total = sheet.maker(root.inputs[0], "Add")
    ratio = sheet.only(root.outputs[0], "Div")
    if total is None or ratio is None or ratio.inputs[1] != root.outputs[0]:
        return
    eps = next((n for v in total.inputs if (n := sheet.number(v)) is not None), None)
    variance = next((m for v in total.inputs if (m := sheet.maker(v, "ReduceMean"))), None)
    if eps is None or variance is None or not _over_last(sheet, variance):
        return
    square = sheet.maker(variance.inputs[0], "Pow", "Mul")
    if square is None or square.inputs[0] != ratio.inputs[0]:
        return
    if not (
        sheet.near(square.inputs[1], 2)
        if square.op == "Pow"
        else square.inputs[0] == square.inputs[1]
    ):
        return
    centred = sheet.maker(ratio.inputs[0], "Sub")
    if centred is None:
        return
    mean = sheet.maker(centred.inputs[1], "ReduceMean")
    if mean is None or mean.inputs[0] != centred.inputs[0] or not _over_last(sheet, mean):
        return
    affine = _affine(sheet, ratio.outputs[0], _vector)
    if affine is None:
        return
    gain, bias, shifted = affine
    made = Step(
        op="LayerNormalization", inputs=(mean.inputs[0], gain, bias), outputs=shifted.outputs,
        attributes={"epsilon": eps, "axis": -1}, path=shifted.path, word=root.word,
    )  # fmt: skip
    sheet.put(shifted, made)


def _over_last(sheet: _Sheet, step: Step) -> bool:
    return sheet.axes(step) == [-1] and bool(step.get("keepdims", 1))


def _affine(
    sheet: _Sheet, name: str, kind: Callable[[_Sheet, Step, str], str | None]
) -> tuple[str, str, Step] | None:
    """Gain and bias behind a value, constants of a kind, and the step that adds the bias."""
    scaled = sheet.only(name, "Mul")
    shifted = sheet.only(scaled.outputs[0], "Add") if scaled is not None else None
    if scaled is None or shifted is None:
        return None
    gain, bias = kind(sheet, scaled, name), kind(sheet, shifted, scaled.outputs[0])
    return None if gain is None or bias is None else (gain, bias, shifted)


def _vector(sheet: _Sheet, step: Step, name: str) -> str | None:
    """The constant row beside a value."""
    other = sheet.beside(step, name)
    tensor = sheet.of.constants.get(other)
    return other if tensor is not None and tensor.dim() == 1 else None


def _gelu(sheet: _Sheet, erf: Step) -> None:
    """x / 2 · (1 + erf(x / √2)), in either order."""
    inner = sheet.maker(erf.inputs[0], "Div", "Mul")
    plus = sheet.only(erf.outputs[0], "Add")
    if inner is None or plus is None or not sheet.near(sheet.beside(plus, erf.outputs[0]), 1):
        return
    x = next((v for v in inner.inputs if sheet.number(v) is None), "")
    factor = sheet.number(sheet.beside(inner, x)) or 0.0
    wanted = math.sqrt(2) if inner.op == "Div" else math.sqrt(0.5)
    if not math.isclose(factor, wanted, rel_tol=1e-4) or (
        inner.op == "Div" and inner.inputs[0] != x
    ):
        return
    product = sheet.only(plus.outputs[0], "Mul")
    if product is None:
        return
    other = sheet.beside(product, plus.outputs[0])
    last = product
    if other == x:
        halved = sheet.only(product.outputs[0], "Mul")
        if halved is None or not sheet.near(sheet.beside(halved, product.outputs[0]), 0.5):
            return
        last = halved
    else:
        half = sheet.maker(other, "Mul")
        if half is None or x not in half.inputs or not sheet.near(sheet.beside(half, x), 0.5):
            return
    sheet.put(
        last, Step(op="Gelu", inputs=(x,), outputs=last.outputs, path=last.path, word=erf.word)
    )


def _silu(sheet: _Sheet, sigmoid: Step) -> None:
    product = sheet.only(sigmoid.outputs[0], "Mul")
    x = sigmoid.inputs[0]
    if product is None or sheet.beside(product, sigmoid.outputs[0]) != x:
        return
    made = Step(
        op="Silu", inputs=(x,), outputs=product.outputs, path=product.path, word=sigmoid.word
    )
    sheet.put(product, made)


def _group_norm(sheet: _Sheet, inner: Step) -> None:
    """A norm of groups, as older exporters write it: the groups as instances, gain and bias behind them."""
    before = sheet.maker(inner.inputs[0], "Reshape")
    after = sheet.only(inner.outputs[0], "Reshape")
    if before is None or after is None:
        return
    shape = sheet.of.constants.get(before.inputs[1])
    one, zero = (sheet.of.constants.get(name) for name in inner.inputs[1:3])
    if shape is None or shape.numel() != 3 or one is None or zero is None:
        return
    first, groups, rest = shape.tolist()
    if first != 0 or rest != -1 or groups < 1 or bool((one != 1).any() or (zero != 0).any()):
        return
    if not _is_shape_of(sheet, after.inputs[1], before.inputs[0]):
        return
    affine = _affine(sheet, after.outputs[0], _column)
    if affine is None:
        return
    *columns, shifted = affine
    names = [f"{name}.row" for name in columns]
    for name, row in zip(columns, names, strict=True):
        sheet.of.constants[row] = sheet.of.constants[name].reshape(-1)
    made = Step(
        op="GroupNormalization", inputs=(before.inputs[0], *names), outputs=shifted.outputs,
        attributes={"epsilon": inner.get("epsilon", 1e-5), "num_groups": groups, "opset": 21},
        path=shifted.path, word=inner.word,
    )  # fmt: skip
    sheet.put(shifted, made)


def _is_shape_of(sheet: _Sheet, name: str, value: str) -> bool:
    shape = sheet.maker(name, "Shape")
    return shape is not None and shape.inputs[0] == value


def _column(sheet: _Sheet, step: Step, name: str) -> str | None:
    """The constant [channels, 1, …] beside a value."""
    other = sheet.beside(step, name)
    tensor = sheet.of.constants.get(other)
    is_column = tensor is not None and tensor.dim() > 1 and tensor.numel() == max(tensor.shape)
    return other if tensor is not None and is_column and tensor.shape[-1] == 1 else None


def _attention(sheet: _Sheet, softmax: Step) -> None:
    """softmax(q kᵀ · scale + mask) v, where k was turned round in front of the product."""
    if softmax.get("axis", -1) not in (-1, 3):
        return
    scale, mask = 1.0, ""
    scores = sheet.makers.get(softmax.inputs[0])
    if scores is not None and scores.op == "Add":
        left, right = (_product_behind(sheet, v) for v in scores.inputs)
        if (left is None) == (right is None):
            return
        mask = scores.inputs[1 if left is not None else 0]
        scores = sheet.makers.get(scores.inputs[0 if left is not None else 1])
    if scores is not None and scores.op in ("Div", "Mul"):
        place = next((i for i, v in enumerate(scores.inputs) if sheet.number(v) is not None), None)
        if place is None or (scores.op == "Div" and place == 0):
            return
        number = sheet.number(scores.inputs[place]) or 0.0
        scale = number if scores.op == "Mul" else 1 / number
        scores = sheet.makers.get(scores.inputs[1 - place])
    if scores is None or scores.op != "MatMul" or mask in sheet.of.outputs:
        return
    inside = [step for name in _between(sheet, scores, softmax) for step in sheet.readers[name]]
    if len(inside) != len(_between(sheet, scores, softmax)):  # somebody else looks at the scores
        return
    end = _weights(sheet, softmax)
    product = sheet.only(end, "MatMul")
    turned = _turned(sheet, scores.inputs[1])
    if product is None or product.inputs[0] != end or turned is None:
        return
    key, steps = turned
    inputs = (scores.inputs[0], key, product.inputs[1], *([mask] if mask else []))
    made = Step(
        op="Attention", inputs=inputs, outputs=product.outputs, attributes={"scale": scale},
        path=product.path, word=softmax.word,
    )  # fmt: skip
    sheet.put(product, *steps, made)


def _product_behind(sheet: _Sheet, name: str) -> Step | None:
    """The product of two computed values that a value is, times a number perhaps."""
    step = sheet.maker(name, "Div", "Mul")
    if step is not None:
        others = [v for v in step.inputs if sheet.number(v) is None]
        if len(others) != 1:
            return None
        name = others[0]
    return sheet.maker(name, "MatMul")


def _between(sheet: _Sheet, first: Step, last: Step) -> list[str]:
    """Values on the way from one step to another, each read by the next."""
    found, name = [], last.inputs[0]
    while name not in first.outputs:
        found.append(name)
        step = sheet.makers[name]
        name = next(v for v in step.inputs if v in first.outputs or _product_behind(sheet, v))
    return [*found, name]


def _weights(sheet: _Sheet, softmax: Step) -> str:
    """The weights of attention, behind what newer exporters make of rows that see nothing."""
    name = softmax.outputs[0]
    readers = sheet.readers.get(name, [])
    if {r.op for r in readers if r is not None} == {"IsNaN", "Where"} and len(readers) == 2:
        where = next(r for r in readers if r.op == "Where")
        nan = next(r for r in readers if r.op == "IsNaN")
        if (
            where.inputs[0] == nan.outputs[0]
            and where.inputs[2] == name
            and sheet.number(where.inputs[1]) == 0
        ):
            return where.outputs[0]
    return name


def _turned(sheet: _Sheet, name: str) -> tuple[str, list[Step]] | None:
    """A key as it was before it was turned round for the product, and the steps that make it so."""
    step = sheet.makers.get(name)
    scaled = None
    if step is not None and step.op == "Mul":
        places = [i for i, v in enumerate(step.inputs) if sheet.maker(v, "Transpose", "Reshape")]
        if len(places) != 1:
            return None
        scaled, step = (step, places[0]), sheet.makers[step.inputs[places[0]]]
    made: list[Step] = []
    if step is not None and step.op == "Reshape":
        flat = _turned_flat(sheet, step)
        if flat is None:
            return None
        key = flat
    elif step is not None and len(order := list(step.get("perm") or ())) == 4:
        order[2:] = order[3], order[2]
        key = step.inputs[0]
        if order != [0, 1, 2, 3]:
            key = f"{name}.key"
            made.append(renamed(step, outputs=(key,), attributes={"perm": order}))
    else:
        return None
    if scaled is not None:
        of, place = scaled
        inputs = [*of.inputs]
        inputs[place] = key
        key = f"{name}.scaled_key"
        made.append(renamed(of, inputs=tuple(inputs), outputs=(key,)))
    return key, made


def _turned_flat(sheet: _Sheet, step: Step) -> str | None:
    """The key in front of what newer exporters write: batch and heads as one axis, turned, and two axes again."""
    turned = sheet.maker(step.inputs[0], "Transpose")
    flat = sheet.maker(turned.inputs[0], "Reshape") if turned is not None else None
    is_last = turned is not None and list(turned.get("perm") or ()) == [0, 2, 1]
    return flat.inputs[0] if flat is not None and is_last else None


def _linear(sheet: _Sheet, product: Step) -> None:
    """x W + b as a layer of weights [out, in]."""
    name = product.inputs[1]
    weight = sheet.of.constants.get(name)
    if (
        weight is None
        or weight.dim() != 2
        or not weight.is_floating_point()
        or product.inputs[0] in sheet.of.constants
    ):
        return
    _put_linear(sheet, product, weight.t(), f"{name}.turned")


def _gemm(sheet: _Sheet, gemm: Step) -> None:
    name = gemm.inputs[1]
    weight = sheet.of.constants.get(name)
    bias = (
        sheet.of.constants.get(gemm.inputs[2]) if len(gemm.inputs) > 2 and gemm.inputs[2] else None
    )
    has_bias = len(gemm.inputs) > 2 and bool(gemm.inputs[2])
    if (
        weight is None
        or gemm.get("transA", 0)
        or gemm.get("alpha", 1.0) != 1
        or gemm.get("beta", 1.0) != 1
    ):
        return
    weight = weight if gemm.get("transB", 0) else weight.t()
    if has_bias and (bias is None or list(bias.shape) != [weight.shape[0]]):
        return
    _put_linear(sheet, gemm, weight, f"{name}.turned", gemm.inputs[2] if has_bias else "")


def _put_linear(sheet: _Sheet, product: Step, weight: Tensor, name: str, bias: str = "") -> None:
    sheet.of.constants[name] = weight if weight.is_contiguous() else weight.contiguous()
    last, inputs = product, [product.inputs[0], name]
    if bias:
        inputs.append(bias)
    elif (add := sheet.only(product.outputs[0], "Add")) is not None:
        row = _vector(sheet, add, product.outputs[0])
        if row is not None and list(sheet.of.constants[row].shape) == [weight.shape[0]]:
            last = add
            inputs.append(row)
    made = Step(
        op="Linear",
        inputs=tuple(inputs),
        outputs=last.outputs,
        path=product.path,
        word=product.word,
    )
    sheet.put(last, made)


def _table(sheet: _Sheet, gather: Step) -> None:
    """A choice of rows of a constant table is an embedding."""
    table = sheet.of.constants.get(gather.inputs[0])
    if (
        table is None
        or table.dim() != 2
        or gather.get("axis", 0) != 0
        or not table.is_floating_point()
    ):
        return
    sheet.put(gather, renamed(gather, attributes={"is_table": True}))


RULES: tuple[tuple[str, Callable[[Any, Step], None]], ...] = (
    ("Sqrt", _layer_norm),
    ("Erf", _gelu),
    ("Sigmoid", _silu),
    ("InstanceNormalization", _group_norm),
    ("Softmax", _attention),
    ("MatMul", _linear),
    ("Gemm", _gemm),
    ("Gather", _table),
)
