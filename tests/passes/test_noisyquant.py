"""Offsets in front of grids: where they go, what they gain, what is refused, and what the file holds."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from graphs import Attention, Call, batches, distance, engine, lower, normal, ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import effc
from effc.backends.dialect import DIALECTS, ORT, TENSORRT
from effc.calib.data import Batch
from effc.errors import CalibrationError, EffcError, PreconditionError
from effc.passes.noisyquant import NoisyQuant, Weights, _Search, grid_of
from effc.passes.quantize import Quantize
from effc.quant import noise
from effc.quant.affine import weight_qparams
from effc.quant.scheme import Scheme

SIZE = 16


class Block(nn.Module):
    """A pre-norm block of a vision transformer with channels that are unlike."""

    def __init__(self, size=SIZE):
        super().__init__()
        self.norm, self.attention, self.norm2 = nn.LayerNorm(size), Attention(size), nn.LayerNorm(size)  # fmt: skip
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        for norm in (self.norm, self.norm2):
            nn.init.normal_(norm.bias, std=2.0)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def traced(module=None, *shape):
    torch.manual_seed(0)
    module = (module or Block()).eval()
    return effc.trace(module, {"x": normal(*(shape or (4, 6, SIZE)))}, dims={"x": {0: "batch"}})


def data(*shape):
    return batches("x", *(shape or (16, 6, SIZE)))


def made(kind=NoisyQuant, program=None, seen=None, dialect=TENSORRT, recorded=None, **options):
    program = program or traced()
    options = {"bits": 6, "activation_bits": 4, **options}
    record = effc.apply(kind(**options), program, seen or data(), dialect=dialect, recorded=recorded)  # fmt: skip
    return program, record


def lost(program, x=None, shape=(64, 6, SIZE)):
    x = normal(*shape, seed=9) if x is None else x
    wanted = traced().run(x=x)["output"]
    return distance(wanted, program.run(x=x)["output"])


@pytest.mark.parametrize("target", ["tensorrt", "ort", "openvino"])
def test_less_is_lost_and_only_behind_gelu_is_there_a_node_more(target):
    dialect = DIALECTS[target]
    (plain, _), (shifted, record) = (made(kind, dialect=dialect) for kind in (Quantize, NoisyQuant))
    assert lost(shifted) < (0.85 if dialect.activation.symmetric else 0.95) * lost(plain)
    more = len(ops(shifted)) - len(ops(plain))
    sums = [v for k, v in record.decisions.items() if "gelu:offset" in k and v]
    assert more == len(sums)
    assert record.sites == 6


def test_a_norm_and_the_values_of_attention_take_up_the_offset():
    program, record = made(add=False)
    shifted = {k for k, v in record.decisions.items() if k.endswith(":offset") and v}
    assert shifted == {
        "main/norm:layer_norm:offset", "main/norm2:layer_norm:offset", "main/attention:reshape:offset",
    }  # fmt: skip
    assert ops(program).count("add") == 2


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_fold_is_the_sum_that_it_stands_for(dtype, bound):
    """The offset of each place by a sum of its own, as the graph is before any grid; float32 rounds."""
    from effc.passes.shift import owner, shift

    def fresh():
        torch.manual_seed(0)
        feeds = {"x": normal(4, 6, SIZE).to(dtype)}
        return effc.trace(Block().eval().to(dtype), feeds, dims={"x": {0: "batch"}})

    x, compared = normal(8, 6, SIZE, seed=5).to(dtype), 0
    for place in NoisyQuant().resolve(TENSORRT).places(fresh().only()):
        outputs = []
        for folded in (True, False):
            program = fresh()
            graph = program.only()
            (node,) = [n for n in graph.nodes if n.name == place.value.name]
            readers = list(node.users)
            at = owner(graph, node) if folded else None
            if folded and at is None:
                break
            offset = normal(*node.meta["val"].shape[-1:]).to(dtype)
            moved = shift(graph, "main/x", node, offset, at, readers[0])
            if moved is not node:
                for reader in readers:
                    reader.replace_input_with(node, moved)
            effc.ir.edit.refresh(graph)
            outputs.append(program.run(x=x)["output"])
        else:
            assert float((outputs[0] - outputs[1]).abs().max()) <= bound
            assert distance(*outputs) <= 1e-6
            compared += 1
    assert compared == 3


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 4, 6]), st.booleans(), st.booleans())
def test_on_held_rows_the_choice_is_never_worse_than_no_offset(seed, bits, symmetric, codes):
    """Values of any shape, those that are codes already among them."""
    x, held = (normal(60, 5, seed=seed + i).exp() - 1 for i in range(2))
    if codes:
        x, held = x.round(), held.round()
    scheme = Scheme(bits=bits, signed=symmetric, symmetric=symmetric, narrow=False)
    options = NoisyQuant(bits=bits, activation_bits=bits, clip="range")
    options = dataclasses.replace(options, activation_signed=symmetric, activation_symmetric=symmetric)  # fmt: skip
    plain = grid_of(float(x.min()), float(x.max()), scheme)
    eight = Scheme(axis=0)
    weight = normal(7, 5, seed=seed)
    behind = Weights(weight, weight_qparams(weight, eight)[0], eight)
    search = _Search(options, x, held, behind, plain, scheme)
    none = search._scored(plain, torch.zeros(5), held)
    for dearer_db in (0.0, 1.0):
        assert search.best(dearer_db).loss <= none.loss


@pytest.mark.parametrize("mode", ["paper", "released", "effc"])
def test_what_was_decided_is_replayed_without_data(mode):
    first, record = made(mode=mode)
    again = traced()
    pass_ = NoisyQuant(bits=6, activation_bits=4, mode=mode)
    decisions = json.loads(json.dumps(record.decisions))
    effc.apply(pass_, again, dialect=TENSORRT, recorded=decisions)
    x = normal(4, 6, SIZE, seed=9)
    assert torch.equal(first.run(x=x)["output"], again.run(x=x)["output"])


def test_paper_mode_keeps_the_grids_of_quantize_and_adds_noise_alone():
    _, plain = made(Quantize)
    _, record = made(mode="paper")
    offsets = {k: v for k, v in record.decisions.items() if k.endswith(":offset")}
    for key, value in offsets.items():
        step, _ = plain.decisions[key.removesuffix(":offset")]
        assert record.decisions[key.removesuffix(":offset")][0] == pytest.approx(step, rel=0.02)
        if value:
            assert np.abs(value).max() <= 2.01 * step


def test_codes_that_make_up_for_each_other_and_refitted_weights_lose_less():
    """On inputs whose channels hang together."""
    mix = normal(SIZE, SIZE, seed=8)
    seen = [Batch(inputs={"x": (normal(256, SIZE, seed=s) @ mix).numpy()}) for s in range(2)]
    x, module = (
        normal(256, SIZE, seed=9) @ mix,
        Call(lambda self, x: self.f(x), f=nn.Linear(SIZE, 8)),
    )
    few = {"bits": 3, "activation_bits": 8}
    kinds = {
        "nearest": few, "gptq": {"rounding": "gptq", **few},
        "as it was": {"bits": 8}, "refit": {"bits": 8, "refit": True},
    }  # fmt: skip
    lost_by = {}
    for name, options in kinds.items():
        program = traced(module, 4, SIZE)
        wanted = program.run(x=x)["output"]
        made(program=program, seen=seen, **options)
        lost_by[name] = distance(wanted, program.run(x=x)["output"])
    assert lost_by["gptq"] < 0.8 * lost_by["nearest"]
    assert lost_by["refit"] < lost_by["as it was"]


def test_a_mean_that_quantising_moves_is_put_right():
    program, _ = made()
    x = normal(256, 6, SIZE, seed=9)
    gap = (program.run(x=x)["output"] - traced().run(x=x)["output"]).mean((0, 1))
    plain, _ = made(Quantize)
    was = (plain.run(x=x)["output"] - traced().run(x=x)["output"]).mean((0, 1))
    assert float(gap.norm()) < 0.5 * float(was.norm())


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("target", ["onnx", "ort", "openvino"])
def test_the_file_holds_no_more_codes_than_the_bits(bits, target, tmp_path):
    """Read out of the ONNX file: codes behind every QuantizeLinear are cut to the grid, and outputs are the graph's."""
    program, _ = made(bits=bits, activation_bits=bits, dialect=DIALECTS[target])
    with engine(program, tmp_path, target) as opened:
        x = 9 * normal(4, 6, SIZE, seed=3)
        found = opened({"x": x.numpy()})["output"]
    assert distance(program.run(x=x)["output"], found) < 0.15
    (file,) = tmp_path.rglob("model.onnx")
    model = onnx.load(file)
    values = {v.name: onnx.numpy_helper.to_array(v) for v in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    quantised = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert quantised
    for node in quantised:
        (reader,) = [n for n in model.graph.node if node.output[0] in n.input]
        assert reader.op_type == "Clip"
        low, high = (int(values[name]) for name in reader.input[1:])
        assert high - low == 2**bits - 1


def test_a_linear_without_a_bias_gets_one_where_it_reads_an_offset():
    module = nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, 4, bias=False))
    nn.init.normal_(module[0].bias, std=3.0)
    program = traced(Call(lambda self, x: self.f(x), f=module), 4, SIZE)
    plain = program.clone()
    _, record = made(program=program, seen=data(16, SIZE))
    made(Quantize, program=plain, seen=data(16, SIZE))
    assert len(record.decisions["main/f.0:layer_norm:offset"]) == SIZE
    (linear,) = effc.Select(op="linear").sites(program.only())
    assert len(linear.args) == 3
    x = normal(64, SIZE, seed=9)
    wanted = traced(Call(lambda self, x: self.f(x), f=module), 4, SIZE).run(x=x)["output"]
    assert distance(wanted, program.run(x=x)["output"]) < distance(wanted, plain.run(x=x)["output"])  # fmt: skip


