"""Where models come from: a directory with its own head, a factory, and never the network or code in a directory."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from effc.calib.data import Record
from effc.errors import SourceError, UsageError
from effc.source import Source, copied_files, directory_digest, from_directory, guess, load
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
    for name in ("mine.py", "pytorch_model.bin", "vocab.txt", "NOTICE.txt", "training.log",
                 "tokenizer.py", "vocab.pkl", "vocab", "tokenizer.bin", "LICENSE.exe"):  # fmt: skip
        (model / name).write_text("x", encoding="utf-8")
    assert copied_files(model) == [
        "1_Pooling/config.json", "LICENSE", "NOTICE.txt", "README.md", "config.json", "modules.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip


def test_a_link_out_of_the_directory_does_not_travel(model, tmp_path):
    (tmp_path / "secret.txt").write_text("mine", encoding="utf-8")
    (model / "real.txt").write_text("ours", encoding="utf-8")
    (model / "vocab.txt").symlink_to("real.txt")
    assert "vocab.txt" in copied_files(model)
    (model / "merges.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(SourceError, match=r"merges\.txt is a link out of the model directory"):
        copied_files(model)


def snapshot(cache: Path, model: Path) -> Path:
    """A directory as the hub's cache has it: links to blobs, of the model or of the whole cache."""
    home = cache / "models--owner--tiny-bert"
    place = home / "snapshots" / "0123abcd"
    shared = cache / "blobs" / "7f"
    shared.mkdir(parents=True)
    (home / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(f for f in model.rglob("*") if f.is_file())):
        blob = home / "blobs" / str(number)
        shutil.copy(file, shared / str(number))
        blob.symlink_to(shared / str(number))
        (place / file.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
        (place / file.relative_to(model)).symlink_to(blob)
    return place


def test_a_snapshot_of_the_hub_has_the_name_of_the_model_and_all_its_files(model, tmp_path):
    place = snapshot(tmp_path / "hub", model)
    source = from_directory(place)
    assert source.name == "tiny-bert"
    assert source.files == tuple(copied_files(model))


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


@pytest.mark.slow
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


def test_a_mistyped_directory_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, caplog):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "bert").mkdir(parents=True)
    with pytest.raises(SourceError, match="no directory models/brt") as caught:
        load(guess("models/brt"))
    assert caught.value.hint == "did you mean models/bert?"
    assert asked == [] and caplog.messages == []
    with pytest.raises(SourceError):
        load(guess("owner/name"))
    assert asked == ["owner/name"]
    assert caplog.messages == ["there is no directory owner/name: looking for it on the hub"]


# Weights that are missing, outputs that are not there


