"""What devices send up, as it lies in a directory of the cloud: of the model that is taken now, and within bounds.

    INBOX/takes.json       whose tokens are taken: digests by name, as in a payload; `expect` exchanges it
    INBOX/<sha256>.effu    a payload that was read and found whole; one that comes twice is kept once
    INBOX/spent.json       bytes that came in a day of UTC, also of what was refused or broke off

`effc.delta.serve` puts in, one process at a time; who teaches reads what `waiting` names, and removes it. No more is
held in memory, on the disk or in a day than `Limits`, `MOST_ARRIVING` and `MOST_FILES` say, whoever sends it. Bytes
count as they arrive, so who announces many and sends none takes no room from anybody.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from effc.delta import uplink
from effc.delta.device import alone
from effc.delta.uplink import DAY_S, MOST_PAYLOAD, SUFFIX, Limits
from effc.errors import DeltaError

TAKES = "takes.json"
LIMITS = Limits(bytes_a_day=256 << 20, bytes_waiting=256 << 20)
MOST_ARRIVING = 2 * MOST_PAYLOAD
"""Bytes of all payloads that are on their way at once."""
MOST_FILES = 10_000
"""Payloads that lie there unread, however small."""


class Refused(DeltaError):
    """A payload that is not taken: `status` is what HTTP calls it, `after_s` when another try may go well, if ever."""

    def __init__(self, what: str, *, hint: str, status: int, after_s: int | None = None) -> None:
        super().__init__(what, hint=hint)
        self.status, self.after_s = status, after_s


class Arrival:
    """A payload on its way, of which `size` bytes were announced."""

    def __init__(self, inbox: Inbox, size: int) -> None:
        self._inbox, self._size = inbox, size
        self._content = io.BytesIO()

    def __len__(self) -> int:
        return self._content.tell()

    def add(self, chunk: bytes) -> None:
        """Take what has come of it. Raises Refused where that is more than was announced, or than there is room for."""
        if len(self) + len(chunk) > self._size:
            raise Refused(
                f"it has more than the {self._size} bytes that it announced", status=413,
                hint="Content-Length is the size of the payload",
            )  # fmt: skip
        self._inbox._admit(len(chunk))
        self._content.write(chunk)

    def content(self) -> bytes:
        """All that has come, which is not copied."""
        return self._content.getvalue()


class Inbox:
    """`limits` are of all devices together; `days` of them says nothing here."""

    def __init__(
        self, place: Path, *, limits: Limits = LIMITS, clock: Callable[[], float] = time.time
    ) -> None:
        self.place, self.limits, self.clock = place, limits, clock
        self._arriving = self._used = 0
        # never less than lies there, as nobody else adds to it; full before the first look
        self._held, self._files = limits.bytes_waiting, MOST_FILES
        self._counts, self._keeps = threading.Lock(), threading.Lock()

    def expect(self, who: Mapping[str, str]) -> None:
        """From now on take tokens of `who`, by the digests that devices pack them with, and of nobody else."""
        if not who or uplink.OWN & set(who):
            raise DeltaError(
                "an inbox must know whose tokens it takes", hint="who: encoder, tokenizer, engine"
            )
        uplink.make_place(self.place)
        uplink.write_sealed(self.place / TAKES, {"schema": 1, "takes": dict(who)})

    def expected(self) -> dict[str, str] | None:
        """Whose tokens are taken; None where nobody said so, or what they wrote is harmed."""
        told = uplink.read_sealed(self.place / TAKES, {"schema", "takes"})
        if told is None or told["schema"] != 1 or not isinstance(told["takes"], dict):
            return None
        return told["takes"] if all(isinstance(v, str) for v in told["takes"].values()) else None

    def waiting(self) -> list[Path]:
        """What was kept and is still there, oldest first."""
        found = self._stats()
        return sorted(found, key=lambda file: (found[file].st_mtime_ns, file.name))

    def _stats(self) -> dict[Path, os.stat_result]:
        found = {}
        with suppress(FileNotFoundError), os.scandir(self.place) as entries:
            for entry in entries:
                if fnmatchcase(entry.name, f"[0-9a-f]*{SUFFIX}"):
                    with suppress(FileNotFoundError):  # who reads it has removed it meanwhile
                        found[self.place / entry.name] = entry.stat()
        return found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The one server of an inbox, which begins without what a killed one left half written. Raises DeltaError."""
        with alone(self.place, ".serve"):
            for part in self.place.glob(f".*{SUFFIX}.part"):
                part.unlink(missing_ok=True)
            yield

    @contextmanager
    def arriving(self, size: int) -> Iterator[Arrival]:
        """A payload of that many bytes, to be filled; what came of it is counted. Raises Refused.

        One that breaks off has cost what it brought, so that nobody sends more than a day's bytes by breaking off.
        """
        if not 0 < size <= min(MOST_PAYLOAD, self.limits.bytes_a_day, self.limits.bytes_waiting):
            raise Refused(
                f"a payload of {size} bytes is not taken",
                hint="send less",
                status=413 if size else 411,
            )
        with self._counts:
            self._expect_room(size)
        arrival = Arrival(self, size)
        try:
            yield arrival
        finally:
            with self._counts:
                self._arriving -= len(arrival)
                day, used = uplink.spent(self.place, self.clock())
                self._used = used + len(arrival)
                uplink.spend(self.place, day, self._used)

    def _admit(self, size: int) -> None:
        """Count so many bytes as arrived. Raises Refused where they are too many; nothing is looked up for it."""
        with self._counts:
            self._expect_day(size)
            if not self._has_room(size):
                raise _no_room()
            self._arriving += size

    def _expect_room(self, size: int) -> None:
        """Raises Refused where so many bytes more are too many for now."""
        if self.expected() is None:
            raise _nobody(self.place)
        _, self._used = uplink.spent(self.place, self.clock())
        self._expect_day(size)
        if self._files >= MOST_FILES or not self._has_room(size):
            found = self._stats()  # only now, as many take their time to look at
            self._held, self._files = sum(s.st_size for s in found.values()), len(found)
        if self._files >= MOST_FILES or not self._has_room(size):
            raise _no_room()

    def _expect_day(self, size: int) -> None:
        """Raises Refused where so many bytes more are too many for today."""
        if self._used + self._arriving + size > self.limits.bytes_a_day:
            raise Refused(
                "the bytes of the day are used up", hint="try again tomorrow", status=429,
                after_s=int(DAY_S - self.clock() % DAY_S) + 1,
            )  # fmt: skip

    def _has_room(self, size: int) -> bool:
        most = min(MOST_ARRIVING, self.limits.bytes_waiting - self._held)
        return self._arriving + size <= most

    def keep(self, digest: str, content: bytes) -> None:
        """Keep a payload that came under its sha256. Raises Refused for what is harmed or of somebody else."""
        if hashlib.sha256(content).hexdigest() != digest:
            raise Refused("it was harmed on the way", hint="send it again", status=400)
        with self._keeps:  # what is packed takes some times its size to look at, so one at a time
            who = self.expected()
            if who is None:  # no reason for a device to forget it
                raise _nobody(self.place)
            try:
                theirs = uplink.owner(content)
                if theirs == who:
                    uplink.read(content, theirs)
            except DeltaError as error:
                raise Refused(error.what, hint=error.hint or uplink.AGAIN, status=422) from error
            if theirs != who:
                raise Refused(
                    "the tokens are of another model", status=409,
                    hint="bring the device up to date first",
                )  # fmt: skip
            uplink.write_whole(self.place / f"{digest}{SUFFIX}", content)
            with self._counts:
                self._held, self._files = self._held + len(content), self._files + 1


def _no_room() -> Refused:
    return Refused("there is no room now", hint="try again later", status=503, after_s=60)


def _nobody(place: Path) -> Refused:
    return Refused(
        f"{place} takes nothing: nobody said whose tokens", status=503, after_s=60,
        hint="effc.delta.inbox.Inbox(PLACE).expect({'engine': …, …})",
    )  # fmt: skip
