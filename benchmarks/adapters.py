"""What adapters cost beside integers: an engine without them, with LoRA, with gated experts, with several at once.

    python benchmarks/adapters.py     # twenty minutes on a quiet machine; writes results/adapters-FEATURES.json

An encoder of random weights and two layers, 1,024 channels wide and 384, reads 8 rows of 128 tokens; its linear layers
multiply bytes, and what stands beside them is in float (ONNX Runtime) or 16 bit (OpenVINO, where the processor has it).
`lora` has adapters of rank 8 that are not merged, `mor1e` 4 · 8 experts of rank 1 with one product for those of query,
key and value (`one by one` without that), `stack` four adapters of which every row chooses: one for all, or four in
turn; and `swap` the adapter of `lora`, left open to be exchanged. All take turns in shuffled blocks. Ratios are
adapters ÷ none, and mixed ÷ one for all. A mixed batch is held against each of its rows alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import transformers
from decoder import Adapted

import effc
from effc import bench, measure
from effc.backends import BACKENDS
from effc.backends.dialect import DIALECTS
from effc.calib.data import Batch
from effc.ir.edit import rebind
from effc.ir.program import Program
from effc.ir.splice import attached
from effc.nn import rank1
from effc.passes import PASSES

THREADS, BUDGET_S = 2, 60.0
WIDTHS, TARGETS = (1024, 384), ("ort", "openvino")
ROWS, LENGTH, WORDS, LAYERS, ADAPTERS, RANK, SIZES = 8, 128, 512, 2, 4, 8, (4, 8)
LORA = ("attach-lora", {"rank": RANK})
EXPERTS = ("attach-rank1", {"sizes": SIZES})
KINDS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "none": [],
    "lora": [LORA],
    "mor1e, one by one": [EXPERTS],
    "mor1e": [EXPERTS, ("batch-rank1", {})],
    "swap": [LORA, ("swap-lora", {})],
    "stack": [],
}
Arrays = Mapping[str, Any]


class Encoder(torch.nn.Module):
    """input_ids [batch, length] → last_hidden_state [batch, length, width]"""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=width // 64,
            intermediate_size=4 * width, max_position_embeddings=LENGTH,
        )  # fmt: skip
        self.inner = transformers.BertModel(config, add_pooling_layer=False).eval()

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": self.inner(input_ids=input_ids).last_hidden_state}


def traced(width: int) -> Program:
    ids = torch.randint(0, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    dims = {"input_ids": {0: "batch", 1: "sequence"}}
    return common.cleaned(effc.trace(Encoder(width).eval(), {"input_ids": ids}, dims=dims))


def stirred(program: Program, seed: int) -> Program:
    """Adapters as training leaves them: nothing is 0, which a kernel might notice."""
    graph, draw = program.only(), torch.Generator().manual_seed(seed)
    for name in attached(graph):
        old = graph.tensors()[name]
        scale = 0.05 if old.dim() else 0.05 / rank1.SLOPE
        rebind(graph, name, old + scale * torch.randn(old.shape, generator=draw), "tuned")
    return program


def stacked(whole: Program, place: Path) -> tuple[str, ...]:
    """Adapters in PEFT's form, each of its own numbers."""
    names = []
    for number in range(ADAPTERS):
        made = whole.clone()
        effc.apply(PASSES["attach-lora"](rank=RANK, seed=number), made)
        effc.save_adapter(stirred(made, number), place / f"adapter-{number}", stem="inner.")
        names.append(str(place / f"adapter-{number}"))
    return tuple(names)


def feeds_of(kind: str, which: list[int]) -> dict[str, Any]:
    """Inputs; what a gate is told and which adapter a row has among them."""
    draw = np.random.default_rng(2)
    made: dict[str, Any] = {"input_ids": draw.integers(0, WORDS, (ROWS, LENGTH))}
    if kind.startswith("mor1e"):
        made["intuition"] = draw.random((ROWS, SIZES[0] * SIZES[1]), np.float32)
    if kind.startswith("stack"):
        made["adapter"] = np.array(which)
    return made


def built(whole: Program, kind: str, names: tuple[str, ...], target: str, place: Path) -> Any:
    """An engine whose base multiplies bytes."""
    program = whole.clone()
    steps = [("stack-lora", {"adapters": names})] if kind == "stack" else KINDS[kind]
    for number, (word, options) in enumerate(steps):
        effc.apply(PASSES[word](**options), program)
        if number == 0:
            stirred(program, 0)
    batches = [Batch(inputs=feeds_of(kind, [1] * ROWS))]
    effc.apply(PASSES["quantize"](), program, batches, dialect=DIALECTS[target])
    return BACKENDS[target]().lower(program.only(), place)


def rows_apart(lowered: Any, feeds: Arrays, threads: int) -> float:
    """The largest difference between a row of a mixed batch and the same row with its adapter alone."""
    with measure.opened(lowered, threads) as engine:
        together = engine(feeds)["last_hidden_state"]
        alone = [
            engine({name: array[i : i + 1] for name, array in feeds.items()})["last_hidden_state"]
            for i in range(ROWS)
        ]
    return float(np.abs(together - np.concatenate(alone)).max())


def timed(width: int, target: str, place: Path, given: Any) -> list[dict[str, Any]]:
    whole = traced(width)
    names = stacked(whole, place)
    made = {kind: built(whole, kind, names, target, place / kind) for kind in KINDS}
    turns = [1 + i % ADAPTERS for i in range(ROWS)]
    apart = rows_apart(made["stack"], feeds_of("stack", turns), given.threads)
    fed = {kind: feeds_of(kind, []) for kind in KINDS if kind != "stack"}
    fed |= {"stack, one": feeds_of("stack", [1] * ROWS), "stack, mixed": feeds_of("stack", turns)}

    def opener(kind: str) -> Any:
        word = "stack" if kind.startswith("stack") else kind
        opened = measure.opener(made[word], given.threads)
        return lambda: Adapted(opened(), fed[kind])

    openers = {"engine" if kind == "none" else kind: opener(kind) for kind in fed}
    case = bench.Case(batch=ROWS, length=LENGTH, feeds=fed["none"])
    budget = given.seconds * len(openers) / 3
    (shape,) = bench.compare(openers, [case], threads=given.threads, budget_s=budget).shapes
    timings = {("none" if name == "engine" else name): t for name, t in shape.timings.items()}
    rows = []
    for kind, timing in timings.items():
        row = {
            "width": width, "target": target, "kind": kind, "ms": round(timing.median_ms, 3), "n": len(timing.runs)
        }  # fmt: skip
        for by in {"none": (), "stack, mixed": ("none", "stack, one", "lora")}.get(kind, ("none",)):
            found = bench.ratio_of(timing, timings[by])
            row[f"÷ {by}"] = {w: round(getattr(found, w), 4) for w in ("ratio", "low", "high")}
        rows.append(row)
        print(row, flush=True)
    rows[-1]["row by row"] = apart
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for three engines")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--try-out", action="store_true", help="print, and write no result")
    given = parser.parse_args()
    rows = []
    for width in given.widths:
        for target in given.targets:
            with tempfile.TemporaryDirectory(prefix="effc-adapters-") as folder:
                rows += timed(width, target, Path(folder), given)
    if not given.try_out:
        content = {
            "name": "adapters", "threads": given.threads, "rows": rows, "batch": ROWS, "length": LENGTH,
            "layers": LAYERS, "rank": RANK, "sizes": list(SIZES), "adapters": ADAPTERS,
        }  # fmt: skip
        print(common.write(f"adapters-{common.features()}", content))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
