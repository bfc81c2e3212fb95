"""Gated experts of rank 1 beside LoRA, at length: what `examples/mor1e` measures, kept with its circumstances.

    python benchmarks/mor1e.py encoder                  # hours, in units that can be stopped
    python benchmarks/mor1e.py causal --gguf FILE

Writes results/mor1e-NAME.json; words behind the name are the example's own (`examples/mor1e/README.md`). Finished units
are kept in results/mor1e/NAME as well, and are not done again where these are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import common

EXAMPLE = common.ROOT / "examples" / "mor1e"
SCRIPTS = {"encoder": "run.py", "causal": "causal.py"}


def exchange(kept: Path, state: Path) -> None:
    """Put units that either place has into the other: `ARM-SEED-PLAN.json`, in folders too of what is left out."""
    for mine, theirs in ((kept, state), (state, kept)):
        for file in (*mine.glob("*-*-*.json"), *mine.glob("without */*-*-*.json")):
            target = theirs / file.relative_to(mine)
            if not target.exists():
                unit = json.loads(file.read_text(encoding="utf-8"))
                unit.pop("curve", None)  # thousands of numbers that no table has
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(unit, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SCRIPTS)
    parser.add_argument("--state", type=Path, help="benchmarks/state/mor1e-NAME where not given")
    given, more = parser.parse_known_args()
    kept = common.RESULTS / "mor1e" / given.name
    state = given.state or common.ROOT / "benchmarks" / "state" / f"mor1e-{given.name}"
    made = state / "found.json"
    exchange(kept, state)
    command = [sys.executable, EXAMPLE / SCRIPTS[given.name], "--state", state, "--json", made]
    try:
        subprocess.run([*command, *more], check=True)
    finally:
        exchange(kept, state)
    found = json.loads(made.read_text(encoding="utf-8"))
    if "skipped" in found:
        parser.error(found["skipped"])
    common.write(f"mor1e-{given.name}", {"name": f"mor1e-{given.name}", **found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
