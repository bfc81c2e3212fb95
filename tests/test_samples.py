"""What a compile measures on: held-out samples come from the same file and cost what is asked for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from effc.recipe import CalibSpec
from effc.samples import Samples


def arrays(path, count: int) -> Samples:
    np.savez(path, x=np.arange(count * 2, dtype=np.float32).reshape(count, 2))
    source = SimpleNamespace(
        inputs={"main": {"x": torch.zeros(2, 2)}}, dims={}, processor=None, batches=None
    )
    return Samples(source, CalibSpec(file=str(path), samples=16, batch=4))


def rows(batches) -> set[tuple[float, ...]]:
    return {tuple(row) for batch in batches for row in batch.inputs["x"].tolist()}


def test_held_out_samples_were_not_calibrated_on(tmp_path):
    samples = arrays(tmp_path / "a.npz", 40)
    fresh = samples.held_out(batches=3)
    assert [len(b.inputs["x"]) for b in fresh] == [4, 4, 4]
    assert not rows(fresh) & rows(samples("main"))


def test_a_file_that_was_calibrated_on_whole_holds_nothing_out(tmp_path):
    assert arrays(tmp_path / "a.npz", 16).held_out() == []


def test_reading_stops_when_enough_is_held_out(tmp_path, monkeypatch):
    samples = arrays(tmp_path / "a.npz", 10_000)
    read, whole = [], samples._records

    def counted(wanted):
        for record in whole(wanted):
            if wanted is None:
                read.append(record)
            yield record

    monkeypatch.setattr(samples, "_records", counted)
    assert len(samples.held_out(batches=2)) == 2
    assert len(read) <= 16 + 2 * 4


@pytest.mark.parametrize(("given", "match"), [(np.zeros((4, 3)), "shape"), (None, "no input 'x'")])
def test_a_batch_that_the_model_does_not_take_is_refused(tmp_path, given, match):
    from effc.errors import CalibrationError

    samples = arrays(tmp_path / "a.npz", 16)
    np.savez(tmp_path / "a.npz", **({"x": given} if given is not None else {"y": np.zeros((4, 2))}))
    with pytest.raises(CalibrationError, match=match):
        list(samples("main"))
