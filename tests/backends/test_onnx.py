"""An ONNX file that means what the graph means, under the user's names, the same bytes every time."""

import os
from dataclasses import replace as changed

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graphs import Call, LlamaNorm, Tied, batches, distance, engine, lower, normal, quantize
from torch import nn

import effc
from effc.backends.dialect import ONNX
from effc.backends.onnx import Onnx, to_onnx, unsupported
from effc.errors import LoweringError

pytestmark = pytest.mark.slow


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8))


def quantized(module, *shape, **options):
    program = effc.trace(module.eval(), normal(2, *shape[1:]))
    name = program.only().inputs[0]
    data = batches(name, *shape) if options.get("activation_bits") != 16 else None
    quantize(program, data, dialect=ONNX, **options)
    return program


@pytest.mark.parametrize(
    ("module", "shape", "options"),
    [
        (encoder(), (8, 16), {}),
        (encoder(), (8, 16), {"activation_bits": 16}),
        (encoder(), (8, 16), {"activation_bits": 16, "bits": 4, "group": 16}),
        (encoder(), (8, 16), {"bits": 6, "activation_bits": 6}),
        (encoder(), (8, 16), {"activation_signed": True, "activation_symmetric": True}),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), (2, 3, 8, 8), {}),
        (nn.Sequential(nn.Linear(16, 16), LlamaNorm(16)), (8, 16), {}),
    ],
    ids=["int8", "weight-only", "4 bit in groups", "6 bit", "signed", "conv", "rms norm"],
)
def test_the_file_computes_what_the_graph_computes(module, shape, options, tmp_path):
    program = quantized(module, *shape, **options)
    lower(program, tmp_path, "onnx")
    (name,) = program.only().inputs
    x = normal(*shape, seed=7)
    (wanted,) = program.run({name: x}).values()
    (found,) = as_written(tmp_path / "model.onnx", {name: x.numpy()})
    assert distance(wanted, found) < 1e-5


