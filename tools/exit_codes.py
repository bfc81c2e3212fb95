"""Write the table of exit codes into the docs, or check that it is what the code says.

python tools/exit_codes.py [--check]
"""

import inspect
import sys
from pathlib import Path

from effc import errors

FILE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
BEGIN, END = "<!-- from tools/exit_codes.py -->", "<!-- end -->"


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
    text = FILE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{FILE} has no place for the table"
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if wanted == text:
        return 0
    if check:
        print(f"the exit codes in {FILE} are not what the code says; run tools/exit_codes.py")
        return 1
    FILE.write_text(wanted, encoding="utf-8")
    print(f"wrote {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
