"""A task from files to an answer: its source, its training, its metric, its packages, and what is wrong with them."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from effc import checkpoint, compiler, metrics, package, recipe, solving
from effc.errors import CalibrationError, RecipeError, SourceError, TuneError, UsageError
from effc.samples import Samples
from effc.source import from_checkpoint, from_encoder, guess, load
from effc.train.loop import Schedule, fit
from effc.zoo import dialogue_files as files
from effc.zoo import dialogue_view as view
from effc.zoo.dialogue import loss
from effc.zoo.dialogue_files import Quad, Span, Truth
from effc.zoo.dialogue_task import Dialogues, Settings
from kit import assert_letter, cli, save_encoder, solved

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "diaasq"
RECIPE = EXAMPLE / "recipe.yaml"
SMALL = [
    "source.options={inner: 8}", "bench=false", "targets=[ort]", "calib.samples=8",
    "passes.0.samples=24", "passes.0.held=8", "passes.0.steps=6", "passes.0.every=3",
    "passes.0.lr=0.01", "passes.0.precision=f32",
]  # fmt: skip
SETS = [word for change in SMALL for word in ("--set", change)]


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("diaasq_made", EXAMPLE / "made.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(made, tmp_path_factory):
    """Files of dialogues and an encoder; a checkpoint beside them."""
    root = tmp_path_factory.mktemp("task")
    made.write(root / "train.json", 32, 0)
    made.write(root / "valid.json", 8, 1)
    made.encoder(root / "encoder", 16)
    ran = cli(
        "tune", RECIPE, "--data", root, "--encoder", root / "encoder", "-o", root / "checkpoint", *SETS
    )  # fmt: skip
    assert ran.code == 0 and "held-out score" in ran.out, ran.err
    return root


def asked(root, *changes):
    overrides = [f"source.encoder={root / 'encoder'}", *SMALL, *changes]
    return recipe.read(RECIPE, overrides, data_place=root)


def test_a_checkpoint_of_a_task_is_a_source_and_its_model_is_the_one_that_was_trained(place):
    word = str(place / "checkpoint")
    assert guess(word) == {"task": "diaasq", "checkpoint": word}
    trained, untrained = load(guess(word)), from_encoder(place / "encoder", "diaasq", {"inner": 8})
    assert trained.kind == "task:diaasq"
    held = checkpoint.read(place / "checkpoint", untrained, asked(place).passes)
    tensors, curve = held.tensors(0, "main")
    state, before = trained.module.state_dict(), untrained.module.state_dict()
    assert set(tensors) <= set(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert any(not torch.equal(state[name], before[name]) for name in tensors)
    assert [point["step"] for point in curve] == [0, 3, 6]
    assert all(0 <= point["score"] <= 1 for point in curve)


def test_what_is_drawn_hangs_on_the_seed_and_decides_the_digest(place):
    a, b, c = (from_encoder(place / "encoder", "diaasq", {"seed": seed}) for seed in (0, 0, 1))
    assert a.digest == b.digest != c.digest
    name = "grids.entity.project.weight"
    first = a.module.state_dict()[name]
    assert torch.equal(first, b.module.state_dict()[name])
    assert not torch.equal(first, c.module.state_dict()[name])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inner": 7}, "inner"),
        ({"innner": 8}, "innner"),
        ({"relation_weight": 0}, "relation_weight"),
    ],
)
def test_settings_that_are_none_are_named(place, settings, words):
    with pytest.raises(SourceError, match=words) as caught:
        from_encoder(place / "encoder", "diaasq", settings)
    assert caught.value.hint


def test_an_encoder_is_no_checkpoint_and_a_checkpoint_no_encoder(place):
    with pytest.raises(SourceError, match="is of no task"):
        from_checkpoint(place / "encoder", "diaasq")
    with pytest.raises(SourceError, match="already, not an encoder"):
        from_encoder(place / "checkpoint", "diaasq", {})


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"\x08\x00\x00\x00", "does not load"),
        ("model.safetensors", None, "no weights"),
        ("config.json", b'{"effc_source": {"task": "other"}}', "unknown task"),
        ("config.json", b'{"effc_source": 3}', "names no task"),
        ("config.json", b'{"effc_source": {"task": "diaasq", "labels": {}}}', "labels"),
        (
            "config.json",
            b'{"effc_source": {"task": "diaasq", "decoder": {"most_mentions": "x"}}}',
            "mentions",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(place, tmp_path, file, content, words):
    copy = tmp_path / "checkpoint"
    shutil.copytree(place / "checkpoint", copy)
    if content is None:
        for weights in copy.glob("*.safetensors"):
            weights.unlink()
    else:
        (copy / file).write_bytes(content)
    with pytest.raises(SourceError, match=words) as caught:
        load({"task": "diaasq", "checkpoint": str(copy)})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{task: diaasq}", "one of the two"),
        ("{task: diaasq, encoder: A, checkpoint: B}", "one of the two"),
        ("{transformers: A, encoder: B}", "is of a task"),
        ("{task: diasq, encoder: B}", "did you mean 'diaasq'"),
        ("{task: diaasq, checkpoint: B, options: {inner: 8}}", "options"),
    ],
)
def test_a_recipe_says_of_a_task_what_it_is_made_of(source, words):
    with pytest.raises(RecipeError, match=words):
        recipe.parse(f"source: {source}")


def test_files_are_looked_for_where_the_data_are(place):
    made = asked(place)
    assert made.calib.file == str(place / "train.json")
    assert made.metric == f"diaasq:{place / 'valid.json'}"
    assert str(place) not in made.portable()


def test_a_recipe_that_trains_a_task_is_compiled_from_its_checkpoint_alone(place):
    with pytest.raises(RecipeError, match="held against a trained one"):
        compiler.settled(asked(place), None)
    with pytest.raises(TuneError, match="other passes"):
        compiler.settled(asked(place, "passes.0.steps=7"), place / "checkpoint")
    rest, tuned = compiler.settled(asked(place), place / "checkpoint")
    assert tuned is None and rest.source.checkpoint == str(place / "checkpoint")
    assert [pass_.name for pass_ in rest.passes] == ["smooth", "quantize"]


def test_a_checkpoint_of_other_settings_or_another_encoder_is_refused(place, tmp_path):
    with pytest.raises(TuneError, match="another model"):
        compiler.settled(asked(place, "source.options.views=false"), place / "checkpoint")
    gone = f"source.encoder={tmp_path / 'gone'}"  # a checkpoint is compiled without it
    compiler.settled(asked(place, gone), place / "checkpoint")
    with pytest.raises(TuneError, match="views: True, and the recipe asks for False") as caught:
        compiler.settled(asked(place, gone, "source.options.views=false"), place / "checkpoint")
    assert caught.value.hint


def test_weights_that_were_exchanged_behind_the_training_are_refused(place, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(place / "checkpoint", copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(TuneError, match="not what it was written as"):
        compiler.settled(asked(place), copy)


def test_what_would_be_lost_in_front_of_the_training_of_a_task_is_refused(place, tmp_path):
    data = yaml.safe_load(asked(place).text)
    data["passes"].insert(0, {"pass": "prune-dims", "ratio": 0.25})
    with pytest.raises(RecipeError, match="prune-dims stands in front") as caught:
        compiler.tune(recipe.build(data), tmp_path / "out")
    assert caught.value.hint and not (tmp_path / "out").exists()


def test_calibration_samples_and_made_up_shapes_are_inputs_of_the_model(place):
    source = load(guess(str(place / "checkpoint")))
    spec = recipe.CalibSpec(file=str(place / "train.json"), samples=6, batch=4)
    samples = Samples(source, spec)
    assert [len(batch.inputs["gather"]) for batch in samples("main")] == [4, 2]
    for batch, length in ((1, 4), (3, 41), (2, 128)):
        feeds = samples.shaped(batch, length)
        assert samples.shape_of(feeds) == (batch, length)
        with torch.no_grad():
            made = source.module(**{n: torch.from_numpy(v) for n, v in feeds.items()})
        assert made["polarity"].shape == (batch, length, length, 4)
    assert samples.key() != Samples(from_encoder(place / "encoder", "diaasq", {}), spec).key()


def test_the_loss_weighs_the_classes_of_each_table():
    """Against loops in float64: every cell that counts has the weight of its class, and the sum is over weights."""
    torch.manual_seed(0)
    sizes = {"entity": 4, "relation": 2, "polarity": 4}
    shape = (2, 3, 3)
    wanted = {
        name: torch.randint(0, count, (*shape, 2) if name == "relation" else shape)
        for name, count in sizes.items()
    }
    wanted["entity"][0, 1] = -100
    outputs = {name: torch.randn(*shape, 4) for name in sizes}
    weights = {"entity": 2.0, "relation": 7.0, "polarity": 0.5}

    def expected(weights):
        total = 0.0
        for name, count in sizes.items():
            tags = wanted[name].reshape(-1).tolist()
            rows = outputs[name].double().reshape(-1, count).log_softmax(-1).tolist()
            scale = [1.0] + [weights[name]] * (count - 1)
            seen = [(tag, row) for tag, row in zip(tags, rows, strict=True) if tag != -100]
            total -= sum(scale[t] * row[t] for t, row in seen) / sum(scale[t] for t, _ in seen)
        return total

    found = float(loss(outputs, wanted, weights))
    assert found == pytest.approx(expected(weights), rel=1e-5)
    for name in weights:  # and a wrong weight of any table is seen
        assert abs(found - expected({**weights, name: weights[name] * 1.1})) > 1e-3
    assert Settings().weights == {"entity": 1.0, "relation": 5.0, "polarity": 3.0}


class Line(torch.nn.Module):
    """One number that is trained towards 1."""

    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(1))

    def forward(self, feeds):
        return {"y": self.x * feeds}


def far(module, feeds):
    return (module(feeds)["y"] - 1).square().mean()


def test_a_score_judges_and_training_ends_when_it_gets_no_better():
    """The score is the best at a third of the way, while the loss goes on falling."""
    module = Line()
    run = fit(
        module, far, lambda step: torch.ones(1), Schedule(steps=100, lr=0.05, check_every=4, patience=3),
        held=[torch.ones(1)], score=lambda line: -abs(float(line(torch.ones(1))["y"]) - 0.3),
    )  # fmt: skip
    scores = {point.step: point.score for point in run.points}
    assert run.best == max(scores, key=scores.get)
    assert run.step == run.best + 3 * 4 < 100
    assert module.x.item() == pytest.approx(0.3, abs=0.1)
    held = [point.held for point in run.points]
    assert held == sorted(held, reverse=True)


def test_between_equal_scores_the_loss_judges():
    run = fit(
        Line(), far, lambda step: torch.ones(1), Schedule(steps=8, lr=0.05, check_every=4, patience=1),
        held=[torch.ones(1)], score=lambda line: 0.0,
    )  # fmt: skip
    assert run.best == run.step == 8


def test_a_judged_training_that_is_killed_is_the_one_that_was_not(tmp_path, monkeypatch):
    schedule = Schedule(steps=60, lr=0.05, check_every=4, patience=3)

    def trained(folder, stop=None):
        def batch(step):
            if step == stop:
                raise KeyboardInterrupt
            return torch.ones(1)

        module = Line()
        run = fit(
            module, far, batch, schedule, held=[torch.ones(1)], folder=folder,
            score=lambda line: -abs(float(line(torch.ones(1))["y"]) - 0.3),
        )  # fmt: skip
        return [(p.step, p.score) for p in run.points], module.x.item()

    monkeypatch.setattr("effc.train.loop.SAVE_S", 0.0)
    whole = trained(None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "state", stop=10)
    assert trained(tmp_path / "state") == whole


def test_parameters_have_shares_of_the_rate():
    module = torch.nn.ModuleDict({"a": Line(), "b": Line()})

    def both(module, feeds):
        return far(module["a"], feeds) + far(module["b"], feeds)

    fit(
        module, both, lambda step: torch.ones(1), Schedule(steps=3, lr=0.01, warmup=0.0),
        shares=[1.0, 0.1],
    )  # fmt: skip
    assert module["a"].x.item() == pytest.approx(10 * module["b"].x.item(), rel=1e-3)


def test_dropout_is_there_while_training_and_gone_when_judged():
    import effc
    from effc.train.graph import InGraph

    graph = effc.trace(torch.nn.Linear(64, 1, bias=False), {"input": torch.ones(2, 64)}).only()
    module = InGraph(graph, list(graph.tensors()), 0.5)
    feeds = {"input": torch.ones(2, 64)}
    name = graph.outputs[0]
    assert not torch.equal(module(feeds)[name], module(feeds)[name])
    with torch.no_grad():
        assert torch.equal(module(feeds)[name], graph.run(feeds)[name])


def test_the_metric_counts_dialogues_and_has_an_interval_for_every_part(place):
    source = load(guess(str(place / "checkpoint")))
    metric = metrics.parse(f"diaasq:{place / 'valid.json'}")
    metric.check(source)
    task = source.processor
    items = task.read(metric.file)

    def samples(said):
        return metrics.Samples(task.tally(items, said))

    right = samples([item.dialogue.truth for item in items])
    half = samples([item.dialogue.truth if i % 2 else Truth() for i, item in enumerate(items)])
    assert metric.value(right) == 1.0
    found = metrics.compare(metric, right, half)
    assert found.verdict == "worse" and found.low < found.engine - 1 < found.high < 0
    assert set(found.parts) == {"identified", "intra", "inter"}
    part = found.parts["inter"]
    assert part["reference"] == 1.0 and part["low"] <= part["engine"] - 1 <= part["high"]
    turned = [
        Truth(quads=frozenset(q._replace(polarity="other" if q.polarity != "other" else "pos")
                              for q in item.dialogue.truth.quads)) for item in items
    ]  # fmt: skip
    other = metrics.compare(metric, right, samples(turned))
    assert other.engine == 0 and other.parts["identified"]["engine"] == 1.0


def test_the_metric_is_for_its_task_alone(place, tmp_path):
    encoder = save_encoder(tmp_path / "plain")
    metric = metrics.parse(f"diaasq:{place / 'valid.json'}")
    with pytest.raises(CalibrationError, match="models of the task diaasq") as caught:
        metric.check(load({"transformers": str(encoder)}))
    assert caught.value.hint


@pytest.fixture(scope="module")
def out(place):
    """A package of int8, whose gate asked the task's score."""
    ran = cli(
        "compile", RECIPE, "--data", place, "--tuned", place / "checkpoint", "-o", place / "out",
        "--threads", 1, *SETS,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return place / "out"


@pytest.mark.slow
def test_a_package_has_what_the_task_needs_and_was_asked_its_score(place, out):
    assert package.read(out).kind == "task:diaasq"
    own = json.loads((out / "config.json").read_text(encoding="utf-8"))["effc_source"]
    assert own["labels"]["polarity"] == ["none", "pos", "neg", "other"]
    assert own["decoder"] == {"most_mentions": 192} and own["settings"]["inner"] == 8
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert any(check["name"] == "metric diaasq" for check in report["gate"]["checks"])
    assert set(report["metric"]["parts"]) == {"identified", "intra", "inter"}
    assert "inter" in (out / "report.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_engine_answers_as_torch_does_and_scores_what_is_known(place, out):
    found = solving.solve(out, place / "valid.json", "diaasq", threads=1)
    assert len(found.answers) == 8 and 0 <= found.to_json()["scores"]["quads"]["f1"] <= 1
    bare = [
        {k: v for k, v in d.items() if k in ("sentences", "replies", "speakers")}
        for d in json.loads((place / "valid.json").read_text(encoding="utf-8"))
    ]
    file = place / "bare.json"
    file.write_text(json.dumps(bare), encoding="utf-8")
    unknown = solving.solve(out, file, "diaasq", threads=1)
    assert unknown.to_json()["scores"] is None
    assert [a["quads"] for a in unknown.answers] == [a["quads"] for a in found.answers]


@pytest.mark.slow
def test_a_task_runs_without_torch_and_writes_its_page(place, out, tmp_path):
    ran = solved(out, "diaasq", place / "valid.json", tmp_path)
    assert ran.code == 0, ran.err
    assert "dialogue 1-0" in ran.out and "F1" in ran.err
    assert len(json.loads((tmp_path / "found.json").read_text())["answers"]) == 8
    assert "<h2>Dialogue 1-0</h2>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_package_of_another_kind_or_task_is_refused(place, out):
    with pytest.raises(UsageError, match="unknown task"):
        solving.solve(out, place / "valid.json", "diasq")


def test_a_task_and_its_file_go_together(tmp_path):
    assert_letter(cli("run", tmp_path, "--task", "diaasq"), "UsageError", 2, "--file")


HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def hostile(tmp_path):
    file = tmp_path / "d.json"
    sentences = [f"{HOSTILE} phone \x1b[31m", "the & bad"]
    value = [{"doc_id": '"><b>', "sentences": sentences, "replies": [-1, 0], "speakers": [0, 1]}]
    file.write_text(json.dumps(value), encoding="utf-8")
    (dialogue,) = files.read(file, labelled=False)
    said = Truth(
        targets=frozenset({Span(0, 1)}),
        quads=frozenset({Quad(Span(0, 1), Span(1, 2), Span(4, 5), "neg")}),
    )
    return dialogue, view.answer(dialogue, said)


def test_a_page_shows_words_of_strangers_and_runs_none(hostile):
    page = view.page([hostile[0]], [hostile[1]])
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>" not in page
    assert "\x1b" not in page and "http" not in page
    for kind in (
        "target",
        "aspect",
        "opinion",
    ):  # a link from every span to its quadruple, and back
        assert f'id="m0-1-{kind}"' in page
    assert page.count('href="#q0-1"') == 3 and 'id="q0-1"' in page and 'href="#m0-1-target"' in page


def test_a_terminal_gets_no_commands_but_our_colours(hostile):
    plain = "\n".join(view.lines(*hostile, in_colour=False))
    assert "\x1b" not in plain and "| neg" in plain
    coloured = "\n".join(view.lines(*hostile, in_colour=True))
    assert "\x1b[36m<script>" in coloured and "\x1b[31m" not in coloured


def test_made_up_dialogues_have_quads_inside_and_between_utterances(made, place):
    found = files.read(place / "train.json")
    far = np.array([d.distance(q[:3]) for d in found for q in d.truth.quads])
    assert 0.2 < (far > 0).mean() < 0.8


class Products(torch.nn.Module):
    """A linear layer in another hand: products with parameters, one of them scaled, and with a matrix that is fixed."""

    def __init__(self, layer):
        super().__init__()
        size = layer.in_features
        self.weight = torch.nn.Parameter(layer.weight.detach().t().clone())
        self.scale = torch.nn.Parameter(torch.ones(layer.out_features))
        self.bias = torch.nn.Parameter(layer.bias.detach().clone())
        self.between = torch.nn.Parameter(torch.eye(size))
        self.register_buffer("fixed", torch.eye(size).flip(0), persistent=False)
        self.register_buffer("held", torch.eye(size))

    def forward(self, x):
        x = torch.nn.functional.linear(x @ self.fixed @ self.between, self.held)
        return x @ (self.weight * self.scale) + self.bias


def test_parameters_that_are_multiplied_by_hand_are_trained_as_they_stand(place, tmp_path, monkeypatch):  # fmt: skip
    plain = Dialogues.model

    def model(task, encoder):
        made = plain(task, encoder)
        made.grids["entity"].project = Products(made.grids["entity"].project)
        return made

    monkeypatch.setattr(Dialogues, "model", model)
    before = from_encoder(place / "encoder", "diaasq", {"inner": 8}).module.state_dict()
    compiler.tune(asked(place, "passes.0.steps=2", "passes.0.every=1"), tmp_path / "checkpoint")
    after = load(guess(str(tmp_path / "checkpoint"))).module.state_dict()
    stem = "grids.entity.project."
    moved = {n for n in before if n.startswith(stem) and not torch.equal(before[n], after[n])}
    assert moved == {stem + name for name in ("weight", "scale", "bias", "between")}


def test_a_dialogue_over_the_encoders_length_is_named_with_its_line(place, tmp_path):
    file = tmp_path / "long.json"
    plain = {"replies": [-1], "speakers": [0]}
    rows = [json.dumps({**plain, "doc_id": i, "sentences": ["good " * i]}) for i in (1, 70)]
    file.write_text("[\n" + ",\n".join(rows) + "]")
    task = from_encoder(place / "encoder", "diaasq", {"inner": 8}).processor
    words = r"long.json line 3: dialogue 70: utterance 0 has 72 pieces"
    with pytest.raises(CalibrationError, match=words) as caught:
        task.read(file, labelled=False)
    assert caught.value.hint
