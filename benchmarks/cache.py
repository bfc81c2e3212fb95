"""What a cache of keys and values in 8 bit is worth: a token behind pasts of several lengths, and the text it costs.

python benchmarks/cache.py          # five minutes on a quiet machine; writes results/cache-FEATURES.json

Times are of a model of random weights with the widths of SmolLM2-135M, eight layers of it and a small table, 4-bit
weights, two threads: an engine that writes with a cache of integers beside one with a cache of floats, in shuffled
blocks. An engine that reads is beside them, since there codes cost time. The ratio is float ÷ integers with its 99 %
interval. Perplexity is of stories260K, measured by benchmarks/rounding.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np

from effc import bench, causal, measure, package, recipe
from effc.compiler import compile
from effc.engine import lowered as lowered_of
from effc.recipe import CalibSpec
from effc.samples import Samples
from effc.source import load

THREADS, BUDGET_S = 2, 20.0
LAYERS, WORDS = 8, 512
PASTS = (128, 512, 1024, 4096)
FOUR_BITS = {"pass": "quantize", "bits": 4, "activation_bits": 16, "group": 32}
KNOWN = "the cat sat on a mat and then it was warm so we all went home to sleep until rain came"
SIZES = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "num_hidden_layers": LAYERS, "vocab_size": WORDS, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def model(place: Path, text: str, sizes: Mapping[str, Any] = SIZES) -> None:
    """A directory of a model of random weights, with a tokenizer that knows the words of a text."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    made.eval().save_pretrained(place)
    words = ["<pad>", "<s>", "</s>", *dict.fromkeys(text.split())][:WORDS]
    known = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>")
    backend = tokenizers.Tokenizer(known)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(place)


def sentences(place: Path) -> Path:
    """A file of text of the words that the model knows."""
    draw = np.random.default_rng(0)
    text = place / "text.txt"
    text.write_text("\n".join(" ".join(draw.choice(KNOWN.split(), 40)) for _ in range(64)))
    return text


def compiled(
    place: Path, text: Path, name: str, passes: list[Any], target: str = "ort"
) -> dict[str, Any]:
    """Engines by role of a package of that name, of the model beside it."""
    made = recipe.build({
        "source": {"transformers": str(place / "model"), "roles": list(causal.ROLES)},
        "calib": {"file": str(text), "samples": 32}, "passes": passes, "targets": [target],
        "gate": False, "bench": False,
    })  # fmt: skip
    compile(made, place / name, threads=THREADS)
    manifest = package.read(place / name)
    return {entry.role: lowered_of(place / name, entry) for entry in manifest.engines}


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="effc-cache-") as folder:
        place = Path(folder)
        text = sentences(place)
        model(place / "model", KNOWN)
        floats = compiled(place, text, "floats", [FOUR_BITS])
        codes = compiled(place, text, "codes", ["quantize-cache", FOUR_BITS])
        samples = Samples(
            load({"transformers": str(place / "model")}), CalibSpec(file=str(text), samples=32)
        )
        rows = []
        for role, length, past in (
            *((causal.DECODE, 1, n) for n in PASTS),
            (causal.PREFILL, 128, 0),
        ):
            feeds = samples.shaped(1, length, past)
            feeds[causal.KEEP] = feeds[causal.KEEP][-1:]
            timed = bench.compare(
                {
                    "engine": measure.opener(codes[role], THREADS),
                    "floats": measure.opener(floats[role], THREADS),
                },
                [bench.Case(batch=1, length=length, feeds=feeds, past=past)],
                threads=THREADS, budget_s=BUDGET_S,
            ).to_json()["shapes"][0]  # fmt: skip
            rows.append({"role": role, "cache_mb": _mb(past + length), **timed})
    content = {"name": "cache", "threads": THREADS, "layers": LAYERS, "rows": rows}
    print(common.write(f"cache-{common.features()}", content))
    return 0


def _mb(positions: int) -> dict[str, float]:
    """Megabytes of the whole cache."""
    heads, size = SIZES["num_key_value_heads"], 576 // 9
    values = 2 * LAYERS * int(heads) * size * positions
    return {"floats": round(values * 4 / 1e6, 2), "codes": round(values / 1e6, 2)}


if __name__ == "__main__":
    raise SystemExit(main())
