"""Training in the graph gives back what passes took, survives being killed, and is kept in one piece."""

import importlib.util
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import effc
from effc import checkpoint, recipe
from effc.calib.data import Record
from effc.errors import CalibrationError, PreconditionError, TuneError
from effc.passes.quantize import Quantize
from effc.passes.tune import Tune
from effc.train import losses
from effc.train.graph import InGraph
from effc.train.loop import STATE, Schedule, fit
from effc.tuning import SORTED_BATCHES, _chosen, _shortened, _sizes
from kit import assert_letter, cli

FACTORY = """
import torch
from torch import nn

def other():
    return net(5)

def net(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)]
    class Net(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x)}
    return Net(*layers), {"x": torch.ones(2, 6)}
"""
HARM = '''
from dataclasses import dataclass
import torch
import effc
from effc.ir.edit import rebind

@effc.register
@dataclass(frozen=True, kw_only=True)
class Harm(effc.Pass):
    """Takes a third of the first layer away."""
    name = "harm"
    effect = "lossy"

    def rewrite(self, graph, stats):
        for name, tensor in graph.tensors().items():
            if tensor.dim() == 2:
                kept = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) > 0.3
                rebind(graph, name, tensor * kept, "harmed")
        return 1
'''


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


def harmed(program):
    """The program with noise on its weights."""
    from effc.ir.edit import rebind

    made = program.clone()
    draw = torch.Generator().manual_seed(3)
    for name, tensor in made.only().tensors().items():
        rebind(
            made.only(), name, tensor + 0.1 * torch.randn(tensor.shape, generator=draw), "harmed"
        )
    return made


def inputs(count=8, rows=32):
    draw = np.random.default_rng(0)
    return [{"input": draw.standard_normal((rows, 6)).astype(np.float32)} for _ in range(count)]


def test_what_a_pass_took_comes_back():
    program = effc.trace(net(), {"input": torch.ones(2, 6)})
    worse = harmed(program)
    record = effc.apply(Tune(steps=150, lr=1e-2), worse, train=effc.trainer(program, inputs()))
    curve = record.notes["main/curve"]
    assert record.sites == 4 and curve[-1]["step"] == 150
    assert min(p["held"] for p in curve) < 0.1 * curve[0]["held"]
    fresh = torch.randn(64, 6, generator=torch.Generator().manual_seed(9))
    (name,) = program.only().outputs
    gaps = [
        float((p.run(input=fresh)[name] - program.run(input=fresh)[name]).norm())
        for p in (worse, harmed(program))
    ]
    assert gaps[0] < 0.35 * gaps[1]


def test_the_model_that_was_traced_is_left_as_it_was():
    program = effc.trace(net(), {"input": torch.ones(2, 6)})
    before = {n: t.clone() for n, t in program.only().tensors().items()}
    worse = program.clone()
    effc.apply(
        Tune(steps=3, task="none", distill=1.0, lr=0.1),
        worse,
        train=effc.trainer(harmed(program), inputs(2)),
    )
    assert all(torch.equal(before[n], t) for n, t in program.only().tensors().items())
    assert not all(torch.equal(before[n], t) for n, t in worse.only().tensors().items())


def test_what_comes_out_is_never_worse_than_what_went_in():
    program = effc.trace(net(), {"input": torch.ones(2, 6)})
    made = program.clone()
    record = effc.apply(Tune(steps=20, lr=50.0), made, train=effc.trainer(program, inputs(3)))
    assert record.notes["main/curve"][0]["held"] == 0
    before = program.only().tensors()
    assert all(torch.equal(before[n], t) for n, t in made.only().tensors().items())


def test_products_of_bfloat16_train_tensors_of_float32():
    program = effc.trace(net(), {"input": torch.ones(2, 6)})
    found = {}
    for precision in ("f32", "bf16"):
        made = harmed(program)
        tune = Tune(steps=150, lr=0.01, precision=precision)
        record = effc.apply(tune, made, train=effc.trainer(program, inputs(6)))
        found[precision] = record.notes["main/curve"][-1]["held"]
        assert all(t.dtype == torch.float32 for t in made.only().tensors().values())
        first = record.notes["main/curve"][0]["held"]
    assert found["f32"] != found["bf16"] and found["bf16"] < 0.2 * first
    assert all(t.dtype == torch.float32 for t in made.run(input=torch.ones(2, 6)).values())


