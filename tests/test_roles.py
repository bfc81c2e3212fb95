"""A program of several graphs: one language model that one engine reads with and another writes with."""

import json
import shutil

import numpy as np
import pytest
import yaml
from test_generate import PROMPTS, expected, saved

import effc
from effc import compiler, package, recipe
from effc.cache import Cache
from effc.causal import PAST, PRESENT, ROLES
from effc.progress import Progress
from kit import assert_letter, cli, forge

pytestmark = pytest.mark.slow
DATA = (
    "the cat sat on the mat\na bird saw them go home\nit was warm and then rain\nthe mat was warm\n"
    * 4
)
WORDS = "prefill=w8a8,decode=w4a16"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, its text, and two packages: in float, and in other bits for every role."""
    found = tmp_path_factory.mktemp("roles")
    saved(found / "model", hidden_size=64, head_dim=16)
    (found / "text.txt").write_text(DATA)
    source = {"transformers": str(found / "model"), "roles": list(ROLES)}
    made = recipe.build({"source": source, "targets": ["ort"], "bench": False})
    effc.compile(made, found / "float")
    words = ("--quantize", WORDS, "--calib", found / "text.txt", "--no-bench")
    ran = cli("compile", found / "model", "-o", found / "out", *words)
    assert ran.code == 0, ran.err
    return found


def test_a_package_has_an_engine_for_each(place):
    manifest = package.read(place / "out")
    assert [(e.role, e.path) for e in manifest.engines] == [
        ("prefill", "prefill/model.onnx"), ("decode", "decode/model.onnx"),
    ]  # fmt: skip
    assert {(p.role, p.name) for p in manifest.passes if p.name == "quantize"} == {
        ("prefill", "quantize"), ("decode", "quantize"),
    }  # fmt: skip
    bits = {p.role: p.options["bits"] for p in manifest.passes if p.name == "quantize"}
    assert bits == {"prefill": 8, "decode": 4}
    decisions = json.loads((place / "out" / "decisions.json").read_text())
    assert {key.split("/")[0] for key in decisions} == set(ROLES)


def test_links_say_what_goes_where(place):
    manifest = package.read(place / "out")
    digests = {e.role: e.sha256 for e in manifest.engines}
    assert len(manifest.links) == 2 * 2 * 2  # layers, sides, producers
    for link in manifest.links:
        assert link.consumer == "decode" and link.sha256 == digests[link.producer]
        assert link.output.replace(PRESENT, PAST) == link.input
        assert (link.dtype, link.layout) == ("float32", "batch, heads, positions, size")
    assert not package.check(place / "out")


def test_greedy_text_of_two_engines_is_that_of_transformers(place, tmp_path):
    words = [w for p in PROMPTS for w in ("--prompt", p)]
    ran = cli("run", place / "float", *words, "--max-tokens", 24, "--json", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "r.json").read_text())["tokens"]
    assert found == expected(place, PROMPTS, 24)


def test_commands_take_an_engine_by_its_role(place):
    with effc.Engine.open(place / "out", "decode", threads=1) as engine:
        sizes = {p.name: [1 if isinstance(s, str) else s for s in p.shape] for p in engine.inputs}
        kinds = {p.name: p.dtype for p in engine.inputs}
        feeds = {n: np.zeros(s, kinds[n]) for n, s in sizes.items()}
        feeds["attention_mask"] = np.ones((1, 2), np.int64)
        assert engine(feeds)["logits"].shape == (1, 1, 64)
    model = ("--model", place / "model")
    ran = cli("verify", place / "out", *model)
    assert ran.code == 0 and "decode/ort: " in ran.out, ran.err
    ran = cli("explain", place / "out", *model, "--target", "decode")
    assert ran.code == 0, ran.err
    assert "elsewhere  llama.cpp: " in ran.out and "elsewhere  vLLM or TensorRT-LLM: " in ran.out
    ran = cli("bench", place / "out", *model, "--target", "decode/ort", "--budget", "0.5")
    assert ran.code == 0, ran.err
    ran = cli("bench", place / "out", *model, "--target", "nobody")
    assert ran.code == 2


def test_each_engine_is_timed_on_what_it_is_for(place, tmp_path):
    ran = cli(
        "bench", place / "float", "--model", place / "model", "--target", "prefill",
        "--shapes", "1x4,1x1+8", "--budget", "0.2", "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    (shape,) = json.loads((tmp_path / "b.json").read_text())["shapes"]
    assert (shape["batch"], shape["length"]) == (1, 4) and "past" not in shape
    ran = cli(
        "bench", place / "float", "--model", place / "model", "--target", "decode",
        "--shapes", "1x4,1x1+8", "--budget", "0.2", "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert ran.code == 0 and "1x1 behind 8" in ran.out + ran.err, ran.err
    (shape,) = json.loads((tmp_path / "b.json").read_text())["shapes"]
    assert (shape["length"], shape["past"]) == (1, 8)


def test_the_page_tells_the_engines_apart(place):
    page = (place / "out" / "report.html").read_text()
    assert "<td>prefill/ort</td>" in page and "<td>decode/ort</td>" in page


def test_a_compile_with_recorded_decisions_is_the_same(place, tmp_path):
    words = ("--decisions", place / "out" / "decisions.json", "--no-bench")
    content = yaml.safe_load((place / "out" / "recipe.yaml").read_text())
    content["source"]["transformers"] = str(place / "model")
    content["calib"]["file"] = str(place / "text.txt")
    (tmp_path / "r.yaml").write_text(yaml.dump(content))
    ran = cli("compile", tmp_path / "r.yaml", "-o", tmp_path / "out", *words)
    assert ran.code == 0, ran.err
    engines = [
        [e.sha256 for e in package.read(out).engines] for out in (place / "out", tmp_path / "out")
    ]
    assert engines[0] == engines[1]


def test_what_an_interval_draws_again_is_said_of_results_from_the_cache_too(place, tmp_path):
    data = {
        "source": {"transformers": str(place / "model")},
        "metric": {"perplexity": str(place / "text.txt")},
        "bench": False,
    }
    kept = Cache(tmp_path / "cache")
    first, again = (
        compiler.run(recipe.build(data), tmp_path / name, kept=kept, progress=Progress())
        for name in ("A", "B")
    )
    assert first.report["metric"]["unit"] == "window"  # the text is one document
    assert again.report["metric"] == first.report["metric"]


def test_a_plan_has_the_stages_of_both(place):
    words = ("--quantize", WORDS, "--calib", place / "text.txt", "--no-bench", "--plan")
    ran = cli("compile", place / "model", "-o", place / "planned", *words)
    assert ran.code == 0 and ran.out.count("quantize") == 2, ran.out + ran.err


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda link: link.update(sha256="0" * 64), "it is from another engine"),
        (lambda link: link.update(output="present.9.key"), "an engine or a port is missing"),
        (lambda link: link.update(output="logits"), "is taken"),
    ],
)
def test_a_link_that_does_not_fit_is_refused(place, tmp_path, change, part):
    shutil.copytree(place / "out", tmp_path / "out")
    forge(tmp_path / "out", "manifest.json", lambda m: change(m["links"][0]))
    ran = cli("run", tmp_path / "out", "--prompt", "the cat")
    assert_letter(ran, "VerifyError", 10, part)


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("prefill=w8a8", "names other graphs than prefill and decode"),
        ("prefill=w8a8,decode=w9", "w9"),
        ("prefill=w8a8,prefill=w8a8", "names other graphs than prefill and decode"),
        ("=", "--quantize word"),
    ],
)
def test_words_for_other_roles_are_letters(place, word, part):
    ran = cli("compile", place / "model", "-o", place / "none", "--quantize", word)
    assert_letter(ran, "UsageError", 2, part)


def test_roles_are_for_language_models_and_passes_for_graphs_that_are_there(place, tmp_path):
    source = {"transformers": str(place / "model")}
    for content, kind, part in (
        ({"source": {**source, "roles": ["prefill", "decode"], "cache": False}}, "SourceError", "has one graph"),
        ({"source": source, "passes": [{"pass": "drop-noops", "graphs": ["decode"]}]}, "RecipeError", "unknown graph"),
    ):  # fmt: skip
        (tmp_path / "r.yaml").write_text(json.dumps({**content, "bench": False}))
        ran = cli("compile", tmp_path / "r.yaml", "-o", tmp_path / "out")
        assert ran.code and part in ran.err and kind in ran.err, ran.err
