"""What an ONNX graph does, as a list of steps over named values, and its constants as tensors.

A step has attributes as plain values, and a path: the module that it was exported from, where the exporter left its
name, so that passes choose `encoder.layer.0.*` in a file as they do in a model.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from effc.errors import SourceError
from effc.foreign.file import OWN, RUNTIME, named
from effc.paths import shown

SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operator: names of what it reads (empty where an input is left out) and of what it writes."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""
    word: str = ""
    """How the node is called in a message."""

    def get(self, name: str, absent: Any = None) -> Any:
        return self.attributes.get(name, absent)


@dataclass(kw_only=True)
class Steps:
    """A graph: its steps in order, its constants, and the names of inputs and outputs."""

    steps: list[Step]
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int

    def makers(self) -> dict[str, Step]:
        return {name: step for step in self.steps for name in step.outputs}

    def readers(self) -> dict[str, list[Step]]:
        """Steps by what they read; what is an output has a reader more, which is None."""
        found: dict[str, list[Any]] = {name: [None] for name in self.outputs}
        for step in self.steps:
            for name in step.inputs:
                found.setdefault(name, []).append(step)
        return found

    def prune(self) -> None:
        """Take out steps that nothing hangs on, and constants that nothing reads."""
        wanted = set(self.outputs)
        kept = []
        for step in reversed(self.steps):
            if wanted.intersection(step.outputs):
                kept.append(step)
                wanted.update(step.inputs)
        self.steps = kept[::-1]
        self.constants = {name: t for name, t in self.constants.items() if name in wanted}


def steps_of(model: ir.Model, known: Iterable[str]) -> Steps:
    """The steps of a model. Raises SourceError where an operator is none of `known`, with the node's name."""
    opset = max(model.opset_imports.get(word, 0) for word in OWN)
    constants = {n: _tensor(v.const_value) for n, v in model.graph.initializers.items()}
    words, steps = set(known), []
    paths_ = _paths(list(model.graph))
    strange: dict[str, str] = {}
    for node, path in zip(model.graph, paths_, strict=True):
        op = node.op_type if node.domain in OWN else f"{RUNTIME}.{node.op_type}"
        values = {name: _plain(a) for name, a in node.attributes.items()}
        outputs = tuple(v.name or "" for v in node.outputs)
        inputs = tuple(v.name or "" if v is not None else "" for v in node.inputs)
        if op == "Constant":
            constants[outputs[0]] = _constant(values)
            continue
        made = _said(node)
        if op not in words:
            strange.setdefault(op, made)
        steps.append(
            Step(op=op, inputs=inputs, outputs=outputs, attributes=values, path=path, word=made)
        )
    if strange:
        raise SourceError(
            f"effc does not read {len(strange)} operator{'s' * (len(strange) > 1)} of the file: "
            + "; ".join(list(strange.values())[:5]),
            hint="export the model without them, or compile it from torch: module:factory",
        )
    for name, tensor in constants.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise SourceError(
                f"weights hold values that are not numbers: {shown(name)}",
                hint="the file is damaged, or training went wrong; take an earlier checkpoint",
            )
    return Steps(
        steps=steps, constants=constants, opset=opset,
        inputs=tuple(v.name or "" for v in model.graph.inputs if v.name not in model.graph.initializers),
        outputs=tuple(v.name or "" for v in model.graph.outputs),
    )  # fmt: skip


@dataclass(frozen=True)
class _Named:
    name: str
    op_type: str
    output: Sequence[str]


def _said(node: ir.Node) -> str:
    return named(_Named(node.name or "", node.op_type, [v.name or "" for v in node.outputs]))


def _tensor(value: Any) -> Tensor:
    array = np.ascontiguousarray(value.numpy()).reshape(tuple(value.shape))
    return torch.from_numpy(array.copy() if not array.flags.writeable else array)


def _plain(attribute: ir.Attr) -> Any:
    if attribute.type is ir.AttributeType.TENSOR:
        return np.array(attribute.value.numpy()).reshape(tuple(attribute.value.shape))
    return attribute.value


def _constant(values: Mapping[str, Any]) -> Tensor:
    (name, value), *_ = values.items()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    kind = torch.float32 if "float" in name else torch.int64
    return torch.tensor(value, dtype=kind)


def _paths(nodes: Sequence[ir.Node]) -> list[str]:
    """For every node the dotted path of its module; of a node whose exporter left none, its own name."""
    found = [_scope(node) for node in nodes]
    count: Counter[str] = Counter()
    for place, (node, path) in enumerate(zip(nodes, found, strict=True)):
        if not path:
            count[node.op_type] += 1
            name = re.sub(r"\W+", "_", node.name or "").strip("_")
            found[place] = name or f"{node.op_type}_{count[node.op_type] - 1}"
    return found


def _scope(node: ir.Node) -> str:
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (SyntaxError, ValueError):
        scopes = []
    if isinstance(scopes, list) and len(scopes) > 1 and isinstance(scopes[-2], str):
        return _dotted(scopes[-2].split("."))
    parts = [part for part in (node.name or "").split("/") if part]
    return _dotted(parts[:-1]) if len(parts) > 1 else ""


def _dotted(parts: Iterable[str]) -> str:
    """A path of names that a module may have."""
    words = [word for part in parts for word in part.split(".") if word]
    return ".".join(re.sub(r"\W+", "_", word) for word in words[:32])


def renamed(step: Step, **changes: Any) -> Step:
    return dataclasses.replace(step, **changes)
