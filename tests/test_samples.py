"""What a compile measures on: held-out samples come from the same file and cost what is asked for."""

import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from effc.calib import data
from effc.errors import CalibrationError
from effc.recipe import CalibSpec
from effc.samples import Samples


def drawn(path, example: torch.Tensor, samples: int) -> Samples:
    source = SimpleNamespace(
        inputs={"main": {"x": example}},
        dims={},
        processor=None,
        batches=None,
        name="m",
        centroids=None,
        file=None,
    )
    return Samples(source, CalibSpec(file=str(path), samples=samples, batch=4))


def arrays(path, count: int) -> Samples:
    np.savez(path, x=np.arange(count * 2, dtype=np.float32).reshape(count, 2))
    return drawn(path, torch.zeros(2, 2), samples=16)


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
    read, whole = [], data._Stored._read

    def counted(self, shape):
        read.append(shape)
        return whole(self, shape)

    monkeypatch.setattr(data._Stored, "_read", counted)
    assert len(samples.held_out(batches=2)) == 2
    assert len(read) <= 16 + 2 * 4


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("x.npy", "w") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (4000, 12_000)}
        np.lib.format.write_array_header_1_0(stream, header)
        for _ in range(4000):
            stream.write(bytes(48_000))

    def peak(count: int) -> int:
        samples = drawn(tmp_path / "a.npz", torch.zeros(2, 12_000), samples=count)
        tracemalloc.start()
        assert sum(len(batch.inputs["x"]) for batch in samples("main")) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(3000) == pytest.approx(peak(10), rel=0.1)


def test_only_pictures_that_are_drawn_are_opened(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    for i in range(30):
        image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i:02}.png")
    opened, whole = [], image.open
    monkeypatch.setattr(
        image, "open", lambda file: opened.append(Path(file.name).name) or whole(file)
    )
    mine = [int(record.pixels[0, 0]) for record in data.read(tmp_path, samples=4, seed=1)]
    assert opened == [f"{i:02}.png" for i in mine] and len(mine) == 4


# Batches of one's own


def own(tmp_path, code: str) -> Samples:
    (tmp_path / "mine.py").write_text(f"import numpy as np\ndef make():\n    {code}\n")
    samples = arrays(tmp_path / "a.npz", 16)
    return Samples(samples.source, CalibSpec(callable=f"{tmp_path / 'mine.py'}:make"))


WRONG = {
    "raise OSError('no disk')": "mine.py:make failed: OSError: no disk",
    "return None": "mine.py:make gave NoneType, which holds no batches",
    "yield [1, 2]": "a batch of .* is list, not a mapping",
    "return {'x': np.zeros((2, 2))}": "a batch of .* is str, not a mapping",
    "yield {'x': [[1.0, 2.0], [3.0]]}": "input 'x' of .* is no array: .*inhomogeneous",
    "yield {'x': np.zeros((2, 2), object)}": "input 'x' is object, the model takes float32",
    "yield {'x': np.zeros((2, 2), int)}": "input 'x' is int64, the model takes float32",
    "yield {'x': np.zeros((2, 2))}; yield 1 / 0": "failed: ZeroDivisionError",
}


@pytest.mark.parametrize("code", WRONG)
def test_what_goes_wrong_in_ones_own_batches_is_said(tmp_path, code):
    samples = own(tmp_path, code)
    with pytest.raises(CalibrationError, match=WRONG[code]):
        list(samples("main"))


@pytest.mark.parametrize("code", WRONG)
def test_batches_of_a_source_are_guarded_as_well(tmp_path, code):
    from effc.source import import_code

    source = own(tmp_path, code).source
    source.batches = import_code(str(tmp_path / "mine.py")).make
    with pytest.raises(
        CalibrationError, match=WRONG[code].replace(r"mine.py:make", "the source m")
    ):
        list(Samples(source, None)("main"))


def test_what_stops_a_run_is_let_through(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        list(own(tmp_path, "raise KeyboardInterrupt")("main"))


def test_tensors_and_lists_are_arrays(tmp_path):
    code = (
        "import torch; yield {'x': torch.ones(1, 2, requires_grad=True)}; yield {'x': [[2.0, 3.0]]}"
    )
    assert rows(own(tmp_path, code)("main")) == {(1.0, 1.0), (2.0, 3.0)}


@pytest.mark.parametrize(("given", "match"), [(np.zeros((4, 3)), "shape"), (None, "no input 'x'")])
def test_a_batch_that_the_model_does_not_take_is_refused(tmp_path, given, match):
    samples = arrays(tmp_path / "a.npz", 16)
    np.savez(tmp_path / "a.npz", **({"x": given} if given is not None else {"y": np.zeros((4, 2))}))
    with pytest.raises(CalibrationError, match=match):
        list(samples("main"))
