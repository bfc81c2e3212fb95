"""Samples from files: what is good is read in order, what is bad is named."""

import gzip
import hashlib
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from effc.calib import data
from effc.calib.data import Record, digest, parse, read
from effc.errors import CalibrationError


def texts(path: Path, **options) -> list[str | None]:
    return [record.text for record in read(path, **options)]


def refused(path: Path, match: str, **options) -> None:
    with pytest.raises(CalibrationError, match=match):
        list(read(path, **options))


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


PICTURES = np.arange(4 * 3 * 2).reshape(4, 3, 2)
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def test_a_text_file_has_a_sample_a_line(write):
    path = write("a.txt", "one\n\n  \ntwo words\r\nthree")
    assert list(read(path)) == [Record(text=t) for t in ("one", "two words", "three")]


def test_a_mark_of_the_byte_order_is_no_text(write):
    assert texts(write("a.txt", b"\xef\xbb\xbfone\ntwo\n")) == ["one", "two"]
    assert texts(write("a.csv", b"\xef\xbb\xbftext,label\none,1\n")) == ["one"]


def test_a_line_that_is_not_utf8_is_named(write):
    lines = [b"fine"] * 3000 + [b"caf\xe9"] + [b"fine"]
    refused(write("a.txt", b"\n".join(lines)), r"a\.txt line 3001 is not UTF-8")
    refused(write("a.csv", b"\n".join(lines)), r"a\.csv line 3001 is not UTF-8")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_holds_no_samples(write, name, content):
    refused(write(name, content), "holds no samples")


def test_a_header_alone_holds_no_samples(write):
    refused(write("a.csv", "text,label\n"), "holds no samples")


def test_what_is_not_there_is_said(tmp_path):
    refused(tmp_path / "no.txt", r"there is no calibration file .*no\.txt")


def test_an_unknown_kind_is_refused(write):
    refused(write("a.parquet", "PAR1"), "no kind that effc reads")


@pytest.mark.parametrize(
    ("content", "column", "expected"),
    [
        ("a,b\nc,d\n", None, ["a", "c"]),
        ("a,b\nc,d\n", 1, ["b", "d"]),
        ("x,y\na,b\nc,d\n", "y", ["b", "d"]),
        ('"a, b",1\n"he said ""no""",2\n', None, ["a, b", 'he said "no"']),
        ('"two\nlines",1\nb,2\n', None, ["two\nlines", "b"]),
        ("a,b\n\nc,d\n", None, ["a", "c"]),
        ("id,text\n1,a\n", None, ["a"]),
    ],
)
def test_a_column_is_found_by_name_or_number(write, content, column, expected):
    assert texts(write("a.csv", content), column=column) == expected


def test_a_table_of_tabs_has_no_quotes(write):
    assert texts(write("a.tsv", '"a\tx\nb"\ty\n')) == ['"a', 'b"']


@pytest.mark.parametrize(
    "content",
    ["label,sentence\n1,a\n0,b\n", "sentence,label\na,1\nb,0\n", "Text,Label\na,1\nb,0\n"],
)
def test_a_label_column_gives_labels(write, content):
    assert [(r.text, r.label) for r in read(write("a.csv", content))] == [("a", 1), ("b", 0)]


def test_a_label_comes_along_with_a_named_column(write):
    path = write("a.csv", "q,label,text\nx,3,a\n")
    assert list(read(path, column="q")) == [Record(text="x", label=3)]


@pytest.mark.parametrize(
    ("content", "column", "match"),
    [
        ("x,y\na,b\n", "z", "no column 'z'"),
        ("a,b\nc\n", 1, "line 2 has 1 columns, not 2"),
        ("text,label\na,1\nb\n", None, "line 3 has 1 columns, not 2"),
        ("text,label\na,1\n\nb,good\n", None, "line 4: the label is not a whole number"),
        ('a,b\n"c"d,e\n', None, "line 2 is no table row"),
        ('a,b\n"never closed,e\nf,g\n', None, "is no table row"),
    ],
)
def test_a_table_at_fault_is_refused_with_its_line(write, content, column, match):
    refused(write("a.csv", content), match, column=column)


def test_only_tables_have_columns(write):
    refused(write("a.txt", "one\n"), "has no columns", column=1)


