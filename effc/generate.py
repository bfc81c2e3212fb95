"""Text from a causal language model: prompts go in, and what follows comes out piece by piece.

Prompts of unequal length are padded at the left, as transformers does it. What is generated goes back in one token at a
time, with the cache of keys and values that the engine gave.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effc.causal import KEEP, carried, empty, positions
from effc.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]
Engine = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Takes and gives arrays, or values of its own runtime for the cache."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the likeliest that hold `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()


def choose(logits: Array, sampling: Sampling, draw: np.random.Generator) -> Array:
    """logits [batch, vocabulary] → tokens [batch]"""
    if sampling.temperature <= 0:
        return np.asarray(logits.argmax(-1))
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, axis=-1, kind="stable")
    sorted_ = np.take_along_axis(scaled, order, -1)
    shares = np.exp(sorted_ - sorted_[:, :1])
    shares /= shares.sum(-1, keepdims=True)
    before = np.cumsum(shares, -1) - shares
    kept = before < sampling.top_p
    kept[:, 0] = True
    shares = np.where(kept, shares, 0.0)
    shares /= shares.sum(-1, keepdims=True)
    places = [draw.choice(len(row), p=row) for row in shares]
    return np.asarray([order[i, place] for i, place in enumerate(places)])


@dataclass
class Counts:
    """What a run took: tokens and seconds of reading the prompts and of writing, and seconds to the first token."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass
class Reply:
    """The tokens of one prompt's continuation so far, and how much of their text is out.

    What stands in `ids` before `told` is text already; it was decoded as `told_text` from `start` on. `held` is text
    that is not out, since a stop string could begin in it.
    """

    ids: list[int] = field(default_factory=list)
    start: int = 0
    told: int = 0
    told_text: str = ""
    held: str = ""
    pieces: list[str] = field(default_factory=list)
    is_in_bytes: bool = False
    done: bool = False

    @property
    def shown(self) -> str:
        return "".join(self.pieces)


def tokens(
    engine: Engine,
    cache: Sequence[tuple[int, int]],
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    ends: Sequence[int],
    pad: int,
    context: int | None,
    counts: Counts | None = None,
    dtype: str = "float32",
    beside: Mapping[str, Array] | None = None,
) -> Generator[list[int | None], Iterable[int] | None, None]:
    """One token a prompt and step; None for those that have ended. Raises UsageError where a prompt does not fit.

    `cache` is heads and head size of every layer, `dtype` the type of what is in it, `beside` what the engine takes at
    every step, a row for each prompt. An `ends` token ends its prompt and is given too. Whoever sends rows ends those.
    """
    counts = counts if counts is not None else Counts()
    _refuse(prompts, context)
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    counts.prompt_tokens += int(mask.sum())
    past: Mapping[str, Any] = empty(cache, len(prompts), dtype)
    draw = np.random.default_rng(sampling.seed)
    running = np.ones(len(prompts), bool)
    room = sampling.max_tokens if context is None else min(sampling.max_tokens, context - longest)
    for number in range(room):
        started = time.perf_counter()
        length = ids.shape[1]
        found = engine({
            "input_ids": ids, "attention_mask": mask, "position_ids": positions(mask, length),
            KEEP: np.array([length - 1]), **past, **(beside or {}),
        })  # fmt: skip
        chosen = choose(found["logits"][:, -1], sampling, draw)
        past = carried(found)
        spent = time.perf_counter() - started
        if number:
            counts.decode_s += spent
        else:
            counts.prefill_s += spent
        counts.new_tokens += int(running.sum())
        done = yield [int(t) if on else None for t, on in zip(chosen, running, strict=True)]
        running &= ~np.isin(chosen, list(ends))
        running[list(done or ())] = False
        if not running.any():
            return
        ids = np.where(running, chosen, pad)[:, None].astype(np.int64)
        mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)


def _refuse(prompts: Sequence[Sequence[int]], context: int | None) -> None:
    if not prompts:
        raise UsageError("there is no prompt", hint='--prompt "Once upon a time"')
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UsageError(
                f"prompt {number} is empty", hint="write something for the model to go on with"
            )
        if context is not None and len(prompt) >= context:
            raise UsageError(
                f"prompt {number} is {len(prompt)} tokens long, and the model takes {context} with what it writes",
                hint="shorten it",
            )


BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token that is one byte, of a vocabulary that spells out in bytes what it has no token for."""


class Texts:
    """The text of every reply as its tokens come, never half of a character and nothing of a stop string.

    A token says nothing alone: whether a blank is in front of it, or which character its bytes are of, hangs on what
    comes before. So a few tokens are decoded with and without what is new, beginning where text was whole. Bytes in a
    row are text together or not at all, and wait for the end of their row.
    """

    def __init__(self, tokenizer: Any, count: int, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.special = frozenset(tokenizer.all_special_ids)
        self.replies = [Reply() for _ in range(count)]

    def add(self, row: int, token: int) -> str:
        """What is new of a reply's text; a stop string ends it."""
        reply = self.replies[row]
        reply.ids.append(token)
        if token not in self.special:
            piece = self.tokenizer.convert_ids_to_tokens(token)
            reply.is_in_bytes = BYTE.fullmatch(piece or "") is not None
        if reply.is_in_bytes:
            return ""
        text = self._decoded(reply, reply.start)
        if text == reply.told_text or text.endswith("\ufffd"):
            return ""
        new = text[len(reply.told_text) :]
        reply.start, reply.told = reply.told, len(reply.ids)
        reply.told_text = self._decoded(reply, reply.start)
        return self._show(reply, new)

    def rest(self, row: int) -> str:
        """What was held back, once no more comes."""
        reply = self.replies[row]
        if reply.done:
            return ""
        new = self._show(reply, self._decoded(reply, reply.start)[len(reply.told_text) :])
        if not reply.done:
            new += reply.held
            reply.pieces.append(reply.held)
        reply.done = True
        return new

    def _decoded(self, reply: Reply, start: int) -> str:
        return str(self.tokenizer.decode(reply.ids[start:], skip_special_tokens=True))

    def _show(self, reply: Reply, new: str) -> str:
        """Put out what is new, but for what a stop string could begin with; a whole one ends the reply before it."""
        text = reply.held + new
        places = [place for word in self.stop if (place := text.find(word)) >= 0]
        if places:
            reply.done = True
        end = min(places, default=len(text) - self._open(text))
        reply.held = text[end:]
        reply.pieces.append(text[:end])
        return text[:end]

    def _open(self, text: str) -> int:
        """How many characters at the end a stop string could begin with."""
        longest = 0
        for word in self.stop:
            for size in range(1, len(word)):
                if text.endswith(word[:size]):
                    longest = max(longest, size)
        return longest
