"""A refit file has the weights that changed, for one engine, and nobody else's.

That an engine takes them needs a GPU. What is seen here is that the library knows every name in the engine's network.
The engines here are built without a driver, so their weights cannot be exchanged, and their manifests say they could.
"""

import json
import shutil
import struct
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from packages import model, weights, write

from effc import package
from effc.delta import packet, refit
from effc.errors import DeltaError
from kit import assert_letter, cli

pytest.importorskip("tensorrt_rtx_bindings")


@cache
def engine():
    """An engine as the library builds it here."""
    from effc.backends.tensorrt_build import Plan, build

    with tempfile.TemporaryDirectory() as place:
        onnx.save(model(weights()), f"{place}/model.onnx")
        plan = Plan(profile={"batch": (1, 2, 4)})
        return bytes(build(Path(place, "model.onnx"), plan, {"x": ("batch", 64)}).engine)


def with_engine(place, tensors, *, weights_="refittable", more=b"", made=None):
    """A package for tensorrt of these weights, its engine beside the ONNX that it is from."""
    write(place, tensors)
    if made is not None:
        onnx.save(made, place / "model.onnx")
    (place / "model.engine").write_bytes(engine() + more)
    told = json.loads((place / "manifest.json").read_text())
    entry = {
        **told["engines"][0], "target": "tensorrt", "path": "model.engine",
        "sha256": package.digest(place / "model.engine"), "options": {"weights": weights_},
    }  # fmt: skip
    for name in ("manifest.json", "volatile.json"):
        (place / name).unlink()
    kept = {
        k: told[k]
        for k in ("schema", "kind", "links", "graph_digest", "source", "decisions", "origins")
    }
    package.write_manifest(place, {**kept, "engines": [entry]})
    assert package.check(place) == []
    return place


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    place = tmp_path_factory.mktemp("refit")
    word = packet.keygen(place / "key", place / "key.pub")
    with_engine(place / "old", weights())
    with_engine(place / "new", weights(1, 0.01), weights_="inside", more=b"another")
    return place, word


def digests(root):
    return {
        "engine": package.digest(root / "model.engine"),
        "onnx_file": package.digest(root / "model.onnx"),
    }


def test_what_changed_is_there_by_name_in_the_type_of_the_engine(two):
    from safetensors.numpy import load

    place, word = two
    content = refit.written(refit.made(place / "old", place / "new", release=3), place / "key")
    found = load(content)
    new = weights(1, 0.01)
    assert set(found) == {n for n, v in new.items() if not np.array_equal(v, weights()[n])}
    assert all(np.array_equal(found[n], new[n]) and found[n].dtype == new[n].dtype for n in found)
    back = refit.read(content, [word], **digests(place / "old"), above=0)
    assert back == refit.made(place / "old", place / "new", release=3)
    assert refit.written(back, place / "key") == content


def test_the_same_weights_make_an_empty_file(two):
    place, word = two
    made = refit.made(place / "old", place / "old", release=1)
    content = refit.written(made, place / "key")
    assert refit.read(content, [word], **digests(place / "old"), above=0).weights == {}


def test_tensorrt_knows_the_names_in_the_network_of_the_engine(two):
    place, _ = two
    made = refit.made(place / "old", place / "new", release=1)
    told = refit.told(place / "old", made)
    assert (told["weights"], told["not_checked"]) == (4, "") and told["checked_with"]
    other = replace(made, weights={"nothing": made.weights["bias"]})
    with pytest.raises(DeltaError, match="no weight 'nothing'") as refused:
        refit.told(place / "old", other)
    assert refused.value.hint


