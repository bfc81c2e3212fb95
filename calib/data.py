"""Samples from files: text lines, table columns, arrays, pictures. Read as a stream, drawn by a seed.

A draw counts the samples first, which reads text once and of arrays and pictures only what says how many there are.
Then each sample in its order is drawn or left (Knuth, The Art of Computer Programming 3.4.2, algorithm S): no more
than one is in memory, and a picture that is left is not opened.

A file that cannot be read as what it says it is ends in a CalibrationError that names the place.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import lzma
import math
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

import numpy as np

from effc import paths
from effc.errors import CalibrationError

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEXTS = (".txt", ".csv", ".tsv", ".npz")
IMAGES = "images-idx3-ubyte"
"""What the name of an idx file of pictures has in it; its labels lie beside it."""

LARGEST = 1 << 28
"""Bytes of a picture, above which it is not read: its header is taken for damaged, or for a trap."""
LONGEST_LINE = 1 << 24
"""Bytes of a line of text, above which the file is taken for none."""
SMALL, MOST_RATIO = 1 << 22, 200
"""What is packed may unpack to `SMALL` bytes, and above that to so many times its size: data do, traps do not."""
DAMAGED = "the file is damaged or cut short; get a whole copy"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample: text, a picture (uint8 [h, w] or [h, w, c]) or ready arrays, perhaps with its label; or of a task."""

    text: str | None = None
    text_pair: str | None = None
    pixels: Array | None = None
    arrays: dict[str, Array] | None = None
    label: int | None = None
    item: Any = None
    """A sample of a task, as its own reader made it."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Inputs of one run, with a weight and a tag (a timestep, a domain) for samplers that care."""

    inputs: dict[str, Array]
    weight: float = 1.0
    tag: str | int | None = None


def parse(spec: str | Path) -> tuple[Path, str | int | None]:
    """`FILE` or `FILE#column`, the column by name or number."""
    text = str(spec)
    path, mark, column = text.rpartition("#")
    if not mark or not path or not column or "/" in column or os.path.exists(text):
        return Path(text), None
    is_number = column.isascii() and column.isdecimal() and len(column) < 10
    return Path(path), int(column) if is_number else column


def read(
    path: Path,
    *,
    column: str | int | None = None,
    samples: int | None = None,
    seed: int = 0,
    labelled: bool = False,
    left: bool = False,
) -> Iterator[Record]:
    """The samples of a file or folder in their order; with `samples`, that many of them drawn by `seed`.

    With `left` those that the same draw leaves, of which there may be none. With `labelled` every sample has its
    label; a table without a header is text, label then. Raises CalibrationError where nothing is there, or where it
    is not what its name says. Files are read as streams: what is at fault far down is met, and said, when it is
    reached.
    """
    path = Path(path)
    if samples is not None and samples < 1:
        raise CalibrationError(f"{samples} samples cannot be drawn", hint="ask for one or more")
    _refuse_missing(path)
    found = 0
    try:
        for record in _records(path, column, labelled, _Draw(samples, seed, left)):
            if labelled and record.label is None:
                raise CalibrationError(
                    f"{path} has samples without a label",
                    hint="a table has a column `label`, an .npz an array `label`, a folder a folder for each class",
                )
            found += 1
            yield record
    except OSError as error:
        raise CalibrationError(
            f"{path} cannot be read: {error.strerror or error}", hint=DAMAGED
        ) from error
    if not found and not left:
        raise CalibrationError(
            f"{path} holds no samples", hint="give a file with one sample or more"
        )


def drawn(items: Sequence[T], samples: int | None, seed: int = 0, *, left: bool = False) -> list[T]:
    """So many of the items, in their order, or those that the same draw leaves; see `read`."""
    return list(_Draw(samples, seed, left)(items, lambda: len(items)))


def _refuse_missing(path: Path) -> None:
    if not os.path.exists(path):
        raise CalibrationError(f"there is no calibration file {path}", hint="check the path")


@dataclass(frozen=True)
class _Draw:
    """Which samples are taken: all, `samples` by a seed, or those that such a draw leaves."""

    samples: int | None
    seed: int
    left: bool

    def __call__(self, items: Iterable[T], count: Callable[[], int]) -> Iterator[T]:
        """Those of `items` that are taken, in their order; `count` is asked only where there is a draw."""
        if self.samples is None:
            yield from items
            return
        draw, size = random.Random(self.seed), count()
        wanted = self.samples
        for item, rest in zip(items, range(size, 0, -1), strict=False):
            drawn = draw.randrange(rest) < wanted
            wanted -= drawn
            if drawn != self.left:
                yield item

    def stream(self, records: Callable[[], Iterator[Record]]) -> Iterator[Record]:
        """Those of a stream that has to be read to be counted."""
        return self(records(), lambda: sum(1 for _ in records()))


