"""Text that an engine writes is what transformers writes, token by token; and bad prompts are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

import effc
from effc.causal import PAST, complete, positions
from effc.errors import UsageError
from effc.generate import Sampling, Texts, choose, tokens
from effc.source import load
from kit import assert_letter, cli, forge, plant, save_tokenizer

FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
    ),
}  # fmt: skip
PROMPTS = ("the cat sat on the mat and", "a bird", "it was warm then we saw them go home when rain")


def saved(place, family="llama", **changes):
    """A directory of a tiny random model of a family, with a tokenizer."""
    import transformers

    kind, config, more = FAMILIES[family]
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 96, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, kind)(
        getattr(transformers, config)(**{**sizes, **more, **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # so that tokens differ by more than rounding
    model.eval().save_pretrained(place)
    save_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """By family, its directory and its package; made when asked for."""
    made = {}

    def make(family):
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            effc.compile(saved(place / "model", family), place / "out", bench=False)
            made[family] = place
        return made[family]

    return make


def expected(place, prompts, count):
    """What transformers' `generate` gives, padded at the left."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model", padding_side="left")
    given = tokenizer(list(prompts), padding=True, return_tensors="pt")
    given.pop("token_type_ids", None)
    with torch.no_grad():
        found = model.generate(**given, max_new_tokens=count, do_sample=False, pad_token_id=0)
    rows = []
    for row in found[:, given["input_ids"].shape[1] :].tolist():
        rows.append(row[: row.index(3) + 1] if 3 in row else row)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(packages, family, tmp_path):
    place = packages(family)
    for prompts in (PROMPTS[:1], PROMPTS):
        words = [w for p in prompts for w in ("--prompt", p)]
        ran = cli("run", place / "out", *words, "--max-tokens", 24, "--json", tmp_path / "r.json")
        assert ran.code == 0, ran.err
        found = json.loads((tmp_path / "r.json").read_text())
        assert found["tokens"] == expected(place, prompts, 24)


@pytest.mark.slow
def test_the_ports_are_named_as_others_read_them(packages):
    manifest = json.loads((packages("llama") / "out" / "manifest.json").read_text())
    (engine,) = manifest["engines"]
    assert manifest["kind"] == "causal-lm"
    assert [p["name"] for p in engine["inputs"]][:5] == [
        "input_ids", "attention_mask", "position_ids", "logits_to_keep", f"{PAST}.0.key",
    ]  # fmt: skip
    assert engine["inputs"][4]["shape"] == ["batch", 2, "past", 8]
    assert engine["outputs"][1]["name"] == "present.0.key"


@pytest.mark.slow
def test_without_a_cache_no_text_is_written(tmp_path):
    place = saved(tmp_path / "model")
    recipe = {
        "source": {"transformers": str(place), "cache": False}, "targets": ["ort"], "bench": False,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert cli("compile", tmp_path / "r.yaml", "-o", tmp_path / "out").code == 0
    (engine,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["engines"]
    assert [p["name"] for p in engine["inputs"]] == ["input_ids", "attention_mask"]
    ran = cli("run", tmp_path / "out", "--prompt", "the cat")
    assert_letter(ran, "UsageError", 2, "without a cache of keys and values")
    assert cli("verify", tmp_path / "out", "--model", place).code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("there is no prompt",)),
        (("--prompt", ""), ("prompt 1 is empty",)),
        (("--prompt", "the", "--prompt", ""), ("prompt 2 is empty",)),
        (("--prompt", "the " * 95), ("tokens long, and the model takes 96",)),
        (("--prompt", "the", "--chat"), ("no chat template",)),
    ],
)
def test_bad_prompts_are_letters(packages, words, parts):
    ran = cli("run", packages("llama") / "out", *words)
    assert_letter(ran, "UsageError", 2, *parts)


@pytest.mark.slow
def test_prompts_of_a_file_and_what_a_run_took(packages, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\n\na bird\\nsang\n", encoding="utf-8")
    words = ("--max-tokens", 5, "--json", "-")
    ran = cli("run", packages("llama") / "out", "--prompts", file, *words)
    found = json.loads(ran.out)
    assert len(found["texts"]) == 2 and found["prompt_tokens"] == 4 + 5
    assert 2 <= found["new_tokens"] <= 10 and found["prefill_per_s"] > 0
    assert "a bird\nsang" in ran.err and "tokens read at" in ran.err


@pytest.mark.slow
def test_what_is_drawn_hangs_on_the_seed(packages):
    out = packages("llama") / "out"

    def text(*words):
        ran = cli("run", out, "--prompt", "the cat", "--temperature", 2, "--max-tokens", 20, *words)
        assert ran.code == 0
        return ran.out

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)


