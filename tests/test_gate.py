"""What passes, what fails, what nobody can tell; and what is taken back when an engine does not pass."""

import dataclasses
import json
import re
import sys

import numpy as np
import onnx_ir as ir
import pytest

from effc import compiler, gate, metrics, recipe, report, search
from effc.build import NOTHING, Builder, Rollback
from effc.cache import Cache
from effc.errors import CalibrationError, GateRefused, RecipeError, VerifyError
from effc.gate import checks, is_content, rank, verdict
from effc.passes import quantize
from effc.passes.awq import Awq
from effc.passes.quantize import Quantize
from effc.progress import Progress
from effc.recipe import GateSpec, MetricGate
from effc.samples import Samples
from effc.trial import Lab, OutOfTime
from kit import assert_letter, cli, leftovers

pytestmark = pytest.mark.slow


def bench(*ratios, length=16):
    """Shapes whose reference ÷ engine has these (value, low, high)."""
    return {
        "shapes": [
            {"batch": 1, "length": length, "reference": "float", "ratio": r, "low": lo, "high": hi}
            for r, lo, hi in ratios
        ]
    }


def test_samples_too_few_to_tell_are_neither_passed_nor_failed():
    few = {**metric(0, 0, 0), "are_few": True}
    (check,) = asked(metric=few)
    assert check.verdict == "undecided" and "too few samples to tell" in check.text
    assert verdict(GateSpec(strict=True), (check,)) == "refused"


@pytest.mark.parametrize(("n", "word"), [(5, "undecided"), (100, "undecided"), (10_000, "pass")])
def test_agreement_of_a_few_samples_is_no_proof(n, word, tmp_path):
    same = metrics.Samples({"correct": np.ones(n)})
    found = metrics.compare(metrics.Accuracy(file=tmp_path), same, same)
    (check,) = asked(metric=dataclasses.asdict(found))
    assert check.verdict == word


def metric(drop, low, high, relative=False):
    return {
        "name": "accuracy", "drop": drop, "drop_low": low, "drop_high": high, "relative": relative,
        "are_few": False,
    }  # fmt: skip


def asked(spec=None, **found):
    found = {"bench": None, "metric": None, "sizes": None, "asked": ()} | found
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
    assert [c.name for c in asked(asked=("metric",))] == ["metric"]
    assert asked(asked=("size", "strict")) == ()
    found = asked(asked=("latency", "metric"))
    assert is_content(GateSpec(strict=True), found)  # no search finds a number that nobody measures
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
    assert made.gate == GateSpec() and not made.gate_asks
    assert recipe.parse("source: {transformers: d}\ngate: false").gate is None
    assert recipe.parse("source: {transformers: d}\ngate: {size: smaller}").gate_asks == {"size"}


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
    assert set(taken["reasons"]) == set(taken["sites"])
    assert all(re.fullmatch(r"[\d.e-]+ of error alone", r) for r in taken["reasons"].values())


def test_without_its_gate_the_same_recipe_loses_more(gated, place, tmp_path):
    naive = compiler.run(made(place, gate=False), tmp_path / "OUT")
    assert naive.report["metric"]["drop"] > 0.02
    assert naive.report["gate"] | {"seconds": 0} == {
        "verdict": "off", "strict": False, "target": "ort", "checks": [], "rolled_back": [], "tried": 1,
        "seconds": 0, "ran_out_of_time": False,
    }  # fmt: skip


def test_what_was_taken_back_is_a_decision_and_is_replayed(gated, place, tmp_path, monkeypatch):
    decisions = json.loads((gated.out / "decisions.json").read_text())
    assert (
        decisions["gate"]["0:quantize"]["exclude"]
        == gated.report["gate"]["rolled_back"][0]["sites"]
    )
    monkeypatch.setattr(search, "search", None)  # nothing is searched for a second time
    again = compiler.run(made(place), tmp_path / "OUT", decisions=decisions)
    taken = again.report["gate"]["rolled_back"]
    assert [t["sites"] for t in taken] == [decisions["gate"]["0:quantize"]["exclude"]]
    assert taken[0]["why"] == "recorded by an earlier compile"
    model = (gated.out / "model.onnx").read_bytes()
    assert (again.out / "model.onnx").read_bytes() == model
    assert again.report["gate"]["tried"] == 1


def test_a_search_chooses_no_codes_again(place, tmp_path, monkeypatch):
    """Every weight's codes are computed once, in all the candidates of a search."""
    chosen, real = [], quantize.gptq

    def count(weight, *args, **options):
        chosen.append(weight.numpy().tobytes())
        return real(weight, *args, **options)

    monkeypatch.setattr(quantize, "gptq", count)
    pass_ = {"pass": "quantize", "bits": 4, "activation_bits": 8, "rounding": "gptq"}
    found = compiler.run(made(place, passes=[pass_]), tmp_path / "OUT", kept=Cache(None))
    assert found.report["gate"]["tried"] > 2
    assert found.report["gate"]["rolled_back"]
    assert len(chosen) == len(set(chosen)) == 9  # linear layers of the model


