"""Settings that are none, are nobody's, or mean harm: one error in words, nothing written, nothing run."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_settings import INT8, MODES, ORT_CONFIG, WORKFLOW

from effc.errors import EffcError, RecipeError, UsageError
from effc.settings import run
from kit import assert_letter, cli, made


def refused(place, text, name="s.json", **options):
    file = place / name
    file.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    before = sorted(p.name for p in place.iterdir())
    with pytest.raises(EffcError) as error:
        run.migrate(file, **{"model": str(made().model), "calib": str(made().sentences), **options})
    assert error.value.hint
    assert sorted(p.name for p in place.iterdir()) == before
    return error.value


DEEP = "[" * 100 + "]" * 100
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a mapping of settings"), ("[]", "not a mapping"), ("7", "not a mapping"), ("{}", "not a mapping"),
        ("{", "cannot be read"), ("a: [", "is not YAML"), ('{"quant_cfg": ' + DEEP + "}", "nested"),
        ("quant_cfg: " + DEEP, "nested"), ("a: " + "[" * 1200, "is not YAML"),
        ('{"is_static": true, "is_static": false, "format": "QDQ"}', "stands there twice"),
        ("quant_cfg: []\nquant_cfg: []", "second time"), ('{"quant_cfg": NaN}', "NaN is no number"),
        ("quant_cfg: !!python/object/apply:os.system [touch pwned]", "is not YAML"),
        ("quant_cfg: !!binary aGk=", "holds no binary"), (BOMB, "more than 10000 values"),
        ("quant_cfg: &x [*x]", "an alias that stands in itself"), ("x: 1\n---\ny: 2", "is not YAML"),
        ('{"quant_cfg": "' + "x" * 300_000 + '"}', "more than 262144 bytes"), ("\x00", "is not YAML"),
    ],
    ids=range(19),
)  # fmt: skip
def test_files_that_are_no_settings(text, why, tmp_path):
    found = refused(tmp_path, text)
    assert isinstance(found, RecipeError) and why in str(found)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "s.json").write_bytes(b"\xff\xfe{\x00")
    assert_letter(
        cli("migrate-config", tmp_path / "s.json", "-o", tmp_path / "r.yaml"),
        "RecipeError", 3, "not UTF-8",
    )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"is_static": "yes"}, "quantization.is_static: 'yes' is not true or false"),
        ({"weights_dtype": 8}, "quantization.weights_dtype: '8' is not text"),
        ({"per_channel": 1}, "per_channel: '1' is not true or false"),
        ({"nodes_to_exclude": "x"}, "nodes_to_exclude: 'x' is not a list"),
        ({"nodes_to_exclude": [1]}, "is not a list of texts"),
        ({"weights_dtype": "QInt16"}, "no weights of int16"),
        ({"operators_to_quantize": ["Add", "Relu"]}, "Add, Relu are not quantised"),
    ],
)
def test_values_of_the_wrong_kind_in_optimum(change, why, tmp_path):
    section = {**ORT_CONFIG["quantization"], **change}
    found = refused(tmp_path, {**ORT_CONFIG, "quantization": section})
    assert isinstance(found, RecipeError) and why in str(found)


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        ({"quant_cfg": 7}, {}, "quant_cfg: is no list"),
        ({"quant_cfg": ["x"]}, {}, "is not a mapping"),
        ({"quant_cfg": [{"quantizer_name": 7, "enable": False}]}, {}, "quantizer_name: '7' is not text"),
        ({"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": 7}]}, {}, "cfg: '7' is not a mapping"),
        (
            {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "block_sizes": {"-1": 0}}}]},
            {}, "no size",
        ),
        ({"quant_cfg": [{"$import": "configs/ptq/units/w4a4_nvfp4_nvfp4"}]}, {}, "no such format"),
        ({"metadata": {"recipe_type": "speculative_eagle"}, "eagle": {}}, {}, "not post-training"),
        ({**INT8, "algorithm": 7}, {}, "algorithm: '7' is no name"),
        ({"input_model": "x", "passes": {}}, {}, "input_model: 'x' is not a mapping"),
        ({**WORKFLOW, "passes": {"q": 1}}, {}, "passes.q: '1' is not a mapping"),
        ({**WORKFLOW, "passes": {"q": {"type": "IncStaticQuantization"}}}, {}, "effc has no such pass"),
        (MODES, {"mode": "bnb4"}, "no integers"),
        ({**MODES, "modes": []}, {}, "names none"),
        ({**MODES, "block_size": 0}, {"mode": "q4"}, "0 is no size"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind_elsewhere(text, options, why, tmp_path):
    found = refused(tmp_path, text, **options)
    assert isinstance(found, RecipeError) and why in str(found)


@pytest.mark.parametrize(
    ("text", "options", "why", "hint"),
    [
        ({"learning_rate": 1}, {}, "of none of", "--kind"),
        ({**ORT_CONFIG, **INT8}, {}, "of optimum and of modelopt", "--kind"),
        (INT8, {"kind": "onnx"}, "unknown --kind", "one of"),
        (INT8, {"target": "coreml"}, "unknown --target", "coremltools"),
        (MODES, {}, "7 modes", "--mode fp16"),
        (MODES, {"mode": "q2"}, "no mode 'q2'", "one of"),
        (ORT_CONFIG, {"model": None}, "names no model", "--model"),
        (WORKFLOW, {"model": None}, "names tiny, which is not here", "--model"),
        (ORT_CONFIG, {"calib": None}, "asks for quantize, which measures", "--calib"),
    ],
)
def test_calls_that_lack_something(text, options, why, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = refused(tmp_path, text, **options)
    assert isinstance(found, UsageError) and why in str(found) and hint in found.hint


def test_a_target_without_the_kernels_says_so(tmp_path):
    fp8 = [
        {"quantizer_name": f"*{side}_quantizer", "cfg": {"num_bits": [4, 3]}}
        for side in ("weight", "input")
    ]
    found = refused(tmp_path, {"quant_cfg": fp8, "algorithm": "max"}, target="ort")
    assert "no kernels for dtype fp8" in str(found)


def test_the_file_that_is_read_is_not_written_over(tmp_path):
    file = tmp_path / "s.json"
    file.write_text(json.dumps(ORT_CONFIG), encoding="utf-8")
    assert_letter(
        cli("migrate-config", file, "-o", file), "UsageError", 2, "is the file that is read"
    )
    assert json.loads(file.read_text()) == ORT_CONFIG
    assert_letter(cli("migrate-config", tmp_path / "none.json"), "RecipeError", 3, "none.json")


def test_a_name_with_lines_in_it_stays_a_comment(tmp_path):
    text = {**ORT_CONFIG, "evil\nplugins: [evil.py]": 1}
    file = tmp_path / "s.json"
    file.write_text(json.dumps(text), encoding="utf-8")
    found = run.migrate(file, kind="optimum", model=str(made().model), calib=str(made().sentences))
    assert "\nplugins" not in found.text and "evil" in found.text


KEYS = st.sampled_from(
    [
        *ORT_CONFIG,
        *ORT_CONFIG["quantization"],
        *INT8,
        *WORKFLOW,
        *MODES,
        "type",
        "config",
        "cfg",
        "quantizer_name",
        "x",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["q8", "*weight_quantizer"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(run.READERS)),
    values=st.dictionaries(KEYS, VALUES, min_size=1, max_size=6),
)
def test_any_settings_are_read_or_refused_in_words(kind, values, tmp_path_factory):
    file = tmp_path_factory.mktemp("any") / "s.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    try:
        found = run.migrate(file, kind=kind, model="x.py:f", calib="s.txt")
    except EffcError as error:
        hint = error.hint
        found = None
    if found is None:
        assert hint
        return
    assert found.text.startswith("# made by")
