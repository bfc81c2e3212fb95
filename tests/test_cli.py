"""The command line: help with examples, JSON for scripts, silence where nobody looks, and no trace elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from kit import assert_letter, cli, content, int8, made, plant, process, save_encoder

COMMANDS = ("compile", "verify", "bench", "inspect", "migrate-config", "passes", "doctor")


@pytest.fixture
def out(tmp_path):
    return Path(shutil.copytree(made().out, tmp_path / "out"))


# Help


def test_help_names_every_command_and_an_example():
    ran = cli("--help")
    assert ran.code == 0
    assert all(f"\n  {word} " in ran.out for word in COMMANDS)
    assert "    effc compile MODEL_DIR -o OUT --quantize int8 --calib sentences.txt\n" in ran.out
    assert ran.err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    ran = cli(command, "--help")
    assert ran.code == 0
    assert ran.out.startswith(f"Usage: effc {command}")
    assert "--json" in ran.out
    if command not in ("passes", "doctor"):
        assert "Example" in ran.out
        examples = ran.out.split("Example", 1)[1].split("Arguments:")[0].split("\n", 1)[1]
        lines = [line for line in examples.splitlines() if line.strip()]
        assert all(line.startswith(f"    effc {command} ") for line in lines), "not one line each"
        assert lines


def test_the_help_lists_the_words_that_the_code_knows():
    from effc.cli import METRIC_NAMES, QUANTIZE_NAMES
    from effc.metrics import METRICS
    from effc.recipe import QUANTIZE_WORDS

    assert sorted(METRIC_NAMES) == list(METRICS)
    assert sorted(QUANTIZE_NAMES) == sorted(QUANTIZE_WORDS)
    said = " ".join(cli("compile", "--help").out.split())
    assert ", ".join(QUANTIZE_NAMES) in said
    assert ", ".join(METRIC_NAMES) in said


def test_the_version():
    import effc

    assert cli("--version").out == f"effc {effc.__version__}\n"


@pytest.mark.slow
def test_debug_and_verbose_are_taken_before_and_after_the_command(tmp_path, caplog):
    for words in (("--debug", "verify", tmp_path), ("verify", tmp_path, "--debug")):
        assert "Traceback" in cli(*words).err
    assert "Traceback" not in cli("verify", tmp_path).err
    assert cli("verify", made().out, "-v").code == 0
    assert "stage integrity" in caplog.text


def test_no_command_shows_help():
    ran = cli()
    assert "Usage: effc" in ran.out + ran.err
    assert "Traceback" not in ran.err


def test_help_is_quick_and_loads_nothing_heavy():
    script = """
