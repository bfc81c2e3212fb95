"""Which tool for a model and a place to run it, where that is not effc: one table, each line with what it rests on.

A line is about a limit of effc that a test shows (`tests/test_peers.py`), or about a number that a script of effc's own
measured. What another tool can do is in its documentation, and was not measured here where that is not said.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effc import bounded, diffusion
from effc.backends import TARGETS
from effc.errors import EffcError, SourceError, UsageError

LM = "causal-lm"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A tool, why it serves better, and where that can be looked up."""

    tool: str
    why: str
    rests_on: str

    def line(self) -> str:
        return f"{self.tool}: {self.why} ({self.rests_on})"

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def _no_target(tool: str, what: str) -> Peer:
    return Peer(
        tool=tool, why=what, rests_on=f"effc writes for {', '.join(TARGETS)} and nothing else"
    )


LLAMA = _no_target(
    "llama.cpp", "chats from one GGUF file, on CPUs first; effc reads GGUF and writes none"
)
SERVING = Peer(
    tool="vLLM or TensorRT-LLM",
    why="serve many requests at once; prompts of one call are written together by effc, and none joins them later",
    rests_on="effc run; there is no server for models",
)
COREML = _no_target("coremltools", "writes for Apple's neural engine")
PHONE = _no_target("LiteRT or ExecuTorch", "write for the accelerators of phones")
NPU = _no_target("Olive", "drives the tools of NPU makers, each with types and shapes of its own")
GPU = _no_target(
    "onnxruntime with CUDA or DirectML, by Olive", "runs ONNX on GPUs that are not for TensorRT"
)
WEB = Peer(
    tool="transformers.js",
    why="runs in browsers; effc package --layout transformers.js writes its folder, and no browser is measured here",
    rests_on="docs/recipes.md",
)
PLACES: dict[str, Peer] = {
    **dict.fromkeys(("gguf", "llama.cpp", "llamacpp", "ollama"), LLAMA),
    **dict.fromkeys(("vllm", "tensorrt-llm", "tgi", "serving"), SERVING),
    **dict.fromkeys(("coreml", "ios", "macos", "ane"), COREML),
    **dict.fromkeys(("tflite", "litert", "android", "executorch"), PHONE),
    **dict.fromkeys(("qnn", "npu", "vitisai"), NPU),
    **dict.fromkeys(("cuda", "directml", "dml", "rocm", "migraphx"), GPU),
    **dict.fromkeys(("web", "browser", "webgpu", "wasm", "onnxruntime-web"), WEB),
}
"""Places that effc has no target for, by the words that people have for them."""

NNCF = Peer(
    tool="NNCF",
    why="its int8 engine of ResNet-50 for OpenVINO was not slower than effc's, and was made in less time and memory",
    rests_on="docs/results.md, ResNet-50; benchmarks/peers.py",
)
CHAT = Peer(
    tool="llama.cpp",
    why="has grids whose scales are rounded themselves (K-quants), and effc has not; 4 bit rounded to the nearest cost "
    "SmolLM2-135M much in perplexity here. It was not measured beside effc",
    rests_on="docs/results.md, Language models beside other tools; benchmarks/decoder.py",
)
MODELOPT = Peer(
    tool="ModelOpt",
    why="has NVFP4 and MX formats, and trains with rounding in the graph; effc has integers of 3 to 8 bit and fp8, "
    "and rounds what is trained already",
    rests_on="docs/recipes.md, quantize and tune",
)
NO_GPU_RUN = Peer(
    tool="trtexec of TensorRT-RTX",
    why="times the engine where it will run; those of effc are built without a GPU, and none has been run yet",
    rests_on="README.md, What it does not do yet",
)
TWO_PARTS = Peer(
    tool="optimum or CTranslate2",
    why="take an encoder with a decoder from its directory; effc takes its parts from a factory alone",
    rests_on="SourceError of effc compile",
)
QUANTISED = Peer(
    tool="the tool that quantised it, or the runtime it is for",
    why="effc takes weights in float, and rounds none a second time",
    rests_on="SourceError of effc compile",
)
DIFFUSION = Peer(
    tool="ModelOpt",
    why="has recipes in 8 bit for pipelines of diffusers; what 8 bit costs their pictures is not measured here yet",
    rests_on="README.md, What it does not do yet",
)


