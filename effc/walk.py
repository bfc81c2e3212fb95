"""The way of a model into its package, step by step: where do the numbers leave it, and at which node?

    module → trace → each pass → ONNX file, as it stands → engine, as it runs

and beside it torch's own float export. Passes are done again with the package's own decisions, so that what is looked
at is what the package holds. An exact step may move the outputs by rounding, a lossy one by what its grids cost
(`noise`); nodes of the file and of the engine are held to those of the graph, each on the same inputs (`ort_values`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from effc import bounded, checkpoint, inspection, measure, package, peers, recipe, scratch
from effc.backends import BACKENDS
from effc.backends.dialect import DIALECTS
from effc.blame import Blame, Faults, first_fault
from effc.build import Rollback, names
from effc.calib.calibrator import MASK, tensors_for
from effc.case import few
from effc.causal import typed
from effc.engine import entry_of
from effc.engine import lowered as lowered_of
from effc.errors import CalibrationError, PackageError, UsageError, VerifyError
from effc.ir.program import Graph, Program
from effc.ir.show import graph_digest
from effc.layers import Layers
from effc.machine import default_threads
from effc.passes import CANONICAL, PASSES
from effc.passes.base import Pass, Trainer
from effc.passes.pipeline import apply
from effc.progress import Progress
from effc.recipe import Recipe, SourceSpec
from effc.remedy import Remedy, remedies
from effc.samples import Samples
from effc.verify import Tolerance, parity

Json = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
Outputs = Mapping[str, Array]

ROWS, LENGTH = 4, 32
"""Of inputs that are made up where no data is given."""
ENOUGH = 0.5
"""Share of nodes that must be compared, or a step cannot be judged by its nodes; 0.88 and more is usual."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What is wrong in a step, and by how many of its nodes that was judged."""

    is_fault: bool = False
    node: str | None = None
    """The first node that is off by more than it may be."""
    reason: str = ""
    compared: int | None = None
    """Nodes that were held to the step before one by one; None where only the outputs were looked at."""
    of: int | None = None
    """Nodes that compute something from the inputs."""

    @property
    def is_judged(self) -> bool:
        """Whether enough nodes were compared for their silence to mean something."""
        return self.compared is None or self.compared >= ENOUGH * (self.of or 0)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the way, with the drift of every output from the module and from the step before."""

    name: str
    kind: str
    from_module: Json
    from_before: Json
    most: float | None
    """What it may move the outputs by; None where its nodes are judged one by one."""
    judgement: Judgement
    seconds: float

    @property
    def moved(self) -> float:
        return max((d["rel_l2"] for d in self.from_before.values()), default=0.0)

    def to_json(self) -> Json:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found = values.pop("judgement")
        judged = {**dataclasses.asdict(found), "is_judged": found.is_judged}
        return {**values, **judged, "moved": self.moved}


def walk(
    out: Path,
    *,
    model: str | None,
    trust_code: bool,
    calib: str | None,
    target: str | None,
    threads: int | None,
    top: int,
    progress: Progress,
    tuned: Path | None = None,
) -> Json:
    """Every step from the model to the engine of a package, the first fault, and the layers that cost most.

    `tuned` is the checkpoint whose tensors a package with a pass that trains was made of.

    Raises VerifyError where the package is not whole, and no code is run that it names unless it is trusted.
    """
    manifest = inspection._whole(out, progress)
    entry = entry_of(out, manifest, target)
    spec = inspection._source_of(out, manifest, model, trust_code)
    asked = _recipe(out, spec, trust_code, calib)
    decisions = package.read_json(out, "decisions.json")
    parts = inspection._open(out, manifest, spec, calib, progress)
    source, samples, original = parts[entry.role]
    threads = threads or default_threads()
    feeds, is_made_up = _feeds(samples, original.only())
    with measure._torch_threads(threads):
        with measure.of_user(source, original.only(), threads) as engine:
            module = engine(feeds)
        trained = checkpoint.read(tuned, source, asked.passes) if tuned is not None else None
        way = _Way(
            feeds=feeds, module=module, is_made_up=is_made_up, progress=progress, trained=trained
        )
        roles = [engine.role for engine in manifest.engines]
        program, before = way.graphs(
            original, asked, entry.target, decisions, Samples(source, asked.calib), roles
        )
        way.plain_export(original.only(), entry.target, threads)
        lowered = lowered_of(out, entry)
        way.files(lowered, program.only(), inspection._lossy(manifest, entry), threads)
        sites, loudest = way.layers(before, program, top)
    is_alone = len(manifest.engines) == 1
    wrong = next((s for s in way.steps if s.judgement.is_fault), None)
    return {
        "target": manifest.label(entry),
        "rows": len(next(iter(feeds.values()))),
        "made_up": is_made_up,
        "replayed": graph_digest([program]) == manifest.graph_digest if is_alone else None,
        "steps": [s.to_json() for s in way.steps],
        "first": None if wrong is None else {
            "step": wrong.name, "node": wrong.judgement.node, "reason": wrong.judgement.reason,
        },
        "nodes": [b.to_json() for b in way.blames[:top]],
        "sites": sites,
        "loudest": [dataclasses.asdict(r) for r in loudest],
        "advice": _advice(sites, loudest),
        "elsewhere": [
            peer.to_json()
            for peer in peers.advice(
                peers.Facts(
                    kind=manifest.kind, has_convs=any(s["op"].startswith("conv") for s in sites)
                ),
                entry.target,
            )
        ],
    }  # fmt: skip


SOURCE = tuple(f.name for f in dataclasses.fields(SourceSpec) if f.name != "options")
"""What a source says; all else in it are options of a factory or a task."""


def _recipe(out: Path, spec: Json, trust_code: bool, calib: str | None) -> Recipe:
    """The passes of a package as its recipe has them, and its draw of samples from the file `calib`.

    Raises UsageError where the passes are code that nobody trusts.
    """
    text = bounded.text_of(out / "recipe.yaml", PackageError)
    try:
        data = yaml.safe_load(text)
        parts = {k: data[k] for k in ("passes", "targets", "canonicalize", "plugins") if k in data}
        if calib is not None:
            drawn = {k: v for k, v in (data.get("calib") or {}).items() if k != "callable"}
            parts["calib"] = {**drawn, "file": calib}
    except (yaml.YAMLError, AttributeError, TypeError, RecursionError) as error:
        raise PackageError(f"recipe.yaml of {out} is damaged", hint=package.UNHARMED) from error
    if parts.get("plugins") and not trust_code:
        raise UsageError(
            f"the passes of {out} are code of its own: {', '.join(map(str, parts['plugins']))}",
            hint="add --trust-code where you trust it, and run this where those files are",
        )
    names = ("python",) if "python" in spec else SOURCE  # a factory's own words may be any
    kept = {k: v for k, v in spec.items() if k in names}
    options = {k: v for k, v in spec.items() if k not in kept}
    source = {**kept, "options": options} if options else kept
    return recipe.build({**parts, "source": source, "bench": False}, replayed=True)


def _feeds(samples: Samples, graph: Graph) -> tuple[dict[str, Array], bool]:
    """A batch to look at, and whether it is made up: of the calibration data where there is any."""
    batch = next(iter(samples(graph.role)), None)
    if batch is not None:
        kept = few(graph, tensors_for(graph, batch.inputs))
        return {name: value.numpy() for name, value in kept.items()}, False
    longest = measure.longest(samples.source, graph)
    feeds = samples.shaped(ROWS, min(LENGTH, longest))
    if MASK in feeds and feeds[MASK].ndim == 2:
        feeds[MASK][0, feeds[MASK].shape[1] // 2 :] = 0
    return feeds, True


ONNXRUNTIME = ("ort", "onnx")
"""Targets whose engines run in onnxruntime, which can be asked for every node that it made of a file."""


class _Way:
    """The steps so far, on one batch."""

    def __init__(
        self,
        *,
        feeds: dict[str, Array],
        module: Outputs,
        is_made_up: bool,
        progress: Progress,
        trained: checkpoint.Checkpoint | None = None,
    ) -> None:
        self.feeds, self.module, self.is_made_up = feeds, module, is_made_up
        self.progress, self.trained = progress, trained
        self.tensors = {n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in feeds.items()}
        self.last: Outputs = module
        self.steps: list[Step] = []
        self.blames: list[Blame] = []

    def graphs(
        self,
        original: Program,
        asked: Recipe,
        target: str,
        decisions: Mapping[str, Any],
        samples: Samples,
        roles: Sequence[str],
    ) -> tuple[Program, Program]:
        """Trace and passes; gives the program as the package has it, and as the first lossy pass found it."""
        self.step("trace", "exact", lambda: self.outputs(original), Tolerance().rel_l2)
        program, found = original.clone(), None
        for word in CANONICAL if asked.canonicalize else ():
            self.passed(PASSES[word](), program, target, None, None)
        role = original.only().role

        def known(key: str) -> list[str]:
            return [name for name in names(role, target, roles, key) if name in decisions]

        gate: Json = next((decisions[name] for name in known("gate")), {})
        rollback = Rollback.from_json(gate, asked.passes)
        for index, given in enumerate(asked.passes):
            pass_ = rollback.apply(index, given)
            if pass_ is None or not pass_.takes(role):
                continue
            key = f"{index}:{given.name}"
            if not known(key):
                raise CalibrationError(
                    f"the recorded decisions know no step {key!r}", hint="compile the model again"
                )
            if found is None and pass_.effect == "lossy":
                found = program.clone()
            train = self._trainer(index, pass_) if pass_.trains else None
            self.passed(pass_, program, target, decisions[known(key)[0]], samples, train)
            if pass_.renews:
                found = None
        return program, found or program

    def _trainer(self, index: int, pass_: Pass) -> Trainer:
        """What gives the tensors of a checkpoint where a pass trains."""
        if self.trained is None:
            raise UsageError(
                f"{pass_.name} was trained, and the package has no more of that than a sha256",
                hint="name the checkpoint that it was made of: --tuned CKPT",
            )
        held = self.trained
        return lambda _, graph, stats: held.tensors(index, graph.role)[0]

    def passed(
        self,
        pass_: Pass,
        program: Program,
        target: str,
        recorded: Any,
        samples: Samples | None,
        train: Trainer | None = None,
    ) -> None:
        """One pass, and what of its nodes is off; `samples` are for one that measures again."""
        before = program.clone()
        data = samples if pass_.measures_again else None
        with self.progress.stage(pass_.name):
            made = apply(
                pass_, program, data, dialect=DIALECTS[target], recorded=recorded, train=train
            )
            if not made.sites:
                return
            is_exact = made.effect == "exact"

            def judge(moved: float) -> Judgement:
                if pass_.renews or (is_exact and moved <= pass_.tolerance):
                    return Judgement()
                case = Faults(
                    before.only(), program.only(), self.tensors, is_made_up=self.is_made_up
                )
                blames = case.blames(1)
                self.blames += blames
                blame, (compared, of) = first_fault(blames), case.compared()
                if blame is not None:
                    return Judgement(
                        is_fault=True,
                        node=blame.site,
                        reason=blame.reason,
                        compared=compared,
                        of=of,
                    )
                return Judgement(is_fault=is_exact, compared=compared, of=of)

            most = pass_.tolerance if is_exact else None
            self.step(pass_.name, made.effect, lambda: self.outputs(program), most, judge)

    def plain_export(self, graph: Graph, target: str, threads: int) -> None:
        """torch's own float export; it lies beside the way, and nothing is made of it."""
        last = self.last
        with self.progress.stage("plain export"), scratch.held() as place:
            runtime = target if BACKENDS[target]().obstacle() is None else "ort"
            lowered = measure.plain_export(graph, place, runtime)
            with BACKENDS[runtime]().open(lowered, threads=threads) as engine:
                self.last = self.module
                self.step("plain export", "beside", lambda: engine(self.feeds), Tolerance().rel_l2)
        self.last = last

    def files(self, lowered: Any, graph: Graph, lossy: bool, threads: int) -> None:
        """The ONNX file without any optimisation, and the engine that a user runs."""
        from effc.backends.ort_values import Nodes, as_it_stands

        most = measure.MOST_LOWERED if lossy else Tolerance().rel_l2
        if lowered.files[0].endswith(".onnx"):
            path = lowered.directory / lowered.files[0]
            nodes = Nodes(graph, self.tensors, lowered.opset)
            feeds = typed(self.feeds, measure.dtypes(lowered.inputs))

            def judge(optimized: bool) -> Callable[[float], Judgement]:
                def run(moved: float) -> Judgement:
                    found = nodes.check(path, optimized=optimized)
                    bad = next(iter(found.off), None)
                    return Judgement(
                        is_fault=bad is not None or not moved <= most,
                        node=None if bad is None else f"{bad.nodes[0]} ({bad.site})",
                        reason="" if bad is None else bad.reason,
                        compared=found.compared, of=found.of,
                    )  # fmt: skip

                return run

            with self.progress.stage("onnx file"):
                self.step(
                    "onnx file", "file", lambda: as_it_stands(path, feeds, threads), most,
                    judge(False),
                )  # fmt: skip
        with (
            self.progress.stage("engine"),
            measure.opened(lowered, threads) as engine,
        ):
            how = judge(True) if lowered.target in ONNXRUNTIME else None
            self.step("engine", "engine", lambda: engine(self.feeds), most, how)

    def layers(
        self, before: Program, program: Program, top: int
    ) -> tuple[list[Json], list[Remedy]]:
        """Every quantised layer with its share, and what would help those with the largest."""
        with self.progress.stage("layers"):
            layers = Layers(before.only(), program.only(), self.tensors, is_made_up=self.is_made_up)
            found = layers.measured()
            loudest = remedies(layers, list(found), top)
            return _one_share(layers.told(found), loudest)

    def outputs(self, program: Program) -> Outputs:
        return {name: value.numpy() for name, value in program.only().run(self.tensors).items()}

    def step(
        self,
        name: str,
        kind: str,
        run: Callable[[], Outputs],
        most: float | None,
        judge: Callable[[float], Judgement] | None = None,
    ) -> None:
        started = time.perf_counter()
        outputs = run()
        from_module, from_before = (self.drift(o, outputs) for o in (self.module, self.last))
        moved = max((d["rel_l2"] for d in from_before.values()), default=0.0)
        made = judge(moved) if judge else Judgement(is_fault=not (most is None or moved <= most))
        self.last = outputs
        self.steps.append(
            Step(
                name=name, kind=kind, from_module=from_module, from_before=from_before, most=most,
                judgement=made, seconds=round(time.perf_counter() - started, 3),
            )
        )  # fmt: skip

    def drift(self, reference: Outputs, outputs: Outputs) -> Json:
        """Drift by output that both have; infinite where values are not numbers."""
        reference = {name: value for name, value in reference.items() if name in outputs}
        try:
            found = parity(lambda _: dict(reference), lambda _: dict(outputs), [self.feeds])
        except VerifyError:
            return {
                n: {"max_abs": float("inf"), "rel_l2": float("inf"), "cosine": 0.0, "n": 0}
                for n in reference
            }
        return {name: dataclasses.asdict(drift) for name, drift in found.items()}


