"""A tenth of what `make torture` does: spoilt inputs end in one clear error, and a killed compile harms nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kit import write_factories

pytestmark = pytest.mark.slow

TOOL = Path(__file__).resolve().parent.parent / "tools" / "torture.py"
QUICK = (
    "weights_header,weights_index,model_special,recipe_bytes,recipe_bomb,data_npz,data_zipped,data_pictures,"
    "package_bytes,manifest_forged,engine_outside,package_special,arguments"
)


def torture(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_spoilt_inputs_end_in_one_clear_error(tmp_path):
    file = tmp_path / "found.json"
    done = torture("malformed", "--seed", 7, "--count", 30, "--only", QUICK, "--json", file)
    assert done.returncode == 0, done.stdout
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["inputs"] == 30
    assert found["failed"] == []
    assert set(found["kinds"]) == set(QUICK.split(","))
    assert sum(found["codes"].values()) == 30
    assert len(found["codes"]) > 3


def test_a_killed_compile_leaves_nothing_or_all_and_goes_on(tmp_path):
    factories = write_factories(tmp_path / "factories.py")
    state, file = tmp_path / "state.json", tmp_path / "found.json"
    words = (
        "kills",
        "--model",
        f"{factories}:perceptron",
        "--trials",
        1,
        "--jobs",
        2,
        "--state",
        state,
    )
    done = torture(*words, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["trials"], found["killed"], found["failed"]) == (1, 1, {})
    again = torture(*words)
    assert again.returncode == 0
    assert "1 trials, seed 0: 1 killed, 0 failed" in again.stdout


@pytest.mark.parametrize("mode", ["malformed", "kills", "full"])
def test_every_way_to_torture_says_how_it_is_called(mode):
    assert torture(mode, "--help").returncode == 0
