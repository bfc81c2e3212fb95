"""Engines of every task's model, for every target: of any size, and decoded as torch is."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import effc
from effc import compiler, measure
from effc.backends import BACKENDS
from effc.backends.dialect import DIALECTS
from effc.passes import CANONICAL, PASSES
from effc.source import Source, from_encoder

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class Made:
    """A task's model of random numbers, traced, with samples of several sizes, the longest last."""

    source: Source
    program: Any
    items: list[Any]


def script(folder):
    spec = importlib.util.spec_from_file_location(f"{folder}_made", EXAMPLES / folder / "made.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def dialogues(root):
    made = script("diaasq")
    made.write(root / "valid.json", 8, 1)
    return made.encoder(root / "encoder", 16), root / "valid.json", {"inner": 8}


def conversations(root):
    made = script("cer")
    made.write(root / "valid.csv", 8, 1)
    return made.encoder(root / "encoder", 16), root / "valid.csv", {"size": 16}


def paragraphs(root):
    made = script("lexical_fusion")
    made.write(root / "valid.jsonl", 8, 1, "valid")
    made.dictionary(root)
    files = {
        "dictionary": str(root / "hownet.txt"),
        "vectors": str(root / "sememe_vector.txt"),
    }
    sizes = {"sememe_size": 16, "heads": 2, "size": 8, "inner": 16}
    return made.encoder(root / "encoder", 16), root / "valid.jsonl", {**sizes, **files}


FILES = {"diaasq": dialogues, "cer": conversations, "lexical-fusion": paragraphs}


@pytest.fixture(scope="module", params=FILES)
def made(request, tmp_path_factory):
    encoder, file, options = FILES[request.param](tmp_path_factory.mktemp(request.param))
    source = from_encoder(encoder, request.param, options)
    items = sorted(source.processor.read(file), key=lambda item: item.length)
    assert len({item.length for item in items}) > 2
    return Made(source=source, program=compiler.trace_source(source), items=items)


@pytest.mark.parametrize("target", ["ort", "openvino", "tensorrt"])
def test_an_engine_takes_any_number_and_size_of_samples_and_says_what_torch_says(
    made, target, tmp_path
):
    """Alone and in a padded batch, the least and the largest; of TensorRT the ONNX that its engine is built from."""
    if target == "tensorrt":
        pytest.importorskip("tensorrt_rtx_bindings")
    task, program = made.source.processor, made.program.clone()
    for word in CANONICAL:
        effc.apply(PASSES[word](), program, dialect=DIALECTS[target])
    lowered = BACKENDS[target]().lower(program.only(), tmp_path)
    if target == "tensorrt":
        assert (tmp_path / lowered.files[0]).read_bytes()[1:4] == b"trt"
        assert set(lowered.options["profile"].replace("=", ";").split(";")) >= {
            word for dims in task.dims.values() for word in dims.values()
        }

    def in_torch(feeds):
        with torch.no_grad():
            found = made.source.module(**{n: torch.from_numpy(v) for n, v in feeds.items()})
        return {name: value.numpy() for name, value in found.items()}

    with measure.opened(lowered, 1) as engine:
        for item in made.items:
            assert task.said(engine, item) == task.said(in_torch, item)
        for some in ([made.items[0], made.items[-1]], made.items):
            feeds = task.feeds(some)
            found, wanted = engine(feeds), in_torch(feeds)
            assert set(found) == set(wanted)
            for name, value in wanted.items():
                np.testing.assert_allclose(found[name], value, atol=1e-4)
