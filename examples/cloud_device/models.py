"""What looks, what answers, and how both are trained: an encoder that device and cloud share, and two answerers.

The encoder (49 tokens of width 256, six blocks) learns from crowded scenes of every light, style and ground what lies
in a place: shape, hue, style, and on which ground. It learns no names. Behind it a bridge gives 49 tokens of 64
features, and that is what goes up. An answerer reads tokens, all or some, and queries. The student is the encoder with
a small answerer that was trained by day; the teacher's is larger, was trained in every domain, and stands for a general
model. An answerer is trained with tokens missing as well, since the cloud gets but some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import world
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

WIDTH, BLOCKS, HEADS = 256, 6, 4
FEATURES = 64
SENT = 8
"""Tokens that go up, of 49."""
STUDENT, TEACHER = (96, 2), (128, 2)
"""Width and layers of the answerers."""


def seen(pictures: Any) -> Tensor:
    """Pictures as the encoder takes them [n, 3, 224, 224], around 0."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 64 - 2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, width // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Pictures [n, 3, 224, 224] → tokens [n, 49, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, world.CELL, world.CELL)
        self.place = nn.Parameter(0.02 * torch.randn(world.PLACES, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(BLOCKS))
        self.norm, self.bridge = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, FEATURES)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patch(pictures).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        made: Tensor = self.bridge(self.norm(x))
        return made


class Layer(nn.Module):
    """Queries look at tokens, and think."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, image: Tensor, bias: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        q = self.q(self.norm1(x)).view(batch, length, HEADS, -1).transpose(1, 2)
        k, v = self.kv(image).view(batch, image.shape[1], 2, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Answerer(nn.Module):
    """Tokens [n, 49, 64], which of them were sent [n, 49], and queries [n, q, 3] → logits [n, q, classes].

    `image` and `last` are features for a teacher to be held against.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(world.VOCABULARY, width)
        self.mix = nn.Linear(3 * width, width)
        self.project, self.norm0 = nn.Linear(FEATURES, width), nn.LayerNorm(width)
        self.place = nn.Parameter(0.02 * torch.randn(world.PLACES, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, world.CLASSES)

    def forward(
        self, tokens: Tensor, queries: Tensor, sent: Tensor | None = None
    ) -> dict[str, Tensor]:
        image = self.norm0(self.project(tokens) + self.place)
        bias = None if sent is None else (1 - sent)[:, None, None, :] * -1e4
        x = self.mix(self.words(queries).flatten(2))
        for layer in self.layers:
            x = layer(x, image, bias)
        last = self.norm(x)
        return {"logits": self.head(last), "image": image, "last": last}


class Student(nn.Module):
    """What a device runs: pictures and queries → logits."""

    def __init__(self, encoder: Encoder, answerer: Answerer) -> None:
        super().__init__()
        self.encoder, self.answerer = encoder, answerer

    def forward(self, pictures: Tensor, queries: Tensor) -> dict[str, Tensor]:
        return {"logits": self.answerer(self.encoder(pictures), queries)["logits"]}


def device(weights: str, calibrate: int = 96) -> Any:
    """The student of a file of weights as a source of `effc compile`, which calibrates by day."""
    import effc
    from effc.calib.data import Batch

    model = Student(Encoder(), Answerer(*STUDENT))
    model.load_state_dict(load_file(weights))
    day = world.drawn(world.DOMAINS[world.SOURCE], calibrate, 5)

    def batches() -> Any:
        for first in range(0, calibrate, 16):
            chosen = slice(first, first + 16)
            feeds = {
                "pictures": seen(day.pictures[chosen]).numpy(),
                "queries": day.queries[chosen],
            }
            yield Batch(inputs=feeds)

    return effc.Source(
        modules={"main": model.eval()},
        inputs={"main": {"pictures": seen(day.pictures[:2]), "queries": torch.from_numpy(day.queries[:2])}},
        dims={"main": {"pictures": {0: "batch"}, "queries": {0: "batch"}}}, batches=batches,
        name=Path(weights).stem,
    )  # fmt: skip


# training


def follow(
    module: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float, *, decay: float = 0.02
) -> None:
    """AdamW along a warm-up and a cosine, for models that are trained from nothing; products are in bfloat16."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=decay, betas=(0.9, 0.98))
    for step in range(steps):
        warm = max(1, steps // 10)
        left = (step - warm) / max(1, steps - warm)
        share = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * left)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()


def encoder(pictures: int, epochs: float, seed: int = 0, batch: int = 32) -> Encoder:
    """Trained to tell what lies in every place, from so many crowded scenes."""
    torch.manual_seed(seed)
    model = Encoder()
    sizes = {"shapes": len(world.SHAPES) + 1, "hues": world.HUES + 1, "styles": len(world.STYLES) + 1,
             "grounds": len(world.DOMAINS)}  # fmt: skip
    heads = nn.ModuleDict({name: nn.Linear(FEATURES, size) for name, size in sizes.items()})
    both = nn.ModuleList([model, heads])
    scenes = world.broad(pictures, seed)
    told = {name: torch.from_numpy(getattr(scenes, name)) for name in sizes}
    told["grounds"] = told["grounds"][:, None].expand(-1, world.PLACES)
    draw = np.random.default_rng([17, seed])

    def loss(step: int) -> Tensor:
        chosen = draw.integers(0, pictures, batch)
        tokens = model(seen(scenes.pictures[chosen]))
        parts = [
            functional.cross_entropy(heads[name](tokens).flatten(0, 1).float(), told[name][chosen].flatten())
            for name in sizes
        ]  # fmt: skip
        return torch.stack(parts).sum()

    follow(both, loss, max(2, round(epochs * pictures / batch)), 1e-3)
    return model.eval()


def tokens_of(model: Encoder, pictures: Any) -> Tensor:
    """Tokens of pictures [n, 49, 64]."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parts = [model(seen(pictures[i : i + 64])).float() for i in range(0, len(pictures), 64)]
    return torch.cat(parts)


def some_sent(scenes_empty: Tensor, draw: torch.Generator) -> Tensor:
    """Which tokens are there in training [n, 49]: all, or a few, things rather than ground more often than not."""
    count = len(scenes_empty)
    leaning = torch.randint(0, 3, (count, 1), generator=draw) * (~scenes_empty)
    order = torch.rand(count, world.PLACES, generator=draw) + leaning.float()
    kept = torch.zeros(count, world.PLACES)
    kept.scatter_(1, order.topk(SENT, 1).indices, 1.0)
    whole = torch.rand(count, 1, generator=draw) < 0.5
    return torch.where(whole, torch.ones(()), kept)


def answerer(
    size: tuple[int, int], tokens: Tensor, scenes: Mapping[str, Tensor], *, passes: int, seed: int, batch: int = 64
) -> Answerer:  # fmt: skip
    """Trained to answer, from tokens and `queries`, `answers` and `shapes` of the same scenes; `passes` of pictures."""
    torch.manual_seed(seed)
    model = Answerer(*size)
    draw = torch.Generator().manual_seed(seed)
    empty = scenes["shapes"] == len(world.SHAPES)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(0, len(tokens), (batch,), generator=draw)
        sent = some_sent(empty[chosen], draw)
        found = model(tokens[chosen], scenes["queries"][chosen], sent)["logits"]
        return functional.cross_entropy(found.flatten(0, 1).float(), scenes["answers"][chosen].flatten())  # fmt: skip

    follow(model, loss, max(2, passes // batch), 2e-3)
    return model.eval()