def test_a_pooler_without_weights_is_left_out(tmp_path):
    model = save_encoder(tmp_path / "other", seed=1)
    (model / "modules.json").unlink()
    source = from_directory(model)
    assert source.outputs["main"] == ("last_hidden_state",)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def headed(place: Path, kind: str) -> Path:
    """A model directory of a class, whose weights of a pooler are left out."""
    import transformers
    from safetensors.torch import load_file, save_file

    made = getattr(transformers, kind)
    made(made.config_class(**SIZES)).save_pretrained(place)
    weights = load_file(place / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(kept, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize(
    "kind",
    ["BertForSequenceClassification", "DebertaV2ForSequenceClassification", "BertForNextSentencePrediction"],
)  # fmt: skip
def test_a_head_that_reads_a_pooler_without_weights_is_refused(tmp_path, kind):
    with pytest.raises(SourceError, match=f"lacks weights that {kind} needs: .*pooler"):
        from_directory(headed(tmp_path / "model", kind))


def test_a_sentence_encoder_is_read_without_the_head_that_it_was_trained_with(tmp_path):
    model = headed(tmp_path / "model", "BertForMaskedLM")
    assert from_directory(model).outputs == {}
    (model / "modules.json").write_text("[]", encoding="utf-8")
    source = from_directory(model)
    assert source.outputs == {"main": ("last_hidden_state",)}
    assert source.kind == "encoder"
    assert type(source.module).__name__ == "BertModel"


# What a factory may return


def returned(tmp_path: Path, code: str) -> Source:
    file = tmp_path / "mine.py"
    head = "import effc, numpy, torch\nfrom torch import nn\nm = nn.Linear(4, 2)\nx = torch.ones(2, 4)\n"
    file.write_text(f"{head}def make():\n    return {code}\n", encoding="utf-8")
    return load({"python": f"{file}:make"})


def source_of(**parts: str) -> str:
    fields = {"modules": "{'main': m}", "inputs": "{'main': {'input': x}}"} | parts
    return f"effc.Source({', '.join(f'{name}={value}' for name, value in fields.items())})"


@pytest.mark.parametrize(
    "code",
    [
        "(m, x)",
        "(m, [x])",
        "(m, {'input': numpy.ones((2, 4), 'float32')})",
        source_of(inputs="{'main': x.requires_grad_()}"),
        source_of(inputs="{'main': (x,)}", dims="{'main': {'input': {0: 'batch'}}}"),
    ],
)
def test_inputs_of_a_factory_become_tensors_by_name(tmp_path, code):
    inputs = returned(tmp_path, code).inputs["main"]
    assert list(inputs) == ["input"]
    assert inputs["input"].numpy().tolist() == [[1] * 4] * 2


@pytest.mark.parametrize(
    ("code", "match", "hint"),
    [
        (source_of(modules="m"), "modules is a Linear", "main"),
        (source_of(modules="{'main': 3}"), "modules is {'main': int}", "main"),
        (source_of(inputs="{'input': x}"), r"inputs is {'input': Tensor}, not one mapping for each role \(main\)",
         'inputs={"main": {name: tensor}}'),
        (source_of(inputs="x"), "inputs is a Tensor", "main"),
        ("(m, {'input': 3})", "input 'input' is a int, not a tensor", "tensor"),
        ("(m, {'x': x})", "forward of Linear does not take these inputs: missing", "input"),
        ("(m, (x, x))", "forward takes 1 inputs but 2 examples", None),
        ("(m, {'input': x.half()})", "input 'input' is float16, and targets take float32", "float()"),
        ("(nn.Linear(4, 2).bfloat16(), x)", "weight is bfloat16, and targets take float32", "float()"),
        ("(nn.Linear(4, 2, device='meta'), x)", "weight is on meta", "cpu()"),
        (source_of(dims="{'main': {'inputs': {0: 'batch'}}}"), "unknown input 'inputs'; did you mean 'input'", "dims"),
        (source_of(dims="{'input': {0: 'batch'}}"), "dims: unknown role 'input'", "dims"),
        (source_of(dims="{'main': {'input': {2: 'batch'}}}"), r"shape \[2, 4\], and no axis 2", "dims"),
        (source_of(dims="{'main': {'input': {0: 1}}}"), "1 is no name of a dimension", "dims"),
        (source_of(dims="{'main': {'input': ['batch']}}"), "dims of 'input' is a list", "dims"),
        (source_of(outputs="{'main': 'logits'}"), "outputs of 'main' is 'logits', not names", "outputs"),
        (source_of(outputs="('logits',)"), "outputs is a tuple", "outputs"),
        (source_of(batches="[]"), "batches is a list", "function"),
        (source_of(metric="'sts:pairs.csv'"), "metric is 'sts:pairs.csv', not a metric", "--metric"),
    ],
)  # fmt: skip
def test_a_source_of_another_form_is_refused_at_the_door(tmp_path, code, match, hint):
    with pytest.raises(SourceError, match=match) as caught:
        returned(tmp_path, code)
    assert caught.value.where == f"what {tmp_path / 'mine.py'}:make returned"
    assert hint is None or hint in caught.value.hint


# A directory that is a trap


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "odd"]
)
def test_a_pipe_or_a_device_in_a_model_directory_is_not_opened(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(SourceError, match=f"{name} is not a plain file"):
        from_directory(model)
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    with pytest.raises(SourceError, match=f"{name} is not a plain file"):
        from_directory(model)


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 70 + "]" * 70, '{"a": "\\ud800"}', "\udc80"])
def test_settings_that_are_no_plain_json_are_refused(model, text):
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SourceError, match=r"config\.json"):
        from_directory(model)


