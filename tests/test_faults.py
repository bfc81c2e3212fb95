"""What goes wrong ends in one message, the exit code of its family, nothing half-made and the old output as it was."""

import json
import logging
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from effc.errors import CalibrationError
from effc.recipe import CalibSpec
from effc.samples import Samples
from effc.source import Source, from_directory
from kit import (
    Ran,
    assert_letter,
    cli,
    content,
    int8,
    leftovers,
    made,
    process,
    save_encoder,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def out(tmp_path):
    """Where to compile to: a place that holds a package already."""
    place = tmp_path / "place" / "out"
    shutil.copytree(made().out, place)
    return place


@pytest.fixture
def fresh(tmp_path):
    """Where to compile to: a free place."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@contextmanager
def untouched(place: Path):
    """Everything below `place` is the same bytes afterwards."""
    before, names = content(place), sorted(p.name for p in place.iterdir())
    yield
    assert content(place) == before
    assert sorted(p.name for p in place.iterdir()) == names


def refused(out: Path, name: str, code: int, *parts: str, words: tuple[object, ...]) -> Ran:
    """`effc compile words… -o out` ends in error `name` that says `parts`, and leaves all as it was."""
    with untouched(out.parent):
        ran = cli("compile", *words, "-o", out)
    assert_letter(ran, name, code, *parts)
    assert ran.out == ""
    return ran


def copy_of_the_model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(made().model, tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, **changes}), encoding="utf-8")


def factory(word: str) -> str:
    return f"{made().factories}:{word}"


@pytest.mark.parametrize(
    ("words", "name", "code"),
    [
        (("nowhere",), "SourceError", 4),
        (("FACTORIES:unknown",), "LoweringError", 8),
        (("FACTORIES:perceptron", "--quantize", "int8", "--calib", "TEXT"), "CalibrationError", 7),
        (("FACTORIES:perceptron", "--target", "ortt"), "RecipeError", 3),
    ],
)
def test_a_failed_compile_leaves_nothing_in_a_free_place(fresh, words, name, code):
    real = {"FACTORIES": str(made().factories), "TEXT": str(made().sentences)}
    for short, file in real.items():
        words = tuple(word.replace(short, file) for word in words)
    refused(fresh, name, code, words=(*words, "--no-bench"))
    assert not fresh.exists()


# The model


def test_a_missing_directory(out, tmp_path):
    refused(out, "SourceError", 4, "there is no directory", words=(tmp_path / "nowhere",))


def test_a_directory_without_config(out, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(out, "SourceError", 4, "has no config.json", words=(tmp_path / "empty",))


def test_a_config_that_is_not_json(out, tmp_path):
    model = copy_of_the_model(tmp_path)
    (model / "config.json").write_text("{", encoding="utf-8")
    refused(out, "SourceError", 4, "config.json cannot be read", words=(model,))


def test_a_directory_without_weights(out, tmp_path):
    model = copy_of_the_model(tmp_path)
    (model / "model.safetensors").unlink()
    refused(out, "SourceError", 4, "has no weights", words=(model,))


def test_weights_that_are_only_a_pickle_are_not_opened(out, tmp_path):
    model = copy_of_the_model(tmp_path)
    (model / "model.safetensors").unlink()
    trap = tmp_path / "sprung"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(trap)))
    refused(out, "SourceError", 4, "only as pickle", "pytorch_model.bin", words=(model,))
    assert not trap.exists()


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_model_that_brings_code(out, tmp_path):
    model = copy_of_the_model(tmp_path)
    edit(model / "config.json", auto_map={"AutoModel": "mine.Model"})
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    refused(out, "SourceError", 4, "auto_map", words=(model,))
    assert not (tmp_path / "ran").exists()


def test_an_unknown_architecture(out, tmp_path):
    model = copy_of_the_model(tmp_path)
    edit(model / "config.json", architectures=["BertModell"])
    refused(out, "SourceError", 4, "did you mean 'BertModel'?", words=(model,))


@pytest.mark.parametrize("value", [[], [7], "BertModel", {"a": 1}])
def test_architectures_that_are_not_a_list_of_names(out, tmp_path, value):
    model = copy_of_the_model(tmp_path)
    edit(model / "config.json", architectures=value)
    refused(out, "SourceError", 4, "architectures", words=(model,))


def change_weights(model: Path, change) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_not_numbers(out, tmp_path):
    model = copy_of_the_model(tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    change_weights(model, lambda t: t[name].fill_(float("nan")))
    refused(out, "SourceError", 4, "not numbers", name, words=(model,))


def test_weights_that_are_missing(out, tmp_path):
    model = copy_of_the_model(tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    change_weights(model, lambda t: t.pop(name))
    refused(out, "SourceError", 4, "lacks weights", name, words=(model,))


def test_weights_of_another_size(out, tmp_path):
    model = copy_of_the_model(tmp_path)
    edit(model / "config.json", intermediate_size=48)
    refused(out, "SourceError", 4, words=(model,))


def test_weights_that_are_cut_short(out, tmp_path):
    model = copy_of_the_model(tmp_path)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(out, "SourceError", 4, "does not load", words=(model,))


def test_a_file_in_place_of_a_model(out):
    refused(out, "SourceError", 4, "is a file", words=(made().sentences,))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("broken", "no weights today"),
        ("nonsense", "returned int"),
        ("infinite", "up.weight"),
        ("perceptrom", "did you mean 'perceptron'?"),
    ],
)
def test_a_factory_that_gives_no_model(out, word, said):
    refused(out, "SourceError", 4, said, words=(factory(word),))


def test_a_factory_whose_file_does_not_import(out, tmp_path):
    (tmp_path / "bad.py").write_text("import no_such_thing", encoding="utf-8")
    refused(out, "SourceError", 4, "no_such_thing", words=(f"{tmp_path / 'bad.py'}:make",))


# The graph


def test_a_module_that_cannot_be_traced(out):
    refused(out, "TraceError", 5, "Moody", words=(factory("moody"), "--no-bench"))


@pytest.mark.parametrize("word", ["unknown", "spectrum"])
def test_an_operator_without_translation_is_named_before_any_work(out, word, caplog):
    caplog.set_level(logging.INFO, logger="effc")
    refused(out, "LoweringError", 8, words=(factory(word), "--no-bench"))
    assert "stage lower" not in caplog.text


# The calibration data


def calibrated(file: object, quantize: str = "int8") -> tuple[object, ...]:
    return (factory("perceptron"), "--quantize", quantize, "--calib", file, "--no-bench")


def test_calibration_data_that_is_not_there(out, tmp_path):
    words = calibrated(tmp_path / "none.txt")
    refused(out, "CalibrationError", 7, "there is no calibration file", words=words)


def test_no_calibration_data_where_it_is_needed(out):
    words = (made().model, "--quantize", "int8")
    refused(out, "RecipeError", 3, "names no calibration data", "--calib FILE", words=words)


@pytest.mark.parametrize("text", ["", "\n \n\n"])
def test_an_empty_calibration_file(out, tmp_path, text):
    (tmp_path / "empty.txt").write_text(text, encoding="utf-8")
    words = calibrated(tmp_path / "empty.txt")
    refused(out, "CalibrationError", 7, "holds no samples", words=words)


def test_calibration_text_that_is_not_utf8(out, tmp_path):
    (tmp_path / "latin.txt").write_bytes("the cat\nun été\n".encode("latin-1"))
    refused(out, "CalibrationError", 7, "not UTF-8", words=calibrated(tmp_path / "latin.txt"))


def test_a_file_of_no_known_kind(out, tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    refused(out, "CalibrationError", 7, "no kind", words=calibrated(tmp_path / "data.parquet"))


def test_a_column_that_is_not_there(out, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\nthe cat,1\n", encoding="utf-8")
    words = calibrated(f"{tmp_path / 'rows.csv'}#txt")
    refused(out, "CalibrationError", 7, "no column 'txt'", "text, label", words=words)


def ids(**changes: object) -> dict[str, np.ndarray]:
    whole = np.tile(np.arange(2, 10), (4, 1))
    mask = np.ones_like(whole)
    arrays = {"input_ids": whole, "attention_mask": mask, "token_type_ids": 0 * mask}
    return {n: a for n, a in {**arrays, **changes}.items() if a is not None}


ARRAYS = {
    "floats for ids": (ids(input_ids=np.full((4, 8), 2.5)), "float64"),
    "text for ids": (ids(input_ids=np.full((4, 8), "cat")), "input_ids"),
    "an input missing": (ids(attention_mask=None), "attention_mask"),
    "one dimension too many": (ids(input_ids=np.ones((4, 8, 1), np.int64)), "shape"),
    "an id beyond the vocabulary": (ids(input_ids=np.full((4, 8), 10**6)), "input_ids"),
    "an id below zero": (ids(input_ids=np.full((4, 8), -1)), "input_ids"),
    "rows that differ in number": (ids(input_ids=np.ones((3, 8), np.int64)), "number of samples"),
    "objects": (ids(input_ids=np.array([[1], [2], [3], None], object)), "arrays"),
    "longer rows than the model takes": (
        {n: np.ones((2, 200), np.int64) for n in ids()},
        "at most 160",
    ),
    "no rows": ({n: a[:0] for n, a in ids().items()}, "no samples"),
}


@cache
def loaded() -> Source:
    return from_directory(made().model)


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_do_not_fit_the_model(tmp_path, case):
    arrays, said = ARRAYS[case]
    np.savez(tmp_path / "arrays.npz", **arrays)
    samples = Samples(loaded(), CalibSpec(file=str(tmp_path / "arrays.npz")))
    with pytest.raises(CalibrationError, match=said):
        list(samples("main"))


@pytest.mark.parametrize("quantize", ["int8", "none"])
def test_floats_for_ids(out, tmp_path, quantize):
    np.savez(tmp_path / "floats.npz", **ARRAYS["floats for ids"][0])
    words = (made().model, "--quantize", quantize, "--calib", tmp_path / "floats.npz")
    refused(out, "CalibrationError", 7, "float64", "int64", words=(*words, "--no-bench"))


def test_an_archive_that_is_none(out, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no archive")
    refused(out, "CalibrationError", 7, "x.npz", words=calibrated(tmp_path / "x.npz"))


@pytest.mark.parametrize("quantize", ["int8", "none"])
def test_arrays_that_do_not_fit_a_factory_model(out, tmp_path, quantize):
    np.savez(tmp_path / "wide.npz", x=np.ones((4, 9), np.float32))
    words = calibrated(tmp_path / "wide.npz", quantize)
    refused(out, "CalibrationError", 7, "'x'", "[4, 9]", words=words)


def test_text_for_a_factory_model(out):
    words = calibrated(made().sentences)
    refused(out, "CalibrationError", 7, "takes ready arrays", words=words)


def test_values_that_are_not_numbers(out, tmp_path):
    np.savez(tmp_path / "nan.npz", x=np.full((4, 8), np.nan, np.float32))
    refused(out, "CalibrationError", 7, "not a number", words=calibrated(tmp_path / "nan.npz"))


# The recipe and the flags


def recipe(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"source: {{transformers: {made().model}}}\n{text}", encoding="utf-8")
    return file


RECIPES = {
    "an unknown section": ("calibb: {file: a}", "unknown key 'calibb'", "'calib'", "line 2"),
    "an unknown key": ("calib:\n  fil: a.txt", "calib.fil", "'file'", "line 3"),
    "a wrong value": ("passes:\n- {pass: quantize, bits: 9}", "passes[0].bits", "line 3"),
    "an unknown option": (
        "passes:\n- {pass: quantize, bit: 8}",
        "passes[0].bit",
        "'bits'",
        "line 3",
    ),
    "an unknown pass": ("passes: [quantise]", "passes[0]", "did you mean 'quantize'?", "line 2"),
    "an unknown target": ("targets: [ortt]", "targets[0]", "did you mean 'ort'?", "line 2"),
    "no YAML": ("passes: [", "not YAML", "line"),
    "another version": ("effc: 2", "version 2", "line 2"),
    "a key twice a section": ("source: 5", "source"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_with_a_mistake_names_path_and_line(tmp_path, out, case):
    text, *said = RECIPES[case]
    refused(out, "RecipeError", 3, "recipe.yaml", *said, words=(recipe(tmp_path, text),))


def test_a_recipe_that_is_not_there(out, tmp_path):
    refused(out, "RecipeError", 3, "cannot be read", words=(tmp_path / "none.yaml",))


@pytest.mark.parametrize("change", ["passes.3.bits=6", "passes.x=1", "source.transformers.x=1"])
def test_a_set_that_fits_nowhere(out, tmp_path, change):
    text = "passes: [{pass: quantize, bits: 8, activation_bits: 16}]"
    words = (recipe(tmp_path, text), "--set", change)
    refused(out, "RecipeError", 3, "no such place", words=words)


def test_a_set_that_is_no_assignment(out, tmp_path):
    words = (recipe(tmp_path, ""), "--set", "bench")
    refused(out, "UsageError", 2, "PATH=VALUE", words=words)


@pytest.mark.parametrize(
    ("words", "name", "code", "said"),
    [
        (("--target", "ortt"), "RecipeError", 3, "did you mean 'ort'?"),
        (("--quantize", "int9"), "UsageError", 2, "did you mean 'int8'?"),
        (("--metric", "stss:x.csv"), "RecipeError", 3, "did you mean 'sts'?"),
        (("--metric", "sts:nowhere.csv"), "CalibrationError", 7, "nowhere.csv"),
        (("--metric", "sts"), "RecipeError", 3, "NAME"),
        (("--decisions", "nowhere.json"), "UsageError", 2, "nowhere.json"),
        (("--json", "no/such/place.json"), "UsageError", 2, "no/such/place.json"),
    ],
)
def test_a_wrong_word_on_the_command_line(out, words, name, code, said):
    refused(out, name, code, said, words=(made().model, *words))


@pytest.mark.parametrize("text", ["[]", "3", '{"1:quantize": 5}', '{"1:quantize": {"x": 1}}'])
def test_decisions_that_are_none(out, tmp_path, text):
    (tmp_path / "decisions.json").write_text(text, encoding="utf-8")
    with untouched(out.parent):
        ran = cli(
            "compile", made().model, "-o", out, *int8(made()),
            "--decisions", tmp_path / "decisions.json",
        )  # fmt: skip
    assert ran.code in (2, 3, 6, 7), ran.err
    assert "Traceback" not in ran.err


def test_flags_beside_a_recipe(out, tmp_path):
    words = (recipe(tmp_path, ""), "--quantize", "int8")
    refused(out, "UsageError", 2, "--set", words=words)


def test_an_unknown_option_is_a_usage_error(out):
    with untouched(out.parent):
        ran = cli("compile", made().model, "-o", out, "--quantise", "int8")
    assert ran.code == 2
    assert "--quantise" in ran.err
    assert "Traceback" not in ran.err


# The place for the output


def test_a_directory_of_somebody_else(tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work", encoding="utf-8")
    refused(out, "PackageError", 12, "did not write", words=(factory("perceptron"),))


def test_a_file_where_the_output_should_be(tmp_path):
    out = tmp_path / "file"
    out.write_text("a", encoding="utf-8")
    refused(out, "PackageError", 12, "is not a directory", words=(factory("perceptron"),))


def test_a_link_where_the_output_should_be(tmp_path):
    (tmp_path / "real").mkdir()
    out = tmp_path / "link"
    out.symlink_to(tmp_path / "real")
    refused(out, "PackageError", 12, "is not a directory", words=(factory("perceptron"),))


@pytest.mark.parametrize("place", ["/proc/effc/out", "file/out", "file/a/b", "x" * 300])
def test_an_output_that_cannot_be_written(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a", encoding="utf-8")
    with untouched(tmp_path):
        ran = cli("compile", factory("perceptron"), "-o", place)
    assert_letter(ran, "PackageError", 12)


def test_the_longest_name_that_a_directory_can_have(tmp_path):
    out = tmp_path / ("x" * 255)
    ran = cli("compile", factory("perceptron"), "-o", out, "--no-bench")
    assert ran.code == 0, ran.err
    assert leftovers(tmp_path) == []


# A full disk and an impatient user, in processes of their own


def without_room(bytes_: int):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))

    return limit


@pytest.mark.parametrize("room", [64, 2048])
def test_a_disk_that_fills_up(fresh, room):
    env = {"PYTHONDONTWRITEBYTECODE": "1"}
    with untouched(fresh.parent):
        ran = process(
            "compile", factory("perceptron"), "-o", fresh, "--no-bench", env=env,
            before=without_room(room),
        )  # fmt: skip
    assert_letter(ran, "PackageError", 12, "no room")


def test_a_real_small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
        set -e
        mount -t tmpfs -o size=128k none {disk}
        cp -r {made().out} {disk}/out 2>/dev/null || true
        find {disk} -type f | xargs sha256sum | sort > {tmp_path}/before
        code=0
        {sys.executable} -m effc compile {made().model} -o {disk}/out --no-bench || code=$?
        find {disk} -type f | xargs sha256sum | sort > {tmp_path}/after
        ls -A {disk} > {tmp_path}/listed
        exit $code
    """
    ran = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if "unshare" in ran.stderr or "mount" in ran.stderr:
        pytest.skip(f"no mounts here: {ran.stderr.strip()}")
    assert_letter(Ran(code=ran.returncode, out=ran.stdout, err=ran.stderr), "PackageError", 12)
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    assert (tmp_path / "listed").read_text() == "out\n"


STAGES = (
    "load", "trace", "drop-noops", "fold-constants", "quantize", "lower", "verify", "metric", "bench",
)  # fmt: skip


@pytest.fixture
def pairs(tmp_path):
    """A task of three sentence pairs."""
    rows = "the cat sat,a dog sat,3.5\nrain fell,sun rose,1\nwe go home,go home,4.5\n"
    (tmp_path / "pairs.csv").write_text(rows, encoding="utf-8")
    return tmp_path / "pairs.csv"


class Interrupter(logging.Handler):
    """Sends this process a signal when a stage begins."""

    def __init__(self, stage: str, number: int) -> None:
        super().__init__(logging.INFO)
        self.stage, self.number, self.sent = stage, number, False

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == f"stage {self.stage}" and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("stage", "number"),
    [*((s, signal.SIGINT) for s in STAGES if s != "metric"), ("lower", signal.SIGTERM)],
)
def test_an_interrupt_as_a_stage_begins(out, tmp_path, stage, number):
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(4, 8)).astype("f"))
    handler = Interrupter(stage, number)
    logging.getLogger("effc").addHandler(handler)
    words = [w for w in calibrated(tmp_path / "x.npz") if w != "--no-bench"]
    try:
        with untouched(out.parent):
            ran = cli("-v", "compile", *words, "-o", out)
    finally:
        logging.getLogger("effc").removeHandler(handler)
    assert handler.sent
    assert ran.code == 130
    assert ran.err == "interrupted; nothing was written\n"
    assert ran.out == ""


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_in_the_midst_of_a_stage(tmp_path, pairs, stage):
    place = tmp_path / "place"
    shutil.copytree(made().out, place / "out")
    flags = [str(w) for w in int8(made()) if w != "--no-bench"]
    with untouched(place):
        started = subprocess.Popen(
            [sys.executable, "-m", "effc", "-v", "compile", str(made().model), "-o",
             str(place / "out"), *flags, "--metric", f"sts:{pairs}"],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert started.stderr is not None
        for line in started.stderr:
            if line.strip() == f"stage {stage}":
                time.sleep(0.05)
                started.send_signal(signal.SIGINT)
                break
        began = time.monotonic()
        _, err = started.communicate(timeout=30)
        assert time.monotonic() - began < 10
    assert started.returncode == 130, err
    assert "Traceback" not in err


def test_an_interrupt_before_anything_is_loaded(tmp_path):
    started = subprocess.Popen(
        [sys.executable, "-m", "effc", "compile", str(made().model), "-o", str(tmp_path / "out")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(1)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=30)
    assert started.returncode == 130, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_few_positions_compiles(tmp_path):
    model = save_encoder(tmp_path / "short", max_position_embeddings=32)
    ran = cli("compile", model, "-o", tmp_path / "out", "--no-bench")
    assert ran.code == 0, ran.err


def test_an_interrupt_that_somebody_took_for_an_error_still_ends_the_command(out, monkeypatch):
    def swallow(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt as error:
            raise TypeError("an odd value") from error

    monkeypatch.setattr("effc.compiler.trace_source", swallow)
    with untouched(out.parent):
        ran = cli("compile", factory("perceptron"), "-o", out, "--no-bench")
    assert ran.code == 130
    assert ran.err == "interrupted; nothing was written\n"
