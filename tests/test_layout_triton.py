"""A repository for Triton: its configs are read by tritonclient's messages, its models answer as the package does."""

import json
import shutil

import numpy as np
import pytest
import repository
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import saved as of_family
from transformers import BertConfig, BertForSequenceClassification

import effc
from effc import intuition, layout, package, recipe
from effc.chain import Chain
from effc.engine import lowered
from effc.prototext import Word, prototext
from effc.source import load
from kit import (
    WORDS,
    assert_letter,
    cli,
    content,
    embeddings,
    forge,
    leftovers,
    made,
    save_encoder,
    save_tokenizer,
    write_factories,
    write_sentences,
)

NAME = "triton"


@pytest.fixture
def own(tmp_path):
    """A copy of the tiny encoder's package that may be harmed."""
    return shutil.copytree(made().out, tmp_path / "own")


FIXED = """

def fixed():
    import effc

    module, inputs = perceptron()
    return effc.Source(modules={"main": module}, inputs={"main": inputs}, dims={"main": {}})
"""


def net(place, factory, *targets):
    """A package of a perceptron; that of `fixed` takes two rows, neither more nor fewer."""
    file = write_factories(place / "factories.py")
    file.write_text(file.read_text(encoding="utf-8") + FIXED, encoding="utf-8")
    source = {"python": f"{file}:{factory}"}
    asked = {"source": source, "targets": list(targets), "bench": False, "gate": False}
    effc.compile(recipe.build(asked), place / "net")
    return place / "net"


def feeds(batch=2, length=5):
    """Tokens of an encoder, the last row padded."""
    ids = np.arange(2, 2 + batch * length).reshape(batch, length) % 40
    mask = np.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def test_an_encoder_is_served_in_batches_and_answers_as_its_engine(tmp_path):
    ran = cli("package", made().out, "--layout", NAME, "-o", tmp_path / "r", "--name", "tiny")
    assert ran.code == 0, ran.err
    assert set(content(tmp_path / "r")) == {
        "tiny/config.pbtxt", "tiny/1/model.onnx", "README.md", "LICENSE",
    }  # fmt: skip
    server = repository.Server(tmp_path / "r")
    found = server.configs["tiny"]
    assert (found.name, found.backend, found.max_batch_size) == ("tiny", "onnxruntime", 8)
    assert found.HasField("dynamic_batching")
    assert [list(port.dims) for port in found.output] == [[-1, 32]]
    assert [repository.kind(port) for port in found.input] == ["TYPE_INT64"] * 3
    (group,) = found.instance_group
    assert group.Kind.Name(group.kind) == "KIND_CPU"
    assert "onnxruntime>=1.32" in (tmp_path / "r" / "tiny" / "config.pbtxt").read_text()
    with effc.Engine.open(made().out, threads=1) as engine:
        expected = engine(feeds())["last_hidden_state"]
    np.testing.assert_array_equal(server("tiny", feeds())["last_hidden_state"], expected)
    assert leftovers(tmp_path) == []


def test_a_fixed_batch_stands_in_the_sizes(tmp_path):
    fixed = net(tmp_path, "fixed", "ort")
    layout.write(fixed, NAME, tmp_path / "r")
    server = repository.Server(tmp_path / "r")
    (found,) = server.configs.values()
    assert found.max_batch_size == 0
    assert not found.HasField("dynamic_batching")
    assert (list(found.input[0].dims), list(found.output[0].dims)) == ([2, 8], [2, 4])
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    with effc.Engine.open(fixed, "ort", threads=1) as engine:
        (expected,) = engine({found.input[0].name: x}).values()
    (answer,) = server(found.name, {found.input[0].name: x}).values()
    np.testing.assert_array_equal(answer, expected)