def as_written(file, feeds):
    """The file run node by node, without the optimiser, which has its own mind about weight-only layers."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def test_a_float_model_agrees_to_the_last_bits(tmp_path):
    program = effc.trace(encoder(), normal(2, 16))
    x = normal(8, 16)
    with engine(program, tmp_path, "onnx") as opened:
        assert (
            distance(program.run(input=x)["output"], opened({"input": x.numpy()})["output"]) < 1e-6
        )


def test_quantise_and_dequantise_stay_what_they_are(tmp_path):
    program = quantized(encoder(), 8, 16)
    lowered = lower(program, tmp_path, "onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 2
    assert kinds.count("DequantizeLinear") == 4
    assert {(o.domain, o.version) for o in model.opset_import if not o.domain} == {("", 21)}
    assert lowered.opset == 21
    assert not any(site.int8 for site in lowered.sites)


def test_names_are_the_users_own(tmp_path):
    class Sum(nn.Module):
        def forward(self, input, id):
            return {"last.state": input + id, "pooled": (input * id).mean(1)}

    dims = {name: {0: "batch", 1: "sequence"} for name in ("input", "id")}
    inputs = {"input": normal(2, 3), "id": normal(2, 3)}
    program = effc.trace(Sum(), inputs, dims=dims)
    lowered = lower(program, tmp_path, "onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph

    def shapes(values):
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    assert shapes(graph.input) == {"input": ["batch", "sequence"], "id": ["batch", "sequence"]}
    assert shapes(graph.output) == {"last.state": ["batch", "sequence"], "pooled": ["batch"]}
    assert [(p.name, p.dtype, p.shape) for p in lowered.inputs] == [
        ("input", "float32", ("batch", "sequence")),
        ("id", "float32", ("batch", "sequence")),
    ]
    with engine(program, tmp_path, "onnx") as opened:
        assert opened({n: np.ones((1, 7), np.float32) for n in inputs})["pooled"].shape == (1,)


def test_outputs_may_have_any_name_and_be_any_value(tmp_path):
    def forward(self, x):
        y = x * 2
        return {"linear": y, "add": x + 1, "mul": x, "again": y, "fixed": self.fixed}

    program = effc.trace(Call(forward, fixed=torch.arange(3.0)), normal(2, 3))
    x = normal(2, 3)
    with engine(program, tmp_path, "onnx") as opened:
        found = opened({"x": x.numpy()})
    wanted = program.run(x=x)
    assert list(found) == list(wanted) == ["linear", "add", "mul", "again", "fixed"]
    for name, value in wanted.items():
        assert np.array_equal(found[name], value), name


def test_one_name_for_an_input_and_an_output_is_refused():
    program = effc.trace(Call(lambda self, x: {"x": x * 2}), normal(2, 3))
    with pytest.raises(LoweringError, match="x of graph 'main' is an input and an output"):
        to_onnx(program.only(), 21)


def test_the_file_tells_nothing_about_the_machine(tmp_path):
    lower(quantized(encoder(), 8, 16), tmp_path, "onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    for word in (
        'File "',
        ".py",
        "site-packages",
        "stack_trace",
        os.getcwd(),
        os.path.expanduser("~/"),
    ):
        assert word.encode() not in content, word


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    files = []
    for place in ("a", "b"):
        lower(quantized(encoder(), 8, 16), tmp_path / place, "onnx")
        files.append((tmp_path / place / "model.onnx").read_bytes())
    assert files[0] == files[1]


def test_lowering_leaves_the_program_alone(tmp_path):
    program = quantized(encoder(), 8, 16)
    before = effc.show(program)
    lower(program, tmp_path, "onnx")
    assert effc.show(program) == before


def test_a_tied_table_is_written_once(tmp_path):
    program = effc.trace(Tied(words=100, size=16), torch.ones(2, 6, dtype=torch.int64))
    lower(program, tmp_path, "onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 1.5 * 100 * 16 * 4


class Twice(nn.Module):
    """Two layers whose biases are equal, and one tensor under two names."""

    def __init__(self, step):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        nn.init.zeros_(self.one.bias)
        nn.init.constant_(self.two.bias, step)
        self.three.bias = self.one.bias

    def forward(self, x):
        return self.three(self.two(self.one(x).relu()).relu())


def test_a_graph_does_not_hang_on_which_weights_are_equal():
    """One tensor of the model is one in the file, and two that a training moves apart are two from the start."""
    same, apart = (
        to_onnx(effc.trace(Twice(step), torch.ones(2, 8)).only(), 21).graph for step in (0.0, 0.5)
    )
    assert {*same.initializers} == {*apart.initializers}
    assert len([n for n in same.initializers if n.endswith("bias")]) == 2


def test_all_that_cannot_be_written_is_named_at_once():
    @torch.library.custom_op("graphs::strange", mutates_args=())
    def strange(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @strange.register_fake
    def _(x):
        return torch.empty_like(x)

    @torch.library.custom_op("graphs::stranger", mutates_args=())
    def stranger(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @stranger.register_fake
    def _(x):
        return torch.empty_like(x)

    module = nn.Sequential(nn.Linear(4, 4), Call(lambda self, x: stranger(strange(x))), nn.ReLU())
    graph = effc.trace(module, normal(2, 4)).only()
    found = unsupported(graph, 23)
    assert [(u.node, u.op) for u in found] == [("1", "strange"), ("1", "stranger")]
    assert "no ONNX translation is known for graphs.strange" in found[0].reason
    assert Onnx().supports(graph) == found
    with pytest.raises(LoweringError, match="graph 'main' cannot be written as ONNX opset 21"):
        to_onnx(graph, 21)


def test_what_can_be_written_is_not_refused():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.SiLU(), LlamaNorm(6), nn.Flatten(), nn.Linear(144, 4)
    )
    program = quantized(module, 2, 3, 8, 8)
    assert unsupported(program.only(), 23) == []


def test_a_lowered_file_does_not_depend_on_the_folder(tmp_path):
    program = effc.trace(encoder(), normal(2, 16))
    one, two = lower(program, tmp_path / "one", "onnx"), lower(program, tmp_path / "two", "onnx")
    assert changed(two, directory=one.directory) == one
