"""A package answers texts alone: what they are about is worked out by an engine of its own."""

import itertools
import json

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import effc
from effc import compiler, engine, intuition, measure, package, plan, recipe
from effc.chain import Chain
from effc.errors import CalibrationError, PackageError, PreconditionError, SourceError, UsageError
from effc.guided import pooled
from effc.processor import Pooling
from effc.progress import Progress
from effc.source import load
from kit import WORDS, cli, embeddings, forge, save_encoder, save_tokenizer, write_sentences

EXPERTS = 6
TEXTS = ["the cat sat on the mat", "rain", "we saw them go home then"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A classifier, an encoder of requests, and clusters of some prompts."""
    place = tmp_path_factory.mktemp("chain")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=160, num_labels=3, id2label={0: "no", 1: "so", 2: "yes"},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(place / "classifier")
    save_tokenizer(place / "classifier")
    encoder = load({"transformers": str(save_encoder(place / "encoder", seed=2))})
    prompts = write_sentences(place / "prompts.txt").read_text(encoding="utf-8").splitlines()
    rows = embeddings(encoder, prompts)
    intuition.fit(rows, EXPERTS, embedder="encoder", temperature=0.1).write(place / "c.safetensors")
    return {
        "transformers": str(place / "classifier"), "intuition": str(place / "c.safetensors"),
        "embedder": str(place / "encoder"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def out(places, tmp_path_factory):
    """A package whose experts read what a text is about, and change what the model says."""
    place = tmp_path_factory.mktemp("package")
    file = place / "texts.tsv"
    rows = [f"{' '.join(WORDS[i : i + 4])}\t{i % 3}" for i in range(24)]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    asked = recipe.build({
        "source": places, "calib": {"file": str(file), "samples": 8, "batch": 8}, "bench": False, "gate": False,
        "metric": {"accuracy": str(file)},
        "passes": [
            {"pass": "attach-rank1", "sizes": [2, 3], "gates": "intuition"},
            {"pass": "tune", "task": "labels", "distill": 0, "steps": 12, "lr": 0.003, "held": 8},
            "batch-rank1",
        ],
    })  # fmt: skip
    effc.compile(asked, place / "OUT")
    return place / "OUT"


def test_texts_alone_are_enough(out, places):
    source = load(places)
    feeds = source.processor.encode(TEXTS)
    with Chain.open(out) as chain, effc.Engine.open(out, "main") as own:
        found = chain(TEXTS)
        np.testing.assert_allclose(found["intuition"], feeds["intuition"], atol=1e-6)
        np.testing.assert_allclose(found["logits"], own(feeds)["logits"], atol=1e-6)
        other = own({**feeds, "intuition": feeds["intuition"][::-1].copy()})["logits"]
    assert np.abs(other - found["logits"]).max() > 2e-5  # what texts are about counts


def test_a_text_is_answered_the_same_beside_others(out):
    with Chain.open(out) as chain:
        together = chain(TEXTS)
        for i, text in enumerate(TEXTS):
            np.testing.assert_allclose(chain([text])["logits"][0], together["logits"][i], atol=1e-6)


def test_the_runtime_alone_does_the_same(out):
    def run(folder, **more):
        tokenizer = AutoTokenizer.from_pretrained(folder.parent if more else folder)
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        words = [port.name for port in session.get_inputs() if port.name != "intuition"]
        tokens = tokenizer(TEXTS, padding=True, return_tensors="np")
        return session.run(None, {**{n: tokens[n] for n in words}, **more})[0]

    (score,) = (run(out / "intuition"),)
    logits = run(out / "main", intuition=score)
    with Chain.open(out) as chain:
        np.testing.assert_allclose(chain(TEXTS)["logits"], logits, atol=1e-6)


def test_the_package_holds_its_clusters_and_what_embeds(out, places):
    held = intuition.read(out / intuition.FILE)
    assert held.digest == intuition.read(places["intuition"]).digest
    manifest = package.read(out)
    assert [e.role for e in manifest.engines] == ["main", "intuition"]
    assert {"intuition/centroids.safetensors", "intuition/tokenizer.json"} <= set(manifest.files)
    (link,) = manifest.links
    assert (link.producer, link.output, link.consumer, link.input) == (
        "intuition", "intuition", "main", "intuition",
    )  # fmt: skip
    assert {p.role for p in manifest.passes if p.name == "attach-rank1"} == {"main"}


def test_the_report_says_which_clusters_samples_are_of(out):
    told = json.loads((out / "report.json").read_text(encoding="utf-8"))
    (curve,) = [n for p in told["passes"] for k, n in p["notes"].items() if k.endswith("curve")]
    counts = curve[-1]["told"]["gates"]["requests by cluster"]
    assert len(counts) == EXPERTS and sum(counts) > 0
    page = (out / "report.html").read_text(encoding="utf-8")
    fullest = counts.index(max(counts))
    assert f"cluster {fullest}" in page and f"{max(counts)} of {sum(counts)}" in page


class Told:
    """A metric that keeps what engines were fed."""

    def measure(self, run, processor):
        feeds = processor.encode(TEXTS)
        return feeds["intuition"], run(feeds)["logits"]


def test_a_metric_is_of_the_engine_that_tells_and_of_the_one_that_answers(out, places, tmp_path):
    source, manifest = load(places), package.read(out)
    main, teller = (engine.lowered(out, e) for e in manifest.engines)
    told, logits = measure.of_engine(source.only("main"), main, Told(), 1, teller=teller)
    with Chain.open(out, threads=1) as chain:
        np.testing.assert_allclose(chain(TEXTS)["logits"], logits, atol=1e-6)
    own, _ = measure.of_engine(source.only("main"), main, Told(), 1)
    np.testing.assert_allclose(told, own, atol=1e-6)
    # one that tells something else is seen
    elsewhere = {**places, "embedder": str(save_encoder(tmp_path / "other", seed=7))}
    other = load(elsewhere)
    asked = recipe.build({"source": elsewhere, "bench": False, "gate": False})
    effc.compile(asked, tmp_path / "OUT")
    wrong = engine.lowered(tmp_path / "OUT", package.read(tmp_path / "OUT").engines[1])
    told, changed = measure.of_engine(source.only("main"), main, Told(), 1, teller=wrong)
    np.testing.assert_allclose(told, other.processor.encode(TEXTS)["intuition"], atol=1e-6)
    assert np.abs(changed - logits).max() > 1e-5


def test_a_compile_measures_with_both(places, tmp_path, monkeypatch):
    file = tmp_path / "texts.tsv"
    file.write_text("".join(f"{w} {v}\t{i % 3}\n" for i, (w, v) in enumerate(itertools.pairwise(WORDS))))  # fmt: skip
    tellers = []
    whole = measure.of_engine

    def watched(*given):
        tellers.append(given[6])
        return whole(*given)

    monkeypatch.setattr(measure, "of_engine", watched)
    asked = {
        "source": places, "calib": {"file": str(file), "samples": 8}, "metric": {"accuracy": str(file)},
        "passes": [
            {"pass": "attach-rank1", "sizes": [2, 3]},
            {"pass": "quantize", "graphs": ["intuition"]},
        ],
        "bench": False, "gate": False,
    }  # fmt: skip
    effc.compile(recipe.build(asked), tmp_path / "OUT")
    assert [t.role for t in tellers] == ["intuition"]
    assert any(site.int8 for site in tellers[0].sites)
    assert [e.role for e in package.read(tmp_path / "OUT").engines] == ["main", "intuition"]


def test_run_answers_texts(out, tmp_path):
    ran = cli("run", out, "--prompt", TEXTS[0], "--prompt", "rain", "--json", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert len(found["labels"]) == 2 and set(found["labels"]) <= {"no", "so", "yes"}
    assert f"{found['labels'][1]}, cluster {found['clusters'][1]}    rain" in ran.out
    assert cli("run", out).code == UsageError.exit_code


def test_verify_compares_both_graphs_with_the_model(out):
    ran = cli("verify", out)
    assert ran.code == 0, ran.err
    ran = cli(
        "verify",
        out,
        "--model",
        json.loads((out / "local.json").read_text())["source"]["transformers"],
    )
    assert ran.code == 0, ran.err
    assert "intuition/ort" in ran.out


def test_a_checkpoint_has_experts_where_those_of_one_graph_are(places, tmp_path):
    file = tmp_path / "texts.tsv"
    file.write_text(
        "".join(f"{w} {v}\t{i % 3}\n" for i, (w, v) in enumerate(itertools.pairwise(WORDS)))
    )
    asked = {
        "source": places, "calib": {"file": str(file), "samples": 8}, "metric": {"accuracy": str(file)},
        "passes": [
            {"pass": "attach-rank1", "sizes": [2, 3]},
            {"pass": "tune", "task": "labels", "distill": 0, "steps": 1, "held": 4, "samples": 16, "batch": 4},
        ],
    }  # fmt: skip
    recipe_ = recipe.build(asked)
    compiler.tune(recipe_, tmp_path / "CKPT")
    assert (tmp_path / "CKPT" / "experts" / "experts.safetensors").is_file()
    told = plan.plan(recipe_, tmp_path / "OUT", progress=Progress())
    assert told["model_bytes"] > 0 and not (tmp_path / "OUT").exists()


def test_a_plain_package_answers_too(places, tmp_path):
    asked = {"source": {"transformers": places["transformers"]}, "bench": False, "gate": False}
    effc.compile(recipe.build(asked), tmp_path / "OUT")
    with Chain.open(tmp_path / "OUT") as chain:
        assert chain(TEXTS)["logits"].shape == (3, 3)


def test_a_package_that_cannot_say_what_texts_are_about_is_refused(places, tmp_path):
    told = {k: v for k, v in places.items() if k != "embedder"}
    asked = {
        "source": told,
        "bench": False,
        "gate": False,
        "passes": [{"pass": "attach-rank1", "sizes": [2, 3]}],
    }
    effc.compile(recipe.build(asked), tmp_path / "OUT")
    with pytest.raises(UsageError, match="nothing that says what a text is about") as error:
        Chain.open(tmp_path / "OUT")
    assert "source.embedder" in error.value.hint


def test_other_clusters_than_experts_are_refused(places, tmp_path):
    asked = {
        "source": places,
        "bench": False,
        "gate": False,
        "passes": [{"pass": "attach-rank1", "sizes": [2, 2]}],
    }
    with pytest.raises(PreconditionError, match=r"the gates read \[batch, 4\]"):
        effc.compile(recipe.build(asked), tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


def test_centroids_that_are_no_numbers_are_refused(places, tmp_path):
    made = intuition.read(places["intuition"])
    made.centroids[0, 0] = np.nan
    made.write(tmp_path / "nan.safetensors")
    with pytest.raises(SourceError, match="not all numbers"):
        load({**places, "intuition": str(tmp_path / "nan.safetensors")})


def test_an_embedder_that_is_gone_or_of_another_size_is_refused(places, tmp_path):
    with pytest.raises(SourceError):
        load({**places, "embedder": str(tmp_path / "nowhere")})
    save_encoder(tmp_path / "wide", hidden_size=48)
    with pytest.raises(CalibrationError, match="48 long, and the centroids 32"):
        load({**places, "embedder": str(tmp_path / "wide")})


def test_centroids_that_were_exchanged_are_refused(out, tmp_path):
    import shutil

    copy = tmp_path / "OUT"
    shutil.copytree(out, copy)
    draw = np.random.default_rng(0)
    intuition.fit(draw.normal(size=(40, 32)), 4).write(copy / intuition.FILE)
    digest = package.digest(copy / intuition.FILE)
    forge(copy, "manifest.json", lambda m: m["files"].update({intuition.FILE: digest}))
    with pytest.raises(PackageError, match="4 centroids, and engines for 6"):
        Chain.open(copy)


@pytest.mark.parametrize(
    "mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
)
def test_pooling_in_the_graph_is_that_of_arrays(mode):
    hidden = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    found = pooled(mode, torch.from_numpy(hidden), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(found, Pooling((mode,))(hidden, mask), atol=1e-6)
