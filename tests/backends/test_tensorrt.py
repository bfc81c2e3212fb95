"""The tensorrt target: engines built without a GPU, what they are checked by, and what is refused with the reason."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import Attention, batches, distance, normal, quantize
from torch import nn

import effc
from effc.backends.base import Port
from effc.backends.dialect import ORT, TENSORRT
from effc.backends.options import TensorRtOptions
from effc.errors import BackendUnavailable, LoweringError, RecipeError, UsageError, VerifyError
from effc.package import sealed
from effc.passes.mixed_precision import MixedPrecision
from effc.passes.noisyquant import NoisyQuant
from effc.recipe import build as recipe
from kit import cli

pytest.importorskip("tensorrt_rtx_bindings")

from effc.backends import cuda
from effc.backends.tensorrt import ENGINE, TensorRt

pytestmark = pytest.mark.slow

SIZE = 64
DIMS = {"x": {0: "batch", 1: "length"}}


def traced(module=None, *shape, dims=None):
    torch.manual_seed(0)
    module = module or Attention(SIZE, 2)
    x = normal(*(shape or (2, 6, SIZE)))
    return effc.trace(module.eval(), {"x": x}, dims=DIMS if dims is None else dims)


def built(program, folder, **options):
    return TensorRt(TensorRtOptions(**options)).lower(program.only(), folder)


def in_16_bit(program, dtype="fp16"):
    effc.apply(MixedPrecision(dtype=dtype), program)
    return program


def gap(program, lowered, seed=5):
    """How far the ONNX that the engine was built from is from the graph."""
    x = normal(3, 7, SIZE, seed=seed)
    with TensorRt().stand_in(lowered, threads=1) as engine:
        found = engine({"x": x.numpy()})
    return distance(program.run(x=x)["output"], found["output"])


PRECISIONS = {
    "fp32": (None, None),
    "fp16": (None, "fp16"),
    "bf16": (None, "bf16"),
    "w8a16": ({"activation_bits": 16}, "fp16"),
    "w4a16": ({"activation_bits": 16, "bits": 4, "group": 32}, "bf16"),
    "w8a8": ({}, "fp16"),
    "fp8": ({"dtype": "fp8"}, "fp16"),
}


@pytest.mark.parametrize("word", PRECISIONS)
def test_every_precision_is_built_and_its_onnx_computes_the_graph(word, tmp_path):
    options, dtype = PRECISIONS[word]
    program = traced()
    if options is not None:
        quantize(program, batches("x", 2, 6, SIZE), dialect=TENSORRT, **options)
    if dtype is not None:
        in_16_bit(program, dtype)
    lowered = built(program, tmp_path)
    assert lowered.files[:2] == (ENGINE, "model.onnx")
    assert (tmp_path / ENGINE).read_bytes()[1:4] == b"trt"
    assert int(lowered.options["layers"]) > 4
    assert gap(program, lowered) < (2e-2 if dtype == "bf16" else 1e-2)


@pytest.mark.parametrize("dtype", [None, "fp16"])
def test_experts_and_what_a_request_is_about_are_built(dtype, tmp_path):
    from gated import X, scores, stirred, with_experts

    from effc.passes.rank1_fold import BatchRank1

    _, program = with_experts()
    program = stirred(program)
    effc.apply(BatchRank1(), program)
    if dtype is not None:
        in_16_bit(program, dtype)
    lowered = built(program, tmp_path)
    assert [port.name for port in lowered.inputs] == ["x", "intuition"]
    assert (tmp_path / ENGINE).read_bytes()[1:4] == b"trt"
    assert not [
        n for n in ir.load(tmp_path / "model.onnx").graph if n.op_type in ("Einsum", "TopK")
    ]
    feeds = {"x": X, "intuition": scores(len(X))}
    with TensorRt().stand_in(lowered, threads=1) as engine:
        found = engine({name: value.numpy() for name, value in feeds.items()})["output"]
        other = engine({"x": X.numpy(), "intuition": scores(len(X), seed=2).numpy()})["output"]
    assert distance(program.run(feeds)["output"], found) < (1e-2 if dtype else 1e-5)
    assert np.abs(found - other).max() > 1e-3  # it is an input, and no constant


def test_weights_of_4_bit_are_stored_so(tmp_path):
    program = traced()
    quantize(program, dialect=TENSORRT, activation_bits=16, bits=4, group=32)
    lowered = built(in_16_bit(program), tmp_path)
    tensors = ir.load(tmp_path / "model.onnx").graph.initializers.values()
    assert {t.dtype for t in tensors if "weight_int8" in t.name} == {ir.DataType.INT4}
    assert gap(program, lowered) < 5e-3


class Lopsided(nn.Module):
    """A norm and a GELU with channels far from zero, each in front of a layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)  # fmt: skip
        nn.init.normal_(self.norm.bias, mean=2.0)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("bits", [8, 6])
