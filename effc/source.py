"""Where a model comes from: modules with example inputs, free dimensions, and what turns raw samples into batches.

A local transformers directory is read with its own head (the class that config.json's `architectures` names), from
safetensors only, and without a network. Anything else comes through a factory, `module:function` or
`file.py:function`, that returns a `Source` or just `(module, inputs)`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effc.calib.data import Batch
from effc.errors import SourceError
from effc.processor import Processor, kind_of, pools
from effc.table import unknown

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece*",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
    "*_Normalize/config.json",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
"""Files of a model directory that travel with the engine."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 16


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to compile, by role; a plain model has the one role `main`.

    `outputs` names the outputs to keep, all where empty. `batches` gives calibration data where the source has its
    own.
    """

    modules: Mapping[str, nn.Module]
    inputs: Mapping[str, Mapping[str, Tensor]]
    dims: Mapping[str, Mapping[str, Mapping[int, str]]] = field(default_factory=dict)
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kind: str = "module"
    name: str = "model"
    digest: str = ""
    batches: Callable[[], Iterable[Batch]] | None = None
    metric: Any = None
    processor: Processor | None = None
    directory: Path | None = None
    files: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        (module,) = self.modules.values()
        return module


def guess(model: str) -> dict[str, str]:
    """A source from one word of the command line: a directory, a factory, or a hub id."""
    if os.path.isdir(model):
        return {"transformers": model}
    if re.fullmatch(r"[\w./-]+:[A-Za-z_]\w*", model) and not os.path.exists(model):
        return {"python": model}
    if os.path.isfile(model):
        raise SourceError(
            f"{model} is a file, not a model directory",
            hint="give the directory that holds config.json and model.safetensors",
        )
    return {"transformers": model}


def load(spec: Mapping[str, Any]) -> Source:
    """The source that `{transformers: DIR}` or `{python: module:factory, …options}` stands for."""
    if "transformers" in spec:
        return from_directory(Path(spec["transformers"]))
    options = {k: v for k, v in spec.items() if k != "python"}
    return from_factory(spec["python"], options)


def from_directory(path: Path) -> Source:
    """A local transformers directory. Raises SourceError, saying what is missing or wrong."""
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        path = _download(str(path))
    config = read_config(path)
    model, incomplete = _load_model(path, config)
    processor = Processor(path, config)
    inputs, dims = _example(config, model, processor)
    processor.input_names = tuple(inputs)
    keep = _outputs(path, config, incomplete)
    return Source(
        modules={"main": model},
        inputs={"main": inputs},
        dims={"main": dims},
        outputs={"main": keep} if keep else {},
        kind=kind_of(config),
        name=path.resolve().name,
        digest=directory_digest(path),
        processor=processor,
        directory=path,
        files=tuple(copied_files(path)),
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, checked for what effc needs and refuses."""
    if not path.is_dir():
        raise SourceError(
            f"there is no directory {path}",
            hint="give a transformers directory, or module:factory for a model of your own",
        )
    file = path / "config.json"
    if not file.exists():
        raise SourceError(f"{path} has no config.json", hint="give a transformers model directory")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SourceError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise SourceError(f"{file} holds no settings")
    if "auto_map" in config:
        raise SourceError(
            f"{path} wants to run code of its own (auto_map)",
            hint="effc runs no code from a model directory; use module:factory with code that you trust",
        )
    return config


def _download(name: str) -> Path:
    """A hub id as a local directory: safetensors and settings only. The one place that uses the network."""
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md", "LICENSE*"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise SourceError(
            f"there is no directory {name}, and the hub cannot be reached for it: {_first_line(error)}",
            hint="give a local directory",
        ) from error


def _load_model(path: Path, config: Mapping[str, Any]) -> tuple[nn.Module, bool]:
    """The model in evaluation mode, and whether its pooler came without weights."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise SourceError(
            f"{path}/config.json names no architectures", hint="add the class to load"
        )
    if not any(path.glob("*.safetensors")):
        pickles = [p.name for pattern in _PICKLES for p in sorted(path.glob(pattern))]
        if pickles:
            raise SourceError(
                f"{path} has its weights only as pickle ({pickles[0]}), which can run code when read",
                hint="convert it where you trust it: model.save_pretrained(DIR, safe_serialization=True)",
            )
        raise SourceError(
            f"{path} has no weights (*.safetensors)", hint="put model.safetensors there"
        )
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, names[0], None)
    if kind is None:
        known = [n for n in dir(transformers) if "For" in n or n.endswith("Model")]
        raise SourceError(unknown("architecture", names[0], known))
    if config.get("is_encoder_decoder"):
        raise SourceError(
            f"{names[0]} is an encoder with a decoder, which has no single graph",
            hint="compile its parts by module:factory",
        )
    try:
        model, info = kind.from_pretrained(
            str(path),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:
        raise SourceError(f"{names[0]} does not load from {path}: {_first_line(error)}") from error
    _check_weights(path, model, info)
    for name in ("use_cache", "output_attentions", "output_hidden_states"):
        if getattr(model.config, name, None):
            setattr(model.config, name, False)
    return model.eval(), bool(info["missing_keys"])


def _check_weights(path: Path, model: nn.Module, info: Mapping[str, Any]) -> None:
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing:
        raise SourceError(
            f"{path} lacks weights that {type(model).__name__} needs: {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            hint="config.json's `architectures` must name the class that was trained",
        )
    if info["mismatched_keys"]:
        key = str(sorted(map(str, info["mismatched_keys"]))[0])
        raise SourceError(f"{path}: the shape of {key} differs from config.json")
    check_finite(model)


def check_finite(model: nn.Module) -> None:
    """Raises SourceError naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SourceError(f"weights hold values that are not numbers: {name}")


