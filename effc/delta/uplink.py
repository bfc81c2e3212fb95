"""The device's way up: tokens that its model was unsure of, in a compact file, in a queue that waits for a line.

    calibrate    a threshold of a sample's score, from samples that the model is at home with
    pack, read   a payload: places and features of kept tokens, in 8 or 16 bits, as safetensors
    Queue        payloads on the disk, where their owner has allowed it, until somebody takes them

The threshold for a share α of such samples is the ⌈(n + 1)(1 − α)⌉-th smallest of n scores: of further samples like
them at most α lie above it, on average over draws (split conformal, Papadopoulos et al. 2002).

A payload says whose tokens it has: sha256 of encoder, tokenizer and engine, or whatever else both sides agree on. The
reader names what it takes, and refuses any other. It is JSON and arrays, and nothing in it is run.

Features can be turned back into something like the picture that they came from. So nothing is kept before `opt_in`,
which is a file of the device, `opt_out` removes all that waits, and what waits too long goes by itself. This needs
what a device needs for deltas and safetensors, no torch and no line: without one the queue keeps its newest within its
bounds, and the engine answers on.
"""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
from safetensors.numpy import load, save

from effc import bounded, paths
from effc.delta import whole
from effc.delta.codec import Array
from effc.delta.device import alone
from effc.errors import DeltaError
from effc.plain import sealed

FORM = "effc uplink 1"
OWN = frozenset({"form", "length", "data"})
"""What a payload says beside whose tokens it has."""
MOST_PAYLOAD = 64 << 20
MOST_HEADER = 1 << 20
MOST_SPREAD = 1 << 28
"""Numbers that a payload may have where every token is in its place, sent or not."""
WIDEST = 127
"""The greatest code of a feature in 8 bits, of either sign."""
LEAST_SCALE = float(np.finfo(np.float16).smallest_subnormal)
SUFFIX = ".effu"
MOST_AHEAD = 366
"""Days that a clock may have gone back; one that was further ahead was wrong."""
SETTINGS, SPENT = "settings.json", "spent.json"
AGAIN = "have the device send it again"
DAY_S = 86400.0


