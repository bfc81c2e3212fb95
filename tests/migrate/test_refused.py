"""Lines, caches and files that are not what they should be; and that nothing of a line is ever run."""

import json
import os

import pytest
from deployed import DETECTOR, cache, convolutions
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from effc.cli import app
from effc.errors import CalibrationError, EffcError, SourceError, UsageError, VerifyError
from effc.migrate import calibration, run, trtexec


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "does not call trtexec"),
        ("polygraphy run m.onnx", "does not call trtexec"),
        ("trtexec", "names no ONNX file"),
        ("trtexec --onnx", "names no ONNX file"),
        ("trtexec --onnx model.onnx", "no flag of trtexec"),
        ("trtexec --onnx=m.onnx --minShapes=x", "no name with sizes"),
        ("trtexec --onnx=m.onnx --minShapes=x:1x-3", "no name with sizes"),
        ("trtexec --onnx=m.onnx --layerPrecisions=a:fp4", "no layer with one of"),
        ("trtexec --uff=m.uff --onnx=m.onnx", "a UFF file"),
        ("trtexec --onnx=m.onnx --loadEngine=m.plan", "an engine that is built"),
        ("trtexec --onnx='m.onnx --fp16", "cannot be split"),
        ("trtexec --onnx=m.onnx; touch pwned", "for a shell"),
        ("trtexec --onnx=m.onnx && touch pwned", "for a shell"),
        ("trtexec --onnx=m.onnx | tee log", "for a shell"),
        ("trtexec --onnx=m.onnx > log", "for a shell"),
        ("trtexec --onnx=$(touch pwned)", "for a shell to fill in"),
        ("trtexec --onnx=`touch pwned`", "for a shell to fill in"),
        ("trtexec --onnx=$MODEL", "for a shell to fill in"),
        ("trtexec --onnx=${MODEL}", "for a shell to fill in"),
        ("trtexec --onnx=m.onnx @flags.txt", "is not read as a file"),
        ("sudo trtexec --onnx=m.onnx", "stands in front of trtexec"),
        ("trtexec --onnx=m.onnx " + "--verbose " * 10_000, "more than 65536 bytes"),
        ("trtexec --onnx=m\0.onnx", "no text"),
    ],
)
def test_a_line_that_is_none_is_refused_in_words(line, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=why) as caught:
        trtexec.parse(trtexec.words_of(line))
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        found = trtexec.parse(trtexec.words_of(f"trtexec --onnx=m.onnx {text}"))
    except UsageError:
        return
    assert found.onnx
    assert trtexec.words_of(found.line("a b.onnx").replace("$", ""))[1] == "--onnx=a b.onnx"


def test_a_value_that_would_be_split_is_quoted_again():
    found = trtexec.parse(trtexec.words_of("trtexec --onnx=m.onnx --saveEngine='my model.plan'"))
    assert "'--saveEngine=my model.plan'" in found.line("m.onnx")


@pytest.mark.parametrize(
    "text",
    [
        "", "TRT-8501-EntropyCalibration2\n", "TRT-8501-EntropyCalibration2\ninput: xyz\n",
        "TRT-8501-EntropyCalibration2\ninput: 3c01\n", "input\n", "input one\n",
        "TRT-8501-EntropyCalibration2\ninput: 7f800000\n", "TRT-8501-EntropyCalibration2\ninput: bf800000\n",
        "TRT-8501-EntropyCalibration2\ninput: 7fc00000\n", "{}", '{"a": 1}', '{"a": {"scale": true}}', '{"a": ',
        "a nan\n",
    ],
)  # fmt: skip
def test_a_cache_that_is_none_is_refused_in_words(text, tmp_path):
    (tmp_path / "c").write_text(text)
    with pytest.raises(CalibrationError) as caught:
        calibration.read(tmp_path / "c")
    assert caught.value.hint


