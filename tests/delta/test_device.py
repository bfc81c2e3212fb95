"""Whatever comes, a store starts, and serves the old package or the new one whole."""

import errno
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from packages import weights, write

from effc.delta import codec, device, make, packet
from effc.errors import DeltaError
from kit import content

X = np.random.default_rng(0).normal(size=(2, 64)).astype("f4")


def serving(store):
    return device.start(store)[1]


def test_a_release_is_pending_then_proves_itself(world):
    store, up = world.store(), world.delta()
    before = device.record_of(store)
    assert device.apply(store, up).pending
    live = device.Live(store)
    for _ in range(device.PROOFS):
        assert device.record_of(store).pending
        live({"x": X})
    record = device.record_of(store)
    assert (record.slot, record.counter, record.pending, record.other) == ("b", 1, False, before.id)


def test_a_release_that_never_proves_itself_gives_way(world):
    store = world.store()
    before = serving(store).id
    device.apply(store, world.delta())
    for left in reversed(range(device.TRIES)):
        record = serving(store)
        assert (record.pending, record.tries) == (True, left)
    record = serving(store)
    assert (record.id, record.pending, record.slot) == (before, False, "a")
    with pytest.raises(DeltaError, match="not above"):
        device.apply(store, world.delta())


def test_rollback_is_allowed_here_and_no_older_release_from_afar(world):
    store = world.store()
    first, second = world.delta(counter=5), world.delta(counter=4, name="older")
    device.apply(store, first)
    assert device.rollback(store).slot == "a"
    for file in (first, second):
        with pytest.raises(DeltaError, match="not above 5"):
            device.apply(store, file)
    device.apply(store, world.delta(counter=6))
    assert serving(store).counter == 6


def test_a_release_twice_is_once(world):
    store, up = world.store(), world.delta()
    record = device.apply(store, up)
    assert device.apply(store, up) == record


def test_nothing_is_taken_on_top_of_what_is_not_proved(world):
    store = world.store()
    device.apply(store, world.delta())
    with pytest.raises(DeltaError, match="not proved itself"):
        device.apply(store, world.delta(world.new, world.old, 2))


def test_a_star_of_deltas_from_one_package_goes_by_way_of_that_package(world):
    """It stays in the other slot, so that as many numbers may follow as there are."""
    store = world.store()
    device.apply(store, world.delta(counter=1))
    device.confirm(store)
    for counter in (2, 3):
        new = write(world.place / str(counter), weights(counter, 0.01), source=str(counter))
        up = world.delta(world.old, new, counter)
        before = device.record_of(store)
        with pytest.raises(DeltaError, match="is for package") as refused:
            device.apply(store, up)
        assert "effc delta rollback first" in refused.value.hint
        assert device.record_of(store) == before
        device.rollback(store)
        device.apply(store, up)
        device.confirm(store)
        assert serving(store).counter == counter
        assert device.status(store)["slots"] == {"a": "whole", "b": "whole"}


def test_the_wrong_base_key_or_kind_of_file_is_refused_and_nothing_changes(world):
    store = world.store()
    other = write(world.place / "c", weights(2, 0.02))
    packet.keygen(world.place / "k2", world.place / "k2.pub")
    good = world.delta().read_bytes()
    cases = {
        "is for package": world.delta(other, world.new, 3).read_bytes(),
        "is no delta": b"PK\3\4" + bytes(99),
        "none of the trusted keys": good[:-1] + bytes([good[-1] ^ 1]),
    }
    before = content(store)
    for word, file in cases.items():
        (world.place / "bad").write_bytes(file)
        with pytest.raises(DeltaError, match=word):
            device.apply(store, world.place / "bad")
    assert {k: v for k, v in content(store).items() if k != ".lock"} == before


BOMB = codec.packed(bytes(1 << 26))


def text(name):
    return packet.Text(name=name, length=0, payload=b"")


def moved(entry, to):
    return to(entry, tensor=to(entry.tensor, offset=10**9))


def fed(vector, to, dtype, count):
    return to(vector, inputs=(("x", dtype, (count,)),), payload=BOMB)


