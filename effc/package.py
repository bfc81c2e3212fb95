"""The output directory: engines, what they need, and a manifest that is written last.

Everything is staged beside its place and exchanged by one rename, so that an interrupted or failed run leaves the old
directory untouched and nothing that looks finished. A directory that is not ours is never replaced.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from effc.backends import TARGETS
from effc.backends.base import Port
from effc.errors import PackageError

SCHEMA = 1
MANIFEST = "manifest.json"
UNHASHED = ("bench.json", "local.json", "report.json", "report.txt", "timings.json")
"""Files that hold measured times or this machine's paths, and differ from run to run."""
_STAGE = ".effc-"
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
MOST_JSON_BYTES = 16 << 20
MOST_JSON_DEPTH = 64


@dataclass(frozen=True, kw_only=True)
class FloatSite:
    """A quantised place that does not run in integers, the kernel that runs it, and why."""

    name: str
    op: str
    kernel: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PassEntry:
    """A pass that changed something for a target; `nodes` and `bytes` are before and after."""

    name: str
    target: str
    options: dict[str, Any]
    effect: str
    sites: int
    nodes: tuple[int, int]
    bytes: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine of a package: where it is, what goes in and comes out, and what of it runs in integers."""

    role: str
    target: str
    path: str
    sha256: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opset: int
    requires: tuple[str, ...] = ()
    int8_sites: int = 0
    total_sites: int = 0
    float_sites: tuple[FloatSite, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a package holds. `unhashed` files may differ between two equal compiles; all others may not."""

    schema: int = SCHEMA
    kind: str
    engines: Annotated[tuple[EngineEntry, ...], Field(min_length=1)]
    links: tuple[dict[str, Any], ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    unhashed: tuple[str, ...] = ()
    source: dict[str, str] = field(default_factory=dict)
    graph_digest: str = ""
    data: dict[str, Any] | None = None
    passes: tuple[PassEntry, ...] = ()
    origins: str = "origins.json"
    decisions: str = "decisions.json"
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Everything that may lie in the package."""
        return {*self.files, *self.unhashed, MANIFEST}

    def model_bytes(self, root: Path, engine: EngineEntry | None = None) -> int:
        """Bytes of an engine, the first where none is given, and the data beside it."""
        path = (engine or self.engines[0]).path
        try:
            return sum(
                inside(root, name).stat().st_size
                for name in dict.fromkeys((path, *self.files))
                if name in (path, f"{path}.data")
            )
        except OSError as error:
            raise PackageError(
                f"{error.filename} is in the manifest and cannot be read: {error.strerror}",
                hint="compile it again, or get an unharmed copy",
            ) from error


def dump(value: Any) -> str:
    """JSON as it stands in every package: sorted, UTF-8, one newline at the end."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not plain JSON")


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_output(out: Path) -> None:
    """Refuse, before any work, a place that cannot become a package. Raises PackageError."""
    try:
        _check_output(out)
    except OSError as error:
        raise PackageError(
            f"{out} cannot be written: {error.strerror}", hint="choose another -o"
        ) from error


def _check_output(out: Path) -> None:
    _check_replaceable(out)
    here = Path.cwd().resolve()
    if out.resolve() in (
        here,
        *here.parents,
    ):  # whoever stands there would stand in a folder that is gone
        raise PackageError(
            f"{out} is, or holds, the folder that this runs in, and it is replaced as a whole",
            hint="name a folder inside it, such as -o OUT",
        )
    parent = out.resolve().parent
    place = parent
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK) or _is_read_only(place):
        raise PackageError(f"{place} cannot be written", hint="choose another -o")


