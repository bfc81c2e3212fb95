"""A name from outside opens a plain file below the root, or nothing."""

import os
import stat
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effc import bounded, paths
from effc.errors import PackageError, SourceError

REFUSED = {
    "nothing": "",
    "the folder itself": ".",
    "the folder above": "..",
    "up at the start": "../a",
    "up in the middle": "a/../../b",
    "up at the end": "a/..",
    "up and down again": "a/../b",
    "a part that stays": "a/./b",
    "an empty part": "a//b",
    "a folder's name": "a/",
    "from the root": "/a",
    "from two roots": "//a",
    "another host": "//host/share/a",
    "another host by backslashes": "\\\\host\\share\\a",
    "a drive": "C:/a",
    "a folder of a drive": "C:a",
    "a stream of a file": "a:b",
    "a backslash": "a\\b",
    "up by backslashes": "..\\a",
    "the end of a C string": "a\0b",
    "a new line": "a\nb",
    "a bell": "a\x07",
    "a deleted letter": "a\x7f",
    "a control of Latin-1": "a\x85b",
    "a separator of lines": "a\u2028b",
    "half a character": "a\ud800",
    "a device": "nul",
    "a device with an ending": "weights/CON.json",
    "a port": "com1",
    "a dot at the end": "a.",
    "a blank at the end": "a ",
    "three dots": "...",
    "a long part": "x" * 300,
    "a part of many bytes": "é" * 128,
    "a long name": "/".join(["x" * 60] * 20),
    "many parts": "/".join("a" * 33),
}
TAKEN = [
    "a",
    "a/b.json",
    "1_Pooling/config.json",
    ".hidden",
    "a..b",
    "..a",
    "~",
    "$HOME",
    "%2e%2e",
    "console.json",
    "LICENSE-é",
    unicodedata.normalize("NFD", "LICENSE-é"),
    "A",
    "a b",
    "x" * 255,
    "é" * 127,
    "/".join("a" * 32),
]


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_are_refused(tmp_path, case):
    for use in (paths.inside, paths.opened):
        with pytest.raises(SourceError, match="is refused as the name of a file") as found:
            use(tmp_path, REFUSED[case], SourceError)
        assert found.value.hint
        assert str(found.value).isprintable() or "\n" in str(found.value)
        assert len(str(found.value).splitlines()) == 2


@pytest.mark.parametrize("name", TAKEN)
def test_names_that_are_taken(tmp_path, name):
    assert paths.inside(tmp_path, name) == tmp_path / name
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with paths.opened(tmp_path, name) as stream:
        assert stream.read() == b"x"
    assert list(paths.below(tmp_path)) == [name]