import sys, time
began = time.perf_counter()
sys.argv = ["effc", "--help"]
from effc.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "transformers", "onnx", "onnxruntime", "numpy", "scipy"} & set(sys.modules)
print(sorted(heavy), time.perf_counter() - began, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.startswith("[]"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-c", "import effc"], ["-m", "effc", "--help"]])
def test_it_starts_in_less_than_three_tenths_of_a_second(command):
    def once(*words: str) -> float:
        """Seconds of the processor: beside other processes, those of the clock say little."""
        began = os.times()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        ended = os.times()
        return sum(ended[2:4]) - sum(began[2:4])

    assert min(once(*command) for _ in range(7)) < 0.3


# What is printed where


@pytest.mark.slow
def test_a_quiet_compile_says_what_came_out_and_nothing_else(tmp_path):
    words = (f"{made().factories}:perceptron", "-o", tmp_path / "out", "--no-bench")
    ran = process("compile", *words)
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert ran.out.startswith("size ")
    assert ran.out.endswith("is ready\n")
    assert not set(ran.out) & set("\x1b\r\b")


@pytest.mark.slow
def test_json_on_stdout_is_nothing_but_json(tmp_path):
    words = (f"{made().factories}:perceptron", "-o", tmp_path / "out", "--no-bench")
    ran = cli("compile", *words, "--json", "-")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["manifest"]["kind"] == "module"
    assert "is ready" in ran.err


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_json_of_a_package(out, tmp_path, command):
    there = cli(command, out, "--json", "-")
    cli(command, out, "--json", tmp_path / "found.json")
    assert json.loads(there.out) == json.loads((tmp_path / "found.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", "out"]


def test_json_goes_through_a_device_or_a_pipe_which_stays(out, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True)
    assert cli("verify", out, "--json", tmp_path / "pipe").code == 0
    assert json.loads(reader.communicate(timeout=30)[0])["files"] > 5
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "null").symlink_to("/dev/null")
    for place in ("/dev/null", tmp_path / "null"):
        assert cli("verify", out, "--json", place).code == 0
    assert Path("/dev/null").is_char_device()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["null", "out", "pipe"]


def test_json_on_dev_stdout_is_json_on_stdout(out, tmp_path):
    with (tmp_path / "found.json").open("w") as file:
        command = [sys.executable, "-m", "effc", "verify", out, "--json", "/dev/stdout"]
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True)
    assert done.stderr.startswith("integrity")
    assert json.loads((tmp_path / "found.json").read_text())["files"] > 5


def test_json_follows_a_link_to_its_file(out, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "far" / "found.json")
    for _ in range(2):
        assert cli("verify", out, "--json", tmp_path / "link.json").code == 0
        assert (tmp_path / "link.json").is_symlink()
        assert json.loads((tmp_path / "far" / "found.json").read_text())["files"] > 5
    assert os.listdir(tmp_path / "far") == ["found.json"]


def test_json_inside_a_package_is_refused_before_any_work(out, tmp_path):
    (tmp_path / "link").symlink_to(out)
    for words in (
        ("verify", out),
        ("inspect", out),
        ("bench", made().out, "--against", out),
        ("compile", made().model, "-o", out),
    ):
        for place in (out / "x.json", tmp_path / "link" / "1_Pooling" / "x.json"):
            ran = cli(*words, "--json", place)
            assert_letter(ran, "UsageError", 2, "lies in", "--json out.json")
    assert cli("verify", out).code == 0


def test_a_refused_file_is_one_line(tmp_path, monkeypatch):
    from effc import inspection

    def refuse(*_) -> None:
        (tmp_path / ("x" * 300)).read_text(encoding="utf-8")

    monkeypatch.setattr(inspection, "doctor", refuse)
    assert_letter(cli("doctor"), "error", 1, "x: File name too long", "--debug")
    assert "Traceback" in cli("doctor", "--debug").err


def test_calls_of_an_engine_are_counted():
    from effc.progress import Counted

    class Double:
        inputs = ("x",)

        def __call__(self, value: int) -> int:
            return 2 * value

    steps: list[tuple[int, int | None]] = []
    first = Counted(Double(), lambda done, total: steps.append((done, total)))
    assert ([first(1), first(2)], first.inputs) == ([2, 4], ("x",))
    second = Counted(Double(), lambda *s: steps.append(s), done=first.done, total=2 * first.done)
    second(1)
    assert steps == [(1, None), (2, None), (3, 4)]


def test_verbose_names_the_stages(tmp_path, caplog):
    words = (f"{made().factories}:perceptron", "-o", tmp_path / "out", "--no-bench")
    assert cli("-v", "compile", *words).code == 0
    stages = [r.getMessage() for r in caplog.records if r.getMessage().startswith("stage ")]
    assert stages[:2] == ["stage load", "stage trace"]
    assert stages[-2:] == ["stage lower", "stage verify"]


# Commands


def test_passes_lists_options_with_their_defaults():
    ran = cli("passes")
    assert ran.code == 0
    assert "quantize (lossy): " in ran.out
    assert "    bits = " in ran.out
    found = json.loads(cli("passes", "--json", "-").out)
    assert found["drop-noops"]["effect"] == "exact"
    assert all(entry["summary"] for entry in found.values())


def test_doctor_says_what_is_here():
    ran = cli("doctor")
    assert ran.code == 0
    assert "ort" in ran.out
    found = json.loads(cli("doctor", "--json", "-").out)
    assert found["targets"]["ort"] == {"available": True, "install": None, "obstacle": None}
    assert "target     tensorrt: " in ran.out
    assert "target     openvino: " in ran.out
    assert found["cores"] == os.cpu_count()
    assert found["versions"]["effc"]


@pytest.mark.slow
def test_inspect_of_a_package_and_of_a_model():
    ran = cli("inspect", made().out)
    assert ran.code == 0
    assert "14/14 sites in integer kernels" in ran.out
    assert "input input_ids: int64 [batch, sequence]" in ran.out
    ran = cli("inspect", made().model, "--graph")
    assert ran.code == 0, ran.err
    assert "linear" in ran.out
    assert "%input_ids" in ran.out


def test_inspect_names_what_cannot_be_lowered():
    ran = cli("inspect", f"{made().factories}:unknown")
    assert ran.code == 0, ran.err
    assert "unsupported" in ran.out


def test_inspect_with_an_unknown_target():
    ran = cli("inspect", made().model, "--target", "ortt")
    assert_letter(ran, "RecipeError", 3, "did you mean 'ort'?")


def test_verify_against_the_model(out, tmp_path):
    words = ("--model", made().model, "--calib", made().sentences)
    ran = cli("verify", out, *words, "--json", tmp_path / "found.json")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "found.json").read_text())
    (drift,) = found["outputs"].values()
    assert drift["cosine"] > 0.999
    assert {"max_abs", "rel_l2", "cosine"} <= set(drift)
    assert "parity " in ran.out


