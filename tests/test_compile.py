"""From a factory and an .npz to a package, by one call and from a recipe; and the same parts one by one."""

import dataclasses
import json
import shutil
import textwrap

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import yaml
from graphs import distance

import effc
from effc import recipe
from effc.backends.ort_rewrites import rewrite
from effc.errors import CalibrationError, LoweringError, SourceError, UsageError, VerifyError
from effc.passes.quantize import Quantize
from effc.passes.smooth import Smooth
from effc.source import load

MODEL = """
    import torch
    from torch import nn


    def build(seed=0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        return model, {"input": torch.randn(4, 32)}


    def broken():
        raise ValueError("no such weights")


    def not_a_number():
        model = nn.Linear(4, 4)
        model.weight.data[0, 0] = float("nan")
        return model, torch.randn(2, 4)


    def number():
        return 3


    class Sorter(nn.Module):
        def forward(self, x):
            return torch.linalg.svd(x)[1]


    def unsupported():
        return Sorter(), torch.randn(2, 4, 4)


    def fixed():
        import effc

        return effc.Source(
            modules={"main": nn.Linear(4, 2)}, inputs={"main": {"input": torch.randn(3, 4)}},
            dims={"main": {"input": {}}},
        )


    def pair():
        import effc

        inputs = {"input": torch.randn(2, 4)}
        return effc.Source(
            modules={"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, inputs={"a": inputs, "b": inputs},
        )


    def with_batches():
        import numpy as np
        import effc

        model, inputs = build()
        batch = effc.Batch(inputs={"input": np.random.default_rng(0).random((16, 32), np.float32)})
        return effc.Source(
            modules={"main": model}, inputs={"main": inputs}, batches=lambda: [batch],
        )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model file and calibration arrays."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "model.py").write_text(textwrap.dedent(MODEL), encoding="utf-8")
    rows = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    np.savez(folder / "rows.npz", input=rows)
    return folder


def compiled(place, out, **options):
    options = {"quantize": "int8", "calib": place / "rows.npz", "samples": 48, **options}
    return effc.compile(f"{place / 'model.py'}:build", out, bench=False, threads=1, **options)


@pytest.fixture(scope="module")
def result(place):
    return compiled(place, place / "OUT")


def test_the_engine_runs_in_plain_onnxruntime_and_agrees(place, result):
    session = onnxruntime.InferenceSession(str(result.out / "model.onnx"))
    x = np.load(place / "rows.npz")["input"]
    model = load({"python": f"{place / 'model.py'}:build"}).module
    with torch.no_grad():
        wanted = model(torch.from_numpy(x))
    (found,) = session.run(["output"], {"input": x})
    assert distance(wanted, found) < 0.03


def test_the_manifest_names_every_site_and_every_file(result):
    manifest = json.loads((result.out / "manifest.json").read_text(encoding="utf-8"))
    (engine,) = manifest["engines"]
    assert (engine["target"], engine["path"]) == ("ort", "model.onnx")
    assert (engine["int8_sites"], engine["total_sites"]) == (3, 3)
    assert engine["inputs"][0]["shape"] == ["batch", 32]
    on_disk = {p.relative_to(result.out).as_posix() for p in result.out.rglob("*") if p.is_file()}
    assert {"manifest.json", *manifest["files"], *manifest["unhashed"]} == on_disk
    assert not {"timings.json", "local.json"} & set(manifest["files"])
    assert manifest["data"]["name"] == "rows.npz"
    assert manifest == json.loads(json.dumps(result.report["manifest"]))


def test_the_report_says_what_was_done_and_how_far_it_moved(result):
    report = result.report
    assert {"passes", "sites", "verify", "bench", "metric", "model_bytes", "timings"} <= set(report)
    assert [p["name"] for p in report["passes"]][-1] == "quantize"
    assert all(site["int8"] for site in report["sites"])
    drifts = report["verify"]["ort"]
    assert {"calibration", "held out"} <= set(drifts)
    assert set(drifts["held out"]["output"]) >= {"max_abs", "rel_l2", "cosine"}
    assert 0 < drifts["held out"]["output"]["rel_l2"] < 0.03
    assert report["bench"] is None
    assert result.bench == {}
    json.dumps(report)


def test_compiling_twice_gives_the_same_bytes(place, result, tmp_path):
    again = compiled(place, tmp_path / "again")
    unhashed = set(again.report["manifest"]["unhashed"])
    for file in sorted(result.out.rglob("*")):
        name = file.relative_to(result.out).as_posix()
        if file.is_file() and name not in unhashed:
            assert (again.out / name).read_bytes() == file.read_bytes(), name


def test_recorded_decisions_give_the_same_model_without_measuring(place, result, tmp_path):
    decisions = json.loads((result.out / "decisions.json").read_text(encoding="utf-8"))
    other = tmp_path / "other.npz"
    np.savez(other, input=np.full((8, 32), 100, np.float32))
    again = compiled(place, tmp_path / "OUT", calib=other, decisions=decisions)
    assert (again.out / "model.onnx").read_bytes() == (result.out / "model.onnx").read_bytes()
    assert (again.out / "decisions.json").read_bytes() == (
        result.out / "decisions.json"
    ).read_bytes()


def test_decisions_of_another_model_are_refused(place, tmp_path):
    with pytest.raises(CalibrationError, match="recorded decisions say nothing"):
        compiled(place, tmp_path / "OUT", decisions={"0:smooth": {"main/elsewhere": []}})
    assert not (tmp_path / "OUT").exists()


def test_decisions_that_lack_a_step_are_refused(place, tmp_path):
    with pytest.raises(CalibrationError, match="know no step '0:smooth'"):
        compiled(place, tmp_path / "OUT", decisions={})


def test_a_replay_needs_no_data(place, result, tmp_path):
    decisions = json.loads((result.out / "decisions.json").read_text(encoding="utf-8"))
    again = compiled(place, tmp_path / "OUT", calib=None, decisions=decisions)
    assert (again.out / "model.onnx").read_bytes() == (result.out / "model.onnx").read_bytes()


def test_a_source_may_bring_its_own_batches(place, tmp_path):
    made = effc.compile(
        f"{place / 'model.py'}:with_batches", tmp_path / "OUT", quantize="int8", bench=False
    )
    assert made.report["verify"]["ort"]["calibration"]["output"]["n"] == 16


@pytest.mark.slow
def test_a_batch_that_is_fixed_is_verified_on_the_example(place, tmp_path):
    made = effc.compile(f"{place / 'model.py'}:fixed", tmp_path / "OUT", threads=1)
    assert list(made.report["verify"]["ort"]) == ["batch 3"]
    assert made.bench["outputs"]["output"]["n"] == 3
    assert [shape["batch"] for shape in made.bench["shapes"]] == [3]


def test_a_package_remembers_where_its_model_lay(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    out = tmp_path / "OUT"
    effc.compile("model.py:fixed", out, bench=False)
    remembered = json.loads((out / "local.json").read_text(encoding="utf-8"))
    assert remembered == {"source": {"python": f"{place / 'model.py'}:fixed"}}


def test_a_recipe_gives_what_the_flags_give(place, result, tmp_path):
    text = """
        source: {python: "model.py:build"}
        calib: {file: rows.npz, samples: 48}
        passes: [smooth, {pass: quantize, bits: 8, activation_bits: 8}]
        targets: [ort]
        bench: false
    """
    data = yaml.safe_load(textwrap.dedent(text))
    data["source"]["python"] = f"{place / 'model.py'}:build"
    data["calib"]["file"] = str(place / "rows.npz")
    made = effc.compile(recipe.build(data), tmp_path / "OUT")
    assert (made.out / "model.onnx").read_bytes() == (result.out / "model.onnx").read_bytes()
    travelled = recipe.read(made.out / "recipe.yaml")
    assert travelled.passes == (Smooth(), Quantize())
    assert str(place) not in (made.out / "recipe.yaml").read_text(encoding="utf-8")


def test_without_quantisation_the_engine_is_exact(place, tmp_path):
    made = compiled(place, tmp_path / "OUT", quantize="none", calib=None)
    (engine,) = made.report["manifest"]["engines"]
    assert engine["total_sites"] == 0
    drifts = made.report["verify"]["ort"].values()
    assert all(outputs["output"]["rel_l2"] < 1e-5 for outputs in drifts)


@pytest.mark.slow
def test_two_targets_lie_in_two_folders(place, tmp_path):
    made = compiled(place, tmp_path / "OUT", target=["ort", "onnx"])
    paths = [engine["path"] for engine in made.report["manifest"]["engines"]]
    assert paths == ["ort/model.onnx", "onnx/model.onnx"]
    assert set(made.report["verify"]) == {"ort", "onnx"}
    decisions = json.loads((made.out / "decisions.json").read_text(encoding="utf-8"))
    steps = ("0:smooth", "1:quantize")
    assert set(decisions) == {f"{target}/{step}" for target in ("ort", "onnx") for step in steps}
    assert made.report["model_bytes"] == (made.out / "ort" / "model.onnx").stat().st_size
    again = compiled(
        place, tmp_path / "again", target=["ort", "onnx"], calib=None, decisions=decisions
    )
    for path in paths:
        assert (again.out / path).read_bytes() == (made.out / path).read_bytes()


def test_a_factory_of_two_graphs_makes_two_engines(place, tmp_path):
    made = effc.compile(f"{place / 'model.py'}:pair", tmp_path / "OUT", bench=False)
    engines = made.report["manifest"]["engines"]
    assert [(e["role"], e["path"]) for e in engines] == [
        ("a", "a/model.onnx"),
        ("b", "b/model.onnx"),
    ]
    assert set(made.report["verify"]) == {"a/ort", "b/ort"}
    assert made.report["manifest"]["links"] == []


@pytest.mark.parametrize("words", ["w4a8", "w6a6", "w8a16", "w4a16"])
@pytest.mark.slow
def test_every_word_makes_an_engine(words, place, tmp_path):
    made = compiled(place, tmp_path / "OUT", quantize=words)
    (engine,) = made.report["manifest"]["engines"]
    assert (engine["int8_sites"], engine["total_sites"]) == (3, 3)


def test_a_wrong_lowering_does_not_hide_behind_quantisation(place, tmp_path, monkeypatch):
    def wrong(model, **options):
        rewrite(model, **options)
        for value in model.graph.initializers.values():
            if value.name.endswith("weight_scale"):
                value.const_value = ir.tensor(value.const_value.numpy() * 2, name=value.name)

    monkeypatch.setattr("effc.backends.ort.rewrite", wrong)
    with pytest.raises(VerifyError, match="from the graph that it was made of"):
        compiled(place, tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


def test_a_recipe_file_compiles_as_it_stands(place, tmp_path):
    text = f"source: {{python: '{place / 'model.py'}:build'}}\nbench: false\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    made = effc.compile(tmp_path / "recipe.yaml", tmp_path / "OUT")
    assert made.report["manifest"]["engines"][0]["total_sites"] == 0
    with pytest.raises(UsageError, match="a recipe says itself"):
        effc.compile(tmp_path / "recipe.yaml", tmp_path / "OUT", quantize="int8")


@pytest.mark.slow
def test_a_compile_leaves_the_model_and_torch_as_they_were(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    before = torch.get_num_threads()
    effc.compile(f"{place / 'model.py'}:build", tmp_path / "OUT", threads=before + 1)
    assert torch.get_num_threads() == before
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_engine_is_replaced_as_a_whole_or_not_at_all(place, result, tmp_path):
    shutil.copytree(result.out, tmp_path / "OUT")
    before = (tmp_path / "OUT" / "manifest.json").read_bytes()
    with pytest.raises(CalibrationError):
        compiled(place, tmp_path / "OUT", calib=tmp_path / "none.npz")
    assert (tmp_path / "OUT" / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["OUT"]
    compiled(place, tmp_path / "OUT", quantize="none", calib=None)
    assert (tmp_path / "OUT" / "manifest.json").read_bytes() != before


@pytest.mark.parametrize(
    ("word", "error", "words"),
    [
        ("bild", SourceError, "did you mean 'build'"),
        ("broken", SourceError, "failed: ValueError: no such weights"),
        ("not_a_number", SourceError, "not numbers: weight"),
        ("number", SourceError, "returned int"),
        ("unsupported", LoweringError, "cannot take 1 nodes of graph 'main'"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_leaves_nothing(word, error, words, place, tmp_path):
    with pytest.raises(error, match=words):
        effc.compile(f"{place / 'model.py'}:{word}", tmp_path / "OUT", bench=False)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_word_is_answered_with_the_nearest(place, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'int8'"):
        compiled(place, tmp_path / "OUT", quantize="int9")


def test_a_wrong_array_is_named(place, tmp_path):
    np.savez(tmp_path / "wrong.npz", inputs=np.zeros((4, 32), np.float32))
    with pytest.raises(CalibrationError, match="has no input 'input'") as caught:
        compiled(place, tmp_path / "OUT", calib=tmp_path / "wrong.npz")
    assert "it has inputs" in caught.value.hint


def test_the_same_parts_one_by_one():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    program = effc.trace(module, torch.randn(4, 8))
    data = [effc.Batch(inputs={"input": np.random.default_rng(0).random((16, 8), np.float32)})]
    pass_ = dataclasses.replace(
        Quantize(),
        activation_signed=False,
        activation_symmetric=False,
        select=effc.Select(module="0"),
    )
    record = effc.apply(pass_, program, data)
    assert record.sites == 1
    x = torch.from_numpy(data[0].inputs["input"])
    found = program.run(input=x)["output"]
    assert 0 < distance(module(x).detach(), found) < 0.02
    assert "quantize(%input" in effc.show(program)
