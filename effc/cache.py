"""Finished work by the sha256 of everything that it was made from, so that a killed compile goes on where it was.

    ROOT/entries/ab/ab12…/   entry.json (sha256 of the others), value.json, files
    ROOT/tmp/                entries that are being written

An entry is written aside and renamed into place, so it is whole or not there. What does not match its sha256 counts as
not there. Any number of compiles may share a cache; when it grows over its size, what was not used for longest goes.
The cache is a help and never a condition: where it cannot be read or written a compile does the work itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from effc import alone, many, scratch
from effc.errors import UsageError
from effc.sizes import parse_bytes

try:
    import fcntl
except ImportError:  # pragma: no cover - a system without flock: two compiles may do the same work
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("effc")

LIMIT_BYTES = 10_000_000_000
OFF = ("", "0", "off", "no", "none")
_ENTRY, _VALUE = "entry.json", "value.json"
_PUT, _GONE = "entry-", "gone-"
"""How directories for entries on their way in and out are called."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished piece of work: a plain value, and files by name in `directory`."""

    value: Any
    directory: Path
    files: tuple[str, ...]

    def copy_to(self, place: Path) -> bool:
        """Copy the files into a directory; False, and nothing left, where one has gone meanwhile."""
        try:
            place.mkdir(parents=True, exist_ok=True)
            for name in self.files:
                shutil.copyfile(self.directory / name, place / name)
        except FileNotFoundError:
            for name in self.files:
                (place / name).unlink(missing_ok=True)
            return False
        return True


class Cache:
    """Entries below `root`, no more than `limit_bytes` of them; with root None nothing is kept."""

    def __init__(self, root: Path | None, limit_bytes: int = LIMIT_BYTES) -> None:
        self.root, self.limit = root, limit_bytes

    def get(self, key: str) -> Entry | None:
        """What was stored under a key, checked against its sha256; None where there is nothing whole.

        Of several processes in step all have it or none.
        """
        found = self._get(key)
        return found if all(many.gathered(found is not None)) else None

    def _get(self, key: str) -> Entry | None:
        if self.root is None:
            return None
        place = self._place(key)
        if not place.is_dir():
            return None
        try:
            digests = _read_entry(place)
            for name, expected in digests.items():
                if sha256(place / name) != expected:
                    raise ValueError(f"{name} differs from its sha256")
            value = json.loads((place / _VALUE).read_text(encoding="utf-8"))
            with contextlib.suppress(OSError):
                os.utime(place / _ENTRY)
        except (OSError, ValueError) as error:
            log.warning("cache entry %s is not whole and is made anew: %s", place, error)
            self.forget(key)
            return None
        return Entry(
            value=value, directory=place, files=tuple(n for n in sorted(digests) if n != _VALUE)
        )

    def put(self, key: str, value: Any, files: Mapping[str, Path | bytes] | None = None) -> None:
        """Store a value and files, or copies of them, under a key. What cannot be stored is not; the log says so."""
        if self.root is None:
            return
        try:
            place = self._place(key)
            (self.root / "tmp").mkdir(parents=True, exist_ok=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            with scratch.held(self.root / "tmp", _PUT) as stage:
                made = stage / "entry"
                made.mkdir()
                (made / _VALUE).write_text(json.dumps(value, sort_keys=True), encoding="utf-8")
                for name, given in (files or {}).items():
                    if isinstance(given, bytes):
                        (made / name).write_bytes(given)
                    else:
                        shutil.copyfile(given, made / name)
                digests = {file.name: sha256(file) for file in sorted(made.iterdir())}
                (made / _ENTRY).write_text(json.dumps(digests, sort_keys=True), encoding="utf-8")
                for file in made.iterdir():
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
                if not place.exists():  # else another compile was first
                    os.rename(made, place)
            self._prune()
        except OSError as error:
            log.warning("the cache %s takes nothing: %s", self.root, error.strerror or error)

    @contextmanager
    def alone(self, key: str | None) -> Iterator[None]:
        """A block in which nobody else makes what a key stands for: whoever waited for it finds that done."""
        descriptor = None
        is_one = many.count() == 1  # those in step make it together
        if self.root is not None and key is not None and fcntl is not None and is_one:
            with contextlib.suppress(OSError):
                descriptor = _locked(self.root / "locks" / key)
        try:
            yield
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self.root / "locks" / key)  # type: ignore[operator]
                os.close(descriptor)

    def forget(self, key: str) -> None:
        """Drop an entry, at once for every reader."""
        if self.root is not None:
            _remove(self.root, self._place(key))

    def sweep(self) -> None:
        """Remove what killed compiles were writing."""
        if self.root is not None:
            for prefix in (_PUT, _GONE):
                scratch.sweep(self.root / "tmp", prefix)

    def _place(self, key: str) -> Path:
        assert self.root is not None
        return self.root / "entries" / key[:2] / key

    def _prune(self) -> None:
        """Drop what was not used for longest until the rest fits; one compile at a time does it."""
        assert self.root is not None
        with _only_one(self.root / "lock") as mine:
            if not mine:
                return
            entries = []
            for place in (self.root / "entries").glob("??/*"):
                with contextlib.suppress(OSError):
                    size = sum(file.stat().st_size for file in place.iterdir())
                    entries.append(((place / _ENTRY).stat().st_mtime, size, place))
            for place in (self.root / "train").glob("*"):  # trainings that nobody went on with
                with contextlib.suppress(OSError):
                    size = sum(file.stat().st_size for file in place.iterdir())
                    entries.append((place.stat().st_mtime, size, place))
            total = sum(size for _, size, _ in entries)
            for _, size, place in sorted(entries):
                if total <= self.limit:
                    break
                _remove(self.root, place)
                total -= size


