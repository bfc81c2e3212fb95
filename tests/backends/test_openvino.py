"""The openvino target: layers in integers, the cache of compiled models, and processors that lack something."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from graphs import Attention, Call, Projections, batches, distance, lower, normal, quantize
from torch import nn

import effc
from effc import cache
from effc.backends import BACKENDS
from effc.backends.dialect import OPENVINO
from effc.backends.openvino import OpenVino, OpenVinoEngine, config
from effc.backends.options import OpenVinoOptions
from effc.errors import BackendUnavailable, LoweringError, UsageError
from effc.machine import cpu_features
from effc.passes import PASSES
from kit import assert_letter, cli, int8, made, process

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _plain_processor(monkeypatch):
    """What is tested is the same everywhere; one test asks for more."""
    monkeypatch.setenv("EFFC_CPU", "avx2")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def traced(module, *shape):
    x = normal(*shape)
    if isinstance(module, nn.Sequential):
        module = Call(lambda self, x: self.body(x), body=module)
    return effc.trace(module.eval(), {"x": x}, dims={"x": {0: "batch"}})


def quantised(module, *shape):
    program = traced(module, *shape)
    record = quantize(program, batches("x", *shape), dialect=OPENVINO)
    return program, record


def run(lowered, **feeds):
    with OpenVino().open(lowered, threads=1) as engine:
        return engine(feeds)


def test_a_float_graph_is_exact(tmp_path):
    program = traced(Attention(), 2, 6, 32)
    lowered = lower(program, tmp_path, "openvino")
    x = normal(3, 6, 32, seed=1)
    assert lowered.options == {"precision": "f32", "hint": "latency"}
    assert lowered.is_float
    wanted = program.run({"x": x})
    found = run(lowered, x=x.numpy())
    assert wanted.keys() == found.keys()
    assert all(distance(wanted[name], found[name]) < 1e-5 for name in wanted)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Projections(), (2, 4, 8)),
        (nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)), (4, 16)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (2, 3, 12, 12)),
    ],
    ids=["projections", "perceptron", "convolutions"],
)
def test_layers_run_in_integers_and_agree_with_the_graph(module, shape, tmp_path):
    program, _ = quantised(module, *shape)
    lowered = lower(program, tmp_path, "openvino")
    assert lowered.sites and all(site.int8 for site in lowered.sites)
    x = normal(*shape, seed=5)
    wanted = program.run({"x": x})
    found = run(lowered, x=x.numpy())
    for name, value in wanted.items():
        assert distance(value, found[name]) < 0.02


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_alone_in_4_bit_stay_so_in_the_compiled_model(symmetric, tmp_path):
    """Activations are rounded as it runs unless asked not to be; the manifest has it."""
    program = traced(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16)), 4, 64)
    quantize(
        program, dialect=OPENVINO, bits=4, activation_bits=16, group=32, weight_symmetric=symmetric
    )
    x, found = normal(4, 64, seed=3), {}
    (wanted,) = program.run({"x": x}).values()
    for products in ("int8", "float"):
        asked = OpenVinoOptions(products=products, precision="f32")
        lowered = OpenVino(asked).lower(program.only(), tmp_path / products)
        assert [(site.kernel, site.int8) for site in lowered.sites] == [
            ("FullyConnected i4", True)
        ] * 2
        assert lowered.options["products"] == products
        found[products] = distance(wanted, next(iter(run(lowered, x=x.numpy()).values())))
    assert found["float"] < 1e-5
    assert found["float"] <= found["int8"] < 0.02


def test_an_embedding_is_looked_up_as_integers(tmp_path):
    table = Call(lambda self, x: self.table(x), table=nn.Embedding(50, 16))
    ids = torch.arange(6).reshape(2, 3)
    program = effc.trace(table.eval(), {"x": ids}, dims={"x": {0: "batch"}})
    quantize(program, None, dialect=OPENVINO)
    lowered = lower(program, tmp_path, "openvino")
    assert [(site.op, site.int8) for site in lowered.sites] == [("embedding", True)]


def test_activations_use_every_code_so_that_no_node_cuts_them(tmp_path):
    program, record = quantised(nn.Sequential(nn.Linear(16, 8)), 4, 16)
    (decided,) = record.decisions.values()
    assert decided[1] == 0
    lowered = lower(program, tmp_path, "openvino")
    import onnx

    assert "Clip" not in [n.op_type for n in onnx.load(lowered.path).graph.node]


def test_neighbouring_products_never_overflow_where_signed_codes_are_shifted():
    """With all activations at their largest, a sum of two products of shifted codes stays within 16 bit."""
    program = traced(nn.Sequential(nn.Linear(64, 16)), 4, 64)
    quantize(program, batches("x", 4, 64), dialect=OPENVINO)
    (weight,) = [t for n, t in program.only().tensors().items() if n.endswith("_int8")]
    pairs = weight.to(torch.int32).unflatten(1, (-1, 2))
    sums = torch.maximum(pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1))
    assert int(sums.max()) * 255 < 2**15


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    lowered = lower(traced(nn.Sequential(nn.Linear(16, 8)), 2, 16), tmp_path, "openvino")
    with pytest.raises(LoweringError, match="cannot run"):
        run(lowered, x=np.zeros((2, 5), np.float32))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"nothing")
    with pytest.raises(LoweringError, match=r"openvino refuses model\.onnx"):
        OpenVinoEngine(file)


def test_an_interrupt_after_engines_were_opened_and_closed_can_be_caught(tmp_path):
    """The stack that signals are taken on is still there; where it is not, the process is killed without a word."""
    paths = [
        lower(traced(nn.Sequential(nn.Linear(16, n)), 2, 16), tmp_path / str(n), "openvino").path
        for n in (4, 8)
    ]
    program = f"""
