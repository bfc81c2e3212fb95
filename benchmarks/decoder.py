"""A small language model beside what else runs one on this processor: reading 128 tokens, and writing one more.

    pip install nncf==3.4.0 onnxruntime-genai==0.18.0     # peers, and no part of effc
    python benchmarks/decoder.py MODEL.gguf TEXT.txt      # 25 minutes; writes results/decoder-FEATURES.json

MODEL is a GGUF file or a directory of a causal language model, TEXT what it is calibrated on. effc's package has two
engines of the one model: `prefill`, 8 bit on both sides of a product, reads, and `decode`, 4-bit weights, writes.
Beside them: the plain float export on ONNX Runtime, which gives the logits of every position, as it does for everybody;
NNCF's int4 on OpenVINO, which gives those of the last as effc's does; the int4 that the model builder of
onnxruntime-genai writes; effc's 4-bit weights on OpenVINO, which holds the cache or has it as ports; and each of effc's
engines at what the other is for. All take turns in shuffled blocks on two threads; a ratio is peer ÷ effc's engine with
its 99 % interval.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnxruntime

from effc import bench, causal, measure, package
from effc.backends.base import EngineBase
from effc.backends.openvino_engine import OpenVinoEngine, opened
from effc.backends.ort_engine import OrtEngine, session_options
from effc.compiler import trace_source
from effc.engine import lowered as lowered_of
from effc.machine import installed
from effc.recipe import CalibSpec
from effc.samples import Samples
from effc.source import guess, load

THREADS = 2
DISTRIBUTION = {"NNCF int4 on OpenVINO": "nncf", "onnxruntime-genai int4": "onnxruntime-genai"}
PAST, PROMPT = 128, 128
Json = dict[str, Any]
Arrays = Mapping[str, Any]


def recipe(source: Json, text: Path, held: Path | None) -> Json:
    """Reads in 8 bit, with a scale per token where a gate and a value are multiplied; writes with 4-bit weights."""
    down = "*down_proj"
    prefill = [
        {"pass": "fuse-projections", "select": {"module": "*attn*"}},
        {"pass": "smooth"},
        {"pass": "quantize", "activation_scale": "token", "select": {"module": down}},
        {"pass": "quantize", "select": {"exclude": down}},
    ]
    decode = [
        {"pass": "fuse-projections"},
        {
            "pass": "quantize",
            "bits": 4,
            "activation_bits": 16,
            "group": 32,
            "weight_range": "mse",
            "table_bits": 4,
        },
    ]
    roles = ((causal.PREFILL, prefill), (causal.DECODE, decode))
    return {
        "source": {**source, "roles": list(causal.ROLES)},
        "calib": {"file": str(text), "samples": 32, "max_length": 256},
        "passes": [{**pass_, "graphs": [role]} for role, passes in roles for pass_ in passes],
        "targets": ["ort"], "gate": False, "bench": False,
        **({"metric": {"perplexity": str(held)}} if held else {}),
    }  # fmt: skip


class Adapted(EngineBase):
    """An engine that is fed what it takes of the inputs, `instead` in the place of some."""

    def __init__(self, engine: Any, instead: Arrays | None = None) -> None:
        self.engine, self.instead = engine, dict(instead or {})
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def __call__(self, feeds: Arrays) -> dict[str, Any]:
        given = {**feeds, **self.instead}
        found: dict[str, Any] = self.engine({p.name: given[p.name] for p in self.inputs})
        return found

    def ready(self, feeds: Arrays) -> Arrays:
        given: Arrays = self.engine.ready({**feeds, **self.instead})
        return given

    def close(self) -> None:
        self.engine.close()


def nncf_int4(plain: Path, out: Path) -> None:
    """NNCF's int4 weights in groups of 64, the widest that divide this model's rows, for OpenVINO."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(plain))
    made = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64)
    openvino.save_model(made, str(out), compress_to_fp16=False)


