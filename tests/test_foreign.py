"""An ONNX file from elsewhere goes the whole way, and is itself what engines are held against."""

import functools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnx_files import node, save

from effc import recipe
from effc.backends import BACKENDS
from effc.backends.ort_engine import OrtEngine
from effc.compiler import trace_source
from effc.errors import RecipeError
from effc.foreign import module as reading
from effc.source import from_directory, load
from kit import WORDS, assert_letter, cli, made

NUMBERS = np.random.default_rng(2)


def floats(*shape, scale=1.0):
    return (NUMBERS.standard_normal(shape) * scale).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text encoder as a file, its tokenizer beside it."""
    place = tmp_path_factory.mktemp("foreign")
    BACKENDS["onnx"]().lower(trace_source(from_directory(made().model)).only(), place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made().model / name, place)
    return place


@pytest.fixture(scope="module")
def out(place):
    """The file's int8 package for two targets."""
    out = place.parent / f"{place.name}-out"
    ran = cli(
        "compile", place / "model.onnx", "-o", out, "--quantize", "int8", "--calib", made().sentences,
        "--samples", 16, "--no-bench", "--target", "ort", "--target", "openvino",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return out


def convnet(place, batch="batch"):
    """A small convolutional net of pictures [batch, 3, 8, 8], with a residual sum."""
    nodes = [
        node("Conv", "x w1 b1", "c1", pads=[1, 1, 1, 1]), node("BatchNormalization", "c1 g b m v", "n"),
        node("Relu", "n", "r1"), node("Conv", "r1 w2 b2", "c2", pads=[1, 1, 1, 1]), node("Add", "c2 r1", "s"),
        node("Relu", "s", "r2"), node("GlobalAveragePool", "r2", "p"), node("Flatten", "p", "f"),
        node("Gemm", "f w3 b3", "logits", transB=1),
    ]  # fmt: skip
    tensors = {
        "w1": floats(8, 3, 3, 3, scale=0.3), "b1": floats(8), "w2": floats(8, 8, 3, 3, scale=0.2), "b2": floats(8),
        "w3": floats(5, 8), "b3": floats(5), "g": floats(8) + 2, "b": floats(8), "m": floats(8),
        "v": floats(8) ** 2 + 1,
    }  # fmt: skip
    return save(place, nodes, {"x": (batch, 3, 8, 8)}, tensors, outputs=("logits",), opset=17)


def pictures(file, count=24):
    np.savez(file, x=floats(count, 3, 8, 8))
    return file


def report(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def manifest(out):
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def test_every_layer_of_a_text_encoder_runs_on_integers(out):
    engines = manifest(out)["engines"]
    assert [e["target"] for e in engines] == ["ort", "openvino"]
    for engine in engines:
        assert engine["int8_sites"] == engine["total_sites"] > 12
        assert [p["name"] for p in engine["outputs"]] == ["last_hidden_state"]


def test_what_makes_inputs_of_texts_travels(out):
    assert (out / "tokenizer.json").is_file()
    assert manifest(out)["source"]["name"] == "model"


def test_the_engine_is_near_the_file_and_not_at_it(out):
    for drifts in report(out)["verify"].values():
        assert all(0 < d["last_hidden_state"]["rel_l2"] < 0.1 for d in drifts.values())


def test_a_package_is_verified_against_its_file_with_the_words_that_it_holds(place, out, tmp_path):
    alone = Path(shutil.copy(place / "model.onnx", tmp_path))
    ran = cli("verify", out, "--model", alone, "--calib", made().sentences)
    assert ran.code == 0, ran.err
    assert "calibration" in ran.out


def test_a_package_of_a_file_is_explained(place, out):
    ran = cli("explain", out, "--model", place / "model.onnx", "--calib", made().sentences)
    assert ran.code == 0, ran.err
    assert "quantize" in ran.out


def test_a_package_is_not_verified_against_another_file(out, tmp_path):
    other = convnet(tmp_path / "other.onnx")
    assert_letter(cli("verify", out, "--model", other), "SourceError", 4, "is not the model that")


def test_texts_without_a_tokenizer_are_refused(place, tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    alone = shutil.copy(place / "model.onnx", inner)
    words = (
        "compile",
        alone,
        "-o",
        tmp_path / "out",
        "--quantize",
        "int8",
        "--calib",
        made().sentences,
    )
    assert_letter(cli(*words), "CalibrationError", 7, "")
    ran = cli(*words, "--samples", 8, "--no-bench", "--tokenizer", place)
    assert ran.code == 0, ran.err


def test_a_file_that_is_read_wrongly_is_never_compiled(tmp_path, monkeypatch):
    monkeypatch.setitem(reading.OPERATORS, "Relu", lambda step, x: torch.abs(x))
    ran = cli("compile", convnet(tmp_path / "m.onnx"), "-o", tmp_path / "out", "--no-bench")
    assert_letter(ran, "VerifyError", 10, "reads the file as another model")
    assert not (tmp_path / "out").exists()


def test_a_convolutional_net_is_compiled_for_every_target(tmp_path):
    file, data = convnet(tmp_path / "m.onnx"), pictures(tmp_path / "x.npz")
    pytest.importorskip("tensorrt_rtx_bindings")
    targets = [w for t in ("ort", "openvino", "tensorrt", "onnx") for w in ("--target", t)]
    ran = cli(
        "compile",
        file,
        "-o",
        tmp_path / "out",
        "--quantize",
        "int8",
        "--calib",
        data,
        "--no-bench",
        *targets,
    )
    assert ran.code == 0, ran.err
    engines = {e["target"]: e for e in manifest(tmp_path / "out")["engines"]}
    assert set(engines) == {"ort", "openvino", "tensorrt", "onnx"}
    assert engines["ort"]["int8_sites"] == 3
    drifts = report(tmp_path / "out")["verify"]
    assert all(d["calibration"]["logits"]["rel_l2"] < 0.1 for d in drifts.values())


class Denoiser(torch.nn.Module):
    """A tiny conditional UNet of diffusers, by names that its files have elsewhere."""

    def __init__(self):
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16, attention_head_dim=8,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
        )  # fmt: skip

    def forward(self, sample, timestep, encoder_hidden_states):
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def test_a_denoiser_is_compiled_with_its_attention_whole(tmp_path):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    example = (torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 5, 16))
    names = ["sample", "timestep", "encoder_hidden_states"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Denoiser().eval(), example, tmp_path / "unet.onnx", dynamo=False, opset_version=17, input_names=names,
            output_names=["out_sample"], dynamic_axes={name: {0: "batch"} for name in [*names, "out_sample"]},
        )  # fmt: skip
    source = load({"onnx": str(tmp_path / "unet.onnx")})
    found = [step.op for step in source.module.steps.steps]
    assert found.count("Attention") == 8 and "Softmax" not in found
    assert "InstanceNormalization" not in found and "Erf" not in found
    times = NUMBERS.integers(0, 999, 16)
    np.savez(
        tmp_path / "x.npz", sample=floats(16, 4, 8, 8), timestep=times,
        encoder_hidden_states=floats(16, 5, 16),
    )  # fmt: skip
    ran = cli(
        "compile", tmp_path / "unet.onnx", "-o", tmp_path / "out", "--quantize", "int8", "--calib", tmp_path / "x.npz",
        "--no-bench",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    drifts = report(tmp_path / "out")["verify"]["ort"]
    assert all(0 < d["out_sample"]["rel_l2"] < 0.2 for d in drifts.values())


def test_a_file_of_one_row_alone_is_calibrated_one_row_at_a_time(tmp_path):
    file, data = convnet(tmp_path / "m.onnx", batch=1), pictures(tmp_path / "x.npz")
    ran = cli(
        "compile", file, "-o", tmp_path / "out", "--quantize", "int8", "--calib", data, "--no-bench"
    )
    assert ran.code == 0, ran.err
    (engine,) = manifest(tmp_path / "out")["engines"]
    assert engine["inputs"][0]["shape"] == [1, 3, 8, 8]
    with OrtEngine(tmp_path / "out" / "model.onnx") as run:
        assert run({"x": floats(1, 3, 8, 8)})["logits"].shape == (1, 5)


def test_a_file_of_one_length_alone_is_refused_for_texts_with_its_shape(place, tmp_path):
    nodes = [node("Gather", "table input_ids", "last_hidden_state")]
    file = save(
        tmp_path / "m.onnx", nodes, {"input_ids": ("batch", 12)}, {"table": floats(160, 8)},
        outputs=("last_hidden_state",), kinds={"input_ids": TensorProto.INT64},
    )  # fmt: skip
    ran = cli(
        "compile", file, "-o", tmp_path / "out", "--quantize", "int8", "--calib", made().sentences, "--tokenizer", place
    )  # fmt: skip
    assert_letter(ran, "CalibrationError", 7, "input_ids", "12")


@functools.cache
def perceptron_of(place):
    nodes = [
        node("MatMul", "x w1", "p", name="/up/MatMul"), node("Add", "p b1", "q", name="/up/Add"),
        node("Relu", "q", "r"),
        node("MatMul", "r w2", "s", name="/down/MatMul"), node("Add", "s b2", "y", name="/down/Add"),
    ]  # fmt: skip
    tensors = {"w1": floats(8, 64), "b1": floats(64), "w2": floats(64, 16), "b2": floats(16)}
    return save(place / "mlp.onnx", nodes, {"x": ("batch", 8)}, tensors)


PASSES = {
    "minmax": [{"pass": "quantize", "range": "minmax"}],
    "percentile": [{"pass": "quantize", "range": "percentile"}],
    "mse": [{"pass": "quantize", "range": "mse"}],
    "gptq": [{"pass": "quantize", "bits": 4, "activation_bits": 16, "rounding": "gptq"}],
    "noisyquant": [{"pass": "noisyquant"}],
    "prune": [{"pass": "prune-dims", "ratio": 0.25}, {"pass": "quantize"}],
    "one layer": [{"pass": "quantize", "select": {"module": "up"}}],
}


@pytest.mark.parametrize("kind", PASSES)
def test_passes_work_on_a_file_as_on_a_model(kind, tmp_path):
    file = perceptron_of(tmp_path)
    np.savez(tmp_path / "x.npz", x=floats(64, 8))
    content = {
        "source": {"onnx": "mlp.onnx"}, "calib": {"file": "x.npz"}, "passes": PASSES[kind], "bench": False,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(content), encoding="utf-8")
    ran = cli("compile", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    lossy = [p for p in manifest(tmp_path / "out")["passes"] if p["effect"] == "lossy"]
    assert lossy and lossy[-1]["sites"] == (1 if kind == "one layer" else 2)
    assert file.is_file()


def test_a_file_is_timed_against_itself(tmp_path):
    file = convnet(tmp_path / "m.onnx")
    pictures(tmp_path / "x.npz")
    content = {
        "source": {"onnx": "m.onnx"}, "calib": {"file": "x.npz"}, "passes": ["quantize"],
        "targets": ["ort", "openvino"],
        "bench": {"shapes": [[1, 1]], "budget_s": 0.5, "threads": 1}, "gate": False,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(content), encoding="utf-8")
    ran = cli("compile", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    bench = report(tmp_path / "out")["bench"]
    assert set(bench["load_ms"]) == {"engine", "float"}
    assert set(bench["others"]["openvino"]["load_ms"]) >= {"engine", "float", "file"}
    assert sorted(p.name for p in file.parent.iterdir()) == [
        "m.onnx",
        "out",
        "recipe.yaml",
        "x.npz",
    ]


def test_a_quantised_file_is_recognised_and_compared(place, out):
    quantised = out / "ort" / "model.onnx"
    ran = cli("inspect", quantised)
    assert ran.code == 0 and "quantised  " in ran.out
    ran = cli(
        "verify",
        quantised,
        "--model",
        place / "model.onnx",
        "--calib",
        made().sentences,
        "--json",
        "-",
    )
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["file"]["quantised"]["form"] in ("static", "dynamic")
    assert 0 < found["outputs"]["last_hidden_state"]["rel_l2"] < 0.1
    ran = cli("compile", quantised, "-o", place / "again", "--calib", made().sentences)
    assert_letter(ran, "SourceError", 4, "quantised already", "effc verify")


def test_a_file_of_floats_is_inspected_as_a_model(tmp_path):
    ran = cli("inspect", perceptron_of(tmp_path))
    assert ran.code == 0, ran.err
    assert "linear     up" in ran.out


def test_a_file_with_weights_that_lead_elsewhere_is_not_even_described(place, tmp_path):
    import onnx

    model = onnx.load(place / "model.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    onnx.save(model, tmp_path / "m.onnx")
    for words in (["inspect"], ["verify"], ["compile", "-o", tmp_path / "out"]):
        ran = cli(*words[:1], tmp_path / "m.onnx", *words[1:])
        assert_letter(ran, "SourceError", 4, "refused as the name of a file")


def test_a_recipe_names_a_file_and_its_tokenizer(place):
    source = load({"onnx": str(place / "model.onnx"), "tokenizer": str(made().model)})
    assert source.kind == "encoder" and source.directory == made().model
    assert source.processor.config["vocab_size"] == len(WORDS) + 5


def test_a_tokenizer_is_for_a_file_alone(tmp_path):
    ran = cli("compile", made().model, "-o", tmp_path / "out", "--tokenizer", made().model)
    assert_letter(ran, "RecipeError", 3, "source.tokenizer")
    ran = cli("verify", made().out, "--tokenizer", made().model)
    assert_letter(ran, "UsageError", 2, "--tokenizer is for an ONNX file")


@pytest.mark.parametrize(
    "what", [{"roles": ["prefill", "decode"]}, {"pixels": "uint8"}, {"cache": False}]
)
def test_a_file_is_taken_as_it_is(what):
    with pytest.raises(RecipeError, match="an ONNX file is taken as it is"):
        recipe.build({"source": {"onnx": "m.onnx", **what}})