@pytest.mark.slow
def test_a_chat_template_is_put_around_a_prompt(packages, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(packages("llama") / "out", out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{{ 'then ' + m.content + ' and' }}{% endfor %}"
    )
    plant(out, "tokenizer_config.json", json.dumps(settings))
    chat = cli("run", out, "--prompt", "the cat", "--chat", "--json", "-", "--max-tokens", 8)
    plain = cli("run", out, "--prompt", "then the cat and", "--json", "-", "--max-tokens", 8)
    chat, plain = json.loads(chat.out), json.loads(plain.out)
    assert chat["prompt_tokens"] == 4  # the marks at both ends are the template's own
    assert plain["prompt_tokens"] == 6


@pytest.mark.slow
def test_the_tokenizer_of_another_model_is_refused(packages, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(packages("llama") / "out", out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["cat"] = 500
    plant(out, "tokenizer.json", json.dumps(tokenizer))
    ran = cli("run", out, "--prompt", "the cat")
    assert_letter(ran, "SourceError", 4, "token 500", "the model knows 64")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda e: e["outputs"][1].update(shape=["batch", 4, "past + sequence", 8]), "layer 0"),
        (lambda e: e["inputs"].pop(), "lacks layers"),
        (lambda e: e["inputs"][4].update(name="past_key_values.7.key"), "layer 0"),
    ],
)
def test_a_cache_of_another_model_is_refused(packages, tmp_path, change, part):
    out = tmp_path / "out"
    shutil.copytree(packages("llama") / "out", out)
    forge(out, "manifest.json", lambda m: change(m["engines"][0]))
    assert_letter(cli("run", out, "--prompt", "the cat"), "PackageError", 12, part)


