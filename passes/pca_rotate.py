"""Turns a residual stream into the basis of its principal components, most variance first (SliceGPT).

    W'[…, j, …] = Σᵢ W[…, i, …] · Q[i, j]        Q [n, n] orthonormal, of every tensor that holds the width

An RMSNorm without gain sees lengths alone, and Q keeps them: RMSNorm(x Q) = RMSNorm(x) Q. So where everything between
is linear in the stream, outputs stay as they are, and what `prune-dims` removes from the end of the width is what the
stream has least of (Ashkboos et al. 2024, arXiv 2401.15024, section 3). Gains of norms go into the layers that read
them first.

Columns of Q are the eigenvectors of Σ x xᵀ over all inputs of the norms. Rows x are brought to one length before, as
the norms will do: without that, positions and blocks where the stream is long decide for those where it is short,
which costs accuracy (`benchmarks/slicing.py`).

The paper also has a Q for every block, which takes a linear layer more in every residual connection. One Q serves the
whole stream here: nothing is added to the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from effc.calib.collectors import Directions, Gram
from effc.calib.probe import Probe
from effc.errors import PreconditionError
from effc.ir.axes import Axis, Stop, leaves, of
from effc.ir.edit import is_constant, rebind, replace, tensor_name, tensor_of
from effc.ir.program import Graph, Program, place_of
from effc.ir.select import Words, op_name, value_key
from effc.passes.base import Pass, Stats
from effc.passes.coupling import Coupling, Group, coupled_dims
from effc.passes.coupling_reading import Call, Reading, every, tensors_of
from effc.passes.layernorm import FACTORS, MOVES, SUMS, fold_scale, put, scaled_layer
from effc.quant.principal import principal

log = logging.getLogger(__name__)

LAYERS = ("linear", "matmul", "mm", "embedding", "conv1d", "conv2d", "conv3d")
"""What is linear in a stream and in its own weight, whichever side the width is on."""
PARTS = ("stack", "split", "split_with_sizes", "chunk", "unbind", "getitem", "repeat", "flip")
"""What only moves places other than the width, beside `MOVES`."""
MOST_TOLD = 3
"""Streams that are named with the reason, where none can be rotated."""


@dataclass(kw_only=True)
class Stream:
    """A residual stream that can be rotated."""

    group: Group
    norms: list[fx.Node] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """What the inputs of the norms are measured under."""
    gains: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    """Norms with a gain, and the linear layers that take it."""
    scales: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    """Products of a layer with a constant along the width: the layer and the constant."""


@dataclass(frozen=True, kw_only=True)
class PCARotate(Pass):
    """Rotates residual streams under RMSNorm into their principal components, so that prune-dims can drop the last.

    `groups` are shell patterns of names of widths, as `effc inspect MODEL --coupling` lists them. With `normed` the
    components are those of what norms give, where every position counts alike; else of what they read, as in the paper.
    """

    name = "pca-rotate"
    tolerance = 1e-4

    groups: Words = "*"
    normed: bool = True

    @property
    def measures(self) -> bool:
        return True

    @property
    def measures_again(self) -> bool:
        return True

    def requires(self, program: Program) -> None:
        plans = [self._plan(graph) for graph in program if self.takes(graph.role)]
        if any(streams for streams, _ in plans):
            return
        refusals = [why for _, found in plans for why in found]
        if not refusals:
            raise PreconditionError(
                f"no norm reads a residual stream of {self.groups!r}, so there is none to rotate",
                hint="leave the pass out; `effc inspect MODEL --coupling` lists the widths that there are",
            )
        reasons = "; ".join(f"{name}: {why}" for name, why in refusals[:MOST_TOLD])
        hint = next((why.hint for _, why in refusals[:MOST_TOLD] if why.hint), None)
        raise PreconditionError(
            f"no residual stream can be rotated; {reasons}",
            hint=f"{hint}, or leave the pass out"
            if hint
            else "leave the pass out: widths can be pruned without it",
        )

    def probes(self, graph: Graph) -> Iterable[Probe]:
        streams, _ = self._plan(graph)
        for stream in streams:
            gram = Directions() if self.normed else Gram()  # one for all of them, which are summed
            for key, norm in zip(stream.keys, stream.norms, strict=True):
                yield Probe(key=key, node=Call(norm)["input"], collector=gram)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        streams, refusals = self._plan(graph)
        for name, why in refusals:
            log.info("%s is not rotated: %s", name, why)
        changed = 0
        for stream in streams:
            key = f"{graph.role}/{stream.group.name}"
            directions = stats.decide_tensor(key, partial(_directions, stats, stream.keys[0]))
            _fold(graph, stream)
            changed += _rotate(graph, stream.norms[0], directions)
        return changed

    def _plan(self, graph: Graph) -> tuple[list[Stream], list[tuple[str, Stop]]]:
        streams, refusals = plan(graph)
        words = (self.groups,) if isinstance(self.groups, str) else self.groups

        def meant(name: str) -> bool:
            return any(fnmatchcase(name, word) for word in words)

        return [s for s in streams if meant(s.group.name)], [r for r in refusals if meant(r[0])]


def plan(graph: Graph) -> tuple[list[Stream], list[tuple[str, Stop]]]:
    """Streams that can be rotated, and the widths under norms that cannot, with the reason."""
    coupling = coupled_dims(graph)
    reading = coupling.reading
    groups = {group.unit: group for group in coupling.groups.values()}
    norms: dict[Axis, list[fx.Node]] = {}
    for node in graph.nodes:
        if op_name(node) in ("rms_norm", "layer_norm"):
            norms.setdefault(of(reading.of(node)[-1]), []).append(node)
    streams: list[Stream] = []
    refusals: list[tuple[str, Stop]] = []
    for axis, found in norms.items():
        group = groups.get(axis)
        if group is None:
            why = next((x.stop for x in leaves(axis) if x.stop is not None), None)
            side = reading.why(found[0], "it normalises parts that lie side by side")
            refusals.append((reading.names[found[0]], why or side))
            continue
        stream = Stream(group=group, norms=found)
        obstacle = group.stop or _obstacle(coupling, stream)
        if obstacle is not None:
            refusals.append((group.name, obstacle))
            continue
        stream.keys = [value_key(graph, reading.names, Call(norm)["input"]) for norm in found]
        streams.append(stream)
    return streams, refusals


# -- what a stream goes through


def _obstacle(coupling: Coupling, stream: Stream) -> Stop | None:
    """Why a stream must stay as it is; notes in `stream` what is to be folded where it need not."""
    reading, unit = coupling.reading, stream.group.unit
    for node in coupling.graph.nodes:
        given = [n for n in node.all_input_nodes if _has(reading, n, unit)]
        if not given and not _has(reading, node, unit):
            continue
        if not tensors_of(node.meta.get("val")):
            continue  # a size
        why = _nonlinear(coupling.graph, reading, node, given, stream)
        if why is not None:
            return why if isinstance(why, Stop) else reading.why(node, why)
    return None


def _has(reading: Reading, node: fx.Node, unit: Axis) -> bool:
    return any(unit in leaves(axis) for axis in every(reading.dims.get(node, [])))


def _is_whole(reading: Reading, node: fx.Node, unit: Axis) -> bool:
    """Whether the width is a dimension of its own wherever a value has it, and the value can be rotated."""
    whole = all(
        of(axis) is unit or unit not in leaves(axis) for axis in every(reading.dims.get(node, []))
    )
    return whole and all(v.is_floating_point() for v in tensors_of(node.meta.get("val")))


def _nonlinear(
    graph: Graph, reading: Reading, node: fx.Node, given: Sequence[fx.Node], stream: Stream
) -> Stop | str | None:
    """Why a call that has the width is not the same behind a rotation; None where it is."""
    unit = stream.group.unit
    word, call = op_name(node), Call(node)
    has = _has(reading, node, unit)
    if not all(_is_whole(reading, value, unit) for value in (*given, node)):
        return "the width is part of a longer dimension, or in integers"
    if sum(of(axis) is unit for axis in reading.of(node)) > 1:
        return f"{word} makes something that has the width twice"
    if word in LAYERS and given and call["groups"] in (None, 1):
        inner = word in ("matmul", "mm") and any(
            of(axis) is unit for value in given for axis in reading.of(value)[:-2]
        )
        shifted = has and isinstance(call["bias"], fx.Node) and call["bias"] not in given
        return f"{word} adds or multiplies channel by channel" if inner or shifted else None
    if word == "rms_norm" and of(reading.of(node)[-1]) is unit:
        return _gain(graph, reading, node, stream)
    operands = node.args[:2]
    if has and word in SUMS:
        return None if all(o in given for o in operands) else f"{word} adds what is no stream"
    if has and word in FACTORS:
        carrying = [o for o in operands if isinstance(o, fx.Node) and o in given]
        if len(carrying) == 1 and (word == "mul" or operands[0] in given):
            return None
        dim = next(d for d, axis in enumerate(reading.of(node)) if of(axis) is unit)
        scaled = scaled_layer(node, carrying, dim)
        if scaled is not None:
            stream.scales[node] = scaled
            return None
        return f"the stream is multiplied channel by channel by {word}"
    if has and word in (*MOVES, *PARTS) and all(value in given for value in _moved(node)):
        return None
    return f"the stream goes through {word}, which is not linear in it"


def _moved(node: fx.Node) -> list[fx.Node]:
    first = node.args[0]
    return [
        n for n in (first if isinstance(first, list | tuple) else [first]) if isinstance(n, fx.Node)
    ]


def _gain(graph: Graph, reading: Reading, norm: fx.Node, stream: Stream) -> Stop | None:
    """A gain that is alike along the width may stay; any other needs linear layers behind the norm."""
    gain = tensor_of(graph, Call(norm)["weight"])
    if bool((gain == gain[0]).all()):
        return None
    readers: list[fx.Node] = []
    todo = [norm]
    while todo:
        value = todo.pop()
        for user in value.users:
            word = op_name(user) if user.op == "call_function" else user.op
            if user.op == "call_function" and not tensors_of(user.meta.get("val")):
                continue  # a size
            weight = Call(user)["weight"] if word == "linear" else None
            if word == "linear" and user.args[0] is value and is_constant(graph, weight):
                readers.append(user)
            elif word in MOVES and word != "cat" and _has(reading, user, stream.group.unit):
                todo.append(user)
            else:
                reason = f"the gain of {reading.names[norm]} can only go into linear layers, and {word} reads it"
                return reading.why(user, reason)
    stream.gains[norm] = readers
    return None


# -- what becomes of it


def _directions(stats: Stats, key: str) -> Tensor:
    return principal(stats[key].matrix())


def _fold(graph: Graph, stream: Stream) -> None:
    """Take out of the stream what counts channel by channel: scales of branches and gains of norms."""
    for product, (layer, factor) in stream.scales.items():
        fold_scale(graph, layer, tensor_of(graph, factor).flatten())
        replace(graph, product, layer)
    parts: dict[tuple[fx.Node, fx.Node], list[fx.Node]] = {}
    for norm, readers in stream.gains.items():
        gain = Call(norm)["weight"]
        for reader in readers:
            parts.setdefault((Call(reader)["weight"], gain), []).append(reader)
    made: dict[Any, Tensor] = {}
    for (weight, gain), readers in parts.items():
        tensor, gains = tensor_of(graph, weight), tensor_of(graph, gain)
        key = (*place_of(tensor), *place_of(gains))
        if key not in made:
            exact = tensor.to(torch.float64) * gains.to(torch.float64)
            made[key] = exact.to(tensor.dtype)
        if set(weight.users) != set(readers):
            size = tensor.numel() * tensor.element_size() / 1e6
            log.info("%s, which others read too, becomes two tensors: %.1f MB more", weight, size)
        put(graph, weight, readers, made[key], "gain")
    for node in {Call(norm)["weight"]: None for norm in stream.gains}:
        ones = torch.ones_like(tensor_of(graph, node))
        rebind(graph, tensor_name(graph, node) or "", ones, "fold-gain")


def _rotate(graph: Graph, norm: fx.Node, directions: Tensor) -> int:
    """Rotate every tensor that has the width that a norm reads; gives how many. Names of one tensor stay so."""
    coupling = coupled_dims(graph)
    unit = of(coupling.reading.of(norm)[-1])
    gains = {Call(n)["weight"] for n, _ in coupling.reading.norms}
    made: dict[Any, Tensor] = {}
    for name, node in coupling.constants.items():
        dims = [d for d, axis in enumerate(coupling.reading.of(node)) if of(axis) is unit]
        if not dims or node in gains:
            continue
        tensor = tensor_of(graph, node)
        key = (*place_of(tensor), *dims)
        if key not in made:
            made[key] = _turned(tensor, dims, directions)
        rebind(graph, name, made[key], "pca-rotate")
    return len(made)


def _turned(tensor: Tensor, dims: Sequence[int], directions: Tensor) -> Tensor:
    exact = tensor.to(torch.float64)
    for dim in dims:
        exact = torch.tensordot(exact, directions, dims=([dim], [0])).movedim(-1, dim)
    return exact.to(tensor.dtype).contiguous()
