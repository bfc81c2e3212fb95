"""A copy of a package opens in the tool that it is laid out for, and writes the text that `effc run` writes."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
from test_generate import saved as of_family

import effc
from effc import layout, layout_causal, package
from effc.backends import onnx, onnx_ports
from kit import assert_letter, cli, content, forge, leftovers, made

GENAI, JS = "onnxruntime-genai", "transformers.js"
PROMPT = "the cat sat on the mat and"


def saved(place, **changes):
    """A directory of a tiny random Llama, whose output layer has a weight of its own, with a tokenizer."""
    return of_family(place, tie_word_embeddings=False, **changes)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The package of a tiny Llama in float32."""
    place = tmp_path_factory.mktemp("llama")
    effc.compile(saved(place / "model"), place / "out", bench=False)
    return place / "out"


@pytest.fixture
def own(out, tmp_path):
    """A copy of it that may be harmed."""
    return shutil.copytree(out, tmp_path / "own")


def greedy(out, count=24):
    """Tokens of the prompt and of what `effc run` goes on with."""
    ran = cli("run", out, "--prompt", PROMPT, "--max-tokens", count, "--json", "-")
    return json.loads(ran.out)["tokens"][0]


def feeds(length=3):
    """What both tools feed at first, but for the cache."""
    return {
        "input_ids": np.arange(5, 5 + length)[None],
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
    }


def session(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def empty(ports):
    """A cache of no position as transformers.js makes it: sizes that it has no word for are 0."""
    return {
        port.name: np.zeros([{"batch_size": 1}.get(s, 0) if isinstance(s, str) else s for s in port.shape], np.float32)
        for port in ports if port.name.startswith("past_key_values.")
    }  # fmt: skip


# onnxruntime-genai


def test_settings_of_genai_are_those_of_the_model(out, tmp_path):
    ran = cli("package", out, "--layout", GENAI, "-o", tmp_path / "genai")
    assert ran.code == 0, ran.err
    assert set(content(tmp_path / "genai")) == {
        "model.onnx", "genai_config.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    found = json.loads((tmp_path / "genai" / "genai_config.json").read_text())
    model, decoder = found["model"], found["model"]["decoder"]
    assert [model[f"{word}_token_id"] for word in ("bos", "eos", "pad")] == [2, 3, 0]
    assert (model["vocab_size"], model["context_length"]) == (64, 96)
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")  # fmt: skip
    assert [decoder[word] for word in sizes] == [8, 32, 4, 2, 2]
    names = {port.name for port in session(tmp_path / "genai" / "model.onnx").get_inputs()}
    words = decoder["inputs"].values()
    assert names == {w % i if "%d" in w else w for w in words for i in range(2)}
    assert found["search"]["do_sample"] is False
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_genai_writes_what_effc_writes(own, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    expected = greedy(own)
    cli("package", own, "--layout", GENAI, "-o", tmp_path / "g")
    model = genai.Model(str(tmp_path / "g"))
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(own)(PROMPT)["input_ids"]
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + 24)
    generator = genai.Generator(model, settings)
    generator.append_tokens(ids)
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == expected


# transformers.js


def test_files_of_transformers_js_are_where_it_looks(out, tmp_path):
    ran = cli("package", out, "--layout", JS, "-o", tmp_path / "js")
    assert ran.code == 0, ran.err
    assert set(content(tmp_path / "js")) == {
        "onnx/model.onnx", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "js" / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    assert config["model_type"] == "llama"
    opened = session(tmp_path / "js" / "onnx" / "model.onnx")
    shapes = {port.name: port.shape for port in opened.get_inputs()}
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 8]
    assert shapes["num_logits_to_keep"] == []
    given = {**feeds(), **empty(opened.get_inputs()), "num_logits_to_keep": np.array(0)}
    (logits,) = opened.run(["logits"], given)
    assert logits.shape == (1, 3, 64)


def test_transformers_js_has_the_chat_template_where_it_reads_it(tmp_path):
    model, template = (
        saved(tmp_path / "model"),
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    (model / "chat_template.jinja").write_text(template)
    effc.compile(model, tmp_path / "out", bench=False)
    layout.write(tmp_path / "out", JS, tmp_path / "js")
    settings = json.loads((tmp_path / "js" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == template
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("word", "file"),
    [("w4a16", "model_q4.onnx"), ("w8a16", "model_quantized.onnx")],
)
@pytest.mark.slow
def test_a_file_is_named_by_what_its_weights_are(tmp_path, word, file):
    model = saved(tmp_path / "model")
    effc.compile(model, tmp_path / "out", quantize=word, bench=False)
    assert cli("package", tmp_path / "out", "--layout", JS, "-o", tmp_path / "js").code == 0
    assert [p.name for p in (tmp_path / "js" / "onnx").iterdir()] == [file]


def test_large_weights_lie_beside_the_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "EXTERNAL_BYTES", 0)
    effc.compile(saved(tmp_path / "model"), tmp_path / "out", bench=False)
    for word, data in ((JS, "onnx/model.onnx_data"), (GENAI, "model.onnx.data")):
        place = tmp_path / word
        assert cli("package", tmp_path / "out", "--layout", word, "-o", place).code == 0
        assert data in content(place)
        opened = session(place / data.removesuffix("_data").removesuffix(".data"))
        given = {**feeds(), **empty(opened.get_inputs()), "num_logits_to_keep": np.array(1)}
        known = {port.name for port in opened.get_inputs()}
        opened.run(["logits"], {name: of for name, of in given.items() if name in known})
    config = json.loads((tmp_path / JS / "config.json").read_text())
    own = config["transformers.js_config"]
    assert own == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}


# Engines that leave the choice of positions


def test_without_a_choice_all_positions_have_logits(own, tmp_path):
    layout.write(own, GENAI, tmp_path / "g")
    opened = session(tmp_path / "g" / "model.onnx")
    assert onnx_ports.KEPT not in {port.name for port in opened.get_inputs()}
    given = {**feeds(), **empty(opened.get_inputs())}
    (logits,) = opened.run(["logits"], given)
    np.testing.assert_array_equal(logits, _chosen(own, given, [0, 1, 2]))


@pytest.mark.parametrize(("asked", "places"), [(0, [0, 1, 2]), (1, [2]), (2, [1, 2])])
def test_transformers_js_says_how_many_at_the_end(own, tmp_path, asked, places):
    layout.write(own, JS, tmp_path / "js")
    opened = session(tmp_path / "js" / "onnx" / "model.onnx")
    given = {**feeds(), **empty(opened.get_inputs())}
    (logits,) = opened.run(["logits"], {**given, "num_logits_to_keep": np.array(asked)})
    np.testing.assert_array_equal(logits, _chosen(own, given, places))


def _chosen(out, given, places):
    """Logits of the package's own engine."""
    return session(out / "model.onnx").run(
        ["logits"], {**given, onnx_ports.KEPT: np.array(places)}
    )[0]


def test_of_two_engines_the_one_that_writes_is_taken(own, tmp_path):
    def change(manifest):
        (entry,) = manifest["engines"]
        one = json.loads(json.dumps(entry))
        one["role"], entry["role"] = "decode", "prefill"
        manifest["engines"] = [entry, one]

    forge(own, "manifest.json", change)
    manifest = package.read(own)
    assert layout_causal._engine(own, manifest).role == "decode"


# Refusals


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    ran = cli("package", made().out, "--layout", GENAI, "-o", tmp_path / "x")
    assert_letter(ran, "UsageError", 2, "holds a model of kind encoder", "docs/deploy.md")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda e: e.update(target="openvino"), "no engine for ort"),
        (lambda e: e["inputs"][0].update(shape=[1, 1]), "prompts of any length"),
        (lambda e: e.update(inputs=e["inputs"][:3]), "a cache of keys and values"),
    ],
)
def test_an_engine_that_these_tools_cannot_feed_is_refused(own, tmp_path, change, part):
    forge(own, "manifest.json", lambda m: change(m["engines"][0]))
    ran = cli("package", own, "--layout", JS, "-o", tmp_path / "x")
    assert_letter(ran, "UsageError", 2, part)
    assert not (tmp_path / "x").exists()


