"""What waits in a device's queue goes up over HTTP(S), each payload whole, as often as it takes.

    PUT URL/<sha256 of the payload>.effu

A payload that was taken is forgotten, and so is one that will not be taken at a second try either; where the line
breaks, or the other side has no room or no day left, the rest waits. Every attempt that found somebody counts in the
queue's day. Nothing is sent anywhere but to the address that was given, and of what comes back the status alone is
looked at: 201, or 204 from other servers, since any page that wants a login is a 200.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import urllib3

from effc.delta import channel
from effc.delta.channel import LATER, TRIES
from effc.delta.uplink import SUFFIX, Queue, Unsent
from effc.errors import DeltaError

_TAKEN = (201, 204)
_FOR_GOOD = {
    409: "another model's tokens are taken there",
    413: "too large for what is taken there",
    422: "harmed, or of another version",
}
_NO_LINE = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """How many payloads were taken, why others were refused for good, and how many wait for another day."""

    taken: int
    refused: tuple[str, ...]
    waiting: int


def push(url: str, queue: Queue, *, ca: Path | None = None) -> Pushed:
    """Send what waits in a queue, as far as its owner and the day allow; `ca` has the certificates to trust for https.

    Raises DeltaError where its owner allows nothing, or the rest cannot be sent now; that stays in the queue.
    """
    if queue.limits() is None:
        raise DeltaError(
            f"nothing may be sent from {queue.place}",
            hint="its owner allows it: effc.delta.uplink.Queue(PLACE).opt_in()",
        )
    base = channel.address(url)
    refused: list[str] = []
    problem: str | None = None
    then = "the next push goes on with them"
    taken = idle = 0
    with channel.pool_of(ca) as pool:
        while True:
            line = _Line(pool, base)
            went = queue.send(line.post)
            refused += line.refused
            taken += went - len(line.refused)
            waiting = len(queue.waiting())
            # with nothing sent the day is over: then what went wrong before is still how it stands
            problem = line.problem or (problem if not went and waiting else None)
            if problem is None:
                return Pushed(taken=taken, refused=tuple(refused), waiting=waiting)
            idle = 0 if went else idle + 1
            if line.problem is None:
                then = "tomorrow has bytes for them again"
                break
            if idle == TRIES or not line.is_to_try_again:
                break
            channel.pause(idle)
    raise DeltaError(
        f"{url} takes nothing now: {problem}",
        hint=f"{waiting} payloads wait, and {then}",
    )


class _Line:
    """One attempt at what waits, up to the first payload that is not taken."""

    def __init__(self, pool: urllib3.PoolManager, base: str) -> None:
        self.pool, self.base = pool, base
        self.refused: list[str] = []
        self.problem: str | None = None
        self.is_to_try_again = True

    def post(self, content: bytes) -> None:
        """Raises OSError where the payload is to be kept."""
        place = f"{self.base}/{hashlib.sha256(content).hexdigest()}{SUFFIX}"
        try:
            answer = self.pool.request(
                "PUT", place, body=content, redirect=False, preload_content=False,
                headers={"Content-Type": "application/octet-stream"},
            )  # fmt: skip
            answer.close()
        except urllib3.exceptions.HTTPError as error:
            self.problem = channel.why(error)
            given_up_for = getattr(error, "reason", None) or error
            lost = Unsent if isinstance(given_up_for, _NO_LINE) else ConnectionError
            raise lost(self.problem) from error
        if answer.status in _TAKEN:
            return
        if answer.status in _FOR_GOOD:
            self.refused.append(_FOR_GOOD[answer.status])
            return
        self.problem = f"it answers {answer.status}"
        # 429: its day is over, and what is no inbox does not become one by asking again
        self.is_to_try_again = answer.status in (400, *LATER) and answer.status != 429
        raise ConnectionError(self.problem)
