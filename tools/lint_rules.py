"""Write the page of lint's rules from the rules, or check that it is what they say.

python tools/lint_rules.py [--check]
"""

import sys
from pathlib import Path

from effc.lint import run
from effc.lint.rule import RULES, TARGETS

FILE = Path(__file__).resolve().parent.parent / "docs" / "lint.md"
BEGIN, END = "<!-- from tools/lint_rules.py -->", "<!-- end -->"
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
    text = FILE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{FILE} has no place for the rules"
    wanted = f"{before}{BEGIN}\n\n{table()}\n{END}{after}"
    if wanted == text:
        return 0
    if check:
        print(f"the rules in {FILE} are not what the code says; run tools/lint_rules.py")
        return 1
    FILE.write_text(wanted, encoding="utf-8")
    print(f"wrote {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
