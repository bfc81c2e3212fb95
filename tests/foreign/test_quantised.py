"""Files that hold integers already are known by their form."""

import numpy as np
import pytest
from onnx import helper
from onnx_files import node, save

from effc.errors import SourceError
from effc.foreign.file import parsed
from effc.foreign.quantised import quantised
from effc.source import from_onnx

X = {"x": ("batch", 16)}
CODES = {
    "q": np.arange(256, dtype=np.int8).reshape(16, 16),
    "s": np.float32(0.1),
    "z": np.int8(0),
    "u": np.uint8(0),
}
NBITS = helper.make_node(
    "MatMulNBits", ["x", "p", "g"], ["y"], domain="com.microsoft", K=16, N=16, bits=4, block_size=16
)
FORMS = {
    "weight-only": ([node("DequantizeLinear", "q s z", "w"), node("MatMul", "x w", "y")], CODES, {}),
    "static": ([
        node("QuantizeLinear", "x s z", "a"), node("DequantizeLinear", "a s z", "b"),
        node("DequantizeLinear", "q s z", "w"), node("MatMul", "b w", "y"),
    ], CODES, {}),
    "dynamic": ([
        node("DynamicQuantizeLinear", "x", "a t v"),
        node("MatMulInteger", "a q v z", "i"), node("Cast", "i", "f", to=1),
        node("Mul", "f t", "y"),
    ], CODES, {}),
    "stored": ([
        node("Cast", "q", "f", to=1), node("Mul", "f s", "w"), node("MatMul", "x w", "y"),
    ], CODES, {}),
    "nbits": ([NBITS], {"p": np.zeros((16, 1, 8), np.uint8), "g": np.ones(16, np.float32)}, {"com.microsoft": 1}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_file_is_known_by_its_form_and_refused_for_a_compile(form, tmp_path):
    nodes, tensors, domains = FORMS[form]
    place = save(tmp_path / "m.onnx", nodes, X, tensors, domains=domains)
    found = quantised(parsed(place))
    assert found is not None
    assert found.form == {"nbits": "weight-only"}.get(form, form)
    assert found.integer_bytes >= 128
    with pytest.raises(SourceError, match="quantised already") as refused:
        from_onnx(place)
    assert "effc verify" in refused.value.hint


def test_a_file_of_floats_is_not_quantised(tmp_path):
    nodes = [node("Gather", "w i", "y")]
    tensors = {"w": np.ones((9, 4), np.float32), "i": np.arange(100) % 9}
    assert quantised(parsed(save(tmp_path / "m.onnx", nodes, X, tensors))) is None
