"""Quantisation block by block: roundings that are learned on what each block is to give (AdaRound, BRECQ).

    weights        min over h in {0, 1}   ‖block(x̂; ŵ(h)) − y‖²      x̂ behind what is rounded already, y in float
    activations    min over steps s       ‖block_s(x̂; ŵ) − y‖²       x̂ with rounded activations too

A weight that is rounded to nearest is not what its layer's output wants. Here every weight goes up or down (Nagel et
al. 2020), for all layers of a residual block, an attention or a feed-forward part together (Li et al. 2021), which
reads what the blocks in front of it give now. Scales are those of nearest rounding, and what would be worse than
nearest on the same rows is not taken. When all weights are codes, the steps of activations are learned (LSQ, Esser et
al. 2020) from inputs that are rounded, as they will be. Biases then give every channel of every layer the mean that it
has in float (Nagel et al. 2019, section 4.2, on what the rounded layers in front really give): a squared error hardly
sees a small mean, and what runs a model again and again adds it up. Samples are a fixed number of rows: memory does not
grow with the data.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, fx

from effc.calib.calibrator import MASK
from effc.calib.collectors import Feeds
from effc.calib.probe import Probe, fitting
from effc.errors import PreconditionError
from effc.ir.edit import tensor_name, tensor_of
from effc.ir.program import Graph, Program
from effc.ir.select import op_name, site_names
from effc.passes.base import Stats
from effc.passes.blocks import Block, above, blocks
from effc.passes.quantize import SAME_GRID, Quantize, Quantized, Work, _channel_axis, constant_bias
from effc.quant import rounding
from effc.quant.affine import dequantize, quantize, steady
from effc.quant.ops import DEQUANTIZE, QUANTIZE
from effc.quant.scheme import Scheme

log = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=1)]
MOST_BYTES = 1 << 30
"""Of the inputs and outputs of a block that are held at a time; a block with more has fewer rows."""
NEAR = 1e-3
"""A block whose rows give the same beside rows of another time has a batch of any."""
TRIED = 3
"""Steps of a block that are timed to say how long all will take."""


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Quantize):
    """Quantises as `quantize` does, with codes and activation steps that are learned block by block.

    A block is a module with at most `block_layers` layers, or a layer. Each takes `steps` of Adam at rate `lr` for its
    weights, and `activation_steps` at `activation_lr` for its activations, on batches of `batch` of the `rows` that
    are drawn from the calibration data. `pull` is what drives roundings to one side, beside an error that is 1 for
    nearest rounding. With `biases` means are put right by them, once behind the weights of a block and once at the end.
    """

    name = "reconstruct"

    steps: Count = 400
    lr: Annotated[float, Field(gt=0)] = 3e-2
    activation_steps: Annotated[int, Field(ge=0)] = 100
    activation_lr: Annotated[float, Field(gt=0)] = 2e-3
    batch: Count = 32
    rows: Count = 256
    block_layers: Count = 6
    pull: Annotated[float, Field(gt=0)] = 2.0
    biases: bool = True
    seed: int = 0

    @property
    def measures(self) -> bool:
        return True

    @property
    def measures_again(self) -> bool:
        return True

    def requires(self, program: Program) -> None:
        if self._is_fp8 or self._of_tokens or self.rounding != "nearest":
            raise PreconditionError(
                "reconstruct learns integer codes beside activations with one scale each",
                hint="leave dtype, activation_scale and rounding out",
            )
        for graph in program:
            if self.takes(graph.role) and len(sizes := _counts(graph)) > 1:
                raise PreconditionError(
                    f"reconstruct takes samples apart by the first dimension of inputs, and those of graph "
                    f"{graph.role!r} have {len(sizes)} kinds of it",
                    hint="quantize with `rounding: gptq`, which takes any inputs",
                )
        super().requires(program)

    def probes(self, graph: Graph) -> Iterable[Probe]:
        yield from super().probes(graph)
        nodes, counts = graph.input_nodes(), _counts(graph)
        wide = [_is_wide(node, counts) for node in nodes.values()]
        collector = Feeds(tuple(nodes), wide, self.rows, self.seed)
        for name, node in nodes.items():
            yield Probe(key=_feeds_key(graph, name), node=node, collector=collector)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        sites = self.sites(graph)
        if not sites:
            return 0
        return self._quantised(_Work(self, graph, stats, site_names(graph)), sites)


def _feeds_key(graph: Graph, name: str) -> str:
    return f"{graph.role}/input:{name}"


def _counts(graph: Graph) -> set[str]:
    """The free sizes that inputs have first: how many samples there are, where it is one."""
    shapes = [node.meta["val"].shape for node in graph.input_nodes().values()]
    return {str(s[0]) for s in shapes if len(s) and not isinstance(s[0], int)}


def _is_wide(node: fx.Node, counts: set[str]) -> bool:
    """Whether a value has a row for each sample."""
    shape = node.meta["val"].shape
    return bool(len(shape)) and str(shape[0]) in counts


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Codes by the name of the weight, factors on activation steps by the key of the value, biases by their layer."""

    codes: Mapping[str, Tensor]
    gains: Mapping[str, float]
    biases: Mapping[str, Tensor]


