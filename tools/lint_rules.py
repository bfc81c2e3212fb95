"""Write the page of lint's rules from the rules, or check that it is what they say.

python tools/lint_rules.py [--check]
"""

import sys
from pathlib import Path

import pages

from effc.lint import run
from effc.lint.rule import RULES, TARGETS

FILE = Path(__file__).resolve().parent.parent / "docs" / "lint.md"
BEGIN = "<!-- from tools/lint_rules.py -->"
assert run.RULES is RULES


def table() -> str:
    """Every rule, by the targets that it is of: what is found, what it costs, what to do."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for id, rule in sorted(RULES.items()):
        row = f"| `{id}` | {rule.level} | {rule.what} | {rule.cost} | {rule.fix} |"
        kinds.setdefault(rule.targets, []).append(row)
    lines: list[str] = []
    for targets in sorted(kinds, key=lambda t: (len(t) == 1, [TARGETS.index(x) for x in t])):
        title = "every target" if targets == TARGETS else " and ".join(f"`{t}`" for t in targets)
        lines += [f"### {title}", "", "| id | level | what | cost | fix |", "|---|---|---|---|---|"]
        lines += [*kinds[targets], ""]
    return "\n".join(lines)


def main(check: bool) -> int:
    return pages.held(
        FILE, BEGIN, f"\n{table()}", what="the rules", tool="tools/lint_rules.py", check=check
    )


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
