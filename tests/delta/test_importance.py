"""What weights of a model matter is found again at the initialisers of its package, also behind what passes did."""

import json

import numpy as np
import pytest
import torch
from packages import weights, write

from effc.delta import device, importance, make, packet
from effc.delta import weights as places
from effc.errors import DeltaError, TuneError
from effc.train import moments
from kit import WORDS, cli, save_encoder


def first(pairs):
    return next(iter(pairs))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An encoder in int8, the same in 4 bit, its tensors, and an importance for each."""
    from transformers import AutoModel

    place = tmp_path_factory.mktemp("importance")
    model = save_encoder(place / "model", hidden_size=64, intermediate_size=96)
    (place / "calib.txt").write_text("\n".join(" ".join(WORDS[i : i + 6]) for i in range(8)) + "\n")
    for name, words in (
        ("int8", ["--quantize", "int8", "--calib", place / "calib.txt"]),
        ("w4a16", ["--quantize", "w4a16"]),
    ):
        ran = cli("compile", model, "-o", place / name, "--no-bench", *words)
        assert ran.code == 0, ran.err
    state = AutoModel.from_pretrained(model, add_pooling_layer=False).state_dict()
    names = {o["source"] for o in _origins(place / "int8").values()}
    prefix = first(n for n in names if n.endswith("word_embeddings.weight")).removesuffix(
        "embeddings.word_embeddings.weight"
    )
    values = {prefix + n: t.numpy() for n, t in state.items() if t.is_floating_point()}
    draw = np.random.default_rng(0)
    return place, values, {n: draw.uniform(0.1, 1, v.shape) for n, v in values.items()}


def _origins(root):
    return json.loads((root / "origins.json").read_text())["main"]


def _held(root):
    return places.read(root, device.manifest_of(root)["engines"][0]["path"])


def test_weights_of_an_engine_that_reads_them_transposed(made):
    place, _, known = made
    found, origins = importance.by_initialiser(place / "int8", known), _origins(place / "int8")
    turned = [n for n in found if n.endswith("_int8.t")]
    assert turned
    for name in turned:
        h = known[origins[name.removesuffix(".t")]["source"]].T
        np.testing.assert_array_equal(found[name], h)
    biases = [n for n in found if n.endswith("LayerNorm.bias")]
    assert biases and all(np.array_equal(found[n], known[origins[n]["source"]]) for n in biases)
    assert not any(n.endswith(("_scale", "_zero_point")) for n in found)


def scaled(place):
    """A package whose weights read channels that passes divided by `s`, and the source's tensors."""
    tensors, draw = weights(), np.random.default_rng(5)
    first = tensors["first.codes"] * tensors["first.scale"][:, None]
    s, t = np.exp2(draw.integers(-3, 4, 64)), draw.uniform(0.2, 5, 96)
    wide = first * s
    size = (np.abs(wide).max(1) / 127).astype("f4")
    codes = np.rint(wide / size[:, None]).astype("i1")
    tensors |= {"first.codes": codes, "first.scale": size}
    source = {"one": first, "two": tensors["second"].copy(), "bias": tensors["bias"].copy()}
    tensors["second"] = (tensors["second"] * t).astype("f4")
    tensors["bias"] = (tensors["bias"] * 2).astype("f4")
    root = write(place / "scaled", tensors)
    origins = {
        "first.codes": {"source": "one", "transforms": ["smooth", "quantize bits=8 axis=0 group=0"]},
        "first.scale": {"source": "one", "transforms": ["smooth", "quantize bits=8 axis=0 group=0"]},
        "second": {"source": "two", "transforms": ["awq"]},
        "bias": {"source": "bias", "transforms": ["level"]},
    }  # fmt: skip
    (root / "origins.json").write_text(json.dumps({"main": origins}))
    return root, source, s, t


def test_channels_that_were_scaled_are_told_by_their_values(tmp_path):
    """h ÷ s²; of codes within what rounding to them leaves."""
    root, source, s, t = scaled(tmp_path)
    draw = np.random.default_rng(0)
    h = {n: draw.uniform(0.1, 1, v.shape) for n, v in source.items()}
    found = importance.by_initialiser(root, h, source)
    assert set(found) == {"first.codes", "second", "bias"}
    off = np.abs(found["first.codes"] * s**2 / h["one"] - 1)
    assert np.median(off) < 0.02 and off.max() < 0.15  # most where few codes are left
    np.testing.assert_allclose(found["second"], h["two"] / t**2, rtol=1e-5)
    np.testing.assert_allclose(found["bias"], h["bias"] / 4, rtol=1e-5)


def test_a_scale_that_is_not_known_is_refused_and_so_are_other_values(tmp_path):
    root, source, *_ = scaled(tmp_path)
    h = {n: np.ones(v.shape) for n, v in source.items()}
    with pytest.raises(DeltaError, match="was scaled") as refused:
        importance.by_initialiser(root, h)
    assert "values of the source" in refused.value.hint
    for name in ("one", "two"):
        other = source | {name: np.random.default_rng(9).normal(size=source[name].shape)}
        with pytest.raises(DeltaError, match="no scaled") as refused:
            importance.by_initialiser(root, h, other)
        assert "compiled of" in refused.value.hint


def test_packed_codes_have_that_of_their_blocks(made):
    place, values, known = made
    found = importance.by_initialiser(place / "w4a16", known, values)
    packed = [n for n in found if n.endswith(".nbits")]
    assert packed
    for name in packed:
        source = _origins(place / "w4a16")[name.removesuffix(".nbits")]["source"]
        rows, blocks, block = found[name].shape
        flat = found[name].reshape(rows, blocks * block)[:, : known[source].shape[1]]
        np.testing.assert_array_equal(flat, known[source])


