"""Every example runs as its first lines say, and writes what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(file.parent.name for file in ROOT.glob("examples/*/run.py"))
KEYS = {
    "diaasq": {"metrics", "decoded_equal", "speedup"},
    "minilm": {"shapes", "outputs", "metric", "model_bytes", "int8_sites", "total_sites"},
    "noisyquant": {
        "arms",
        "fold_max_abs",
        "extra_nodes",
        "engine_steps_off",
        "latency_ratio",
        "theorem",
    },
    "pat": {
        "arms",
        "fold_rel_err_fp32",
        "fold_rel_err_fp64",
        "linear_param_ratio",
        "engine_rel_l2",
        "prefill_speedup",
    },
    "q_diffusion": {"arms", "steps", "is_trained"},
    "own_pass": {"before", "after", "sites", "max_abs", "recipe"},
}


def test_every_example_is_known():
    assert sorted(KEYS) == EXAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, ROOT / "examples" / name / "run.py", "--smoke", "--json", file]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["example"] == name
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert set(found) >= KEYS[name]
    assert set(found["data"]) >= {"name", "n", "sha256"}
