"""A language model that writes is told what its prompt is about at every step, and a package needs the prompt alone."""

import json

import numpy as np
import pytest
from test_generate import PROMPTS, saved

import effc
from effc import intuition, metrics, package, recipe
from effc.causal import ROLES, complete
from effc.errors import TuneError, UsageError
from effc.source import load
from kit import cli, embeddings, save_encoder, write_sentences

EXPERTS = 6
COUNT = 10


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A small Llama, an encoder of requests, and clusters of some prompts."""
    place = tmp_path_factory.mktemp("told")
    saved(place / "model")
    encoder = load({"transformers": str(save_encoder(place / "encoder", seed=2))})
    prompts = write_sentences(place / "prompts.txt").read_text(encoding="utf-8").splitlines()
    rows = embeddings(encoder, prompts)
    made = intuition.fit(rows, EXPERTS, embedder="encoder", temperature=0.02)
    made.write(place / "c.safetensors")
    return {
        "transformers": str(place / "model"), "intuition": str(place / "c.safetensors"),
        "embedder": str(place / "encoder"),
    }  # fmt: skip


def compiled(spec, out, **more):
    texts = write_sentences(out.with_name("texts.txt"))
    asked = {
        "source": spec, "calib": {"file": str(texts), "samples": 8, "batch": 4}, "bench": False, "gate": False,
        "passes": [
            {"pass": "attach-rank1", "sizes": [2, 3], "gates": "intuition"},
            {"pass": "tune", "task": "tokens", "distill": 0, "steps": 12, "lr": 0.05, "held": 4},
            "batch-rank1",
        ],
    } | more  # fmt: skip
    effc.compile(recipe.build(asked), out)
    return out


@pytest.fixture(scope="module")
def out(spec, tmp_path_factory):
    return compiled(spec, tmp_path_factory.mktemp("package") / "OUT")


def by_hand(out, spec, prompt, label="main/ort"):
    """Greedy text of one prompt without a cache that is carried: all of it is read again for every token."""
    source = load(spec)
    told = source.processor.teller([prompt])
    ids = source.processor.tokenizer(prompt)["input_ids"]
    made = []
    with effc.Engine.open(out, label) as engine:
        for _ in range(COUNT):
            row = np.array([ids + made])
            feeds = complete(
                {"input_ids": row, "attention_mask": np.ones_like(row)}, source.processor.cache
            )
            made.append(int(engine({**feeds, "intuition": told})["logits"][0, -1].argmax()))
            if made[-1] == 3:
                break
    return made


def written(out, prompts, tmp_path):
    words = [w for p in prompts for w in ("--prompt", p)]
    ran = cli("run", out, *words, "--max-tokens", COUNT, "--json", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    return json.loads((tmp_path / "r.json").read_text())["tokens"]


def test_every_prompt_is_gone_on_with_by_what_it_is_about(out, spec, tmp_path):
    wanted = [by_hand(out, spec, prompt) for prompt in PROMPTS]
    assert written(out, PROMPTS, tmp_path) == wanted
    assert written(out, PROMPTS[:1], tmp_path) == wanted[:1]


def test_what_a_prompt_is_about_counts(out, spec):
    source = load(spec)
    feeds = source.processor.encode(PROMPTS[:1])
    with effc.Engine.open(out, "main/ort") as engine:
        own = engine(feeds)["logits"]
        other = engine({**feeds, "intuition": np.roll(feeds["intuition"], 1, 1)})["logits"]
    assert np.abs(own - other).max() > 1e-3


@pytest.mark.slow
def test_who_reads_and_who_writes_are_told_the_same(spec, tmp_path):
    out = compiled({**spec, "roles": list(ROLES)}, tmp_path / "OUT")
    manifest = package.read(out)
    assert {e.role for e in manifest.engines} == {*ROLES, "intuition"}
    told = [link.consumer for link in manifest.links if link.output == "intuition"]
    assert sorted(told) == sorted(ROLES)
    wanted = [by_hand(out, spec, prompt, "prefill/ort") for prompt in PROMPTS]
    assert written(out, PROMPTS, tmp_path) == wanted


def test_perplexity_is_that_of_windows_told_of_themselves(out, spec, tmp_path):
    file = write_sentences(tmp_path / "measured.txt")
    metric, processor = metrics.parse(f"perplexity:{file}"), load(spec).processor
    told = []
    with effc.Engine.open(out, "main/ort") as engine:

        def run(feeds):
            told.append((feeds["input_ids"][0], feeds["intuition"]))
            return engine(feeds)

        assert np.isfinite(metric.measure(run, processor).columns["loss"]).all()
    for ids, scores in told:
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        np.testing.assert_array_equal(scores, processor.teller([text]))


def test_tools_that_do_not_work_it_out_are_refused(out, tmp_path):
    ran = cli("package", out, "--layout", "onnxruntime-genai", "-o", tmp_path / "genai")
    assert ran.code == UsageError.exit_code and "what a request is about" in ran.err
    assert not (tmp_path / "genai").exists()


def test_an_answer_that_may_be_cut_off_is_not_trained_on(spec, tmp_path):
    texts = write_sentences(tmp_path / "texts.txt")
    tune = {"pass": "tune", "task": "answer", "distill": 0, "steps": 1, "held": 2, "max_length": 6}
    asked = {
        "source": {"transformers": spec["transformers"], "cache": False}, "bench": False, "gate": False,
        "passes": [{"pass": "attach-lora", "rank": 2}, {**tune, "file": str(texts)}],
    }  # fmt: skip
    with pytest.raises(TuneError, match="cut to 6 tokens") as error:
        effc.compile(recipe.build(asked), tmp_path / "OUT")
    assert "max_length" in error.value.hint and not (tmp_path / "OUT").exists()
    asked["passes"][1]["max_length"] = 90
    effc.compile(recipe.build(asked), tmp_path / "OUT")


def test_without_who_embeds_a_prompt_is_refused(spec, tmp_path):
    told = {k: v for k, v in spec.items() if k != "embedder"}
    passes = [{"pass": "attach-rank1", "sizes": [2, 3]}]
    asked = {"source": told, "bench": False, "gate": False, "passes": passes}
    effc.compile(recipe.build(asked), tmp_path / "OUT")
    ran = cli("run", tmp_path / "OUT", "--prompt", PROMPTS[0])
    assert ran.code == UsageError.exit_code and "nothing that says" in ran.err
