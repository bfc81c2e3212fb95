"""What a device decodes is what the maker meant, the same every time, and nothing that was not encoded is taken."""

import math

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.delta import codec, rate
from effc.errors import DeltaError


def tensor(shape, dtype="float32", width=None):
    width = width or {"float32": 4, "float16": 2}[dtype]
    return codec.Tensor(
        name="w", file="f", offset=0, length=math.prod(shape) * width, dtype=dtype, width=width, shape=shape
    )  # fmt: skip


def pair(shape, seed=0, dtype="float32"):
    draw = np.random.default_rng(seed)
    old = draw.normal(size=shape).astype(dtype)
    return old, (old + 0.01 * draw.normal(size=shape)).astype(dtype)


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8]), st.integers(1, 900), st.floats(0, 1))
@settings(max_examples=60)
def test_exact_encodings_lose_nothing(seed, width, count, share):
    draw = np.random.default_rng(seed)
    old, new = (draw.integers(0, 256, count * width, np.uint8).tobytes() for _ in range(2))
    steps = draw.integers(0, 3, count) * (draw.random(count) < share)
    near = (np.frombuffer(old, f"<u{width}") + steps.astype(f"<u{width}")).tobytes()
    shape = tensor((count,), "", width)
    for wanted in (old, new, near):
        assert codec.decode(shape, *codec.exact(shape, old, wanted), old) == wanted


def codes(share, bits=8, far=0.0, count=40_000, seed=0):
    """Codes, what comes of them where that share goes a step, and the bytes that the entropy of the steps has."""
    draw = np.random.default_rng(seed)
    step = draw.choice([-1, 1], count) * (draw.random(count) < share)
    step = np.where(draw.random(count) < far, draw.integers(-40, 40, count), step)
    old = draw.integers(40, 200, count) if bits == 8 else draw.integers(1, 15, count)
    found = np.unique(step, return_counts=True)[1] / count
    sides = (old.astype("u1"), (old + step).astype("u1"))
    if bits == 4:
        sides = tuple(side[::2] | side[1::2] << 4 for side in sides)
    return *(side.tobytes() for side in sides), float(-(found * np.log2(found)).sum()) * count / 8


@pytest.mark.parametrize(
    ("word", "how"),
    [
        ("gaps", {"share": 0.01}),
        ("gaps", {"share": 0.003, "count": 300_000}),
        ("gaps", {"share": 0.01, "bits": 4}),
        ("steps8", {"share": 0.3}),
        ("steps8", {"share": 0.7, "far": 0.01}),
        ("steps4", {"share": 0.3, "bits": 4}),
    ],
)
def test_codes_that_go_a_step_take_little_more_than_their_entropy(word, how):
    old, new, entropy = codes(**how)
    shape = tensor((len(old),), "", 1)
    encoding, payload = codec.exact(shape, old, new)
    assert encoding == word
    assert codec.decode(shape, encoding, payload, old) == new
    assert len(payload) < 1.3 * entropy + 60
    tight = codec.tightened(encoding, payload)
    assert len(tight) <= len(payload) and codec.decode(shape, encoding, tight, old) == new


