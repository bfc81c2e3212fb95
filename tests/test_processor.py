"""Pictures as a model's image processor makes them; texts, words and rows of ids as its inputs."""

import json
from pathlib import Path

import numpy as np
import pytest

from effc.calib.data import Record
from effc.errors import CalibrationError, SourceError
from effc.processor import Processor
from kit import save_tokenizer

RNG = np.random.default_rng(0)
SHAPES = [(40, 61), (61, 40), (17, 23), (31, 31), (28, 28), (90, 30)]


def picture(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def waves(height: int, width: int) -> np.ndarray:
    """A picture that is neither black nor white anywhere, so that nothing is cut off between two passes."""
    down, across = np.ogrid[:height, :width]
    turns = RNG.uniform(0, 1.5, (3, 3))
    planes = [127 + 90 * np.cos(a * down + b * across + 4 * c) for a, b, c in turns]
    return np.stack(planes, axis=-1).astype(np.uint8)


def processor(place: Path, settings: dict | None = None, **config) -> Processor:
    if settings is not None:
        (place / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return Processor(place, config, ["pixel_values"])


PLAIN = {"do_rescale": False, "do_normalize": False}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit.image_processing_pil_vit.ViT", {"size": {"height": 32, "width": 32}}),
        ("vit.image_processing_pil_vit.ViT", {"size": {"height": 32, "width": 32}, "resample": 3}),
        ("vit.image_processing_pil_vit.ViT", {"size": {"height": 32, "width": 32}, "resample": 2,
         "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}),
        ("clip.image_processing_pil_clip.CLIP", {"size": {"shortest_edge": 36}, "resample": 3,
         "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}),
        ("clip.image_processing_pil_clip.CLIP", {"size": 32, "resample": 3, "do_center_crop": True,
         "crop_size": 32}),
        ("clip.image_processing_pil_clip.CLIP", {"do_resize": False, "do_center_crop": True,
         "crop_size": {"height": 32, "width": 32}}),
        ("convnext.image_processing_pil_convnext.ConvNext", {"size": {"shortest_edge": 32},
         "crop_pct": 0.875, "resample": 3}),
    ],
)  # fmt: skip
def test_pictures_are_as_transformers_makes_them(tmp_path, name, settings):
    pytest.importorskip("PIL")
    module, _, prefix = name.rpartition(".")
    module = pytest.importorskip(f"transformers.models.{module}")
    try:
        theirs = getattr(module, f"{prefix}ImageProcessorPil")(**settings)
    except ImportError as error:
        pytest.skip(str(error))
    mine = processor(tmp_path, theirs.to_dict() | settings, image_size=32)
    pictures = [waves(*shape) for shape in SHAPES]
    want = np.stack([theirs(p, return_tensors="np")["pixel_values"][0] for p in pictures])
    got = mine.images(pictures)["pixel_values"]
    assert got.dtype == np.float32 and got.shape == want.shape
    level = 1 / 255 / np.min(theirs.image_std)
    apart = np.abs(got - want) / level
    assert apart.max() < 2.1 and apart.mean() < 0.1  # Pillow rounds twice, in an order of its own


def test_the_nearest_pixel_is_taken_where_the_settings_say_so(tmp_path):
    mine = processor(tmp_path, {**PLAIN, "size": 4, "resample": 0}, image_size=4)
    given = picture(12, 12, 3)
    want = given[1::3, 1::3].transpose(2, 0, 1)
    np.testing.assert_array_equal(mine.images([given])["pixel_values"][0], want)


def test_pictures_of_one_size_are_treated_as_each_alone(tmp_path):
    mine = processor(tmp_path, image_size=24)
    pictures = [picture(30, 40, 3) for _ in range(3)]
    alone = np.concatenate([mine.images([p])["pixel_values"] for p in pictures])
    np.testing.assert_array_equal(mine.images(np.stack(pictures))["pixel_values"], alone)


def test_large_pictures_are_floats_one_at_a_time(tmp_path, monkeypatch):
    mine, seen, whole = processor(tmp_path, image_size=24), [], Processor._sized
    monkeypatch.setattr(mine, "_sized", lambda p, s: seen.append(len(p)) or whole(mine, p, s))
    mine.images([picture(1024, 1024, 3) for _ in range(2)])
    mine.images([picture(30, 40, 3) for _ in range(2)])
    assert seen == [1, 1, 2]


def test_pictures_of_many_sizes_and_colours_are_one_batch(tmp_path):
    mine = processor(tmp_path, image_size=16)
    pictures = [picture(16, 16), picture(20, 30, 3), picture(9, 16, 4), picture(16, 16, 1)]
    (batch,) = mine.batches([Record(pixels=p) for p in pictures])
    assert batch.inputs["pixel_values"].shape == (4, 3, 16, 16)
    np.testing.assert_array_equal(
        batch.inputs["pixel_values"][3], mine.images([pictures[3][..., 0]])["pixel_values"][0]
    )


def test_colour_becomes_luma_for_a_model_of_grey(tmp_path):
    image = pytest.importorskip("PIL.Image")
    colour = picture(16, 16, 3)
    mine = processor(tmp_path, PLAIN, image_size=16, num_channels=1)
    want = np.asarray(image.fromarray(colour).convert("L"), np.float32)
    got = mine.images([colour, picture(16, 16)])["pixel_values"]
    assert got.shape == (2, 1, 16, 16)
    assert np.abs(got[0, 0] - want).max() <= 1


def test_channels_that_nobody_can_make_are_refused(tmp_path):
    with pytest.raises(CalibrationError, match="have 3 channels, the model takes 5"):
        processor(tmp_path, num_channels=5, image_size=8).images([picture(8, 8, 3)])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"size": {"longest_edge": 8}}, "is no size of a picture"),
        ({"size": 8, "resample": 1}, "resample 1 is not one of 0, 2, 3"),
        ([], "holds a list, not a dict"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path, settings, match):
    with pytest.raises(SourceError, match=match):
        processor(tmp_path, settings, image_size=8).images([picture(9, 9, 3)])


def test_settings_lie_in_processor_config_too(tmp_path):
    mine = processor(tmp_path)
    nested = {"image_processor": {**PLAIN, "crop_size": {"height": 8, "width": 6}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")
    assert mine.image_size() == (8, 6)
    assert mine.images([picture(8, 6, 3)])["pixel_values"].max() > 1


def test_a_settings_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "modules.json").write_text("{", encoding="utf-8")
    with pytest.raises(SourceError, match=r"modules\.json cannot be read"):
        Processor(tmp_path, {})


# Words


def test_the_first_token_of_a_word_has_its_place(tmp_path):
    save_tokenizer(tmp_path)
    mine = Processor(tmp_path, {}, ["input_ids", "attention_mask"])
    feeds, places = mine.words([["the", "cat-dog", "sat"], ["ran"]])
    assert places == [{0: 1, 1: 2, 2: 5}, {0: 1}]
    assert feeds["attention_mask"].tolist() == [[1] * 7, [1] * 3 + [0] * 4]


def test_a_word_behind_the_longest_input_has_no_place(tmp_path):
    save_tokenizer(tmp_path)
    mine = Processor(tmp_path, {"max_position_embeddings": 5}, ["input_ids"])
    feeds, places = mine.words([["cat"] * 9])
    assert feeds["input_ids"].shape == (1, 5)
    assert places == [{0: 1, 1: 2, 2: 3}]


# Pooling


def pooling(place: Path, settings: dict, *types: str) -> Processor:
    (place / "1_Pooling").mkdir(exist_ok=True)
    (place / "1_Pooling" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in types]
    (place / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    return Processor(place, {})


HIDDEN = RNG.normal(size=(3, 4, 5))
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])


def by_hand(mode: str, tokens: np.ndarray) -> np.ndarray:
    """One row of pooled vectors from the tokens that are there."""
    places = range(1, len(tokens) + 1)
    return {
        "cls": tokens[0],
        "max": tokens.max(axis=0),
        "mean": tokens.mean(axis=0),
        "mean_sqrt_len_tokens": tokens.sum(axis=0) / len(tokens) ** 0.5,
        "weightedmean": sum(n * t for n, t in zip(places, tokens, strict=True)) / sum(places),
        "lasttoken": tokens[-1],
    }[mode]


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({}, ["mean"]),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ["cls"]),
        ({"pooling_mode_max_tokens": True}, ["max"]),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ["mean_sqrt_len_tokens"]),
        ({"pooling_mode_weightedmean_tokens": True}, ["weightedmean"]),
        ({"pooling_mode_lasttoken": True}, ["lasttoken"]),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ["cls", "mean"]),
        ({"pooling_mode": "lasttoken", "pooling_mode_mean_tokens": True}, ["lasttoken"]),
        ({"pooling_mode": ["mean", "max"]}, ["mean", "max"]),
    ],
)
def test_token_vectors_are_pooled_as_the_directory_says(tmp_path, settings, modes):
    mine = pooling(tmp_path, settings, "Transformer", "Pooling")
    want = [
        np.concatenate([by_hand(mode, row[mask > 0]) for mode in modes])
        for row, mask in zip(HIDDEN, MASK, strict=True)
    ]
    np.testing.assert_allclose(mine.pool(HIDDEN, MASK), want)


