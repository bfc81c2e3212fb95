"""An ONNX file of anybody's: what it is, and what it is worth beside the float model that it was made of.

So a file that was quantised elsewhere is held against the same model by the same measures as an engine of effc's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effc import measure, metrics
from effc.backends.base import Lowered
from effc.backends.ort_engine import OrtEngine
from effc.compiler import trace_source
from effc.engine import refuse
from effc.errors import UsageError
from effc.foreign.file import OWN, data_files, parsed
from effc.foreign.quantised import quantised
from effc.machine import default_threads
from effc.progress import Progress
from effc.recipe import CalibSpec
from effc.report import drift_lines, metric_line
from effc.samples import Samples
from effc.source import guess, load

Json = dict[str, Any]


def is_file(word: str | Path) -> bool:
    """Whether a word names an ONNX file rather than a package or a model directory."""
    return str(word).endswith(".onnx") and not Path(word).is_dir()


def described(path: Path) -> Json:
    """What an ONNX file says of itself. Raises SourceError where it is none, or its data lie elsewhere."""
    proto = parsed(path)
    names = [path.name, *data_files(path, proto)]
    how = quantised(proto)
    return {
        "name": path.name,
        "opset": max((o.version for o in proto.opset_import if o.domain in OWN), default=0),
        "nodes": len(proto.graph.node),
        "bytes": sum((path.parent / name).stat().st_size for name in names),
        "quantised": how.to_json() if how is not None else None,
        "sentence": how.sentence if how is not None else "floats, computed as floats",
    }


def verify(
    path: Path,
    *,
    model: str | None,
    tokenizer: str | None,
    calib: str | None,
    metric: str | None,
    threads: int | None,
    progress: Progress,
) -> Json:
    """What a file is; with its model, how far it is from that on ONNX Runtime, and the task metric of both.

    Raises VerifyError where it has other outputs than the model, and nothing where they are merely far off.
    """
    with progress.stage("integrity"):
        from effc.backends import onnx_file

        found: Json = {"file": described(path), "outputs": {}, "cases": {}, "metric": None}
        refuse(path, onnx_file.problems(path.parent, path.name))
    if model is None:
        if metric is not None:
            raise UsageError("--metric compares with the model", hint="add --model MODEL")
        return found
    spec = guess(model)
    if tokenizer is not None:
        spec["tokenizer"] = tokenizer
    wanted = metrics.parse(metric) if metric else None
    with progress.stage("load"):
        source = load(spec)
    if wanted is not None:
        wanted.check(source)
    with progress.stage("trace"):
        program = trace_source(source)
    graph, threads = program.only(), threads or default_threads()
    measure.check_reading(source, graph)
    with OrtEngine(path, threads=threads) as engine:
        lowered = Lowered(
            role=graph.role, target="onnx", directory=path.parent, files=(path.name,), opset=found["file"]["opset"],
            inputs=engine.inputs, outputs=engine.outputs,
        )  # fmt: skip
    samples = Samples(source, CalibSpec(file=calib) if calib else None)
    with progress.stage("verify") as step:
        cases = measure.verify_engine(source, graph, lowered, samples, True, threads, step)
    found["cases"], found["outputs"] = cases, measure.worst_known(cases)
    if wanted is not None:
        with progress.stage("metric") as step:
            compared = measure.task_metric(source, graph, lowered, wanted, threads, step)
        found["metric"] = compared
    return found


def lines(found: Mapping[str, Any]) -> list[str]:
    file = found["file"]
    made = [
        f"file       {file['name']}: opset {file['opset']}, {file['nodes']} nodes, {file['bytes'] / 1e6:.1f} MB",
        f"quantised  {file['sentence']}" if file["quantised"] else f"float      {file['sentence']}",
    ]
    for label, outputs in found.get("cases", {}).items():
        made += [f"parity     {label}: {line}" for line in drift_lines(outputs)]
    if found.get("metric"):
        made.append(metric_line(found["metric"]))
    return made
