"""What builds and checks an engine with enterprise TensorRT's own tool, on a machine that has neither effc nor torch.

kit.txt             the line for trtexec 11, which takes its precision from the ONNX, and the one that checks
kit-*.bin           inputs, raw
kit-expected.npz    what the graph gives for them in torch, casts in it, layers on integers as fused kernels do them
kit-check.py        compares what trtexec wrote with that
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch

from effc.backends.base import Array, Lowered
from effc.backends.emulate import emulated
from effc.backends.tensorrt_build import Plan, shapes_of
from effc.ir.program import Graph

TEXT, EXPECTED, CHECK = "kit.txt", "kit-expected.npz", "kit-check.py"
_SIDES = ("minShapes", "optShapes", "maxShapes")
_SCRIPT = '''"""Compares outputs.json, as trtexec writes it with --exportOutput, with kit-expected.npz.

    python kit-check.py [outputs.json]

Prints the relative L2 of every output; ends with 1 where one is missing or above 0.05.
"""

import json
import sys
from pathlib import Path

import numpy as np

found = {o["name"]: o for o in json.loads(Path(sys.argv[1] if sys.argv[1:] else "outputs.json").read_text())}
wanted = np.load(Path(__file__).with_name("kit-expected.npz"))
bad = False
for name in wanted.files:
    if name not in found:
        print(f"{name}: missing")
        bad = True
        continue
    values = np.array(found[name]["values"], np.float64)
    exact = wanted[name].astype(np.float64).ravel()
    if values.size != exact.size:
        print(f"{name}: {values.size} values, {exact.size} are wanted")
        bad = True
        continue
    gap = np.linalg.norm(values - exact) / max(np.linalg.norm(exact), 1e-30)
    print(f"{name}: relative L2 {gap:.3g}")
    bad |= not gap <= 0.05
sys.exit(bad)
'''


def write(graph: Graph, lowered: Lowered, plan: Plan) -> tuple[str, ...]:
    """The files of the kit, written beside the engine."""
    feeds = _example(graph, lowered, plan)
    files = {name: f"kit-{re.sub(r'[^A-Za-z0-9_-]', '_', name)}.bin" for name in feeds}
    place = lowered.directory
    for name, value in feeds.items():
        (place / files[name]).write_bytes(np.ascontiguousarray(value).tobytes())
    made = emulated(graph, {name: torch.from_numpy(value) for name, value in feeds.items()})
    np.savez(place / EXPECTED, **{name: value.numpy() for name, value in made.items()})  # type: ignore[arg-type]
    (place / CHECK).write_text(_SCRIPT, encoding="utf-8")
    (place / TEXT).write_text(_text(lowered, plan, feeds, files), encoding="utf-8")
    return (TEXT, CHECK, EXPECTED, *files.values())


def _example(graph: Graph, lowered: Lowered, plan: Plan) -> dict[str, Array]:
    """Inputs of the graph's own example where they fit the profile; else whole numbers from 0 and a normal draw."""
    args, kwargs = graph.exported.example_inputs or ((), {})
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if len(given) == len(lowered.inputs):
        feeds = {p.name: v.detach().numpy() for p, v in zip(lowered.inputs, given, strict=True)}
        if all(_fits(feeds[p.name], p.shape, plan) for p in lowered.inputs):
            return feeds
    draw = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for port in lowered.inputs:
        least, usual, _ = shapes_of(port.shape, plan.profile)
        shape = tuple(min(u, 2 * low) for u, low in zip(usual, least, strict=True))
        kind = np.dtype(port.dtype)
        values = draw.standard_normal(shape) if kind.kind == "f" else np.ones(shape)
        made[port.name] = values.astype(kind)
    return made


def _fits(value: Array, shape: tuple[int | str, ...], plan: Plan) -> bool:
    least, _, most = shapes_of(shape, plan.profile)
    return len(least) == value.ndim and all(
        low <= size <= high for low, size, high in zip(least, value.shape, most, strict=True)
    )


def _text(
    lowered: Lowered, plan: Plan, feeds: Mapping[str, Array], files: Mapping[str, str]
) -> str:
    def shaped(sizes: Mapping[str, tuple[int, ...]]) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in sizes.items())

    words = [f"--onnx={lowered.files[1]}"]
    free = [p for p in lowered.inputs if any(isinstance(size, str) for size in p.shape)]
    for place, side in enumerate(_SIDES if free else ()):
        sizes = {p.name: shapes_of(p.shape, plan.profile)[place] for p in free}
        words.append(f"--{side}={shaped(sizes)}")
    if free:
        words.append(f"--shapes={shaped({p.name: feeds[p.name].shape for p in free})}")
    loads = ",".join(f"{name}:{file}" for name, file in files.items())
    words += [f"--loadInputs={loads}", "--exportOutput=outputs.json", "--saveEngine=model.plan"]
    return "\n".join(
        [
            "Enterprise TensorRT 11, on the machine with the GPU, in this folder:",
            "",
            "    trtexec " + " \\\n        ".join(words),
            f"    python {CHECK} outputs.json",
            "",
        ]
    )