def padded():
    parts = {"norm": nn.LayerNorm(SIZE), "f": nn.Linear(SIZE, 4)}
    nn.init.normal_(parts["norm"].bias, std=3.0)
    return Call(lambda self, x: self.f(F.pad(self.norm(x), (0, 0, 1, 2))), **parts)


def shared():
    parts = {"norm": nn.LayerNorm(SIZE), "f": nn.Linear(SIZE, SIZE)}
    nn.init.normal_(parts["norm"].bias, std=3.0)

    def forward(self, x):
        y = self.norm(x)
        return y + self.f(y)

    return Call(forward, **parts)


def convolved():
    """A convolution with a pad reads what a linear layer reads."""
    parts = {"norm": nn.LayerNorm(SIZE), "f": nn.Linear(SIZE, 4), "c": nn.Conv1d(6, 4, 3, padding=1)}  # fmt: skip
    nn.init.normal_(parts["norm"].bias, std=3.0)

    def forward(self, x):
        y = self.norm(x)
        return self.f(y), self.c(y)

    return Call(forward, **parts)


@pytest.mark.parametrize("module", [padded, shared, convolved])
def test_nothing_in_front_takes_up_an_offset_that_others_would_see(module):
    """A live pad, a residual and a padded convolution behind a norm: a sum of its own, or none."""
    torch.manual_seed(1)
    model = module()
    for add in (True, False):
        program = traced(model, 4, 6, SIZE)
        places = NoisyQuant(select=effc.Select(op="linear")).resolve(TENSORRT).places(program.only())  # fmt: skip
        assert [p.owner for p in places] == [None]
        _, record = made(program=program, add=add, select=effc.Select(op="linear"))
        (key,) = [k for k in record.decisions if k.endswith(":offset")]
        assert bool(record.decisions[key]) is add
        x = normal(8, 6, SIZE, seed=9)
        for name, wanted in traced(model, 4, 6, SIZE).run(x=x).items():
            assert distance(wanted, program.run(x=x)[name]) < 0.15


