"""Adapters of low rank in the form of PEFT: a directory with settings and tensors, read and written.

    adapter_config.json          r, lora_alpha, use_rslora, use_dora, target_modules, …
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [r, in], .lora_B.weight [out, r],
                                 and .lora_magnitude_vector [out] for DoRA

Whatever of the settings would make the adapter compute something else than that is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from effc import bounded, paths
from effc.errors import SourceError, first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(
    re.escape(PREFIX)
    + r"(?P<layer>.+)\.(?:lora_(?P<part>[AB])\.weight|lora_(?P<magnitude>magnitude)_vector(?:\.weight)?)"
)
_MERGE = "merge it with peft (merge_and_unload, save_pretrained) and give the model that comes out"
_REFUSED = {
    "modules_to_save": "it brings whole layers of its own beside the adapter",
    "lora_bias": "it has biases in its products",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it changes single rows of the embedding",
    "target_parameters": "it changes parameters that are no layer's weight",
    "alora_invocation_tokens": "it counts behind certain tokens only",
    "use_qalora": "it reads means of inputs",
    "use_bdlora": "its matrices are of blocks",
    "arrow_config": "a router chooses between several",
    "monteclora_config": "its tensors are drawn",
    "kasa_config": "it changes the base when it is loaded",
    "megatron_config": "it is for layers that are spread over machines",
}
"""Settings that must not be set, and what they mean."""
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""How A and B may have begun; all other ways change the weights of the base too."""
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "init_lora_weights", "fan_in_fan_out", "target_modules", "exclude_modules", "layers_pattern",
    "layers_to_transform", "lora_dropout", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "peft_version", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "ensure_weight_tying", "runtime_config",
}  # fmt: skip
"""Settings that are read, or say how it was trained or which layers have tensors, which the tensors say themselves.
`fan_in_fan_out` is how the base stores a weight; A and B are the same either way."""