@pytest.mark.parametrize("kind", ["int8", "w4a16"])
def test_make_takes_it_as_it_is(made, tmp_path, kind):
    place, values, known = made
    packet.keygen(tmp_path / "key", tmp_path / "key.pub")
    weighed = importance.by_initialiser(place / kind, known, values)
    sent = make.make(
        place / kind, place / kind, key=tmp_path / "key", counter=1, budget=10**6, importance=weighed
    )  # fmt: skip
    assert not sent.packet.entries
    for each in _held(place / kind).coded:
        if each.codes in weighed:
            held = _held(place / kind)
            content = {n: _bytes(place / kind, held.tensors[n]) for n in each.names if n in held.tensors}  # fmt: skip
            assert places.grid(held, each, content)[0].shape == weighed[each.codes].shape


@pytest.mark.parametrize("shape", [(), (64,), (63, 64), (2, 64, 64)])
def test_an_importance_of_another_shape_is_refused_also_for_packed_codes(made, shape):
    place, _, known = made
    name = first(n for n in known if n.endswith("query.weight"))
    for kind in ("int8", "w4a16"):
        with pytest.raises(DeltaError, match="does not go with") as refused:
            importance.by_initialiser(place / kind, {name: np.ones(shape)})
        assert "shape of the tensor" in refused.value.hint


def _bytes(root, tensor):
    return (root / tensor.file).read_bytes()[tensor.offset : tensor.offset + tensor.length]


def told(place, transforms, source="second"):
    """A package of which one tensor went through these passes."""
    root = write(place / "p", weights())
    origin = {"main": {"second": {"source": source, "transforms": transforms}}}
    (root / "origins.json").write_text(json.dumps(origin))
    return root


@pytest.mark.parametrize(
    ("word", "transforms", "source"),
    [
        ("'pca-rotate'", ["pca-rotate"], "second"),
        ("'tuned'", ["smooth", "tuned"], "second"),
        ("of several tensors", [], "second+second"),
        ("does not go with", ["concatenate"], "second+second"),
        ("does not go with", ["transpose"], "second"),
    ],
)
def test_what_a_pass_made_of_it_is_known_or_refused(tmp_path, word, transforms, source):
    known = {"second": weights()["second"] ** 2}
    with pytest.raises(DeltaError, match=word) as refused:
        importance.by_initialiser(told(tmp_path, transforms, source), known)
    assert refused.value.hint


def test_tensors_that_were_joined_or_turned_are_so_too(tmp_path):
    h = weights()["second"].astype("f8") ** 2
    root = told(tmp_path, ["transpose", "concatenate"], "a+b")
    known = {"a": h[:3].T, "b": h[3:].T}
    np.testing.assert_array_equal(importance.by_initialiser(root, known)["second"], h)
    assert importance.by_initialiser(root, {"a": known["a"]}) == {}  # of b nobody knows


def test_what_cannot_be_joined_is_refused(tmp_path):
    root = told(tmp_path, ["concatenate"], "a+b")
    for b in (np.ones(()), np.ones((5, 95))):
        with pytest.raises(DeltaError, match="cannot be joined") as refused:
            importance.by_initialiser(root, {"a": np.ones((3, 96)), "b": b})
        assert "shape of the tensor" in refused.value.hint


@pytest.mark.parametrize("text", ["{}", "[]", "no json"])
def test_a_package_that_does_not_say_where_tensors_come_from_is_refused(tmp_path, text):
    root = told(tmp_path, [])
    (root / "origins.json").write_text(text)
    with pytest.raises(DeltaError, match="where its tensors come from"):
        importance.by_initialiser(root, {})


def test_moments_of_inputs_are_what_an_error_of_a_weight_costs_its_layer():
    """E ‖εx‖² over many draws of ε is Σ h ε²."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    x = torch.randn(50, 6) * torch.arange(1, 7)
    found = moments.of_inputs(model, [{"input": x[:20]}, {"input": x[20:]}])
    assert {n: h.shape for n, h in found.items()} == {"0.weight": (4, 6), "2.weight": (3, 4)}
    noise = torch.randn(4000, 4, 6)
    cost = torch.einsum("nij,bj->nbi", noise, x).square().sum(-1).mean()
    told = (found["0.weight"] * noise.square()).sum((1, 2)).mean()
    assert abs(cost / told - 1) < 0.05


class ByName(torch.nn.Module):
    """A model that gives its layer what it reads by name."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.inner(input=x)


def test_moments_are_of_layers_that_are_called_by_name_too():
    x = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    found = moments.of_inputs(ByName(), [{"x": x}])["inner.weight"]
    assert torch.equal(found, torch.tensor([[5.0, 4, 5]]).expand(2, 3))


def test_moments_of_one_row_without_a_batch_are_its_squares():
    found = moments.of_inputs(ByName(), [{"x": torch.tensor([1.0, 2, 3])}])["inner.weight"]
    assert torch.equal(found, torch.tensor([[1.0, 4, 9]]).expand(2, 3))


def test_no_samples_and_no_numbers_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    for samples in ([], [{"input": torch.full((1, 2), float("nan"))}]):
        with pytest.raises(TuneError) as refused:
            moments.of_inputs(model, samples)
        assert refused.value.hint
