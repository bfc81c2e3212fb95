"""The whole way as one short function: load, trace, rewrite, lower, verify, time, gate, package.

Nothing here knows a pass, a target or a paper by name; tables do.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from effc import (
    alike,
    cache,
    checkpoint,
    correction,
    diffusion,
    gate,
    intuition,
    many,
    measure,
    metrics,
    package,
    report,
    search,
)
from effc.backends import BACKENDS
from effc.backends.base import Lowered, Port
from effc.build import Builder, Built, revocable, versions
from effc.cache import Cache
from effc.causal import ROLES
from effc.errors import GateRefused, LoweringError, RecipeError, TuneError, UsageError
from effc.ir.edit import keep_outputs
from effc.ir.program import Graph, Program
from effc.ir.show import graph_digest, tensors_digest
from effc.ir.trace import refuse_chance, trace
from effc.passes.base import Model, Pass
from effc.progress import Progress
from effc.recipe import PLACES, QUANTIZE_WORDS, Recipe, build, passes_of, read, without_bench
from effc.room import within
from effc.samples import Samples
from effc.sampling import predicted
from effc.schedule import sampler
from effc.search import Found
from effc.source import Source, check_settings, guess, is_of_shapes, load
from effc.table import unknown
from effc.trajectories import at_a_time
from effc.trial import Lab, model_bytes

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a compile made: the package and everything that was measured on the way."""

    out: Path
    report: Json

    @property
    def bench(self) -> Json:
        return dict(self.report["bench"] or {})

    def text(self) -> str:
        return report.text(self.report)


def compile(
    model: str | Path | Recipe,
    out: str | Path,
    *,
    target: str | Sequence[str] = "ort",
    quantize: str = "none",
    kv_cache: str = "float32",
    ratio: float | None = None,
    latency_budget: float | None = None,
    align: int | str | None = None,
    calib: str | Path | None = None,
    metric: str | None = None,
    samples: int = 128,
    tokenizer: str | Path | None = None,
    bench: bool = True,
    threads: int | None = None,
    decisions: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    allow_worse: bool = False,
    time_budget_s: float | None = None,
    max_ram_bytes: int | None = None,
) -> Result:
    """Compile a model, or a recipe, into the directory `out`.

    `model` is a transformers directory, `module:factory`, an ONNX file, a `Recipe` or the path of one; for all but the
    last two the other options build a recipe. `tokenizer` is the directory of what makes inputs for an ONNX file.
    `decisions` replays the recorded ranges of an earlier compile. `time_budget_s` bounds the
    search for what to take back where the gate is not met; `allow_worse` writes an engine that does not meet it;
    `max_ram_bytes` is what calibration and verification stay within.
    Raises an `EffcError`, and then `out` is what it was before.
    """
    replayed = decisions is not None
    if isinstance(model, Recipe) or str(model).endswith((".yaml", ".yml")):
        prunes = (ratio, latency_budget, align) != (None, None, None)
        flags = quantize != "none" or kv_cache != "float32" or prunes
        if flags or calib is not None or metric is not None:
            raise UsageError(
                "a recipe says itself what to do; quantize, calib, metric and their like do not go with it",
                hint="write them into the recipe",
            )
        recipe = model if isinstance(model, Recipe) else read(Path(model), replayed=replayed)
    else:
        data = from_flags(
            str(model),
            target=target,
            quantize=quantize,
            kv_cache=kv_cache,
            ratio=ratio,
            latency_budget=latency_budget,
            align=align,
            calib=calib,
            metric=metric,
            samples=samples,
            tokenizer=tokenizer,
        )
        recipe = build(data, replayed=replayed)
    if not bench:
        recipe = without_bench(recipe)
    return run(
        recipe, Path(out), threads=threads, decisions=decisions, progress=progress,
        allow_worse=allow_worse, time_budget_s=time_budget_s, max_ram_bytes=max_ram_bytes,
    )  # fmt: skip


KV_CACHES = ("float32", "int8")


