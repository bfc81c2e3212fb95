"""ONNX's operators in torch's words: those that have weights, look at neighbours, or normalise."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.foreign.numbers import listed, tensor
from effc.foreign.operators import Operator
from effc.foreign.steps import Step


def _matmul(step: Step, a: Any, b: Any) -> Any:
    return torch.matmul(tensor(a), tensor(b))


def _linear(step: Step, x: Any, weight: Any, bias: Any = None) -> Any:
    """`weight` [out, in]; `together` writes products with constant matrices so."""
    return F.linear(tensor(x), weight, bias)


def _gemm(step: Step, a: Any, b: Any, c: Any = None) -> Any:
    a, b = tensor(a), tensor(b)
    a = a.t() if step.get("transA", 0) else a
    b = b.t() if step.get("transB", 0) else b
    alpha, beta = step.get("alpha", 1.0), step.get("beta", 1.0)
    found = torch.matmul(a, b)
    found = found if alpha == 1 else found * alpha
    if c is None:
        return found
    return found + (tensor(c) if beta == 1 else tensor(c) * beta)


def _einsum(step: Step, *given: Any) -> Any:
    return torch.einsum(step.get("equation"), *map(tensor, given))


def _same(
    step: Step, x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int] | None:
    """Paddings [before…, after…] that `auto_pad` stands for."""
    word = step.get("auto_pad", "NOTSET")
    if word in ("NOTSET", "", None):
        return None
    if word == "VALID":
        return [0] * (2 * len(kernel))
    before, after = [], []
    for axis, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True)):
        size = x.shape[2 + axis]
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if word == "SAME_UPPER" else large)
        after.append(large if word == "SAME_UPPER" else small)
    return before + after


def _pads(
    step: Step, x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    found = _same(step, x, kernel, strides, dilations)
    return found if found is not None else list(step.get("pads") or [0] * (2 * len(kernel)))


def _padded(x: Tensor, pads: list[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """What torch is given where both ends of an axis are not padded alike, and the padding that is left."""
    half = len(pads) // 2
    before, after = pads[:half], pads[half:]
    if before == after:
        return x, before
    flat = [side for axis in reversed(range(half)) for side in (before[axis], after[axis])]
    return F.pad(x, flat, value=value), [0] * half


def _conv(step: Step, x: Any, weight: Tensor, bias: Any = None) -> Any:
    x, rank = tensor(x), weight.dim() - 2
    strides = list(step.get("strides") or [1] * rank)
    dilations = list(step.get("dilations") or [1] * rank)
    pads = _pads(step, x, list(weight.shape[2:]), strides, dilations)
    x, padding = _padded(x, pads)
    function: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    return function(x, weight, bias, strides, padding, dilations, step.get("group", 1))


def _conv_transpose(step: Step, x: Any, weight: Tensor, bias: Any = None) -> Any:
    x, rank = tensor(x), weight.dim() - 2
    if step.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", "") or step.get("output_shape"):
        raise ValueError("auto_pad and output_shape are not read here")
    strides = list(step.get("strides") or [1] * rank)
    dilations = list(step.get("dilations") or [1] * rank)
    more = list(step.get("output_padding") or [0] * rank)
    pads = list(step.get("pads") or [0] * (2 * rank))
    before, after = pads[:rank], pads[rank:]
    if before != after:
        raise ValueError("paddings that are not alike at both ends are not read here")
    function: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[rank]
    return function(x, weight, bias, strides, before, more, step.get("group", 1), dilations)


def _pool(step: Step, x: Any) -> Any:
    x, kernel = tensor(x), list(step.get("kernel_shape"))
    rank = len(kernel)
    strides = list(step.get("strides") or [1] * rank)
    dilations = list(step.get("dilations") or [1] * rank)
    pads = _pads(step, x, kernel, strides, dilations)
    ceil = bool(step.get("ceil_mode", 0))
    if step.op == "MaxPool":
        x, padding = _padded(x, pads, -math.inf)
        function: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[rank]
        return function(x, kernel, strides, padding, dilations, ceil)
    counts = bool(step.get("count_include_pad", 0))
    if any(d != 1 for d in dilations) or (pads[:rank] != pads[rank:] and not counts):
        raise ValueError("a mean over neighbours with dilation, or padded unevenly, is not read")
    x, padding = _padded(x, pads)
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    return function(x, kernel, strides, padding, ceil, counts)


def _global(step: Step, x: Any) -> Any:
    x = tensor(x)
    axes = list(range(2, x.dim()))
    return torch.amax(x, axes, True) if step.op == "GlobalMaxPool" else x.mean(axes, True)


def _batch_norm(step: Step, x: Any, gain: Any, bias: Any, mean: Any, variance: Any) -> Any:
    if step.get("training_mode", 0):
        raise ValueError("a batch norm in training is not read")
    return F.batch_norm(
        tensor(x), mean, variance, gain, bias, False, 0.1, step.get("epsilon", 1e-5)
    )


def _layer_norm(step: Step, x: Any, gain: Any, bias: Any = None) -> Any:
    x, axis = tensor(x), step.get("axis", -1)
    return F.layer_norm(x, list(x.shape[axis:]), gain, bias, step.get("epsilon", 1e-5))


def _skip_layer_norm(
    step: Step, x: Any, skip: Any, gain: Any, bias: Any = None, more: Any = None
) -> Any:
    total = tensor(x) + tensor(skip)
    total = total if more is None else total + more
    made = F.layer_norm(total, [total.shape[-1]], gain, bias, step.get("epsilon", 1e-12))
    return made, None, None, total


def _rms_norm(step: Step, x: Any, gain: Any) -> Any:
    x, axis = tensor(x), step.get("axis", -1)
    return F.rms_norm(x, list(x.shape[axis:]), gain, step.get("epsilon", 1e-5))


def _group_norm(step: Step, x: Any, gain: Any, bias: Any) -> Any:
    x, groups = tensor(x), step.get("num_groups")
    if step.get("opset") < 21 and gain.shape[0] == groups != x.shape[1]:
        each = x.shape[1] // groups
        gain, bias = gain.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, gain, bias, step.get("epsilon", 1e-5))


def _instance_norm(step: Step, x: Any, gain: Any, bias: Any) -> Any:
    x = tensor(x)
    return F.group_norm(x, x.shape[1], gain, bias, step.get("epsilon", 1e-5))


def _resize(step: Step, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    x, mode = tensor(x), step.get("mode", "nearest")
    if step.op == "Upsample" and scales is None:
        roi, scales = None, roi
    given = step.get("scales") or () if scales is None else listed(scales)
    factors = [float(v) for v in given]
    if step.get("axes") or factors[:2] not in ([], [1.0, 1.0]):
        raise ValueError("a resize of other axes than those of a picture is not read")
    how: dict[str, Any] = (
        {"size": listed(sizes)[2:]} if not factors else {"scale_factor": factors[2:]}
    )
    where = step.get("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest":
        if step.op != "Upsample" and not _takes_floor(step, where, factors):
            raise ValueError(f"a nearest resize by {where}, {step.get('nearest_mode')} is not read")
        return F.interpolate(x, mode="nearest", **how)
    word = {("linear", 3): "linear", ("linear", 4): "bilinear", ("cubic", 4): "bicubic"}.get(
        (mode, x.dim())
    )
    if word is None or where not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise ValueError(f"a {mode} resize by {where} is not read")
    if mode == "cubic" and step.get("cubic_coeff_a", -0.75) != -0.75:
        raise ValueError("a cubic resize with other coefficients is not read")
    return F.interpolate(x, mode=word, align_corners=where == "align_corners", **how)


def _takes_floor(step: Step, where: str, factors: list[float]) -> bool:
    """Whether a nearest resize takes the pixel that torch takes: that at ⌊place ÷ factor⌋."""
    rounding = step.get("nearest_mode", "round_prefer_floor")
    if where == "asymmetric":
        return bool(rounding == "floor")
    is_whole = bool(factors) and all(f.is_integer() for f in factors)
    return is_whole and (where, rounding) == ("half_pixel", "round_prefer_floor")


def _attention(step: Step, q: Any, k: Any, v: Any, mask: Any = None, *rest: Any) -> Any:
    if any(r is not None for r in rest) or len([o for o in step.outputs if o]) > 1:
        raise ValueError("attention with a cache is not read")
    if step.get("softcap", 0.0):
        raise ValueError("attention with a soft cap is not read")
    q, k, v = tensor(q), tensor(k), tensor(v)
    heads = (step.get("q_num_heads"), step.get("kv_num_heads"), step.get("kv_num_heads"))
    is_flat = q.dim() == 3
    if is_flat:
        q, k, v = (
            x.reshape(x.shape[0], x.shape[1], n, -1).transpose(1, 2)
            for x, n in zip((q, k, v), heads, strict=True)
        )
    found = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=bool(step.get("is_causal", 0)), scale=step.get("scale"),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return found.transpose(1, 2).flatten(2) if is_flat else found


def _fused_matmul(step: Step, a: Any, b: Any) -> Any:
    a, b = tensor(a), tensor(b)
    if step.get("transBatchA", 0) or step.get("transBatchB", 0):
        raise ValueError("transposed batches are not read")
    a = a.transpose(-1, -2) if step.get("transA", 0) else a
    b = b.transpose(-1, -2) if step.get("transB", 0) else b
    return torch.matmul(a, b) * step.get("alpha", 1.0)


def _bias_gelu(step: Step, x: Any, bias: Any = None) -> Any:
    return F.gelu(tensor(x) if bias is None else tensor(x) + bias)


def _fast_gelu(step: Step, x: Any, bias: Any = None) -> Any:
    return F.gelu(tensor(x) if bias is None else tensor(x) + bias, approximate="tanh")


def _quick_gelu(step: Step, x: Any) -> Any:
    return tensor(x) * torch.sigmoid(tensor(x) * step.get("alpha", 1.702))


LAYERS: dict[str, Operator] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GlobalAveragePool": _global,
    "GlobalMaxPool": _global,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "Linear": _linear,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "RMSNormalization": _rms_norm,
    "Resize": _resize,
    "Upsample": _resize,
    "com.microsoft.BiasGelu": _bias_gelu,
    "com.microsoft.FastGelu": _fast_gelu,
    "com.microsoft.FusedMatMul": _fused_matmul,
    "com.microsoft.Gelu": _bias_gelu,
    "com.microsoft.QuickGelu": _quick_gelu,
    "com.microsoft.SkipLayerNormalization": _skip_layer_norm,
}
NORMS = (
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "RMSNormalization",
)
PICTURES = ("Resize", "Upsample")
