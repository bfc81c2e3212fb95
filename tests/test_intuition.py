"""Clusters of prompts come from their embeddings alone, and say how near a request is to each."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from effc import intuition
from effc.errors import CalibrationError, SourceError


def clouds(per=20, seed=0):
    """Embeddings around three directions of [6], and which direction each is around."""
    draw = np.random.default_rng(seed)
    centres = np.eye(6)[[0, 2, 4]]
    which = np.repeat(np.arange(3), per)
    return centres[which] * 5 + 0.3 * draw.normal(size=(3 * per, 6)), which


def test_clusters_are_the_clouds_and_the_same_every_time():
    embeddings, which = clouds()
    made = intuition.fit(embeddings, 3, seed=4)
    assert np.allclose(np.linalg.norm(made.centroids, axis=1), 1, atol=1e-6)
    found = made.nearest(embeddings)
    assert len({(a, b) for a, b in zip(found, which, strict=True)}) == 3
    assert intuition.fit(embeddings, 3, seed=4).digest == made.digest
    fresh, of = clouds(5, seed=1)
    assert all(made.nearest(fresh)[of == k].std() == 0 for k in range(3))


def test_scores_are_cosines_or_their_softmax():
    embeddings, _ = clouds()
    made = intuition.fit(embeddings, 3)
    rows = 7.0 * embeddings[:4]  # lengths do not count
    wanted = [
        [sum(c * x for c, x in zip(centre, row / np.linalg.norm(row), strict=True)) for centre in made.centroids]
        for row in rows
    ]  # fmt: skip
    np.testing.assert_allclose(made.scores(rows), wanted, atol=1e-6)
    soft = intuition.fit(embeddings, 3, temperature=0.1).scores(rows)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    powers = np.exp(np.array(wanted) / 0.1)
    np.testing.assert_allclose(soft, powers / powers.sum(1, keepdims=True), atol=1e-5)


def test_a_file_gives_back_what_was_written(tmp_path):
    embeddings, _ = clouds()
    made = intuition.fit(embeddings, 3, embedder="minilm", temperature=0.2)
    made.write(tmp_path / "centroids.safetensors")
    found = intuition.read(tmp_path / "centroids.safetensors")
    assert found.digest == made.digest and (found.embedder, found.temperature) == ("minilm", 0.2)
    np.testing.assert_array_equal(found.scores(embeddings), made.scores(embeddings))


def test_embeddings_of_another_model_are_refused():
    embeddings, _ = clouds()
    made = intuition.fit(embeddings, 3, embedder="minilm")
    with pytest.raises(CalibrationError, match="5 long, and the centroids 6") as error:
        made.scores(embeddings[:, :5])
    assert "minilm" in error.value.hint


def test_prompts_that_make_no_clusters_are_refused():
    embeddings, _ = clouds()
    with pytest.raises(CalibrationError, match="2 different prompts do not make 3"):
        intuition.fit(np.repeat(embeddings[:2], 9, axis=0), 3)
    broken = embeddings.copy()
    broken[3, 1] = np.nan
    with pytest.raises(CalibrationError, match="no matrix of numbers"):
        intuition.fit(broken, 3)
    broken[3] = 0
    with pytest.raises(CalibrationError, match="prompt 3 is 0"):
        intuition.fit(broken, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_centroids_that_are_no_numbers_are_refused(value, tmp_path):
    embeddings, _ = clouds()
    made = intuition.fit(embeddings, 3)
    made.centroids[1, 2] = value
    made.write(tmp_path / "c.safetensors")
    with pytest.raises(SourceError, match="not all numbers"):
        intuition.read(tmp_path / "c.safetensors")


def test_a_file_that_is_none_or_another_is_refused(tmp_path):
    file = tmp_path / "c.safetensors"
    with pytest.raises(SourceError, match="cannot be read"):
        intuition.read(file)
    file.write_bytes(b"no tensors at all")
    with pytest.raises(SourceError, match="holds no centroids"):
        intuition.read(file)
    save_file({"weights": np.zeros((2, 2), np.float32)}, file)
    with pytest.raises(SourceError, match="holds no centroids"):
        intuition.read(file)
    embeddings, _ = clouds()
    made = intuition.fit(embeddings, 3)
    record = {"embedder": "", "temperature": None, "digest": made.digest}
    changed = made.centroids.copy()
    changed[0] = changed[0, ::-1]
    save_file({"centroids": changed}, file, metadata={"effc": json.dumps(record)})
    with pytest.raises(SourceError, match="not what it was written as"):
        intuition.read(file)
    save_file(
        {"centroids": made.centroids},
        file,
        metadata={"effc": json.dumps({**record, "temperature": -1})},
    )
    with pytest.raises(SourceError, match="temperature is no number above 0"):
        intuition.read(file)