@pytest.mark.parametrize(
    ("spec", "path", "column"),
    [
        ("a.csv", "a.csv", None),
        ("a.csv#2", "a.csv", 2),
        ("a.csv#text", "a.csv", "text"),
        ("a.csv#²", "a.csv", "²"),
        ("a.csv#", "a.csv#", None),
        ("#1/a.csv", "#1/a.csv", None),
        ("part#1/a.csv", "part#1/a.csv", None),
        ("part#1/a.csv#3", "part#1/a.csv", 3),
    ],
)
def test_a_column_is_written_behind_the_file(spec, path, column):
    assert parse(spec) == (Path(path), column)


def test_a_file_that_is_called_so_wins(write):
    path = write("a#b.txt", "one\n")
    assert parse(path) == (path, None)


def test_samples_are_drawn_by_seed_in_file_order(write):
    path = write("a.txt", "\n".join(f"{i:03}" for i in range(200)))
    drawn = texts(path, samples=20, seed=3)
    assert drawn == texts(path, samples=20, seed=3) == sorted(drawn)
    assert len(set(drawn)) == 20
    assert drawn != texts(path, samples=20, seed=4)
    assert texts(path, samples=500) == texts(path, samples=200) == texts(path)


def test_every_line_is_as_likely_to_be_drawn(write):
    path = write("a.txt", "\n".join("abcdefghij"))
    counts = dict.fromkeys("abcdefghij", 0)
    for seed in range(1000):
        for text in texts(path, samples=3, seed=seed):
            counts[text] += 1
    assert all(230 < count < 370 for count in counts.values())  # 300 expected, 14.5 a deviation


@pytest.mark.parametrize("kind", ["a.txt", "a.csv.gz", "a.npz", IMAGES, "folder"])
def test_what_a_draw_takes_and_what_it_leaves_is_the_whole_file(write, tmp_path, kind):
    values = np.arange(12)
    if kind == "a.txt":
        path = write(kind, "\n\n".join(map(str, values)))
    elif kind == "a.csv.gz":
        path = write(kind, gzip.compress("\n".join(["text", *map(str, values)]).encode()))
    elif kind == "a.npz":
        path = tmp_path / kind
        np.savez(path, x=values)
    elif kind == IMAGES:
        path = write(kind, idx(values.reshape(12, 1, 1)))
    else:
        image, path = pytest.importorskip("PIL.Image"), tmp_path
        for i in values:
            image.fromarray(np.full((1, 1), i, np.uint8)).save(tmp_path / f"{i:02}.png")

    def number(record: Record) -> int:
        if record.pixels is not None:
            return int(record.pixels[0, 0])
        return int(record.text if record.arrays is None else record.arrays["x"])

    def read_values(**options) -> list[int]:
        return [number(record) for record in read(path, **options)]

    taken, left = (read_values(samples=5, seed=2, left=left) for left in (False, True))
    assert len(taken) == 5 and taken == sorted(taken) and left == sorted(left)
    assert sorted(taken + left) == read_values() == values.tolist()
    assert read_values(samples=12, left=True) == []


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_cannot_be_drawn(write, samples):
    refused(write("a.txt", "one\n"), "cannot be drawn", samples=samples)


@pytest.mark.slow
def test_drawing_from_a_long_file_takes_the_memory_of_a_short_one(write, tmp_path):
    long = write("long.txt", ("x" * 200 + "\n") * 50_000)
    np.savez(tmp_path / "long.npz", x=np.zeros((10_000, 250), np.float32))

    def peak(path: Path) -> int:
        tracemalloc.start()
        assert len(list(read(path, samples=10))) == 10
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(long) < 1 << 20
    assert peak(tmp_path / "long.npz") < 1 << 20


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_have_their_samples_along_the_first_axis(tmp_path, save):
    ids = np.arange(12, dtype=np.int64).reshape(4, 3)
    by_column = np.asfortranarray(np.random.default_rng(0).normal(size=(4, 2, 3)))
    save(
        tmp_path / "a.npz",
        input_ids=ids,
        pixels=by_column,
        label=np.array([3, 1, 2, 0]),
        t=ids[:, 0],
    )
    records = list(read(tmp_path / "a.npz"))
    assert [r.label for r in records] == [3, 1, 2, 0]
    for i, record in enumerate(records):
        assert list(record.arrays) == ["input_ids", "pixels", "t"]
        assert record.arrays["input_ids"].dtype == np.int64
        np.testing.assert_array_equal(record.arrays["input_ids"], ids[i])
        np.testing.assert_array_equal(record.arrays["pixels"], by_column[i])
        assert record.arrays["t"].shape == ()
    drawn = list(read(tmp_path / "a.npz", samples=2, seed=1))
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": np.zeros((3, 2)), "y": np.zeros((4, 2))}, "differ in their number of samples"),
        ({"x": np.zeros((3, 2)), "y": np.array(1.0)}, "differ in their number of samples"),
        ({"x": np.array([{"a": 1}], dtype=object)}, "'x' holds Python objects"),
        ({"x": np.zeros((2, 1)), "label": np.array([0.5, 1])}, "`label` is not one whole number"),
        ({"x": np.zeros((2, 1)), "label": np.array([[0], [1]])}, "`label` is not one whole number"),
        ({"x": np.zeros((0, 4))}, "holds no samples"),
        ({}, "holds no samples"),
    ],
)
def test_arrays_that_are_no_samples_are_refused(tmp_path, arrays, match):
    np.savez(tmp_path / "a.npz", **arrays)
    refused(tmp_path / "a.npz", match)


