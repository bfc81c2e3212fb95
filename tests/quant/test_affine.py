"""Scales, zero points, codes and packed codes, against plain float64 loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effc.quant import affine
from effc.quant.affine import dequantize, fake_quantize, qparams, quantize, weight_qparams
from effc.quant.pack import pack, unpack
from effc.quant.scheme import Scheme

BITS = st.sampled_from([3, 4, 6, 8])
SCHEMES = st.builds(Scheme, bits=BITS, signed=st.booleans(), symmetric=st.booleans())
ENDS = st.floats(-1e6, 1e6, width=32)
INT8 = Scheme(axis=0)
UINT8 = Scheme(signed=False, symmetric=False)


def oracle_code(x: float, scale: float, zero: int, scheme: Scheme) -> int:
    """One number at a time; Python's `round` is half to even, the division float32 as in ONNX."""
    share = float(np.float32(x) / np.float32(scale))
    return min(max(round(share) + zero, scheme.low), scheme.high)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(ENDS, ENDS, SCHEMES)
def test_zero_is_on_every_grid(a, b, scheme):
    scale, zero = qparams(torch.tensor(min(a, b)), torch.tensor(max(a, b)), scheme)
    assert zero.dtype == scheme.dtype and scale.dtype == torch.float32
    assert scheme.low <= int(zero) <= scheme.high
    assert fake_quantize(torch.zeros(3), scale, zero, scheme).eq(0).all()
    if scheme.symmetric:
        assert int(zero) == 0


@given(ENDS, ENDS, SCHEMES)
def test_a_scale_is_a_normal_number_and_covers_the_range(a, b, scheme):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    scale, zero = qparams(torch.tensor(low), torch.tensor(high), scheme)
    assert float(scale) >= affine.SMALLEST * 0.999
    if max(-low, high) < 1e-6:
        return
    slack = float(scale) * 0.501  # the zero point is rounded
    if scheme.signed or not scheme.symmetric:
        assert (scheme.low - int(zero)) * float(scale) <= low + slack
    assert (scheme.high - int(zero)) * float(scale) >= high - slack


@pytest.mark.parametrize("scheme", [Scheme(), UINT8, Scheme(symmetric=False), Scheme(signed=False)])
@pytest.mark.parametrize("end", [0.0, 1e-40, 1e-30])
def test_a_range_of_nothing_has_scale_one(scheme, end):
    scale, zero = qparams(torch.tensor(-end), torch.tensor(end), scheme)
    assert (float(scale), int(zero)) == (1.0, 0)


def test_a_range_that_misses_zero_is_widened():
    scale, zero = qparams(torch.tensor(2.0), torch.tensor(5.1), UINT8)
    assert (round(float(scale), 6), int(zero)) == (0.02, 0)
    scale, zero = qparams(torch.tensor(-5.1), torch.tensor(-2.0), UINT8)
    assert (round(float(scale), 6), int(zero)) == (0.02, 255)


def test_the_largest_floats_still_have_a_finite_scale():
    most = torch.tensor(torch.finfo(torch.float32).max)
    for scheme in (Scheme(), UINT8):
        scale, _ = qparams(-most, most, scheme)
        assert torch.isfinite(scale)


@pytest.mark.parametrize("end", [float("nan"), float("inf")])
def test_a_range_without_a_finite_end_is_refused(end):
    with pytest.raises(ValueError, match="finite"):
        qparams(torch.tensor([0.0, 0.0]), torch.tensor([1.0, end]), Scheme())


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), SCHEMES)
def test_codes_agree_with_a_loop_and_stay_in_their_bits(values, scheme):
    x = torch.tensor(values)
    scale, zero = qparams(x.min() / 2, x.max() / 2, scheme)
    codes = quantize(x, scale, zero, scheme)
    assert codes.dtype == scheme.dtype
    assert codes.tolist() == [oracle_code(v, float(scale), int(zero), scheme) for v in values]
    assert int(codes.max()) <= scheme.high and int(codes.min()) >= scheme.low
    assert int(codes.max()) - int(codes.min()) < 1 << scheme.bits


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), SCHEMES)
def test_inside_the_range_a_round_trip_errs_by_half_a_step(values, scheme):
    x = torch.tensor(values)
    if scheme.symmetric and not scheme.signed:
        x = x.abs()
    scale, zero = qparams(x.min(), x.max(), scheme)
    if float(scale) == 1.0:
        return
    low, high = ((end - int(zero)) * float(scale) for end in (scheme.low, scheme.high))
    error = (fake_quantize(x, scale, zero, scheme) - x).abs()
    inside = (x >= low) & (x <= high)
    assert (error[inside] <= scale * 0.5001).all()