def too_large(needed: int, memory: int) -> Peer:
    return Peer(
        tool="llm-compressor or ModelOpt",
        why=f"take a model layer by layer; effc holds all of it in float32, {needed / 1e9:.3g} GB of the "
        f"{memory / 1e9:.3g} GB of this machine",
        rests_on="effc compile --plan",
    )


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model without loading it. `float_bytes` are its weights in float32, 0 where nobody says."""

    kind: str = ""
    has_convs: bool = False
    is_quantised: bool = False
    has_two_parts: bool = False
    float_bytes: int = 0


def place(word: str) -> Peer | None:
    """Who serves a place that effc has no target for; None where it has one, or the word says nothing."""
    return PLACES.get(word.lower())


def hint(word: str) -> str | None:
    """What to say to somebody who asks effc for such a target."""
    found = place(word)
    return None if found is None else found.line()


def advice(facts: Facts, target: str) -> list[Peer]:
    """Who serves a model better on one of effc's targets, or at all; nobody where it should be effc."""
    if facts.is_quantised:
        return [QUANTISED]
    if facts.has_two_parts:
        return [TWO_PARTS]
    memory = _memory()
    rules: tuple[tuple[bool, Callable[[], Peer]], ...] = (
        (0 < memory < facts.float_bytes, lambda: too_large(facts.float_bytes, memory)),
        (facts.kind == LM and target != "tensorrt", lambda: CHAT),
        (facts.kind == LM, lambda: SERVING),
        (facts.kind == diffusion.KIND and target == "tensorrt", lambda: DIFFUSION),
        (facts.has_convs and facts.kind != diffusion.KIND and target == "openvino", lambda: NNCF),
        (target == "tensorrt", lambda: MODELOPT),
        (target == "tensorrt", lambda: NO_GPU_RUN),
    )
    return [make() for applies, make in rules if applies]


def lines(found: Iterable[Peer | Mapping[str, str]]) -> list[str]:
    peers = [one if isinstance(one, Peer) else Peer(**one) for one in found]
    return [f"elsewhere  {peer.line()}" for peer in peers]


def everywhere() -> dict[str, dict[str, Any]]:
    """Every place without a target once, with its words: `effc doctor` without a model."""
    found: dict[str, dict[str, Any]] = {}
    for word, peer in PLACES.items():
        found.setdefault(peer.tool, {"words": [], **peer.to_json()})["words"].append(word)
    return found


def answer(model: str | None, target: str) -> dict[str, Any]:
    """Which tool for a model and a target: effc's own line, and who serves better.

    Raises UsageError for a target that nobody knows, SourceError for a model that cannot be read.
    """
    other = place(target)
    if other is None and target not in TARGETS:
        known = ", ".join((*TARGETS, *sorted(PLACES)))
        raise UsageError(f"nobody here knows the target {target[:40]!r}", hint=f"one of {known}")
    facts = facts_of(model) if model is not None else Facts()
    found = [other] if other is not None else advice(facts, target)
    refused = other is not None or facts.is_quantised or facts.has_two_parts
    named = model if model is not None else "MODEL"
    own = None if refused else f"effc compile {named} -o OUT --target {target}"
    return {"target": target, "effc": own, "elsewhere": [peer.to_json() for peer in found]}


def facts_of(model: str) -> Facts:
    """What the files of a model say; nothing is loaded or run. Raises SourceError."""
    path = Path(model)
    if path.is_dir():
        return _of_directory(path)
    if not path.is_file() and ":" not in model:
        raise SourceError(
            f"{model} is no file and no folder", hint="--model DIR, a file, or module:factory"
        )
    if model.endswith(".gguf"):
        return Facts(kind=LM)
    if model.endswith(".onnx"):
        return _of_onnx(path)
    return Facts()


def _of_directory(path: Path) -> Facts:
    if (path / diffusion.INDEX).is_file():
        return Facts(kind=diffusion.KIND, has_convs=True)
    config = bounded.read_json(path / "config.json", SourceError)
    if not isinstance(config, dict):
        raise SourceError(f"{path / 'config.json'} holds no settings", hint=bounded.HINT)
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    widths = {"float16": 2, "bfloat16": 2}.get(
        str(config.get("dtype", config.get("torch_dtype"))), 4
    )
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return Facts(
        kind=LM if first.endswith(("ForCausalLM", "LMHeadModel")) else "",
        has_convs=any(word in json.dumps(config) for word in ("conv", "Conv", "ResNet")),
        is_quantised=config.get("quantization_config") is not None,
        has_two_parts=config.get("is_encoder_decoder") is True,
        float_bytes=stored * 4 // widths,
    )


def _of_onnx(path: Path) -> Facts:
    from effc.foreign import file as foreign
    from effc.foreign.quantised import quantised

    proto = foreign.parsed(path)
    return Facts(
        has_convs=any(node.op_type == "Conv" for node in proto.graph.node),
        is_quantised=quantised(proto) is not None,
    )


def of_file(path: Path, target: str) -> list[Peer]:
    """Who serves an ONNX file better than effc does; nobody of a file that effc cannot read."""
    try:
        return advice(_of_onnx(path), target)
    except EffcError:
        return []


def _memory() -> int:
    """Bytes of this machine's memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