class _Work(Work):
    """The rewrite with what was learned on a copy of the graph, which is done when the first of it is asked for."""

    def __init__(
        self, pass_: Reconstruct, graph: Graph, stats: Stats, names: dict[fx.Node, str]
    ) -> None:
        super().__init__(pass_, graph, stats, names)
        self.pass_ = pass_
        self.float = graph.clone()
        self._learned: Learned | None = None

    @property
    def learned(self) -> Learned:
        if self._learned is None:
            self._learned = _Learner(self.pass_, self.float, self.stats).learned()
        return self._learned

    def codes(
        self, node: fx.Node, tensor: Tensor, grid: tuple[Tensor, Tensor, Scheme], limit: int | None
    ) -> Tensor:
        if all(op_name(user) == "embedding" for user in node.users):
            return super().codes(node, tensor, grid, limit)
        name = tensor_name(self.graph, node) or ""
        return self.stats.decide_tensor(
            f"{self.graph.role}/{name}", lambda: self.learned.codes[name]
        )

    def correct_bias(self, site: fx.Node, weight: Quantized) -> None:
        bias = _own_bias(self.graph, site) if self.pass_.biases else None
        if bias is None:
            super().correct_bias(site, weight)
            return
        key = f"{self.graph.role}/{self.names[site]}:bias"
        self.correct(
            site, bias, self.stats.decide_tensor(key, lambda: self.learned.biases[site.name])
        )

    def grid(self, value: fx.Node, key: str, scheme: Scheme) -> tuple[float, int]:
        def make() -> list[float | int]:
            step, zero_point = self.measured_grid(key, scheme)
            gain = self.learned.gains.get(key, 1.0)
            return [float(torch.tensor(steady(step * gain, 12), dtype=torch.float32)), zero_point]

        step, zero_point = self.stats.decide(key, make)
        return step, zero_point


def _own_bias(graph: Graph, site: fx.Node) -> fx.Node | None:
    """The bias of a layer that is constant and that nobody else reads."""
    bias = constant_bias(graph, site)
    return bias if bias is not None and list(bias.users) == [site] else None


class _Nearest(Work):
    """The rewrite as it would be by nearest rounding, remembering which tensor holds which weight's codes."""

    def __init__(
        self, pass_: Quantize, graph: Graph, stats: Stats, names: dict[fx.Node, str]
    ) -> None:
        super().__init__(pass_, graph, stats, names)
        self.rounded: dict[str, _Rounded] = {}

    def codes(
        self, node: fx.Node, tensor: Tensor, grid: tuple[Tensor, Tensor, Scheme], limit: int | None
    ) -> Tensor:
        made = super().codes(node, tensor, grid, limit)
        if any(op_name(user) != "embedding" for user in node.users):
            scale, zero, scheme = grid
            name, weight = tensor_name(self.graph, node) or "", tensor.detach()
            self.rounded[name] = _Rounded(
                name=name, weight=weight, scale=scale, zero=zero, scheme=scheme, limit=limit
            )
        return made

    def _clamps(self, activation: fx.Node, step: float, zero_point: int) -> bool:
        return False  # where nothing is rounded, nothing cuts in the place of the activation

    def weight(self, site: fx.Node, node: fx.Node, scheme: Scheme) -> Quantized:
        made = super().weight(site, node, scheme)
        name = tensor_name(self.graph, node) or ""
        if name in self.rounded:
            self.rounded[name].node = made.codes
        return made