def test_samples_without_size_are_samples(tmp_path):
    np.savez(tmp_path / "a.npz", past=np.zeros((2, 0, 4), np.float32))
    assert [r.arrays["past"].shape for r in read(tmp_path / "a.npz")] == [(0, 4), (0, 4)]


def test_a_damaged_archive_is_refused(write, tmp_path):
    refused(write("a.npz", "not a zip"), "cannot be read as arrays")
    np.savez_compressed(tmp_path / "b.npz", x=np.random.default_rng(0).normal(size=(500, 8)))
    content = bytearray((tmp_path / "b.npz").read_bytes())
    content[1000:1010] = bytes(10)
    refused(write("b.npz", bytes(content)), "cannot be read as arrays")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    refused(tmp_path / "c.npz", "'notes.txt' is no array")
    np.save(tmp_path / "x.npy", np.zeros((9, 9)))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes()[:-8])
    refused(tmp_path / "d.npz", "'x' is cut short")
    huge = (tmp_path / "x.npy").read_bytes().replace(b"(9, 9), } ", b"(9, 9" + b"0" * 12 + b"), } ")
    with zipfile.ZipFile(tmp_path / "e.npz", "w") as archive:
        archive.writestr("x.npy", huge[: 10 + 118] + bytes(72))
    refused(tmp_path / "e.npz", "'x' is")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_of_idx_files_has_pictures_and_labels(write, tmp_path, zipped):
    pack, end = (gzip.compress, ".gz") if zipped else (bytes, "")
    path = write(IMAGES + end, pack(idx(PICTURES)))
    write(LABELS + end, pack(idx(np.array([3, 0, 255, 1]))))
    write("README.txt", "about")
    for place in (tmp_path, path):
        records = list(read(place))
        assert [r.label for r in records] == [3, 0, 255, 1]
        for record, picture in zip(records, PICTURES, strict=True):
            assert record.pixels.dtype == np.uint8
            np.testing.assert_array_equal(record.pixels, picture)


def test_idx_pictures_need_no_labels(write, tmp_path):
    write(IMAGES, idx(PICTURES))
    assert [r.label for r in read(tmp_path)] == [None] * 4


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (b"\0\0\x09\x03" + idx(PICTURES)[4:], None, "is not an idx file of bytes with 3"),
        (idx(PICTURES)[:9], None, "is not an idx file of bytes with 3"),
        (idx(np.arange(4)), None, "is not an idx file of bytes with 3"),
        (idx(PICTURES)[:-1], None, "is cut short"),
        (idx(PICTURES)[:8] + b"\x7f" * 8, None, "claims pictures of 2139062143 × 2139062143"),
        (idx(PICTURES) + b"x", None, "go on after 4 samples"),
        (idx(PICTURES), idx(np.arange(3)), "holds 4 pictures but 3 labels"),
        (idx(PICTURES), idx(np.arange(4))[:-1], "labels-idx1-ubyte is cut short"),
        (idx(PICTURES), idx(np.arange(4)) + b"x", "go on after 4 samples"),
        (idx(np.zeros((0, 3, 2))), None, "holds no samples"),
    ],
)
def test_idx_files_at_fault_are_refused(write, tmp_path, images, labels, match):
    write(IMAGES, images)
    if labels is not None:
        write(LABELS, labels)
    refused(tmp_path, match)


