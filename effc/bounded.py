"""Text and JSON that somebody else wrote, read within bounds: not too long, not too deep, and nothing but a plain file.

`json.loads` alone reads what fills the memory or nests beyond the stack, and `read_text` alone waits for a pipe.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from effc import paths
from effc.errors import EffcError

MOST_BYTES = 16 << 20
MOST_DEPTH = 64
HINT = "repair it, or get an unharmed copy"


def content(
    stream: BinaryIO, name: str, error: type[EffcError], most_bytes: int = MOST_BYTES
) -> bytes:
    """All that is in an open file, which is closed. Raises `error` where that is too much."""
    try:
        with stream:
            found = stream.read(most_bytes + 1)
    except OSError as failure:
        raise error(f"{name} cannot be read: {failure.strerror}", hint=HINT) from failure
    if len(found) > most_bytes:
        raise error(f"{name} has more than {most_bytes} bytes, the most that is read", hint=HINT)
    return found


def text_of(file: Path, error: type[EffcError], most_bytes: int = MOST_BYTES) -> str:
    """The UTF-8 text of a file that the user named. Raises `error`."""
    found = content(paths.plain(file, error), str(file), error, most_bytes)
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise error(f"{file} cannot be read: it is not UTF-8 text", hint=HINT) from failure


def json_of(found: bytes, name: str, error: type[EffcError]) -> Any:
    """The value of JSON text. Raises `error` for what is no JSON, too deep, or half a character."""
    try:
        value = json.loads(found.decode("utf-8"))
        if is_deep(value):
            raise error(f"{name} is nested more than {MOST_DEPTH} deep", hint=HINT)
        json.dumps(value, ensure_ascii=False).encode()  # no half characters
    except RecursionError as failure:
        raise error(f"{name} is nested too deep", hint=HINT) from failure
    except ValueError as failure:
        raise error(f"{name} cannot be read: {failure}", hint=HINT) from failure
    return value


def header_of(
    content: bytes, name: str, error: type[EffcError], most_bytes: int = MOST_BYTES
) -> tuple[dict[str, Any], int]:
    """The header of a file of safetensors, {} where there is none, and where its data begin. Raises `error`."""
    if len(content) < 8:
        return {}, len(content)
    (size,) = struct.unpack_from("<Q", content)
    if size > min(most_bytes, len(content) - 8):
        raise error(f"the header of {name} is longer than it may be", hint=HINT)
    header = json_of(content[8 : 8 + size], f"the header of {name}", error)
    return (header if isinstance(header, dict) else {}), 8 + size


def read_json(file: Path, error: type[EffcError], most_bytes: int = MOST_BYTES) -> Any:
    """The value in a JSON file that the user named. Raises `error`."""
    return json_of(
        content(paths.plain(file, error), str(file), error, most_bytes), str(file), error
    )


def is_deep(value: Any, left: int = MOST_DEPTH) -> bool:
    """Whether mappings and lists nest more than `left` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not left or any(is_deep(part, left - 1) for part in inner)
