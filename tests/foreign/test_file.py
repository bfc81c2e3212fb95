"""What an ONNX file may not be, and that each refusal names the place and says what to do."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import node, save

from effc.errors import SourceError
from effc.foreign import file
from effc.source import from_onnx

X = {"x": ("batch", 4)}
W = {"w": np.eye(4, dtype=np.float32)}


def linear(place, **options):
    return save(place, [node("MatMul", "x w", "y")], X, W, **options)


def refused(place, *parts):
    """A file is refused by a letter with those words, and with a next step."""
    with pytest.raises(SourceError) as found:
        from_onnx(place)
    said = str(found.value)
    assert all(part in said for part in parts), said
    assert found.value.hint


def changed(place, change):
    model = onnx.load(place, load_external_data=False)
    change(model)
    onnx.save(model, place)
    return place


def outside(place, location):
    """The file with its weights at a `location`."""
    data = place.parent / "w.bin"
    data.write_bytes(np.eye(4, dtype=np.float32).tobytes())

    def change(model):
        (tensor,) = model.graph.initializer
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        tensor.external_data.add(key="length", value="64")

    return changed(linear(place), change)


def test_a_plain_file_is_read(tmp_path):
    source = from_onnx(linear(tmp_path / "m.onnx"))
    assert source.file == tmp_path / "m.onnx" and source.kind == "module"
    assert source.dims["main"] == {"x": {0: "batch"}}


def test_weights_beside_the_file_are_read(tmp_path):
    source = from_onnx(outside(tmp_path / "m.onnx", "w.bin"))
    assert sum(p.numel() for p in source.module.parameters()) == 16


def test_weights_are_part_of_what_a_file_is(tmp_path):
    place = outside(tmp_path / "m.onnx", "w.bin")
    before = file.digest(place, file.parsed(place))
    (tmp_path / "w.bin").write_bytes(np.zeros(16, np.float32).tobytes())
    assert file.digest(place, file.parsed(place)) != before


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "C:\\w.bin", "", "nul"]
)
def test_weights_that_lead_elsewhere_are_refused(location, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(64))
    refused(outside(tmp_path / "inner" / "m.onnx", location), "tensor 'w'")


def test_weights_behind_a_link_are_refused(tmp_path):
    (tmp_path / "real.bin").write_bytes(bytes(64))
    place = outside(tmp_path / "m.onnx", "link.bin")
    (tmp_path / "link.bin").symlink_to(tmp_path / "real.bin")
    refused(place, "tensor 'w'", "not a plain file")


def test_weights_that_are_gone_or_short_are_refused(tmp_path):
    refused(outside(tmp_path / "m.onnx", "gone.bin"), "gone.bin is missing")
    (tmp_path / "short.bin").write_bytes(bytes(8))
    refused(outside(tmp_path / "m.onnx", "short.bin"), "ends at byte 64", "which has 8")


def test_a_file_beyond_protobuf_is_refused_by_its_size(tmp_path):
    place = linear(tmp_path / "m.onnx")
    os.truncate(place, 3 << 30)  # it has holes, and takes no room
    refused(place, "3221225472 bytes", "save_as_external_data")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_file_cut_short_is_refused(share, tmp_path):
    place = linear(tmp_path / "m.onnx")
    os.truncate(place, int(place.stat().st_size * share))
    refused(place, "m.onnx")


def test_a_file_that_is_something_else_is_refused(tmp_path):
    place = tmp_path / "m.onnx"
    refused(place, "cannot be read")
    place.write_text("import os", encoding="utf-8")
    refused(place, "m.onnx")
    place.unlink()
    os.mkfifo(place)
    refused(place, "not a plain file")


@pytest.mark.parametrize("opset", [6, 99])
def test_an_unknown_opset_is_refused(opset, tmp_path):
    place = changed(
        linear(tmp_path / "m.onnx"), lambda m: setattr(m.opset_import[0], "version", opset)
    )
    refused(place, f"opset {opset}", "opset_version")


def test_an_unknown_domain_is_refused_with_the_node(tmp_path):
    nodes = [helper.make_node("Fancy", ["x"], ["y"], name="mine", domain="com.example")]
    place = save(tmp_path / "m.onnx", nodes, X, domains={"com.example": 1})
    refused(place, "node 'mine' (Fancy)", "com.example")


def test_an_unknown_operator_is_refused_with_the_node(tmp_path):
    place = save(tmp_path / "m.onnx", [helper.make_node("Hardmax", ["x"], ["y"], name="odd")], X)
    refused(place, "node 'odd' (Hardmax)", "1 operator of")


def test_control_flow_is_refused_with_the_node(tmp_path):
    empty = helper.make_graph(
        [node("Identity", "x", "z")], "then", [], [helper.make_empty_tensor_value_info("z")]
    )
    flow = helper.make_node("If", ["c"], ["y"], name="fork", then_branch=empty, else_branch=empty)
    nodes = [
        node("ReduceSum", "x", "s", keepdims=0),
        node("Cast", "s", "c", to=TensorProto.BOOL),
        flow,
    ]
    refused(
        save(tmp_path / "m.onnx", nodes, X, domains={"a": 1}), "node 'fork' (If)", "control flow"
    )


def test_a_loop_is_refused_with_the_node(tmp_path):
    body = helper.make_graph(
        [node("Identity", "going", "go")], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("going", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("go", TensorProto.BOOL, [])],
    )  # fmt: skip
    nodes = [
        helper.make_node("Loop", ["n", ""], [], name="again", body=body),
        node("Relu", "x", "y"),
    ]
    place = save(tmp_path / "m.onnx", nodes, X, {"n": np.int64(3)}, domains={"a": 1})
    refused(place, "node 'again' (Loop)")


def test_a_cycle_is_refused_with_a_node_in_it(tmp_path):
    def change(model):
        model.graph.node[0].input[0] = "b"

    nodes = [node("Relu", "x", "a"), node("Abs", "a", "b"), node("Add", "b x", "y")]
    refused(changed(save(tmp_path / "m.onnx", nodes, X), change), "cycle")


def test_nodes_out_of_order_are_read(tmp_path):
    def change(model):
        first, second = model.graph.node
        del model.graph.node[:]
        model.graph.node.extend([second, first])

    place = changed(
        save(tmp_path / "m.onnx", [node("Relu", "x", "a"), node("Abs", "a", "y")], X), change
    )
    assert [step.op for step in from_onnx(place).module.steps.steps] == ["Relu", "Abs"]


def test_a_value_of_two_makers_or_none_is_refused(tmp_path):
    nodes = [node("Relu", "x", "y"), node("Abs", "x", "y")]
    refused(save(tmp_path / "two.onnx", nodes, X, domains={"a": 1}), "'y'", "written already")
    nodes = [node("Add", "x nowhere", "y")]
    refused(save(tmp_path / "none.onnx", nodes, X, domains={"a": 1}), "'nowhere'", "nothing makes")


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path):
    weights = {"w": np.full((4, 4), np.nan, np.float32)}
    refused(save(tmp_path / "m.onnx", [node("MatMul", "x w", "y")], X, weights), "not numbers: 'w'")


def test_weights_of_half_precision_are_refused_by_name(tmp_path):
    nodes = [node("Cast", "w", "v", to=TensorProto.FLOAT), node("MatMul", "x v", "y")]
    place = save(tmp_path / "m.onnx", nodes, X, {"w": np.eye(4, dtype=np.float16)})
    refused(place, "tensor 'w' is float16")


def test_sparse_weights_are_refused(tmp_path):
    def change(model):
        values = numpy_helper.from_array(np.ones(1, np.float32), "s")
        places = numpy_helper.from_array(np.zeros(1, np.int64), "p")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))

    refused(changed(linear(tmp_path / "m.onnx"), change), "sparse")


def test_inputs_that_are_no_tensors_are_refused(tmp_path):
    def change(model):
        kind = helper.make_sequence_type_proto(
            helper.make_tensor_type_proto(TensorProto.FLOAT, [4])
        )
        model.graph.input.append(helper.make_value_info("list", kind))

    refused(changed(linear(tmp_path / "m.onnx"), change), "input 'list' is no tensor")


def test_inputs_of_half_precision_are_refused(tmp_path):
    nodes = [node("Cast", "h", "y", to=TensorProto.FLOAT)]
    place = save(tmp_path / "m.onnx", nodes, {"h": ("batch", 4)}, kinds={"h": TensorProto.FLOAT16})
    refused(place, "input 'h' is float16")


def test_a_size_that_data_decide_is_refused_with_the_node(tmp_path):
    nodes = [node("Reshape", "x s", "y")]
    place = save(tmp_path / "m.onnx", nodes, {**X, "s": (2,)}, kinds={"s": TensorProto.INT64})
    refused(place, "(Reshape)", "hangs on data")


def test_functions_are_written_out(tmp_path):
    place = save(tmp_path / "m.onnx", [helper.make_node("Twice", ["x"], ["y"], domain="mine")], X,
                 domains={"mine": 1})  # fmt: skip

    def change(model):
        opset = [helper.make_opsetid("", 21)]
        model.functions.append(
            helper.make_function("mine", "Twice", ["a"], ["b"], [node("Add", "a a", "b")], opset)
        )

    assert [s.op for s in from_onnx(changed(place, change)).module.steps.steps] == ["Add"]