def _check_replaceable(out: Path) -> None:
    """Refuse a place with anything in it that effc did not write there."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise PackageError(f"{out} is not a directory", hint="choose another -o")
    if not out.exists() or not any(out.iterdir()):
        return
    if os.path.lexists(out / MANIFEST):
        try:
            names = read(out).names
        except PackageError as error:
            raise PackageError(
                f"{out} is not replaced: {error.what}",
                hint="choose another -o, or remove it yourself",
            ) from error
        strange = [name for name in _files(out) if name not in names]
    else:
        strange = sorted(p.name for p in out.iterdir())
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise PackageError(
            f"{out} holds files that effc did not write: {', '.join(strange[:3])}{more}",
            hint="choose another -o, or move them elsewhere",
        )


def _files(out: Path) -> list[str]:
    """Names of everything below `out` that is not a directory of its own."""
    found = (p for p in out.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(p.relative_to(out).as_posix() for p in found)


def _is_read_only(place: Path) -> bool:
    try:
        with tempfile.TemporaryDirectory(prefix=_STAGE, dir=place):
            return False
    except OSError:
        return True


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory to fill that becomes `out` when the block ends well, and vanishes when it does not."""
    out = Path(os.path.abspath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f"{_STAGE}{out.name[:32]}-", dir=out.parent))
        os.chmod(stage, 0o755)
    except OSError as error:
        raise PackageError(
            f"{out} cannot be written: {error.strerror}", hint="choose another -o"
        ) from error
    try:
        yield stage
        if not (stage / MANIFEST).is_file():
            raise PackageError("internal: a package was staged without its manifest")
        _sync(stage)
        _check_replaceable(
            out
        )  # again: a compile is long, and what was put there meanwhile is not ours
        _exchange(stage, out)
    except OSError as error:
        if not _is_about(error, out):
            raise
        if error.errno in _NO_ROOM:
            raise PackageError(
                f"no room for {out}: {error.strerror}",
                hint="free some disk space, the old output is untouched",
            ) from error
        place = error.filename or out
        raise PackageError(f"{place}: {error.strerror or error}", where=f"writing {out}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _is_about(error: OSError, out: Path) -> bool:
    """Whether an error comes from writing `out`, and not from a file that was read meanwhile."""
    if not isinstance(error.filename, str | bytes):
        cut_short = error.errno is None and "requested and" in str(error)  # numpy, on a full disk
        return cut_short or error.errno in (*_NO_ROOM, errno.EROFS)
    place = Path(os.path.abspath(os.fsdecode(error.filename)))
    if not place.is_relative_to(out.parent):
        return False
    below = place.relative_to(out.parent).parts
    return not below or below[0] == out.name or below[0].startswith(_STAGE)


def _sync(directory: Path) -> None:
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _exchange(stage: Path, out: Path) -> None:
    """One rename: into an empty place, or swapped with the old package, which then is `stage` and gets removed."""
    if not out.exists():
        os.rename(stage, out)
        return
    if _swap(stage, out):
        return
    old = Path(tempfile.mkdtemp(prefix=f"{_STAGE}{out.name[:32]}-old-", dir=out.parent))
    os.rename(out, old / "package")
    try:
        os.rename(stage, out)
    except OSError:
        os.rename(old / "package", out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _swap(a: Path, b: Path) -> bool:
    """Linux renameat2 with RENAME_EXCHANGE; False where the system has none."""
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    at_cwd, exchange = -100, 2
    return bool(function(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0)


def copy_files(source: Path, names: Sequence[str], stage: Path) -> None:
    """Copy named files of a model directory; contents only, no links, no permissions."""
    for name in names:
        target = inside(stage, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)


def inside(root: Path, name: str) -> Path:
    """`root / name` for a plain relative name. Raises PackageError for anything that could lead elsewhere."""
    pure = PurePosixPath(name)
    bad = pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or ":" in name
    if bad or not pure.parts:
        raise PackageError(f"{name!r} is not a file name inside a package")
    path = root.joinpath(*pure.parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise PackageError(f"{name!r} leads out of the package")
    return path


def write_manifest(stage: Path, manifest: Mapping[str, Any]) -> None:
    """Hash what is there and write manifest.json, last."""
    files = {}
    present = sorted(p for p in stage.rglob("*") if p.is_file())
    for file in present:
        name = file.relative_to(stage).as_posix()
        if name not in UNHASHED and name != MANIFEST:
            files[name] = digest(file)
    unhashed = [n for n in UNHASHED if (stage / n).exists()]
    content = {**manifest, "files": files, "unhashed": unhashed}
    (stage / MANIFEST).write_text(dump(content), encoding="utf-8")


def read_json(file: Path) -> Any:
    """JSON of a plain file. Raises PackageError for a link or a pipe, and for what is too big, too deep or no JSON."""
    try:
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise PackageError(f"{file} is not a plain file")
        if found.st_size > MOST_JSON_BYTES:
            raise PackageError(
                f"{file} has {found.st_size} bytes, at most {MOST_JSON_BYTES} are read"
            )
        content = json.loads(file.read_text(encoding="utf-8"))
        if _is_deep(content):
            raise PackageError(f"{file} is nested more than {MOST_JSON_DEPTH} deep")
        json.dumps(content, ensure_ascii=False).encode()  # no half characters
    except RecursionError as error:
        raise PackageError(f"{file} is nested too deep") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PackageError(f"{file} cannot be read: {reason}") from error
    return content


def _is_deep(value: Any, left: int = MOST_JSON_DEPTH) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not left or any(_is_deep(part, left - 1) for part in parts)


def read(out: Path) -> Manifest:
    """The manifest of a package. Raises PackageError where there is none, or one that this effc cannot read."""
    file = out / MANIFEST
    if not os.path.lexists(file):
        raise PackageError(f"{out} is not a package: it has no {MANIFEST}")
    content = read_json(file)
    found = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(found, int):
        raise PackageError(f"{file} is no manifest of effc")
    if found != SCHEMA:
        raise PackageError(
            f"{file} has schema {found!r}; this effc reads {SCHEMA}",
            hint="use the effc that wrote it",
        )
    try:
        manifest = TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(p) for p in first["loc"])
        raise PackageError(f"{file}: {place}: {first['msg']}") from error
    for engine in manifest.engines:
        if engine.target not in TARGETS:
            raise PackageError(
                f"{file}: this effc knows no target {engine.target!r}",
                hint=f"it knows {', '.join(TARGETS)}; use the effc that wrote it",
            )
    for name in (*manifest.names, *(engine.path for engine in manifest.engines)):
        inside(out, name)
    return manifest


def check(out: Path) -> list[str]:
    """What of a package differs from its manifest, in words; an empty list where it is whole."""
    manifest = read(out)
    try:
        found = [word for name in sorted(manifest.files) if (word := _broken(out, manifest, name))]
        names = manifest.names
        for name in _files(out):
            if name not in names:
                found.append(f"{name} is not in the manifest")
            elif name not in manifest.files and not _is_plain(out / name):
                found.append(f"{name} is not a plain file")
    except OSError as error:
        raise PackageError(f"{error.filename} cannot be read: {error.strerror}") from error
    for engine in manifest.engines:
        if manifest.files.get(engine.path) != engine.sha256:
            found.append(f"{engine.path} is an engine but not a file of the manifest")
    return found


def _broken(out: Path, manifest: Manifest, name: str) -> str | None:
    path = inside(out, name)
    if not os.path.lexists(path):
        return f"{name} is missing"
    if not _is_plain(path):
        return f"{name} is not a plain file"
    return None if digest(path) == manifest.files[name] else f"{name} differs from its sha256"


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def engine_dir(
    stage: Path, role: str, target: str, roles: Sequence[str], targets: Sequence[str]
) -> Path:
    """`[TARGET/][ROLE/]`, a level left out where it has one member."""
    place = stage
    if len(targets) > 1:
        place = place / target
    if len(roles) > 1:
        place = place / role
    return place


def schema() -> dict[str, Any]:
    """JSON Schema of manifest.json."""
    made = TypeAdapter(Manifest).json_schema()
    made["properties"]["schema"] = {"const": SCHEMA}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "title": "effc manifest",
    }