def _example(
    config: Mapping[str, Any], model: nn.Module, processor: Processor
) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Example inputs under the names that the outside world uses, and their free dimensions."""
    accepted = set(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    draw = torch.Generator().manual_seed(0)
    if main == "pixel_values":
        shape = (EXAMPLE_BATCH, int(config.get("num_channels", 3)), *processor.image_size())
        pixels = torch.rand(shape, generator=draw) * 2 - 1
        return {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}
    if main != "input_ids":
        raise SourceError(
            f"{type(model).__name__} takes {main}, which effc has no reader for",
            hint="use module:factory, which gives its own example inputs",
        )
    names = ["input_ids", "attention_mask"]
    types = int(config.get("type_vocab_size") or 0)
    if types > 0:
        asked = processor.tokenizer.model_input_names if processor.has_tokenizer else []
        if "token_type_ids" in asked or (not asked and types > 1):
            names.append("token_type_ids")
    names = [name for name in names if name in accepted]
    text = (EXAMPLE_BATCH, EXAMPLE_LENGTH)
    values = {
        "input_ids": torch.randint(3, int(config.get("vocab_size", 1000)), text, generator=draw),
        "attention_mask": torch.ones(text, dtype=torch.int64),
        "token_type_ids": torch.zeros(text, dtype=torch.int64),
    }
    return {n: values[n] for n in names}, {n: {0: "batch", 1: "sequence"} for n in names}


def _outputs(path: Path, config: Mapping[str, Any], incomplete: bool) -> tuple[str, ...]:
    """Outputs to keep; all where empty. A pooler that nobody trained or reads is dropped."""
    if pools(path) or incomplete:
        return ("last_hidden_state",)
    return ("logits",) if kind_of(config) in ("classifier", "causal-lm") else ()


def copied_files(path: Path) -> list[str]:
    """Relative names of the files that travel with the engine."""
    found: set[str] = set()
    for pattern in COPIED:
        for file in path.glob(pattern):
            if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt"):
                found.add(file.relative_to(path).as_posix())
    return sorted(found)


def directory_digest(path: Path) -> str:
    """sha256 over the weights and config.json, by name."""
    total = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), path / "config.json"]):
        total.update(file.name.encode())
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def from_factory(word: str, options: Mapping[str, Any] | None = None) -> Source:
    """`module:function` or `file.py:function`, called with `options`; gives a Source or `(module, inputs)`."""
    place, _, attribute = word.rpartition(":")
    module = import_code(place)
    factory = getattr(module, attribute, None)
    if factory is None:
        known = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise SourceError(unknown(f"function in {place}", attribute, known))
    try:
        made = factory(**(options or {}))
    except Exception as error:
        raise SourceError(f"{word} failed: {type(error).__name__}: {_first_line(error)}") from error
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        made = _plain_source(*made)
    if not isinstance(made, Source):
        raise SourceError(
            f"{word} returned {type(made).__name__}",
            hint="return effc.Source(...) or (module, inputs)",
        )
    for model in made.modules.values():
        check_finite(model)
    name = made.name if made.name != "model" else attribute
    return dataclasses.replace(made, name=name, digest=made.digest or _module_digest(made.modules))


def _plain_source(module: nn.Module, inputs: Any) -> Source:
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, Mapping):
        inputs = dict(zip(inspect.signature(module.forward).parameters, inputs, strict=False))
    return Source(modules={"main": module}, inputs={"main": dict(inputs)})


def import_code(place: str) -> Any:
    """A module by dotted name or by path to a .py file. Only ever called with what the user typed."""
    try:
        if not place.endswith(".py"):
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.exists():
            raise SourceError(f"there is no file {place}")
        name = f"effc_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error


def _module_digest(modules: Mapping[str, nn.Module]) -> str:
    total = hashlib.sha256()
    for role, module in sorted(modules.items()):
        total.update(role.encode())
        for name, tensor in sorted(module.state_dict().items()):
            total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            total.update(flat.numpy().tobytes())
    return total.hexdigest()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
