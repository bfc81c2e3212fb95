"""Which architectures compile to int8 on ONNX Runtime, and how many of their layers really run in integers?

Every model has random weights and a small configuration of the real architecture; each is saved as a transformers
directory (or comes from a factory), compiled with the same command, and checked against torch. A failure is printed
with its reason.

    python benchmarks/coverage.py [--only NAME] [--json FILE] [--smoke]
    python benchmarks/coverage.py --all [--state DIR] [--minutes N] [--only TYPE] [--target TARGET] [--quantize WORD]

Without --only and --smoke the table goes to benchmarks/results/coverage-FEATURES.json too. With --all it is every
configuration type of transformers (`every.py`), each in a process of its own, into coverage-all-….json. What is done
is kept in DIR, and a second run goes on there; `--minutes` says when no further type is begun.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import nn

import effc
from effc.build import versions
from effc.errors import EffcError

TEXT: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 160,
}
LLM: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
SMOKE = ("bert", "resnet", "plain_mlp")


def text(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(**{**TEXT, **options})
        return getattr(transformers, kind)(settings)

    return make


def vision(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**options))

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": text("BertModel", "BertConfig"),
    "bert_classifier": text("BertForSequenceClassification", "BertConfig", num_labels=3),
    "roberta": text("RobertaForSequenceClassification", "RobertaConfig", num_labels=3),
    "xlm_roberta": text("XLMRobertaModel", "XLMRobertaConfig"),
    "distilbert": text(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=128,
    ),
    "albert": text("AlbertModel", "AlbertConfig", embedding_size=32),
    "electra": text(
        "ElectraForTokenClassification", "ElectraConfig", embedding_size=32, num_labels=5
    ),
    "deberta_v2": text(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        relative_attention=True,
        position_buckets=32,
        pos_att_type=["p2c", "c2p"],
        num_labels=3,
    ),
    "mpnet": text("MPNetModel", "MPNetConfig"),
    "modernbert": text(
        "ModernBertModel",
        "ModernBertConfig",
        global_attn_every_n_layers=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        cls_token_id=2,
        sep_token_id=1,
    ),
    "gpt2": text(
        "GPT2LMHeadModel",
        "GPT2Config",
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=160,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "llama": text("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, head_dim=16),
    "qwen3": text("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=16),
    "gemma2": text("Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=2, head_dim=16),
    "vit": vision(
        "ViTForImageClassification",
        "ViTConfig",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    ),
    "swin": vision(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=64,
        patch_size=4,
        embed_dim=32,
        depths=[1, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "convnext": vision(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        hidden_sizes=[16, 32],
        depths=[1, 2],
        num_stages=2,
        image_size=64,
    ),
    "resnet": vision(
        "ResNetForImageClassification",
        "ResNetConfig",
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[2, 2],
        layer_type="bottleneck",
        image_size=64,
    ),
    "mobilenet_v2": vision(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        image_size=64,
        depth_multiplier=0.35,
    ),
}


class PlainMLP(nn.Module):
    """Linear, batch norm, in-place activation: what people write by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(24, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
            nn.Linear(64, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Unusual(nn.Module):
    """Unusual blocks: a gated convolution, a squeeze-and-excite branch, einsum attention over channels, a weight
    used twice, and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(8, 32, 5, padding=2)
        self.gate = nn.Conv1d(32, 64, 3, padding=1, groups=4)
        self.squeeze = nn.Linear(32, 8)
        self.excite = nn.Linear(8, 32)
        self.shared = nn.Linear(32, 32)
        self.norm = nn.GroupNorm(4, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, signal: torch.Tensor) -> dict[str, torch.Tensor]:
        x = nn.functional.silu(self.stem(signal))
        x = x + nn.functional.glu(self.gate(x), dim=1)
        weight = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean(-1)))))
        x = self.norm(x * weight[..., None]).transpose(1, 2)
        y = self.shared(torch.tanh(self.shared(x)))
        attention = torch.einsum("bld,ble->bde", x, y).softmax(-1)
        mixed = torch.einsum("bld,bde->ble", x, attention)
        return {"logits": self.head(mixed.mean(1)), "features": mixed}


def plain_mlp() -> effc.Source:
    torch.manual_seed(0)
    return effc.Source(
        modules={"main": PlainMLP()},
        inputs={"main": {"x": torch.randn(4, 24)}},
        dims={"main": {"x": {0: "batch"}}},
    )


def unusual() -> effc.Source:
    torch.manual_seed(0)
    inputs = {"signal": torch.randn(4, 8, 50)}
    return effc.Source(
        modules={"main": Unusual()},
        inputs={"main": inputs},
        dims={"main": {"signal": {0: "batch", 2: "time"}}},
    )


FACTORIES = {"plain_mlp": plain_mlp, "unusual": unusual}


def awaken(model: nn.Module) -> nn.Module:
    """Weights that keep a signal alive: the stock initialisation of deep convolutions lets it die out at 1e-25."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def calibration(model: nn.Module | None, name: str, place: Path) -> Path:
    """Random inputs of the right shape, as an .npz."""
    rng = np.random.default_rng(0)
    if model is None:
        source = FACTORIES[name]()
        arrays = {
            n: rng.standard_normal((32, *t.shape[1:])).astype(np.float32)
            for n, t in source.inputs["main"].items()
        }
    elif getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = int(model.config.image_size)
        arrays = {"pixel_values": rng.standard_normal((16, 3, size, size)).astype(np.float32)}
    else:
        ids = rng.integers(3, TEXT["vocab_size"], (32, 48))
        arrays = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
    np.savez(place, **arrays)
    return place


def compile_one(name: str, root: Path) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    started = time.perf_counter()
    row: dict[str, Any] = {"name": name}
    try:
        if name in FACTORIES:
            model, where = None, f"{Path(__file__)}:{name}"
        else:
            model = awaken(MODELS[name]().eval())
            folder = root / name
            model.save_pretrained(folder)
            where = str(folder)
        data = calibration(model, name, root / f"{name}.npz")
        result = effc.compile(
            where, root / f"{name}.out", quantize="int8", calib=data, samples=16, bench=False
        )
    except Exception as error:  # whatever it is, the table goes on
        reason = error.what if isinstance(error, EffcError) else str(error)
        return {**row, "ok": False, "reason": f"{type(error).__name__}: {reason}"}
    entry = result.report["manifest"]["engines"][0]
    drift = next(iter(next(iter(result.report["verify"].values())).values()))
    return {
        **row,
        "ok": True,
        "int8_sites": entry["int8_sites"],
        "total_sites": entry["total_sites"],
        "rel_l2": max(d["rel_l2"] for d in drift.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "bytes": [result.report["source_bytes"], result.report["model_bytes"]],
        "float_sites": [f"{s['name']}: {s['reason']}" for s in entry["float_sites"]],
    }


def line(row: dict[str, Any]) -> str:
    if not row["ok"]:
        return f"{row['name']:16} FAIL  {row['reason']}"
    sites = f"{row['int8_sites']}/{row['total_sites']}"
    before, after = row["bytes"]
    size = f"{before / after:.1f}× smaller"
    return f"{row['name']:16} pass  {sites:>7} sites int8, drift {row['rel_l2']:.3f}, {size}, {row['seconds']} s"


def everything(options: argparse.Namespace) -> int:
    """Every type of transformers; 1 where an engine is wrong and nobody said so."""
    import every
    import tiny

    found = tiny.types()
    words = options.only or found
    how = f"{options.target}-{options.quantize}"
    state = options.state or Path(tempfile.gettempdir()) / f"effc-coverage-{how}"
    until = time.time() + 60 * options.minutes if options.minutes else None
    rows = every.run(state, words, options.target, options.quantize, until)
    print(every.summary(rows))
    if not options.only:
        content = {
            "name": "coverage-all", "rows": [every.small(row) for row in rows], "types": len(found),
            "target": options.target, "quantize": options.quantize,
            "revision": ", ".join(sorted({row["revision"] for row in rows})),
        }  # fmt: skip
        print(common.write(f"coverage-all-{how}-{common.features()}", content))
    return 1 if any(row["state"] == "differs" for row in rows) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="a model by name; may be given again")
    parser.add_argument("--smoke", action="store_true", help="three models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--all", action="store_true", help="every type of transformers")
    parser.add_argument("--state", type=Path, help="with --all, where finished types are kept")
    parser.add_argument("--minutes", type=float, help="with --all, for how long types are begun")
    parser.add_argument("--target", default="ort", help="with --all")
    parser.add_argument("--quantize", default="none", help="with --all")
    options = parser.parse_args()
    if options.all:
        return everything(options)
    names = options.only or (SMOKE if options.smoke else [*MODELS, *FACTORIES])
    rows = []
    with tempfile.TemporaryDirectory(prefix="effc-coverage-") as place:
        for name in names:
            rows.append(compile_one(name, Path(place)))
            print(line(rows[-1]), flush=True)
    passed = sum(row["ok"] for row in rows)
    print(f"{passed} of {len(rows)} architectures compile")
    if options.json:
        options.json.write_text(
            json.dumps({"rows": rows, "versions": versions()}, indent=1, sort_keys=True) + "\n"
        )
    if not (options.only or options.smoke):
        for row in rows:
            row.pop("seconds", None)
        print(common.write(f"coverage-{common.features()}", {"name": "coverage", "rows": rows}))
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
