"""Six bits for a vision transformer: NoisyQuant, what is left of its gain, and what gains more at the same cost.

    python examples/noisyquant/run.py [--smoke | --fast] [--json FILE] [--model DIR] [--pictures DIR] [--target TARGET]

The model is `$EFFC_DATA/vit-fashion-mnist`, the pictures are `$EFFC_DATA/fashion-mnist` (or `../shared/data` beside the
repository); `train.py` makes a model for those who have none. Pictures that calibrate are some of those that are
measured, without their labels. What is measured are engines; KL is from the float model's answers.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Json = dict[str, Any]
BITS, CALIBRATED, THREADS = 6, 128, 2
GRAPHED = 512
"""Pictures that the graph itself is run on."""
ROWS = 32
"""Of every layer, by which engine and graph are compared."""
BEST = {"range": "percentile", "clip": "range", "weight_range": "mse", "rounding": "gptq"}
ARMS: dict[str, list[Json]] = {
    "w6a6/clip search": [{"pass": "quantize"}],
    "w6a6/noise": [{"pass": "noisyquant", "mode": "paper"}],
    "w6a6/offsets": [{"pass": "noisyquant"}],
    "w6a6/effc": [{"pass": "level", "alike": True}, {"pass": "noisyquant", **BEST}],
}
BEST_ARM, PLAIN, SHIFTED = "w6a6/effc", "w6a6/clip search", "w6a6/offsets"


def data_root() -> Path | None:
    places = [os.environ.get("EFFC_DATA"), HERE.parents[2] / "shared" / "data"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


class Study:
    """One model, its pictures, and the arms that are measured on them."""

    def __init__(self, model: Path, pictures: Path, count: int, target: str) -> None:
        import numpy as np
        import torch

        from effc.backends import BACKENDS
        from effc.backends.dialect import DIALECTS
        from effc.calib import data
        from effc.calib.data import Batch
        from effc.compiler import trace_source
        from effc.source import load

        torch.set_num_threads(THREADS)
        self.source = load({"transformers": str(model)})
        records = list(data.read(pictures, labelled=True, samples=count))
        self.labels = np.array([record.label for record in records])
        pixels = [record.pixels for record in records]
        self.feeds = self.source.processor.images(pixels)["pixel_values"]
        (role,) = self.source.inputs
        (self.name,) = self.source.inputs[role]
        self.batches = [
            Batch(inputs={self.name: part})
            for part in np.split(self.feeds[:CALIBRATED], max(1, min(CALIBRATED, count) // 32))
        ]
        self.dialect = DIALECTS[target]
        options = {"openvino": {"precision": "f32"}}
        self.backend = BACKENDS[target](*_options(target, options.get(target)))
        self.float = self.cleaned(trace_source(self.source))
        self.wanted = self.answers(self.float)

    def cleaned(self, program: Any) -> Any:
        """The program as the exact passes of every compile leave it."""
        import effc
        from effc.passes import CANONICAL, PASSES

        for word in CANONICAL:
            effc.apply(PASSES[word](), program, dialect=self.dialect)
        return program

    def quantised(self, passes: list[Json], kind: str) -> tuple[Any, Json]:
        """The program behind passes, and what they decided."""
        import effc
        from effc.passes import PASSES

        program, decided = self.float.clone(), dict[str, Any]()
        for options in passes:
            given = {k: v for k, v in options.items() if k != "pass"}
            if kind == "smoke" and options["pass"] == "noisyquant":
                given["rows"] = 256
            pass_ = PASSES[options["pass"]](
                bits=BITS, activation_bits=BITS, select=effc.Select(op="linear"), **given
            )
            record = effc.apply(pass_, program, self.batches, dialect=self.dialect)
            decided |= record.decisions
        return program, decided

    def opened(self, program: Any, place: str) -> Any:
        return self.backend.open(self.backend.lower(program.only(), Path(place)), threads=THREADS)

    def answers(self, program: Any) -> Any:
        """Logits of an engine of the program."""
        import numpy as np

        parts = np.array_split(self.feeds, max(1, len(self.feeds) // 64))
        with (
            tempfile.TemporaryDirectory(prefix="effc-") as place,
            self.opened(program, place) as engine,
        ):
            return np.concatenate([engine({self.name: part})["logits"] for part in parts])

    def arm(self, program: Any) -> Json:
        """Accuracy, and KL from the float model with an interval from pictures drawn again."""
        import numpy as np
        from scipy.special import log_softmax

        found = self.answers(program)
        p, q = (log_softmax(side.astype(np.float64), -1) for side in (self.wanted, found))
        kl = (np.exp(p) * (p - q)).sum(-1)
        draw = np.random.default_rng(0)
        means = [kl[draw.integers(len(kl), size=len(kl))].mean() for _ in range(1000)]
        low, high = np.percentile(means, [2.5, 97.5])
        return {
            "accuracy": float((found.argmax(-1) == self.labels).mean()), "n": len(kl),
            "kl": float(kl.mean()), "kl_low": float(low), "kl_high": float(high),
        }  # fmt: skip

    def nodes(self, program: Any) -> int:
        """Nodes of the ONNX file of an engine."""
        import onnx

        with tempfile.TemporaryDirectory(prefix="effc-") as place:
            self.backend.lower(program.only(), Path(place))
            (file,) = Path(place).rglob("model.onnx")
            return sum(n.op_type != "Constant" for n in onnx.load(file).graph.node)

    def folds(self, decided: Json, dtype: Any) -> float:
        """The largest difference between offsets that norms and biases took up, and sums in their place, at the logits.

        In float64 it is what the folds do; in float32 it is rounding too, a place or two of logits this large.
        """
        import torch

        import effc
        from effc.ir.edit import refresh
        from effc.ir.select import site_names, value_key
        from effc.passes.noisyquant import NoisyQuant
        from effc.passes.shift import shift

        outputs = []
        for is_folded in (True, False):
            program = _in(self.float, dtype)
            graph = program.only()
            names = site_names(graph)
            pass_ = NoisyQuant(select=effc.Select(op="linear")).resolve(self.dialect)
            for place in pass_.places(graph):
                key = value_key(graph, names, place.value)
                offset = decided.get(f"{key}:offset")
                if place.owner is None or not offset:
                    continue
                at, values = (
                    place.owner if is_folded else None,
                    torch.tensor(offset, dtype=dtype),
                )
                made = shift(graph, key, place.value, values, at, place.layers[0])
                for layer in place.layers if made is not place.value else ():
                    layer.update_arg(0, made)
            refresh(graph)
            with torch.no_grad():
                feeds = {self.name: torch.from_numpy(self.feeds[:64]).to(dtype)}
                outputs.append(program.run(**feeds)["logits"])
        return float((outputs[0] - outputs[1]).abs().max())

    def steps_off(self, program: Any) -> float:
        """How far outputs of layers are from the graph's where both are fed the same codes, in steps of their sums."""
        import numpy as np
        import torch

        import effc
        from effc.calib.calibrator import collect
        from effc.calib.collectors import Rows
        from effc.calib.probe import Probe
        from effc.ir.edit import tensor_of
        from effc.ir.select import op_name
        from effc.quant.ops import DEQUANTIZE

        graph = program.only()
        layers = [
            n for n in graph.nodes if op_name(n) == "linear" and n.args[0].target is DEQUANTIZE
        ]
        probes = [
            Probe(key=str(i), node=n.args[0], collector=Rows(ROWS)) for i, n in enumerate(layers)
        ]
        seen = collect(graph, probes, self.batches[:1])
        rows = [seen[str(i)].rows for i in range(len(layers))]

        def constants(parts: Any) -> list[Any]:
            return [tensor_of(graph, a) if isinstance(a, torch.fx.Node) else a for a in parts]

        parts = [
            (constants(n.args[0].args[0].args[1:]), constants(n.args[1].args),
             tensor_of(graph, n.args[2]) if len(n.args) > 2 else None)
            for n in layers
        ]  # fmt: skip
        module = _sites()(parts)
        widest = max(row.shape[1] for row in rows)
        fed = torch.stack([torch.nn.functional.pad(r, (0, widest - r.shape[1])) for r in rows])
        made = effc.trace(module.eval(), {"x": fed}, dims={"x": {1: "rows"}})
        with torch.no_grad():
            wanted = [part.numpy() for part in module(fed)]
        with (
            tempfile.TemporaryDirectory(prefix="effc-") as place,
            self.opened(made, place) as engine,
        ):
            found = list(engine({"x": fed.numpy()}).values())
        most = 0.0
        for (grid, weight, _), mine, theirs in zip(parts, found, wanted, strict=True):
            step = float(grid[0]) * weight[1].numpy()
            most = max(most, float((np.abs(mine - theirs) / step).max()))
        return most

    def error_ratio(self, program: Any) -> float:
        """Distance of the engine's logits to the float model's ÷ that of the graph's, on some pictures."""
        import numpy as np
        import torch

        count = min(GRAPHED, len(self.feeds))
        with torch.no_grad():
            parts = torch.from_numpy(self.feeds[:count]).split(64)
            graphed = torch.cat([program.run(**{self.name: x})["logits"] for x in parts]).numpy()
        engine, wanted = self.answers(program)[:count], self.wanted[:count]
        return float(np.linalg.norm(engine - wanted) / np.linalg.norm(graphed - wanted))

    def latency(self, plain: Any, shifted: Any, seconds: float) -> Json:
        """Time of the engine with offsets ÷ that of the one without, 16 pictures at once."""
        from effc import bench, measure

        with tempfile.TemporaryDirectory(prefix="effc-") as place:
            made = {
                name: measure.opener(
                    self.backend.lower(program.only(), Path(place) / name), THREADS
                )
                for name, program in (("engine", shifted), ("plain", plain))
            }
            case = bench.Case(batch=16, length=None, feeds={self.name: self.feeds[:16]})
            (shape,) = bench.compare(made, [case], threads=THREADS, budget_s=seconds).shapes
            found = bench.ratio_of(shape.timings["engine"], shape.timings["plain"])
        return {"ratio": found.ratio, "low": found.low, "high": found.high}

    def theorem(self) -> list[Json]:
        """Mean error of activations under noise of half a step: what it is without, what is predicted, what it is."""
        import numpy as np

        import effc
        from effc.calib.calibrator import collect
        from effc.calib.collectors import Rows
        from effc.calib.probe import Probe
        from effc.ir.select import op_name, site_names, value_key
        from effc.passes.noisyquant import NoisyQuant, grid_of
        from effc.quant import noise

        graph = self.float.only()
        pass_ = NoisyQuant(bits=BITS, activation_bits=BITS, select=effc.Select(op="linear"))
        pass_ = pass_.resolve(self.dialect)
        places = pass_.places(graph)
        probes = [
            Probe(key=str(i), node=p.value, collector=Rows(512)) for i, p in enumerate(places)
        ]
        seen, names, found = collect(graph, probes, self.batches[:2]), site_names(graph), []
        for i, place in enumerate(places):
            x = seen[str(i)].rows
            grid = grid_of(2 * float(x.min()), 2 * float(x.max()), pass_._activation)
            half, amplitude = grid.scale / 2, grid.scale / 2
            far = noise.to_border(x, grid)
            drawn = [
                float(
                    noise.input_error(x, amplitude * noise.uniform(x.shape[1], seed), grid)
                    .abs()
                    .mean()
                )
                for seed in range(16)
            ]
            found.append({
                "site": value_key(graph, names, place.value), "behind": op_name(place.value),
                "without": float(noise.expected(far, 0.0, half).mean()),
                "predicted": float(noise.expected(far, amplitude, half).mean()),
                "measured": float(np.mean(drawn)), "spread": float(np.std(drawn) / np.sqrt(len(drawn))),
            })  # fmt: skip
        return found


