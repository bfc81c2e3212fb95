"""Files of tasks, read within bounds: their text, with the line of what is no UTF-8."""

from __future__ import annotations

import json
from pathlib import Path

from effc import bounded, paths
from effc.errors import CalibrationError

MOST_BYTES = 64 << 20


def text(file: Path, most_bytes: int = MOST_BYTES) -> str:
    """All that a file says. Raises CalibrationError where it is too long, no plain file, or no UTF-8 text."""
    content = bounded.content(
        paths.plain(file, CalibrationError), str(file), CalibrationError, most_bytes
    )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CalibrationError(
            f"{file} line {line} is not UTF-8 text", hint="save the file as UTF-8"
        ) from error


def no_json(
    file: Path,
    error: json.JSONDecodeError | RecursionError,
    *,
    begun: int = 1,
    line: int | None = None,
) -> CalibrationError:
    """What is wrong with text of a file that is no JSON; the text begins at line `begun`, the value at `line`."""
    if isinstance(error, RecursionError):
        where = str(file) if line is None else f"{file} line {line}"
        return CalibrationError(f"{where} is nested too deep", hint=bounded.HINT)
    return CalibrationError(
        f"{file} line {begun + error.lineno - 1} is no JSON: {error.msg}", hint=bounded.HINT
    )
