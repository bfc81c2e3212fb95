"""Quantised layers really run in int8 kernels, and what is reported is what onnxruntime made of them."""

import numpy as np
import onnx
import pytest
import torch
from graphs import (
    Attention,
    Call,
    Projections,
    Tied,
    batches,
    distance,
    engine,
    lower,
    normal,
    quantize,
)
from torch import nn

import effc
from effc.backends.ort import Ort
from effc.backends.ort_engine import OrtEngine
from effc.calib.data import Batch
from effc.errors import LoweringError
from effc.passes import CANONICAL, PASSES
from effc.verify import invariance

WORDS, LENGTH = 200, 12


def kinds(folder):
    return [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]


@pytest.fixture(scope="module")
def bert():
    """BERT with two small random layers, as transformers builds it."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def sentences(count, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, WORDS, (count, length))
    return {"input_ids": ids, "attention_mask": np.ones((count, length), np.int64)}


@pytest.fixture(scope="module")
def program(bert):
    """The same BERT in int8."""
    inputs = {name: torch.from_numpy(value) for name, value in sentences(2).items()}
    program = effc.trace(bert, inputs, dims={n: {0: "batch", 1: "sequence"} for n in inputs})
    for word in CANONICAL:
        effc.apply(PASSES[word](), program, probes={"main": [inputs]})
    quantize(program, [Batch(inputs=sentences(8, seed=seed)) for seed in range(4)])
    return program


@pytest.fixture(scope="module")
def built(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return folder, lower(program, folder)


@pytest.mark.slow
def test_every_layer_of_an_encoder_is_fused(built):
    _, lowered = built
    linear = [site for site in lowered.sites if site.op == "linear"]
    assert len(linear) == 12
    assert {site.kernel for site in linear} == {"MatMulIntegerToFloat"}
    assert all(site.int8 and not site.reason for site in lowered.sites)
    assert lowered.opset == 23
    assert lowered.requires[0].startswith("onnxruntime>=")


@pytest.mark.slow
def test_biases_are_inside_and_attention_has_no_transposes(built):
    folder, _ = built
    graph = onnx.load(folder / "model.onnx").graph
    products = [n for n in graph.node if n.op_type == "MatMulIntegerToFloat"]
    assert all(len(node.input) == 7 and node.input[6] for node in products)
    found = kinds(folder)
    assert found.count("Attention") == 2
    assert "Transpose" not in found
    assert "MatMul" not in found


@pytest.mark.slow
def test_an_encoder_in_int8_agrees_with_the_graph(program, built):
    feeds = sentences(4, seed=9)
    wanted = program.run({n: torch.from_numpy(v) for n, v in feeds.items()})["last_hidden_state"]
    with Ort().open(built[1], threads=1) as opened:
        found = opened(feeds)["last_hidden_state"]
    assert distance(wanted, found) < 0.02


@pytest.mark.slow
def test_an_embedding_does_not_depend_on_neighbours_or_padding(built):
    together = sentences(4, seed=3)
    lengths = [3, 12, 7, 1]
    for row, length in enumerate(lengths):
        together["attention_mask"][row, length:] = 0
        together["input_ids"][row, length:] = 0
    alone = [
        {name: value[row : row + 1, :length] for name, value in together.items()}
        for row, length in enumerate(lengths)
    ]
    with Ort().open(built[1], threads=1) as opened:
        assert invariance(opened, alone, together) <= 1e-5
        assert (
            invariance(
                opened, [{n: v[i : i + 1] for n, v in together.items()} for i in range(4)], together
            )
            <= 1e-5
        )


@pytest.mark.parametrize("shape", [(1, 1), (1, 32), (5, 2)])
@pytest.mark.slow
def test_the_engine_takes_every_shape(built, shape):
    with Ort().open(built[1], threads=1) as opened:
        assert opened(sentences(*shape))["last_hidden_state"].shape == (*shape, 32)
        assert [p.name for p in opened.inputs] == ["input_ids", "attention_mask"]
        assert opened.inputs[0].shape == ("batch", "sequence")


def test_attention_of_any_module_loses_its_transposes(tmp_path):
    torch.manual_seed(0)
    program = effc.trace(
        Attention(), {"x": normal(2, 5, 32)}, dims={"x": {0: "batch", 1: "sequence"}}
    )
    data = batches("x", 2, 5, 32)
    quantize(program, data)
    with engine(program, tmp_path) as opened:
        found = opened(data[0].inputs)["output"]
    assert kinds(tmp_path).count("Transpose") == 0
    assert distance(program.run(x=torch.from_numpy(data[0].inputs["x"]))["output"], found) < 0.02


class Masked(nn.Module):
    """Attention whose mask is one row for all queries, as a float and as a bool."""

    def __init__(self, *, is_float):
        super().__init__()
        self.is_float = is_float

    def forward(self, x, mask):
        q = x.view(*x.shape[:2], 2, -1).transpose(1, 2)
        seen = mask[:, None, None, :] > 0
        bias = torch.where(seen, 0.0, -1e9) if self.is_float else seen
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=bias)


@pytest.mark.parametrize("is_float", [True, False])
def test_a_mask_that_is_one_row_for_all_queries(tmp_path, is_float):
    feeds = {"x": normal(2, 5, 16), "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    program = effc.trace(Masked(is_float=is_float), feeds)
    with engine(program, tmp_path) as opened:
        found = opened({name: value.numpy() for name, value in feeds.items()})["output"]
    assert distance(program.run(feeds)["output"], found) < 1e-5


def test_one_linear_layer_agrees_with_the_graph_to_the_last_bits(tmp_path):
    program = effc.trace(nn.Linear(32, 16), normal(2, 32))
    data = batches("input", 8, 32)
    quantize(program, data)
    with engine(program, tmp_path) as opened:
        found = opened(data[0].inputs)["output"]
    assert kinds(tmp_path) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    assert (
        distance(program.run(input=torch.from_numpy(data[0].inputs["input"]))["output"], found)
        < 1e-5
    )


def test_a_layer_without_bias_is_fused_too(tmp_path):
    program = effc.trace(nn.Linear(32, 16, bias=False), normal(2, 32))
    quantize(program, batches("input", 8, 32))
    (site,) = lower(program, tmp_path).sites
    assert (site.kernel, site.int8) == ("MatMulIntegerToFloat", True)


def test_a_value_that_three_layers_read_is_quantised_once(tmp_path):
    program = effc.trace(Projections(16), normal(2, 4, 16))
    quantize(program, batches("x", 2, 4, 16))
    lowered = lower(program, tmp_path)
    assert kinds(tmp_path).count("QuantizeLinear") == 1
    assert [site.name for site in lowered.sites] == ["q", "k", "v"]
    assert all(site.int8 for site in lowered.sites)


# The kernel rounds activations to 8 bit per block.
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, 32)])
def test_weight_only_layers_run_in_matmulnbits(bits, group, tmp_path):
    torch.manual_seed(0)
    program = effc.trace(
        nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8)), normal(2, 64)
    )
    quantize(program, bits=bits, activation_bits=16, group=group)
    x = normal(8, 64)
    with engine(program, tmp_path) as opened:
        found = opened({"input": x.numpy()})["output"]
    assert kinds(tmp_path).count("MatMulNBits") == 2
    assert 1e-5 < distance(program.run(input=x)["output"], found) < 1e-2
    sites = lower(program, tmp_path).sites
    assert [(s.kernel, s.int8) for s in sites] == [("MatMulNBits", True)] * 2


@pytest.mark.parametrize(("bits", "lookup"), [(8, "Gather"), (4, "GatherBlockQuantized")])
def test_a_tied_table_is_looked_up_and_multiplied_from_the_same_bytes(bits, lookup, tmp_path):
    program = effc.trace(Tied(words=96, size=64), torch.ones(2, 6, dtype=torch.int64))
    exact = program.clone()
    quantize(program, bits=bits, activation_bits=16, group=32, table_bits=bits)
    ids = torch.arange(24).reshape(4, 6) * 4
    with engine(program, tmp_path) as opened:
        found = opened({"ids": ids.numpy()})["output"]
    assert distance(program.run(ids=ids)["output"], found) < 1e-2
    assert distance(exact.run(ids=ids)["output"], found) < (0.02 if bits == 8 else 0.2)
    assert {lookup, "MatMulNBits"} <= set(kinds(tmp_path)) and "MatMul" not in kinds(tmp_path)
    tables = [
        i for i in onnx.load(tmp_path / "model.onnx").graph.initializer if np.prod(i.dims) > 1000
    ]
    assert len(tables) == 1 and np.prod(tables[0].dims) == 96 * 64 * bits // 8
    assert all(site.int8 for site in lower(program, tmp_path).sites)


def test_a_scale_per_token_stays_in_integers(tmp_path):
    """A token a thousand times as large, and one of nothing but zeros, cost the others nothing."""
    program = effc.trace(
        nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8, bias=False)), normal(2, 5, 64)
    )
    exact = program.clone()
    quantize(program, activation_scale="token")
    x = normal(3, 5, 64)
    x[0, 0] *= 1000
    x[1, 2] = 0
    with engine(program, tmp_path) as opened:
        found = opened({"input": x.numpy()})["output"]
    assert distance(program.run(input=x)["output"], found) < 1e-5
    wanted = exact.run(input=x)["output"]
    for row in range(1, 5):
        assert distance(wanted[0, row], found[0, row]) < 0.03
    assert kinds(tmp_path).count("MatMulIntegerToFloat") == 2
    assert "DequantizeLinear" not in kinds(tmp_path)
    assert all(site.int8 for site in lower(program, tmp_path).sites)
    as_arithmetic = tmp_path / "onnx"
    with engine(program, as_arithmetic, "onnx") as opened:
        assert distance(found, opened({"input": x.numpy()})["output"]) < 0.02


def test_four_bits_take_half_the_room(tmp_path):
    sizes = {}
    for bits in (4, 8):
        program = effc.trace(nn.Linear(256, 256), normal(2, 256))
        quantize(program, bits=bits, activation_bits=16, group=32)
        lower(program, tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits) / "model.onnx").stat().st_size
    assert sizes[4] < 0.65 * sizes[8]


@pytest.mark.parametrize(
    ("layer", "shape", "kernel"),
    [
        (nn.Linear(32, 32), (4, 32), "MatMulIntegerToFloat"),
        (nn.Conv2d(16, 16, 3), (2, 16, 6, 6), "QLinearConv"),
    ],
)
def test_codes_of_four_bits_beside_bytes_lie_in_half_a_byte_and_run_as_bytes(
    layer, shape, kernel, tmp_path
):
    torch.manual_seed(0)
    program = effc.trace(nn.Sequential(layer, nn.Sigmoid()), torch.randn(*shape))
    quantize(program, batches("input", *shape), bits=4)
    lowered = lower(program, tmp_path)
    assert [(site.kernel, site.int8) for site in lowered.sites] == [(kernel, True)]
    model = onnx.load(tmp_path / "model.onnx")
    (packed,) = [v for v in model.graph.initializer if v.data_type == onnx.TensorProto.INT4]
    assert len(packed.raw_data) == layer.weight.numel() / 2
    x = normal(*shape, seed=9)
    wanted = program.run(input=x)["output"]
    with Ort().open(lowered, threads=1) as opened:
        assert distance(torch.from_numpy(opened({"input": x.numpy()})["output"]), wanted) < 0.01


def test_a_tied_table_is_one_initialiser_and_both_its_sites_are_int8(tmp_path):
    program = effc.trace(Tied(), torch.ones(2, 6, dtype=torch.int64))
    ids = np.random.default_rng(0).integers(0, 40, (4, 6))
    quantize(program, [Batch(inputs={"ids": ids})])
    with engine(program, tmp_path) as opened:
        found = opened({"ids": ids})["output"]
    sites = lower(program, tmp_path).sites
    assert [(s.name, s.int8) for s in sites] == [("embed", True), ("head", True)]
    large = [
        i for i in onnx.load(tmp_path / "model.onnx").graph.initializer if np.prod(i.dims) >= 640
    ]
    assert [(list(i.dims), i.data_type) for i in large] == [([40, 16], onnx.TensorProto.INT8)]
    assert distance(program.run(ids=torch.from_numpy(ids))["output"], found) < 1e-5


@pytest.mark.slow
def test_nothing_quantised_means_no_sites_and_the_same_numbers(bert, tmp_path):
    inputs = {name: torch.from_numpy(value) for name, value in sentences(2).items()}
    program = effc.trace(bert, inputs, dims={n: {0: "batch", 1: "sequence"} for n in inputs})
    assert lower(program, tmp_path).sites == ()
    feeds = sentences(3, 5, seed=5)
    with torch.no_grad():
        wanted = bert(**{n: torch.from_numpy(v) for n, v in feeds.items()}).last_hidden_state
    with engine(program, tmp_path) as opened:
        assert distance(wanted, opened(feeds)["last_hidden_state"]) < 1e-5


def test_a_layer_that_fell_back_is_named_with_a_reason(tmp_path):
    module = Call(lambda self, x: self.conv(x), conv=nn.Conv2d(3, 4, 3))
    program = effc.trace(module, normal(2, 3, 8, 8))
    quantize(program, batches("x", 2, 3, 8, 8))
    (site,) = lower(program, tmp_path).sites
    assert (site.name, site.op, site.int8) == ("conv", "conv2d", False)
    assert "float" in site.reason


@pytest.mark.slow
def test_the_same_program_gives_the_same_bytes(program, built, tmp_path):
    lower(program, tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == (built[0] / "model.onnx").read_bytes()


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(LoweringError, match=r"onnxruntime refuses model\.onnx"):
        OrtEngine(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(64, 48), (5, 64)),
        (nn.Linear(37, 21), (1, 37)),
        (nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten()), (2, 8, 10, 10)),
        (nn.Sequential(nn.Conv1d(3, 6, 5), nn.ReLU(), nn.Flatten()), (2, 3, 20)),
        (nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Flatten()), (2, 8, 9, 9)),
    ],
    ids=["linear", "one row", "conv2d", "conv1d", "groups"],
)
def test_sums_do_not_saturate_where_weights_and_inputs_are_largest(layer, shape, tmp_path):
    """Kernels without VNNI add two products in 16 bit: 255 · (127 + 127) would be cut off at 32767."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.sign(parameter) * (0.9 + 0.1 * torch.rand_like(parameter))
    program = effc.trace(layer, torch.sign(normal(2, *shape[1:])))
    name = program.only().inputs[0]
    x = torch.sign(normal(*shape)).numpy()
    quantize(program, [Batch(inputs={name: x})])
    wanted = program.run({name: torch.from_numpy(x)})["output"]
    with engine(program, tmp_path) as opened:
        assert distance(wanted, opened({name: x})["output"]) < 0.01