def test_a_damaged_gzip_is_refused(write, tmp_path):
    packed = gzip.compress(idx(PICTURES))
    for content in (b"no gzip", packed[:-12], packed[:20] + b"\xff\xff" + packed[22:]):
        write(IMAGES + ".gz", content)
        with pytest.raises(CalibrationError):
            list(read(tmp_path))


def test_two_sets_of_idx_files_are_not_guessed_between(write, tmp_path):
    write(IMAGES, idx(PICTURES))
    other = write(IMAGES.replace("train", "t10k"), idx(PICTURES[:2]))
    refused(tmp_path, "2 files that could be samples: t10k")
    assert len(list(read(other))) == 2


def test_a_folder_of_pictures_is_labelled_by_its_folders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for place, mode, shape in (
        ("cat", "L", (4, 5)),
        ("dog", "RGB", (4, 5, 3)),
        ("dog", "RGBA", (4, 5, 4)),
    ):
        (tmp_path / place).mkdir(exist_ok=True)
        image.fromarray(np.full(shape, 7, np.uint8)).save(tmp_path / place / f"{mode}.png")
    (tmp_path / ".cache").mkdir()
    records = list(read(tmp_path))
    assert [(r.label, r.pixels.shape) for r in records] == [
        (0, (4, 5)),
        (1, (4, 5, 3)),
        (1, (4, 5, 3)),
    ]
    refused(tmp_path, "has no columns", column=1)
    (tmp_path / "dog" / "worse.jpg").write_bytes(b"no picture")
    refused(tmp_path, r"worse\.jpg cannot be read as a picture")


def test_a_folder_with_one_file_is_that_file(write, tmp_path):
    write("README.txt", "about")
    write("LICENSE.txt", "do")
    write("part/data.txt", "hidden")
    write("data.csv", "x,y\na,b\n")
    assert texts(tmp_path, column="y") == ["b"]
    write("more.txt", "one\n")
    refused(tmp_path, r"2 files that could be samples: data\.csv, more\.txt")


def test_an_empty_folder_is_refused(tmp_path):
    refused(tmp_path, "holds 0 files that could be samples")


def test_a_digest_names_the_file_and_its_content(write):
    path = write("a.txt", "one\n")
    assert digest(path) == {
        "name": "a.txt",
        "bytes": 4,
        "sha256": hashlib.sha256(b"one\n").hexdigest(),
    }


def test_the_digest_of_a_folder_knows_names_and_content(write, tmp_path):
    write("d/a.txt", "one\n")
    first = digest(tmp_path / "d")
    assert first["name"] == "d" and first["bytes"] == 4
    assert first == digest(tmp_path / "d")
    (tmp_path / "d" / "a.txt").rename(tmp_path / "d" / "b.txt")
    renamed = digest(tmp_path / "d")
    write("d/b.txt", "two\n")
    assert len({first["sha256"], renamed["sha256"], digest(tmp_path / "d")["sha256"]}) == 3


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "one,1\ntwo,0\n"), ("a.tsv", "one\t1\ntwo\t0\n"), ("a.tsv", "text\tlabel\none\t1\ntwo\t0\n")],
)  # fmt: skip
def test_a_labelled_table_without_a_header_is_text_and_label(write, zipped, name, content):
    path = write(name + ".gz", gzip.compress(content.encode())) if zipped else write(name, content)
    assert [(r.text, r.label) for r in read(path, labelled=True)] == [("one", 1), ("two", 0)]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", "one\n", "line 1 has 1 columns, not 2"),
        ("a.csv", "one,good\n", "line 1: the label is not a whole number"),
        ("a.csv", "text,score\none,1\n", "has samples without a label"),
        ("a.txt", "one\n", "has samples without a label"),
    ],
)
def test_a_sample_that_lacks_its_label_is_refused(write, name, content, match):
    refused(write(name, content), match, labelled=True)


def test_a_zipped_text_is_a_text(write, tmp_path):
    packed = gzip.compress(b"one\ntwo\n")
    assert texts(write("a.txt.gz", packed)) == ["one", "two"]
    assert texts(tmp_path) == ["one", "two"]
    refused(write("a.txt.gz", packed[:-9]), r"a\.txt\.gz cannot be read")
    refused(write("a.txt.gz", b"plain"), r"a\.txt\.gz cannot be read")


# What is a trap


