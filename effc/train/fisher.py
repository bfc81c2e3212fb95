"""How much every weight matters to what a model answers: the diagonal of its Fisher information.

    hᵢ = mean over samples x of (∂ log p(y | x) / ∂wᵢ)²        y drawn from p(· | x)

To second order, weights that are off by εᵢ move the answers by Σ hᵢ εᵢ² ÷ 2 (Kullback–Leibler). y is what the model
itself would say and no label: with labels it is another matrix (Kunstner et al., NeurIPS 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from effc.errors import TuneError
from effc.train.losses import LOGITS, Outputs

Feeds = Mapping[str, Tensor]


def information(
    model: Callable[[Feeds], Outputs],
    weights: Mapping[str, Tensor],
    samples: Iterable[Feeds],
    seed: int = 0,
) -> dict[str, Tensor]:
    """h of each of the `weights`, which are those that the model runs on; a sample is a batch of one.

    An answer of several rows, logits [1, …, classes], is one draw for each. Raises TuneError where there are no
    samples, or their logits are no numbers.
    """
    draw = torch.Generator().manual_seed(seed)
    found = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    count = 0
    for feeds in samples:
        rows = model(feeds)[LOGITS].flatten(0, -2)
        if not bool(torch.isfinite(rows).all()):
            raise TuneError(
                "logits are no numbers", hint="a model that does not answer has no information"
            )
        drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=draw)[:, 0]
        surprise = functional.cross_entropy(rows, drawn, reduction="sum")
        gradients = torch.autograd.grad(surprise, [*weights.values()], allow_unused=True)
        for total, gradient in zip(found.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.square()
        count += 1
    if not count:
        raise TuneError(
            "there is nothing to see what weights matter to", hint="give samples of one each"
        )
    return {name: total / count for name, total in found.items()}
