"""Exact fusions: patterns that export spells out, put back into the one operator that engines know."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from effc.ir.edit import insert, is_constant, lift, replace, tensor_name, tensor_of
from effc.ir.program import Graph, Origin
from effc.ir.select import Select, op_name
from effc.passes.base import Pass, Stats

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class FuseRMSNorm(Pass):
    """Writes `x · rsqrt(mean(x²) + eps) · weight` as one `rms_norm` (Zhang and Sennrich 2019, equation 4)."""

    name = "fuse-rmsnorm"

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        changed = 0
        for node in list(graph.nodes):
            if op_name(node) != "rsqrt":
                continue
            match = _rms_norm(graph, node)
            if match is None:
                continue
            scaled, x, weight, eps = match
            size = x.meta["val"].shape[-1]
            new = insert(graph, scaled, aten.rms_norm.default, (x, [size], weight, eps))
            replace(graph, scaled, new)
            changed += 1
        return changed


def _rms_norm(graph: Graph, rsqrt: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """The last node of an RMSNorm around `rsqrt`, its input, its weight and its epsilon."""
    add = rsqrt.args[0]
    if not (isinstance(add, fx.Node) and op_name(add) == "add" and isinstance(add.args[1], float)):
        return None
    mean = add.args[0]
    if not (isinstance(mean, fx.Node) and op_name(mean) == "mean"):
        return None
    if mean.args[1] not in ([-1], (-1,)) or len(mean.args) < 3 or mean.args[2] is not True:
        return None
    power = mean.args[0]
    if not (isinstance(power, fx.Node) and op_name(power) == "pow" and power.args[1] == 2):
        return None
    x = power.args[0]
    normed = _only_user(rsqrt)
    if normed is None or op_name(normed) != "mul" or set(normed.args) != {x, rsqrt}:
        return None
    scaled = _only_user(normed)
    if scaled is None or op_name(scaled) != "mul":
        return None
    weight = scaled.args[0] if scaled.args[1] is normed else scaled.args[1]
    if not isinstance(weight, fx.Node) or not _is_fixed(graph, weight):
        return None
    assert isinstance(x, fx.Node)
    value = x.meta["val"]
    same = value.dtype == scaled.meta["val"].dtype
    whole = list(weight.meta["val"].shape) == [value.shape[-1]]
    return (scaled, x, weight, add.args[1]) if same and whole else None


def _is_fixed(graph: Graph, node: fx.Node) -> bool:
    """Whether a value is a constant, or computed from constants alone, as Gemma's 1 + g is; it is folded later."""
    inputs = node.all_input_nodes
    return is_constant(graph, node) or (bool(inputs) and all(_is_fixed(graph, n) for n in inputs))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


@dataclass(frozen=True, kw_only=True)
class FuseLinear(Pass):
    """Writes products with a constant matrix, `x W + b` as GPT-2 has it, as `linear(x, Wᵀ, b)`."""

    name = "fuse-linear"

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        changed = 0
        made: dict[fx.Node, fx.Node] = {}
        for node in list(graph.nodes):
            match = _product(graph, node)
            if match is None:
                continue
            x, weight, bias = match
            if weight not in made:
                name = tensor_name(graph, weight) or ""
                origin = graph.origins[name]
                turned = tensor_of(graph, weight).t().contiguous()
                origin = Origin(origin.source, (*origin.transforms, "transpose"))
                made[weight] = lift(graph, name, turned, origin)
            new = insert(graph, node, aten.linear.default, (x, made[weight], bias))
            replace(graph, node, new)
            changed += 1
        return changed


def _product(graph: Graph, node: fx.Node) -> tuple[Any, fx.Node, Any] | None:
    """Input, constant [in, out] matrix and bias of an `addmm`, `mm` or `matmul`."""
    match op_name(node):
        case "addmm" if not node.kwargs:
            bias, x, weight = node.args
        case "mm" | "matmul":
            (x, weight), bias = node.args, None
        case _:
            return None
    if not isinstance(weight, fx.Node) or not isinstance(x, fx.Node) or is_constant(graph, x):
        return None
    value = weight.meta["val"]
    if not is_constant(graph, weight) or value.dim() != 2 or not value.is_floating_point():
        return None
    if bias is not None:
        if not isinstance(bias, fx.Node) or not is_constant(graph, bias):
            return None
        if bias.meta["val"].dim() != 1:
            return None
    return x, weight, bias


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """Folds batch norm into the convolution or linear layer in front of it: one tensor less to read per layer.

    W′ = W · γ / √(var + ε),   b′ = (b − mean) · γ / √(var + ε) + β   (in float64, once)
    """

    name = "fold-batchnorm"
    tolerance = 1e-4

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        changed = 0
        for output, layer, parts, eps in foldable(graph):
            _fold_into(graph, layer, parts, eps)
            replace(graph, output, layer)
            changed += 1
        return changed