def test_codes_of_another_weight_are_chosen_for_it(place, tmp_path, monkeypatch):
    """Where a pass in front is taken back the weight is another, and codes of the first are none for it."""
    source = compiler.opened(made(place), Progress())
    builder = Builder(
        recipe=dataclasses.replace(
            made(place),
            passes=(Awq(group=None), Quantize(bits=4, activation_bits=16, rounding="gptq")),
        ),
        source=source[0], samples=Samples(source[0], None), original=source[1],
        progress=Progress(), cache=Cache(None),
    )  # fmt: skip
    whole = builder.rewrite("ort")
    assert whole.steps[0].sites
    known = {index: record.decisions for index, record in whole.steps.items()}
    without = Rollback(dropped=frozenset({0}))
    assert builder.rewrite("ort", without, known).steps[1].decisions == alone(builder, without)


def alone(builder, rollback):
    """What the same builder decides that has seen nothing yet."""
    fresh = dataclasses.replace(builder, _kept={})
    return fresh.rewrite("ort", rollback).steps[1].decisions


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


@pytest.mark.slow
def test_a_search_stops_when_its_time_is_up(place, tmp_path):
    with pytest.raises(GateRefused, match="the time for the search is up"):
        compiler.run(made(place), tmp_path / "OUT", time_budget_s=0.0)
    found = compiler.run(made(place), tmp_path / "OUT", time_budget_s=0.0, allow_worse=True)
    gate = found.report["gate"]
    assert (gate["verdict"], gate["tried"], gate["ran_out_of_time"]) == ("refused", 1, True)
    assert gate["rolled_back"] == []


@pytest.mark.slow
def test_a_search_that_is_cut_short_gives_the_best_so_far(place, tmp_path, monkeypatch):
    """Time is up when a second whole candidate is asked for."""
    attempt, whole = Lab.attempt, []

    def until_then(lab, base, rollback, *, timed):
        if timed and whole:
            raise OutOfTime
        whole.extend([rollback] if timed else [])
        return attempt(lab, base, rollback, timed=timed)

    monkeypatch.setattr(Lab, "attempt", until_then)
    found = compiler.run(made(place), tmp_path / "OUT", time_budget_s=1e6).report["gate"]
    assert found["ran_out_of_time"] is True and len(whole) == 1
    assert found["verdict"] != "refused" and found["rolled_back"]


@pytest.mark.slow
def test_a_candidate_that_cannot_be_built_ends_no_search(place, tmp_path, monkeypatch):
    attempt, calls = Lab.attempt, []

    def first_fails(lab, base, rollback, *, timed):
        calls.append(rollback)
        if len(calls) == 1:
            raise VerifyError("another thing", hint="none")
        return attempt(lab, base, rollback, timed=timed)

    monkeypatch.setattr(Lab, "attempt", first_fails)
    found = compiler.run(made(place), tmp_path / "OUT").report["gate"]
    assert found["verdict"] != "refused" and len(calls) > 1


@pytest.mark.slow
def test_strict_without_a_bench_or_a_metric_searches_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_candidates", None)
    gate = {"strict": True, "latency": "not-slower"}
    spec = recipe.without_bench(made(place, gate=gate, metric=None, bench={"shapes": [[1, 1]]}))
    with pytest.raises(GateRefused, match="latency: asked for and not measured"):
        compiler.run(spec, tmp_path / "OUT")
    spec = recipe.without_bench(made(place, gate={"strict": True}, metric=None))
    assert compiler.run(spec, tmp_path / "OUT").report["gate"]["verdict"] == "off"


@pytest.mark.slow
def test_every_target_is_asked_for_itself(place, tmp_path):
    found = compiler.run(made(place, targets=["ort", "onnx"]), tmp_path / "OUT")
    decisions = json.loads((tmp_path / "OUT" / "decisions.json").read_text())
    assert decisions["ort/gate"] and decisions["onnx/gate"]
    assert set(found.report["verify"]) == {"ort", "onnx"}
    gates = [found.report["gate"], found.report["others"]["onnx"]["gate"]]
    assert [gate["target"] for gate in gates] == ["ort", "onnx"]
    assert all(gate["verdict"].startswith("passed") for gate in gates)
    assert found.report["others"]["onnx"]["metric"]["n"] == found.report["metric"]["n"]
    assert "engine    onnx" in found.text()