@pytest.mark.slow
def test_an_interrupted_reply_ends_like_any_interrupted_command(packages, tmp_path):
    place = tmp_path
    effc.compile(
        saved(place / "model", "llama", max_position_embeddings=30000, eos_token_id=None),
        place / "out", bench=False,
    )  # fmt: skip
    words = ("run", place / "out", "--prompt", "the cat", "--max-tokens", 29000)
    running = subprocess.Popen(
        [sys.executable, "-m", "effc", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    assert running.stdout.read(20).startswith(b"the cat")  # it writes as it comes
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and b"Traceback" not in err


LEAN = """
import json, sys
from effc import cli
sys.argv = ["effc", "run", *sys.argv[1:]]
try:
    cli.main()
finally:
    print(json.dumps(sorted({"torch", "onnxscript", "scipy"} & sys.modules.keys())), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--chat",)])
def test_writing_loads_no_torch_and_writes_the_same(packages, tmp_path, words):
    out = tmp_path / "out"
    shutil.copytree(packages("llama") / "out", out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content + ' then' }}{% endfor %}"
    plant(out, "tokenizer_config.json", json.dumps(settings))
    words = ("--prompt", "the cat", "--max-tokens", "24", *words)
    command = [sys.executable, "-c", LEAN, str(out), *words, "--json", str(tmp_path / "lean.json")]
    lean = subprocess.run(command, capture_output=True, text=True)
    assert lean.returncode == 0, lean.stderr
    assert lean.stderr.splitlines()[-1] == "[]"
    assert "PyTorch" not in lean.stderr
    cli("run", out, *words, "--json", tmp_path / "full.json")  # torch is loaded in this process
    found, full = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("lean", "full"))
    assert (found["tokens"], found["texts"]) == (full["tokens"], full["texts"])


def test_transformers_is_left_alone_where_it_is_loaded():
    from effc import lean

    before = sys.modules["torch"]
    lean.without_torch()
    assert sys.modules["torch"] is before
    assert lean.QUIET not in os.environ


@pytest.mark.slow
def test_an_encoder_answers_a_text_with_its_outputs():
    from kit import made

    ran = cli("run", made().out, "--prompt", "the cat", "--json", "-")
    assert ran.code == 0, ran.err
    (answer,) = json.loads(ran.out)["outputs"]["last_hidden_state"]
    assert np.isfinite(answer).all() and len(answer) >= 2


def test_positions_do_not_count_padding():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert positions(mask, 1).tolist() == [[2], [4]]


def test_a_filled_cache_is_in_front_of_the_mask():
    feeds = {"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.ones((2, 3), np.int64)}
    found = complete(feeds, [(2, 4)], past=5)
    assert found["attention_mask"].shape == (2, 8)
    assert found["position_ids"].tolist() == [[5, 6, 7]] * 2
    assert found[f"{PAST}.0.key"].shape == (2, 2, 5, 4)


def test_sampling_draws_from_the_likeliest_only():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    draw = np.random.default_rng(0)

    def drawn(**options):
        chosen = [int(choose(logits, Sampling(**options), draw)[0]) for _ in range(2000)]
        return np.bincount(chosen, minlength=4) / 2000

    assert drawn()[0] == 1
    assert np.allclose(drawn(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    assert np.allclose(drawn(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0], atol=0.04)
    assert drawn(temperature=1.0, top_p=0.0)[0] == 1
    cold = drawn(temperature=0.5)
    assert np.allclose(cold, np.array([25, 9, 2.25, 0.25]) / 36.5, atol=0.04)


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    all_special_ids = ()

    def convert_ids_to_tokens(self, token):
        return chr(token)

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")


def test_half_a_character_is_never_shown():
    texts, text = Texts(Bytes(), 1), "naïve 世界 🙂!"
    pieces = [texts.add(0, byte) for byte in text.encode()]
    assert "".join(pieces) + texts.rest(0) == text
    assert not any("\ufffd" in piece for piece in pieces)
    broken = Texts(Bytes(), 1)
    shown = [broken.add(0, byte) for byte in b"ab\xe4\xb8"]
    assert "".join(shown) == "ab" and broken.rest(0) == "\ufffd"


def test_nothing_of_a_stop_string_is_shown():
    texts = Texts(Bytes(), 1, stop=["\nUser:"])
    shown = [texts.add(0, byte) for byte in b"Yes.\nUse it.\nUser: no"]
    assert "".join(shown) == "Yes.\nUse it." and texts.replies[0].done
    assert texts.rest(0) == ""
    held = Texts(Bytes(), 1, stop=["STOP"])
    shown = [held.add(0, byte) for byte in b"a ST"]
    assert "".join(shown) == "a " and held.rest(0) == "ST"


def byte_level():
    """A tokenizer of bytes and a few pairs of them, as of GPT-2; 0 is special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [a + b for a in letters[::7] for b in letters[::11]]
    words = dict.fromkeys(["</s>", *letters, *pairs])
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def sentencepiece():
    """A tokenizer of words with a blank before them and of bytes, as of Llama; 0 is special."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = [
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "▁▁",
        "▁the",
        "cat",
        "s",
        "世",
        "▁é",
        "🙂",
    ]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


MADE = {"byte level": byte_level(), "sentencepiece": sentencepiece()}
WRITTEN = "naïve 世界 🙂! the cats\n é"


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=300, deadline=None)
@given(data=strategies.data())
def test_pieces_join_to_what_all_tokens_say_at_once(kind, data):
    tokenizer = MADE[kind]
    spelled = [tokenizer.convert_tokens_to_ids(piece) for piece in _spelled(kind)]
    draw = strategies.integers(0, len(tokenizer) - 1) | strategies.sampled_from([0, *spelled])
    parts = data.draw(
        strategies.lists(strategies.lists(draw, max_size=9) | strategies.just(spelled))
    )
    ids = [token for part in parts for token in part]
    texts = Texts(tokenizer, 1)
    pieces = [texts.add(0, token) for token in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) + texts.rest(0) == whole == texts.replies[0].shown
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


def _spelled(kind):
    """A text in tokens of one byte each."""
    from tokenizers import pre_tokenizers

    if kind == "sentencepiece":
        return [f"<0x{byte:02X}>" for byte in WRITTEN.encode()]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return list(plain.pre_tokenize_str(WRITTEN)[0][0])


@pytest.mark.parametrize("kind", MADE)
def test_a_token_of_a_long_reply_costs_what_one_of_a_short_one_does(kind):
    tokenizer, decoded = MADE[kind], []

    class Counting:
        all_special_ids = tokenizer.all_special_ids
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def decode(self, ids, **options):
            decoded.append(len(ids))
            return tokenizer.decode(ids, **options)

    texts = Texts(Counting(), 1)
    words = [tokenizer.convert_tokens_to_ids(p) for p in _spelled(kind)] + [len(tokenizer) - 3]
    for token in words * 50:
        texts.add(0, token)
    assert sum(decoded) < 6 * len(words) * 50
    assert max(decoded) <= 2 * len(words)


def test_rows_end_by_themselves():
    """An engine whose next token is the last one plus one; row 0 ends at 9, row 1 is ended from outside."""
    calls = []

    def engine(feeds):
        calls.append(feeds["input_ids"].shape)
        logits = np.zeros((*feeds["input_ids"].shape, 20), np.float32)
        for row, ids in enumerate(feeds["input_ids"]):
            logits[row, -1, (ids[-1] + 1) % 20] = 1
        return {"logits": logits}

    steps = tokens(
        engine, [], [[5, 6], [7, 8, 11]], sampling=Sampling(max_tokens=50), ends=[9], pad=0, context=None
    )  # fmt: skip
    assert next(steps) == [7, 12] and steps.send(None) == [8, 13]
    assert steps.send([]) == [9, 14]
    assert steps.send(None) == [None, 15]
    with pytest.raises(StopIteration):
        steps.send([1])
    assert calls == [(2, 3), (2, 1), (2, 1), (2, 1)]
    with pytest.raises(UsageError, match="empty"):
        next(tokens(engine, [], [[]], sampling=Sampling(), ends=[], pad=0, context=None))


@pytest.mark.slow
def test_a_source_with_a_cache_gives_it_back(tmp_path):
    source = load({"transformers": str(saved(tmp_path))})
    given = source.inputs["main"]
    with torch.no_grad():
        found = source.module(**given)
    past = given[f"{PAST}.0.key"]
    assert torch.equal(found["present.0.key"][:, :, : past.shape[2]], past)
