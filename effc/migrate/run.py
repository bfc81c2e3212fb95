"""A line of trtexec 10 in; a strongly typed ONNX file, held against float32, and the line of trtexec 11 out."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from effc import bounded
from effc.backends import onnx_out
from effc.backends.base import Port
from effc.backends.onnx_widen import open_widened
from effc.backends.ort_engine import PlainEngine
from effc.errors import LoweringError, SourceError, UsageError, VerifyError, first_line
from effc.foreign.file import load
from effc.migrate import calibration, integers, narrow, trtexec
from effc.migrate.trtexec import Command, Note

TOLERANCE = {"float32": 1e-5, "float16": 0.01, "bfloat16": 0.05, "int8": 0.1}
"""Relative L2 that outputs may be from those in float32, the worst output, by the narrowest type that was asked for."""
MOST_INPUT_BYTES = 1 << 30
NO_SCALES = (
    "the line has no --calib and the graph no grids, so nothing says what integers stand for"
)
CALIBRATE = (
    "effc compile MODEL --target tensorrt --quantize int8 --calib FILE makes them of samples"
)
TIMES = "CUDA graphs and spinning are on in 11 and transfers are off: times of 10 and 11 are not comparable"


@dataclass(frozen=True, kw_only=True)
class Migrated:
    """What came of a line: the file, how far it is from float32, both new lines, and what became of every flag."""

    onnx: str
    source: str
    kind: str
    gap: float
    tolerance: float
    narrow_nodes: int
    wide_nodes: int
    integer_layers: int
    trtexec: str
    tensorrt_rtx: str
    notes: tuple[Note, ...]

    def to_json(self) -> dict[str, Any]:
        plain = {k: v for k, v in asdict(self).items() if k != "notes"}
        return {**plain, "notes": [asdict(note) for note in self.notes]}

    def lines(self) -> list[str]:
        told = [
            f"{self.onnx} is written: {self.narrow_nodes} nodes in 16 bit, {self.integer_layers} layers on integers, "
            f"{self.wide_nodes} nodes in float32",
            f"    relative L2 {self.gap:.2g} from {self.source} in float32 ({self.tolerance:g} is allowed), on the CPU",
            f"    TensorRT 11:  {self.trtexec}",
            f"    TensorRT-RTX: {self.tensorrt_rtx}",
        ]
        for note in self.notes:
            word = "not carried over" if note.is_lost else "carried over as"
            told.append(f"    --{note.flag} {word}: {note.became}")
        return [*told, f"    {TIMES}"]


def flags_of(file: Path) -> str:
    """The text of a file that the user named, as one command line."""
    text = bounded.text_of(file, UsageError, trtexec.MOST_BYTES)
    line = " ".join(
        part.rstrip("\\").strip() for part in text.splitlines() if not part.lstrip().startswith("#")
    )
    return line if "trtexec" in line.partition("--")[0] else f"trtexec {line}"


def migrate(line: str, place: Path, *, tolerance: float | None = None) -> Migrated:
    """Write `place`, a file that computes what a line of trtexec meant.

    Raises UsageError for what is no such line, SourceError for the ONNX file that it names, CalibrationError for its
    cache, VerifyError where the outputs are further from float32 than `tolerance`; nothing is written then.
    """
    command = trtexec.parse(trtexec.words_of(line))
    source = Path(command.onnx)
    if place.exists() and source.exists() and place.samefile(source):
        raise UsageError(f"{place} is the file that the line reads", hint="name another with -o")
    model = onnx_out.shaped(load(source))
    notes = list(command.notes)
    scales, layers = _integers(model, command, notes)
    model, kind = _typed(model, command, notes, layers > 0)
    found = _narrowed(model, kind, command, notes) if kind != "float32" else None
    _ports(model, command, notes)
    onnx_out.drop_dead(model.graph)
    narrowest = "int8" if layers else kind
    limit = TOLERANCE[narrowest] if tolerance is None else tolerance

    def check(made: Path) -> float:
        gap = _gap(source, made, command, scales)
        if gap <= limit:
            return gap
        raise VerifyError(
            f"the migrated graph is off by a relative L2 of {gap:.2g} from float32, above {limit:g}",
            hint="leave the layers that overflow in float32 with --layerPrecisions=NAME*:fp32, or allow more "
            "with --tolerance",
        )

    gap = onnx_out.write(model, place, check)
    return Migrated(
        onnx=str(place), source=command.onnx, kind=narrowest, gap=gap, tolerance=limit,
        narrow_nodes=found.nodes if found else 0, wide_nodes=found.wide if found else len(model.graph),
        integer_layers=layers or _grids(model), trtexec=command.line(str(place)),
        tensorrt_rtx=command.line(str(place), rtx=True), notes=tuple(notes),
    )  # fmt: skip


def _grids(model: ir.Model) -> int:
    """Layers that read what is dequantised."""
    found = 0
    for node in model.graph.all_nodes():
        value = node.inputs[0] if node.inputs else None
        made = value.producer() if value is not None else None
        found += (
            node.op_type in integers.LAYERS
            and made is not None
            and made.op_type == "DequantizeLinear"
        )
    return found


def _integers(model: ir.Model, command: Command, notes: list[Note]) -> tuple[dict[str, float], int]:
    """Put the scales of a cache into the graph where the line asked for integers; gives scales, and layers on them."""
    asked = command.precisions & {"int8", "best"}
    others = command.precisions & {"fp8", "int4"}
    has = integers.is_quantised(model.graph)
    for flag in sorted(others):
        became = "the grids that the graph has" if has else NO_SCALES
        notes.append(Note(flag=flag, became=became, is_lost=not has))
    if command.is_typed or not asked:
        if command.calib and not asked:
            notes.append(Note(flag="calib", became="without --int8 it was not read", is_lost=True))
        return {}, 0
    flag = "int8" if "int8" in asked else "best"
    if has:
        notes.append(Note(flag=flag, became="the grids that the graph has"))
        if command.calib:
            notes.append(Note(flag="calib", became="the graph has grids of its own", is_lost=True))
        return {}, 0
    if command.calib is None:
        if flag == "int8":
            notes.append(Note(flag=flag, became=f"{NO_SCALES}; {CALIBRATE}", is_lost=True))
        return {}, 0
    scales = calibration.read(Path(command.calib))
    chosen = _chooser(command)
    made = integers.quantise(model, scales, lambda node: chosen(node) in ("", "int8"))
    if not made.layers:
        raise SourceError(
            f"{command.calib} has scales of {len(scales)} tensors, and none that a layer of {command.onnx} reads",
            hint="the cache is of another export: names of tensors must be the same",
        )
    notes.append(
        Note(
            flag="calib",
            became=f"grids in front of {made.layers} layers, weights per output channel",
        )
    )
    if made.without_scale:
        names = ", ".join(made.without_scale[:3])
        became = f"{len(made.without_scale)} layers have no scale in the cache and stay as they are: {names}"
        notes.append(Note(flag="calib", became=became, is_lost=True))
    return scales, made.layers


def _chooser(command: Command) -> Callable[[ir.Node], str]:
    """What --layerPrecisions says of a node; nothing where it says nothing."""

    def chosen(node: ir.Node) -> str:
        for pattern, kind in command.layers:
            if fnmatch.fnmatchcase(
                node.name or "", pattern.replace("[", "[[]").replace("?", "[?]")
            ):
                return kind
        return ""

    return chosen


def _typed(
    model: ir.Model, command: Command, notes: list[Note], has_codes: bool
) -> tuple[ir.Model, str]:
    """The type that the line asked for beside integers, and the graph in an opset that has it."""
    asked = command.precisions
    if command.is_typed:
        for flag in sorted(asked):
            notes.append(
                Note(flag=flag, became="--stronglyTyped: the graph already said what to compute in")
            )
        return model, "float32"
    kind = "float16" if asked & {"fp16", "best"} else "bfloat16" if "bf16" in asked else "float32"
    if "best" in asked:
        notes.append(
            Note(flag="best", became="fp16, and integers where the graph or a cache has scales")
        )
    elif {"fp16", "bf16"} <= asked:
        notes.append(Note(flag="bf16", became="fp16, which has more digits", is_lost=True))
    has_grids = has_codes or integers.is_quantised(model.graph)
    needed = (
        19
        if has_grids and kind == "float16"
        else 22
        if kind == "bfloat16"
        else 13
        if has_codes
        else 0
    )
    if model.graph.opset_imports.get("", 1) < needed:
        model = _lifted(model, needed, notes)
    return model, kind


def _lifted(model: ir.Model, opset: int, notes: list[Note]) -> ir.Model:
    """The graph in a newer opset, whose operators have the types that are wanted. Raises LoweringError."""
    had = model.graph.opset_imports.get("", 1)
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), opset)
        made = onnx_out.shaped(ir.from_proto(proto))
    except Exception as error:
        raise LoweringError(
            f"the graph has opset {had}, {opset} is needed, and onnx cannot convert it: {first_line(error)}",
            hint=f"export the model again with opset {opset} or newer",
        ) from error
    notes.append(Note(flag="onnx", became=f"opset {had} converted to {opset}, which has the types"))
    return made


def _narrowed(model: ir.Model, kind: str, command: Command, notes: list[Note]) -> narrow.Narrowed:
    chosen = _chooser(command)
    found = narrow.narrow(model, kind, lambda node: chosen(node) not in ("float32",))
    flag = next(f for f in ("fp16", "best", "bf16") if f in command.precisions)
    notes.append(
        Note(flag=flag, became=f"{found.nodes} nodes in {kind}; sums, norms and powers in float32")
    )
    if found.too_large:
        names = ", ".join(found.too_large[:3])
        count = len(found.too_large)
        became = f"float32 of {count} node{'s' if count > 1 else ''} whose constants are beyond 16 bit: {names}"
        notes.append(Note(flag=flag, became=became))
    if command.layers:
        notes.append(
            Note(flag="layerPrecisions", became="types in the graph, by the names of its nodes")
        )
    return found


def _ports(model: ir.Model, command: Command, notes: list[Note]) -> None:
    """Give inputs and outputs the types of --inputIOFormats and --outputIOFormats."""
    for flag, formats, values in (
        ("inputIOFormats", command.inputs, list(model.graph.inputs)),
        ("outputIOFormats", command.outputs, list(model.graph.outputs)),
    ):
        if not formats:
            continue
        kinds = formats * len(values) if len(formats) == 1 else formats
        changed = 0
        for value, word in zip(values, kinds, strict=False):
            if word == "fp16" and value.dtype == narrow.FLOAT:
                narrow.set_port(model, value, narrow.KINDS["float16"])
                changed += 1
        if changed:
            notes.append(
                Note(flag=flag, became=f"{changed} of {len(values)} are fp16 in the graph")
            )
        if odd := sorted(set(kinds) - {"fp16", "fp32"}):
            became = f"the type of a port is the graph's: {', '.join(odd)} is left as it is"
            notes.append(Note(flag=flag, became=became, is_lost=True))


def _gap(source: Path, made: Path, command: Command, scales: Mapping[str, float]) -> float:
    """Relative L2 of the made file's outputs from the source's in float32, the worst output, at the usual sizes."""
    with PlainEngine(source, threads=1) as plain, open_widened(made, 1) as engine:
        shapes = {p.name: _sizes(p, command) for p in plain.inputs}
        ranges = {name: scale * 127 for name, scale in scales.items()}
        feeds = onnx_out.drawn(plain.inputs, 1, ranges=ranges, shapes=shapes)
        exact = plain(feeds)
        found = engine({p.name: feeds[p.name].astype(p.dtype) for p in engine.inputs})
    return onnx_out.gap(exact, found)


def _sizes(port: Port, command: Command) -> tuple[int, ...]:
    """The sizes of an input that the line calls usual; 1 where it says nothing of a free one."""
    for pattern, shape in command.usual.items():
        if fnmatch.fnmatchcase(port.name, pattern) and len(shape) == len(port.shape):
            return shape
    return tuple(n if isinstance(n, int) and n > 0 else 1 for n in port.shape)
