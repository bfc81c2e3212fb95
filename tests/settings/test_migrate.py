"""Settings of other tools become recipes that compile, and each of their keys is answered for."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from peer_settings import (
    CALIBRATION,
    DYNAMIC,
    INT8,
    MIXED,
    MODES,
    OFF,
    ORT_CONFIG,
    PER_MODEL,
    WORKFLOW,
)

from effc import recipe
from effc.settings import run
from kit import cli, made, save_encoder, write_sentences


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a model and sentences, where the command runs."""
    save_encoder(tmp_path / "tiny")
    write_sentences(tmp_path / "sentences.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def places():
    return {"model": str(made().model), "calib": str(made().sentences)}


def written(place: Path, settings, name="settings.json") -> Path:
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (place / name).write_text(text, encoding="utf-8")
    return place / name


def passes(found):
    return yaml.safe_load(found.text).get("passes")


def told(found, key):
    return [n for n in found.notes if any(k == key or k.startswith(f"{key}.") for k in n.keys)]


def leaves(value, path=""):
    """Paths of everything in settings that is no mapping; lists of mappings by number."""
    if isinstance(value, dict) and value:
        return [p for k, v in value.items() for p in leaves(v, f"{path}.{k}" if path else str(k))]
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return [p for n, v in enumerate(value) for p in leaves(v, f"{path}[{n}]")]
    return [path]


ALL = {
    "optimum static": (ORT_CONFIG, {}),
    "optimum dynamic": (DYNAMIC, {}),
    "optimum with a calibration": ({**ORT_CONFIG, "calibration": CALIBRATION}, {}),
    "optimum, a quantization alone": (ORT_CONFIG["quantization"], {}),
    "modelopt int8": (INT8, {"target": "ort"}),
    "modelopt mixed": (MIXED, {"target": "ort"}),
    "olive": (WORKFLOW, {}),
    **{f"transformers.js {m}": (MODES, {"mode": m}) for m in ("fp16", "q8", "int8", "uint8", "q4", "q4f16")},
    "transformers.js version 2": (PER_MODEL, {}),
}  # fmt: skip


@pytest.mark.parametrize("title", ALL)
def test_every_key_is_answered_for_and_the_recipe_is_one(title, tmp_path, places):
    settings, options = ALL[title]
    found = run.migrate(written(tmp_path, settings), **places, **options)
    assert found.kind == title.split()[0].rstrip(",")
    values = yaml.safe_load(settings) if isinstance(settings, str) else settings
    keys = {key for note in found.notes for key in note.keys}
    for leaf in leaves(values):
        above = [leaf]
        while "." in above[-1]:
            above.append(above[-1].rpartition(".")[0])
        is_inside = any(key.startswith(f"{leaf}.") for key in keys)
        assert is_inside or any(p in keys for p in above), f"{leaf} is answered for by nobody"
    assert all(note.became for note in found.notes)
    jsonschema.validate(yaml.safe_load(found.text), recipe.schema())
    assert all(
        line.startswith("# ")
        for line in found.text.partition("calib:")[0].splitlines()
        if ":" in line
    )
    for note in found.lost:
        assert f"# not carried over: {run._line(note)}" in found.text


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (ORT_CONFIG, {}),
        (MIXED, {"target": "ort"}),
        (WORKFLOW, {}),
        (MODES, {"mode": "q4"}),
    ],
    ids=["optimum", "modelopt", "olive", "transformers.js"],
)
def test_what_comes_out_is_compiled(settings, options, here):
    words = [w for k, v in options.items() for w in (f"--{k}", v)]
    named = () if settings is WORKFLOW else ("--model", "tiny", "--calib", "sentences.txt")
    ran = cli("migrate-config", written(here, settings), "-o", "recipe.yaml", *named, *words)
    assert ran.code == 0, ran.err
    assert "not carried over" in ran.out and "recipe.yaml is ready" in ran.out
    ran = cli("compile", "recipe.yaml", "-o", "OUT", "--no-bench", "--set", "gate=false")
    assert ran.code == 0, ran.err
    engine = json.loads((here / "OUT" / "manifest.json").read_text())["engines"][0]
    report = json.loads((here / "OUT" / "report.json").read_text())
    quantised = sum(p["sites"] for p in report["manifest"]["passes"] if p["name"] == "quantize")
    assert quantised > 0 and engine["target"] == "ort"