def test_two_targets_are_two_models(tmp_path):
    pytest.importorskip("openvino")
    asked = recipe.build({
        "source": {"transformers": str(made().model)}, "targets": ["ort", {"openvino": {"precision": "f32"}}],
        "bench": False, "gate": False,
    })  # fmt: skip
    effc.compile(asked, tmp_path / "out")
    ran = cli("package", tmp_path / "out", "--layout", NAME, "-o", tmp_path / "r")
    assert ran.code == 0, ran.err
    server = repository.Server(tmp_path / "r")
    assert set(server.configs) == {"tiny_ort", "tiny_openvino"}
    assert {"model.xml", "model.bin"} <= {p.name for p in tmp_path.glob("r/tiny_openvino/1/*")}
    found = server.configs["tiny_openvino"]
    assert found.max_batch_size == 0 and [list(p.dims) for p in found.output] == [[-1, -1, 32]]
    assert {k: v.string_value for k, v in found.parameters.items()} == {
        "PERFORMANCE_HINT": "LATENCY"
    }
    assert "takes bf16" in (tmp_path / "r" / "tiny_openvino" / "config.pbtxt").read_text()
    asked = ("--layout", NAME, "-o", tmp_path / "one", "--target")
    ran = cli("package", tmp_path / "out", *asked, "tensorrt")
    assert_letter(ran, "UsageError", 2, "has no engine for 'tensorrt'", "it has openvino, ort")
    assert cli("package", tmp_path / "out", *asked, "ort").code == 0
    assert [p.name for p in (tmp_path / "one").iterdir() if p.is_dir()] == ["tiny"]
    for target in ("ort", "openvino"):
        with effc.Engine.open(tmp_path / "out", target, threads=1) as engine:
            expected = engine(feeds())["last_hidden_state"]
        answer = server(f"tiny_{target}", feeds())["last_hidden_state"]
        np.testing.assert_allclose(answer, expected, atol=0 if target == "ort" else 1e-6)


def test_bf16_is_asked_for_in_the_words_of_the_backend(own, tmp_path):
    def change(manifest):
        (entry,) = manifest["engines"]
        entry.update(target="openvino", options={"precision": "bf16", "hint": "throughput"})

    pytest.importorskip("openvino")
    forge(own, "manifest.json", change)
    layout.write(own, NAME, tmp_path / "r")
    found = repository.config(tmp_path / "r", "tiny")
    assert {k: v.string_value for k, v in found.parameters.items()} == {
        "PERFORMANCE_HINT": "THROUGHPUT", "HINT_BF16": "YES",
    }  # fmt: skip