def genai_int4(spec: Json, out: Path) -> None:
    """The int4 model that onnxruntime-genai's builder writes for the processor."""
    model = directory(spec, out.parent / "float")
    words = ["-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    words += ["-m", str(model), "-o", str(out), "-c", str(out / "cache")]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)


def directory(spec: Json, place: Path) -> Path:
    """The model as a directory of float weights, for tools that read no GGUF."""
    if "transformers" in spec:
        return Path(spec["transformers"])
    import torch
    import transformers

    file = Path(spec["gguf"])
    words = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**words, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(place)
    transformers.AutoTokenizer.from_pretrained(**words).save_pretrained(place)
    return place


def profile(path: Path, feeds: Arrays, runs: int = 20) -> Json:
    """Milliseconds of a run by operator, and how many nodes there are, as ONNX Runtime tells."""
    with tempfile.TemporaryDirectory() as place:
        options = session_options(THREADS)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(place) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        given = {i.name: feeds[i.name] for i in session.get_inputs()}
        for _ in range(runs):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent, count = Counter[str](), Counter[str]()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
            count[event["args"]["op_name"]] += 1
    return {
        "nodes": sum(count.values()) // runs,
        "ms": {op: round(us / runs / 1e3, 3) for op, us in spent.most_common(12)},
        "count": {op: count[op] // runs for op, _ in spent.most_common(12)},
    }


def main() -> int:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    asked.add_argument("model")
    asked.add_argument("text", type=Path)
    asked.add_argument("--held", type=Path, help="a text of several documents, for perplexity")
    asked.add_argument("--budget", type=float, default=90.0, help="seconds a comparison")
    asked.add_argument("--keep", type=Path, help="a directory for what is built, taken up again")
    given = asked.parse_args()
    with contextlib.ExitStack() as stack:
        place = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        print(common.write(f"decoder-{common.features()}", run(given, place)))
    return 0


def run(given: argparse.Namespace, place: Path) -> Json:
    spec: Json = guess(given.model)
    out, took = place / "out", None
    if not (out / "manifest.json").exists():
        (place / "recipe.yaml").write_text(
            json.dumps(recipe(spec, given.text.resolve(), given.held and given.held.resolve()))
        )
        seconds, peak = common.run_cli("compile", place / "recipe.yaml", "-o", out)
        took = {"seconds": round(seconds, 1), "peak_mb": round(peak)}
    manifest = package.read(out)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    told = (report, *report["others"].values())
    quality = {e.role: of["metric"] for e, of in zip(manifest.engines, told, strict=True)}
    mine = {entry.role: lowered_of(out, entry).path for entry in manifest.engines}
    source = load(spec)
    samples = Samples(source, CalibSpec(file=str(given.text), samples=32))
    plain = place / "plain" / "model.onnx"
    if not plain.exists():
        measure.plain_export(trace_source(source).only(), plain.parent, "ort")
    peers: dict[str, Callable[[], Any]] = {"plain": lambda: OrtEngine(plain, threads=THREADS)}
    versions, left_out = {}, {}
    for name, make, file, opener in (
        ("NNCF int4 on OpenVINO", lambda to: nncf_int4(plain, to), "nncf/model.xml", _openvino),
        ("onnxruntime-genai int4", lambda to: genai_int4(spec, to.parent), "genai/model.onnx", _ort),
    ):  # fmt: skip
        target = place / file
        try:
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                make(target)
            versions[name] = installed(DISTRIBUTION[name])
        except (ImportError, subprocess.CalledProcessError) as error:
            left_out[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        peers[name] = opener(target)
    peers |= on_openvino(spec, place / "openvino")
    found = {}
    for word, role, length, past in (
        ("prefill", causal.PREFILL, PROMPT, 0), ("decode", causal.DECODE, 1, PAST),
    ):  # fmt: skip
        feeds = samples.shaped(1, length, past)
        last = {causal.KEEP: np.array([length - 1])}
        (other,) = set(causal.ROLES) - {role}
        engines: dict[str, Callable[[], Any]] = {
            "engine": lambda role=role, last=last: Adapted(OrtEngine(mine[role], threads=THREADS), last),
            f"effc {other}": lambda other=other, last=last: Adapted(OrtEngine(mine[other], threads=THREADS), last),
            "plain, last position": lambda last=last: Adapted(peers["plain"](), last),
            **{
                name: lambda name=name, last=last: Adapted(
                    peers[name](), last if "OpenVINO" in name else None
                )
                for name in peers
            },
        }  # fmt: skip
        case = bench.Case(batch=1, length=length, feeds=feeds)
        timed = bench.compare(
            engines, [case], threads=THREADS, budget_s=given.budget, references=("plain",)
        ).to_json()
        found[word] = {
            **timed["shapes"][0],
            "profile": {
                "plain": profile(plain, feeds), "effc": profile(mine[role], {**feeds, **last}),
            },
        }  # fmt: skip
    return {
        "name": "decoder", "model": source.name, "threads": THREADS, "past": PAST,
        "prompt": PROMPT, "cases": found, "quality": quality, "compile": took, "left_out": left_out,
        "peer_versions": versions, "model_bytes": {
            "plain": plain.stat().st_size + _size(plain.with_name("model.onnx.data")),
            **{role: path.stat().st_size for role, path in mine.items()},
        },
    }  # fmt: skip


def on_openvino(spec: Json, out: Path) -> dict[str, Callable[[], Any]]:
    """effc's 4-bit weights on OpenVINO, with either way to keep the cache."""
    if not (out / "manifest.json").exists():
        quantize = {
            "pass": "quantize",
            "bits": 4,
            "activation_bits": 16,
            "group": 32,
            "weight_range": "mse",
        }
        made = {
            "source": spec, "passes": [quantize], "targets": ["openvino"], "gate": False, "bench": False,
        }  # fmt: skip
        out.with_suffix(".yaml").write_text(json.dumps(made))
        common.run_cli("compile", out.with_suffix(".yaml"), "-o", out)
    (entry,) = package.read(out).engines
    low = lowered_of(out, entry)
    held = dataclasses.replace(low, options={**low.options, "cache": low.options["precision"]})
    return {
        "effc on OpenVINO, cache held": lambda: opened(held, threads=THREADS),
        "effc on OpenVINO, ports": lambda: Viewed(low.path, low.options, threads=THREADS),
    }


class Viewed(OpenVinoEngine):
    """An engine whose outputs are seen where they lie: this one is timed, not read."""

    def __call__(self, feeds: Arrays) -> dict[str, Any]:
        found = self._request.infer(dict(feeds), share_inputs=True, share_outputs=True)
        return {p.name: found[place] for place, p in enumerate(self.outputs)}


def _openvino(path: Path) -> Callable[[], Any]:
    return lambda: Viewed(path, threads=THREADS)


def _ort(path: Path) -> Callable[[], Any]:
    return lambda: OrtEngine(path, threads=THREADS)


def _size(path: Path) -> int:
    return os.path.getsize(path) if path.exists() else 0


if __name__ == "__main__":
    raise SystemExit(main())