def _in(program: Any, dtype: Any) -> Any:
    """A copy of the program that computes in `dtype`."""
    from effc.ir.edit import rebind

    made = program.clone()
    graph = made.only()
    for name, tensor in graph.tensors().items():
        if tensor.is_floating_point():
            rebind(graph, name, tensor.to(dtype), "widened")
    for node in graph.input_nodes().values():
        node.meta["val"] = node.meta["val"].to(dtype)
    return made


def _options(target: str, given: Json | None) -> list[Any]:
    from effc.backends.options import OPTIONS

    return [OPTIONS[target](**given)] if given else []


def _sites() -> Any:
    """Layers side by side, each on rows of its own, as a module."""
    import torch

    from effc.quant.ops import DEQUANTIZE, QUANTIZE

    class Sites(torch.nn.Module):
        def __init__(self, parts: list[Any]) -> None:
            super().__init__()
            self.rest: list[Any] = []
            for i, (grid, weight, bias) in enumerate(parts):
                named = {"scale": grid[0], "zero": grid[1], "codes": weight[0], "steps": weight[1],
                         "middle": weight[2], "bias": bias}  # fmt: skip
                for name, tensor in named.items():
                    self.register_buffer(f"{name}_{i}", tensor)
                self.rest.append((grid[2:4], weight[0].shape[1]))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outputs = []
            for i, ((low, high), width) in enumerate(self.rest):

                def own(name: str, i: int = i) -> torch.Tensor:
                    return getattr(self, f"{name}_{i}")  # type: ignore[no-any-return]

                codes = QUANTIZE(
                    x[i : i + 1, :, :width], own("scale"), own("zero"), low, high, 0, 0
                )
                value = DEQUANTIZE(codes, own("scale"), own("zero"), 0, 0)
                weight = DEQUANTIZE(own("codes"), own("steps"), own("middle"), 0, 0)
                outputs.append(torch.nn.functional.linear(value, weight, own("bias")))
            return tuple(outputs)

    return Sites