# the threshold


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Above which score a sample is worth sending.

    `value` is of `score`, such that a share of at most `share` of samples like those `samples` lies above it; `engine`
    is the sha256 of what gave the scores.
    """

    score: str
    share: float
    value: float
    samples: int
    engine: str

    def takes(self, scores: Array) -> Array:
        """Which samples are worth sending [batch]; one whose score is no number is not."""
        return np.asarray(scores) > self.value


def calibrate(scores: Array, share: float, *, score: str, engine: str) -> Threshold:
    """The threshold that `share` of samples like these exceed. Raises DeltaError where they are too few to tell."""
    found = np.sort(np.asarray(scores, np.float64).reshape(-1))
    if not 0 < share < 1:
        raise DeltaError(f"{share} is no share of samples", hint="one between 0 and 1, such as 0.1")
    if not np.isfinite(found).all():
        raise DeltaError("a score is no number", hint="does the engine give numbers for them?")
    place = math.ceil((len(found) + 1) * (1 - share) - 1e-9)
    if place > len(found):
        raise DeltaError(
            f"{len(found)} scores do not tell what {share} of them exceeds",
            hint=f"give {math.ceil(1 / share) - 1} or more",
        )
    return Threshold(
        score=score, share=share, value=float(found[place - 1]), samples=len(found), engine=engine
    )


def write_threshold(threshold: Threshold, file: Path) -> None:
    """Write it as JSON that holds its own sha256."""
    write_sealed(file, {"schema": 1, **asdict(threshold)})


def read_threshold(file: Path, *, engine: str) -> Threshold:
    """What `write_threshold` wrote for an engine. Raises DeltaError for what is harmed or is another engine's."""
    told = read_sealed(file, {"schema"} | {f.name for f in fields(Threshold)})
    if told is None or told.pop("schema") != 1:
        raise DeltaError(f"{file} has no whole threshold", hint="calibrate it again")
    if not all(_is_number(told[name]) for name in ("share", "value", "samples")):
        raise DeltaError(f"{file} has a threshold that is no number", hint="calibrate it again")
    found = Threshold(**told)
    if found.engine != engine:
        raise DeltaError(
            f"the threshold is of engine {str(found.engine)[:12]}, and {engine[:12]} serves",
            hint="scores of another engine are others: calibrate it again",
        )
    return found


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# the payload


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Kept tokens of n samples, each of `length` tokens.

    `index` [n, K] are their places, `tokens` [n, K, D] their features in float32, `score` [n] that of the samples;
    `beside` has arrays of integers [n, …] by name that go with them, such as the ids of a question.
    """

    length: int
    index: Array
    tokens: Array
    score: Array
    beside: Mapping[str, Array] = field(default_factory=dict)

    def spread(self) -> tuple[Array, Array]:
        """Features in their places [n, length, D], 0 where none was sent, and which were sent [n, length]."""
        count, _, width = self.tokens.shape
        rows = np.arange(count)[:, None]
        wide = np.zeros((count, self.length, width), np.float32)
        sent = np.zeros((count, self.length), bool)
        wide[rows, self.index], sent[rows, self.index] = self.tokens, True
        return wide, sent


def pack(
    tokens: Tokens, who: Mapping[str, str], *, form: Literal["int8", "float16"] = "int8"
) -> bytes:
    """The bytes of a payload; `who` has the digests of what the tokens are of, by any names but those of `OWN`.

    In int8 every token has a scale of its own. Raises DeltaError for what is no such thing, or no numbers.
    """
    if problem := _problem(tokens):
        raise DeltaError(f"the tokens cannot be sent: {problem}", hint="give what the engine gives")
    if not who or OWN & set(who):
        raise DeltaError(
            "a payload must say whose tokens it has", hint="who: encoder, tokenizer, engine"
        )
    arrays = {
        "index": _narrow(tokens.index),
        "score": np.clip(tokens.score, -65504, 65504).astype(np.float16),
        **{f"beside.{name}": _narrow(array) for name, array in tokens.beside.items()},
    }
    features = np.asarray(tokens.tokens, np.float32)
    if form == "float16":
        arrays["tokens"] = np.clip(features, -65504, 65504).astype(np.float16)
    else:
        size = np.abs(features).max(-1) / WIDEST
        scale = np.clip(size, LEAST_SCALE, 65504).astype(np.float16)
        codes = np.rint(features / scale.astype(np.float32)[..., None])
        arrays["tokens"] = np.clip(codes, -WIDEST, WIDEST).astype(np.int8)
        arrays["scale"] = scale
    told = {"form": FORM, "length": str(tokens.length), **who}
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(held, metadata={**told, "data": _data_digest(save(held))})


def _data_digest(content: bytes) -> str:
    """sha256 of all of a safetensors file but its header."""
    (size,) = struct.unpack_from("<Q", content)
    return hashlib.sha256(content[8 + size :]).hexdigest()


def read(content: bytes, who: Mapping[str, str], *, length: int | None = None) -> Tokens:
    """What is in a payload of `who`, of samples of `length` tokens, of any where None.

    Raises DeltaError for anything else, and for what is of somebody else.
    """
    told = _metadata(content)
    if told.get("form") != FORM:
        raise DeltaError("this is no payload, or one of another version", hint=AGAIN)
    for name in sorted({*who, *told} - OWN):
        if told.get(name) != who.get(name):
            raise DeltaError(
                f"the tokens are of another {name}: {str(told.get(name))[:12]}, and not {str(who.get(name))[:12]}",
                hint="tokens of one model say nothing to another; bring the device up to date first",
            )
    if told.get("data") != _data_digest(content):
        raise DeltaError(
            "the payload is harmed: its bytes are not those that were packed", hint=AGAIN
        )
    try:
        arrays = load(content)
        found = _tokens(arrays, int(told["length"]))
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DeltaError(f"the payload is harmed: {error}", hint=AGAIN) from error
    if problem := _problem(found):
        raise DeltaError(f"the payload is harmed: {problem}", hint=AGAIN)
    if length is not None and found.length != length:
        raise DeltaError(
            f"the payload is of samples of {found.length} tokens, and not {length}", hint=AGAIN
        )
    return found


def owner(content: bytes) -> dict[str, str]:
    """Whose tokens a payload says that it has; nothing else is looked at. Raises DeltaError where it says nothing."""
    return {name: value for name, value in _metadata(content).items() if name not in OWN}


def _metadata(content: bytes) -> dict[str, str]:
    """What a payload says of itself, before anything else of it is looked at."""
    if not 8 < len(content) <= MOST_PAYLOAD:
        raise DeltaError(f"a payload of {len(content)} bytes is not read", hint=AGAIN)
    header, _ = bounded.header_of(content, "the payload", DeltaError, MOST_HEADER)
    told = header.get("__metadata__")
    if not isinstance(told, dict) or not all(isinstance(v, str) for v in told.values()):
        raise DeltaError("the payload does not say what it is", hint=AGAIN)
    return told


def _tokens(arrays: Mapping[str, Array], length: int) -> Tokens:
    features = arrays["tokens"]
    if features.dtype == np.int8:
        features = features.astype(np.float32) * arrays["scale"].astype(np.float32)[..., None]
    elif features.dtype != np.float16:
        raise ValueError(f"features of {features.dtype}")
    whole = {n: a for n, a in arrays.items() if n == "index" or n.startswith("beside.")}
    if strange := [n for n, a in whole.items() if a.dtype.kind not in "iu"]:
        raise ValueError(f"{strange[0]} is no integers")
    return Tokens(
        length=length,
        index=arrays["index"].astype(np.int64),
        tokens=features.astype(np.float32),
        score=arrays["score"].astype(np.float32),
        beside={
            name.removeprefix("beside."): array.astype(np.int64)
            for name, array in arrays.items() if name.startswith("beside.")
        },
    )  # fmt: skip


def _problem(tokens: Tokens) -> str | None:
    """What of it is not as it should be; None where all is."""
    index, features, score = tokens.index, tokens.tokens, tokens.score
    if features.ndim != 3 or index.shape != features.shape[:2] or not features.size:
        return f"features {list(features.shape)} and places {list(index.shape)} are not of the same tokens"
    if score.shape != index.shape[:1] or any(len(a) != len(index) for a in tokens.beside.values()):
        return "there is not one score, or one of what goes beside it, for each sample"
    if not 0 < tokens.length <= 1 << 16 or index.min() < 0 or index.max() >= tokens.length:
        return f"a place lies outside of {tokens.length} tokens"
    if (np.diff(np.sort(index, axis=1), axis=1) == 0).any():
        return "a place is there twice"
    if len(index) * tokens.length * features.shape[2] > MOST_SPREAD:
        return f"spread out it has more than {MOST_SPREAD} numbers"
    if any(array.dtype.kind not in "iu" for array in tokens.beside.values()):
        return "what goes beside the tokens is no integers"
    if not np.isfinite(features).all() or not np.isfinite(score).all():
        return "a feature or a score is no number"
    return None


def _narrow(array: Array) -> Array:
    """Integers in the fewest bytes that hold them all."""
    for kind in (np.uint8, np.uint16, np.int32):
        info = np.iinfo(kind)
        if not array.size or (array.min() >= info.min and array.max() <= info.max):
            return array.astype(kind)
    return array.astype(np.int64)


# the queue


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an owner allows: bytes that are sent in a day, bytes that wait on the disk, and days that they wait."""

    bytes_a_day: int = 1 << 20
    bytes_waiting: int = 16 << 20
    days: float = 7.0


