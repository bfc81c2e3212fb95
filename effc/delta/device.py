"""The device's half of a delta: a store with two whole slots, one of which always serves.

    STORE/trust.json          public keys that releases must be signed by; written by `init` and never again
    STORE/CURRENT, CURRENT.2  the record: which slot serves, since which release, and whether it has proved itself
    STORE/slots/a, slots/b    two packages, each whole or not there; the one that serves is never written to

    verify     signature, release counter, base, graph
    stage      the other slot is filled beside the serving one, and synced
    hash       every file of it, read back from the disk
    try        a second session opens it and answers the test vectors of the release
    swap       one record is exchanged by a rename: from then on the other slot serves
    pending    until some inferences went well; a start that finds it unproven too often goes back to the slot before

Until the swap nothing that serves has changed, so a kill, a full disk or a harmed file costs the update and no more.
The record has two copies, each with the sha256 of itself, and the later whole one counts. Keys and counter lie outside
the slots, where no release can write.

This needs numpy, onnxruntime, zstandard and cryptography, and of effc nothing that needs more: `pip install --no-deps`.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from effc import bounded, paths
from effc.delta import codec, packet, whole
from effc.delta.codec import HARMED, Array
from effc.delta.packet import Packet
from effc.delta.slot import (
    MANIFEST,
    VOLATILE,
    Session,
    graph_of,
    id_of,
    manifest_in,
    manifest_of,
    mapped,
    problems,
    self_test,
    session,
    slot_texts,
)
from effc.errors import DeltaError
from effc.plain import dump, sealed

try:
    import fcntl
except ImportError:  # pragma: no cover - without locks two updates at once are the user's to avoid
    fcntl = None  # type: ignore[assignment]

RECORDS = ("CURRENT", "CURRENT.2")
TRUST = "trust.json"
SLOTS = ("a", "b")
TRIES = 3
"""Starts that a release has to prove itself in."""
PROOFS = 3
"""Inferences that prove it."""
MOST_PACKET = 64 << 20
"""A delta may be as large as that, or as the package where that is larger."""
MOST_INSPECTED = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Record:
    """Which slot serves. `other` is the sha256 of what the other slot holds, "" where that is nothing whole.

    `counter` is of the release that serves, `highest` the greatest that was ever taken: what is not above that is
    refused, also after a rollback.
    """

    sequence: int
    slot: str
    id: str
    counter: int
    highest: int
    pending: bool = False
    tries: int = 0
    other: str = ""
    other_counter: int = 0

    @property
    def spare(self) -> str:
        return SLOTS[1 - SLOTS.index(self.slot)]


def init(store: Path, out: Path, keys: list[str]) -> Record:
    """A new store with a copy of a package in its first slot. Raises DeltaError where there is one already."""
    if not keys:
        raise DeltaError("a store without a key trusts nobody", hint="give --key PUBLIC")
    if store.exists() and (not store.is_dir() or any(store.iterdir())):
        raise DeltaError(f"{store} is not empty", hint="name a directory that is not there")
    manifest = manifest_of(out)
    try:
        slot = store / "slots" / SLOTS[0]
        slot.mkdir(parents=True)
        for name in manifest["files"]:
            (slot / name).parent.mkdir(parents=True, exist_ok=True)
            with paths.opened(out, name, DeltaError) as given, (slot / name).open("xb") as taken:
                shutil.copyfileobj(given, taken, 1 << 20)
        text = _finish(slot, manifest)
        if broken := problems(slot, id_of(text)):
            raise DeltaError(f"{out} is not whole: {broken[0]}", hint="get an unharmed package")
        whole.write(store / TRUST, dump({"schema": 1, "keys": sorted(keys)}))
        made = Record(sequence=1, slot=SLOTS[0], id=id_of(text), counter=0, highest=0)
        _write(store, made)
    except OSError as error:
        raise _no(error, store) from error
    return made


def _finish(slot: Path, manifest: Mapping[str, Any]) -> str:
    """Write what makes a slot a package, and let all of it reach the disk; gives the manifest."""
    text, volatile = slot_texts(manifest)
    (slot / VOLATILE).write_text(volatile, encoding="utf-8")
    (slot / MANIFEST).write_text(text, encoding="utf-8")
    for place in (*slot.rglob("*"), slot, slot.parent, slot.parent.parent):
        whole.sync(place)
    return text


def _no(error: OSError, place: Path) -> DeltaError:
    room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return DeltaError(
        f"{error.filename or place}: {error.strerror or error}",
        where=str(place),
        hint="what serves is untouched; "
        + ("free some disk space" if room else "make it writable"),
    )


def record_of(store: Path) -> Record:
    """The later whole copy of the record. Raises DeltaError where there is none."""
    found = [r for name in RECORDS if (r := _record(store, name)) is not None]
    if not found:
        raise DeltaError(
            f"{store} is no store, or its record is gone", hint="effc delta init makes a store"
        )
    return max(found, key=lambda r: r.sequence)


def _record(store: Path, name: str) -> Record | None:
    with suppress(DeltaError, TypeError, ValueError):
        text = bounded.content(paths.opened(store, name, DeltaError), name, DeltaError, 1 << 16)
        value = bounded.json_of(text, name, DeltaError)
        if isinstance(value, dict) and sealed(value).encode() == text:
            made = Record(**{k: v for k, v in value.items() if k != "digest"})
            return made if made.slot in SLOTS else None
    return None


def _write(store: Path, record: Record) -> None:
    for name in RECORDS:  # one after the other, so that one is whole at any time
        whole.write(store / name, sealed(asdict(record)))


@contextmanager
def alone(store: Path, name: str = ".lock") -> Iterator[None]:
    """One change of a store at a time, or pull. Raises DeltaError where another is at it, or the system refuses."""
    if not store.is_dir():
        raise DeltaError(f"{store} is no store", hint="effc delta init makes one")
    try:
        with (store / name).open("w") as lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise DeltaError(
                        f"another process is changing {store}", hint="wait for it"
                    ) from error
            yield
    except OSError as error:
        raise _no(error, store) from error


def keys_of(store: Path) -> list[str]:
    """The trusted keys in hex. Raises DeltaError."""
    text = bounded.content(paths.opened(store, TRUST, DeltaError), TRUST, DeltaError, 1 << 16)
    value = bounded.json_of(text, TRUST, DeltaError)
    keys = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(keys, list) or not all(isinstance(k, str) and len(k) == 64 for k in keys):
        raise DeltaError(
            f"{store / TRUST} has no keys", hint="make the store again: effc delta init"
        )
    return keys


def apply(store: Path, file: Path) -> Record:
    """Take a release: from then on the other slot serves, pending. Raises DeltaError, and then all is as it was."""
    with alone(store):
        record = record_of(store)
        content = packet.read(file, most_bytes(store, record))
        packet.check_signature(content, keys_of(store))
        found = packet.parsed(content)
        base, slot = store / "slots" / record.slot, store / "slots" / record.spare
        broken = problems(base, record.id)
        if broken and (not found.is_anchor or _has_other(store, record)):
            raise DeltaError(
                f"the package that serves is harmed: {broken[0]}",
                hint="effc delta rollback, else take an anchor",
            )
        if not broken and (found.target, found.counter) == (record.id, record.counter):
            return record  # it is here already
        _refuse(record, found, is_lost=bool(broken))
        if found.target == record.id and not (found.entries or found.texts):
            same = replace(
                record, sequence=record.sequence + 1, counter=found.counter, highest=found.counter
            )
            _write(store, same)  # what serves is the release already
            return same
        cleared = replace(record, sequence=record.sequence + 1, other="", other_counter=0)
        _write(store, cleared)
        try:
            _stage(base, slot, found)
            if wrong := problems(slot, found.target):
                raise DeltaError(f"the release is not what it should be: {wrong[0]}", hint=HARMED)
            _try(slot, found)
        except BaseException:
            shutil.rmtree(slot, ignore_errors=True)
            raise
        swapped = Record(
            sequence=cleared.sequence + 1, slot=record.spare, id=found.target,
            counter=found.counter, highest=found.counter, pending=True, tries=TRIES,
            other=record.id, other_counter=record.counter,
        )  # fmt: skip
        if broken:  # nothing whole is left to go back to, so it need not prove itself any more
            swapped = replace(swapped, pending=False, tries=0, other="", other_counter=0)
        _write(store, swapped)
        return swapped


def needs_anchor(store: Path, record: Record) -> bool:
    """Whether neither slot is whole, so that a release which differs from nothing is all that helps."""
    broken = problems(store / "slots" / record.slot, record.id)
    return bool(broken) and not _has_other(store, record)


def _has_other(store: Path, record: Record) -> bool:
    """Whether the slot that does not serve is whole."""
    return bool(record.other) and not problems(store / "slots" / record.spare, record.other)


def most_bytes(store: Path, record: Record) -> int:
    """Bytes that a release may have here."""
    slot = store / "slots" / record.slot
    size = sum(p.stat().st_size for p in slot.rglob("*") if p.is_file())
    return max(MOST_PACKET, size)


def expect_proved(record: Record) -> None:
    """Raise DeltaError where the release that serves has not proved itself."""
    if record.pending:
        raise DeltaError(
            "the release before has not proved itself yet",
            hint="effc delta confirm or rollback first",
        )


def _refuse(record: Record, found: Packet, *, is_lost: bool) -> None:
    """Raise DeltaError for a release that is not to be taken. What is lost as a whole comes back by its own number."""
    if not is_lost:
        expect_proved(record)
    is_own = is_lost and found.target == record.id and found.counter == record.highest
    if found.counter <= record.highest and not is_own:
        raise DeltaError(
            f"release {found.counter} is not above {record.highest}, which was taken before",
            hint=f"take an anchor above {record.highest}, or one of {record.highest} with the package that was lost"
            if is_lost
            else "older releases come back by effc delta rollback alone",
        )
    if found.base != record.id and not found.is_anchor:
        raise DeltaError(
            f"the delta is for package {found.base[:12]}, and {record.id[:12]} serves",
            hint="effc delta rollback first, for it is made from the package that this brings back"
            if found.base == record.other
            else "have a delta made from the package that serves, or take an anchor",
        )


def _stage(base: Path, slot: Path, found: Packet) -> None:
    """Fill the other slot with the base, changed. Raises DeltaError before it writes where the delta does not fit.

    Of the base an anchor takes over what its graph has the digest of, and nothing that is not looked at afterwards.
    """
    manifest = manifest_of(base)
    known = {*manifest["files"], MANIFEST}
    named = {e.tensor.file for e in found.entries} | {t.name for t in found.texts}
    if strange := sorted(named - known):
        raise DeltaError(f"{paths.shown(strange[0])} is no file of the package", hint=HARMED)
    patched = {e.tensor.file for e in found.entries}
    if MANIFEST in patched or patched & {t.name for t in found.texts}:
        raise DeltaError("a file is patched and replaced at once", hint=HARMED)
    contents = {name: mapped(base / name) for name in patched}
    if graph_of(contents, (e.tensor for e in found.entries)) != found.graph:
        raise DeltaError("the delta is for another graph", hint="have it made from this package")
    texts = {t.name: _text(None if found.is_anchor else base, t) for t in found.texts}
    target = manifest_in(texts[MANIFEST], "the delta") if MANIFEST in texts else manifest
    if {*target["files"]} != {*manifest["files"]}:
        raise DeltaError("the release has other files than the package", hint=HARMED)
    shutil.rmtree(slot, ignore_errors=True)
    slot.mkdir(parents=True)
    for name in manifest["files"]:
        (slot / name).parent.mkdir(parents=True, exist_ok=True)
        if name in texts:
            (slot / name).write_bytes(texts[name])
        else:
            shutil.copyfile(base / name, slot / name)
    _patch_files(slot, patched, found)
    _finish(slot, target)


def _patch_files(slot: Path, patched: set[str], found: Packet) -> None:
    """By reads and writes, since a full disk ends a process that writes through a map."""
    for name in sorted(patched):
        with (slot / name).open("r+b") as stream:
            for entry in (e for e in found.entries if e.tensor.file == name):
                tensor = entry.tensor
                stream.seek(tensor.offset)
                old = stream.read(tensor.length)
                stream.seek(tensor.offset)
                stream.write(codec.decode(tensor, entry.encoding, entry.payload, old))


def _text(base: Path | None, text: packet.Text) -> bytes:
    known = b""
    if base is not None:
        with paths.opened(base, text.name, DeltaError) as stream:
            known = stream.read()
    most = max(MOST_PACKET, 2 * len(known))
    found = codec.unpacked(text.payload, min(text.length, most), name=text.name, known=known)
    if len(found) != text.length:
        raise DeltaError(f"{text.name} is of another size", hint=HARMED)
    return found


def _try(slot: Path, found: Packet) -> None:
    engines = manifest_of(slot)["engines"]
    tested = {v.engine for v in found.vectors}
    if missing := [e["path"] for e in engines if e["path"] not in tested]:
        raise DeltaError(f"the release has no test for {missing[0]}", hint=HARMED)
    for engine in engines:
        run = session(slot, engine)
        for vector in (v for v in found.vectors if v.engine == engine["path"]):
            self_test(run, vector)


def confirm(store: Path) -> Record:
    """The release that serves has proved itself."""
    with alone(store):
        record = record_of(store)
        if not record.pending:
            return record
        made = replace(record, sequence=record.sequence + 1, pending=False, tries=0)
        _write(store, made)
        return made


def rollback(store: Path) -> Record:
    """Let the other slot serve again. Raises DeltaError where it holds nothing whole."""
    with alone(store):
        made = _reversed(store, record_of(store))
        _write(store, made)
        return made


def _reversed(store: Path, record: Record) -> Record:
    """The record with the other slot serving. Raises DeltaError where that holds nothing whole."""
    broken = ["it is empty"]
    if record.other:
        broken = problems(store / "slots" / record.spare, record.other)
    if broken:
        raise DeltaError(
            f"there is nothing to go back to: {broken[0]}",
            hint="take an anchor, or make the store again: effc delta init",
        )
    made = Record(
        sequence=record.sequence + 1, slot=record.spare, id=record.other,
        counter=record.other_counter, highest=record.highest,
    )  # fmt: skip
    if record.pending:  # what never proved itself is nothing to come back to
        return made
    return replace(made, other=record.id, other_counter=record.counter)


def start(store: Path) -> tuple[Path, Record]:
    """The slot to serve from, whole. A release that did not prove itself in time, or is harmed, gives way to the other.

    A release that is being taken meanwhile is no hindrance, nor is a disk that cannot be written: a release that has
    not proved itself then gives way at once, since nobody could count its starts. Raises DeltaError where neither slot
    is whole.
    """
    record = record_of(store)
    broken = problems(store / "slots" / record.slot, record.id)
    if broken or (record.pending and record.tries <= 0):
        made = _reversed(store, record)
    elif record.pending:
        made = replace(record, sequence=record.sequence + 1, tries=record.tries - 1)
    else:
        made = record
    if any(_record(store, name) != made for name in RECORDS):  # also one that is harmed or behind
        is_kept = _kept(store, record, made)
        if not is_kept and made.pending:
            with suppress(DeltaError):
                made = _reversed(store, record)
    return store / "slots" / made.slot, made


def _kept(store: Path, record: Record, made: Record) -> bool:
    """Write the record that follows another; whether the disk took it, or somebody else is changing the store."""
    try:
        with alone(store):
            if record_of(store) == record:  # else who changed it meanwhile knows better
                _write(store, made)
    except DeltaError as error:
        return isinstance(error.__cause__, BlockingIOError)
    return True


def _given_up(store: Path) -> tuple[Path, Record]:
    """The other slot in the place of a release that does not open, also where the disk takes no record of it."""
    record = record_of(store)
    made = _reversed(store, record)
    _kept(store, record, made)
    return store / "slots" / made.slot, made


def status(store: Path) -> dict[str, Any]:
    """What a store holds, every byte of it looked at."""
    record = record_of(store)
    found: dict[str, Any] = {**asdict(record), "slots": {}}
    for slot, wanted in ((record.slot, record.id), (record.spare, record.other)):
        broken = problems(store / "slots" / slot, wanted) if wanted else ["empty"]
        found["slots"][slot] = broken[0] if broken else "whole"
    return found


class Live:
    """An engine of a store that goes on serving while a release is taken.

    `live = Live(STORE)`, then `live(feeds)`, and `live.update("up.effd")` from any thread: the session is exchanged
    when the new one has answered its tests, and a call that is under way ends on the old one.
    """

    def __init__(self, store: str | os.PathLike[str], target: str | None = None) -> None:
        self._store, self._target = Path(store), target
        self._lock = threading.Lock()
        root, record = start(self._store)
        try:
            self._run, self._left = self._open(root), PROOFS if record.pending else 0
        except DeltaError:
            if not record.pending:
                raise
            # it opened when it was taken, and does not any more
            self._run, self._left = self._open(_given_up(self._store)[0]), 0

    def _open(self, root: Path) -> Session:
        engines = manifest_of(root)["engines"]
        found = [e for e in engines if self._target in (None, e.get("target"), e.get("role"))]
        if not found:
            raise DeltaError(
                f"no engine for {self._target!r}", hint="name one that the package has"
            )
        return session(root, found[0])

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        run = self._run
        found = run(feeds)
        if self._left and run is self._run and _is_finite(found):
            with self._lock:
                self._left -= bool(self._left)
                proved = not self._left
            if proved:
                try:
                    confirm(self._store)
                except DeltaError:  # a full disk is no reason not to answer
                    self._left = 1
        return found

    def update(self, file: str | os.PathLike[str]) -> Record:
        """Take a release and serve it. Raises DeltaError, and then the old one serves on."""
        record = apply(self._store, Path(file))
        run = self._open(self._store / "slots" / record.slot)
        with self._lock:
            self._run, self._left = run, PROOFS if record.pending else 0
        return record

    def pull(self, url: str, *, ca: Path | None = None) -> Record | None:
        """Fetch the next release and serve it; None where there is none. Raises DeltaError; the old one serves on."""
        from effc.delta import channel

        return channel.pull(url, self._store, ca=ca, take=self.update)


def _is_finite(outputs: Mapping[str, Array]) -> bool:
    """Whether an answer is one: numbers that are none prove nothing."""
    return all(np.isfinite(value).all() for value in outputs.values() if value.dtype.kind == "f")


def line(record: Record) -> str:
    """A record for a person."""
    state = f"pending, {record.tries} starts left" if record.pending else "confirmed"
    back = f"; {record.other[:12]} can come back" if record.other else "; nothing to go back to"
    return f"slot {record.slot} serves {record.id[:12]}, release {record.counter}, {state}{back}"
