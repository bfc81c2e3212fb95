"""A package is whole or is told apart, is exchanged in one step, and needs no effc to run."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from effc import bounded, package
from effc.errors import PackageError
from effc.package import digest
from kit import assert_letter, cli, content, forge, leftovers, made, plant


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


def changed(content: bytes, draw: random.Random, how: str) -> bytes:
    """The same bytes but for one, which is another, one more or gone."""
    place = draw.randrange(len(content) + (how == "insert"))
    if how == "delete":
        return content[:place] + content[place + 1 :]
    new = draw.randrange(256)
    if how == "insert":
        return content[:place] + bytes([new]) + content[place:]
    return content[:place] + bytes([content[place] ^ (new or 1)]) + content[place + 1 :]


@pytest.mark.slow
def test_one_byte_of_any_file_that_is_another_is_found(out):
    for name in content(out):
        whole = (out / name).read_bytes()
        draw = random.Random(name)
        for how in ("flip", "insert", "delete") * 3:
            (out / name).write_bytes(harmed := changed(whole, draw, how))
            ran = cli("verify", out)
            assert ran.code in (10, 12), (name, harmed, ran.out)
            assert name in ran.err
            assert "Traceback" not in ran.err
        (out / name).write_bytes(whole)
    assert cli("verify", out).code == 0


@pytest.mark.parametrize("name", ["manifest.json", "volatile.json"])
@pytest.mark.parametrize("old", ["\n", " ", ": ", ",", "{", "1", '"'])
def test_what_json_does_not_count_is_found_too(out, name, old):
    text = (out / name).read_text(encoding="utf-8")
    for new in (f"{old} ", f" {old}", f"{old}\n"):
        (out / name).write_text(text.replace(old, new, 1), encoding="utf-8")
        assert cli("verify", out).code in (10, 12)


def test_a_key_that_stands_twice_in_a_manifest_is_found(out):
    text = (out / "manifest.json").read_text(encoding="utf-8")
    (out / "manifest.json").write_text(text.replace("{", '{\n "kind": "module",', 1), "utf-8")
    assert_letter(cli("verify", out), "PackageError", 12, "is not as it was written")


def test_the_digest_of_a_manifest_can_be_found_without_effc(out):
    content = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    said = content.pop("digest")
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() == said


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
    assert_letter(cli("verify", out), "VerifyError", 10, "LICENSE is not a plain file")


def change_manifest(out: Path, change) -> None:
    """A manifest that somebody changed and gave the right digest again, as a forger would."""
    forge(out, "manifest.json", change)


@pytest.mark.parametrize("command", ["verify", "inspect", "bench"])
def test_a_manifest_of_another_schema_is_refused(out, command):
    change_manifest(out, lambda m: m.update(schema=99))
    assert_letter(cli(command, out), "PackageError", 12, "schema 99", "use the effc that wrote it")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 1, "kind": "\\ud800"}']
)
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e["inputs"][0].update(name="ids"), "has inputs input_ids: int64"),
        (lambda e: e["inputs"][0].update(dtype="int32"), "has inputs input_ids: int64"),
        (lambda e: e["inputs"][0].update(shape=["batch", 7]), "has inputs input_ids: int64"),
        (lambda e: e["outputs"].clear(), "has outputs last_hidden_state: float32"),
        (lambda e: e.update(opset=21), "has opset 23, and not 21"),
        (lambda e: e.update(path="README.md"), "README.md is an engine but not a file"),
        (lambda e: e.update(sha256="0" * 64), "model.onnx is an engine but not a file"),
    ],
)
def test_an_engine_that_is_not_what_the_manifest_says(out, change, said):
    change_manifest(out, lambda m: change(m["engines"][0]))
    assert_letter(cli("verify", out), "VerifyError", 10, said)


@pytest.mark.parametrize("name", ["model.ort", "model", "engine.bin"])
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_an_engine_of_another_kind_is_not_opened(out, command, name):
    """A runtime would open it by what is in it, and nobody has looked at that."""
    (out / "model.onnx").rename(out / name)

    def change(manifest) -> None:
        manifest["files"][name] = manifest["files"].pop("model.onnx")
        manifest["engines"][0]["path"] = name

    change_manifest(out, change)
    ran = cli(command, out, "--model", made().model)
    assert_letter(ran, "VerifyError", 10, f"{name} is no kind of engine")


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize("location", ["../../secret", "/etc/passwd", "unlisted.bin", "link.bin"])
def test_an_engine_whose_data_lie_elsewhere_is_not_opened(out, tmp_path, command, location):
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    model = onnx.load(out / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    plant(out, "model.onnx", model.SerializeToString())
    if location == "link.bin":
        (out / location).symlink_to(tmp_path / "secret")
        change_manifest(out, lambda m: m["files"].update({location: digest(tmp_path / "secret")}))
    ran = cli(command, out, "--model", made().model)
    assert_letter(ran, "VerifyError", 10, location)


def test_a_backup_by_hard_links_is_as_good_as_a_copy(out, tmp_path):
    shutil.copytree(out, tmp_path / "backup", copy_function=os.link)
    assert cli("verify", tmp_path / "backup").code == 0


@pytest.mark.parametrize("name", ["decisions.json", "origins.json"])
@pytest.mark.parametrize("text", ["{", "[]", "3", '"a"', "[" * 1000])
def test_records_that_are_none_are_found(out, name, text):
    plant(out, name, text)
    assert_letter(cli("verify", out), "VerifyError", 10, name)


FORMS = {
    "a hash that is none": lambda m: m["files"].update({"README.md": "0" * 63}),
    "a hash in capitals": lambda m: m["files"].update({"README.md": "A" * 64}),
    "a graph without digest": lambda m: m.pop("graph_digest"),
    "a graph's digest that is none": lambda m: m.update(graph_digest="x" * 64),
    "an engine's hash that is none": lambda m: m["engines"][0].update(sha256=""),
    "names that are one file elsewhere": lambda m: m["files"].update({"readme.MD": "0" * 64}),
    "records elsewhere": lambda m: m.update(decisions="../decisions.json"),
}


@pytest.mark.parametrize("case", FORMS)
def test_words_of_a_wrong_form_in_a_manifest(out, case):
    change_manifest(out, FORMS[case])
    assert_letter(cli("verify", out), "PackageError", 12)


@pytest.mark.parametrize("change", [lambda f: f.clear(), lambda f: f.update({"LICENSE": "0" * 64})])
def test_the_list_of_unhashed_files_is_that_of_the_manifest(out, change):
    forge(out, "volatile.json", lambda content: change(content["files"]))
    assert_letter(cli("verify", out), "VerifyError", 10, "volatile.json lists other files")


def test_a_manifest_may_not_leave_out_the_list_of_unhashed_files(out):
    (out / "volatile.json").unlink()
    change_manifest(out, lambda m: m["unhashed"].remove("volatile.json"))
    assert_letter(cli("verify", out), "VerifyError", 10, "volatile.json")


# Trust

COMMANDS = [
    ("verify", "OUT"),
    ("verify", "OUT", "--model", "MODEL"),
    ("bench", "OUT", "--shapes", "1x4", "--budget", "0.1"),
    ("bench", "OUT", "--model", "MODEL", "--shapes", "1x4", "--budget", "0.1"),
    ("inspect", "OUT"),
    ("inspect", "OUT", "--graph"),
    ("explain", "OUT"),
    ("report", "OUT"),
]


@pytest.fixture
def trapped(out, tmp_path, monkeypatch):
    """A package with all hashes right that names, wherever code can be named, a module that leaves a mark."""
    monkeypatch.chdir(tmp_path)
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\n"
    for place in (tmp_path / "trap.py", tmp_path / "evil" / "trap.py"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(f"{trap}def build(**_):\n    {trap}", encoding="utf-8")
    shutil.copytree(made().model, tmp_path / "evil", dirs_exist_ok=True)
    for name, key in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        settings = json.loads((out / name).read_text(encoding="utf-8"))
        text = json.dumps({**settings, "auto_map": {key: "trap.build"}})
        (tmp_path / "evil" / name).write_text(text, encoding="utf-8")
        plant(out, name, text)
    plant(out, "recipe.yaml", EVIL_RECIPE)
    return out


EVIL_RECIPE = """
source: {python: "trap.py:build"}
plugins: [trap, trap.py]
metric: {"trap.py:build": x}
calib: {callable: "trap:build"}
"""


@pytest.mark.slow
@pytest.mark.parametrize("source", [{"python": "trap.py:build"}, {"transformers": "EVIL"}])
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_command_on_a_package_runs_code_that_it_names(trapped, tmp_path, words, source):
    remembered = {k: str(tmp_path / "evil") if v == "EVIL" else v for k, v in source.items()}
    plant(trapped, "local.json", json.dumps({"source": remembered}))
    assert package.check(trapped) == []
    real = {"OUT": trapped, "MODEL": made().model}
    ran = cli(*(real.get(word, word) for word in words))
    assert not (tmp_path / "sprung").exists()
    assert "trap" not in sys.modules
    assert "Traceback" not in ran.err
    assert ran.code in (0, 2, 4, 10, 12)


@pytest.mark.slow
def test_with_trust_code_the_factory_that_a_package_remembers_is_run(trapped, tmp_path):
    plant(trapped, "local.json", json.dumps({"source": {"python": "trap.py:build"}}))
    assert_letter(cli("verify", trapped, "--trust-code"), "SourceError", 4)
    assert (tmp_path / "sprung").exists()


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
    "too long": b" " * (bounded.MOST_BYTES + 1),
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
    plant(out, "local.json", text)
    ran = cli("bench", out, "--trust-code")
    assert_letter(ran, "UsageError", 2, "remembers none", "--model MODEL")


# Staging


def fill(stage: package.Stage, text: str) -> None:
    (stage.package / "file").write_text(text, encoding="utf-8")
    engine = {
        "role": "main", "target": "ort", "path": "file", "sha256": "0" * 64, "inputs": [],
        "outputs": [], "opset": 21,
    }  # fmt: skip
    manifest = {"schema": 1, "kind": "module", "engines": [engine], "graph_digest": "0" * 64}
    package.write_manifest(stage.package, manifest)


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
    refuse_to_replace(tmp_path / "extension", "was not written by effc", "choose another -o")


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
                named = error.filename.replace("STAGE", str(stage.package))
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
            assert stage.package.parent.parent == stage.work.parent.parent == out.parent
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


def test_a_package_that_a_kill_left_aside_is_put_back(tmp_path, monkeypatch):
    """Killed between the two renames: the old package has another name, and the new one none."""
    monkeypatch.setattr(package, "_swap", lambda a, b: False)
    out = tmp_path / "out"
    with package.staged(out) as stage:
        fill(stage, "old")
    before = content(out)
    out.rename(package._old(out))
    with pytest.raises(RuntimeError), package.staged(out):
        raise RuntimeError
    assert content(out) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("made_before", [False, True])
def test_folders_that_were_made_for_nothing_are_removed(tmp_path, made_before):
    out = tmp_path / "a" / "b" / "out"
    if made_before:
        out.parent.mkdir(parents=True)
    with pytest.raises(RuntimeError), package.staged(out):
        raise RuntimeError
    assert (tmp_path / "a").exists() == made_before


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
        (stage.package / "file").write_text("x", encoding="utf-8")
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


@pytest.mark.slow
def test_the_bytes_hang_on_nothing_around_the_compile(tmp_path):
    """Another folder, user, home, language, time zone, umask, order of hashes and number of threads."""
    place = tmp_path / "elsewhere, with spaces"
    shutil.copytree(made().model, place / made().model.name)
    shutil.copy(made().sentences, place)
    (place / "work").mkdir()
    (place / "home").mkdir()
    around = {
        "HOME": str(place / "home"), "USER": "nobody", "LOGNAME": "nobody", "TZ": "Asia/Tokyo",
        "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "2",
        "COLUMNS": "40",
    }  # fmt: skip
    words = [
        "compile",
        place / made().model.name,
        "-o",
        place / "work" / "out",
        "--quantize",
        "int8",
    ]
    words += ["--calib", place / made().sentences.name, "--no-bench", "--threads", "2"]
    words += ["--samples", 16]

    def as_nobody() -> None:
        os.umask(0o077)
        os.setgid(65534)
        os.setuid(65534)

    def as_somebody_else() -> None:
        if may_be_nobody:
            as_nobody()
        os.umask(0o077)

    try:  # a user who is no root, or whose Python is in a closed folder, stays who he is
        subprocess.run([sys.executable, "-c", "import effc"], preexec_fn=as_nobody, check=True)
        may_be_nobody = True
    except (OSError, subprocess.SubprocessError):
        may_be_nobody = False
    if may_be_nobody:
        for path in (place, *place.rglob("*")):
            os.chown(path, 65534, 65534)
        for folder in (place, *list(place.parents)[:3]):
            folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "effc", *map(str, words)], env={**os.environ, **around}, cwd=place / "work",
        preexec_fn=as_somebody_else, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    unhashed = package.read(made().out).unhashed
    here, there = content(made().out), content(place / "work" / "out")
    assert sorted(here) == sorted(there)
    assert {n for n in here if here[n] != there[n]} <= set(unhashed)


def test_the_folder_that_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PackageError, match="the folder that this runs in"):
        package.check_output(Path("."))
