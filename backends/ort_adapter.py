"""Adapters that ONNX Runtime exchanges while a session runs: left open in an engine, and written as `.onnx_adapter`.

`swap-lora` names the constants `LAYER.swap_A` [in, r] and `LAYER.swap_B` [r, out]. Here they become inputs of the file
that have a value already, of any rank r: a run that brings nothing has the engine's own adapter, and one with an active
adapter that adapter's, in the same session.

    effc.onnx_adapter("OUT/model.onnx", "billing", "billing.onnx_adapter")      # billing: a directory in PEFT's form

    adapter = onnxruntime.LoraAdapter()
    adapter.Load("billing.onnx_adapter")
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    session.run(None, feeds, options)

Options know no more than where an adapter lies in memory: whoever uses them keeps it, or its place in a run is empty.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from effc.adapter import Adapter, Low, read
from effc.errors import LoweringError, PackageError, PreconditionError, SourceError, first_line
from effc.ir.program import Graph
from effc.nn.lora import SWAP, SWAP_A, SWAP_B, scale_of

Array = np.ndarray[Any, np.dtype[Any]]
SUFFIX = ".onnx_adapter"
VERSION = 1


def leave_open(graph: Graph, model: ir.Model) -> None:
    """Let a file take other values for the adapters that a graph says are to be exchanged."""
    for layer in graph.pending.get(SWAP, {}).get("layers", ()):
        for name, axis in ((f"{layer}.{SWAP_A}", 1), (f"{layer}.{SWAP_B}", 0)):
            value = model.graph.initializers.get(name)
            if value is None or value.const_value is None:
                raise LoweringError(
                    f"the adapter of {layer} cannot be exchanged: the file has no constant {name}",
                    hint="leave `swap-lora` out, and report the model",
                )
            sizes: list[int | str] = list(value.const_value.shape.numpy())
            sizes[axis] = f"{layer}.rank"
            value.shape = ir.Shape(sizes)
            model.graph.inputs.append(value)


def onnx_adapter(
    model: str | os.PathLike[str], adapter: str | os.PathLike[str], file: str | os.PathLike[str]
) -> None:
    """Write an adapter of PEFT as ONNX Runtime's `.onnx_adapter` for an engine that `swap-lora` left open.

    Layers of the engine that the adapter leaves alone get none. Raises SourceError for a directory that is no adapter,
    or a file that is no such engine; PreconditionError for an adapter of another base; PackageError where `file` is
    something else.
    """
    place, out = Path(adapter), Path(file)
    if out.suffix != SUFFIX or out.is_dir():
        raise PackageError(f"{out} is no name of an adapter's file", hint=f"NAME{SUFFIX}")
    given, known = read(place), _open_layers(Path(model))
    named = _named(given, known, place)
    tensors: dict[str, Array] = {}
    for layer, (inner, width) in known.items():
        low = named.get(layer)
        tensors |= _pair(layer, low, given.rooted, inner, width)
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(VERSION)
    made.set_model_version(VERSION)
    made.set_parameters(
        {n: onnxruntime.OrtValue.ortvalue_from_numpy(array) for n, array in tensors.items()}
    )
    part = out.with_name(f"{out.name}.part")
    made.export_adapter(str(part.absolute()))
    os.replace(part, out)


def _open_layers(file: Path) -> dict[str, tuple[int, int]]:
    """Layers of an engine whose adapters may be exchanged, with their inputs and outputs. Raises SourceError."""
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:
        raise SourceError(
            f"{file} is no ONNX file: {first_line(error)}", hint="name OUT/model.onnx of a package"
        ) from error
    inputs = {value.name for value in model.graph.input}
    sizes = {t.name: list(t.dims) for t in model.graph.initializer if t.name in inputs}
    layers = [m[1] for name in sizes if (m := re.fullmatch(rf"(.+)\.{SWAP_A}", name))]
    found = {
        layer: (sizes[f"{layer}.{SWAP_A}"][0], sizes[f"{layer}.{SWAP_B}"][1])
        for layer in layers
        if f"{layer}.{SWAP_B}" in sizes
    }
    if not found:
        raise SourceError(
            f"{file} takes no adapters in exchange",
            hint="compile it with swap-lora behind attach-lora",
        )
    return found


def _named(
    given: Adapter, known: Mapping[str, tuple[int, int]], place: Path
) -> dict[str, Low]:  # fmt: skip
    """What an adapter has for each layer of an engine. Raises PreconditionError where it is for another base.

    The base may lie in a wrapper of effc, whose name stands before all of its own.
    """
    first = next(iter(given.layers))
    ends = [name.removesuffix(first) for name in known if f".{name}".endswith(f".{first}")]
    prefix = next(
        (p for p in sorted(ends, key=len) if all(p + n in known for n in given.layers)), None
    )
    if prefix is None:
        missing = next((n for n in given.layers if min(ends, default="") + n not in known), first)
        raise PreconditionError(
            f"{place} is an adapter of another base: the engine takes none for a layer {missing!r}",
            hint="attach adapters to all the layers that it has, and put swap-lora behind",
        )
    for name, low in given.layers.items():
        if low.magnitude is not None:
            raise PreconditionError(
                f"{place} is in DoRA's form, which scales what a layer itself gives",
                hint="merge it, or train it as lora or rslora",
            )
        if (low.a.shape[1], len(low.b)) != known[prefix + name]:
            inner, width = known[prefix + name]
            raise PreconditionError(
                f"{place} is an adapter of another base: {name} is [{width}, {inner}] in the engine, "
                f"and [{len(low.b)}, {low.a.shape[1]}] there",
                hint="name the engine of the model that it was trained on",
            )
    return {prefix + name: low for name, low in given.layers.items()}


def _pair(layer: str, low: Low | None, rooted: bool, inner: int, width: int) -> dict[str, Array]:
    """The two constants of a layer, the scale in B; of rank 1 and 0 where there is nothing."""
    if low is None:
        a, b = np.zeros((inner, 1), np.float32), np.zeros((1, width), np.float32)
    else:
        scale = scale_of(low.alpha, low.rank, rooted=rooted)
        a = low.a.T.to(torch.float32).contiguous().numpy()
        b = (low.b.double().T * scale).to(torch.float32).contiguous().numpy()
    return {f"{layer}.{SWAP_A}": a, f"{layer}.{SWAP_B}": b}