def default() -> Cache:
    """The user's cache: `$EFFC_CACHE`, else `effc` in the system's place for caches; `EFFC_CACHE=off` has none.

    `EFFC_CACHE_MAX` bounds it, in bytes or as `5GB`. Raises UsageError where that is no size.
    """
    given = os.environ.get("EFFC_CACHE")
    if given is not None and given.strip().lower() in OFF:
        return Cache(None)
    limit = os.environ.get("EFFC_CACHE_MAX")
    try:
        limit_bytes = parse_bytes(limit) if limit else LIMIT_BYTES
    except ValueError as error:
        raise UsageError(f"EFFC_CACHE_MAX: {error}", hint="EFFC_CACHE_MAX=5GB") from error
    if given:
        return Cache(Path(os.path.abspath(given)), limit_bytes)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Cache(Path(home) / "effc" / "work", limit_bytes)


def key_of(stage: str, **parts: Any) -> str:
    """The key of a piece of work: sha256 over its name, effc's own code and all that it was made from."""
    content = {"stage": stage, "code": code_digest(), **parts}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_digest() -> str:
    """sha256 over the source of effc: another effc makes its own entries."""
    total = hashlib.sha256()
    for name in ("effc", "effc.backends", "effc.calib", "effc.passes"):
        spec = importlib.util.find_spec(name)
        root = Path(spec.origin if spec and spec.origin else "").parent
        pattern = "**/*.py" if name == "effc" else "*.py"
        for file in sorted(root.glob(pattern)):
            total.update(file.relative_to(root).as_posix().encode())
            total.update(file.read_bytes())
    return total.hexdigest()


def check(root: Path) -> list[str]:
    """What is wrong in a cache that nobody is writing to, in words; an empty list where nothing is."""
    found = []
    for place in sorted((root / "entries").glob("??/*")):
        try:
            digests = _read_entry(place)
            names = {file.name for file in place.iterdir()} - {_ENTRY}
            found += [
                f"{place.name}: {name} is not listed" for name in sorted(names - set(digests))
            ]
            for name, expected in digests.items():
                if sha256(place / name) != expected:
                    found.append(f"{place.name}: {name} differs from its sha256")
        except (OSError, ValueError) as error:
            found.append(f"{place.name}: {error}")
    if (root / "tmp").is_dir():
        found += [f"tmp/{file.name} was left" for file in sorted((root / "tmp").iterdir())]
    return found


def _read_entry(place: Path) -> dict[str, str]:
    content = json.loads((place / _ENTRY).read_text(encoding="utf-8"))
    plain = isinstance(content, dict) and _VALUE in content
    if not plain or any("/" in name or name.startswith(".") for name in content):
        raise ValueError(f"{_ENTRY} is no list of files")
    return {str(name): str(digest) for name, digest in content.items()}


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remove(root: Path, place: Path) -> None:
    """Take an entry out of sight by one rename, then away."""
    with contextlib.suppress(OSError):
        (root / "tmp").mkdir(parents=True, exist_ok=True)
        with scratch.held(root / "tmp", _GONE) as stage:
            os.rename(place, stage / "entry")


def _locked(file: Path) -> int:
    """The open file, held by this process alone; one that its holder removed meanwhile is made anew."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not scratch.take(descriptor):
                with alone.waiting():
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            if file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def _only_one(lock: Path) -> Iterator[bool]:
    """Whether this is the only process here at the moment."""
    with lock.open("a") as stream:
        yield scratch.take(stream.fileno())