@dataclass(kw_only=True)
class _Rounded:
    """A weight and its grid; `node` stands for its codes in the graph."""

    name: str
    weight: Tensor
    scale: Tensor
    zero: Tensor
    scheme: Scheme
    limit: int | None
    node: fx.Node | None = None

    def soft(self, a: Tensor) -> Tensor:
        return rounding.between(self.weight, rounding.soft(a), self.scale, self.zero, self.scheme)

    def made(self, codes: Tensor) -> Tensor:
        return dequantize(codes, self.scale, self.zero, self.scheme)

    def nearest(self) -> Tensor:
        return quantize(self.weight, self.scale, self.zero, self.scheme)


@dataclass(kw_only=True)
class _Part:
    """A block in the quantised graph: what it reads, its nodes in order, and where its values leave it."""

    block: Block
    inputs: list[fx.Node]
    nodes: list[fx.Node]
    outputs: list[fx.Node]
    weights: list[_Rounded]
    keys: list[str]
    """Of the activation grids that are in it."""
    layers: list[str]
    """Those with a bias of their own, in order."""


Values = dict[fx.Node, Any]


@dataclass(kw_only=True)
class _Rows:
    """What a block reads and is to give, for rows that may stand in one batch."""

    inputs: list[Any]
    wide: list[bool]
    targets: list[Tensor]
    masks: list[Tensor | None]

    def __len__(self) -> int:
        return len(self.targets[0])

    def some(self, draw: torch.Generator, count: int) -> _Rows:
        if count >= len(self):
            return self
        return self.at(torch.randperm(len(self), generator=draw)[:count])

    def tiled(self, count: int) -> _Rows:
        """As many rows as a step has, some more than once; as they are where a number says how many there are."""
        is_free = any(self.wide) and all(isinstance(value, Tensor) for value in self.inputs)
        return self.at(torch.arange(count) % len(self)) if is_free else self

    def at(self, chosen: Tensor) -> _Rows:
        inputs = [v[chosen] if w else v for v, w in zip(self.inputs, self.wide, strict=True)]
        masks = [m if m is None else m[chosen] for m in self.masks]
        return _Rows(
            inputs=inputs, wide=self.wide, targets=[t[chosen] for t in self.targets], masks=masks
        )


