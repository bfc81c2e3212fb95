"""What an ONNX file says of itself, read without a runtime and without trust: its ports, and where its data lie."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import onnx

from effc import bounded, paths
from effc.backends.base import Port
from effc.errors import EffcError, PackageError
from effc.external import MOST_BYTES, confined, external


def read(root: Path, name: str) -> onnx.ModelProto:
    """The model in a file below `root`, its external data unread. Raises PackageError."""
    content = bounded.content(paths.opened(root, name), name, PackageError, MOST_BYTES)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(content)
        return model
    except Exception as error:  # protobuf's own, without a public name
        raise PackageError(
            f"{name} is no ONNX file: {error}", where=str(root), hint=bounded.HINT
        ) from error


def problems(
    root: Path,
    name: str,
    *,
    inputs: Sequence[Port] | None = None,
    outputs: Sequence[Port] | None = None,
    opset: int | None = None,
    listed: Container[str] | None = None,
) -> list[str]:
    """What of an ONNX file below `root` is not what is said of it, in words; what is None is not asked.

    `listed` are the files that external data may lie in.
    """
    try:
        model = read(root, name)
        found = external_problems(root, name, model, listed)
        for side, said, values in (
            ("inputs", inputs, _inputs(model)),
            ("outputs", outputs, list(model.graph.output)),
        ):
            has = [_port(value) for value in values]
            if said is not None and has != list(said):
                found.append(f"{name} has {side} {_words(has)}, and not {_words(said)}")
        has_opset = max((o.version for o in model.opset_import if not o.domain), default=0)
        if opset is not None and has_opset != opset:
            found.append(f"{name} has opset {has_opset}, and not {opset}")
    except EffcError as error:
        return [error.what]
    except ValueError as error:  # text in it that is no UTF-8
        return [f"{name} is no ONNX file: {error}"]
    return found


def _inputs(model: onnx.ModelProto) -> list[Any]:
    """Inputs that a caller gives; an old file lists its initialisers there too."""
    owned = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in owned]


def _port(value: Any) -> Port:
    tensor = value.type.tensor_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:
        dtype = "no tensor"
    sizes = (d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return Port(name=value.name, dtype=dtype, shape=tuple(sizes))


def _words(ports: Sequence[Port]) -> str:
    words = [f"{p.name}: {p.dtype} [{', '.join(map(str, p.shape))}]" for p in ports[:4]]
    more = [f"{len(ports) - 4} more"] if len(ports) > 4 else []
    return "; ".join([*words, *more]) or "none"


def external_problems(
    root: Path, name: str, model: onnx.ModelProto, listed: Container[str] | None
) -> list[str]:
    """Every tensor whose bytes outside the file may not be read, and why; `listed` are the files they may lie in."""
    found = []
    sizes: dict[str, int | str] = {}
    for data in external(model):
        if (wrong := data.wrong or confined(root, name, data, listed, sizes)) is not None:
            found.append(f"{name}: tensor {paths.shown(data.tensor)}: {wrong}")
    return found
