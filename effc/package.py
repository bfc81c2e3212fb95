"""The output directory: engines, what they need, and a manifest that is written last.

Everything is staged beside its place and exchanged by one rename, so that an interrupted or failed run leaves the old
directory untouched and nothing that looks finished. A directory that is not ours is never replaced.

Every byte of a package is under a hash: files that two equal compiles write alike in the manifest, those with measured
times in `volatile.json`, and these two in a digest of themselves. That tells harm and chance apart from what was
written; it is no signature, since whoever writes a file can write its hash.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from effc import bounded, paths, scratch
from effc.backends import TARGETS
from effc.backends.base import Port
from effc.errors import PackageError, SourceError
from effc.plain import dump as dump
from effc.plain import sealed as sealed

SCHEMA = 1
MANIFEST = "manifest.json"
VOLATILE = "volatile.json"
"""The sha256 of every unhashed file: kept out of the manifest, which is the same in two equal compiles."""
UNHASHED = (
    "bench.json", "local.json", "report.html", "report.json", "report.txt", "timings.json", VOLATILE,
)  # fmt: skip
"""Files that hold measured times or this machine's paths, and differ from run to run."""
_STAGE = ".effc-"
MOST_RECORD_BYTES = 1 << 28
"""Of decisions.json and origins.json, which grow with the model."""
UNHARMED = "compile it again, or get an unharmed copy"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


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
    role: str = "main"


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine of a package: where it is, what goes in and comes out, and what of it runs in integers."""

    role: str
    target: str
    path: str
    sha256: Sha256
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opset: int
    requires: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    int8_sites: int = 0
    total_sites: int = 0
    float_sites: tuple[FloatSite, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LinkEntry:
    """What an engine takes as another gave it: the roles and ports, and the sha256 of the engine that gives."""

    target: str
    producer: str
    output: str
    consumer: str
    input: str
    dtype: str
    shape: tuple[int | str, ...]
    layout: str
    sha256: Sha256
    grid: str = ""
    """Of codes, the sha256 of the sizes that they are multiples of."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a package holds. `unhashed` files may differ between two equal compiles; all others may not."""

    schema: int = SCHEMA
    digest: Sha256
    kind: str
    engines: Annotated[tuple[EngineEntry, ...], Field(min_length=1)]
    links: tuple[LinkEntry, ...] = ()
    files: dict[str, Sha256] = field(default_factory=dict)
    unhashed: tuple[str, ...] = ()
    source: dict[str, str] = field(default_factory=dict)
    graph_digest: Sha256
    data: dict[str, Any] | None = None
    passes: tuple[PassEntry, ...] = ()
    origins: str = "origins.json"
    decisions: str = "decisions.json"
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Everything that may lie in the package."""
        return {*self.files, *self.unhashed, MANIFEST}

    def engine(self, target: str, role: str) -> EngineEntry | None:
        return next((e for e in self.engines if (e.target, e.role) == (target, role)), None)

    def label(self, engine: EngineEntry) -> str:
        """What an engine is called: its target, and its role where there are several."""
        return label(engine.role, engine.target, [e.role for e in self.engines])

    def model_bytes(self, root: Path, engine: EngineEntry | None = None) -> int:
        """Bytes of an engine, the first where none is given, and the data beside it."""
        path = (engine or self.engines[0]).path
        try:
            return sum(
                paths.inside(root, name).stat().st_size
                for name in dict.fromkeys((path, *self.files))
                if name in (path, f"{path}.data")
            )
        except OSError as error:
            raise PackageError(
                f"{error.filename} is in the manifest and cannot be read: {error.strerror}",
                hint=UNHARMED,
            ) from error


def _unsealed(out: Path, name: str) -> Any:
    """What `sealed` wrote, or any JSON of a later schema. Raises PackageError where a byte of it is another one."""
    text = bounded.content(paths.opened(out, name), name, PackageError)
    content = bounded.json_of(text, str(out / name), PackageError)
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise PackageError(f"{out / name} was not written by effc", hint=UNHARMED)
    if content["schema"] != SCHEMA:
        raise PackageError(
            f"{out / name} has schema {content['schema']!r}; this effc reads {SCHEMA}",
            hint="use the effc that wrote it",
        )
    if sealed(content).encode() != text:
        raise PackageError(
            f"{out / name} is not as it was written: its digest is that of another text",
            hint=UNHARMED,
        )
    return content


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_output(out: Path, check: Callable[[Path], None] | None = None) -> None:
    """Refuse, before any work, a place that cannot become a package. Raises PackageError.

    `check` refuses what may not be replaced; without one that is all but a package.
    """
    try:
        (check or _check_replaceable)(out)
        _check_output(out)
    except OSError as error:
        raise PackageError(
            f"{out} cannot be written: {error.strerror}", hint="choose another -o"
        ) from error


def _check_output(out: Path) -> None:
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
        strange = [name for name in sorted(paths.below(out)) if name not in names]
    else:
        strange = sorted(p.name for p in out.iterdir())
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise PackageError(
            f"{out} holds files that effc did not write: {', '.join(map(paths.word, strange[:3]))}{more}",
            hint="choose another -o, or move them elsewhere",
        )


def check_empty(out: Path) -> None:
    """Refuse a place with anything in it, a package too. Raises PackageError."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
        raise PackageError(f"{out} is not a directory", hint="choose another -o")
    if out.is_dir() and any(out.iterdir()):
        raise PackageError(f"{out} is not empty", hint="choose another -o, or remove it yourself")


