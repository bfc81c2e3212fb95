"""Units are ranked by what they are worth, and the ranking is above chance."""

import numpy as np
import pytest
import torch
from torch import nn

import effc
from effc.calib.data import Batch
from effc.calib.slopes import Slopes, SlopeWatcher
from effc.errors import CalibrationError, RecipeError
from effc.passes.coupling import coupled_dims
from effc.passes.importance import IMPORTANCES, read
from effc.passes.prune_dims import PruneDims, spread


class Net(nn.Module):
    """Two hidden layers whose units differ much in what they do; a few are loud and read by nobody."""

    def __init__(self, seed=0, width=24, name="out"):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 5)
        self.name = name
        with torch.no_grad():
            for layer, after in ((self.a, self.b), (self.b, self.c)):
                loud = torch.randperm(width)[: width // 3]
                layer.weight[loud] *= 4
                after.weight[:, loud] *= 0.02
                after.weight.mul_(torch.rand(width) * 2)

    def forward(self, x):
        return {self.name: self.c(torch.relu(self.b(torch.relu(self.a(x)))))}


def data(seed=0, rows=64):
    x = np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32)
    return [Batch(inputs={"x": x[i : i + 16]}) for i in range(0, rows, 16)]


def traced(**options):
    return effc.trace(Net(**options), {"x": torch.ones(2, 8)})


def off(program, name="out", seed=0, **options):
    """How far the outputs are from the model's after pruning, on data that was not measured."""
    made = program.clone()
    effc.apply(PruneDims(**options), made, data(seed))
    x = torch.from_numpy(np.random.default_rng(99).standard_normal((256, 8)).astype(np.float32))
    exact = program.run(x=x)[name]
    return float((made.run(x=x)[name] - exact).norm() / exact.norm())


@pytest.mark.parametrize("word", ["taylor", "wanda"])
@pytest.mark.parametrize("name", ["out", "logits"])
def test_a_ranking_is_above_chance_and_above_the_size_of_weights(word, name):
    for seed in range(3):
        program = traced(seed=seed, name=name)
        gaps = {
            w: off(program, name, seed, ratio=0.4, importance=w)
            for w in (word, "random", "magnitude")
        }
        assert gaps[word] < 0.7 * min(gaps["random"], gaps["magnitude"]), gaps


def test_activations_rank_by_what_readers_see():
    program = traced()
    coupling = coupled_dims(program.only())
    (group,) = [g for g in coupling.prunable() if g.name == "a"]
    record = effc.apply(
        PruneDims(ratio=0.5, importance="activation", groups="a"), program.clone(), data()
    )
    x = torch.from_numpy(np.concatenate([b.inputs["x"] for b in data()]))
    seen = torch.relu(traced_layer(program, x)).double().square().mean(0)
    expected = sorted(
        torch.sort(seen, descending=True, stable=True).indices[: group.size // 2].tolist()
    )
    assert record.decisions["main/a"] == expected


def traced_layer(program, x):
    tensors = program.only().tensors()
    return nn.functional.linear(x, tensors["a.weight"], tensors["a.bias"])


def test_a_slope_is_that_of_a_mask():
    net = Net()
    program = effc.trace(net, {"x": torch.ones(2, 8)})
    graph = program.only()
    coupling = coupled_dims(graph)
    group = coupling.groups["a"]
    x = torch.from_numpy(data()[0].inputs["x"])
    probes = list(IMPORTANCES["taylor"]().probes(coupling, group))
    SlopeWatcher(graph, probes).run({"x": x}, None)
    found = probes[0].collector.mean()

    mask = torch.ones(len(x), group.size, requires_grad=True)
    out = net.c(torch.relu(net.b(torch.relu(net.a(x)) * mask)))
    signs = torch.randint(0, 2, out.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss = (out * signs).sum() / out.detach().norm()
    (slope,) = torch.autograd.grad(loss, mask)
    assert torch.allclose(found, slope.double().square().mean(0), rtol=1e-4)


def test_units_of_several_indices_are_summed_before_the_square():
    places = torch.tensor([0, 0, 1, -1])
    x, slope = torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[1.0, -1.0, 2.0, 9.0]])
    seen = Slopes(2)
    seen.add(x, slope, 1, places)
    seen.add(x, slope, 1, places)  # another reader of the same units
    seen.close()
    assert seen.mean().tolist() == [4.0, 144.0]
    both = seen.merge(seen)
    assert both.count == 2 and both.mean().tolist() == [4.0, 144.0]


def test_a_slope_that_is_no_number_is_refused():
    program = traced()
    bad = [Batch(inputs={"x": np.full((4, 8), np.nan, np.float32)})]
    with pytest.raises(CalibrationError, match="not a number"):
        effc.apply(PruneDims(ratio=0.5, importance="taylor"), program, bad)


