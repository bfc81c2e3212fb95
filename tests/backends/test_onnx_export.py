"""Operators that torch's exporter decomposes or casts by tracing again mean the same when it does not."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from graphs import Call, distance, engine, normal
from torch import nn
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.fx import passes

import effc
from effc.backends.onnx import to_onnx
from effc.backends.onnx_export import settle

pytestmark = pytest.mark.slow

X = normal(3, 4)
WHOLE = torch.arange(12).reshape(3, 4)


def computed(module, feeds):
    """What a file of the graph gives, run node by node, and what torch gives."""
    program = effc.trace(module, {name: value.clone() for name, value in feeds.items()})
    model = ir.serde.serialize_model(to_onnx(program.only(), 21))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    wanted = [value.numpy() for value in program.run(**feeds).values()]
    return found, wanted


def agrees(module, feeds):
    found, wanted = computed(module, feeds)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


ALONE = {
    "to its own type": lambda self, x: x.to(torch.float32) + 1,
    "to another type": lambda self, x: x.to(torch.int32),
    "to another and back": lambda self, x: x.double().to(x.dtype) * 2,
    "output is a conversion": lambda self, x: (x * 2).to(torch.float32),
    "output is the input converted": lambda self, x: (x.to(torch.float32), x + 1),
    "and": lambda self, x: ((x > 0) & (x < 1)).float(),
    "or, xor": lambda self, x: (((x > 0) | (x < -1)) ^ (x > 1)).float(),
    "an integer factor": lambda self, x: x * 2 - 1,
    "power": lambda self, x: x**2 + x.abs().pow(1.5),
    "mean over axes": lambda self, x: x.mean([0, 1], keepdim=True),
    "cat of types": lambda self, x: torch.cat([x, (x > 0).long(), x.to(torch.int32)]),
    "where of types": lambda self, x: torch.where(x > 0, x, 0),
    "parts of it are known": lambda self, x: torch.special.xlog1py(x, x.abs()),
    "narrow from behind": lambda self, x: x.narrow(1, -2, 2) * 2,
    "uneven pieces": lambda self, x: torch.cat(x[:, :3].chunk(2, -1)[:1] + x.chunk(3, -1)[:1]),
    "one piece": lambda self, x: x.chunk(1, -1)[0] + 1,
    "broadcast": lambda self, x: x[:, :1].broadcast_to((-1, 4)) + 1,
    "transposed booleans": lambda self, x: (x > 0).mT.float(),
    "transposed": lambda self, x: x.mT + 1,
    "reshaped empty": lambda self, x: x[:, :0].reshape(0, 5).sum(0) + x[0, 0],
    "flattened": lambda self, x: x[None, :, :, None].flatten(1, -2).flatten(-2),
    "contiguous": lambda self, x: x.t().contiguous() + 1,
    "halves": lambda self, x: torch.cat([-x[..., 2:], x[..., :2]], -1),
}


@pytest.mark.parametrize("forward", ALONE.values(), ids=ALONE)
def test_it_computes_what_torch_computes(forward):
    agrees(Call(forward), {"x": X})


WHOLES = {
    "times a float": lambda self, n: n * 0.5,
    "true division": lambda self, n: n / 4,
    "plus floats": lambda self, n: n + n.float() * 1.5,
    "root": lambda self, n: torch.sqrt(n),
    "sum of booleans": lambda self, n: (n > 3).sum(-1),
    "mean": lambda self, n: n.float().mean(-1),
    "bits": lambda self, n: (n & 3) | 8,
    "int32 with int64": lambda self, n: n.to(torch.int32) + n,
    "shape": lambda self, n: n + n.shape[0],
    "shape with floats": lambda self, n: n.float() * n.shape[0],
}


@pytest.mark.parametrize("forward", WHOLES.values(), ids=WHOLES)
def test_whole_numbers_become_what_torch_makes_of_them(forward):
    agrees(Call(forward), {"x": WHOLE})


DECOMPOSED = ["parts of it are known", "narrow from behind", "one piece", "broadcast", "transposed"]


@pytest.mark.parametrize("name", DECOMPOSED)
def test_torch_decomposes_what_has_no_translation_or_one_that_nobody_uses(name, monkeypatch):
    seen = []
    real = _fx_passes.decompose_with_registry

    def decompose(exported, known):
        seen.append(exported)
        return real(exported, known)

    monkeypatch.setattr(_fx_passes, "decompose_with_registry", decompose)
    graph = effc.trace(Call(ALONE[name]), X).only()
    to_onnx(graph, 21)
    assert len(seen) == 1


def block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.norm, self.conv = nn.LayerNorm(16), nn.Conv1d(16, 8, 3, padding=1)

        def forward(self, x):
            q, k, v = self.qkv(self.norm(x)).split(16, -1)
            q, k, v = (t.reshape(*t.shape[:2], 2, 8).transpose(1, 2) for t in (q, k, v))
            y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            y = nn.functional.dropout(x + self.out(y), 0.1, self.training)
            return nn.functional.gelu(self.conv(y.transpose(1, 2))).mean(-1)

    torch.manual_seed(0)
    return Block().eval()


SHAPES = {"Shape", "Slice", "Gather", "Concat", "Squeeze", "Unsqueeze"}


@pytest.mark.slow
def test_the_float_reference_computes_as_torchs_own_export():
    x = normal(2, 5, 16)
    graph = effc.trace(block(), {"x": x}, dims={"x": {0: "batch", 1: "sequence"}}).only()
    mine = to_onnx(graph, 21, translate=False)
    theirs = torch.onnx.export(
        block(), (), kwargs={"x": x}, dynamo=True, opset_version=21, verbose=False,
        dynamic_shapes={"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}},
    ).model  # fmt: skip
    left, right = (Counter(n.op_type for n in model.graph) for model in (mine, theirs))
    assert {k: n for k, n in left.items() if k not in SHAPES} == {
        k: n for k, n in right.items() if k not in SHAPES
    }


def test_nothing_is_traced_again_where_every_operator_is_known(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("traced again")

    monkeypatch.setattr(_fx_passes, "decompose_with_registry", never)
    monkeypatch.setattr(passes, "InsertTypePromotion", never)
    agrees(block(), {"x": normal(2, 5, 16)})


@pytest.mark.parametrize("dim", [-1, 2, 1])
def test_a_dimension_in_parts_is_no_reason_to_trace_again(dim, monkeypatch, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("traced again")

    monkeypatch.setattr(_fx_passes, "decompose_with_registry", never)
    size = {1: (-1, 2), 2: (2, -1), -1: (2, 4)}[dim]
    module = Call(lambda self, x: x.unflatten(dim, size).sum(-1) * 2)
    dims = {0: "batch", 1: "sequence"} if dim != 1 else {0: "batch"}
    program = effc.trace(module, {"x": normal(2, 6, 8)}, dims={"x": dims})
    x = normal(3, 6, 8, seed=1) if dim == 1 else normal(3, 5, 8, seed=1)
    with engine(program, tmp_path) as opened:
        found = opened({"x": x.numpy()})["output"]
    assert distance(program.run(x=x)["output"], found) < 1e-6


def test_settling_leaves_a_graph_that_computes_the_same():
    forward = ALONE["output is the input converted"]
    program = effc.trace(Call(forward), X)
    exported = program.only().clone().exported
    settle(exported.graph)
    exported.graph.lint()
    assert not [n for n in exported.graph.nodes if "aten.to." in str(n.target)]
    assert len(program.only().exported.graph.nodes) > len(exported.graph.nodes)
    for mine, theirs in zip(exported.module()(x=X), forward(None, X), strict=True):
        assert torch.equal(mine, theirs)


class Windows(nn.Module):
    """A picture in windows, as Swin cuts it: a copy in order between a permutation and a view."""

    def forward(self, x):
        batch, height, width, size = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, size).transpose(2, 3).contiguous()
        x = x.view(-1, 4, size).transpose(1, 2)
        return nn.functional.adaptive_avg_pool1d(x, 1)  # which torch has to take apart


def test_a_view_behind_a_copy_in_order_needs_no_copy(tmp_path):
    program = effc.trace(Windows(), {"x": normal(2, 4, 6, 3)})
    x = normal(5, 4, 6, 3, seed=1)
    with engine(program, tmp_path) as opened:
        found = opened({"x": x.numpy()})["output"]
    assert distance(program.run(x=x)["output"], found) < 1e-6


def test_a_swin_is_written_as_it_was_traced(tmp_path):
    """Its heads are put together by a view that attention's layout allows, until types are promoted."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=16, num_channels=1, num_labels=3, patch_size=2, embed_dim=8, depths=[2], num_heads=[2],
        window_size=4, mlp_ratio=2.0,
    )  # fmt: skip
    module = Call(
        lambda self, x: self.swin(pixel_values=x).logits, swin=SwinForImageClassification(config)
    ).eval()
    program = effc.trace(module, {"x": normal(2, 1, 16, 16)}, dims={"x": {0: "batch"}})
    x = normal(3, 1, 16, 16, seed=1)
    with engine(program, tmp_path) as opened:
        found = opened({"x": x.numpy()})["output"]
    assert distance(program.run(x=x)["output"], found) < 1e-5


