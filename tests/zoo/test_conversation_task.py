"""Emotions as a task from files to an answer: speakers beside it, a head that goes, and the package."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from effc import compiler, package, recipe, solving
from effc.cache import Cache
from effc.errors import CalibrationError, PreconditionError, SourceError, TuneError
from effc.passes.tune import Tune
from effc.source import from_encoder, guess, load
from effc.tuning import Tuner
from kit import cli, solved

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cer"
RECIPE = EXAMPLE / "recipe.yaml"
SMALL = [
    "source.options={size: 16}", "bench=false", "targets=[ort]", "calib.samples=8",
    "passes.0.samples=24", "passes.0.held=8", "passes.0.steps=6", "passes.0.every=3",
    "passes.0.lr=0.01", "passes.0.precision=f32",
]  # fmt: skip
SETS = [word for change in SMALL for word in ("--set", change)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files of conversations and an encoder."""
    spec = importlib.util.spec_from_file_location("cer_made", EXAMPLE / "made.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    root = tmp_path_factory.mktemp("cer")
    made.write(root / "train.csv", 32, 0)
    made.write(root / "valid.csv", 8, 1)
    made.encoder(root / "encoder", 16)
    return root


@pytest.fixture(scope="module")
def source(place):
    return from_encoder(place / "encoder", "cer", {"size": 16})


def tuner(source):
    program = compiler.trace_source(source)
    return Tuner(source=source, teacher=program.only(), calib=None, cache=Cache(None)), program


def tune(place, **changes):
    asked = {
        "task": "source",
        "distill": 0.0,
        "file": str(place / "train.csv"),
        "samples": 24,
        "held": 4,
    }
    return Tune(**{**asked, "batch": 4, "beside": (str(place / "train.csv"),), **changes})


def test_every_other_batch_is_for_the_speakers(place, source):
    made, program = tuner(source)
    drawn, held, score = made._examples(tune(place), program.only())
    for step in range(4):
        wanted = drawn(step).wanted
        known = {name for name, tags in wanted.items() if (tags >= 0).any()}
        assert known == ({"speaker"} if step % 2 else {"emotion"})
    assert all((example.wanted["emotion"] >= 0).any() for example in held) and score is not None
    alone, *_ = made._examples(tune(place, beside=()), program.only())
    assert all((alone(step).wanted["speaker"] < 0).all() for step in range(4))


def test_conversations_that_judge_teach_no_speakers(place, source):
    task = source.processor
    items = task.read(place / "train.csv")
    long = [i for i in items if len(task.beside(place / "train.csv", [i])) < len(items)]
    assert long and all(i.is_beside for i in task.beside(place / "train.csv", long[:1]))
    head, *rows = (place / "train.csv").read_text().splitlines(keepends=True)
    name = long[0].conversation.name
    file = place / "one.csv"
    file.write_text("".join([head, *(row for row in rows if row.split(",")[-2] == name)]))
    with pytest.raises(CalibrationError, match="apart from those that judge"):
        task.beside(file, long[:1])


def test_which_files_are_beside_decides_what_is_trained(place, source):
    made, program = tuner(source)
    keys = [
        made._key(tune(place, **change), program.only())
        for change in ({}, {"beside": ()}, {"beside": (str(place / "valid.csv"),)},
                       {"apart": (str(place / "valid.csv"),)})
    ]  # fmt: skip
    assert len(set(keys)) == 4


def test_speakers_are_classes_by_first_names(source):
    task = source.processor
    found = [
        task._speaker(names)
        for names in (("Joey",), ("Ross Geller",), ("Gunther",), (), ("A", "B"))
    ]
    assert found == [1, 5, 6, -100, -100]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"emotions": "mld"}, "emotions"), ({"size": 20}, "size"), ({"sizes": 16}, "sizes")],
)
def test_settings_that_are_none_are_named(place, settings, words):
    with pytest.raises(SourceError, match=f"settings of cer: {words}") as caught:
        from_encoder(place / "encoder", "cer", settings)
    assert caught.value.hint


def test_beside_is_refused_where_nobody_learns_from_it(place, source, tmp_path):
    program = compiler.trace_source(source)
    with pytest.raises(PreconditionError, match="source's task"):
        Tune(beside=("x",)).requires(program)
    with pytest.raises(PreconditionError, match="there are none"):
        Tune(apart=("x",)).requires(program)
    silent = from_encoder(place / "encoder", "cer", {"size": 16, "speakers": ()})
    with pytest.raises(CalibrationError, match="has no speakers"):
        silent.processor.beside(place / "train.csv", [])
    other = from_encoder(place / "encoder", "diaasq", {"inner": 8})
    with pytest.raises(TuneError, match="learns nothing beside"):
        other.processor.beside(place / "train.csv", [])


def test_an_utterance_over_the_encoders_length_is_named(place, tmp_path):
    file = tmp_path / "long.csv"
    file.write_text("Utterance,Speaker,Dialogue_ID\nhi,A,3\n" + "we " * 80 + ",A,3\n")
    task = from_encoder(place / "encoder", "cer", {}).processor
    words = r"long.csv: line 3, dialogue 3: utterance 1 has 82 pieces, the encoder takes 64"
    with pytest.raises(CalibrationError, match=words) as caught:
        task.read(file, labelled=False)
    assert caught.value.hint


def test_files_beside_are_looked_for_where_the_data_are(place):
    made = recipe.read(RECIPE, [f"source.encoder={place / 'encoder'}", *SMALL], data_place=place)
    first = made.passes[0]
    assert first.beside == (str(place / "train.csv"),)
    assert first.apart == (str(place / "valid.csv"),)
    assert str(place) not in made.portable()


@pytest.mark.slow
def test_a_package_tells_emotions_without_torch_and_has_no_speakers(place, tmp_path):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    ran = cli(
        "tune", RECIPE, "--data", place, "--encoder", place / "encoder", "-o", checkpoint, *SETS
    )
    assert ran.code == 0 and "held-out score" in ran.out, ran.err
    trained = load(guess(str(checkpoint)))
    assert trained.kind == "task:cer" and any("speaker" in n for n in trained.module.state_dict())
    ran = cli(
        "compile", RECIPE, "--data", place, "--tuned", checkpoint, "-o", out, "--threads", 1,
        *SETS, "--set", "gate=false",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    (engine,) = package.read(out).engines
    assert [port.name for port in engine.outputs] == ["emotion"]
    assert not any("speaker" in name for name in json.loads((out / "origins.json").read_text()))
    assert cli("verify", out, "--model", checkpoint).code == 0
    ran = solved(out, "cer", place / "valid.csv", tmp_path)
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["answers"]) == 8 and 0 <= found["scores"]["weighted"] <= 1
    assert "dialogue 0" in ran.out and "<h2>Dialogue 0</h2>" in (tmp_path / "page.html").read_text()
    told = solving.solve(out, place / "valid.csv", "cer", threads=1).answers
    with torch.no_grad():
        task = trained.processor
        run = lambda feeds: {  # noqa: E731
            n: v.numpy()
            for n, v in trained.module(**{n: torch.from_numpy(x) for n, x in feeds.items()}).items()
        }
        mine = [task.answer(i, task.said(run, i)) for i in task.read(place / "valid.csv")]
    same = [
        a["emotion"] == b["emotion"]
        for x, y in zip(told, mine, strict=True)
        for a, b in zip(x["utterances"], y["utterances"], strict=True)
    ]
    assert sum(same) > 0.9 * len(same)