# Several roles


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A classifier that is told what a text is about by an engine of its own."""
    place = tmp_path_factory.mktemp("chain")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=160, num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(place / "classifier")
    save_tokenizer(place / "classifier")
    encoder = load({"transformers": str(save_encoder(place / "encoder", seed=2))})
    prompts = write_sentences(place / "prompts.txt").read_text(encoding="utf-8").splitlines()
    intuition.fit(embeddings(encoder, prompts), 4, embedder="encoder").write(
        place / "c.safetensors"
    )
    asked = recipe.build({
        "source": {
            "transformers": str(place / "classifier"), "intuition": str(place / "c.safetensors"),
            "embedder": str(place / "encoder"),
        },
        "passes": [{"pass": "attach-rank1", "sizes": [2, 2], "gates": "intuition"}], "bench": False, "gate": False,
    })  # fmt: skip
    effc.compile(asked, place / "OUT")
    return place / "OUT"


@pytest.mark.slow
def test_roles_that_give_each_other_something_are_an_ensemble(chain, tmp_path):
    ran = cli("package", chain, "--layout", NAME, "-o", tmp_path / "r", "--name", "told")
    assert ran.code == 0, ran.err
    server = repository.Server(tmp_path / "r")
    assert set(server.configs) == {"told", "told_main", "told_intuition"}
    found = server.configs["told"]
    assert found.platform == "ensemble" and found.max_batch_size == 8
    assert [step.model_name for step in found.ensemble_scheduling.step] == [
        "told_intuition", "told_main",
    ]  # fmt: skip
    assert list((tmp_path / "r" / "told" / "1").iterdir()) == []
    texts = ["the cat sat on the mat", "rain"]
    with Chain.open(chain, threads=1) as opened:
        expected = opened(texts)
        tokens = opened._processor.encode(texts)
    asked = {port.name for port in found.input}
    more = {name for name in asked if name.startswith("intuition.")}
    assert {name.removeprefix("intuition.") for name in more} <= tokens.keys()
    request = {name: tokens[name.removeprefix("intuition.")] for name in asked}
    answer = server("told", request)
    np.testing.assert_allclose(answer["logits"], expected["logits"], atol=1e-6)
    np.testing.assert_allclose(answer["intuition.intuition"], expected["intuition"], atol=1e-6)


@pytest.mark.slow
def test_every_role_is_a_component_of_a_model_package(chain, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", "1.32")
    layout.write(chain, "ort-model-package", tmp_path / "p")
    found = onnxruntime.ModelPackageContext(str(tmp_path / "p"))
    assert sorted(found.get_component_names()) == ["intuition", "main"]
    beside = {"assets/intuition/tokenizer.json", "assets/intuition/centroids.safetensors"}
    assert beside < set(content(tmp_path / "p"))
    options = onnxruntime.ModelPackageOptions(onnxruntime.SessionOptions())
    for role in ("intuition", "main"):
        session = found.select_component(role, options).create_session()
        with effc.Engine.open(chain, role, threads=1) as engine:
            assert [p.name for p in session.get_inputs()] == [p.name for p in engine.inputs]


@pytest.mark.slow
def test_what_goes_on_with_its_own_cache_stands_side_by_side(tmp_path):
    source = {"transformers": str(of_family(tmp_path / "lm")), "roles": ["prefill", "decode"]}
    effc.compile(recipe.build({"source": source, "bench": False, "gate": False}), tmp_path / "out")
    layout.write(tmp_path / "out", NAME, tmp_path / "r")
    server = repository.Server(tmp_path / "r")
    assert set(server.configs) == {"lm_prefill", "lm_decode"}
    for name, found in server.configs.items():
        assert found.max_batch_size == 0  # logits_to_keep is no row of the batch
        assert "no ensemble repeats" in (tmp_path / "r" / name / "config.pbtxt").read_text()
    given = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    given |= {"position_ids": np.arange(3)[None], "logits_to_keep": np.array([2])}
    for port in server.configs["lm_prefill"].input:
        if port.name.startswith("past_key_values"):
            _, heads, _, size = port.dims
            given[port.name] = np.zeros((1, heads, 0, size), np.float32)
    with effc.Engine.open(tmp_path / "out", "prefill", threads=1) as engine:
        expected = engine(given)
    answer = server("lm_prefill", given)
    np.testing.assert_array_equal(answer["logits"], expected["logits"])


# TensorRT


def test_an_engine_of_another_library_is_refused_and_a_plan_is_taken(tmp_path):
    kit = net(tmp_path, "perceptron", {"tensorrt": {"build": "kit"}})
    ran = cli("package", kit, "--layout", NAME, "-o", tmp_path / "r")
    assert_letter(ran, "UsageError", 2, "is a kit", "plans of enterprise TensorRT", "--plan")
    assert not (tmp_path / "r").exists()
    (tmp_path / "no.plan").write_bytes(b"PK\x03\x04")
    asked = ("--layout", NAME, "-o", tmp_path / "r", "--plan")
    ran = cli("package", kit, *asked, tmp_path / "no.plan")
    assert_letter(ran, "PackageError", 12, "is no plan of TensorRT")
    ran = cli("package", kit, *asked, tmp_path / "absent.plan")
    assert_letter(ran, "PackageError", 12, "cannot be read")
    assert not (tmp_path / "r").exists() and leftovers(tmp_path) == []
    (tmp_path / "model.plan").write_bytes(b"ftrt and what trtexec wrote")
    ran = cli("package", kit, *asked, tmp_path / "model.plan")
    assert ran.code == 0, ran.err
    found = repository.config(tmp_path / "r", "perceptron")
    assert (found.backend, found.default_model_filename) == ("tensorrt", "model.plan")
    (group,) = found.instance_group
    assert group.Kind.Name(group.kind) == "KIND_GPU"
    profile = lowered(kit, package.read(kit).engines[0]).profile
    assert found.max_batch_size == profile["batch"][2] > 8
    plan = tmp_path / "r" / "perceptron" / "1" / "model.plan"
    assert plan.read_bytes() == (tmp_path / "model.plan").read_bytes()


def test_a_plan_for_anything_else_is_refused(tmp_path):
    (tmp_path / "model.plan").write_bytes(b"ftrt")
    for word, part in (
        (NAME, "for one engine, for tensorrt"),
        ("transformers.js", "are for --layout"),
    ):
        ran = cli(
            "package", made().out, "--layout", word, "-o", tmp_path / "r", "--plan", tmp_path / "model.plan",
        )  # fmt: skip
        assert_letter(ran, "UsageError", 2, part)
    assert not (tmp_path / "r").exists()


# Names and damage


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", ".hidden", "x" * 65, "a b", "é", "-x"])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name):
    ran = cli("package", made().out, "--layout", NAME, "-o", tmp_path / "r", f"--name={name}")
    assert_letter(ran, "UsageError", 2, "is no name that Triton")
    assert not (tmp_path / "r").exists() and leftovers(tmp_path) == []


def test_names_in_a_forged_manifest_lead_nowhere(own, tmp_path):
    forge(own, "manifest.json", lambda m: m["source"].update(name="../../evil\n name"))
    layout.write(own, NAME, tmp_path / "r")
    assert {p.name for p in (tmp_path / "r").iterdir() if p.is_dir()} == {"evil_name"}
    forge(own, "manifest.json", lambda m: m["engines"][0].update(role="../up"))
    for word in (NAME, "ort-model-package"):
        ran = cli("package", own, "--layout", word, "-o", tmp_path / "x")
        assert ran.code == 12, ran.err
        assert not (tmp_path / "x").exists() and not (tmp_path / "up").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda e: e["inputs"][0].update(dtype="int4"), "Triton has no type for"),
        (lambda e: e.update(target="eager"), "knows no target"),
        (lambda e: (e.update(target="openvino"), e["inputs"][0].update(shape=[])), "without a dimension"),
    ],
)  # fmt: skip
def test_what_no_backend_serves_is_refused(own, tmp_path, change, part):
    forge(own, "manifest.json", lambda m: change(m["engines"][0]))
    ran = cli("package", own, "--layout", NAME, "-o", tmp_path / "x")
    assert ran.code in (2, 12) and part in ran.err, ran.err
    assert not (tmp_path / "x").exists()


def test_a_damaged_package_and_a_full_place_are_refused(own, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    ran = cli("package", own, "--layout", NAME, "-o", tmp_path / "full")
    assert_letter(ran, "PackageError", 12, "is not empty")
    assert set(content(tmp_path / "full")) == {"mine"}
    with (own / "model.onnx").open("r+b") as stream:
        stream.truncate(100)
    for word in (NAME, "ort-model-package", "sentence-transformers"):
        ran = cli("package", own, "--layout", word, "-o", tmp_path / "x")
        assert_letter(ran, "VerifyError", 10, "model.onnx differs")
    assert not (tmp_path / "x").exists() and leftovers(tmp_path) == []


# Sizes and text


def port(shape, name="x"):
    from effc.backends.base import Port

    return Port(name=name, dtype="float32", shape=tuple(shape))


@pytest.mark.parametrize(
    ("shapes", "most"),
    [
        ([("batch", 3), ("batch",)], 8),
        ([("batch", 3), ("kept",)], 0),
        ([("batch", 3), ()], 0),
        ([("batch", "batch")], 0),
        ([("batch", "past + batch")], 0),
        ([(2, 3), (2, 1)], 0),
        ([("batch", 3), (1, 3)], 0),
    ],
)
def test_a_batch_is_a_size_that_all_ports_begin_with(shapes, most):
    from effc import layout_triton

    entry = package.EngineEntry(
        role="main", target="ort", path="model.onnx", sha256="0" * 64, inputs=tuple(map(port, shapes)),
        outputs=(), opset=21,
    )  # fmt: skip
    assert layout_triton._most(made().out, entry) == most


def test_a_port_without_sizes_has_one_on_the_wire():
    from effc import layout_triton

    for shape, most in (((), 0), (("batch",), 8)):
        text = prototext({"name": "m", "input": [layout_triton._port(port(shape), most)]})
        (found,) = repository.parsed(text).input
        assert list(found.dims) == [1] and found.HasField("reshape")
        assert list(found.reshape.shape) == []


@settings(max_examples=40)
@given(st.text(max_size=30).filter(lambda t: t.isprintable() or True))
def test_any_text_comes_back_from_the_text_form(text):
    if any("\ud800" <= c <= "\udfff" for c in text):
        return
    written = prototext({
        "name": text, "max_batch_size": 3,
        "instance_group": [{"kind": Word("KIND_CPU")}, {"count": 2}],
        "parameters": [{"key": "k", "value": {"string_value": text}}],
    })  # fmt: skip
    found = repository.parsed(written)
    assert found.name == text == found.parameters["k"].string_value
    assert [group.count for group in found.instance_group] == [0, 2]


def test_the_json_of_the_command_names_the_files(tmp_path):
    ran = cli("package", made().out, "--layout", NAME, "-o", tmp_path / "r", "--json", "-")
    assert "tiny/config.pbtxt" in json.loads(ran.out)["files"]
