"""A recipe is read strictly, and an error says where and what was meant."""

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from effc import recipe
from effc.errors import RecipeError, UsageError
from effc.ir.select import Select
from effc.passes import PASSES
from effc.passes.quantize import Quantize
from effc.recipe import QUANTIZE_WORDS, build, canonical, parse, read

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*/recipe.yaml"))

TEXT = """\
source: {transformers: DIR}
calib: {file: sentences.txt, samples: 64}
passes:
  - drop-noops
  - {pass: quantize, bits: 6, select: {op: linear, exclude: "head.*"}}
targets: [ort, onnx]
metric: {sts: pairs.csv}
bench: {shapes: [[1, 16]], threads: 2}
"""


def refused(text, **options):
    with pytest.raises(RecipeError) as caught:
        parse(text, name="recipe.yaml", **options)
    return caught.value


def test_a_recipe_becomes_frozen_values():
    made = parse(TEXT)
    assert made.source.transformers == "DIR"
    assert made.calib is not None
    assert made.calib.samples == 64
    assert [p.name for p in made.passes] == ["drop-noops", "quantize"]
    assert made.passes[1] == Quantize(bits=6, select=Select(op="linear", exclude="head.*"))
    assert made.targets == ("ort", "onnx")
    assert made.metric == "sts:pairs.csv"
    assert made.bench is not None
    assert (made.bench.shapes, made.bench.threads) == (((1, 16),), 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.metric = None


@pytest.mark.parametrize(
    ("change", "place", "line", "words"),
    [
        (("samples", "smaples"), "calib.smaples", 2, "did you mean 'samples'?"),
        (("targets", "target"), "target", 6, "did you mean 'targets'?"),
        (("pass: quantize", "pass: quantise"), "passes[1].pass", 5, "did you mean 'quantize'?"),
        (("bits: 6", "bit: 6"), "passes[1].bit", 5, "did you mean 'bits'?"),
        (("bits: 6", "bits: 5"), "passes[1].bits", 5, "5 is not one of 4, 6, 8"),
        (("exclude", "exlude"), "passes[1].select.exlude", 5, "did you mean 'exclude'?"),
        (("- drop-noops", "- drop-nops"), "passes[0].pass", 4, "did you mean 'drop-noops'?"),
        (("[ort, onnx]", "[ort, onxx]"), "targets[1]", 6, "did you mean 'onnx'?"),
        (("samples: 64", "samples: many"), "calib.samples", 2, "should be a valid integer"),
        (("[[1, 16]]", "[[1]]"), "bench.shapes", 8, ""),
        (("{sts: pairs.csv}", "sts"), "metric", 7, "one NAME: FILE"),
    ],
)
def test_a_wrong_word_is_answered_with_its_place_and_the_nearest(change, place, line, words):
    assert TEXT.count(change[0]) == 1
    error = refused(TEXT.replace(*change))
    assert error.what.startswith(place)
    assert words in error.what
    assert f"line {line} of recipe.yaml" in error.where


def test_the_error_of_an_option_names_its_pass():
    error = refused(TEXT.replace("bits: 6", "bits: 5"))
    assert str(error).splitlines()[:2] == [
        "passes[1].bits: 5 is not one of 4, 6, 8",
        "in quantize, line 5 of recipe.yaml",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a mapping"),
        ("[1, 2]", "not a mapping"),
        ("source: {transformers: [", "line 1 is not YAML"),
        ("targets: [ort]", "a recipe needs a source"),
        ("effc: 2\nsource: {transformers: D}", "version 2; effc reads 1"),
        ("source: {}", "one of transformers, python"),
        ("source: {transformers: D, python: m:f}", "one of transformers, python"),
        ("source: D", "source is a mapping"),
        ("source: {transformers: D}\ntargets: []", "list of words"),
        ("source: {transformers: D}\npasses: quantize", "passes is a list"),
        ("source: {transformers: D}\npasses: [{bits: 8}]", "a pass is {pass: NAME"),
        ("source: {transformers: D}\ncalib: {samples: 8}", "one of file, callable"),
        ("source: {transformers: D}\nplugins: [1]", "a plugin is module or file.py"),
    ],
)
def test_what_is_no_recipe_is_refused(text, words):
    assert words in refused(text).what


def test_a_pass_that_measures_must_be_told_with_what():
    text = "source: {transformers: D}\npasses:\n  - quantize\n"
    error = refused(text)
    assert error.what.startswith("passes[0]: quantize measures activations")
    assert "--calib FILE" in error.hint
    weight_only = text.replace("quantize", "{pass: quantize, activation_bits: 16}")
    assert parse(weight_only).passes[0].activation_bits == 16


def test_values_can_be_set_from_outside():
    overrides = ["passes.1.bits=8", "calib.samples=7", "bench=false", "source.transformers=OTHER"]
    made = parse(TEXT, overrides=overrides)
    assert made.passes[1].bits == 8
    assert made.calib is not None
    assert made.calib.samples == 7
    assert made.bench is None
    assert made.source.transformers == "OTHER"
    assert yaml.safe_load(made.text)["passes"][1]["bits"] == 8


