"""Which tokens a model is unsure of, given out beside its answer, for a device that sends those and no others.

Of a value x [batch, L, D] every token has a score, and the K = ⌈ratio · L⌉ of the highest, or the lowest, come out:

    uts_token_score [batch, L]    uts_index [batch, K]    uts_tokens [batch, K, D]    uts_sample_score [batch]

    energy    mean over D of x²: what dropout right behind x has for a variance, but for p and the noise of its draws
    mcdrop    variance of x over fixed masks of dropout behind a module in front of it, mean over D
    entropy   of the softmax of logits [batch, L, classes]
    maha      mean over D of (x − μ)² / σ², with μ and σ of calibration data
    random    for comparison: no order that means anything, and the same for the same token

Dropout of x itself is what released code of CD-CCA (CVPR 2024) draws, which is `energy` with noise in it; masks inside
the model are MC dropout (Gal and Ghahramani 2016). Masks are constants, so that an engine needs no random numbers. The
score of a sample is −log of the largest probability, mean over positions, where logits are named, else the mean of
the scores of its tokens that come out. Nothing of the model's own path is changed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, fx, nn

from effc.calib.collectors import Moments
from effc.calib.probe import Probe
from effc.errors import PreconditionError
from effc.ir.edit import COPIED_META, add_output, fake_run, insert, lift
from effc.ir.program import Graph, Origin, Program
from effc.ir.select import site_names, value_key
from effc.ir.splice import SPLICED, splice
from effc.passes.base import Pass, Stats

aten = torch.ops.aten
OUTPUTS = ("uts_token_score", "uts_index", "uts_tokens", "uts_sample_score")
SCORE = "uts.score"
"""What the module of a score is called in the graph."""
LEAST = 1e-12
"""Of a variance, where a channel does not move on calibration data."""
STRIDE = 997.0
"""How far neighbours of a drawn projection lie apart before only the fraction counts."""


def unsteady(graph: Graph) -> set[str]:
    """Outputs that hang on the last bit of a graph's values: which of tokens with nearly equal scores come out.

    Of scores that are drawn by the token, all of them.
    """
    return set(OUTPUTS) if f"{SCORE}.drawn" in graph.tensors() else set(OUTPUTS[1:3])


class Energy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x).mean(-1)


class Mahalanobis(nn.Module):
    mean: Tensor
    inverse: Tensor

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("inverse", 1 / variance.clamp_min(LEAST).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        far = (x - self.mean) * self.inverse
        return (far * far).mean(-1)


class Spread(nn.Module):
    """Variance over draws [draws, batch, L, D], mean over D."""

    def forward(self, every: Tensor) -> Tensor:
        off = every - every.mean(0, keepdim=True)
        return (off * off).mean(0).mean(-1)


class Entropy(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        log = torch.log_softmax(logits, -1)
        return -(log.exp() * log).sum(-1)


class Random(nn.Module):
    drawn: Tensor

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("drawn", torch.randn(size, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        far = (x * self.drawn).sum(-1) * STRIDE
        return far - far.floor()


class Doubt(nn.Module):
    """−log of the largest probability of logits [batch, …, classes], mean over all but the batch."""

    def forward(self, logits: Tensor) -> Tensor:
        most = -torch.log_softmax(logits, -1).amax(-1)
        return most if most.dim() == 1 else most.flatten(1).mean(1)


class Mean(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return scores.mean(1)


@dataclass(frozen=True, kw_only=True)
class UncertainTokens(Pass):
    """Scores the tokens that the module `at` gives, and puts out the `ratio` of them that is kept, with their places.

    `keep` is what comes out: the tokens of `high` scores or of `low` ones. `inside` is the module behind which `mcdrop`
    drops channels with probability `dropout`, in `draws` fixed masks. `logits` names an output of the model.
    """

    name = "uncertain-tokens"
    tolerance = 0.0

    at: str = ""
    score: Literal["maha", "energy", "mcdrop", "entropy", "random"] = "maha"
    ratio: float = 0.25
    keep: Literal["high", "low"] = "high"
    inside: str = ""
    draws: int = 8
    dropout: float = 0.1
    logits: str = ""
    seed: int = 0

    @property
    def measures(self) -> bool:
        return self.score == "maha"

    def requires(self, program: Program) -> None:
        wrong = {
            "at: name the module whose tokens are scored": not self.at,
            "ratio: more than 0 and at most 1": not 0 < self.ratio <= 1,
            "dropout: between 0 and 1": not 0 < self.dropout < 1,
            "draws: 2 or more": self.draws < 2,
            "inside: the module that mcdrop drops behind": self.score == "mcdrop" and not self.inside,
            "logits: the output that entropy is of": self.score == "entropy" and not self.logits,
        }  # fmt: skip
        for hint in (word for word, holds in wrong.items() if holds):
            raise PreconditionError(f"{self.name} has an option that does not do", hint=hint)
        for graph in program:
            if self.takes(graph.role):
                self._refuse(graph)

    def _refuse(self, graph: Graph) -> None:
        """Raise PreconditionError where the graph has no such value, or none of a fixed number of tokens."""
        where = f"graph {graph.role!r}"
        if taken := sorted(set(OUTPUTS) & set(graph.outputs)):
            raise PreconditionError(
                f"{self.name}: there is an output {taken[0]!r} already", where=where, hint="once is enough"
            )  # fmt: skip
        x = self._anchor(graph, self.at, "at")
        shape = x.meta["val"].shape
        if len(shape) != 3 or not all(isinstance(size, int) for size in shape[1:]):
            raise PreconditionError(
                f"{self.name}: {self.at} gives {[str(s) for s in shape]}, and not [batch, tokens, channels]",
                where=where,
                hint="name a module that gives a fixed number of tokens; K of a free number is not fixed",
            )
        if self.score == "mcdrop" and x not in self._path(graph, x):
            raise PreconditionError(
                f"{self.name}: {self.at} does not read what {self.inside} gives",
                where=where,
                hint="inside: a module in front of it",
            )
        if self.logits and self.logits not in graph.outputs:
            raise PreconditionError(
                f"{self.name}: there is no output {self.logits!r}",
                where=where,
                hint=f"logits: one of {', '.join(graph.outputs)}",
            )
        tokens = self._logits(graph).meta["val"].shape if self.score == "entropy" else shape
        if len(tokens) != 3 or tokens[1] != shape[1]:
            raise PreconditionError(
                f"{self.name}: {self.logits} has no row for every token of {self.at}",
                where=where,
                hint="entropy wants logits [batch, tokens, classes]; name them as a sample's with another score",
            )

    def _anchor(self, graph: Graph, word: str, option: str) -> fx.Node:
        """What a module gives: the last value of it that is read outside of it."""
        found = [node for node in graph.nodes if _is_in(node, word) and _is_float(node)]
        if not found:
            raise PreconditionError(
                f"{self.name}: {option}: no module {word!r} is in the graph",
                where=f"graph {graph.role!r}",
                hint="a module's path as `effc inspect` shows it, such as encoder.bridge",
            )
        return found[-1]

    def _logits(self, graph: Graph) -> fx.Node:
        (output,) = [n for n in graph.fx.nodes if n.op == "output"]
        values = output.args[0]
        assert isinstance(values, tuple | list)
        node = values[graph.outputs.index(self.logits)]
        assert isinstance(node, fx.Node)
        return node

    def _path(self, graph: Graph, x: fx.Node) -> list[fx.Node]:
        """Everything from behind the module `inside` to `x`, in order."""
        start = self._anchor(graph, self.inside, "inside")
        reached = {start}
        for node in graph.nodes:
            if reached.intersection(node.all_input_nodes):
                reached.add(node)
        wanted = {x}
        for node in reversed(list(graph.nodes)):
            if node in wanted:
                wanted.update(node.all_input_nodes)
        return [node for node in graph.nodes if node in reached & wanted and node is not start]

    def probes(self, graph: Graph) -> Iterable[Probe]:
        if self.score == "maha":
            x = self._anchor(graph, self.at, "at")
            key = value_key(graph, site_names(graph), x)
            yield Probe(key=key, node=x, collector=Moments())

    def gives(self, outputs: Sequence[str]) -> tuple[str, ...]:
        return (*outputs, *OUTPUTS)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        x = self._anchor(graph, self.at, "at")
        (end,) = [n for n in graph.fx.nodes if n.op == "output"]
        value = self._drawn(graph, x, end) if self.score == "mcdrop" else x
        if self.score == "entropy":
            value = self._logits(graph)
        module = self._module(graph, x, stats)
        (scores,) = splice(graph, end, module, [value], SCORE, scope=x)
        length = int(x.meta["val"].shape[1])
        count = math.ceil(self.ratio * length)
        top = insert(graph, end, aten.topk.default, [scores, count, 1, self.keep == "high"])
        kept, index = (insert(graph, end, operator.getitem, [top, place]) for place in (0, 1))
        wide = insert(graph, end, aten.unsqueeze.default, [index, -1])
        wide = insert(
            graph, end, aten.expand.default, [wide, [-1, -1, int(x.meta["val"].shape[2])]]
        )
        tokens = insert(graph, end, aten.gather.default, [x, 1, wide])
        asked: tuple[nn.Module, fx.Node] = (Mean(), kept)
        if self.logits:
            asked = (Doubt(), self._logits(graph))
        (sample,) = splice(graph, end, asked[0], [asked[1]], "uts.sample", scope=x)
        for name, node in zip(OUTPUTS, (scores, index, tokens, sample), strict=True):
            add_output(graph, name, node)
        stats.notes["tokens"] = f"{count} of {length}"
        return 1

    def _module(self, graph: Graph, x: fx.Node, stats: Stats) -> nn.Module:
        if self.score == "maha":
            key = value_key(graph, site_names(graph), x)
            told = stats.decide(
                key,
                lambda: {
                    "mean": stats[key].mean.tolist(),
                    "variance": stats[key].variance.tolist(),
                },
            )
            return Mahalanobis(torch.tensor(told["mean"]), torch.tensor(told["variance"]))
        if self.score == "random":
            return Random(int(x.meta["val"].shape[2]), self.seed)
        return {"energy": Energy, "mcdrop": Spread, "entropy": Entropy}[self.score]()

    def _drawn(self, graph: Graph, x: fx.Node, end: fx.Node) -> fx.Node:
        """`x` once for each mask [draws, batch, L, D]: all that lies between it and the mask is there as often."""
        start, path = self._anchor(graph, self.inside, "inside"), self._path(graph, x)
        draw = torch.Generator().manual_seed(self.seed)
        size = int(start.meta["val"].shape[-1])
        found = []
        for number in range(self.draws):
            kept = (torch.rand(size, generator=draw) >= self.dropout) / (1 - self.dropout)
            name = f"uts.mask{number}"
            mask = lift(graph, name, kept.to(start.meta["val"].dtype), Origin(name, (SPLICED,)))
            table = {start: insert(graph, end, aten.mul.Tensor, [start, mask])}
            for node in path:
                table[node] = _copied(graph, node, end, table)
            found.append(table[x])
        return insert(graph, end, aten.stack.default, [found])


def _copied(
    graph: Graph, node: fx.Node, before: fx.Node, table: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """A call once more, of what stands in the table for what it reads."""
    with graph.fx.inserting_before(before):
        made = graph.fx.node_copy(node, lambda n: table.get(n, n))
    made.meta = {k: node.meta[k] for k in COPIED_META if k in node.meta}
    made.meta["val"] = fake_run(graph, made)
    return made


def _is_in(node: fx.Node, word: str) -> bool:
    stack = node.meta.get("nn_module_stack") or {}
    return node.op == "call_function" and any(fnmatchcase(str(path), word) for path, _ in stack.values())  # fmt: skip


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