def test_constant_activations_are_no_trouble():
    ones = [Batch(inputs={"x": np.ones((8, 6, SIZE), np.float32)})]
    for mode in ("paper", "released", "effc"):
        program, _ = made(mode=mode, seen=ones)
        assert torch.isfinite(program.run(x=torch.ones(2, 6, SIZE))["output"]).all()


def test_a_value_that_is_not_a_number_is_refused():
    bad = np.ones((8, 6, SIZE), np.float32)
    bad[3, 2, 1] = np.nan
    with pytest.raises(CalibrationError, match="not a number"):
        made(seen=[Batch(inputs={"x": bad})])


@pytest.mark.parametrize(
    "options", [{"activation_bits": 16}, {"activation_scale": "token"}, {"dtype": "fp8"}]
)
def test_what_has_no_grid_of_integers_is_refused(options):
    with pytest.raises(PreconditionError, match="integer activations") as caught:
        made(**{"bits": 8, "activation_bits": 8, **options}, dialect=DIALECTS["onnx"])
    assert caught.value.hint


@pytest.mark.parametrize("bits", [2, 9])
def test_bits_out_of_range_are_refused_by_the_recipe(bits):
    from effc import recipe

    with pytest.raises(EffcError, match="bits"):
        recipe.build({
            "source": {"transformers": "x"}, "calib": {"file": "y"},
            "passes": [{"pass": "noisyquant", "bits": bits}],
        })  # fmt: skip