def test_verify_against_another_model(out, tmp_path):
    other = save_encoder(tmp_path / "other", seed=1)
    ran = cli("verify", out, "--model", other)
    assert_letter(ran, "SourceError", 4, "is not the model that")


def test_a_metric_needs_the_model(out):
    assert_letter(cli("verify", out, "--metric", "sts:x"), "UsageError", 2, "--model")


@pytest.mark.parametrize(
    "word",
    [
        "1y16",
        "x8",
        "0x8",
        "1x0",
        "",
        "1x-2",
        "²x8",
        "1x1+",
        "1x1+0",
        "1x1+x",
    ],
)
def test_shapes_that_are_none(out, word):
    ran = cli("bench", out, f"--shapes={word}")
    assert_letter(ran, "UsageError", 2, "BATCHxLENGTH")


def test_bench_against_something_else(out, tmp_path):
    ran = cli("bench", out, "--against", tmp_path / "none.onnx")
    assert_letter(ran, "UsageError", 2, "--against")


def test_bench_without_its_model(out, tmp_path):
    plant(out, "local.json", '{"source": {"transformers": "/gone"}}')
    assert_letter(cli("bench", out), "UsageError", 2, "--model MODEL")


@pytest.fixture
def wide(tmp_path):
    """A package for two targets, made by a factory with an option, which is `wide.py` of this folder."""
    shutil.copy(made().factories, tmp_path / "wide.py")
    (tmp_path / "recipe.yaml").write_text(
        f"source: {{python: '{tmp_path / 'wide.py'}:perceptron', options: {{size: 12}}}}\n"
        "targets: [ort, onnx]\nbench: false\n",
        encoding="utf-8",
    )
    ran = cli("compile", tmp_path / "recipe.yaml", "-o", tmp_path / "wide")
    assert ran.code == 0, ran.err
    return tmp_path / "wide"


def test_code_that_a_package_remembers_is_run_only_where_it_is_trusted(wide, tmp_path):
    sprung = tmp_path / "sprung"
    with (tmp_path / "wide.py").open("a") as file:
        file.write(
            f"\n\ndef other(size):\n    open({str(sprung)!r}, 'w')\n    return perceptron(size)\n"
        )
    memory = {"source": {"python": f"{tmp_path / 'wide.py'}:other", "size": 12}}
    plant(wide, "local.json", json.dumps(memory))
    for name in [n for n in sys.modules if n.startswith("effc_user_")]:
        del sys.modules[name]
    assert_letter(cli("bench", wide), "UsageError", 2, "--model MODEL", "--trust-code")
    ran = cli("verify", wide, "--metric", "sts:x")
    assert_letter(ran, "UsageError", 2, "--model MODEL", "--trust-code")
    assert cli("verify", wide).code == 0
    assert not sprung.exists()
    ran = cli("verify", wide, "--trust-code")
    assert ran.code == 0, ran.err
    assert sprung.exists()