class Attentive(nn.Module):
    """Attention and nothing else."""

    def forward(self, query, key, value, bias):
        return nn.functional.scaled_dot_product_attention(query, key, value, bias)


def test_attention_is_of_float32_where_products_are_of_bfloat16():
    torch.manual_seed(0)
    feeds = {name: torch.randn(2, 2, 5, 4) for name in ("query", "key", "value")}
    feeds["bias"] = torch.randn(5, 5)
    graph = effc.trace(Attentive().eval(), feeds).only()
    wanted = graph.run(feeds)["output"]
    with torch.autocast("cpu", torch.bfloat16):
        assert graph.run(feeds)["output"].dtype == torch.bfloat16
        assert torch.equal(InGraph(graph, [])(feeds)["output"], wanted)
    assert torch.equal(InGraph(graph, [])(feeds)["output"], wanted)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patience": 2, "held": 0}, "waits for what held-out"),
        ({"rates": {"encoder.*": 0.1}}, "no tensor that is trained has a name like 'encoder"),
    ],
)
def test_what_would_say_nothing_is_refused(options, words):
    program = effc.trace(net(), {"input": torch.ones(2, 6)})
    rates = tuple(options.pop("rates", {}).items())
    with pytest.raises(PreconditionError, match=words) as caught:
        effc.apply(Tune(**options, rates=rates), program, train=effc.trainer(program, inputs(2)))
    assert caught.value.hint


def test_only_tensors_that_match_are_trained():
    program = effc.trace(net(), {"input": torch.ones(2, 6)})
    worse = harmed(program)
    before = worse.clone().only().tensors()
    record = effc.apply(
        Tune(steps=5, lr=0.01, tensors="2.*"), worse, train=effc.trainer(program, inputs(2))
    )
    changed = {n for n, t in worse.only().tensors().items() if not torch.equal(before[n], t)}
    assert record.sites == 2 and changed == {"2.weight", "2.bias"}
    assert worse.only().origins["2.weight"].transforms[-1] == "tuned"


def test_a_shared_tensor_is_trained_once():
    from graphs import Tied

    program = effc.trace(Tied(), {"ids": torch.zeros(2, 3, dtype=torch.int64)})
    graph = program.only()
    module = InGraph(graph, list(graph.tensors()))
    assert len(module.weights) == 1 and len(module.places) == 2
    found = module.tensors()
    assert len({t.data_ptr() for t in found.values()}) == 1


def test_nobody_trains_unasked():
    program = effc.trace(net(), {"input": torch.ones(2, 6)})
    with pytest.raises(PreconditionError, match="nobody has said on what"):
        effc.apply(Tune(), program)
    with pytest.raises(PreconditionError, match="nothing to train towards"):
        effc.apply(Tune(distill=0), program, train=effc.trainer(program, inputs(2)))
    effc.apply(Quantize(activation_bits=16), program)
    with pytest.raises(PreconditionError, match="on integers already"):
        effc.apply(Tune(), program, train=effc.trainer(program, inputs(2)))


def test_a_loss_that_is_no_number_is_said():
    program = effc.trace(net(), {"input": torch.ones(2, 6)})
    bad = [{"input": np.full((4, 6), np.nan, np.float32)}]
    with pytest.raises(TuneError, match="loss is nan at step 0"):
        effc.apply(Tune(steps=2), harmed(program), train=effc.trainer(program, bad))
    with pytest.raises(TuneError, match="nothing to train on"):
        effc.apply(Tune(steps=2), harmed(program), train=effc.trainer(program, []))
    with pytest.raises(TuneError, match="nothing to train"):
        effc.apply(
            Tune(steps=2, tensors="none.*"), harmed(program), train=effc.trainer(program, inputs(2))
        )


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path, monkeypatch):
    from effc.train import loop

    monkeypatch.setattr(loop, "SAVE_S", 0.0)
    data = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    schedule = Schedule(steps=12, lr=0.05, check_every=4, weight_decay=0.01)

    def loss(module, x):
        return (module(x) - 1).square().mean() + 0.1 * module(
            nn.functional.dropout(x, 0.5)
        ).square().mean()

    def run(folder, die_at=None):
        module = net(1)

        def progress(done, of):
            if done == die_at:
                raise KeyboardInterrupt

        try:
            made = fit(
                module,
                loss,
                lambda s: data[s % 4],
                schedule,
                held=data[4:],
                folder=folder,
                progress=progress,
            )
        except KeyboardInterrupt:
            return None, None
        return made, [p.detach().clone() for p in module.parameters()]

    whole, expected = run(tmp_path / "a")
    assert run(tmp_path / "b", die_at=7) == (None, None)
    assert json.loads((tmp_path / "b" / STATE).read_text())["step"] == 6
    again, found = run(tmp_path / "b")
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
    assert [(p.step, p.loss, p.held) for p in again.points] == [
        (p.step, p.loss, p.held) for p in whole.points
    ]
    run(tmp_path / "c", die_at=7)
    (tmp_path / "c" / STATE).write_text("{")  # what was damaged is made anew
    again, found = run(tmp_path / "c")
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def test_the_rate_rises_and_falls():
    schedule = Schedule(steps=100, lr=1.0, warmup=0.1)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and rates[-1] < 0.01


