"""Two versions of an ONNX file from elsewhere, compiled with one calibration, are a delta apart."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_files import node, save

from effc import package
from effc.delta import device, make, packet
from kit import assert_letter, cli, content

NUMBERS = np.random.default_rng(5)
X = {"x": ("batch", 3, 8, 8)}


def floats(*shape, scale=1.0):
    return (NUMBERS.standard_normal(shape) * scale).astype(np.float32)


def net(place):
    """A convolution with its norm, a residual branch with a learned scalar in front, and a layer."""
    nodes = [
        node("Conv", "x stem.weight stem.bias", "c", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "c norm.weight norm.bias norm.mean norm.var", "n"),
        node("Relu", "n", "r"), node("Conv", "r body.weight body.bias", "b", pads=[1, 1, 1, 1]),
        node("Mul", "b gate", "g"), node("Add", "g r", "s"),
        node("GlobalAveragePool", "s", "p"), node("Flatten", "p", "f"),
        node("Gemm", "f head.weight head.bias", "y", transB=1),
    ]  # fmt: skip
    tensors = {
        "stem.weight": floats(8, 3, 3, 3, scale=0.3), "stem.bias": floats(8), "norm.weight": floats(8) + 2,
        "norm.bias": floats(8), "norm.mean": floats(8), "norm.var": floats(8) ** 2 + 1,
        "body.weight": floats(8, 8, 3, 3, scale=0.2), "body.bias": floats(8), "gate": np.array([0.5], np.float32),
        "head.weight": floats(5, 8), "head.bias": floats(5),
    }  # fmt: skip
    return save(place, nodes, X, tensors, opset=17)


def moved(old, place, by=0.02):
    """The file with every weight moved by a little, as training does."""
    model = onnx.load(old)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        step = by * np.abs(value).mean() * NUMBERS.standard_normal(value.shape)
        tensor.CopyFrom(numpy_helper.from_array((value + step).astype(value.dtype), tensor.name))
    onnx.save(model, place)
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Packages of two versions of a file and a key; the second with the ranges of the first."""
    place = tmp_path_factory.mktemp("foreign-delta")
    np.savez(place / "x.npz", x=floats(24, 3, 8, 8))
    moved(net(place / "old.onnx"), place / "new.onnx")
    frozen = []
    for name in ("old", "new"):
        ran = cli(
            "compile", place / f"{name}.onnx", "-o", place / name, "--quantize", "int8", "--calib", place / "x.npz",
            "--target", "ort", "--target", "openvino", "--no-bench", *frozen,
        )  # fmt: skip
        assert ran.code == 0, ran.err
        frozen = ["--decisions", place / "old" / "decisions.json"]
    packet.keygen(place / "release.key", place / "release.key.pub")
    return place


def answers(root, x):
    return {
        e["target"]: device.session(root, e)({"x": x})["y"]
        for e in device.manifest_of(root)["engines"]
    }


def test_a_new_version_of_a_file_is_sent_and_taken(made, tmp_path):
    up, store = tmp_path / "up.effd", tmp_path / "store"
    key = made / "release.key"
    for words in (
        ("make", made / "old", made / "new", "--release", 1, "--key", key, "-o", up),
        ("inspect", up, "--key", made / "release.key.pub"),
        ("init", store, made / "old", "--key", made / "release.key.pub"),
        ("apply", store, up),
        ("confirm", store),
    ):
        ran = cli("delta", *words)
        assert ran.code == 0, ran.err
    serving, record = device.start(store)
    assert (record.counter, package.check(serving)) == (1, [])
    x = floats(4, 3, 8, 8)
    old, new, got = (answers(root, x) for root in (made / "old", made / "new", serving))
    for target in ("ort", "openvino"):
        assert np.array_equal(got[target], new[target])
        assert not np.array_equal(got[target], old[target])
    assert up.stat().st_size < sum((made / "new" / t / "model.onnx").stat().st_size for t in got)


def test_what_a_device_holds_then_is_verified_against_the_new_file(made, tmp_path):
    mirror = tmp_path / "mirror"
    make.make(made / "old", made / "new", key=made / "release.key", counter=1, mirror=mirror)
    ran = cli(
        "verify", mirror, "--model", made / "new.onnx", "--calib", made / "x.npz", "--json", "-"
    )
    assert ran.code == 0, ran.err
    assert 0 < json.loads(ran.out)["outputs"]["y"]["rel_l2"] < 0.1
    ran = cli("verify", mirror, "--model", made / "old.onnx", "--calib", made / "x.npz")
    assert_letter(ran, "SourceError", 4, "is not the model that")


def test_a_budget_holds_for_a_file_too(made, tmp_path):
    whole = len(make.make(made / "old", made / "new", key=made / "release.key", counter=1).content)
    part = make.make(
        made / "old", made / "new", key=made / "release.key", counter=1, budget=whole * 3 // 4
    )
    assert len(part.content) <= whole * 3 // 4 and 0 < part.packet.error < 1


def test_a_file_of_another_graph_is_no_new_version(made, tmp_path):
    nodes = [node("Flatten", "x", "f"), node("Gemm", "f head.weight", "y", transB=1)]
    other = save(tmp_path / "other.onnx", nodes, X, {"head.weight": floats(5, 192)}, opset=17)
    ran = cli(
        "compile", other, "-o", tmp_path / "other", "--quantize", "int8", "--calib", made / "x.npz",
        "--target", "ort", "--target", "openvino", "--no-bench",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    ran = cli(
        "delta", "make", made / "old", tmp_path / "other", "--release", 1, "--key", made / "release.key",
        "-o", tmp_path / "up.effd",
    )  # fmt: skip
    assert_letter(ran, "DeltaError", 14, "another graph")
    assert not (tmp_path / "up.effd").exists()
    held = content(made / "old")
    assert package.check(made / "old") == [] and held == content(made / "old")


def test_a_version_that_is_slower_than_asked_is_refused_by_the_gate(made, tmp_path):
    """The gate asks a file as it asks a model: here a size that a net of a few numbers cannot have."""
    recipe = {
        "source": {"onnx": str(made / "new.onnx")}, "calib": {"file": str(made / "x.npz")}, "passes": ["quantize"],
        "bench": False, "gate": {"size": "smaller", "latency": False, "strict": True},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    ran = cli("compile", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert_letter(ran, "GateRefused", 11, "size")
    assert not (tmp_path / "out").exists()
