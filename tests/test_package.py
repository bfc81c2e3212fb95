"""A package is whole or is told apart, is exchanged in one step, and needs no effc to run."""

import errno
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
    assert_letter(cli("verify", out), "VerifyError", 10, "LICENSE is not a plain file")
    (out / "LICENSE").unlink()
    (out / "LICENSE").symlink_to(out / "LICENSE")
    assert_letter(cli("verify", out), "VerifyError", 10, "LICENSE is not a plain file")
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
    assert_letter(cli("verify", out), "PackageError", 12, "/etc/passwd")


@pytest.mark.parametrize("command", ["verify", "inspect", "bench"])
@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..\\secret", "a\0b"])
def test_a_name_that_leads_outside_is_refused_wherever_it_stands(out, command, name):
    change_manifest(out, lambda m: m["unhashed"].append(name))
    assert_letter(cli(command, out), "PackageError", 12, repr(name))


def nested(depth: int) -> object:
    found: object = 0
    for _ in range(depth):
        found = [found]
    return found


DAMAGE = {
    "no engine": (lambda m: m.update(engines=[]), "engines"),
    "an engine for nobody": (lambda m: m["engines"][0].update(target="eager"), "'eager'"),
    "an engine of a later effc": (lambda m: m["engines"][0].update(target="npu"), "'npu'"),
    "a pass without anything": (lambda m: m.update(passes=[{}]), "passes.0"),
    "a port without a name": (lambda m: m["engines"][0]["inputs"][0].pop("name"), "inputs.0.name"),
    "a port without a type": (lambda m: m["engines"][0]["inputs"][0].pop("dtype"), "inputs.0"),
    "a port without a shape": (lambda m: m["engines"][0]["outputs"][0].pop("shape"), "outputs.0"),
    "a site without a reason": (
        lambda m: m["engines"][0].update(float_sites=[{"name": "a"}]),
        "float_sites.0",
    ),
    "half a character": (lambda m: m.update(kind="\ud800"), "surrogates"),
    "deep": (lambda m: m.update(data={"x": nested(100)}), "deep"),
    "a long number": (lambda m: m.update(data={"x": 10**4000}), None),
    "a source without a name": (lambda m: m.update(source={}), None),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_manifest_is_one_clear_error(out, case):
    change, said = DAMAGE[case]
    change_manifest(out, change)
    for command in ("verify", "inspect"):
        ran = cli(command, out)
        if said is None:
            assert ran.code == 0, ran.err
        else:
            assert_letter(ran, "PackageError", 12, "manifest.json", said)


DAMAGED = {
    "not UTF-8": b'{"schema": 1, "kind": "\xff"}',
    "too deep to parse": b"[" * 100_000,
    "too long": b" " * (package.MOST_JSON_BYTES + 1),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("command", ["verify", "inspect", "bench"])
def test_a_manifest_of_strange_bytes_is_one_clear_error(out, command, case):
    (out / "manifest.json").write_bytes(DAMAGED[case])
    assert_letter(cli(command, out), "PackageError", 12, "manifest.json")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to("report.json")])
@pytest.mark.parametrize("command", ["verify", "inspect", "bench"])
def test_a_manifest_that_is_no_plain_file_is_not_opened(out, command, make):
    (out / "manifest.json").unlink()
    make(out / "manifest.json")
    assert_letter(cli(command, out), "PackageError", 12, "is not a plain file")


@pytest.mark.parametrize("name", ["model.onnx", "local.json", "extra"])
def test_a_pipe_in_a_package_is_told_and_not_opened(out, name):
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    for command in ("verify", "bench"):
        assert_letter(cli(command, out), "VerifyError", 10, name)


def test_inspect_of_a_package_without_its_engine(out):
    (out / "model.onnx").unlink()
    assert_letter(cli("inspect", out), "PackageError", 12, "model.onnx", "cannot be read")


@pytest.mark.parametrize("text", ["{", "[]", '{"source": 3}', '{"source": {"python": 3}}', "\x00"])
def test_a_damaged_memory_of_the_source_is_as_good_as_none(out, text):
    (out / "local.json").write_text(text, encoding="utf-8")
    ran = cli("bench", out, "--trust-code")
    assert_letter(ran, "UsageError", 2, "remembers none", "--model MODEL")


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
    engine = {
        "role": "main", "target": "ort", "path": "file", "sha256": "", "inputs": [], "outputs": [],
        "opset": 21,
    }  # fmt: skip
    package.write_manifest(stage, {"schema": 1, "kind": "module", "engines": [engine]})


def refuse_to_replace(out: Path, *parts: str) -> None:
    before = content(out)
    with pytest.raises(PackageError) as early:
        package.check_output(out)
    with pytest.raises(PackageError), package.staged(out) as stage:
        fill(stage, "new")
    assert content(out) == before
    assert leftovers(out.parent) == []
    for part in parts:
        assert part in str(early.value)


def test_a_folder_with_a_manifest_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"manifest_version": 3}', "utf-8")
    (tmp_path / "extension" / "background.js").write_text("years of work", "utf-8")
    refuse_to_replace(tmp_path / "extension", "no manifest of effc", "choose another -o")


def test_a_package_with_files_of_the_user_is_not_replaced(out):
    (out / "notes").mkdir()
    for name in ("a", "b", "c", "d"):
        (out / "notes" / f"{name}.txt").write_text("thoughts", encoding="utf-8")
    refuse_to_replace(out, "notes/a.txt, notes/b.txt, notes/c.txt and 1 more", "move them")


def test_a_link_that_the_user_put_into_a_package_is_not_removed(out, tmp_path):
    (out / "data").symlink_to(tmp_path)
    refuse_to_replace(out, "did not write: data")


@pytest.mark.parametrize("text", ["{", '{"schema": 1}', '{"schema": 99}'])
def test_a_package_with_a_damaged_manifest_is_not_replaced(out, text):
    (out / "manifest.json").write_text(text, encoding="utf-8")
    refuse_to_replace(out, "is not replaced", "manifest.json", "remove it yourself")


def test_a_file_that_is_put_there_during_a_compile_is_not_removed(out):
    def write() -> None:
        with package.staged(out) as stage:
            fill(stage, "new")
            (out / "late.txt").write_text("just now", encoding="utf-8")

    with pytest.raises(PackageError, match=r"did not write: late\.txt"):
        write()
    assert (out / "late.txt").read_text(encoding="utf-8") == "just now"
    assert leftovers(out.parent) == []


@pytest.mark.parametrize(
    ("error", "is_ours"),
    [
        (OSError(errno.EACCES, "Permission denied", "STAGE/model.onnx"), True),
        (OSError(errno.EACCES, "Permission denied", "PARENT"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EROFS, "Read-only file system"), True),
        (OSError("4096 requested and 17 written"), True),
        (OSError(errno.ENAMETOOLONG, "File name too long", "PARENT/calib.txt"), False),
        (OSError(errno.ENOSPC, "No space left on device", "/elsewhere/x"), False),
        (OSError(errno.EIO, "Input/output error"), False),
    ],
)
def test_only_an_error_about_the_output_is_one_of_the_package(tmp_path, error, is_ours):
    def write() -> None:
        with package.staged(tmp_path / "out") as stage:
            if error.filename:
                named = error.filename.replace("STAGE", str(stage))
                error.filename = named.replace("PARENT", str(tmp_path))
            raise error

    with pytest.raises(PackageError if is_ours else OSError) as found:
        write()
    assert is_ours or found.value is error


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


def test_the_folder_that_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PackageError, match="the folder that this runs in"):
        package.check_output(Path("."))