def run(study: Study, kind: str) -> Json:
    """All that is measured, `smoke` with few pictures and two arms."""
    import torch

    made = {
        arm: study.quantised(ARMS[arm], kind)
        for arm in ARMS
        if kind != "smoke" or arm in (PLAIN, BEST_ARM)
    }
    arms = {arm: study.arm(program) for arm, (program, _) in made.items()}
    for arm, found in arms.items():
        ends = f"[{found['kl_low']:.5f}, {found['kl_high']:.5f}]"
        print(f"{arm:18} accuracy {found['accuracy']:.4f}  KL {found['kl']:.5f} {ends}", flush=True)
    program, decided = made.get(SHIFTED, made[BEST_ARM])
    sums = sum("gelu" in k and k.endswith(":offset") and bool(v) for k, v in decided.items())
    theorem = study.theorem()
    for each in theorem:
        told = f"{each['predicted']:.5f} predicted, {each['measured']:.5f} measured"
        print(f"{each['site']:44} {each['without']:.5f} → {told}", flush=True)
    time_ratio = study.latency(made[PLAIN][0], program, 1.0 if kind == "smoke" else 15.0)
    return {
        "arms": arms, "float_accuracy": float((study.wanted.argmax(-1) == study.labels).mean()),
        "fold_max_abs": study.folds(decided, torch.float64), "gelu_sums": sums,
        "fold_max_abs_float32": study.folds(decided, torch.float32),
        "logits_max_abs": float(abs(study.wanted).max()),
        "extra_nodes": study.nodes(program) - study.nodes(made[PLAIN][0]) - sums,
        "engine_steps_off": study.steps_off(program),
        "engine_error_ratio": study.error_ratio(made[BEST_ARM][0]),
        "latency_ratio": time_ratio["ratio"], "latency_interval": [time_ratio["low"], time_ratio["high"]],
        "theorem": theorem,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Six bits for a vision transformer.")
    parser.add_argument("--smoke", action="store_true", help="few pictures, two arms")
    parser.add_argument(
        "--fast", action="store_true", help="what runs where nothing is said: minutes"
    )
    parser.add_argument("--model", type=Path, help="a transformers image classifier")
    parser.add_argument(
        "--pictures", type=Path, help="labelled pictures: idx files, or a folder for each class"
    )
    parser.add_argument("--target", choices=("openvino", "ort"))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured as JSON")
    given = parser.parse_args()
    data, started = data_root(), time.perf_counter()
    model = given.model or (data / "vit-fashion-mnist" if data else None)
    pictures = given.pictures or (data / "fashion-mnist" if data else None)
    if model is None or pictures is None or not model.is_dir() or not pictures.is_dir():
        why = "there is no model: make one with train.py, and name it with --model and --pictures"
        found: Json = {"example": "noisyquant", "skipped": why, "data": None}
        print(why)
    else:
        target = given.target or ("openvino" if importlib.util.find_spec("openvino") else "ort")
        kind = "smoke" if given.smoke else "full"
        study = Study(model, pictures, 128 if given.smoke else 10_000, target)
        found = {
            "example": "noisyquant", "kind": kind, "target": target, **run(study, kind),
            "data": {"name": pictures.name, "n": len(study.labels),
                     "sha256": hashlib.sha256(study.feeds.tobytes()).hexdigest()},
        }  # fmt: skip
    found["wall_s"] = round(time.perf_counter() - started, 1)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