class Unsent(ConnectionError):
    """Nobody was there to send to, so no byte of a payload has left."""


class Queue:
    """Payloads of a device that wait to be taken, oldest first; each is a file, and whole or not there.

    `place` is a directory of its own. `clock` gives seconds since 1970; days are those of UTC, and a day that was begun
    is not begun again by a clock that goes back, but for one that was a year ahead.
    """

    def __init__(self, place: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.place, self.clock = place, clock

    def opt_in(self, limits: Limits | None = None) -> None:
        """From now on payloads are kept and sent. Raises DeltaError for limits that are none."""
        limits = limits or Limits()
        if not all(_is_number(v) and v > 0 for v in asdict(limits).values()):
            raise DeltaError(f"{limits} has a limit that is none", hint="numbers above 0")
        make_place(self.place)
        with alone(self.place):
            write_sealed(self.place / SETTINGS, {"schema": 1, **asdict(limits)})

    def opt_out(self) -> None:
        """From now on nothing is kept, and what waits is gone."""
        if self.place.is_dir():
            with alone(self.place):
                (self.place / SETTINGS).unlink(missing_ok=True)
                for file in self.place.glob(f"*{SUFFIX}*"):
                    file.unlink(missing_ok=True)

    def limits(self) -> Limits | None:
        """What its owner allows; None where they allow nothing, or what they wrote is harmed."""
        told = read_sealed(self.place / SETTINGS, {"schema"} | {f.name for f in fields(Limits)})
        if told is None or told.pop("schema") != 1:
            return None
        if not all(_is_number(v) and v > 0 for v in told.values()):
            return None
        return Limits(**told)

    def put(self, content: bytes) -> bool:
        """Keep a payload; False where its owner has not allowed it, or it alone is too large.

        The oldest go where there is no more room for it. Raises DeltaError where the disk refuses it.
        """
        if self.limits() is None:  # there need not be a directory
            return False
        with alone(self.place):
            limits = self.limits()  # may have been taken back meanwhile
            if limits is None or len(content) > min(limits.bytes_waiting, limits.bytes_a_day):
                return False
            waiting = self._fresh(limits)
            used = sum(file.stat().st_size for file in waiting)
            for file in waiting:
                if used + len(content) <= limits.bytes_waiting:
                    break
                used -= file.stat().st_size
                file.unlink()
            number = max((_number(file) for file in waiting), default=0) + 1
            stamp = f"{int(self.clock() * 1000):015d}-{number:012d}{SUFFIX}"
            write_whole(self.place / stamp, content)
            return True

    def waiting(self) -> list[Path]:
        """What waits, oldest first."""
        return sorted(self.place.glob(f"[0-9]*{SUFFIX}"), key=_number)

    def send(self, post: Callable[[bytes], None]) -> int:
        """Give what waits to `post`, as far as the day allows, and forget what it took; gives how many those were.

        Where `post` raises OSError the rest stays for another time, and nothing is raised: a device need not have a
        line. That counts in the day all the same, unless it was `Unsent`. What it took and a crash kept from being
        forgotten is sent once more.
        """
        taken = 0
        if self.limits() is None:
            return taken
        with alone(self.place, ".send"):
            while (chosen := self._chosen()) is not None:
                file, content = chosen
                try:
                    post(content)  # what takes long keeps nobody from adding to what waits
                except Unsent:
                    self._give_back(len(content))
                    break
                except OSError:
                    break
                file.unlink(missing_ok=True)
                taken += 1
        return taken

    def _chosen(self) -> tuple[Path, bytes] | None:
        """The oldest that waits, counted as sent; None where nothing waits or the day allows no more."""
        with alone(self.place):
            limits = self.limits()
            waiting = self._fresh(limits) if limits is not None else []
            if limits is None or not waiting:
                return None
            content = waiting[0].read_bytes()
            day, used = spent(self.place, self.clock())
            if used + len(content) > limits.bytes_a_day:
                return None
            # counted before it is sent: a line that breaks has cost what it carried
            spend(self.place, day, used + len(content))
            return waiting[0], content

    def _give_back(self, size: int) -> None:
        with alone(self.place):
            day, used = spent(self.place, self.clock())
            spend(self.place, day, max(0, used - size))  # 0 where another day has begun

    def _fresh(self, limits: Limits) -> list[Path]:
        """What waits and is not too old; the rest is removed, with what a killed process left half written."""
        for part in self.place.glob(".*.part"):
            part.unlink(missing_ok=True)
        oldest = (self.clock() - limits.days * DAY_S) * 1000
        found = self.waiting()
        for file in found:
            if int(file.name.split("-")[0]) < oldest:
                file.unlink(missing_ok=True)
        return [file for file in found if file.exists()]


def make_place(place: Path) -> None:
    """A directory, where there is none yet. Raises DeltaError."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeltaError(
            f"{place} cannot be made: {error.strerror}", hint="name another directory"
        ) from error


def spent(place: Path, now: float) -> tuple[int, int]:
    """The day of a time in seconds since 1970, and the bytes that a directory has counted in it."""
    day = int(now // DAY_S)
    told = read_sealed(place / SPENT, {"day", "bytes"})
    if told is None or not all(type(v) is int for v in told.values()):
        return day, 0
    if not day <= told["day"] <= day + MOST_AHEAD:
        return day, 0
    return told["day"], told["bytes"]


def spend(place: Path, day: int, total: int) -> None:
    """Count so many bytes in a day. Raises DeltaError where the disk refuses it."""
    write_sealed(place / SPENT, {"day": day, "bytes": total})


def _number(file: Path) -> int:
    return int(file.name.removesuffix(SUFFIX).split("-")[1])


def read_sealed(file: Path, names: set[str]) -> dict[str, Any] | None:
    """What a file of JSON with its own sha256 holds, under these names and no others; None where it is not whole."""
    with suppress(DeltaError):
        text = bounded.content(paths.plain(file, DeltaError), str(file), DeltaError, 1 << 16)
        told = bounded.json_of(text, str(file), DeltaError)
        if isinstance(told, dict) and sealed(told).encode() == text:
            del told["digest"]
            return told if set(told) == names else None
    return None


def write_sealed(place: Path, told: Mapping[str, Any]) -> None:
    """Write JSON that holds its own sha256. Raises DeltaError where the disk refuses it."""
    write_whole(place, sealed(told))


def write_whole(place: Path, content: str | bytes) -> None:
    """Write a file whole. Raises DeltaError where the disk refuses it."""
    try:
        whole.write(place, content)
    except OSError as error:
        raise DeltaError(
            f"{place} cannot be written: {error.strerror}", hint="free some disk space"
        ) from error