def test_what_a_static_config_of_optimum_asks_for(tmp_path, places):
    found = run.migrate(written(tmp_path, {**ORT_CONFIG, "calibration": CALIBRATION}), **places)
    exclude = {"exclude": ["encoder.layer.0.output.dense"]}
    assert passes(found) == [
        {
            "pass": "quantize",
            "bits": 8,
            "range": "percentile",
            "percentile": 99.999,
            "select": exclude,
        }
    ]
    assert yaml.safe_load(found.text)["calib"]["samples"] == 20
    lost = {key for note in found.lost for key in note.keys}
    assert {"quantization.nodes_to_exclude", "calibration.dataset_name"} <= lost
    (name,) = (n.became for n in found.lost if n.keys == ("quantization.nodes_to_exclude",))
    assert "MatMul_12" in name and "/encoder" not in name


def test_dynamic_ranges_become_those_of_rows(tmp_path, places):
    found = run.migrate(written(tmp_path, DYNAMIC), model=places["model"])
    assert passes(found) == [{"pass": "quantize", "bits": 8, "activation_scale": "token"}]
    assert any("a convolution has no rows" in n.became for n in found.lost)
    on_openvino = run.migrate(written(tmp_path, DYNAMIC), **places, target="openvino")
    assert "activation_scale" not in passes(on_openvino)[0]
    assert any("measured on samples" in n.became for n in on_openvino.lost)


def test_what_optimum_writes_for_tensorrt_goes_there(tmp_path, places):
    section = {
        **ORT_CONFIG["quantization"],
        "qdq_add_pair_to_weight": True,
        "qdq_dedicated_pair": True,
    }
    section |= {"activations_dtype": "QInt8", "activations_symmetric": True}
    found = run.migrate(written(tmp_path, {**ORT_CONFIG, "quantization": section}), **places)
    assert yaml.safe_load(found.text)["targets"] == ["tensorrt"]
    assert not [n for n in found.lost if "activations" in n.keys[0]]


def test_formats_of_modules_are_passes_of_their_own(tmp_path, places):
    found = run.migrate(written(tmp_path, MIXED, "r.yaml"), **places, target="ort")
    ops = ["linear", "conv1d", "conv2d"]
    out = ["encoder.layer.1", "encoder.layer.1.*"]
    common = {"pass": "quantize", "ops": ops, "rounding": "gptq", "activation_bits": 16}
    assert passes(found) == [
        {**common, "bits": 8, "select": {"module": ["*attention*"], "exclude": out}},
        {**common, "bits": 4, "group": 16, "select": {"exclude": out}},
    ]


def test_the_older_mapping_of_quantisers_is_read_as_the_list_is(tmp_path, places):
    old = {
        "quant_cfg": {
            "*weight_quantizer": {"num_bits": 8, "axis": 0},
            "*input_quantizer": {"num_bits": 8, "axis": None},
            "*lm_head*": {"enable": False},
            "nn.BatchNorm1d": {"*": {"enable": False}},
            "default": {"enable": False},
        },
        "algorithm": "max",
    }
    new = run.migrate(written(tmp_path, INT8), **places)
    assert passes(run.migrate(written(tmp_path, old), **places)) == passes(new)


def test_a_cache_of_integers_is_carried_over_where_there_is_one(tmp_path, places):
    cfg = [*INT8["quant_cfg"], {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8}}]
    found = run.migrate(written(tmp_path, {**INT8, "quant_cfg": cfg}), **places, target="ort")
    assert passes(found)[0] == {"pass": "quantize-cache"}
    cfg[-1]["cfg"]["num_bits"] = "e4m3"
    found = run.migrate(written(tmp_path, {**INT8, "quant_cfg": cfg}), **places, target="ort")
    assert [p["pass"] for p in passes(found)] == ["quantize"]
    assert any("cache of keys and values" in n.became for n in found.lost)


@pytest.mark.parametrize(
    ("cfg", "why"),
    [
        (
            {"num_bits": "e2m1", "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": "e4m3"}},
            "no numbers of e2m1",
        ),
        ({"num_bits": 16}, "no numbers of 16"),
        ([{"num_bits": 4}, {"num_bits": "e4m3"}], "one after the other"),
        ({"num_bits": 8, "block_sizes": {-1: 128, -2: 128}}, "along the last axis alone"),
    ],
)
def test_formats_that_effc_has_not_are_refused_and_not_left_in_float(cfg, why, tmp_path, places):
    entries = [OFF, {"quantizer_name": "*weight_quantizer", "cfg": cfg}]
    with pytest.raises(recipe.RecipeError, match=why) as error:
        run.migrate(
            written(tmp_path, yaml.safe_dump({"quant_cfg": entries, "algorithm": "max"}), "r.yaml"),
            **places,
        )
    assert "doctor" in error.value.hint


