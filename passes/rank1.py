"""Gated experts of low rank beside linear layers (Intuition-MoR1E, arXiv 2404.08985; formulas: `effc/nn/rank1.py`).

    attach-rank1    y = W x + b   →   y = W x + b + γ σ(100 v) B u(x, s)

What a request is about, s [batch, clusters], is an input of the graph called `intuition`; or the graph takes the
embedding of the request and has the centroids, and the gates of all layers read one product of both. Fresh experts
change nothing, to the last bit. Tensors are called after the layer, `mlp.fc1.rank1_A` and so on, and what they have in
common stands in `Graph.pending`, by which passes behind know them again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from effc import experts as held
from effc import intuition
from effc.errors import PreconditionError
from effc.experts import Experts, Kind
from effc.intuition import EMBEDDING, INPUT, Intuition
from effc.ir.edit import add_input, insert, lift, match_rows, redirect, tensor_name, tensor_of
from effc.ir.program import Graph, Origin, Program
from effc.ir.select import Select, module_path, op_name
from effc.ir.show import tensors_digest
from effc.ir.splice import SPLICED, is_spliced, matched, small_graph, splice
from effc.nn import lora, rank1
from effc.nn.rank1 import COEFFICIENT, Form, Gates, Rank1
from effc.passes import lora as layers
from effc.passes.base import Model, Pass, Stats
from effc.passes.lora import Site

log = logging.getLogger(__name__)

WORD = "rank1"
"""What adapters stand under in `Graph.pending`."""
CENTROIDS = "intuition.centroids"
FOLDER = "experts"
"""Where a checkpoint has them for others."""
aten: Any = torch.ops.aten
Size = Annotated[int, Field(ge=1, le=held.MOST)]


@dataclass(frozen=True, kw_only=True)
class AttachRank1(Pass):
    """Puts gated experts of low rank beside linear layers; `tune` then trains nothing else.

    `sizes` are rows of A and columns of B, of which every pair is an expert; in the form `single` their product counts,
    in `groups` they are experts and the rank of each. `gates` says what the gates read. A `router` of zeros, as the
    authors released it, gives every pair the same gate: the columns of B then get the same gradient, and stay one
    column, but for what requests tell them apart. One that is `drawn` as A is has them differ from the first step on.
    `centroids` is a file of `effc.intuition`: the graph then takes embeddings in the place of scores. `adapter` is a
    directory of experts that `effc tune` wrote, which are taken as they are.
    """

    name = "attach-rank1"
    renews = True

    sizes: tuple[Size, Size] = (4, 8)
    form: Form = "pairs"
    gates: Gates = "both"
    router: Literal["zero", "drawn"] = "zero"
    coefficient: Annotated[float, Field(gt=0, allow_inf_nan=False)] = COEFFICIENT
    gain: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    seed: int = 0
    output: bool = False
    select: Select = field(default_factory=Select)
    centroids: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.adapter is not None:  # it changes what the model does, and is meant to
            object.__setattr__(self, "effect", "lossy")
            object.__setattr__(self, "is_meant", True)

    @property
    def kind(self) -> Kind:
        return Kind(
            form=self.form, gates=self.gates, sizes=self.sizes, coefficient=self.coefficient, gain=self.gain
        )  # fmt: skip

    def agrees(self, behind: Sequence[Pass]) -> None:
        if self.adapter is not None:
            usual = type(self)()
            words = (
                "sizes",
                "form",
                "gates",
                "router",
                "coefficient",
                "gain",
                "seed",
                "output",
                "select",
            )
            told = [word for word in words if getattr(self, word) != getattr(usual, word)]
            if told:
                raise PreconditionError(
                    f"{self.name}: the adapter itself says its {' and '.join(told)}",
                    hint=f"leave {' and '.join(told)} out, or the adapter",
                )
        if self.adapter is None and self.centroids is not None and not self.kind.reads:
            raise PreconditionError(
                f"{self.name}: gates that read {self.gates!r} alone take no centroids",
                hint="leave `centroids` out, or set gates: both",
            )

    def requires(self, program: Program) -> None:
        self.agrees(())
        found = self._clusters()
        given = held.read(Path(self.adapter)) if self.adapter is not None else None
        kind = given.kind if given is not None else self.kind
        if kind.reads and found is not None and len(found.centroids) != kind.experts:
            raise PreconditionError(
                f"{self.name}: {len(found.centroids)} clusters are no gates of {kind.experts} experts",
                hint=f"cluster the prompts into {kind.experts}, or choose other `sizes`",
            )
        for graph in program:
            if self.takes(graph.role):
                if WORD in graph.pending:
                    raise PreconditionError(
                        f"{self.name}: the graph has experts already",
                        where=f"graph {graph.role!r}",
                        hint="leave one of the two out",
                    )
                self._sites(graph, kind, given)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        given = held.read(Path(self.adapter)) if self.adapter is not None else None
        kind = given.kind if given is not None else self.kind
        clusters = self._clusters()
        found = self._sites(graph, kind, given)
        if given is not None:
            layers.hold_recorded(graph, stats, _digest(given), str(self.adapter))
            _refuse_other(graph, given, clusters, found, str(self.adapter))
        known = graph.inputs
        score = _score(graph, kind, clusters, found[0]) if kind.reads else None
        traced: dict[Any, Graph] = {}
        changed = count = 0
        for site in found:
            tensors = given.layers[site.name] if given is not None else self._fresh(graph, site)
            _attach(graph, site, tensors, kind, score, traced)
            changed += len(site.layers)
            count += sum(tensor.numel() for tensor in tensors.values())
        graph.pending[WORD] = {
            **asdict(kind), "sizes": list(kind.sizes), "base": base_digest(graph, found),
            "centroids": clusters.digest if clusters is not None else "",
            "input": next((name for name in graph.inputs if name not in known), ""),
            "layers": [site.name for site in found],
        }  # fmt: skip
        stats.notes["parameters"] = count
        return changed

    def files(self, graph: Graph, model: Model) -> Mapping[str, bytes]:
        if WORD not in graph.pending:  # folded
            return {}
        made = held.files(experts_of(graph))
        return {f"{FOLDER}/{name}": content for name, content in made.items()}

    def _clusters(self) -> Intuition | None:
        return None if self.centroids is None else intuition.read(Path(self.centroids))

    def _fresh(self, graph: Graph, site: Site) -> dict[str, Tensor]:
        """A as LoRA's begins, and a router that is drawn; everything else 0."""
        weight = layers.weight_of(graph, site.layers[0])
        kind = self.kind
        shapes = rank1.shapes(kind.form, kind.gates, kind.sizes, site.shape)
        made = {name: weight.new_zeros(shape) for name, shape in shapes.items()}
        made[rank1.A], _ = lora.fresh(site.name, weight, len(made[rank1.A]), self.seed)
        if self.router == "drawn" and rank1.ROUTER in made:
            name = f"{site.name}.{rank1.ROUTER}"
            made[rank1.ROUTER], _ = lora.fresh(name, weight, len(made[rank1.ROUTER]), self.seed)
        return made

    def _sites(self, graph: Graph, kind: Kind, given: Experts | None) -> list[Site]:
        """Raises PreconditionError where there is no layer, or one that cannot have the adapter."""
        if given is not None:
            known = {s.name: s for s in layers.sites(graph, Select(), output=True)}
            missing = sorted(set(given.layers) - set(known))
            wrong = [
                name
                for name, tensors in given.layers.items()
                if name in known
                and (len(tensors[rank1.B]), tensors[rank1.A].shape[1]) != known[name].shape
            ]
            if missing or wrong:
                what = f"no linear layer {missing[0]!r}" if missing else f"another {wrong[0]!r}"
                raise PreconditionError(
                    f"{self.adapter} is for another base: the graph has {what}",
                    where=f"graph {graph.role!r}",
                    hint="name the model that it was trained on as the source",
                )
            found = [known[name] for name in given.layers]
        else:
            found = layers.sites(graph, self.select, output=self.output)
        if not found:
            raise _nothing(self.name, graph)
        if kind.reads:
            hint = "gates: router, or leave the layer out by `select`"
            refuse_rows(self.name, graph, found, hint)
        most = max(
            rank1.shapes(kind.form, kind.gates, kind.sizes, (1, 1))[rank1.A][0], kind.sizes[1]
        )
        for site in found:
            if min(site.shape) < most and kind.form != "pairs":
                raise PreconditionError(
                    f"{self.name}: {most} ranks are more than {site.name} has, which is {list(site.shape)}",
                    hint=f'fewer, or leave it out: select: {{exclude: "{module_path(site.layers[0])}"}}',
                )
        return found


