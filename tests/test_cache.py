"""Finished work is found again whole, or not at all."""

import json
import multiprocessing
import os
import time

import pytest

from effc import cache, scratch
from effc.cache import Cache, check, key_of
from effc.errors import UsageError
from effc.sizes import parse_bytes


@pytest.fixture
def kept(tmp_path):
    return Cache(tmp_path / "cache")


def put(kept, key, text="model", value=None):
    file = kept.root.parent / "model.onnx"
    file.write_text(text)
    kept.put(key, value, {"model.onnx": file})


def entry(kept, key):
    return kept.root / "entries" / key[:2] / key


KEY = key_of("test", a=1)


def test_what_is_put_is_found(kept, tmp_path):
    put(kept, KEY, value={"opset": 23})
    found = kept.get(KEY)
    assert found.value == {"opset": 23}
    assert found.copy_to(tmp_path / "new" / "place")
    assert (tmp_path / "new" / "place" / "model.onnx").read_text() == "model"
    assert check(kept.root) == []


def test_nothing_is_found_where_nothing_was_put(kept):
    assert kept.get(KEY) is None
    kept.forget(KEY)


def test_a_cache_that_is_off_keeps_nothing(tmp_path, monkeypatch):
    for word in ("off", "0", ""):
        monkeypatch.setenv("EFFC_CACHE", word)
        made = cache.default()
        made.put(KEY, 1)
        made.forget(KEY)
        assert made.root is None and made.get(KEY) is None


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("EFFC_CACHE_MAX", "2GB")
    assert (cache.default().root, cache.default().limit) == (tmp_path / "here", 2 * 10**9)
    monkeypatch.delenv("EFFC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default().root == tmp_path / "effc" / "work"
    monkeypatch.setenv("EFFC_CACHE_MAX", "much")
    with pytest.raises(UsageError, match="EFFC_CACHE_MAX: 'much' is no size"):
        cache.default()


@pytest.mark.parametrize("name", ["model.onnx", "value.json", "entry.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_an_entry_that_is_not_whole_counts_as_none(kept, name, harm):
    put(kept, KEY, value=[1, 2])
    file = entry(kept, KEY) / name
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif harm == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    assert check(kept.root) != []
    assert kept.get(KEY) is None
    put(kept, KEY, value=[1, 2])
    assert kept.get(KEY).value == [1, 2]


def test_a_key_hangs_on_everything():
    keys = {key_of("a", x=1), key_of("b", x=1), key_of("a", x=2), key_of("a", y=1), key_of("a")}
    assert len(keys) == 5
    assert key_of("a", x=1, y=2) == key_of("a", y=2, x=1)


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    kept = Cache(tmp_path / "cache", limit_bytes=2600)
    keys = [key_of("test", number=n) for n in range(3)]
    for age, key in enumerate(keys[:2]):
        put(kept, key, "x" * 1000)
        past = time.time() - 100 + age
        os.utime(entry(kept, key) / "entry.json", (past, past))
    assert kept.get(keys[0]) is not None  # used just now
    put(kept, keys[2], "x" * 1000)
    assert [kept.get(key) is not None for key in keys] == [True, False, True]
    assert check(kept.root) == []


def test_an_entry_may_go_while_it_is_copied(kept, tmp_path):
    put(kept, KEY)
    found = kept.get(KEY)
    kept.forget(KEY)
    assert not found.copy_to(tmp_path / "place")
    assert list((tmp_path / "place").iterdir()) == []


def test_a_cache_that_cannot_be_written_stops_nobody(tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    kept = Cache(tmp_path / "file" / "cache")
    kept.put(KEY, 1)
    assert kept.get(KEY) is None
    assert "takes nothing" in caplog.text


def test_a_strange_name_in_an_entry_is_not_followed(kept, tmp_path):
    put(kept, KEY)
    file = entry(kept, KEY) / "entry.json"
    (tmp_path / "secret").write_text("x")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "../../../../secret": "0" * 64}))
    assert kept.get(KEY) is None


def _fill(root, start):
    kept = Cache(root, limit_bytes=4000)
    for number in range(30):
        key = key_of("test", number=(start + number) % 12)
        found = kept.get(key)
        if found is not None:
            assert found.value == "x" * 300
        kept.put(key, "x" * 300)


@pytest.mark.slow
def test_many_compiles_share_one_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path / "c", 3 * n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0] * 4
    assert check(tmp_path / "c") == []
    size = sum(f.stat().st_size for f in (tmp_path / "c" / "entries").rglob("*") if f.is_file())
    assert size <= 4000 + 4 * 700


@pytest.mark.parametrize("name", ["entry-dead", "gone-dead"])
def test_leftovers_of_a_killed_compile_are_swept_by_the_next(kept, name):
    put(kept, KEY)
    left = kept.root / "tmp" / name
    (left / "entry").mkdir(parents=True)
    (left / scratch.MARK).touch()
    assert check(kept.root) == [f"tmp/{name} was left"]
    kept.sweep()
    assert check(kept.root) == []


def test_what_others_keep_in_a_folder_of_such_a_name_is_not_swept(kept):
    mine = kept.root / "tmp" / "entry-of-my-diary"
    mine.mkdir(parents=True)
    (mine / "today.txt").write_text("dear diary")
    kept.sweep()
    assert (mine / "today.txt").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1000", 1000), ("1.5 gb", 1_500_000_000), ("2k", 2000)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4XB", "nan", "inf", "1e400", "0"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)
