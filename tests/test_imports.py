"""Who may import whom, read from the source, and what `import effc` must not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "effc": "effc",
    "passes": "effc.passes",
    "backends": "effc.backends",
    "calib": "effc.calib",
}

# Parts of effc, lowest first. A part imports only from lines above its own, and itself.
LINES = [
    line.split()
    for line in """
    errors sizes heap quiet lean plain prototext
    progress paths scratch alone many
    bounded table stats cache external
    machine schedule tasks
    quant diffusion
    dialect correction
    ir nn
    calib
    causal intuition
    processor noise generate gguf cached adapter pipeline experts foreign
    guided task
    source
    passes backends
    peers
    metrics sampling lint migrate
    recipe room checkpoint trajectories
    settings
    samples verify bench alike
    gate case tuning
    package
    engine
    delta charts report_shape chain
    report_numbers coupled
    report_html
    report
    measure
    timing
    build blame layers elsewhere
    trial remedy layout_plan
    search layout_causal layout_encoder layout_ort layout_pipeline
    compiler layout_triton layout_peft
    compared sweep
    inspection plan writing painting solving layout
    walk
    cli
    __init__ __main__
    """.strip().splitlines()
]
LEVEL = {part: level for level, line in enumerate(LINES) for part in line}
STANDARD_LIBRARY_ONLY = {
    "errors",
    "progress",
    "scratch",
    "sizes",
    "machine",
    "heap",
    "quiet",
    "paths",
    "plain",
    "prototext",
    "bounded",
    "table",
    "tasks",
}

# Training and the built-in models stand aside: all they may import, and who may import them.
ASIDE = {
    "train": {"errors", "many", "progress", "table", "quant", "dialect", "ir", "nn", "calib"},
    "zoo": {
        "errors",
        "paths",
        "bounded",
        "table",
        "nn",
        "calib",
        "processor",
        "task",
        "source",
        "train",
    },
}
IMPORTERS_OF_ASIDE = {"train": {"zoo", "tuning", "compiler", "cli", "passes"}, "zoo": set()}


def modules() -> dict[str, Path]:
    """Every module of effc by the name it is imported under."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            inner = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in inner if p != "__init__")])] = file
    return found


MODULES = modules()


def imports(module: str, text: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + is_package]
                base = ".".join([*package, *base.split(".")] if base else package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def part_of(name: str) -> str:
    """`effc.ir.edit.lift` → `ir`; a name that effc itself defines belongs to `__init__`."""
    _, _, rest = name.partition(".")
    part = rest.split(".")[0]
    known = part in LEVEL or part in ASIDE or f"effc.{part}" in MODULES
    return part if known else "__init__"


def is_allowed(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if importer in ASIDE:
        return imported in ASIDE[importer]
    if imported in ASIDE:
        return importer in IMPORTERS_OF_ASIDE[imported]
    return LEVEL[imported] < LEVEL[importer]


def broken_rules(module: str, text: str, is_package: bool = False) -> list[str]:
    importer = part_of(module)
    broken = []
    for line, name in imports(module, text, is_package):
        top = name.split(".")[0]
        if top in FOLDERS and top != "effc":
            broken.append(f"{module}:{line} imports {name}, which is effc.{name}")
        elif top == "effc" and not is_allowed(importer, part_of(name)):
            broken.append(f"{module}:{line} imports {name}")
        elif importer in STANDARD_LIBRARY_ONLY and top not in {"effc", *sys.stdlib_module_names}:
            broken.append(f"{module}:{line} imports {name}, not of the standard library")
    return broken


def test_every_module_has_a_line():
    assert set(map(part_of, MODULES)) <= LEVEL.keys() | ASIDE.keys()
    for package in FOLDERS.values():
        assert any(name.startswith(f"{package}.") for name in MODULES), f"{package} is not read"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    file = MODULES[module]
    text = file.read_text(encoding="utf-8")
    assert broken_rules(module, text, is_package=file.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("effc.passes.base", "from effc.backends import BACKENDS"),
        ("effc.backends.ort", "from effc import passes"),
        ("effc.passes.base", "import effc.backends.ort"),
        ("effc.passes.base", "def f():\n    from ..backends import ort"),
        ("effc.ir.edit", "if TYPE_CHECKING:\n    from effc.calib.probe import Probe"),
        ("effc.calib.data", "from effc.source import Source"),
        ("effc.quant.affine", "from effc import __version__"),
        ("effc.compiler", "from effc.cli import main"),
        ("effc.compiler", "from effc.zoo import vision"),
        ("effc.train.loop", "from effc.passes import PASSES"),
        ("effc.errors", "import numpy"),
        ("effc.recipe", "import passes.base"),
    ],
)
def test_the_rule_sees_every_way_to_break_it(module, text):
    assert len(broken_rules(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("effc.passes.quantize", "from effc.passes.base import Pass"),
        ("effc.passes.quantize", "from .base import Pass"),
        ("effc.passes.quantize", "from effc.quant.affine import quantize"),
        ("effc.source", "from effc.calib.data import Batch"),
        ("effc.train.loop", "from effc.nn import adapters"),
        ("effc.zoo.dialogue", "from effc.train import loop"),
        ("effc.compiler", "import torch"),
    ],
)
def test_the_rule_leaves_the_rest_alone(module, text):
    assert broken_rules(module, text) == []


def test_a_relative_import_in_a_package_counts_from_the_package():
    found = imports("effc.passes", "from .base import Pass\nfrom . import fuse", is_package=True)
    assert [name for _, name in found] == ["effc.passes.base.Pass", "effc.passes.fuse"]


@pytest.mark.parametrize("arguments", [["-c", "import effc"], ["-m", "effc", "--help"]])
def test_starting_effc_loads_nothing_heavy(arguments, tmp_path):
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert "effc" in loaded
    assert not loaded & {"torch", "numpy", "scipy", "onnx", "onnxruntime", "transformers"}


def test_the_mapped_folders_are_not_imported_from_the_root():
    import effc.backends
    import effc.calib
    import effc.passes

    assert Path(effc.passes.__file__).parent == ROOT / "passes"
    assert not {"passes", "backends", "calib"} & set(sys.modules)