def foldable(graph: Graph) -> list[tuple[fx.Node, fx.Node, list[Any], float]]:
    """Batch norms that a layer with constant weights takes in: output node, layer, [γ, β, mean, var], ε."""
    return [
        found
        for node in graph.nodes
        if (found := _batch_norm(node)) is not None
        and op_name(found[1]) in ("conv1d", "conv2d", "linear")
        and len(found[1].users) == 1
        and is_constant(graph, found[1].args[1])
        and all(is_constant(graph, part) for part in found[2])
    ]


def _batch_norm(node: fx.Node) -> tuple[fx.Node, fx.Node, list[Any], float] | None:
    """Output node, layer in front, [γ, β, mean, var] and ε of a batch norm in evaluation."""
    name = op_name(node)
    if name == "batch_norm" and not node.args[5]:
        output, eps = node, node.args[7]
    elif name == "_native_batch_norm_legit_no_training":
        users = list(node.users)
        if len(users) != 1 or users[0].target is not operator.getitem or users[0].args[1] != 0:
            return None
        output, eps = users[0], node.args[6]
    else:
        return None
    layer = node.args[0]
    if not isinstance(layer, fx.Node) or not isinstance(eps, float):
        return None
    return output, layer, list(node.args[1:5]), eps


def _fold_into(graph: Graph, layer: fx.Node, parts: list[Any], eps: float) -> None:
    gamma, beta, mean, variance = (tensor_of(graph, p).double() for p in parts)
    scale = gamma / torch.sqrt(variance + eps)
    weight_node = layer.args[1]
    assert isinstance(weight_node, fx.Node)
    weight = tensor_of(graph, weight_node)
    shape = (-1, *[1] * (weight.dim() - 1))
    has_bias = len(layer.args) > 2 and isinstance(layer.args[2], fx.Node)
    bias = tensor_of(graph, layer.args[2]).double() if has_bias else torch.zeros_like(scale)  # type: ignore[arg-type]
    folded = (weight.double() * scale.view(shape)).to(weight.dtype)
    shifted = ((bias - mean) * scale + beta).to(weight.dtype)
    name = tensor_name(graph, weight_node) or ""
    origin = graph.origins[name]
    stem = name.removesuffix(".weight")
    new_weight = _lift(graph, f"{stem}.weight", folded, origin)
    new_bias = _lift(graph, f"{stem}.bias", shifted, Origin(f"{stem}.bias"))
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])


def _lift(graph: Graph, name: str, tensor: Tensor, origin: Origin) -> fx.Node:
    word = "fold-batchnorm"
    return lift(graph, name, tensor, Origin(origin.source, (*origin.transforms, word)))


@dataclass(frozen=True, kw_only=True)
class FuseProjections(Pass):
    """Writes linear layers that read one value as one layer and a split: query, key and value; gate and up."""

    name = "fuse-projections"

    select: Select = field(default_factory=Select)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        groups: dict[Any, list[fx.Node]] = {}
        for node in self.select.sites(graph):
            if op_name(node) == "linear" and _owns_tensors(graph, node):
                groups.setdefault((node.args[0], len(node.args)), []).append(node)
        wide = [layers for layers in groups.values() if len(layers) > 1]
        for layers in wide:
            _fuse_side_by_side(graph, layers)
        return sum(map(len, wide))


def _owns_tensors(graph: Graph, layer: fx.Node) -> bool:
    """Whether weight and bias of a layer are constants that nothing else reads."""
    return not layer.kwargs and all(
        isinstance(t, fx.Node) and is_constant(graph, t) and len(t.users) == 1
        for t in layer.args[1:]
    )


def _fuse_side_by_side(graph: Graph, layers: Sequence[fx.Node]) -> None:
    first = layers[0]
    tensors = []
    for place in range(1, len(first.args)):
        parts: list[Any] = [layer.args[place] for layer in layers]
        names = [tensor_name(graph, part) or "" for part in parts]
        joined = torch.cat([tensor_of(graph, part).detach() for part in parts])
        origins = [graph.origins[name] for name in names]
        source, done = "+".join(o.source for o in origins), origins[0].transforms
        tensors.append(lift(graph, names[0], joined, Origin(source, (*done, "concatenate"))))
    sizes = [layer.meta["val"].shape[-1] for layer in layers]
    fused = insert(graph, first, aten.linear.default, (first.args[0], *tensors))
    split = insert(graph, first, aten.split_with_sizes.default, (fused, sizes, -1))
    for place, layer in enumerate(layers):
        replace(graph, layer, insert(graph, layer, operator.getitem, (split, place)))