def test_what_measures_wants_data():
    assert PruneDims(ratio=0.5, importance="taylor").measures
    assert not PruneDims(ratio=0.5).measures and not PruneDims(keep={"a": (0,)}).measures
    with pytest.raises(RecipeError, match="taylr"):
        effc.apply(PruneDims(ratio=0.5, importance="taylr"), traced(), data())


def test_the_readers_of_a_group_are_each_seen_once():
    coupling = coupled_dims(traced().only())
    for name in ("a", "b"):
        (place,) = read(coupling, coupling.groups[name])
        assert place.dim == 1 and place.units.tolist() == list(range(24)) and len(place.uses) == 1


def test_a_global_budget_takes_where_least_is_lost():
    program = traced()
    coupling = coupled_dims(program.only())
    groups = coupling.prunable()
    sizes = {g.name: g.size for g in groups}
    scores = {
        g.name: torch.full((g.size,), 1.0 if g.name == "a" else 1e-3, dtype=torch.float64)
        for g in groups
    }
    left = spread(groups, scores, 0.3, is_of_loss=True)
    assert left["a"] == sizes["a"] and left["b"] < sizes["b"]
    most = spread(groups, scores, 0.99, is_of_loss=True)
    assert all(count >= 0.1 * sizes[name] for name, count in most.items())
    even = spread(groups, scores, 0.3, is_of_loss=False)  # scales of unlike groups say nothing
    assert even["a"] < sizes["a"]
    gaps = [off(program, ratio=0.4, importance="taylor", budget=b) for b in ("global", "group")]
    assert gaps[0] < 1.5 * gaps[1]


def test_a_replay_needs_no_data():
    program = traced()
    first, again = program.clone(), program.clone()
    pass_ = PruneDims(ratio=0.4, importance="taylor", budget="global")
    record = effc.apply(pass_, first, data())
    effc.apply(pass_, again, recorded=record.decisions)
    assert all(torch.equal(t, again.only().tensors()[n]) for n, t in first.only().tensors().items())


def test_channels_that_attention_alone_reads_are_ranked_too():
    from graphs import Attention

    program = effc.trace(Attention(), {"x": torch.ones(2, 4, 32)})
    x = np.random.default_rng(0).standard_normal((8, 4, 32)).astype(np.float32)
    coupling = coupled_dims(program.only())
    names = {group.name for group in coupling.prunable()}
    assert {"q:0", "q:1"} <= names
    for word in ("activation", "wanda", "taylor"):
        record = effc.apply(
            PruneDims(ratio=0.5, importance=word), program.clone(), [Batch(inputs={"x": x})]
        )
        assert len(record.decisions["main/q:1"]) == 4


def test_padding_is_left_out_of_every_ranking():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x, attention_mask):
            return {"out": self.down(torch.relu(self.up(x))) * attention_mask[:, :, None]}

    mask = np.ones((4, 6), np.int64)
    mask[:2, 3:] = 0
    x = np.random.default_rng(0).standard_normal((4, 6, 8)).astype(np.float32)
    loud = np.where(mask[:, :, None] > 0, x, 100.0).astype(np.float32)
    program = effc.trace(
        Masked(),
        {"x": torch.ones(2, 3, 8), "attention_mask": torch.ones(2, 3, dtype=torch.int64)},
        dims={"x": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}},
    )
    for word in ("activation", "wanda", "taylor"):
        kept = [
            effc.apply(
                PruneDims(ratio=0.5, importance=word), program.clone(),
                [Batch(inputs={"x": values, "attention_mask": mask})],
            ).decisions
            for values in (x, loud)
        ]  # fmt: skip
        assert kept[0] == kept[1], word


def test_a_convolution_in_groups_reads_a_part_in_each():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.p, self.q = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, groups=3)
            self.out = nn.Conv2d(12, 4, 1)

        def forward(self, x):
            return self.out(torch.relu(self.q(torch.relu(self.p(x)))))

    program = effc.trace(Grouped(), {"x": torch.ones(2, 3, 5, 5)})
    coupling = coupled_dims(program.only())
    x = np.random.default_rng(0).standard_normal((4, 3, 5, 5)).astype(np.float32)
    from effc.calib.calibrator import collect
    from effc.passes.base import Stats

    wanda = IMPORTANCES["wanda"]()
    for group in coupling.prunable():
        probes = list(wanda.probes(coupling, group))
        stats = Stats(collect(program.only(), probes, [Batch(inputs={"x": x})]))
        scores = wanda.scores(coupling, group, stats)
        assert bool((scores > 0).any()), group.name
