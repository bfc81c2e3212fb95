"""How far every quantised place of an engine is from what its own file says, in steps of its grid.

Kernels that multiply integers round a sum that the file's nodes compute in float, so a code may be off by one. The
file is cut at its codes: the engine as it runs gives all of them, and a copy none of whose nodes is fused is fed these
and gives each place's codes anew. No place sees what another one has done, so errors do not add up.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

Array = np.ndarray[Any, np.dtype[Any]]
FED = ".fed"


def steps_off(path: Path, feeds: Mapping[str, Array]) -> dict[str, int]:
    """The most that a code of each place is off by, by its name; places with a constant input have nothing to lose."""
    model = onnx.load(path)
    given = {value.name for value in model.graph.initializer}
    codes = {
        node.output[0]: _kind(model, node)
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in given
    }
    shown = copy.deepcopy(model)
    shown.graph.output.extend(_values(codes))
    ran = _ran(shown, feeds, list(codes), whole=True)
    cut = copy.deepcopy(model)
    for node in cut.graph.node:
        for place, name in enumerate(node.input):
            if name in codes:
                node.input[place] = name + FED
    cut.graph.input.extend(_values({name + FED: kind for name, kind in codes.items()}))
    cut.graph.output.extend(_values(codes))
    fed = {**feeds, **{name + FED: value for name, value in ran.items()}}
    again = _ran(cut, fed, list(codes), whole=False)
    return {
        name: int(np.abs(again[name].astype(np.int32) - ran[name].astype(np.int32)).max())
        for name in codes
    }


def _kind(model: onnx.ModelProto, node: onnx.NodeProto) -> int:
    """The type of the codes that a node gives: that of its zero point."""
    zeros = {value.name: value.data_type for value in model.graph.initializer}
    return zeros[node.input[2]] if len(node.input) > 2 else onnx.TensorProto.UINT8


def _values(kinds: Mapping[str, int]) -> list[onnx.ValueInfoProto]:
    return [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]


def _ran(
    model: onnx.ModelProto, feeds: Mapping[str, Array], names: list[str], *, whole: bool
) -> dict[str, Array]:
    """Values of a model by name, fused as it is where `whole`, else node by node."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if not whole:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = {value.name for value in session.get_inputs()}
    given = {name: value for name, value in feeds.items() if name in wanted}
    return dict(zip(names, session.run(names, given), strict=True))
