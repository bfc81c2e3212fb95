"""Write the table of exit codes into the docs, or check that it is what the code says.

python tools/exit_codes.py [--check]
"""

import inspect
import sys
from pathlib import Path

import pages

from effc import errors

FILE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
BEGIN = "<!-- from tools/exit_codes.py -->"


def table() -> str:
    """Every error of the family under its code, with the sentence that its class begins with."""
    family = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.EffcError)
    ]
    lines = ["| code | error | when |", "|---|---|---|", "| 0 | | All went well. |"]
    for kind in sorted(family, key=lambda kind: kind.exit_code):
        sentence = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        lines.append(f"| {kind.exit_code} | `{kind.__name__}` | {sentence} |")
    lines.append(f"| {errors.INTERRUPTED} | | Ctrl-C or SIGTERM; nothing was written. |")
    return "\n".join(lines)


def main(check: bool) -> int:
    return pages.held(
        FILE, BEGIN, table(), what="the exit codes", tool="tools/exit_codes.py", check=check
    )


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
