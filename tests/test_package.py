"""A package is whole or is told apart, is exchanged in one step, and needs no effc to run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effc import package
from effc.errors import PackageError
from kit import assert_letter, cli, content, leftovers, made


@pytest.fixture
def out(tmp_path):
    return Path(shutil.copytree(made().out, tmp_path / "out"))


# What is in it


def test_a_package_holds_what_an_encoder_needs():
    names = set(content(made().out))
    assert names >= {
        "model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json",
        "1_Pooling/config.json", "README.md", "LICENSE", "recipe.yaml", "manifest.json",
    }  # fmt: skip
    assert not {n for n in names if n.endswith((".safetensors", ".bin", ".pkl", ".py"))}


def test_the_manifest_lists_every_file_once():
    manifest = package.read(made().out)
    hashed, rest = set(manifest.files), set(manifest.unhashed)
    assert not hashed & rest
    assert hashed | rest | {package.MANIFEST} == set(content(made().out))
    assert manifest.kind == "encoder"
    (engine,) = manifest.engines
    assert (engine.role, engine.target, engine.path) == ("main", "ort", "model.onnx")
    assert (engine.int8_sites, engine.total_sites) == (14, 14)


def test_nothing_hashed_knows_where_it_was_made():
    manifest = package.read(made().out)
    here = str(made().model.parent).encode()
    for name in manifest.files:
        assert here not in (made().out / name).read_bytes(), name


def test_it_runs_where_effc_cannot_be_imported():
    script = """
import sys
sys.modules["effc"] = None
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
ids = np.arange(2, 10)[None]
feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
print(session.run(["last_hidden_state"], feeds)[0].shape, "torch" in sys.modules)
"""
    command = [sys.executable, "-I", "-c", script, str(made().out / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "(1, 8, 32) False\n", done.stderr


# Integrity


def test_a_whole_package_verifies(out):
    ran = cli("verify", out)
    assert ran.code == 0
    assert ran.out.startswith("integrity")


def test_one_flipped_bit_is_found(out):
    file = out / "model.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert_letter(cli("verify", out), "VerifyError", 10, "model.onnx differs")


def test_a_file_more_or_less_is_found(out):
    (out / "extra.bin").write_bytes(b"x")
    (out / "tokenizer.json").unlink()
    ran = cli("verify", out)
    assert_letter(
        ran, "VerifyError", 10, "extra.bin is not in the manifest", "tokenizer.json is missing"
    )


def test_a_link_in_place_of_a_file_is_found(out, tmp_path):
    (out / "LICENSE").unlink()
    (out / "LICENSE").symlink_to(out / "README.md")
    assert_letter(cli("verify", out), "VerifyError", 10, "LICENSE is missing")
    (out / "LICENSE").unlink()
    (out / "LICENSE").symlink_to(tmp_path / "elsewhere")
    assert_letter(cli("verify", out), "PackageError", 12, "'LICENSE' leads out of the package")


def test_timing_files_may_differ(out):
    (out / "timings.json").write_text("{}\n", encoding="utf-8")
    assert package.check(out) == []


def change_manifest(out: Path, change) -> None:
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("command", ["verify", "inspect", "bench"])
def test_a_manifest_of_another_schema_is_refused(out, command):
    change_manifest(out, lambda m: m.update(schema=99))
    assert_letter(cli(command, out), "PackageError", 12, "schema 99", "use the effc that wrote it")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', '"\\ud800"'])
def test_a_manifest_that_is_none_is_refused(out, text):
    (out / "manifest.json").write_text(text, encoding="utf-8")
    assert_letter(cli("verify", out), "PackageError", 12, "manifest.json")


def test_a_directory_that_is_no_package(tmp_path):
    assert_letter(cli("verify", tmp_path), "PackageError", 12, "is not a package")


def test_a_manifest_may_not_name_files_outside(out):
    change_manifest(out, lambda m: m["files"].update({"../../secret": "0" * 64}))
    assert_letter(cli("verify", out), "PackageError", 12, "'../../secret'")


def test_an_engine_outside_is_not_opened(out):
    change_manifest(out, lambda m: m["engines"][0].update(path="/etc/passwd"))
    assert_letter(cli("verify", out), "VerifyError", 10, "/etc/passwd")


# Names


def leads_outside(name: str) -> bool:
    parts = name.split("/")
    drive = len(name) > 1 and name[1] == ":"
    return name.startswith("/") or ".." in parts or "\0" in name or "\\" in name or drive


HOSTILE = st.lists(
    st.sampled_from(["..", ".", "", "a", "b.txt", "C:", "\\", "\0", "~", "..\\x", "é", " "]),
    max_size=6,
).map("/".join)


@given(name=HOSTILE | st.text(max_size=30))
def test_a_name_stays_inside_or_is_refused(name):
    root = Path("/nowhere/root")
    try:
        path = package.inside(root, name)
    except PackageError:
        return
    assert not leads_outside(name)
    assert path != root
    assert Path(os.path.normpath(path)).is_relative_to(root)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../../b", "/a", "C:/a", "C:a", "a\\b", "a\0b", "//a"]
)
def test_names_that_are_refused(tmp_path, name):
    with pytest.raises(PackageError):
        package.inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b.json", "1_Pooling/config.json", ".hidden", "a..b"])
def test_names_that_are_taken(tmp_path, name):
    assert package.inside(tmp_path, name) == tmp_path / name


def test_a_name_may_not_follow_a_link_out(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(PackageError):
        package.inside(tmp_path / "root", "link/a")


# Staging


def fill(stage: Path, text: str) -> None:
    (stage / "file").write_text(text, encoding="utf-8")
    package.write_manifest(stage, {"schema": 1, "kind": "module", "engines": []})


def test_a_new_package_takes_the_place_of_the_old(tmp_path):
    out = tmp_path / "deep" / "out"
    for text in ("old", "new"):
        with package.staged(out) as stage:
            fill(stage, text)
            assert stage.parent == out.parent
        assert (out / "file").read_text(encoding="utf-8") == text
        assert leftovers(out.parent) == []
    assert os.listdir(out.parent) == ["out"]


def test_without_an_atomic_swap_it_is_renamed_in_two_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "_swap", lambda a, b: False)
    for text in ("old", "new"):
        with package.staged(tmp_path / "out") as stage:
            fill(stage, text)
    assert (tmp_path / "out" / "file").read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_a_block_that_fails_leaves_the_old_package(tmp_path, error):
    with package.staged(tmp_path / "out") as stage:
        fill(stage, "old")
    before = content(tmp_path)

    def write() -> None:
        with package.staged(tmp_path / "out") as stage:
            fill(stage, "new")
            raise error

    with pytest.raises(error):
        write()
    assert content(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_package_without_manifest_is_not_put_in_place(tmp_path):
    with pytest.raises(PackageError), package.staged(tmp_path / "out") as stage:
        (stage / "file").write_text("x", encoding="utf-8")
    assert os.listdir(tmp_path) == []


def test_json_is_written_the_same_every_time():
    assert package.dump({"b": 1, "a": [1, "é"]}) == '{\n "a": [\n  1,\n  "é"\n ],\n "b": 1\n}\n'


@pytest.mark.slow
def test_compiling_twice_gives_the_same_bytes(tmp_path):
    from kit import int8

    out = tmp_path / "out"
    assert cli("compile", made().model, "-o", out, *int8(made())).code == 0
    unhashed = package.read(out).unhashed
    first, second = content(made().out), content(out)
    for name in unhashed:
        first.pop(name), second.pop(name)
    assert first == second