def test_a_factory_without_the_options_is_another_model(wide, tmp_path):
    ran = cli("verify", wide, "--model", f"{tmp_path / 'wide.py'}:perceptron")
    assert_letter(ran, "SourceError", 4, "is not the model that", "--trust-code")


def test_verify_opens_the_engine_of_every_target(wide, tmp_path):
    ran = cli("verify", wide, "--trust-code", "--json", tmp_path / "found.json")
    assert ran.code == 0, ran.err
    cases = json.loads((tmp_path / "found.json").read_text())["cases"]
    plain = [label for label in cases if not label.startswith("onnx: ")]
    assert plain
    assert set(cases) == {*plain, *(f"onnx: {label}" for label in plain)}


def test_verify_finds_the_second_engine_broken(wide):
    plant(wide, "onnx/model.onnx", b"no engine")
    ran = cli("verify", wide)
    assert_letter(ran, "VerifyError", 10, "onnx/model.onnx is no ONNX file")


def test_verify_finds_that_nobody_can_run_the_second_engine(wide):
    model = onnx.load(wide / "onnx" / "model.onnx")
    model.graph.node[0].op_type = "NoOperator"
    plant(wide, "onnx/model.onnx", model.SerializeToString())
    assert cli("verify", wide).code == 0
    assert_letter(cli("verify", wide, "--trust-code"), "LoweringError", 8, "model.onnx")


@pytest.mark.slow
def test_bench_times_the_engine_of_a_target(wide, tmp_path):
    words = ("--trust-code", "--budget", 0.2, "--shapes", "1", "--json", tmp_path / "bench.json")
    for target in ("ort", "onnx"):
        ran = cli("bench", wide, *words, "--target", target)
        assert ran.code == 0, ran.err
        found = json.loads((tmp_path / "bench.json").read_text())
        assert found["target"] == target
        assert found["model_bytes"] == (wide / target / "model.onnx").stat().st_size
    ran = cli("bench", wide, *words, "--target", "npu")
    assert_letter(ran, "UsageError", 2, "no engine for 'npu'", "ort, onnx")


@pytest.mark.slow
def test_bench_writes_the_published_json(out, tmp_path):
    ran = cli(
        "bench", out, "--model", made().model, "--budget", 0.3, "--shapes", "1x8",
        "--json", tmp_path / "bench.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {"shapes", "outputs", "metric", "model_bytes", "reference", "threads", "cpu"} <= set(
        found
    )
    (shape,) = found["shapes"]
    assert {"batch", "length", "reference_ms", "engine_ms", "ratio", "low", "high"} <= set(shape)
    assert (shape["batch"], shape["length"]) == (1, 8)
    assert set(shape["against"]) == {"float", "torch"}
    assert shape["low"] <= shape["ratio"] <= shape["high"]
    assert found["metric"] is None
    assert found["model_bytes"] == (out / "model.onnx").stat().st_size
    assert {"max_abs", "rel_l2", "cosine"} <= set(found["outputs"]["last_hidden_state"])
    assert content(out) == content(made().out)


@pytest.mark.slow
def test_decisions_are_replayed_without_data(tmp_path):
    words = ("--quantize", "int8", "--calib", made().sentences, "--samples", 2, "--no-bench")
    decisions = made().out / "decisions.json"
    ran = cli("compile", made().model, "-o", tmp_path / "out", *words, "--decisions", decisions)
    assert ran.code == 0, ran.err
    assert content(tmp_path / "out")["model.onnx"] == content(made().out)["model.onnx"]


