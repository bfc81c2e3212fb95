"""What an engine takes in a process that holds nothing else: its runtime alone, as it is deployed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from effc import scratch
from effc.backends.base import Array
from effc.errors import LoweringError

_PROGRAM = """
import pathlib, resource, sys
import numpy as np
path, feeds, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
{opening}
with np.load(feeds) as arrays:
    for _ in range(3):
        run({{name: arrays[name] for name in arrays.files}})
status = pathlib.Path("/proc/self/status")  # where there is one, ru_maxrss also counts the process that started this
if status.exists():
    print(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_rss_mb(opening: str, path: Path, feeds: Mapping[str, Array], threads: int) -> float:
    """Peak resident memory, in MB, of a process that opens a file and runs `feeds` through it three times.

    `opening` is Python that makes `run(feeds)` of `path` and `threads`. Raises LoweringError where it fails.
    """
    with scratch.held() as place:
        np.savez(place / "feeds.npz", **feeds)  # type: ignore[arg-type]
        program = _PROGRAM.format(opening=opening)
        command = [sys.executable, "-c", program, path, place / "feeds.npz", threads]
        ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LoweringError(
            f"{path.name} does not run in a process of its own: {reason}",
            hint="is there memory for it? --no-bench leaves this out",
        )
    return round(int(ran.stdout) / (1e6 if sys.platform == "darwin" else 1e3), 1)
