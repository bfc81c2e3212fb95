"""Graphs that break the rules of their operators are looked at all the same: a finding or none, never a crash."""

from collections.abc import Iterator

import onnx
import pytest
from planted_onnx import FAULTS, branches

from effc.errors import SourceError
from effc.lint import run
from effc.lint.rule import TARGETS

SOME = (
    "a Gemm with a float bias", "two halves on one grid", "4 bit in blocks, 8-bit activations", "a clip of int8 codes",
    "a convolution with a bias of another scale", "a value quantised twice", "a weight stored in float",
    "attention in float32", "a batch that is baked in", "int8 read by a product and a sum",
)  # fmt: skip


def spoilt(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model with one input, attribute, output name or tensor of it gone or another."""
    for number, node in enumerate(model.graph.node):
        for place in range(len(node.input)):
            for word in ("", *[v.name for v in model.graph.input]):
                copy = onnx.ModelProto.FromString(model.SerializeToString())
                copy.graph.node[number].input[place] = word
                yield copy
        for count in (0, 1):
            copy = onnx.ModelProto.FromString(model.SerializeToString())
            del copy.graph.node[number].input[count:]
            yield copy
        for place in range(len(node.attribute)):
            copy = onnx.ModelProto.FromString(model.SerializeToString())
            copy.graph.node[number].attribute[place].i = 7
            yield copy
            del copy.graph.node[number].attribute[place]
            yield copy
    for number, tensor in enumerate(model.graph.initializer):
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        size = 1
        for n in tensor.dims:
            size *= n
        del copy.graph.initializer[number].dims[:]
        copy.graph.initializer[number].dims.extend([size, 1, 1])
        yield copy
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    del copy.graph.output[0].type.tensor_type.shape.dim[:]
    yield copy


@pytest.mark.parametrize("title", [*SOME, "branches"])
def test_a_spoilt_graph_is_looked_at(title, tmp_path):
    model = (branches() if title == "branches" else FAULTS[title].build()).model()
    looked = 0
    for number, copy in enumerate(spoilt(model)):
        file = tmp_path / f"{number}.onnx"
        file.write_bytes(copy.SerializeToString())
        for target in TARGETS:
            try:
                run.check(file, run.chosen(target))
                looked += 1
            except SourceError:
                continue
    assert looked >= 15
