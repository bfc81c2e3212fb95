"""`effc package --layout peft`: an adapter of low rank as `peft.PeftModel.from_pretrained(model, DIR)` loads it.

    adapter_config.json, adapter_model.safetensors

It comes from a checkpoint of `effc tune`, where it lies already, or from a package whose engine for ONNX Runtime takes
adapters in exchange (`swap-lora`): then it is the one that the engine has by itself, its scale inside B. Anywhere else
an adapter is part of a graph that was changed around it. Several roles have a folder each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import torch

from effc import adapter, causal, checkpoint, diffusion, package, paths
from effc.adapter import CONFIG, WEIGHTS, Adapter, Low
from effc.errors import TuneError, UsageError
from effc.intuition import INPUT
from effc.layout_causal import KIND as CAUSAL
from effc.layout_plan import TARGET, Plan, own_entries
from effc.nn.lora import SWAP_A, SWAP_B

if TYPE_CHECKING:
    import onnx_ir as ir

KEPT = {"transpose"}
"""What a base's weights may have gone through and still be the base's."""


def of_checkpoint(out: Path) -> Plan:
    """Raises TuneError where the checkpoint is not whole, UsageError where it holds no adapter."""
    content = checkpoint.record(out)
    checkpoint.check_files(out, content)
    folders = [
        PurePosixPath(name).parent for name in content["files"] if PurePosixPath(name).name == CONFIG
    ]  # fmt: skip
    if not folders:
        raise UsageError(
            f"{out} holds no adapter in PEFT's form",
            hint="effc tune writes one where attach-lora stands in the recipe, on a base that nothing else changed",
        )

    def fill(place: Path) -> None:
        for folder in folders:
            adapter.read(out / folder)
            target = folder.parent if len(folders) > 1 else PurePosixPath()
            for name in (CONFIG, WEIGHTS):
                if (folder / name).as_posix() not in content["files"]:
                    raise TuneError(f"{out} does not list {folder / name}", hint=checkpoint.AGAIN)
                package.copy_file(out / folder / name, place, (target / name).as_posix())

    return Plan(last=_last([str(f.parent) for f in folders]), fill=fill)


def plan(out: Path, manifest: package.Manifest) -> Plan:
    """Raises UsageError where no engine has an adapter that can be told from it, or its base is not as it came."""
    named = [p.role for p in manifest.passes if p.name == "swap-lora" and p.target == TARGET]
    entries = [entry for entry in own_entries(out, manifest) if entry.role in named]
    if not entries:
        raise UsageError(
            f"{out} has no engine whose adapter is still one: merged or compiled, it is part of the weights",
            hint="name the checkpoint that effc tune wrote, or compile with swap-lora behind attach-lora",
        )

    def fill(place: Path) -> None:
        for entry in entries:
            task = "CAUSAL_LM" if manifest.kind == CAUSAL else None
            base = str(manifest.source.get("name", ""))
            made = adapter.files(_adapter(out, manifest, entry), base=base, task=task)
            folder = paths.inside(place, entry.role) if len(entries) > 1 else place
            folder.mkdir(exist_ok=True)
            for name, content in made.items():
                (folder / name).write_bytes(content)

    return Plan(last=_last([entry.role for entry in entries]), fill=fill)


def _last(roles: list[str]) -> str:
    return f"{roles[-1]}/{CONFIG}" if len(roles) > 1 else CONFIG


def _adapter(out: Path, manifest: package.Manifest, entry: package.EngineEntry) -> Adapter:
    """The adapter that an engine has by itself, by the names of layers in its model."""
    import onnx_ir as ir

    found = package.read_json(out, manifest.origins, package.MOST_RECORD_BYTES)
    origins = found.get(f"{TARGET}/{entry.role}") or found.get(entry.role) or {}
    _refuse_changed(out, origins)
    graph = ir.load(paths.inside(out, entry.path)).graph
    stem = "model." if _is_wrapped(manifest, entry) else ""
    layers, turned = {}, False
    for name in graph.initializers:
        layer = name.removesuffix(f".{SWAP_A}")
        if layer == name:
            continue
        a, b = _tensor(graph, name).T, _tensor(graph, f"{layer}.{SWAP_B}").T
        layers[layer.removeprefix(stem)] = Low(a=a, b=b, alpha=len(a))
        turned |= "transpose" in origins.get(f"{layer}.weight", {}).get("transforms", ())
    return Adapter(layers=layers, turned=turned)


def _is_wrapped(manifest: package.Manifest, entry: package.EngineEntry) -> bool:
    """Whether effc put the model into a module of its own, as `Source.stem` knows, told by the ports."""
    names = {port.name: port.dtype for port in entry.inputs}
    has_cache = any(name.startswith(f"{causal.PAST}.") for name in names)
    is_pixels = names.get("pixel_values") == "uint8"
    return has_cache or is_pixels or INPUT in names or manifest.kind == diffusion.KIND


def _tensor(graph: ir.Graph, name: str) -> torch.Tensor:
    value = graph.initializers[name].const_value
    assert value is not None
    return torch.from_numpy(np.array(value.numpy(), np.float32))


def _refuse_changed(out: Path, origins: Mapping[str, Mapping[str, list[str]]]) -> None:
    for name, origin in origins.items():
        changes = set(origin.get("transforms", ())) - KEPT
        if changes and not name.endswith((f".{SWAP_A}", f".{SWAP_B}")):
            raise UsageError(
                f"the adapter in {out} is not for the model as it came: {paths.word(name)} is "
                f"{' and '.join(sorted(changes))}",
                hint="PEFT's form is for a base that nothing else changed",
            )
