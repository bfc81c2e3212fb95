"""Command lines as people wrote them: each becomes a graph that builds and computes what was meant."""

import os
from collections.abc import Iterator

import onnx_ir as ir
import pytest
from deployed import DETECTOR, cache, convolutions, denoiser, encoder, explicit, upscaler
from runtimes import on_tensorrt

from effc.migrate import run

BERT = (
    "input_ids:1x8,attention_mask:1x8",
    "input_ids:2x16,attention_mask:2x16",
    "input_ids:4x32,attention_mask:4x32",
)
LINES = {
    "a detector in fp16": (
        "trtexec --onnx=yolov8n.onnx --saveEngine=yolov8n.engine --fp16 --workspace=4096",
        convolutions, "float16",
    ),
    "a detector with shapes, as it is typed in a shell": (
        "./trtexec --onnx=yolov8m.onnx --saveEngine=yolov8m.engine --minShapes='images':1x3x32x32 "
        "--optShapes='images':4x3x32x32 --maxShapes='images':4x3x32x32 --explicitBatch --fp16",
        convolutions, "float16",
    ),
    "int8 with a cache and fp16, as the docs of TAO have it": (
        "trtexec --onnx=model.onnx \\\n        --maxShapes=images:4x3x32x32 \\\n"
        "        --minShapes=images:1x3x32x32 \\\n        --optShapes=images:2x3x32x32 \\\n"
        "        --calib=calib.txt \\\n        --fp16 \\\n        --int8 \\\n        --saveEngine=model.engine",
        convolutions, "int8",
    ),
    "int8 with a cache alone": (
        "trtexec --onnx=test.onnx --calib=test.cache --int8 --saveEngine=test.engine", convolutions, "int8",
    ),
    "best with a cache": (
        "trtexec --onnx=model.onnx --best --calib=calib.cache --saveEngine=model.plan --buildOnly",
        convolutions, "int8",
    ),
    "best without one": ("trtexec --onnx=model.onnx --best --verbose", convolutions, "float16"),
    "a UNet on Windows": (
        'D:/TensorRT-8.6.1.6/bin/trtexec.exe --onnx="unet.onnx" --saveEngine="unet.trt" '
        "--minShapes=x:2x4x16x16,context:2x7x12,timesteps:2 --maxShapes=x:2x4x16x16,context:2x7x12,timesteps:2 --fp16 "
        "--workspace=8192",
        denoiser, "float16",
    ),
    "an upscaler with a free size": (
        "trtexec --onnx=realesrgan.onnx --saveEngine=realesrgan.trt --fp16 --minShapes=input:1x3x8x8 "
        "--optShapes=input:1x3x24x40 --maxShapes=input:1x3x32x64 --builderOptimizationLevel=5 --tacticSources=-CUDNN",
        upscaler, "float16",
    ),
    "an encoder in fp16": (
        f"trtexec --onnx=bert.onnx --fp16 --minShapes={BERT[0]} --optShapes={BERT[1]} --maxShapes={BERT[2]} "
        "--saveEngine=bert.plan --memPoolSize=workspace:2048 --timingCacheFile=timing.cache",
        encoder, "float16",
    ),
    "an encoder in bf16, no TF32": (
        f"trtexec --onnx=bert.onnx --bf16 --noTF32 --skipInference --minShapes={BERT[0]} --optShapes={BERT[1]} "
        f"--maxShapes={BERT[2]} --saveEngine=bert.plan",
        encoder, "bfloat16",
    ),
    "layers that are kept in float32": (
        "trtexec --onnx=model.onnx --fp16 --precisionConstraints=obey --layerPrecisions=Conv_0:fp32,*Gemm*:fp32 "
        "--saveEngine=model.plan --stronglyTyped=",
        convolutions, "float32",
    ),
    "all layers in fp16, and so the ports": (
        "/usr/src/tensorrt/bin/trtexec --skipInference --fp16 --timingCacheFile=timing.cache --shapes=images:1x3x32x32 "
        "--precisionConstraints=prefer --layerPrecisions=*:fp16 --layerOutputTypes=*:fp16 --inputIOFormats=fp16:chw "
        "--outputIOFormats=fp16:chw --onnx=model.onnx --saveEngine=model.engine --verbose",
        convolutions, "float16",
    ),
    "softmax in float32 by name": (
        "trtexec --onnx=model.onnx --fp16 --precisionConstraints=obey --layerPrecisions='Softmax_*':fp32,MatMul_5:fp32 "
        f"--minShapes={BERT[0]} --optShapes={BERT[1]} --maxShapes={BERT[2]}",
        encoder, "float16",
    ),
    "grids of its own, and --int8": (
        "CUDA_VISIBLE_DEVICES=2 trtexec --onnx=qat.onnx --saveEngine=qat.engine --minShapes=images:1x3x16x16 "
        "--optShapes=images:2x3x16x16 --maxShapes=images:4x3x16x16 --int8 --fp16 --useCudaGraph --useSpinWait",
        explicit, "float16",
    ),
    "strongly typed already": (
        "trtexec --onnx=model.onnx --stronglyTyped --saveEngine=model.plan --profilingVerbosity=detailed --device=3",
        convolutions, "float32",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(tmp_path)
    yield
    os.chdir(before)


def prepared(title: str) -> str:
    from effc.migrate import trtexec

    line, build, _ = LINES[title]
    command = trtexec.parse(trtexec.words_of(line))
    build().save(command.onnx)
    if command.calib:
        from pathlib import Path

        cache(Path(command.calib), DETECTOR)
    return line


def test_there_are_as_many_lines_as_is_said():
    assert len(LINES) >= 10


@pytest.mark.parametrize("title", LINES)
def test_a_line_becomes_a_graph_that_agrees_and_builds(title, tmp_path):
    pytest.importorskip("tensorrt_rtx_bindings")
    place = tmp_path / "typed.onnx"
    found = run.migrate(prepared(title), place)
    assert found.kind == LINES[title][2]
    assert found.gap <= found.tolerance == run.TOLERANCE[found.kind]
    assert on_tensorrt(place) == "fine"
    for flag in (
        "fp16",
        "bf16",
        "int8",
        "best",
        "calib",
        "explicitBatch",
        "workspace",
        "layerPrecisions",
        "precisionConstraints",
    ):
        assert f"--{flag}" not in found.trtexec
    assert found.trtexec.startswith(f"trtexec --onnx={place}")
    assert found.tensorrt_rtx.startswith(f"tensorrt_rtx --onnx={place}")


def kinds(place, op: str) -> list[str]:
    graph = ir.load(place).graph
    return [str(node.inputs[1].dtype or "?") for node in graph if node.op_type == op]


def test_layers_of_an_fp16_line_compute_in_16_bit_and_ports_stay(tmp_path):
    place = tmp_path / "typed.onnx"
    found = run.migrate(prepared("a detector in fp16"), place)
    graph = ir.load(place).graph
    assert kinds(place, "Conv") == ["FLOAT16"] * 2 and kinds(place, "Gemm") == ["FLOAT16"]
    assert [v.dtype for v in (*graph.inputs, *graph.outputs)] == [ir.DataType.FLOAT] * 2
    assert "--memPoolSize=workspace:4096" in found.trtexec
    assert found.narrow_nodes == 10 and found.wide_nodes == 1  # the pool is a sum


def test_ports_are_of_16_bit_where_the_line_said_so(tmp_path):
    place = tmp_path / "typed.onnx"
    found = run.migrate(prepared("all layers in fp16, and so the ports"), place)
    graph = ir.load(place).graph
    assert [v.dtype for v in (*graph.inputs, *graph.outputs)] == [ir.DataType.FLOAT16] * 2
    assert "--inputIOFormats=fp16:chw" in found.trtexec


def test_a_cache_becomes_grids_with_its_scales(tmp_path):
    place = tmp_path / "typed.onnx"
    found = run.migrate(prepared("int8 with a cache alone"), place)
    graph = ir.load(place).graph
    assert found.integer_layers == 3 and found.narrow_nodes == 0
    scale = next(n for n in graph if n.op_type == "QuantizeLinear").inputs[1].const_value.numpy()
    assert float(scale) == pytest.approx(3 / 127)
    weights = [
        n for n in graph if n.op_type == "DequantizeLinear" and n.inputs[0].const_value is not None
    ]
    assert sorted(n.inputs[0].const_value.shape[0] for n in weights) == [8, 8, 10]
    assert all(n.inputs[1].const_value.shape == n.inputs[0].const_value.shape[:1] for n in weights)


@pytest.mark.parametrize("kind", ["hex", "json", "plain"])
def test_every_form_of_a_cache_gives_the_same_graph(tmp_path, kind):
    line = prepared("int8 with a cache alone")
    run.migrate(line, tmp_path / "one.onnx")
    cache(tmp_path / "test.cache", DETECTOR, kind)
    assert run.migrate(line, tmp_path / "other.onnx").integer_layers == 3
    scales = [
        [
            v.const_value.numpy().tolist()
            for k, v in ir.load(tmp_path / f).graph.initializers.items()
            if k.endswith("scale")
        ]
        for f in ("one.onnx", "other.onnx")
    ]
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in zip(*scales, strict=True))


def test_what_could_not_be_carried_over_is_named(tmp_path):
    convolutions().save("model.onnx")
    found = run.migrate(
        "trtexec --onnx=model.onnx --int8 --minTiming=8 --newFlag --batch=4", tmp_path / "t.onnx"
    )
    lost = {note.flag: note.became for note in found.notes if note.is_lost}
    assert set(lost) == {"int8", "minTiming", "newFlag", "batch"}
    assert "--calib" in lost["int8"] and "effc compile" in lost["int8"]
    assert "newFlag" not in found.trtexec
    assert any("--int8 not carried over" in line for line in found.lines())


def test_a_layer_that_the_cache_does_not_know_is_named(tmp_path):
    convolutions().save("model.onnx")
    cache(tmp_path / "c.cache", {"images": 0.02})
    found = run.migrate("trtexec --onnx=model.onnx --int8 --calib=c.cache", tmp_path / "t.onnx")
    assert found.integer_layers == 1
    assert any("2 layers have no scale" in note.became and note.is_lost for note in found.notes)


def test_an_old_opset_is_lifted_where_types_ask_for_it(tmp_path):
    convolutions(opset=11).save("model.onnx")
    cache(tmp_path / "c.cache", DETECTOR)
    found = run.migrate(
        "trtexec --onnx=model.onnx --int8 --fp16 --calib=c.cache", tmp_path / "t.onnx"
    )
    assert any("opset 11 converted to 19" in note.became for note in found.notes)
    assert on_tensorrt(tmp_path / "t.onnx") == "fine"


def test_a_constant_beyond_16_bit_keeps_its_node_in_float32(tmp_path):
    found = run.migrate(prepared("an encoder in fp16"), tmp_path / "t.onnx")
    assert any(
        "float32 of 1 node whose constants are beyond 16 bit" in note.became for note in found.notes
    )
