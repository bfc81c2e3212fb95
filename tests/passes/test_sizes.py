"""Sizes are chosen by a clock: where multiples are really faster they are taken, and a budget is met or refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graphs import normal
from torch import nn

import effc
from effc.errors import CalibrationError, PreconditionError
from effc.passes import sizes
from effc.passes.coupling import coupled_dims
from effc.passes.prune_dims import PruneDims, shrunk
from effc.passes.quantize import Quantize
from kit import Perceptron

X = normal(3, 8)


class Staircase:
    """A made-up clock: a layer takes as long as the next multiple of `tile` of its width, in one row per graph."""

    def __init__(self, tile=16, noise=0.0, more=lambda width: 0.0):
        self.tile, self.more, self.asked = tile, more, 0
        self.noise, self.draw = noise, np.random.default_rng(0)

    def __call__(self, graphs):
        rows = []
        for graph in graphs:
            self.asked += 1
            widths = [t.shape[0] for n, t in graph.tensors().items() if n.endswith("weight")][:-1]
            ms = 10 + sum(-(-w // self.tile) * self.tile + self.more(w) for w in widths)
            rows.append(ms * np.exp(self.noise * self.draw.normal(size=8)) if rows else [ms] * 8)
        return [list(row) for row in rows]


def net(*widths):
    torch.manual_seed(0)
    layers = []
    for before, after in zip((8, *widths), widths, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 4))


def pruned(module, clock, recorded=None, **options):
    program = effc.trace(module.eval(), X)
    name = program.only().inputs[0]
    options = PruneDims(**options)
    record = effc.apply(
        options, program, probes={"main": [{name: X}]}, clock=clock, recorded=recorded
    )
    return record, program


def kept(record):
    return {name: len(units) for name, units in record.decisions.items() if name != "main/sizes"}


def test_a_size_goes_to_the_top_of_its_step():
    record, program = pruned(net(96), Staircase(16), ratio=0.3, align="auto")
    assert kept(record) == {
        "main/0": 64
    }  # 67 takes as long as 80: the step below gives most for a unit
    assert program.only().tensors()["0.weight"].shape == (64, 8)
    (kind,) = record.notes["main/sizes"]["kinds"]
    assert kind["wanted"] == 67 and kind["kept"] == 64 and kind["size"] == 96
    assert {t["units"] for t in kind["tried"]} == {64, 67, 68, 72, 80}
    assert kind["bought"]["ms"] == pytest.approx(74) and record.notes["main/sizes"][
        "whole_ms"
    ] == pytest.approx(106)


def test_units_that_cost_nothing_are_kept():
    record, _ = pruned(net(96), Staircase(40), ratio=0.3, align="auto")
    assert kept(record) == {"main/0": 80}  # 67 and 80 are on one step


def test_without_steps_the_wish_stands():
    record, _ = pruned(net(96), Staircase(1), ratio=0.3, align="auto")
    assert kept(record) == {"main/0": 67}


def test_what_noise_may_explain_is_not_preferred():
    found = []
    for seed in range(40):
        draw = np.random.default_rng(seed)
        kind = sizes._Tried(groups=[SimpleNamespace(size=96)], wanted=67)
        kind.shares = {n: n / 96 * np.exp(0.1 * draw.normal(size=8)) for n in (64, 67, 68, 72, 80)}
        found.append(kind.best())
    assert found.count(67) >= 38
    large = Staircase(1, noise=0.01, more=lambda w: 0.0 if w % 8 == 0 else 20.0)
    record, _ = pruned(net(96), large, ratio=0.3, align="auto")
    assert kept(record)["main/0"] % 8 == 0


def test_what_pruning_slows_down_stays_whole():
    record, program = pruned(
        net(96), Staircase(1, more=lambda w: 0 if w == 96 else 50), ratio=0.3, align="auto"
    )
    assert kept(record) == {"main/0": 96} and record.sites == 0
    assert program.only().tensors()["0.weight"].shape == (96, 8)


def test_groups_that_are_alike_share_a_measurement():
    clock = Staircase(16)
    record, _ = pruned(net(96, 96, 96, 96), clock, ratio=0.3, align="auto")
    notes = record.notes["main/sizes"]
    alike = [kind["groups"] for kind in notes["kinds"]]
    assert alike == [["0"], ["2", "4"], ["6"]]  # the first reads 8, the last is read for 4
    assert set(kept(record).values()) == {64}
    assert clock.asked == 1 + 3 * 5 + 2
    assert notes["together"]["ms"] == pytest.approx(10 + 4 * 64)


def test_all_groups_in_blocks_are_tried_where_none_shows_it_alone():
    class Blocks(Staircase):
        """Fast only where every width is a multiple of 16."""

        def __call__(self, graphs):
            rows = []
            for graph in graphs:
                widths = [t.shape[0] for n, t in graph.tensors().items() if n.endswith("weight")][
                    :-1
                ]
                slow = any(w % 16 for w in widths)
                rows.append([sum(widths) * (1.0 if slow else 0.5)] * 8)
            return rows

    record, _ = pruned(net(97, 97), Blocks(), ratio=0.3, align="auto")
    assert kept(record) == {"main/0": 64, "main/2": 64}


def test_a_record_is_replayed_without_a_clock():
    record, first = pruned(net(96, 48), Staircase(16), ratio=0.3, align="auto")
    recorded = json.loads(json.dumps(record.decisions))
    again, second = pruned(net(96, 48), None, recorded=recorded, ratio=0.3, align="auto")
    assert json.dumps(again.notes) == json.dumps(record.notes)
    for name, tensor in first.only().tensors().items():
        assert torch.equal(tensor, second.only().tensors()[name])


@pytest.mark.parametrize("align", [None, 8, "auto"])
def test_a_budget_is_met_with_as_few_units_gone_as_can_be(align):
    record, _ = pruned(net(160, 160, 160), Staircase(8), latency_budget=0.7, align=align)
    notes = record.notes["main/sizes"]
    share = notes["together"]["ms"] / notes["whole_ms"]
    assert 0.6 < share <= 0.7
    assert notes["ratio"] == pytest.approx(0.32, abs=0.06)
    assert align is None or all(count % 8 == 0 for count in kept(record).values())
    assert all(kind["bought"]["ms"] < notes["whole_ms"] for kind in notes["kinds"])


def test_a_budget_out_of_reach_says_what_was_reached():
    with pytest.raises(PreconditionError, match=r"0\.3 cannot be met: .* takes 0\.53") as error:
        pruned(net(24), Staircase(8), latency_budget=0.3)
    assert "larger budget" in error.value.hint


def test_counts_are_rounded_to_a_given_multiple():
    record, _ = pruned(net(96, 48), None, ratio=0.3, align=16)
    assert kept(record) == {"main/0": 64, "main/2": 32}


def test_a_head_is_a_multiple_by_itself():
    from graphs import Attention

    module = nn.Sequential(nn.Linear(32, 32), Attention(), nn.Linear(32, 32))
    coupling = coupled_dims(effc.trace(module.eval(), normal(2, 5, 32)).only())
    heads, inner = coupling.groups["1.q:0"], coupling.groups["1.q:1"]
    assert [sizes.step_of(heads, n) for n in (4, 8, 16)] == [1, 1, 2]  # of 8 channels
    assert [sizes.step_of(inner, n) for n in (4, 8, 16)] == [4, 8, 16]
    assert sizes.candidates(heads, 3) == [3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.2, "align": 8}, "align: 8 leaves no size for 0, of 5 units"),
        ({"keep": {"0": (0, 1)}, "align": 2}, "leaves nothing to align"),
        ({"ratio": 0.2, "latency_budget": 0.5}, "or a latency budget"),
        ({"align": "auto"}, "or a latency budget"),
        ({"ratio": 0.2, "align": "auto"}, "there is no clock"),
        ({"latency_budget": 0.5}, "there is no clock"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(options, words):
    with pytest.raises(PreconditionError) as error:
        pruned(net(5), None, **options)
    assert words in str(error.value) and error.value.hint


def test_a_ratio_that_leaves_no_smaller_multiple_is_refused():
    with pytest.raises(PreconditionError, match="in multiples of 16 leaves every group whole") as e:
        pruned(net(32), None, ratio=0.2, align=16)
    assert "a larger ratio" in e.value.hint
    record, _ = pruned(net(32), None, ratio=0.3, align=16)
    assert kept(record) == {"main/0": 16}


def test_a_global_budget_that_leaves_no_smaller_multiple_is_refused_too():
    with pytest.raises(PreconditionError, match="in multiples of 16 leaves every group whole") as e:
        pruned(net(32), None, ratio=0.2, align=16, budget="global")
    assert "a larger ratio" in e.value.hint and "main" in e.value.where
    record, _ = pruned(net(32), None, ratio=0.3, align=16, budget="global")
    assert kept(record) == {"main/0": 16} and record.notes == {}


@pytest.mark.parametrize(("budget", "whole"), [("group", {"2": 32}), ("global", {"0": 96})])
def test_what_a_multiple_leaves_whole_is_told_where_another_group_is_pruned(budget, whole):
    options = {"ratio": 0.2, "align": 16, "budget": budget}
    record, _ = pruned(net(96, 32), None, **options)
    assert record.sites == 1
    assert record.notes["main/whole"] == {"groups": whole, "align": 16}
    again, _ = pruned(net(96, 32), None, record.decisions, **options)
    assert again.notes == record.notes


@pytest.mark.parametrize("budget", ["group", "global"])
def test_multiples_of_one_are_any_number(budget):
    record, _ = pruned(net(96, 2), None, ratio=0.2, align=1, budget=budget)
    assert record.sites and record.notes == {}


def test_a_ratio_below_a_unit_is_refused_without_a_word_of_multiples_of_one():
    with pytest.raises(PreconditionError, match="less than one unit") as error:
        pruned(net(32), None, ratio=0.01, align=1)
    assert error.value.hint == "ratio: 0.031 or more"


@pytest.mark.parametrize("change", ["counts", "kinds", "nothing"])
def test_a_record_of_another_model_is_refused(change):
    record, _ = pruned(net(96), Staircase(), ratio=0.3, align="auto")
    recorded = json.loads(json.dumps(record.decisions))
    if change == "counts":
        recorded["main/sizes"]["counts"] = {"9": 64}
    elif change == "kinds":
        recorded["main/sizes"]["kinds"] = [1]
    else:
        recorded["main/sizes"] = None
    with pytest.raises(CalibrationError, match="another model"):
        pruned(net(96), None, recorded=recorded, ratio=0.3, align="auto")


def test_a_copy_has_the_units_that_were_asked_for():
    graph = effc.trace(Perceptron().eval(), X).only()
    smaller = shrunk(graph, {"up": 5})
    assert smaller.tensors()["up.weight"].shape == (5, 8)
    assert graph.tensors()["up.weight"].shape == (16, 8)


@pytest.mark.slow
@pytest.mark.parametrize("behind", [[], [Quantize()]])
def test_onnxruntime_is_a_clock(behind):
    module, x = net(512, 512), {"input": X.numpy()}
    clock = effc.clock("ort", x, threads=1, behind=behind)
    program = effc.trace(module.eval(), X)
    graph = program.only()
    whole, half, same = clock([graph, shrunk(graph, {"0": 64, "2": 64}), shrunk(graph, {"0": 512})])
    assert len(whole) == len(half) == len(same) >= 5 and min(half) > 0
    assert np.median(half) < 0.8 * np.median(whole)  # a thirtieth of the products
    assert np.median(same) == pytest.approx(np.median(whole), rel=0.35)
