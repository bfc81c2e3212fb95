"""`effc package --layout triton`: a model repository of NVIDIA Triton.

    NAME/config.pbtxt           ports, batches, and what runs it
    NAME/1/model.onnx           ort: the engine as it is
    NAME/1/model.xml, .bin      openvino: the same graph as its intermediate representation
    NAME/1/model.plan           tensorrt: an engine of enterprise TensorRT

A package of several roles or targets has a folder for each, `NAME_ROLE_TARGET`, a part left out where it has one
member, and an ensemble `NAME` where one role takes what another gives. What runs again and again on what it gave, as
language models and denoisers do, no ensemble can say: its parts stand side by side, and the client runs them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc import diffusion, package, paths
from effc.backends.base import Port
from effc.engine import lowered
from effc.errors import BackendUnavailable, PackageError, UsageError
from effc.layout_causal import KIND as CAUSAL
from effc.layout_plan import Asked, Json, Plan, beside
from effc.prototext import Word, prototext

NAME = "triton"
CONFIG = "config.pbtxt"
BACKENDS = {"ort": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}
FILES = {"ort": "model.onnx", "openvino": "model.xml", "tensorrt": "model.plan"}
"""What the backend of a target opens in the folder of a version."""
VERSION = "1"
MOST_BATCH = 8
"""`max_batch_size` where the engine takes any: how much memory a server has for it nobody knows here."""
LOOPS = {CAUSAL: "token", diffusion.KIND: "step"}
"""Kinds of packages whose engines run once for each of these."""
TYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
TERMS = ("README", "LICENSE", "LICENCE", "NOTICE")
"""Files that travel with a model wherever it goes. Triton reads folders alone."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """An engine, the name that it is served by, and whether the server may put requests together in one batch."""

    name: str
    entry: package.EngineEntry
    most: int


def plan(out: Path, manifest: package.Manifest, asked: Asked | None = None) -> Plan:
    """Raises UsageError where Triton has nothing that runs an engine, or a name is none for a folder."""
    asked = asked or Asked()
    name = _name(manifest, asked.name)
    engines = [e for e in manifest.engines if asked.target in (None, e.target)]
    roles = {entry.role for entry in engines}
    targets = {entry.target for entry in engines}
    if not engines:
        known = ", ".join(sorted({entry.target for entry in manifest.engines}))
        raise UsageError(f"{out} has no engine for {asked.target!r}", hint=f"it has {known}")
    if asked.plan is not None and [entry.target for entry in engines] != ["tensorrt"]:
        raise UsageError(
            "--plan is for one engine, for tensorrt", hint="--target tensorrt, or leave it out"
        )
    for entry in engines:
        _refuse(out, manifest, entry, asked.plan)
    linked = bool(manifest.links) and manifest.kind not in LOOPS
    served = []
    for target in sorted(targets):
        entries = [entry for entry in engines if entry.target == target]
        most = {entry.role: _most(out, entry) for entry in entries}
        if linked and not all(most.values()):
            most = dict.fromkeys(most, 0)  # an ensemble batches with all its steps or with none
        for entry in entries:
            words = [name, *_more(entry.role, roles), *_more(target, targets)]
            served.append(Served(name="_".join(words), entry=entry, most=most[entry.role]))
    ensembles = {
        "_".join([name, *_more(target, targets)]): [s for s in served if s.entry.target == target]
        for target in sorted(targets)
        if linked
    }
    names = [each.name for each in served] + list(ensembles)
    if (pair := paths.twins(names)) or len(set(names)) < len(names):
        raise PackageError(
            f"two engines of {out} would both be served as {(pair or names)[0]}",
            hint="compile it again, or get an unharmed copy",
        )

    def fill(place: Path) -> None:
        for each in served:
            _put(out, manifest, each, place / each.name / VERSION, asked.plan)
            notes = _notes(manifest, each.entry)
            _write(place / each.name, _model(each), notes)
        for word, steps in ensembles.items():
            (place / word / VERSION).mkdir(parents=True)  # a version, which holds nothing
            _write(place / word, _ensemble(word, steps, manifest), [])
        package.copy_files(out, [n for n in beside(manifest) if n.startswith(TERMS)], place)

    return Plan(last=f"{names[-1]}/{CONFIG}", fill=fill)


def _more(word: str, words: set[str]) -> list[str]:
    """A part of a name, left out where it has one member."""
    return [word] if len(words) > 1 else []


def _name(manifest: package.Manifest, asked: str | None) -> str:
    if asked is None:
        given = re.sub(r"[^A-Za-z0-9_-]+", "_", str(manifest.source.get("name", ""))).strip("_-")
        return given[:64] or "model"
    if not _NAME.fullmatch(asked):
        raise UsageError(
            f"--name {paths.word(asked)} is no name that Triton can serve a model by",
            hint="letters, digits, dots, dashes and underscores, a letter or digit first, at most 64",
        )
    return asked


def _refuse(
    out: Path, manifest: package.Manifest, entry: package.EngineEntry, built: Path | None
) -> None:
    """Raise UsageError for an engine that no backend of Triton runs."""
    label = manifest.label(entry)
    if entry.target not in BACKENDS:
        raise UsageError(
            f"Triton has nothing that runs an engine for {entry.target}",
            hint=f"compile with --target {' or '.join(BACKENDS)}",
        )
    if not _NAME.fullmatch(entry.role):
        raise PackageError(
            f"{out} has a role that is no name: {paths.word(entry.role)}", hint=package.UNHARMED
        )
    for port in (*entry.inputs, *entry.outputs):
        if port.dtype not in TYPES:
            raise UsageError(
                f"{label} has {port.name} of {port.dtype}, which Triton has no type for",
                hint="compile it with ports of another type",
            )
    scalars = [port.name for port in entry.inputs if not port.shape]
    if entry.target == "openvino" and scalars:
        raise UsageError(
            f"{label} takes {scalars[0]} without a dimension, which Triton's openvino backend does not serve",
            hint="compile with --target ort",
        )
    if entry.target == "tensorrt":
        _refuse_engine(entry, label, built)


def _refuse_engine(entry: package.EngineEntry, label: str, built: Path | None) -> None:
    """Raise UsageError where no plan of enterprise TensorRT with its weights inside is at hand."""
    if built is not None:
        return
    is_engine = entry.path.endswith(".engine")
    if not is_engine or not any(word.startswith("tensorrt>=") for word in entry.requires):
        raise UsageError(
            f"{label} is {'of TensorRT-RTX' if is_engine else 'a kit'}, and Triton's tensorrt backend opens plans of "
            "enterprise TensorRT alone",
            hint="build a plan on the GPU that serves it, by the line in kit.txt, and give it: --plan model.plan",
        )
    if entry.options.get("weights") == "stripped":
        raise UsageError(
            f"{label} has no weights, and Triton puts none in", hint="compile with weights: inside"
        )


def _most(out: Path, entry: package.EngineEntry) -> int:
    """`max_batch_size`: 0 unless every port begins with one and the same free size, which is nowhere else.

    The backend of openvino answers a batch that is smaller than its maximum with an error, and takes any batch as a
    size of its own.
    """
    shapes = [port.shape for port in (*entry.inputs, *entry.outputs)]
    first = {shape[0] if shape else 1 for shape in shapes}
    batch = first.pop()
    rest = [size for shape in shapes for size in shape[1:]]
    if first or not isinstance(batch, str) or _is_in(batch, rest) or entry.target == "openvino":
        return 0
    profile = lowered(out, entry).profile
    return profile[batch][2] if batch in profile else MOST_BATCH


def _is_in(batch: str, sizes: Sequence[int | str]) -> bool:
    return any(re.search(rf"\b{re.escape(batch)}\b", str(size)) for size in sizes)


# Files


def _put(
    out: Path, manifest: package.Manifest, served: Served, place: Path, built: Path | None
) -> None:
    """The engine in the folder of its version, with the data beside it."""
    entry, file = served.entry, FILES[served.entry.target]
    if entry.target == "openvino":
        _write_ir(paths.inside(out, entry.path), place / file)
    elif entry.target == "tensorrt":
        _put_plan(built or paths.inside(out, entry.path), place, file)
    else:
        package.copy_file(paths.inside(out, entry.path), place, file)
        data = f"{entry.path}.data"
        if data in manifest.files:
            package.copy_file(paths.inside(out, data), place, f"{file}.data")


def _put_plan(file: Path, place: Path, name: str) -> None:
    with paths.plain(file, PackageError) as stream:
        if stream.read(4)[1:] != b"trt":
            raise PackageError(
                f"{file} is no plan of TensorRT", hint="trtexec --saveEngine=model.plan writes one"
            )
    package.copy_file(file, place, name)


def _write_ir(model: Path, file: Path) -> None:
    try:
        import openvino
    except ImportError as error:
        raise BackendUnavailable(
            "what Triton's openvino backend reads is written by openvino, which is not installed",
            hint="pip install 'effc[openvino]'",
        ) from error
    file.parent.mkdir(parents=True)
    openvino.save_model(openvino.Core().read_model(model), file, compress_to_fp16=False)


def _write(place: Path, config: Mapping[str, Any], notes: Sequence[str]) -> None:
    lines = [f"# {note}\n" for note in notes]
    (place / CONFIG).write_text("".join(lines) + prototext(config), encoding="utf-8")


def _notes(manifest: package.Manifest, entry: package.EngineEntry) -> list[str]:
    """What whoever serves an engine has to know, and the format has no field for."""
    notes = [f"Made with {word}; the server's should be no older." for word in entry.requires]
    if (turn := LOOPS.get(manifest.kind)) is not None:
        notes.append(f"Runs once for every {turn}: the client calls it, for no ensemble repeats.")
    if entry.target == "openvino" and entry.options.get("precision") == "f32":
        notes.append(
            "Compiled for f32; the backend has no word for that, and OpenVINO takes bf16 where the processor has it."
        )
    return notes


# config.pbtxt


def _model(served: Served) -> Json:
    entry = served.entry
    config: Json = {
        "name": served.name,
        "backend": BACKENDS[entry.target],
        "default_model_filename": FILES[entry.target],
        "max_batch_size": served.most,
        "input": [_port(port, served.most) for port in entry.inputs],
        "output": [_port(port, served.most) for port in entry.outputs],
    }
    if served.most:
        config["dynamic_batching"] = {}
    kind = "KIND_GPU" if entry.target == "tensorrt" else "KIND_CPU"
    config["instance_group"] = [{"count": 1, "kind": Word(kind)}]
    if entry.target == "openvino":
        parameters = {"PERFORMANCE_HINT": str(entry.options.get("hint", "latency")).upper()}
        if entry.options.get("precision") == "bf16":
            parameters["HINT_BF16"] = "YES"
        config["parameters"] = [
            {"key": key, "value": {"string_value": value}} for key, value in parameters.items()
        ]
    return config


def _port(port: Port, most: int, name: str | None = None) -> Json:
    """A port without its batch, which the server adds; a port without dimensions has one on the wire."""
    sizes = [-1 if isinstance(size, str) else size for size in port.shape][1 if most else 0 :]
    found: Json = {
        "name": name or port.name,
        "data_type": Word(f"TYPE_{TYPES[port.dtype]}"),
        "dims": sizes or [1],
    }
    return found if sizes else {**found, "reshape": {"shape": []}}


def _ensemble(name: str, steps: Sequence[Served], manifest: package.Manifest) -> Json:
    """One request through all roles of a target: ports that nobody gives are its inputs, under names of their own."""
    links = [link for link in manifest.links if link.target == steps[0].entry.target]
    fed = {(link.consumer, link.input): f"{link.producer}.{link.output}" for link in links}
    gives = {link.producer for link in links}
    ends = [step for step in steps if step.entry.role not in gives]
    is_one = len(ends) == 1
    known = {port.name for step in ends for port in step.entry.inputs}
    inputs, outputs, made = [], [], []
    for step in sorted(steps, key=lambda step: step in ends):
        role = step.entry.role
        takes: dict[str, str] = {}
        for port in step.entry.inputs:
            if (role, port.name) in fed:
                takes[port.name] = fed[role, port.name]
                continue
            is_own = (step in ends and is_one) or port.name not in known
            own = port.name if is_own else f"{role}.{port.name}"
            takes[port.name] = own
            inputs.append(_port(port, step.most, own))
        given = {
            port.name: port.name if step in ends and is_one else f"{role}.{port.name}"
            for port in step.entry.outputs
        }
        outputs += [_port(port, step.most, given[port.name]) for port in step.entry.outputs]
        made.append({
            "model_name": step.name, "model_version": -1,
            "input_map": [{"key": key, "value": value} for key, value in takes.items()],
            "output_map": [{"key": key, "value": value} for key, value in given.items()],
        })  # fmt: skip
    return {
        "name": name, "platform": "ensemble", "max_batch_size": min(step.most for step in steps),
        "input": inputs, "output": outputs, "ensemble_scheduling": {"step": made},
    }  # fmt: skip