def test_a_setting_that_fits_nowhere_is_refused():
    with pytest.raises(UsageError, match="PATH=VALUE"):
        parse(TEXT, overrides=["bits"])
    for override in ("passes.7.bits=8", "passes.x.bits=8", "targets.0.x=1"):
        assert "no such place" in refused(TEXT, overrides=[override]).what
    assert refused(TEXT, overrides=["passes.1.bits=5"]).what.startswith("passes[1].bits")


def test_relative_paths_are_relative_to_the_recipe(tmp_path, monkeypatch):
    for name in ("DIR", "sentences.txt", "pairs.csv"):
        (tmp_path / name).touch()
    (tmp_path / "recipe.yaml").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path.parent)
    made = read(tmp_path / "recipe.yaml")
    assert made.source.transformers == str(tmp_path / "DIR")
    assert made.calib is not None
    assert made.calib.file == str(tmp_path / "sentences.txt")
    assert made.metric == f"sts:{tmp_path / 'pairs.csv'}"


def test_a_module_is_no_path(tmp_path):
    (tmp_path / "recipe.yaml").write_text("source: {python: 'package.model:build'}", "utf-8")
    assert read(tmp_path / "recipe.yaml").source.python == "package.model:build"


def test_a_factory_or_a_column_beside_the_recipe_is_found(tmp_path):
    (tmp_path / "model.py").touch()
    (tmp_path / "pairs.csv").touch()
    text = "source: {python: 'model.py:build'}\ncalib: {file: 'pairs.csv#left'}"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    made = read(tmp_path / "recipe.yaml")
    assert made.source.python == f"{tmp_path / 'model.py'}:build"
    assert made.calib is not None
    assert made.calib.file == f"{tmp_path / 'pairs.csv'}#left"


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read(tmp_path / "none.yaml")


@pytest.mark.parametrize("word", list(PASSES))
def test_every_option_of_every_pass_can_be_said(word):
    """Each option is accepted under its own name, at its default."""
    kind = PASSES[word]
    options = {
        f.name: json.loads(json.dumps(value, default=dataclasses.asdict))
        for f in dataclasses.fields(kind)
        if (value := getattr(kind(), f.name)) is not None
    }
    data = {
        "source": {"transformers": "D"},
        "calib": {"file": "F"},
        "passes": [{"pass": word, **options}],
    }
    (made,) = build(data).passes
    assert made == kind() or dataclasses.asdict(made) == dataclasses.asdict(kind())


@pytest.mark.parametrize("word", list(QUANTIZE_WORDS))
def test_every_word_of_quantize_is_a_recipe(word):
    options = QUANTIZE_WORDS[word]
    passes = [{"pass": "quantize", **options}] if options else []
    made = build({"source": {"transformers": "D"}, "calib": {"file": "F"}, "passes": passes})
    assert len(made.passes) == len(passes)


def test_one_recipe_has_one_text():
    data = yaml.safe_load(TEXT)
    turned = dict(reversed(data.items()))
    assert canonical(data) == canonical(turned)
    assert parse(TEXT).text == parse(yaml.safe_dump(turned)).text
    assert yaml.safe_load(parse(TEXT).text)["effc"] == 1


def test_the_text_is_a_recipe_again():
    made = parse(TEXT)
    assert parse(made.text) == made


def test_a_recipe_travels_without_the_folders_of_this_machine(tmp_path):
    text = TEXT.replace("DIR", "/home/someone/models/minilm").replace(
        "sentences.txt", "/home/someone/sentences.txt"
    )
    text = text.replace("pairs.csv", "/home/someone/pairs.csv")
    portable = parse(text).portable()
    assert "someone" not in portable
    assert yaml.safe_load(portable)["source"] == {"transformers": "minilm"}
    assert yaml.safe_load(portable)["metric"] == {"sts": "pairs.csv"}
    assert parse(portable).passes == parse(text).passes


def test_a_plugin_makes_a_pass_known(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "import effc\n"
        "@effc.register\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(effc.Pass):\n"
        "    name = 'recipe-test-mine'\n"
        "    strength: int = 1\n"
        "    def rewrite(self, graph, stats):\n"
        "        return 0\n",
        encoding="utf-8",
    )
    text = "source: {transformers: D}\npasses: [{pass: recipe-test-mine, strength: 3}]\n"
    assert "unknown pass" in refused(text).what
    made = parse("plugins: [mine.py]\n" + text, base=tmp_path)
    assert made.passes[0].strength == 3
    assert yaml.safe_load(made.portable())["plugins"] == ["mine.py"]


def test_the_published_schema_is_what_the_code_says():
    published = json.loads((ROOT / "effc" / "schema" / "recipe.json").read_text(encoding="utf-8"))
    known = {w: published["$defs"][w] for w in PASSES if w in published["$defs"]}
    assert {"quantize", "drop-noops"} <= set(known)
    for word, part in known.items():
        fields = {f.name for f in dataclasses.fields(PASSES[word])}
        assert set(part["properties"]) == {"pass", *fields}
    assert set(published["properties"]) == set(recipe.schema()["properties"])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.parent.name)
def test_the_schema_accepts_the_examples_and_refuses_a_typing_error(file):
    schema = recipe.schema()
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    own = [p for p in data.get("passes", []) if isinstance(p, str) and p not in PASSES]
    data["passes"] = [p for p in data["passes"] if p not in own]
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "target": ["ort"]}, schema)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.parent.name)
def test_the_examples_are_recipes(file):
    assert read(file).targets