def test_types_of_16_8_and_4_bits_keep_them(tmp_path):
    """Values of each as they lie in the ONNX, and a library that knows all of their names."""
    import ml_dtypes

    def narrow(seed):
        draw = np.random.default_rng(seed)
        codes = draw.integers(-8, 8, (32, 32)).astype(ml_dtypes.int4)
        tensors = {
            "half": draw.normal(size=(64, 32)).astype("f2"),
            "brain": draw.normal(size=(32, 8)).astype(ml_dtypes.bfloat16),
            "four": codes, "scale": draw.uniform(1, 2, (32, 1)).astype("f2"),
        }  # fmt: skip
        nodes = [
            helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", ["h", "half"], ["a"]),
            helper.make_node("DequantizeLinear", ["four", "scale"], ["w"], axis=1, block_size=32),
            helper.make_node("MatMul", ["a", "w"], ["b"]),
            helper.make_node("Cast", ["b"], ["c"], to=TensorProto.BFLOAT16),
            helper.make_node("MatMul", ["c", "brain"], ["d"]),
            helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
        ]
        graph = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
            [numpy_helper.from_array(v, n) for n, v in tensors.items()],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    for seed in (0, 1):
        with_engine(tmp_path / str(seed), weights(), made=narrow(seed))
    word = packet.keygen(tmp_path / "key", tmp_path / "key.pub")
    made = refit.made(tmp_path / "0", tmp_path / "1", release=1)
    assert {n: w.dtype for n, w in made.weights.items()} == {
        "brain": "BF16", "four": "I4", "half": "F16", "scale": "F16",
    }  # fmt: skip
    back = refit.read(
        refit.written(made, tmp_path / "key"), [word], **digests(tmp_path / "0"), above=0
    )
    assert back == made and back.weights["four"].shape == (32, 32)
    assert len(back.weights["four"].values) == 512
    told = refit.told(tmp_path / "0", made)
    assert told["checked_with"] or "TensorRT" in told["not_checked"]


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("none of the trusted keys", lambda c: c[:-1] + bytes([c[-1] ^ 1])),
        ("none of the trusted keys", lambda c: c.replace(b'"release":"1"', b'"release":"9"')),
        ("none of the trusted keys", lambda c: c + b"\0"),
        ("longer than it may be", lambda c: c[:40]),
        ("longer than it may be", lambda c: struct.pack("<Q", 1 << 40) + c[8:]),
        ("no refit file", lambda c: c.replace(b"effc refit 1", b"effc refit 2")),
        ("no refit file", lambda _: b""),
        ("no refit file", lambda _: struct.pack("<Q", 2) + b"{}"),
        ("no refit file", lambda _: struct.pack("<Q", 2) + b"[]"),
        ("not signed", lambda c: c.replace(b'"signature":"', b'"signature":"0')),
    ],
)
def test_a_spoilt_file_is_refused_with_its_reason(two, word, change):
    place, key = two
    content = refit.written(refit.made(place / "old", place / "new", release=1), place / "key")
    with pytest.raises(DeltaError, match=word) as refused:
        refit.read(change(content), [key], **digests(place / "old"), above=0)
    assert refused.value.hint


def test_weights_of_another_engine_key_or_onnx_are_refused(two, tmp_path):
    place, word = two
    content = refit.written(refit.made(place / "old", place / "new", release=1), place / "key")
    foreign = packet.keygen(tmp_path / "k", tmp_path / "k.pub")
    with pytest.raises(DeltaError, match="none of the trusted"):
        refit.read(content, [foreign], **digests(place / "old"), above=0)
    for name in ("engine", "onnx_file"):
        with pytest.raises(DeltaError, match="for another"):
            refit.read(content, [word], **{**digests(place / "old"), name: "0" * 64}, above=0)


def signed(header, key):
    """A file with any header at all, signed by who may."""
    told = header["__metadata__"]
    told["signature"] = refit.UNSIGNED
    text = json.dumps(header, separators=(",", ":")).encode()
    bare = struct.pack("<Q", len(text)) + text + bytes(64)
    name = packet.private_key(key).sign(refit._message(bare)).hex()
    return refit._with(bare, refit.UNSIGNED, name)


