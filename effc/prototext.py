"""The text form of protocol buffers, written: what it takes to say a config, and no library behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Word(str):
    """A name of the format itself, such as TYPE_FP32, which stands without quotation marks."""


def prototext(message: Mapping[str, Any], depth: int = 0) -> str:
    """A message in the text form of protocol buffers: mappings are messages, lists are repeated fields."""
    pad, lines = "  " * depth, []
    for field, value in message.items():
        if isinstance(value, Mapping):
            lines.append(f"{pad}{field} {{\n{prototext(value, depth + 1)}{pad}}}\n")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [prototext({field: each}, depth) for each in value]
        elif isinstance(value, list):
            lines.append(f"{pad}{field}: [ {', '.join(map(_scalar, value))} ]\n")
        else:
            lines.append(f"{pad}{field}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool | int):
        return str(value).lower()
    plain = {b: chr(b) for b in range(0x20, 0x7F) if chr(b) not in '"\\'}
    return '"' + "".join(plain.get(b, f"\\{b:03o}") for b in value.encode()) + '"'
