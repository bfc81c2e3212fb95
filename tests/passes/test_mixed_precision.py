"""Products in 16 bit, what is sensitive in 32, and all of it to be seen in the graph."""

import numpy as np
import pytest
import torch
from graphs import Call, distance, normal
from torch import nn
from torch.nn import functional as F

import effc
from effc.backends.dialect import TENSORRT
from effc.backends.onnx import save, to_onnx
from effc.backends.onnx_widen import open_widened
from effc.calib.data import Batch
from effc.ir.select import op_name
from effc.passes.mixed_precision import MixedPrecision
from effc.passes.quantize import Quantize

SIZE = 16
CLOSE = {"fp16": 2e-3, "bf16": 2e-2}


class Block(nn.Module):
    """A norm, attention with a float mask, a residual sum, a gated layer, a softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "up", "gate", "down"):
            self.add_module(name, nn.Linear(SIZE, SIZE))
        self.norm = nn.LayerNorm(SIZE)

    def forward(self, x, mask):
        bias = (1 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        inner = self.norm(x)
        q, k, v = (
            f(inner).view(*x.shape[:2], 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
        x = x + self.o(mixed.reshape(x.shape))
        return self.down(F.silu(self.gate(x)) * self.up(x)).softmax(-1), x


def inputs(seed=0):
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[0, 3:] = 0
    return {"x": normal(2, 5, SIZE, seed=seed), "mask": mask}


def traced(module=None, feeds=None):
    torch.manual_seed(0)
    return effc.trace((module or Block()).eval(), feeds or inputs())


def narrowed(program, **options):
    made = program.clone()
    return made, effc.apply(MixedPrecision(**options), made)


def kinds(program):
    return {
        (op_name(n), str(n.meta["val"].dtype).removeprefix("torch."))
        for n in program.only().nodes
        if isinstance(n.meta["val"], torch.Tensor)
    }


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_close_to_what_it_was_and_half_the_bytes(dtype):
    program = traced()
    made, record = narrowed(program, dtype=dtype)
    wanted, found = program.run(inputs(9)), made.run(inputs(9))
    assert record.effect == "lossy" and record.sites
    assert all(value.dtype == torch.float32 for value in found.values())
    assert all(0 < distance(wanted[n], found[n]) < CLOSE[dtype] for n in wanted)
    assert made.weight_bytes() < 0.6 * program.weight_bytes()


def test_products_are_narrow_and_what_is_sensitive_is_not():
    found = kinds(narrowed(traced())[0])
    for word in ("linear", "scaled_dot_product_attention", "silu", "add", "view"):
        assert (word, "float16") in found and (word, "float32") not in found
    for word in ("layer_norm", "softmax"):
        assert (word, "float32") in found and (word, "float16") not in found


class Scores(nn.Module):
    """Attention written out, its mask a number, a constant, or chosen between two."""

    def __init__(self, how):
        super().__init__()
        self.how, self.q = how, nn.Linear(SIZE, SIZE)
        least = torch.finfo(torch.float32).min
        self.register_buffer("hidden", torch.full((5, 5), least))
        self.register_buffer("zero", torch.tensor(0.0))

    def forward(self, x, mask):
        least = torch.finfo(torch.float32).min
        scores, seen = self.q(x) @ self.q(x).transpose(-1, -2), mask[:, None, :]
        bias = {
            "number": lambda: (1 - seen.float()) * least,
            "constant": lambda: self.hidden,
            "chosen": lambda: torch.where(seen > 0, self.zero, least),
        }[self.how]()
        return (scores + bias).softmax(-1) @ self.q(x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("how", ["number", "constant", "chosen"])
def test_a_mask_that_hides_everything_gives_numbers(dtype, how):
    program = traced(Scores(how))
    made, _ = narrowed(program, dtype=dtype)
    feeds = inputs()
    feeds["mask"][0, :] = 0
    wanted, found = program.run(feeds)["output"], made.run(feeds)["output"]
    assert bool(found.isfinite().all())
    assert distance(wanted, found) < CLOSE[dtype] * 5


def test_a_value_that_is_returned_twice():
    module = Call(lambda self, x: (y := self.f(x), y), f=nn.Linear(4, 4))
    made, _ = narrowed(traced(module, {"x": normal(2, 4)}))
    first, second = made.run({"x": normal(2, 4)}).values()
    assert first.dtype == torch.float32 and torch.equal(first, second)


def test_scales_too_small_for_fp16_stay_wide():
    module = Call(lambda self, x: self.f(x), f=nn.Linear(SIZE, SIZE, bias=False))
    with torch.no_grad():
        module.f.weight *= 1e-4
    program = traced(module, {"x": normal(2, SIZE)})
    effc.apply(Quantize(activation_bits=16), program, dialect=TENSORRT)
    made, _ = narrowed(program)
    x = {"x": normal(2, SIZE, seed=4)}
    assert ("dequantize", "float32") in kinds(made)
    assert distance(program.run(x)["output"], made.run(x)["output"]) < CLOSE["fp16"]


def large():
    """What its first layer gives is beyond fp16, and what reads that takes it back."""
    parts = {"a": nn.Linear(SIZE, SIZE), "b": nn.Linear(SIZE, SIZE), "c": nn.Linear(SIZE, SIZE)}
    with torch.no_grad():
        parts["a"].weight *= 8 * torch.finfo(torch.float16).max
        parts["b"].weight /= 1e6
    return Call(lambda self, x: self.c(self.b(self.a(x))), **parts)


def test_what_comes_near_the_largest_number_stays_wide_for_whoever_reads_it():
    program = traced(large(), {"x": normal(4, SIZE)})
    data = [Batch(inputs={"x": normal(4, SIZE).numpy()})]
    made, again = program.clone(), program.clone()
    record = effc.apply(MixedPrecision(check_range=True), made, data)
    found = [str(n.meta["val"].dtype) for n in made.only().nodes if op_name(n) == "linear"]
    assert found == ["torch.float32", "torch.float32", "torch.float16"]
    x = {"x": normal(4, SIZE, seed=3)}
    assert distance(program.run(x)["output"], made.run(x)["output"]) < CLOSE["fp16"]
    assert not bool(narrowed(program)[0].run(x)["output"].isfinite().all())
    effc.apply(MixedPrecision(check_range=True), again, recorded=record.decisions)
    assert torch.equal(made.run(x)["output"], again.run(x)["output"])


def test_an_input_that_is_large_is_read_wide():
    program = traced(
        Call(lambda self, x: self.f(x), f=nn.Linear(SIZE, 4)), {"x": normal(4, SIZE) * 1e6}
    )
    data = [Batch(inputs={"x": (normal(4, SIZE) * 1e6).numpy()})]
    made = program.clone()
    assert effc.apply(MixedPrecision(check_range=True), made, data).sites == 0


def test_the_file_overflows_where_the_gpu_would(tmp_path):
    made, _ = narrowed(traced(large(), {"x": normal(4, SIZE)}))
    save(to_onnx(made.only(), 21), tmp_path)
    with open_widened(tmp_path / "model.onnx", 1) as engine:
        found = engine({"x": normal(4, SIZE).numpy()})["output"]
    assert not np.isfinite(found).all()


def test_only_what_is_chosen():
    made, _ = narrowed(traced(), select=effc.Select(exclude=("down",)))
    last = [n for n in made.only().nodes if op_name(n) == "linear"][-1]
    assert last.meta["val"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_of_integers_is_read_in_16_bit(bits):
    program = traced()
    effc.apply(Quantize(bits=bits, activation_bits=16, group=8), program, dialect=TENSORRT)
    made, _ = narrowed(program)
    assert ("dequantize", "float16") in kinds(made)
    assert ("dequantize", "float32") not in kinds(made)
    wanted, found = program.run(inputs(9)), made.run(inputs(9))
    assert all(distance(wanted[n], found[n]) < CLOSE["fp16"] for n in wanted)


def test_a_layer_on_integers_is_left_on_them():
    program = traced()
    data = [Batch(inputs={k: v.numpy() for k, v in inputs(seed).items()}) for seed in range(2)]
    effc.apply(Quantize(), program, data, dialect=TENSORRT)
    found = kinds(narrowed(program)[0])
    assert ("linear", "float32") in found and ("linear", "float16") not in found
    assert ("scaled_dot_product_attention", "float16") in found


def test_a_constant_or_an_input_that_is_an_output_keeps_its_type():
    module = Call(lambda self, x: (self.f(x), self.f.weight * 1, x + 0), f=nn.Linear(4, 4))
    made, _ = narrowed(traced(module, {"x": normal(2, 4)}))
    assert all(v.dtype == torch.float32 for v in made.run({"x": normal(2, 4)}).values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("opset", [21, 23])
def test_onnx_has_the_same_casts(dtype, opset, tmp_path):
    made, _ = narrowed(traced(), dtype=dtype)
    save(to_onnx(made.only(), opset), tmp_path)
    feeds = {k: v.numpy() for k, v in inputs(9).items()}
    wanted = made.run(inputs(9))
    with open_widened(tmp_path / "model.onnx", 1) as engine:
        found = engine(feeds)
    for name, value in wanted.items():
        assert distance(value, torch.from_numpy(found[name])) < CLOSE[dtype]


def test_nothing_to_narrow_is_said():
    program = traced(Call(lambda self, x: x.softmax(-1)), {"x": normal(2, 4)})
    made, record = narrowed(program)
    assert record.sites == 0
    assert effc.show(made) == effc.show(program)


def test_a_free_batch_stays_free_behind_a_pad():
    """Shapes are worked out anew behind the casts; a pad that torch resolves outside of Python knows numbers only."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4)

        def forward(self, x):
            return self.second(F.pad(F.hardtanh(self.first(x), 0, 6), [1, 1, 1, 1]))

    program = effc.trace(Padded().eval(), {"x": normal(2, 3, 9, 9)})
    effc.apply(MixedPrecision(), program)
    sizes = [n.meta["val"].shape[0] for n in program.only().nodes]
    assert not any(isinstance(size, int) for size in sizes)
    assert program.run(x=normal(5, 3, 9, 9))["output"].shape == (5, 4, 7, 7)
