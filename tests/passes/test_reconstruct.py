"""Codes that are learned block by block, on what the blocks in front of them give."""

import pytest
import torch
from graphs import distance
from torch import nn

import effc
from effc.backends.dialect import DIALECTS, ORT
from effc.calib.collectors import Feeds
from effc.calib.data import Batch
from effc.errors import PreconditionError
from effc.ir.edit import rebind
from effc.passes.blocks import blocks
from effc.passes.quantize import Quantize
from effc.passes.reconstruct import Reconstruct, _spread
from effc.passes.split import SplitConcat

QUICK = {"bits": 4, "weight_range": "mse", "steps": 120, "activation_steps": 20, "rows": 64}


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return torch.relu(x + self.b(torch.relu(self.a(x))))


class Small(nn.Module):
    """A layer, two residual blocks, and a shortcut that is concatenated."""

    def __init__(self, width=8):
        super().__init__()
        self.begin = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(2))
        self.join, self.time = nn.Conv2d(2 * width, width, 1), nn.Linear(1, width)
        self.end = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, time):
        first = x = self.begin(x) + self.time(time[:, None])[:, :, None, None]
        for block in self.blocks:
            x = block(x)
        return self.end(torch.relu(self.join(torch.cat((x, 0.02 * first), 1))))


class Attention(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        made = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(made.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.attention, self.norm = Attention(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(16, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def pictures(count=6, rows=16):
    draw = torch.Generator().manual_seed(1)
    made = [torch.randn(rows, 1, 8, 8, generator=draw).numpy() for _ in range(count)]
    return [
        Batch(inputs={"x": x, "time": torch.tensor([float(i % 3)]).numpy()})
        for i, x in enumerate(made)
    ]


def small():
    torch.manual_seed(0)
    given = {"x": torch.randn(2, 1, 8, 8), "time": torch.tensor([1.0])}
    return effc.trace(Small(), given, dims={"x": {0: "batch"}, "time": {}})


def tokens(count=6):
    draw = torch.Generator().manual_seed(1)
    return [
        Batch(inputs={"x": torch.randn(8, 5, 16, generator=draw).numpy()}) for _ in range(count)
    ]


def transformer():
    torch.manual_seed(0)
    return effc.trace(Transformer(), {"x": torch.randn(2, 5, 16)})


def apart(made, whole, data):
    """Mean distance of the outputs over batches."""
    found = []
    for batch in data:
        feeds = {name: torch.from_numpy(value) for name, value in batch.inputs.items()}
        found.append(distance(made.run(feeds)["output"], whole.run(feeds)["output"]))
    return sum(found) / len(found)


def told(record):
    return record.notes["main/blocks"]


class Shelf(dict):
    """Keeps what a pass has so far."""

    def put(self, word, tensors):
        self[word] = tensors


def test_a_block_is_a_module_of_few_layers_and_the_rest_are_layers():
    graph = small().only()
    found = blocks(graph, Quantize().sites(graph), 2)
    assert [b.name for b in found][2:4] == ["blocks.0", "blocks.1"]
    assert [len(b.sites) for b in found] == [1, 1, 2, 2, 1, 1]
    graph = transformer().only()
    found = blocks(graph, Quantize().sites(graph), 4)
    assert [b.name for b in found][:3] == ["layers.0.attention", "layers.0.up", "layers.0.down"]
    whole = blocks(graph, Quantize().sites(graph), 6)
    assert [b.name for b in whole] == ["layers.0", "layers.1", "head"]


def test_a_module_that_is_left_and_entered_again_is_taken_apart():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, which):
            return self.a(x) if which else self.b(x)

    class Back(nn.Module):
        def __init__(self):
            super().__init__()
            self.holder, self.between = Holder(), nn.Linear(4, 4)

        def forward(self, x):
            return self.holder(self.between(self.holder(x, True)), False)

    graph = effc.trace(Back(), {"x": torch.randn(2, 4)}).only()
    found = blocks(graph, Quantize().sites(graph), 2)
    assert [b.name for b in found] == ["holder.a", "between", "holder.b"]


@pytest.mark.parametrize(("program", "data"), [(small, pictures), (transformer, tokens)])
def test_outputs_are_nearer_than_with_nearest_rounding_and_no_block_is_worse(program, data):
    whole, nearest, learned = program(), program(), program()
    options = {"bits": 4, "weight_range": "mse"}
    effc.apply(Quantize(**options), nearest, data(), dialect=ORT)
    record = effc.apply(Reconstruct(**QUICK), learned, data(), dialect=ORT)
    assert apart(learned, whole, data()) < 0.95 * apart(nearest, whole, data())
    for note in told(record):
        first = note["nearest"] if note["stage"] == "weights" else note.get("before", 0)
        assert note.get("error", 0) <= first
        assert note["predicted_s"] > 0


def test_all_that_is_learned_is_codes_one_step_from_nearest():
    nearest, learned = small(), small()
    effc.apply(Quantize(bits=4, weight_range="mse"), nearest, pictures(), dialect=ORT)
    effc.apply(Reconstruct(**QUICK), learned, pictures(), dialect=ORT)
    before, after = nearest.only().tensors(), learned.only().tensors()
    moved = 0
    for name, codes in after.items():
        if not name.endswith("weight_int8"):
            continue
        assert codes.dtype == torch.int8
        lost = (codes.int() - before[name].int()).abs()
        moved += int(lost.sum())
        assert int(lost.max()) <= 1
        assert torch.equal(
            after[name.replace("int8", "scale")], before[name.replace("int8", "scale")]
        )
    assert moved


def test_the_first_block_begins_where_the_float_graph_is():
    """With a range that cuts nothing, soft roundings give the float outputs before the first step."""
    record = effc.apply(
        Reconstruct(**(QUICK | {"weight_range": "minmax"})), small(), pictures(), dialect=ORT
    )
    first = told(record)[0]
    assert first["soft_before"] < 0.01 * first["nearest"]  # what is left is the rounding of biases


def test_every_channel_of_every_layer_has_the_mean_of_the_float_graph():
    data = pictures()
    whole, learned, plain = small(), small(), small()
    effc.apply(Reconstruct(**QUICK), learned, data, dialect=ORT)
    effc.apply(Reconstruct(**QUICK, biases=False), plain, data, dialect=ORT)

    def mean(program):
        outputs = [
            program.run({n: torch.from_numpy(v) for n, v in b.inputs.items()})["output"]
            for b in data
        ]
        return torch.cat(outputs).mean()

    lost, before = (abs(float(mean(p) - mean(whole))) for p in (learned, plain))
    assert lost < 0.2 * before and lost < 2e-3
    assert not any("corrected" in name for name in plain.only().tensors())


def test_both_halves_of_a_split_shortcut_are_learned():
    data, program = pictures(), small()
    weight = program.only().tensors()["join.weight"].clone()
    weight[:, 8:] *= 20
    rebind(program.only(), "join.weight", weight, "larger")
    assert effc.apply(SplitConcat(), program, data, dialect=ORT).sites == 1
    nearest = program.clone()
    effc.apply(Quantize(bits=4, weight_range="mse"), nearest, data, dialect=ORT)
    effc.apply(Reconstruct(**QUICK), program, data, dialect=ORT)
    name = "join.weight_int8"
    moved = program.only().tensors()[name].int() != nearest.only().tensors()[name].int()
    assert bool(moved[:, :8].any()) and bool(moved[:, 8:].any())


def test_blocks_that_are_done_are_taken_from_the_shelf():
    shelf, first, again = Shelf(), small(), small()
    effc.apply(Reconstruct(**QUICK), first, pictures(), dialect=ORT, shelf=shelf)
    kept = Shelf(
        {k: v for k, v in shelf.items() if k.startswith("weights:") and not k.endswith(("end", "join"))}
    )  # fmt: skip
    record = effc.apply(Reconstruct(**QUICK), again, pictures(), dialect=ORT, shelf=kept)
    weights = [n for n in told(record) if n["stage"] == "weights"]
    assert [n["resumed"] for n in weights] == [n["block"] not in ("end", "join") for n in weights]
    before, after = first.only().tensors(), again.only().tensors()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_replay_needs_no_learning():
    kept, first, again = {}, small(), small()
    record = effc.apply(Reconstruct(**QUICK), first, pictures(), dialect=ORT, kept=kept)
    replayed = effc.apply(
        Reconstruct(**QUICK), again, dialect=ORT, recorded=record.decisions, kept=kept
    )
    assert "main/blocks" not in replayed.notes
    before, after = first.only().tensors(), again.only().tensors()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_rows_that_are_kept_do_not_grow_with_the_data():
    held = Feeds(("x", "time"), (True, False), 10)
    for number in range(200):
        held.update(torch.full((4, 3), float(number)))
        held.update(torch.tensor([float(number % 2)]))
    groups = held.groups(8)
    assert sum(len(g["x"]) for g in groups) == 10
    assert max(len(g["x"]) for g in groups) <= 8
    for group in groups:  # a row stays beside the time that it came with
        assert bool((group["x"][:, 0] % 2 == group["time"]).all())
    assert float(max(g["x"].max() for g in groups)) > 100  # not the first rows alone


def test_a_progress_is_told():
    seen = []
    effc.apply(
        Reconstruct(**QUICK), transformer(), tokens(), dialect=ORT,
        progress=lambda word, done, of: seen.append((word, done, of)),
    )  # fmt: skip
    steps = [s for s in seen if s[0] == "reconstruct"]
    assert [s[1] for s in steps] == list(range(1, len(steps) + 1)) and steps[-1][1] == steps[-1][2]


@pytest.mark.parametrize("options", [{"rounding": "gptq"}, {"activation_scale": "token"}])
def test_what_cannot_be_learned_is_refused(options):
    with pytest.raises(PreconditionError, match="one scale each") as caught:
        effc.apply(Reconstruct(**options), transformer(), tokens(), dialect=ORT)
    assert caught.value.hint


class Rows(nn.Module):
    """Inputs of different counts, as of rows and of places in them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, places):
        return self.layer(x)[places]


def test_inputs_that_count_different_things_are_refused():
    given = {"x": torch.randn(6, 4), "places": torch.arange(3)}
    program = effc.trace(Rows(), given, dims={"x": {0: "rows"}, "places": {0: "places"}})
    batches = [Batch(inputs={name: value.numpy() for name, value in given.items()})]
    with pytest.raises(PreconditionError, match="2 kinds of it") as caught:
        effc.apply(Reconstruct(**QUICK), program, batches, dialect=ORT)
    assert caught.value.hint


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = (nn.Conv2d(i, 4, 3, padding=1) for i in (1, 4))
        self.middle = Residual(4)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.first(x)), 2)
        return self.last(torch.relu(self.middle(x)))


def test_a_pool_keeps_its_own_grid_and_no_other():
    torch.manual_seed(0)
    data = [Batch(inputs={"x": batch.inputs["x"]}) for batch in pictures()]
    learned = effc.trace(Pooled(), {"x": torch.randn(2, 1, 8, 8)}, dims={"x": {0: "batch"}})
    nearest = learned.clone()
    effc.apply(Reconstruct(**QUICK), learned, data, dialect=ORT)
    effc.apply(Quantize(bits=4, weight_range="mse"), nearest, data, dialect=ORT)
    steps, before = ({n: float(t) for n, t in p.only().tensors().items() if n.endswith("_scale") and t.dim() == 0}
                     for p in (learned, nearest))  # fmt: skip
    moved = {name for name in steps if steps[name] != pytest.approx(before[name], rel=1e-4)}
    assert moved and not moved & {"relu_scale", "max_pool2d_scale"}
    assert steps["relu_scale"] == steps["max_pool2d_scale"]


def test_weights_alone_are_learned_beside_float_activations():
    whole, nearest, learned = transformer(), transformer(), transformer()
    options = {"bits": 4, "activation_bits": 16, "group": 8}
    effc.apply(Quantize(**options), nearest, tokens(), dialect=DIALECTS["ort"])
    effc.apply(Reconstruct(**(QUICK | options)), learned, tokens(), dialect=DIALECTS["ort"])
    assert apart(learned, whole, tokens()) < apart(nearest, whole, tokens())


def test_a_block_too_large_to_hold_has_fewer_rows_of_all_the_data(monkeypatch):
    assert _spread(5, 9) == {0, 1, 2, 3, 4} and _spread(9, 3) == {0, 4, 8} and _spread(9, 0) == {0}
    monkeypatch.setattr("effc.passes.reconstruct.MOST_BYTES", 1 << 16)
    whole, learned = small(), small()
    effc.apply(Reconstruct(**QUICK), learned, pictures(), dialect=ORT)
    assert apart(learned, whole, pictures()) < 0.2