def from_flags(
    model: str,
    *,
    target: str | Sequence[str] = "ort",
    quantize: str = "none",
    kv_cache: str = "float32",
    ratio: float | None = None,
    latency_budget: float | None = None,
    align: int | str | None = None,
    calib: str | Path | None = None,
    metric: str | None = None,
    samples: int = 128,
    tokenizer: str | Path | None = None,
) -> Json:
    """The plain values of the recipe that command line flags stand for."""
    words = _words(quantize)
    if kv_cache not in KV_CACHES:
        raise UsageError(unknown("--kv-cache word", kv_cache, KV_CACHES))
    data: Json = {
        "source": guess(model),
        "targets": [target] if isinstance(target, str) else list(target),
    }
    if tokenizer is not None:
        data["source"]["tokenizer"] = str(tokenizer)
    if len(words) > 1:
        data["source"]["roles"] = list(words)
    if calib is not None:
        data["calib"] = {"file": str(calib), "samples": samples}
    passes: list[Any] = []
    passes += _pruning(ratio, latency_budget, align, has_data=calib is not None)
    if kv_cache == "int8":
        passes.append("quantize-cache")
    for role, word in words.items():
        of = passes_of(word, data["targets"], checks=calib is not None)
        passes += [_on(pass_, role) for pass_ in of] if len(words) > 1 else of
    if passes:
        data["passes"] = passes
    if metric is not None:
        data["metric"] = metric
    return data


def _pruning(
    ratio: float | None, latency_budget: float | None, align: int | str | None, *, has_data: bool
) -> list[Json]:
    """The pass that flags of pruning stand for, if any. Raises UsageError where they go against each other."""
    if ratio is None and latency_budget is None:
        if align is not None:
            raise UsageError(
                "--align rounds what pruning leaves, and nothing is pruned",
                hint="--ratio 0.25 --align auto, or --latency-budget 0.7",
            )
        return []
    if ratio is not None and latency_budget is not None:
        raise UsageError(
            "--ratio and --latency-budget both say how much is pruned", hint="leave one of them out"
        )
    multiple = int(str(align)) if str(align).isdecimal() else 0
    if align not in (None, "auto") and multiple < 1:
        raise UsageError(f"--align {align} is neither a number nor auto", hint="--align 8")
    made: Json = {
        "ratio": ratio, "latency_budget": latency_budget, "align": multiple or align,
        "importance": "taylor" if has_data else "magnitude",
    }  # fmt: skip
    return [{"pass": "prune-dims", **{k: v for k, v in made.items() if v is not None}}]


def _words(quantize: str) -> dict[str, str]:
    """The word of every role: of `main` where it is one word, of both of a language model in `prefill=…,decode=…`.

    Raises UsageError for anything else.
    """
    pairs = [part.partition("=") for part in quantize.split(",")]
    found = {role: word for role, _, word in pairs} if "=" in quantize else {"main": quantize}
    for word in found.values():
        if word not in QUANTIZE_WORDS:
            raise UsageError(unknown("--quantize word", word, QUANTIZE_WORDS))
    if found.keys() != {"main"} and (set(found) != set(ROLES) or len(pairs) != len(ROLES)):
        raise UsageError(
            f"--quantize {quantize} names other graphs than prefill and decode",
            hint="--quantize prefill=w8a8,decode=w4a16",
        )
    return found if "main" in found else {role: found[role] for role in ROLES}


def _on(pass_: str | Json, role: str) -> Json:
    named = {"pass": pass_} if isinstance(pass_, str) else pass_
    return {**named, "graphs": [role]}


