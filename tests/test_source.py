"""Where models come from: a directory with its own head, a factory, and never the network or code in a directory."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from effc.calib.data import Record
from effc.errors import SourceError, UsageError
from effc.source import copied_files, directory_digest, from_directory, guess, load
from kit import cli, content, made, save_encoder


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(made().model, tmp_path / "model"))


def test_a_directory_is_read_with_the_head_that_it_names():
    source = from_directory(made().model)
    assert type(source.module).__name__ == "BertModel"
    assert not source.module.training
    assert source.kind == "encoder"
    assert list(source.inputs["main"]) == ["input_ids", "attention_mask", "token_type_ids"]
    assert source.dims["main"]["input_ids"] == {0: "batch", 1: "sequence"}
    assert source.outputs["main"] == ("last_hidden_state",)


def test_what_travels_is_no_weights_and_no_code(model):
    for name in ("mine.py", "pytorch_model.bin", "vocab.txt", "NOTICE.txt", "training.log"):
        (model / name).write_text("x", encoding="utf-8")
    assert copied_files(model) == [
        "1_Pooling/config.json", "LICENSE", "NOTICE.txt", "README.md", "config.json", "modules.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip


def test_the_digest_is_of_weights_and_config(model):
    before = directory_digest(model)
    (model / "README.md").write_text("another", encoding="utf-8")
    assert directory_digest(model) == before
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "x": 1}), encoding="utf-8")
    assert directory_digest(model) != before


def test_texts_are_padded_at_the_right_and_masked():
    source = from_directory(made().model)
    assert source.processor is not None
    feeds = source.processor.encode(["the cat", "the cat sat on the mat"])
    assert feeds["input_ids"].shape == (2, 8)
    assert feeds["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert feeds["input_ids"][0, 4:].tolist() == [0] * 4
    (batch,) = source.processor.batches([Record(text="the cat")])
    assert batch.inputs["input_ids"].shape == (1, 4)


def spoil_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": 7}', encoding="utf-8")


def test_a_tokenizer_that_does_not_load_is_copied_and_not_needed_for_arrays(model, tmp_path):
    spoil_tokenizer(model)
    ids = np.random.default_rng(0).integers(2, 30, (8, 6))
    np.savez(
        tmp_path / "ids.npz",
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        token_type_ids=0 * ids,
    )
    out = tmp_path / "out"
    words = ("--quantize", "int8", "--calib", tmp_path / "ids.npz", "--no-bench")
    ran = cli("compile", model, "-o", out, *words)
    assert ran.code == 0, ran.err
    assert content(out)["tokenizer.json"] == content(model)["tokenizer.json"]


def test_a_tokenizer_that_does_not_load_is_fatal_for_text(model):
    spoil_tokenizer(model)
    source = from_directory(model)
    assert source.processor is not None
    with pytest.raises(SourceError, match="does not load") as caught:
        list(source.processor.batches([Record(text="the cat")]))
    assert ".npz" in str(caught.value)


def test_code_beside_a_tokenizer_is_not_run(model, tmp_path):
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n"
    (model / "mine.py").write_text(code, encoding="utf-8")
    source = from_directory(model)
    assert source.processor is not None
    assert source.processor.has_tokenizer in (True, False)
    assert not (tmp_path / "ran").exists()


# Factories


def test_a_factory_in_a_file_gives_a_module_and_its_inputs():
    source = load(guess(f"{made().factories}:perceptron"))
    assert list(source.inputs["main"]) == ["x"]
    assert source.name == "perceptron"
    assert source.processor is None


def test_positional_inputs_get_the_names_of_forward():
    assert list(load(guess(f"{made().factories}:positional")).inputs["main"]) == ["x"]


def test_a_factory_takes_options():
    source = load({"python": f"{made().factories}:perceptron", "size": 6})
    assert source.inputs["main"]["x"].shape == (2, 6)


def test_a_factory_by_dotted_name_is_looked_for_where_the_user_is(tmp_path, monkeypatch):
    shutil.copy(made().factories, tmp_path / "my_models.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load(guess("my_models:perceptron")).name == "perceptron"


def test_equal_weights_have_equal_digests():
    word = f"{made().factories}:perceptron"
    assert load(guess(word)).digest == load(guess(word)).digest
    assert load(guess(word)).digest != load({"python": word, "size": 6}).digest


@pytest.mark.parametrize("word", ["broken", "nonsense", "infinite", "nothing_like_it"])
def test_a_factory_that_fails_is_a_source_error(word):
    with pytest.raises(SourceError):
        load(guess(f"{made().factories}:{word}"))


def test_a_factory_whose_file_is_missing(tmp_path):
    with pytest.raises(SourceError, match="there is no file"):
        load(guess(f"{tmp_path / 'none.py'}:make"))


def test_a_factory_model_compiles_to_the_same_function(tmp_path):
    import onnxruntime

    ran = cli("compile", f"{made().factories}:perceptron", "-o", tmp_path / "out", "--no-bench")
    assert ran.code == 0, ran.err
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    expected = load(guess(f"{made().factories}:perceptron")).module(x).detach().numpy()
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Guessing


def test_a_word_is_a_directory_a_factory_or_a_name(tmp_path):
    assert guess(str(tmp_path)) == {"transformers": str(tmp_path)}
    assert guess("package.module:make") == {"python": "package.module:make"}
    assert guess("./a-b/file.py:make") == {"python": "./a-b/file.py:make"}
    assert guess("owner/name") == {"transformers": "owner/name"}
    with pytest.raises((SourceError, UsageError)):
        guess(str(made().sentences))


def test_a_pooler_without_weights_is_left_out(tmp_path):
    model = save_encoder(tmp_path / "other", seed=1)
    (model / "modules.json").unlink()
    source = from_directory(model)
    assert source.outputs["main"] == ("last_hidden_state",)