import faulthandler, gc, os, pathlib, signal
faulthandler.enable()
from effc.backends.openvino import OpenVinoEngine
for _ in range(2):
    kept = [OpenVinoEngine(pathlib.Path(path)) for path in {list(map(str, paths))!r}]
    while kept:
        kept.pop(0).close()
        gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("caught")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "caught\n"), ran.stderr


# The cache of compiled models


def test_a_compiled_model_is_taken_from_the_cache(kept, tmp_path, monkeypatch):
    lowered = lower(traced(nn.Sequential(nn.Linear(16, 8)), 2, 16), tmp_path, "openvino")
    x = normal(2, 16).numpy()
    first = run(lowered, x=x)
    entries = list(kept.glob("entries/*/*/blob"))
    assert len(entries) == 1
    import openvino

    monkeypatch.setattr(openvino.Core, "compile_model", None)
    again = run(lowered, x=x)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_damaged_compiled_model_is_made_anew(kept, tmp_path):
    lowered = lower(traced(nn.Sequential(nn.Linear(16, 8)), 2, 16), tmp_path, "openvino")
    x = normal(2, 16).numpy()
    first = run(lowered, x=x)
    (blob,) = kept.glob("entries/*/*/blob")
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 255
    blob.write_bytes(content)
    again = run(lowered, x=x)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert cache.check(kept) == []


def test_another_processor_compiles_for_itself(kept, tmp_path, monkeypatch):
    lowered = lower(traced(nn.Sequential(nn.Linear(16, 8)), 2, 16), tmp_path, "openvino")
    x = normal(2, 16).numpy()
    run(lowered, x=x)
    monkeypatch.setenv("EFFC_CPU", "avx2,avx512f")
    run(lowered, x=x)
    assert len(list(kept.glob("entries/*/*/blob"))) == 2


# What a recipe may ask for