def run(
    recipe: Recipe,
    out: Path,
    *,
    threads: int | None = None,
    decisions: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    kept: Cache | None = None,
    allow_worse: bool = False,
    time_budget_s: float | None = None,
    max_ram_bytes: int | None = None,
    tuned: Path | None = None,
) -> Result:
    """Compile a recipe into `out`; see `compile`. `threads` goes before what the recipe's bench says.

    `tuned` is a checkpoint of `tune`, whose tensors are taken in the place of training. `kept` is the cache of finished
    work, the user's own where None. Raises GateRefused where the best that was found does not meet the recipe's gate,
    unless `allow_worse`. `max_ram_bytes` is what calibration and verification stay within: they take fewer rows at a
    time where all would need more.
    """
    progress = progress or Progress()
    out = Path(os.path.abspath(out))
    recipe, tuned = settled(recipe, tuned)
    threads = recipe.threads(threads)
    package.check_output(out)
    metric = metrics.parse(recipe.metric) if recipe.metric else None
    source, original = opened(recipe, progress)
    metric = metric or source.metric
    if metric is not None:
        for role in source.main:
            metric.check(source.only(role))
    kept = kept or cache.default()
    kept.sweep()
    builders = builders_of(
        recipe, source, original, progress, kept, decisions=decisions, max_ram_bytes=max_ram_bytes,
        trained=checkpoint.read(tuned, source, recipe.passes) if tuned is not None else None,
        threads=threads,
    )  # fmt: skip
    labs: dict[str, Lab] = {}
    with package.staged(out) as stage:
        for role, builder in builders.items():
            work = package.engine_dir(stage.work, role, "", builder.roles, ())
            work.mkdir(exist_ok=True)
            labs[role] = Lab(
                builder=builder, work=work, threads=threads,
                metric=metric if role in source.main else None,
                spec=recipe.gate if role in source.main else None,
            )  # fmt: skip
        made: list[_Made] = []
        for target in recipe.targets:
            for role in (*source.beside, *source.main):  # what a model is told, before its metric
                lab = labs[role]
                spent = sum(of.found.seconds for of in made)
                left = time_budget_s - spent if time_budget_s is not None else None
                made.append(_made(lab, target, left, replays=decisions is not None))
                if made[-1].gate["verdict"] == "refused" and not allow_worse:
                    for of in labs.values():
                        of.finish()
                    raise _refusal(lab, made[-1])
                if role == intuition.ROLE:
                    for of in labs.values():
                        of.tellers[target] = made[-1].built.first
        made.sort(
            key=lambda of: (recipe.targets.index(of.built.target), [*labs].index(of.built.role))
        )
        told = _first_and_others(made)
        built = [_moved(of.built, of.work, stage) for of in made]
        samples = next(iter(labs.values())).samples
        content = {**_write(stage.package, recipe, source, samples, built), **told}
        content |= {
            "verify": {of.label: of.drifts for of in made},
            "lowering": {of.label: of.lowering for of in made if of.lowering is not None},
            "layers": {of.label: of.layers for of in made if of.layers},
            "stand_ins": {
                b.label: why for b in built if (why := labs[b.role].obstacle(b)) is not None
            },
            "stages": [dataclasses.asdict(stage) for stage in progress.stages.values()],
            "timings": {name: round(s.seconds, 3) for name, s in progress.stages.items()},
        }
        report.write(stage.package, content)
        package.write_manifest(stage.package, content["manifest"])
    for lab in labs.values():
        lab.finish()
    content["manifest"] = json.loads((out / package.MANIFEST).read_text(encoding="utf-8"))
    return Result(out=out, report={**content, "out": str(out)})


def settled(recipe: Recipe, tuned: Path | None) -> tuple[Recipe, Path | None]:
    """A recipe that trains the model of a task, as the rest of it on the checkpoint; any other as it is.

    An engine is held against a trained model: one that nobody trained would make any gate pass. Raises RecipeError
    where there is no checkpoint, TuneError where it is not whole, or of other passes or settings, or over another
    encoder where that is there to be looked at.
    """
    last = max((i for i, pass_ in enumerate(recipe.passes) if pass_.trains), default=None)
    if recipe.source.encoder is None or last is None:
        return recipe, tuned
    if tuned is None:
        raise RecipeError(
            "the recipe trains the model of a task, and an engine is held against a trained one",
            hint="effc tune RECIPE -o CKPT, then effc compile RECIPE --tuned CKPT -o OUT",
        )
    if os.path.isdir(recipe.source.encoder):
        checkpoint.read(tuned, load(recipe.source.as_mapping()), recipe.passes)
    else:
        checkpoint.whole(tuned, recipe.passes)
        check_settings(tuned, recipe.source.options)
    data = yaml.safe_load(recipe.text)
    data["source"] = {"task": recipe.source.task, "checkpoint": str(tuned)}
    data["passes"] = data["passes"][last + 1 :]
    return build(data), None


