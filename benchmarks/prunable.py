"""Which part of a network can be pruned with nothing said about it, and is what is left exact?

For every network: the groups that effc finds, the part of the parameters on those that can lose units, and the largest
relative error of removed against masked, half of every group removed at random, three times. Beside it Torch-Pruning
where it is installed (pip install torch-pruning), with no layer named to it either: a group of it counts as *running*
where the net still runs after half of it is removed and gives outputs of the same shape, and as *exact* where these are
also those of the net with the same channels set to zero.

    python benchmarks/prunable.py [--only NAME]     # half an hour; writes benchmarks/results/prunable.json
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import sys
import time
from collections.abc import Iterable
from typing import Any

import common
import torch
from prunenets import NETS
from torch import Tensor, nn

from effc.errors import PreconditionError
from effc.ir.check import drift
from effc.ir.program import Program
from effc.machine import installed
from effc.passes.coupling import coupled_dims, masked_run
from effc.passes.layernorm import LayerNormToRMSNorm
from effc.passes.pipeline import apply
from effc.passes.prune_dims import PruneDims

from architectures import Built, program_of  # isort: skip  # found where prunenets says

Json = dict[str, Any]
DRAWS = 3
SAME = 1e-3
"""Relative L2 within which outputs count as the same for Torch-Pruning; a wrong one is off by a tenth and more."""


def ours(built: Built) -> Json:
    """Groups, share and error, before and after LayerNorms are converted."""
    program, feeds = program_of(built)
    found = _measured(program, feeds)
    try:
        record = apply(LayerNormToRMSNorm(), program, probes={"main": [feeds]})
    except PreconditionError as error:
        found["conversion"] = error.what
        return found
    if record.sites:
        found["converted"] = _measured(program, feeds)
    return found


def _measured(program: Program, feeds: dict[str, Tensor]) -> Json:
    started = time.perf_counter()
    coupling = coupled_dims(program.only())
    seconds = time.perf_counter() - started
    draw, worst = random.Random(0), 0.0
    for _ in range(DRAWS):
        keep = {
            g.name: tuple(sorted(draw.sample(range(g.size), max(1, g.size // 2))))
            for g in coupling.prunable()
        }
        wanted = masked_run(coupling, keep, feeds)
        smaller = program.clone()
        apply(PruneDims(keep=keep), smaller)
        worst = max(worst, drift(wanted, smaller.run(feeds)).rel_l2)
    stops = [g.stop for g in coupling.groups.values() if g.stop is not None]
    return {
        "groups": len(coupling.groups),
        "prunable": len(coupling.prunable()),
        "share": coupling.share(),
        "rel_l2": worst,
        "seconds": round(seconds, 3),
        "refused": sorted({s.reason for s in stops}),
    }


def theirs(built: Built) -> Json:
    """The same of Torch-Pruning: parameters on groups that run, and on those that are exact."""
    module, inputs, _ = built
    try:
        count = len(_groups(copy.deepcopy(module), inputs)[1])
    except Exception as error:  # whatever it says to a net that it cannot take
        return {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    flags = {k: {n: torch.zeros_like(p, dtype=torch.bool) for n, p in module.named_parameters()}
             for k in ("running", "exact")}  # fmt: skip
    with torch.no_grad():
        whole = module(**inputs)
    verdicts = {"running": 0, "exact": 0}
    for number in range(count):
        runs, exact, members = _tried(module, inputs, number, whole)
        for word, good in (("running", runs), ("exact", exact)):
            verdicts[word] += good
            for name, dim, idxs in members if good else ():
                flags[word][name].index_fill_(dim, torch.tensor(idxs), True)
    total = sum(p.numel() for p in module.parameters())
    shares = {w: sum(int(f.sum()) for f in each.values()) / total for w, each in flags.items()}
    return {"groups": count, **verdicts, "shares": shares, "version": installed("torch-pruning")}


def _groups(module: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, list[Any]]:
    import torch_pruning

    graph = torch_pruning.DependencyGraph()
    with torch.enable_grad():
        graph.build_dependency(module, example_inputs=inputs, verbose=False)
    return graph, list(graph.get_all_groups())


Member = tuple[str, int, list[int]]


def _tried(
    module: nn.Module, inputs: dict[str, Tensor], number: int, whole: Tensor
) -> tuple[bool, bool, list[Member]]:
    """Whether the net runs without half of a group, whether exactly, and what all of the group holds."""
    pruned, zeroed = copy.deepcopy(module), copy.deepcopy(module)
    graph, groups = _groups(pruned, inputs)
    group = groups[number]
    everything = list(_members(graph, pruned, group))
    root = group[0]
    draw = random.Random(number)
    half = sorted(draw.sample(list(root.idxs), max(1, len(root.idxs) // 2)))
    try:
        smaller = graph.get_pruning_group(root.dep.target.module, root.dep.handler, half)
        parameters = dict(zeroed.named_parameters())
        with torch.no_grad():
            for name, dim, idxs in _members(graph, pruned, smaller):
                parameters[name].index_fill_(dim, torch.tensor(idxs), 0.0)
            wanted = zeroed(**inputs)
            smaller.prune()
            found = pruned(**inputs)
    except Exception:
        return False, False, []
    if found.shape != whole.shape or not bool(found.isfinite().all()):
        return False, False, []
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return True, error <= SAME, everything


def _members(graph: Any, module: nn.Module, group: Any) -> Iterable[Member]:
    """Parameters, dimensions and indices of a group of Torch-Pruning."""
    modules = {id(m): name for name, m in module.named_modules()}
    parameters = {id(p): name for name, p in module.named_parameters()}
    for dep, idxs in group:
        target = dep.target.module
        idxs = [int(i) for i in idxs]
        if isinstance(target, nn.Parameter):
            if id(target) in parameters:
                yield parameters[id(target)], dep.target.pruning_dim, idxs
            continue
        if id(target) not in modules:
            continue
        out = graph.is_out_channel_pruning_fn(dep.handler)
        for word, value in target.named_parameters(recurse=False):
            name = parameters[id(value)]
            dim = _dimension(target, value, word, out=out)
            if dim is not None and max(idxs) < value.shape[dim]:
                yield name, dim, idxs


def _dimension(target: nn.Module, value: Tensor, word: str, *, out: bool) -> int | None:
    if value.dim() == 1:
        return 0 if out or not isinstance(target, nn.Linear | nn.modules.conv._ConvNd) else None
    if isinstance(target, nn.Embedding):
        return 1
    if isinstance(target, nn.modules.conv._ConvNd) and target.groups > 1:
        return 0
    turned = isinstance(target, nn.modules.conv._ConvTransposeNd)
    return 0 if out != turned else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=NETS, help="measure one network and write nothing")
    only = parser.parse_args().only
    here = importlib.util.find_spec("torch_pruning") is not None
    rows = []
    for name in [only] if only else NETS:
        torch.manual_seed(0)
        built = NETS[name]()
        row = {
            "name": name,
            "parameters": sum(p.numel() for p in built[0].parameters()),
            "effc": ours(built),
            "torch_pruning": theirs(built) if here else None,
        }
        rows.append(row)
        print(row, flush=True)
    if not only:
        print(f"wrote {common.write('prunable', {'draws': DRAWS, 'rows': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
