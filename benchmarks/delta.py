"""Weight deltas of MiniLM-L6 in int8, tuned on film reviews: bytes against what the tuning gained; and a large package.

    python benchmarks/delta.py [--state DIR] [--smoke]    # half an hour of a core; writes benchmarks/results/delta.json

The model that devices hold has a head that saw few sentences. From there the norms and the head are tuned, or all of
it for long and with ten stops on the way, or one small step is made; each is compiled with the first one's decisions,
so that calibration is frozen. Accuracy is that of the int8 engines, on SST-2's dev sentences, that nothing was trained
on; what a delta recovers is a share of what the whole new package gains, with a paired bootstrap over sentences.
`--state` keeps what was trained and compiled, and a training that was stopped goes on at its last stop.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from effc.delta import device, make, packet

sys.path.insert(0, str(common.ROOT / "tests"))

Json = dict[str, Any]
SEED = 0
LENGTH, SHORT = 64, 32
"""Tokens of a sentence that are read, and in tuning."""
BATCH = 16
HEAD_STEPS, HEAD_ROWS = 20, 320
STEPS, STOPS = 1000, tuple(range(100, 1001, 100))
"""Of the tuning of everything, 16,000 sentences with some seen again, and when it is looked at: targets of a chain."""
SMOKE = 0.01, (100, 1000)
"""Of all steps, and stops, where nothing is to come of it."""
NORM_STEPS = 60
SMALL = 1e-6
"""Learning rate of one small step, as in reinforcement learning."""
SHARES = (0.02, 0.06, 0.13)
"""Budgets, of the bytes of the engine's files."""
ROUND_SHARE = 0.02
FULL_SHARE = SHARES[-1]
"""What a tuning of everything has to come through with; a lossless delta of it must be larger, or it shows nothing."""
MOST = {"norms and head": 0.02, "a small step, lossless": 0.03}
LARGE = 32, 1792
"""Layers and width of the large package: 103 million weights in int8."""


def sentences(data: Path, name: str) -> tuple[list[str], np.ndarray[Any, Any]]:
    lines = (data / "sst2" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    texts, labels = zip(*(line.rsplit("\t", 1) for line in lines), strict=True)
    return list(texts), np.array(labels, np.int64)


def batches(texts: Sequence[str], labels: Any, tokens: Any, steps: int) -> Iterator[Any]:
    draw = np.random.default_rng(SEED)
    for _ in range(steps):
        rows = draw.choice(len(texts), BATCH, replace=False)
        chosen = [texts[r] for r in rows]
        fed = tokens(chosen, truncation=True, max_length=SHORT, padding=True, return_tensors="pt")
        yield dict(fed), torch.from_numpy(labels[rows])


def optimizer_of(model: nn.Module, words: Sequence[str] = ()) -> torch.optim.Optimizer:
    """For the parameters whose names have one of these words, all where there are none."""
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not words or any(word in name for word in words))
        chosen += [parameter] if parameter.requires_grad else []
    return torch.optim.AdamW(chosen, weight_decay=0.0)


def tuned(
    model: nn.Module, optimizer: torch.optim.Optimizer, given: Iterator[Any], *, lr: float, steps: int, begun: int = 0
) -> Iterator[int]:  # fmt: skip
    """Train from the step behind `begun` on; gives each step's number."""
    model.train()
    for step, (fed, labels) in enumerate(given, begun + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 10, (steps + 1 - step) / (steps / 2))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(**fed).logits, labels).backward()
        optimizer.step()
        yield step


NORMS = ("LayerNorm", "pooler", "classifier")


def full(stop: int) -> str:
    """The name of a model of which everything was tuned for so many steps."""
    return f"everything{stop}"