def builders_of(
    recipe: Recipe,
    source: Source,
    original: Program,
    progress: Progress,
    kept: Cache,
    *,
    decisions: Mapping[str, Any] | None = None,
    trained: checkpoint.Checkpoint | None = None,
    max_ram_bytes: int | None = None,
    threads: int | None = None,
) -> dict[str, Builder]:
    """What builds each graph of a source, by role."""
    found: dict[str, Builder] = {}
    for graph in original:
        part, dims = source.only(graph.role), source.dims.get(graph.role, {})
        room = within(max_ram_bytes, graph, dims) if max_ram_bytes is not None else None
        found[graph.role] = Builder(
            recipe=recipe, source=part, samples=Samples(part, recipe.calib, room),
            original=Program({graph.role: graph}), progress=progress, cache=kept,
            decisions=decisions, checkpoint=trained, roles=tuple(original.graphs),
            threads=threads, twin=twin_of(source, graph.role, found),
            shared=alike.shared(recipe.passes, source, graph.role),
        )  # fmt: skip
    return found


def tune(
    recipe: Recipe,
    out: Path,
    *,
    progress: Progress | None = None,
    kept: Cache | None = None,
    max_ram_bytes: int | None = None,
) -> Json:
    """Run a recipe up to its last pass that trains, and write what was trained into `out`; gives the curves by step.

    A run that was killed goes on where it was. Of several processes in step (`effc.many`) the first writes. Raises
    RecipeError where nothing trains, TuneError where training fails.
    """
    progress, out = progress or Progress(), Path(os.path.abspath(out))
    last = max((i for i, pass_ in enumerate(recipe.passes) if pass_.trains), default=None)
    if last is None:
        raise RecipeError("the recipe trains nothing", hint="passes: [{pass: tune, file: DATA}]")
    checkpoint.refuse(out)
    if recipe.source.encoder is not None:
        _refuse_in_front(recipe.passes[:last])
    source, original = opened(recipe, progress)
    kept = kept or cache.default()
    kept.sweep()
    decisions: Json = {}
    made: dict[str, checkpoint.Made] = {}
    more: dict[str, bytes] = {}
    builders = builders_of(recipe, source, original, progress, kept, max_ram_bytes=max_ram_bytes)
    for role, builder in builders.items():
        for target in recipe.targets:
            built = builder.rewrite(target, first=last + 1)
            word = f"{target}/{role}"
            decisions |= {f"{word}/{i}:{r.name}": r.decisions for i, r in built.steps.items()}
            for step, (tensors, curve) in builder.tuner.steps.items():
                if step in made and tensors_digest(made[step][0]) != tensors_digest(tensors):
                    raise TuneError(
                        f"{target} has another graph in front of step {step} than {recipe.targets[0]}",
                        hint="train for each by itself: --set targets=[ort]; or put what differs behind `tune`",
                    )
                made[step] = tensors, curve
            more |= _files(built, source, role, recipe.passes[: last + 1])
    if source.kept is not None:
        more |= source.kept(
            {n: t for _, (tensors, _) in sorted(made.items()) for n, t in tensors.items()}
        )
    if many.rank() == 0:
        checkpoint.write(
            out, source, recipe.passes, decisions=decisions, made=made, more=more, recipe=recipe.portable(),
        )  # fmt: skip
    return {"out": str(out), "curves": {step: curve for step, (_, curve) in sorted(made.items())}}


def _refuse_in_front(passes: Sequence[Pass]) -> None:
    """The checkpoint of a task's model holds its weights and no graph: what a pass did to that would be lost."""
    if found := [pass_.name for pass_ in passes if not pass_.trains]:
        raise RecipeError(
            f"{found[0]} stands in front of the training of a task's model, and would be lost with its graph",
            hint="put it behind `tune`, where it works on the trained model",
        )


def _files(built: Built, source: Source, role: str, passes: Sequence[Pass]) -> dict[str, bytes]:
    """What passes have for others once a graph is trained, by place; of several graphs each in a folder of its own."""
    model = Model(name=source.name, kind=source.kind, stem=source.stem(role))
    folder = f"{role}/" if len(source.main) > 1 else ""
    return {
        f"{folder}{name}": content
        for pass_ in passes if pass_.takes(role)
        for name, content in pass_.files(built.program[role], model).items()
    }  # fmt: skip


def twin_of(source: Source, role: str, builders: Mapping[str, Builder]) -> Builder | None:
    """The builder of another role of the same graph, where there is one already: a partner's before any other's."""
    twins = [r for r in builders if alike.is_twin(source, r, role)]
    near = alike.partners(source, role)
    return builders[min(twins, key=lambda r: r not in near)] if twins else None


