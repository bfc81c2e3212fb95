"""A part of a page that the code says: written between two marks, or checked to be what the code says."""

from pathlib import Path

END = "<!-- end -->"


def held(file: Path, begin: str, made: str, *, what: str, tool: str, check: bool) -> int:
    """Write `made` between the marks, or only look; gives the exit code. `what` it is and the `tool` stand in words."""
    text = file.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    assert found and end, f"{file} has no place for {what}"
    wanted = f"{before}{begin}\n{made}\n{END}{after}"
    if wanted == text:
        return 0
    if check:
        print(f"{what} in {file} are not what the code says; run {tool}")
        return 1
    file.write_text(wanted, encoding="utf-8")
    print(f"wrote {file}")
    return 0
