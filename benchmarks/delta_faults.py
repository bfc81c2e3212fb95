"""Faults for the device's half of weight deltas: does a store serve the old package or the new one whole all the same?

    python benchmarks/delta_faults.py [--smoke] [--seed 0]      # minutes; writes benchmarks/results/delta_faults.json

One store goes through all kills: a process that takes a release, confirms it or goes back is sent SIGKILL after a time
drawn evenly from what the act takes undisturbed. A third as many hit a process that takes an anchor on a device of
whose slots neither is whole: it then serves nothing, and says so, or what the anchor has. Other faults are planted in
files that the device reads, in the disk that it writes to, and in releases that are signed all the same.

After each fault another process starts the store as a device does, holds every file of what serves against its sha256,
and runs it on fixed inputs: the fault is survived where the sha256 of the outputs is that of the old or of the new
package, and where a release that was spoilt was refused with a reason of its kind and a hint. What a killed process
wrote is in the cache of the system, so a loss of power is not shown; "torn files" comes nearest, where files that may
not have reached the disk are cut. Ends with 1 where a fault is not survived, and where a kind of moment was not hit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from effc.delta import codec, device, make, packet
from effc.delta.packet import Packet
from effc.delta.slot import graph_of
from effc.errors import DeltaError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

SIZES = 1024, 2048, 512
OUTSIDE = (
    "../../trust.json", "/etc/passwd", "a/../../../CURRENT", "..\\x", "./model.onnx", "model.onnx/", "", ".", "..",
    "model.onnx\0", "MANIFEST.JSON", "~/x", "//model.onnx", "a" * 4000,
)  # fmt: skip
KILLS, SMOKE = 300, 10
"""SIGKILLs of a full run, and what part of all faults a run in CI makes."""
NOTHING = "nothing to go back to"
"""What a store says of which neither slot is whole."""
MOST_GROWN_MB = 300
"""A release that takes more memory than that on top of what the process had is a bomb that went off."""
ASKED = np.random.default_rng(0).normal(size=(2, SIZES[0])).astype("f4")
FORK = multiprocessing.get_context("fork")


# processes: this one never opens an engine, so that its forks may


@dataclass(frozen=True, kw_only=True)
class End:
    """How an act ended: what it gave, or what and hint of its DeltaError."""

    value: Any = None
    what: str = ""
    hint: str = ""
    grown_mb: float = 0.0


def _act(pipe: Any, act: Callable[..., Any], words: tuple[Any, ...]) -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, not in the parent
    before = _peak_mb()
    try:
        end = End(value=act(*words))
    except DeltaError as error:
        end = End(what=str(error.what), hint=str(error.hint or ""))
    pipe.send(replace(end, grown_mb=_peak_mb() - before))


def _peak_mb() -> float:
    text = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", text)[0]) / 1e3


def begun(act: Callable[..., Any], *words: Any) -> tuple[Any, Any]:
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_act, args=(there, act, words))
    process.start()
    there.close()
    return process, here


def done(act: Callable[..., Any], *words: Any) -> End:
    """An act in a process of its own. Raises RuntimeError where it ends with anything but a value or a DeltaError."""
    process, pipe = begun(act, *words)
    try:
        found: End = pipe.recv()
    except EOFError:
        raise RuntimeError(f"{act.__name__} died") from None
    finally:
        process.join()
    return found


def outputs(root: Path) -> str:
    """sha256 of what the engine in a directory answers."""
    run = device.session(root, device.manifest_of(root)["engines"][0])
    return hashlib.sha256(run({"x": ASKED})["y"].tobytes()).hexdigest()


def served(store: Path) -> tuple[str, str, list[str], device.Record]:
    """What a device would serve: its id, the sha256 of its answers, what is broken in it, and the record."""
    root, record = device.start(store)
    return record.id, outputs(root), device.problems(root, record.id), record


# two packages, and the releases that lead from each to the other


@dataclass(kw_only=True)
class World:
    place: Path
    rng: random.Random
    key: Any
    word: str
    packages: tuple[Path, Path]
    ways: dict[str, Packet]
    """By the id of the base."""
    answers: dict[str, str]
    stranger: Packet
    anchor: Packet
    counter: int = 0
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def store(self, name: str, where: Path | None = None) -> Path:
        store = (where or self.place) / name
        shutil.rmtree(store, ignore_errors=True)
        device.init(store, self.packages[0], [self.word])
        return store

    def release(self, base: str) -> Packet:
        """The next release for who holds that package."""
        self.counter += 1
        return replace(self.ways[base], counter=self.counter)

    def anchored(self) -> Packet:
        """The next release, for whoever holds whatever."""
        self.counter += 1
        return replace(self.anchor, counter=self.counter)

    def file(self, content: bytes | Packet, name: str = "up.effd") -> Path:
        whole = content if isinstance(content, bytes) else packet.written(content, self.key)
        (self.place / name).write_bytes(whole)
        return self.place / name

    def check(
        self,
        kind: str,
        store: Path,
        end: End | None = None,
        reason: str = "",
        *,
        is_lost: bool = False,
    ) -> Any:
        """Count a fault, and what is left of the store after it; gives its record. `reason` is what must be said.

        A store that `is_lost` held nothing whole before: it may serve nothing on, where it says why.
        """
        after = done(served, store)
        broken = []
        if after.what and not (is_lost and NOTHING in after.what and after.hint):
            broken.append(f"does not start: {after.what}")
        elif not after.what:
            id_, answer, problems, _ = after.value
            if self.answers.get(id_) != answer or problems:
                broken.append(f"serves neither the old nor the new: {problems}")
        if reason:
            assert end is not None
            if not re.search(reason, end.what) or not end.hint:
                broken.append(f"said {end.what or 'nothing'!r} and not {reason!r}")
            self.reasons.setdefault(kind, Counter())[shape(end.what)] += 1
        counts = self.kinds.setdefault(kind, Counter())
        counts["injected"] += 1
        counts["survived"] += not broken
        self.failed += [f"{kind}: {word}" for word in broken]
        return after.value[3] if after.value else None


def shape(what: str) -> str:
    """A reason without the names, numbers and digests in it."""
    what = re.sub(r"[^\s:]*/[^\s:]+", "FILE", what)
    return re.sub(r"'[^']*'|\b[0-9a-f]{12}\b|\b\d[\d.e+-]*\b", "…", what)


def build(place: Path, seed: int) -> World:
    from packages import weights, write

    word = packet.keygen(place / "key", place / "key.pub")
    old = write(place / "old", weights(0, 0.0, SIZES))
    new = write(place / "new", weights(1, 0.01, SIZES), source="1")
    far = write(place / "far", weights(2, 0.02, SIZES), source="2")
    made = [
        make.make(a, b, key=place / "key", counter=1).packet
        for a, b in ((old, new), (new, old), (far, new))
    ]
    answers = {p.base: outputs(root) for p, root in zip(made[:2], (old, new), strict=True)}
    assert len(set(answers.values())) == 2
    made.append(make.make(old, new, key=place / "key", counter=1, anchor=True).packet)
    content = [packet.written(p, packet.private_key(place / "key")) for p in made]
    for name, each, text in zip("abcd", made, content, strict=True):
        (place / f"{name}.effd").write_bytes(text)
        assert each.base != each.target
    (place / "answers.json").write_text(json.dumps({"word": word, "answers": answers}))
    return world(place, seed)


def world(place: Path, seed: int) -> World:
    """What `build` left, read by a process that has opened no engine."""
    told = json.loads((place / "answers.json").read_text())
    a, b, c, d = (packet.parsed((place / f"{n}.effd").read_bytes()) for n in "abcd")
    return World(
        place=place, rng=random.Random(seed), key=packet.private_key(place / "key"), word=told["word"],
        packages=(place / "old", place / "new"), ways={a.base: a, b.base: b}, answers=told["answers"],
        stranger=c, anchor=d,
    )  # fmt: skip


# faults


def act_of(w: World, store: Path) -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
    """What a device would do next: take a release, or confirm the one it has, or go back."""
    record = device.record_of(store)
    if record.pending:
        word = w.rng.choice(("confirm", "rollback", "start"))
        if word == "confirm" or (word == "rollback" and record.other):
            return word, getattr(device, word), (store,)
        return "start", device.start, (store,)
    return "apply", device.apply, (store, w.file(w.release(record.id)))


def times(w: World, store: Path) -> dict[str, float]:
    """Seconds that each act takes, the median of five, with its process."""
    found: dict[str, list[float]] = {}
    while min(map(len, (found.get(n, []) for n in ("apply", "confirm", "rollback", "start")))) < 5:
        word, act, words = act_of(w, store)
        started = time.perf_counter()
        end = done(act, *words)
        found.setdefault(word, []).append(time.perf_counter() - started)
        assert not end.what, end.what
    return {word: statistics.median(seconds) for word, seconds in found.items()}


def kills(w: World, count: int, usual: dict[str, float]) -> dict[str, Counter[str]]:
    """SIGKILL at any moment of an act; where it was hit, by what was left."""
    store = w.store("killed")
    hit: dict[str, Counter[str]] = {}
    while sum(c.total() for c in hit.values()) < count:
        word, act, words = act_of(w, store)
        before = device.record_of(store)
        process, _ = begun(act, *words)
        time.sleep(w.rng.uniform(0, usual[word]))
        process.kill()
        process.join()
        if process.exitcode != -9:
            continue  # it was done before
        if word == "apply":
            where = moment(store, before)
        else:
            where = "before the record" if device.record_of(store) == before else "after the record"
        hit.setdefault(word, Counter())[where] += 1
        w.check(f"SIGKILL in {word}", store)
    end = done(device.apply, store, *act_until_apply(w, store))
    w.check("a release after all kills", store, end)
    if end.what:
        w.failed.append(f"after all kills: {end.what}")
    return hit


def moment(store: Path, before: device.Record) -> str:
    """How far an apply had come, by what is left of it."""
    after = device.record_of(store)
    if after.slot != before.slot:
        return "swapped"
    if after == before:
        return "before it wrote"
    filled = (store / "slots" / before.spare / device.MANIFEST).exists()
    return "slot filled" if filled else "slot empty or in part"


def act_until_apply(w: World, store: Path) -> tuple[Path]:
    if device.record_of(store).pending:
        done(device.confirm, store)
    return (w.file(w.release(device.record_of(store).id)),)


def torn(w: World, count: int, usual: dict[str, float]) -> None:
    """A kill, and then files that nobody had synced are cut, and one copy of the record."""
    store = w.store("torn")
    for _ in range(count):
        words = act_until_apply(w, store)
        filled = store / "slots" / device.record_of(store).spare
        process, _ = begun(device.apply, store, *words)
        time.sleep(w.rng.uniform(0, usual["apply"]))
        process.kill()
        process.join()
        files = [p for p in filled.rglob("*") if p.is_file()] + [*store.glob(".*.part")]
        harmed = [p for p in files if w.rng.random() < 0.7]
        for place in (*harmed, store / w.rng.choice(device.RECORDS)):
            os.truncate(place, w.rng.randrange(place.stat().st_size + 1))
        w.check("torn files", store)
    end = done(device.apply, store, *act_until_apply(w, store))
    w.check("a release after torn files", store, end)
    if end.what:
        w.failed.append(f"after torn files: {end.what}")


def _limited(store: Path, file: Path, most: int) -> Any:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return device.apply(store, file)


def limited_files(w: World, count: int) -> None:
    """Writes end where a file reaches a size."""
    store = w.store("limited")
    largest = (w.packages[0] / "model.onnx").stat().st_size
    for _ in range(count):
        file = w.file(w.release(device.record_of(store).id))
        end = done(_limited, store, file, w.rng.randrange(largest - 1))
        w.check("a file may not grow", store, end, "File too large")


@contextmanager
def small_disk(place: Path, most_bytes: int) -> Iterator[Path | None]:
    """A disk of that many bytes; None where this user may mount none."""
    place.mkdir(exist_ok=True)
    ran = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={most_bytes}", "none", str(place)],
        capture_output=True,
    )
    try:
        yield place if ran.returncode == 0 else None
    finally:
        if ran.returncode == 0:
            subprocess.run(["umount", "-l", str(place)], check=True)


def full_disk(w: World, count: int) -> bool:
    """A disk with room for less than the other slot."""
    size = sum(p.stat().st_size for p in w.packages[0].rglob("*") if p.is_file())
    with small_disk(w.place / "disk", 3 * size) as disk:
        if disk is None:
            return False
        store = w.store("store", disk)
        whole = os.statvfs(disk)
        for _ in range(count):
            spare = w.rng.randrange(size)
            free = os.statvfs(disk)
            with (disk / "ballast").open("wb") as ballast:
                ballast.write(bytes(max(0, free.f_bavail * free.f_frsize - spare)))
            file = w.file(w.release(device.record_of(store).id))
            end = done(device.apply, store, file)
            w.check("the disk is full", store, end, "No space left")
            (disk / "ballast").unlink()
        assert whole.f_bavail > 0
        end = done(device.apply, store, *act_until_apply(w, store))
        w.check("a release after a full disk", store, end)
        with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)):
                pass
        end = done(_asks, store)
        w.check("the disk is full at the proof", store, end)
        if end.what or not end.value:
            w.failed.append(f"a full disk at the proof: {end.what}")
    return True


def _asks(store: Path) -> bool:
    live = device.Live(store)
    return len({live({"x": ASKED})["y"].tobytes() for _ in range(device.PROOFS + 2)}) == 1


def spoilt_files(w: World, count: int) -> None:
    """Bits flipped in a release, and releases cut, put together otherwise, and of other kinds."""
    store = w.store("spoilt")
    base = device.record_of(store).id
    good = w.file(w.release(base)).read_bytes()
    for _ in range(count):
        place = w.rng.randrange(len(good))
        flipped = bytearray(good)
        flipped[place] ^= 1 << w.rng.randrange(8)
        cut = good[: w.rng.randrange(len(good))]
        a, b = sorted(w.rng.sample(range(12, len(good) - packet.SIGNATURE), 2))
        turned = good[:a] + good[b:-64] + good[a:b] + good[-64:]
        for kind, content in (
            ("a flipped bit in a release", bytes(flipped)),
            ("a truncated release", cut),
            ("a release whose parts changed places", turned),
            ("a file of chance", w.rng.randbytes(1 + w.rng.randrange(999))),
        ):
            end = done(device.apply, store, w.file(content))
            w.check(kind, store, end, "none of the trusted keys|is no delta")


def spoilt_slots(w: World, count: int) -> None:
    """Bits flipped on the device: in what serves, in what can come back, in the record, in the keys."""
    ready = w.store("ready")
    assert not done(device.apply, ready, *act_until_apply(w, ready)).what
    done(device.confirm, ready)
    record = device.record_of(ready)
    store = w.place / "harmed"
    for at in range(count):
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(ready, store)
        serving, spare = store / "slots" / record.slot, store / "slots" / record.spare
        kind, place = (
            ("a flipped bit in what serves", serving / w.rng.choice(device_files(serving))),
            ("a flipped bit in the other slot", spare / w.rng.choice(device_files(spare))),
            ("a flipped bit in the record", store / w.rng.choice(device.RECORDS)),
            ("a flipped bit in the keys", store / device.TRUST),
        )[at % 4]
        flip(w, place)
        found = w.check(kind, store)
        wanted = record.other if kind == "a flipped bit in what serves" else record.id
        if found is not None and found.id != wanted:
            w.failed.append(f"{kind}: {place.name}: the other package serves")


def device_files(slot: Path) -> list[str]:
    return [*sorted(device.manifest_of(slot)["files"]), device.MANIFEST]


def flip(w: World, place: Path, start: int = 0, length: int | None = None) -> None:
    """Turn one bit of a file, of the bytes from `start` on."""
    content = bytearray(place.read_bytes())
    at = start + w.rng.randrange(len(content) - start if length is None else length)
    content[at] ^= 1 << w.rng.randrange(8)
    place.write_bytes(content)


def wrong_order(w: World, count: int) -> None:
    """Releases for another package, out of order, again, and older ones."""
    store = w.store("order")
    old, new = w.ways
    for _ in range(count):
        first, second = w.release(old), w.release(new)
        end = done(device.apply, store, w.file(second))
        w.check("releases out of order", store, end, "is for package")
        w.counter += 1
        stranger = replace(w.stranger, counter=w.counter)
        end = done(device.apply, store, w.file(stranger))
        w.check("a release for another package", store, end, "is for package")
        for release in (first, second):
            assert not done(device.apply, store, w.file(release)).what
            end = done(device.apply, store, w.file(replace(first, counter=w.counter + 1)))
            if device.record_of(store).pending:
                w.check("a release on one that is not proved", store, end, "not proved itself")
            done(device.confirm, store)
        end = done(device.apply, store, w.file(first))
        w.check("an old release again", store, end, "not above")


def paths_out(w: World) -> None:
    """Signed releases that name places outside of the package."""
    store = w.store("paths")
    base = device.record_of(store).id
    for name in OUTSIDE:
        release = w.release(base)
        text = packet.Text(name=name, length=0, payload=codec.packed(b""))
        entry = release.entries[0]
        elsewhere = replace(entry, tensor=replace(entry.tensor, file=name))
        for spoilt in (
            replace(release, texts=(*release.texts, text)),
            replace(release, entries=(elsewhere,)),
        ):
            end = done(device.apply, store, w.file(spoilt))
            w.check("a path out of the package", store, end, "is no file of the package")
    outside = w.place / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    slot = store / "slots" / device.record_of(store).spare
    shutil.rmtree(slot, ignore_errors=True)
    slot.symlink_to(outside)
    end = done(device.apply, store, w.file(w.release(base)))
    w.check("a link in the place of a slot", store, end, "File exists")
    if [p.name for p in outside.iterdir()] != ["kept"]:
        w.failed.append("a link in the place of a slot: it was followed")


def bombs(w: World) -> float:
    """Signed releases that unpack to a gigabyte; the most megabytes that one took."""
    store = w.store("bombs")
    base = device.record_of(store).id
    zeros = zstandard.ZstdCompressor(level=3)
    bomb = zeros.compress(bytes(1 << 30))
    release = w.release(base)
    vector = replace(release.vectors[0], payload=bomb, inputs=(("x", "float32", (1, 1 << 28)),))
    head = packet.MAGIC + struct.pack("<I", len(bomb)) + bomb
    signed = head + w.key.sign(packet.CONTEXT + hashlib.sha256(head).digest())
    most = 0.0
    entry = replace(release.entries[-1], encoding="q8", payload=bomb)
    model = np.frombuffer((w.packages[0] / "model.onnx").read_bytes(), np.uint8)
    lossy = replace(release, entries=(entry,))
    lossy = replace(lossy, graph=graph_of({"model.onnx": model}, [entry.tensor]))
    for content in (
        signed,
        replace(release, entries=tuple(replace(e, payload=bomb) for e in release.entries)),
        lossy,
        replace(release, texts=(*release.texts[1:], replace(release.texts[0], payload=bomb, length=1 << 30))),
        replace(release, vectors=(vector,)),
    ):  # fmt: skip
        end = done(device.apply, store, w.file(content))
        w.check("a payload that unpacks to a gigabyte", store, end, "unpacks to more")
        most = max(most, end.grown_mb)
    if most > MOST_GROWN_MB:
        w.failed.append(f"a bomb took {most:.0f} MB")
    return most


def through(taken: socket.socket, port: int, seed: int, most: int) -> None:
    """A slow line to a server on this machine, cut after a number of bytes that is drawn for each connection."""
    rng = random.Random(seed)
    while True:
        line, _ = taken.accept()
        with line, socket.create_connection(("127.0.0.1", port)) as far, suppress(OSError):
            far.sendall(line.recv(1 << 16))
            left = rng.randrange(most)
            while left and (chunk := far.recv(min(1 << 15, left))):
                line.sendall(chunk)
                left -= len(chunk)
                time.sleep(0.002)


@contextmanager
def lines(w: World, directory: Path, most: int) -> Iterator[str]:
    """A server of releases behind such a line."""
    from effc.delta import serve

    with serve.listening("127.0.0.1", 0) as there, serve.listening("127.0.0.1", 0) as here:
        server = FORK.Process(target=serve.serve, args=(directory, there))
        line = FORK.Process(
            target=through, args=(here, there.getsockname()[1], w.rng.random(), most)
        )
        server.start()
        line.start()
        try:
            yield f"http://127.0.0.1:{here.getsockname()[1]}"
        finally:
            for process in (line, server):
                process.kill()
                process.join()


def ready(w: World) -> Path:
    """A store that serves the old package again, with the new one in the other slot."""
    store = w.store("ready for anchors")
    for _ in range(2):
        assert not done(device.apply, store, *act_until_apply(w, store)).what
    done(device.confirm, store)
    return store


def lost(w: World, store: Path, name: str, *, spare: bool) -> Path:
    """A copy of a store with a bit of a weight turned in what serves, and in the other slot, or nothing in that."""
    made = w.place / name
    shutil.copytree(store, made)
    record = device.record_of(made)
    for name in (record.slot, *([record.spare] if spare else [])):
        tensor = w.rng.choice(w.anchor.entries).tensor
        flip(w, made / "slots" / name / tensor.file, tensor.offset, tensor.length)
    if not spare:
        shutil.rmtree(made / "slots" / record.spare, ignore_errors=True)
    return made


def anchor_kills(w: World, count: int, from_: list[Path]) -> Counter[str]:
    """SIGKILL while a store that holds nothing whole takes an anchor, and the anchor again; where it was hit."""
    store = w.place / "healed"
    hit: Counter[str] = Counter()
    usual: list[float] = []
    while hit.total() < count:
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(from_[hit.total() % len(from_)], store)
        before = device.record_of(store)
        file = w.file(w.anchored())
        if len(usual) < 5:
            started = time.perf_counter()
            heal(w, store, "an anchor over what is harmed", file)
            usual.append(time.perf_counter() - started)
            continue
        process, _ = begun(device.apply, store, file)
        time.sleep(w.rng.uniform(0, statistics.median(usual)))
        process.kill()
        process.join()
        if process.exitcode != -9:
            continue  # it was done before
        hit[moment(store, before)] += 1
        w.check("SIGKILL in an anchor over what is harmed", store, is_lost=True)
        heal(w, store, "an anchor after a kill", w.file(w.anchored()))
    return hit


def heal(w: World, store: Path, kind: str, file: Path) -> None:
    """An anchor that is taken, after which its package serves."""
    end = done(device.apply, store, file)
    record = w.check(kind, store, end)
    if end.what or record is None or record.id != w.anchor.target:
        w.failed.append(f"{kind}: {end.what or 'another package serves'}")


def spoilt_anchors(w: World, count: int, from_: list[Path], whole: Path) -> None:
    """Anchors that are harmed, cut, signed by nobody or somebody else, old, or with a difference in them."""
    stranger = packet.private_key(w.place / "stranger")
    for store in (whole, *from_):
        is_lost = store != whole
        for _ in range(count):
            anchor = w.anchored()
            good = w.file(anchor).read_bytes()
            flipped = bytearray(good)
            flipped[w.rng.randrange(len(good))] ^= 1 << w.rng.randrange(8)
            bare = good[: -packet.SIGNATURE]
            old = replace(anchor, counter=w.rng.randint(1, device.record_of(store).highest))
            (first, *more) = anchor.entries
            other = replace(anchor, entries=(replace(first, encoding="ints"), *more))
            for kind, content, reason in (
                ("a flipped bit in an anchor", bytes(flipped), "none of the trusted keys|is no delta"),
                ("a truncated anchor", good[: w.rng.randrange(len(good))], "none of the trusted keys|is no delta"),
                ("an unsigned anchor", bare + w.rng.randbytes(packet.SIGNATURE), "none of the trusted keys"),
                ("an anchor of another key", packet.written(anchor, stranger), "none of the trusted keys"),
                ("an old anchor", old, "not above"),
                ("a difference in an anchor", other, "difference to a base"),
            ):  # fmt: skip
                end = done(device.apply, store, w.file(content))
                w.check(kind, store, end, reason, is_lost=is_lost)
        heal(w, store, "an anchor after spoilt ones", w.file(w.anchored()))


def downloads(w: World, count: int) -> Counter[str]:
    """Lines that break and pulls that are killed; what was kept of a file is the beginning of it."""
    from effc.delta import channel

    store, directory = w.store("pulled"), w.place / "releases"
    directory.mkdir()
    base = device.record_of(store).id
    content = w.file(w.release(base)).read_bytes()
    (directory / "up.effd").write_bytes(content)
    part = store / channel.INCOMING / channel.PART
    kept: Counter[str] = Counter()
    with lines(w, directory, len(content)) as url:  # no connection brings all of it
        started = time.perf_counter()
        end = done(channel.pull, url, store)
        usual = time.perf_counter() - started
        w.check("a download over a line that breaks", store, end)
        if end.what:
            w.failed.append(f"a download over a line that breaks: {end.what}")
        while sum(kept.values()) < count:
            if device.record_of(store).id != base or device.record_of(store).highest:
                shutil.rmtree(store)
                w.store("pulled")
            process, _ = begun(channel.pull, url, store)
            time.sleep(w.rng.uniform(0, usual / 2))
            process.kill()
            process.join()
            if process.exitcode != -9:
                continue
            found = part.read_bytes() if part.exists() else b""
            kept["something" if found else "nothing"] += 1
            if not content.startswith(found):
                w.failed.append("a download that is killed: what was kept is not of the file")
            w.check("a download that is killed", store)
        while not device.record_of(store).highest:
            end = done(channel.pull, url, store)
        w.check("a download after all kills", store)
    return kept


def run(place: Path, seed: int, kill_count: int) -> dict[str, Any]:
    process = FORK.Process(target=build, args=(place, seed))
    process.start()
    process.join()
    w = world(place, seed)
    part = max(1, kill_count // 10)
    usual = times(w, w.store("times"))
    hit = kills(w, kill_count, usual)
    torn(w, part, usual)
    limited_files(w, part)
    disk = full_disk(w, part)
    spoilt_files(w, part)
    spoilt_slots(w, 2 * part)
    wrong_order(w, max(1, part // 5))
    paths_out(w)
    grown = bombs(w)
    kept = downloads(w, part)
    packet.keygen(place / "stranger", place / "stranger.pub")
    whole = ready(w)
    harmed = [lost(w, whole, f"harmed {spare}", spare=spare) for spare in (True, False)]
    hit["anchor"] = anchor_kills(w, max(1, kill_count // 3), harmed)
    spoilt_anchors(w, part, harmed, whole)
    wanted = {"before it wrote", "slot empty or in part", "slot filled", "swapped"}
    for word in ("apply", "anchor"):
        missed = sorted(wanted - set(hit.get(word, ())))
        if kill_count >= KILLS and missed:
            w.failed.append(f"no kill hit an {word} {missed}")
    size = sum(p.stat().st_size for p in w.packages[0].rglob("*") if p.is_file())
    return {
        "seed": seed, "package_bytes": size, "usual_s": usual, "bomb_mb": grown, "small_disk": disk,
        "faults": {n: sum(c[n] for c in w.kinds.values()) for n in ("injected", "survived")},
        "kinds": {k: {**c, "reasons": dict(w.reasons.get(k, {}))} for k, c in w.kinds.items()},
        "kills": {k: dict(c) for k, c in hit.items()}, "kept": dict(kept), "failed": w.failed,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tenth of all faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write what was found here, and no result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="effc-delta-") as place:
        found = run(Path(place), args.seed, KILLS // SMOKE if args.smoke else KILLS)
    for kind, counts in found["kinds"].items():
        print(
            f"{counts['survived']:4} of {counts['injected']:4}  {kind}  {counts['reasons'] or ''}"
        )
    print(f"kills: {found['kills']}; {found['faults']}")
    for word in found["failed"]:
        print(f"NOT SURVIVED: {word}")
    if args.json:
        Path(args.json).write_text(json.dumps(found), encoding="utf-8")
    elif not args.smoke:
        import common

        print(common.write("delta_faults", {"name": "delta_faults", **found}))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
