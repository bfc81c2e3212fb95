"""What a recipe may ask of a target: `targets: [{openvino: {precision: f32}}]`. Loads no runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

Least = Annotated[int, Field(ge=0)]
"""No past yet is a size too."""
Size = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class OpenVinoOptions:
    """`precision` is the type of what is not quantised; `auto` is bf16 beside integers where the processor has it.

    `hint` is what the runtime is asked for: one request as fast as can be, or many beside each other. `cache` is where
    keys and values of a language model are: they go in and out through `ports`, or the runtime holds them, in the type
    of what is not quantised (`inside`) or in 8 bit (`u8`); `auto` is inside for an engine that only writes.
    `products` says what weights that are quantised alone are multiplied with: activations rounded to 8 bit as the
    engine runs, a scale for every 32, or as they are.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    precision: Literal["auto", "f32", "bf16"] = "auto"
    hint: Literal["latency", "throughput"] = "latency"
    cache: Literal["auto", "ports", "inside", "u8"] = "auto"
    products: Literal["int8", "float"] = "int8"


Capability = Literal["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"]


@dataclass(frozen=True, kw_only=True)
class TensorRtOptions:
    """`compute` are the compute capabilities of the GPUs that it is to run on; a portable engine for Ampere and newer
    where none is named. `profile` has least, usual and largest size of free dimensions. `weights` lie `inside` the
    engine, or are `refittable` there, or are `stripped` from it and come from `model.onnx` when it is opened. `build`
    says whether an engine is built `ahead` of time, or left to enterprise TensorRT's trtexec by a `kit`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    short: ClassVar[str] = "compute"
    """The option that a list in the place of options is."""

    compute: tuple[Capability, ...] = ()
    platform: Literal["linux", "windows"] = "linux"
    profile: dict[str, tuple[Least, Size, Size]] = field(default_factory=dict)
    weights: Literal["inside", "refittable", "stripped"] = "inside"
    build: Literal["ahead", "kit"] = "ahead"


OPTIONS: dict[str, type[Any]] = {"openvino": OpenVinoOptions, "tensorrt": TensorRtOptions}
"""By target that has any."""
