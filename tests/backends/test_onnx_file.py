"""An ONNX file says where its data lie; only a listed file of the package itself is taken for an answer."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effc.backends import onnx_file
from effc.backends.base import Port

X = Port(name="x", dtype="float32", shape=("batch", 4))
Y = Port(name="y", dtype="float32", shape=("batch", 4))


def outside(location="data.bin", name="w", **more) -> TensorProto:
    """A tensor of four floats that says it lies in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(*tensors: TensorProto, nodes=(), **parts) -> onnx.ModelProto:
    here = numpy_helper.from_array(np.ones(4, np.float32), "here")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "here"], ["y"]), *nodes],
        "main_graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [here, *tensors],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], **parts)


def problems(root, made: onnx.ModelProto, **words):
    (root / "model.onnx").write_bytes(made.SerializeToString())
    return onnx_file.problems(root, "model.onnx", **words)


def graph_of(*tensors: TensorProto) -> onnx.GraphProto:
    return helper.make_graph([], "inner", [], [], list(tensors))


def in_sparse(tensor: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor, dims=[4])


def node(**attributes) -> onnx.NodeProto:
    made = onnx.NodeProto(op_type="Constant", output=["c"])
    made.attribute.append(onnx.AttributeProto(name="a", **attributes))
    return made


def in_deep_graph(tensor: TensorProto) -> onnx.ModelProto:
    inner = graph_of(tensor)
    for _ in range(8):
        outer = graph_of()
        outer.node.append(node(g=inner))
        inner = outer
    return model(nodes=[node(g=inner)])


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    made = model()
    function = made.functions.add(name="f", domain="mine")
    function.node.append(node(t=tensor))
    return made


def in_default_of_a_function(tensor: TensorProto) -> onnx.ModelProto:
    made = model()
    function = made.functions.add(name="f", domain="mine")
    function.attribute_proto.append(onnx.AttributeProto(name="a", t=tensor))
    return made


def in_training(tensor: TensorProto) -> onnx.ModelProto:
    made = model()
    made.training_info.add(algorithm=graph_of(tensor))
    return made


def in_sparse_initializer(tensor: TensorProto) -> onnx.ModelProto:
    made = model()
    made.graph.sparse_initializer.append(in_sparse(tensor))
    return made


PLACES = {
    "an initialiser": model,
    "a sparse initialiser": in_sparse_initializer,
    "an attribute": lambda t: model(nodes=[node(t=t)]),
    "a list in an attribute": lambda t: model(nodes=[node(tensors=[t])]),
    "a sparse attribute": lambda t: model(nodes=[node(sparse_tensor=in_sparse(t))]),
    "a list of sparse ones": lambda t: model(nodes=[node(sparse_tensors=[in_sparse(t)])]),
    "a graph in a node": lambda t: model(nodes=[node(g=graph_of(t))]),
    "a list of graphs": lambda t: model(nodes=[node(graphs=[graph_of(), graph_of(t)])]),
    "a graph far inside": in_deep_graph,
    "a function": in_function,
    "a default of a function": in_default_of_a_function,
    "the training part": in_training,
}


@pytest.mark.parametrize("place", PLACES)
def test_data_outside_are_found_wherever_they_are_described(tmp_path, place):
    (said,) = problems(tmp_path, PLACES[place](outside("../secret")))
    assert said.startswith("model.onnx: tensor 'w': '../secret' is refused")


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/passwd", "C:\\a", "\\\\host\\a", "a/../../b", "", "a\0b", "x" * 300],
)
def test_a_location_that_leads_outside_is_refused(tmp_path, location):
    (said,) = problems(tmp_path, model(outside(location)))
    assert "is refused as the name of a file" in said


@pytest.fixture
def root(tmp_path):
    place = tmp_path / "root"
    (place / "deep").mkdir(parents=True)
    (place / "data.bin").write_bytes(bytes(32))
    (tmp_path / "secret").write_bytes(bytes(32))
    return place


def test_data_in_a_listed_file_are_taken(root):
    assert problems(root, model(outside(offset=16, length=16)), listed={"data.bin"}) == []
    assert problems(root, model(outside(checksum="a")), listed={"data.bin"}) == []
    (root / "deep" / "model.onnx").write_bytes(model(outside("data.bin")).SerializeToString())
    (root / "deep" / "data.bin").write_bytes(bytes(16))
    found = onnx_file.problems(root, "deep/model.onnx", listed={"deep/data.bin"})
    assert found == []


