"""A model that effc compiled in 4 bit for both runtimes at once goes through a delta and its transaction."""

import math
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effc import package
from effc.delta import device, make, packet, steps
from effc.delta import weights as places
from effc.errors import DeltaError
from kit import cli, content, save_encoder

ENGINES = ("ort/model.onnx", "openvino/model.onnx")


def shaken(source, place, seed):
    """The same encoder, every weight moved by a little: what was equal in it is so no more."""
    import torch
    from transformers import AutoModel

    shutil.copytree(source, place)
    model = AutoModel.from_pretrained(source, add_pooling_layer=False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn(each.shape, generator=draw) * (each.abs().mean() * 0.15 + 0.001))
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two packages of one graph in 4 bit, for ONNX Runtime and OpenVINO, and a key."""
    place = tmp_path_factory.mktemp("compiled")
    save_encoder(place / "model0", hidden_size=64, intermediate_size=128)  # its biases are all 0
    shaken(place / "model0", place / "model1", 1)
    frozen = []
    for name in ("old", "new"):
        model = place / ("model0" if name == "old" else "model1")
        words = ["--quantize", "w4a16", "--target", "ort", "--target", "openvino", "--no-bench"]
        ran = cli("compile", model, "-o", place / name, *words, *frozen)
        assert ran.code == 0, ran.err
        frozen = ["--decisions", place / "old" / "decisions.json"]
    word = packet.keygen(place / "key", place / "key.pub")
    return place, word


def delta(made, old="old", new="new", **how):
    place, _ = made
    return make.make(place / old, place / new, key=place / "key", **{"counter": 1, **how})


def answers(root):
    feeds = {
        "input_ids": np.arange(5, 13, dtype=np.int64)[None],
        "attention_mask": np.ones((1, 8), np.int64),
        "token_type_ids": np.zeros((1, 8), np.int64),
    }
    found = {}
    for engine in device.manifest_of(root)["engines"]:
        named = {port["name"] for port in engine["inputs"]}
        run = device.session(root, engine)
        out = run({n: v for n, v in feeds.items() if n in named})
        found[engine["path"]] = next(iter(out.values()))
    return found


@pytest.mark.slow
def test_codes_of_4_bits_move_as_far_as_a_budget_goes(made, tmp_path):
    """A tighter budget leaves more out, and what it sends of packed codes is a part of them and not all or nothing."""
    place, word = made
    whole = len(delta(made).content)
    engines = {name: places.read(place / "old", name) for name in ENGINES}
    assert all(len(known.coded) == 14 for known in engines.values())
    assert {c.bits for c in engines[ENGINES[0]].coded} == {0, 4}
    errors, some = [], set()
    for share in (0.15, 0.3, 0.5, 0.8):
        mirror = tmp_path / f"mirror{share}"
        budget = int(share * whole)
        found = delta(made, budget=budget, mirror=mirror)
        assert len(found.content) <= budget
        assert delta(made, budget=budget).content == found.content
        errors.append(found.packet.error)
        store = tmp_path / f"store{share}"
        device.init(store, place / "old", [word])
        (tmp_path / "up").write_bytes(found.content)
        device.apply(store, tmp_path / "up")
        assert content(device.start(store)[0]) == content(mirror)
        some |= _partly(place, mirror, engines)
    assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < 0.1 < errors[0] < 1
    assert some == {("ort/model.onnx", "nbits"), ("openvino/model.onnx", "int4")}


def _partly(place, mirror, engines):
    """Engines and kinds of packed codes of which some went to a new place and some that would have gone did not."""
    found = set()
    for name, known in engines.items():
        for coded in known.coded:
            tensor = known.tensors[coded.codes]
            old, new, got = (
                np.frombuffer((r / name).read_bytes(), "u1", tensor.length, tensor.offset)
                for r in (place / "old", place / "new", mirror)
            )
            kind = coded.codes.rpartition(".")[2]
            if (
                kind in ("nbits", "int4")
                and (got != old).any()
                and ((got == old) & (new != old)).any()
            ):
                found.add((name, kind))
    return found


@pytest.mark.slow
def test_a_package_of_two_runtimes_goes_through_the_whole_transaction(made, tmp_path):
    place, word = made
    store = tmp_path / "store"
    device.init(store, place / "old", [word])
    first = content(store / "slots" / "a")
    found = delta(made)
    assert {v.engine for v in found.packet.vectors} == set(ENGINES)
    (tmp_path / "up").write_bytes(found.content)
    assert device.apply(store, tmp_path / "up").pending
    for target in ("ort", "openvino"):
        live = device.Live(store, target)
        feeds = {p["name"]: np.ones((1, 4), np.int64) for p in _inputs(place / "new", target)}
        assert all(np.isfinite(v).all() for v in live(feeds).values())
    device.confirm(store)
    serving, record = device.start(store)
    assert (record.counter, package.check(serving)) == (1, [])
    new, got = answers(place / "new"), answers(serving)
    assert all(np.array_equal(new[n], got[n]) for n in ENGINES)
    back = delta(made, "new", "old", counter=2)
    (tmp_path / "back").write_bytes(back.content)
    device.apply(store, tmp_path / "back")
    assert content(store / "slots" / "a") == first
    device.confirm(store)
    assert device.rollback(store).slot == "b"
    assert device.status(store)["slots"] == {"a": "whole", "b": "whole"}


def _inputs(root, target):
    return next(e["inputs"] for e in device.manifest_of(root)["engines"] if e["target"] == target)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spoilt", ["no test for", "is off by"])
def test_each_engine_of_a_package_is_held_to_its_own_test(made, tmp_path, engine, spoilt):
    place, word = made
    found = delta(made).packet
    fine = tuple(v for v in found.vectors if v.engine != engine)
    wrong = next(v for v in found.vectors if v.engine == engine)
    if spoilt == "is off by":
        shut = replace(wrong, tolerance=-1.0)
        fine = (*fine, shut)
    (tmp_path / "up").write_bytes(
        packet.written(replace(found, vectors=fine), packet.private_key(place / "key"))
    )
    device.init(tmp_path / "store", place / "old", [word])
    with pytest.raises(DeltaError, match=spoilt):
        device.apply(tmp_path / "store", tmp_path / "up")
    assert device.start(tmp_path / "store")[1].counter == 0


# MatMulNBits, as its kernel reads it


def product(bits, *, zeros=True, rows=6, columns=40, block=16):
    """A model of one product in blocks, whose last one is half full, and the weight that its kernel multiplies by."""
    draw = np.random.default_rng(bits)
    blocks, middle = math.ceil(columns / block), 1 << (bits - 1)
    codes = draw.integers(0, 2 * middle, (rows, blocks, block)).astype("u1")
    scale = draw.uniform(0.5, 2, (rows, blocks)).astype("f4")
    zero = draw.integers(0, 2 * middle, (rows, blocks)).astype("u1")
    tensors = {"codes": _packed(codes, bits), "scale": scale.reshape(-1)}
    if zeros:
        tensors["zero"] = _packed(zero, bits).reshape(-1)
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=block,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])],
        [numpy_helper.from_array(v, n) for n, v in tensors.items()],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10)


def _packed(codes, bits):
    if bits == 8:
        return codes
    even = np.concatenate([codes, np.zeros_like(codes[..., : codes.shape[-1] % 2])], axis=-1)
    return even[..., ::2] | even[..., 1::2] << 4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
def test_blocks_are_read_as_the_kernel_reads_them(tmp_path, bits, zeros):
    import onnxruntime

    onnx.save(product(bits, zeros=zeros), tmp_path / "model.onnx")
    known = places.read(tmp_path, "model.onnx")
    (coded,) = known.coded
    raw = (tmp_path / "model.onnx").read_bytes()
    held = {n: raw[t.offset : t.offset + t.length] for n, t in known.tensors.items()}
    codes, scale, zero = places.grid(known, coded, held)
    weight = ((codes.astype("f4") - zero) * scale).reshape(6, -1)[:, :40]
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": np.eye(40, dtype="f4")})
    assert np.allclose(found.T, weight, atol=1e-4)
    assert places.bytes_of(known, coded, codes) == held["codes"]


def _moved(known, coded, held, seed=0):
    draw = np.random.default_rng(seed)
    codes, *_ = places.grid(known, coded, held)
    low, high = places.code_range(known, coded)
    codes = np.clip(codes.astype(int) + draw.integers(-1, 2, codes.shape), low, high)
    return {**held, "codes": places.bytes_of(known, coded, codes.astype("u1"))}


@pytest.mark.parametrize("bits", [4, 8])
def test_some_codes_of_a_block_are_a_way_to_send_it(tmp_path, bits):
    from effc.delta import codec

    onnx.save(product(bits, rows=24, columns=64), tmp_path / "model.onnx")
    known = places.read(tmp_path, "model.onnx")
    (coded,) = known.coded
    raw = (tmp_path / "model.onnx").read_bytes()
    old = {n: raw[t.offset : t.offset + t.length] for n, t in known.tensors.items()}
    new = _moved(known, coded, old)
    unit = steps.unit(known, coded, old, new, 1.0)
    sent = {}
    for way in unit.candidates[1:]:
        (part,) = way.parts
        made = codec.decode(part.tensor, part.encoding, part.payload, old["codes"])
        values = [_value(known, coded, {**old, "codes": c}) for c in (made, new["codes"])]
        assert way.error == pytest.approx(float(((values[0] - values[1]) ** 2).sum()), abs=1e-3)
        sent[way.error] = made
    assert len(sent) >= 4 and sent[0.0] == new["codes"]


def _value(known, coded, held):
    codes, scale, zero = places.grid(known, coded, held)
    return (codes.astype(float) - zero) * scale


def test_codes_of_another_kind_go_with_their_scales_or_not_at_all(tmp_path):
    """Two bits, an order of columns, zero points in float: nothing is known of what a code of them is worth."""
    model = product(4)
    next(a for a in model.graph.node[0].attribute if a.name == "bits").i = 2
    onnx.save(model, tmp_path / "model.onnx")
    known = places.read(tmp_path, "model.onnx")
    (coded,) = known.coded
    raw = (tmp_path / "model.onnx").read_bytes()
    old = {n: raw[t.offset : t.offset + t.length] for n, t in known.tensors.items()}
    new = {n: bytes(len(v)) for n, v in old.items()}
    (way,) = steps.unit(known, coded, old, new, 1.0).candidates
    assert way.error == 0 and {p.tensor.name for p in way.parts} == {"codes", "scale", "zero"}


def test_an_importance_of_another_shape_is_refused(tmp_path):
    onnx.save(product(4), tmp_path / "model.onnx")
    known = places.read(tmp_path, "model.onnx")
    (coded,) = known.coded
    raw = (tmp_path / "model.onnx").read_bytes()
    old = {n: raw[t.offset : t.offset + t.length] for n, t in known.tensors.items()}
    with pytest.raises(DeltaError, match=r"importance of 'codes' is \[7\]") as refused:
        steps.unit(known, coded, old, _moved(known, coded, old), np.ones(7))
    assert "one number" in refused.value.hint


def test_a_table_that_a_product_reads_too_moves_with_both_scales():
    """The codes of a tied table in blocks have a scale for the product and one for the lookup."""
    model = product(8, zeros=False, rows=30, columns=32)
    tensors = [numpy_helper.from_array(np.ones(30, "f4"), "rows")]
    tensors.append(numpy_helper.from_array(np.array([1]), "one"))
    tensors.append(numpy_helper.from_array(np.array([0, 32]), "flat"))
    tensors.append(numpy_helper.from_array(np.array(128, "f4"), "middle"))
    model.graph.initializer.extend(tensors)
    for kind, ins, out, how in (
        ("Unsqueeze", ["rows", "one"], "wide", {}),
        ("Gather", ["codes", "ids"], "g", {}),
        ("Reshape", ["g", "flat"], "r", {}),
        ("Cast", ["r"], "c", {"to": TensorProto.FLOAT}),
        ("Sub", ["c", "middle"], "s", {}),
        ("Gather", ["wide", "ids"], "h", {}),
        ("Mul", ["s", "h"], "t", {}),
    ):
        model.graph.node.append(helper.make_node(kind, ins, [out], **how))
    known = {t.name: None for t in model.graph.initializer}
    (coded,) = places._coded(model, known)
    assert (coded.bits, coded.scale, coded.others) == (8, "scale", ("rows",))
    assert coded.names == ["codes", "scale", "rows"]
