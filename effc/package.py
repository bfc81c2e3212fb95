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
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from effc.errors import PackageError

SCHEMA = 1
MANIFEST = "manifest.json"
UNHASHED = ("bench.json", "local.json", "report.json", "report.txt", "timings.json")
"""Files that hold measured times or this machine's paths, and differ from run to run."""
_STAGE = ".effc-"


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine of a package: where it is, what goes in and comes out, and what of it runs in integers."""

    role: str
    target: str
    path: str
    sha256: str
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    opset: int
    requires: tuple[str, ...] = ()
    int8_sites: int = 0
    total_sites: int = 0
    float_sites: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a package holds. `unhashed` files may differ between two equal compiles; all others may not."""

    schema: int = SCHEMA
    kind: str
    engines: tuple[EngineEntry, ...]
    links: tuple[dict[str, Any], ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    unhashed: tuple[str, ...] = ()
    source: dict[str, str] = field(default_factory=dict)
    graph_digest: str = ""
    data: dict[str, Any] | None = None
    passes: tuple[dict[str, Any], ...] = ()
    origins: str = "origins.json"
    decisions: str = "decisions.json"
    versions: dict[str, str] = field(default_factory=dict)

    def model_bytes(self, root: Path) -> int:
        """Bytes of the first engine and the data beside it."""
        path = self.engines[0].path
        return sum((root / n).stat().st_size for n in self.files if n in (path, f"{path}.data"))


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
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise PackageError(f"{out} is not a directory", hint="choose another -o")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise PackageError(
            f"{out} holds files that effc did not write",
            hint="choose another -o, or empty it yourself",
        )
    parent = out.resolve().parent
    place = parent
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK) or _is_read_only(place):
        raise PackageError(f"{place} cannot be written", hint="choose another -o")


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
        _exchange(stage, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise PackageError(
                f"no room for {out}: {error.strerror}",
                hint="free some disk space, the old output is untouched",
            ) from error
        place = error.filename or out
        raise PackageError(f"{place}: {error.strerror or error}", where=f"writing {out}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


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
    if not path.resolve().is_relative_to(root.resolve()):
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


def read(out: Path) -> Manifest:
    """The manifest of a package. Raises PackageError where there is none, or one that this effc cannot read."""
    from pydantic import TypeAdapter, ValidationError

    file = out / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PackageError(f"{out} is not a package: it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise PackageError(f"{file} cannot be read: {error}") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        raise PackageError(
            f"{file} has schema {found!r}; this effc reads {SCHEMA}",
            hint="use the effc that wrote it",
        )
    try:
        return TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(p) for p in first["loc"])
        raise PackageError(f"{file}: {place}: {first['msg']}") from error


def check(out: Path) -> list[str]:
    """What of a package differs from its manifest, in words; an empty list where it is whole."""
    manifest = read(out)
    found: list[str] = []
    for name, expected in sorted(manifest.files.items()):
        path = inside(out, name)
        if not path.is_file() or path.is_symlink():
            found.append(f"{name} is missing")
        elif digest(path) != expected:
            found.append(f"{name} differs from its sha256")
    known = {*manifest.files, *manifest.unhashed, MANIFEST}
    for file in sorted(p for p in out.rglob("*") if p.is_file() or p.is_symlink()):
        name = file.relative_to(out).as_posix()
        if name not in known:
            found.append(f"{name} is not in the manifest")
    for engine in manifest.engines:
        if manifest.files.get(engine.path) != engine.sha256:
            found.append(f"{engine.path} is an engine but not a file of the manifest")
    return found


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
    from pydantic import TypeAdapter

    made = TypeAdapter(Manifest).json_schema()
    made["properties"]["schema"] = {"const": SCHEMA}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **made,
        "title": "effc manifest",
    }
