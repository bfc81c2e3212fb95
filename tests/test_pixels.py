"""A model of pictures that takes bytes computes what it does behind its processor, as a graph and as an engine."""

import json

import numpy as np
import pytest
import torch
from graphs import distance, engine
from transformers import ViTConfig, ViTForImageClassification

import effc
from effc import recipe
from effc.compiler import trace_source
from effc.errors import SourceError
from effc.source import load
from kit import save_encoder

SETTINGS = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "size": {"height": 8, "width": 8},
}


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps(SETTINGS), encoding="utf-8"
    )
    return tmp_path / "vit"


def test_bytes_in_give_the_logits_of_floats(classifier, tmp_path):
    pictures = list(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    floats, bytes_in = (
        load({"transformers": str(classifier), "pixels": p}) for p in ("float", "uint8")
    )
    wanted = trace_source(floats).run(
        pixel_values=torch.from_numpy(floats.processor.images(pictures)["pixel_values"])
    )["logits"]
    feeds = bytes_in.processor.images(pictures)
    assert feeds["pixel_values"].dtype == np.uint8
    program = trace_source(bytes_in)
    assert (
        distance(
            wanted, program.run(pixel_values=torch.from_numpy(feeds["pixel_values"]))["logits"]
        )
        < 1e-5
    )
    with engine(program, tmp_path / "engine") as opened:
        assert opened.inputs[0].dtype == "uint8"
        assert distance(wanted, opened(feeds)["logits"]) < 1e-5


def test_pictures_of_other_sizes_are_rounded_to_bytes(classifier):
    source = load({"transformers": str(classifier), "pixels": "uint8"})
    made = source.processor.images([np.full((20, 12, 3), 200, np.uint8)])["pixel_values"]
    assert made.shape == (1, 3, 8, 8) and (made == 200).all()


def test_a_compile_calibrates_and_measures_on_bytes(classifier, tmp_path):
    rng = np.random.default_rng(1)
    pictures = tmp_path / "pictures"
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b", "c"):
        (pictures / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            image.fromarray(pixels).save(pictures / name / f"{i}.png")
    asked = recipe.build(
        {
            "source": {"transformers": str(classifier), "pixels": "uint8"},
            "calib": {"file": str(pictures), "samples": 8}, "passes": ["quantize"],
            "metric": {"accuracy": str(pictures)}, "bench": False, "gate": False,
        }
    )  # fmt: skip
    result = effc.compile(asked, tmp_path / "OUT")
    assert result.report["metric"]["n"] == 12


def test_a_model_of_texts_takes_no_bytes(tmp_path):
    place = save_encoder(tmp_path / "encoder")
    with pytest.raises(SourceError, match="no pictures") as caught:
        load({"transformers": str(place), "pixels": "uint8"})
    assert caught.value.hint
