"""Any configuration type of transformers as a small network with random weights, and inputs that it runs on.

built = build("bert")                # Built: a module with named tensors in and out
built.inputs(3, 11)                  # inputs of another batch and length
"""

from __future__ import annotations

import copy
import importlib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tinyconfigs import PLANS, Json, Plan, agree, shrunk
from tinyfeeds import Feeds, Sizes, Unknown
from torch import Tensor, nn

import effc

MOST = 40_000_000
"""Parameters of a model that is called small."""


class NotBuilt(Exception):
    """No small model of a type was made; says why not."""


def types() -> list[str]:
    """Every configuration type of the installed transformers, in an order drawn once: any first part is a sample."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found = sorted(CONFIG_MAPPING_NAMES)
    random.Random(0).shuffle(found)
    return found


def model_class(config: Any) -> type[nn.Module]:
    """The class of models that a configuration is of: the plain one, where there are several."""
    from transformers import PreTrainedModel
    from transformers.models.auto import modeling_auto as auto

    kind = type(config)
    tables = [
        auto.MODEL_MAPPING,
        *(
            v
            for k, v in sorted(vars(auto).items())
            if k.endswith("_MAPPING") and k != "MODEL_MAPPING"
        ),
    ]
    for table in tables[:1]:
        found = _looked_up(table, kind)
        if found is not None:
            return found
    try:
        module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    except ImportError:
        module = None
    own = [
        found
        for name, found in (vars(module).items() if module else ())
        if inspect.isclass(found)
        and issubclass(found, PreTrainedModel)
        and found.config_class is kind
        and not name.endswith("PreTrainedModel")
    ]
    if own:
        return min(own, key=lambda c: not c.__name__.endswith("Model"))
    for table in tables[1:]:
        found = _looked_up(table, kind)
        if found is not None:
            return found
    raise NotBuilt(f"transformers has no model class of {kind.__name__}")


def _looked_up(table: Any, kind: type) -> Any:
    try:
        found = table.get(kind, None)
    except (ValueError, ImportError, AttributeError):
        return None
    return found[0] if isinstance(found, list | tuple) else found


def configured(word: str, plan: Plan) -> Any:
    """The default configuration of a type made small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[word]
    settings = _plain(kind().to_dict())
    made = shrunk(settings, plan)
    agree(settings, made)
    config = kind.from_dict(made)
    _settle(config)
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return copy.deepcopy(value)


def _settle(config: Any) -> None:
    """No cache, no dropping of tokens, a mapping of outputs, in a configuration and those within it."""
    for part in [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]:
        for name, value in (("use_cache", False), ("return_dict", True), ("torchscript", False)):
            if hasattr(part, name):
                try:
                    setattr(part, name, value)
                except (AttributeError, TypeError, ValueError):
                    continue


