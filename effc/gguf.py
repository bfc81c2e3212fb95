"""A causal language model out of a GGUF file, as a transformers directory: float32, its tokenizer beside it.

transformers reads the file and undoes its quantisation. The directory lies in the cache under the file's sha256.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from effc import cache, paths, scratch
from effc.errors import SourceError, first_line
from effc.machine import installed

MAGIC = b"GGUF"


def directory(file: Path) -> tuple[Path, str]:
    """A directory with the model of a file, and the file's sha256. Raises SourceError."""
    with paths.plain(file, SourceError) as stream:
        if stream.read(4) != MAGIC:
            raise SourceError(
                f"{file} is no GGUF file", hint="give one, or a transformers directory"
            )
    if installed("gguf") is None:
        raise SourceError(
            f"{file} needs the package gguf to be read", hint="pip install 'effc[gguf]'"
        )
    digest = cache.sha256(file)
    key = cache.key_of("gguf", sha256=digest, transformers=installed("transformers"))
    kept = cache.default()
    if (entry := kept.get(key)) is not None:
        return entry.directory, digest
    with scratch.held() as stage:
        place = stage / "model"
        place.mkdir()
        _convert(file, place)
        kept.put(key, None, {name: place / name for name in paths.below(place)})
        if (entry := kept.get(key)) is not None:
            return entry.directory, digest
        held = Path(tempfile.mkdtemp(prefix="effc-gguf-"))
        atexit.register(shutil.rmtree, held, ignore_errors=True)
        shutil.copytree(place, held, dirs_exist_ok=True)
    return held, digest


def _convert(file: Path, place: Path) -> None:
    import transformers
    from safetensors.torch import save_file

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # which draws bars of its own
            model, tokenizer = _read(file)
    except Exception as error:
        raise SourceError(
            f"transformers does not read {file}: {first_line(error)}",
            hint="it may be damaged, or of an architecture that transformers does not know in this form",
        ) from error
    tokenizer.save_pretrained(place)
    settings = {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    settings.pop("quantization_config", None)
    (place / "config.json").write_text(
        json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8"
    )
    kept, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if (where := tensor.data_ptr()) not in seen:  # a tied table once
            kept[name] = tensor.contiguous()
        seen.add(where)
    save_file(kept, place / "model.safetensors", metadata={"format": "pt"})


def _read(file: Path) -> tuple[Any, Any]:
    import torch
    import transformers

    options: dict[str, Any] = {
        "gguf_file": file.name, "local_files_only": True, "trust_remote_code": False,
    }  # fmt: skip
    place = str(file.parent)
    kind, words = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    return (
        kind.from_pretrained(place, dtype=torch.float32, **options),
        words.from_pretrained(place, **options),
    )
