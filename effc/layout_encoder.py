"""`effc package --layout sentence-transformers` and `--layout transformers.js` of encoders and classifiers.

    sentence-transformers    config.json, tokenizer, modules.json, 1_Pooling/config.json, onnx/model.onnx
    transformers.js          config.json, tokenizer, onnx/model.onnx

Weights in integers are told by the name of the file, onnx/model_qint8_quantized.onnx and onnx/model_quantized.onnx, and
by quantize_config.json, in the words of the tool that converts models for transformers.js. The engine is as it is in
the package.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effc import package, paths
from effc.errors import SourceError, UsageError
from effc.intuition import INPUT
from effc.layout_plan import (
    JS_SUFFIXES,
    TARGET,
    Json,
    Plan,
    beside,
    own_entries,
    settings,
    write_json,
)
from effc.processor import PACKAGE, POOLING, Processor

if TYPE_CHECKING:
    import onnx_ir as ir

NAME = "sentence-transformers"
KINDS = ("encoder", "classifier")
CONFIG, MODULES, QUANTIZED = "config.json", "modules.json", "quantize_config.json"
WORDS = ("input_ids", "attention_mask")
TYPES = ("INT8", "UINT8", "INT4", "UINT4")
"""Integers that weights are stored as."""


def sentence_transformers(out: Path, manifest: package.Manifest) -> Plan:
    """Raises UsageError where the package holds no encoder of sentences, or one with modules that effc does not do."""
    entry = _engine(out, manifest, "encoder")
    hidden = next((p.shape[-1] for p in entry.outputs if p.name == "last_hidden_state"), None)
    asked = {port.name for port in entry.inputs}
    if not isinstance(hidden, int) or not asked.issuperset(WORDS) or INPUT in asked:
        raise UsageError(
            f"{out} holds no encoder that makes token vectors of texts alone, which the layout {NAME} is for",
            hint="effc compile a directory of sentence-transformers, or of a model such as BERT",
        )

    def fill(place: Path) -> None:
        modules, pooling = _modules(out, hidden)
        graph = _load(out, entry)
        kind = _weights(graph)
        names = {"fp32": "model.onnx", "fp16": "model_fp16.onnx"}
        file = names.get(kind.dtype, f"model_{kind.word}_quantized.onnx")
        _put(out, manifest, entry, graph, place, (file, "model.onnx.data"))
        write_json(place / MODULES, modules)
        (folder,) = (m["path"] for m in modules if m["type"].endswith(".Pooling"))
        write_json(place / folder / CONFIG, pooling)

    return Plan(last=MODULES, fill=fill)


def transformers_js(out: Path, manifest: package.Manifest) -> Plan:
    """Raises UsageError where the package holds nothing that transformers.js can name."""
    entry = _engine(out, manifest, *KINDS)
    if CONFIG not in manifest.files or INPUT in {port.name for port in entry.inputs}:
        raise UsageError(
            f"{out} holds no model of transformers that takes texts or pictures alone, which transformers.js is for",
            hint="compile a directory of transformers",
        )

    def fill(place: Path) -> None:
        graph = _load(out, entry)
        dtype = _weights(graph).dtype
        file = f"model{JS_SUFFIXES[dtype]}.onnx"
        own: Json = {"dtype": dtype}
        if _put(out, manifest, entry, graph, place, (file, f"{file}_data")):
            own["use_external_data_format"] = {file: 1}
        write_json(place / CONFIG, {**settings(out / CONFIG), "transformers.js_config": own})

    return Plan(last=CONFIG, fill=fill)


def _engine(out: Path, manifest: package.Manifest, *kinds: str) -> package.EngineEntry:
    """The one engine for ONNX Runtime. Raises UsageError."""
    if manifest.kind not in kinds:
        raise UsageError(
            f"{out} holds a model of kind {manifest.kind}, and this layout is for {' and '.join(kinds)}",
            hint="its model.onnx is all that a tool needs: docs/deploy.md",
        )
    own = own_entries(out, manifest)
    if len(own) > 1:
        roles = ", ".join(entry.role for entry in own)
        raise UsageError(
            f"{out} has several engines ({roles}), and this layout holds one",
            hint="--layout triton or ort-model-package hold all of them",
        )
    return own[0]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What most of the weights are stored as: the dtype of transformers.js, and of integers optimum's word for them."""

    dtype: str
    word: str
    ops: tuple[str, ...]
    """Operators that read integers."""


