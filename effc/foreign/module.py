"""An ONNX graph as a torch module, which is traced like any other, so that every pass and every target takes it.

Parts of the module have the paths of the modules that the file was exported from, and its tensors the names that they
had there, as far as the file tells.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effc.errors import SourceError, first_line
from effc.foreign.layers import LAYERS, NORMS, PICTURES
from effc.foreign.numbers import MOST, ON_NUMBERS, NotNumbers, is_numbers, numbers_of, tensor
from effc.foreign.operators import ELEMENTS, SHAPES
from effc.foreign.steps import Step, Steps, renamed
from effc.foreign.together import together
from effc.ir.trace import spelled

OPERATORS: Mapping[str, Callable[..., Any]] = {**ELEMENTS, **SHAPES, **LAYERS}
WRITTEN = frozenset({*OPERATORS, "Constant"}) - {"Linear", "Silu"}
"""Operators that may stand in a file."""
WEIGHTS = ("", "weight", "bias", "running_mean", "running_var")
_WHOLE = ("Linear", "Conv", "ConvTranspose", *NORMS)
"""Layers whose constants are tensors, however small."""
MOST_FOLDED = 1 << 24
"""Values of a constant that is worked out here; a larger one stays with the step that makes it."""


class Part(nn.Module):
    """A place of the graph that has tensors of its own; what it computes is handed in."""

    def forward(self, run: Callable[..., Any], step: Step, values: list[Any]) -> Any:
        return run(step, values)


class Graph(nn.Module):
    """A module that takes the steps of an ONNX graph one by one; `module_of` makes one."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.steps = steps
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self._numbers: dict[str, Any] = {}
        self._parts: list[nn.Module] = []
        shared: dict[Any, tuple[nn.Module, str]] = {}
        for step in steps.steps:
            part = self._part(step.path)
            self._parts.append(part)
            for place, name in enumerate(step.inputs):
                value = steps.constants.get(name)
                if value is None:
                    continue
                if not is_whole(step) and self._is_number(step, name, value):
                    continue
                if name not in self._places:
                    key = value.data_ptr(), tuple(value.shape), value.stride(), value.dtype
                    if key not in shared or not value.numel():
                        shared[key] = self._held(part, step, place, name, value)
                    self._places[name] = shared[key]

    def _is_number(self, step: Step, name: str, value: Tensor) -> bool:
        """Whether a constant is a size or a setting, which then is known by its numbers."""
        small = numbers_of(value)
        if small is None and step.op in PICTURES and value.numel() <= MOST:
            small = value.numpy()
        if small is not None:
            self._numbers[name] = small
        return name in self._numbers

    def _part(self, path: str) -> nn.Module:
        """The part at a path, made where there is none yet."""
        found: nn.Module = self
        for word in path.split("."):
            word = word or "graph"
            inner = found._modules.get(word)
            if inner is None:
                while hasattr(found, word):
                    word = f"{word}_"
                inner = found._modules.get(word) or Part()
                found._modules[word] = inner
            found = inner
        return found

    def _held(
        self, part: nn.Module, step: Step, place: int, name: str, value: Tensor
    ) -> tuple[nn.Module, str]:
        """Where a constant is kept, under its usual name in a layer and its own anywhere else."""
        own = (
            re.sub(r"\W+", "_", name.rpartition(".")[2] if step.path else name).strip("_")
            or "constant"
        )
        word = WEIGHTS[place] if step.op in _WHOLE and 0 < place < len(WEIGHTS) else own
        word = "weight" if step.get("is_table") and place == 0 else word
        while hasattr(part, word):
            word = f"{word}_"
        if value.is_floating_point():
            part.register_parameter(word, nn.Parameter(value, requires_grad=False))
        else:
            part.register_buffer(word, value)
        return part, word

    def _value(self, step: Step, name: str, made: Mapping[str, Any]) -> Any:
        if not name:
            return None
        if name in made:
            return made[name]
        if name in self._numbers and not is_whole(step):
            return self._numbers[name]
        part, word = self._places[name]
        return getattr(part, word)

    def compute(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of inputs, both by the names in the file. Raises SourceError naming the step that fails."""
        made: dict[str, Any] = dict(named)
        for step, part in zip(self.steps.steps, self._parts, strict=True):
            values = [self._value(step, name, made) for name in step.inputs]
            found = part(done, step, values)
            made.update(
                zip(step.outputs, found if isinstance(found, tuple) else (found,), strict=False)
            )
        return {name: self._given(name, made) for name in self.steps.outputs}

    def _given(self, name: str, made: Mapping[str, Any]) -> Tensor:
        value = made.get(name)
        if value is None:
            value = self.steps.constants[name]
        value = tensor(value)
        return value.clone() if any(value is made[i] for i in self.steps.inputs) else value


def is_whole(step: Step) -> bool:
    return step.op in _WHOLE or bool(step.get("is_table"))


def done(step: Step, values: list[Any]) -> Any:
    """What a step makes of its inputs. Raises SourceError with the name of its node."""
    try:
        given = [v for v in values if v is not None]
        if step.op in ON_NUMBERS and given and all(map(is_numbers, given)):
            try:
                return ON_NUMBERS[step.op](step, *values)
            except NotNumbers:
                pass
        return OPERATORS[step.op](step, *values)
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(
            f"effc cannot read {step.word}: {first_line(error)}",
            hint="export the model without it, or compile it from torch: module:factory",
        ) from error


def fold(steps: Steps) -> None:
    """Work out what hangs on constants alone, in place."""
    kept = []
    for step in steps.steps:
        known = [name for name in step.inputs if name]
        if not known or not all(name in steps.constants for name in known):
            kept.append(step)
            continue
        values = [steps.constants[name] if name else None for name in step.inputs]
        small = [numbers_of(v) if v is not None else None for v in values]
        given: list[Any] = [v if n is None else n for v, n in zip(values, small, strict=True)]
        if is_whole(step) or step.op == "Shape":
            given = values
        with torch.no_grad():
            found = done(step, given)
        parts = found if isinstance(found, tuple) else (found,)
        made = [tensor(part) if part is not None else None for part in parts]
        if sum(m.numel() for m in made if m is not None) > MOST_FOLDED and step.op not in (
            "Transpose",
            "Cast",
            "Identity",
        ):
            kept.append(step)
            continue
        for name, value in zip(step.outputs, made, strict=False):
            if name and value is not None:
                steps.constants[name] = value
    steps.steps = kept
    steps.prune()


def module_of(steps: Steps) -> Graph:
    """The module of a graph, whose `forward` says by its signature what inputs there are. Raises SourceError."""
    steps.steps = [
        renamed(s, attributes={"opset": steps.opset, **s.attributes}) for s in steps.steps
    ]
    fold(steps)
    together(steps)

    def forward(self: Graph, **given: Tensor) -> dict[str, Tensor]:
        words = {spelled(name): name for name in self.steps.inputs}
        return self.compute({words.get(word, word): value for word, value in given.items()})

    words = [spelled(name) for name in steps.inputs]
    if len(set(words)) != len(words):
        raise SourceError(
            f"two inputs are called alike: {', '.join(steps.inputs)}",
            hint="rename one of them in letters and digits",
        )
    made: Graph = type("Graph", (Graph,), {"forward": forward})(steps)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(word, kind) for word in ("self", *words)])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return made.eval()
