"""A recipe is read strictly, and an error says where and what was meant."""

import contextlib
import copy
import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from effc import recipe
from effc.errors import CalibrationError, RecipeError, SourceError, UsageError
from effc.ir.select import Select
from effc.passes import PASSES
from effc.passes.base import Pass
from effc.passes.quantize import Quantize
from effc.recipe import QUANTIZE_WORDS, build, canonical, parse, passes_of, read
from effc.tuning import _schedule

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*/*.yaml"))


def named(file):
    return f"{file.parent.name}/{file.stem}"


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
        (("bits: 6", "bits: 9"), "passes[1].bits", 5, "9 is not one of 3, 4, 5, 6, 7, 8"),
        (("exclude", "exlude"), "passes[1].select.exlude", 5, "did you mean 'exclude'?"),
        (("- drop-noops", "- drop-nops"), "passes[0].pass", 4, "did you mean 'drop-noops'?"),
        (("[ort, onnx]", "[ort, onxx]"), "targets[1]", 6, "did you mean 'onnx'?"),
        (("samples: 64", "samples: many"), "calib.samples", 2, "should be a valid integer"),
        (("[[1, 16]]", "[[1]]"), "bench.shapes", 8, ""),
        (("{sts: pairs.csv}", "sts"), "metric", 7, "one NAME: FILE"),
        (("{sts: pairs.csv}", "{sts: }"), "metric", 7, "one NAME: FILE"),
        (("select: {op: linear", "select: {int: linear"), "passes[1].select.int", 5, "known: "),
        (("samples: 64", "samples: 0"), "calib.samples: should be", 2, "equal to 1, not 0"),
        (("samples: 64", "batch: 0"), "calib.batch: should be", 2, "equal to 1, not 0"),
        (("samples: 64", "max_length: 0"), "calib.max_length", 2, "equal to 1, not 0"),
        (("threads: 2", "threads: 0"), "bench.threads", 8, "equal to 1, not 0"),
        (("threads: 2", "budget_s: 0"), "bench.budget_s", 8, "greater than 0, not 0"),
        (("threads: 2", "budget_s: .inf"), "bench.budget_s", 8, "a finite number, not inf"),
        (("threads: 2", "seed: -1"), "bench.seed", 8, "equal to 0, not -1"),
        (("[[1, 16]]", "[[1, 16], [1, 0]]"), "bench.shapes[1][1]", 8, "equal to 1, not 0"),
    ],
)
def test_a_wrong_word_is_answered_with_its_place_and_the_nearest(change, place, line, words):
    assert TEXT.count(change[0]) == 1
    error = refused(TEXT.replace(*change))
    assert error.what.startswith(place)
    assert words in error.what
    assert f"line {line} of recipe.yaml" in error.where


def test_the_error_of_an_option_names_its_pass():
    error = refused(TEXT.replace("bits: 6", "bits: 9"))
    assert str(error).splitlines()[:2] == [
        "passes[1].bits: 9 is not one of 3, 4, 5, 6, 7, 8",
        "in quantize, line 5 of recipe.yaml",
    ]


LETTERS = "abcdefghijklmnopqrstuvwxyz"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise(LETTERS))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a mapping"),
        ("[1, 2]", "not a mapping"),
        ("source: {transformers: [", "line 1 is not YAML"),
        ("targets: [ort]", "a recipe needs a source"),
        ("effc: 2\nsource: {transformers: D}", "version 2; effc reads 1"),
        ("source: {}", "one of transformers, diffusers, gguf, onnx, python"),
        (
            "source: {transformers: D, python: m:f}",
            "one of transformers, diffusers, gguf, onnx, python",
        ),
        ("source: D", "source is a mapping"),
        ("source: {transformers: D}\ntargets: []", "list of words"),
        ("source: {transformers: D}\ntargets: [{ort: {}}]", "target ort has no options"),
        ("source: {transformers: D}\ntargets: [{onxx: {}}]", "did you mean 'onnx'?"),
        ("source: {transformers: D}\ntargets: [{ort: {}, onnx: {}}]", "unknown target"),
        ("source: {transformers: D}\ntargets: [{openvino: 5}]", "is a mapping"),
        ("source: {transformers: D}\ntargets: [{openvino: {hnt: x}}]", "did you mean 'hint'?"),
        ("source: {transformers: D}\ntargets: [{openvino: {precision: f16}}]", "auto, f32, bf16"),
        (
            "source: {transformers: D}\ntargets: [openvino, {openvino: {hint: latency}}]",
            "asked for twice",
        ),
        ("source: {transformers: D}\npasses: quantize", "passes is a list"),
        ("source: {transformers: D}\npasses: [{bits: 8}]", "a pass is {pass: NAME"),
        ("source: {transformers: D}\ncalib: {samples: 8}", "one of file, callable"),
        ("source: {transformers: D}\nplugins: [1]", "a plugin is module or file.py"),
        ("source: {transformers: D}\ncalib: {}", "one of file, callable"),
        ("source: {transformers: D}\ncanonicalize: no way", "'no way' is not true or false"),
        ("source: {transformers: D}\ntargets: [[ort]]", "unknown target"),
        ("source: {transformers: D}\npasses: [{pass: [quantize]}]", "unknown pass"),
        ("source: {transformers: D, options: {n: 1}}", "a model directory takes none"),
        ("source: {python: m:f, options: {python: n:g}}", "cannot be an option"),
        ("source: {python: m:f, options: {since: 2020-01-01}}", "options are text, numbers"),
        ("source: {python: m:f, options: &o {o: *o}}", "stands in itself"),
        ("source: &a {transformers: *a}", "stands in itself"),
        (BOMB, "more than 10000 values"),
        (
            "source: {transformers: !!binary aGVsbG8=}",
            "source.transformers: a recipe holds no binary",
        ),
        ("source: !!set {transformers}", "source: a recipe holds no set"),
        ("a: [" + "1, " * 10_001 + "]", "more than 10000 values"),
        ("effc: 2020-99-99", "is not YAML: month must be"),
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


def test_a_replay_needs_no_data(tmp_path):
    text = "source: {transformers: D}\npasses: [quantize]\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert read(tmp_path / "recipe.yaml", replayed=True).passes == (Quantize(),)
    assert parse(text, replayed=True).calib is None
    assert build(yaml.safe_load(text), replayed=True).calib is None
    with pytest.raises(RecipeError, match="measures activations"):
        build(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("change", "place", "line"),
    [
        (("samples: 64", "samples: 64, file: other.txt"), "calib.file", 2),
        (("bits: 6", "bits: 6, bits: 8"), "passes[1].bits", 5),
        (("targets:", "calib: {file: other.txt}\ntargets:"), "calib", 6),
    ],
)
def test_a_key_that_is_there_twice_is_refused_at_the_second(change, place, line):
    error = refused(TEXT.replace(*change))
    assert error.what == f"{place}: stands here for the second time"
    assert error.where == f"line {line} of recipe.yaml"


def test_a_key_may_stand_over_one_that_was_merged_in():
    text = TEXT.replace("bench: {", "bench: {<<: {threads: 7, seed: 3}, ")
    bench = parse(text).bench
    assert bench is not None
    assert (bench.threads, bench.seed) == (2, 3)


def test_what_the_flags_made_has_no_lines():
    data = yaml.safe_load(TEXT)
    made = build(data, overrides=["passes.1.bits=8"])
    assert made.passes[1].bits == 8
    assert data == yaml.safe_load(TEXT)
    with pytest.raises(RecipeError) as caught:
        build(data, overrides=["calib.batch=0"])
    assert caught.value.where == "the command line"


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
    for override in ("bits", "=1", ".=1", "a..b=1", "passes.=1"):
        with pytest.raises(UsageError, match="PATH=VALUE"):
            parse(TEXT, overrides=[override])
    for override in ("passes.7.bits=8", "passes.x.bits=8", "passes.-1.bits=8", "targets.0.x=1"):
        assert "no such place" in refused(TEXT, overrides=[override]).what
    assert "calib.samples, line 1 is not YAML" in refused(TEXT, overrides=["calib.samples=["]).what
    assert "passes is a list" in refused(TEXT, overrides=["passes=x"]).what
    error = refused(TEXT, overrides=["bench.shapes=[[1,0]]"])
    assert error.what.startswith("bench.shapes[0][1]")
    assert "second time" in refused(TEXT, overrides=["calib={file: a, file: b}"]).what
    assert refused(TEXT, overrides=["passes.1.bits=9"]).what.startswith("passes[1].bits")


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


def test_code_for_data_and_metric_is_found_beside_the_recipe(tmp_path):
    for name in ("gen.py", "mine.py", "pairs.csv"):
        (tmp_path / name).touch()
    for metric, name in (
        ("sts:pairs.csv", "sts"),
        ("{sts: pairs.csv}", "sts"),
        ("mine.py:score:pairs.csv", f"{tmp_path / 'mine.py'}:score"),
        ("package.mine:score:pairs.csv", "package.mine:score"),
        ("{'mine.py:score': pairs.csv}", f"{tmp_path / 'mine.py'}:score"),
        ("{'package.mine:score': pairs.csv}", "package.mine:score"),
    ):
        text = f"source: {{transformers: D}}\ncalib: {{callable: 'gen.py:f'}}\nmetric: {metric}\n"
        made = parse(text, base=tmp_path)
        assert made.calib is not None
        assert made.calib.callable == f"{tmp_path / 'gen.py'}:f"
        assert made.metric == f"{name}:{tmp_path / 'pairs.csv'}"


def test_a_module_of_batches_is_no_path(tmp_path):
    (tmp_path / "gen").touch()
    made = parse("source: {transformers: D}\ncalib: {callable: 'gen:f'}", base=tmp_path)
    assert made.calib is not None
    assert made.calib.callable == "gen:f"


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
    first = QUANTIZE_WORDS[word]
    passes = [first] if first else []
    made = build({"source": {"transformers": "D"}, "calib": {"file": "F"}, "passes": passes})
    assert len(made.passes) == len(passes)


def test_one_recipe_has_one_text():
    data = yaml.safe_load(TEXT)
    turned = dict(reversed(data.items()))
    assert canonical(data) == canonical(turned)
    assert parse(TEXT).text == parse(yaml.safe_dump(turned)).text
    assert parse(TEXT).text == parse(TEXT.replace("{sts: pairs.csv}", "sts:pairs.csv")).text
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


def test_code_and_options_travel_without_the_folders_of_this_machine():
    text = """
        source:
          python: /home/someone/model.py:build
          options: {weights: /home/someone/w.npz, more: [/home/someone/v.npz], size: small/2, n: 3}
        calib: {callable: "/home/someone/gen.py:f"}
        metric: {"/home/someone/my.py:score": /home/someone/pairs.csv}
        bench: null
    """
    data = yaml.safe_load(parse(text).portable())
    assert data == {
        "effc": 1,
        "source": {
            "python": "model.py:build",
            "options": {"weights": "w.npz", "more": ["v.npz"], "size": "small/2", "n": 3},
        },
        "calib": {"callable": "gen.py:f"},
        "metric": {"my.py:score": "pairs.csv"},
        "bench": None,
    }


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


@pytest.mark.parametrize("file", EXAMPLES, ids=named)
def test_the_schema_accepts_the_examples_and_refuses_a_typing_error(file):
    schema = recipe.schema()
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "target": ["ort"]}, schema)


@pytest.mark.parametrize("file", EXAMPLES, ids=named)
def test_the_examples_are_recipes(file):
    assert read(file).targets


def test_the_recipe_of_seven_billion_trains_as_the_paper_does():
    (tune,) = [p for p in read(ROOT / "examples/pat/llama2-7b.yaml").passes if p.name == "tune"]
    schedule = _schedule(tune)
    assert schedule.rate(99) == schedule.lr == 5e-5 and schedule.rate(98) < schedule.lr
    assert (schedule.clip, schedule.weight_decay) == (0.3, 0)
    assert tune.steps * tune.batch == 3 * tune.samples


@pytest.mark.parametrize(
    "text",
    [
        "metric: sts:pairs.csv",
        "metric: {sts: pairs.csv}",
        "metric: {'my.py:score': pairs.csv}",
        "metric: null",
        "targets: onnx",
        "targets: [ort, onnx]",
        "targets: [ort, {openvino: {precision: f32, hint: throughput}}]",
        "targets: [{tensorrt: [sm86, sm89]}]",
        "targets: [{tensorrt: {profile: {batch: [1, 2, 3]}, weights: stripped}}]",
        "bench: null",
        "bench: false",
        "bench: {threads: null}",
        "calib: null",
        "passes: null",
        "passes: [drop-noops, {pass: fold-constants, max_growth_bytes: 0}]",
        "plugins: null",
        "plugins: [json]\npasses: [schema-test-mine, {pass: schema-test-mine, strength: 3}]",
    ],
)
def test_the_schema_accepts_what_the_reader_accepts(text, monkeypatch):
    known = recipe.schema()
    monkeypatch.setitem(PASSES._words, "schema-test-mine", Mine)
    text = f"source: {{transformers: D}}\n{text}\n"
    parse(text)
    jsonschema.validate(yaml.safe_load(text), known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Pass):
    name = "schema-test-mine"
    strength: int = 1


@pytest.mark.parametrize(
    "text",
    [
        "metric: sts",
        "metric: {sts: null}",
        "metric: {sts: a.csv, f1: b.csv}",
        "targets: []",
        "targets: onxx",
        "targets: [{ort: {}}]",
        "targets: [{openvino: {hint: often}}]",
        "targets: [{openvino: {hnt: latency}}]",
        "bench: true",
        "bench: {shapes: [[1, 0]]}",
        "bench: {threads: 0}",
        "bench: {budget_s: 0}",
        "calib: {file: f, batch: 0}",
        "canonicalize: null",
        "passes: [schema-test-mine]",
        "passes: [{pass: schema-test-mine}]",
        "plugins: []\npasses: [schema-test-mine]",
        "plugins: [json]\npasses: [{pass: quantize, activation_bits: 16, bit: 8}]",
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(text):
    text = f"source: {{transformers: D}}\n{text}\n"
    refused(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), recipe.schema())


WORDS = st.sampled_from(
    ["", ".", "sts:x", "int", "pass", "file", "python", "options", "1e-5", "\0"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


def containers(value):
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


@st.composite
def spoilt(draw):
    """A recipe with up to three keys dropped, added or changed, wherever they stand."""
    data = copy.deepcopy(WHOLE)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(containers(data))))
        there = sorted(place, key=str) if isinstance(place, dict) else list(range(len(place)))
        if there and draw(st.booleans()):
            del place[draw(st.sampled_from(there))]
        elif there and draw(st.booleans()):
            place[draw(st.sampled_from(there))] = draw(VALUES)
        elif isinstance(place, dict):
            place[draw(WORDS)] = draw(VALUES)
        else:
            place.append(draw(VALUES))
    return data


WHOLE = {
    **yaml.safe_load(TEXT),
    "effc": 1,
    "source": {"python": "m:f", "options": {"size": 3}},
    "canonicalize": True,
    "plugins": ["json"],
}


@pytest.mark.slow
@settings(max_examples=200)
@given(spoilt())
def test_a_spoilt_recipe_is_read_or_refused(data):
    with contextlib.suppress(RecipeError, UsageError, SourceError, CalibrationError):
        build(data).portable()
    with contextlib.suppress(RecipeError, UsageError, SourceError, CalibrationError):
        made = parse(canonical(data), base=ROOT)
        assert parse(made.text, base=ROOT) == made


def test_words_of_the_command_line_stand_for_passes():
    rest = {"pass": "mixed-precision", "dtype": "fp16", "check_range": True}
    assert passes_of("fp8", ["tensorrt"], checks=True) == [
        {"pass": "quantize", "dtype": "fp8"}, rest,
    ]  # fmt: skip
    assert passes_of("none", ["tensorrt"]) == [{"pass": "mixed-precision", "dtype": "fp16"}]
    assert passes_of("none", ["ort"]) == []
    assert passes_of("int8", ["tensorrt"])[0] == "smooth"


@pytest.mark.parametrize("word", ["w4a16-gptq", "w4a16-awq"])
def test_words_for_weights_that_look_at_data_need_some(word):
    made = passes_of(word, ["ort"])
    assert made[-1].items() >= passes_of("w4a16", ["ort"])[0].items()
    data = {"source": {"transformers": "m"}, "passes": made}
    with pytest.raises(RecipeError, match="names no calibration data") as told:
        build(data)
    assert "--calib FILE" in told.value.hint
    build({**data, "calib": {"file": "sentences.txt"}})


def with_awq(awq, *behind):
    passes = [
        {"pass": "awq", **awq},
        *({"pass": "quantize", "activation_bits": 16, **q} for q in behind),
    ]
    data = {"source": {"transformers": "m"}, "passes": passes, "calib": {"file": "sentences.txt"}}
    return build(data)


@pytest.mark.parametrize(
    ("awq", "behind", "told"),
    [
        ({}, {"bits": 8, "group": 32}, "bits: 8"),
        ({}, {"bits": 4}, "group: null"),
        ({"group": None}, {"bits": 4, "group": 32}, "group: 32"),
        ({}, {"bits": 4, "group": 32, "weight_symmetric": False}, "weight_symmetric: false"),
        ({"bits": 8, "group": None}, {"dtype": "fp8", "activation_bits": 8}, 'dtype: "fp8"'),
    ],
)
def test_awq_for_another_grid_than_that_of_the_quantize_behind_it_is_refused(awq, behind, told):
    with pytest.raises(RecipeError, match=rf"^passes\[0\]: awq.* has {told}") as refused:
        with_awq(awq, behind)
    assert "give awq the bits" in refused.value.hint


def test_awq_takes_any_quantize_behind_it_that_is_cut_alike():
    with_awq({}, {"bits": 4, "group": 32})
    with_awq({"weight_symmetric": False}, {"bits": 4, "group": 32, "weight_symmetric": False})
    with_awq({}, {"bits": 8, "select": {"module": "head"}}, {"bits": 4, "group": 32})
    with_awq({"graphs": ["decode"]}, {"bits": 8, "graphs": ["prefill"]})
    with_awq({})
