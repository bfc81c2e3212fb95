"""Causal language models whose cache of keys and values goes in and out, so that one engine reads and writes.

    input_ids, position_ids                [batch, sequence]
    attention_mask                         [batch, past + sequence]
    logits_to_keep                         [kept]                                positions of the sequence
    past_key_values.N.key, .value          [batch, heads, past, size]            past is 0 or more
    logits                                 [batch, kept, vocabulary]
    present.N.key, .value                  [batch, heads, past + sequence, size]

The names are those that optimum and transformers.js use; `logits_to_keep` is that of transformers. Who reads a prompt
needs the logits of its last position alone, and they are a fifth of the work in a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]

ROLES = PREFILL, DECODE = "prefill", "decode"
"""Two graphs of one model: what reads prompts and what writes, where the best engine of each is another."""
LAYOUT = "batch, heads, positions, size"
PAST, PRESENT = "past_key_values", "present"
TOKENS = ("input_ids", "attention_mask", "position_ids")
KEEP = "logits_to_keep"
SIDES = ("key", "value")


def shapes(config: Any) -> list[tuple[int, int]]:
    """Heads and head size of the keys and values of every layer."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [(heads, size)] * config.num_hidden_layers


def names(layers: int, stem: str = PAST) -> list[str]:
    return [f"{stem}.{number}.{side}" for number in range(layers) for side in SIDES]


def links(layers: int) -> list[dict[str, str]]:
    """How the cache goes from who reads to who writes, and on from there."""
    pairs = zip(names(layers, PRESENT), names(layers), strict=True)
    return [
        {"producer": role, "output": given, "consumer": DECODE, "input": taken, "layout": LAYOUT}
        for given, taken in pairs
        for role in ROLES
    ]


def empty(
    layers: Sequence[tuple[int, int]], batch: int, dtype: str = "float32"
) -> dict[str, Array]:
    """A cache without any position."""
    return {
        f"{PAST}.{number}.{side}": np.zeros((batch, heads, 0, size), dtype)
        for number, (heads, size) in enumerate(layers)
        for side in SIDES
    }


def filled(layers: Sequence[tuple[int, int]], batch: int, past: int) -> dict[str, Array]:
    """A cache of `past` positions of normal numbers, the same every time."""
    draw = np.random.default_rng(0)
    return {
        name: draw.standard_normal((batch, *value.shape[1:2], past, value.shape[3])).astype(
            np.float32
        )
        for name, value in empty(layers, batch).items()
    }


def positions(mask: Array, length: int) -> Array:
    """Of the last `length` places of a mask [batch, past + length]: how many are set before each."""
    counted = np.cumsum(mask, axis=1) - 1
    found: Array = np.maximum(counted, 0)[:, -length:].astype(np.int64)
    return found


def complete(
    feeds: Mapping[str, Array], layers: Sequence[tuple[int, int]], past: int = 0
) -> dict[str, Array]:
    """Tokens and their mask with positions, all of them wanted, and with a cache of `past` positions."""
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    mask = np.concatenate([np.ones((len(ids), past), mask.dtype), mask], axis=1)
    return {
        "input_ids": ids, "attention_mask": mask, "position_ids": positions(mask, ids.shape[1]),
        KEEP: np.arange(ids.shape[1]),
        **(filled(layers, len(ids), past) if past else empty(layers, len(ids))),
    }  # fmt: skip


def carried(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The cache that a run gave, as the next one takes it."""
    return {
        f"{PAST}{name.removeprefix(PRESENT)}": value
        for name, value in outputs.items()
        if name.startswith(f"{PRESENT}.")
    }


def in_steps(run: Run, first: int) -> Run:
    """A run that reads the `first` tokens alone, and gives what comes of the rest behind their cache."""

    def stepped(feeds: Mapping[str, Array]) -> dict[str, Array]:
        split = (*TOKENS, KEEP)

        def part(start: int, stop: int) -> dict[str, Array]:
            return {
                "input_ids": feeds["input_ids"][:, start:stop],
                "attention_mask": feeds["attention_mask"][:, :stop],
                "position_ids": feeds["position_ids"][:, start:stop],
                KEEP: np.arange(stop - start),
            }

        given = {name: value for name, value in feeds.items() if name not in split}
        past = carried(run({**given, **part(0, first)}))
        return run({**given, **past, **part(first, feeds["input_ids"].shape[1])})

    return stepped


STEPS = 32
"""Codes a unit, of a cache that is made up."""


def typed(feeds: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Feeds with a cache of codes where an engine takes one: any codes will do for one that is empty or made up."""

    def is_meant(name: str, value: Any) -> bool:
        is_coded = name.startswith(f"{PAST}.") and dtypes.get(name) == "int8"
        return is_coded and isinstance(value, np.ndarray) and value.dtype.kind == "f"

    return {
        name: np.clip(np.round(value * STEPS), -128, 127).astype(np.int8)
        if is_meant(name, value)
        else value
        for name, value in feeds.items()
    }
