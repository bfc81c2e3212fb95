"""A device kept fresh from a cloud, at length: what `examples/cloud_device` measures, kept with its circumstances.

    python benchmarks/cloud_device.py --state DIR [--html FILE]     # hours; writes results/cloud_device.json

Words are the example's own. Finished units lie in `--state`, and a run that was stopped goes on from there: with all of
them there it takes seconds, and does nothing but write.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common

EXAMPLE = common.ROOT / "examples" / "cloud_device" / "run.py"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="effc-cloud-") as place:
        file = Path(place) / "found.json"
        subprocess.run([sys.executable, EXAMPLE, *sys.argv[1:], "--json", file], check=True)
        found = json.loads(file.read_text(encoding="utf-8"))
    common.write("cloud_device", found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
