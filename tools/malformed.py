"""Inputs that are wrong in every way that comes to mind: cut, bent, huge, endless, and not what their names say.

A kind is a function that spoils a copy of good material in a folder and says what to run there. All chance comes from
the `Random` that it is given, so a seed and a number name one input for good.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import math
import os
import random
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spoil import HOSTILE, bend, bent, harmed, put_special, spoil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import kit

Words = tuple[str, ...]
LOADED = frozenset({0, 4, 5, 7, 8, 10})
"""How a compile of a spoilt model may end: it may still be a model, of odd numbers or an odd shape."""
CALIBRATED = frozenset({0, 7})
CHECKED = frozenset({10, 12})


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command on one spoilt input, what was done to it, and the codes that the command may end with."""

    words: Words
    codes: frozenset[int]
    note: str


@dataclass(frozen=True, kw_only=True)
class Base:
    """Good material: an encoder with its package, a model of pictures, and data for both."""

    place: Path

    @property
    def model(self) -> Path:
        return self.place / "model"

    @property
    def out(self) -> Path:
        return self.place / "out"

    @property
    def eye(self) -> Path:
        return self.place / "eye"

    @property
    def sentences(self) -> Path:
        return self.place / "sentences.txt"


def make_base(place: Path) -> Base:
    base = Base(place=place)
    kit.save_encoder(base.model, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    kit.write_sentences(base.sentences)
    save_eye(base.eye)
    ran = kit.cli("compile", base.model, "-o", base.out, *calibrated(base.sentences))
    assert ran.code == 0, ran.err
    return base


def save_eye(place: Path) -> None:
    """A transformers directory of a random model of 16 × 16 pictures."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 16, "patch_size": 4}
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(place)
    settings = {
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (place / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def calibrated(file: object) -> Words:
    return ("--quantize", "int8", "--calib", str(file), "--samples", "8", "--no-bench")


Kind = Callable[[random.Random, Path, Base], Case]
KINDS: dict[str, Kind] = {}


def kind(make: Kind) -> Kind:
    KINDS[make.__name__] = make
    return make


def case_of(
    seed: int, number: int, place: Path, base: Base, only: str | None = None
) -> tuple[str, Case]:
    """Input `number` of a seed, made in an empty folder; the kinds take turns."""
    names = only.split(",") if only else [*KINDS, "settings_config", "settings_tokenizer"]
    name = names[number % len(names)]
    return name, KINDS[name](random.Random(f"{seed}:{number}:{name}"), place, base)


# What a command reads


def copied(source: Path, place: Path) -> Path:
    return Path(shutil.copytree(source, place, symlinks=True))


def read_tokens(model: str, file: str) -> None:
    from effc.calib import data
    from effc.processor import Processor
    from effc.source import read_config

    path = Path(model)
    made = Processor(path, read_config(path), ["input_ids", "attention_mask"])
    for _ in made.batches(data.read(Path(file)), size=8):
        pass


def read_data(word: str, *labelled: str) -> None:
    from effc.calib import data

    path, column = data.parse(word)
    for _ in data.read(
        path, column=column, samples=None if labelled else 8, labelled=bool(labelled)
    ):
        pass


def read_recipe(file: str) -> None:
    from effc import recipe

    recipe.read(Path(file)).portable()


PARTS: dict[str, Callable[..., None]] = {
    "part:tokens": read_tokens,
    "part:data": read_data,
    "part:recipe": read_recipe,
}
"""What most spoilt inputs of a kind go through alone, which is far quicker than a compile that reads them."""


def run_part(words: Words) -> int:
    """The exit code of a part, with its message as the command line writes it."""
    from effc import cli
    from effc.errors import EffcError

    try:
        PARTS[words[0]](*words[1:])
    except EffcError as error:
        return cli._fail(error)
    except OSError as error:
        return cli._fail(cli._plain(error))
    return 0


def read_(draw: random.Random, *words: object) -> Words:
    """A command that reads `model`: mostly the one that is done soon."""
    return compile_("model", *words) if draw.random() < 0.3 else ("inspect", "model")


def compile_(model: object, *words: object) -> Words:
    return ("compile", str(model), "-o", "OUT", *map(str, words or ("--no-bench",)))


# The model


@kind
def weights_bytes(draw: random.Random, place: Path, base: Base) -> Case:
    model = copied(base.model, place / "model")
    note = spoil(draw, model / "model.safetensors")
    return Case(words=read_(draw), codes=LOADED, note=note)


def _safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@kind
def weights_header(draw: random.Random, place: Path, base: Base) -> Case:
    model = copied(base.model, place / "model")
    file = model / "model.safetensors"
    header, data = _safetensors(file)
    name = draw.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    changes: list[Callable[[], Any]] = [
        lambda: entry.update(shape=[2**40, 2**40]),
        lambda: entry.update(shape=[2**62]),
        lambda: entry.update(shape=[-1]),
        lambda: entry.update(shape=[]),
        lambda: entry.update(shape=[0]),
        lambda: entry.update(
            dtype=draw.choice(["F16", "BF16", "I64", "U8", "BOOL", "F64", "F8_E4M3", "F4"])
        ),
        lambda: entry.update(data_offsets=[0, 2**63 - 1]),
        lambda: entry.update(data_offsets=[8, 4]),
        lambda: entry.update(data_offsets=[0, 4]),
        lambda: header.update({name + "x": dict(entry)}),
        lambda: header.update({"__metadata__": draw.choice(HOSTILE[:-1])}),
        lambda: header.update({"\ud800" if draw.random() < 0.5 else "x" * 10**6: entry}),
        lambda: header.pop(name),
    ]
    note = "header"
    if draw.random() < 0.3:
        header, note = bent(draw, header)
    else:
        draw.choice(changes)()
    text = json.dumps(header).encode()
    if draw.random() < 0.1:
        text = b'{"a":' * 50_000
    size = draw.choice([len(text)] * 6 + [0, 2**63, 2**40, len(text) * 2, 100_000_001])
    file.write_bytes(struct.pack("<Q", size) + text + data)
    return Case(words=read_(draw), codes=LOADED, note=f"{name}: {note}, {size} said")


@kind
def weights_values(draw: random.Random, place: Path, base: Base) -> Case:
    model = copied(base.model, place / "model")
    file = model / "model.safetensors"
    header, data = _safetensors(file)
    name = draw.choice([n for n in header if n != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    value = draw.choice([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0, 1e20])
    count = draw.choice([1, (end - begin) // 4])
    filled = struct.pack("<f", value) * count
    data = data[:begin] + filled + data[begin + len(filled) :]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    words = compile_("model", *calibrated(base.sentences))
    return Case(words=words, codes=LOADED | {6}, note=f"{count} of {name} are {value}")


@kind
def weights_index(draw: random.Random, place: Path, base: Base) -> Case:
    """Weights in several files, which the index may place anywhere."""
    model = copied(base.model, place / "model")
    header, _ = _safetensors(model / "model.safetensors")
    (place / "secret.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    good = "model-00001-of-00001.safetensors"
    shard = draw.choice(
        ["../secret.safetensors", str(place / "secret.safetensors"), "/dev/zero", "/etc/passwd", "",
         ".", "a\0b", "x" * 300, "nowhere.safetensors", "pipe.safetensors", good, 3, None, [], "\ud800"]
    )  # fmt: skip
    if shard == "pipe.safetensors":
        os.mkfifo(model / "pipe.safetensors")
    names = [n for n in header if n != "__metadata__"]
    index: Any = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, good)}
    index["weight_map"][draw.choice(names)] = shard
    note = f"a shard is {str(shard)[:40]!r}"
    if draw.random() < 0.3:
        index, note = bent(draw, index)
    text = json.dumps(index)
    (model / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return Case(words=read_(draw), codes=LOADED, note=note)


def _settings(name: str) -> Kind:
    def make(draw: random.Random, place: Path, base: Base) -> Case:
        model = copied(base.model, place / "model")
        file = model / name
        if not file.exists():
            file.write_text(json.dumps(SETTINGS[name]), encoding="utf-8")
        note = spoil(draw, file) if draw.random() < 0.3 else bend(draw, file)
        words = read_(draw, *calibrated(base.sentences))
        if "token" in name and words[0] != "compile":
            words = ("part:tokens", "model", str(base.sentences))
        return Case(words=words, codes=LOADED | {6}, note=note)

    return make


SETTINGS: dict[str, Any] = {
    "config.json": None,
    "tokenizer.json": None,
    "tokenizer_config.json": None,
    "modules.json": None,
    "1_Pooling/config.json": None,
    "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": False},
    "special_tokens_map.json": {"cls_token": "[CLS]", "pad_token": {"content": "[PAD]"}},
    "generation_config.json": {"bos_token_id": 1, "max_length": 20},
    "added_tokens.json": {"[NEW]": 40},
}
for _name in SETTINGS:
    _made = _settings(_name)
    _made.__name__ = "settings_" + _name.removesuffix(".json").replace("/", "_").lower()
    kind(_made)


@kind
def model_special(draw: random.Random, place: Path, base: Base) -> Case:
    model = copied(base.model, place / "model")
    secret = place / "secret.json"
    secret.write_text("{}", encoding="utf-8")
    names = sorted(p.relative_to(model).as_posix() for p in model.rglob("*"))
    names += ["generation_config.json", "vocab.txt", "tokenizer.model", "model2.safetensors"]
    names += ["LICENSE", "chat_template.jinja", "2_Normalize", "a\nb.json", "LICENSE-\x07"]
    note = put_special(draw, model / draw.choice(names), secret)
    words = read_(draw, *calibrated(base.sentences))
    return Case(words=words, codes=LOADED | {12}, note=note)


@kind
def model_place(draw: random.Random, place: Path, base: Base) -> Case:
    """A word for a model that is none."""
    (place / "file").write_bytes(b"x")
    (place / "empty").mkdir()
    os.mkfifo(place / "pipe")
    (place / "loop").symlink_to("loop")
    words = [
        "",
        ".",
        "..",
        "/",
        "/dev/null",
        "/dev/zero",
        "file",
        "empty",
        "pipe",
        "loop",
        "a" * 5000,
    ]
    words += [
        "nowhere:build",
        "file.py:build",
        "a/b/c",
        "é:é",
        "os:system",
        "\udcff",
        "~",
        "-",
        "pipe.yaml",
    ]
    word = draw.choice(words)
    return Case(words=compile_(word), codes=frozenset({2, 3, 4}), note=repr(word[:40]))


# The recipe

RECIPE = """\
effc: 1
source: {transformers: model}
calib: {file: sentences.txt, samples: 8, seed: 0, batch: 4}
passes:
- {pass: quantize, bits: 8, activation_bits: 8, range: mse, select: {op: linear, exclude: "x.*"}}
targets: [ort]
canonicalize: true
bench: false
"""


def _recipe(draw: random.Random, place: Path, base: Base, text: bytes) -> Words:
    (place / "model").symlink_to(base.model)
    (place / "sentences.txt").symlink_to(base.sentences)
    (place / "recipe.yaml").write_bytes(text)
    if draw.random() < 0.7:
        return ("part:recipe", "recipe.yaml")
    return ("compile", "recipe.yaml", "-o", "OUT", "--no-bench")


READ = frozenset({0, 3, 4, 6, 7})


@kind
def recipe_bytes(draw: random.Random, place: Path, base: Base) -> Case:
    text, note = harmed(draw, RECIPE.encode())
    return Case(words=_recipe(draw, place, base, text), codes=READ, note=note)


@kind
def recipe_values(draw: random.Random, place: Path, base: Base) -> Case:
    import yaml

    value, note = bent(draw, yaml.safe_load(RECIPE))
    text = json.dumps(value)
    if draw.random() < 0.5:
        with contextlib.suppress(RecursionError):  # PyYAML cannot write what is that deep
            text = yaml.safe_dump(value)
    return Case(
        words=_recipe(draw, place, base, text.encode("utf-8", "surrogatepass")),
        codes=READ,
        note=note,
    )


_AZ = "abcdefghijklmnopqrstuvwxyz"
BOMBS = {
    "aliases": "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in itertools.pairwise(_AZ)),
    "aliases of mappings": "source: {python: a, options: &a {x: &b {y: 1}, z: *b, w: *b}}\n",
    "itself": "source: &a {transformers: *a}\n",
    "itself in a list": "passes: &a [*a]\nsource: {transformers: model}\n",
    "deep": "[" * 50_000,
    "deep mappings": "{a: " * 5_000 + "}" * 5_000,
    "deep block": "".join(f"{' ' * i}- \n" for i in range(2000)),
    "code": "source: !!python/object/apply:os.system [touch sprung]\n",
    "a tag": "source: !mine {transformers: model}\n",
    "merge": "a: &a {transformers: model}\nsource: {<<: *a, <<: *a}\n",
    "merge itself": "source: &a {<<: *a}\n",
    "binary": "source: {transformers: !!binary aGVsbG8=}\n",
    "a set": "source: !!set {transformers}\n",
    "a date": "source: {transformers: 2020-01-01}\n",
    "a bad date": "source: {transformers: 2020-99-99}\n",
    "a long number": "effc: " + "1" * 5000 + "\n",
    "base sixty": "effc: 1:1\n",
    "no end": "source: {transformers: \"a\n",
    "two documents": "source: {transformers: model}\n---\nsource: {}\n",
    "a null": "source: {transformers: \"\\0\"}\n",
    "half a character": "source: {transformers: \"\\ud800\"}\n",
    "keys of keys": "{[a, b]: 1, {c: d}: 2}\n",
    "a long key": "x" * 2_000_000 + ": 1\n",
    "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "UTF-16": "\ufeffsource: {transformers: model}\n",
    "a bell": "source: \a\n",
    "not a number": "source: {transformers: model}\nbench: {budget_s: .nan}\n",
    "endless": "source: {transformers: model}\ncalib: {file: a, samples: .inf}\n",
}  # fmt: skip


@kind
def recipe_bomb(draw: random.Random, place: Path, base: Base) -> Case:
    name = draw.choice(sorted(BOMBS))
    text = BOMBS[name].encode("utf-16" if name == "UTF-16" else "utf-8")
    if draw.random() < 0.3:
        text = RECIPE.encode() + text
    return Case(words=_recipe(draw, place, base, text), codes=READ, note=name)


# The data


def _data(draw: random.Random, base: Base, file: str) -> Words:
    if draw.random() < 0.7:
        return ("part:data", file, *(["labelled"] if draw.random() < 0.3 else []))
    return _with_data(base, file)


def _with_data(base: Base, file: str, *words: object) -> Words:
    return compile_(base.model, *calibrated(file), *words)


@kind
def data_text(draw: random.Random, place: Path, base: Base) -> Case:
    texts = {
        "noise": draw.randbytes(4096),
        "nulls": b"the cat\0sat\n\0\n" * 10,
        "one line": b"the cat sat " * 300_000,
        "UTF-16": "the cat\nsat\n".encode("utf-16"),
        "half a letter": b"the cat\n\xc3\n",
        "a surrogate": b"the cat \xed\xa0\x80\n",
        "blank": b" \n\t\n\r\n" * 100,
        "a mark": b"\xef\xbb\xbfthe cat\n",
        "old ends": b"the cat\rsat\r",
        "odd blanks": "the\u2028cat\u0085sat\u3000on\n".encode(),
        "directions": "\u202ethe cat\u200b\u200d\n".encode() * 20,
        "emoji": "👩‍👩‍👧‍👦 the cat\n".encode() * 20,
        "accents": ("e" + "\u0301" * 5000 + "\n").encode(),
        "one letter": b"a",
        "harmed": harmed(draw, base.sentences.read_bytes())[0],
    }
    name = draw.choice(sorted(texts))
    (place / "data.txt").write_bytes(texts[name])
    return Case(words=_data(draw, base, "data.txt"), codes=CALIBRATED, note=name)


@kind
def data_table(draw: random.Random, place: Path, base: Base) -> Case:
    end = draw.choice(["csv", "tsv"])
    mark = "," if end == "csv" else "\t"
    rows = [[" ".join(draw.sample(kit.WORDS, 4)), str(i % 3)] for i in range(12)]
    good = "\n".join(mark.join(row) for row in [["text", "label"], *rows]).encode()
    texts = {
        "harmed": harmed(draw, good)[0],
        "open quote": good + b'\n"the cat',
        "quote inside": good + b'\nthe "cat" sat,1',
        "a long field": b"text\n" + b"x" * 300_000,
        "nulls": good.replace(b"1", b"\0"),
        "many columns": mark.join("abc" * 20_000).encode(),
        "no rows": b"text,label\n",
        "twins": mark.join(["text", "text", "label"]).encode() + b"\na,b,1\n",
        "labels": good.replace(
            b"1", draw.choice([b"", b"1.5", b"-", b"9" * 5000, b"1e9", "٣".encode()])
        ),
        "short rows": good + b"\nthe cat\n",
        "not UTF-8": good + b"\n\xff,1\n",
    }
    name = draw.choice(sorted(texts))
    column = draw.choice(["", "", "#text", "#label", "#nope", "#0", "#99999999999", "#", "#²"])
    (place / f"data.{end}").write_bytes(texts[name])
    words = _data(draw, base, f"data.{end}{column}")
    if draw.random() < 0.3:
        words = (*compile_(base.model), "--metric", f"sts:data.{end}")
    return Case(words=words, codes=CALIBRATED, note=f"{name}{column}")


@kind
def metric_table(draw: random.Random, place: Path, base: Base) -> Case:
    good = "\n".join(f"the cat {w},a dog {w},{i % 5}" for i, w in enumerate(kit.WORDS)).encode()
    texts = {
        "harmed": harmed(draw, good)[0],
        "not numbers": good.replace(b",1", b",nan"),
        "huge": good.replace(b",1", b",1e400"),
        "alike": b"a,b,1\n" * 10,
        "one": b"a,b,1\n",
        "two": b"the cat,b,1\nthe,cat,2\n",
        "nothing": b"",
        "empty texts": b",,1\n,,2\n,,3\n",
        "a long field": b"x" * 200_000 + b",b,1\n",
        "good": good,
    }
    name = draw.choice(sorted(texts))
    (place / "data.csv").write_bytes(texts[name])
    metric = draw.choice(["sts", "sts", "recall@1", "accuracy", "f1", "entity_f1", "perplexity"])
    words = (*compile_(base.model), "--metric", f"{metric}:data.csv")
    return Case(words=words, codes=frozenset({0, 7}), note=f"{metric} {name}")


def _npy(head: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    size = struct.pack("<H" if version[0] == 1 else "<I", len(head))
    return b"\x93NUMPY" + version + size + head + data


def _npz(arrays: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in arrays.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _good_arrays() -> dict[str, bytes]:
    import numpy as np

    found = {}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        stream = io.BytesIO()
        value = (
            np.tile(np.arange(2, 10), (6, 1)) if name == "input_ids" else np.zeros((6, 8), np.int64)
        )
        np.save(stream, value + (name == "attention_mask"))
        found[f"{name}.npy"] = stream.getvalue()
    return found


HEADS = {
    "huge": b"{'descr': '<i8', 'fortran_order': False, 'shape': (9223372036854775807, 8), }\n",
    "large": b"{'descr': '<i8', 'fortran_order': False, 'shape': (6, 1000000000), }\n",
    "by column": b"{'descr': '<i8', 'fortran_order': True, 'shape': (1000000000, 8), }\n",
    "below zero": b"{'descr': '<i8', 'fortran_order': False, 'shape': (-6, 8), }\n",
    "objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (6, 8), }\n",
    "structure": b"{'descr': [('a', '<i8'), ('b', '<f4')], 'fortran_order': False, 'shape': (6, 8), }\n",
    "text": b"{'descr': '<U5', 'fortran_order': False, 'shape': (6, 8), }\n",
    "no size": b"{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000, 8), }\n",
    "empty rows": b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 0), }\n",
    "many axes": b"{'descr': '<i8', 'fortran_order': False, 'shape': (" + b"1, " * 60 + b"), }\n",
    "too many axes": b"{'descr': '<i8', 'fortran_order': False, 'shape': ("
    + b"1, " * 70
    + b"), }\n",
    "a name": b"{'descr': '<i8', 'fortran_order': False, 'shape': (6, 8), 'x': 1}\n",
    "a call": b"{'descr': __import__('os').system('touch sprung'), 'fortran_order': False, 'shape': ()}\n",
    "deep": b"{'descr': '<i8', 'fortran_order': False, 'shape': "
    + b"(" * 5000
    + b")" * 5000
    + b"}\n",
    "times": b"{'descr': '<M8[s]', 'fortran_order': False, 'shape': (6, 8), }\n",
    "complex": b"{'descr': '<c16', 'fortran_order': False, 'shape': (6, 8), }\n",
    "truth": b"{'descr': 1, 'fortran_order': 1, 'shape': (True, 8), }\n",
    "long": b"{'descr': '<i8', 'fortran_order': False, 'shape': (6, 8), }" + b" " * 60_000 + b"\n",
    "a dot": b"{'descr': '<i8', 'fortran_order': False, 'shape': (), }\n",
}


@kind
def data_npz(draw: random.Random, place: Path, base: Base) -> Case:
    arrays, note = _good_arrays(), ""
    name = draw.choice(sorted(arrays))
    how = draw.choice(
        ["harmed", "head", "head", "head", "bomb", "name", "method", "member", "flags"]
    )
    data = bytes(8 * 48)
    if how == "head":
        note = draw.choice(sorted(HEADS))
        version = draw.choice([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
        arrays[name] = _npy(HEADS[note], data, version)
    elif how == "bomb":
        head = b"{'descr': '<i8', 'fortran_order': %s, 'shape': (%d, 8), }\n"
        column = draw.random() < 0.5
        content = _npy(head % (b"True" if column else b"False", 1 << 22)) + bytes(1 << 28)
        arrays = dict.fromkeys(arrays if draw.random() < 0.2 else [name], content) | arrays
        arrays[name] = content
    elif how == "name":
        note = draw.choice(
            ["../../x.npy", "/etc/x.npy", "x", "label.npy", "a\0b.npy", "x" * 5000, "é.npy"]
        )
        arrays[note] = arrays[name]
    elif how == "member":
        arrays[name], note = harmed(draw, arrays[name])
    method = zipfile.ZIP_DEFLATED if how == "bomb" or draw.random() < 0.3 else zipfile.ZIP_STORED
    if how == "method":
        method = draw.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    content = _npz(arrays, method)
    if how == "harmed":
        content, note = harmed(draw, content)
    if how == "flags":
        made = bytearray(content)
        made[content.rindex(b"PK\x01\x02") + draw.choice([8, 10, 20, 24, 42])] ^= draw.randrange(
            1, 255
        )
        content = bytes(made)
    (place / "data.npz").write_bytes(content)
    return Case(words=_data(draw, base, "data.npz"), codes=CALIBRATED, note=f"{how} {note}")


def _png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    def chunk(word: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + word
            + content
            + struct.pack(">I", zlib.crc32(word + content))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = data or zlib.compress(bytes(min(height, 64) * (1 + 3 * min(width, 64))))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@kind
def data_pictures(draw: random.Random, place: Path, base: Base) -> Case:
    folder = place / "pictures"
    folder.mkdir()
    good = _png(20, 20)
    pictures: dict[str, Callable[[], bytes]] = {
        "harmed": lambda: harmed(draw, good)[0],
        "huge": lambda: _png(60_000, 60_000),
        "larger than numbers": lambda: _png(2**31 - 1, 2**31 - 1),
        "large": lambda: _png(12_000, 12_000, zlib.compress(bytes(12_000 * 36_001), 9)),
        "wide": lambda: _png(100_000, 1, zlib.compress(bytes(300_001))),
        "high": lambda: _png(1, 100_000, zlib.compress(bytes(400_000))),
        "no size": lambda: _png(0, 0),
        "a bomb": lambda: _png(16, 16, zlib.compress(bytes(1 << 28), 9)),
        "grey": lambda: _png(20, 20, zlib.compress(bytes(20 * 41)), 16, 0),
        "palette": lambda: _png(20, 20, zlib.compress(bytes(20 * 21)), 8, 3),
        "odd": lambda: _png(20, 20, b"", 7, 5),
        "text": lambda: b"no picture",
        "nothing": lambda: b"",
    }
    note = draw.choice(sorted(pictures))
    for i in range(3):
        (folder / f"{i}.png").write_bytes(good)
    (folder / "1.png").write_bytes(pictures[note]())
    if draw.random() < 0.25:
        note = put_special(draw, folder / "1.png", base.sentences)
    elif draw.random() < 0.2:
        (folder / "1.png").rename(folder / draw.choice(["1.jpg", "1.bmp", "1.webp", "1.PNG"]))
    words = compile_(base.eye, *calibrated("pictures"))
    if draw.random() < 0.7:
        words = ("part:data", "pictures")
    return Case(words=words, codes=CALIBRATED | {4}, note=note)


@kind
def settings_pictures(draw: random.Random, place: Path, base: Base) -> Case:
    eye = copied(base.eye, place / "eye")
    note = bend(draw, eye / draw.choice(["preprocessor_config.json", "config.json"]))
    (place / "pictures").mkdir()
    for i in range(3):
        (place / "pictures" / f"{i}.png").write_bytes(_png(20 + i, 30))
    words = compile_("eye", *calibrated("pictures"))
    return Case(words=words, codes=LOADED | {6}, note=note)


@kind
def data_idx(draw: random.Random, place: Path, base: Base) -> Case:
    images = struct.pack(">IIII", 0x803, 4, 16, 16) + bytes(4 * 256)
    labels = struct.pack(">II", 0x801, 4) + bytes(4)
    how = draw.choice(["images", "labels", "head", "gz", "bomb", "special"])
    note, end = "", ""
    if how == "images":
        images, note = harmed(draw, images)
    elif how == "labels":
        labels, note = harmed(draw, labels)
    elif how == "head":
        sizes = [draw.choice([0, 1, 4, 16, 2**16, 2**31, 2**32 - 1]) for _ in range(3)]
        images, note = struct.pack(">IIII", 0x803, *sizes) + bytes(4096), str(sizes)
    elif how in ("gz", "bomb"):
        end = ".gz"
        if how == "bomb":
            images = struct.pack(">IIII", 0x803, 2, 16_000, 16_000) + bytes(1 << 29)
        images, labels = gzip.compress(images, 9 if how == "bomb" else 1), gzip.compress(labels)
        if how == "gz":
            images, note = harmed(draw, images)
    file = place / f"t-images-idx3-ubyte{end}"
    file.write_bytes(images)
    (place / f"t-labels-idx1-ubyte{end}").write_bytes(labels)
    if how == "special":
        note = put_special(draw, place / "t-labels-idx1-ubyte", base.sentences)
    words = compile_(base.eye, *calibrated(file.name))
    if draw.random() < 0.7:
        words = ("part:data", file.name)
    return Case(words=words, codes=CALIBRATED, note=f"{how} {note}")


@kind
def data_zipped(draw: random.Random, place: Path, base: Base) -> Case:
    text = base.sentences.read_bytes()
    end = draw.choice(["txt", "csv", "tsv"])
    makes: dict[str, Callable[[], bytes]] = {
        "harmed": lambda: harmed(draw, gzip.compress(text))[0],
        "a bomb of one line": lambda: gzip.compress(bytes(1 << 31), 1),
        "a bomb of lines": lambda: gzip.compress(b"a\n" * (1 << 22), 9),
        "a bomb of blank lines": lambda: gzip.compress(b"\n" * (1 << 26), 9),
        "two": lambda: gzip.compress(text) + gzip.compress(text),
        "a tail": lambda: gzip.compress(text) + b"noise",
        "a tail of nothing": lambda: gzip.compress(text) + bytes(1 << 20),
        "not zipped": lambda: text,
        "nothing": lambda: gzip.compress(b""),
        "zipped twice": lambda: gzip.compress(gzip.compress(text)),
    }
    note = draw.choice(sorted(makes))
    (place / f"data.{end}.gz").write_bytes(makes[note]())
    return Case(words=_data(draw, base, f"data.{end}.gz"), codes=CALIBRATED, note=f"{end} {note}")


@kind
def data_place(draw: random.Random, place: Path, base: Base) -> Case:
    """A word for data that is none."""
    (place / "empty").mkdir()
    (place / "mixed").mkdir()
    for name in ("a.txt", "b.csv"):
        (place / "mixed" / name).write_bytes(b"x")
    note = put_special(
        draw, place / draw.choice(["a.txt", "a.npz", "a.csv", "a.txt.gz"]), base.sentences
    )
    name = note.split()[0]
    words = ["", ".", "empty", "mixed", "nowhere", "/dev/null", "/dev/zero", "a" * 5000, "~"]
    word = draw.choice([name] * 10 + words)
    return Case(
        words=_data(draw, base, word), codes=CALIBRATED | {3}, note=f"{word[:30]!r}, {note}"
    )


@kind
def decisions(draw: random.Random, place: Path, base: Base) -> Case:
    file = place / "decisions.json"
    shutil.copyfile(base.out / "decisions.json", file)
    how = draw.random()
    if how < 0.25:
        note = spoil(draw, file)
    elif how < 0.85:
        note = bend(draw, file)
    else:
        note = put_special(draw, file, base.sentences)
    words = (*_with_data(base, str(base.sentences)), "--decisions", "decisions.json")
    return Case(words=words, codes=frozenset({0, 2, 6, 7, 10}), note=note)


# The package


def _looks(draw: random.Random, base: Base) -> Words:
    return draw.choice(
        [("verify", "OUT"), ("verify", "OUT"), ("inspect", "OUT"), ("bench", "OUT"),
         ("report", "OUT", "-o", "-"), ("explain", "OUT"),
         ("verify", "OUT", "--model", str(base.model)), ("verify", "OUT", "--trust-code"),
         ("compile", str(base.model), "-o", "OUT", "--no-bench")]
    )  # fmt: skip


def reseal(out: Path) -> None:
    """All hashes of a package right again, as far as there are any: what a forger does."""
    from effc import package

    try:
        for name, key in ((package.VOLATILE, "unhashed"), (package.MANIFEST, "files")):
            content = json.loads((out / package.MANIFEST).read_text(encoding="utf-8"))
            names = [n for n in content[key] if n != package.VOLATILE and (out / n).is_file()]
            digests = {n: package.digest(out / n) for n in names}
            if name == package.MANIFEST:
                for engine in content["engines"]:
                    engine["sha256"] = digests.get(engine["path"], engine["sha256"])
                content["files"] = {**content["files"], **digests}
            else:
                content = {"schema": package.SCHEMA, "files": digests}
            (out / name).write_text(package.sealed(content), encoding="utf-8")
    except Exception:  # a manifest that is bent too far has no hashes to set right
        return


@kind
def package_bytes(draw: random.Random, place: Path, base: Base) -> Case:
    """Any file, hashes as they were."""
    out = copied(base.out, place / "OUT")
    file = draw.choice(sorted(p for p in out.rglob("*") if p.is_file()))
    before = file.read_bytes()
    note = spoil(draw, file)
    codes = CHECKED if file.read_bytes() != before else frozenset({0})
    return Case(words=("verify", "OUT"), codes=codes, note=note)


@kind
def manifest_forged(draw: random.Random, place: Path, base: Base) -> Case:
    out = copied(base.out, place / "OUT")
    note = bend(draw, out / "manifest.json")
    reseal(out)
    return Case(words=_looks(draw, base), codes=frozenset({0, 2, 4, 8, 10, 12}), note=note)


@kind
def package_forged(draw: random.Random, place: Path, base: Base) -> Case:
    out = copied(base.out, place / "OUT")
    names = ["decisions.json", "origins.json", "volatile.json", "local.json", "config.json"]
    name = draw.choice([*names, "tokenizer.json", "report.json"])
    note = bend(draw, out / name) if draw.random() < 0.8 else spoil(draw, out / name)
    if name != "volatile.json":
        reseal(out)
    return Case(words=_looks(draw, base), codes=frozenset({0, 2, 4, 10, 12}), note=note)


@kind
def engine_forged(draw: random.Random, place: Path, base: Base) -> Case:
    """Any bytes in the engine, hashes right: the parser sees them."""
    out = copied(base.out, place / "OUT")
    note = spoil(draw, out / "model.onnx")
    reseal(out)
    words = draw.choice([("verify", "OUT"), ("inspect", "OUT")])
    if draw.random() < 0.4:
        words = ("verify", "OUT", "--model", str(base.model))
    return Case(words=words, codes=frozenset({0, 8, 10, 12}), note=note)


@kind
def engine_outside(draw: random.Random, place: Path, base: Base) -> Case:
    import onnx

    out = copied(base.out, place / "OUT")
    (place / "secret").write_bytes(bytes(1 << 16))
    model = onnx.load(out / "model.onnx")
    tensor = draw.choice([t for t in model.graph.initializer if t.raw_data])
    location = draw.choice(
        ["../secret", str(place / "secret"), "C:\\secret", "\\\\host\\x", "a/../../secret", "link", "hard",
         "pipe", "", "unlisted", "model.onnx", "manifest.json", "README.md", "a\0b", "x" * 300, "é"]
    )  # fmt: skip
    if location == "link":
        (out / "link").symlink_to("../secret")
    elif location == "hard":
        os.link(place / "secret", out / "hard")
    elif location == "pipe":
        os.mkfifo(out / "pipe")
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    keys = {"location": location, "offset": "0", "length": str(size)}
    if draw.random() < 0.4:
        keys[draw.choice(["offset", "length", "basepath", "checksum"])] = draw.choice(
            ["-1", str(2**63), "1e9", "x", "", "999999999"]
        )
    for key, value in keys.items():
        tensor.external_data.add(key=key, value=value)
    (out / "model.onnx").write_bytes(model.SerializeToString())
    if draw.random() < 0.5 and location in ("hard", "link", "pipe"):
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        manifest["files"][location] = "0" * 64
        (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    reseal(out)
    words = draw.choice([("verify", "OUT"), ("bench", "OUT", "--model", str(base.model))])
    codes = CHECKED if location not in ("README.md", "model.onnx") else frozenset({0, 8, 10, 12})
    return Case(words=words, codes=codes, note=f"{keys}")


@kind
def package_special(draw: random.Random, place: Path, base: Base) -> Case:
    out = copied(base.out, place / "OUT")
    secret = place / "secret"
    secret.write_text("{}", encoding="utf-8")
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*"))
    names += ["extra", "a\nb", "deep", "\udcff", "many"]
    name = draw.choice(names)
    note = repr(name)
    if name == "deep":
        os.makedirs(out / "/".join("d" * 400))
        (out / "/".join("d" * 400) / "f").touch()
    elif name == "many":
        (out / "many").mkdir()
        for i in range(3000):
            (out / "many" / str(i)).touch()
    else:
        note = put_special(draw, out / name, secret)
    codes = frozenset({0, 2, 4, 10, 12})
    return Case(words=_looks(draw, base), codes=codes, note=note)


@kind
def against(draw: random.Random, place: Path, base: Base) -> Case:
    shutil.copyfile(base.out / "model.onnx", place / "other.onnx")
    how = draw.random()
    note = (
        spoil(draw, place / "other.onnx")
        if how < 0.8
        else put_special(draw, place / "other.onnx", base.sentences)
    )
    words = ("bench", str(base.out), "--model", str(base.model), "--against", "other.onnx")
    words += ("--shapes", "1x4", "--budget", "0.1")
    return Case(words=words, codes=frozenset({0, 2, 8, 10, 12}), note=note)


# The command line

OUTS = ["", "/", "/dev/null", ".", "a" * 5000, "\udcff/x", "..", "x\ny"]
METRICS = ["", ":", "sts", "sts:", "a:b:c", "x.py:f:y"]
BUDGETS = ["0.1", "nan", "inf", "-1", "x"]
NUMBERS = ["0", "-1", "1", "99999999999999999999", "1e9", "nan", "inf", "", "x", "1.5", "²", "0x10"]


@kind
def arguments(draw: random.Random, place: Path, base: Base) -> Case:
    number = draw.choice(NUMBERS)
    sets = [
        "passes.0.bits",
        "calib.samples",
        "calib.batch",
        "bench",
        "a.b.c",
        "passes.99",
        "targets",
    ]
    sets += ["source.transformers", "calib", "passes", ".", "", "effc", "plugins", "metric"]
    values = [
        *NUMBERS,
        "[",
        "{a: b}",
        "!!python/name:os.system",
        "&a [*a]",
        "null",
        "\udcff",
        "a" * 9000,
    ]
    choices: list[Words] = [
        (*_with_data(base, str(base.sentences)), "--samples", number),
        (*_with_data(base, str(base.sentences)), "--threads", number),
        (*_with_data(base, str(base.sentences)), "--set", f"{draw.choice(sets)}={draw.choice(values)}"),
        (*_with_data(base, str(base.sentences)), "--set", f"{draw.choice(sets)}={draw.choice(values)}"),
        ("bench", str(base.out), "--model", str(base.model), "--budget", draw.choice(BUDGETS),
         "--shapes", "1x4"),
        ("bench", str(base.out), "--model", str(base.model), "--budget", "0.1", "--shapes",
         draw.choice([f"{number}x4", f"1x{number}", "1000000000x128", "x", "1x", ",", "1x4,", "1X4"])),
        ("bench", str(base.out), "--model", str(base.model), "--budget", "0.1", "--shapes", "1x4",
         "--streams", draw.choice(["0", "100000", number])),
        ("verify", draw.choice(["", "/", "/dev/null", "nowhere", "a" * 5000, ".", "\udcff"])),
        ("inspect", draw.choice(["", "/", "/dev/null", "nowhere", "a" * 5000, ".", str(base.sentences)])),
        ("compile", str(base.model), "-o", draw.choice(OUTS),
         "--no-bench"),
        ("compile", str(base.model), "-o", "OUT", "--target", draw.choice(["", "x", "eager", "ORT", "\udcff"])),
        ("compile", str(base.model), "-o", "OUT", "--metric", draw.choice(METRICS)),
        (draw.choice(["", "x", "compile", "--json", "passes"]), "--json", draw.choice(["/", "", "a/b/c", "/dev/full"])),
    ]  # fmt: skip
    words = draw.choice(choices)
    codes = frozenset({0, 2, 3, 4, 6, 7, 8, 10, 12})
    return Case(words=words, codes=codes, note=" ".join(words[-2:])[:60])