def test_a_shift_stands_in_for_the_zero_point_that_the_target_lacks(bits, tmp_path):
    """Steps of every layer are in the file, zero points are 0, and no more is lost than with zero points."""
    few = {"bits": bits, "activation_bits": bits}
    seen, x = batches("x", 16, 6, SIZE), normal(64, 6, SIZE, seed=9)
    torch.manual_seed(1)
    module = Lopsided()
    wanted = traced(module).run(x=x)["output"]

    def lost(program):
        return distance(wanted, program.run(x=x)["output"])

    plain, shifted, with_zero = (traced(module) for _ in range(3))
    quantize(plain, seen, dialect=TENSORRT, **few)
    record = effc.apply(NoisyQuant(**few), shifted, seen, dialect=TENSORRT)
    quantize(with_zero, seen, dialect=ORT, **few)
    assert lost(shifted) < 0.8 * lost(plain)
    assert lost(shifted) < 1.05 * lost(with_zero)
    lowered = built(shifted, tmp_path)
    assert (tmp_path / ENGINE).read_bytes()[1:4] == b"trt"
    model = ir.load(tmp_path / "model.onnx")
    quantised = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    steps = sorted(record.decisions[k][0] for k in ("main/norm:layer_norm", "main/gelu"))
    assert sorted(float(n.inputs[1].const_value.numpy()) for n in quantised) == pytest.approx(steps)
    for node in quantised:
        assert not node.inputs[2].const_value.numpy().any()
    clips = [n for n in model.graph if n.op_type == "Clip"]
    ends = [[int(v.const_value.numpy()) for v in n.inputs[1:]] for n in clips]
    assert ends == ([] if bits == 8 else [[-32, 31]] * 2)
    assert gap(shifted, lowered) < 1e-2


def test_attention_is_whole_where_there_is_a_kernel_and_else_the_reason_is_kept(tmp_path):
    whole = built(in_16_bit(traced()), tmp_path / "whole")
    apart = built(in_16_bit(traced(Attention(32, 4), 2, 6, 32)), tmp_path / "apart")
    wide = built(traced(), tmp_path / "wide")
    assert [low.options["attention"] for low in (whole, apart, wide)] == [
        "whole", "decomposed", "decomposed",
    ]  # fmt: skip
    assert (whole.opset, apart.opset) == (23, 21)
    assert "kernel" in apart.options["attention_refused"]
    assert "attention_refused" not in wide.options


def test_a_softmax_of_16_bit_is_computed_in_32(tmp_path):
    built(in_16_bit(traced(Attention(32, 4), 2, 6, 32)), tmp_path)
    model = ir.load(tmp_path / "model.onnx")
    (softmax,) = (n for n in model.graph if n.op_type == "Softmax")
    assert softmax.inputs[0].producer().op_type == "Cast"
    assert softmax.inputs[0].producer().attributes["to"].value == ir.DataType.FLOAT
    assert [n.op_type for n in softmax.outputs[0].consumers()] == ["Cast"]


