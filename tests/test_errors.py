"""An error is a letter to someone in a hurry: what is wrong, where, and what to do."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from effc import errors

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("effc", "passes", "backends", "calib")
FAMILY = {
    name
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, errors.EffcError)
}
"""Names of the errors; `error` is a class of them that a function was given."""
ADVISES = {"unknown"}
"""What is called to word an error and ends with the nearest known word, or all of them: that is the next step."""
EXCEPTIONS = {
    "internal: a package was staged without its manifest": "only our own bug could break it",
}
FILES = {
    "effc/stats.py": "maths, whose callers have counted what they give it; read in Python alone",
}
"""Errors without a next step, and files of such, and why they need none."""


def raised() -> Iterator[tuple[str, ast.Call]]:
    """Every place in effc where an error of the family is made, raised there or not."""
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    given = node.func.id == "error" and bool(node.args)
                    if node.func.id in FAMILY or given:
                        yield f"{file.relative_to(ROOT)}:{node.lineno}", node


def says_what_to_do(call: ast.Call) -> bool:
    if {"hint"} & {keyword.arg for keyword in call.keywords}:
        return True
    names = {
        n.func.id
        for n in ast.walk(call)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    return bool(names & ADVISES)


def words(call: ast.Call) -> str:
    return "".join(
        str(n.value)
        for n in ast.walk(call)
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )


RAISED = dict(raised())


def test_every_error_says_what_to_do():
    mute = [place for place, call in RAISED.items() if not says_what_to_do(call)]
    mute = [p for p in mute if words(RAISED[p]) not in EXCEPTIONS and p.split(":")[0] not in FILES]
    assert mute == []


def test_no_exception_is_listed_in_vain():
    assert set(EXCEPTIONS) <= {words(call) for call in RAISED.values() if not says_what_to_do(call)}


def test_the_places_are_found():
    assert len(RAISED) > 200
    found = {call.func.id for call in RAISED.values() if isinstance(call.func, ast.Name)}
    assert {"SourceError", "RecipeError", "PackageError", "error"} <= found


def test_every_family_has_a_code_of_its_own():
    codes: dict[int, list[type]] = {}
    for name in sorted(FAMILY):
        kind = getattr(errors, name)
        codes.setdefault(kind.exit_code, []).append(kind)
    for kinds in codes.values():
        first = max(kinds, key=lambda kind: -len(kind.__mro__))
        assert all(issubclass(kind, first) for kind in kinds)
    assert errors.INTERRUPTED not in codes


def test_the_table_in_the_docs_is_that_of_the_code():
    command = [sys.executable, str(ROOT / "tools" / "exit_codes.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.EffcError("a"), "a"),
        (errors.EffcError("a", hint="c"), "a\nc"),
        (errors.EffcError("a", where="b", hint="c"), "a\nin b\nc"),
    ],
)
def test_a_letter_has_what_where_and_what_to_do(error, text):
    assert str(error) == text


def test_a_panic_of_rust_code_is_a_failure_and_an_interrupt_is_none():
    panic = type("PanicException", (BaseException,), {})
    assert errors.is_failure(panic("at the disco"))
    assert errors.is_failure(ValueError())
    assert not errors.is_failure(KeyboardInterrupt())
    assert not errors.is_failure(SystemExit())
