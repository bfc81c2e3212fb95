"""Strict mypy over the layout that is installed, not the one in the repository.

Static checkers cannot follow the mapping of `passes/` to `effc.passes`: asked about the repository
they skip half of it and report success. So a throw-away tree of links shows them the installed
layout, and the number of files that mypy says it checked must be the number of files there are.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("passes", "backends", "calib")
TREE = ROOT / "build" / "types"


def link_tree() -> None:
    """Make `build/types/effc`, with every package where an installation has it."""
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "effc"
    package.mkdir(parents=True)
    for path in [*(ROOT / "effc").iterdir(), *(ROOT / name for name in MAPPED)]:
        if path.suffix == ".py" or any(path.rglob("*.py")):  # mypy counts an empty folder as a file
            (package / path.name).symlink_to(path)


def main() -> int:
    link_tree()
    files = [path for name in ("effc", *MAPPED) for path in (ROOT / name).rglob("*.py")]
    config = [f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *config, "-p", "effc"],
        cwd=TREE,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(run.stdout, end="")
    seen = re.search(r"(?:in|checked) (\d+) source files?\)?$", run.stdout.strip())
    if seen is None:
        print("mypy did not say how many files it checked")
        return run.returncode or 1
    if not files or int(seen[1]) != len(files):
        print(f"mypy checked {seen[1]} files of {len(files)}: a folder without __init__.py?")
        return 1
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