def test_a_build_tells_how_far_it_is_and_can_be_stopped(tmp_path):
    seen = []
    program = in_16_bit(traced()).only()
    TensorRt().lower(program, tmp_path / "a", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and len(seen) > 2 and len({total for _, total in seen}) == 1

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TensorRt().lower(program, tmp_path / "b", stop)
    assert not (tmp_path / "b" / ENGINE).exists()


def test_a_kit_alone_wants_no_library(tmp_path, monkeypatch):
    def absent():
        raise BackendUnavailable("there is no TensorRT", hint="")

    monkeypatch.setattr("effc.backends.tensorrt_build.library", absent)
    backend = TensorRt(TensorRtOptions(build="kit"))
    program = in_16_bit(traced()).only()
    assert backend.supports(program) == []
    lowered = backend.lower(program, tmp_path)
    assert lowered.files[0] == "model.onnx" and not (tmp_path / ENGINE).exists()
    assert lowered.requires == ("tensorrt>=11",)
    assert "kit that builds the engine" in backend.obstacle(lowered)
    assert "--onnx=model.onnx" in (tmp_path / "kit.txt").read_text()
    with backend.stand_in(lowered, threads=1) as engine:
        assert engine({"x": normal(3, 7, SIZE).numpy()})["output"].shape == (3, 7, SIZE)


def test_fp8_is_for_gpus_that_have_it(tmp_path):
    program = traced()
    quantize(program, batches("x", 2, 6, SIZE), dialect=TENSORRT, dtype="fp8")
    with pytest.raises(RecipeError, match="sm86, which has no fp8"):
        TensorRt(TensorRtOptions(compute=("sm86", "sm89"))).supports(program.only())
    assert built(program, tmp_path).options["compute"] == "sm89,sm120,sm121"


class Joined(nn.Module):
    """What was there before and what is new, joined: a size that is a sum."""

    def forward(self, past, x, mask):
        return (torch.cat([past, x], 1) * mask[..., None]).relu()


def test_a_size_that_is_a_sum_follows_from_its_parts(tmp_path):
    feeds = {"past": normal(2, 5, SIZE), "x": normal(2, 3, SIZE), "mask": torch.ones(2, 8)}
    dims = {
        "past": {0: "batch", 1: "past"},
        "x": {0: "batch", 1: "length"},
        "mask": {0: "batch", 1: "whole"},
    }
    program = effc.trace(Joined(), feeds, dims=dims)
    lowered = built(program, tmp_path, profile={"past": (0, 7, 20), "length": (1, 2, 4)})
    assert sorted(lowered.profile) == ["batch", "length", "past"]
    text = (tmp_path / "kit.txt").read_text()
    assert "mask:1x1" in text and "mask:8x9" in text and "mask:32x24" in text


def test_what_is_outside_of_a_profile_is_not_measured():
    from effc.measure import fits

    port = Port(name="x", dtype="float32", shape=("batch", 4))
    bound = {"batch": (2, 4, 8)}
    sizes = [n for n in range(12) if fits([port], {"x": np.zeros((n, 4))}, bound)]
    assert sizes == list(range(2, 9)) and fits([port], {"x": np.zeros((99, 4))})


def test_one_engine_for_several_gpus_and_for_windows(tmp_path):
    several = built(in_16_bit(traced()), tmp_path, compute=("sm86", "sm89", "sm120"))
    assert several.options["compute"] == "sm86,sm89,sm120"
    other = built(in_16_bit(traced()), tmp_path / "w", platform="windows", compute=("sm89",))
    assert other.options["platform"] == "windows"


def test_a_gpu_without_kernels_is_refused_by_the_builder_with_its_reason(tmp_path):
    with pytest.raises(LoweringError, match=r"Turing.*FP32"):
        built(traced(), tmp_path, compute=("sm75",))


@pytest.mark.skipif(cuda.obstacle() is None, reason="there is a driver")
@pytest.mark.parametrize("weights", ["stripped", "refittable"])
def test_weights_outside_the_engine_need_a_driver(weights, tmp_path):
    with pytest.raises(BackendUnavailable, match="NVIDIA driver"):
        built(in_16_bit(traced()), tmp_path, weights=weights)


def test_the_profile_is_made_of_the_named_dimensions(tmp_path):
    lowered = built(in_16_bit(traced()), tmp_path, profile={"length": (2, 20, 99)})
    assert lowered.options["profile"] == "batch=1,8,32;length=2,20,99"


class Positions(nn.Module):
    """As many positions as there are rows in a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(normal(40, SIZE))

    def forward(self, x):
        return x + self.table[: x.shape[1]]


@pytest.mark.parametrize(
    "profile", [{"width": (1, 2, 3)}, {"batch": (4, 2, 8)}, {"length": (1, 5, 41)}]
)
def test_a_profile_that_does_not_fit_is_refused(profile):
    program = traced(Positions())
    assert program.only().largest("length") == 40
    with pytest.raises(RecipeError, match=next(iter(profile))):
        TensorRt(TensorRtOptions(profile=profile)).supports(program.only())


@pytest.mark.parametrize(
    "asked",
    [
        {"compute": ["sm90"]},
        {"profile": {"batch": [-1, 1, 2]}},
        {"profile": {"batch": [0, 0, 2]}},
        {"fp16": True},
        ["sm1"],
    ],
)
def test_options_that_nobody_knows_are_refused(asked):
    with pytest.raises(RecipeError, match="targets"):
        recipe({"source": {"transformers": "D"}, "targets": [{"tensorrt": asked}]})


def test_a_list_is_short_for_compute_capabilities():
    found = recipe({"source": {"transformers": "D"}, "targets": [{"tensorrt": ["sm86", "sm89"]}]})
    assert found.target_options["tensorrt"].compute == ("sm86", "sm89")


def test_what_the_parser_refuses_is_named_by_module(tmp_path):
    program = traced()
    quantize(program, batches("x", 2, 6, SIZE), dialect=ORT)  # zero points, which it does not take
    with pytest.raises(LoweringError, match=r"QuantizeLinear q .*"):
        built(program, tmp_path)
    assert not (tmp_path / ENGINE).exists()


def test_the_kit_checks_what_trtexec_writes(tmp_path):
    lowered = built(in_16_bit(traced()), tmp_path)
    text = (tmp_path / "kit.txt").read_text()
    for word in ("--onnx=model.onnx", "--minShapes=x:1x1x64", "--optShapes=x:8x128x64"):
        assert word in text
    assert "--loadInputs=x:kit-x.bin" in text and "fp16" not in text
    assert set(lowered.files) == {p.name for p in tmp_path.iterdir()}
    x = np.fromfile(tmp_path / "kit-x.bin", np.float32).reshape(2, 6, SIZE)
    with TensorRt().stand_in(lowered, threads=1) as engine:
        found = engine({"x": x})["output"]
    hole = found.copy()
    hole[0, 0, 0] = -np.inf
    for values, code in ((found, 0), (found * 1.2, 1), (found[:1], 1), (hole, 1)):
        told = [{"name": "output", "dimensions": "2x6x64", "values": values.ravel().tolist()}]
        written = json.dumps(told).replace("-Infinity", "-inf")  # as trtexec writes it
        (tmp_path / "outputs.json").write_text(written)
        words = [sys.executable, "kit-check.py", "outputs.json"]
        assert subprocess.run(words, cwd=tmp_path, check=False).returncode == code


@pytest.mark.skipif(TensorRt().obstacle() is None, reason="there is a GPU")
def test_without_a_gpu_it_is_said_and_nothing_crashes(tmp_path):
    lowered = built(in_16_bit(traced()), tmp_path)
    assert "NVIDIA" in TensorRt().obstacle()
    with pytest.raises(BackendUnavailable, match="NVIDIA"):
        TensorRt().open(lowered)


def test_without_the_library_there_is_the_line_that_installs_it():
    code = (
        "import sys; sys.modules['tensorrt_rtx_libs'] = sys.modules['tensorrt'] = None\n"
        "from effc.backends.tensorrt_build import library\n"
        "library()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "pip install 'effc[tensorrt]'" in found.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    place = tmp_path_factory.mktemp("tensorrt")
    (place / "model.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    f = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))\n"
        "    return f.eval(), {'input': torch.randn(2, 32)}\n"
    )
    out = place / "out"
    effc.compile(f"{place / 'model.py'}:build", out, target=["tensorrt", "ort"])
    return out


def test_a_package_says_what_was_not_run(package):
    manifest = json.loads((package / "manifest.json").read_text())
    assert [e["path"] for e in manifest["engines"]] == ["tensorrt/model.engine", "ort/model.onnx"]
    text = (package / "report.txt").read_text()
    if TensorRt().obstacle() is not None:
        assert "tensorrt was not run where it was compiled, and not timed" in text
    assert effc_verify(package) is None


def effc_verify(package):
    from effc.inspection import verify
    from effc.progress import Progress

    try:
        verify(package, model=None, calib=None, metric=None, threads=1, progress=Progress())
    except VerifyError as error:
        return error.what
    return None


@pytest.mark.parametrize("change", ["truncated", "another", "no engine"])
def test_an_engine_that_the_manifest_does_not_know_is_not_opened(package, tmp_path, change):

    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    file = copy / "tensorrt" / ENGINE
    content = file.read_bytes()
    changed = {
        "truncated": content[: len(content) // 2],
        "another": content[:-1] + bytes([content[-1] ^ 1]),
        "no engine": b"MZ" + content[2:],
    }
    file.write_bytes(changed[change])
    assert "model.engine differs from its sha256" in effc_verify(copy)


def test_a_manifest_does_not_make_an_engine_of_any_file(package, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    (copy / "tensorrt" / ENGINE).write_bytes(b"MZ" * 100)
    manifest = json.loads((copy / "manifest.json").read_text())
    digest = hashlib.sha256(b"MZ" * 100).hexdigest()
    manifest["files"]["tensorrt/model.engine"] = manifest["engines"][0]["sha256"] = digest
    (copy / "manifest.json").write_text(sealed(manifest))
    assert "model.engine is no engine of TensorRT" in effc_verify(copy)


def test_a_profile_is_refused_before_any_work(tmp_path):
    place = tmp_path / "recipe.yaml"
    (tmp_path / "model.py").write_text(
        "import torch\n"
        "def build():\n"
        "    return torch.nn.Linear(16, 8).eval(), {'input': torch.randn(2, 16)}\n"
    )
    target = {"tensorrt": {"profile": {"width": [1, 2, 3]}}}
    content = {"source": {"python": "model.py:build"}, "targets": [target]}
    place.write_text(json.dumps(content))
    ran = cli("compile", place, "-o", tmp_path / "out", "-v")
    assert ran.code == 3 and "width" in ran.err and "lower" not in ran.err


def test_the_words_of_the_command_line(tmp_path):
    place = tmp_path / "model.py"
    place.write_text(
        "import torch\n"
        "def build():\n"
        "    return torch.nn.Linear(16, 8).eval(), {'input': torch.randn(2, 16)}\n"
    )
    cli("compile", f"{place}:build", "-o", tmp_path / "out", "--target", "tensorrt")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [p["name"] for p in manifest["passes"]] == ["mixed-precision"]


def test_an_engine_of_a_package_is_opened_by_its_target(package, tmp_path):
    x = {"input": np.ones((3, 32), np.float32)}
    with effc.Engine.open(package, "ort") as engine:
        assert engine(x)["output"].shape == (3, 8)
    with pytest.raises(UsageError, match="no engine for 'openvino'"):
        effc.Engine.open(package, "openvino")
    if TensorRt().obstacle() is not None:
        with pytest.raises(BackendUnavailable, match="NVIDIA"):
            effc.Engine.open(package)
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    (copy / "ort" / "model.onnx").write_bytes(b"")
    with pytest.raises(VerifyError):
        effc.Engine.open(copy, "ort")
