"""The one way from a name that somebody else wrote to a file.

A name in a manifest, in an ONNX file or in an index of weights is text from outside. Taken as a path it can lead
anywhere: up by `..`, to the root, to another drive, along a link. So such a name is first held against rules that need
no file system, and then walked one folder at a time, each opened below the one before it and none of them a link. What
is given away is the open file: between looking and opening nobody can put another in its place.

A second name of the same file (a hard link) is refused only where `alone` asks for it. The contents of a package are
held against their sha256, so a backup by `cp -l` is as good as any copy; but data that a runtime opens by itself, by a
name in another file, must be the package's own.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from effc.errors import EffcError, PackageError

MOST_BYTES = 1024
"""Of a whole name in UTF-8; each part of it has at most 255, as file systems want it."""
MOST_PARTS = 32
HINT = "whoever wrote that name made a mistake or means harm; get an unharmed copy"

_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])[ ]*(\..*)?", re.I)
_NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FILE = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_BELOW = os.open in os.supports_dir_fd
"""Whether this system opens files below an open folder; where not, the walk is by whole paths."""


def word(name: str) -> str:
    """A name as it stands in a message: on one line, in letters that can be printed, and not too long."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= 100 else f"{text[:90]}…"


def shown(name: str) -> str:
    """`word` in quotes, for a name that may be nothing or blank."""
    return repr(name) if name.isprintable() and len(name) <= 90 else f"'{word(name)}'"


def parts(name: str, error: type[EffcError] = PackageError) -> tuple[str, ...]:
    """The folders and the file of a plain relative name. Raises `error` for anything that could lead elsewhere."""
    if why := _wrong(name):
        raise error(f"{shown(name)} is refused as the name of a file: {why}", hint=HINT)
    return tuple(name.split("/"))


def _wrong(name: str) -> str | None:
    if not name:
        return "it is empty"
    if any(unicodedata.category(c) in _NO_TEXT for c in name):
        return "it has characters that are no text"
    if len(name.encode()) > MOST_BYTES:
        return f"it has more than {MOST_BYTES} bytes"
    for mark, word in (("\\", "a backslash"), (":", "a colon")):
        if mark in name:
            return f"it has {word}"
    if name.startswith("/"):
        return "it is absolute"
    pieces = name.split("/")
    if len(pieces) > MOST_PARTS:
        return f"it has more than {MOST_PARTS} parts"
    return next((why for piece in pieces if (why := _wrong_part(piece))), None)


def _wrong_part(part: str) -> str | None:
    if part in ("", ".", ".."):
        return f"{part!r} is no part of a name"
    if len(part.encode()) > 255:
        return "a part of it has more than 255 bytes"
    if part[-1] in ". ":
        return "a part of it ends with a dot or a blank"
    return f"{part!r} is a device on some systems" if _DEVICE.fullmatch(part) else None


def twins(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that are one file where case or the spelling of accents does not count; None where all differ."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if folded in seen:
            return seen[folded], name
        seen[folded] = name
    return None


def inside(root: Path, name: str, error: type[EffcError] = PackageError) -> Path:
    """`root / name`, no link on the way, for whoever must be given a path. Raises `error` for any other name."""
    path = root
    for part in parts(name, error):
        path = path / part
        if os.path.islink(path):
            raise error(f"{shown(name)} is not a plain file: {path} is a link", hint=HINT)
    return path


def opened(
    root: Path, name: str, error: type[EffcError] = PackageError, *, alone: bool = False
) -> BinaryIO:
    """The plain file `name` below `root`, open for reading; with `alone` it has no second name.

    `root` is the caller's, and may be a link itself. Raises `error` with what is wrong in words.
    """
    *folders, last = parts(name, error)
    hint = "compile it again, or get an unharmed copy"
    try:
        file = _walk(root, folders, last)
    except FileNotFoundError as gone:
        raise error(f"{name} is missing", where=str(root), hint=hint) from gone
    except OSError as failure:
        if failure.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR):
            raise error(f"{name} is not a plain file", where=str(root), hint=hint) from failure
        reason = failure.strerror or failure
        raise error(f"{name} cannot be read: {reason}", where=str(root), hint=hint) from failure
    links = os.fstat(file).st_nlink
    if alone and links != 1:
        os.close(file)
        raise error(
            f"{name} has {links} names (hard links), and its bytes can be changed through the others",
            where=str(root),
            hint="copy the directory without links: cp -r",
        )
    return os.fdopen(file, "rb")


def _walk(root: Path, folders: Iterable[str], last: str) -> int:
    """A plain file through folders that are folders. Raises OSError."""
    if not _BELOW:
        return _walk_by_path(root, folders, last)
    place = os.open(root, _FOLDER)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER | _NO_LINK, dir_fd=place)
            os.close(place)
            place = inner
        found = os.stat(last, dir_fd=place, follow_symlinks=False)
        _refuse_special(found, last)  # before it is opened: to open a pipe waits, a device may act
        return _same(os.open(last, _FILE | _NO_LINK, dir_fd=place), found, last)
    finally:
        os.close(place)


def _walk_by_path(root: Path, folders: Iterable[str], last: str) -> int:
    path = root
    for folder in folders:
        path = path / folder
        if path.is_symlink() or not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(path))
    found = os.lstat(path / last)
    _refuse_special(found, last)
    return _same(os.open(path / last, _FILE), found, last)


def _refuse_special(found: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.ELOOP, "not a plain file", name)


def _same(file: int, found: os.stat_result, name: str) -> int:
    """The open file, if it is the one that was looked at."""
    now = os.fstat(file)
    if (now.st_dev, now.st_ino) != (found.st_dev, found.st_ino):
        os.close(file)
        raise OSError(errno.ELOOP, "exchanged while it was opened", name)
    return file


def plain(path: Path, error: type[EffcError]) -> BinaryIO:
    """A file that the user named, open for reading: links are followed, a pipe or a device is not opened."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path} is not a plain file", hint="name a file, not a folder or a device")
        return open(
            path, "rb", opener=lambda name, _: _same(os.open(name, _FILE), found, str(path))
        )
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"{path} cannot be read: {reason}", hint="check the path") from failure


def below(root: Path) -> Iterator[str]:
    """Names of everything below `root` that is not a folder, and of folders deeper than a name can be; links unread."""
    todo = [""]
    while todo:
        prefix = todo.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                name = f"{prefix}{entry.name}"
                if entry.is_dir(follow_symlinks=False) and name.count("/") + 1 < MOST_PARTS:
                    todo.append(f"{name}/")
                else:
                    yield name
