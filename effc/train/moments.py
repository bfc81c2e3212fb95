"""How much the weights of linear layers matter to what those layers put out: the second moments of their inputs.

    y = W x        E ‖εx‖² = Σᵢⱼ εᵢⱼ² E xⱼ²      for errors ε of W that have nothing to do with each other

So h of a weight [out, in] is E x² of the channel that it reads, the same for every row. It needs no gradients and no
answers, and knows nothing of what the layers behind make of an error (OBD without the rest of the network).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effc.errors import TuneError


def of_inputs(model: nn.Module, samples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """h of the weight of every linear layer that the samples reach, by its name in the model, in its shape.

    A sample is what the model is called with, by name. Raises TuneError where no layer was reached, or by no numbers.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def seen(name: str, given: Tensor) -> None:
        rows = given.detach().reshape(-1, given.shape[-1]).double()
        sums[name] = sums.get(name, torch.zeros(rows.shape[-1]).double()) + rows.square().sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, named, name=name: seen(name, args[0] if args else named["input"]),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            for sample in samples:
                model(**sample)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums or not all(bool(torch.isfinite(each).all()) for each in sums.values()):
        raise TuneError(
            "no linear layer was given numbers", hint="give samples that the model reads"
        )
    return {
        f"{name}.weight": (total / counts[name]).to(layers[name].weight.dtype).expand_as(layers[name].weight)
        for name, total in sums.items()
    }  # fmt: skip
