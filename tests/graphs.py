"""Models that fit in a line, and graphs compared as text.

    assert_graph(program, '''
        %x: f32[batch, 4] = input
        ...
    ''')

EFFC_ACCEPT=1 writes the graph that is there into the test; read the change before you keep it.
"""

import difflib
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import effc
from effc.backends import BACKENDS
from effc.backends.base import Engine, Lowered
from effc.backends.dialect import ORT
from effc.calib.data import Batch
from effc.dialect import Dialect
from effc.ir.program import Graph, Program
from effc.passes.base import PassRecord
from effc.passes.quantize import Quantize


def assert_graph(item: Program | Graph, text: str) -> None:
    """The graph shows as `text`, indentation aside."""
    shown, wanted = effc.show(item), textwrap.dedent(text).strip()
    if shown == wanted:
        return
    if os.environ.get("EFFC_ACCEPT"):
        _accept(Path(inspect.stack()[1].filename), text, shown)
        return
    lines = difflib.unified_diff(
        wanted.splitlines(), shown.splitlines(), "wanted", "shown", lineterm=""
    )
    raise AssertionError("\n".join(["the graph differs", *lines]))


def _accept(file: Path, old: str, shown: str) -> None:
    """Write `shown` where the test `file` has `old`, under the same indentation."""
    indent = old.rpartition("\n")[2]
    new = f"\n{textwrap.indent(shown, indent)}\n{indent}"
    source = file.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{file} does not hold this text once"
    file.write_text(source.replace(old, new), encoding="utf-8")


class Call(nn.Module):
    """Any function of tensors as a module; `parts` are its parameters, buffers and children."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Projections(nn.Module):
    """Queries, keys and values of one input."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x)


class Tied(nn.Module):
    """An embedding whose table is the output layer's weight too."""

    def __init__(self, words: int = 40, size: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, size)
        self.head = nn.Linear(size, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class LlamaNorm(nn.Module):
    """RMSNorm as Llama spells it."""

    def __init__(self, size: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps))


class Attention(nn.Module):
    """Self-attention as transformers write it: four projections around one fused operator."""

    def __init__(self, size: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, -1).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(batch, length, size))


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Reproducible normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batches(name: str, *shape: int, count: int = 4) -> list[Batch]:
    """Calibration batches of normal numbers for the input `name`."""
    return [Batch(inputs={name: normal(*shape, seed=seed).numpy()}) for seed in range(count)]


def quantize(
    program: Program, data: Any = None, *, dialect: Dialect = ORT, **options: Any
) -> PassRecord:
    return effc.apply(Quantize(**options), program, data, dialect=dialect)


def lower(program: Program, folder: Path, target: str = "ort") -> Lowered:
    lowered: Lowered = BACKENDS[target]().lower(program.only(), folder)
    return lowered


@contextmanager
def engine(program: Program, folder: Path, target: str = "ort") -> Iterator[Engine]:
    """The program as an engine of `target` on one thread."""
    with BACKENDS[target]().open(lower(program, folder, target), threads=1) as opened:
        yield opened


def distance(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖a‖"""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def ops(item: Program | Graph) -> list[str]:
    """Operators of a program's one graph, in order."""
    from effc.ir.select import op_name

    graph = item.only() if isinstance(item, Program) else item
    return [op_name(node) for node in graph.nodes]


def node_of(item: Program | Graph, op: str) -> Any:
    """The one node that calls `op`."""
    graph = item.only() if isinstance(item, Program) else item
    (node,) = effc.Select(op=op).sites(graph)
    return node