def _kind(path: Path) -> str:
    """What the name says that a file is; `.gz` at its end says only how it is stored."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _records(path: Path, column: str | int | None, labelled: bool, draw: _Draw) -> Iterator[Record]:
    kind = _kind(path)
    if path.is_dir():
        yield from _folder(path, column, labelled, draw)
        return
    if kind in (".csv", ".tsv"):
        yield from draw.stream(lambda: _table(path, column, labelled))
        return
    _refuse_column(path, column)
    if kind == ".txt":
        yield from draw.stream(lambda: _texts(path))
    elif kind == ".npz":
        yield from _arrays(path, draw)
    elif IMAGES in path.name:
        yield from _idx_pair(path, draw)
    else:
        raise CalibrationError(
            f"{path} is of no kind that effc reads",
            hint=f"known: {', '.join(TEXTS)}, text and tables as .gz too, a folder of pictures, a folder of idx files",
        )


def _refuse_column(path: Path, column: str | int | None) -> None:
    if column is not None:
        raise CalibrationError(
            f"{path} has no columns, so none is called {column!r}",
            hint="leave the column out, or give a table",
        )


def _texts(path: Path) -> Iterator[Record]:
    for line in lines(path):
        if line.strip():
            yield Record(text=line.rstrip("\r\n"))


def lines(path: Path) -> Iterator[str]:
    """Lines of a text file, zipped or not, with their ends.

    Decoded one by one, so that a line that is not UTF-8 can be named.
    """
    try:
        with _unzipped(path) as stream:
            for number in itertools.count(1):
                line = stream.readline(LONGEST_LINE + 1)
                if not line:
                    return
                if len(line) > LONGEST_LINE:
                    raise CalibrationError(
                        f"{path} line {number} has more than {LONGEST_LINE} bytes",
                        hint="is it text? give one sample a line",
                    )
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise CalibrationError(
                        f"{path} line {number} is not UTF-8 text", hint="save the file as UTF-8"
                    ) from error
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise CalibrationError(f"{path} cannot be read: {why}", hint=DAMAGED) from error


def _table(path: Path, column: str | int | None, labelled: bool) -> Iterator[Record]:
    """Rows of a CSV or TSV.

    The first row is a header where a column is asked for by name, or where none is asked for and it names a `label`
    or a `text`; the text is then that column, or the first that is not the label.
    """
    table = rows(path)
    _, first = next(table, (0, []))
    if not first:
        return
    names = [name.strip().lower() for name in first]
    label: int | None = names.index("label") if "label" in names else None
    if isinstance(column, str):
        if column not in first:
            raise CalibrationError(
                f"{path} has no column {column!r}", hint=f"it has {', '.join(first)}"
            )
        place = first.index(column)
        label = None if label == place else label
    elif column is None and "text" in names:
        place = names.index("text")
    elif column is None and label is not None and len(names) > 1:
        place = 1 if label == 0 else 0
    else:
        place, label = column or 0, 1 if labelled else None
        table = itertools.chain([(1, first)], table)
    for number, row in table:
        if max(place, label or 0) >= len(row):
            want = max(place, label or 0) + 1
            raise CalibrationError(
                f"{path} line {number} has {len(row)} columns, not {want}",
                hint="every row needs them; is a quote or a separator missing?",
            )
        try:
            yield Record(text=row[place], label=int(row[label]) if label is not None else None)
        except ValueError as error:
            raise CalibrationError(
                f"{path} line {number}: the label is not a whole number",
                hint="labels are numbers from 0, as the model counts its classes",
            ) from error


def rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a table that are not empty, with the line that each ends on. Quotes mean something in a CSV only."""
    if _kind(path) == ".tsv":
        reader = csv.reader(lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines(path), strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise CalibrationError(
            f"{path} line {reader.line_num} is no table row: {error}",
            hint="is a quote open? a .tsv knows no quotes",
        ) from error


def _arrays(path: Path, draw: _Draw) -> Iterator[Record]:
    """Samples of an .npz: every array has them along its first axis; whole numbers called `label` are the labels.

    Arrays are read a sample at a time, so that memory does not grow with the file.
    """
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(paths.plain(path, CalibrationError))
            archive = stack.enter_context(zipfile.ZipFile(stream))
            unpacked = sum(info.file_size for info in archive.infolist())
            if unpacked > max(SMALL, MOST_RATIO * path.stat().st_size):
                raise CalibrationError(
                    f"{path} says it unpacks to {unpacked} bytes, more than {MOST_RATIO} times its size",
                    hint="this is a trap, or nearly all of it is the same; save it with np.savez",
                )
            arrays = {
                info.filename.removesuffix(".npy"): _Stored(
                    path, info, stack.enter_context(archive.open(info))
                )
                for info in archive.infolist()
            }
            sizes = {name: a.shape[0] if a.shape else None for name, a in arrays.items()}
            if len(set(sizes.values())) > 1 or None in sizes.values():
                raise CalibrationError(
                    f"{path}: the arrays differ in their number of samples: {sizes}",
                    hint="the first axis of every array counts the samples",
                )
            label = arrays.get("label")
            if label is not None and (len(label.shape) > 1 or label.dtype.kind not in "iub"):
                raise CalibrationError(
                    f"{path}: `label` is not one whole number a sample",
                    hint="label: integers [samples]",
                )
            size = next(iter(sizes.values()), 0) or 0
            if size > unpacked:
                raise CalibrationError(f"{path} claims {size} samples of nothing", hint=DAMAGED)
            for sample in draw(zip(*arrays.values(), strict=True), lambda: size):
                found = dict(zip(arrays, sample, strict=True))
                mark = found.pop("label", None)
                yield Record(arrays=found, label=int(mark) if mark is not None else None)
    except _BAD_ZIP as error:
        raise CalibrationError(f"{path} cannot be read as arrays: {error}", hint=DAMAGED) from error


_BAD_ZIP = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError,
    RuntimeError, ValueError,
)  # fmt: skip
"""What zipfile raises on archives that are damaged, encrypted or of another kind."""


