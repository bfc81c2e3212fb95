"""JSON as it stands in every package, and JSON that holds its own sha256; the standard library alone writes it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def dump(value: Any) -> str:
    """JSON as it stands in every package: sorted, UTF-8, one newline at the end."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not plain JSON")


def sealed(content: Mapping[str, Any]) -> str:
    """JSON that holds its own sha256: `digest` is that of the same text without the line of `digest`."""
    plain = json.loads(dump({k: v for k, v in content.items() if k != "digest"}))
    return dump({**plain, "digest": hashlib.sha256(dump(plain).encode()).hexdigest()})