@pytest.mark.slow
def test_a_refused_target_is_named_and_leaves_nothing(place, tmp_path, monkeypatch):
    """The second target fails its gate: nothing of the first is written either."""
    monkeypatch.setattr(search, "search", lambda lab, base, **_: search.Found(trial=base))
    made_for = []

    def fails(spec, found):
        made_for.append(len(found))
        return list(found) if len(made_for) > 2 else []

    monkeypatch.setattr(gate, "fails", fails)
    with pytest.raises(GateRefused, match="the engine for onnx does not meet its gate"):
        compiler.run(made(place, targets=["ort", "onnx"]), tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    "record",
    [
        {"0:drop-noops": {"dropped": True}},
        {"1:quantize": {"dropped": True}},
        {"0:quantize": {"exclude": "abc"}},
        {"0:quantize": {"exclude": [1]}},
        {"0:quantize": {}},
        {"0:quantize": None},
        ["0:quantize"],
    ],
    ids=["pass", "place", "text", "number", "nothing", "null", "list"],
)
def test_a_record_of_another_recipe_is_refused(record, gated, place, tmp_path):
    decisions = json.loads((gated.out / "decisions.json").read_text())
    with pytest.raises(CalibrationError, match="not about this recipe"):
        compiler.run(made(place), tmp_path / "OUT", decisions={**decisions, "gate": record})


@pytest.mark.parametrize(
    ("groups", "counts"),
    [(1, []), (2, [1]), (3, [1, 2]), (4, [1, 2, 3]), (40, [1, 2, 4, 8, 16, 32, 39])],
)
def test_every_number_of_groups_but_all_is_within_reach(groups, counts):
    assert search._counts(groups) == counts


def test_a_pass_that_makes_it_slower_is_taken_back(place, tmp_path, monkeypatch):
    """Eight small layers in integers cost more than they save; every class is one of these."""
    spec = made(
        place, gate={"metric": False}, bench={"shapes": [[1, 1]], "budget_s": 0.5}, metric=None
    )

    def slow(lab, lowered, spec, against=None):
        """An engine takes as long as it has layers in integers, and the float one one unit."""
        counts = {
            n: 1 + len(integer_layers(low)) for n, low in {**(against or {}), "me": lowered}.items()
        }
        mine = counts.pop("me")
        ratios = {
            n: {"ratio": c / mine, "low": c / mine, "high": c / mine} for n, c in counts.items()
        }
        shape = {
            "batch": 1,
            "length": 1,
            "reference": "float",
            "ratio": 1 / mine,
            "low": 1 / mine,
            "high": 1 / mine,
        }
        return {"shapes": [{**shape, "against": ratios}], "peak_rss_mb": {}, "load_ms": {}}

    monkeypatch.setattr(Lab, "bench", slow)
    monkeypatch.setattr(report, "write", lambda *_: None)
    found = compiler.run(spec, tmp_path / "OUT").report["gate"]
    assert found["verdict"] == "passed"
    ((taken),) = found["rolled_back"]
    assert taken["sites"] == ["all"]


def integer_layers(lowered):
    """Shapes of the weights of products in integers."""
    model = ir.load(lowered.directory / lowered.files[0])
    nodes = [n for n in model.graph if n.op_type == "MatMulIntegerToFloat"]
    return [tuple(node.inputs[1].shape) for node in nodes]


@pytest.mark.slow
def test_only_the_class_that_makes_it_slower_is_taken_back(place, tmp_path, monkeypatch):
    """The last layer alone, of another size than the others, costs in integers."""
    spec = made(
        place, gate={"metric": False}, bench={"shapes": [[1, 1]], "budget_s": 0.5}, metric=None
    )

    def slow(lab, lowered, spec, against=None):
        ms = {
            n: 3 if (16, 4) in integer_layers(low) else 1
            for n, low in {**(against or {}), "me": lowered}.items()
        }
        mine = ms.pop("me")
        ratios = {n: {"ratio": m / mine, "low": m / mine, "high": m / mine} for n, m in ms.items()}
        shape = {
            "batch": 1,
            "length": 1,
            "reference": "float",
            "ratio": 2 / mine,
            "low": 2 / mine,
            "high": 2 / mine,
        }
        return {"shapes": [{**shape, "against": ratios}], "peak_rss_mb": {}, "load_ms": {}}

    monkeypatch.setattr(Lab, "bench", slow)
    monkeypatch.setattr(report, "write", lambda *_: None)
    found = compiler.run(spec, tmp_path / "OUT").report["gate"]
    ((taken),) = found["rolled_back"]
    assert found["verdict"] == "passed" and len(taken["sites"]) == 1
    assert "left in float: 0.33 of the time" in taken["reasons"][taken["sites"][0]]


@pytest.mark.slow
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
    assert Rollback.from_json(content, spec.passes) == rollback