def test_data_in_a_file_that_nobody_lists_are_refused(root):
    (said,) = problems(root, model(outside()), listed={"other.bin"})
    assert "its data lie in data.bin, which the manifest does not list" in said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: (root / "a").symlink_to("../secret"), "a is not a plain file"),
        (lambda root: (root / "a").symlink_to("data.bin"), "a is not a plain file"),
        (lambda root: os.link(root / "../secret", root / "a"), "a has 2 names"),
        (lambda root: os.mkfifo(root / "a"), "a is not a plain file"),
        (lambda root: (root / "a").mkdir(), "a is not a plain file"),
        (lambda root: None, "a is missing"),
    ],
)
def test_data_in_what_is_no_file_of_its_own_are_refused(root, make, said):
    make(root)
    (found,) = problems(root, model(outside("a")), listed={"a"})
    assert said in found


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"offset": 20, "length": 16}, "ends at byte 36 of data.bin, which has 32"),
        ({"offset": 33}, "ends at byte 33"),
        ({"offset": -1}, "no place in numbers"),
        ({"offset": "0x10"}, "no place in numbers"),
        ({"offset": "1" * 20}, "no place in numbers"),
        ({"length": "²"}, "no place in numbers"),
        ({"length": 2**63}, "ends at byte"),
        ({"__class__": "x"}, "described wrongly"),
        ({"basepath": "/etc"}, "described wrongly"),
    ],
)
def test_data_that_cannot_lie_there_are_refused(root, more, said):
    (found,) = problems(root, model(outside(**more)))
    assert said in found


def test_two_locations_of_one_tensor_are_refused(root):
    tensor = outside()
    tensor.external_data.add(key="location", value="../secret")
    (found,) = problems(root, model(tensor))
    assert "described wrongly" in found


def test_a_place_outside_counts_even_where_the_tensor_says_it_lies_inside(root):
    tensor = outside("../secret")
    tensor.data_location = TensorProto.DEFAULT
    (found,) = problems(root, model(tensor))
    assert "'../secret' is refused" in found


def test_ports_and_opset_are_those_that_are_said(root):
    assert problems(root, model(), inputs=[X], outputs=[Y], opset=21) == []
    for change in ({"name": "z"}, {"dtype": "int64"}, {"shape": ("rows", 4)}, {"shape": (2, 4)}):
        other = Port(**{"name": "x", "dtype": "float32", "shape": ("batch", 4), **change})
        (said,) = problems(root, model(), inputs=[other], outputs=[Y], opset=21)
        assert said.startswith("model.onnx has inputs x: float32 [batch, 4], and not")
    (said,) = problems(root, model(), inputs=[X], outputs=[], opset=21)
    assert said == "model.onnx has outputs y: float32 [batch, 4], and not none"
    (said,) = problems(root, model(), opset=20)
    assert said == "model.onnx has opset 21, and not 20"


def test_an_initialiser_that_is_listed_as_input_is_none(root):
    made = model()
    made.graph.input.append(helper.make_tensor_value_info("here", TensorProto.FLOAT, [4]))
    assert problems(root, made, inputs=[X]) == []


@pytest.mark.parametrize("content", [b"no model", b"\x0a\xff", b"\x3a\x7f", b"\x08" * 100])
def test_what_is_no_model_is_said(root, content):
    (root / "model.onnx").write_bytes(content)
    found = onnx_file.problems(root, "model.onnx", inputs=[X])
    assert len(found) == 1
    assert "model.onnx" in found[0]


def test_text_that_is_no_utf8_is_said(root):
    content = model().SerializeToString().replace(b"batch", b"b\xfftch")
    (root / "model.onnx").write_bytes(content)
    (said,) = onnx_file.problems(root, "model.onnx", inputs=[X])
    assert "model.onnx is no ONNX file" in said or "has inputs" in said


def wrapped(field: int, content: bytes) -> bytes:
    """A message as a field of another one, as protobuf writes it."""
    size, text = len(content), b""
    while size > 127:
        text, size = text + bytes([size & 127 | 128]), size >> 7
    return bytes([field << 3 | 2]) + text + bytes([size]) + content


def test_graphs_nested_without_end_are_said(root):
    graph = b""
    for _ in range(400):
        graph = wrapped(1, wrapped(5, wrapped(6, graph)))  # a node, its attribute, the graph in it
    (root / "model.onnx").write_bytes(wrapped(7, graph))
    (said,) = onnx_file.problems(root, "model.onnx")
    assert "no ONNX file" in said
