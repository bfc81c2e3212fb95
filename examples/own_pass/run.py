"""A pass of one's own, used from Python and from a recipe: the graph before, the graph after, and how far they differ.

python examples/own_pass/run.py [--smoke] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import model
import own_pass
import torch

import effc

HERE = Path(__file__).resolve().parent


def in_python(samples: int) -> dict[str, Any]:
    """Trace, apply, run: no recipe and no package."""
    module, inputs = model.build()
    program = effc.trace(module, inputs)
    before = effc.show(program)
    record = effc.apply(own_pass.FoldScale(), program, probes={"main": [inputs]})
    after = effc.show(program)
    x = torch.randn(samples, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = module(x)
    worst = float((program.run(x=x)["output"] - wanted).abs().max())
    digest = hashlib.sha256(x.numpy().tobytes()).hexdigest()
    return {
        "before": before.splitlines(),
        "after": after.splitlines(),
        "record": record.line(),
        "sites": record.sites,
        "nodes": list(record.nodes),
        "max_abs": worst,
        "data": {"name": "normal random numbers, seed 1", "n": samples, "sha256": digest},
    }


def from_a_recipe() -> dict[str, Any]:
    """`effc compile recipe.yaml`: the same pass on the way to an engine."""
    with tempfile.TemporaryDirectory(prefix="effc-") as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "effc", "compile", "recipe.yaml", "-o", f"{scratch}/OUT"]
        subprocess.run(
            [*command, "--json", str(report)], cwd=HERE, check=True, stdout=subprocess.DEVNULL
        )
        made = json.loads(report.read_text(encoding="utf-8"))
    sites = {entry["name"]: entry["sites"] for entry in made["passes"]}
    worst = max(
        d["max_abs"] for outputs in made["verify"]["ort"].values() for d in outputs.values()
    )
    return {"sites": sites["fold-scale"], "max_abs": worst, "model_bytes": made["model_bytes"]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A pass of one's own, from Python and from a recipe."
    )
    parser.add_argument("--smoke", action="store_true", help="fewer random inputs")
    parser.add_argument("--json", metavar="FILE", help="write what was found as JSON")
    given = parser.parse_args()
    found = in_python(64 if given.smoke else 4096)
    print("before\n  " + "\n  ".join(found["before"]))
    print("after\n  " + "\n  ".join(found["after"]))
    print(found["record"])
    print(f"largest difference over {found['data']['n']} inputs: {found['max_abs']:.2g}")
    found["recipe"] = from_a_recipe()
    print(
        f"from the recipe: {found['recipe']['sites']} sites, engine off by {found['recipe']['max_abs']:.2g} at most"
    )
    content = {"example": "own_pass", "smoke": given.smoke, **found}
    if given.json:
        Path(given.json).write_text(
            json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
