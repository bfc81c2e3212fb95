"""Pruning while tuning beside its rivals, at length: what `examples/pat` measures, kept with its circumstances.

    python benchmarks/pat.py stories260k --state DIR
    python benchmarks/pat.py smollm2 --gguf FILE --state DIR
    python benchmarks/pat.py encoders

Writes results/pat-NAME.json. Words behind the name are the example's own (`examples/pat/README.md`); finished units lie
in `--state`, and a run that was stopped goes on from there. `--taken FILE…` keeps what an example wrote by `--json` on
this machine, of the revision that it has in it, or that `--revision` says; arms of later files, of more seeds, stand in
the place of those of the first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import common

EXAMPLE = common.ROOT / "examples" / "pat"
COMMANDS = {
    "stories260k": ["run.py"],
    "smollm2": ["run.py", "--model", "smollm2"],
    "encoders": ["encoders.py"],
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=COMMANDS)
    parser.add_argument("--taken", type=Path, nargs="+", help="what the example wrote")
    parser.add_argument("--revision", help="of what was taken, as `git describe --always` said it")
    given, more = parser.parse_known_args()
    if given.taken is None and given.revision is not None:
        parser.error("--revision is of numbers that were --taken before")
    with tempfile.TemporaryDirectory(prefix="effc-pat-") as place:
        files = given.taken or [Path(place) / "found.json"]
        if given.taken is None:
            script, *words = COMMANDS[given.name]
            command = [sys.executable, EXAMPLE / script, *words, *more, "--json", files[0]]
            subprocess.run(command, check=True)
        found, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for other in others:
        if (other["model"], other["data"]) != (found["model"], found["data"]):
            parser.error("--taken: the files are of other data")
        found["arms"] |= other["arms"]
        for worst in ("fold_rel_err_fp32", "fold_rel_err_fp64", "engine_rel_l2"):
            found[worst] = max(found[worst], other.get(worst, 0.0))
    if given.revision is not None:
        found = {"revision": given.revision, **found}
    if given.taken is not None and "revision" not in found:
        parser.error(f"--revision: {files[0].name} does not say which it is of")
    common.write(f"pat-{given.name}", {"name": f"pat-{given.name}", **found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