class _Learner:
    """Learns on a float graph and its copy that is rounded to nearest, of which the codes change block by block."""

    def __init__(self, pass_: Reconstruct, graph: Graph, stats: Stats) -> None:
        self.pass_, self.float, self.stats = pass_, graph, stats
        self.quantised = graph.clone()
        self.decided = stats.afresh()
        work = _Nearest(pass_, self.quantised, self.decided, site_names(self.quantised))
        sites = pass_.sites(self.quantised)
        pass_._quantised(work, sites)
        self.rounded = work.rounded
        self.codes = {name: weight.nearest() for name, weight in self.rounded.items()}
        self.gains = {key: 1.0 for key in self.decided.decisions if self._is_grid(key)}
        by_name = {node.name: node for node in self.float.fx.nodes}
        owned = {s: _own_bias(graph, by_name[s.name]) for s in sites} if pass_.biases else {}
        self.biases = {s.name: tensor_of(graph, b) for s, b in owned.items() if b is not None}
        self.readers = {s.name: s for s in owned}
        """Layers of the quantised graph; what they read as a bias is overruled by `biases`."""
        self.feeds = stats[_feeds_key(graph, graph.inputs[0])].groups(pass_.batch)
        found = blocks(graph, pass_.sites(graph), pass_.block_layers)
        self.parts = [part for block in found if (part := self._part(block)).weights]
        self.constants = [_constants(self.float), _constants(self.quantised)]

    def learned(self) -> Learned:
        steps, seconds, started = 0, [], time.monotonic()
        predicted = self._predicted()
        stages = [("weights", self._learn_weights)]
        if self.pass_._static and self.pass_.activation_steps:
            stages.append(("activations", self._learn_steps))
        if self.biases:
            stages.append(("biases", self._put_biases))
        whole = sum(sum(predicted[word]) for word, _ in stages)
        log.info("reconstruct: %d blocks, about %.0f s", len(self.parts), whole)
        told: list[dict[str, Any]] = []
        for word, learn in stages:
            for part, guess in zip(self.parts, predicted[word], strict=True):
                began = time.monotonic()
                found = self._again(f"{word}:{part.block.name}", part)
                is_known = found is not None
                note = {} if is_known else learn(part)
                if not is_known:
                    self._keep(f"{word}:{part.block.name}", part, note)
                seconds.append(time.monotonic() - began)
                told.append(
                    {
                        "block": part.block.name, "stage": word, "layers": len(part.block.sites),
                        "predicted_s": round(guess, 3), "seconds": round(seconds[-1], 3),
                        "resumed": is_known, **(found or note),
                    }
                )  # fmt: skip
                steps += 1
                self.stats.progress(steps, len(stages) * len(self.parts))
                log.info("reconstruct %s: %s", word, told[-1])
        self.stats.notes["blocks"] = told
        self.stats.notes["seconds"] = round(time.monotonic() - started, 3)
        return Learned(codes=self.codes, gains=self.gains, biases=self.biases)

    # What was learned of a block before.

    def _again(self, word: str, part: _Part) -> dict[str, float] | None:
        """What is kept of a block under a word, taken over; None where there is nothing."""
        held = self.stats.shelf.get(word) if self.stats.shelf is not None else None
        if held is None:
            return None
        self.codes |= {w.name: held[w.name] for w in part.weights if w.name in held}
        self.gains |= {
            key: float(held[f"gain:{key}"]) for key in part.keys if f"gain:{key}" in held
        }
        self.biases |= {
            name: held[f"bias:{name}"] for name in part.layers if f"bias:{name}" in held
        }
        return {k.removeprefix("note:"): float(v) for k, v in held.items() if k.startswith("note:")}

    def _keep(self, word: str, part: _Part, note: Mapping[str, float]) -> None:
        if self.stats.shelf is None:
            return
        wide = {f"note:{k}": torch.tensor(v, dtype=torch.float64) for k, v in note.items()}
        wide |= {f"gain:{k}": torch.tensor(self.gains[k], dtype=torch.float64) for k in part.keys}
        wide |= {f"bias:{name}": self.biases[name] for name in part.layers}
        self.stats.shelf.put(word, {**{w.name: self.codes[w.name] for w in part.weights}, **wide})

    # Where things stand.

    def _is_grid(self, key: str) -> bool:
        value = self.decided.decisions[key]
        return isinstance(value, list) and len(value) == 2 and not key.endswith(":mean")

    def _part(self, block: Block) -> _Part:
        graph, known = self.quantised, {n.name for n in self.float.nodes}
        by_name = {n.name: n for n in graph.fx.nodes}
        users = set(graph.input_nodes().values())
        outputs = [by_name[name] for name in block.outputs if name in by_name]
        stop = frozenset(
            n for n in graph.nodes if n.name in known and n.name not in block.nodes
        ) | frozenset(users)
        seen = list(above(outputs, stop)) if outputs else []
        inputs = [n for n in seen if n in stop]
        nodes = [n for n in seen if n not in stop and n.op != "placeholder"]
        inside = {n for n in seen if n.op == "placeholder"}
        weights = [w for w in self.rounded.values() if w.node in inside]
        pooled: list[Any] = [
            n for n in graph.nodes
            if n.target is QUANTIZE and op_name(n.args[0]) in SAME_GRID  # type: ignore[arg-type]
        ]  # fmt: skip
        shared = {_grid_key(graph, end) for n in pooled for end in (n, n.args[0].args[0])}
        keys = [
            _grid_key(graph, n) for n in nodes if n.target is DEQUANTIZE and _is_value(graph, n)
        ]
        keys = [key for key in dict.fromkeys(keys) if key in self.gains and key not in shared]
        return _Part(
            block=block, inputs=inputs, nodes=nodes, outputs=outputs, weights=weights, keys=keys,
            layers=[name for name in block.sites if name in self.biases],
        )  # fmt: skip

    # Running what there is.

    def _run(
        self,
        nodes: Iterable[fx.Node],
        values: Values,
        *,
        weights: Mapping[fx.Node, Tensor] | None = None,
        gains: Mapping[str, Any] | None = None,
        rounds: bool = True,
    ) -> Values:
        """Values of `nodes` added to those there are.

        `weights` stand for those that are made of codes; activations go through their grids where it `rounds`, with
        steps times `gains`.
        """
        graph = self.quantised
        for node in nodes:
            if node in values:
                continue
            if node.op == "get_attr":
                values[node] = getattr(graph.exported.graph_module, str(node.target))
                continue
            if node.target is DEQUANTIZE and node.args[0] in (weights or {}):
                values[node] = weights[node.args[0]]  # type: ignore[index]
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.target is QUANTIZE or (node.target is DEQUANTIZE and _is_value(graph, node)):
                gain = (gains or self.gains).get(_grid_key(graph, node), 1.0)
                values[node] = (_rounded if node.target is QUANTIZE else _numbers)(
                    args, gain, rounds
                )
                continue
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
        return values

    def _constants(self, graph: Graph) -> Values:
        values: Values = dict(self.constants[graph is self.quantised])
        if graph is self.quantised:
            for name, weight in self.rounded.items():
                assert weight.node is not None
                values[weight.node] = self.codes[name]
            values |= {self.readers[name].args[2]: bias for name, bias in self.biases.items()}  # type: ignore[misc]
        return values

    def _values(
        self, graph: Graph, ends: Sequence[fx.Node], feeds: Mapping[str, Tensor], rounds: bool
    ) -> list[Any]:
        """Values of `ends` for feeds."""
        values = self._constants(graph)
        values |= {
            node: graph.coded(name, feeds[name]) for name, node in graph.input_nodes().items()
        }
        nodes = [n for n in above(ends) if n not in values]
        last = {n: node for node in nodes for n in node.all_input_nodes}
        kept = set(ends)
        found: Values = {end: values[end] for end in ends if end in values}
        with torch.no_grad():
            for node in nodes:
                self._run([node], values, rounds=rounds)
                if node in kept:
                    value = values[node]
                    found[node] = value.clone() if isinstance(value, Tensor) else value
                for used in node.all_input_nodes:
                    if last[used] is node and used.op != "placeholder":
                        values.pop(used, None)
        return [found[end] for end in ends]

    def _data(
        self, part: _Part, *, rounds: bool, groups: int | None = None, of: Sequence[str] = ()
    ) -> list[_Rows]:
        """What a block, or nodes `of` it, are to give, and what it reads now, for the rows that there are."""
        named = {n.name: n for n in self.float.fx.nodes}
        ends = [named[name] for name in of or [node.name for node in part.outputs]]
        counts = _counts(self.quantised)
        wide = [_is_tensor(node) and _is_wide(node, counts) for node in part.inputs]
        found: list[_Rows] = []
        feeds, kept = self.feeds[:groups], {0}
        for number, given in enumerate(feeds):
            if number not in kept:
                continue
            inputs = self._values(self.quantised, part.inputs, given, rounds) if part.inputs else []
            targets = self._values(self.float, ends, given, rounds=False)
            mask = given.get(MASK)
            masks = [fitting(None if mask is None else mask.bool(), t) for t in targets]
            found.append(_Rows(inputs=inputs, wide=wide, targets=targets, masks=masks))
            if number == 0:
                size = sum(v.nbytes for v in (*inputs, *targets) if isinstance(v, Tensor))
                kept = _spread(len(feeds), MOST_BYTES // max(1, size))
        return self._mixed(part, found)

    def _mixed(self, part: _Part, found: list[_Rows]) -> list[_Rows]:
        """All rows as one where each of them gives the same beside the others."""
        shapes = {
            tuple(tuple(v.shape[w:]) if isinstance(v, Tensor) else v for v, w in zip(r.inputs, r.wide, strict=True))
            for r in found
        }  # fmt: skip
        if len(found) < 2 or len(shapes) > 1 or any(m is not None for r in found for m in r.masks):
            return found
        inputs: list[Any] = []
        for place, is_wide in enumerate(found[0].wide):
            each = [r.inputs[place] for r in found]
            if is_wide:
                inputs.append(torch.cat(each))
            elif not isinstance(each[0], Tensor):
                return found
            elif all(torch.equal(value, each[0]) for value in each):
                inputs.append(each[0])
            elif each[0].dim() and len(each[0]) == 1:
                rows = [v.expand(len(r), *v.shape[1:]) for v, r in zip(each, found, strict=True)]
                inputs.append(torch.cat(rows))
            else:
                return found
        wide = [isinstance(v, Tensor) and len(v) == sum(map(len, found)) for v in inputs]
        targets = [torch.cat(each) for each in zip(*(r.targets for r in found), strict=True)]
        made = _Rows(inputs=inputs, wide=wide, targets=targets, masks=[None] * len(targets))
        return [made] if self._is_the_same(part, found, made) else found

    def _is_the_same(self, part: _Part, found: list[_Rows], made: _Rows) -> bool:
        """Whether a first and a last row give together what each gives alone."""
        ends = torch.tensor([0, len(made) - 1])
        pair = replace(
            made,
            inputs=[v[ends] if w else v for v, w in zip(made.inputs, made.wide, strict=True)],
            targets=[t[ends] for t in made.targets],
        )
        try:
            with torch.no_grad():
                together = self._outputs(part, pair, rounds=False)
                alone = [self._outputs(part, rows, rounds=False) for rows in (found[0], found[-1])]
        except RuntimeError:  # a size in the graph is that of one row
            return False
        for mixed, first, last in zip(together, *alone, strict=True):
            wanted = torch.stack([first[0], last[-1]])
            if mixed.shape != wanted.shape or float((mixed - wanted).norm()) > NEAR * float(
                wanted.norm()
            ):
                return False
        return True

    def _outputs(
        self,
        part: _Part,
        rows: _Rows,
        *,
        weights: Mapping[fx.Node, Tensor] | None = None,
        gains: Mapping[str, Any] | None = None,
        ends: Sequence[fx.Node] | None = None,
        rounds: bool,
    ) -> list[Tensor]:
        nodes = part.nodes
        if ends is not None:
            nodes = nodes[: 1 + max(map(nodes.index, ends))]
        values = self._constants(self.quantised)
        copies = [v.clone() if isinstance(v, Tensor) else v for v in rows.inputs]
        values |= dict(zip(part.inputs, copies, strict=True))
        self._run(nodes, values, weights=weights, gains=gains, rounds=rounds)
        return [values[node] for node in ends or part.outputs]

    def _error(self, part: _Part, data: list[_Rows], scales: Sequence[float], **how: Any) -> float:
        """Mean over outputs of the squared error over that of the float values, on all rows."""
        total, count = 0.0, 0
        with torch.no_grad():
            for rows in data:
                for start in range(0, len(rows), self.pass_.batch):
                    piece = _slice(rows, start, start + self.pass_.batch)
                    made = self._outputs(part, piece, **how)
                    total += len(piece) * float(_loss(made, piece, scales))
                    count += len(piece)
        return total / count

    # Learning.

    def _learn_weights(self, part: _Part) -> dict[str, float]:
        options, draw = self.pass_, torch.Generator().manual_seed(self.pass_.seed)
        data = self._data(part, rounds=False)
        scales = _scales(data)
        nearest = self._error(part, data, scales, rounds=False)
        started = {w.name: rounding.begin(w.weight, w.scale, w.scheme) for w in part.weights}
        before = self._error(part, data, scales, weights=self._soft(part, started), rounds=False)
        a = self._descend_weights(part, data, scales, nearest, started, draw, options.steps)
        undecided = [((h := rounding.soft(a[w.name])) > 0.01) & (h < 0.99) for w in part.weights]
        share = sum(int(u.sum()) for u in undecided) / sum(u.numel() for u in undecided)
        was = {w.name: self.codes[w.name] for w in part.weights}
        for w in part.weights:
            self.codes[w.name] = rounding.hard(
                w.weight, a[w.name], w.scale, w.zero, w.scheme, pair_limit=w.limit
            )
        after = self._error(part, data, scales, rounds=False)
        if after > nearest:
            self.codes |= was
        self._put_biases(part, rounds=False)
        return {
            "soft_before": before, "nearest": nearest, "error": min(after, nearest), "undecided": share,
        }  # fmt: skip

    def _descend_weights(
        self, part: _Part, data: list[_Rows], scales: Sequence[float], nearest: float,
        started: Mapping[str, Tensor], draw: torch.Generator, steps: int,
    ) -> dict[str, Tensor]:  # fmt: skip
        options = self.pass_
        a = {name: value.clone().requires_grad_() for name, value in started.items()}
        optimizer = torch.optim.Adam(list(a.values()), lr=options.lr)
        count = sum(value.numel() for value in a.values())
        for step in range(steps):
            rows = _picked(data, draw).some(draw, options.batch)
            made = self._outputs(part, rows, weights=self._soft(part, a), rounds=False)
            loss = _loss(made, rows, scales) / max(nearest, 1e-12)
            power = rounding.beta(step, steps)
            if power is not None:
                pulls = torch.stack([rounding.pull(value, power) for value in a.values()])
                loss = loss + options.pull * pulls.sum() / count
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {name: value.detach() for name, value in a.items()}

    def _soft(self, part: _Part, a: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        return {w.node: w.soft(a[w.name]) for w in part.weights if w.node is not None}

    def _learn_steps(self, part: _Part) -> dict[str, float]:
        options, draw = self.pass_, torch.Generator().manual_seed(self.pass_.seed + 1)
        if not part.keys:
            return {}
        data = self._data(part, rounds=True)
        scales = _scales(data)
        before = self._error(part, data, scales, rounds=True)
        was = dict(self.gains)
        self.gains |= self._descend_steps(
            part, data, scales, before, draw, options.activation_steps
        )
        after = self._error(part, data, scales, rounds=True)
        if after > before:
            self.gains = was
        return {"before": before, "error": min(after, before)}

    def _descend_steps(
        self, part: _Part, data: list[_Rows], scales: Sequence[float], before: float,
        draw: torch.Generator, steps: int,
    ) -> dict[str, float]:  # fmt: skip
        options = self.pass_
        logs = {
            key: torch.tensor(math.log(self.gains[key]), requires_grad=True) for key in part.keys
        }
        fixed = {w.node: w.made(self.codes[w.name]) for w in part.weights if w.node is not None}
        optimizer = torch.optim.Adam(list(logs.values()), lr=options.activation_lr)
        for _ in range(steps):
            rows = _picked(data, draw).some(draw, options.batch)
            gains = {**self.gains, **{key: value.exp() for key, value in logs.items()}}
            made = self._outputs(part, rows, weights=fixed, gains=gains, rounds=True)
            loss = _loss(made, rows, scales) / max(before, 1e-12)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {key: float(value.detach().exp()) for key, value in logs.items()}

    def _put_biases(self, part: _Part, *, rounds: bool = True) -> dict[str, float]:
        """Give every channel of a block's layers the mean that it has in float, one layer behind the other."""
        if not part.layers:
            return {}
        data, moved = self._data(part, rounds=rounds, of=part.layers), 0.0
        for place, name in enumerate(part.layers):
            site, lost, count = self.readers[name], [], 0
            for rows in data:
                for start in range(0, len(rows), self.pass_.batch):
                    piece = _slice(rows, start, start + self.pass_.batch)
                    with torch.no_grad():
                        (made,) = self._outputs(part, piece, ends=[site], rounds=rounds)
                    gap, mask = piece.targets[place] - made, piece.masks[place]
                    gap = gap.movedim(_channel_axis(site), -1)
                    gap = gap[mask] if mask is not None else gap.flatten(0, -2)
                    lost.append(gap.sum(0, dtype=torch.float64))
                    count += len(gap)
            mean = torch.stack(lost).sum(0) / max(1, count)
            self.biases[name] = (self.biases[name].double() + mean).to(torch.float32)
            moved = max(moved, float(mean.abs().max()))
        return {"moved": moved}

    # How long it will take.

    def _predicted(self) -> dict[str, list[float]]:
        """Seconds that each block will take in every stage, from a few steps of it on a few rows."""
        options, found = self.pass_, list[tuple[float, float, float]]()
        total = sum(max(len(v) for v in given.values() if v.dim()) for given in self.feeds)
        for part in self.parts:
            started = time.monotonic()
            data = self._data(part, rounds=False, groups=1)
            reading = (time.monotonic() - started) * len(self.feeds)
            full = [data[0].tiled(min(options.batch, total))]
            scales, draw = _scales(data), torch.Generator().manual_seed(options.seed)
            begun = {w.name: rounding.begin(w.weight, w.scale, w.scheme) for w in part.weights}
            self._descend_weights(part, full, scales, 1.0, begun, draw, 1)
            started = time.monotonic()
            self._descend_weights(part, full, scales, 1.0, begun, draw, TRIED)
            step = (time.monotonic() - started) / TRIED
            started = time.monotonic()
            self._error(part, data, scales, rounds=False)
            checks = (time.monotonic() - started) * len(self.feeds)
            means = reading + len(part.layers) * checks if part.layers else 0.0
            weights = reading + options.steps * step + 3 * checks + means
            activations = reading + 2 * checks if part.keys else 0.0
            if part.keys and options.activation_steps:
                started = time.monotonic()
                self._descend_steps(part, full, scales, 1.0, draw, TRIED)
                step = (time.monotonic() - started) / TRIED
                activations += options.activation_steps * step
            found.append((weights, activations, means))
        words = ("weights", "activations", "biases")
        return dict(zip(words, map(list, zip(*found, strict=True)), strict=True))


def _constants(graph: Graph) -> Values:
    return {
        node: tensor_of(graph, node)
        for node in graph.fx.nodes
        if node.op == "placeholder" and tensor_name(graph, node) is not None
    }


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_value(graph: Graph, node: fx.Node) -> bool:
    """Whether what is turned back to numbers is computed, and no weight or bias."""
    codes = node.args[0]
    return not (isinstance(codes, fx.Node) and codes.op == "placeholder") and (
        tensor_name(graph, node.args[1]) is not None
    )


def _grid_key(graph: Graph, node: fx.Node) -> str:
    """What the grid of a value was decided under."""
    name = tensor_name(graph, node.args[1])
    return graph.origins[name].source if name is not None else ""


def _rounded(args: Sequence[Any], gain: Any, rounds: bool) -> Tensor:
    """Codes as float numbers, which a gradient passes; not rounded nor cut where nothing is to be rounded."""
    x, scale, zero, low, high = args[:5]
    steps: Tensor = x / (scale * gain)
    if not rounds:
        return steps.add(zero)
    whole = steps + (steps.round() - steps).detach()
    return torch.clamp(whole + zero, low, high)


def _numbers(args: Sequence[Any], gain: Any, rounds: bool) -> Tensor:
    codes, scale, zero = args[:3]
    made: Tensor = (codes - zero) * (scale * gain)
    return made


def _scales(data: list[_Rows]) -> list[float]:
    """Mean square of every output that a block is to give."""
    found = []
    for place in range(len(data[0].targets)):
        total = sum(float(r.targets[place].double().square().sum()) for r in data)
        found.append(total / sum(r.targets[place].numel() for r in data) or 1.0)
    return found


def _loss(made: Sequence[Tensor], rows: _Rows, scales: Sequence[float]) -> Tensor:
    """Mean over outputs of the mean squared error over `scales`; padded positions are left out."""
    found = []
    for value, target, mask, scale in zip(made, rows.targets, rows.masks, scales, strict=True):
        lost = (value - target).square()
        if mask is not None:
            lost = lost[mask]
        found.append(lost.mean() / scale)
    return torch.stack(found).mean()


def _spread(count: int, most: int) -> set[int]:
    """Numbers below `count`, at most so many, spread evenly: the first and the last are among them."""
    if most >= count:
        return set(range(count))
    return {round(i * (count - 1) / max(1, most - 1)) for i in range(max(1, most))}


def _slice(rows: _Rows, start: int, stop: int) -> _Rows:
    return _Rows(
        inputs=[v[start:stop] if w else v for v, w in zip(rows.inputs, rows.wide, strict=True)],
        wide=rows.wide,
        targets=[t[start:stop] for t in rows.targets],
        masks=[m if m is None else m[start:stop] for m in rows.masks],
    )


def _picked(data: list[_Rows], draw: torch.Generator) -> _Rows:
    return data[int(torch.randint(len(data), (), generator=draw))]