def test_a_place_with_something_in_it_is_refused(out, tmp_path):
    place = tmp_path / "x"
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    ran = cli("package", out, "--layout", JS, "-o", place)
    assert_letter(ran, "PackageError", 12, "is not empty", "choose another -o")
    assert set(content(place)) == {"mine.txt"}
    again = cli("package", out, "--layout", JS, "-o", shutil.copytree(out, tmp_path / "package"))
    assert_letter(again, "PackageError", 12, "is not empty")
    inside = cli("package", out, "--layout", JS, "-o", out / "js")
    assert_letter(inside, "UsageError", 2, "lies in", "name a place beside it")


def test_an_altered_package_is_refused(own, tmp_path):
    (own / "tokenizer.json").write_text("{}")
    ran = cli("package", own, "--layout", GENAI, "-o", tmp_path / "x")
    assert_letter(ran, "VerifyError", 10, "tokenizer.json differs")
    assert not (tmp_path / "x").exists() and leftovers(tmp_path) == []


def test_an_unknown_layout_is_answered_with_the_nearest(out, tmp_path):
    ran = cli("package", out, "--layout", "transformer.js", "-o", tmp_path / "x")
    assert_letter(ran, "UsageError", 2, "did you mean 'transformers.js'?")


def test_the_command_line_names_every_layout():
    from effc import cli as commands

    assert set(commands.LAYOUT_NAMES) == set(layout.LAYOUTS)
