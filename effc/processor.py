"""From text and pictures to a model's inputs, and from token vectors to sentence vectors, by the files in a directory.

The same files travel with the engine, so a package is measured exactly as the model was.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effc.calib.data import Batch, Record
from effc.errors import CalibrationError, SourceError

log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

LONGEST = 512
"""Calibration texts are cut here even where the model takes more."""


def kind_of(config: Mapping[str, Any]) -> str:
    """encoder, classifier or causal-lm, from the class that config.json names."""
    name = (config.get("architectures") or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    return "classifier" if name.endswith("Classification") else "encoder"


def pools(directory: Path) -> bool:
    """Whether a directory says how token vectors become a sentence vector."""
    return (directory / "modules.json").exists()


@dataclass(frozen=True)
class Pooling:
    """How a sentence encoder turns token vectors into one: as its own `1_Pooling/config.json` says."""

    mode: str = "mean"
    normalize: bool = False

    def __call__(self, hidden: Array, mask: Array) -> Array:
        """hidden [batch, length, size], mask [batch, length] → [batch, size]"""
        if self.mode == "cls":
            pooled = hidden[:, 0]
        elif self.mode == "max":
            pooled = np.where(mask[..., None] > 0, hidden, -np.inf).max(axis=1)
        else:
            weights = mask[..., None].astype(hidden.dtype)
            pooled = (hidden * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
        if self.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
        return np.asarray(pooled)


class Processor:
    """A model directory's tokenizer, picture settings and pooling, loaded when first needed."""

    def __init__(
        self, directory: Path, config: Mapping[str, Any], inputs: Sequence[str] = ()
    ) -> None:
        self.directory, self.config = directory, config
        self.input_names = tuple(inputs)
        self.kind = kind_of(config)
        self.pooling = _pooling(directory)
        self._tokenizer: Any = None
        self._why_not: str | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises SourceError where the directory has none that loads."""
        if self._tokenizer is None and self._why_not is None:
            try:
                from transformers import AutoTokenizer

                self._tokenizer = AutoTokenizer.from_pretrained(
                    str(self.directory), local_files_only=True, trust_remote_code=False
                )
            except Exception as error:
                self._why_not = (str(error).strip() or type(error).__name__).splitlines()[0]
        if self._tokenizer is None:
            raise SourceError(
                f"the tokenizer in {self.directory} does not load: {self._why_not}",
                hint="calibrate with an .npz of ready inputs, or repair the tokenizer files",
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer that loads. One that does not is only a warning: it may not be needed."""
        if not any(self.directory.glob("tokenizer*")) and not any(self.directory.glob("vocab*")):
            return False
        try:
            return self.tokenizer is not None
        except SourceError as error:
            log.warning("%s", error.what)
            return False

    @property
    def bos_id(self) -> int | None:
        value = getattr(self.tokenizer, "bos_token_id", None)
        return int(value) if value is not None else None

    @property
    def max_length(self) -> int | None:
        """The longest input that the model takes, in tokens."""
        limits = [self.config.get("max_position_embeddings")]
        if self.config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
            limits = [n - 2 for n in limits if n]
        settings = self.directory / "sentence_bert_config.json"
        if settings.exists():
            limits.append(json.loads(settings.read_text(encoding="utf-8")).get("max_seq_length"))
        if self._tokenizer is not None:
            limits.append(self._tokenizer.model_max_length)
        found = [int(n) for n in limits if n and 0 < n < 10**9]
        return min(found) if found else None

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> dict[str, Array]:
        """Token ids [batch, length] and their mask, padded at the right to the longest text."""
        begin = self.bos_id if self.kind == "causal-lm" else None
        limit = min(n for n in (max_length, self.max_length, LONGEST) if n)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=limit)
        rows = [list(ids) for ids in encoded["input_ids"]]
        if begin is not None:
            rows = [ids if ids[:1] == [begin] else [begin, *ids][:limit] for ids in rows]
        rows = [ids or [begin or 0] for ids in rows]
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = np.full((len(rows), max(map(len, rows))), pad, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        wanted = self.input_names or ("input_ids", "attention_mask")
        return {name: known[name] for name in wanted if name in known}

    def pool(self, hidden: Array, mask: Array) -> Array:
        return self.pooling(hidden, mask)

    def images(self, pixels: Array) -> dict[str, Array]:
        """uint8 [n, height, width] or [n, height, width, channels] → float32 `pixel_values`."""
        import torch

        settings = self._image_settings()
        array = np.asarray(pixels)
        if array.ndim == 3:
            array = array[..., None]
        channels = int(self.config.get("num_channels", 3))
        if array.shape[-1] == 1 and channels > 1:
            array = np.repeat(array, channels, axis=-1)
        if array.shape[-1] != channels:
            raise CalibrationError(
                f"pictures have {array.shape[-1]} channels, the model takes {channels}"
            )
        values = torch.from_numpy(array.astype(np.float32)).permute(0, 3, 1, 2)
        size = self.image_size()
        if tuple(values.shape[2:]) != size:
            values = torch.nn.functional.interpolate(
                values, size=size, mode="bilinear", antialias=True, align_corners=False
            )
        if settings.get("do_rescale", True):
            values = values * float(settings.get("rescale_factor", 1 / 255))
        if settings.get("do_normalize", True):
            mean = torch.tensor(settings.get("image_mean", [0.5])).view(1, -1, 1, 1)
            std = torch.tensor(settings.get("image_std", [0.5])).view(1, -1, 1, 1)
            values = (values - mean) / std
        return {"pixel_values": values.contiguous().numpy()}

    def _image_settings(self) -> dict[str, Any]:
        path = self.directory / "preprocessor_config.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def image_size(self) -> tuple[int, int]:
        """Height and width that the model takes."""
        size: Any = self.config.get("image_size")
        if size is None:
            settings = self._image_settings()
            size = settings.get("crop_size") or settings.get("size") or 224
        if isinstance(size, Mapping):
            edge: Any = size.get("shortest_edge")
            return int(size.get("height") or edge), int(size.get("width") or edge)
        return (
            (int(size[0]), int(size[1])) if isinstance(size, Sequence) else (int(size), int(size))
        )

    def batches(
        self, records: Iterable[Record], *, size: int = 16, max_length: int | None = None
    ) -> Iterator[Batch]:
        """Records as batches of at most `size`. Raises CalibrationError where a record is of the wrong sort."""
        chunk: list[Record] = []
        for record in records:
            chunk.append(record)
            if len(chunk) == size:
                yield self._batch(chunk, max_length)
                chunk = []
        if chunk:
            yield self._batch(chunk, max_length)

    def _batch(self, records: Sequence[Record], max_length: int | None) -> Batch:
        first = records[0]
        if first.arrays is not None:
            return stack(records)
        if first.pixels is not None:
            return Batch(
                inputs=self.images(np.stack([r.pixels for r in records if r.pixels is not None]))
            )
        if "input_ids" not in self.input_names:
            raise CalibrationError(
                "the samples are text but the model takes " + ", ".join(self.input_names),
                hint="give a folder of pictures or an .npz of ready inputs",
            )
        return Batch(inputs=self.encode([r.text or "" for r in records], max_length=max_length))


def stack(records: Sequence[Record]) -> Batch:
    """Records of ready arrays as one batch, dtypes kept."""
    names = sorted(records[0].arrays or {})
    return Batch(inputs={n: np.stack([(r.arrays or {})[n] for r in records]) for n in names})


def _pooling(path: Path) -> Pooling:
    modules = path / "modules.json"
    listed = json.loads(modules.read_text(encoding="utf-8")) if modules.exists() else []
    normalize = any(str(m.get("type", "")).endswith("Normalize") for m in listed)
    files = sorted(path.glob("*_Pooling/config.json"))
    settings = json.loads(files[0].read_text(encoding="utf-8")) if files else {}
    mode = "mean"
    if settings.get("pooling_mode_cls_token"):
        mode = "cls"
    elif settings.get("pooling_mode_max_tokens"):
        mode = "max"
    return Pooling(mode, normalize)