def _one_share(sites: Sequence[Json], loudest: Sequence[Remedy]) -> tuple[list[Json], list[Remedy]]:
    """Every layer with the share that was tried out, where it was, and that was estimated, where not."""
    tried = {r.site: r.share for r in loudest}
    shares: Json = {s["site"]: tried.get(s["site"], s["share"]) for s in sites}
    whole = max(1.0, sum(shares.values()))
    rows = [
        {**s, "share": shares[s["site"]] / whole, "is_estimated": s["site"] not in tried}
        for s in sites
    ]
    return rows, [dataclasses.replace(r, share=r.share / whole) for r in loudest]


def _advice(sites: Sequence[Json], loudest: Sequence[Remedy]) -> list[str]:
    """What would help the package as a whole."""
    if not sites or not loudest:
        return []
    advice = []
    ranked = sorted(sites, key=lambda s: -s["share"])
    half, total = [], 0.0
    for site in ranked:
        half.append(site["site"])
        total += site["share"]
        if total >= 0.5:
            break
    advice.append(
        f"{len(half)} of {len(sites)} layers make {100 * total:.2g} % of the error: {', '.join(half[:5])}"
        + (" …" if len(half) > 5 else "")
    )
    known = [r for r in loudest if r.activations is not None]
    if known:
        weight = sum(r.share for r in known)
        part = sum(r.share * (r.activations or 0.0) for r in known) / weight if weight else 0.0
        advice.append(
            f"in the {len(known)} largest, activations make {100 * part:.2g} % of it, weights {100 * (1 - part):.2g} %"
        )
    return advice