def test_rounding_is_half_to_even_and_divides():
    one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int8)
    assert quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), one, zero, Scheme()).tolist() == [
        0,
        2,
        2,
        0,
        -2,
    ]
    scale = torch.tensor(0.1)
    x = torch.arange(-1000, 1000) * 0.05
    assert quantize(x, scale, zero, Scheme()).tolist() == [
        oracle_code(v, float(scale), 0, Scheme()) for v in x.tolist()
    ]


def test_onnxruntime_makes_the_same_codes():
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    x = normal(4, 500) * 3
    scale, zero = qparams(x.min(), x.max(), UINT8)
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    kinds = onnx.TensorProto
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [
            onnx.helper.make_tensor_value_info("x", kinds.FLOAT, [4, 500]),
            onnx.helper.make_tensor_value_info("s", kinds.FLOAT, []),
            onnx.helper.make_tensor_value_info("z", kinds.UINT8, []),
        ],
        [onnx.helper.make_tensor_value_info("q", kinds.UINT8, [4, 500])],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (codes,) = session.run(None, {"x": x.numpy(), "s": scale.numpy(), "z": zero.numpy()})
    assert (codes == quantize(x, scale, zero, UINT8).numpy()).all()


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_each_index_of_the_axis_has_its_own_scale(axis, method):
    weight = normal(6, 5, 3) * torch.arange(1, 7)[:, None, None]
    scheme = Scheme(axis=axis)
    scale, zero = weight_qparams(weight, scheme, method=method)
    assert scale.shape == (weight.shape[axis],) and zero.eq(0).all()
    back = fake_quantize(weight, scale, zero, scheme)
    if method == "minmax":
        wanted = weight.abs().movedim(axis, 0).flatten(1).amax(1) / 127
        assert torch.allclose(scale, wanted)
        assert ((back - weight).abs().movedim(axis, 0).flatten(1).amax(1) <= scale * 0.5001).all()


def test_groups_have_their_own_scales():
    weight = normal(4, 12)
    weight[:, 4:8] *= 100
    scheme = Scheme(bits=4, axis=0, group=4)
    scale, zero = weight_qparams(weight, scheme)
    assert scale.shape == zero.shape == (4, 3)
    for row in range(4):
        for group in range(3):
            part = weight[row, 4 * group : 4 * group + 4]
            assert float(scale[row, group]) == pytest.approx(float(part.abs().max()) / 7)
    codes = quantize(weight, scale, zero, scheme)
    assert codes.min() >= -7 and codes.max() <= 7
    wide = scale.repeat_interleave(4, dim=1)
    assert torch.equal(dequantize(codes, scale, zero, scheme), codes.float() * wide)
    assert ((dequantize(codes, scale, zero, scheme) - weight).abs() <= wide * 0.5001).all()


def test_a_short_last_group_is_refused():
    with pytest.raises(ValueError, match=r"\[4, 10\] has no whole groups of 4"):
        weight_qparams(normal(4, 10), Scheme(bits=4, axis=0, group=4))
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        weight_qparams(normal(4, 8, 8), Scheme(bits=4, axis=0, group=4))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_weight_is_refused(shape):
    with pytest.raises(ValueError, match="nothing to quantise"):
        weight_qparams(torch.zeros(shape), INT8)


def test_a_dead_channel_stays_zero():
    weight = normal(3, 8)
    weight[1] = 0
    scale, zero = weight_qparams(weight, INT8, method="mse")
    assert float(scale[1]) == 1.0
    assert fake_quantize(weight, scale, zero, INT8)[1].eq(0).all()