class _Stored:
    """An array in an .npz, as its samples. One stored as Python objects would run code, and is refused."""

    def __init__(self, path: Path, info: zipfile.ZipInfo, stream: IO[bytes]) -> None:
        self.what = f"{path}: {info.filename.removesuffix('.npy')!r}"
        self.stream = stream
        try:
            first = np.lib.format.read_magic(stream) == (1, 0)
            header = (
                np.lib.format.read_array_header_1_0
                if first
                else np.lib.format.read_array_header_2_0
            )
            self.shape, self.by_column, self.dtype = header(stream)
        except Exception as error:  # of the little language that a header is written in
            raise CalibrationError(f"{self.what} is no array: {error}", hint=DAMAGED) from error
        if self.dtype.kind not in "fiub":
            kind = "Python objects" if self.dtype.hasobject else str(self.dtype)
            raise CalibrationError(
                f"{self.what} holds {kind}, not numbers", hint="save arrays of numbers"
            )
        size = math.prod(map(int, self.shape)) * self.dtype.itemsize
        if min(self.shape, default=1) < 0 or not size <= info.file_size:
            raise CalibrationError(f"{self.what} is cut short", hint=DAMAGED)

    def __iter__(self) -> Iterator[Array]:
        if self.by_column and len(self.shape) > 1:  # its samples lie interleaved
            yield from self._read(self.shape).reshape(self.shape, order="F")
            return
        for _ in range(self.shape[0]):
            yield self._read(self.shape[1:]).reshape(self.shape[1:])

    def _read(self, shape: tuple[int, ...]) -> Array:
        size = math.prod(shape) * self.dtype.itemsize
        content = self.stream.read(size)
        if len(content) != size:
            raise CalibrationError(f"{self.what} is cut short", hint=DAMAGED)
        return np.frombuffer(bytearray(content), self.dtype)


def _folder(path: Path, column: str | int | None, labelled: bool, draw: _Draw) -> Iterator[Record]:
    images = sorted(p for p in path.iterdir() if IMAGES in p.name)
    pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
    if images or pictures:
        _refuse_column(path, column)
    if images:
        _only(path, images)
        yield from _idx_pair(images[0], draw)
        return
    if pictures:
        yield from _pictures(path, pictures, draw)
        return
    files = sorted(
        p
        for p in path.iterdir()
        if _kind(p) in TEXTS
        and p.is_file()
        and not p.name.upper().startswith(("README", "LICENSE"))
    )
    _only(path, files)
    yield from _records(files[0], column, labelled, draw)


def _only(path: Path, files: Sequence[Path]) -> None:
    if len(files) != 1:
        named = f": {', '.join(p.name for p in files[:5])}" if files else ""
        raise CalibrationError(
            f"{path} holds {len(files)} files that could be samples{named}",
            hint="name one of them, or give a folder of pictures",
        )


