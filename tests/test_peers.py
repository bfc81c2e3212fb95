"""Which tool for a model and a place: every line of the table answers, and what it rests on is held to be so."""

import json
import typing
from pathlib import Path

import pytest
from planted_onnx import FAULTS
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

import effc
from effc import peers, recipe
from effc.backends import TARGETS
from effc.errors import EffcError, RecipeError, SourceError, UsageError
from effc.passes.quantize import Quantize
from effc.passes.tune import Tune
from effc.peers import LM, Facts
from kit import assert_letter, cli, made

ROOT = Path(__file__).resolve().parent.parent


def tools(found):
    return [peer.tool for peer in found]


@pytest.mark.parametrize(
    ("facts", "target", "expected"),
    [
        (Facts(), "ort", []),
        (Facts(has_convs=True), "ort", []),
        (Facts(has_convs=True), "openvino", [peers.NNCF]),
        (Facts(kind=LM), "ort", [peers.CHAT, peers.SERVING]),
        (Facts(kind=LM), "tensorrt", [peers.SERVING, peers.MODELOPT, peers.NO_GPU_RUN]),
        (Facts(kind="diffusion", has_convs=True), "tensorrt", [peers.DIFFUSION, peers.MODELOPT, peers.NO_GPU_RUN]),
        (Facts(kind="diffusion", has_convs=True), "openvino", []),
        (Facts(is_quantised=True, kind=LM), "ort", [peers.QUANTISED]),
        (Facts(has_two_parts=True), "ort", [peers.TWO_PARTS]),
    ],
)  # fmt: skip
def test_every_case_answers(facts, target, expected):
    assert peers.advice(facts, target) == expected


def test_a_model_that_does_not_fit_into_memory_is_told_by_this_machines(monkeypatch):
    monkeypatch.setattr(peers, "_memory", lambda: 10**9)
    (one,) = peers.advice(Facts(float_bytes=2 * 10**9), "ort")
    assert "2 GB of the 1 GB" in one.why
    assert peers.advice(Facts(float_bytes=10**9), "ort") == []


def test_places_are_none_of_effcs_targets_and_every_one_answers():
    assert not {*peers.PLACES} & {*TARGETS}
    for word in peers.PLACES:
        found = peers.answer(None, word)
        assert found["effc"] is None and found["elsewhere"]
        with pytest.raises(RecipeError) as error:
            recipe.build({"source": {"transformers": "x"}, "targets": [word]})
        assert error.value.hint == peers.hint(word)
    for word in TARGETS:
        assert peers.hint(word) is None and f"--target {word}" in peers.answer(None, word)["effc"]
    with pytest.raises(UsageError, match="nobody here knows"):
        peers.answer(None, "abacus")


def test_what_the_table_says_of_effc_is_so():
    """A line whose reason has gone must go too."""
    hints = typing.get_type_hints(Quantize, include_extras=False)
    assert typing.get_args(hints["dtype"]) == ("int", "fp8")
    assert typing.get_args(hints["bits"]) == (3, 4, 5, 6, 7, 8)
    assert not {"bits", "quantize", "qat"} & {*typing.get_type_hints(Tune)}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "none has been run yet" in readme
    assert "nothing is said yet of what 8 bit costs them" in readme
    measured = json.loads((ROOT / "benchmarks/results/peers-resnet50-avx2.json").read_text())
    for shape in measured["shapes"]:
        nncf, own = shape["against"]["nncf int8"], shape["against"]["effc openvino"]
        assert nncf["ratio"] <= own["ratio"]
    made_in = measured["made"]
    assert made_in["nncf int8"]["seconds"] < made_in["effc, both, gated"]["seconds"]
    assert made_in["nncf int8"]["peak_mb"] < made_in["effc, both, gated"]["peak_mb"]
    decoder = json.loads((ROOT / "benchmarks/results/decoder-avx512_vnni.json").read_text())
    assert decoder["quality"]["decode"]["drop"] > 0.1


def test_a_directory_is_read_by_its_settings_alone(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "lm")  # fmt: skip
    found = peers.facts_of(str(tmp_path / "lm"))
    size = (tmp_path / "lm" / "model.safetensors").stat().st_size
    assert found.kind == LM and found.float_bytes == size
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    assert peers.facts_of(str(tmp_path / "lm")).is_quantised
    with pytest.raises(SourceError, match="quantised already"):
        effc.compile(str(tmp_path / "lm"), tmp_path / "OUT")
    assert peers.facts_of(str(made().model)) == Facts(
        float_bytes=(made().model / "model.safetensors").stat().st_size
    )


def test_an_encoder_with_a_decoder_is_refused_as_the_table_says(tmp_path):
    config = BartConfig(
        vocab_size=16, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    ran = cli("doctor", "--model", tmp_path / "bart", "--for", "ort", "--json", tmp_path / "d.json")
    assert ran.code == 0 and "effc does not serve ort" in ran.out and "optimum" in ran.out
    found = json.loads((tmp_path / "d.json").read_text())["answer"]
    assert found["effc"] is None and found["elsewhere"][0]["rests_on"]
    with pytest.raises(SourceError, match="an encoder with a decoder"):
        effc.compile(str(tmp_path / "bart"), tmp_path / "OUT")


def test_doctor_says_which_tool(tmp_path):
    ran = cli("doctor")
    assert "gguf, llama.cpp" in ran.out and "effc doctor --for" in ran.out
    ran = cli("doctor", "--for", "GGUF")
    assert ran.code == 0 and "elsewhere  llama.cpp: chats from one GGUF file" in ran.out
    ran = cli("doctor", "--model", made().model, "--for", "ort")
    assert f"answer     effc compile {made().model} -o OUT --target ort" in ran.out
    assert "elsewhere" not in ran.out
    assert_letter(
        cli("doctor", "--model", made().model), "UsageError", 2, "--model goes with --for"
    )
    assert_letter(cli("doctor", "--for", "abacus"), "UsageError", 2, "abacus", "one of onnx")
    assert_letter(cli("doctor", "--for", "ort", "--model", tmp_path), "SourceError", 4)


def test_lint_says_it_of_a_file_that_loses_something(tmp_path):
    file = FAULTS["int8 and a bias, fixed sizes"].build().save(tmp_path / "m.onnx")
    ran = cli("lint", file, "--json", tmp_path / "l.json")
    assert ran.code == 15 and "elsewhere  the tool that quantised it" in ran.out
    (one,) = json.loads((tmp_path / "l.json").read_text())["runs"]
    assert one["elsewhere"] == [peers.QUANTISED.to_json()]
    assert_letter(cli("lint", file, "--target", "coreml"), "UsageError", 2, "coremltools")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": [7]}', '{"architectures": {}}'])
def test_settings_that_are_none_are_refused_or_say_nothing(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    try:
        found = peers.facts_of(str(tmp_path))
    except EffcError as error:
        hint = error.hint
        found = None
    assert hint if found is None else found.kind == ""