@pytest.mark.parametrize(
    "scheme", [Scheme(bits=4, axis=0), Scheme(bits=4, symmetric=False, axis=0)]
)
def test_the_least_squares_clip_is_the_best_of_its_candidates(scheme):
    weight = normal(5, 300, seed=3) ** 3
    scale, zero = weight_qparams(weight, scheme, method="mse")
    for row in range(len(weight)):
        values = weight[row].double().tolist()
        errors = []
        for share in affine.SHRINK.tolist():
            low, high = (torch.tensor(end * share) for end in (min(values), max(values)))
            step, rest = qparams(low, high, scheme)
            codes = (oracle_code(v, float(step), int(rest), scheme) for v in values)
            back = [(c - int(rest)) * float(step) for c in codes]
            errors.append(sum((b - v) ** 2 for b, v in zip(back, values, strict=True)))
        kept = fake_quantize(weight, scale, zero, scheme)[row].double() - weight[row].double()
        assert float(kept.square().sum()) == pytest.approx(min(errors), rel=1e-5)
        assert min(errors) < errors[-1] or not scheme.symmetric


def test_memory_is_one_chunk_and_changes_nothing(monkeypatch):
    weight = normal(7, 64, seed=1)
    for scheme in (Scheme(bits=4, axis=0), Scheme(bits=4), Scheme(bits=4, axis=0, group=16)):
        whole = weight_qparams(weight, scheme, method="mse")
        monkeypatch.setattr(affine, "_CHUNK", 24)
        pieces = weight_qparams(weight, scheme, method="mse")
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_a_half_precision_weight_gets_float_scales():
    scale, zero = weight_qparams(normal(4, 8).bfloat16(), INT8, method="mse")
    assert scale.dtype == torch.float32
    assert quantize(normal(4, 8).bfloat16(), scale, zero, INT8).dtype == torch.int8


@given(st.integers(0, 4), st.integers(0, 9), st.booleans(), st.integers(0, 1000))
def test_packed_codes_come_back(rows, size, signed, seed):
    low, high = (-8, 8) if signed else (0, 16)
    dtype = torch.int8 if signed else torch.uint8
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high, (rows, size), generator=generator).to(dtype)
    packed = pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, (size + 1) // 2)
    back = unpack(packed, size, signed=signed)
    assert back.dtype == dtype and torch.equal(back, codes)


def test_the_first_code_is_the_low_nibble():
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([-1, 7, -8], dtype=torch.int8)).tolist() == [0x7F, 0x08]


@pytest.mark.parametrize(
    "codes",
    [
        torch.tensor([8], dtype=torch.int8),
        torch.tensor([-9], dtype=torch.int8),
        torch.tensor([16], dtype=torch.uint8),
        torch.tensor([1.0]),
        torch.tensor(1, dtype=torch.int8),
    ],
)
def test_what_is_no_4_bit_code_is_not_packed(codes):
    with pytest.raises(ValueError, match=r"4.bit"):
        pack(codes)


def test_bytes_of_another_length_are_not_unpacked():
    with pytest.raises(ValueError, match="rows of 5"):
        unpack(torch.zeros(2, 2, dtype=torch.uint8), 5, signed=True)


@given(
    st.sampled_from([(3, 8), (3, 7), (2, 1), (2, 3, 5), (4, 3, 3, 3), (2, 4, 1, 2)]),
    st.sampled_from(["normal", "uniform", "one sign", "spikes"]),
    st.sampled_from(["minmax", "mse"]),
    st.integers(0, 2**16),
)
def test_two_neighbouring_codes_never_pass_the_limit(shape, kind, method, seed):
    weight = normal(*shape, seed=seed)
    weight = {
        "normal": weight,
        "uniform": torch.special.ndtr(weight) * 2 - 1,
        "one sign": weight.abs(),
        "spikes": weight**5,
    }[kind]
    scale, zero = weight_qparams(weight, INT8, method=method, pair_limit=128)
    codes = quantize(weight, scale, zero, INT8).to(torch.int64)
    for row in codes:
        flat = row if row.dim() == 1 else row.movedim(0, -1)  # channels last, as kernels read them
        flat = flat.reshape(-1).tolist()
        for first, second in zip(flat[::2], [*flat[1::2], 0], strict=False):
            assert abs(max(first, 0) + max(second, 0)) <= 128
            assert abs(min(first, 0) + min(second, 0)) <= 128


def test_the_limit_costs_less_than_a_bit_of_a_trained_looking_weight():
    weight = normal(64, 384)
    errors = []
    for bits, limit in ((8, None), (8, 128), (7, None)):
        scheme = Scheme(bits=bits, axis=0)
        grid = weight_qparams(weight, scheme, pair_limit=limit)
        errors.append(float((fake_quantize(weight, *grid, scheme) - weight).norm()))
    free, limited, seven = errors
    assert free < limited < 0.75 * seven
