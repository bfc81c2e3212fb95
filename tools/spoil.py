"""Ways to spoil what is good: bytes that are cut and flipped, values that are bent, things that are no plain files.

All chance comes from the `Random` that is given; each says in words what it did.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def harmed(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """The bytes with something done to them, and what."""
    size = len(content)
    place, length = draw.randrange(size + 1), draw.choice((1, 2, 8, 64, 1024))
    end = min(size, place + length)
    ways: list[Callable[[], tuple[bytes, str]]] = [
        lambda: (content[:place], f"cut at {place}"),
        lambda: (content[place:], f"begins at {place}"),
        lambda: (content[:place] + content[end:], f"{length} bytes gone at {place}"),
        lambda: (content[:place] + draw.randbytes(length) + content[end:], f"noise at {place}"),
        lambda: (content[:place] + draw.randbytes(length) + content[place:], f"more at {place}"),
        lambda: (content[:place] + bytes(length) + content[end:], f"zeros at {place}"),
        lambda: (content[:end] + content[place:], f"{length} bytes twice at {place}"),
        lambda: (content + content, "twice"),
        lambda: (b"", "empty"),
        lambda: (draw.randbytes(256), "noise"),
        *[lambda: _flipped(draw, content)] * 6,
    ]
    return draw.choice(ways)()


def _flipped(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """Some bits are others, half of the time near the beginning, where headers are."""
    made = bytearray(content)
    count = draw.choice((1, 1, 4, 32))
    top = len(made) if draw.random() < 0.5 else min(len(made), 256)
    for _ in range(count if made else 0):
        made[draw.randrange(top)] ^= 1 << draw.randrange(8)
    return bytes(made), f"{count} bits flipped in the first {top} bytes"


def spoil(draw: random.Random, file: Path) -> str:
    content, note = harmed(draw, file.read_bytes())
    file.write_bytes(content)
    return f"{file.name} {note}"


def nested(depth: int, shape: Any = list) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = {"a": found} if shape is dict else [found]
    return found


HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, -(2**31), 2**63, 10**30, 0.5, 1e308, math.nan, math.inf,
    -math.inf, "", "a", "x" * 10_000, "../../secret", "/etc/passwd", "\0", "é\u2028", "\ud800", "1",
    [], {}, [[]], {"a": {}}, [1] * 10_000, [None], ["a", 1], nested(40), nested(40, dict), nested(900),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path into plain values."""
    if path:
        yield path
    pairs: Sequence[Any] = ()
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def bent(draw: random.Random, value: Any, times: int = 1) -> tuple[Any, str]:
    """Plain values with one to three of them changed, gone or moved, and what was done."""
    value = json.loads(json.dumps(value))
    notes = []
    for _ in range(draw.choice((1, 1, 2, 3)) * times):
        paths = list(places(value))
        if not paths:
            break
        path = draw.choice(paths)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        how = draw.random()
        if how < 0.15:
            del holder[path[-1]]
            notes.append(f"{path} gone")
        elif how < 0.25 and isinstance(holder, dict):
            new = draw.choice(["", "a", "x" * 1000, "auto_map", "__class__", "../a", "\0"])
            holder[new] = draw.choice(HOSTILE)
            notes.append(f"{path[:-1]} has {new[:20]!r} too")
        else:
            old = holder[path[-1]]
            near = [old + 1, old * 1000, -old, old / 2] if type(old) in (int, float) else []
            holder[path[-1]] = new = draw.choice([*HOSTILE, *near])
            notes.append(f"{path} is {repr(new)[:40]}")
    return value, "; ".join(notes)


def bend(draw: random.Random, file: Path) -> str:
    value, note = bent(draw, json.loads(file.read_text(encoding="utf-8")))
    text = json.dumps(value)
    if draw.random() < 0.1:
        text = draw.choice(
            [text + "}", text.replace("1", "1" * 5000, 1), "[" * 100_000, "\ufeff" + text]
        )
        note += ", and text"
    file.write_text(text, encoding="utf-8")
    return f"{file.name}: {note}"


def put_special(draw: random.Random, file: Path, secret: Path) -> str:
    """Something that is no plain file in the place of a file."""
    how = draw.choice(
        [
            "out",
            "loop",
            "dangling",
            "pipe",
            "folder",
            "zero",
            "random",
            "tty",
            "hard",
            "self",
            "empty",
        ]
    )
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "hard":
        os.link(secret, file)
    elif how == "empty":
        file.touch()
    else:
        targets = {"out": secret, "loop": file.name, "dangling": "nowhere", "zero": "/dev/zero"}
        targets |= {"random": "/dev/urandom", "tty": "/dev/tty", "self": "."}
        file.symlink_to(targets[how])
    return f"{file.name} is {how}"
