"""Releases over HTTP(S): a device asks for the one behind what it serves, and goes on where the line broke.

    GET URL/<sha256 of the package that serves>.effd?above=<highest release that was taken>
    GET URL/anchor.effd?above=…                 where neither slot of the store is whole

What came so far lies in STORE/incoming with the ETag that it had, so the next attempt, also of another process, asks
for the rest alone, and for all of it where the file has become another one. No more is kept than a device may take, and
nothing is believed of it before its signature was looked at: who answers, and over which line, need not be trusted.

Any server of files can stand there, with releases under those names; `effc.delta.serve` finds them by what is in them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effc.delta import device, packet
from effc.delta.device import Record
from effc.errors import DeltaError
from effc.plain import dump

try:
    import urllib3
except ImportError as error:
    raise DeltaError("urllib3 fetches releases", hint="pip install urllib3") from error

INCOMING = "incoming"
PART, TOLD = "part", "told.json"
TIMEOUT = urllib3.Timeout(connect=10, read=30)
TRIES = 6
"""Attempts in a row that bring no byte."""
MOST_ATTEMPTS = 200
MOST_REDIRECTS = 3
CHUNK = 1 << 16
_GONE = (404, 410)
LATER = (408, 425, 429, 500, 502, 503, 504)


def pull(
    url: str,
    store: Path,
    *,
    ca: Path | None = None,
    take: Callable[[Path], Record] | None = None,
) -> Record | None:
    """Fetch the release that follows what a store serves, and take it; None where there is none.

    `ca` has the certificates to trust for https, `take` is `device.apply` where it is not given. Raises DeltaError,
    and then the store serves what it served; what was fetched so far is kept for the next time.
    """
    with device.alone(store, ".pull"):
        record = device.record_of(store)
        is_lost = device.needs_anchor(store, record)
        if not is_lost:
            device.expect_proved(record)
        file = _fetched(url, store, record, ca, is_lost=is_lost)
        if file is None:
            return None
        try:
            return take(file) if take else device.apply(store, file)
        finally:
            _forget(file.parent)


def _fetched(
    url: str, store: Path, record: Record, ca: Path | None, *, is_lost: bool
) -> Path | None:
    place = store / INCOMING
    place.mkdir(exist_ok=True)
    base, above = (packet.ANCHOR if is_lost else record.id), record.highest
    if is_lost and record.counter == above:
        above = max(0, above - 1)  # what was lost comes back by its own number too
    asked = f"{address(url)}/{base}.effd?above={above}"
    transfer = _Transfer(asked, place, device.most_bytes(store, record))
    idle = 0
    with pool_of(ca) as pool:
        for _ in range(MOST_ATTEMPTS):
            before = transfer.size
            problem = transfer.attempt(pool)
            if problem is None:
                return transfer.part if transfer.found else None
            idle = 0 if transfer.size > before else idle + 1
            if idle == TRIES:
                break
            pause(idle)
    raise DeltaError(
        f"{url} cannot be read: {problem}",
        hint=f"{transfer.size} bytes are kept, and the next pull goes on behind them",
    )


def address(url: str) -> str:
    """The address of a channel, without the slash at its end. Raises DeltaError for what is none."""
    try:
        told = urllib3.util.parse_url(url)
    except urllib3.exceptions.LocationParseError:
        told = urllib3.util.Url()
    if told.scheme not in ("http", "https") or not told.host or told.query or told.fragment:
        raise DeltaError(
            f"{url!r} is no address of a channel", hint="give one such as https://host/releases"
        )
    return url.rstrip("/")


def pool_of(ca: Path | None) -> urllib3.PoolManager:
    """Connections that try nothing again by themselves; `ca` has the certificates to trust. Raises DeltaError."""
    if ca is not None and not ca.is_file():
        raise DeltaError(f"{ca} is no file", hint="--ca names a file of certificates")
    return urllib3.PoolManager(
        timeout=TIMEOUT,
        retries=urllib3.Retry(
            total=None, connect=0, read=0, status=0, other=0, redirect=MOST_REDIRECTS
        ),
        ca_certs=str(ca) if ca else None,
    )


def why(error: urllib3.exceptions.HTTPError) -> str:
    """What went wrong on the line, without what urllib3 puts around it."""
    return str(error.__cause__ or getattr(error, "reason", None) or error)


def pause(idle: int) -> None:
    """Wait before another attempt, longer after each in a row that brought nothing."""
    time.sleep(min(8.0, 0.25 * 2**idle))


def _forget(place: Path) -> None:
    for name in (TOLD, PART):
        (place / name).unlink(missing_ok=True)


@dataclass(kw_only=False)
class _Transfer:
    """A file on its way, in as many attempts as it takes."""

    url: str
    place: Path
    most: int
    found: bool = False

    @property
    def part(self) -> Path:
        return self.place / PART

    @property
    def size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def attempt(self, pool: urllib3.PoolManager) -> str | None:
        """Why it is to be tried again, None where all is there or there is nothing. Raises DeltaError for good."""
        start, etag = self._kept()
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": etag}
        try:
            answer = pool.request(
                "GET", self.url, headers=headers, preload_content=False, decode_content=False
            )
            try:
                return self._taken(answer, start)
            finally:
                answer.close()
        except urllib3.exceptions.HTTPError as error:
            return why(error)

    def _kept(self) -> tuple[int, str]:
        """How much is there already, and of what; nothing where it is of another place or of nobody knows what."""
        try:
            told = json.loads((self.place / TOLD).read_text(encoding="utf-8"))
            if told["url"] == self.url and isinstance(told["etag"], str) and told["etag"].isascii():
                return self.size, told["etag"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        _forget(self.place)
        return 0, ""

    def _taken(self, answer: urllib3.BaseHTTPResponse, start: int) -> str | None:
        if answer.status in _GONE:
            _forget(self.place)
            return None
        if answer.status in LATER:
            return f"it answered {answer.status}"
        if answer.status == 416:  # all of it is there, or more than all
            whole = answer.headers.get("Content-Range", "") == f"bytes */{start}"
            self.found = whole
            return None if whole else self._again("it has become shorter")
        if answer.status not in (200, 206):
            raise DeltaError(
                f"{self.url} answers {answer.status}", hint="is it the address of a channel?"
            )
        if answer.status == 200:
            start = self._begun(answer.headers.get("ETag", ""))
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            return self._again("it sent another part than was asked for")
        self._write(answer, start)
        return None

    def _again(self, why: str) -> str:
        _forget(self.place)
        return why

    def _begun(self, etag: str) -> int:
        _forget(self.place)
        if etag.startswith('"'):  # a weak one does not say that bytes are the same
            (self.place / TOLD).write_text(dump({"url": self.url, "etag": etag}), encoding="utf-8")
        return 0

    def _write(self, answer: urllib3.BaseHTTPResponse, start: int) -> None:
        told = answer.headers.get("Content-Length", "0")
        self._expect(start + packet.number(told))
        with self.part.open("ab") as stream:
            for chunk in answer.stream(CHUNK):
                self._expect(stream.tell() + len(chunk))
                stream.write(chunk)
        self.found = True

    def _expect(self, size: int) -> None:
        if size > self.most:
            _forget(self.place)
            raise DeltaError(
                f"{self.url} has more than the {self.most} bytes that a release may have",
                hint="send the package itself to devices where so much of it changes",
            )