@given(
    st.binary(max_size=80), st.sampled_from(codec.EXACT), st.sampled_from([1, 2, 4]), st.integers()
)
@settings(max_examples=200)
def test_any_exact_payload_decodes_or_is_refused(content, encoding, width, seed):
    cuts = abs(seed) % 40
    whole = cuts.to_bytes(4, "little") + content if encoding == "gaps" else content
    try:
        made = codec.decode(
            tensor((24 // width,), "", width), encoding, codec.packed(whole), bytes(24)
        )
    except DeltaError:
        return
    assert len(made) == 24


@pytest.mark.parametrize(
    ("encoding", "content"),
    [
        ("gaps", b""),
        ("gaps", b"\2\0\0\0" + bytes(3)),
        ("gaps", b"\1\0\0\0\x18\1"),
        ("gaps", b"\xff\xff\xff\xff" + bytes(8)),
        ("steps8", bytes(5)),
        ("steps8", b"\3" + bytes(5)),
        ("steps8", bytes(7)),
        ("steps4", bytes(11)),
        ("steps9", bytes(6)),
        ("ints", bytes(23)),
        ("", bytes(24)),
    ],
)
def test_a_payload_that_says_too_little_or_names_what_is_not_there_is_refused(encoding, content):
    with pytest.raises(DeltaError):
        codec.decode(tensor((24,), "", 1), encoding, codec.packed(content), bytes(24))


def test_steps_are_of_single_bytes():
    with pytest.raises(DeltaError, match="does not fit"):
        codec.decode(tensor((6,)), "steps8", codec.packed(bytes(6)), bytes(24))


@pytest.mark.parametrize("shape", [(1,), (63,), (64, 65), (7, 300), (3, 4, 5)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_lossy_encoding_is_nearer_than_nothing(shape, dtype):
    old, new = pair(shape, dtype=dtype)
    change = (new.astype(np.float32) - old.astype(np.float32)).reshape(-1)
    for encoding, payload in rate.lossy(tensor(shape, dtype), change, np.ones_like(change)):
        made = np.frombuffer(
            codec.decode(tensor(shape, dtype), encoding, payload, old.tobytes()), dtype
        )
        error = np.linalg.norm(made.astype(np.float64) - new.reshape(-1))
        assert error < np.linalg.norm(change), encoding


def test_more_bits_are_nearer():
    old, new = pair((64, 64))
    errors = []
    for bits in (2, 4, 8):
        payload = codec.grouped((new - old).reshape(-1), bits)
        made = codec.decode(tensor((64, 64)), f"q{bits}", payload, old.tobytes())
        errors.append(np.abs(np.frombuffer(made, "f4") - new.reshape(-1)).max())
    assert errors[0] > 4 * errors[1] > 40 * errors[2]


def test_few_elements_may_lie_far_apart():
    change = np.zeros(300_000, np.float32)
    change[[0, 3, 65535 * 2, 299_999]] = [1, -2, 3, 0.5]
    found = codec._few(
        codec.unpacked(codec.few(change, np.ones_like(change), 4), 99, name="w"), tensor((300_000,))
    )
    assert np.flatnonzero(found).tolist() == [0, 3, 131070, 299_999]
    assert np.abs(found - change).max() <= 3 / 127


def test_a_product_of_rank_one_is_found():
    draw = np.random.default_rng(0)
    change = np.outer(draw.normal(size=40), draw.normal(size=90)).astype(np.float32).reshape(-1)
    payload = dict(rate.lossy(tensor((40, 90)), change, np.ones_like(change)))["lowrank"]
    made = codec.decode(tensor((40, 90)), "lowrank", payload, bytes(40 * 90 * 4))
    assert np.linalg.norm(np.frombuffer(made, "f4") - change) < 0.02 * np.linalg.norm(change)


@given(st.binary(max_size=80), st.sampled_from(codec.LOSSY))
@settings(max_examples=100)
def test_any_payload_decodes_or_is_refused(content, encoding):
    """A payload of chance may be one by chance; nothing but DeltaError comes of any other."""
    try:
        made = codec.decode(tensor((3, 4)), encoding, codec.packed(content), bytes(48))
    except DeltaError:
        return
    assert len(made) == 48 and np.isfinite(np.frombuffer(made, "f4")).all()


def test_a_bomb_is_refused_before_it_is_unpacked():
    bomb = codec.packed(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    untold = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(48))
    for frame in (bomb, untold, codec.packed(bytes(48)) + b"more", b"", b"\0" * 40):
        with pytest.raises(DeltaError):
            codec.decode(tensor((3, 4)), "bytes", frame, bytes(48))


def test_what_is_no_number_is_refused():
    payload = codec.packed(np.array([np.inf], "<f2").tobytes() + bytes(12))
    with pytest.raises(DeltaError, match="no number"):
        codec.decode(tensor((12,)), "q8", payload, bytes(48))
