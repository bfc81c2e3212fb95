"""What pruning buys on ONNX Runtime, with and without sizes that pay: a conv net and an encoder of random weights.

Each is pruned by 25, 40 and 50 %, as the ratio says (`plain`) and with an `align`, in float and under int8. The
ratio is unpruned ÷ pruned in the same precision, engines taking turns as in a bench. Speed alone is asked here: numbers
of a random model are worth nothing.

python benchmarks/sizes.py                                       # `align: auto`, a quarter of an hour on two free cores
python benchmarks/sizes.py --align 8 16 --pruned 0.4             # what rounding to a fixed multiple does
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

import effc
from effc import bench, measure
from effc.backends import BACKENDS
from effc.backends.base import Lowered
from effc.backends.dialect import DIALECTS
from effc.calib.data import Batch
from effc.ir.program import Program
from effc.passes import CANONICAL, PASSES
from effc.passes.prune_dims import PruneDims
from effc.passes.quantize import Quantize

THREADS, BUDGET_S = 1, 24.0
RATIOS = (0.25, 0.4, 0.5)
GROUPS = {"resnet": "*", "bert": ("*.intermediate.dense", "*.query:0")}
"""All channels of the conv net; of the encoder feed-forward width and whole heads, as anybody would."""


class Resnet(nn.Module):
    def __init__(self) -> None:
        from transformers import ResNetConfig, ResNetForImageClassification

        super().__init__()
        sizes = {"embedding_size": 32, "hidden_sizes": [64, 128, 256], "depths": [2, 2, 2]}
        config = ResNetConfig(layer_type="basic", num_labels=10, **sizes)
        self.body = ResNetForImageClassification(config)

    def forward(self, pixels: Tensor) -> Any:
        return self.body(pixels).logits


class Bert(nn.Module):
    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
        config = BertConfig(vocab_size=1000, num_hidden_layers=4, **sizes)
        self.body = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Any:
        return self.body(ids).last_hidden_state


def nets() -> Iterator[tuple[str, nn.Module, Tensor]]:
    torch.manual_seed(0)
    yield "resnet", Resnet().eval(), torch.randn(1, 3, 64, 64)
    yield "bert", Bert().eval(), torch.randint(0, 1000, (1, 32))


def lowered(program: Program, place: Path, behind: list[Any], feeds: dict[str, Any]) -> Lowered:
    program = program.clone()
    for pass_ in behind:
        effc.apply(pass_, program, [Batch(inputs=feeds)], dialect=DIALECTS["ort"])
    found: Lowered = BACKENDS["ort"]().lower(program.only(), place)
    return found


def rows_of(
    name: str, module: nn.Module, x: Tensor, place: Path, aligns: list[str], ratios: list[float]
) -> Iterator[dict[str, Any]]:
    program = effc.trace(module, x)
    (port,) = program.only().inputs
    probes = {"main": [{port: x}]}
    for word in CANONICAL:
        effc.apply(PASSES[word](), program, dialect=DIALECTS["ort"], probes=probes)
    feeds = {port: x.numpy()}
    case = bench.Case(batch=1, length=None, feeds=feeds)
    for kind, behind in (("float", []), ("int8", [Quantize()])):
        whole = lowered(program, place / f"{name}-{kind}", behind, feeds)
        for ratio in ratios:
            engines, about = {"engine": measure.opener(whole, THREADS)}, {}
            for align in ("plain", *aligns):
                smaller, started = program.clone(), time.perf_counter()
                asked: Any = int(align) if align.isdecimal() else {"plain": None}.get(align, align)
                pass_ = PruneDims(ratio=ratio, groups=GROUPS[name], align=asked)
                clock = effc.clock("ort", feeds, threads=THREADS, behind=behind)
                record = effc.apply(pass_, smaller, probes=probes, clock=clock)
                seconds = time.perf_counter() - started
                made = lowered(smaller, place / f"{name}-{kind}-{ratio}-{align}", behind, feeds)
                engines[align] = measure.opener(made, THREADS)
                kinds = record.notes.get("main/sizes", {}).get("kinds", [])
                about[align] = {
                    "parameters": _parameters(smaller) / _parameters(program), "seconds": round(seconds, 1),
                    "moved": [[k["size"], k["wanted"], k["kept"]] for k in kinds if k["wanted"] != k["kept"]],
                    "kinds": len(kinds), "timed": sum(len(k["tried"]) for k in kinds),
                }  # fmt: skip
            timed = bench.compare(engines, [case], threads=THREADS, budget_s=BUDGET_S)
            (shape,) = timed.shapes
            for align, told in about.items():
                yield {
                    "net": name, "kind": kind, "pruned": ratio, "align": align, **told,
                    "whole_ms": round(shape.timings["engine"].median_ms, 3),
                    "ms": round(shape.timings[align].median_ms, 3), "n": len(shape.timings[align].runs),
                    **_plain(bench.ratio_of(shape.timings["engine"], shape.timings[align])),
                    "against_plain": None if align == "plain"
                    else _plain(bench.ratio_of(shape.timings["plain"], shape.timings[align])),
                }  # fmt: skip


def _plain(ratio: bench.Ratio) -> dict[str, float]:
    return {
        "ratio": round(ratio.ratio, 4),
        "low": round(ratio.low, 4),
        "high": round(ratio.high, 4),
    }


def _parameters(program: Program) -> int:
    tensors = program.only().tensors().values()
    return sum({t.data_ptr(): t.numel() for t in tensors if t.is_floating_point()}.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nets", nargs="*", help="resnet, bert; both where none is named")
    parser.add_argument("--align", nargs="+", default=["auto"], help="auto, or multiples")
    parser.add_argument("--pruned", nargs="+", type=float, default=list(RATIOS))
    asked = parser.parse_args()
    word = "" if asked.align == ["auto"] else "".join(f"-{align}" for align in asked.align)
    with tempfile.TemporaryDirectory(prefix="effc-sizes-") as folder:
        for name, module, x in nets():
            if asked.nets and name not in asked.nets:
                continue
            rows = []
            for row in rows_of(name, module, x, Path(folder), asked.align, asked.pruned):
                print({k: v for k, v in row.items() if k != "moved"}, flush=True)
                rows.append(row)
            content = {"name": "sizes", "threads": THREADS, "groups": GROUPS[name], "rows": rows}
            print(common.write(f"sizes-{name}{word}-{common.features()}", content))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
