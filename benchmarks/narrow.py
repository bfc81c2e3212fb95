"""What a quarter less residual width is worth to a language model: reading 128 tokens, and writing one more.

    python benchmarks/narrow.py [--threads N]     # ten quiet minutes; writes results/narrow-N-FEATURES.json

The model has random weights: eight layers of 1,024 channels, 16 heads of 64, a feed-forward width of 2,816 and a table
of 32,000 words. Every linear loses a quarter of one of its two sides, so the bound of their time is 1.33; attention and
the feed-forward product keep their sizes. Whole and narrowed are compiled for ONNX Runtime and OpenVINO in float, with
8 bit on both sides of a product (reading) and with 4-bit weights (writing), and take turns with the plain float export
in shuffled blocks. Ratios are whole ÷ narrowed of the same kind, and plain export ÷ engine: the export
as everybody has it gives the logits of every position, effc's engines those of the last; a second export does so too.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache
import common
import numpy as np
from decoder import Adapted

from effc import bench, causal, measure
from effc.compiler import trace_source
from effc.recipe import CalibSpec
from effc.samples import Samples
from effc.source import load

BUDGET_S, RATIO, ALIGN = 60.0, 0.25, 64
PAST, PROMPT = 128, 128
TARGETS = ("ort", "openvino")
SIZES: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_hidden_layers": 8, "vocab_size": 32000, "max_position_embeddings": 1024,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
READS, WRITES = [causal.PREFILL], [causal.DECODE]
DOWN = "*down_proj"
KINDS: dict[str, list[Any]] = {
    "float": [],
    "integers": [
        {"pass": "fuse-projections", "select": {"module": "*attn*"}, "graphs": READS},
        {"pass": "smooth", "graphs": READS},
        {"pass": "quantize", "activation_scale": "token", "select": {"module": DOWN}, "graphs": READS},
        {"pass": "quantize", "select": {"exclude": DOWN}, "graphs": READS},
        {"pass": "fuse-projections", "graphs": WRITES},
        {**cache.FOUR_BITS, "graphs": WRITES},
    ],
}  # fmt: skip
"""What is done to a model: 8 bit on both sides of a product where it reads, 4-bit weights where it writes."""


def width(model: Path) -> str:
    """The name of the residual stream in the graph as the passes of every compile leave it."""
    found = common.stream(common.cleaned(trace_source(load({"transformers": str(model)}))))
    assert found.size == SIZES["hidden_size"]
    return found.name


def of_target(target: str, passes: list[Any]) -> list[Any]:
    """The passes as a target can have them: OpenVINO has no kernels for a scale per token."""
    drop = "activation_scale" if target == "openvino" else None
    return [{k: v for k, v in pass_.items() if k != drop} for pass_ in passes]


def adapted(open_: Callable[[], Any], feeds: dict[str, Any]) -> Callable[[], Any]:
    """What opens an engine that is fed what it takes of the inputs."""
    return lambda: Adapted(open_(), feeds)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    with tempfile.TemporaryDirectory(prefix="effc-narrow-") as folder:
        place = Path(folder)
        text = cache.sentences(place)
        cache.model(place / "model", cache.KNOWN, SIZES)
        source = load({"transformers": str(place / "model")})
        plain = measure.plain_export(trace_source(source).only(), place / "plain", "ort")
        samples = Samples(source, CalibSpec(file=str(text), samples=32))
        prune = {
            "pass": "prune-dims",
            "ratio": RATIO,
            "align": ALIGN,
            "groups": width(place / "model"),
        }
        made = {
            (word, kind, target): cache.compiled(
                place, text, f"{word} {kind} {target}", [*first, *of_target(target, passes)], target
            )
            for kind, passes in KINDS.items() for target in TARGETS
            for word, first in (("whole", []), ("narrow", [prune]))
        }  # fmt: skip
        rows = []
        for role, length, past in ((causal.PREFILL, PROMPT, 0), (causal.DECODE, 1, PAST)):
            feeds = samples.shaped(1, length, past)
            feeds[causal.KEEP] = feeds[causal.KEEP][-1:]
            engines = {
                " ".join(key): adapted(measure.opener(of[role], threads), feeds)
                for key, of in made.items()
            }
            every = {**feeds, causal.KEEP: np.arange(length)}
            engines["engine"] = adapted(measure.opener(plain, threads), every)
            engines["plain, last position"] = adapted(measure.opener(plain, threads), feeds)
            case = bench.Case(batch=1, length=length, feeds=feeds, past=past)
            (shape,) = bench.compare(
                engines, [case], threads=threads, budget_s=BUDGET_S * len(engines) / 9
            ).shapes
            timings = shape.timings
            for kind, target in itertools.product(KINDS, TARGETS):
                whole, narrow = (timings[f"{word} {kind} {target}"] for word in ("whole", "narrow"))
                rows.append({
                    "role": role, "kind": kind, "target": target,
                    "plain_ms": round(timings["engine"].median_ms, 3), "n": len(narrow.runs),
                    "whole_ms": round(whole.median_ms, 3), "ms": round(narrow.median_ms, 3),
                    "whole ÷ narrow": _ratio(whole, narrow),
                    "plain ÷ narrow": _ratio(timings["engine"], narrow),
                    "plain ÷ whole": _ratio(timings["engine"], whole),
                    "plain, last position ÷ narrow": _ratio(timings["plain, last position"], narrow),
                })  # fmt: skip
                print(rows[-1], flush=True)
    content = {"name": "narrow", "threads": threads, "ratio": RATIO, "sizes": SIZES, "rows": rows}
    print(common.write(f"narrow-{threads}-{common.features()}", content))
    return 0


def _ratio(of: bench.Timing, by: bench.Timing) -> dict[str, float]:
    found = bench.ratio_of(of, by)
    return {word: round(getattr(found, word), 4) for word in ("ratio", "low", "high")}


if __name__ == "__main__":
    raise SystemExit(main())