def _is_read_only(place: Path) -> bool:
    try:
        with scratch.held(place, f"{_STAGE}check-"):
            return False
    except OSError:
        return True


@contextmanager
def staged(
    out: Path, *, check: Callable[[Path], None] = _check_replaceable, last: str = MANIFEST
) -> Iterator[Stage]:
    """A directory to fill that becomes `out` when the block ends well, and vanishes when it does not.

    What a killed run left beside `out` goes first. `check` refuses what may not be replaced, and nothing is exchanged
    without the file `last`.
    """
    out = Path(os.path.abspath(out))
    with ExitStack() as stack:
        try:
            stack.callback(_remove_empty, [p for p in out.parents if not p.exists()])
            out.parent.mkdir(parents=True, exist_ok=True)
            _rescue(out)
            root = stack.enter_context(scratch.held(out.parent, f"{_STAGE}{out.name[:32]}-"))
            stage = Stage(package=root / "package", work=root / "work")
            stage.package.mkdir(mode=0o755)
            stage.work.mkdir()
        except OSError as error:
            raise PackageError(
                f"{out} cannot be written: {error.strerror}", hint="choose another -o"
            ) from error
        try:
            yield stage
            if not (stage.package / last).is_file():
                raise PackageError("internal: a package was staged without its manifest")
            _sync(stage.package)
            check(out)  # again: a compile is long, and what was put there meanwhile is not ours
            _exchange(stage.package, out)
            _sync_one(out.parent)
        except OSError as error:
            if not _is_about(error, out):
                raise
            if error.errno in scratch.NO_ROOM:
                raise PackageError(
                    f"no room for {out}: {error.strerror}",
                    hint="free some disk space, the old output is untouched",
                ) from error
            place = error.filename or out
            raise PackageError(
                f"{place}: {error.strerror or error}",
                where=f"writing {out}",
                hint="make it writable, or choose another output; the old one is untouched",
            ) from error


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a package is filled, and room beside it for what is on the way; both on the disk of the output."""

    package: Path
    work: Path


def _is_about(error: OSError, out: Path) -> bool:
    """Whether an error comes from writing `out`, and not from a file that was read meanwhile."""
    if not isinstance(error.filename, str | bytes):
        cut_short = error.errno is None and "requested and" in str(error)  # numpy, on a full disk
        return cut_short or error.errno in (*scratch.NO_ROOM, errno.EROFS)
    place = Path(os.path.abspath(os.fsdecode(error.filename)))
    if not place.is_relative_to(out.parent):
        return False
    below = place.relative_to(out.parent).parts
    return not below or below[0] == out.name or below[0].startswith(_STAGE)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that were made for an output that was not."""
    for place in folders:
        with suppress(OSError):
            place.rmdir()


def _sync(directory: Path) -> None:
    """Let everything below a directory, and its own entry in the folder above, reach the disk."""
    for place in (*sorted(directory.rglob("*")), directory):
        _sync_one(place)


