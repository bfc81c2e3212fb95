"""What an exporter took apart is put together where the pattern holds to the letter, and computes the same."""

import math

import numpy as np
import pytest
import torch
from onnx_files import module, node, only, ops, run, save

NUMBERS = np.random.default_rng(1)


def floats(*shape):
    return NUMBERS.standard_normal(shape).astype(np.float32)


def number(value):
    return np.float32(value)


def same(place, made, feeds):
    with torch.no_grad():
        found = made.compute(feeds)["y"].numpy()
    np.testing.assert_allclose(found, run(place, feeds)[0], rtol=1e-4, atol=1e-5)


ROWS = {"x": ("batch", 5, 8)}
NORM = [
    node("ReduceMean", "x a", "m"), node("Sub", "x m", "d"), node("Pow", "d two", "p"), node("ReduceMean", "p a", "v"),
    node("Add", "v eps", "t"), node("Sqrt", "t", "s"), node("Div", "d s", "n"), node("Mul", "n g", "w"),
    node("Add", "w b", "y"),
]  # fmt: skip
NORMED = {
    "a": np.array([-1]), "two": number(2), "eps": number(1e-5), "g": floats(8), "b": floats(8)
}  # fmt: skip


def test_a_layer_norm_is_put_together(tmp_path):
    made = module(place := save(tmp_path / "m.onnx", NORM, ROWS, NORMED))
    assert ops(made) == ["LayerNormalization"]
    assert only(made, "LayerNormalization").get("epsilon") == pytest.approx(1e-5)
    same(place, made, {"x": torch.from_numpy(floats(2, 5, 8))})


@pytest.mark.parametrize("what", [{"a": np.array([1])}, {"two": number(3)}])
def test_what_only_looks_like_a_layer_norm_stays(what, tmp_path):
    made = module(place := save(tmp_path / "m.onnx", NORM, ROWS, {**NORMED, **what}))
    assert "LayerNormalization" not in ops(made)
    if "two" not in what:  # a mean of cubes may be negative, and has no root
        same(place, made, {"x": torch.from_numpy(floats(2, 5, 8))})


GELUS = {
    "x first": [
        node("Div", "x root", "d"), node("Erf", "d", "e"), node("Add", "e one", "p"), node("Mul", "x p", "q"),
        node("Mul", "q half", "y"),
    ],
    "half first": [
        node("Mul", "x half", "h"), node("Mul", "x inverse", "d"), node("Erf", "d", "e"), node("Add", "one e", "p"),
        node("Mul", "h p", "y"),
    ],
}  # fmt: skip
FACTORS = {
    "root": number(math.sqrt(2)), "one": number(1), "half": number(0.5), "inverse": number(math.sqrt(0.5))
}  # fmt: skip


@pytest.mark.parametrize("kind", GELUS)
def test_a_gelu_is_put_together(kind, tmp_path):
    made = module(place := save(tmp_path / "m.onnx", GELUS[kind], ROWS, FACTORS))
    assert ops(made) == ["Gelu"]
    same(place, made, {"x": torch.from_numpy(floats(2, 5, 8))})
    other = module(save(tmp_path / "o.onnx", GELUS[kind], ROWS, {**FACTORS, "half": number(0.6)}))
    assert "Gelu" not in ops(other)


def test_a_silu_is_put_together(tmp_path):
    nodes = [node("Sigmoid", "x", "s"), node("Mul", "x s", "y")]
    made = module(place := save(tmp_path / "m.onnx", nodes, ROWS))
    assert ops(made) == ["Silu"]
    same(place, made, {"x": torch.from_numpy(floats(2, 5, 8))})


def test_a_group_norm_is_put_together(tmp_path):
    nodes = [
        node("Reshape", "x groups", "r"), node("InstanceNormalization", "r one zero", "n"), node("Shape", "x", "s"),
        node("Reshape", "n s", "t"), node("Mul", "t g", "u"), node("Add", "u b", "y"),
    ]  # fmt: skip
    tensors = {
        "groups": np.array([0, 2, -1]), "one": np.ones(2, np.float32), "zero": np.zeros(2, np.float32),
        "g": floats(4, 1, 1), "b": floats(4, 1, 1),
    }  # fmt: skip
    made = module(place := save(tmp_path / "m.onnx", nodes, {"x": ("batch", 4, 3, 3)}, tensors))
    assert ops(made) == ["GroupNormalization"]
    same(place, made, {"x": torch.from_numpy(floats(2, 4, 3, 3))})


