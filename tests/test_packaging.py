"""The wheel and the sdist hold what they should, and the wheel works far from the repository."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("passes", "backends", "calib")

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Both archives, built from a clean copy; the wheel is made from the sdist."""
    place = tmp_path_factory.mktemp("dist")
    skip = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "demo")
    shutil.copytree(ROOT, place / "source", ignore=skip)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", place, cwd=place / "source")
    return place


@pytest.fixture(scope="module")
def wheel(dist):
    (file,) = dist.glob("effc-*.whl")
    return file


def test_the_wheel_holds_every_module_and_no_test(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "effc").rglob("*.py")}
    for folder in MAPPED:
        files = list((ROOT / folder).rglob("*.py"))
        assert files
        modules |= {f"effc/{file.relative_to(ROOT).as_posix()}" for file in files}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"effc/py.typed", "effc/schema/recipe.json", "effc/schema/manifest.json"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_can_be_built_from_and_holds_no_test(dist):
    (file,) = dist.glob("effc-*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "effc/py.typed", "passes/base.py"} <= names
    assert {"docs/recipes.md", "examples/minilm/recipe.yaml", "constraints.txt"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_what_is_imported_is_declared():
    """The wheel is tested beside a full environment, so a missing declaration would not be noticed there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    words = ("openvino", "tensorrt", "train", "diffusion", "delta", "sweep")
    lines = [*project["dependencies"], *(line for word in words for line in extras[word])]
    declared = {re.split(r"[<>=!~ ;\[]", line)[0].lower().replace("-", "_") for line in lines}
    names = {"yaml": "pyyaml", "PIL": "pillow", "cuda": "cuda_bindings"}
    names |= {f"tensorrt_rtx_{part}": f"tensorrt_rtx_cu12_{part}" for part in ("libs", "bindings")}
    # guarded, or a dependency's own
    optional = {"pillow", "psutil", "click", "huggingface_hub", "tensorrt"}
    files = [f for folder in ("effc", *MAPPED) for f in (ROOT / folder).rglob("*.py")]
    used = set()
    for node in (n for f in files for n in ast.walk(ast.parse(f.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            used |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            used.add(node.module.split(".")[0])
    used -= {"effc", *sys.stdlib_module_names}
    assert {names.get(n, n) for n in used} - optional <= declared
    behind = {
        "onnx",
        "safetensors",
    }  # onnx-ir and transformers work with them; only their versions are ours to ask
    assert declared - {names.get(n, n) for n in used} <= {"openvino", *behind}


def test_the_wheel_works_in_a_bare_environment(wheel, tmp_path):
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(*pip, wheel, cwd=tmp_path)

    # A path line lends the dependencies and does not bring the editable installation along.
    (site,) = venv.glob("lib/*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

    places = "import effc.passes.base as base, effc; print(effc.__file__, base.__file__)"
    for file in run(python, "-c", places, cwd=tmp_path).split():
        assert Path(file).is_relative_to(site)
    assert "compile" in run(python, "-m", "effc", "--help", cwd=tmp_path)
    assert "compile" in run(venv / "bin" / "effc", "--help", cwd=tmp_path)