def _nothing(word: str, graph: Graph) -> PreconditionError:
    return PreconditionError(
        f"{word}: no linear layer of {graph.role!r} is selected",
        hint="effc inspect MODEL lists the layers; output: true takes the one that gives the logits",
    )


# What the gates read


def first_rows(graph: Graph) -> fx.Node:
    """The input whose rows are those of a batch: the first whose first dimension is called so, or the first of all."""
    rows = [n for n in graph.input_nodes().values() if n.meta["val"].dim()]
    named = [n for n in rows if graph.dims.get(str(n.meta["val"].shape[0])) == "batch"]
    return (named or rows)[0]


def refuse_rows(word: str, graph: Graph, found: Sequence[Site], hint: str) -> None:
    """Raise PreconditionError where the first dimension of what a layer reads is not that of the requests."""
    rows = str(first_rows(graph).meta["val"].shape[0])
    for site in found:
        for layer in site.layers:
            value = layer.args[0].meta["val"]  # type: ignore[union-attr]
            if value.dim() < 2 or str(value.shape[0]) != rows:
                raise PreconditionError(
                    f"{word}: {site.name} does not read a row for every request, but {list(value.shape)}",
                    where=f"graph {graph.role!r}",
                    hint=hint,
                )


def _score(graph: Graph, kind: Kind, clusters: Intuition | None, site: Site) -> fx.Node:
    """The node of s, in the type of the layers; an input is added where the graph has none of its name.

    Raises PreconditionError where it has one of another size.
    """
    size = kind.experts if clusters is None else clusters.centroids.shape[1]
    name = INPUT if clusters is None else EMBEDDING
    like, weight = first_rows(graph), site.layers[0].args[1]
    dtype = weight.meta["val"].dtype  # type: ignore[union-attr]
    if name in graph.inputs:
        node = graph.input_nodes()[name]
        if not node.users:  # nothing has told torch yet that its rows are those of the others
            match_rows(graph, node, like)
        shape = [str(n) for n in node.meta["val"].shape]
        if shape != [str(like.meta["val"].shape[0]), str(size)]:
            raise PreconditionError(
                f"attach-rank1: the input {name!r} is [{', '.join(shape)}], and the gates read [batch, {size}]",
                hint="make the last dimension of the input as many as there are experts",
            )
    else:
        known = graph.exported.example_inputs
        rows = len(known[1][like.name]) if known is not None and like.name in known[1] else 2
        draw = torch.Generator().manual_seed(0)
        example = torch.rand(rows, size, generator=draw)
        if clusters is not None:
            example = torch.nn.functional.normalize(example - 0.5, dim=-1)
        node = add_input(graph, name, like, example.to(dtype))
    if clusters is None:
        return node
    centroids = torch.from_numpy(clusters.centroids).to(dtype)
    table = lift(graph, CENTROIDS, centroids, Origin(CENTROIDS, (SPLICED,)))
    first = next(iter(graph.nodes))
    made = insert(graph, first, aten.linear.default, (node, table))
    if clusters.temperature is not None:
        made = insert(graph, first, aten.div.Tensor, (made, clusters.temperature))
        made = insert(graph, first, aten.softmax.int, (made, -1))
    return made


