"""Models that fit in a kilobyte, and the command line in this process or in one of its own."""

import atexit
import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

_TEXT = """
    the a cat dog bird sat ran slept sang on under near mat tree house river and then it was
    warm cold quiet loud old young small big when rain fell sun rose we saw them go home
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


def save_encoder(place: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A transformers directory of a random two-layer BERT with a tokenizer that knows `WORDS`."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(WORDS) + 5,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 160,
    }
    BertModel(BertConfig(**{**sizes, **changes}), add_pooling_layer=False).save_pretrained(place)
    save_tokenizer(place)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Pooling"}]
    (place / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (place / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (place / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    (place / "README.md").write_text("A model of random numbers.\n", encoding="utf-8")
    (place / "LICENSE").write_text("Do with it what you like.\n", encoding="utf-8")
    return place


def embeddings(source: Any, texts: Any) -> Any:
    """Embeddings by hand [texts, size]: every text alone, the mean of its vectors."""
    rows = []
    for text in texts:
        feeds = {n: torch.from_numpy(a) for n, a in source.processor.encode([text]).items()}
        with torch.no_grad():
            rows.append(source.module(**feeds)["last_hidden_state"][0].mean(0).numpy())
    return np.stack(rows)


def save_tokenizer(place: Path) -> None:
    """A word-level tokenizer.json with BERT's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(place / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 160,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    }
    (place / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_sentences(file: Path, count: int = 24) -> Path:
    """Sentences of 3 to 11 words, the same every time."""
    lines = [
        " ".join(WORDS[(7 * i + 3 * j) % len(WORDS)] for j in range(3 + i % 9))
        for i in range(count)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


FACTORIES = '''
import torch
from torch import nn


class Perceptron(nn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.up, self.down = nn.Linear(size, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Spectrum(nn.Module):
    """Eigenvalues have no ONNX operator."""

    def forward(self, x):
        return torch.linalg.eigh(x @ x.transpose(-1, -2)).eigenvalues


class Moody(nn.Module):
    """Which way it goes depends on the data, which no graph can say."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x - 1


def perceptron(size=8):
    torch.manual_seed(0)
    return Perceptron(size), {"x": torch.randn(2, size)}


def positional():
    torch.manual_seed(0)
    return Perceptron(), (torch.randn(2, 8),)


def spectrum():
    return Spectrum(), {"x": torch.randn(2, 4, 4)}


if not hasattr(torch.ops.kit, "odd"):  # this file is also read as a file of factories, and torch's table is one

    @torch.library.custom_op("kit::odd", mutates_args=())
    def _odd(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @_odd.register_fake
    def _(x):
        return torch.empty_like(x)


odd = torch.ops.kit.odd


class Odd(nn.Module):
    """An operator that nobody but this file knows."""

    def forward(self, x):
        return odd(x)


def unknown():
    return Odd(), {"x": torch.randn(2, 4)}


def moody():
    return Moody(), {"x": torch.randn(2, 4)}


def broken():
    raise RuntimeError("no weights today")


def nonsense():
    return 42


def infinite():
    made = Perceptron()
    made.up.weight.data[0, 0] = float("inf")
    return made, {"x": torch.randn(2, 8)}
'''


def write_factories(file: Path) -> Path:
    """A user's own file: `perceptron` is a good factory, the others fail each in their way."""
    file.write_text(FACTORIES.lstrip(), encoding="utf-8")
    return file


class Perceptron(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tiny encoder with its sentences, its int8 package, and a file of factories. To be read, not changed."""

    model: Path
    sentences: Path
    factories: Path
    out: Path


@cache
def made() -> Made:
    """The same for every test of a run."""
    place = Path(tempfile.mkdtemp(prefix="effc-tests-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    found = Made(
        model=save_encoder(place / "tiny"),
        sentences=write_sentences(place / "sentences.txt"),
        factories=write_factories(place / "factories.py"),
        out=place / "out",
    )
    ran = cli("compile", found.model, "-o", found.out, *int8(found))
    assert ran.code == 0, ran.err
    return found


def int8(found: Made) -> tuple[object, ...]:
    """The flags of a quick int8 compile."""
    return ("--quantize", "int8", "--calib", found.sentences, "--samples", 16, "--no-bench")


def solved(out: Path, task: str, file: Path, place: Path) -> Ran:
    """`effc run --task` in a process that may load no torch; writes page.html and found.json into a folder."""
    words = ["effc", "run", out, "--task", task, "--file", file, "--html", place / "page.html"]
    words += ["--json", place / "found.json"]
    code = (
        f"import sys\nfrom effc import cli\nsys.argv = {list(map(str, words))!r}\n"
        "code = cli._run()\nassert 'torch' not in sys.modules, 'torch was loaded'\nsys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return Ran(code=ran.returncode, out=ran.stdout, err=ran.stderr)


class TableEncoder(nn.Module):
    """An encoder of one table of 20 pieces."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(20, hidden)
        self.config = type("Config", (), {"hidden_size": hidden})()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return type("Read", (), {"last_hidden_state": self.table(input_ids)})()


def cli(*words: object) -> Ran:
    """The command line in this process: quick, since torch is loaded already."""
    from effc import cli as commands

    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["effc", *map(str, words)]
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            commands.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ran(code=code, out=out.getvalue(), err=err.getvalue())


def process(
    *words: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    prefix: Sequence[str] = (),
    before: Callable[[], None] | None = None,
    timeout: float = 120,
) -> Ran:
    """The command line in a process of its own; `before` runs in it first, `prefix` starts it."""
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "effc", *map(str, words)],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        preexec_fn=before,
        stdin=subprocess.DEVNULL,
    )
    return Ran(code=done.returncode, out=done.stdout, err=done.stderr)


def example_modules(monkeypatch: Any, place: Path) -> Iterator[Callable[[str], Any]]:
    """Gives modules of an example by name, for a fixture; other examples have some of the same names."""
    names = [file.stem for file in place.glob("*.py")]
    monkeypatch.syspath_prepend(str(place))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def content(place: Path) -> dict[str, str]:
    """sha256 of every file under `place` by name; a missing place has none."""
    return {
        file.relative_to(place).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(place.rglob("*"))
        if file.is_file()
    }


def forge(out: Path, name: str, change: Callable[[Any], object]) -> None:
    """A manifest, or volatile.json, that somebody changed and gave the right digest again, as a forger would."""
    from effc import package

    found = json.loads((out / name).read_text(encoding="utf-8"))
    change(found)
    (out / name).write_text(package.sealed(found), encoding="utf-8")


def plant(out: Path, name: str, text: str | bytes) -> None:
    """Another content in a file of a package, with all hashes right again."""
    from effc import package

    (out / name).write_bytes(text.encode() if isinstance(text, str) else text)
    digest = package.digest(out / name)

    def change(found: Any) -> None:
        found["files"][name] = digest
        for engine in found.get("engines", ()):
            if engine["path"] == name:
                engine["sha256"] = digest

    forge(out, package.VOLATILE if name in package.UNHASHED else package.MANIFEST, change)


def leftovers(place: Path) -> list[str]:
    """Staging directories that a run left beside its output."""
    return sorted(file.name for file in place.glob(".effc-*"))


def assert_letter(ran: Ran, name: str, code: int, *parts: str) -> None:
    """The run ended with one error of family `name`: its exit code, its message, no traceback."""
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert len([n for n in ran.err.splitlines() if n.startswith(f"{name}: ")]) == 1, ran.err
    for part in parts:
        assert part in ran.err, ran.err