def _sync_one(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in scratch.NO_ROOM or place.is_file():
            raise  # some file systems cannot sync folders
    finally:
        os.close(handle)


def _exchange(stage: Path, out: Path) -> None:
    """One rename: into an empty place, or swapped with the old package, which then is `stage` and gets removed."""
    if not out.exists():
        os.rename(stage, out)
        return
    if _swap(stage, out):
        return
    old = _old(out)
    os.rename(out, old)
    try:
        os.rename(stage, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _old(out: Path) -> Path:
    """Where an old package waits while the new one takes its place, on a system that cannot swap the two."""
    # a digest, since names may be as long as they can be
    known = hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]
    return out.with_name(f".effc-old-{known}")


def _rescue(out: Path) -> None:
    """Put an old package back, or away, that a kill between two renames has left."""
    old = _old(out)
    if old.is_dir() and not os.path.lexists(out):
        os.rename(old, out)
    elif old.is_dir() and (out / MANIFEST).is_file():
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
        copy_file(source / name, stage, name)


def copy_file(file: Path, stage: Path, name: str) -> None:
    """Copy a file to a name in a package; contents only."""
    target = paths.inside(stage, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with paths.plain(file, SourceError) as given, target.open("xb") as taken:
        shutil.copyfileobj(given, taken)


def write_manifest(stage: Path, manifest: Mapping[str, Any]) -> None:
    """Hash what is there; write volatile.json, and manifest.json last.

    Raises PackageError where engines do not fit each other.
    """
    digests = {name: digest(stage / name) for name in sorted(paths.below(stage))}
    files = {name: value for name, value in digests.items() if name not in UNHASHED}
    volatile = {name: value for name, value in digests.items() if name in UNHASHED}
    if pair := paths.twins(digests):
        raise PackageError(
            f"{pair[0]} and {pair[1]} are one file on some systems", hint="rename one of the two"
        )
    _write_volatile(stage, volatile)
    content = {**manifest, "files": files, "unhashed": sorted({*volatile, VOLATILE})}
    (stage / MANIFEST).write_text(sealed(content), encoding="utf-8")
    if broken := broken_links(read(stage)):
        raise PackageError(
            f"engines of one package do not fit each other: {broken[0]}",
            hint="a pass that changes what goes from one to another is for both of them",
        )


def _write_volatile(out: Path, files: Mapping[str, str]) -> None:
    (out / VOLATILE).write_text(sealed({"schema": SCHEMA, "files": files}), encoding="utf-8")


def replace(out: Path, texts: Mapping[str, str]) -> None:
    """Other texts in unhashed files of a package, and their sha256 in volatile.json. Raises PackageError.

    Each is exchanged by one rename; in between a file differs from its sha256, and whoever is killed there does it
    again.
    """
    out = Path(os.path.realpath(out))
    manifest = read(out)
    if (name := next((n for n in texts if n not in manifest.unhashed), None)) is not None:
        raise PackageError(
            f"{out} was made by an effc that wrote no {name}, and its manifest does not list it",
            hint=f"write it elsewhere: -o {name}",
        )
    digests = _volatile(out, manifest)
    digests |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    try:
        with scratch.held(out.parent, f"{_STAGE}{out.name[:32]}-") as place:
            for name, text in texts.items():
                (place / name).write_text(text, encoding="utf-8")
            _write_volatile(place, digests)
            _sync(place)
            for name in (*texts, VOLATILE):
                os.replace(place / name, out / name)
    except OSError as error:
        last = list(texts)[-1]
        raise PackageError(
            f"{out / last} cannot be written: {error.strerror}",
            hint=f"write it elsewhere: -o {last}",
        ) from error


def read_json(out: Path, name: str, most_bytes: int = bounded.MOST_BYTES) -> Any:
    """JSON of a plain file of a package. Raises PackageError, also for what is too long or too deep."""
    text = bounded.content(paths.opened(out, name), name, PackageError, most_bytes)
    return bounded.json_of(text, str(out / name), PackageError)


def read(out: Path) -> Manifest:
    """The manifest of a package. Raises PackageError where there is none, or one that this effc cannot read."""
    file = out / MANIFEST
    if not os.path.lexists(file):
        raise PackageError(
            f"{out} is not a package: it has no {MANIFEST}",
            hint="name a directory that effc compile wrote",
        )
    content = _unsealed(out, MANIFEST)
    try:
        manifest = TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(p) for p in first["loc"])
        raise PackageError(f"{file}: {place}: {first['msg']}", hint=UNHARMED) from error
    for engine in manifest.engines:
        if engine.target not in TARGETS:
            raise PackageError(
                f"{file}: this effc knows no target {engine.target!r}",
                hint=f"it knows {', '.join(TARGETS)}; use the effc that wrote it",
            )
    records = (manifest.decisions, manifest.origins)
    for name in (*manifest.names, *(engine.path for engine in manifest.engines), *records):
        paths.parts(name)
    if pair := paths.twins(manifest.names):
        raise PackageError(
            f"{file}: {pair[0]!r} and {pair[1]!r} are one file on some systems", hint=UNHARMED
        )
    return manifest


def check(out: Path) -> list[str]:
    """What of a package differs from its manifest, in words; an empty list where it is whole."""
    manifest = read(out)
    digests = dict(manifest.files)
    found = []
    try:
        digests |= _volatile(out, manifest)
    except PackageError as error:
        found.append(error.what)
    found += [word for name in sorted(digests) if (word := _broken(out, name, digests[name]))]
    try:
        strange = sorted(set(paths.below(out)) - manifest.names)
    except OSError as error:
        raise PackageError(
            f"{error.filename} cannot be read: {error.strerror}", hint=UNHARMED
        ) from error
    found += [f"{paths.word(name)} is not in the manifest" for name in strange]
    return found or [*_false_words(out, manifest), *broken_links(manifest)]


def _volatile(out: Path, manifest: Manifest) -> dict[str, str]:
    """The sha256 of every unhashed file. Raises PackageError where volatile.json does not have just these."""
    files = _unsealed(out, VOLATILE).get("files")
    names = set(manifest.unhashed) - {VOLATILE}
    if VOLATILE not in manifest.unhashed or not isinstance(files, dict) or set(files) != names:
        raise PackageError(f"{VOLATILE} lists other files than the manifest", hint=UNHARMED)
    return {name: str(value) for name, value in files.items()}


def _broken(out: Path, name: str, expected: str) -> str | None:
    try:
        with paths.opened(out, name) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    except PackageError as error:
        return error.what
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if found == expected else f"{name} differs from its sha256"


def _false_words(out: Path, manifest: Manifest) -> list[str]:
    """What a manifest says of files that are as it lists them, and is not so."""
    from effc.backends import onnx_file

    found = []
    for name in (manifest.decisions, manifest.origins):
        if name not in manifest.files:
            found.append(f"{name} is not in the manifest")
            continue
        try:
            record = read_json(out, name, MOST_RECORD_BYTES)
            if not isinstance(record, dict):
                found.append(f"{name} holds no entries by name")
        except PackageError as error:
            found.append(error.what)
    for engine in manifest.engines:
        if manifest.files.get(engine.path) != engine.sha256:
            found.append(f"{engine.path} is an engine but not a file of the manifest")
            continue
        path = engine.path
        if path.endswith(".engine"):
            with paths.opened(out, path) as stream:
                if stream.read(4)[1:] != b"trt":
                    found.append(f"{path} is no engine of TensorRT")
            path = f"{path.removesuffix('.engine')}.onnx"  # that it was built from
        if not path.endswith(".onnx") or path not in manifest.files:
            found.append(f"{path} is no kind of engine that this effc knows")
        else:
            found += onnx_file.problems(
                out, path, inputs=engine.inputs, outputs=engine.outputs,
                opset=engine.opset, listed=manifest.files,
            )  # fmt: skip
    return found


def label(role: str, target: str, roles: Sequence[str]) -> str:
    """`ort`, or `decode/ort` where a program has several graphs."""
    return f"{role}/{target}" if len(set(roles)) > 1 else target


def broken_links(manifest: Manifest) -> list[str]:
    """Links that do not fit the engines on their two sides."""
    found = []
    for link in manifest.links:
        word = f"{link.producer} {link.output} → {link.consumer} {link.input}"
        sides = []
        for role, name, side in (
            (link.producer, link.output, "outputs"), (link.consumer, link.input, "inputs"),
        ):  # fmt: skip
            engine = manifest.engine(link.target, role)
            ports = {p.name: p for p in getattr(engine, side)} if engine is not None else {}
            sides.append((engine, ports.get(name)))
        (producer, given), (_, taken) = sides
        if producer is None or given is None or taken is None:
            found.append(f"link {word}: an engine or a port is missing")
        elif producer.sha256 != link.sha256:
            found.append(f"link {word}: it is from another engine")
        elif given.dtype != taken.dtype or not _fit(given.shape, taken.shape):
            found.append(
                f"link {word}: {given.dtype} {list(given.shape)} is given, "
                f"{taken.dtype} {list(taken.shape)} is taken"
            )
        elif not given.grid == link.grid == taken.grid:
            found.append(
                f"link {word}: the codes of one side mean other numbers than those of the other"
            )
    return found


def _fit(given: Sequence[int | str], taken: Sequence[int | str]) -> bool:
    """Whether the sizes that are fixed on both sides are the same."""
    return len(given) == len(taken) and all(
        a == b
        for a, b in zip(given, taken, strict=True)
        if isinstance(a, int) and isinstance(b, int)
    )


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