def _load(out: Path, entry: package.EngineEntry) -> ir.Model:
    import onnx_ir as ir

    return ir.load(paths.inside(out, entry.path))


def _weights(graph: ir.Model) -> Weights:
    from effc.backends import onnx_ports

    sizes: Counter[str] = Counter()
    ops = set()
    for value in graph.graph.initializers.values():
        if value.const_value is None or value.const_value.size < onnx_ports.SCALARS:
            continue
        kind = value.const_value.dtype.name
        if kind in TYPES:
            sizes[kind] += value.const_value.nbytes
            ops |= {use.node.op_type for use in value.uses()}
    dtype = onnx_ports.precision(graph)
    kind = next((kind for kind, _ in sizes.most_common(1)), "")
    word = f"q{kind.lower()}"
    if dtype in ("q4", "q4f16"):
        word = word.replace("8", "4")  # packed by two
    return Weights(dtype=dtype, word=word, ops=tuple(sorted(ops)))


def _put(
    out: Path, manifest: package.Manifest, entry: package.EngineEntry, graph: ir.Model, place: Path,
    names: tuple[str, str],
) -> bool:  # fmt: skip
    """The files of the model, the engine in `onnx/` under one of two names, its data under the other.

    Says whether there are any data beside it. The engine is copied as it is where there are none.
    """
    import onnx_ir as ir

    package.copy_files(out, beside(manifest), place)
    file, data = names
    source = paths.inside(out, entry.path)
    is_outside = f"{entry.path}.data" in manifest.files
    if is_outside:
        (place / "onnx").mkdir()
        ir.save(graph, place / "onnx" / file, external_data=data)
    else:
        package.copy_file(source, place, f"onnx/{file}")
    if (content := _quantisation(manifest, _weights(graph))) is not None:
        write_json(place / QUANTIZED, content)
    return is_outside


def _quantisation(manifest: package.Manifest, weights: Weights) -> Json | None:
    """How the weights were quantised, in the words of transformers.js's own converter; None where they are floats."""
    if not weights.ops:
        return None
    done = [p for p in manifest.passes if p.name == "quantize" and p.target == TARGET]
    options = done[-1].options if done else {}
    kind = weights.word.removeprefix("q")
    return {
        "modes": [weights.dtype],
        "per_channel": "group" not in options,
        "reduce_range": False,
        "block_size": options.get("group"),
        "is_symmetric": bool(options.get("weight_symmetric", True)),
        "per_model_config": {
            "model": {
                "op_types": list(weights.ops),
                "weight_type": "Q" + kind.replace("uint", "UInt").replace("int", "Int", 1),
            }
        },
    }


def _modules(out: Path, hidden: int) -> tuple[list[Json], Json]:
    """modules.json and the settings of its pooling, completed where the package has them in part.

    Raises UsageError where there are modules that effc does not do.
    """
    try:
        pooling = Processor(out, settings(out / CONFIG)).pooling
    except SourceError as error:
        raise UsageError(
            error.what, hint="that layout holds an encoder, its pooling and a norm"
        ) from error
    kinds = ["Transformer", "Pooling", *(["Normalize"] if pooling.normalize else [])]
    modules = [
        {"idx": index, "name": str(index), "type": f"{PACKAGE}models.{kind}",
         "path": f"{index}_{kind}" if index else ""}
        for index, kind in enumerate(kinds)
    ]  # fmt: skip
    flags = {f"pooling_mode_{flag}": mode in pooling.modes for flag, mode in POOLING.items()}
    own = settings(out / f"1_Pooling/{CONFIG}")
    return modules, {**own, "word_embedding_dimension": hidden, **flags}
