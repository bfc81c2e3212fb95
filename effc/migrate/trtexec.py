"""A command line of trtexec 8 to 10, read as text: what it meant, and the words of it that trtexec 11 still takes.

Nothing of it is run, no variable is filled in, no file is read because a word names it (`@file`), and what only a shell
could make sense of is refused. Flags are those of `samples/common/sampleOptions.cpp` of TensorRT 10 and 11.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from effc.errors import UsageError
from effc.paths import shown

MOST_BYTES = 64 << 10
PRECISIONS = ("fp16", "bf16", "int8", "fp8", "int4", "best")
HINT = "give one line as it is typed, e.g. effc migrate-trt 'trtexec --onnx=model.onnx --fp16'"
LINE_11, LINE_RTX = "trtexec", "tensorrt_rtx"

KEPT = frozenset(
    {
        "saveEngine", "minShapes", "optShapes", "maxShapes", "shapes", "inputIOFormats", "outputIOFormats",
        "memPoolSize", "profilingVerbosity", "avgTiming", "refit", "stripWeights", "versionCompatible", "vc",
        "pluginInstanceNorm", "pi", "uint8AsymmetricQuantizationDLA", "reportCapabilityDLA", "adjustForDLA",
        "enablePluginOverride", "useRuntime", "leanDLLPath", "excludeLeanRuntime", "monitorMemory", "sparsity",
        "noTF32", "layerDeviceTypes", "decomposableAttentions", "safe", "dumpKernelText", "buildDLAStandalone",
        "allowGPUFallback", "consistency", "noBuilderCache", "noCompilationCache", "errorOnTimingCacheMiss",
        "timingCacheFile", "builderOptimizationLevel", "maxTactics", "hardwareCompatibilityLevel",
        "runtimePlatform", "tempdir", "tempfileControls", "maxAuxStreams", "profile", "allowWeightStreaming",
        "markDebug", "markUnfusedTensorsAsDebugTensors", "tilingOptimizationLevel", "l2LimitForTiling",
        "device", "useDLACore", "staticPlugins", "dynamicPlugins", "setPluginsToSerialize",
        "ignoreParsedPluginLibs", "loadInputs", "iterations", "warmUp", "duration", "sleepTime", "idleTime",
        "infStreams", "exposeDMA", "includeDataTransfers", "useManagedMemory", "noSpinWait", "threads",
        "noCudaGraph", "timeDeserialize", "timeRefit", "skipInference", "persistentCacheRatio", "useProfile",
        "allocationStrategy", "saveDebugTensors", "saveAllDebugTensors", "weightStreamingBudget", "verbose",
        "avgRuns", "percentile", "dumpRefit", "dumpOutput", "dumpRawBindingsToFile", "dumpProfile",
        "dumpLayerInfo", "dumpOptimizationProfile", "exportTimes", "exportOutput", "exportProfile",
        "exportLayerInfo",
    }
)  # fmt: skip
"""Flags that mean in 11 what they meant before."""
RTX = ("saveEngine", "minShapes", "optShapes", "maxShapes", "shapes")
"""Those of them that the tool of TensorRT-RTX is known to take."""
ALWAYS = {
    "explicitBatch": "every network has an explicit batch",
    "stronglyTyped": "every network is strongly typed",
    "useCudaGraph": "on by default in 11",
    "useSpinWait": "on by default in 11",
    "noDataTransfers": "no transfers by default in 11",
    "separateProfileRun": "on by default in 11",
    "directIO": "deprecated, and nothing asks for it",
}
"""Flags that 11 does not need, and why."""
RENAMED = {"buildOnly": "skipInference", "weightless": "stripWeights", "refittable": "refit"}
GRAPH = ("precisionConstraints", "layerPrecisions", "layerOutputTypes", "calib", *PRECISIONS)
"""Flags whose meaning goes into the graph."""
GONE = {
    "minTiming": "removed in 10; --avgTiming says how often a kernel is timed",
    "heuristic": "removed; the timing cache serves",
    "batch": "sizes of batches stand in --shapes",
    "maxBatch": "sizes of batches stand in --maxShapes",
    "minShapesCalib": "nothing is calibrated while it is built",
    "optShapesCalib": "nothing is calibrated while it is built",
    "maxShapesCalib": "nothing is calibrated while it is built",
    "calibProfile": "nothing is calibrated while it is built",
    "timingCache": "--timingCacheFile names the file",
    "fp32": "float32 is what a graph in float32 is computed in",
}
REFUSED = {
    "uff": "a UFF file", "deploy": "a Caffe file", "model": "a Caffe file", "loadEngine": "an engine that is built",
}  # fmt: skip
KINDS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
Shapes = Mapping[str, tuple[int, ...]]
_VARIABLE = re.compile(r"\$[\w({]|%\w+%|`")
_SHELL = ("&&", "||", ";", "|", "&", ">", "<", ">>", "2>&1", "2>")


@dataclass(frozen=True, kw_only=True)
class Note:
    """A flag that is not in the new line as it was, and what became of it; `is_lost` where nothing did."""

    flag: str
    became: str
    is_lost: bool = False


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a command line asks for. `layers` are patterns of names of nodes, each with a kind, later ones first."""

    onnx: str
    precisions: frozenset[str]
    calib: str | None = None
    is_typed: bool = False
    layers: tuple[tuple[str, str], ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    least: Shapes = field(default_factory=dict)
    usual: Shapes = field(default_factory=dict)
    largest: Shapes = field(default_factory=dict)
    kept: tuple[tuple[str, str | None], ...] = ()
    notes: tuple[Note, ...] = ()

    def line(self, onnx: str, *, rtx: bool = False) -> str:
        """The line for trtexec 11, or for the tool of TensorRT-RTX, over another file."""
        words = [LINE_RTX if rtx else LINE_11, f"--onnx={onnx}"]
        for flag, value in self.kept:
            if not rtx or flag in RTX:
                words.append(f"--{flag}" if value is None else f"--{flag}={value}")
        return shlex.join(words)


def words_of(line: str) -> list[str]:
    """The words of a command line as a shell would split it, and no more of what a shell does. Raises UsageError."""
    if len(line.encode()) > MOST_BYTES:
        raise UsageError(f"the line has more than {MOST_BYTES} bytes", hint=HINT)
    if "\0" in line:
        raise UsageError("the line has characters that are no text", hint=HINT)
    if found := _VARIABLE.search(line):
        raise UsageError(
            f"{found.group()!r} in the line is for a shell to fill in, and nothing is run here",
            hint="write what it stands for",
        )
    try:
        words = shlex.split(re.sub(r"\\\r?\n", " ", line), comments=False)
    except ValueError as error:
        raise UsageError(f"the line cannot be split into words: {error}", hint=HINT) from error
    for word in words:
        if word in _SHELL or word.endswith(";"):
            raise UsageError(f"{word!r} is for a shell, and nothing is run here", hint=HINT)
        if word.startswith("@"):
            raise UsageError(
                f"{shown(word)} is not read as a file", hint="--flags-file FILE names one"
            )
    return words


def parse(words: list[str]) -> Command:
    """What the words ask for. Raises UsageError for what is no line of trtexec, or has no ONNX file in it."""
    flags, notes = _flags(words)
    told: dict[str, str | None] = {}
    kept: list[tuple[str, str | None]] = []
    for flag, value in flags:
        told.setdefault(flag, value)
        _sort(flag, value, kept, notes)
    for flag, what in REFUSED.items():
        if flag in told:
            raise UsageError(
                f"--{flag} names {what}, and only ONNX can be migrated",
                hint="export the model to ONNX again",
            )
    onnx = told.get("onnx")
    if not onnx:
        raise UsageError("the line names no ONNX file", hint="it needs --onnx=FILE")
    precisions = frozenset(flag for flag in PRECISIONS if flag in told)
    shapes = {
        side: _shapes(side, told.get(side))
        for side in ("minShapes", "optShapes", "maxShapes", "shapes")
    }
    usual = {
        **shapes["maxShapes"],
        **shapes["minShapes"],
        **shapes["shapes"],
        **shapes["optShapes"],
    }
    if "layerOutputTypes" in told:
        notes.append(
            Note(
                flag="layerOutputTypes",
                became="outputs are of the type that their layer computes in",
            )
        )
    return Command(
        onnx=onnx, precisions=precisions, calib=told.get("calib") or None, is_typed="stronglyTyped" in told,
        layers=_layers(told.get("layerPrecisions")), inputs=_formats(told.get("inputIOFormats")),
        outputs=_formats(told.get("outputIOFormats")), least={**usual, **shapes["minShapes"]}, usual=usual,
        largest={**usual, **shapes["maxShapes"]}, kept=tuple(kept), notes=tuple(notes),
    )  # fmt: skip


def _flags(words: list[str]) -> tuple[list[tuple[str, str | None]], list[Note]]:
    """Flags behind the program's name, with their values."""
    place = next((n for n, word in enumerate(words) if _is_program(word)), None)
    if place is None:
        raise UsageError("the line does not call trtexec", hint=HINT)
    notes = [Note(flag=word, became="an environment, which stays yours") for word in words[:place]]
    if odd := [word for word in words[:place] if not re.fullmatch(r"\w+=.*", word)]:
        raise UsageError(f"{shown(odd[0])} stands in front of trtexec", hint=HINT)
    flags = []
    for word in words[place + 1 :]:
        found = re.fullmatch(r"--?(\w+)(?:=(.*))?", word, re.S)
        if found is None:
            raise UsageError(
                f"{shown(word)} is no flag of trtexec, whose values stand behind `=`",
                hint="e.g. --onnx=model.onnx",
            )
        flags.append((found.group(1), found.group(2)))
    return flags, notes


def _is_program(word: str) -> bool:
    return PurePosixPath(word.replace("\\", "/")).name in ("trtexec", "trtexec.exe", "tensorrt_rtx")


def _sort(
    flag: str, value: str | None, kept: list[tuple[str, str | None]], notes: list[Note]
) -> None:
    """Put a flag into the new line, or say what became of it."""
    if flag == "workspace":
        kept.append(("memPoolSize", f"workspace:{value}"))
        notes.append(Note(flag=flag, became=f"--memPoolSize=workspace:{value}"))
    elif flag in RENAMED:
        kept.append((RENAMED[flag], value))
        notes.append(Note(flag=flag, became=f"--{RENAMED[flag]}"))
    elif flag == "tacticSources":
        left = [t for t in (value or "").split(",") if "EDGE_MASK" in t or "JIT_CONV" in t]
        if left:
            kept.append((flag, ",".join(left)))
        if len(left) != len((value or "").split(",")):
            notes.append(Note(flag=flag, became="11 has no cuBLAS or cuDNN tactics to choose"))
    elif flag in KEPT:
        kept.append((flag, value))
    elif flag in ALWAYS:
        notes.append(Note(flag=flag, became=ALWAYS[flag]))
    elif flag in GONE:
        notes.append(Note(flag=flag, became=GONE[flag], is_lost=True))
    elif flag not in (*GRAPH, *REFUSED, "onnx"):
        notes.append(Note(flag=flag, became="11 does not know it, or we do not", is_lost=True))


def _pieces(text: str) -> list[str]:
    """What commas part, those inside of single quotes not counting."""
    return [p.strip() for p in re.findall(r"(?:'[^']*'|[^,'])+", text) if p.strip()]


def _shapes(side: str, text: str | None) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for piece in _pieces(text or ""):
        name, colon, sizes = piece.rpartition(":")
        is_scalar = sizes in ("", "scalar")
        if not colon or not (is_scalar or re.fullmatch(r"\d{1,9}(x\d{1,9})*", sizes)):
            raise UsageError(
                f"--{side}: {shown(piece)} is no name with sizes",
                hint=f"--{side}=input:1x3x224x224",
            )
        found[name.strip().strip("'")] = () if is_scalar else tuple(map(int, sizes.split("x")))
    return found


def _layers(text: str | None) -> tuple[tuple[str, str], ...]:
    """Patterns and kinds, the last of a line first: later ones hold."""
    found = []
    for piece in _pieces(text or ""):
        name, colon, kind = piece.rpartition(":")
        if not colon or kind not in KINDS:
            raise UsageError(
                f"--layerPrecisions: {shown(piece)} is no layer with one of {', '.join(KINDS)}",
                hint="--layerPrecisions=*softmax*:fp32",
            )
        found.append((name.strip("'\""), KINDS[kind]))
    return tuple(reversed(found))


def _formats(text: str | None) -> tuple[str, ...]:
    return tuple(piece.partition(":")[0] for piece in (text or "").split(",") if piece)