def _idx_pair(images: Path, draw: _Draw) -> Iterator[Record]:
    labels = images.with_name(images.name.replace(IMAGES, "labels-idx1-ubyte"))
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_unzipped(images))
        count, height, width = _idx_head(images, stream, 3)
        if not 0 < height * width <= LARGEST:
            raise CalibrationError(f"{images} claims pictures of {height} × {width}", hint=DAMAGED)
        marks = stack.enter_context(_unzipped(labels)) if labels.exists() else None
        if marks is not None and (found := _idx_head(labels, marks, 1)[0]) != count:
            raise CalibrationError(
                f"{images} holds {count} pictures but {found} labels",
                hint="are they of one set? move the labels away where they are not needed",
            )
        try:
            every = (
                Record(
                    pixels=_bytes(images, stream, height * width).reshape(height, width),
                    label=int(_bytes(labels, marks, 1)[0]) if marks is not None else None,
                )
                for _ in range(count)
            )
            yield from draw(every, lambda: count)
            if stream.read(1) or (marks is not None and marks.read(1)):
                raise CalibrationError(
                    f"{images} or its labels go on after {count} samples", hint=DAMAGED
                )
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CalibrationError(
                f"{images} or its labels are damaged: {error}", hint=DAMAGED
            ) from error


def _unzipped(path: Path) -> BinaryIO:
    stream = paths.plain(path, CalibrationError)
    if path.suffix != ".gz":
        return stream
    return io.BufferedReader(_Unpacked(path, stream))


class _Unpacked(io.RawIOBase):
    """What a gzip file holds, as long as that is no more than real data of its size could be."""

    def __init__(self, path: Path, packed: BinaryIO) -> None:
        self.path, self.packed = path, packed
        self.inner = gzip.GzipFile(fileobj=packed)
        self.most = max(SMALL, MOST_RATIO * os.fstat(packed.fileno()).st_size)
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        taken = self.inner.readinto(buffer)
        self.count += taken
        if self.count > self.most:
            raise CalibrationError(
                f"{self.path} unpacks to more than {MOST_RATIO} times its size",
                hint="this is a trap, or nearly all of it is the same; unpack it yourself",
            )
        return taken

    def close(self) -> None:
        self.packed.close()
        super().close()


def _idx_head(path: Path, stream: IO[bytes], dimensions: int) -> tuple[int, ...]:
    """The sizes in an idx file of bytes (LeCun's format: magic, sizes, data)."""
    try:
        head = stream.read(4 + 4 * dimensions)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CalibrationError(f"{path} cannot be read: {error}", hint=DAMAGED) from error
    if len(head) != 4 + 4 * dimensions or head[:4] != bytes([0, 0, 8, dimensions]):
        raise CalibrationError(
            f"{path} is not an idx file of bytes with {dimensions} dimensions",
            hint="give the file as its makers publish it, as .gz or unpacked",
        )
    return struct.unpack(f">{dimensions}I", head[4:])


def _bytes(path: Path, stream: IO[bytes], size: int) -> Array:
    content = stream.read(size)
    if len(content) != size:
        raise CalibrationError(f"{path} is cut short", hint=DAMAGED)
    return np.frombuffer(bytearray(content), np.uint8)


def _pictures(root: Path, files: Sequence[Path], draw: _Draw) -> Iterator[Record]:
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("pictures need Pillow", hint="pip install pillow") from error
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    for file in draw(files, lambda: len(files)):
        try:
            with paths.plain(file, CalibrationError) as stream, Image.open(stream) as picture:
                if not 0 < 3 * math.prod(picture.size) <= LARGEST:
                    raise CalibrationError(
                        f"{file} says it has {picture.width} × {picture.height} pixels",
                        hint="take it out, or make it smaller",
                    )
                pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(
                f"{file} cannot be read as a picture: {error}", hint="repair it or take it out"
            ) from error
        top = file.relative_to(root).parts[0]
        yield Record(pixels=pixels, label=classes.index(top) if top in classes else None)


def digest(path: Path) -> dict[str, Any]:
    """Name, number of bytes and sha256 of a file; for a folder, over its files by name."""
    path = Path(path)
    _refuse_missing(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if len(files) == 1 and path.is_file():
        with path.open("rb") as stream:
            return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha(stream)}
    total = hashlib.sha256()
    for file in files:
        total.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            total.update(bytes.fromhex(_sha(stream)))
    return {
        "name": path.name,
        "bytes": sum(f.stat().st_size for f in files),
        "sha256": total.hexdigest(),
    }


def _sha(stream: Any) -> str:
    return hashlib.file_digest(stream, "sha256").hexdigest()