def test_a_gradient_is_shortened_to_what_the_recipe_says():
    program = effc.trace(net(), {"input": torch.ones(2, 6)})
    moved = []
    for clip in (1.0, 1e-12):  # far below what AdamW adds to the root of a gradient's square
        made = harmed(program)
        before = made.only().tensors()
        effc.apply(
            Tune(steps=3, lr=1e-2, held=0, clip=clip), made, train=effc.trainer(program, inputs())
        )
        after = made.only().tensors()
        moved.append(max(float((after[n] - t).abs().max()) for n, t in before.items()))
    assert moved[0] > 1e-3 and moved[1] < 1e-5


def test_every_epoch_sees_all_samples_once():
    pass_ = Tune(batch=4)
    seen = [i for step in range(5) for i in _chosen(10, pass_, step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_samples_of_about_one_length_go_together_and_all_are_seen_once():
    pass_, sizes = Tune(batch=4), np.random.default_rng(0).integers(5, 40, 4 * SORTED_BATCHES)
    seen = [_chosen(len(sizes), pass_, number, sizes) for number in range(2 * SORTED_BATCHES)]
    for epoch in (seen[:SORTED_BATCHES], seen[SORTED_BATCHES:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(len(sizes)))
    wide = np.mean([np.ptp(sizes[batch]) for batch in seen])
    plain = [_chosen(len(sizes), pass_, number) for number in range(SORTED_BATCHES)]
    assert wide < 0.25 * np.mean([np.ptp(sizes[batch]) for batch in plain])
    longest = [sizes[batch].max() for batch in seen[:SORTED_BATCHES]]
    assert longest != sorted(longest)  # short ones do not always come first
    assert _chosen(3, pass_, 7, sizes[:3]) == _chosen(3, pass_, 7, sizes[:3])  # fewer than a batch


def test_what_has_no_length_is_refused():
    assert _sizes([Record(text="ab", text_pair="c"), Record(text="abcd")]).tolist() == [3, 4]
    mask = {"attention_mask": np.array([1, 1, 0])}
    assert _sizes([Record(arrays=mask)]).tolist() == [2]
    with pytest.raises(TuneError, match="have no length"):
        _sizes([Record(pixels=np.zeros((2, 2), np.uint8))])


def test_a_step_of_several_batches_is_that_of_one_large_batch():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 6, generator=draw), torch.randn(48, 4, generator=draw)

    def loss(module, rows):
        return (module(x[rows]) - y[rows]).square().mean()

    ends = []
    for parts, rows in ((1, 12), (3, 4)):
        module = net()
        schedule = Schedule(steps=4, lr=1e-2)
        run = fit(
            module, loss, lambda n, rows=rows: slice(n * rows, (n + 1) * rows), schedule, accumulate=parts
        )  # fmt: skip
        ends.append((module.state_dict(), run.points[-1].loss))
    (whole, of_whole), (apart, of_apart) = ends
    assert of_whole == pytest.approx(of_apart, rel=1e-5)
    for name, tensor in net().state_dict().items():
        assert float((whole[name] - tensor).abs().max()) > 1e-3
        assert float((whole[name] - apart[name]).abs().max()) < 1e-6


def test_positions_that_no_row_has_are_not_computed():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask[..., None].float()
            return {"logits": self.head((self.words(input_ids) * mask).sum(1) / mask.sum(1))}

    ids = torch.ones(2, 6, dtype=torch.int64)
    given = {"input_ids": ids, "attention_mask": ids}
    free = {name: {0: "batch", 1: "sequence"} for name in given}
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
    feeds = {"input_ids": torch.arange(14).reshape(2, 7) % 9, "attention_mask": mask}
    graph = effc.trace(Reader(), given, dims=free).only()
    short = _shortened(graph, feeds)
    assert {tuple(t.shape) for t in short.values()} == {(2, 3)}
    assert torch.equal(graph.run(short)["logits"], graph.run(feeds)["logits"])
    fixed = effc.trace(Reader(), given, dims={n: {0: "batch"} for n in given}).only()
    assert _shortened(fixed, given) == given
    empty = {**feeds, "attention_mask": 0 * mask}
    assert _shortened(graph, empty)["input_ids"].shape == (2, 2)


def test_distillation_is_the_divergence_of_what_both_say():
    draw = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn(5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    t = 2.0
    p, q = (torch.softmax(v / t, -1) for v in (theirs, mine))
    expected = t * t * float((p * (p.log() - q.log())).sum(-1).mean())
    found = losses.distillation({"logits": mine}, {"logits": theirs}, temperature=t)
    assert float(found) == pytest.approx(expected)
    assert float(losses.distillation({"logits": mine}, {"logits": mine})) == pytest.approx(
        0, abs=1e-12
    )


def test_an_answer_is_the_last_token_that_counts_behind_those_before_it():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, generator=draw, dtype=torch.float64)
    ids = torch.tensor([[1, 2, 3, 4], [5, 4, 0, 0], [2, 2, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    said = [(logits[0, 2], 4), (logits[1, 0], 4), (logits[2, 1], 1)]
    expected = sum(float(torch.logsumexp(row, 0) - row[k]) for row, k in said) / 3
    assert float(losses.answer({"logits": logits}, ids, mask)) == pytest.approx(expected)
    elsewhere = logits.clone()
    elsewhere[:, 3] = elsewhere[1, 1:] = 9.0  # positions that no answer is read from
    assert float(losses.answer({"logits": elsewhere}, ids, mask)) == pytest.approx(expected)
    with pytest.raises(TuneError, match="no answer behind a question"):
        losses.answer({"logits": logits}, ids, torch.tensor([[1, 0, 0, 0]] * 3))
    with pytest.raises(TuneError, match="a language model"):
        losses.answer({"logits": logits[:, 0]}, ids, mask)


def test_padding_counts_for_nothing():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x, y = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    y[0, 2] = 100
    for name in ("logits", "hidden"):
        assert float(losses.distillation({name: y}, {name: x}, mask)) == pytest.approx(0)
    ids = torch.tensor([[1, 2, 0], [3, 0, 0]])
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 2] = 50.0  # the one token that comes next
    assert float(losses.tokens({"logits": logits}, ids, mask)) == pytest.approx(0)


def test_losses_refuse_what_they_are_not_for():
    with pytest.raises(TuneError, match="no output left"):
        losses.distillation({"a": torch.ones(2, 3)}, {"a": torch.ones(2, 4)})
    with pytest.raises(TuneError, match="labels are for"):
        losses.labels({"hidden": torch.ones(2, 3)}, torch.tensor([0, 1]))
    with pytest.raises(TuneError, match="a label is 7"):
        losses.labels({"logits": torch.ones(2, 3)}, torch.tensor([0, 7]))
    with pytest.raises(TuneError, match="tokens are for"):
        losses.tokens({"logits": torch.ones(2, 3)}, torch.ones(2, 5, dtype=torch.int64))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A pass of one's own, which a process takes from one file alone."""
    file = tmp_path_factory.mktemp("plugin") / "harm.py"
    file.write_text(HARM)
    return file


@pytest.fixture
def place(tmp_path, monkeypatch, plugin):
    """A factory, labelled data, and a recipe that harms, trains and quantises."""
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.py").write_text(FACTORY)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((200, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, label=draw.integers(0, 4, 200))
    (tmp_path / "r.yaml").write_text(yaml.dump({
        "source": {"python": f"{tmp_path / 'model.py'}:net"}, "plugins": [str(plugin)],
        "calib": {"file": str(tmp_path / "data.npz"), "samples": 64},
        "passes": [
            {"pass": "harm"},
            {"pass": "tune", "steps": 40, "lr": 0.01, "samples": 128, "held": 32, "batch": 32},
            {"pass": "quantize"},
        ],
        "bench": False, "gate": False,
    }))  # fmt: skip
    return tmp_path


def drift(out):
    report = json.loads((out / "report.json").read_text())
    return report["verify"]["ort"]["held out"]["logits"]["rel_l2"], report


@pytest.mark.slow
def test_harm_train_quantise_in_one_recipe(place):
    ran = cli("compile", place / "r.yaml", "-o", place / "out")
    assert ran.code == 0, ran.err
    assert "held-out loss" in ran.out and "Training" in (place / "out" / "report.html").read_text()
    without = cli("compile", place / "r.yaml", "-o", place / "harmed", "--set", "passes.1.steps=1")
    assert without.code == 0
    assert drift(place / "out")[0] < 0.7 * drift(place / "harmed")[0]


@pytest.mark.slow
def test_a_checkpoint_takes_the_place_of_training(place):
    ran = cli("tune", place / "r.yaml", "-o", place / "ck", "--json", place / "tune.json")
    assert ran.code == 0 and "held-out loss" in ran.out, ran.err
    assert set(json.loads((place / "tune.json").read_text())["curves"]) == {"1.main"}
    again = cli("tune", place / "r.yaml", "-o", place / "ck")
    assert again.code == 0
    shutil.rmtree(place / "cache")
    ran = cli("compile", place / "r.yaml", "-o", place / "one", "--tuned", place / "ck")
    assert ran.code == 0, ran.err
    ran = cli("compile", place / "r.yaml", "-o", place / "two", "--tuned", place / "ck")
    assert ran.code == 0
    engines = [
        json.loads((place / n / "manifest.json").read_text())["engines"][0]["sha256"]
        for n in ("one", "two")
    ]
    assert engines[0] == engines[1]
    assert drift(place / "one")[1]["passes"][-2]["notes"]["main/curve"]


@pytest.mark.slow
def test_a_checkpoint_of_something_else_is_refused(place):
    assert cli("tune", place / "r.yaml", "-o", place / "ck").code == 0
    words = ("--tuned", place / "ck", "-o", place / "out")
    ran = cli("compile", place / "r.yaml", *words, "--set", "passes.1.steps=41")
    assert_letter(ran, "TuneError", 13, "trained by other passes")
    ran = cli(
        "compile", place / "r.yaml", *words, "--set", f"source.python={place / 'model.py'}:other"
    )
    assert_letter(ran, "TuneError", 13, "another model")
    file = place / "ck" / "1.main.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    ran = cli("compile", place / "r.yaml", *words)
    assert_letter(ran, "TuneError", 13, "not what it was written as")
    ran = cli("compile", place / "r.yaml", "-o", place / "out", "--tuned", place)
    assert_letter(ran, "TuneError", 13, "is no checkpoint")
    ran = cli("tune", place / "r.yaml", "-o", place)
    assert_letter(ran, "TuneError", 13, "something else")
    ran = cli("tune", place / "r.yaml", "-o", place / "ck2", "--set", "passes=[{pass: quantize}]")
    assert_letter(ran, "RecipeError", 3, "trains nothing")
    assert not (place / "out").exists() and not (place / "ck2").exists()


@pytest.mark.slow
def test_labels_may_be_what_is_trained_towards(place):
    words = (
        "--set",
        "passes.1.task=labels",
        "--set",
        "passes.1.distill=0",
        "--set",
        "passes.1.steps=60",
    )
    ran = cli("tune", place / "r.yaml", "-o", place / "ck", *words, "--json", place / "t.json")
    assert ran.code == 0, ran.err
    curve = json.loads((place / "t.json").read_text())["curves"]["1.main"]
    assert (
        curve[-1]["loss"] < curve[1]["loss"]
    )  # random labels: learnt by heart, and held-out ones not
    np.savez(place / "data.npz", x=np.ones((20, 6), np.float32))
    ran = cli("tune", place / "r.yaml", "-o", place / "ck2", *words)
    assert_letter(ran, "CalibrationError", 7, "without a label")


@pytest.mark.slow
def test_recorded_decisions_hold_what_training_made(place):
    assert cli("compile", place / "r.yaml", "-o", place / "out").code == 0
    decisions = json.loads((place / "out" / "decisions.json").read_text())
    ran = cli(
        "compile",
        place / "r.yaml",
        "-o",
        place / "again",
        "--decisions",
        place / "out" / "decisions.json",
    )
    assert ran.code == 0, ran.err
    decisions["1:tune"]["main/tensors"] = "0" * 64
    made = recipe.read(place / "r.yaml")
    with pytest.raises(CalibrationError, match="comes out differently"):
        effc.compile(made, place / "other", decisions=decisions)


def test_steps_name_no_folder_of_this_machine():
    (step,) = checkpoint.steps_of([Tune(file="/somewhere/data.npz")])
    assert step["file"] == "data.npz" and step["pass"] == "tune"


@pytest.mark.slow
def test_a_plan_tries_two_steps(place):
    ran = cli("compile", place / "r.yaml", "-o", place / "out", "--plan")
    assert ran.code == 0 and "tune" in ran.out, ran.err
    assert not (place / "out").exists() and not (place / "cache" / "train").exists()


@pytest.mark.slow
def test_prune_train_quantise_for_every_target_in_one_recipe(place):
    targets = ["ort", "openvino", "onnx"]
    targets += ["tensorrt"] if importlib.util.find_spec("tensorrt_rtx_bindings") else []
    words = (
        "--set", "passes.0={pass: prune-dims, ratio: 0.25, importance: taylor}",
        "--set", f"targets=[{', '.join(targets)}]", "--set", "plugins=[]",
    )  # fmt: skip
    ran = cli("tune", place / "r.yaml", "-o", place / "ck", *words)
    assert ran.code == 0, ran.err
    ran = cli("compile", place / "r.yaml", "-o", place / "out", *words, "--tuned", place / "ck")
    assert ran.code == 0, ran.err
    report = json.loads((place / "out" / "report.json").read_text())
    pruned = [p["sites"] for p in report["passes"] if p["name"] == "prune-dims"]
    assert pruned == [1] * len(targets)
    for target in targets:
        assert (place / "out" / target / "model.onnx").is_file()
    assert all(
        layer["site"] for target in ("ort", "openvino") for layer in report["layers"][target]
    )
    model = ("--model", f"{place / 'model.py'}:net")
    ran = cli("explain", place / "out", *model)
    assert_letter(ran, "UsageError", 2, "--tuned CKPT")
    ran = cli(
        "explain", place / "out", *model, "--tuned", place / "ck", "--calib", place / "data.npz"
    )
    assert ran.code == 0, ran.err
    assert "a node is off" not in ran.out and "prune-dims" in ran.out


@pytest.mark.slow
def test_a_directory_of_somebody_is_no_checkpoint(place):
    mine = place / "mine"
    mine.mkdir()
    (mine / "tune.json").write_text("{}")
    (mine / "notes.txt").write_text("mine")
    ran = cli("tune", place / "r.yaml", "-o", mine)
    assert_letter(ran, "TuneError", 13, "something else than a checkpoint")
    assert cli("tune", place / "r.yaml", "-o", place / "ck").code == 0
    (place / "ck" / "notes.txt").write_text("mine")
    ran = cli("tune", place / "r.yaml", "-o", place / "ck")
    assert_letter(ran, "TuneError", 13, "something else than a checkpoint")
    assert (mine / "notes.txt").read_text() == (place / "ck" / "notes.txt").read_text() == "mine"


def test_a_training_is_known_by_all_that_it_is_made_of(tmp_path):
    from effc.cache import Cache
    from effc.recipe import CalibSpec
    from effc.source import Source
    from effc.tuning import Tuner

    program = effc.trace(net(), {"input": torch.ones(2, 6)})
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    source = Source(modules={"main": net()}, inputs={"main": {"input": torch.ones(2, 6)}})

    def key(spec, **options):
        tuner = Tuner(source=source, teacher=program.only(), calib=spec, cache=Cache(None))
        pass_ = Tune(**options)
        return tuner._key(pass_, program.only()), tuner._is_known(pass_)

    file = str(tmp_path / "t.csv")
    keys = [
        key(CalibSpec(file=f"{file}#a")),
        key(CalibSpec(file=f"{file}#b")),
        key(CalibSpec(file=f"{file}#a"), seed=1),
    ]
    assert len({k for k, _ in keys}) == 3 and all(known for _, known in keys)
    assert not key(CalibSpec(callable="m.py:f"))[1]


def test_a_save_that_fails_costs_no_training(tmp_path, monkeypatch):
    from effc.train import loop

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "SAVE_S", 0.0)
    monkeypatch.setattr(loop, "save_file", full)
    data = torch.randn(8, 6)
    made = fit(
        net(),
        lambda module, x: module(x).square().mean(),
        lambda step: data,
        Schedule(steps=4, lr=0.01),
        held=[data],
        folder=tmp_path / "state",
    )
    assert made.step == 4
