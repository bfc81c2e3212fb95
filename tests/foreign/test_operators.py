"""Every operator that is read computes what ONNX Runtime does, traced, and with another batch than the trace saw."""

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnx_files import module, node, run, save

from effc.foreign.module import WRITTEN
from effc.ir.trace import trace

NUMBERS = np.random.default_rng(0)


def whole(*values):
    return np.array(values, np.int64)


def floats(*shape):
    return NUMBERS.standard_normal(shape).astype(np.float32)


X = {"x": ("batch", 4, 6, 8)}
ROW = {"x": ("batch", 12)}
UNARY = """
    Abs Ceil Celu Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Mish Neg Reciprocal Relu Round
    Selu Sigmoid Sign Sin Softplus Softsign Tan Tanh
"""
SUMS = """
    ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
"""
DOUBLE = {"s": np.array([1, 1, 2, 2], np.float32)}
CASES = [
    *((op, X, [node(op, "x", "y")], {}) for op in UNARY.split()),
    *((op, X, [node("Abs", "x", "a"), node(op, "a", "y")], {}) for op in ("Log", "Sqrt")),
    *((op, X, [node(op, "x w", "y")], {"w": floats(8)}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    ("Add a number", X, [node("Add", "x w", "y")], {"w": np.float32(0.5)}),
    ("Add to a number", X, [node("Sub", "w x", "y")], {"w": np.float32(0.5)}),
    ("Div of whole numbers", {"i": ("batch", 3)}, [node("Div", "i w", "y")], {"w": whole(3)}),
    ("Pow", X, [node("Pow", "x w", "y")], {"w": np.float32(2)}),
    ("Mod", {"i": ("batch", 3)}, [node("Mod", "i w", "y")], {"w": whole(3)}),
    ("PRelu", X, [node("PRelu", "x w", "y")], {"w": floats(4, 1, 1)}),
    ("Clip", X, [node("Clip", "x l h", "y")], {"l": np.float32(-0.5), "h": np.float32(0.5)}),
    ("Clip at 0", X, [node("Clip", "x l", "y")], {"l": np.float32(0)}),
    ("Sum", X, [node("Sum", "x x w", "y")], {"w": floats(8)}),
    ("Cast", X, [node("Cast", "x", "y", to=TensorProto.INT32)], {}),
    ("Where of two numbers", X, [node("Greater", "x z", "c"), node("Where", "c o z", "y")],
     {"z": np.float32(0), "o": np.float32(1)}),
    ("Flatten at its end", X, [node("Flatten", "x", "y", axis=4)], {}),
    ("Where", X, [node("Greater", "x z", "c"), node("Where", "c x z", "y")], {"z": np.float32(0)}),
    ("And Or Xor Not", X, [
        node("Greater", "x z", "a"), node("Less", "x o", "b"), node("And", "a b", "c"), node("Or", "a c", "d"),
        node("Xor", "b d", "e"), node("Not", "e", "y"),
    ], {"z": np.float32(0), "o": np.float32(1)}),
    ("Equal LessOrEqual GreaterOrEqual", X, [
        node("Round", "x", "r"), node("Equal", "r z", "a"), node("LessOrEqual", "x z", "b"),
        node("GreaterOrEqual", "x r", "c"), node("And", "a b", "d"), node("Or", "c d", "y"),
    ], {"z": np.float32(0)}),
    ("IsNaN IsInf", X, [
        node("Div", "x z", "a"), node("IsInf", "a", "b"), node("IsNaN", "a", "c"), node("Or", "b c", "y"),
    ], {"z": np.float32(0)}),
    ("MatMul", {"x": ("batch", 3, 12)}, [node("MatMul", "x w", "y")], {"w": floats(12, 5)}),
    ("MatMul of batches", X, [node("Transpose", "x", "t", perm=[0, 1, 3, 2]), node("MatMul", "x t", "y")], {}),
    ("Gemm", ROW, [node("Gemm", "x w b", "y", transB=1)], {"w": floats(5, 12), "b": floats(5)}),
    ("Gemm with factors", ROW, [node("Gemm", "x w b", "y", alpha=0.5, beta=2.0)], {"w": floats(12, 5), "b": floats(5)}),
    ("Einsum", X, [node("Einsum", "x w", "y", equation="bchw,wk->bchk")], {"w": floats(8, 3)}),
    ("Conv", X, [node("Conv", "x w b", "y", pads=[1, 1, 1, 1])], {"w": floats(5, 4, 3, 3), "b": floats(5)}),
    ("Conv, uneven", X, [node("Conv", "x w", "y", pads=[0, 0, 1, 1], strides=[2, 2])], {"w": floats(5, 4, 3, 3)}),
    ("Conv, same", X, [node("Conv", "x w", "y", auto_pad="SAME_UPPER", strides=[2, 2])], {"w": floats(5, 4, 3, 3)}),
    ("Conv, in groups", X, [node("Conv", "x w", "y", group=4, dilations=[2, 2])], {"w": floats(4, 1, 3, 3)}),
    ("Conv of rows", {"x": ("batch", 4, 9)}, [node("Conv", "x w", "y")], {"w": floats(5, 4, 3)}),
    ("ConvTranspose", X, [
        node("ConvTranspose", "x w", "y", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])
    ], {"w": floats(4, 5, 3, 3)}),
    ("MaxPool", X, [node("MaxPool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])], {}),
    ("MaxPool, uneven", X, [node("MaxPool", "x", "y", kernel_shape=[2, 2], pads=[0, 0, 1, 1])], {}),
    ("AveragePool", X, [node("AveragePool", "x", "y", kernel_shape=[2, 2], strides=[2, 2])], {}),
    ("AveragePool, padded", X, [node("AveragePool", "x", "y", kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {}),
    ("GlobalAveragePool", X, [node("GlobalAveragePool", "x", "y")], {}),
    ("GlobalMaxPool", X, [node("GlobalMaxPool", "x", "y")], {}),
    ("BatchNormalization", X, [node("BatchNormalization", "x a b c d", "y")],
     {"a": floats(4), "b": floats(4), "c": floats(4), "d": np.abs(floats(4))}),
    ("LayerNormalization", X, [node("LayerNormalization", "x a b", "y")], {"a": floats(8), "b": floats(8)}),
    ("LayerNormalization of two axes", X, [node("LayerNormalization", "x a", "y", axis=2)], {"a": floats(6, 8)}),
    ("GroupNormalization", X, [node("GroupNormalization", "x a b", "y", num_groups=2)],
     {"a": floats(4), "b": floats(4)}),
    ("InstanceNormalization", X, [node("InstanceNormalization", "x a b", "y")], {"a": floats(4), "b": floats(4)}),
    ("Softmax", X, [node("Softmax", "x", "y")], {}),
    ("LogSoftmax", X, [node("LogSoftmax", "x", "y", axis=1)], {}),
    ("Reshape", X, [node("Reshape", "x s", "y")], {"s": whole(0, -1, 8)}),
    ("Reshape by sizes", X, [
        node("Shape", "x", "s"), node("Gather", "s i", "b"), node("Unsqueeze", "b n", "bb"),
        node("Concat", "bb rest", "t", axis=0), node("Reshape", "x t", "y"),
    ], {"i": np.int64(0), "n": whole(0), "rest": whole(4, -1)}),
    ("Flatten", X, [node("Flatten", "x", "y")], {}),
    ("Flatten at 2", X, [node("Flatten", "x", "y", axis=2)], {}),
    ("Transpose", X, [node("Transpose", "x", "y", perm=[0, 2, 3, 1])], {}),
    ("Squeeze Unsqueeze", X,
     [node("Unsqueeze", "x a", "t"), node("Squeeze", "t a", "u"), node("Unsqueeze", "u b", "y")],
     {"a": whole(1), "b": whole(-1)}),
    ("Concat", X, [node("Concat", "x x", "y", axis=-1)], {}),
    ("Split", X, [node("Split", "x s", "a b", axis=3), node("Concat", "b a", "y", axis=3)], {"s": whole(3, 5)}),
    ("Split alike", X, [node("Split", "x", "a b", axis=1, num_outputs=2), node("Sub", "a b", "y")], {}),
    ("Slice", X, [node("Slice", "x s e a t", "y")],
     {"s": whole(1, 0), "e": whole(9, -1), "a": whole(2, 3), "t": whole(2, 1)}),
    ("Slice backwards", X, [node("Slice", "x s e a t", "y")],
     {"s": whole(-1), "e": whole(-9999), "a": whole(3), "t": whole(-1)}),
    ("Expand", {"x": ("batch", 1, 8)}, [node("Expand", "x s", "y")], {"s": whole(1, 3, 8)}),
    ("Tile", X, [node("Tile", "x s", "y")], {"s": whole(1, 1, 2, 3)}),
    ("Pad", X, [node("Pad", "x p", "y")], {"p": whole(0, 0, 1, 2, 0, 0, 3, 0)}),
    ("Pad by what is there", X, [node("Pad", "x p", "y", mode="reflect")], {"p": whole(0, 0, 1, 2, 0, 0, 2, 1)}),
    ("Gather", X, [node("Gather", "x i", "y", axis=3)], {"i": whole(0, -1, 3)}),
    ("Gather one", X, [node("Gather", "x i", "y", axis=1)], {"i": np.int64(2)}),
    ("Gather from a table", {"i": ("batch", 3)}, [node("Gather", "w i", "y")], {"w": floats(9, 4)}),
    ("GatherElements", {"x": ("batch", 9)}, [node("GatherElements", "x i", "y", axis=0)],
     {"i": np.zeros((1, 9), np.int64)}),
    ("GatherND", X, [node("GatherND", "x i", "y")], {"i": np.array([[0, 1], [1, 3]])}),
    ("ScatterND", {"x": (3, 4)}, [node("ScatterND", "x i v", "y")], {"i": np.array([[1]]), "v": floats(1, 4)}),
    ("ScatterElements", {"x": (3, 4)}, [node("ScatterElements", "x i v", "y", axis=1)],
     {"i": np.array([[1], [2], [0]]), "v": floats(3, 1)}),
    ("ArgMax", X, [node("ArgMax", "x", "y", axis=1)], {}),
    ("ArgMin", X, [node("ArgMin", "x", "y", axis=-1, keepdims=0)], {}),
    ("TopK", X, [node("TopK", "x k", "y i")], {"k": whole(3)}),
    ("CumSum", X, [node("CumSum", "x a", "y")], {"a": np.int64(2)}),
    ("Trilu", X, [node("Trilu", "x", "y", upper=0)], {}),
    ("OneHot", {"i": ("batch", 3)}, [node("OneHot", "i d v", "y")], {"d": whole(9), "v": np.array([0, 1], np.float32)}),
    ("Range ConstantOfShape", X, [
        node("Shape", "x", "s"), node("Gather", "s i", "n"), node("Range", "i n o", "r"),
        node("Unsqueeze", "n a", "nn"),
        node("ConstantOfShape", "nn", "z"), node("Cast", "r", "rr", to=1), node("Add", "rr z", "y"),
    ], {"i": np.int64(0), "o": np.int64(1), "a": whole(0)}),
    ("Shape from and to", X, [node("Shape", "x", "s", start=1, end=3), node("Cast", "s", "y", to=1)], {}),
    ("Size", X, [node("Size", "x", "s"), node("Cast", "s", "t", to=1), node("Div", "x t", "y")], {}),
    ("DepthToSpace", X, [node("DepthToSpace", "x", "y", blocksize=2)], {}),
    ("DepthToSpace, columns first", X, [node("DepthToSpace", "x", "y", blocksize=2, mode="CRD")], {}),
    ("SpaceToDepth", X, [node("SpaceToDepth", "x", "y", blocksize=2)], {}),
    ("Resize", X, [node("Resize", "x _ s", "y", mode="nearest")], DOUBLE),
    ("Resize, asymmetric", X, [
        node("Resize", "x _ s", "y", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    ], DOUBLE),
    ("Resize, linear", X, [node("Resize", "x _ s", "y", mode="linear")], DOUBLE),
    ("Resize, cubic", X, [node("Resize", "x _ s", "y", mode="cubic", cubic_coeff_a=-0.75)], DOUBLE),
    *((op, X, [node(op, "x a", "y", keepdims=0)], {"a": whole(1, -1)})
      for op in SUMS.split()),
    ("ReduceMean of all", X, [node("ReduceMean", "x", "m"), node("Sub", "x m", "y")], {}),
]  # fmt: skip
OLD = [
    ("Softmax before 13", X, [node("Softmax", "x", "y", axis=2)], {}, 11),
    (
        "Squeeze before 13",
        X,
        [node("Unsqueeze", "x", "t", axes=[1]), node("Squeeze", "t", "y", axes=[1])],
        {},
        11,
    ),
    ("ReduceSum before 13", X, [node("ReduceSum", "x", "y", axes=[1], keepdims=1)], {}, 11),
    ("Pad before 11", X, [node("Pad", "x", "y", pads=[0, 0, 1, 2, 0, 0, 3, 0])], {}, 9),
    (
        "Slice before 10",
        X,
        [node("Slice", "x", "y", axes=[2, 3], starts=[1, 0], ends=[9999, -1])],
        {},
        9,
    ),
    ("Clip before 11", X, [node("Clip", "x", "y", min=-0.5, max=0.5)], {}, 9),
    (
        "Upsample",
        X,
        [node("Upsample", "x s", "y", mode="nearest")],
        {"s": np.array([1, 1, 2, 2], np.float32)},
        9,
    ),
    ("Gemm before 11", ROW, [node("Gemm", "x w b", "y")], {"w": floats(12, 5), "b": floats(5)}, 9),
    ("Dropout", X, [node("Dropout", "x", "y")], {}, 9),
]
NEW = [
    ("RMSNormalization", X, [node("RMSNormalization", "x a", "y")], {"a": floats(8)}, 23),
    ("Attention", {"x": ("batch", 5, 8)}, [
        node("Attention", "x x x", "y", q_num_heads=2, kv_num_heads=2)
    ], {}, 23),
]  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "nodes", "tensors", "opset"),
    [(i, n, t, 21) for _, i, n, t in CASES] + [(i, n, t, o) for _, i, n, t, o in OLD + NEW],
    ids=[case[0] for case in (*CASES, *OLD, *NEW)],
)
def test_an_operator_is_what_onnxruntime_computes(inputs, nodes, tensors, opset, tmp_path):
    kinds = {"i": TensorProto.INT64} if "i" in inputs else {}
    place = save(tmp_path / "m.onnx", nodes, inputs, tensors, opset=opset, kinds=kinds)
    made = module(place)

    def feeds(rows):
        return {
            n: torch.from_numpy(
                NUMBERS.integers(0, 9, (rows, *s[1:])) if n == "i"
                else floats(rows if s[0] == "batch" else s[0], *s[1:])
            )
            for n, s in inputs.items()
        }  # fmt: skip

    first = feeds(2)
    dims = {n: {0: "batch"} if s[0] == "batch" else {} for n, s in inputs.items()}
    graph = trace(made, first, dims=dims).only()
    for given in (first, feeds(3)) if any(dims.values()) else (first,):
        (wanted,) = run(place, given)[:1]
        found = graph.run(given)["y"].numpy()
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def test_what_is_tested_is_what_is_read():
    tested = {n.op_type for case in (*CASES, *OLD, *NEW) for n in case[2]}
    left = {op for op in WRITTEN if not op.startswith("com.microsoft")} - tested
    assert left == {"CastLike", "Constant", "Swish"}