def test_vectors_are_of_length_one_where_the_directory_says_so(tmp_path):
    mine = pooling(tmp_path, {}, "Transformer", "Pooling", "Normalize")
    np.testing.assert_allclose(np.linalg.norm(mine.pool(HIDDEN, MASK), axis=1), 1)


@pytest.mark.parametrize(
    ("settings", "type_", "match"),
    [
        ({}, "Dense", r"modules\.json lists sentence_transformers\.models\.Dense"),
        ({"pooling_mode_best_token": True}, "Dropout", "pools by best_token"),
        ({"pooling_mode": ["mean", "best"]}, "Dropout", "pools by best"),
    ],
)
def test_what_is_not_done_behind_the_engine_matters_to_who_pools(
    tmp_path, caplog, settings, type_, match
):
    mine = pooling(tmp_path, settings, "Transformer", "Pooling", type_)
    (warned,) = caplog.messages
    with pytest.raises(SourceError, match=match) as caught:
        mine.pool(HIDDEN, MASK)
    assert caught.value.what == warned


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 10**9},
        {"size": -3},
        {"size": {"height": "a", "width": 3}},
        {"size": float("inf")},
        {"size": {"shortest_edge": "a"}},
        {"size": {"shortest_edge": 10**9}},
        {"size": 20, "crop_pct": "a"},
        {"size": 20, "crop_pct": 1e-300},
        {"do_center_crop": True, "crop_size": [1, 2, 3]},
        {"image_mean": "a"},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": [float("nan")] * 3},
        {"image_std": [0, 1, 1]},
        {"image_std": [[1], [1, 2]]},
        {"rescale_factor": None},
        {"rescale_factor": 10**400},
        {"size": 20, "resample": []},
        {"size": 20, "resample": 99},
    ],
)
def test_settings_of_pictures_that_cannot_be_are_one_clear_error(tmp_path, settings):
    made = processor(tmp_path, settings, image_size=16)
    with pytest.raises(SourceError) as found:
        made.images([picture(20, 30, 3)])
    assert found.value.hint


def test_a_picture_that_would_be_made_huge_is_refused(tmp_path):
    made = processor(tmp_path, {"size": {"shortest_edge": 200}}, image_size=16)
    with pytest.raises(CalibrationError, match="much longer than wide"):
        made.images([picture(1, 4000, 3)])
    made = processor(tmp_path, {"size": {"shortest_edge": 2}}, image_size=16)
    made.images([picture(20, 30, 3)])
