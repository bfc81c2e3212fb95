"""Samples from files: text lines, table columns, arrays, pictures. Read as a stream, drawn by a seed.

A file that cannot be read as what it says it is ends in a CalibrationError that names the place.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effc.errors import CalibrationError

Array = np.ndarray[Any, np.dtype[Any]]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEXTS = (".txt", ".csv", ".tsv", ".npz")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample: text, a picture (uint8 [h, w] or [h, w, c]) or ready arrays; perhaps with its label."""

    text: str | None = None
    text_pair: str | None = None
    pixels: Array | None = None
    arrays: dict[str, Array] | None = None
    label: int | None = None


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
    if not mark or Path(text).exists():
        return Path(text), None
    return Path(path), int(column) if column.isdigit() else column


def read(
    path: Path, *, column: str | int | None = None, samples: int | None = None, seed: int = 0
) -> Iterator[Record]:
    """The samples of a file or folder in their order; with `samples`, that many of them drawn by `seed`.

    Raises CalibrationError where nothing is there, or where it is not what its name says.
    """
    path = Path(path)
    if not path.exists():
        raise CalibrationError(f"there is no calibration file {path}", hint="check the path")
    found = 0
    for record in _draw(_records(path, column), samples, seed):
        found += 1
        yield record
    if not found:
        raise CalibrationError(f"{path} holds no samples")


def _draw(records: Iterator[Record], samples: int | None, seed: int) -> Iterator[Record]:
    """A reservoir sample in file order (Vitter's algorithm R): memory for `samples`, not for the file."""
    if samples is None:
        yield from records
        return
    rng = random.Random(seed)
    kept: list[tuple[int, Record]] = []
    for place, record in enumerate(records):
        if len(kept) < samples:
            kept.append((place, record))
        elif (slot := rng.randrange(place + 1)) < samples:
            kept[slot] = (place, record)
    for _, record in sorted(kept, key=lambda item: item[0]):
        yield record


def _records(path: Path, column: str | int | None) -> Iterator[Record]:
    if path.is_dir():
        yield from _folder(path, column)
    elif path.suffix == ".txt":
        yield from (Record(text=line) for line in _lines(path) if line.strip())
    elif path.suffix in (".csv", ".tsv"):
        yield from _table(path, column)
    elif path.suffix == ".npz":
        yield from _arrays(path)
    else:
        raise CalibrationError(
            f"{path} is of no kind that effc reads",
            hint=f"known: {', '.join(TEXTS)}, a folder of pictures, a folder of idx files",
        )


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                number += 1
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text after line {number}") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error


def _table(path: Path, column: str | int | None) -> Iterator[Record]:
    """Rows of a CSV or TSV. A column by name means that the first row is a header."""
    tabbed = path.suffix == ".tsv"
    rows: Iterator[list[str]] = csv.reader(
        _lines(path),
        delimiter="\t" if tabbed else ",",
        quoting=csv.QUOTE_NONE if tabbed else csv.QUOTE_MINIMAL,
    )
    first = next(rows, None)
    if first is None:
        return
    lowered = [name.strip().lower() for name in first]
    label: int | None = lowered.index("label") if "label" in lowered else None
    if isinstance(column, str):
        if column not in first:
            raise CalibrationError(
                f"{path} has no column {column!r}", hint=f"it has {', '.join(first)}"
            )
        place, rest = first.index(column), rows
    elif label is not None and column is None:
        place, rest = (lowered.index("text") if "text" in lowered else 0), rows
    else:
        place, rest = column or 0, itertools.chain([first], rows)
        label = None
    for number, row in enumerate(rest, 1):
        if not row:
            continue
        if place >= len(row):
            raise CalibrationError(f"{path} row {number} has {len(row)} columns, not {place + 1}")
        try:
            yield Record(text=row[place], label=int(row[label]) if label is not None else None)
        except (ValueError, IndexError) as error:
            raise CalibrationError(
                f"{path} row {number}: the label is not a whole number"
            ) from error


def _arrays(path: Path) -> Iterator[Record]:
    """Samples of an .npz: every array has them along its first axis; `label` is the label."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        raise CalibrationError(f"{path} cannot be read as arrays: {error}") from error
    sizes = {name: array.shape[0] if array.ndim else None for name, array in arrays.items()}
    if len(set(sizes.values())) > 1 or None in sizes.values():
        raise CalibrationError(f"{path}: the arrays differ in their number of samples: {sizes}")
    labels = arrays.pop("label", None)
    for i in range(next(iter(sizes.values()), None) or 0):
        label = int(labels[i]) if labels is not None else None
        yield Record(arrays={name: array[i] for name, array in arrays.items()}, label=label)


def _folder(path: Path, column: str | int | None) -> Iterator[Record]:
    images = sorted(path.glob("*images*idx3-ubyte*"))
    if images:
        yield from _idx_pair(images[0])
        return
    pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
    if pictures:
        yield from _pictures(path, pictures)
        return
    files = sorted(
        p for p in path.iterdir() if p.suffix in TEXTS and not p.name.startswith("README")
    )
    if len(files) != 1:
        raise CalibrationError(
            f"{path} holds {len(files)} files that could be samples",
            hint="name one of them, or give a folder of pictures",
        )
    yield from _records(files[0], column)


def _idx_pair(images: Path) -> Iterator[Record]:
    pixels = _idx(images, dimensions=3)
    labels_path = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
    labels = _idx(labels_path, dimensions=1) if labels_path.exists() else None
    if labels is not None and len(labels) != len(pixels):
        raise CalibrationError(f"{images} holds {len(pixels)} pictures but {len(labels)} labels")
    for i, picture in enumerate(pixels):
        yield Record(pixels=picture, label=int(labels[i]) if labels is not None else None)


def _idx(path: Path, dimensions: int) -> Array:
    """An idx file of bytes, plain or gzipped (LeCun's format: magic, sizes, data)."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes([0, 0, 8, dimensions]):
        raise CalibrationError(f"{path} is not an idx file of bytes with {dimensions} dimensions")
    sizes = struct.unpack(f">{dimensions}I", content[4:head])
    if len(content) != head + int(np.prod(sizes, dtype=np.int64)):
        raise CalibrationError(f"{path} is cut short or too long for {sizes}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(sizes)


def _pictures(root: Path, files: Iterable[Path]) -> Iterator[Record]:
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("pictures need Pillow", hint="pip install pillow") from error
    classes = sorted(p.name for p in root.iterdir() if p.is_dir())
    for file in files:
        try:
            with Image.open(file) as picture:
                pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
        except Exception as error:
            raise CalibrationError(f"{file} cannot be read as a picture: {error}") from error
        top = file.relative_to(root).parts[0]
        yield Record(pixels=pixels, label=classes.index(top) if top in classes else None)


def digest(path: Path) -> dict[str, Any]:
    """Name, number of bytes and sha256 of a file; for a folder, over its files by name."""
    path = Path(path)
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
