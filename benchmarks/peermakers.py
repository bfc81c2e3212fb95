"""What other tools make of a float ONNX file, each in a process of its own: python peermakers.py TOOL FLOAT ROWS OUT.

ROWS is an npz of calibration samples, `NUMBER/INPUT` each, without padding, as the tools' guides have it; OUT is
written. Nothing of effc is loaded, so time and memory are the tool's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """Samples one by one."""
    with np.load(file) as arrays:
        found: dict[int, dict[str, Any]] = {}
        for name in arrays.files:
            number, _, word = name.partition("/")
            found.setdefault(int(number), {})[word] = arrays[name]
    yield from (found[number] for number in sorted(found))


def ort_dynamic(plain: Path, data: Path, out: Path, *, attends: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(plain, out, per_channel=True, weight_type=QuantType.QInt8)


def ort_static(plain: Path, data: Path, out: Path, *, attends: bool) -> None:
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = rows(data)

        def get_next(self) -> Any:
            return next(self.rows, None)

    whole, ready = out.with_suffix(".whole.onnx"), out.with_suffix(".ready.onnx")
    onnx.save(onnx.load(plain), whole)  # its weights inside: the next step loses those beside it
    quant_pre_process(whole, ready, skip_symbolic_shape=True)
    quantize_static(
        ready, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def nncf(plain: Path, data: Path, out: Path, *, attends: bool) -> None:
    import nncf as tool
    import openvino

    found = list(rows(data))
    kind = tool.ModelType.TRANSFORMER if attends else None
    model = openvino.Core().read_model(str(plain))
    made = tool.quantize(model, tool.Dataset(found), model_type=kind, subset_size=len(found))
    openvino.save_model(made, str(out), compress_to_fp16=False)


TOOLS = {"ort dynamic int8": ort_dynamic, "ort static int8": ort_static, "nncf int8": nncf}

if __name__ == "__main__":
    tool, plain, data, out, attends = sys.argv[1:]
    TOOLS[tool](Path(plain), Path(data), Path(out), attends=attends == "True")
