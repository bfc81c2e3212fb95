"""Planted faults are named, honest noise is not accused, and a package is walked from its model to its engine."""

import json
import math
import shutil
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import Attention, Call, LlamaNorm, lower, node_of, normal, quantize
from torch import nn

import effc
from effc.backends.ort_values import Nodes, _gap
from effc.blame import first_fault
from effc.calib.data import Batch
from effc.case import few, made_up
from effc.ir.align import align
from effc.ir.edit import insert, insert_after, rebind, refresh, replace, tensor_name, tensor_of
from effc.ir.gap import Padding
from effc.ir.select import op_name
from effc.ir.values import Values
from effc.layers import Layers, layer_errors
from effc.noise import Local, Noise
from effc.passes import CANONICAL, PASSES
from effc.quant.affine import quantize as quantized
from effc.quant.scheme import Scheme
from effc.walk import Judgement, lines
from kit import assert_letter, cli, made, plant

pytestmark = pytest.mark.slow

aten = torch.ops.aten


class Block(nn.Module):
    """A transformer block after its norm: attention, a residual, and a gated layer."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(size), Attention(size)
        self.gate, self.up, self.down = (nn.Linear(size, size) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        y = (self.gate(x) - self.up(x)) / (1.5 + torch.sigmoid(x))
        return x + self.down(nn.functional.gelu(y) * self.scale)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3),
        )
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


@cache
def programs(kind=Block, *shape):
    """A model as traced and after the passes of a compile. To be cloned, not changed."""
    torch.manual_seed(0)
    module, shape = kind().eval(), shape or (8, 6, 32)
    batches = [Batch(inputs={"x": normal(*shape, seed=seed).numpy()}) for seed in range(4)]
    original = effc.trace(module, {"x": normal(*shape)})
    program = original.clone()
    for word in CANONICAL:
        effc.apply(PASSES[word](), program, probes={"main": [{"x": normal(*shape)}]})
    quantize(program, batches)
    return original, program


X = {"x": normal(8, 6, 32)}


def planted(edit, kind=Block, *shape):
    """A copy with a fault: the original, the copy and the node that was changed."""
    original, program = programs(kind, *shape)
    program = program.clone()
    node = edit(program.only())
    refresh(program.only())
    return original, program, node


def at(graph, op, number=0):
    return [n for n in graph.nodes if op_name(n) == op][number]


def constant(node, how, graph):
    name = tensor_name(graph, node)
    rebind(graph, name, how(tensor_of(graph, node).clone()), "fault")


def epsilon(graph):
    node = at(graph, "layer_norm")
    node.args = (*node.args[:4], 0.5, *node.args[5:])
    return node


def swapped(graph):
    node = at(graph, "sub")
    node.args = node.args[::-1]
    return node


def attention_scale(graph):
    node = at(graph, "scaled_dot_product_attention")
    node.kwargs = {**node.kwargs, "scale": 1.5}
    return node


def transposed(graph):
    node = at(graph, "linear", 2)
    constant(node.args[1].args[0], lambda t: t.t().contiguous(), graph)
    return node


def scale_of_a_weight(graph):
    node = at(graph, "linear", 4)
    constant(node.args[1].args[1], lambda t: t * 1.1, graph)
    return node


def scale_of_a_grid(graph):
    node = at(graph, "quantize", 2)
    constant(node.args[1], lambda t: t / 4, graph)
    return node


def zero_point_of_a_weight(graph):
    node = at(graph, "linear", 5)
    constant(node.args[1].args[2], lambda t: t + 4, graph)
    return node


def without_bias(graph):
    node = at(graph, "linear", 3)
    node.args = node.args[:2]
    return node


def stale_weight(graph):
    node = at(graph, "linear", 5)
    node.args = (node.args[0], at(graph, "linear", 4).args[1], node.args[2])
    return node


def truncated(graph):
    node = at(graph, "layer_norm")
    readers = list(node.users)
    whole = insert_after(graph, node, aten.to.dtype, (node, torch.int32))
    back = insert_after(graph, whole, aten.to.dtype, (whole, torch.float32))
    for reader in readers:
        reader.replace_input_with(node, back)
    return back


def other_activation(graph):
    node = at(graph, "gelu")
    new = insert(graph, node, aten.relu.default, node.args)
    replace(graph, node, new)
    return new


def dropped_residual(graph):
    node = at(graph, "add")
    before = node.args[1]
    replace(graph, node, before)
    return before


def negated(graph):
    node = at(graph, "mul")
    constant(node.args[1], lambda t: -t, graph)
    return node


def regridded(factor, kind=Block, *shape, op="linear", number=4):
    """A weight on a grid with other steps, and codes that were made with them."""

    def edit(graph):
        node = at(graph, op, number)
        codes, scale, zero, axis, _ = node.args[1].args
        exact = programs(kind, *shape)[0].only().tensors()
        exact = exact[graph.origins[tensor_name(graph, codes)].source]
        step = tensor_of(graph, scale) * factor
        scheme = Scheme(bits=8, axis=axis)
        made = quantized(exact, step, tensor_of(graph, zero), scheme)
        constant(scale, lambda _: step, graph)
        constant(codes, lambda _: made, graph)
        return node

    edit.__name__ = f"steps_{factor:g}_times_as_wide"
    return edit


FAULTS = [
    *(regridded(factor) for factor in (8, 4, 1 / 2, 1 / 8)),
    epsilon,
    swapped,
    attention_scale,
    transposed,
    scale_of_a_weight,
    scale_of_a_grid,
    zero_point_of_a_weight,
    without_bias,
    stale_weight,
    truncated,
    other_activation,
    dropped_residual,
    negated,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_node_with_the_fault_is_named_first(fault):
    original, program, node = planted(fault)
    found = effc.explain(original, program, X)
    assert found[0].node is node
    assert first_fault(found).node is node
    assert found[0].reason


@pytest.mark.parametrize("fault", [epsilon, swapped, transposed, without_bias, dropped_residual])
def test_made_up_data_is_enough_for_faults_that_are_no_ranges(fault):
    original, program, node = planted(fault)
    assert effc.explain(original, program)[0].node is node


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (epsilon, "eps is 0.5, not 1e-05"),
        (swapped, "self is linear_5, not linear_4"),
        (without_bias, "bias is nothing"),
        (scale_of_a_weight, "weight is 0.1 (relative L2) from the reference's"),
        (scale_of_a_grid, "of the values lie outside its range"),
        (truncated, "the reference has no such to"),
        (dropped_residual, "add of the reference is not there"),
    ],
)
def test_the_reason_says_what_is_different(fault, words):
    original, program, _ = planted(fault)
    assert words in effc.explain(original, program, X)[0].reason


@pytest.mark.parametrize("data", [X, None], ids=["data", "made up"])
def test_honest_noise_is_nobodys_fault(data):
    original, program = programs()
    found = effc.explain(original, program, data)
    assert first_fault(found) is None
    assert {b.op for b in found} == {"linear", "quantize"}


@pytest.mark.parametrize("count", [1, 2, 5, 6, 20])
def test_the_worst_grid_is_not_what_it_is_compared_with(count):
    original, program = (p.only() for p in programs())
    found = [Local(node=None, place=i, noise=1.0, expected=1.0, is_grid=True) for i in range(count)]
    found[0].noise = 20.0
    Noise(
        reference=original, graph=program, alignment=align(original, program),
        padding=Padding(program, X), is_made_up=False,
    ).allow_grids(found)  # fmt: skip
    assert [local.is_fault for local in found] == [True] + [False] * (count - 1)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "weight_range": "mse"},
        {"bits": 6},
        {"overflow_fix": False},
        {"activation_bits": 16, "group": 16},
        {"bits": 4, "activation_bits": 16, "group": 16, "weight_range": "mse"},
    ],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_honest_noise_of_other_grids_is_nobodys_fault_either(options):
    original, _ = programs()
    program = original.clone()
    quantize(
        program,
        [Batch(inputs={"x": normal(8, 6, 32, seed=s).numpy()}) for s in range(4)],
        **options,
    )
    assert first_fault(effc.explain(original, program, X)) is None


def test_shares_are_parts_of_the_error_and_come_with_their_nodes():
    original, program = programs()
    shares = [share for _, share in effc.explain(original, program, X)]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1 + 1e-9
    assert all(node.graph is program.only().fx for node, _ in effc.explain(original, program, X))


def test_a_program_beside_itself_is_not_off_at_all():
    _, program = programs()
    assert effc.explain(program, program.clone(), X) == []


def test_a_fault_beside_the_same_noise_is_exact():
    """Where the reference is quantised alike, a hundredth of a scale is seen."""
    _, program = programs()
    copy = program.clone()
    node = at(copy.only(), "linear", 2)
    constant(node.args[1].args[1], lambda t: t * 1.01, copy.only())
    found = effc.explain(program, copy, X)
    assert [b.node for b in found] == [node] and found[0].is_fault


def test_batch_norm_and_relu_that_were_folded_away_are_nobodys_fault():
    original, program = programs(Convolutions, 8, 3, 10, 10)
    assert "batch_norm" not in [op_name(n) for n in program.only().nodes]
    assert first_fault(effc.explain(original, program, {"x": normal(8, 3, 10, 10)})) is None


def test_a_fault_in_a_folded_convolution_is_named():
    def kernel(graph):
        node = at(graph, "conv2d", 1)
        constant(node.args[1].args[0], lambda t: t.transpose(0, 1).contiguous(), graph)
        return node

    original, program, node = planted(kernel, Convolutions, 8, 3, 10, 10)
    assert effc.explain(original, program, {"x": normal(8, 3, 10, 10)})[0].node is node


def test_a_scale_moved_from_one_layer_to_the_next_is_on_purpose():
    original = effc.trace(
        Call(lambda m, x: m.b(m.a(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8)), {"x": normal(4, 8)}
    )
    program = original.clone()
    graph = program.only()
    for name, how in (("a.weight", 4.0), ("a.bias", 4.0), ("b.weight", 0.25)):
        rebind(graph, name, graph.tensors()[name] * how, "scale")
    assert first_fault(effc.explain(original, program, {"x": normal(4, 8)})) is None


def test_pieces_of_a_tensor_are_compared_one_by_one():
    original = effc.trace(
        Call(lambda m, x: torch.cat(m.a(x).split(4, -1)[::-1], -1), a=nn.Linear(8, 12)),
        {"x": normal(4, 8)},
    )
    program = original.clone()
    assert effc.explain(original, program, {"x": normal(4, 8)}) == []
    node = next(n for n in program.only().nodes if op_name(n).startswith("split"))
    node.target = aten.split.Tensor
    node.args = (insert(program.only(), node, aten.neg.default, (node.args[0],)), *node.args[1:])
    found = effc.explain(original, program, {"x": normal(4, 8)})
    assert first_fault(found) is not None


def test_a_fused_norm_stands_for_the_last_node_of_its_pattern():
    original = effc.trace(LlamaNorm(), {"x": normal(4, 8)})
    program = original.clone()
    effc.apply(PASSES["fuse-rmsnorm"](), program)
    alignment = align(original.only(), program.only())
    fused = node_of(program, "rms_norm")
    assert alignment.values[fused] is list(original.only().nodes)[-1]
    fused.args = (*fused.args[:3], 0.5)
    found = effc.explain(original, program, {"x": normal(4, 8)})
    assert [b.node for b in found] == [fused]


def test_graphs_of_two_traces_lie_on_each_other_by_module_and_order():
    original, other = (effc.trace(Attention().eval(), {"x": normal(2, 6, 32)}) for _ in range(2))
    alignment = align(original.only(), other.only())
    pairs = {(a.name, b.name) for a, b in alignment.values.items()}
    assert pairs == {(n.name, n.name) for n in other.only().nodes}


def test_values_are_dropped_after_their_last_use():
    original = effc.trace(
        Call(lambda m, x: [x := torch.relu(x + 1) for _ in range(20)][-1]), {"x": normal(2, 4)}
    )
    values, most = Values(original.only(), {"x": normal(2, 4)}), 0
    for node in original.only().nodes:
        while node not in values.known:
            values._step(next(values._todo))
            most = max(most, len(values.known))
    assert most <= 2


def test_every_quantised_layer_has_its_errors_and_its_share():
    original, program = programs()
    rows = layer_errors(original.only(), program.only(), X)
    assert [r["site"] for r in rows] == [
        *(f"attention.{name}" for name in "qkvo"), "gate", "up", "down",
    ]  # fmt: skip
    assert all(
        set(r) == {"site", "op", "sqnr_db", "local_db", "share", "rows", "probes"} for r in rows
    )
    assert all(20 < r["sqnr_db"] <= r["local_db"] + 3 < 60 for r in rows)
    assert 0.7 < sum(r["share"] for r in rows) <= 1 + 1e-9
    assert {(r["rows"], r["probes"]) for r in rows} == {(8, 4)}


def test_estimated_shares_are_close_to_those_tried_out():
    original, program = programs()
    case = Layers(original.only(), program.only(), X)
    for local in case.measured():
        tried = case.alone(local) / case.total
        assert abs(math.log(local.share / tried)) < 1.2 or tried < 0.01


def test_few_rows_are_taken_of_the_inputs_that_have_rows():
    class Net(nn.Module):
        def forward(self, ids, kept):
            return ids[:, kept]

    def cut(**dims):
        feeds = {"ids": torch.zeros(6, 32, dtype=torch.int64), "kept": torch.arange(32)}
        graph = effc.trace(Net(), feeds, dims=dims).only()
        return {name: len(value) for name, value in few(graph, feeds, tokens=64).items()}

    kept = {0: "kept"}  # as logits_to_keep of a language model
    assert cut(ids={0: "batch"}, kept=kept) == {"ids": 2, "kept": 32}
    assert cut(ids={0: "samples"}, kept=kept) == {"ids": 6, "kept": 32}


def test_a_batch_is_left_whole_where_another_input_counts_by_it():
    class Net(nn.Module):
        def forward(self, ids, twice):
            return torch.cat([ids, ids]) + twice

    feeds = {
        "ids": torch.zeros(6, 32, dtype=torch.int64),
        "twice": torch.zeros(12, 32, dtype=torch.int64),
    }
    graph = effc.trace(Net(), feeds, dims={"ids": {0: "batch"}, "twice": {0: "2*batch"}}).only()
    assert {name: len(v) for name, v in few(graph, feeds, tokens=64).items()} == {
        "ids": 6,
        "twice": 12,
    }


def test_layer_errors_need_no_gradient_of_the_program():
    """It holds integers, and a graph of constants has no output to differentiate."""
    original = effc.trace(Call(lambda m, x: (x > 0).to(torch.int64)), {"x": normal(4, 8)})
    assert layer_errors(original.only(), original.clone().only(), {"x": normal(4, 8)}) == []


def test_made_up_inputs_are_the_same_every_time_and_padded():
    class Masked(nn.Module):
        def forward(self, x, attention_mask):
            return x * attention_mask[..., None]

    example = {"x": normal(3, 9, 4), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    dims = {name: {0: "batch", 1: "sequence"} for name in example}
    graph = effc.trace(Masked(), example, dims=dims).only()
    first, again = made_up(graph), made_up(graph)
    assert {n: list(v.shape) for n, v in first.items()} == {
        "x": [2, 16, 4],
        "attention_mask": [2, 16],
    }
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert first["attention_mask"].sum() == 16 + 10


def test_errors_in_padding_do_not_count():
    class Masked(nn.Module):
        def forward(self, x, attention_mask):
            return torch.relu(x)

    mask = torch.tensor([[1, 1, 1, 0]])
    x = normal(2, 4, 3)
    example = {"x": x, "attention_mask": mask.expand(2, 4).contiguous()}
    dims = {name: {0: "batch", 1: "sequence"} for name in example}
    original = effc.trace(Masked(), example, dims=dims)
    program = original.clone()
    node = node_of(program, "relu")
    new = insert(program.only(), node, aten.mul.Tensor, (node.args[0], 1.0))
    node.update_arg(0, new)
    padded = {**example, "x": torch.cat([x[:, :3].relu(), torch.full((2, 1, 3), -9.0)], 1)}
    node.target = aten.alias.default
    refresh(program.only())
    assert first_fault(effc.explain(original, program, padded)) is None
    assert first_fault(effc.explain(original, program, example)) is not None


# --- the file and the package -------------------------------------------------------------------


@cache
def lowered_block(place):
    return lower(programs()[1], place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "edit"),
    [
        ("Sub", lambda n, m: n.replace_input_with(0, n.inputs[1])),
        ("Attention", lambda n, m: n.attributes.add(ir.AttrFloat32("scale", 2.0))),
        ("Gelu", lambda n, m: _replaced(n, "Relu")),
        ("LayerNormalization", lambda n, m: n.attributes.add(ir.AttrFloat32("epsilon", 0.5))),
        ("MatMulIntegerToFloat", lambda n, m: _halved(n, m, 3)),
    ],
    ids=["sub", "attention", "gelu", "norm", "weight"],
)
def test_a_fault_in_the_file_is_named(op, edit, tmp_path_factory):
    place = tmp_path_factory.getbasetemp() / "block"
    made = lowered_block(place)
    nodes = Nodes(programs()[1].only(), X, made.opset)
    assert nodes.check(place / "model.onnx").off == ()
    model = ir.load(place / "model.onnx")
    node = next(n for n in model.graph if n.op_type == op)
    edit(node, model)
    ir.save(model, place / "faulty.onnx")
    found = nodes.check(place / "faulty.onnx").off
    assert [off.nodes[0] for off in found] == [node.name]


@pytest.mark.slow
def test_a_zero_point_off_by_one_is_more_than_codes_on_a_border(tmp_path):
    made = lower(programs()[1], tmp_path)
    model = ir.load(tmp_path / "model.onnx")
    node = [n for n in model.graph if n.op_type == "QuantizeLinear"][1]
    _other(node, model, 2, lambda zero: zero + 1)
    ir.save(model, tmp_path / "faulty.onnx")
    found = Nodes(programs()[1].only(), X, made.opset).check(tmp_path / "faulty.onnx").off
    assert found[0].nodes[0] == node.name


def test_few_codes_may_be_one_step_off_and_none_two():
    codes = np.arange(200, dtype=np.uint8)
    few, all_, far = codes.copy(), codes + np.uint8(1), codes.copy()
    few[[3, 70]] += 1
    far[3] += 2
    assert _gap(few, codes) == 0 == _gap(codes[:1] + np.uint8(1), codes[:1])
    assert min(_gap(all_, codes), _gap(far, codes)) > 1e-3


@pytest.mark.slow
def test_a_file_with_other_names_cannot_be_judged(tmp_path):
    made = lower(programs()[1], tmp_path)
    nodes = Nodes(programs()[1].only(), X, made.opset)
    good = nodes.check(tmp_path / "model.onnx")
    assert good.of >= good.compared >= 0.8 * good.of
    model = ir.load(tmp_path / "model.onnx")
    for node in model.graph:
        for value in node.outputs:
            value.name = f"other.{value.name}" if not value.is_graph_output() else value.name
    ir.save(model, tmp_path / "renamed.onnx")
    found = nodes.check(tmp_path / "renamed.onnx")
    assert (found.off, found.compared, found.of) == ((), 1, good.of)
    assert not Judgement(compared=found.compared, of=found.of).is_judged
    assert Judgement(compared=good.compared, of=good.of).is_judged


def _replaced(node, op):
    node.op_type = op
    node.attributes.clear()


def _halved(node, model, place):
    _other(node, model, place, lambda array: array / 2)


def _other(node, model, place, how):
    """One node reads another constant."""
    old = node.inputs[place]
    array = how(old.const_value.numpy())
    tensor = ir.tensor(array.astype(old.const_value.numpy().dtype), name="other")
    value = ir.Value(name="other", shape=old.shape, type=old.type, const_value=tensor)
    model.graph.register_initializer(value)
    node.replace_input_with(place, value)


@pytest.mark.slow
def test_a_package_is_walked_from_its_model_to_its_engine(tmp_path):
    found = made()
    file = tmp_path / "explain.json"
    ran = cli(
        "explain", found.out, "--model", found.model, "--calib", found.sentences, "--json", file,
        "--top", 2,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "no fault found: " in ran.out
    told = json.loads(file.read_text())
    names = [step["name"] for step in told["steps"]]
    assert names[0] == "trace" and names[-4:] == ["quantize", "plain export", "onnx file", "engine"]
    assert told["replayed"] is True and told["first"] is None and told["made_up"] is False
    by_name = {step["name"]: step for step in told["steps"]}
    assert by_name["trace"]["moved"] < 1e-5 < 1e-3 < by_name["quantize"]["moved"] < 0.1
    assert len(told["loudest"]) == 2 and len(told["sites"]) == 14
    assert sum(s["share"] for s in told["sites"]) <= 1 + 1e-9
    assert "exclude" in told["loudest"][0]["advice"][0]


def step(name, **values):
    drift = {"rel_l2": 0.01, "max_abs": 0.1, "cosine": 1.0, "n": 8}
    judged = {
        "is_fault": False,
        "node": None,
        "reason": "",
        "compared": None,
        "of": None,
        "is_judged": True,
    }
    return {
        "name": name,
        "from_module": {"y": drift},
        "moved": 0.01,
        "most": None,
        **judged,
        **values,
    }


def told(*steps):
    found = {"made_up": False, "rows": 4, "replayed": True, "steps": steps, "first": None}
    return "\n".join(lines({**found, "sites": [], "loudest": [], "advice": []}))


def test_silence_is_worth_what_was_compared():
    text = told(step("quantize", compared=68, of=74), step("engine", most=0.25, compared=53, of=55))
    assert "0.25  53 of 55" in text and text.endswith("no node compared is off")
    text = told(
        step("quantize", compared=68, of=74), step("engine", compared=3, of=55, is_judged=False)
    )
    assert "cannot be judged: too few nodes could be compared in engine (3 of 55 nodes)" in text


@pytest.mark.slow
def test_a_package_with_a_fault_in_its_file_is_told_by_its_node(tmp_path):
    found, out = made(), tmp_path / "out"
    shutil.copytree(found.out, out)
    model = ir.load(out / "model.onnx")
    node = [n for n in model.graph if n.op_type == "LayerNormalization"][1]
    node.attributes.add(ir.AttrFloat32("epsilon", 0.5))
    ir.save(model, tmp_path / "faulty.onnx")
    plant(out, "model.onnx", (tmp_path / "faulty.onnx").read_bytes())
    ran = cli("explain", out, "--model", found.model)
    assert ran.code == 0, ran.err
    assert f"it goes wrong in onnx file at {node.name}" in ran.out


def test_a_broken_package_is_refused(tmp_path):
    found, out = made(), tmp_path / "out"
    shutil.copytree(found.out, out)
    with (out / "model.onnx").open("r+b") as stream:
        stream.seek(200)
        stream.write(b"\0\0\0\0")
    assert_letter(cli("explain", out, "--model", found.model), "VerifyError", 10, "model.onnx")


def test_a_package_is_no_place_for_the_answer():
    found = made()
    ran = cli("explain", found.out, "--json", found.out / "explain.json")
    assert_letter(ran, "UsageError", 2, "lies in")


def test_code_that_a_recipe_names_is_not_run_without_trust(tmp_path):
    found, out = made(), tmp_path / "out"
    shutil.copytree(found.out, out)
    recipe = (out / "recipe.yaml").read_text() + "plugins: [touch.py]\n"
    plant(out, "recipe.yaml", recipe)
    (tmp_path / "touch.py").write_text("raise SystemExit(99)\n")
    ran = cli("explain", out, "--model", found.model)
    assert_letter(ran, "UsageError", 2, "touch.py", "--trust-code")


def test_a_factory_that_a_package_remembers_is_not_run_without_trust(tmp_path):
    found, out = made(), tmp_path / "out"
    shutil.copytree(found.out, out)
    local = {"source": {"python": f"{found.factories}:broken"}}
    plant(out, "local.json", json.dumps(local))
    assert_letter(cli("explain", out), "UsageError", 2, "--model", "--trust-code")