@dataclass(frozen=True, kw_only=True)
class Low:
    """What stands beside one layer: A [r, in], B [out, r], α, and for DoRA the size of every row [out]."""

    a: Tensor
    b: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Changes of low rank by the name of the layer in the base; `rooted` where α is divided by the root of the rank."""

    layers: Mapping[str, Low]
    rooted: bool = False
    turned: bool = False
    """Whether the base stores weights as [in, out]; PEFT wants to be told when it loads the adapter."""

    @property
    def digest(self) -> str:
        """sha256 of all that it changes."""
        made = files(self)
        return hashlib.sha256(made[CONFIG] + made[WEIGHTS]).hexdigest()


def read(place: Path) -> Adapter:
    """An adapter from a directory that PEFT wrote. Raises SourceError with the reason where it is none or damaged."""
    if not (place / CONFIG).is_file():
        raise SourceError(
            f"{paths.word(str(place))} is no adapter: it has no {CONFIG}",
            hint="name the directory that save_pretrained of peft wrote",
        )
    config = bounded.read_json(place / CONFIG, SourceError)
    if not isinstance(config, dict):
        raise SourceError(f"{place / CONFIG} holds no settings", hint=bounded.HINT)
    _refuse(place, config)
    parts = _parts(place, _tensors(place))
    ranks = _Pattern(place, config, "rank_pattern", config.get("r"), parts)
    alphas = _Pattern(place, config, "alpha_pattern", config.get("lora_alpha"), parts)
    layers = {}
    for name, tensors in sorted(parts.items()):
        wanted = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
        if tensors.keys() != wanted:
            raise _damaged(place, f"{name} has {' and '.join(sorted(tensors))} where {CONFIG} "
                           f"asks for {' and '.join(sorted(wanted))}")  # fmt: skip
        low = Low(
            a=tensors["A"], b=tensors["B"], alpha=alphas.of(name), magnitude=tensors.get("magnitude")
        )  # fmt: skip
        _check(place, name, low, ranks.of(name))
        layers[name] = low
    return Adapter(
        layers=layers, rooted=bool(config.get("use_rslora")), turned=bool(config.get("fan_in_fan_out"))
    )  # fmt: skip


def files(adapter: Adapter, *, base: str = "", task: str | None = None) -> dict[str, bytes]:
    """The files of an adapter, such as `peft.PeftModel.from_pretrained` loads; `base` is the name of its model."""
    ranks = {name: low.rank for name, low in adapter.layers.items()}
    alphas = {name: low.alpha for name, low in adapter.layers.items()}
    (rank, _), (alpha, _) = (Counter(v.values()).most_common(1)[0] for v in (ranks, alphas))
    config = {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base or None, "r": rank, "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "use_rslora": adapter.rooted, "bias": "none", "lora_dropout": 0.0, "inference_mode": True,
        "use_dora": any(low.magnitude is not None for low in adapter.layers.values()),
        "fan_in_fan_out": adapter.turned, "init_lora_weights": True, "target_modules": sorted(adapter.layers),
    }  # fmt: skip
    tensors = {}
    for name, low in adapter.layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = low.a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = low.b
        if low.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = low.magnitude
    held = {key: tensor.detach().clone().contiguous() for key, tensor in sorted(tensors.items())}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: save(held, metadata={"format": "pt"})}


def _refuse(place: Path, config: Mapping[str, Any]) -> None:
    """Raise SourceError for settings that ask for something else than the product of two matrices."""

    def refusal(what: str) -> SourceError:
        return SourceError(f"{place / CONFIG}: {what}", hint=_MERGE)

    if config.get("peft_type") != "LORA":
        kind = str(config.get("peft_type"))[:40]
        raise refusal(
            f"peft_type is {kind!r}, and only LORA is a change of low rank as it is meant here"
        )
    if config.get("bias", "none") != "none":
        raise refusal(
            f"bias is {str(config['bias'])[:40]!r}: it brings biases of the base that were trained too"
        )
    for key, value in config.items():
        if not value or key in _HARMLESS:
            continue
        why = _REFUSED.get(key, "effc does not know what that changes")
        raise refusal(f"{paths.shown(str(key))} is set: {why}")
    start = config.get("init_lora_weights")
    if not any(start is word or start == word for word in _STARTS):
        raise refusal(
            f"init_lora_weights is {str(start)[:40]!r}, which changes the weights of the base too"
        )


def _tensors(place: Path) -> dict[str, Tensor]:
    if not (place / WEIGHTS).is_file():
        pickles = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in place.glob(pattern)
        )
        if pickles:
            raise SourceError(
                f"{place} has its tensors only as pickle ({pickles[0]}), which can run code when read",
                hint="convert it where you trust it: load it with peft, save_pretrained(DIR, safe_serialization=True)",
            )
        raise SourceError(f"{place} has no {WEIGHTS}", hint="get a whole copy of the adapter")
    paths.plain(place / WEIGHTS, SourceError).close()
    try:
        return load_file(place / WEIGHTS)
    except Exception as error:
        raise _damaged(place, f"it does not load: {first_line(error)}") from error


def _parts(place: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and part: `A`, `B`, `magnitude`."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            what = (
                "an embedding's"
                if ".lora_embedding_" in key
                else "none of a linear layer's adapter"
            )
            raise SourceError(
                f"{place / WEIGHTS} holds {paths.shown(key)}, which is {what}",
                hint=f"adapters of linear layers are taken; {_MERGE}",
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise _damaged(place, f"{paths.word(key)} is {dtype}, and no number of 16 bit or more")
        found.setdefault(match["layer"], {})[match["part"] or "magnitude"] = tensor
    if not found:
        raise _damaged(place, "it holds no tensor")
    return found


def _check(place: Path, name: str, low: Low, rank: int) -> None:
    """Raise SourceError where the tensors of a layer do not go together, or hold what is no number."""
    shapes = [list(low.a.shape), list(low.b.shape)]
    if any(len(shape) != 2 for shape in shapes) or not shapes[0][0] == shapes[1][1] == rank > 0:
        raise _damaged(
            place, f"{name} has A {shapes[0]} and B {shapes[1]}, which are not of rank {rank}"
        )
    if low.magnitude is not None and list(low.magnitude.shape) != shapes[1][:1]:
        raise _damaged(
            place, f"{name} has {list(low.magnitude.shape)} sizes of rows, and B {shapes[1]}"
        )
    for part in (low.a, low.b, low.magnitude):
        if part is not None and not bool(torch.isfinite(part).all()):
            raise _damaged(place, f"{name} holds values that are no numbers (NaN or infinite)")


def _damaged(place: Path, what: str) -> SourceError:
    return SourceError(f"{place / WEIGHTS}: {what}", hint="get a whole copy of the adapter")


class _Pattern:
    """A setting that some layers have another value of, by the ends of their names.

    PEFT reads the names as regular expressions; one from outside may run for ever, so that only plain names are taken.
    """

    def __init__(
        self, place: Path, config: Mapping[str, Any], key: str, usual: Any, layers: Iterable[str]
    ) -> None:
        self.usual, found = usual, config.get(key) or {}
        if not isinstance(found, dict):
            raise SourceError(f"{place / CONFIG}: {key} is no mapping", hint=bounded.HINT)
        self.values: dict[str, Any] = {}
        for word, value in found.items():
            name = word.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not re.fullmatch(r"[\w.-]+", name):
                raise SourceError(
                    f"{place / CONFIG}: {key} has the regular expression {paths.shown(word)}, and only names are read",
                    hint="write the names of the layers out",
                )
            ends = [n for n in layers if n == name or (word[0] != "^" and n.endswith(f".{name}"))]
            for layer in ends:
                self.values.setdefault(layer, value)  # the first that fits counts
        for value in (usual, *self.values.values()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                word = "r" if key == "rank_pattern" else "lora_alpha"
                raise SourceError(
                    f"{place / CONFIG}: {word} is {str(value)[:40]}, and no number above 0",
                    hint=bounded.HINT,
                )

    def of(self, layer: str) -> Any:
        return self.values.get(layer, self.usual)
