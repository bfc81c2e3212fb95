"""What one target wants from a quantised graph, as data, with the reason beside each rule.

A dialect is chosen before passes run, because a pass that optimises against a grid must know the grid. The tables
live with the backends; passes see only this type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from effc.quant.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Rules of one target. `reasons` says, per rule, why it is so and where it was measured."""

    name: str
    opset: int
    activation: Scheme = field(default_factory=lambda: Scheme(signed=False, symmetric=False))
    quantized_ops: tuple[str, ...] = ("linear", "conv1d", "conv2d", "embedding")
    conv_output: bool = True
    conv_bias_int32: bool = True
    conv_residual: bool = True
    overflow_fix: bool = True
    smooth_gain_db: float | None = None
    """What scaling the channels of an activation must be expected to gain; None where nothing is scaled."""
    token_scales: bool = False
    """Whether products are of integers where activations have a scale per token, computed as the engine runs."""
    narrow_tables: bool = False
    """Whether rows of a table in 4 bit can be looked up."""
    cache_codes: bool = False
    """Whether the cache of a language model may be integers."""
    joins_codes: bool = False
    """Whether integers of two values are put together in front of a layer that runs on them."""
    weight_zero_point: bool = True
    """Whether weights beside float activations may have a zero point."""
    fp8: bool = False
    """Whether products of 8-bit floating point numbers have kernels."""
    rest: str | None = None
    """The word for `--quantize` that says what type everything else is in; None for float32."""
    reasons: Mapping[str, str] = field(default_factory=dict)