def shaken(model: nn.Module) -> nn.Module:
    """Random gains and shifts, and values where there were zeros alone, so that nothing cancels; for evaluation."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or "freq" in name or not value.numel():
                continue
            if not value.isfinite().all():
                continue
            is_weight = isinstance(value, nn.Parameter)
            if value.dim() == 1 and (is_weight or "running" in name):
                noise = torch.rand(value.shape, generator=draw)
                value.copy_(0.5 + noise if "var" in name else value + 0.2 * (noise - 0.5))
            elif is_weight and not value.any():
                value.copy_(0.05 * torch.randn(value.shape, generator=draw))
    return model.eval()


class Called(nn.Module):
    """A model called with named tensors; all tensors that it returns, by name."""

    def __init__(self, model: nn.Module, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.fixed = model, {name: value.tolist() for name, value in fixed.items()}

    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        fixed = {name: torch.tensor(numbers) for name, numbers in self.fixed.items()}
        return dict(_tensors("", self.model(**given, **fixed)))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from _tensors(f"{name}.{place}" if name else f"output_{place}", part)


def called(model: nn.Module, names: Iterable[str], fixed: Mapping[str, Any]) -> Called:
    """The model as a module whose forward has these parameters and no others."""
    words = list(names)
    space: Json = {}
    given = ", ".join(f"{w!r}: {w}" for w in words)
    exec(f"def forward(self, {', '.join(words)}):\n    return self.run({{{given}}})", space)
    made = type("Called", (Called,), {"forward": space["forward"], "__module__": __name__})
    return made(model, fixed)


@dataclass
class Built:
    """A small network of a type; `inputs` makes inputs by batch and length, `free` are the dimensions of each."""

    word: str
    plan: Plan
    module: nn.Module
    inputs: Callable[[int, int], dict[str, Tensor]]
    free: dict[str, dict[int, str]]
    sizes: list[tuple[int, int]]
    """Batches and lengths that the model itself runs with, the example first."""
    parameters: int
    fixed: tuple[str, ...] = ()
    tried: list[str] = field(default_factory=list)

    @property
    def module_inputs(self) -> dict[str, Tensor]:
        return self.inputs(*self.sizes[0])

    def source(self) -> effc.Source:
        return effc.Source(
            modules={"main": self.module},
            inputs={"main": self.inputs(*self.sizes[0])},
            dims={"main": self.free},
        )


FIXED = ("grid_thw", "spatial_shapes", "image_sizes", "original_sizes")
"""Inputs whose values decide sizes: they stand in the module, and batch is then what it was."""
SIZES = [(2, 12), (3, 17), (1, 9)]


def build(word: str) -> Built:
    """A small network of a configuration type. Raises NotBuilt with what each way came to."""
    tried: list[str] = []
    for plan in PLANS:
        try:
            torch.manual_seed(0)
            config = configured(word, plan)
            kind = model_class(config)
            with torch.device("meta"):
                count = _count(kind, config)
            if count > MOST:
                raise NotBuilt(f"{count / 1e6:.0f} M parameters")
            model = shaken(kind(config).float())
            count = sum(p.numel() for p in model.parameters())
            if count > MOST:
                raise NotBuilt(f"{count / 1e6:.0f} M parameters")
            return _running(word, plan, model, config, count, tried)
        except Exception as error:
            tried.append(
                f"{plan.kind}, {plan.layers} layers, {plan.picture}: {type(error).__name__}: {str(error)[-300:]}"
            )
            if isinstance(error, ImportError):
                break
    raise NotBuilt("\n".join(tried))


def _count(kind: Any, config: Any) -> int:
    try:
        return sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    except Exception:  # it looks at values while it is made
        return 0


def _running(
    word: str, plan: Plan, model: nn.Module, config: Any, count: int, tried: list[str]
) -> Built:
    feeds = Feeds(model, config)
    failed: list[str] = []
    for names in dict.fromkeys(feeds.forms()):
        for form in range(6):
            try:
                return _at(word, plan, model, feeds, names, form, count, tried)
            except Unknown as error:
                failed.append(f"{names}: {error}")
                break
            except Exception as error:
                failed.append(
                    f"{', '.join(names)} [{form}]: {type(error).__name__}: {str(error)[:200]}"
                )
    raise NotBuilt("; ".join(dict.fromkeys(failed)))


def _at(
    word: str,
    plan: Plan,
    model: nn.Module,
    feeds: Feeds,
    names: tuple[str, ...],
    form: int,
    count: int,
    tried: list[str],
) -> Built:
    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        found = feeds.values(names, Sizes(batch, length, form))
        return {n: v for n, v in found.items() if not n.endswith(FIXED)}

    first = feeds.values(names, Sizes(*SIZES[0], form))
    fixed = {n: v for n, v in first.items() if n.endswith(FIXED)}
    module = called(model, inputs(*SIZES[0]), fixed)
    with torch.no_grad():
        outputs = module(**inputs(*SIZES[0]))
        if not outputs:
            raise NotBuilt("it returns no tensor")
        sizes = [SIZES[0]]
        for batch, length in [*SIZES[1:], (3, 12), (2, 17), (1, 12), (2, 9)]:
            if len(sizes) > 2:
                break
            try:
                module(**inputs(batch, length))
                sizes.append((batch, length))
            except Exception:
                continue
    return Built(
        word, plan, module, inputs, _free(inputs, sizes), sizes, count, tuple(fixed), tried
    )


def _free(
    inputs: Callable[[int, int], dict[str, Tensor]], sizes: list[tuple[int, int]]
) -> dict[str, dict[int, str]]:
    """Axes whose size is another where batch or length are."""
    base, found = inputs(*sizes[0]), {}
    for batch, length in sizes[1:]:
        for name, value in inputs(batch, length).items():
            for axis, (a, b) in enumerate(zip(base[name].shape, value.shape, strict=True)):
                if a != b:
                    found.setdefault(name, {})[axis] = (
                        "batch"
                        if axis == 0
                        else f"{'length' if name.endswith(('ids', 'mask')) else name}_{axis}"
                    )
    return found
