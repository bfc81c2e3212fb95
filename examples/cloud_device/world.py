"""A world of shapes on textured grounds: pictures, questions with closed answers, and captions word by word.

A picture is 224 × 224, in 7 × 7 places of 32 × 32, and has five things on it, one below the other. A thing is a shape
of a colour. A domain says under which light it is seen (how far hues are turned, how strong they are), how it is drawn,
and on which ground; what a thing is called stays the same. So another light makes the same name look like another
colour, and only the ground tells which light it is.

Every picture is asked eight questions (what colour is the circle, what is the red thing, how many circles, how many red
things, is there a red circle) and ten words of its caption: colour and shape of its things from top to bottom.
"""

from __future__ import annotations

import colorsys
import io
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
SIZE, CELL = 224, 32
GRID = SIZE // CELL
PLACES = GRID * GRID
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
STYLES = ("filled", "outlined", "striped")
HUES = 18
THINGS = 5
ASKED, WORDS = 8, 2 * THINGS
QUERIES = ASKED + WORDS
KINDS = ("colour of", "shape of", "count shape", "count colour", "is there", "caption")
_FIRST_SHAPE = 1 + len(KINDS)
_FIRST_COLOUR = _FIRST_SHAPE + len(SHAPES)
_FIRST_SLOT = _FIRST_COLOUR + len(COLOURS)
VOCABULARY = _FIRST_SLOT + WORDS
"""0 is no word."""
COUNTS = len(COLOURS) + len(SHAPES)
YES = COUNTS + THINGS + 1
CLASSES = YES + 2
"""Colours, shapes, 0 to 5, yes and no."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """`turn` is of hues, in degrees; `tint` is of the ground; `noise` the deviation of every pixel in 8 bits."""

    name: str
    turn: float = 0.0
    strength: float = 0.85
    style: str = "filled"
    tint: tuple[float, float, float] = (128, 128, 128)
    texture: int = 0
    noise: float = 14.0


DOMAINS = {
    d.name: d
    for d in (
        Domain(name="day"),
        Domain(name="dusk", turn=40, tint=(176, 120, 84), texture=1),
        Domain(name="ink", style="outlined", turn=-20, tint=(148, 148, 120), texture=2, noise=18),
        Domain(name="frost", turn=-40, strength=0.6, style="striped", tint=(96, 124, 172), texture=3, noise=18),
    )
}  # fmt: skip
SOURCE = "day"


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Pictures [n, 224, 224, 3] in 8 bits, queries [n, 18, 3], answers [n, 18], and what lies in every place.

    `shapes`, `hues` and `styles` are [n, 49], one more than there are where the place is empty; `grounds` [n].
    """

    pictures: Array
    queries: Array
    answers: Array
    shapes: Array
    hues: Array
    styles: Array
    grounds: Array

    def __len__(self) -> int:
        return len(self.pictures)


@cache
def mask(shape: str, style: str) -> Array:
    """Where a thing is [28, 28]."""
    y, x = np.mgrid[0:28, 0:28] - 13.5
    far, wide = np.hypot(x, y), np.maximum(abs(x), abs(y))
    size = {
        "circle": far / 12, "square": wide / 10.5, "diamond": (abs(x) + abs(y)) / 13.5,
        "triangle": np.maximum(y / 10, (2 * abs(x) - y) / 14),
        "cross": np.maximum(np.minimum(abs(x), abs(y)) / 4, wide / 12.5),
        "ring": np.maximum(far / 12.5, np.where(far < 6.5, 2.0, 0.0)),
    }[shape]  # fmt: skip
    inside: Array = size <= 1
    if style == "outlined":
        core = (size <= 0.68) if shape != "ring" else (np.abs(far - 9.5) < 1.4)
        inside = inside & ~core
    if style == "striped":
        inside = inside & ((x + y).astype(int) % 6 < 4)
    return inside


@cache
def ground(texture: int) -> Array:
    """A texture [480, 480] around 0, of its own kind."""
    draw = np.random.default_rng([7, texture])
    y, x = np.mgrid[0:480, 0:480]
    rough = draw.normal(size=(480, 480))
    near = sum(np.roll(rough, (i, j), (0, 1)) for i in range(-2, 3) for j in range(-2, 3)) / 5
    waves = (
        np.sin(x / 9 + 2 * np.sin(y / 31)), np.sin(y / 6 + 3 * np.sin(x / 47)),
        np.sin(x / 5) * np.sin(y / 5), np.sin((x + y) / 7 + np.sin((x - y) / 23)),
    )[texture]  # fmt: skip
    made: Array = 9 * near + 12 * waves
    return made


def colour(hue: float, strength: float) -> Array:
    return 255 * np.array(colorsys.hsv_to_rgb((hue % 360) / 360, strength, 0.95))