def signed(world, change, counter=1):
    """A delta that its maker spoiled and signed all the same."""
    from dataclasses import replace

    found = packet.parsed(world.delta().read_bytes())
    spoiled = change(replace(found, counter=counter), replace)
    (world.place / "bad").write_bytes(packet.written(spoiled, packet.private_key(world.key)))
    return world.place / "bad"


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("another graph", lambda p, to: to(p, graph="0" * 64)),
        ("no test for", lambda p, to: to(p, vectors=())),
        ("no file of the package", lambda p, to: to(p, texts=(*p.texts, text("../../CURRENT")))),
        ("no file of the package", lambda p, to: to(p, texts=(*p.texts, text("/etc/passwd")))),
        ("of another package|differs", lambda p, to: to(p, target="0" * 64)),
        ("another graph|differs", lambda p, to: to(p, entries=p.entries[1:])),
        ("lies outside", lambda p, to: to(p, entries=(moved(p.entries[0], to),))),
        ("lies outside", lambda p, to: to(p, entries=(p.entries[0], *p.entries))),
        ("patched and replaced", lambda p, to: to(p, texts=(*p.texts, text("model.onnx")))),
        ("more than 64 MiB", lambda p, to: to(p, vectors=(fed(p.vectors[0], to, "f4", 1 << 40),))),
        ("no numbers", lambda p, to: to(p, vectors=(fed(p.vectors[0], to, "O", 2),))),
        ("no numbers", lambda p, to: to(p, vectors=(fed(p.vectors[0], to, "what", 2),))),
        ("unpacks to more", lambda p, to: to(p, entries=tuple(to(e, payload=BOMB) for e in p.entries))),
    ],
)  # fmt: skip
def test_a_spoilt_release_is_refused_also_when_it_is_signed(world, word, change):
    store = world.store()
    before = serving(store)
    with pytest.raises(DeltaError, match=word) as refused:
        device.apply(store, signed(world, change))
    assert refused.value.hint
    after, record = device.start(store)
    assert record.id == before.id and device.problems(after, before.id) == []


def test_an_engine_that_answers_otherwise_than_its_maker_saw_is_not_served(world):
    store = world.store()

    def wrong(found, to):
        vector = found.vectors[0]
        size = sum(np.dtype(d).itemsize * int(np.prod(s)) for _, d, s in vector.inputs)
        inside = bytearray(codec.unpacked(vector.payload, 1 << 20, name="v"))
        inside[size:] = (np.frombuffer(bytes(inside[size:]), "<f4") * 1.1).tobytes()
        return to(found, vectors=(to(vector, payload=codec.packed(bytes(inside))),))

    with pytest.raises(DeltaError, match="is off by"):
        device.apply(store, signed(world, wrong))
    assert serving(store).counter == 0


@pytest.mark.parametrize("name", device.RECORDS)
@pytest.mark.parametrize("spoil", [b"", b"{}", None])
def test_one_copy_of_the_record_is_enough(world, name, spoil):
    store = world.store()
    device.apply(store, world.delta())
    wanted = device.record_of(store)
    (store / name).write_bytes((store / name).read_bytes()[:40] if spoil is None else spoil)
    assert device.record_of(store) == wanted
    _, healed = device.start(store)
    assert {device._record(store, n) for n in device.RECORDS} == {healed}


def test_a_harmed_slot_gives_way_to_the_other(world):
    store = world.store()
    before = serving(store).id
    device.apply(store, world.delta())
    device.confirm(store)
    file = store / "slots" / "b" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert device.status(store)["slots"]["b"] == "model.onnx differs from its sha256"
    assert serving(store).id == before
    with pytest.raises(DeltaError, match="nothing to go back to"):
        device.rollback(store)


def test_a_full_disk_costs_the_update_and_nothing_else(world, monkeypatch):
    store = world.store()
    before = serving(store)

    with monkeypatch.context() as patched:
        patched.setattr(device.shutil, "copyfile", no_room)
        with pytest.raises(DeltaError, match="No space") as refused:
            device.apply(store, world.delta())
    assert "disk" in refused.value.hint
    assert serving(store).id == before.id
    assert device.apply(store, world.delta()).counter == 1


def test_a_release_of_what_serves_already_changes_its_number_and_nothing_else(world):
    store = world.store()
    before = serving(store)
    made = make.make(world.old, world.old, key=world.key, counter=4)
    (world.place / "same.effd").write_bytes(made.content)
    record = device.apply(store, world.place / "same.effd")
    assert (record.slot, record.id, record.pending) == (before.slot, before.id, False)
    assert (record.counter, record.highest) == (4, 4) and serving(store) == record
    with pytest.raises(DeltaError, match="not above 4"):
        device.apply(store, world.delta(counter=3))
    assert device.apply(store, world.delta(counter=5)).pending


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_release_that_gave_way_does_not_come_back_as_one_that_is_proved(world):
    store = world.store()
    before = serving(store).id
    device.apply(store, world.delta())
    record = device.rollback(store)
    assert (record.id, record.other) == (before, "")
    with pytest.raises(DeltaError, match="nothing to go back to"):
        device.rollback(store)
    device.apply(store, world.delta(counter=2))
    device.confirm(store)
    assert device.rollback(store).other  # one that was proved does
    assert device.rollback(store).counter == 2


def test_on_a_full_disk_a_release_that_is_not_proved_gives_way_at_once(world, monkeypatch):
    store = world.store()
    before = serving(store).id
    device.apply(store, world.delta())
    with monkeypatch.context() as patched:
        patched.setattr(device.whole, "write", no_room)
        for _ in range(2 * device.TRIES):
            assert serving(store).id == before
    assert serving(store).pending  # with room again it is tried, and its starts are counted


