"""How long it takes to trace a causal language model and write it as ONNX, by depth, and beside torch.onnx.export.

A Llama of the shape of SmolLM-135M (random weights; tied table of 49,152 words) with 6, 12 and 30 layers. Every row is
a process of its own, so that nothing is warm: trace, effc's exact passes, translation, and writing of the files; beside
them `torch.onnx.export` of the same model to the same opset.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common

LAYERS = (6, 12, 30)
OPSET = 23
WIDTH, INNER, HEADS, KEYS, WORDS = 576, 1536, 9, 3, 49152


def model(layers: int) -> tuple[Any, dict[str, Any]]:
    """The language model as a module that gives logits, and an example of its inputs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEYS, max_position_embeddings=2048,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = LlamaForCausalLM(config)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.body(input_ids=input_ids, attention_mask=attention_mask).logits

    ids = torch.randint(0, WORDS, (2, 16))
    return Logits().eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ours(layers: int, place: Path) -> dict[str, float]:
    """Seconds of every step."""
    import effc
    from effc.backends.onnx import save, to_onnx
    from effc.passes import CANONICAL, PASSES

    module, feeds = model(layers)
    clock = Clock()
    program = effc.trace(module, feeds, dims={k: {0: "batch", 1: "sequence"} for k in feeds})
    clock.lap("trace")
    for word in CANONICAL:
        effc.apply(PASSES[word](), program, probes={"main": [feeds]})
    clock.lap("exact passes")
    written = to_onnx(program.only(), OPSET)
    clock.lap("translate")
    save(written, place)
    clock.lap("write")
    return clock.laps


def theirs(layers: int, place: Path) -> dict[str, float]:
    import torch

    module, feeds = model(layers)
    sizes = {k: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for k in feeds}
    clock = Clock()
    torch.onnx.export(
        module, (), str(place / "model.onnx"), kwargs=feeds, dynamic_shapes=sizes, dynamo=True,
        opset_version=OPSET, verbose=False, external_data=True,
    )  # fmt: skip
    clock.lap("torch.onnx.export")
    return clock.laps


class Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 2)
        self._last = time.perf_counter()


ARMS = {"effc": ours, "torch": theirs}


def alone(arm: str, layers: int) -> dict[str, Any]:
    """One row, from a process that did nothing before."""
    with TemporaryDirectory() as place:
        command = [sys.executable, __file__, "--one", arm, str(layers), place]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        size = sum(f.stat().st_size for f in Path(place).iterdir())
    steps = json.loads(ran.stdout.splitlines()[-1])
    total = round(sum(steps.values()), 2)
    return {"arm": arm, "layers": layers, "mb": round(size / 1e6), "steps": steps, "total": total}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one layer count, effc alone")
    parser.add_argument(
        "--one", nargs=3, metavar=("ARM", "LAYERS", "PLACE"), help="a single row, here"
    )
    args = parser.parse_args()
    if args.one:
        arm, layers, place = args.one
        print(json.dumps(ARMS[arm](int(layers), Path(place))))
        return 0
    rows = []
    for layers in LAYERS[:1] if args.smoke else LAYERS:
        for arm in list(ARMS)[:1] if args.smoke else ARMS:
            rows.append(alone(arm, layers))
            print(json.dumps(rows[-1]), flush=True)
    if not args.smoke:
        print(common.write(f"lowering-{common.features()}", {"name": "lowering", "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
