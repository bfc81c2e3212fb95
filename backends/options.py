"""What a recipe may ask of a target: `targets: [{openvino: {precision: f32}}]`. Loads no runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class OpenVinoOptions:
    """`precision` is the type of what is not quantised; `auto` is bf16 beside integers where the processor has it.

    `hint` is what the runtime is asked for: one request as fast as can be, or many beside each other.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    precision: Literal["auto", "f32", "bf16"] = "auto"
    hint: Literal["latency", "throughput"] = "latency"


OPTIONS: dict[str, type[Any]] = {"openvino": OpenVinoOptions}
"""By target that has any."""
