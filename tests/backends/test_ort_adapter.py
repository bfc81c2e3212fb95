"""One session serves several adapters in turn: each gives what merging it into the weights gives."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gated import DIMS, Block, X, stirred, traced
from graphs import assert_graph, distance, lower, quantize

import effc
from effc.calib.data import Batch
from effc.errors import PackageError, PreconditionError, SourceError
from effc.passes.lora import AttachLora, MergeLora
from effc.passes.lora_swap import SwapLora

KINDS = ({"rank": 3, "alpha": 5}, {"rank": 1}, {"rank": 4, "form": "rslora"})


def tuned(number, **options):
    """The model with an adapter that was trained, as stirring has it."""
    program = traced()
    effc.apply(AttachLora(**{**KINDS[number], "seed": number, **options}), program)
    return stirred(program, by=0.2 + 0.1 * number)


def saved(number, place, **options):
    """Its adapter in PEFT's form, and what the model gives with it merged."""
    program = tuned(number, **options)
    effc.save_adapter(program, place)
    effc.apply(MergeLora(), program)
    return place, program.run({"x": X})["output"].numpy()


def with_active(run, file):
    """What a session gives with an adapter; options know no more than where it lies in memory, so that it is held."""
    held = onnxruntime.LoraAdapter()
    held.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(held)
    return run.run(None, {"x": X.numpy()}, options)[0]


def session(program, place):
    lower(program, place)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(place / "model.onnx"), options)


def test_adapters_are_constants_as_they_are_multiplied():
    program = tuned(0, select=effc.Select(module="up"))
    record = effc.apply(SwapLora(), program, probes={"main": [{"x": X}]})
    assert record.sites == 1 and record.drift.rel_l2 < 1e-6
    assert_graph(
        program,
        """
        %x: f32[batch, sequence, 12] = input
        %linear: f32[batch, sequence, 16] = linear(%x, @up.weight, @up.bias)
        %matmul: f32[batch, sequence, 3] = matmul(%x, @up.swap_A)
        %matmul_1: f32[batch, sequence, 16] = matmul(%matmul, @up.swap_B)
        %add_1: f32[batch, sequence, 16] = add(%linear, %matmul_1)
        %relu: f32[batch, sequence, 16] = relu(%add_1)
        %linear_1: f32[batch, sequence, 12] = linear(%relu, @down.weight, @down.bias)
        return output=%linear_1
        """,
    )


def test_layers_that_share_an_adapter_share_what_is_exchanged():
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 12)
    program = effc.trace(torch.nn.Sequential(layer, torch.nn.ReLU(), layer).eval(), X[0])
    effc.apply(AttachLora(rank=2), program)
    program = stirred(program)
    (name,) = program.only().inputs
    record = effc.apply(SwapLora(), program, probes={"main": [{name: X[0]}]})
    assert record.sites == 2 and record.drift.rel_l2 < 1e-6
    assert len([n for n in program.only().tensors() if ".swap_" in n]) == 2


@pytest.mark.parametrize("base", ["float", "int4", "int8"])
def test_one_session_gives_for_each_what_merging_gives(base, tmp_path):
    program = traced()
    if base == "int4":
        quantize(program, activation_bits=16, bits=4, group=4)
    elif base == "int8":
        quantize(program, [Batch(inputs={"x": X.numpy()})])
    fresh = program.clone()
    effc.apply(AttachLora(rank=2), program)  # B is 0, of all layers alike
    effc.apply(SwapLora(), program)
    run = session(program, tmp_path / "engine")
    assert [port.name for port in run.get_inputs()] == ["x"]
    own = run.run(None, {"x": X.numpy()})[0]
    rounded, near = (1e-6, 1e-6) if base == "float" else (0.02, 0.2)  # kernels, and the base itself
    assert distance(fresh.run({"x": X})["output"], own) < rounded
    for number in range(3):
        place, wanted = saved(number, tmp_path / f"{number}")
        file = tmp_path / f"{number}.onnx_adapter"
        effc.onnx_adapter(tmp_path / "engine" / "model.onnx", place, file)
        found = with_active(run, file)
        assert distance(wanted, found) < near < 0.3 < distance(wanted, own)
        beside = fresh.clone()
        effc.apply(AttachLora(adapter=str(place)), beside)
        assert distance(beside.run({"x": X})["output"], found) < rounded
    assert np.array_equal(own, run.run(None, {"x": X.numpy()})[0])  # nothing stays behind