def in_two_files(model: Path, name: object) -> None:
    """Weights that an index says lie in a file of that name."""
    whole = model / "model-00001-of-00001.safetensors"
    (model / "model.safetensors").rename(whole)
    index = {"metadata": {}, "weight_map": {"a": whole.name, "b": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../secret.safetensors", "is refused as the name of a file"),
        ("/etc/passwd", "is refused as the name of a file"),
        ("C:\\a.safetensors", "is refused as the name of a file"),
        ("nowhere.safetensors", "'nowhere.safetensors', which is not there"),
        (3, "no `weight_map` of file names"),
    ],
)
def test_an_index_of_weights_leads_nowhere_else(model, name, said):
    (model.parent / "secret.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    in_two_files(model, name)
    with pytest.raises(SourceError, match=said):
        from_directory(model)


def test_weights_that_are_a_link_to_nowhere_are_refused(model):
    (model / "more.safetensors").symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"more\.safetensors cannot be read"):
        from_directory(model)


@pytest.mark.parametrize("key", ["type_vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", ["a", -1, 2.5, 10**30, [], True])
def test_a_setting_that_is_no_number_is_one_clear_error(model, key, value):
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**settings, key: value}), encoding="utf-8")
    with pytest.raises(SourceError) as found:
        from_directory(model)
    assert found.value.hint


def test_a_tokenizer_that_panics_or_fails_is_one_clear_error(monkeypatch):
    class Panic(BaseException):
        pass

    Panic.__name__ = "PanicException"
    processor = from_directory(made().model).processor
    for error in (Panic("at the disco"), ValueError("odd")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(type(processor), "tokenizer", property(lambda _, fail=fail: fail))
        with pytest.raises(SourceError, match="fails on 'the cat'"):
            processor._encoded(["the cat"], max_length=8)


def setting(model: Path, **changes: object) -> None:
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**settings, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attn_implementation": "owner/kernel"}, "asks for attn_implementation: owner/kernel"),
        ({"_attn_implementation": "flash_attention_2"}, "which is code from elsewhere"),
        ({"text_config": {"_experts_implementation": "owner/k"}}, "which is code from elsewhere"),
        ({"attn_implementation": {"": "owner/kernel"}}, "which is code from elsewhere"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000, and the weights have 37"),
        ({"text_config": {"depths": [1, 10**9]}}, "says depths: 1000000000"),
        ({"hidden_size": 10**9}, "other shapes than config.json says"),
    ],
)
def test_settings_that_ask_for_code_or_for_more_than_the_weights_are_refused(model, change, said):
    setting(model, **change)
    with pytest.raises(SourceError, match=said) as found:
        from_directory(model)
    assert found.value.hint


def test_attention_of_torch_itself_may_be_asked_for(model):
    setting(model, _attn_implementation="eager")
    assert from_directory(model).outputs["main"] == ("last_hidden_state",)


def test_an_adapter_is_no_model(model):
    (model / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SourceError, match="an adapter of another model"):
        from_directory(model)


def test_a_word_that_no_directory_can_have_is_one_that_is_not_there():
    for word in ("x" * 5000, "x/" + "y" * 5000, "a\0b"):
        with pytest.raises(SourceError):
            load(guess(word))


@pytest.mark.parametrize(
    "name", ["LICENSE-\x07", "LICENSE-a\nb", "LICENSE-", "LICENSE:x", "vocab .txt"]
)
def test_a_file_that_no_package_may_hold_is_told_before_any_work(model, name):
    taken = name in ("LICENSE-", "vocab .txt")
    (model / name).write_text("x", encoding="utf-8")
    if taken:
        assert name in copied_files(model)
        return
    with pytest.raises(SourceError, match="is refused as the name of a file"):
        copied_files(model)


def test_two_files_that_are_one_elsewhere_are_told_before_any_work(model):
    for name in ("NOTICE-a", "NOTICE-A"):
        (model / name).write_text("x", encoding="utf-8")
    with pytest.raises(SourceError, match="NOTICE-A and NOTICE-a"):
        copied_files(model)
