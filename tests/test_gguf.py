"""A GGUF file goes through as the model that is in it; what is none is refused."""

import json

import numpy as np
import pytest
import torch
from test_generate import saved

from effc.errors import SourceError
from effc.source import guess, load
from kit import assert_letter, cli, content

gguf = pytest.importorskip("gguf")

SIZE, HEADS, WORDS = 32, 4, 64


def written(place):
    """A tiny Llama as GGUF, with the model it was written from."""
    from safetensors.torch import load_file

    model = saved(place / "model")
    weights = load_file(model / "model.safetensors")
    file = place / "tiny.gguf"
    out = gguf.GGUFWriter(str(file), "llama")
    out.add_context_length(96)
    out.add_embedding_length(SIZE)
    out.add_block_count(2)
    out.add_feed_forward_length(64)
    out.add_head_count(HEADS)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(WORDS)
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)
    words += ["t", "h", "th"]
    words += [f"<{n}>" for n in range(len(words), WORDS)]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words)
    out.add_token_types([1] * WORDS)
    out.add_token_merges(["t h"])
    out.add_bos_token_id(2)
    out.add_eos_token_id(3)
    out.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    out.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    for layer in range(2):
        for mine, theirs in names.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"].numpy()
            if mine in (
                "attn_q",
                "attn_k",
            ):  # GGUF has pairs side by side where transformers has halves
                heads = HEADS if mine == "attn_q" else 2
                weight = weight.reshape(heads, 2, -1, SIZE).swapaxes(1, 2).reshape(weight.shape)
            out.add_tensor(f"blk.{layer}.{mine}.weight", np.ascontiguousarray(weight))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file, model


@pytest.mark.slow
def test_it_is_the_model_that_is_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "cache"))
    file, model = written(tmp_path)
    assert guess(str(file)) == {"gguf": str(file)}
    found, wanted = load({"gguf": str(file)}), load({"transformers": str(model)})
    assert found.name == "tiny" and found.kind == "causal-lm"
    feeds = wanted.inputs["main"]
    with torch.no_grad():
        a, b = wanted.module(**feeds), found.module(**feeds)
    assert torch.allclose(a["logits"], b["logits"], rtol=1e-4, atol=1e-4)
    before = content(tmp_path / "cache")
    assert sum(name.endswith("model.safetensors") for name in before) == 1
    again = load({"gguf": str(file)})
    assert (again.digest, again.directory) == (found.digest, found.directory)
    assert content(tmp_path / "cache") == before  # read once


@pytest.mark.slow
def test_it_compiles_and_is_verified_by_its_name(tmp_path):
    file, _ = written(tmp_path)
    ran = cli("compile", file, "-o", tmp_path / "out", "--no-bench")
    assert ran.code == 0, ran.err
    assert cli("verify", tmp_path / "out", "--model", file).code == 0
    assert cli("verify", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("bytes_", [b"", b"GG", b"PK\x03\x04" * 100])
def test_what_is_no_gguf_is_refused(tmp_path, bytes_):
    file = tmp_path / "x.gguf"
    file.write_bytes(bytes_)
    with pytest.raises(SourceError, match="is no GGUF file"):
        load({"gguf": str(file)})


@pytest.mark.slow
@pytest.mark.parametrize("cut", [4, 40, 4000])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    file, _ = written(tmp_path)
    file.write_bytes(file.read_bytes()[:cut])
    assert_letter(cli("compile", file, "-o", tmp_path / "out"), "SourceError", 4, "tiny.gguf")
