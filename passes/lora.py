"""Adapters of low rank beside linear layers: attached to be trained or as they come, and folded into the weights.

    attach-lora     y = W x + b   →   y = W x + b + s B A x                        or DoRA's form, see `effc.nn.lora`
    merge-lora      W   →   W + s B A                                              and the operators are those of before

The weight may be integers already (`quantize` in front): W is then what they stand for, the adapter reads x in float,
and is trained on the model as it was rounded (QLoRA, Dettmers et al. 2023). Into integers nothing is merged.

A fresh adapter changes nothing, to the last bit. Its tensors are called after the layer, `mlp.fc1.lora_A` and
`mlp.fc1.lora_B`, and their origin says that they were spliced in: by that, and by the operators around them,
`merge-lora` knows them again, whatever was trained, cloned or pruned meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from effc.adapter import Adapter, Low, files, read
from effc.errors import CalibrationError, PackageError, PreconditionError
from effc.ir.edit import is_constant, lift, rebind, redirect, replace, tensor_name, tensor_of
from effc.ir.program import Graph, Origin, Program, place_of
from effc.ir.select import Select, module_path, op_name
from effc.ir.splice import is_spliced, matched, small_graph, splice
from effc.nn import lora
from effc.nn.lora import FORMS, Dora, Lora
from effc.passes.base import Model, Pass, Stats
from effc.quant.ops import DEQUANTIZE, QUANTIZE

log = logging.getLogger(__name__)

RANK = 8
FOLDER = "adapter"
"""Where a checkpoint has it in PEFT's form."""
LOGITS = "logits"
_FREE = 0.7310585
"""A scale that no adapter has, for a graph that adapters of any scale are held against."""
ROOTED = "rslora"
"""What the origin of A says where the scale is by the root of the rank."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Linear layers that share a weight, and the name that their adapter has."""

    name: str
    layers: tuple[fx.Node, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        weight: Any = self.layers[0].args[1]
        out, inner = weight.meta["val"].shape
        return int(out), int(inner)


@dataclass(frozen=True, kw_only=True)
class AttachLora(Pass):
    """Puts a trainable change of low rank beside linear layers; `tune` then trains nothing else.

    `rank`, `alpha` and `form` say what it is: 8, the rank and `lora` where nothing is said. The layer that gives the
    logits, and one whose weight is an embedding's too, have one only with `output`. `adapter` is a directory of PEFT,
    whose adapter is taken as it is in the place of a new one.
    """

    name = "attach-lora"
    renews: ClassVar[bool] = True

    rank: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    form: FORMS | None = None
    seed: int = 0
    output: bool = False
    select: Select = field(default_factory=Select)
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.adapter is not None:  # it changes what the model does, and is meant to
            object.__setattr__(self, "effect", "lossy")
            object.__setattr__(self, "is_meant", True)

    def agrees(self, behind: Sequence[Pass]) -> None:
        usual = type(self)()
        told = [
            word
            for word in ("rank", "alpha", "form", "seed", "output", "select")
            if self.adapter is not None and getattr(self, word) != getattr(usual, word)
        ]
        if told:
            raise PreconditionError(
                f"{self.name}: the adapter itself says its {' and '.join(told)}",
                hint=f"leave {' and '.join(told)} out, or the adapter",
            )

    def requires(self, program: Program) -> None:
        self.agrees(())
        given = self._given()
        for graph in program:
            if self.takes(graph.role):
                for site, _, _ in self._adapters(graph, given):
                    _refuse_twice(graph, site)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        given = self._given()
        if given is not None:
            hold_recorded(graph, stats, given.digest, str(self.adapter))
        traced: dict[Any, Graph] = {}
        changed = count = 0
        for site, low, rooted in list(self._adapters(graph, given)):
            attach(graph, site, low, rooted=rooted, traced=traced)
            changed += len(site.layers)
            parts = (low.a, low.b, low.magnitude)
            count += sum(part.numel() for part in parts if part is not None)
        stats.notes["parameters"] = count
        return changed

    def _given(self) -> Adapter | None:
        """The adapter that is named; None where a new one is made."""
        return None if self.adapter is None else read(Path(self.adapter))

    def _adapters(self, graph: Graph, given: Adapter | None) -> Iterator[tuple[Site, Low, bool]]:
        """Every site, what is to stand beside it, and whether its scale is by the root of the rank.

        Raises PreconditionError where there is none, or where one cannot have it.
        """
        if given is not None:
            for site, low in fitted(graph, given, str(self.adapter)):
                yield site, low, given.rooted
            return
        found = sites(graph, self.select, output=self.output)
        if not found:
            raise self._nothing(graph)
        rank = self.rank or RANK
        for site in found:
            weight = weight_of(graph, site.layers[0])
            if rank > min(site.shape):
                raise PreconditionError(
                    f"{self.name}: rank {rank} is more than {site.name} has, which is {list(site.shape)}",
                    hint=f"rank: {min(site.shape)} or less, or leave it out: "
                    f'select: {{exclude: "{module_path(site.layers[0])}"}}',
                )
            a, b = lora.fresh(site.name, weight, rank, self.seed)
            size = lora.norms(weight) if self.form == "dora" else None
            low = Low(a=a, b=b, alpha=self.alpha or rank, magnitude=size)
            yield site, low, self.form == "rslora"

    def files(self, graph: Graph, model: Model) -> Mapping[str, bytes]:
        if not _names(graph):  # merged
            return {}
        task = "CAUSAL_LM" if model.kind == "causal-lm" else None
        try:
            made = files(adapter_of(graph, model.stem), base=model.name, task=task)
        except PreconditionError as error:
            log.warning("no adapter in PEFT's form is written: %s", error.what)
            return {}
        return {f"{FOLDER}/{name}": content for name, content in made.items()}

    def _nothing(self, graph: Graph) -> PreconditionError:
        last = [] if self.output else sites(graph, self.select, output=True)
        names = ", ".join(site.name for site in last[:3])
        return PreconditionError(
            f"{self.name}: no linear layer of {graph.role!r} is selected"
            + (f" but {names}, which gives the logits or shares an embedding" if last else ""),
            hint="output: true takes it" if last else "effc inspect MODEL lists the layers",
        )


@dataclass(frozen=True, kw_only=True)
class MergeLora(Pass):
    """Folds the adapters of linear layers into their weights; the graph has the operators that it had without them."""

    name = "merge-lora"

    def requires(self, program: Program) -> None:
        graphs = [graph for graph in program if self.takes(graph.role)]
        found = [_checked(graph, self.name) for graph in graphs]
        if not any(found):
            raise PreconditionError(
                f"{self.name}: no adapter is attached to {' and '.join(repr(g.role) for g in graphs)}",
                hint="put `attach-lora` in front of it",
            )

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        found = places(graph)
        if found:
            merge(graph, found, self.name)
        return len(found)


# Where adapters go


def sites(graph: Graph, select: Select, *, output: bool = False) -> list[Site]:
    """The linear layers of a choice that may have an adapter, those that share a weight together.

    Their weight is a constant that came with the model, or what its integers stand for. With `output` the layer that
    gives the logits is one of them, and one that shares its weight with an embedding.
    """
    tensors, tables, last = graph.tensors(), _tables(graph), _of_logits(graph)
    found: dict[Any, list[fx.Node]] = {}
    for node in select.sites(graph):
        name = tensor_name(graph, stored(node.args[1])) if op_name(node) == "linear" else None
        if name is None or is_spliced(graph, name):
            continue
        place = place_of(tensors[name])
        if output or (node is not last and place not in tables):
            found.setdefault(place, []).append(node)
    return [
        Site(name=layer_name(graph, layers[0], tables), layers=tuple(layers))
        for layers in found.values()
    ]


def stored(weight: Any) -> Any:
    """The node of what a weight is stored as: its codes, where it is integers."""
    is_coded = isinstance(weight, fx.Node) and weight.target is DEQUANTIZE
    return weight.args[0] if is_coded else weight


def weight_of(graph: Graph, layer: fx.Node) -> Tensor:
    """The weight of a layer as a tensor; where it is integers, what they stand for."""
    weight: Any = layer.args[1]
    if weight.target is not DEQUANTIZE:
        return tensor_of(graph, weight)
    parts = [tensor_of(graph, x) if isinstance(x, fx.Node) else x for x in weight.args]
    made: Tensor = DEQUANTIZE(*parts)
    return made


def read_of(layer: fx.Node) -> Any:
    """The value that a layer reads, before it is rounded to a grid."""
    value: Any = layer.args[0]
    codes: Any = value.args[0] if value.target is DEQUANTIZE else None
    return codes.args[0] if codes is not None and codes.target is QUANTIZE else value


def layer_name(graph: Graph, layer: fx.Node, tables: Collection[Any]) -> str:
    """What a layer is called in the model: by its weight, or by its own place where that is one of the `tables`."""
    name = tensor_name(graph, stored(layer.args[1])) or ""
    if module_path(layer) and place_of(graph.tensors()[name]) in tables:
        return module_path(layer)
    source = graph.origins[name].source
    word = source if source.endswith(".weight") and "+" not in source else name
    return re.sub(r"\.?weight(_\d+)?$", "", word) or "linear"


def _tables(graph: Graph) -> set[Any]:
    """Where the tensors lie that embeddings look things up in."""
    tensors = graph.tensors()
    names = (tensor_name(graph, n.args[0]) for n in graph.nodes if op_name(n) == "embedding")
    return {place_of(tensors[name]) for name in names if name is not None}


def _of_logits(graph: Graph) -> fx.Node | None:
    """The layer that the output `logits` is the value of, but for a cast, a slice, a view; None where there is none."""
    (output,) = [n for n in graph.fx.nodes if n.op == "output"]
    given: Any = output.args[0]
    value = dict(zip(graph.outputs, given, strict=True)).get(LOGITS)
    while isinstance(value, fx.Node) and op_name(value) != "linear":
        read = [n for n in value.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        value = read[0] if len(read) == 1 else None
    return value if isinstance(value, fx.Node) else None


def fitted(graph: Graph, adapter: Adapter, place: str) -> Iterator[tuple[Site, Low]]:
    """The layers that an adapter is for. Raises PreconditionError where it is for another model.

    The base may lie in a wrapper of effc, whose name stands before all of its own.
    """
    known = {site.name: site for site in sites(graph, Select(), output=True)}
    first = next(iter(adapter.layers))
    ends = [name.removesuffix(first) for name in known if f".{name}".endswith(f".{first}")]
    prefix = next(
        (p for p in sorted(ends, key=len) if all(p + n in known for n in adapter.layers)), None
    )
    if prefix is None:
        common = min(ends, key=len, default="")
        missing = [name for name in adapter.layers if common + name not in known]
        raise PreconditionError(
            f"{place} is an adapter of another base: the graph has no linear layer {missing[0]!r}",
            where=f"graph {graph.role!r}",
            hint="name the model that it was trained on as the source, and put it in front of what fuses layers",
        )
    for name, low in adapter.layers.items():
        site = known[prefix + name]
        if (len(low.b), low.a.shape[1]) != site.shape:
            raise PreconditionError(
                f"{place} is an adapter of another base: {name} is {list(site.shape)} here, "
                f"and [{len(low.b)}, {low.a.shape[1]}] there",
                where=f"graph {graph.role!r}",
                hint="name the model that it was trained on as the source",
            )
        like: Any = site.layers[0].args[1]
        dtype = like.meta["val"].dtype
        size = low.magnitude
        yield site, dataclasses.replace(
            low, a=low.a.to(dtype), b=low.b.to(dtype), magnitude=size if size is None else size.to(dtype)
        )  # fmt: skip


def hold_recorded(graph: Graph, stats: Stats, digest: str, place: str) -> None:
    """Raise CalibrationError where a replay is given another adapter: what was decided behind it is not for that."""
    if stats.decide(f"{graph.role}/adapter", lambda: digest) != digest:
        raise CalibrationError(
            f"{place} is another adapter than that of the recorded decisions",
            hint="name the one that they were made with, or compile again without them",
        )


def _refuse_twice(graph: Graph, site: Site) -> None:
    names = {graph.origins[name].source for name in graph.tensors() if is_spliced(graph, name)}
    if f"{site.name}.{lora.A}" in names:
        raise PreconditionError(
            f"attach-lora: {site.name} has an adapter already",
            where=f"graph {graph.role!r}",
            hint="put `merge-lora` between the two, or choose other layers by `select`",
        )


def attach(graph: Graph, site: Site, low: Low, *, rooted: bool, traced: dict[Any, Graph]) -> None:
    """Put an adapter beside the layers of a site, which share it; the caller refreshes.

    `traced` keeps what was traced for layers of one form, for the next site.
    """
    scale = lora.scale_of(low.alpha, low.rank, rooted=rooted)
    shared: dict[str, fx.Node] = {}
    for layer in site.layers:
        own = layer.args[1:]
        module: nn.Module = Lora(low.a, low.b, scale)
        inputs: list[Any] = [read_of(layer), layer]
        if low.magnitude is not None:
            module = Dora(low.a, low.b, scale, low.magnitude)
            inputs += [part for part in own if part is not None]
        values = [node.meta["val"] for node in inputs]
        key = (
            type(module), scale, low.rank, *((str(tuple(v.shape)), v.dtype, v.device) for v in values)
        )  # fmt: skip
        if key not in traced:
            traced[key] = small_graph(module, values)
        small, users = traced[key], list(layer.users)
        (made,) = splice(
            graph, layer.next, module, inputs, site.name, like=small, scope=layer, shared=shared
        )  # fmt: skip
        redirect(graph, layer, made, users)
        found = matched(small, made) or {}
        shared = {word: found[word] for word, _ in module.named_parameters()}
    if rooted:
        name = tensor_name(graph, shared[lora.A]) or ""
        origin = graph.origins[name]
        graph.origins[name] = Origin(origin.source, (*origin.transforms, ROOTED))


# Where adapters are


@dataclass(frozen=True, kw_only=True)
class Place:
    """A layer, the adapter beside it, and the node that gives both together."""

    layer: fx.Node
    output: fx.Node
    a: fx.Node
    b: fx.Node
    scale: float
    magnitude: fx.Node | None = None


def places(graph: Graph) -> list[Place]:
    """Every adapter of a graph that stands beside a layer as `attach` puts it there."""
    ours = set(_names(graph))
    found: list[Place] = []
    if not ours:
        return found
    for node in graph.nodes:
        matches = (matched(small, node, _FREE) for small in _smalls() if op_name(node) == "add")
        hit = next((m for m in matches if m is not None and _is_ours(graph, m, ours)), None)
        if hit is not None:
            found.append(
                Place(
                    layer=hit["b"], output=node, a=hit[lora.A], b=hit[lora.B], scale=float(hit["free"]),
                    magnitude=hit.get(lora.MAGNITUDE),
                )
            )  # fmt: skip
    return found


@cache
def _smalls() -> tuple[Graph, ...]:
    """The graphs of both modules, that of DoRA with a bias too; nobody edits them."""
    a, b, size = torch.zeros(2, 4), torch.zeros(3, 2), torch.zeros(3)
    x, base, weight, bias = torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(3, 4), torch.zeros(3)
    dora = Dora(a, b, _FREE, size)
    return (
        small_graph(Lora(a, b, _FREE), [x, base]),
        small_graph(dora, [x, base, weight]), small_graph(dora, [x, base, weight, bias]),
    )  # fmt: skip


def _names(graph: Graph) -> list[str]:
    """Tensors of adapters, by their origin."""
    ends = tuple(f".{word}" for word in (lora.A, lora.B, lora.MAGNITUDE))
    return [
        n
        for n in graph.tensors()
        if is_spliced(graph, n) and graph.origins[n].source.endswith(ends)
    ]


def adapted(graph: Graph, place: Place) -> str:
    """What the layer of an adapter is called, by the adapter's own tensors."""
    return graph.origins[tensor_name(graph, place.a) or ""].source.rpartition(".")[0]


def _is_ours(graph: Graph, hit: dict[str, Any], ours: set[str]) -> bool:
    """Whether a match is of an adapter's own tensors, beside the layer that reads what it reads."""
    layer = hit["b"]
    parts = [hit[word] for word in (lora.A, lora.B, lora.MAGNITUDE) if word in hit]
    own = [hit[word] for word in ("c", "d") if word in hit]
    return (
        all(tensor_name(graph, part) in ours for part in parts)
        and op_name(layer) == "linear"
        and hit["a"] is read_of(layer)
        and all(mine is theirs for mine, theirs in zip(own, layer.args[1:], strict=False))
    )


def _checked(graph: Graph, word: str) -> list[Place]:
    """`places`, every one beside a weight in float. Raises PreconditionError for what is left of any other adapter."""
    found = places(graph)
    parts = {node for place in found for node in (place.a, place.b, place.magnitude)}
    left = set(_names(graph)) - {tensor_name(graph, node) for node in parts}
    for place in found:
        if not is_constant(graph, place.layer.args[1]):
            left.add(tensor_name(graph, place.a) or "")
    if not left:
        return found
    layer = graph.origins[min(left)].source.rpartition(".")[0]
    if any(node.target is DEQUANTIZE for node in graph.nodes):
        raise PreconditionError(
            f"{word}: the weight beneath the adapter of {layer} is integers already, and a sum of both is not",
            where=f"graph {graph.role!r}",
            hint="put `merge-lora` in front of `quantize`",
        )
    raise PreconditionError(
        f"{word}: a pass has changed the operators between {layer} and its adapter",
        where=f"graph {graph.role!r}",
        hint="put `merge-lora` right behind what trains, in front of what fuses or casts",
    )


def merge(graph: Graph, found: Sequence[Place], word: str) -> None:
    """Fold adapters into the weights; the caller refreshes.

    A weight that something else reads too, such as an embedding, stays, and the layer gets one of its own.
    """
    for place in found:
        replace(graph, place.output, place.layer)
    graph.fx.eliminate_dead_code()  # who reads a weight now reads it as a weight
    groups: dict[Any, list[Place]] = {}
    for place in found:
        groups.setdefault((place.layer.args[1], place.a, place.b), []).append(place)
    made: dict[Any, Tensor] = {}
    for (weight, a, b), group in groups.items():
        key = tuple(place_of(tensor_of(graph, node)) for node in (weight, a, b))
        if key not in made:
            made[key] = _folded(graph, group[0], word)
        put_weight(graph, weight, [place.layer for place in group], made[key], word)


def put_weight(
    graph: Graph, weight: fx.Node, layers: Sequence[fx.Node], tensor: Tensor, word: str
) -> None:
    """Give layers another weight; one that something else reads too stays, and the layers get one of their own."""
    name = tensor_name(graph, weight) or ""
    if set(weight.users) == set(layers):
        rebind(graph, name, tensor, word)
        return
    old = graph.origins[name]
    stem = layer_name(graph, layers[0], _tables(graph))
    own = lift(graph, f"{stem}.weight", tensor, Origin(old.source, (*old.transforms, word)))
    for layer in layers:
        layer.update_arg(1, own)


def _folded(graph: Graph, place: Place, word: str) -> Tensor:
    """The weight of a layer with its adapter in it. Raises PreconditionError where that is no number somewhere."""
    weight: Any = place.layer.args[1]
    size = tensor_of(graph, place.magnitude) if place.magnitude is not None else None
    w, a, b = (tensor_of(graph, node) for node in (weight, place.a, place.b))
    made = lora.merged(w, a, b, place.scale, size)
    if not made.is_meta and not bool(torch.isfinite(made).all()):
        raise PreconditionError(
            f"{word}: the adapter of {adapted(graph, place)} makes values that are no numbers",
            hint="its tensors hold NaN, or are too large; train again with a lower `lr`",
        )
    return made


# Out into the world


def adapter_of(graph: Graph, stem: str = "") -> Adapter:
    """The adapters of a graph, by the names of layers in its model; `stem` is what effc put before those.

    Raises PreconditionError where there are none, or where the graph is the model with more than them.
    """
    found = _checked(graph, "PEFT's form")
    if not found:
        raise PreconditionError("no adapter is attached", hint="effc.apply(AttachLora(…), program)")
    _refuse_changed(graph)
    rooted = [ROOTED in graph.origins[tensor_name(graph, p.a) or ""].transforms for p in found]
    layers, tables = {}, _tables(graph)
    for place in found:
        name, rank = layer_name(graph, place.layer, tables), int(place.a.meta["val"].shape[0])
        layers[name.removeprefix(stem)] = Low(
            a=tensor_of(graph, place.a), b=tensor_of(graph, place.b),
            alpha=lora.alpha_of(place.scale, rank, rooted=all(rooted)),
            magnitude=tensor_of(graph, place.magnitude) if place.magnitude is not None else None,
        )  # fmt: skip
    if len({low.magnitude is None for low in layers.values()}) > 1:
        raise PreconditionError(
            "some layers have an adapter in DoRA's form and some have not, which PEFT has no settings for",
            hint="attach one form",
        )
    weights = [tensor_name(graph, place.layer.args[1]) or "" for place in found]
    turned = any("transpose" in graph.origins[name].transforms for name in weights)
    return Adapter(layers=layers, rooted=all(rooted), turned=turned)


def _refuse_changed(graph: Graph) -> None:
    """Raise PreconditionError where the model beneath the adapters is not as it came."""
    state, ours = graph.exported.state_dict, _names(graph)
    for name in graph.tensors():
        changes = set(graph.origins[name].transforms) - {"transpose"}
        if name not in ours and changes and isinstance(state.get(name), nn.Parameter):
            raise PreconditionError(
                f"the adapter is not for the model as it came: {name} is {' and '.join(sorted(changes))}",
                hint="`merge-lora` and compile; PEFT's form is for a base that nothing else changed",
            )


def save_adapter(
    item: Program | Graph,
    place: str | Path,
    *,
    stem: str = "",
    base: str = "",
    task: str | None = None,
) -> None:
    """Write the adapters of a graph in the form of PEFT, whose `PeftModel.from_pretrained(model, place)` loads them.

    `stem` stands before the names of the model's own modules in those of the graph; `base` and `task` (`CAUSAL_LM`) are
    what the settings are to say of the model. Raises PreconditionError where there are none, or where the graph is not
    the model with an adapter and nothing else; PackageError where `place` holds something else.
    """
    graph = item.only() if isinstance(item, Program) else item
    place = Path(place)
    made = files(adapter_of(graph, stem), base=base, task=task)
    if place.exists() and (not place.is_dir() or {f.name for f in place.iterdir()} - made.keys()):
        raise PackageError(
            f"{place} holds something else than an adapter",
            hint="name a directory that is not there yet",
        )
    place.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        (place / f"{name}.part").write_bytes(content)
        os.replace(place / f"{name}.part", place / name)