def write_recipe(place: Path, factories: Path | str) -> Path:
    np.savez(place / "x.npz", x=np.random.default_rng(0).normal(size=(8, 8)).astype("f"))
    (place / "recipe.yaml").write_text(
        f"source: {{python: '{factories}:perceptron'}}\n"
        "calib: {file: x.npz}\n"
        "passes: [{pass: quantize, bits: 8, activation_bits: 8}]\n"
        "bench: false\n",
        encoding="utf-8",
    )
    return place / "recipe.yaml"


def test_a_recipe_with_a_changed_setting(tmp_path):
    words = ("compile", write_recipe(tmp_path, made().factories), "-o", tmp_path / "out")
    ran = cli(*words, "--set", "passes.0.bits=4", "--json", "-")
    assert ran.code == 0, ran.err
    (quantize,) = [p for p in json.loads(ran.out)["passes"] if p["name"] == "quantize"]
    assert quantize["options"]["bits"] == 4


def test_a_compile_says_what_every_pass_changed(tmp_path):
    file = write_recipe(tmp_path, made().factories)
    passes = (
        "passes=[{pass: quantize, bits: 8, activation_bits: 8},"
        " {pass: quantize, bits: 8, activation_bits: 8}]"
    )
    ran = cli("compile", file, "-o", tmp_path / "out", "--set", passes)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert "pass      quantize: 2 sites, " in ran.out
    assert " nodes, 0.0 → 0.0 MB, drift " in ran.out
    assert "warning   quantize changed nothing: no site fits it" in lines


def test_exact_passes_are_one_line_of_the_report():
    from effc import report

    step = {"target": "ort", "nodes": (1204, 1151), "bytes": (1, 1), "drift": None}
    passes = [
        {**step, "name": "drop-noops", "sites": 53},
        {**step, "name": "fold-batchnorm", "sites": 0, "nodes": (1151, 1151)},
        {**step, "name": "fold-constants", "sites": 2, "nodes": (1151, 1149)},
    ]
    content = {"verify": {"ort": {}}, "passes": passes}
    assert report._passes(content) == [
        "pass      drop-noops 53, fold-constants 2 sites, 1 204 → 1 149 nodes"
    ]


def test_a_factory_in_a_recipe_is_relative_to_it(tmp_path):
    shutil.copy(made().factories, tmp_path / "models.py")
    ran = cli("compile", write_recipe(tmp_path, "models.py"), "-o", tmp_path / "out")
    assert ran.code == 0, ran.err


# A fresh machine without a network


def unshared() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0


def fresh(home: Path) -> dict[str, str]:
    home.mkdir()
    return {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "HF_HUB_OFFLINE": ""}


@pytest.mark.slow
@pytest.mark.skipif(not unshared(), reason="no name spaces here")
def test_it_compiles_without_a_network_and_leaves_only_a_cache(tmp_path):
    home = tmp_path / "home"
    words = ("compile", made().model, "-o", tmp_path / "out", *int8(made()))
    ran = process(*words, env=fresh(home), prefix=["unshare", "-rn"])
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert set(os.listdir(home)) <= {".cache"}
    assert sorted(os.listdir(tmp_path)) == ["home", "out"]


@pytest.mark.skipif(not unshared(), reason="no name spaces here")
@pytest.mark.slow
def test_a_hub_name_without_a_network_is_a_source_error(tmp_path):
    words = ("compile", "nobody/no-such-model", "-o", tmp_path / "out")
    ran = process(*words, env=fresh(tmp_path / "home"), prefix=["unshare", "-rn"], cwd=tmp_path)
    assert_letter(ran, "SourceError", 4, "hub cannot be reached")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_onnxruntime_is_imported_without_telemetry(tmp_path):
    home = tmp_path / "home"
    script = "import effc.backends.ort_engine, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | fresh(home)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
    assert set(os.listdir(home)) <= {".cache"}
    assert not [p for p in home.rglob("*") if "onnxruntime" in p.name or "icrosoft" in p.name]