def test_padding_is_not_sampled():
    from effc.calib.collectors import Rows

    seen = Rows(64)
    x = normal(8, 6, 4)
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[:, :2] = True
    x[~mask] = 1e9
    seen.update(x, mask)
    assert seen.count == 16 and float(seen.rows.abs().max()) < 1e3


def test_no_offset_where_none_helps_leaves_quantize_as_it_is():
    """Integers that are codes already: zero wins, and the graph is that of quantize with its mean put right."""
    x = torch.randint(-7, 8, (64, SIZE), generator=torch.Generator().manual_seed(0)).float()
    x[0] = 7.0
    seen = [Batch(inputs={"x": x.numpy()})]
    module = Call(lambda self, x: self.f(x), f=nn.Linear(SIZE, 4))
    _, record = made(program=traced(module, 4, SIZE), seen=seen, range="minmax", bits=8)
    assert record.decisions["main/x:offset"] == []


def test_the_file_is_lowered_like_that_of_quantize(tmp_path):
    """No node more where nothing but a norm takes offsets up."""
    module = nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, 4))
    nn.init.normal_(module[0].bias, std=3.0)
    counts = []
    for kind in (Quantize, NoisyQuant):
        program = traced(Call(lambda self, x: self.f(x), f=module), 4, SIZE)
        made(kind, program=program, seen=data(16, SIZE), dialect=ORT, bits=8, activation_bits=8)
        lower(program, tmp_path / kind.name)
        (file,) = (tmp_path / kind.name).rglob("model.onnx")
        counts.append(sorted(n.op_type for n in onnx.load(file).graph.node))
    assert counts[0] == counts[1]


BASES = {
    "angle": {"clip": "cosine", "weight_clip": "output"},
    "slopes": {"clip": "output", "weight_clip": "output", "slopes": True},
}


@pytest.mark.parametrize("base", BASES)
def test_grids_by_outputs_lose_less_than_grids_of_all_values(base):
    """Without any offset, at few bits and with values far out; and they are replayed."""
    seen = [Batch(inputs={"x": (normal(16, 6, SIZE, seed=s) ** 3).numpy()}) for s in range(4)]
    x = normal(64, 6, SIZE, seed=9) ** 3
    few = {"bits": 4, "activation_bits": 4, "seen": seen, "mode": "none"}
    plain, _ = made(range="minmax", clip="range", **few)
    searched, record = made(range="minmax", **few, **BASES[base])
    assert lost(searched, x) < 0.9 * lost(plain, x)
    assert not any(v for k, v in record.decisions.items() if k.endswith(":offset"))
    assert any(v for k, v in record.decisions.items() if k.endswith(":shares"))
    again, _ = made(range="minmax", **{**few, "seen": None}, recorded=record.decisions, **BASES[base])  # fmt: skip
    assert torch.equal(searched.run(x=x)["output"], again.run(x=x)["output"])