def test_the_overflow_fix_can_be_left_out():
    program = effc.trace(nn.Linear(64, 8), normal(2, 64))
    scales = []
    for fix in (True, False):
        made = program.clone()
        quantize(made, batches("input", 4, 64), overflow_fix=fix)
        scales.append(made.only().tensors()["weight_scale"])
    assert bool((scales[0] > scales[1]).any())
    assert torch.equal(scales[1], program.only().tensors()["weight"].abs().amax(1) / 127)


class BlockAttention(Attention):
    """Attention within blocks of four positions: its views split the length, not only the heads."""

    def forward(self, x):
        batch, length, size = x.shape

        def split(y):
            return y.view(batch * 2, length // 2, self.heads, -1).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(batch, length, size))


def test_attention_within_blocks_keeps_its_blocks(tmp_path):
    torch.manual_seed(0)
    program = effc.trace(BlockAttention(), {"x": normal(2, 8, 32)}, dims={"x": {0: "batch"}})
    data = batches("x", 2, 8, 32)
    quantize(program, data)
    with engine(program, tmp_path) as opened:
        found = opened(data[0].inputs)["output"]
    assert distance(program.run(x=torch.from_numpy(data[0].inputs["x"]))["output"], found) < 0.02


def test_one_number_behind_a_product_is_no_bias_of_it(tmp_path):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8, bias=False)
            self.shift = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.layer(x) + self.shift

    program = effc.trace(Shifted(), normal(2, 16))
    data = batches("x", 4, 16)
    quantize(program, data)
    with engine(program, tmp_path) as opened:
        found = opened(data[0].inputs)["output"]
    assert distance(program.run(x=torch.from_numpy(data[0].inputs["x"]))["output"], found) < 1e-5


def test_a_graph_above_the_limit_keeps_its_weights_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("effc.backends.onnx.EXTERNAL_BYTES", 1000)
    program = effc.trace(nn.Linear(64, 64), normal(2, 64))
    data = batches("input", 4, 64)
    quantize(program, data)
    lowered = lower(program, tmp_path)
    assert lowered.files == ("model.onnx", "model.onnx.data")
    assert (tmp_path / "model.onnx").stat().st_size < 4096
    assert lowered.sites[0].int8
    with engine(program, tmp_path) as opened:
        found = opened(data[0].inputs)["output"]
    wanted = program.run(input=torch.from_numpy(data[0].inputs["input"]))["output"]
    assert distance(wanted, found) < 1e-5
