"""A model of a directory is told what its requests are about, by arrays or by an encoder that reads their texts."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import effc
from effc import intuition, recipe
from effc.compiler import trace_source
from effc.errors import CalibrationError, RecipeError, SourceError
from effc.samples import Samples
from effc.source import load
from kit import WORDS, cli, embeddings, save_encoder, save_tokenizer, write_sentences

EXPERTS = 6


@pytest.fixture
def places(tmp_path):
    """A classifier, an embedder, and centroids of its embeddings of some prompts."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=160, num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    save_tokenizer(tmp_path / "classifier")
    embedder = save_encoder(tmp_path / "embedder", seed=2)
    prompts = write_sentences(tmp_path / "prompts.txt").read_text(encoding="utf-8").splitlines()
    encoder = load({"transformers": str(embedder)})
    rows = embeddings(encoder, prompts)
    intuition.fit(rows, EXPERTS, embedder="embedder").write(tmp_path / "c.safetensors")
    return {
        "transformers": str(tmp_path / "classifier"), "intuition": str(tmp_path / "c.safetensors"),
        "embedder": str(embedder),
    }  # fmt: skip


def labelled(file):
    rows = [f"{' '.join(WORDS[i : i + 4])}\t{i % 3}" for i in range(30)]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def test_texts_bring_their_scores_along(places):
    source = load(places)
    texts = ["the cat sat on the mat", "rain"]
    feeds = source.processor.encode(texts)
    rows = embeddings(load({"transformers": places["embedder"]}), texts)
    centroids = intuition.read(places["intuition"]).centroids
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(feeds["intuition"], unit @ centroids.T, atol=1e-5)


def test_the_model_itself_leaves_them_unread(places):
    source, plain = load(places).only("main"), load({"transformers": places["transformers"]})
    ids = {n: torch.from_numpy(a) for n, a in plain.processor.encode(["a dog ran"]).items()}
    found = trace_source(source).run(**ids, intuition=torch.ones(1, EXPERTS))["logits"]
    assert torch.equal(found, trace_source(plain).run(**ids)["logits"])
    assert source.stem("main") == "model."


@pytest.mark.slow
def test_a_recipe_attaches_trains_and_measures_experts_on_texts(places, tmp_path):
    file = labelled(tmp_path / "texts.tsv")
    asked = recipe.build({
        "source": places, "calib": {"file": str(file), "samples": 16, "batch": 8},
        "passes": [
            {"pass": "attach-rank1", "sizes": [2, 3]},
            {"pass": "tune", "task": "labels", "distill": 0, "steps": 12, "lr": 0.01, "held": 8},
            "batch-rank1",
        ],
        "metric": {"accuracy": str(file)}, "bench": {"shapes": [[1, 16]], "budget_s": 0.5}, "gate": False,
    })  # fmt: skip
    made = effc.compile(asked, tmp_path / "OUT")
    engine = made.report["manifest"]["engines"][0]
    assert {"name": "intuition", "shape": ["batch", EXPERTS]}.items() <= next(
        port for port in engine["inputs"] if port["name"] == "intuition"
    ).items()
    assert made.report["metric"]["n"] == 30
    text = (tmp_path / "OUT" / "recipe.yaml").read_text(encoding="utf-8")
    assert "intuition: c.safetensors" in text and "embedder: embedder" in text


def test_samples_of_other_centroids_are_other_samples(places, tmp_path):
    file = labelled(tmp_path / "texts.tsv")
    spec = recipe.build({"source": places, "calib": {"file": str(file)}}).calib
    draw = np.random.default_rng(0)
    intuition.fit(draw.normal(size=(40, 32)), EXPERTS).write(tmp_path / "others.safetensors")
    others = {**places, "intuition": str(tmp_path / "others.safetensors")}
    keys = [Samples(load(place), spec).key() for place in (places, places, others)]
    assert keys[0] == keys[1] != keys[2]


def test_texts_that_nobody_embeds_are_told_of(places):
    source = load({k: v for k, v in places.items() if k != "embedder"})
    assert source.inputs["main"]["intuition"].shape[1] == EXPERTS
    with pytest.raises(CalibrationError, match="the samples are texts alone") as error:
        source.processor.encode(["a dog"])
    assert "source.embedder" in error.value.hint


def test_parts_that_do_not_go_together_are_refused(places, tmp_path):
    draw = np.random.default_rng(0)
    intuition.fit(draw.normal(size=(20, 8)), 4).write(tmp_path / "short.safetensors")
    with pytest.raises(CalibrationError, match="32 long, and the centroids 8"):
        load({**places, "intuition": str(tmp_path / "short.safetensors")})
    with pytest.raises(SourceError, match="a classifier, which embeds no texts"):
        load({**places, "embedder": places["transformers"]})
    with pytest.raises(RecipeError, match="none are named"):
        recipe.build({"source": {"transformers": "x", "embedder": "y"}})
    with pytest.raises(RecipeError, match="is for a model directory"):
        recipe.build({"source": {"python": "m:f", "intuition": "c.safetensors"}})


@pytest.mark.slow
def test_a_package_that_is_told_is_walked_like_any_other(places, tmp_path):
    file = labelled(tmp_path / "texts.tsv")
    asked = recipe.build({
        "source": places, "calib": {"file": str(file), "samples": 16, "batch": 8}, "passes": ["quantize"],
        "bench": False, "gate": False,
    })  # fmt: skip
    effc.compile(asked, tmp_path / "OUT")
    ran = cli("explain", tmp_path / "OUT", "--calib", file, "--json", tmp_path / "found.json")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["replayed"] is not False and found["first"] is None and found["sites"]
