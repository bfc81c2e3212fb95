"""How the change of one tensor is written in bytes, and what a device makes of them.

Both sides run `decode`, so what the maker measured is what the device gets. It is the same on every machine: float32,
one rounded operation at a time in the order of the elements, no matrix product, and a cast to the nearest (ties to
even) at the end.

    bytes     the new bytes
    ints      new − old of every element as an integer, modulo its width; for floats that of their bits
    gaps      the same of the elements that changed alone, each named by its distance from the one before
    steps     the same of codes in 8 bits, or of two codes of 4 in a byte: 2 bits for each, and a byte where it went far
    q8 q4 q2  new ≈ old + code · scale, a scale (float16) for each 64 elements
    sign      new ≈ old + sign · scale, a scale for each row (BitDelta, NeurIPS 2024)
    topk      the same with 8 bits for a few elements, each named by its distance from the one before
    lowrank   new ≈ old + Σ aᵢ bᵢᵀ, the vectors in 8 bits with a scale each

Every payload is one zstd frame that says how long its content is. Changes of codes are mostly −1, 0 and 1: four of
them in a byte, or a distance in one, come within a tenth of their entropy at zstd's lowest level, which looks for
nothing but how often a byte occurs; a byte for each takes its highest level, and more bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from effc.errors import DeltaError

Array = NDArray[Any]

GROUP = 64
EXACT = ("bytes", "ints", "gaps", "steps8", "steps4")
LOSSY = ("q8", "q4", "q2", "sign", "topk", "lowrank")
FLOATS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
MOST_WINDOW = 1 << 27
MOST_RANK = 64
HARMED = "get an unharmed copy of the delta, or have it made again"
COUNTED, QUICK, TIGHT = 1, 3, 19
"""Levels of zstd: for what has nothing that repeats, to compare ways of sending a tensor, and for what is sent."""
_SLOW_BELOW = 1 << 20
"""Only content of less than that is packed tight; more of it would take minutes."""
_FAR_GAP, _FAR_STEP = 255, 3
_FEW_OF = 16
"""Of so many elements one may have changed, or less, for `gaps` to be the shortest."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor in a file of a package: `length` bytes at `offset`, `width` bytes for each element.

    `dtype` is float32 or float16, or "" where the bytes are integers or anything else.
    """

    name: str
    file: str
    offset: int
    length: int
    dtype: str
    width: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, int]:
        """Rows and columns of the matrix that it is taken for."""
        count = math.prod(self.shape)
        first = self.shape[0] if len(self.shape) > 1 else 1
        return (first, count // first) if count else (0, 0)


# both sides


def packed(content: bytes, level: int = QUICK) -> bytes:
    """One zstd frame with the length of its content in it."""
    return zstandard.ZstdCompressor(level=level).compress(content)


def tightened(encoding: str, frame: bytes) -> bytes:
    """The same content in fewer bytes, where more time finds such, for what is sent in the end."""
    if encoding.startswith("steps"):  # a hundredth, in a hundred times the time
        return frame
    content = zstandard.ZstdDecompressor().decompress(frame)
    if len(content) >= _SLOW_BELOW:
        return frame
    return min(frame, packed(content, TIGHT), key=len)


def unpacked(frame: bytes, most: int, *, name: str, known: bytes = b"") -> bytes:
    """The content of a frame of at most that many bytes. Raises DeltaError before more is unpacked."""
    try:
        told = zstandard.get_frame_parameters(frame)
        if told.content_size > most:  # also where it is not told, which reads as the largest number
            raise DeltaError(
                f"{name} unpacks to more than the {most} bytes that it may have", hint=HARMED
            )
        dictionary = zstandard.ZstdCompressionDict(known, zstandard.DICT_TYPE_RAWCONTENT)
        reader = zstandard.ZstdDecompressor(
            dict_data=dictionary if known else None, max_window_size=MOST_WINDOW
        )
        content: bytes = reader.decompress(frame, max_output_size=most, allow_extra_data=False)
        return content
    except zstandard.ZstdError as error:
        raise DeltaError(f"{name} cannot be unpacked: {error}", hint=HARMED) from error


def decode(tensor: Tensor, encoding: str, frame: bytes, old: bytes) -> bytes:
    """The new bytes of a tensor. Raises DeltaError for anything that cannot have been encoded."""
    name = f"tensor {tensor.name!r}"
    if len(old) != tensor.length:
        raise DeltaError(f"{name} has {len(old)} bytes and not {tensor.length}", hint=HARMED)
    if encoding in EXACT:
        return _decoded(tensor, encoding, frame, old, name)
    _expect(tensor.dtype in FLOATS and encoding in LOSSY, name)
    kind = FLOATS[tensor.dtype]
    count = tensor.length // kind.itemsize
    _expect(count == math.prod(tensor.shape) and count * kind.itemsize == tensor.length, name)
    content = unpacked(frame, 8 * count + 4096, name=name)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number is refused below
            change = _CHANGES[encoding](content, tensor)
    except (ValueError, IndexError) as error:  # numpy's, for too few bytes
        raise DeltaError(f"{name} has a payload of another size", hint=HARMED) from error
    _expect(change.dtype == np.float32 and change.shape == (count,), name)
    with np.errstate(over="ignore", invalid="ignore"):
        new = (np.frombuffer(old, kind).astype(np.float32) + change).astype(kind)
    if not np.isfinite(new).all():
        raise DeltaError(f"{name} would hold what is no number", hint=HARMED)
    result: bytes = new.tobytes()
    return result


def _expect(holds: bool, name: str) -> None:
    if not holds:
        raise DeltaError(f"{name} has a payload that does not fit it", hint=HARMED)


def _decoded(tensor: Tensor, encoding: str, frame: bytes, old: bytes, name: str) -> bytes:
    """The new bytes of a tensor whose change lost nothing."""
    if encoding.startswith("steps"):
        _expect(tensor.width == 1, name)
        return _stepped(unpacked(frame, 3 * tensor.length, name=name), old, encoding, name)
    if encoding == "gaps":
        content = unpacked(frame, 4 + 3 * tensor.length, name=name)
        return _placed(content, old, tensor.width, name)
    found = unpacked(frame, tensor.length, name=name)
    _expect(len(found) == tensor.length, name)
    if encoding == "bytes":
        return found
    kind = np.dtype(f"<u{tensor.width}")
    new: bytes = (np.frombuffer(old, kind) + _unzigzag(_joined(found, kind))).astype(kind).tobytes()
    return new


def _joined(planes: bytes, kind: np.dtype[Any]) -> Array:
    """Numbers whose first bytes come first, then their second ones."""
    found: Array = np.frombuffer(planes, np.uint8).reshape(kind.itemsize, -1).T.copy().view(kind)
    return found.reshape(-1)


def _placed(content: bytes, old: bytes, width: int, name: str) -> bytes:
    """Gaps, of which 255 says only that the next begins 255 elements on, and how far the element behind each went."""
    _expect(len(content) >= 4, name)
    steps = int.from_bytes(content[:4], "little")
    gaps = np.frombuffer(content, np.uint8, min(steps, len(content) - 4), 4)
    ends = gaps < _FAR_GAP
    places = np.cumsum(gaps.astype(np.int64) + ends)[ends] - 1
    kind = np.dtype(f"<u{width}")
    new = np.frombuffer(old, kind).copy()
    _expect(len(content) == 4 + steps + width * places.size, name)
    _expect(not places.size or places[-1] < new.size, name)
    new[places] += _unzigzag(_joined(content[4 + steps :], kind))
    result: bytes = new.tobytes()
    return result


def _stepped(content: bytes, old: bytes, encoding: str, name: str) -> bytes:
    bits = int(encoding[-1])
    codes = halves(np.frombuffer(old, np.uint8)) if bits == 4 else np.frombuffer(old, np.uint8)
    packs = -(-codes.size // 4)
    _expect(len(content) >= packs, name)
    each = np.frombuffer(content, np.uint8, packs)
    steps = np.stack([each >> s & 3 for s in (0, 2, 4, 6)], axis=1).reshape(-1)[: codes.size]
    far = np.flatnonzero(steps == _FAR_STEP)
    _expect(len(content) == packs + far.size, name)
    steps[far] += np.frombuffer(content, np.uint8, far.size, packs)
    new = codes + _unzigzag(steps)
    result: bytes = (paired(new) if bits == 4 else new).tobytes()
    return result


def halves(pairs: Array) -> Array:
    """Codes of 4 bits, of which a byte has two, the lower one first."""
    found: Array = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)
    return found


def paired(codes: Array) -> Array:
    """The way back from `halves`; of an odd number of codes the last byte is filled with 0."""
    low = np.zeros(-(-codes.size // 2) * 2, np.uint8)
    low[: codes.size] = codes & 15
    found: Array = low[::2] | low[1::2] << 4
    return found


def _zigzag(value: Array) -> Array:
    """Small differences of either sign as small numbers: 0, −1, 1, −2, … become 0, 1, 2, 3, …"""
    signed = value.view(f"<i{value.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * value.itemsize - 1))).view(value.dtype)


def _unzigzag(value: Array) -> Array:
    one = value.dtype.type(1)
    result: Array = (value >> one) ^ (~(value & one) + one)
    return result


def _grouped(content: bytes, tensor: Tensor, bits: int) -> Array:
    count = math.prod(tensor.shape)
    groups = -(-count // GROUP)
    scales, codes = _scales(content, groups), np.frombuffer(content[2 * groups :], np.uint8)
    if bits < 8:
        codes = np.stack(
            [codes >> s & ((1 << bits) - 1) for s in range(0, 8, bits)], axis=1
        ).reshape(-1)
    if not count <= codes.size < count + 8 // bits:
        raise ValueError("codes")
    middle = 1 << (bits - 1)
    values = (codes[:count].astype(np.int16) - middle).astype(np.float32)
    result: Array = values * np.repeat(scales, GROUP)[:count]
    return result


def _signs(content: bytes, tensor: Tensor) -> Array:
    rows, columns = tensor.rows
    bits = np.unpackbits(
        np.frombuffer(content[2 * rows :], np.uint8), count=rows * columns, bitorder="little"
    )
    if len(content) != 2 * rows + -(-rows * columns // 8):
        raise ValueError("signs")
    result: Array = (bits.astype(np.float32) * 2 - 1) * np.repeat(_scales(content, rows), columns)
    return result


def _few(content: bytes, tensor: Tensor) -> Array:
    count = (len(content) - 2) // 3
    if len(content) != 2 + 3 * count:
        raise ValueError("few")
    gaps = np.frombuffer(content, np.uint8, 2 * count, 2).reshape(2, -1).T.copy().view("<u2")
    places = np.cumsum(gaps.reshape(-1).astype(np.int64))
    values = np.frombuffer(content, np.int8, count, 2 + 2 * count).astype(np.float32)
    found = np.zeros(math.prod(tensor.shape), np.float32)
    # a gap that is too wide for 16 bits is several, all but the last of them with value 0 at a place that may recur
    np.add.at(found, places, values * _scales(content, 1)[0])
    return found


def _product(content: bytes, tensor: Tensor) -> Array:
    rows, columns = tensor.rows
    rank, rest = divmod(len(content), rows + columns + 4)
    if rest or not 1 <= rank <= MOST_RANK:
        raise ValueError("rank")
    scales = _scales(content, 2 * rank)
    codes = np.frombuffer(content, np.int8, offset=4 * rank).astype(np.float32)
    left = codes[: rank * rows].reshape(rank, rows) * scales[:rank, None]
    right = codes[rank * rows :].reshape(rank, columns) * scales[rank:, None]
    found = np.zeros((rows, columns), np.float32)
    for a, b in zip(left, right, strict=True):  # a product of matrices rounds as its library likes
        found += np.multiply(a[:, None], b[None, :])
    return found.reshape(-1)


def _scales(content: bytes, count: int) -> Array:
    return np.frombuffer(content, "<f2", count).astype(np.float32)


_CHANGES = {
    "q8": lambda content, tensor: _grouped(content, tensor, 8),
    "q4": lambda content, tensor: _grouped(content, tensor, 4),
    "q2": lambda content, tensor: _grouped(content, tensor, 2),
    "sign": _signs,
    "topk": _few,
    "lowrank": _product,
}


# the maker's side


def exact(tensor: Tensor, old: bytes, new: bytes) -> tuple[str, bytes]:
    """The shortest of the encodings that lose nothing, and its payload."""
    kind = np.dtype(f"<u{tensor.width}")
    before, after = np.frombuffer(old, kind), np.frombuffer(new, kind)
    places = np.flatnonzero(before != after)
    found = {}
    if 4 * places.size <= after.size:
        change = _zigzag(after[places] - before[places])
        found["gaps"] = packed(_gaps(places) + _planes(change), COUNTED)
    if _FEW_OF * places.size > after.size:
        difference = _zigzag(after - before)
        found["ints"] = packed(_planes(difference))
        if tensor.width == 1:
            found |= _all_steps(before, after, difference)
    if 2 * min(map(len, found.values())) > len(new):
        found["bytes"] = packed(new)  # where less changed, the new bytes are not worth packing
    encoding = min(found, key=lambda word: len(found[word]))
    return encoding, found[encoding]


def _all_steps(before: Array, after: Array, difference: Array) -> dict[str, bytes]:
    content = _steps(difference)
    found = {"steps8": packed(content, COUNTED)}
    if (
        8 * len(content) > 3 * difference.size
    ):  # where an eighth went far, the upper of two codes may have moved
        apart = (halves(after) - halves(before)) & 15
        low = (apart + 8 & 15).astype(np.int8) - 8  # modulo 16, from −8 to 7
        found["steps4"] = packed(_steps(_zigzag(low.view(np.uint8))), COUNTED)
    return found


def _planes(values: Array) -> bytes:
    found: bytes = values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()
    return found


def _gaps(places: Array) -> bytes:
    gaps = np.diff(places, prepend=-1) - 1
    far = gaps // _FAR_GAP
    found = np.full(gaps.size + int(far.sum()), _FAR_GAP, np.uint8)
    found[np.arange(gaps.size) + np.cumsum(far)] = gaps % _FAR_GAP
    return bytes(found.size.to_bytes(4, "little") + found.tobytes())


def _steps(difference: Array) -> bytes:
    padded = np.zeros(-(-difference.size // 4) * 4, np.uint8)
    np.minimum(difference, _FAR_STEP, out=padded[: difference.size])
    fours = padded.view("<u4")
    twos = fours | fours >> 6  # the second of each pair behind the first
    joined = ((twos | twos >> 12) & 255).astype(np.uint8)
    far = difference[difference >= _FAR_STEP] - _FAR_STEP
    return bytes(joined.tobytes() + far.tobytes())


def grouped(change: Array, bits: int) -> bytes:
    """`change` [n] in codes of 8, 4 or 2 bits, symmetric around 0."""
    groups = -(-change.size // GROUP)
    padded = np.zeros(groups * GROUP, np.float32)
    padded[: change.size] = change
    blocks = padded.reshape(groups, GROUP)
    most = (1 << (bits - 1)) - 1
    scales = _half(np.abs(blocks).max(axis=1) / most)
    if bits == 2:  # of −1, 0 and 1 the best step is far below the largest change
        scales = _half(_ternary(blocks))
    middle = 1 << (bits - 1)
    codes = (np.clip(_ratio(blocks, scales), -most, most) + middle).astype(np.uint8).reshape(-1)
    codes = codes[: -(-change.size * bits // 8) * 8 // bits]
    each = codes.reshape(-1, 8 // bits)
    joined = np.zeros(len(each), np.uint8)
    for place in range(each.shape[1]):
        joined |= each[:, place] << np.uint8(place * bits)
    return packed(scales.tobytes() + joined.tobytes())


def _ternary(blocks: Array) -> Array:
    """The step, of a few shares of the largest, with the least squared error in each block."""
    largest = np.abs(blocks).max(axis=1)
    shares = np.array([0.3, 0.45, 0.6, 0.8, 1.0], np.float32)
    errors = []
    for share in shares:
        step = (largest * share)[:, None]
        near = np.clip(
            np.rint(np.divide(blocks, step, where=step > 0, out=np.zeros_like(blocks))), -1, 1
        )
        errors.append(((blocks - near * step) ** 2).sum(axis=1))
    result: Array = largest * shares[np.argmin(errors, axis=0)]
    return result


def _half(scales: Array) -> Array:
    return np.minimum(scales, 60000).astype("<f2")


def _ratio(values: Array, scales: Array) -> Array:
    step = scales.astype(np.float32)[:, None]
    return np.rint(np.divide(values, step, where=step > 0, out=np.zeros_like(values)))


def signs(change: Array, tensor: Tensor) -> bytes:
    rows = change.reshape(tensor.rows)
    scales = _half(np.abs(rows).mean(axis=1))
    return packed(scales.tobytes() + np.packbits(rows.reshape(-1) > 0, bitorder="little").tobytes())


def few(change: Array, weight: Array, count: int) -> bytes:
    """The `count` elements that the error hangs on most, by weight · change²."""
    places = np.sort(np.argpartition(-weight * change * change, count - 1)[:count])
    scale = _half(np.abs(change[places]).max(keepdims=True) / 127)
    values = _ratio(change[places][None], scale)[0].clip(-127, 127)
    gaps = np.diff(places, prepend=0)
    wide = gaps // 65535
    at = np.arange(count) + np.cumsum(wide)
    all_gaps = np.full(count + int(wide.sum()), 65535, "<u2")
    all_values = np.zeros(all_gaps.size, np.int8)
    all_gaps[at], all_values[at] = gaps % 65535, values
    planes = all_gaps.view(np.uint8).reshape(-1, 2).T.tobytes()
    return packed(scale.tobytes() + planes + all_values.tobytes())


def product(left: Sequence[Array], right: Sequence[Array]) -> bytes:
    """Vectors a [rank][rows] and b [rank][columns], each in 8 bits with a scale of its own."""
    scales, codes = [], []
    for vector in (*left, *right):
        scale = _half(np.abs(vector).max(keepdims=True) / 127)
        scales.append(scale)
        codes.append(_ratio(vector[None].astype(np.float32), scale)[0].clip(-127, 127))
    return packed(
        np.concatenate(scales).tobytes() + np.concatenate(codes).astype(np.int8).tobytes()
    )
