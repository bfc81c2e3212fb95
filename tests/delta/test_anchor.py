"""An anchor brings any device of its graph back to one package, whatever it holds, and no other device."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from lines import served
from packages import weights, write

from effc.delta import channel, codec, device, make, packet, serve
from effc.errors import DeltaError
from kit import assert_letter, cli, content


def anchored(world, counter=2, name="anchor.effd", old=None, new=None):
    made = make.make(
        old or world.old, new or world.new, key=world.key, counter=counter, anchor=True
    )
    (world.place / name).write_bytes(made.content)
    return world.place / name


def off(world, **how):
    """A store whose package no delta of the chain was made for."""
    lost = write(world.place / "lost", weights(7, 0.3), source="lost", **how)
    device.init(world.place / "off", lost, [world.word])
    return world.place / "off"


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_a_device_off_the_chain_comes_back_and_takes_deltas_again(world, external, target):
    how = {"external": external, "target": target}
    old = write(world.place / "a", weights(), **how)
    new = write(world.place / "b", weights(1, 0.01), source="1", **how)
    last = write(world.place / "c", weights(2, 0.01), source="22", **how)
    store, on = off(world, **how), world.place / "on"
    device.init(on, old, [world.word])
    with pytest.raises(DeltaError, match="is for package") as refused:
        device.apply(store, world.delta(old, new, 1))
    assert "anchor" in refused.value.hint
    device.apply(on, world.delta(old, new, 1))
    device.confirm(on)
    device.apply(store, anchored(world, 2, old=old, new=new))
    device.confirm(store)
    assert content(store / "slots" / "b") == content(on / "slots" / "b")  # as those on the chain
    for each in (store, on):
        device.apply(each, world.delta(new, last, 3))
    assert content(store / "slots" / "a") == content(on / "slots" / "a")


def test_an_anchor_holds_bytes_alone_and_needs_no_change(world):
    made = make.make(world.old, world.old, key=world.key, counter=1, anchor=True)
    assert {e.encoding for e in made.packet.entries} == {"bytes"}
    assert len(made.packet.entries) == len(weights())
    assert {t.name for t in made.packet.texts} == {
        "decisions.json",
        "origins.json",
        device.MANIFEST,
    }
    assert made.packet.is_anchor and made.packet.vectors and made.numbers["base"] == packet.ANCHOR
    assert packet.parsed(made.content) == made.packet


@pytest.mark.parametrize("spare", ["empty", "harmed"])
def test_a_device_without_a_whole_package_is_healed_by_an_anchor_alone(world, spare):
    store = world.store()
    if spare == "harmed":
        device.apply(store, world.delta(counter=1))
        device.confirm(store)
        _harm(store / "slots" / "a")
    slot = store / "slots" / device.record_of(store).slot
    _harm(slot)
    with pytest.raises(DeltaError, match="nothing to go back to"):
        device.start(store)
    up = world.delta(*((world.new, world.old) if spare == "harmed" else ()), counter=2)
    with pytest.raises(DeltaError, match="serves is harmed") as refused:
        device.apply(store, up)
    assert "anchor" in refused.value.hint
    record = device.apply(store, anchored(world, 3))
    assert (record.pending, record.other) == (
        False,
        "",
    )  # there is nothing that it could give way to
    assert device.Live(store)({"x": np.ones((1, 64), "f4")})["y"].shape == (1, 8)
    assert device.start(store)[1] == record


def _harm(slot, where=None):
    """Flip a bit of a weight, or of the graph."""
    file = slot / "model.onnx"
    raw = bytearray(file.read_bytes())
    known = weights()["second"].tobytes()[:8]
    at = raw.find(b"Gemm") if where == "graph" else max(raw.find(known), 0) or 2 * len(raw) // 3
    raw[at] ^= 1
    file.write_bytes(raw)


def lost(world, *, confirmed):
    """A store that took release 1 and then lost both of its packages."""
    store = world.store()
    device.apply(store, world.delta(counter=1))
    if confirmed:
        device.confirm(store)
    for slot in device.SLOTS:
        _harm(store / "slots" / slot)
    return store


@pytest.mark.parametrize("counter", [1, 2])
@pytest.mark.parametrize("confirmed", [True, False])
def test_what_was_lost_comes_back_by_an_anchor_of_its_own_number_too(world, counter, confirmed):
    """Also where the release that was lost had not proved itself: there is nothing left to prove it against."""
    store = lost(world, confirmed=confirmed)
    with pytest.raises(DeltaError, match="nothing to go back to") as told:
        device.start(store)
    assert "take an anchor" in told.value.hint
    record = device.apply(store, anchored(world, counter))
    assert (record.counter, record.highest, record.pending) == (counter, counter, False)
    assert device.start(store)[1] == record


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_device_that_is_up_to_date_and_lost_pulls_the_anchor_of_its_number(world, confirmed):
    store, releases = lost(world, confirmed=confirmed), world.place / "releases"
    releases.mkdir()
    shutil.move(anchored(world, 1), releases)
    with served(releases) as url:
        assert channel.pull(url, store).counter == 1
        assert device.start(store)[1].counter == 1
        assert channel.pull(url, store) is None


def test_what_is_lost_comes_back_by_no_older_release_and_by_no_other_of_its_number(world):
    store = world.store()
    device.apply(store, world.delta(counter=3))
    device.rollback(store)
    _harm(store / "slots" / "a")
    up = {
        "older": anchored(world, 2, "older", new=world.old),
        "other": anchored(world, 3, "other", new=world.new),  # which was taken back here
    }
    for file in up.values():
        with pytest.raises(DeltaError, match="not above 3") as refused:
            device.apply(store, file)
        assert "an anchor above 3" in refused.value.hint
    assert device.apply(store, anchored(world, 3, new=world.old)).counter == 3


def test_what_is_harmed_and_not_lost_goes_back_before_anything_is_taken(world):
    """An anchor of the number that serves is not taken for being here already."""
    store = world.store()
    device.apply(store, world.delta(counter=1))
    _harm(store / "slots" / "b")
    for file in (anchored(world, 1), world.delta(counter=1)):
        with pytest.raises(DeltaError, match="serves is harmed") as refused:
            device.apply(store, file)
        assert "rollback" in refused.value.hint
    assert device.start(store)[1].slot == "a"


def test_what_is_whole_is_never_given_up_for_an_anchor(world):
    """Where the slot that serves is harmed and the other one is not, the way back is the other one."""
    store = world.store()
    device.apply(store, world.delta(counter=1))
    device.confirm(store)
    _harm(store / "slots" / "b")
    with pytest.raises(DeltaError, match="serves is harmed") as refused:
        device.apply(store, anchored(world, 2))
    assert "rollback" in refused.value.hint
    assert device.start(store)[1].slot == "a"
    assert device.apply(store, anchored(world, 2)).pending


def test_a_harmed_graph_is_no_graph_of_the_anchor(world):
    store = world.store()
    _harm(store / "slots" / "a", "graph")
    with pytest.raises(DeltaError, match="another graph"):
        device.apply(store, anchored(world))


def test_another_graph_is_refused_on_both_sides(world):
    tensors = weights(1, 0.01, sizes=(64, 80, 8))
    other = write(world.place / "other", tensors)
    with pytest.raises(DeltaError, match="another graph"):
        make.make(world.old, other, key=world.key, counter=1, anchor=True)
    device.init(world.place / "s", other, [world.word])
    before = device.record_of(world.place / "s").id
    with pytest.raises(DeltaError):
        device.apply(world.place / "s", anchored(world))
    assert device.start(world.place / "s")[1].id == before


def first(found, **change):
    return replace(found, entries=(replace(found.entries[0], **change), *found.entries[1:]))


@pytest.mark.parametrize(
    ("word", "spoil"),
    [
        ("difference to a base", lambda p, _: first(p, encoding="ints")),
        ("difference to a base", lambda p, _: first(p, encoding="topk", payload=codec.packed(b""))),
        ("another graph", lambda p, _: replace(p, entries=p.entries[1:])),
        ("has a payload", lambda p, _: first(p, payload=codec.packed(b"short"))),
        ("not above 2", lambda p, _: replace(p, counter=2)),
        ("no test for", lambda p, _: replace(p, vectors=())),
        ("of another package", lambda p, _: replace(p, target="0" * 64)),
        ("no sha256", lambda p, _: replace(p, base="Anchor")),
    ],
)
def test_a_spoilt_anchor_is_refused_also_when_it_is_signed(world, word, spoil):
    store = world.store()
    device.apply(store, world.delta(counter=2))
    device.confirm(store)
    before = device.start(store)[1].id
    found = packet.parsed(anchored(world, 3, new=world.old).read_bytes())
    content = packet.written(spoil(found, world), packet.private_key(world.key))
    (world.place / "bad").write_bytes(content)
    with pytest.raises(DeltaError, match=word) as refused:
        device.apply(store, world.place / "bad")
    assert refused.value.hint and device.start(store)[1].id == before


def test_an_anchor_is_signed_as_every_release_is(world):
    store, up = off(world), anchored(world)
    raw = bytearray(up.read_bytes())
    raw[-100] ^= 1
    up.write_bytes(raw)
    with pytest.raises(DeltaError, match="none of the trusted keys"):
        device.apply(store, up)


def test_a_text_of_an_anchor_does_not_lean_on_the_base(world):
    """It is unpacked without a dictionary, so what was packed with one is harmed."""
    store, found = off(world), packet.parsed(anchored(world).read_bytes())
    known = (store / "slots" / "a" / device.MANIFEST).read_bytes()
    *others, whole = found.texts
    content = codec.unpacked(whole.payload, whole.length, name=whole.name)
    leaning = make._text(whole.name, known, content)
    assert len(leaning.payload) < len(whole.payload)
    spoilt = replace(found, texts=(*others, leaning))
    (world.place / "bad").write_bytes(packet.written(spoilt, packet.private_key(world.key)))
    with pytest.raises(DeltaError, match=r"manifest\.json"):
        device.apply(store, world.place / "bad")


def test_a_directory_gives_the_delta_first_and_else_the_newest_anchor(world):
    releases = world.place / "releases"
    releases.mkdir()
    five, three, four = (
        file.rename(releases / file.name)
        for file in (
            world.delta(counter=5, name="five.effd"),
            anchored(world, 3, "three.effd"),
            anchored(world, 4, "four.effd"),
        )
    )
    old = packet.parsed(five.read_bytes()).base
    new = packet.parsed(four.read_bytes()).target
    assert packet.parsed(three.read_bytes()).target == new

    def given(base, above):
        file = serve.newest(releases, base, above)
        return file and file.stem

    assert given(old, 0) == "five"
    assert given("0" * 64, 0) == "four" and given("0" * 64, 3) == "four"
    assert given("0" * 64, 4) is None
    assert given(new, 0) is None  # it is there already
    assert given(packet.ANCHOR, 2) == "four"


@pytest.mark.parametrize("harmed", [False, True])
def test_a_device_that_no_delta_is_for_pulls_the_anchor(world, harmed):
    releases = world.place / "releases"
    releases.mkdir()
    store = world.store() if harmed else off(world)
    shutil.move(world.delta(counter=1, name="one.effd"), releases)
    if harmed:
        _harm(store / "slots" / "a")
    with served(releases) as url:
        assert channel.pull(url, store) is None
        shutil.move(anchored(world, 2), releases)
        assert channel.pull(url, store).counter == 2
        device.confirm(store)
        assert channel.pull(url, store) is None


def test_the_command_line_makes_an_anchor(world):
    words = ["delta", "make", world.old, world.new, "--key", world.key, "--release", 4, "--anchor"]
    ran = cli(*words, "-o", world.place / "up")
    assert ran.code == 0 and ran.out.startswith("anchor → "), ran.err
    seen = cli("delta", "inspect", world.place / "up", "--json", "-")
    assert json.loads(seen.out)["base"] == "anchor"
    store = off(world)
    assert cli("delta", "apply", store, world.place / "up").code == 0
    for more in (("--budget", "1MB"), ("--max-error", 0.1)):
        refused = cli(*words, *more, "-o", world.place / "no")
        assert_letter(refused, "DeltaError", 14, "leaves nothing out")
    assert not (world.place / "no").exists()
