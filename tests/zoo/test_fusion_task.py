"""Lexical fusion as a task from files to an answer: sememes that travel, the package, and the example's own parts."""

import dataclasses
import importlib.util
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from effc import package, recipe, solving
from effc.errors import CalibrationError, SourceError, TuneError
from effc.source import check_settings, from_encoder, guess, load
from effc.zoo import fusion_files as files
from effc.zoo import fusion_tags as tags
from kit import cli, solved

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lexical_fusion"
RECIPE = EXAMPLE / "recipe.yaml"
OPTIONS = {"sememe_size": 16, "heads": 2, "size": 8, "inner": 16}
SMALL = [
    *(f"source.options.{name}={value}" for name, value in OPTIONS.items()), "bench=false",
    "targets=[ort]", "calib.samples=8", "passes.0.samples=24", "passes.0.held=8", "passes.0.steps=6",
    "passes.0.every=3", "passes.0.lr=0.01", "passes.0.batch=4",
]  # fmt: skip
SETS = [word for change in SMALL for word in ("--set", change)]


def script(name):
    spec = importlib.util.spec_from_file_location(f"lf_{name}", EXAMPLE / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files of paragraphs, a dictionary and an encoder."""
    made, root = script("made"), tmp_path_factory.mktemp("fusion")
    made.write(root / "train.jsonl", 32, 0)
    made.write(root / "valid.jsonl", 8, 1, "valid")
    made.dictionary(root)
    made.encoder(root / "encoder", 16)
    return root


def options(place, **changes):
    named = {"dictionary": str(place / "hownet.txt"), "vectors": str(place / "sememe_vector.txt")}
    return {**OPTIONS, **named, **changes}


@pytest.fixture(scope="module")
def source(place):
    return from_encoder(place / "encoder", "lexical-fusion", options(place))


def test_made_up_paragraphs_have_fusions_or_none_and_words_of_their_own(place):
    made = script("made")
    words = [{row.split()[2] for row in made.triples(kind)} for kind in ("train", "valid")]
    assert not words[0] & words[1]
    made.write(place / "many.jsonl", 300, 3)
    found = files.read(place / "many.jsonl")
    without = sum(not p.truth.fusions for p in found) / len(found)
    assert 0.2 < without < 0.4
    rows = [json.loads(line) for line in (place / "many.jsonl").read_text("utf-8").splitlines()]
    assert all(row["synthetic"] for row in rows)
    again = made.write(place / "again.jsonl", 300, 3)
    assert again.read_bytes() == (place / "many.jsonl").read_bytes()


def test_paragraphs_without_a_fusion_are_cut_from_ones_with_one(place):
    quiet = script("quiet")
    row = {
        "id": "1", "text": "美国要撤出很多的作战部队，这是昨天的报道。关于修改撤军速度的问题，他给予肯定答复。",
        "fusion": [25, 27, "撤军"], "separations": [[3, 5, "撤出"], [10, 12, "部队"]],
    }  # fmt: skip
    made = {quiet.cuts([row], seed)[0]["text"] for seed in range(8)}
    assert made == {
        "美国要撤出很多的作战部队，这是昨天的报道。",
        "这是昨天的报道。关于修改撤军速度的问题，他给予肯定答复。",
    }
    assert quiet.cuts([row], 0)[0]["synthetic"] and quiet.cuts([row], 0)[0]["fusion"] is None
    short = {**row, "text": "撤军撤出部队"}
    assert quiet.cut(short, random.Random(0)) is None


def test_words_are_exchanged_for_others_of_the_dictionary(place, tmp_path):
    file = tmp_path / "words.txt"
    words = {"撤出": "撤", "撤后": "撤", "部队": "军", "军人": "军", "士兵": "军", "走路": "走"}
    file.write_text("".join(f"{w}\n{s}\n" for w, s in words.items()), "utf-8")
    row = {
        "id": "1", "text": "撤出部队，撤军，撤军", "fusion": [5, 7, "撤军"],
        "separations": [[0, 2, "撤出"], [2, 4, "部队"]], "char_links": [[5, 0], [6, 1]],
        "extra": {"fusion": [[8, 10]], "A": [], "B": []},
    }  # fmt: skip
    draw = random.Random(0)
    exchange = script("exchange").Exchange(file, avoid={"撤人"})
    made = [exchange(row, draw, "2") for _ in range(12)]
    for each in made:  # what is written is what the reader takes
        (found,) = files.read(script("quiet").write(tmp_path / "f.jsonl", [each]))
        assert found.truth.fusions == {files.Span(5, 7), files.Span(8, 10)}
    # 撤后 alone has the sememe of 撤出; 军人 would give 撤军, which is there, or 撤人, which is avoided
    assert {each["separations"][0][2] for each in made} == {"撤后"}
    assert {each["separations"][1][2] for each in made} == {"士兵"}
    assert {each["fusion"][2] for each in made} == {"撤士", "撤兵"}
    assert all(each["synthetic"] for each in made)
    assert exchange({**row, "separations": [[0, 2, "撤出"], [2, 9, "长" * 7]]}, draw, "3") is None


def test_sememes_decide_what_is_trained_and_off_has_none(place, source):
    made = {
        word: from_encoder(place / "encoder", "lexical-fusion", options(place, sememes=word))
        for word in ("off", "shuffled")
    }
    assert len({source.digest, *(m.digest for m in made.values())}) == 3
    file = place / "valid.jsonl"
    counts = {
        word: [len(item.sememes) for item in each.processor.read(file)]
        for word, each in {"on": source, **made}.items()
    }
    assert max(counts["off"]) == 0 and min(counts["on"]) > 2 and min(counts["shuffled"]) > 2
    assert made["off"].module.sememes.weight.shape == (1, 16)
    names = source.processor.sememes.names
    begun = source.module.sememes.weight.detach()
    for row in (place / "sememe_vector.txt").read_text("utf-8").splitlines():
        name, *numbers = row.split()
        assert begun[1 + names.index(name)].tolist() == pytest.approx(list(map(float, numbers)))


def test_files_of_options_are_looked_for_where_the_data_are(place):
    made = recipe.read(RECIPE, [f"source.encoder={place / 'encoder'}", *SMALL], data_place=place)
    assert made.source.options["dictionary"] == str(place / "hownet.txt")
    assert made.source.options["vectors"] == str(place / "sememe_vector.txt")
    assert str(place) not in made.portable() and "hownet.txt" in made.portable()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sememes": "of"}, "settings of lexical-fusion: sememes"),
        ({"heads": 0}, "settings of lexical-fusion: heads"),
        ({"link_weight": -1}, "link_weight"),
        ({"dictionry": "x"}, "dictionry"),
        ({"dictionary": None}, "no dictionary of sememes is named"),
        ({"sememe_size": 15}, "has no vector of 15 numbers"),
    ],
)
def test_settings_that_are_none_are_named(place, changes, words):
    with pytest.raises(SourceError, match=words) as caught:
        from_encoder(place / "encoder", "lexical-fusion", options(place, **changes))
    assert caught.value.hint


def test_a_dictionary_that_is_not_there_is_named(place):
    with pytest.raises(CalibrationError, match=r"gone\.txt"):
        from_encoder(place / "encoder", "lexical-fusion", options(place, dictionary="gone.txt"))


def test_a_paragraph_over_the_encoders_length_is_named_with_its_line(place, source, tmp_path):
    file = tmp_path / "long.jsonl"
    rows = ({"id": "a", "text": "好"}, {"id": "b", "text": "好" * 63})
    file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(CalibrationError, match=r"long.jsonl line 2: paragraph b has 65 characters"):
        source.processor.read(file, labelled=False)


def test_made_up_shapes_are_inputs_of_the_model(place, source):
    for batch, length in ((1, 3), (2, 40)):
        feeds = source.processor.shaped(batch, length, np.arange(3, 9))
        with torch.no_grad():
            made = source.module(**{n: torch.from_numpy(v) for n, v in feeds.items()})
        assert made["tag_logits"].shape == (batch, length, len(tags.LABELS))
        assert made["link_logits"].shape == (batch, length, length)
        assert feeds["incidence"].any(1).all()


def test_without_a_weight_of_links_words_alone_are_found(place):
    task = from_encoder(
        place / "encoder", "lexical-fusion", options(place, link_weight=0)
    ).processor
    item = next(i for i in task.read(place / "valid.jsonl") if i.paragraph.truth.fusions)
    said, links = tags.encode(item)
    outputs = {"tag_logits": np.eye(5)[said][None], "link_logits": np.where(links, 9.0, -9.0)[None]}
    found = task.said(lambda feeds: outputs, item)
    assert found.fusions == item.paragraph.truth.fusions and not found.pairs
    task.settings = dataclasses.replace(task.settings, link_weight=1.0)
    assert task.said(lambda feeds: outputs, item).pairs == item.paragraph.truth.pairs
    with pytest.raises(CalibrationError, match="no output 'link_logits'"):
        task.said(lambda feeds: {"tag_logits": 0}, item)


@pytest.fixture(scope="module")
def trained(place):
    ran = cli(
        "tune", RECIPE, "--data", place, "--encoder", place / "encoder", "-o", place / "checkpoint", *SETS
    )  # fmt: skip
    assert ran.code == 0 and "held-out score" in ran.out, ran.err
    return place / "checkpoint"


@pytest.mark.slow
def test_sememes_travel_with_the_checkpoint(place, source, trained, tmp_path):
    again = load(guess(str(trained)))
    assert (
        again.kind == "task:lexical-fusion" and again.processor.sememes == source.processor.sememes
    )
    assert again.processor.own() == json.loads((trained / "config.json").read_text())["effc_source"]
    check_settings(trained, options(place, dictionary="/gone/hownet.txt"))  # nothing is read
    with pytest.raises(TuneError, match="sememes: on, and the recipe asks for off"):
        check_settings(trained, options(place, sememes="off"))
    for change, words in ((None, "there is no"), ("义\n好\t1\n", "not what the model was trained with")):  # fmt: skip
        copy = tmp_path / words[:5]
        shutil.copytree(trained, copy)
        (copy / "sememes.txt").unlink()
        if change is not None:
            (copy / "sememes.txt").write_text(change, "utf-8")
        with pytest.raises(SourceError, match=words) as caught:
            load(guess(str(copy)))
        assert "sememes.txt" in str(caught.value) and caught.value.hint
    for key, value, words in (
        ("labels", ["O"], "labels of"),
        ("decoder", {"threshold": 2.0}, "probability of 2.0"),
    ):
        config = json.loads((trained / "config.json").read_text())
        config["effc_source"][key] = value
        copy = tmp_path / key
        shutil.copytree(trained, copy)
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(SourceError, match=words):
            load(guess(str(copy)))


@pytest.mark.slow
def test_a_package_finds_fusions_without_torch_and_writes_its_page(place, trained, tmp_path):
    out = tmp_path / "out"
    ran = cli(
        "compile", RECIPE, "--data", place, "--tuned", trained, "-o", out, "--threads", 1, *SETS,
        "--set", "gate=false",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    (engine,) = package.read(out).engines
    ports = {port.name: port.shape for port in (*engine.inputs, *engine.outputs)}
    assert list(ports["incidence"]) == ["batch", "sequence", "sememes"]
    assert list(ports["link_logits"]) == ["batch", "sequence", "sequence"]
    assert (out / "sememes.txt").read_bytes() == (trained / "sememes.txt").read_bytes()
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert set(report["metric"]["parts"]) == set(load(guess(str(trained))).processor.parts)
    ran = solved(out, "lexical-fusion", place / "valid.jsonl", tmp_path)
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["answers"]) == 8 and 0 <= found["scores"]["pairs"]["f1"] <= 1
    assert sum(found["scores"]["errors"].values()) == 8 and "alarms" in found["scores"]
    assert "paragraph 1-0" in ran.out and "F1" in ran.err
    assert "<h2>Paragraph 1-0</h2>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    bare = tmp_path / "bare.jsonl"
    rows = [{"text": p.text} for p in files.read(place / "valid.jsonl")]
    bare.write_text("\n".join(map(json.dumps, rows)))
    told = solving.solve(out, bare, "lexical-fusion", threads=1)
    assert told.to_json()["scores"] is None
    assert [a["mentions"] for a in told.answers] == [a["mentions"] for a in found["answers"]]


@pytest.mark.slow
def test_arms_are_units_that_are_counted_once(place, tmp_path, monkeypatch):
    arms, quiet = script("arms"), script("quiet")
    monkeypatch.setattr(arms, "TUNED", {"joint": {}})
    quiet.write(place / "quiet.jsonl", [{"text": "好好好好", "fusion": None}])
    sets = [change for change in SMALL if change != "bench=false"]
    rows = [row for row in quiet.rows_of(place / "valid.jsonl") if row["fusion"]]
    quiet.write(place / "valid.jsonl", rows)
    found = arms.measured(place, place / "encoder", tmp_path, sets, seeds=1)
    assert set(found["arms"]) == {"joint", "rule", "crf", "pipeline"} and found["seeds"] == 1
    for arm in found["arms"].values():
        assert sum(arm["errors"].values()) == len(rows) and arm["alarms"]["without"] == 1
    assert set(found["compared"]) == {"rule", "crf", "pipeline"}
    for each in found["compared"].values():
        assert each["pairs"]["low"] <= each["pairs"]["difference"] <= each["pairs"]["high"]
    for name in ("_tuned", "_crf", "_pipeline"):
        monkeypatch.setattr(arms, name, lambda *given: pytest.fail("a unit was counted twice"))
    again = arms.measured(place, place / "encoder", tmp_path, sets, seeds=1)
    assert again == found