def test_a_cache_is_read_within_bounds(tmp_path):
    (tmp_path / "c").write_text("TRT-8501-EntropyCalibration2\n" + "a: 3c010a14\n" * 1_500_000)
    with pytest.raises(CalibrationError):
        calibration.read(tmp_path / "c")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CalibrationError, match="not a plain file"):
        calibration.read(tmp_path / "pipe")


def test_scales_are_read_as_they_were_written(tmp_path):
    text = "TRT-8XXX-EntropyCalibration2\ninput:0: 3c010204\nzero: 0\n\n(Unnamed Layer* 3) [Add]_output: 3F800000\n"
    (tmp_path / "c").write_text(text)
    found = calibration.read(tmp_path / "c")
    assert found == {
        "input:0": pytest.approx(1 / 127),
        "(Unnamed Layer* 3) [Add]_output": 1.0,
    }


def migrated(*words: object):
    return CliRunner().invoke(app, ["migrate-trt", *map(str, words)], standalone_mode=False)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convolutions().save(tmp_path / "model.onnx")
    return tmp_path


def test_the_command_writes_the_file_the_lines_and_the_report(here):
    ended = migrated("trtexec --onnx=model.onnx --fp16 --saveEngine=m.plan", "--json", "r.json")
    assert ended.exception is None, ended.exception
    assert "model.typed.onnx is written: 10 nodes in 16 bit" in ended.output
    assert "trtexec --onnx=model.typed.onnx --saveEngine=m.plan" in ended.output
    found = json.loads((here / "r.json").read_text())
    assert found["gap"] <= found["tolerance"] and found["kind"] == "float16"


def test_a_file_of_flags_is_read_where_an_option_names_it(here):
    (here / "flags.txt").write_text("# as in the docs\n--onnx=model.onnx \\\n--fp16\n")
    assert migrated("--flags-file", "flags.txt", "-o", "t.onnx").exception is None
    assert (here / "t.onnx").exists()
    (here / "line.txt").write_text("trtexec --onnx=model.onnx --fp16 @flags.txt")
    assert isinstance(migrated("--flags-file", "line.txt", "-o", "u.onnx").exception, UsageError)


def test_wrong_calls_are_refused(here):
    for words in (
        (),
        ("trtexec --onnx=model.onnx", "--flags-file", "x"),
        ("trtexec --onnx=model.onnx", "-o", "model.onnx"),
    ):
        ended = migrated(*words)
        assert isinstance(ended.exception, UsageError) and ended.exception.hint
    assert isinstance(migrated("trtexec --onnx=gone.onnx --fp16").exception, SourceError)
    assert sorted(p.name for p in here.iterdir()) == ["model.onnx"]


def test_what_is_too_far_from_float32_is_not_written(here):
    ended = migrated("trtexec --onnx=model.onnx --fp16", "--tolerance", "1e-9")
    assert isinstance(ended.exception, VerifyError) and "relative L2" in str(ended.exception)
    assert sorted(p.name for p in here.iterdir()) == ["model.onnx"]


def test_a_cache_of_another_export_is_refused(here):
    cache(here / "c.cache", {"somebody": 0.1})
    ended = migrated("trtexec --onnx=model.onnx --int8 --calib=c.cache")
    assert isinstance(ended.exception, SourceError) and "none that a layer" in str(ended.exception)


def test_a_cut_off_model_or_cache_is_refused(here):
    cache(here / "c.cache", DETECTOR)
    (here / "c.cache").write_bytes((here / "c.cache").read_bytes()[:40])
    (here / "cut.onnx").write_bytes((here / "model.onnx").read_bytes()[:200])
    for line in (
        "trtexec --onnx=cut.onnx --fp16",
        "trtexec --onnx=model.onnx --int8 --calib=c.cache",
    ):
        assert isinstance(migrated(line).exception, EffcError)
    assert run.TOLERANCE["float16"] < run.TOLERANCE["int8"]
