"""Calibration caches of TensorRT 5 to 10 and of ONNX Runtime, which are text: one scale for every tensor.

TRT-8501-EntropyCalibration2         a line of the maker, then the bits of a float32 in hex: 3c010a14 is 1/127
input: 3c010a14
{"input": {"scale": 0.0078, …}}      JSON of older versions
input 1.0                            ONNX Runtime's: the largest magnitude, which is 127 scales
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

from effc import bounded
from effc.errors import CalibrationError
from effc.paths import shown

LARGEST = 127
MOST_LINES = 1_000_000
HINT = "it is the file that an IInt8Calibrator or trtexec wrote, or onnxruntime's calibration.cache"


def read(path: Path) -> dict[str, float]:
    """The scale of every tensor, those of zero left out: nothing was seen there. Raises CalibrationError."""
    text = bounded.text_of(path, CalibrationError)
    if text.count("\n") > MOST_LINES:
        raise CalibrationError(f"{path} has more than {MOST_LINES} lines", hint=HINT)
    if text.lstrip().startswith("{"):
        found = _json(bounded.json_of(text.encode(), str(path), CalibrationError), path)
    elif re.match(r"TRT-\w+-\w*Calibration\w*\s", text):
        found = dict(_hex(line, path) for line in text.splitlines()[1:] if line.strip())
    else:
        found = dict(_plain(line, path) for line in text.splitlines() if line.strip())
    for name, scale in found.items():
        if not math.isfinite(scale) or scale < 0:
            raise CalibrationError(f"{path}: the scale of {shown(name)} is {scale:g}", hint=HINT)
    kept = {name: scale for name, scale in found.items() if scale > 0}
    if not kept:
        raise CalibrationError(f"{path} has no scales", hint=HINT)
    return kept


def _hex(line: str, path: Path) -> tuple[str, float]:
    name, _, bits = line.rpartition(":")
    bits = bits.strip()
    if not name or not re.fullmatch(
        r"[0-9a-fA-F]{8}|0{1,7}", bits
    ):  # fewer digits are a line that was cut off
        raise CalibrationError(f"{path}: {shown(line)} is no tensor with a scale", hint=HINT)
    return name.strip(), float(struct.unpack(">f", bytes.fromhex(bits.zfill(8)))[0])


def _plain(line: str, path: Path) -> tuple[str, float]:
    name, _, value = line.strip().rpartition(" ")
    try:
        return name.strip().removesuffix(":") or _refuse(line, path), float(value) / LARGEST
    except ValueError:
        return _refuse(line, path), 0.0


def _refuse(line: str, path: Path) -> str:
    raise CalibrationError(f"{path}: {shown(line)} is no tensor with a range", hint=HINT)


def _json(value: Any, path: Path) -> dict[str, float]:
    found = {}
    for name, entry in value.items():
        scale = entry.get("scale") if isinstance(entry, dict) else None
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise CalibrationError(f"{path}: {shown(name)} has no scale", hint=HINT)
        found[name] = float(scale)
    return found