def test_a_workflow_names_its_model_and_its_samples(here):
    found = run.migrate(written(here, WORKFLOW))
    data = yaml.safe_load(found.text)
    assert data["source"] == {"transformers": "tiny"} and data["targets"] == ["ort"]
    assert data["calib"] == {"file": "sentences.txt", "samples": 12, "batch": 4, "max_length": 64}
    assert data["passes"] == [
        {"pass": "smooth"},
        {"pass": "quantize", "bits": 8, "range": "minmax"},
    ]
    lost = {key for note in found.lost for key in note.keys}
    assert {
        "passes.tuning.type", "engine.search_strategy", "evaluators", "data_configs[1].user_script",
        "passes.quantization.config.extra_options.MatMulConstBOnly",
    } <= lost  # fmt: skip


LINEAR = {"ops": ["linear"]}
AWQ = {"bits": 4, "group": 16, "weight_symmetric": False}


def no(*modules):
    return {"select": {"exclude": [*modules]}}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {"type": "GptqQuantizer", "group_size": 32, "sym": True, "lm_head": True},
            [{"bits": 4, "group": 32, "rounding": "gptq", **LINEAR}],
        ),
        ({"type": "Rtn", "bits": 8, "group_size": -1, "sym": True}, [{"bits": 8, **LINEAR, **no("lm_head")}]),
        (
            {"type": "AutoAWQQuantizer", "q_group_size": 16, "modules_to_not_convert": ["pooler"]},
            [
                {"pass": "awq", **AWQ, **no("*pooler*", "lm_head")},
                {**AWQ, **LINEAR, **no("*pooler*", "lm_head")},
            ],
        ),
        (
            {"type": "OnnxHqqQuantization", "block_size": 32},
            [{"bits": 4, "group": 32, "weight_symmetric": False, "weight_range": "mse"}],
        ),
        ({"type": "ModelBuilder", "precision": "int4", "int4_block_size": 64}, [{"bits": 4, "group": 64, **LINEAR}]),
    ],
    ids=lambda v: v["type"] if isinstance(v, dict) else "",
)  # fmt: skip
def test_weights_alone_as_olive_says_them(entry, expected, tmp_path, places):
    workflow = {
        "input_model": {"type": "HfModel", "model_path": "hub/name"},
        "passes": {"q": entry},
    }
    found = run.migrate(written(tmp_path, workflow), **places)
    whole = [
        p if "pass" in p else {"pass": "quantize", "activation_bits": 16, **p} for p in expected
    ]
    assert passes(found) == whole


def test_an_execution_provider_says_the_target(tmp_path, places):
    for provider, target in (
        ("OpenVINOExecutionProvider", "openvino"), ("NvTensorRTRTXExecutionProvider", "tensorrt"),
        ("QNNExecutionProvider", "onnx"),
    ):  # fmt: skip
        accelerators = [{"execution_providers": [provider]}]
        systems = {"s": {"type": "LocalSystem", "config": {"accelerators": accelerators}}}
        settings = {
            "input_model": {"type": "HfModel", "model_path": "x"},
            "systems": systems,
            "target": "s",
        }
        found = run.migrate(written(tmp_path, settings), **places)
        assert yaml.safe_load(found.text)["targets"] == [target]
        assert ("QNNExecutionProvider" in str(found.lost)) == (target == "onnx")


def test_a_mode_of_transformers_js_is_one_recipe(tmp_path, places):
    file = written(tmp_path, {**MODES, "block_size": 64})
    q4 = run.migrate(file, **places, mode="q4f16", target="onnx")
    assert passes(q4) == [
        {"pass": "quantize", "bits": 4, "activation_bits": 16, "group": 64, "ops": ["linear"]},
        {"pass": "mixed-precision", "dtype": "fp16"},
    ]
    on_ort = run.migrate(file, **places, mode="q4f16")
    assert passes(on_ort) == passes(q4)[:1] and ("mixed-precision",) in {
        n.keys for n in on_ort.lost
    }
    level = run.migrate(written(tmp_path, {**MODES, "accuracy_level": 1}), **places, mode="q4")
    assert any("accuracy_level" in n.keys for n in level.lost)
    alone = run.migrate(written(tmp_path, {**MODES, "modes": ["q8"]}), **places)
    assert not alone.lost


def test_the_recipe_on_stdout_is_nothing_but_a_recipe(here):
    ran = cli("migrate-config", written(here, WORKFLOW), "-o", "-")
    assert ran.code == 0 and recipe.parse(ran.out).targets == ("ort",)
    assert "not carried over" in ran.err


def test_paths_hold_where_the_recipe_lies(here):
    (here / "deep").mkdir()
    ran = cli("migrate-config", written(here, WORKFLOW), "-o", "deep/r.yaml", "--json", "r.json")
    assert ran.code == 0, ran.err
    made_ = recipe.read(Path("deep/r.yaml"))
    assert made_.source.transformers == str(here / "tiny")
    found = json.loads((here / "r.json").read_text())
    assert found["kind"] == "olive" and any(note["is_lost"] for note in found["notes"])