def test_an_older_release_does_not_come_back(two):
    place, word = two
    content = refit.written(refit.made(place / "old", place / "new", release=3), place / "key")
    with pytest.raises(DeltaError, match="release 3 is not above 3") as refused:
        refit.read(content, [word], **digests(place / "old"), above=3)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("F32", b"\x00\x00\xc0\x7f"),
        ("F16", b"\x00\xfc"),
        ("BF16", b"\x80\x7f"),
        ("F8_E4M3", b"\xff"),
    ],
)
def test_values_that_are_no_numbers_are_refused_also_when_they_are_signed(two, dtype, values):
    place, word = two
    made = refit.made(place / "old", place / "new", release=3)
    spoilt = replace(made, weights={"w": refit.Weight(dtype=dtype, shape=(1,), values=values)})
    with pytest.raises(DeltaError, match="no numbers"):
        refit.read(refit.written(spoilt, place / "key"), [word], **digests(place / "old"), above=0)


@pytest.mark.parametrize(
    "line",
    [
        {"dtype": "F32", "shape": [16], "data_offsets": [0, 63]},
        {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]},
        {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]},
        {"dtype": "F77", "shape": [16], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": "16", "data_offsets": [0, 64]},
        {"dtype": "F32"},
        "F32",
    ],
)
def test_places_that_do_not_fit_are_refused_also_when_they_are_signed(two, line):
    place, word = two
    told = {"form": refit.FORM, "release": "1", "int4": "{}"}
    told |= {
        "engine": digests(place / "old")["engine"],
        "onnx": digests(place / "old")["onnx_file"],
    }
    content = signed({"w": line, "__metadata__": told}, place / "key")
    with pytest.raises(DeltaError, match="does not fit") as refused:
        refit.read(content, [word], **digests(place / "old"), above=0)
    assert refused.value.hint


def test_what_cannot_be_refitted_is_refused_with_what_to_do(two, world):
    place, _ = two
    fixed = with_engine(world.place / "fixed", weights(), weights_="inside")
    with pytest.raises(DeltaError, match="for good") as refused:
        refit.made(fixed, place / "new", release=1)
    assert "refittable" in refused.value.hint
    with pytest.raises(DeltaError, match="0 engines for tensorrt"):
        refit.made(world.old, world.new, release=1)
    tensors = weights(1, 0.01)
    tensors["bias"] = tensors["bias"][None]
    with pytest.raises(DeltaError, match="other weights"):
        refit.made(place / "old", with_engine(world.place / "shape", tensors), release=1)
    lost = weights(1, 0.01)
    lost["bias"][0] = np.inf
    with pytest.raises(DeltaError, match="no numbers"):
        refit.made(place / "old", with_engine(world.place / "lost", lost), release=1)
    harmed = shutil.copytree(place / "new", world.place / "harmed")
    (harmed / "model.onnx").write_bytes(b"")
    with pytest.raises(DeltaError, match="is not whole"):
        refit.made(place / "old", harmed, release=1)


def test_the_command_line_writes_one_and_says_what_was_looked_at(two, tmp_path):
    place, word = two
    words = ("--key", place / "key", "--release", 2)
    ran = cli("delta", "refit", place / "old", place / "new", "-o", tmp_path / "w", *words)
    assert ran.code == 0, ran.err
    assert "4 weights" in ran.out and ("on a GPU alone" in ran.out or "not checked" in ran.out)
    found = refit.read((tmp_path / "w").read_bytes(), [word], **digests(place / "old"), above=0)
    assert found.release == 2
    again = cli("delta", "refit", place / "new", place / "old", "-o", tmp_path / "no", *words)
    assert_letter(again, "DeltaError", 14, "for good")
    assert not (tmp_path / "no").exists()
    wrong = cli("delta", "make", place / "old", place / "new", "-o", tmp_path / "no", *words)
    assert_letter(wrong, "DeltaError", 14, "no place in the file")
    assert "effc delta refit" in wrong.err
