"""Products in 16 bit, what is sensitive in 32, and all of it to be seen in the graph."""

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
from effc.passes.mixed_precision import HEADROOM, MixedPrecision
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


def test_a_mask_that_hides_everything_gives_numbers():
    made, _ = narrowed(traced())
    feeds = inputs()
    feeds["mask"][:] = 0
    assert all(bool(value.isfinite().all()) for value in made.run(feeds).values())


def large():
    """What its first layer gives is beyond fp16; the second takes it back."""
    parts = {"a": nn.Linear(SIZE, SIZE), "b": nn.Linear(SIZE, SIZE), "c": nn.Linear(SIZE, SIZE)}
    with torch.no_grad():
        parts["a"].weight *= 2 * torch.finfo(torch.float16).max / HEADROOM
        parts["b"].weight /= 1e6
    return Call(lambda self, x: self.c(self.b(self.a(x))), **parts)


def test_what_comes_near_the_largest_number_stays_wide():
    program = traced(large(), {"x": normal(4, SIZE)})
    data = [Batch(inputs={"x": normal(4, SIZE).numpy()})]
    made = program.clone()
    record = effc.apply(MixedPrecision(check_range=True), made, data)
    found = [str(n.meta["val"].dtype) for n in made.only().nodes if op_name(n) == "linear"]
    assert found == ["torch.float32", "torch.float16", "torch.float16"]
    again = program.clone()
    effc.apply(MixedPrecision(check_range=True), again, recorded=record.decisions)
    x = {"x": normal(4, SIZE, seed=3)}
    assert torch.equal(made.run(x)["output"], again.run(x)["output"])


def test_only_what_is_chosen():
    made, _ = narrowed(traced(), select=effc.Select(exclude=("down",)))
    last = [n for n in made.only().nodes if op_name(n) == "linear"][-1]
    assert last.meta["val"].dtype == torch.float32


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