class Chosen(nn.Module):
    """Places along one dimension."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x, places):
        return x[(slice(None),) * self.dim + (places,)]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_places_along_one_dimension_are_one_gather(dim):
    feeds = {"x": normal(3, 4, 5), "places": torch.tensor([2, 0, 1, 2])}
    agrees(Chosen(dim), feeds)
    model = to_onnx(effc.trace(Chosen(dim), feeds).only(), 21)
    assert Counter(node.op_type for node in model.graph) == {"Gather": 1}


def test_a_choice_by_mask_is_left_to_torch():
    feeds = {"x": normal(3, 4), "places": torch.tensor([True, False, True])}
    agrees(Chosen(0), feeds)


class Experts(nn.Module):
    """Rows sorted by the expert that they go to, times the matrix of each, as transformers has its experts do it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(4, 6, 5))

    def forward(self, x, places):
        order = places.argsort()
        ends = torch.histc(places.float(), bins=4, min=0, max=3).cumsum(0).to(torch.int32)
        made = torch.ops.transformers.grouped_mm_fallback(x[order], self.weight, ends)
        return made[order.argsort()]


@pytest.mark.parametrize("places", [[0, 3, 1, 1, 0, 3, 3], [2] * 7])
def test_experts_take_the_rows_that_are_theirs(places):
    pytest.importorskip("transformers.integrations.moe")
    module, feeds = Experts(), {"x": normal(7, 6), "places": torch.tensor(places)}
    (found,), (wanted,) = computed(module, feeds)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