HEADS = {"q": ("batch", 2, 5, 4), "k": ("batch", 5, 2, 4), "v": ("batch", 2, 5, 4)}
KEY = node("Transpose", "k", "t", perm=[0, 2, 3, 1])
ATTENTIONS = {
    "divided": [
        KEY, node("MatMul", "q t", "s"), node("Div", "s c", "z"), node("Softmax", "z", "w"), node("MatMul", "w v", "y"),
    ],
    "masked": [
        KEY, node("MatMul", "q t", "s"), node("Mul", "s c", "z"), node("Add", "z mask", "a"), node("Softmax", "a", "w"),
        node("MatMul", "w v", "y"),
    ],
    "scaled on both sides": [
        KEY, node("Mul", "q c", "qq"), node("Mul", "t c", "tt"), node("MatMul", "qq tt", "s"),
        node("Add", "s mask", "a"), node("Softmax", "a", "w"), node("MatMul", "w v", "y"),
    ],
    "turned with batch and heads as one": [
        node("Transpose", "k", "kk", perm=[0, 2, 1, 3]), node("Reshape", "kk flat", "f"),
        node("Transpose", "f", "t", perm=[0, 2, 1]), node("Reshape", "t two", "r"), node("Mul", "r c", "tt"),
        node("Mul", "q c", "qq"), node("MatMul", "qq tt", "s"), node("Softmax", "s", "w"), node("MatMul", "w v", "y"),
    ],
    "watched for rows that see nothing": [
        KEY, node("MatMul", "q t", "s"), node("Add", "s mask", "a"), node("Softmax", "a", "w"), node("IsNaN", "w", "i"),
        node("Where", "i zero w", "o"), node("MatMul", "o v", "y"),
    ],
}  # fmt: skip


def heads():
    return {name: torch.from_numpy(floats(2, *shape[1:])) for name, shape in HEADS.items()}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_is_put_together(kind, tmp_path):
    tensors = {"c": number(2), "zero": number(0), "mask": floats(1, 1, 1, 5), "flat": np.array([-1, 5, 4]),
               "two": np.array([-1, 2, 4, 5])}  # fmt: skip
    made = module(place := save(tmp_path / "m.onnx", ATTENTIONS[kind], HEADS, tensors))
    assert "Attention" in ops(made) and not {"Softmax", "MatMul"} & set(ops(made))
    same(place, made, heads())


def test_attention_whose_weights_somebody_reads_stays(tmp_path):
    nodes = [
        *ATTENTIONS["divided"][:-1],
        node("MatMul", "w v", "o"),
        node("ReduceSum", "w", "r"),
        node("Add", "o r", "y"),
    ]
    made = module(place := save(tmp_path / "m.onnx", nodes, HEADS, {"c": number(2)}))
    assert "Attention" not in ops(made)
    same(place, made, heads())


def test_attention_whose_scores_somebody_reads_stays(tmp_path):
    nodes = [
        *ATTENTIONS["divided"][:-1],
        node("MatMul", "w v", "o"),
        node("ReduceSum", "z", "r"),
        node("Add", "o r", "y"),
    ]
    made = module(place := save(tmp_path / "m.onnx", nodes, HEADS, {"c": number(2)}))
    assert "Attention" not in ops(made)
    same(place, made, heads())


def test_a_product_and_its_bias_are_one_layer(tmp_path):
    nodes = [node("MatMul", "x w", "p"), node("Add", "b p", "y")]
    made = module(
        place := save(tmp_path / "m.onnx", nodes, ROWS, {"w": floats(8, 3), "b": floats(3)})
    )
    assert ops(made) == ["Linear"] and len(only(made, "Linear").inputs) == 3
    same(place, made, {"x": torch.from_numpy(floats(2, 5, 8))})


def test_a_number_is_no_bias(tmp_path):
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    made = module(
        place := save(tmp_path / "m.onnx", nodes, ROWS, {"w": floats(8, 3), "b": floats(1)})
    )
    assert ops(made) == ["Linear", "Add"]
    same(place, made, {"x": torch.from_numpy(floats(2, 5, 8))})


def test_a_table_that_is_read_twice_is_held_once(tmp_path):
    nodes = [
        node("Gather", "table i", "x"), node("Transpose", "table", "t", perm=[1, 0]), node("MatMul", "x t", "y"),
    ]  # fmt: skip
    place = save(
        tmp_path / "m.onnx", nodes, {"i": ("batch", 3)}, {"table": floats(9, 4)}, kinds={"i": 7}
    )
    made = module(place)
    assert ops(made) == ["Gather", "Linear"]
    assert sum(p.numel() for p in made.parameters()) == 36


def test_parts_have_the_paths_that_the_exporter_noted(tmp_path):
    nodes = [node("MatMul", "x w", "p", name="/encoder/layer.0/query/MatMul"),
             node("Add", "p b", "y", name="/encoder/layer.0/query/Add")]  # fmt: skip
    made = module(save(tmp_path / "m.onnx", nodes, ROWS, {"w": floats(8, 3), "b": floats(3)}))
    names = [name for name, _ in made.named_parameters()]
    assert names == ["encoder.layer.0.query.weight", "encoder.layer.0.query.bias"]