def opened(recipe: Recipe, progress: Progress, *, shapes: bool = False) -> tuple[Source, Program]:
    """The source of a recipe and its traced program, which every target can take.

    With `shapes` a model directory may lack its weights.
    """
    with progress.stage("load"):
        source = load(recipe.source.as_mapping(), shapes=shapes)
    asked = recipe.calib
    if asked is not None and asked.trajectories is not None and source.scheduler is not None:
        source = at_a_time(source, sampler(source.scheduler, asked.steps).times.tolist())
    for pass_ in recipe.passes:
        if strange := sorted(set(pass_.graphs) - set(source.modules)):
            raise RecipeError(
                f"pass {pass_.name!r} works on the unknown graph {strange[0]!r}",
                hint=f"graphs: {', '.join(source.modules)}",
            )
    alike.refuse_unlike(recipe.passes, source)
    with progress.stage("trace"):
        original = trace_source(source)
        for graph in original:
            refuse_chance(graph)
        _refuse_unsupported(original, recipe)
        measure.check_reading(source, original[source.main[0]])
    return source, original


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What became of one target: the candidate to ship, and what is said of it."""

    found: Found
    drifts: Json
    lowering: Json | None
    layers: list[Json]
    gate: Json
    work: Path

    @property
    def built(self) -> Built:
        return self.found.trial.built

    @property
    def label(self) -> str:
        return self.built.label

    def told(self) -> Json:
        """What stands in the report: metric, bench, gate and bytes of an engine."""
        trial, bytes_ = self.found.trial, model_bytes(self.built.first)
        return {
            "metric": trial.metric,
            "bench": _bench_json(trial.bench, self.drifts, trial.metric, bytes_),
            "gate": self.gate,
            "model_bytes": bytes_,
        }


def _made(lab: Lab, target: str, time_budget_s: float | None, *, replays: bool) -> _Made:
    """The engine of a target, what the gate wants taken back already taken back."""
    built = lab.build(target)
    drifts, lowering = lab.drifts(built)[target], lab.lowering(built)
    base = lab.timed(lab.measured(built))
    found = Found(trial=base)
    if not replays:  # else what to take back is recorded
        found = search.search(lab, base, time_budget_s=time_budget_s)
    chosen = found.trial.built
    if found.trial is not base:
        drifts, lowering = lab.drifts(chosen)[target], lab.lowering(chosen)
    if lab.obstacle(chosen) is None:
        lab.beside[target] = chosen.first
    gated = gate.to_json(
        lab.spec, found.trial.checks, rolled_back=search.rolled_back(lab, base, found.trial),
        tried=found.tried, seconds=found.seconds, ran_out=found.ran_out, target=built.label,
    )  # fmt: skip
    return _Made(
        found=found, drifts=drifts, lowering=lowering, layers=lab.layers(chosen), gate=gated,
        work=lab.work,
    )  # fmt: skip


def _refusal(lab: Lab, made: _Made) -> GateRefused:
    recipe, found = lab.recipe, made.found
    assert recipe.gate is not None
    many = len(recipe.targets) > 1 or made.label != made.built.target
    passes, steps = recipe.passes, made.built.steps
    lossy = {i for i, record in steps.items() if record.is_lossy}
    stays = [
        f"{passes[i].name} makes the model that is meant"
        for i in sorted(lossy - revocable(passes, lossy))
    ]
    stays += [
        f"{passes[i].name} is not taken back for one engine alone"
        for i in lab.builder.alike
        if i in lossy
    ]
    return gate.refusal(
        recipe.gate, found.trial.checks, tried=found.tried, ran_out=found.ran_out,
        target=made.label if many else None,
        stays=stays,
    )  # fmt: skip


def _first_and_others(made: Sequence[_Made]) -> Json:
    """What the report says of the first engine, and by label of the others; bench.json has all that were timed."""
    told, *rest = [of.told() for of in made]
    others = {of.label: each for of, each in zip(made[1:], rest, strict=True)}
    beside = {label: of["bench"] for label, of in others.items() if of["bench"]}
    if told["bench"] and beside:
        told["bench"]["others"] = beside
    return {**told, "others": others}


def _moved(built: Built, work: Path, stage: package.Stage) -> Built:
    """A candidate whose files lie in the package."""
    lowered = []
    for low in built.lowered:
        trial = work / low.directory.relative_to(work).parts[0]
        place = stage.package / low.directory.relative_to(trial)
        place.mkdir(parents=True, exist_ok=True)
        for name in low.files:
            os.rename(low.directory / name, place / name)
        lowered.append(dataclasses.replace(low, directory=place))
    return dataclasses.replace(built, lowered=tuple(lowered))


def trace_source(source: Source) -> Program:
    """Every module of a source as a graph under its role, with only the outputs that it wants kept."""
    graphs: dict[str, Graph] = {}
    for role, module in source.modules.items():
        same = next((r for r in graphs if alike.is_twin(source, r, role)), None)
        if same is not None:
            graphs[role] = dataclasses.replace(graphs[same].clone(), role=role)
            continue
        inputs = source.inputs[role]
        if is_of_shapes(module):
            inputs = {name: value.to("meta") for name, value in inputs.items()}
        program = trace(module, inputs, dims=source.dims.get(role), role=role)
        graph = program.only()
        if wanted := source.outputs.get(role):
            keep_outputs(graph, wanted)
        graphs[role] = graph
    return Program(graphs)


def _refuse_unsupported(program: Program, recipe: Recipe) -> None:
    for target in recipe.targets:
        asked = recipe.target_options.get(target)
        backend = BACKENDS[target]() if asked is None else BACKENDS[target](asked)
        for graph in program:
            if found := backend.supports(graph):
                lines = [f"{u.node}: {u.reason}" for u in found[:5]]
                more = f" and {len(found) - 5} more" if len(found) > 5 else ""
                raise LoweringError(
                    f"target {target} cannot take {len(found)} nodes of graph {graph.role!r}: "
                    + "; ".join(lines) + more,
                    hint="write the module without them, or choose another target",
                )  # fmt: skip


def _bench_json(
    timed: Json | None,
    drifts: Mapping[str, Json],
    metric: Json | None,
    model_bytes: int,
) -> Json | None:
    """bench.json as it is published: shapes, outputs, metric, model_bytes and the circumstances."""
    if timed is None:
        return None
    return {
        **timed,
        "outputs": measure.worst_known(drifts),
        "metric": metric,
        "model_bytes": model_bytes,
        "versions": versions(),
    }


def _corrections(source: Source, samples: Samples, built: Sequence[Built]) -> Json:
    """What the sampler is to put right of the denoiser's engines, by target."""
    runs = samples.trajectories
    assert runs is not None  # a recipe that asks for it has them
    pipeline, found = runs.pipeline, {}
    role = pipeline.role

    def whole(feeds: Mapping[str, Any]) -> Any:
        return predicted(pipeline.run(role, feeds))

    for made in built:
        if made.role != role:
            continue
        backend = BACKENDS[made.target]()
        opens = backend.open if backend.obstacle(made.first) is None else backend.stand_in
        with opens(made.first, threads=1) as engine:

            def asked(feeds: Mapping[str, Any], engine: Any = engine) -> Any:
                return predicted(engine(feeds))

            shown = (batch.inputs for batch in runs(role))
            is_mean = samples.spec is not None and samples.spec.correct == "mean"
            table = correction.measured(whole, asked, shown, mean_only=is_mean)
            found[made.target] = table.to_json()
    return found


