"""What the search of noisyquant costs on a model of DeiT-S's size: seconds of every pass and memory.

    python benchmarks/searching.py     # minutes; writes benchmarks/results/searching-FEATURES.json

A vision transformer of random weights, 384 wide, twelve layers, 197 tokens, is brought to six bits by the whole stack,
levelled channels, offsets and codes that make up for each other, with 128 pictures of noise. All is done in a process
of its own, whose peak is the memory; asked are ten minutes and 4 GB. Seconds are those that one core works for it, with
one thread, which other work on the machine does not lengthen; what the clock said beside other work is `wall_s`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

import effc
from effc.backends.dialect import DIALECTS
from effc.calib.data import Batch
from effc.ir.program import Program
from effc.passes import PASSES

SAMPLES, BATCH, BITS, TARGET = 128, 16, 6, "tensorrt"
STACK: tuple[dict[str, Any], ...] = (
    {"pass": "level", "alike": True},
    {"pass": "noisyquant", "weight_range": "mse", "rounding": "gptq"},
)
LONGEST_S, MOST_MB = 600, 4000


def model() -> Program:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )  # fmt: skip
    module = transformers.ViTForImageClassification(config).eval()
    return effc.trace(
        module, {"pixel_values": _pictures(2, 0)}, dims={"pixel_values": {0: "batch"}}
    )


def _pictures(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


def once(file: Path) -> int:
    """The whole search in this process; writes its seconds by step."""
    torch.set_num_threads(1)
    started, seconds = time.process_time(), dict[str, float]()

    def lap(word: str) -> None:
        seconds[word] = round(time.process_time() - started - sum(seconds.values()), 1)

    program = model()
    lap("trace")
    program = common.cleaned(program, TARGET)
    lap("clean up")
    data = [
        Batch(inputs={"pixel_values": _pictures(BATCH, i).numpy()}) for i in range(SAMPLES // BATCH)
    ]
    sites = 0
    for options in STACK:
        given = {k: v for k, v in options.items() if k != "pass"}
        pass_ = PASSES[options["pass"]](
            bits=BITS, activation_bits=BITS, select=effc.Select(op="linear"), **given
        )
        record = effc.apply(pass_, program, data, dialect=DIALECTS[TARGET])
        sites = record.sites
        lap(options["pass"])
    logits = program.run(pixel_values=_pictures(2, 99))["logits"].numpy()
    assert np.isfinite(logits).all()
    found = {
        "seconds": seconds,
        "sites": sites,
        "cpu_s": round(time.process_time(), 1),
    }
    file.write_text(json.dumps(found), encoding="utf-8")
    return 0


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="effc-") as place:
        file = Path(place) / "found.json"
        code, wall, peak = common.run_python(__file__, file)
        if code:
            return code
        found = json.loads(file.read_text(encoding="utf-8"))
    found |= {
        "name": "searching",
        "wall_s": round(wall, 1),
        "peak_mb": round(peak),
        "samples": SAMPLES,
        "bits": BITS,
    }
    print(common.write(f"searching-{common.features()}", found))
    print(found)
    missed = found["cpu_s"] > LONGEST_S or peak > MOST_MB
    if missed:
        print(f"MISSED: {LONGEST_S} s and {MOST_MB} MB")
    return int(missed)


if __name__ == "__main__":
    sys.exit(once(Path(sys.argv[1])) if sys.argv[1:] else main())