def test_slopes_are_of_the_rows_that_are_kept():
    from effc.calib.collectors import Rows
    from effc.calib.slopes import RowSlopes

    rows, slopes = Rows(16, seed=3), RowSlopes(16, seed=3)
    for seed in range(3):
        x, mask = normal(8, 6, 4, seed=seed), torch.rand(8, 6) < 0.7
        rows.update(x, mask)
        slopes.add(x, 2 * x, -1, torch.arange(4), mask)
    for mine, theirs in zip(rows.parts(), slopes.parts(), strict=True):
        assert torch.equal(2 * mine, theirs)


def test_an_error_without_slope_costs_nothing():
    errors, weight, mean = normal(9, 4), normal(3, 4, seed=1), torch.zeros(4)
    slopes = torch.zeros(9, 3)
    assert noise.output_loss(errors, weight, mean, slopes) == 0
    slopes[:, 1] = 2
    only = noise.output_loss(errors, weight[1:2], mean)
    assert noise.output_loss(errors, weight, mean, slopes) == pytest.approx(2 * only)


@pytest.mark.parametrize(
    "options", [{"clip": "cosine", "slopes": True}, {"clip": "range", "weight_clip": "output"}]
)
def test_ways_to_choose_grids_that_exclude_each_other_are_refused(options):
    with pytest.raises(PreconditionError) as caught:
        made(**options)
    assert caught.value.hint


@pytest.mark.parametrize("target", ["ort", "openvino"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_on_the_same_codes_an_engine_is_within_a_step_of_the_graph(target, bits, tmp_path):
    """Fed values that are codes already, in steps of the sums of products of codes."""
    from effc.backends.openvino import OpenVino
    from effc.backends.options import OpenVinoOptions
    from effc.backends.ort import Ort

    layer = nn.Linear(SIZE, 8)
    program = traced(Call(lambda self, x: self.f(x), f=layer), 4, 6, SIZE)
    _, record = made(program=program, bits=bits, activation_bits=bits, dialect=DIALECTS[target])
    step, zero = record.decisions["main/x"]
    offset = torch.tensor(record.decisions["main/x:offset"] or [0.0])
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (4, 6, SIZE)).float()
    middle = zero if zero == 0 else zero - 2 ** (bits - 1)
    x = (codes - middle) * step - offset
    backend = Ort() if target == "ort" else OpenVino(OpenVinoOptions(precision="f32"))
    with backend.open(backend.lower(program.only(), tmp_path), threads=1) as opened:
        found = opened({"x": x.numpy()})["output"]
    wanted = program.run(x=x)["output"].numpy()
    rows = layer.weight.detach().abs().amax(1).numpy() / (2 ** (bits - 1) - 1)
    assert (np.abs(found - wanted) <= step * rows).all()


@pytest.mark.parametrize(
    ("target", "bits"), [("ort", 8), ("ort", 6), ("openvino", 8), ("openvino", 6)]
)
def test_an_engine_is_as_near_to_the_float_model_as_its_graph(target, bits, tmp_path):
    """End to end, of the whole stack, on inputs that calibrated nothing."""
    from effc.backends.openvino import OpenVino
    from effc.backends.options import OpenVinoOptions
    from effc.backends.ort import Ort
    from effc.passes.level import Level

    program, dialect, few = traced(), DIALECTS[target], {"bits": bits, "activation_bits": bits}
    made(Level, program=program, dialect=dialect, alike=True, **few)
    made(program=program, dialect=dialect, rounding="gptq", weight_range="mse", **few)
    x = normal(64, 6, SIZE, seed=9)
    wanted = traced().run(x=x)["output"]
    backend = Ort() if target == "ort" else OpenVino(OpenVinoOptions(precision="f32"))
    with backend.open(backend.lower(program.only(), tmp_path), threads=1) as opened:
        found = torch.from_numpy(opened({"x": x.numpy()})["output"])
    assert distance(wanted, found) <= 1.05 * lost(program, x)