def _attach(
    graph: Graph,
    site: Site,
    tensors: Mapping[str, Tensor],
    kind: Kind,
    score: fx.Node | None,
    traced: dict[Any, Graph],
) -> None:
    """Put experts beside the layers of a site, which share them; the caller refreshes."""
    shared: dict[str, fx.Node] = {}
    like: Any = site.layers[0].args[1]
    dtype = like.meta["val"].dtype
    module = module_of({n: t.to(dtype) for n, t in tensors.items()}, kind)
    for layer in site.layers:
        inputs = inputs_of(layer, score)
        small, users = _small(module, inputs, traced), list(layer.users)
        (made,) = splice(
            graph, layer.next, module, inputs, site.name, like=small, scope=layer, shared=shared
        )  # fmt: skip
        redirect(graph, layer, made, users)
        found = matched(small, made) or {}
        shared = {word: found[word] for word, _ in module.named_parameters()}


def module_of(tensors: Mapping[str, Tensor], kind: Kind) -> Rank1:
    return Rank1(
        tensors, kind.sizes, form=kind.form, gates=kind.gates, coefficient=kind.coefficient, gain=kind.gain
    )  # fmt: skip


def inputs_of(layer: fx.Node, score: fx.Node | None) -> list[Any]:
    return [layers.read_of(layer), layer, *([] if score is None else [score])]


def _small(module: Rank1, inputs: Sequence[fx.Node], traced: dict[Any, Graph]) -> Graph:
    """The graph of a module behind values of such shapes; `traced` keeps it for the next layer of the form."""
    values = [node.meta["val"] for node in inputs]
    key = tuple((str(tuple(v.shape)), v.dtype) for v in values)
    if key not in traced:
        traced[key] = small_graph(module, values)
    return traced[key]