def _step_line(step: Json) -> str:
    worst = max(step["from_module"].values(), key=lambda d: d["rel_l2"])
    most = "" if step["most"] is None else f"{step['most']:g}"
    nodes = "" if step["compared"] is None else f"{step['compared']} of {step['of']}"
    text = (
        f"{step['name']:16} {worst['rel_l2']:12.3g} {worst['cosine']:9.5f} {step['moved']:12.3g} "
        f"{most:>8}  {nodes}"
    ).rstrip()
    if step["is_fault"]:
        return f"{text}  ← a node is off" if step["node"] else f"{text}  ← more than it may"
    return text if step["is_judged"] else f"{text}  ← cannot be judged"


def _verdict(steps: Sequence[Json], wrong: Json | None) -> list[str]:
    """The first fault, or what was looked at without finding one."""
    if wrong is not None:
        where = f" at {wrong['node']}" if wrong["node"] else ""
        return [
            f"it goes wrong in {wrong['step']}{where}: {wrong['reason'] or 'no single node is off'}"
        ]
    blind = [s for s in steps if not s["is_judged"]]
    if blind:
        names = ", ".join(f"{s['name']} ({s['compared']} of {s['of']} nodes)" for s in blind)
        return [f"where it goes wrong cannot be judged: too few nodes could be compared in {names}"]
    return ["no fault found: outputs stay within the bounds above, and no node compared is off"]


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `walk` found, for a person."""
    made_up = (
        "made-up inputs; name real ones with --calib" if found["made_up"] else "calibration samples"
    )
    shown = [f"on {found['rows']} rows of {made_up}"]
    if found["replayed"] is False:
        shown.append("this effc makes another graph of the model than the package was made from")
    shown.append(
        f"{'step':16} {'from module':>12} {'cosine':>9} {'from before':>12} {'at most':>8}  nodes compared"
    )
    shown += [_step_line(step) for step in found["steps"]]
    shown += _verdict(found["steps"], found["first"])
    shares = {s["site"]: s for s in found["sites"]}
    for remedy in found["loudest"]:
        site = shares[remedy["site"]]
        shown.append(
            f"{100 * remedy['share']:5.1f} % {remedy['site']} ({site['op']}): {site['sqnr_db']:.1f} dB, its own "
            f"{site['local_db']:.1f} dB, outputs {remedy['alone_db']:.1f} dB where only it is quantised"
        )
        shown += [f"        {text}" for text in remedy["advice"]]
    return [*shown, *found["advice"], *peers.lines(found.get("elsewhere", ()))]
