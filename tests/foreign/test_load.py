"""ONNX files of others: what is read, and what is refused and in which words."""

import os

import numpy as np
import onnx
import pytest
from nets import Net
from onnx import TensorProto, helper

from effc.errors import SourceError
from effc.foreign.file import load


def net() -> Net:
    made = Net()
    x = made.input("x", ["n", 8])
    made.give(made.add("MatMul", x, made.const(made.weight(8, 4), name="w"), out="y"))
    return made


def written(place, model) -> object:
    file = place / "m.onnx"
    file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return file


def refused(file) -> str:
    with pytest.raises(SourceError) as caught:
        load(file)
    assert caught.value.hint
    return str(caught.value)


def test_a_file_is_read_with_its_weights(tmp_path):
    model = load(net().save(tmp_path / "m.onnx"))
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert model.graph.initializers["w"].const_value.numpy().shape == (8, 4)


def test_weights_beside_the_file_are_read(tmp_path):
    onnx.save(
        net().model(), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin",
        size_threshold=0,
    )  # fmt: skip
    weight = load(tmp_path / "m.onnx").graph.initializers["w"].const_value.numpy()
    assert np.isfinite(weight).all() and weight.any()


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "c:w.bin"])
def test_weights_that_lie_elsewhere_are_refused(tmp_path, location):
    (tmp_path / "w.bin").write_bytes(bytes(128))
    (tmp_path / "in").mkdir()
    model = net().model()
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location)
    model.graph.initializer[0].ClearField("raw_data")
    assert "is refused as the name of a file" in refused(written(tmp_path / "in", model))


def test_weights_behind_a_link_are_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(128))
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "secret", tmp_path / "in" / "w.bin")
    model = net().model()
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "w.bin")
    model.graph.initializer[0].ClearField("raw_data")
    assert "is not a plain file" in refused(written(tmp_path / "in", model))


def test_a_truncated_file_is_refused(tmp_path):
    whole = net().model().SerializeToString()
    for size in (1, 7, len(whole) // 2, len(whole) - 1):
        assert "can be read" in refused(written(tmp_path, whole[:size]))


@pytest.mark.parametrize("content", [b"", b"not an onnx file", bytes(4096), b"\x0a" * 1000])
def test_what_is_no_onnx_is_refused(tmp_path, content):
    assert "is no ONNX file" in refused(written(tmp_path, content))


def test_a_file_of_three_gigabytes_is_refused_unread(tmp_path):
    with open(tmp_path / "m.onnx", "wb") as stream:
        stream.truncate(3 << 30)  # a hole: it takes no room
    assert "more than an ONNX file can have" in refused(tmp_path / "m.onnx")


def test_a_graph_nested_without_end_is_refused(tmp_path):
    def field(number: int, content: bytes) -> bytes:
        size, length = b"", len(content)
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    graph = b""
    for _ in range(200):  # a graph in an attribute of a node of a graph
        graph = field(1, field(5, field(6, graph)))
    refused(written(tmp_path, field(7, graph)))


def test_a_cycle_is_refused(tmp_path):
    made = net()
    made.nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "second"),
        helper.make_node("Relu", ["b"], ["y"], "third"),
    ]
    assert "the graph has a cycle" in refused(written(tmp_path, made.model()))


def test_a_value_that_is_made_twice_is_refused(tmp_path):
    made = net()
    made.nodes.append(helper.make_node("Relu", ["x"], ["y"], "again"))
    assert "node 'again' (Relu) writes 'y', which is written already" in refused(
        written(tmp_path, made.model())
    )


@pytest.mark.parametrize("opset", [0, 3, 99])
def test_an_opset_that_nobody_knows_is_refused(tmp_path, opset):
    model = net().model()
    model.opset_import[0].version = opset
    assert f"it has opset {opset}, and 7 to" in refused(written(tmp_path, model))


def test_a_tensor_that_is_not_as_long_as_its_shape_is_refused(tmp_path):
    model = net().model()
    model.graph.initializer[0].dims[0] = 1 << 40
    assert "tensor 'w' has 128 bytes and needs" in refused(written(tmp_path, model))
    model.graph.initializer[0].dims[0] = -8
    assert "negative size" in refused(written(tmp_path, model))
    model.graph.initializer[0].dims[0] = 8
    model.graph.initializer[0].data_type = 77
    assert "unknown type 77" in refused(written(tmp_path, model))


def test_branches_read_what_is_outside_of_them(tmp_path):
    made = net()
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    other = helper.make_tensor_value_info("p", TensorProto.FLOAT, None)
    then = helper.make_graph([helper.make_node("Relu", ["y"], ["o"], "r")], "t", [], [out])
    orelse = helper.make_graph([helper.make_node("Neg", ["nobody"], ["p"], "n")], "e", [], [other])
    flag = made.const(np.array(True))
    made.nodes.append(
        helper.make_node("If", [flag], ["z"], "if", then_branch=then, else_branch=then)
    )
    made.give("z")
    assert len(list(load(written(tmp_path, made.model())).graph.all_nodes())) == 4
    made.nodes[-1] = helper.make_node(
        "If", [flag], ["z"], "if", then_branch=then, else_branch=orelse
    )
    assert "node 'n' (Neg) reads 'nobody', which nothing makes" in refused(
        written(tmp_path, made.model())
    )


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.onnx")
    assert "not a plain file" in refused(tmp_path / "m.onnx")


def test_an_operator_without_what_it_must_have_is_refused(tmp_path):
    model = net().model()
    model.graph.node[0].input[1] = ""
    assert "node 'MatMul_0' (MatMul) has no B" in refused(written(tmp_path, model))
    del model.graph.node[0].input[1:]
    assert "node 'MatMul_0' (MatMul) has 1 inputs" in refused(written(tmp_path, model))


def test_a_function_is_held_to_the_operators_that_it_imports(tmp_path):
    """Its axes were an attribute until opset 13, and are an input since."""
    body = [helper.make_node("ReduceSum", ["a"], ["b"], "sum", axes=[1])]
    made = net()
    made.nodes = [helper.make_node("Old", ["x"], ["y"], "call", domain="mine")]
    model = made.model()
    model.opset_import.append(helper.make_opsetid("mine", 1))
    old = helper.make_function("mine", "Old", ["a"], ["b"], body, [helper.make_opsetid("", 11)])
    model.functions.append(old)
    assert len(load(written(tmp_path, model)).functions) == 1
    body[0].input.append("a")
    del model.functions[:]
    model.functions.append(
        helper.make_function("mine", "Old", ["a"], ["b"], body, [helper.make_opsetid("", 11)])
    )
    assert "node 'sum' (ReduceSum) has 2 inputs" in refused(written(tmp_path, model))