def _write(
    stage: Path, recipe: Recipe, source: Source, samples: Samples, built: Sequence[Built]
) -> Json:
    """Everything of the package but the manifest file; gives what the report and the manifest say."""
    for role, of in source.beside.items():
        assert of.directory is not None and of.centroids is not None
        package.copy_files(of.directory, of.files, stage / role)
        package.copy_file(of.centroids, stage, intuition.FILE)
    if source.directory is not None:
        package.copy_files(source.directory, source.files, stage)
        for name, text in source.texts.items():
            (stage / name).write_text(text, encoding="utf-8")
    elif source.scheduler is not None:
        place = stage / diffusion.SCHEDULER
        place.parent.mkdir()
        place.write_text(package.dump(source.scheduler), encoding="utf-8")
    if samples.spec is not None and samples.spec.correct:
        text = package.dump(_corrections(source, samples, built))
        (stage / correction.FILE).write_text(text, encoding="utf-8")
    decisions: Json = {}
    origins: Json = {}
    for made in built:
        prefix = made.prefix(recipe.targets)
        decisions |= {f"{prefix}{i}:{r.name}": r.decisions for i, r in made.steps.items()}
        if taken := made.rollback.to_json(recipe.passes):
            decisions[f"{prefix}gate"] = taken
        origins |= {
            f"{made.target}/{graph.role}" if len(recipe.targets) > 1 else graph.role: {
                n: dataclasses.asdict(o) for n, o in graph.origins.items()
            }
            for graph in made.program
        }
    (stage / "decisions.json").write_text(package.dump(decisions), encoding="utf-8")
    (stage / "origins.json").write_text(package.dump(origins), encoding="utf-8")
    (stage / "recipe.yaml").write_text(recipe.portable(), encoding="utf-8")
    (stage / "local.json").write_text(
        package.dump({"source": _absolute(recipe.source.as_mapping())}), encoding="utf-8"
    )
    engines = [_entry(low, stage) for made in built for low in made.lowered]
    passes = [
        {
            "name": r.name, "role": made.role, "target": made.target, "options": r.options, "effect": r.effect,
            "sites": r.sites, "nodes": list(r.nodes), "bytes": list(r.bytes),
        }
        for made in built for r in made.records if r.sites
    ]  # fmt: skip
    manifest = {
        "schema": package.SCHEMA,
        "kind": source.kind,
        "engines": engines,
        "links": _links(source, engines),
        "source": {"name": source.name, "digest": source.digest},
        "data": samples.description(),
        "graph_digest": graph_digest([made.program for made in built]),
        "passes": passes,
        "decisions": "decisions.json",
        "origins": "origins.json",
        "versions": versions(),
    }
    return {
        "manifest": manifest,
        "passes": [
            {**dataclasses.asdict(r), "target": made.label, "decisions": len(r.decisions)}
            for made in built
            for r in made.records
        ],
        "sites": [
            {**dataclasses.asdict(s), "target": made.label}
            for made in built
            for low in made.lowered
            for s in low.sites
        ],
        "source_bytes": _weight_bytes(source.modules[built[0].role]),
        "data": samples.description(),
    }


