"""Targets: what a graph can be lowered to."""

from effc.errors import RecipeError
from effc.table import Table

BACKENDS = Table(
    "target",
    {
        "eager": "effc.backends.eager:Eager",
        "onnx": "effc.backends.onnx:Onnx",
        "ort": "effc.backends.ort:Ort",
    },
    error=RecipeError,
)

TARGETS = tuple(word for word in BACKENDS if word != "eager")
"""Targets that make a file to ship."""
