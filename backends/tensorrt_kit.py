"""What builds and checks an engine with enterprise TensorRT's own tool, on a machine that has neither effc nor torch.

kit.txt             the line for trtexec 11, which takes its precision from the ONNX, and the one that checks
kit-*.bin           inputs, raw
kit-expected.npz    what the graph gives for them in torch, casts in it, layers on integers as fused kernels do them
kit-check.py        compares what trtexec wrote with that
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from effc.backends.base import Array, Port
from effc.backends.eager import ports
from effc.backends.emulate import emulated, integer_products
from effc.backends.onnx_widen import open_widened
from effc.backends.tensorrt_profile import Sizes, shapes_of
from effc.ir.check import drift
from effc.ir.program import Graph

TEXT, EXPECTED, CHECK = "kit.txt", "kit-expected.npz", "kit-check.py"
_SIDES = ("minShapes", "optShapes", "maxShapes")
_SCRIPT = r'''"""Compares outputs.json, as trtexec writes it with --exportOutput, with kit-expected.npz.

    python kit-check.py [outputs.json]

Prints the relative L2 of every output; ends with 1 where one is missing or above {most}.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

text = Path(sys.argv[1] if sys.argv[1:] else "outputs.json").read_text()
text = re.sub(r"(?<=[\s,\[])(-?)inf(inity)?\b", r"\1Infinity", text)  # as C++ writes it
text = re.sub(r"(?<=[\s,\[])-?nan\b", "NaN", text)
found = {{o["name"]: o for o in json.loads(text)}}
wanted = np.load(Path(__file__).with_name("kit-expected.npz"))
bad = False
for name in wanted.files:
    if name not in found:
        print(f"{{name}}: missing")
        bad = True
        continue
    values = np.array(found[name]["values"], np.float64).ravel()
    exact = wanted[name].astype(np.float64).ravel()
    if values.size != exact.size:
        print(f"{{name}}: {{values.size}} values, {{exact.size}} are wanted")
        bad = True
        continue
    there = np.isfinite(exact)
    if not np.array_equal(exact[~there], values[~there], equal_nan=True):
        print(f"{{name}}: infinity or NaN in other places than is wanted")
        bad = True
    gap = np.linalg.norm(values[there] - exact[there]) / max(np.linalg.norm(exact[there]), 1e-30)
    print(f"{{name}}: relative L2 {{gap:.3g}}")
    bad |= not gap <= {most}
sys.exit(bad)
'''
FLOAT_GAP, NARROW_GAP = 1e-3, 0.05
"""Relative L2 that an engine may be from what is expected: in float32 throughout, and with anything narrower in it."""


@dataclass(frozen=True, kw_only=True)
class Kit:
    """Files; and for a graph with products of integers how far onnxruntime, which rounds at every node, is from what is
    expected: relative L2, the worst output.
    """

    files: tuple[str, ...]
    gap: float | None = None


def write(graph: Graph, place: Path, onnx: str, profile: Mapping[str, Sizes]) -> Kit:
    """The kit of an ONNX file, written beside it."""
    ins, _ = ports(graph)
    feeds = _example(graph, ins, profile)
    files = {name: f"kit-{re.sub(r'[^A-Za-z0-9_-]', '_', name)}.bin" for name in feeds}
    for name, value in feeds.items():
        (place / files[name]).write_bytes(np.ascontiguousarray(value).tobytes())
    made = emulated(graph, {name: torch.from_numpy(value) for name, value in feeds.items()})
    expected = {name: value.numpy() for name, value in made.items()}
    np.savez(place / EXPECTED, **expected)  # type: ignore[arg-type]
    gaps: dict[str, float] = {}
    if integer_products(graph):
        with open_widened(place / onnx, 1) as engine:
            found = {name: torch.from_numpy(value) for name, value in engine(feeds).items()}
        gaps = {name: drift({name: made[name]}, found).rel_l2 for name in made}
    most = NARROW_GAP if _is_narrow(graph) else FLOAT_GAP
    (place / CHECK).write_text(_SCRIPT.format(most=most), encoding="utf-8")
    text = _text(onnx, ins, profile, feeds, files, gaps)
    (place / TEXT).write_text(text, encoding="utf-8")
    return Kit(files=(TEXT, CHECK, EXPECTED, *files.values()), gap=max(gaps.values(), default=None))


def _is_narrow(graph: Graph) -> bool:
    """Whether anything is in less than 32 bit."""
    kinds = {t.dtype for t in graph.tensors().values()}
    kinds |= {
        n.meta["val"].dtype for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)
    }
    return bool(
        kinds & {torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn}
    )


def _example(graph: Graph, ins: Sequence[Port], profile: Mapping[str, Sizes]) -> dict[str, Array]:
    """Inputs of the graph's own example where they fit the profile; else a normal draw, and whole numbers of one."""
    args, kwargs = graph.exported.example_inputs or ((), {})
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if len(given) == len(ins):
        feeds = {p.name: v.detach().numpy() for p, v in zip(ins, given, strict=True)}
        if all(_fits(feeds[p.name], p.shape, profile) for p in ins):
            return feeds
    draw = np.random.default_rng(0)
    made: dict[str, Array] = {}
    near = {
        word: (u := max(1, min(usual, 2 * least)), u, u)
        for word, (least, usual, _) in profile.items()
    }
    for port in ins:
        shape = shapes_of(port.shape, near)[0]
        kind = np.dtype(port.dtype)
        values = draw.standard_normal(shape) if kind.kind == "f" else np.ones(shape)
        made[port.name] = values.astype(kind)
    return made


def _fits(value: Array, shape: Sequence[int | str], profile: Mapping[str, Sizes]) -> bool:
    least, _, most = shapes_of(shape, profile)
    return len(least) == value.ndim and all(
        low <= size <= high for low, size, high in zip(least, value.shape, most, strict=True)
    )


def _text(
    onnx: str,
    ins: Sequence[Port],
    profile: Mapping[str, Sizes],
    feeds: Mapping[str, Array],
    files: Mapping[str, str],
    gaps: Mapping[str, float],
) -> str:
    def shaped(sizes: Mapping[str, tuple[int, ...]]) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in sizes.items())

    words = [f"--onnx={onnx}"]
    free = [p for p in ins if any(isinstance(size, str) for size in p.shape)]
    for place, side in enumerate(_SIDES if free else ()):
        sizes = {p.name: shapes_of(p.shape, profile)[place] for p in free}
        words.append(f"--{side}={shaped(sizes)}")
    if free:
        words.append(f"--shapes={shaped({p.name: feeds[p.name].shape for p in free})}")
    loads = ",".join(f"{name}:{file}" for name, file in files.items())
    words += [f"--loadInputs={loads}", "--exportOutput=outputs.json", "--saveEngine=model.plan"]
    lines = [
        "Enterprise TensorRT 11, on the machine with the GPU, in this folder:",
        "",
        "    trtexec " + " \\\n        ".join(words),
        f"    python {CHECK} outputs.json",
        "",
    ]
    if gaps:
        lines += [
            "What is expected has integer products summed exactly and rounded once, as fused kernels do. ONNX Runtime,",
            "which rounds between nodes, is this far from it on the same inputs (relative L2):",
            "",
            *(f"    {name}: {gap:.3g}" for name, gap in gaps.items()),
            "",
        ]
    return "\n".join(lines)