def test_what_an_adapter_leaves_alone_has_none(tmp_path):
    """The engine's own adapter of such a layer is not mixed into another's."""
    program = tuned(0)
    effc.apply(SwapLora(), program)
    run = session(program, tmp_path / "engine")
    place, wanted = saved(1, tmp_path / "up", select=effc.Select(module="up"))
    effc.onnx_adapter(tmp_path / "engine" / "model.onnx", place, tmp_path / "up.onnx_adapter")
    found = with_active(run, tmp_path / "up.onnx_adapter")
    assert distance(wanted, found) < 1e-6


def test_a_package_says_what_it_takes(tmp_path):
    from effc import recipe
    from kit import cli

    (tmp_path / "model.py").write_text(
        "import sys\nsys.path.insert(0, " + repr(str(effc.__path__[0] + "/../tests")) + ")\n"
        "import effc, torch\nfrom gated import Block, X\n\n"
        "def make():\n"
        "    dims = {'main': {'x': {0: 'batch', 1: 'sequence'}}}\n"
        "    return effc.Source(modules={'main': Block()}, inputs={'main': {'x': X}}, dims=dims)\n",
        encoding="utf-8",
    )
    place, wanted = saved(0, tmp_path / "support")
    asked = recipe.build({
        "source": {"python": f"{tmp_path / 'model.py'}:make"}, "gate": False, "bench": False,
        "passes": [{"pass": "attach-lora", "adapter": str(place)}, "swap-lora"],
    })  # fmt: skip
    effc.compile(asked, tmp_path / "OUT")
    assert cli("verify", tmp_path / "OUT").code == 0
    with effc.Engine.open(tmp_path / "OUT") as engine:
        assert distance(wanted, engine({"x": X.numpy()})["output"]) < 1e-6
    open_ones = {value.name for value in onnx.load(tmp_path / "OUT" / "model.onnx").graph.input}
    assert open_ones == {"x", *(f"{n}.swap_{w}" for n in ("up", "down") for w in "AB")}


def test_what_cannot_be_exchanged_is_refused(tmp_path):
    program = traced()
    with pytest.raises(PreconditionError, match="no adapter is attached to 'main'"):
        effc.apply(SwapLora(), program)
    effc.apply(AttachLora(rank=2, form="dora"), program)
    with pytest.raises(PreconditionError, match="DoRA's form"):
        effc.apply(SwapLora(), program)
    lower(traced(), tmp_path / "closed")
    place, _ = saved(0, tmp_path / "0")
    with pytest.raises(SourceError, match="takes no adapters in exchange"):
        effc.onnx_adapter(tmp_path / "closed" / "model.onnx", place, tmp_path / "a.onnx_adapter")
    with pytest.raises(SourceError, match="is no ONNX file"):
        effc.onnx_adapter(place / "adapter_config.json", place, tmp_path / "a.onnx_adapter")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    program = tuned(0, select=effc.Select(module="up"))
    effc.apply(SwapLora(), program)
    lower(program, tmp_path / "engine")
    model, out = tmp_path / "engine" / "model.onnx", tmp_path / "a.onnx_adapter"
    place, _ = saved(0, tmp_path / "both")
    with pytest.raises(PreconditionError, match="takes none for a layer 'down'"):
        effc.onnx_adapter(model, place, out)
    torch.manual_seed(0)
    block = Block()
    block.up, block.down = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12)
    other = effc.trace(block.eval(), {"x": X}, dims=DIMS)
    effc.apply(AttachLora(rank=2, select=effc.Select(module="up")), other)
    effc.save_adapter(other, tmp_path / "wide")
    with pytest.raises(PreconditionError, match=r"up is \[16, 12\] in the engine, and \[20, 12\]"):
        effc.onnx_adapter(model, tmp_path / "wide", out)
    with pytest.raises(SourceError, match="is no adapter"):
        effc.onnx_adapter(model, tmp_path / "nowhere", out)
    with pytest.raises(PackageError, match="no name of an adapter's file"):
        effc.onnx_adapter(model, place, tmp_path / "a.onnx")
    assert not out.exists()