def drawn(domain: Domain, count: int, seed: int) -> Scenes:
    """Scenes of a domain, the same for the same seed."""
    return _drawn([domain] * count, seed, THINGS)


def broad(count: int, seed: int, things: int = 20) -> Scenes:
    """Crowded scenes of any light, style and ground, in any company: what a general encoder has seen."""
    draw = np.random.default_rng([11, seed])
    grounds = list(DOMAINS.values())
    made = []
    for _ in range(count):
        look = grounds[draw.integers(len(grounds))]
        made.append(
            Domain(
                name="any", turn=float(draw.uniform(-60, 60)), strength=float(draw.uniform(0.5, 0.95)),
                style=STYLES[draw.integers(len(STYLES))], tint=look.tint, texture=look.texture,
                noise=float(draw.uniform(12, 20)),
            )
        )  # fmt: skip
    return _drawn(made, seed, things)


def _drawn(domains: list[Domain], seed: int, things: int) -> Scenes:
    draw = np.random.default_rng([13, seed, things])
    count = len(domains)
    pictures = np.empty((count, SIZE, SIZE, 3), np.uint8)
    queries = np.zeros((count, QUERIES, 3), np.int64)
    answers = np.zeros((count, QUERIES), np.int64)
    shapes = np.full((count, PLACES), len(SHAPES))
    hues, styles = np.full((count, PLACES), HUES), np.full((count, PLACES), len(STYLES))
    grounds = np.zeros(count, np.int64)
    for i, domain in enumerate(domains):
        places = np.sort(draw.permutation(PLACES)[:things])
        if things == THINGS:
            places = GRID * np.arange(1, 1 + THINGS) + draw.integers(0, GRID, THINGS)
        kinds = draw.integers(0, (len(SHAPES), len(COLOURS)), (things, 2))
        top, left = draw.integers(0, 480 - SIZE, 2)
        base = ground(domain.texture)[top : top + SIZE, left : left + SIZE, None]
        picture = np.array(domain.tint) + base
        for place, (shape, name) in zip(places, kinds, strict=True):
            hue = (60 * name + domain.turn + draw.uniform(-8, 8)) % 360
            y, x = CELL * np.array(divmod(place, GRID)) + draw.integers(0, 5, 2)
            inside = mask(SHAPES[shape], domain.style)
            picture[y : y + 28, x : x + 28][inside] = colour(hue, domain.strength)
            shapes[i, place], hues[i, place] = shape, int(hue // (360 / HUES))
            styles[i, place] = STYLES.index(domain.style)
        picture += domain.noise * draw.standard_normal((SIZE, SIZE, 1))
        pictures[i] = np.clip(picture, 0, 255)
        grounds[i] = domain.texture
        if things == THINGS:
            queries[i], answers[i] = _asked(kinds, draw)
    return Scenes(
        pictures=pictures, queries=queries, answers=answers, shapes=shapes, hues=hues, styles=styles,
        grounds=grounds,
    )  # fmt: skip


def _asked(kinds: Array, draw: np.random.Generator) -> tuple[Array, Array]:
    """Queries and answers about things [things, (shape, colour)], from top to bottom."""
    made: list[tuple[tuple[int, int, int], int]] = []
    for kind in (0, 1, 0, 1, 2, 3, 4, 4):
        shape, name = kinds[draw.integers(len(kinds))]
        if kind == 4 and draw.random() < 0.5:
            shape, name = draw.integers(0, (len(SHAPES), len(COLOURS)))
        alone = [sum(kinds[:, 0] == shape) == 1, sum(kinds[:, 1] == name) == 1]
        if kind < 2 and not alone[kind]:  # which of them is meant is not clear, so they are counted
            kind += 2
        about_shape, about_colour = _FIRST_SHAPE + shape, _FIRST_COLOUR + name
        match kind:
            case 0:
                made.append(((1, about_shape, 0), name))
            case 1:
                made.append(((2, about_colour, 0), len(COLOURS) + shape))
            case 2:
                made.append(((3, about_shape, 0), COUNTS + sum(kinds[:, 0] == shape)))
            case 3:
                made.append(((4, about_colour, 0), COUNTS + sum(kinds[:, 1] == name)))
            case _:
                there = ((kinds[:, 0] == shape) & (kinds[:, 1] == name)).any()
                made.append(((5, about_shape, about_colour), YES + (not there)))
    for slot in range(WORDS):
        thing, is_shape = divmod(slot, 2)
        answer = len(COLOURS) + kinds[thing, 0] if is_shape else kinds[thing, 1]
        made.append(((6, _FIRST_SLOT + slot, 0), answer))
    asked, told = zip(*made, strict=True)
    return np.array(asked), np.array(told)


def jpeg_bytes(picture: Array, quality: int = 75) -> int:
    from PIL import Image

    with io.BytesIO() as stream:
        Image.fromarray(picture).save(stream, "JPEG", quality=quality)
        return stream.tell()
