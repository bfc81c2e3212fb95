"""Gated experts of low rank as files: a directory with settings and tensors, read and written.

    experts_config.json        form, gates, sizes, coefficient, gain, and the sha256 of the base and of the centroids
    experts.safetensors        LAYER.rank1_A, LAYER.rank1_B, LAYER.rank1_R, LAYER.rank1_w, LAYER.rank1_v

`effc/nn/rank1.py` says what is computed from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from effc import bounded, paths
from effc.errors import SourceError, first_line
from effc.nn import rank1
from effc.nn.rank1 import Form, Gates

CONFIG, WEIGHTS = "experts_config.json", "experts.safetensors"
SCHEMA = 1
MOST = 4096
"""Rows of A, columns of B or experts of one adapter."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the adapters of a graph have in common; see `effc.nn.rank1.Rank1`."""

    form: Form = "pairs"
    gates: Gates = "both"
    sizes: tuple[int, int] = (4, 8)
    coefficient: float = rank1.COEFFICIENT
    gain: float = 1.0

    @property
    def experts(self) -> int:
        return rank1.experts(self.form, self.sizes)

    @property
    def reads(self) -> bool:
        """Whether the gates read what a request is about."""
        return self.gates in ("both", "intuition")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Tensors by layer and name, their kind, and the sha256 of the weights beneath them and of the centroids."""

    kind: Kind
    layers: Mapping[str, Mapping[str, Tensor]]
    base: str = ""
    centroids: str = ""


def files(experts: Experts) -> dict[str, bytes]:
    """The files of a directory that `read` reads."""
    kind = experts.kind
    config = {
        "effc": SCHEMA, "form": kind.form, "gates": kind.gates, "sizes": list(kind.sizes),
        "coefficient": kind.coefficient, "gain": kind.gain, "base": experts.base, "centroids": experts.centroids,
    }  # fmt: skip
    tensors = {
        f"{layer}.{name}": tensor.detach().clone().contiguous()
        for layer, held in sorted(experts.layers.items())
        for name, tensor in sorted(held.items())
    }
    text = json.dumps(config, indent=1, sort_keys=True) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: save(tensors)}


def read(place: Path) -> Experts:
    """Experts from a directory. Raises SourceError with the reason where it holds none, or damaged ones."""
    if not (place / CONFIG).is_file():
        raise SourceError(
            f"{paths.word(str(place))} holds no experts: it has no {CONFIG}",
            hint="effc tune writes them, into CKPT/experts",
        )
    config = bounded.read_json(place / CONFIG, SourceError)
    kind = _kind(place, config)
    paths.plain(place / WEIGHTS, SourceError).close()
    try:
        tensors = load_file(place / WEIGHTS)
    except Exception as error:
        raise _damaged(place, f"it does not load: {first_line(error)}") from error
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(".")
        layers.setdefault(layer, {})[name] = tensor
    if not layers:
        raise _damaged(place, "it holds no tensor")
    for layer, held in layers.items():
        _check(place, layer, held, kind)
    return Experts(kind=kind, layers=layers, base=config["base"], centroids=config["centroids"])


def _kind(place: Path, config: Any) -> Kind:
    """Raises SourceError where the settings are none."""
    numbers = ("coefficient", "gain")
    wanted = {"effc", "form", "gates", "sizes", "base", "centroids", *numbers}
    if (
        not isinstance(config, dict) or set(config) != wanted or config["effc"] != SCHEMA
        or config["form"] not in get_args(Form) or config["gates"] not in get_args(Gates)
        or not all(isinstance(config[word], str) for word in ("base", "centroids"))
        or not all(type(config[w]) in (int, float) and math.isfinite(config[w]) for w in numbers)
        or not isinstance(config["sizes"], list) or len(config["sizes"]) != 2
        or not all(type(n) is int and 0 < n <= MOST for n in config["sizes"])
    ):  # fmt: skip
        raise SourceError(
            f"{place / CONFIG} is not one that this effc reads", hint="get a whole copy of it"
        )
    n, m = config["sizes"]
    return Kind(
        form=config["form"], gates=config["gates"], sizes=(n, m),
        coefficient=float(config["coefficient"]), gain=float(config["gain"]),
    )  # fmt: skip


def _check(place: Path, layer: str, held: Mapping[str, Tensor], kind: Kind) -> None:
    """Raise SourceError where the tensors of a layer are not those of the kind, or hold what is no number."""
    a, b = (held.get(name) for name in (rank1.A, rank1.B))
    if a is None or b is None or a.dim() != 2 or b.dim() != 2:
        raise _damaged(place, f"{paths.word(layer)} has no A [n, in] and B [out, m]")
    wanted = rank1.shapes(kind.form, kind.gates, kind.sizes, (len(b), a.shape[1]))
    if {name: tuple(t.shape) for name, t in held.items()} != wanted:
        raise _damaged(place, f"{paths.word(layer)} has tensors of other sizes than {CONFIG} says")
    for name, tensor in held.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise _damaged(place, f"{paths.word(layer)}.{name} holds values that are no numbers")


def _damaged(place: Path, what: str) -> SourceError:
    return SourceError(f"{place / WEIGHTS}: {what}", hint="get a whole copy of the experts")
