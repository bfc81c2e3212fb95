"""A model repository of Triton, read by tritonclient's own messages and held to the rules of the server's backends."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

DTYPES = {
    "TYPE_INT64": "int64", "TYPE_INT32": "int32", "TYPE_FP32": "float32", "TYPE_FP16": "float16", "TYPE_BOOL": "bool",
    "TYPE_UINT8": "uint8", "TYPE_INT8": "int8",
}  # fmt: skip


def messages():
    """tritonclient's `model_config_pb2`, by its file: the package around it wants grpc, which these messages do not."""
    pytest.importorskip("google.protobuf")
    client = importlib.util.find_spec("tritonclient")
    if client is None:
        pytest.skip("tritonclient is not installed")
    file = Path(client.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_MESSAGES = []


def parsed(text):
    """A config as the server reads it; a field that it does not know is an error."""
    from google.protobuf import text_format

    if not _MESSAGES:
        _MESSAGES.append(messages())
    return text_format.Parse(text, _MESSAGES[0].ModelConfig())


def config(repository, name):
    return parsed((repository / name / "config.pbtxt").read_text(encoding="utf-8"))


def kind(port):
    """`TYPE_FP32` of a port."""
    return _MESSAGES[0].DataType.Name(port.data_type)


class Server:
    """Answers requests by the models of a repository, on the runtimes that the backends of Triton stand on."""

    def __init__(self, repository):
        self.repository = repository
        self.configs = {
            p.parent.name: config(repository, p.parent.name)
            for p in repository.glob("*/config.pbtxt")
        }
        self.runs = {
            n: self._opened(c) for n, c in self.configs.items() if c.platform != "ensemble"
        }

    def _opened(self, found):
        """Refuses what the backend refuses: other ports, types or sizes than the file has."""
        place = self.repository / found.name / "1" / found.default_model_filename
        ports, run = {"onnxruntime": _on_ort, "openvino": _on_openvino}[found.backend](place, found)
        for side, listed in (("input", found.input), ("output", found.output)):
            assert {p.name for p in listed} == ports[side].keys()
            for port in listed:
                dtype, shape = ports[side][port.name]
                assert DTYPES[kind(port)] == dtype
                sizes = list(port.reshape.shape) if port.HasField("reshape") else list(port.dims)
                assert len(port.dims) >= 1
                if found.max_batch_size:  # the server puts the batch in front
                    assert shape[:1] == [-1], f"{port.name} has no batch of its own"
                    sizes = [-1, *sizes]
                assert sizes == shape, port.name
        return run

    def __call__(self, name, feeds):
        found = self.configs[name]
        assert feeds.keys() == {p.name for p in found.input}
        for port in found.input:
            given = feeds[port.name].shape[1 if found.max_batch_size else 0 :]
            assert len(given) == len(port.dims) and all(
                d in (-1, g) for d, g in zip(port.dims, given, strict=True)
            )
            assert feeds[port.name].dtype == DTYPES[kind(port)]
        if found.max_batch_size:
            assert {len(value) for value in feeds.values()} <= set(
                range(1, found.max_batch_size + 1)
            )
        if found.platform != "ensemble":
            shaped = {
                p.name: _reshaped(feeds[p.name], p, found.max_batch_size) for p in found.input
            }
            return self.runs[name](shaped)
        known = dict(feeds)
        for step in found.ensemble_scheduling.step:
            assert self.configs[step.model_name].max_batch_size >= found.max_batch_size
            made = self(
                step.model_name, {port: known[tensor] for port, tensor in step.input_map.items()}
            )
            known |= {tensor: made[port] for port, tensor in step.output_map.items()}
        return {port.name: known[port.name] for port in found.output}


def _reshaped(value, port, is_batched):
    if not port.HasField("reshape"):
        return value
    return value.reshape([*value.shape[: 1 if is_batched else 0], *port.reshape.shape])


def _on_ort(file, found):
    import onnxruntime

    from effc.backends.ort_engine import _DTYPES, session_options

    session = onnxruntime.InferenceSession(
        file, session_options(1), providers=["CPUExecutionProvider"]
    )
    ports = {
        side: {
            v.name: (_DTYPES[v.type], [s if isinstance(s, int) else -1 for s in v.shape])
            for v in values
        }
        for side, values in (("input", session.get_inputs()), ("output", session.get_outputs()))
    }
    names = [v.name for v in session.get_outputs()]
    return ports, lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def _on_openvino(file, found):
    openvino = pytest.importorskip("openvino")
    asked = {p: v.string_value for p, v in found.parameters.items()}
    settings = {
        "PERFORMANCE_HINT": asked["PERFORMANCE_HINT"],
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
    }
    settings["INFERENCE_PRECISION_HINT"] = "bf16" if asked.get("HINT_BF16") == "YES" else "f32"
    model = openvino.Core().read_model(file)
    ports = {
        side: {
            v.any_name: (
                np.dtype(v.element_type.to_dtype()).name,
                [s.get_length() if s.is_static else -1 for s in v.partial_shape],
            )
            for v in values
        }
        for side, values in (("input", model.inputs), ("output", model.outputs))
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    names = [v.any_name for v in compiled.outputs]
    return ports, lambda feeds: dict(zip(names, compiled(feeds).to_tuple(), strict=True))