def _links(source: Source, engines: Sequence[Json]) -> list[Json]:
    """Every link of the source between two engines of one target, as the ports of the producer say."""
    found = []
    by = {(engine["target"], engine["role"]): engine for engine in engines}
    for target in dict.fromkeys(engine["target"] for engine in engines):
        for link in source.links:
            producer = by[target, link.producer]
            port = next(p for p in producer["outputs"] if p["name"] == link.output)
            found.append({
                **dataclasses.asdict(link), "target": target, "dtype": port["dtype"],
                "shape": port["shape"], "sha256": producer["sha256"],
                **({"grid": port["grid"]} if "grid" in port else {}),
            })  # fmt: skip
    return found


def _absolute(source: Mapping[str, Any]) -> Json:
    """A source whose files are named from the root, so that it is found from any folder."""
    found = dict(source)
    for word in PLACES:
        if os.path.exists(place := found.get(word, "")):
            found[word] = os.path.abspath(place)
    file, _, function = found.get("python", "").rpartition(":")
    if os.path.isfile(file):
        found["python"] = f"{os.path.abspath(file)}:{function}"
    return found


def _weight_bytes(module: Any) -> int:
    places = {t.data_ptr(): t.numel() * t.element_size() for t in module.state_dict().values()}
    return sum(places.values())


def _port(port: Port) -> Json:
    return {k: v for k, v in dataclasses.asdict(port).items() if k != "grid" or v}


def _entry(lowered: Lowered, stage: Path) -> Json:
    path = lowered.directory / lowered.files[0]
    slow = [s for s in lowered.sites if not s.int8]
    return {
        "role": lowered.role,
        "target": lowered.target,
        "path": path.relative_to(stage).as_posix(),
        "sha256": package.digest(path),
        "inputs": list(map(_port, lowered.inputs)),
        "outputs": list(map(_port, lowered.outputs)),
        "opset": lowered.opset,
        "requires": list(lowered.requires),
        "options": dict(lowered.options),
        "int8_sites": len(lowered.sites) - len(slow),
        "total_sites": len(lowered.sites),
        "float_sites": [
            {"name": s.name, "op": s.op, "kernel": s.kernel, "reason": s.reason} for s in slow
        ],
    }