def checkpoints(
    state: Path, data: Path, scale: float = 1.0, stops: Sequence[int] = STOPS
) -> dict[str, Path]:
    """Directories of the models by name, trained where they are not there; everything up to the last stop."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(1)
    texts, labels = sentences(data, "train")
    tokens = AutoTokenizer.from_pretrained(common.minilm())
    names = ["base", "norms", "small", *map(full, stops)]
    found = {name: state / "models" / name for name in names}

    def loaded(place: Path) -> Any:
        torch.manual_seed(SEED)  # for each, whichever of them are there
        return AutoModelForSequenceClassification.from_pretrained(place, num_labels=2)

    def written(model: Any, name: str) -> None:
        part = found[name].with_name(f"{name}.part")
        model.save_pretrained(part)
        tokens.save_pretrained(part)
        shutil.rmtree(found[name], ignore_errors=True)  # of a process that ended right behind it
        os.replace(part, found[name])

    def scaled(steps: int) -> int:
        return max(1, int(steps * scale))

    def trained(
        start: Path, at: dict[int, str], rows: int, *, steps: int, lr: float, words: Sequence[str] = (),
        held: Path | None = None,
    ) -> None:  # fmt: skip
        """Write the model under a name at each of these steps; what is `held` from an earlier process goes on."""
        model, begun = loaded(start), 0
        optimizer = optimizer_of(model, words)
        if held is not None and held.exists():
            earlier = torch.load(held, weights_only=True)
            model.load_state_dict(earlier["model"])
            optimizer.load_state_dict(earlier["optimizer"])
            torch.set_rng_state(earlier["draw"])
            begun = earlier["step"]
        given = itertools.islice(
            batches(texts[:rows], labels[:rows], tokens, steps), begun, max(at)
        )
        began = time.process_time()
        for step in tuned(model, optimizer, given, lr=lr, steps=steps, begun=begun):
            if step == begun + 10:
                minutes = (max(at) - step) * (time.process_time() - began) / 600
                print(f"{max(at) - step} more steps, about {minutes:.1f} minutes of a core", flush=True)  # fmt: skip
            if step not in at:
                continue
            written(model, at[step])
            if held is not None:
                now = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                part = held.with_suffix(".part")
                torch.save({**now, "draw": torch.get_rng_state(), "step": step}, part)
                os.replace(part, held)

    if not found["base"].exists():
        steps = scaled(HEAD_STEPS)
        trained(common.minilm(), {steps: "base"}, HEAD_ROWS, steps=steps, lr=1e-3, words=NORMS[1:])
    if not found["norms"].exists():
        steps = scaled(NORM_STEPS)
        trained(found["base"], {steps: "norms"}, len(texts), steps=steps, lr=2e-3, words=NORMS)
    if not all(found[full(stop)].exists() for stop in stops):
        at = {scaled(stop): full(stop) for stop in stops}
        held = state / "training.pt"
        trained(found["base"], at, len(texts), steps=scaled(STEPS), lr=1e-4, held=held)
    if not found["small"].exists():
        model = loaded(found[full(stops[0])])
        given = batches(texts, labels, tokens, 1)
        for _ in tuned(model, optimizer_of(model), given, lr=SMALL * 10, steps=1):
            written(model, "small")  # the first of ten steps of warm-up, so a tenth of that rate
    return found


def packages(state: Path, data: Path, models: dict[str, Path]) -> dict[str, Path]:
    """Their packages, compiled where they are not there; the base a second time too."""
    calib = state / "calib.txt"
    calib.write_text("\n".join(sentences(data, "train")[0][:256]) + "\n", encoding="utf-8")
    found = {name: state / "packages" / name for name in ("base", "again", *models)}
    (state / "packages").mkdir(exist_ok=True)
    for name, out in found.items():
        if out.exists():
            continue
        words = [
            "compile",
            models.get(name, models["base"]),
            "-o",
            out,
            "--quantize",
            "int8",
            "--calib",
            calib,
        ]
        words += ["--no-bench", "--threads", "1"]
        words += [] if name == "base" else ["--decisions", found["base"] / "decisions.json"]
        common.run_cli(*words)
    return found


class Judge:
    """Which sentences an engine gets right."""

    def __init__(self, data: Path, model: Path, most: int | None) -> None:
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(model)
        texts, labels = sentences(data, "dev")
        texts, self.labels = texts[:most], labels[:most]
        order = np.argsort([len(t) for t in texts], kind="stable")
        self.rows = [order[i : i + 16] for i in range(0, len(order), 16)]
        how = {"truncation": True, "max_length": LENGTH, "padding": True, "return_tensors": "np"}
        self.fed = [dict(tokens([texts[r] for r in rows], **how)) for rows in self.rows]

    def __call__(self, root: Path) -> np.ndarray[Any, Any]:
        engine = device.manifest_of(root)["engines"][0]
        run = device.session(root, engine)
        names = [port["name"] for port in engine["inputs"]]
        right = np.zeros(len(self.labels), bool)
        for rows, fed in zip(self.rows, self.fed, strict=True):
            logits = run({n: fed[n].astype(np.int64) for n in names})["logits"]
            right[rows] = logits.argmax(-1) == self.labels[rows]
        return right


def recovered(old: Any, new: Any, got: Any) -> Json:
    """The share of the gain from old to new that `got` has, with a 95 % interval: a paired bootstrap over sentences."""
    draw = np.random.default_rng(SEED)
    rows = draw.integers(0, len(old), (2000, len(old)))
    sums = [right[rows].sum(axis=1).astype(float) for right in (old, new, got)]
    shares = (sums[2] - sums[0]) / np.maximum(sums[1] - sums[0], 1.0)
    gain = float(new.mean() - old.mean())
    low, high = np.quantile(shares, [0.025, 0.975])
    share = float(got.mean() - old.mean()) / gain if gain > 0 else float("nan")
    return {"accuracy": float(got.mean()), "gain": share, "low": float(low), "high": float(high)}


def row(made: make.Made, seconds: float) -> Json:
    return {k: made.numbers[k] for k in ("bytes", "share", "error", "tensors", "encodings")} | {
        "make_s": round(seconds, 1)
    }


def timed(old: Path, new: Path, key: Path, counter: int = 1, **how: Any) -> tuple[make.Made, float]:
    started = time.perf_counter()
    made = make.make(old, new, key=key, counter=counter, **how)
    return made, time.perf_counter() - started


def kept(state: Path, name: str, measure: Callable[[], Any]) -> Any:
    """What was measured before, or now."""
    file = state / f"{name}.json"
    if not file.exists():
        file.write_text(json.dumps(measure()), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def weight_bytes(root: Path) -> int:
    return sum(p.stat().st_size for p in root.rglob("model.onnx*"))


def arms(place: Path, out: dict[str, Path], judge: Judge, key: Path, stops: Sequence[int]) -> Json:
    """Every arm and budget: bytes of the signed file, and what of the gain it brings; and bytes by steps of tuning."""
    first, last = full(stops[0]), full(stops[-1])
    right = {name: judge(out[name]) for name in ("base", "norms", *map(full, stops))}
    size = weight_bytes(out["base"])
    found: list[Json] = []
    targets = (
        ("norms and head", "norms", (0.02,)), (f"everything, {stops[0]} steps", first, SHARES),
        ("everything", last, SHARES),
    )  # fmt: skip
    for arm, name, shares in targets:
        for share in (*shares, None):
            mirror = place / "mirror"
            shutil.rmtree(mirror, ignore_errors=True)
            budget = int(share * size) if share else None
            made, seconds = timed(out["base"], out[name], key, budget=budget, mirror=mirror)
            model = "model.onnx"  # where it is the new one to the byte, so are its answers
            is_new = (mirror / model).read_bytes() == (out[name] / model).read_bytes()
            got = right[name] if is_new else judge(mirror)
            told = recovered(right["base"], right[name], got)
            found.append({"arm": arm, "budget": share, **row(made, seconds), **told})
            print(found[-1], flush=True)
    made, seconds = timed(out[first], out["small"], key)
    found.append({"arm": "a small step, lossless", "budget": None, **row(made, seconds)})
    made, seconds = timed(out["base"], out["again"], key)
    found.append({"arm": "the same weights again", "budget": None, **row(made, seconds)})
    by_steps, before = [], "base"
    for stop in stops:
        sizes = [len(timed(out[old], out[full(stop)], key)[0].content) for old in ("base", before)]
        accuracy = float(right[full(stop)].mean())
        told = dict(zip(("bytes", "bytes_from_last"), sizes, strict=True))
        by_steps.append({"steps": stop, **told, "accuracy": accuracy})
        before = full(stop)
    return {
        "arms": found, "by_steps": by_steps,
        "accuracy": {name: float(each.mean()) for name, each in right.items()},
    }  # fmt: skip


def files(root: Path) -> dict[str, str]:
    named = [p for p in root.rglob("*") if p.is_file()]
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in named}  # fmt: skip


def chain(
    place: Path, out: dict[str, Path], judge: Judge, key: Path, word: str, stops: Sequence[int]
) -> list[Json]:
    """A round to each stop of the tuning, in a closed loop, on a device; is it what its maker thinks?"""
    store, held = place / "store", out["base"]
    device.init(store, held, [word])
    found = []
    budget = int(ROUND_SHARE * weight_bytes(held))
    for number, stop in enumerate(stops, 1):
        target = out[full(stop)]
        mirror = place / f"mirror{number}"
        made, seconds = timed(held, target, key, number, budget=budget, mirror=mirror)
        (place / "up.effd").write_bytes(made.content)
        started = time.perf_counter()
        device.apply(store, place / "up.effd")
        apply_s = time.perf_counter() - started
        device.confirm(store)
        serving, _ = device.start(store)
        run, twin = (
            device.session(r, device.manifest_of(r)["engines"][0]) for r in (serving, mirror)
        )
        fed = {n: v.astype(np.int64) for n, v in judge.fed[0].items()}
        names = [p["name"] for p in device.manifest_of(serving)["engines"][0]["inputs"]]
        given = {n: fed[n] for n in names}
        same = all(
            np.array_equal(a, b)
            for a, b in zip(run(given).values(), twin(given).values(), strict=True)
        )
        found.append(
            {"round": number, "steps": stop, **row(made, seconds), "apply_s": round(apply_s, 2),
             "files_equal": files(serving) == files(mirror), "answers_equal": same}
        )  # fmt: skip
        print(found[-1], flush=True)
        held = mirror
    return found


def there_and_back(place: Path, out: dict[str, Path], key: Path, word: str) -> bool:
    store, new = place / "back", out[full(STOPS[-1])]
    device.init(store, out["base"], [word])
    first = files(store / "slots" / "a")
    for number, (a, b) in enumerate(((out["base"], new), (new, out["base"])), 1):
        made, _ = timed(a, b, key, number)
        (place / "up.effd").write_bytes(made.content)
        device.apply(store, place / "up.effd")
        device.confirm(store)
    return files(store / "slots" / "a") == first


def large_model(layers: int, width: int, seed: int) -> onnx.ModelProto:
    """Linear layers in int8 codes with a scale for each row; with another seed one code in fifty is another one."""
    draw, move = np.random.default_rng(0), np.random.default_rng(seed)
    tensors, nodes, name = [], [], "x"
    for at in range(layers):
        codes = draw.integers(-127, 128, (width, width)).astype(np.int8)
        if seed:
            moved = move.random(codes.shape) < 0.02
            codes = np.clip(codes + moved * move.choice([-1, 1], codes.shape), -127, 127)
        scale = np.full(width, 1 / (74 * np.sqrt(width)), "f4")
        made = {f"codes{at}": codes.astype(np.int8), f"scale{at}": scale}
        tensors += [numpy_helper.from_array(v, n) for n, v in made.items()]
        nodes += [
            helper.make_node("DequantizeLinear", [f"codes{at}", f"scale{at}"], [f"w{at}"], axis=0),
            helper.make_node("Gemm", [name, f"w{at}"], [f"a{at}"], transB=1),
        ]
        name = f"a{at}"
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", width]) for n in ("x", name)]  # fmt: skip
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def large(place: Path, key: Path, word: str, layers: int, width: int) -> Json:
    """Seconds and room that a device needs for a package of a hundred million weights."""
    from packages import write_model

    roots = []
    for seed in (0, 1):
        model = large_model(layers, width, seed)
        ports = [("x", width), (f"a{layers - 1}", width)]
        roots.append(write_model(place / f"large{seed}", model, ports))
        del model
    made, seconds = timed(*roots, key)
    (place / "large.effd").write_bytes(made.content)
    size = sum(p.stat().st_size for p in roots[0].rglob("*"))
    store = place / "large-store"
    device.init(store, roots[0], [word])
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], used(store))

    thread = threading.Thread(target=watch)
    thread.start()
    started, busy = time.perf_counter(), time.process_time()
    device.apply(store, place / "large.effd")
    apply_s, busy = time.perf_counter() - started, time.process_time() - busy
    over.set()
    thread.join()
    most[0] = max(most[0], used(store))
    return {
        "weights": layers * width * width, "package_bytes": size, **row(made, seconds),
        "apply_s": round(apply_s, 2), "apply_cpu_s": round(busy, 2), "load": os.getloadavg()[0],
        "most_bytes": most[0], "times_package": most[0] / size,
    }  # fmt: skip


def used(store: Path) -> int:
    total = 0
    for folder, _, names in os.walk(store):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # it is being exchanged
                continue
    return total


def bounds(found: Json) -> dict[str, bool]:
    """What must hold, in words."""
    rows = {(r["arm"], r["budget"]): r for r in found["arms"]}
    held = {
        f"{arm}: at most {most:.0%} of the engine's bytes": min(r["bytes"] for r in found["arms"] if r["arm"] == arm)
        <= most * found["full_bytes"]
        for arm, most in MOST.items()
    }  # fmt: skip
    held["norms and head: 95 % of the gain in 2 %"] = rows["norms and head", 0.02]["gain"] >= 0.95
    held["everything: 95 % of the gain in 13 %"] = rows["everything", FULL_SHARE]["gain"] >= 0.95
    whole = rows["everything", None]["bytes"]
    held["everything: all of it takes more than that, so that something is left out"] = (
        whole > FULL_SHARE * found["full_bytes"] and rows["everything", FULL_SHARE]["error"] > 0
    )
    again = rows["the same weights again", None]
    held["the same weights make an empty delta"] = again["tensors"] == 0
    equal = all(r["files_equal"] and r["answers_equal"] for r in found["chain"])
    held["a device is what its maker thinks, ten rounds on"] = equal and len(
        {r["steps"] for r in found["chain"]}
    ) == len(STOPS)
    held["there and back is the same to the byte"] = found["there_and_back"]
    large = found["large"]
    held["a large delta is taken in at most 10 s"] = large["apply_s"] <= 10
    held["it takes at most twice the package"] = large["times_package"] <= 2.001
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", help="where trained models and packages are kept")
    parser.add_argument("--smoke", action="store_true", help="few steps and sentences, no result")
    args = parser.parse_args()
    data = common.data_root()
    if data is None:
        print("skipped: EFFC_DATA has no sst2")
        return 0
    with tempfile.TemporaryDirectory(prefix="effc-delta-") as scratch:
        place, state = Path(scratch), Path(args.state or scratch)
        state.mkdir(parents=True, exist_ok=True)
        scale, stops = SMOKE if args.smoke else (1.0, STOPS)
        models = checkpoints(state, data, scale, stops)
        out = packages(state, data, models)
        word = packet.keygen(place / "key", place / "key.pub")
        judge = Judge(data, models["base"], 64 if args.smoke else None)
        key, shape = place / "key", (4, 256) if args.smoke else LARGE
        found = {
            "name": "delta", "full_bytes": weight_bytes(out["base"]), "sentences": len(judge.labels),
            "steps": {"head": HEAD_STEPS, "norms": NORM_STEPS, "everything": STEPS, "batch": BATCH},
            "large": kept(state, "large", lambda: large(place, key, word, *shape)),
            "there_and_back": kept(state, "back", lambda: there_and_back(place, out, key, word)),
            **kept(state, "arms", lambda: arms(place, out, judge, key, stops)),
            "chain": kept(state, "chain", lambda: chain(place, out, judge, key, word, stops)),
        }  # fmt: skip
    missed = [text for text, held in bounds(found).items() if not held]
    if not args.smoke:
        print(common.write("delta", found))
    for text in missed:
        print(f"MISSED: {text}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
