"""effc: a compiler that makes trained PyTorch models smaller and faster, and proves what that cost.

    effc.compile("MODEL_DIR", "OUT", quantize="int8", calib="sentences.txt")

The same parts one by one: `effc.trace`, `effc.apply`, `program.run`. Names are loaded when they are first used.
"""

import os as _os
from typing import TYPE_CHECKING, Any

_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when onnxruntime is imported

__version__ = "0.1.0"

_NAMES = {
    "compile": "effc.compiler:compile",
    "trace": "effc.ir.trace:trace",
    "apply": "effc.passes.pipeline:apply",
    "clock": "effc.timing:clock",
    "save_adapter": "effc.passes.lora:save_adapter",
    "onnx_adapter": "effc.backends.ort_adapter:onnx_adapter",
    "show": "effc.ir.show:show",
    "trainer": "effc.tuning:trainer",
    "Pass": "effc.passes.base:Pass",
    "Probe": "effc.calib.probe:Probe",
    "Select": "effc.ir.select:Select",
    "Source": "effc.source:Source",
    "Batch": "effc.calib.data:Batch",
    "Program": "effc.ir.program:Program",
    "Engine": "effc.engine:Engine",
    "Chain": "effc.chain:Chain",
    "EffcError": "effc.errors:EffcError",
    "register": "effc.passes:register",
    "explain": "effc.blame:explain",
    "first_fault": "effc.blame:first_fault",
}

if TYPE_CHECKING:
    from effc.backends.ort_adapter import onnx_adapter as onnx_adapter
    from effc.blame import explain as explain
    from effc.blame import first_fault as first_fault
    from effc.calib.data import Batch as Batch
    from effc.calib.probe import Probe as Probe
    from effc.chain import Chain as Chain
    from effc.compiler import compile as compile
    from effc.engine import Engine as Engine
    from effc.errors import EffcError as EffcError
    from effc.ir.program import Program as Program
    from effc.ir.select import Select as Select
    from effc.ir.show import show as show
    from effc.ir.trace import trace as trace
    from effc.passes import register as register
    from effc.passes.base import Pass as Pass
    from effc.passes.lora import save_adapter as save_adapter
    from effc.passes.pipeline import apply as apply
    from effc.source import Source as Source
    from effc.timing import clock as clock
    from effc.tuning import trainer as trainer


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'effc' has no attribute {name!r}")
    import importlib

    module, _, attribute = _NAMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*_NAMES, "__version__"])
