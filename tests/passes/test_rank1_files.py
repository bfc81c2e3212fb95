"""Experts go into a directory and come back; those of another base, of other clusters or damaged are refused."""

import json

import numpy as np
import pytest
import torch
from gated import Block, X, run, stirred, traced, with_experts
from graphs import Call, engine
from safetensors.torch import load_file, save_file

import effc
from effc import experts, intuition
from effc.errors import CalibrationError, PreconditionError, SourceError
from effc.passes.base import Model
from effc.passes.rank1 import AttachRank1


def written(place, program):
    """The experts of a program in a directory."""
    place.mkdir(exist_ok=True)
    model = Model(name="block", kind="encoder", stem="")
    for name, content in AttachRank1().files(program.only(), model).items():
        (place / name.removeprefix("experts/")).write_bytes(content)
    return place


def clusters(place, count=6, size=8, seed=0, **options):
    """A file of centroids, and embeddings to score."""
    draw = np.random.default_rng(seed)
    embeddings = draw.normal(size=(40, size))
    intuition.fit(embeddings, count, seed=seed, **options).write(place)
    return place, embeddings[:4].astype(np.float32)


@pytest.fixture
def trained():
    _, program = with_experts()
    return stirred(program)


def test_experts_come_back_as_they_were(trained, tmp_path):
    place = written(tmp_path / "experts", trained)
    program = traced()
    record = effc.apply(AttachRank1(adapter=str(place)), program)
    assert record.effect == "lossy" and record.sites == 2
    assert torch.equal(run(program), run(trained))
    assert record.options["adapter"] == "experts" and record.decisions
    effc.apply(AttachRank1(adapter=str(place)), traced(), recorded=record.decisions)


def test_a_replay_with_other_experts_is_refused(trained, tmp_path):
    first = written(tmp_path / "a", trained)
    other = written(tmp_path / "b", stirred(trained))
    record = effc.apply(AttachRank1(adapter=str(first)), traced())
    with pytest.raises(CalibrationError, match="another adapter"):
        effc.apply(AttachRank1(adapter=str(other)), traced(), recorded=record.decisions)


def test_experts_of_another_base_are_refused(trained, tmp_path):
    place = written(tmp_path / "experts", trained)
    module = Block()
    torch.nn.init.normal_(module.up.weight)
    with pytest.raises(PreconditionError, match="another base: the weights beneath it are others"):
        effc.apply(AttachRank1(adapter=str(place)), traced(module))
    module = Block()
    module.down = torch.nn.Linear(16, 10)
    with pytest.raises(PreconditionError, match="another base: the graph has another 'down'"):
        effc.apply(AttachRank1(adapter=str(place)), traced(module))
    with pytest.raises(PreconditionError, match="another base: the graph has no linear layer"):
        effc.apply(
            AttachRank1(adapter=str(place)),
            traced(Call(lambda self, x: self.fc(x), fc=torch.nn.Linear(12, 16))),
        )


def test_the_adapter_says_itself_what_it_is(trained, tmp_path):
    place = str(written(tmp_path / "experts", trained))
    with pytest.raises(PreconditionError, match="the adapter itself says its sizes and seed"):
        effc.apply(AttachRank1(adapter=place, sizes=(2, 2), seed=1), traced())


def test_damaged_or_strange_files_are_refused(trained, tmp_path):
    with pytest.raises(SourceError, match="holds no experts"):
        experts.read(tmp_path)
    place = written(tmp_path / "experts", trained)
    config, tensors = place / experts.CONFIG, load_file(place / experts.WEIGHTS)
    good = json.loads(config.read_text())
    for change in (
        {"form": "ring"},
        {"gain": True},
        {"sizes": [2, 10**9]},
        {"more": 1},
        {"base": 3},
    ):
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(SourceError, match="not one that this effc reads"):
            experts.read(place)
    config.write_text(json.dumps({**good, "sizes": [3, 2]}))
    with pytest.raises(SourceError, match="tensors of other sizes"):
        experts.read(place)
    config.write_text(json.dumps(good))
    for change, why in (
        ({"up.rank1_A": torch.full_like(tensors["up.rank1_A"], torch.nan)}, "no numbers"),
        ({"../up.rank1_Z": torch.zeros(1)}, "no A"),
        ({"up.rank1_Z": torch.zeros(1)}, "tensors of other sizes"),
    ):
        save_file({**tensors, **change}, place / experts.WEIGHTS)
        with pytest.raises(SourceError, match=why):
            experts.read(place)
    (place / experts.WEIGHTS).write_bytes(b"cut")
    with pytest.raises(SourceError, match="does not load"):
        experts.read(place)
    (place / experts.WEIGHTS).unlink()
    (place / experts.WEIGHTS).symlink_to(tmp_path)
    with pytest.raises(SourceError, match="not a plain file"):
        experts.read(place)


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_the_graph_takes_embeddings_where_it_has_the_centroids(temperature, tmp_path):
    file, rows = clusters(tmp_path / "c.safetensors", temperature=temperature)
    by_score = stirred(with_experts()[1])
    record, program = with_experts(centroids=str(file))
    by_embedding = stirred(program)
    assert by_embedding.only().inputs == ("x", "embedding")
    assert record.options["centroids"] == "c.safetensors"
    held = intuition.read(file)
    unit = intuition.unit(rows).astype(np.float32)
    found = by_embedding.run({"x": X, "embedding": torch.from_numpy(unit)})["output"]
    wanted = run(by_score, s=torch.from_numpy(held.scores(rows)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with engine(by_embedding, tmp_path) as ran:
        given = ran({"x": X.numpy(), "embedding": unit})["output"]
    np.testing.assert_allclose(given, found.numpy(), atol=1e-5)


def test_as_many_clusters_as_experts_are_wanted(trained, tmp_path):
    file, _ = clusters(tmp_path / "c.safetensors", count=5)
    with pytest.raises(PreconditionError, match="5 clusters are no gates of 6 experts"):
        with_experts(centroids=str(file))
    with pytest.raises(PreconditionError, match="take no centroids"):
        with_experts(centroids=str(file), gates="router")


def test_experts_of_other_clusters_are_refused(tmp_path):
    file, rows = clusters(tmp_path / "c.safetensors")
    other, _ = clusters(tmp_path / "d.safetensors", seed=5)
    program = stirred(with_experts(centroids=str(file))[1])
    place = written(tmp_path / "experts", program)
    again = traced()
    effc.apply(AttachRank1(adapter=str(place), centroids=str(file)), again)
    feeds = {"x": X, "embedding": torch.from_numpy(rows)}
    assert torch.equal(again.run(feeds)["output"], program.run(feeds)["output"])
    with pytest.raises(PreconditionError, match="other clusters"):
        effc.apply(AttachRank1(adapter=str(place), centroids=str(other)), traced())
