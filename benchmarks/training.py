"""What training while pruning costs beside LoRA at as many trainables: seconds a step and memory.

    python benchmarks/training.py [--rounds N]     # a quarter of an hour; writes results/training-FEATURES.json

A Llama of random weights as wide as SmolLM2-135M, four layers of it, is trained on rows of 128 tokens, four a step.
`pat` has adapters of rank 8 and hybrid sparsification modules of rank 28 (5 % of the width) whose mask closes half way;
`lora` has adapters of the rank that trains as much. Every training is a process of its own; a round has one of each in
shuffled order, and ratios are of neighbours, with Student's interval over rounds. Memory is the peak of the process,
and what training added to it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
import transformers

import effc
from effc.ir.program import Program
from effc.passes import PASSES
from effc.passes.tune import Tune
from effc.train.hsm import Hsm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "pat"))
import run as example

ARMS = ("lora", "pat")
WIDTH, LAYERS, WORDS = 576, 4, 4096
LENGTH, BATCH, STEPS, RANK, HSM_RANK, THREADS = 128, 4, 24, 8, 28, 1
Json = dict[str, Any]


class Stack(torch.nn.Module):
    """input_ids [batch, length] → logits [batch, length, words]"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=WORDS, use_cache=False,
        )  # fmt: skip
        self.inner = transformers.LlamaForCausalLM(config).eval()

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.inner(input_ids).logits}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", choices=ARMS, help="one training, in this process")
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(trained(given.arm)))
        return 0
    draw, found = random.Random(0), {arm: [] for arm in ARMS}
    for _ in range(given.rounds):
        for arm in draw.sample(ARMS, len(ARMS)):
            command = [sys.executable, __file__, "--arm", arm]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            found[arm].append(json.loads(ran.stdout.splitlines()[-1]))
            print(arm, found[arm][-1], flush=True)
    rows = {
        word: [math.log(a[word] / b[word]) for a, b in zip(found["pat"], found["lora"], strict=True)]
        for word in ("step_s", "peak_mb", "added_mb")
    }  # fmt: skip
    common.write(
        f"training-{common.features()}",
        {
            "name": "training", "steps": STEPS, "batch": BATCH, "length": LENGTH, "width": WIDTH, "layers": LAYERS,
            "threads": THREADS, "rounds": found, "logs": rows,
        },
    )  # fmt: skip
    return 0


def trained(arm: str) -> Json:
    """One arm: seconds a step, peak memory, what it trains."""
    torch.set_num_threads(THREADS)
    ids = torch.randint(0, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    program = common.cleaned(effc.trace(Stack().eval(), {"input_ids": ids}))
    before = peak_mb()
    shape = SimpleNamespace(rank=RANK, hsm_rank=HSM_RANK)
    more = example.matched(program.only(), common.stream(program), shape)
    for word, options in passes(arm, more):
        effc.apply(PASSES[word](**options), program)
    step = Tune(
        steps=STEPS, lr=1e-3, batch=BATCH, task="tokens", distill=0.0,
        terms=(Hsm(milestone=0.5),) if arm == "pat" else (),
    )  # fmt: skip
    record = effc.apply(step, program, train=effc.trainer(program, [{"input_ids": ids.numpy()}]))
    last = record.notes["main/curve"][-1]
    return {
        "step_s": last["seconds"] / last["step"], "peak_mb": peak_mb(), "added_mb": peak_mb() - before,
        "trainables": trainables(program, step),
    }  # fmt: skip


def passes(arm: str, more: int) -> list[tuple[str, Json]]:
    if arm == "lora":
        return [("attach-lora", {"rank": more, "alpha": 2 * more})]
    return [
        ("insert-hsm", {"ratio": 0.25, "align": 16, "rank": HSM_RANK, "embedding": "mask-only"}),
        ("attach-lora", {"rank": RANK, "alpha": 2 * RANK}),
    ]


def trainables(program: Program, step: Tune) -> int:
    graph = program.only()
    tensors = graph.tensors()
    return sum(tensors[name].numel() for name in step.trained(graph))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    raise SystemExit(main())