def test_a_line_without_end_is_not_read_to_its_end(write, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE", 100)
    refused(write("a.txt", "x" * 101), "line 1 has more than 100 bytes")
    assert texts(write("b.txt", "x" * 100)) == ["x" * 100]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.gz", bytes(1 << 24)),
        ("a.csv.gz", b"\n" * (1 << 24)),
        ("a.tsv.gz", b"a\n" * (1 << 23)),
        ("a-images-idx3-ubyte.gz", idx(np.zeros((4, 2000, 2000)))),
    ],
)
@pytest.mark.slow
def test_what_unpacks_to_far_more_than_it_is_is_refused(write, name, content):
    refused(write(name, gzip.compress(content)), "unpacks to more than 200 times its size")


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((4, 1 << 18)))
    refused(tmp_path / "a.npz", "more than 200 times its size")


def test_a_mask_of_ones_beside_real_numbers_is_no_trap(tmp_path):
    ids = np.random.default_rng(0).integers(0, 30000, (2000, 256))
    np.savez_compressed(tmp_path / "a.npz", ids=ids, mask=np.ones_like(ids), types=0 * ids)
    assert len(list(read(tmp_path / "a.npz"))) == 2000


def archive(path: Path, **heads: str) -> Path:
    """An .npz of arrays whose headers are as given, with 64 bytes each."""
    with zipfile.ZipFile(path, "w") as made:
        for name, head in heads.items():
            text = f"{{'descr': {head}, }}\n".encode()
            size = struct.pack("<H", len(text))
            made.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + size + text + bytes(64))
    return path


@pytest.mark.parametrize(
    ("head", "match"),
    [
        ("'<i8', 'fortran_order': False, 'shape': (1 << 60, 8)", "is no array"),
        ("'<i8', 'fortran_order': False, 'shape': (1000000000000, 8)", "is cut short"),
        ("'<i8', 'fortran_order': True, 'shape': (1000000000000, 8)", "is cut short"),
        ("'<i8', 'fortran_order': False, 'shape': (-1, 8)", "is cut short"),
        ("'<i8', 'fortran_order': False, 'shape': (1000000000000, 0)", "samples of nothing"),
        ("'|S0', 'fortran_order': False, 'shape': (1000000000000, 8)", "not numbers"),
        ("'|O', 'fortran_order': False, 'shape': (1, 8)", "holds Python objects"),
        ("[('a', '<i8')], 'fortran_order': False, 'shape': (1, 8)", "not numbers"),
        ("'<M8[s]', 'fortran_order': False, 'shape': (1, 8)", "not numbers"),
        ("__import__('os').abort(), 'fortran_order': False, 'shape': (1, 8)", "is no array"),
        ("'<i8', 'fortran_order': False, 'shape': " + "(" * 900 + ")" * 900, "is no array"),
    ],
)
def test_an_array_that_claims_what_it_has_not_is_refused(tmp_path, head, match):
    refused(archive(tmp_path / "a.npz", x=head), match)


@pytest.mark.parametrize("shape", [(2**31, 0, 5), (4, 2**16, 2**16), (4, 0, 0)])
def test_idx_pictures_of_no_size_or_of_any_are_refused(write, shape):
    head = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape)
    refused(write("a-images-idx3-ubyte", head), "claims pictures")


@pytest.mark.slow
def test_a_picture_that_says_it_is_huge_is_not_unpacked(write, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    pillow.new("RGB", (11_000, 9_000)).save(tmp_path / "a.png")
    refused(tmp_path, "says it has 11000 × 9000 pixels")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.npz", "a.txt.gz", "a-images-idx3-ubyte"])
def test_a_pipe_or_a_device_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, "is not a plain file")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    refused(tmp_path / name, "is not a plain file")


def test_a_pipe_among_pictures_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    refused(tmp_path, "is not a plain file")


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_a_folder_that_lies_in_itself_is_empty(tmp_path, name):
    (tmp_path / name).symlink_to(".")
    refused(tmp_path, "0 files that could be samples")


@pytest.mark.parametrize("word", ["x" * 5000, "a\0b", "x" * 5000 + "#1", "a#" + "9" * 5000])
def test_a_word_that_no_file_can_have_is_one_that_is_not_there(word):
    path, _ = parse(word)
    refused(path, "there is no calibration file")
    with pytest.raises(CalibrationError, match="there is no calibration file"):
        digest(path)
