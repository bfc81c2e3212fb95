"""What devices send up, as it lies in a directory of the cloud: of the model that is taken now, and within bounds.

    INBOX/takes.json       whose tokens are taken: digests by name, as in a payload; `expect` exchanges it
    INBOX/<sha256>.effu    a payload that was read and found whole; one that comes twice is kept once
    INBOX/spent.json       bytes that came in a day of UTC, also of what was refused or broke off

`effc.delta.serve` puts in, one process at a time; who teaches reads what `waiting` names, and removes it. No more is
held in memory, on the disk or in a day than `Limits` and `MOST_ARRIVING` say, whoever sends it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from effc.delta import uplink
from effc.delta.uplink import DAY_S, MOST_PAYLOAD, SUFFIX, Limits
from effc.errors import DeltaError

TAKES = "takes.json"
LIMITS = Limits(bytes_a_day=256 << 20, bytes_waiting=256 << 20)
MOST_ARRIVING = 2 * MOST_PAYLOAD
"""Bytes of all payloads that are on their way at once."""


class Refused(DeltaError):
    """A payload that is not taken: `status` is what HTTP calls it, `after_s` when another try may go well, if ever."""

    def __init__(self, what: str, *, hint: str, status: int, after_s: int | None = None) -> None:
        super().__init__(what, hint=hint)
        self.status, self.after_s = status, after_s


class Inbox:
    """`limits` are of all devices together; `days` of them says nothing here."""

    def __init__(
        self, place: Path, *, limits: Limits = LIMITS, clock: Callable[[], float] = time.time
    ) -> None:
        self.place, self.limits, self.clock = place, limits, clock
        self._arriving = 0
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
        found = {file: file.stat().st_mtime_ns for file in self.place.glob(f"[0-9a-f]*{SUFFIX}")}
        return sorted(found, key=lambda file: (found[file], file.name))

    @contextmanager
    def arriving(self, size: int) -> Iterator[bytearray]:
        """Room for a payload of that many bytes, to be filled; what came of it is counted. Raises Refused.

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
            self._arriving += size
        content = bytearray()
        try:
            yield content
        finally:
            with self._counts:
                self._arriving -= size
                day, used = uplink.spent(self.place, self.clock())
                uplink.spend(self.place, day, used + len(content))

    def _expect_room(self, size: int) -> None:
        """Raises Refused where so many bytes more are too many for now."""
        if self.expected() is None:
            raise Refused(
                f"{self.place} takes nothing: nobody said whose tokens", status=503, after_s=60,
                hint="effc.delta.inbox.Inbox(PLACE).expect({'engine': …, …})",
            )  # fmt: skip
        now = self.clock()
        _, used = uplink.spent(self.place, now)
        if used + self._arriving + size > self.limits.bytes_a_day:
            raise Refused(
                "the bytes of the day are used up", hint="try again tomorrow", status=429,
                after_s=int(DAY_S - now % DAY_S) + 1,
            )  # fmt: skip
        held = sum(file.stat().st_size for file in self.waiting())
        if (
            self._arriving + size > MOST_ARRIVING
            or held + self._arriving + size > self.limits.bytes_waiting
        ):
            raise Refused("there is no room now", hint="try again later", status=503, after_s=60)

    def keep(self, digest: str, content: bytes) -> None:
        """Keep a payload that came under its sha256. Raises Refused for what is harmed or of somebody else."""
        if hashlib.sha256(content).hexdigest() != digest:
            raise Refused("it was harmed on the way", hint="send it again", status=400)
        with self._keeps:  # what is packed takes some times its size to look at, so one at a time
            who = self.expected()
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
