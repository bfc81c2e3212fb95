"""What passes, what fails, what nobody can tell; and what is taken back when an engine does not pass."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from effc import compiler, gate, recipe, search
from effc.build import NOTHING, Rollback
from effc.errors import CalibrationError, GateRefused, RecipeError
from effc.gate import checks, is_content, rank, verdict
from effc.recipe import GateSpec, MetricGate
from kit import assert_letter, cli, leftovers


def bench(*ratios, length=16):
    """Shapes whose reference ÷ engine has these (value, low, high)."""
    return {
        "shapes": [
            {"batch": 1, "length": length, "reference": "float", "ratio": r, "low": lo, "high": hi}
            for r, lo, hi in ratios
        ]
    }


def metric(drop, low, high, relative=False):
    return {
        "name": "accuracy", "drop": drop, "drop_low": low, "drop_high": high, "relative": relative
    }  # fmt: skip


def asked(spec=None, **found):
    found = {"bench": None, "metric": None, "sizes": None, "asked": False} | found
    return checks(spec or GateSpec(), **found)


@pytest.mark.parametrize(
    ("ratio", "word"),
    [
        ((2.0, 1.9, 2.1), "pass"),
        ((1.0, 0.985, 1.01), "pass"),
        ((0.99, 0.95, 1.03), "undecided"),
        ((0.5, 0.49, 0.51), "fail"),
        ((0.97, 0.96, 0.979), "fail"),
    ],
)
def test_latency_is_judged_by_its_interval(ratio, word):
    (check,) = asked(bench=bench(ratio))
    assert check.verdict == word
    assert check.value == pytest.approx(1 / ratio[0])
    assert check.low <= check.value <= check.high


@pytest.mark.parametrize(
    ("drop", "word"),
    [
        ((0.001, -0.001, 0.004), "pass"),
        ((-0.01, -0.02, 0.0), "pass"),
        ((0.004, 0.001, 0.007), "undecided"),
        ((0.006, 0.001, 0.011), "undecided"),
        ((0.02, 0.01, 0.03), "fail"),
    ],
)
def test_a_metric_is_judged_by_the_interval_of_its_drop(drop, word):
    (check,) = asked(metric=metric(*drop))
    assert (check.verdict, check.bound) == (word, 0.005)


def test_a_perplexity_may_lose_a_share():
    (check,) = asked(metric=metric(0.007, 0.001, 0.012, relative=True))
    assert (check.verdict, check.bound) == ("pass", 0.02)
    spec = GateSpec(metric=MetricGate(max_drop=0.01))
    (check,) = asked(spec, metric=metric(0.007, 0.001, 0.012, relative=True))
    assert check.verdict == "undecided"


def test_a_size_needs_no_interval():
    spec = GateSpec(size="smaller")
    assert [c.verdict for c in asked(spec, sizes=(9, 10))] == ["pass"]
    assert [c.verdict for c in asked(spec, sizes=(10, 10))] == ["fail"]


def test_what_was_not_measured_is_no_question_unless_somebody_asked():
    assert asked() == ()
    found = asked(asked=True)
    assert [(c.name, c.verdict) for c in found] == [
        ("latency", "undecided"),
        ("metric", "undecided"),
    ]
    assert verdict(GateSpec(), found) == "passed with warnings"
    assert verdict(GateSpec(strict=True), found) == "refused"


def test_strict_refuses_what_cannot_be_told():
    found = asked(bench=bench((0.99, 0.95, 1.03)))
    assert verdict(GateSpec(), found) == "passed with warnings"
    assert verdict(GateSpec(strict=True), found) == "refused"
    assert verdict(None, found) == "off"
    assert verdict(GateSpec(), ()) == "off"


def test_a_value_beyond_its_bound_is_worth_a_search_even_where_nobody_can_tell():
    open_, beyond = (
        asked(metric=metric(0.004, 0.001, 0.007)),
        asked(metric=metric(0.006, 0.0, 0.011)),
    )
    assert is_content(GateSpec(), open_) and not is_content(GateSpec(), beyond)
    assert rank(GateSpec(), open_) < rank(GateSpec(), beyond)
    assert rank(GateSpec(), beyond) < rank(GateSpec(), asked(metric=metric(0.02, 0.01, 0.03)))


def test_a_refusal_says_what_was_reached():
    found = asked(bench=bench((2, 1.9, 2.1)), metric=metric(0.02, 0.01, 0.03))
    letter = gate.refusal(GateSpec(), found, tried=3)
    assert letter.exit_code == 11
    for part in ("best of 3", "0.0200 [0.0100, 0.0300]", "at most 0.005", "--allow-worse", "0.500"):
        assert part in str(letter)


# The recipe's section


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gate: {latency: fast}", "gate.latency: 'fast' is not one of not-slower, false"),
        ("gate: {metrc: false}", "did you mean 'metric'"),
        ("gate: {metric: {max_dorp: 1}}\nmetric: {accuracy: f}", "did you mean 'max_drop'"),
        (
            "gate: {metric: {max_drop: -1}}\nmetric: {accuracy: f}",
            "gate.metric.max_drop: should be",
        ),
        ("gate: {metric: {max_drop: 0.1}}", "names no metric"),
        ("gate: {latency: not-slower}\nbench: false", "and does not measure it"),
        ("gate: yes please", "gate is a mapping"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(text, words):
    with pytest.raises(RecipeError, match=words) as caught:
        recipe.parse(f"source: {{transformers: d}}\n{text}")
    assert "line 2" in caught.value.where


def test_a_recipe_without_a_gate_has_the_usual_one():
    made = recipe.parse("source: {transformers: d}")
    assert made.gate == GateSpec() and not made.gate_is_asked
    assert recipe.parse("source: {transformers: d}\ngate: false").gate is None
    assert recipe.parse("source: {transformers: d}\ngate: {size: smaller}").gate_is_asked


# What is taken back

MODEL = '''
import numpy as np
import torch
from torch import nn
import effc


class Net(nn.Module):
    """The second layer of each block has one huge weight: in few bits the rest of its row is lost."""

    def __init__(self, harm=True, size=16):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size)) for _ in range(4)
        )
        self.head = nn.Linear(size, 4)
        if harm:
            for block in (self.blocks[1], self.blocks[2]):
                block[2].weight.data[:, 0] *= 400.0
                block[0].weight.data[0] = 0.0
                block[0].bias.data[0] = -1.0

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def batches():
    rng = np.random.default_rng(0)
    for _ in range(4):
        yield {"x": rng.standard_normal((16, 16)).astype(np.float32)}


def net(harm=True):
    module = Net(harm).eval()
    return effc.Source(
        modules={"main": module},
        inputs={"main": {"x": torch.randn(2, 16, generator=torch.Generator().manual_seed(1))}},
        batches=batches,
    )


def agreement(run, processor, file):
    """How often the largest output is that of the float model."""
    x = np.load(file)["x"]
    truth = Net().eval()(torch.from_numpy(x)).argmax(-1).numpy()
    return {"score": (run({"x": x})["output"].argmax(-1) == truth).astype(float)}


def never(run, processor, file):
    """Right for the model, which is asked first, and wrong for every engine."""
    never.asked += 1
    return {"score": np.full(100, float(never.asked == 1))}


never.asked = 0
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("gate")
    (place / "net.py").write_text(MODEL)
    x = np.random.default_rng(7).standard_normal((600, 16)).astype(np.float32)
    np.savez(place / "test.npz", x=x)
    return place


def made(place, **changes):
    data = {
        "source": {"python": f"{place}/net.py:net"},
        "passes": [{"pass": "quantize", "bits": 4, "activation_bits": 8}],
        "metric": {f"{place}/net.py:agreement": f"{place}/test.npz"},
        "gate": {"latency": False, "metric": {"max_drop": 0.02}},
        "bench": False,
    }
    return recipe.build({**data, **changes})


@pytest.fixture(scope="module")
def gated(place):
    """Compiled under a gate that the whole of the recipe cannot meet."""
    return compiler.run(made(place), place / "OUT")


def test_the_worst_sites_are_left_in_float_and_the_report_says_which_and_why(gated, place):
    found = gated.report["gate"]
    assert found["verdict"] in ("passed", "passed with warnings")
    ((taken),) = found["rolled_back"]
    assert taken["pass"] == "0:quantize"
    assert {"blocks.1.2", "blocks.2.2"} & set(taken["sites"])
    assert len(taken["sites"]) < 9  # not everything
    assert "metric" in taken["why"] and "at most 0.02" in taken["why"]
    assert gated.report["metric"]["drop"] <= 0.02
    assert "blocks.1.2" in gated.text() or "blocks.2.2" in gated.text()


def test_without_its_gate_the_same_recipe_loses_more(gated, place, tmp_path):
    naive = compiler.run(made(place, gate=False), tmp_path / "OUT")
    assert naive.report["metric"]["drop"] > 0.02
    assert naive.report["gate"] | {"seconds": 0} == {
        "verdict": "off", "strict": False, "checks": [], "rolled_back": [], "tried": 1, "seconds": 0,
        "ran_out_of_time": False,
    }  # fmt: skip


def test_what_was_taken_back_is_a_decision_and_is_replayed(gated, place, tmp_path):
    decisions = json.loads((gated.out / "decisions.json").read_text())
    assert (
        decisions["gate"]["0:quantize"]["exclude"]
        == gated.report["gate"]["rolled_back"][0]["sites"]
    )
    again = compiler.run(made(place), tmp_path / "OUT", decisions=decisions)
    model = (gated.out / "model.onnx").read_bytes()
    assert (again.out / "model.onnx").read_bytes() == model
    assert again.report["gate"]["tried"] == 1


def hopeless(place):
    """A recipe whose metric no engine can meet, not even the model itself."""
    # the metric counts, so each compile needs it fresh

    for name in [n for n in sys.modules if n.startswith("effc_user_")]:
        del sys.modules[name]
    return made(
        place,
        metric={f"{place}/net.py:never": f"{place}/test.npz"},
        gate={"latency": False, "metric": {"max_drop": 0.5}},
    )


def test_where_nothing_helps_the_compile_is_refused_and_nothing_is_written(place, tmp_path):
    with pytest.raises(GateRefused, match="does not meet its gate"):
        compiler.run(hopeless(place), tmp_path / "OUT", time_budget_s=0)
    assert list(tmp_path.iterdir()) == []


def test_a_search_stops_when_its_time_is_up(place, tmp_path):
    found = compiler.run(made(place), tmp_path / "OUT", time_budget_s=0.0)
    assert found.report["gate"]["verdict"] in ("passed", "passed with warnings")
    assert found.report["gate"]["tried"] <= 3


def test_a_pass_that_makes_it_slower_is_taken_back(place, tmp_path):
    """Eight small layers in integers cost more than they save; every class is one of these."""
    spec = made(
        place, gate={"metric": False}, bench={"shapes": [[1, 1]], "budget_s": 0.5}, metric=None
    )
    found = compiler.run(spec, tmp_path / "OUT", allow_worse=True).report
    for check in found["gate"]["checks"]:
        assert check["verdict"] != "fail" or found["gate"]["rolled_back"]


def test_the_command_line_refuses_with_its_own_code(place, tmp_path):
    (tmp_path / "recipe.yaml").write_text(hopeless(place).text)
    ran = cli("compile", tmp_path / "recipe.yaml", "-o", tmp_path / "OUT", "--time-budget", "0s")
    assert_letter(ran, "GateRefused", 11, "--allow-worse")
    assert not (tmp_path / "OUT").exists() and leftovers(tmp_path) == []
    hopeless(place)
    words = ("--allow-worse", "--time-budget", "0")
    ran = cli("compile", tmp_path / "recipe.yaml", "-o", tmp_path / "OUT", *words)
    assert ran.code == 0 and "gate" in ran.out


@pytest.mark.parametrize("word", ["soon", "-1", "1d", "nan"])
def test_a_time_budget_is_a_time(word):
    assert_letter(cli("compile", "x", "-o", "y", "--time-budget", word), "UsageError", 2)


# Groups


def test_groups_are_modules_side_by_side_and_blocks_where_these_are_many():
    assert (
        search._parent("encoder.layer.3.attention.self.query") == "encoder.layer.3.attention.self"
    )
    assert search._parent("blocks.1.2") == "blocks.1.2"
    assert search._parent("head") == "head"
    assert search._block("encoder.layer.3.output.dense") == "encoder.layer.3"
    assert search._block("classifier") == "classifier"


def test_a_module_called_by_a_pattern_is_taken_literally():
    from fnmatch import fnmatchcase

    for path in ("a.b", "a[0].b*", "what?"):
        assert fnmatchcase(path, search.literal(path))
        assert not fnmatchcase(path + "x", search.literal(path))


def test_a_rollback_is_recorded_and_read_again():
    spec = recipe.parse("source: {python: 'a:b'}\npasses: [drop-noops, quantize, quantize]")
    rollback = NOTHING.without(1, ["a", "b"]).without(1, ["c"])
    rollback = dataclasses.replace(rollback, dropped=frozenset({2}))
    content = rollback.to_json(spec.passes)
    assert content == {"1:quantize": {"exclude": ["a", "b", "c"]}, "2:quantize": {"dropped": True}}
    assert Rollback.from_json(content) == rollback


@pytest.mark.parametrize("content", [{"x": {}}, {"0:q": {"exclude": 3}}, {"0:q": 1}])
def test_a_damaged_record_is_refused(content):
    with pytest.raises(CalibrationError, match="damaged"):
        Rollback.from_json(content)
