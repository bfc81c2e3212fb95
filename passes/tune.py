"""Short training of the graph as it stands, so that it gets back what passes before it took.

The tensors of the graph are trained in the graph itself, towards the outputs of the model as it was (distillation), to
the labels of its samples, or to the tokens of its texts. Dropout and the statistics of batch norms are as they are when
the model is used. What comes out is never worse on held-out samples than what went in.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Discriminator, Field, Tag

from effc.errors import CalibrationError, PreconditionError
from effc.ir.edit import rebind, tensor_name
from effc.ir.program import Graph, Program
from effc.ir.select import op_name
from effc.ir.show import tensors_digest
from effc.ir.splice import attached
from effc.passes.base import Pass, Stats
from effc.quant.ops import DEQUANTIZE, QUANTIZE
from effc.train.anchor import Anchor
from effc.train.graph import is_rounding
from effc.train.hsm import Hsm
from effc.train.loop import Precision

Rates = Annotated[
    tuple[tuple[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]], ...],
    BeforeValidator(
        lambda x: tuple(x.items()) if isinstance(x, dict) else x,
        json_schema_input_type=dict[str, float],
    ),
]
Files = Annotated[
    tuple[str, ...],
    BeforeValidator(
        lambda x: (x,) if isinstance(x, str) else x, json_schema_input_type=tuple[str, ...] | str
    ),
]
LAYERS = ("linear", "conv1d", "conv2d", "embedding")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _term(value: Any) -> Any:
    """A term by its word alone is one without options."""
    return {"term": value} if isinstance(value, str) else value


def _kind(value: Any) -> str | None:
    term = value.get("term") if isinstance(value, dict) else getattr(value, "term", None)
    return term if isinstance(term, str) else None


Terms = tuple[
    Annotated[
        Annotated[Hsm, Tag("hsm")] | Annotated[Anchor, Tag("l2-sp")],
        Discriminator(_kind),
        BeforeValidator(_term, json_schema_input_type=Hsm | Anchor | Literal["hsm", "l2-sp"]),
    ],
    ...,
]
"""What is done beside lowering the loss, by word; a further one is a member of a union here."""


@dataclass(frozen=True, kw_only=True)
class Tune(Pass):
    """Trains the tensors of the graph that match `tensors`, `steps` of AdamW with a warm-up and a cosine.

    Where none are named, they are those that passes attached, and all where nothing is attached. `clip` bounds the norm
    of a step's gradient.

    The loss is `distill` times that of distillation from the model as it was, at `temperature`, and the `task`'s:
    `labels` of the samples, the next of their `tokens`, the last token of each as the `answer`, that of a `source`
    which has a task, or none. `file` has the samples, those of `calib` where None; `samples` of them are drawn by
    `seed`, and `held` others judge. With `precision` bf16 products are of bfloat16, and what is trained stays in
    float32: faster on processors that have such products. `terms` are what passes in front put in to be trained in ways
    of its own. A step is of `accumulate` batches, one in memory at a time. With `group_by_length` samples of about one
    length are in a batch, so that less is padded. Held-out samples judge `every` so many steps, by their loss, or by
    the score of the source's task; after `patience` judgements without a better one training ends. `rates` are shares
    of `lr` for tensors by name, the first pattern that fits; `dropout` is the share of what linear layers read that is
    left out. Every other batch is of `beside`, files of what a source's task learns beside itself; samples of them that
    are like held-out ones, or like ones in the files `apart`, are left out.
    """

    name = "tune"
    effect = "lossy"
    trains: ClassVar[bool] = True
    renews: ClassVar[bool] = True
    is_shared: ClassVar[bool] = True

    steps: Count = 200
    lr: Positive = 1e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: Share = 0.0
    clip: Positive = 1.0
    batch: Count = 16
    accumulate: Count = 1
    group_by_length: bool = False
    distill: Share = 1.0
    temperature: Positive = 1.0
    task: Literal["none", "labels", "tokens", "answer", "source"] = "none"
    file: str | None = None
    column: str | int | None = None
    max_length: Count | None = None
    samples: Count = 2048
    held: Annotated[int, Field(ge=0)] = 128
    seed: int = 0
    precision: Precision = "f32"
    tensors: str | tuple[str, ...] | None = None
    every: Count | None = None
    patience: Count | None = None
    rates: Rates = ()
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    beside: Files = ()
    apart: Files = ()
    terms: Terms = ()

    def requires(self, program: Program) -> None:
        if self.task == "none" and not self.distill:
            raise PreconditionError(
                "tune: there is nothing to train towards", hint="set distill or task"
            )
        if self.beside and self.task != "source":
            raise PreconditionError(
                "tune: what is learnt beside is that of a source's task", hint="set task: source"
            )
        if self.apart and not self.beside:
            raise PreconditionError(
                "tune: `apart` says what samples of `beside` must not be like, and there are none",
                hint="name files: `beside`, or leave `apart` out",
            )
        if self.patience is not None and not self.held:
            raise PreconditionError(
                "tune: `patience` waits for what held-out samples say, and there are none",
                hint="held: 128, or leave `patience` out",
            )
        names: list[str] = []
        for graph in program:
            if self.takes(graph.role):
                _refuse_integers(graph)
                names += self.trained(graph)
        if idle := [word for word, _ in self.rates if not any(fnmatchcase(n, word) for n in names)]:
            raise PreconditionError(
                f"tune: no tensor that is trained has a name like {idle[0]!r}, which `rates` names",
                hint=f"names are such as {', '.join(names[:3])}",
            )

    def trained(self, graph: Graph) -> list[str]:
        """Names of the tensors that are trained: parameters of the model, and what passes made of them, that match."""
        if self.tensors is None and (found := attached(graph)):
            return found
        wanted = "*" if self.tensors is None else self.tensors
        words = (wanted,) if isinstance(wanted, str) else wanted
        layers = {
            tensor_name(graph, n)
            for node in graph.nodes if op_name(node) in LAYERS
            for n in node.all_input_nodes
        }  # fmt: skip
        held = graph.exported.state_dict
        return [
            name
            for name, tensor in graph.tensors().items()
            if tensor.is_floating_point() and any(fnmatchcase(name, word) for word in words)
            and (isinstance(held.get(name), torch.nn.Parameter) or name in layers)
        ]  # fmt: skip

    def rate_of(self, name: str) -> float:
        """The share of `lr` that a tensor has."""
        return next((rate for word, rate in self.rates if fnmatchcase(name, word)), 1.0)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        found = stats.train(self, graph)
        key, made = f"{graph.role}/tensors", tensors_digest(found)
        if stats.decide(key, lambda: made) != made:
            raise CalibrationError(
                "training comes out differently from the recorded decisions",
                hint="it hangs on weights, samples and processor; keep what was trained: effc tune, and --tuned",
            )
        for name, tensor in found.items():
            rebind(graph, name, tensor, "tuned")
        return len(found)


def _refuse_integers(graph: Graph) -> None:
    """Raise PreconditionError where what is trained is integers, or its gradient would have to pass codes."""
    if not any(node.target is DEQUANTIZE for node in graph.nodes):
        return
    if not attached(graph):
        raise PreconditionError(
            "tune trains floats, and the graph is on integers already",
            where=f"graph {graph.role!r}",
            hint="put `tune` in front of `quantize`, or `attach-lora` between: adapters are trained on integers",
        )
    for node in graph.nodes:
        if node.target is QUANTIZE and not all(is_rounding(user) for user in node.users):
            raise PreconditionError(
                f"tune: {node.name} gives codes that something else than a layer reads, and no gradient passes those",
                where=f"graph {graph.role!r}",
                hint="quantize the weights alone (activation_bits: 16), or put `tune` in front of `quantize`",
            )
