"""A causal language model of transformers as a module whose cache goes in and out by name, and its example inputs.

The names are those of `causal`, which does without torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effc.causal import KEEP, PAST, PRESENT, SIDES, TOKENS, complete, names, shapes

EXAMPLE_PAST = 5


class Cached(nn.Module):
    """A causal language model of transformers, its cache as inputs and outputs by name; `cached` makes one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        self.layers = len(shapes(self.config))
        self.chooses = KEEP in inspect.signature(model.forward).parameters

    def compute(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits and cache of inputs by name, with a dot or its stand-in."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        given = {parameter(name): value for name, value in named.items()}
        # without the settings, which would cut the past of sliding windows
        cache: Any = DynamicCache()
        for number in range(self.layers):
            layer: Any = DynamicLayer()
            key, value = (given.pop(f"{PAST}_{number}_{side}") for side in SIDES)
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        found = self.model(**given, past_key_values=cache, use_cache=True)
        made = {"logits": found.logits}
        for number, layer in enumerate(found.past_key_values.layers):
            made[f"{PRESENT}.{number}.key"] = layer.keys
            made[f"{PRESENT}.{number}.value"] = layer.values
        return made


def parameter(name: str) -> str:
    """The name of an input as Python can spell it."""
    return name.replace(".", "_")


def cached(model: nn.Module) -> Cached:
    """The module of a model, whose `forward` says by its signature what inputs there are."""

    def forward(self: Cached, **named: Tensor) -> dict[str, Tensor]:
        return self.compute(named)

    made: Cached = type("Cached", (Cached,), {"forward": forward})(model)
    chosen = [KEEP] if made.chooses else []
    words = ["self", *TOKENS, *chosen, *map(parameter, names(made.layers))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(word, kind) for word in words])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return made


def example(
    feeds: Mapping[str, Tensor], layers: Sequence[tuple[int, int]]
) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Example inputs with some past, and the names of their free dimensions."""
    arrays = complete({name: value.numpy() for name, value in feeds.items()}, layers, EXAMPLE_PAST)
    dims = {name: {0: "batch", 2: "past"} for name in names(len(layers))}
    dims |= {name: {0: "batch", 1: "sequence"} for name in TOKENS}
    dims["attention_mask"] = {0: "batch", 1: "total"}
    dims[KEEP] = {0: "kept"}
    arrays[KEEP] = arrays[KEEP][1:]
    return {name: torch.from_numpy(value) for name, value in arrays.items()}, dims