def test_throughput_leaves_the_streams_to_the_runtime(tmp_path):
    asked = OpenVinoOptions(hint="throughput")
    program = traced(nn.Sequential(nn.Linear(16, 8)), 2, 16)
    lowered = OpenVino(asked).lower(program.only(), tmp_path)
    assert lowered.options == {"precision": "f32", "hint": "throughput"}
    assert config(lowered.options, None) == {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    x = normal(2, 16)
    (wanted,), (found,) = program.run({"x": x}).values(), run(lowered, x=x.numpy()).values()
    assert distance(wanted, found) < 1e-5


def test_float_can_be_asked_for_where_the_processor_has_bfloat16(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFC_CPU", "avx2,avx512f,avx512_bf16")
    program, _ = quantised(nn.Sequential(nn.Linear(16, 8)), 4, 16)
    exact = OpenVino(OpenVinoOptions(precision="f32")).lower(program.only(), tmp_path / "f32")
    assert exact.options["precision"] == "f32"
    assert OpenVino()._options(program.only(), is_quantised=True)["precision"] == "bf16"


@pytest.mark.slow
def test_bfloat16_asked_for_without_it_is_refused_with_nothing_written(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
source: {{transformers: {made().model}}}
passes: [{{pass: quantize, activation_bits: 16}}]
targets: [{{openvino: {{precision: bf16}}}}]
bench: false
""")
    ran = cli("compile", recipe, "-o", tmp_path / "OUT")
    assert_letter(ran, "BackendUnavailable", BackendUnavailable.exit_code)
    assert "bfloat16" in ran.err
    assert not (tmp_path / "OUT").exists()


# Processors


def test_bfloat16_beside_integers_where_the_processor_has_it(monkeypatch):
    from effc.backends.openvino import precision

    assert precision(True) == "f32"
    monkeypatch.setenv("EFFC_CPU", "avx2,avx512f,avx512_bf16")
    assert precision(True) == "bf16"
    assert precision(False) == "f32"
    assert config({"precision": "bf16"}, 2) == {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": 2,
    }


def test_an_engine_in_bfloat16_is_refused_where_the_processor_has_none(tmp_path):
    lowered = lower(traced(nn.Sequential(nn.Linear(16, 8)), 2, 16), tmp_path, "openvino")
    with pytest.raises(BackendUnavailable, match="this processor has none of avx512_bf16"):
        OpenVinoEngine(lowered.path, {"precision": "bf16"})


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("EFFC_CPU", "avx2,avx512_vni")
    with pytest.raises(UsageError, match="did you mean 'avx512_vnni'"):
        cpu_features()


def test_without_openvino_the_line_that_installs_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "effc.backends.openvino")
    monkeypatch.setitem(BACKENDS._words, "openvino", "effc.backends.openvino:OpenVino")
    with pytest.raises(BackendUnavailable, match="needs openvino") as caught:
        BACKENDS["openvino"]
    assert "pip install 'effc[openvino]'" in str(caught.value)


# Packages


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A package with an engine for each of two targets."""
    out = tmp_path_factory.mktemp("both") / "OUT"
    found = made()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFC_CPU", "avx2")
        ran = cli(
            "compile", found.model, "-o", out, *int8(found), "--target", "ort",
            "--target", "openvino", "--no-bench",
        )  # fmt: skip
    assert ran.code == 0, ran.err
    return out


@pytest.mark.slow
def test_a_package_of_two_targets_holds_both(both):
    manifest = json.loads((both / "manifest.json").read_text())
    assert [(e["target"], e["path"]) for e in manifest["engines"]] == [
        ("ort", "ort/model.onnx"),
        ("openvino", "openvino/model.onnx"),
    ]
    assert [e["options"] for e in manifest["engines"]] == [
        {},
        {"precision": "f32", "hint": "latency"},
    ]
    assert manifest["engines"][1]["requires"][0].startswith("openvino>=")
    report = json.loads((both / "report.json").read_text())
    assert set(report["others"]) == {"openvino"}


@pytest.mark.slow
def test_it_loads_with_plain_openvino(both, tmp_path):
    script = f"""
import json, numpy as np, openvino
entry = json.load(open({str(both / "manifest.json")!r}))["engines"][1]
model = openvino.Core().compile_model({str(both)!r} + "/" + entry["path"], "CPU",
    {{"INFERENCE_PRECISION_HINT": entry["options"]["precision"]}})
ids = np.array([[1, 2, 3]])
feeds = {{p["name"]: np.ones_like(ids) for p in entry["inputs"]}} | {{"input_ids": ids}}
assert np.isfinite(model(feeds)[0]).all()
import sys; assert "effc" not in sys.modules
"""
    file = tmp_path / "plain.py"
    file.write_text(script)
    import subprocess

    subprocess.run([sys.executable, str(file)], check=True)


def _documented():
    """The loader of docs/deploy.md."""
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs/deploy.md").read_text()
    code = (
        text.partition("<!-- run by tests/backends/test_openvino.py")[2]
        .partition("```python\n")[2]
        .partition("```")[0]
    )
    found = {}
    exec(code, found)
    return found


@pytest.mark.slow
def test_the_documented_loader_takes_the_fastest_that_is_installed(both, monkeypatch):
    found = _documented()
    feeds = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.ones((1, 3), np.int64)}
    names = {
        p["name"] for p in json.loads((both / "manifest.json").read_text())["engines"][0]["inputs"]
    }
    feeds = {name: feeds.get(name, np.zeros((1, 3), np.int64)) for name in names}
    target, run = found["fastest"](both, feeds, threads=1, runs=3)
    assert target in ("ort", "openvino")
    assert all(np.isfinite(value).all() for value in run(feeds).values())
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert found["fastest"](both, feeds, threads=1, runs=1)[0] == "ort"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match="no runtime"):
        found["fastest"](both, feeds, threads=1, runs=1)


@pytest.mark.slow
def test_verify_and_bench_take_either_engine(both):
    ran = cli("verify", both, "--model", made().model)
    assert ran.code == 0, ran.err
    assert "openvino: " in ran.out
    ran = cli(
        "bench", both, "--model", made().model, "--target", "openvino", "--shapes", "1x4",
        "--budget", "0.5",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "1x4" in ran.out


@pytest.mark.slow
def test_a_package_in_bfloat16_is_refused_on_a_processor_without(both, tmp_path):
    """Moved from a processor with bfloat16 to one without: what is missing is named."""
    import shutil

    from effc import package

    moved = tmp_path / "OUT"
    shutil.copytree(both, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["engines"][1]["options"]["precision"] = "bf16"
    (moved / "manifest.json").write_text(package.sealed(manifest))
    ran = process("verify", moved, "--model", made().model, env={"EFFC_CPU": "avx2"})
    assert_letter(ran, "BackendUnavailable", 9, "bfloat16")


@pytest.mark.slow
def test_passes_know_the_dialect():
    pass_ = PASSES["quantize"]().resolve(OPENVINO)
    assert (pass_.activation_signed, pass_.activation_symmetric) == (True, True)
    assert not pass_.conv_output and not pass_.conv_bias_int32
