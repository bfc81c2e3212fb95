"""The wheel and the sdist hold what they should, and the wheel works far from the repository."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
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
    assert not [name for name in names if name.startswith("tests")]


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
