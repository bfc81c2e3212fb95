"""Targets: what a graph can be lowered to."""

from typing import Any

from effc.errors import BackendUnavailable, RecipeError
from effc.table import Table

DISTRIBUTIONS = {
    "onnx": ("onnxscript", "onnxscript"),
    "ort": ("onnxruntime", "onnxruntime"),
    "openvino": ("openvino", "'effc[openvino]'"),
    "tensorrt": ("tensorrt-rtx-cu12-bindings", "'effc[tensorrt]'"),
}
"""By target: the distribution that it needs, and what pip is to install for it."""


class _Backends(Table):
    def __getitem__(self, word: str) -> Any:
        """The backend of a target. Raises BackendUnavailable where what it needs is not installed."""
        try:
            return super().__getitem__(word)
        except ImportError as error:
            name, wanted = DISTRIBUTIONS.get(word, (word, word))
            raise BackendUnavailable(
                f"target {word} needs {name}, which cannot be loaded: {error}",
                hint=f"pip install {wanted}",
            ) from error


BACKENDS = _Backends(
    "target",
    {
        "eager": "effc.backends.eager:Eager",
        "onnx": "effc.backends.onnx:Onnx",
        "openvino": "effc.backends.openvino:OpenVino",
        "tensorrt": "effc.backends.tensorrt:TensorRt",
        "ort": "effc.backends.ort:Ort",
    },
    error=RecipeError,
)

OPENERS = _Backends(
    "target",
    {
        "ort": "effc.backends.ort_engine:opened",
        "openvino": "effc.backends.openvino_engine:opened",
    },
    error=RecipeError,
)
"""By target: what opens an engine without loading all that makes one. Other targets are opened by their backend."""

TARGETS = tuple(word for word in BACKENDS if word != "eager")
"""Targets that make a file to ship."""