# Where they are


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A layer, the node that gives it and the experts together, and their tensors by name."""

    layer: fx.Node
    output: fx.Node
    tensors: Mapping[str, fx.Node]


def kind_of(graph: Graph) -> Kind:
    """Raises PreconditionError where the graph has no experts."""
    if WORD not in graph.pending:
        raise PreconditionError(
            "the graph has no experts",
            where=f"graph {graph.role!r}",
            hint="put `attach-rank1` in front",
        )
    state = graph.pending[WORD]
    n, m = state["sizes"]
    return Kind(
        form=state["form"], gates=state["gates"], sizes=(n, m), coefficient=state["coefficient"],
        gain=state["gain"],
    )  # fmt: skip


def places(graph: Graph) -> list[Place]:
    """Every adapter of a graph as `attach-rank1` put it there.

    Raises PreconditionError where the graph has none, or where a pass changed the operators of one.
    """
    kind, tensors = kind_of(graph), graph.tensors()
    traced: dict[Any, Graph] = {}
    found = list(_places(graph, kind, traced))
    seen = {tensor_name(graph, node) for place in found for node in place.tensors.values()}
    words = rank1.names(kind.form, kind.gates)
    left = [
        n for n in tensors
        if is_spliced(graph, n) and graph.origins[n].source.endswith(words) and n not in seen
    ]  # fmt: skip
    if left:
        raise PreconditionError(
            f"a pass has changed the operators between {left[0].rpartition('.')[0]} and its experts",
            where=f"graph {graph.role!r}",
            hint="put what folds or fuses experts right behind what trains them",
        )
    return found


def _places(graph: Graph, kind: Kind, traced: dict[Any, Graph]) -> Iterator[Place]:
    score = score_of(graph, kind)
    for node in graph.nodes:
        layer = node.args[0] if op_name(node) == "add" else None
        if not isinstance(layer, fx.Node) or op_name(layer) != "linear":
            continue
        last = node.args[1]
        out = last.args[1] if isinstance(last, fx.Node) and op_name(last) == "linear" else None
        if isinstance(out, fx.Node) and op_name(out) == "sum":  # uniform gates
            out = out.args[0]
        name = tensor_name(graph, out)
        if name is None or not graph.origins[name].source.endswith(rank1.B):
            continue
        stem = graph.origins[name].source.removesuffix(rank1.B)
        shapes = rank1.shapes(kind.form, kind.gates, kind.sizes, _shape(layer))
        dtype = graph.tensors()[name].dtype
        empty = {word: torch.zeros(shape, dtype=dtype) for word, shape in shapes.items()}
        small = _small(module_of(empty, kind), inputs_of(layer, score), traced)
        hit = matched(small, node)
        if hit is not None and hit["b"] is layer and hit["a"] is layers.read_of(layer):
            yield Place(layer=layer, output=node, tensors={word: hit[word] for word in shapes})
        else:
            log.debug("%s is no adapter as it was attached", stem)


def _shape(layer: fx.Node) -> tuple[int, int]:
    out, inner = layer.meta["val"].shape[-1], layer.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    return int(out), int(inner)


def score_of(graph: Graph, kind: Kind) -> fx.Node | None:
    """The node of s; None where the gates read none."""
    if not kind.reads:
        return None
    if not graph.pending[WORD]["centroids"]:
        return graph.input_nodes()[INPUT]
    for node in graph.nodes:
        if op_name(node) == "linear" and tensor_name(graph, node.args[1]) == CENTROIDS:
            users = list(node.users)
            is_soft = len(users) == 1 and op_name(users[0]) == "div"
            return next(iter(users[0].users)) if is_soft else node
    raise AssertionError("the centroids are gone")


def stem_of(graph: Graph, place: Place) -> str:
    """What the layer of an adapter is called, by the adapter's own tensors."""
    return graph.origins[tensor_name(graph, place.tensors[rank1.A]) or ""].source.rpartition(".")[0]


# Out into the world


def base_digest(graph: Graph, found: Sequence[Site]) -> str:
    """sha256 over the weights that experts stand beside, by their layers; of shapes alone it says little."""
    return tensors_digest({s.name: layers.weight_of(graph, s.layers[0]) for s in found})


def _digest(given: Experts) -> str:
    tensors = {f"{layer}.{n}": t for layer, h in given.layers.items() for n, t in h.items()}
    return tensors_digest(tensors)


def _refuse_other(
    graph: Graph, given: Experts, clusters: Intuition | None, found: Sequence[Site], place: str
) -> None:
    """Raise PreconditionError where experts were trained beside other weights, or on other clusters."""
    if not graph.is_of_shapes and given.base != base_digest(graph, found):
        raise PreconditionError(
            f"{place} is for another base: the weights beneath it are others",
            where=f"graph {graph.role!r}",
            hint="name the model that it was trained on as the source, and put it in front of what changes weights",
        )
    if clusters is not None and given.centroids and given.centroids != clusters.digest:
        raise PreconditionError(
            f"{place} was trained on other clusters than these centroids",
            hint="name the file of centroids that it was trained with",
        )


def experts_of(graph: Graph) -> Experts:
    """The experts of a graph, to be written. Raises PreconditionError where it has none."""
    tensors = {
        stem_of(graph, place): {
            word: tensor_of(graph, node) for word, node in place.tensors.items()
        }
        for place in places(graph)
    }
    state = graph.pending[WORD]
    return Experts(
        kind=kind_of(graph), layers=tensors, base=state["base"], centroids=state["centroids"]
    )