def test_on_a_full_disk_a_release_that_does_not_open_gives_way(world, monkeypatch):
    store = world.store()
    wanted = device.Live(store)({"x": X})["y"]
    device.apply(store, world.delta())
    whole = device.session

    def opened(root, engine):
        if root.name == "b":
            raise DeltaError("it does not open", hint="")
        return whole(root, engine)

    monkeypatch.setattr(device, "session", opened)
    monkeypatch.setattr(device.whole, "write", no_room)
    # the countdown is written before the disk is full
    monkeypatch.setattr(
        device, "start", lambda store: (store / "slots" / "b", device.record_of(store))
    )
    assert np.array_equal(device.Live(store)({"x": X})["y"], wanted)


def test_answers_that_are_no_numbers_prove_nothing(world):
    store = world.store()
    device.apply(store, world.delta())
    live = device.Live(store)
    for _ in range(2 * device.PROOFS):
        assert np.isnan(live({"x": np.full_like(X, np.nan)})["y"]).any()
    assert device.record_of(store).pending


def test_it_serves_while_a_release_is_taken(world):
    store = world.store()
    live = device.Live(store)
    old, up = live({"x": X})["y"], world.delta()
    answers, failed, stop = [], [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                found = live({"x": X})["y"]
            except Exception as error:
                failed.append(error)
            else:
                answers.append((time.perf_counter(), found))

    thread = threading.Thread(target=ask)
    thread.start()
    began = time.perf_counter()
    live.update(up)
    took = time.perf_counter() - began
    new = live({"x": X})["y"]
    stop.set()
    thread.join()
    assert failed == [] and not np.array_equal(old, new)
    assert all(np.array_equal(y, old) or np.array_equal(y, new) for _, y in answers)
    ends = [began, *(at for at, _ in answers if began < at < began + took), began + took]
    assert np.diff(ends).max() < took / 2  # nothing waits for the release


def test_a_store_is_made_of_a_whole_package_in_an_empty_place(world):
    store = world.store()
    with pytest.raises(DeltaError, match="not empty"):
        device.init(store, world.old, [world.word])
    (world.old / "decisions.json").write_text("{} ")
    with pytest.raises(DeltaError, match="not whole"):
        device.init(world.place / "s2", world.old, [world.word])
    with pytest.raises(DeltaError, match="no store"):
        device.start(world.place / "nowhere")


def test_the_device_needs_no_torch_and_nothing_that_makes_engines(world):
    store = world.store()
    code = (
        "import sys, json; from pathlib import Path; from effc.delta import device;"
        f"device.apply(Path({str(store)!r}), Path({str(world.delta())!r}));"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(ran.stdout))
    assert {"numpy", "onnxruntime", "zstandard", "cryptography"} <= loaded
    assert not loaded & {"torch", "onnx", "onnx_ir", "pydantic", "scipy", "transformers", "yaml"}


def test_what_is_not_installed_is_named(tmp_path):
    code = "import sys; sys.modules['zstandard'] = None; from effc.cli import main; main()"
    words = [sys.executable, "-c", code, "delta", "status", str(tmp_path)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 14 and "need zstandard" in ran.stderr
    assert "effc[delta]" in ran.stderr and "Traceback" not in ran.stderr


def test_an_engine_is_opened_with_the_settings_of_its_manifest(world):
    """What the manifest says, and not what is usual, is what the runtime is told."""
    told = {}
    for name, options in (("a", {}), ("b", {"hint": "throughput", "products": "int8"})):
        root = write(world.place / name, weights(), target="openvino", options=options)
        compiled = device.session(root, device.manifest_of(root)["engines"][0]).compiled
        asked = ("PERFORMANCE_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        told[name] = [str(compiled.get_property(p)) for p in asked]
    assert told["a"][0].endswith("LATENCY")
    assert told["b"][0].endswith("THROUGHPUT") and told["b"][1] == "32"


def test_settings_that_this_machine_cannot_take_are_refused_with_what_to_do(world, monkeypatch):
    from effc.backends import openvino_engine

    monkeypatch.setattr(openvino_engine, "BF16", ())
    root = write(world.place / "bf16", weights(), target="openvino", options={"precision": "bf16"})
    with pytest.raises(DeltaError, match="bfloat16") as refused:
        device.session(root, device.manifest_of(root)["engines"][0])
    assert "processor" in refused.value.hint


def test_a_start_while_the_record_is_changed_does_not_change_it_back(world, monkeypatch):
    """A device starts while another process confirms: what that wrote stands."""
    store = world.store()
    device.apply(store, world.delta())
    look = device.problems

    def slow(*place):
        monkeypatch.setattr(device, "problems", look)
        device.confirm(store)
        return look(*place)

    monkeypatch.setattr(device, "problems", slow)
    assert device.start(store)[0] == store / "slots" / "b"
    assert not device.record_of(store).pending
