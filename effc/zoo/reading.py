"""Files of tasks, read within bounds: their text, with the line of what is no UTF-8."""

from __future__ import annotations

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