ACCENT = unicodedata.normalize("NFD", "é")


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (["a", "b", "a/b", "A/c"], None),
        (["b", "a", "A"], ("A", "a")),
        (["straße", "STRASSE"], ("STRASSE", "straße")),
        (["é", ACCENT], (ACCENT, "é")),
        (["x/É", f"X/{ACCENT}"], (f"X/{ACCENT}", "x/É")),
    ],
)
def test_names_that_are_one_file_on_another_system(names, pair):
    assert paths.twins(names) == pair


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A root with plain files and every kind of thing that is none, and a secret outside of it."""
    place = tmp_path_factory.mktemp("tree")
    root = place / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    for name in ("plain", "sub/plain", "sub/deep/plain"):
        (root / name).write_bytes(b"mine")
    (place / "secret").write_bytes(b"secret")
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "plain").write_bytes(b"secret")
    (root / "out").symlink_to(place / "secret")
    (root / "relative").symlink_to("../secret")
    (root / "chain1").symlink_to("chain2")
    (root / "chain2").symlink_to("out")
    (root / "folder").symlink_to(place / "elsewhere")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    (root / "inner").symlink_to("plain")
    (root / "up").symlink_to("..")
    (root / "device").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe")
    return root


NO_FILES = ["out", "relative", "chain1", "chain2", "loop", "dangling", "inner", "device"]
NO_FILES += ["folder/plain", "up/secret", "up/root/plain", "plain/x", "pipe/x", "loop/x"]
NO_FILES += ["pipe", "sub", "sub/deep", "folder"]


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_plain_file_is_not_opened(tree, name):
    with pytest.raises(PackageError, match="is not a plain file"):
        paths.opened(tree, name)


@pytest.mark.parametrize(
    "name", [n for n in NO_FILES if n.split("/")[0] not in ("pipe", "sub", "plain")]
)
def test_a_path_through_a_link_is_not_given(tree, name):
    with pytest.raises(PackageError, match="is a link"):
        paths.inside(tree, name)


def test_a_file_that_is_not_there(tree):
    for name in ("nowhere", "nowhere/x", "sub/nowhere"):
        with pytest.raises(PackageError, match=f"{name} is missing"):
            paths.opened(tree, name)
    with pytest.raises(PackageError, match="x is missing"):
        paths.opened(tree / "nowhere", "x")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no devices here")
def test_a_device_is_not_opened():
    with pytest.raises(PackageError, match="is not a plain file"):
        paths.opened(Path("/dev"), "zero")
    with pytest.raises(SourceError, match="is not a plain file"):
        paths.plain(Path("/dev/zero"), SourceError)


def test_the_root_itself_may_be_a_link(tree, tmp_path):
    (tmp_path / "link").symlink_to(tree)
    with paths.opened(tmp_path / "link", "sub/plain") as stream:
        assert stream.read() == b"mine"


def test_a_second_name_of_a_file_is_refused_where_it_must_have_one(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    os.link(tmp_path / "a", tmp_path / "b")
    paths.opened(tmp_path, "a").close()
    with pytest.raises(PackageError, match="has 2 names") as found:
        paths.opened(tmp_path, "a", alone=True)
    assert "cp -r" in str(found.value)
    (tmp_path / "b").unlink()
    paths.opened(tmp_path, "a", alone=True).close()


@pytest.mark.parametrize("put", ["link", "pipe", "another file"])
def test_a_file_that_is_exchanged_while_it_is_opened_is_not_given(tmp_path, monkeypatch, put):
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    file = tmp_path / "root" / "a"
    file.write_bytes(b"mine")
    look = os.stat

    def exchange(*words, **options):
        found = look(*words, **options)
        if words[0] == "a":
            file.rename(tmp_path / "old")
            if put == "link":
                file.symlink_to(tmp_path / "secret")
            elif put == "pipe":
                os.mkfifo(file)
            else:
                file.write_bytes(b"another")
        return found

    monkeypatch.setattr(os, "stat", exchange)
    with pytest.raises(PackageError, match="is not a plain file"):
        paths.opened(tmp_path / "root", "a")


def test_systems_that_cannot_open_below_a_folder_walk_by_path(tree, monkeypatch):
    monkeypatch.setattr(paths, "_BELOW", False)
    with paths.opened(tree, "sub/deep/plain") as stream:
        assert stream.read() == b"mine"
    for name in NO_FILES:
        with pytest.raises(PackageError):
            paths.opened(tree, name)


PIECES = [
    "..",
    ".",
    "",
    "plain",
    "sub",
    "deep",
    *{n.split("/")[0] for n in NO_FILES},
    "secret",
    "\\",
]
HOSTILE = st.lists(
    st.sampled_from([*PIECES, "C:", "\0", "~", "..\\x", "é", " ", "con", "root", "elsewhere"]),
    max_size=6,
).map("/".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500)
@given(name=HOSTILE | st.text(max_size=30))
def test_whatever_the_name_only_a_file_of_ours_is_opened(tree, name):
    mine = {(p.stat().st_dev, p.stat().st_ino) for p in tree.rglob("plain") if not p.is_symlink()}
    try:
        stream = paths.opened(tree, name)
    except PackageError:
        return
    with stream:
        found = os.fstat(stream.fileno())
        assert (found.st_dev, found.st_ino) in mine
        assert stat.S_ISREG(found.st_mode)
        assert stream.read() == b"mine"


@given(name=HOSTILE | st.text(max_size=30))
def test_whatever_the_name_a_path_lies_below_the_root(name):
    root = Path("/nowhere/root")
    try:
        path = paths.inside(root, name)
    except PackageError:
        return
    assert path != root
    assert Path(os.path.normpath(path)) == path
    assert path.is_relative_to(root)


# What the user names


def test_a_link_of_the_user_is_followed(tree):
    with paths.plain(tree / "inner", SourceError) as stream:
        assert stream.read() == b"mine"


@pytest.mark.parametrize("name", ["pipe", "sub", "loop", "dangling", "device", "nowhere", "a\0b"])
def test_what_the_user_names_and_is_no_file(tree, name):
    with pytest.raises(SourceError) as found:
        paths.plain(tree / name, SourceError)
    assert found.value.hint


# What lies below a folder


def test_everything_below_a_folder_is_listed_and_no_link_followed(tree):
    names = set(paths.below(tree))
    assert names >= {"plain", "sub/plain", "sub/deep/plain", "out", "folder", "loop", "pipe", "up"}
    assert "sub" not in names
    assert not any(name.startswith(("folder/", "up/")) for name in names)


def test_folders_deeper_than_a_name_can_be_are_listed_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    try:
        assert list(paths.below(tmp_path)) == ["/".join("d" * paths.MOST_PARTS)]
    finally:
        for _ in range(1200):
            os.chdir("..")
            os.rmdir("d")


def test_a_name_that_cannot_be_printed_is_shown_on_one_line():
    assert paths.word("a\nb") == "a\\nb"
    assert paths.word("x" * 300) == "x" * 90 + "…"
    assert paths.shown("") == "''"
    assert paths.shown("a\ud800") == "'a\\ud800'"


# Text and JSON within bounds


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b'"\\ud800"', "surrogates"),
        (b"[" * 100_000, "nested too deep"),
        (b"[" * 65 + b"]" * 65, "more than 64 deep"),
        (b"1" * 5000, "cannot be read"),
        (b" " * 101, "more than 100 bytes"),
    ],
)
def test_json_that_is_not_read(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SourceError, match=said) as found:
        bounded.read_json(
            tmp_path / "a.json", SourceError, 100 if b" " in content else bounded.MOST_BYTES
        )
    assert "a.json" in found.value.what
    assert found.value.hint


def test_json_and_text_that_are_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" * 63 + b"1" + b"]" * 63)
    bounded.read_json(tmp_path / "a.json", SourceError)
    (tmp_path / "a.txt").write_text("é\n", encoding="utf-8")
    assert bounded.text_of(tmp_path / "a.txt", SourceError) == "é\n"
    (tmp_path / "a.txt").write_bytes(b"\xe9")
    with pytest.raises(SourceError, match="not UTF-8"):
        bounded.text_of(tmp_path / "a.txt", SourceError)
