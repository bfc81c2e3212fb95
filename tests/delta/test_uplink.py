"""Tokens go up compactly, to who knows whose they are, when their owner allows it and a line is there."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import WHO, Clock, tokens
from safetensors.numpy import save

from effc.delta import uplink
from effc.delta.uplink import Limits, Queue
from effc.errors import DeltaError


@pytest.mark.parametrize(("form", "most"), [("int8", 0.5 / 127), ("float16", 1e-3)])
def test_what_comes_out_is_what_went_in_but_for_rounding(form, most):
    given_ = tokens()
    found = uplink.read(uplink.pack(given_, WHO, form=form), WHO)
    assert np.array_equal(found.index, given_.index)
    assert np.array_equal(found.beside["question"], given_.beside["question"])
    size = np.abs(given_.tokens).max(-1, keepdims=True)
    assert (np.abs(found.tokens - given_.tokens) <= 1.001 * most * size).all()
    np.testing.assert_allclose(found.score, given_.score, rtol=1e-3)


def test_a_token_costs_a_byte_for_a_feature_and_three_more():
    one, many = (len(uplink.pack(tokens(count), WHO)) for count in (1, 101))
    assert (many - one) / 100 == pytest.approx(4 * (16 + 3) + 2 + 3, abs=0.5)


def test_tokens_go_back_to_their_places():
    given_ = tokens(2, 3, 5, 7)
    wide, sent = given_.spread()
    assert wide.shape == (2, 7, 5) and (sent.sum(1) == 3).all()
    for row in range(2):
        assert np.array_equal(wide[row, given_.index[row]], given_.tokens[row])
    assert not wide[~sent].any()


def test_samples_of_another_length_or_too_long_to_spread_are_refused():
    content = uplink.pack(tokens(), WHO)
    assert uplink.read(content, WHO, length=49).length == 49
    with pytest.raises(DeltaError, match="of 49 tokens, and not 50"):
        uplink.read(content, WHO, length=50)
    with pytest.raises(DeltaError, match="spread out"):  # a few bytes for some gigabytes
        uplink.pack(replace(tokens(300, 1, 16), length=1 << 16), WHO)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1.0, 6e4])
def test_features_of_any_size_stay_numbers(scale):
    given_ = replace(tokens(), tokens=tokens().tokens * np.float32(scale))
    found = uplink.read(uplink.pack(given_, WHO), WHO).tokens
    size = np.abs(given_.tokens).max(-1, keepdims=True)
    assert (np.abs(found - given_.tokens) <= size / 100 + 1e-7).all()


@pytest.mark.parametrize("name", WHO)
def test_tokens_of_another_model_are_refused_by_name(name):
    content = uplink.pack(tokens(), {**WHO, name: "b" * 64})
    with pytest.raises(DeltaError, match=f"another {name}"):
        uplink.read(content, WHO)
    with pytest.raises(DeltaError, match=f"another {name}"):
        uplink.read(content, {n: v for n, v in WHO.items() if n != name})


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("outside of 49", lambda t: replace(t, index=t.index + 46)),
        ("outside of 49", lambda t: replace(t, index=t.index - 49)),
        ("twice", lambda t: replace(t, index=t.index * 0)),
        ("not of the same", lambda t: replace(t, index=t.index[:, :2])),
        ("one score", lambda t: replace(t, score=t.score[:2])),
        ("no number", lambda t: replace(t, tokens=t.tokens * np.inf)),
        ("no number", lambda t: replace(t, score=t.score * np.nan)),
        ("no integers", lambda t: replace(t, beside={"x": np.ones(3)})),
    ],
)
def test_what_makes_no_payload_is_refused(word, change):
    with np.errstate(invalid="ignore"), pytest.raises(DeltaError, match=word) as refused:
        uplink.pack(change(tokens()), WHO)
    assert refused.value.hint


def test_a_payload_of_nobody_is_refused():
    for who in ({}, {"form": "x"}):
        with pytest.raises(DeltaError, match="whose tokens"):
            uplink.pack(tokens(), who)


def arrays(**changed):
    made = {
        "index": np.arange(4, dtype="u1")[None], "score": np.ones(1, "f2"),
        "tokens": np.ones((1, 4, 2), "i1"), "scale": np.ones((1, 4), "f2"),
    }  # fmt: skip
    return {k: v for k, v in {**made, **changed}.items() if v is not None}


TOLD = {"form": uplink.FORM, "length": "49", **WHO}


def payload(held, told):
    """A payload whose bytes are those that it says."""
    return save(held, metadata={**told, "data": uplink._data_digest(save(held))})


@pytest.mark.parametrize(
    ("word", "content"),
    [
        ("is not read", b""),
        ("longer than it may be", struct.pack("<Q", 1 << 60) + b"{}"),
        ("cannot be read", struct.pack("<Q", 2) + b"{,"),
        ("what it is", struct.pack("<Q", 2) + b"[]"),
        ("no payload", payload(arrays(), {**TOLD, "form": "effc uplink 9"})),
        ("harmed", payload(arrays(), {**TOLD, "length": "many"})),
        ("outside", payload(arrays(), {**TOLD, "length": "3"})),
        ("harmed", payload(arrays(scale=None), TOLD)),
        ("harmed", payload(arrays(tokens=np.ones((1, 4, 2), "f4")), TOLD)),
        ("harmed", payload(arrays(scale=np.ones((1, 3), "f2")), TOLD)),
        ("no number", payload(arrays(scale=np.full((1, 4), np.nan, "f2")), TOLD)),
        ("not those that were packed", save(arrays(), metadata={**TOLD, "data": "0" * 64})),
        ("no integers", payload(arrays(**{"index": np.full((1, 4), 0.5, "f4")}), TOLD)),
    ],
)  # fmt: skip
def test_what_is_no_payload_is_refused_with_the_reason(word, content):
    with pytest.raises(DeltaError, match=word) as refused:
        uplink.read(content, WHO)
    assert refused.value.hint


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_a_harmed_payload_is_refused_or_has_numbers_in_their_places(place, value, cut):
    packed = uplink.pack(tokens(), WHO)
    content = bytearray(packed)
    place %= len(content)
    content[place] = value
    try:
        found = uplink.read(bytes(content[:place] if cut else content), WHO)
    except DeltaError:
        return
    (size,) = struct.unpack_from("<Q", packed)
    assert not cut and (place < 8 + size or content == packed)  # what is harmed in the data is seen
    assert np.isfinite(found.tokens).all() and found.index.max() < found.length
    found.spread()


def test_the_share_of_samples_above_a_threshold_is_what_it_says_on_average():
    draw = np.random.default_rng(0)
    above = []
    for _ in range(2000):
        made = uplink.calibrate(draw.normal(size=39), 0.1, score="doubt", engine="a")
        above.append(made.takes(draw.normal(size=20)).mean())
    assert np.mean(above) == pytest.approx(0.1, abs=4 * np.std(above) / len(above) ** 0.5)
    assert not made.takes(np.array([np.nan]))[0]


@pytest.mark.parametrize(
    ("word", "scores", "share"),
    [
        ("do not tell", np.arange(8.0), 0.1),
        ("no share", np.arange(8.0), 1.0),
        ("no number", np.array([1.0, np.nan] * 9), 0.1),
    ],
)
def test_a_threshold_that_scores_do_not_tell_is_refused(word, scores, share):
    with pytest.raises(DeltaError, match=word) as refused:
        uplink.calibrate(scores, share, score="doubt", engine="a")
    assert refused.value.hint
    uplink.calibrate(np.arange(9.0), 0.1, score="doubt", engine="a")  # as many as it asks for


def test_a_threshold_is_a_file_that_knows_its_engine_and_its_harm(tmp_path):
    file = tmp_path / "threshold.json"
    made = uplink.calibrate(np.arange(99.0), 0.1, score="doubt", engine="a" * 64)
    assert made.value == 89
    uplink.write_threshold(made, file)
    assert uplink.read_threshold(file, engine="a" * 64) == made
    with pytest.raises(DeltaError, match="serves"):
        uplink.read_threshold(file, engine="b" * 64)
    text = file.read_text()
    for bad in (text.replace("89", "88"), text[:-9], "[]", json.dumps({"schema": 1})):
        file.write_text(bad)
        with pytest.raises(DeltaError, match="no whole threshold"):
            uplink.read_threshold(file, engine="a" * 64)
    with pytest.raises(DeltaError):
        uplink.read_threshold(tmp_path / "none", engine="a")


def queue(tmp_path, **limits):
    made = Queue(tmp_path / "up", clock=Clock())
    if limits:
        made.opt_in(Limits(**limits))
    return made


def lost(content):
    raise ConnectionError("no line")


def test_nothing_is_kept_before_its_owner_allows_it_and_nothing_stays_behind(tmp_path):
    up = queue(tmp_path)
    assert not up.put(b"x") and not up.send(lost) and not up.place.exists()
    up.opt_out()
    up.opt_in()
    assert up.put(b"x") and len(up.waiting()) == 1
    up.opt_out()
    assert not up.waiting() and not up.put(b"x") and up.send(lost) == 0


def test_permission_that_is_harmed_is_none(tmp_path):
    up = queue(tmp_path, days=1.0)
    file = up.place / uplink.SETTINGS
    file.write_text(file.read_text().replace('"days": 1.0', '"days": 9.0'))
    assert up.limits() is None and not up.put(b"x")


def test_it_waits_for_a_line_and_is_sent_once_in_order(tmp_path):
    up, got = queue(tmp_path, days=1.0), []
    for part in (b"one", b"two", b"three"):
        assert up.put(part)
    assert up.send(lost) == 0 and len(up.waiting()) == 3

    def breaks(content):
        if len(got) == 1:
            raise TimeoutError
        got.append(content)

    assert up.send(breaks) == 1 and got == [b"one"]
    assert Queue(up.place, clock=up.clock).send(got.append) == 2  # also by the next process
    assert got == [b"one", b"two", b"three"] and up.send(got.append) == 0


def test_a_day_has_its_bytes_and_the_next_day_more(tmp_path):
    up, got = queue(tmp_path, bytes_a_day=10), []
    for _ in range(3):
        up.put(bytes(4))
    assert up.send(got.append) == 2 and up.send(got.append) == 0
    up.clock.now -= 2 * uplink.DAY_S  # a clock that goes back gives no more
    assert up.send(got.append) == 0
    up.clock.now += 3 * uplink.DAY_S
    assert up.send(got.append) == 1


def test_a_clock_that_was_far_ahead_does_not_stop_it_for_good(tmp_path):
    up, got = queue(tmp_path, bytes_a_day=10), []
    up.clock.now += 80 * 365 * uplink.DAY_S
    up.put(bytes(10))
    assert up.send(got.append) == 1
    up.clock.now -= 80 * 365 * uplink.DAY_S
    up.put(bytes(10))
    assert up.send(got.append) == 1


def test_a_line_that_is_slow_keeps_nobody_from_adding(tmp_path):
    up, got = queue(tmp_path, days=1.0), []
    up.put(b"one")

    def slow(content):
        got.append(content)
        if len(got) == 1:
            assert up.put(b"two")
            with pytest.raises(DeltaError, match="another process"):
                up.send(got.append)  # but nobody sends the same twice

    assert up.send(slow) == 2 and got == [b"one", b"two"]


def test_a_line_that_breaks_costs_its_bytes_too(tmp_path):
    up = queue(tmp_path, bytes_a_day=10)
    up.put(bytes(4))
    assert [up.send(lost) for _ in range(3)] == [0, 0, 0]
    assert up.send(lambda content: pytest.fail("the day is over")) == 0


def test_the_oldest_make_room_and_what_waited_too_long_goes(tmp_path):
    up, got = queue(tmp_path, bytes_waiting=10, days=2.0), []
    for number in range(4):
        assert up.put(bytes([number] * 4))
    assert [file.read_bytes()[0] for file in up.waiting()] == [2, 3]
    assert not up.put(bytes(11))
    up.clock.now += 1.5 * uplink.DAY_S
    up.put(b"new")
    up.clock.now += uplink.DAY_S
    assert up.send(got.append) == 1 and got == [b"new"] and not up.waiting()


def test_what_a_kill_left_half_written_is_no_payload(tmp_path):
    up, got = queue(tmp_path, days=1.0), []
    (up.place / f".000-1{uplink.SUFFIX}.part").write_bytes(b"half")
    up.put(b"whole")
    assert up.send(got.append) == 1 and got == [b"whole"]
    assert not list(up.place.glob(".*.part"))


def test_limits_that_are_none_are_refused(tmp_path):
    for limits in ({"days": 0.0}, {"bytes_a_day": -1}, {"days": float("nan")}):
        with pytest.raises(DeltaError) as refused:
            queue(tmp_path, **limits)
        assert refused.value.hint


def test_a_disk_that_refuses_is_an_error_with_a_next_step(tmp_path, monkeypatch):
    up = queue(tmp_path, days=1.0)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeltaError, match="No space") as refused:
        up.put(b"x")
    assert refused.value.hint and not up.waiting() and not list(up.place.glob(".*.part"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DeltaError, match="cannot be made"):
        Queue(tmp_path / "file" / "up").opt_in()


def test_it_needs_no_torch():
    code = "import sys, effc.delta.uplink; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
