"""From text and pictures to a model's inputs, and from token vectors to sentence vectors, by the files in a directory.

The same files travel with the engine, so a package is measured exactly as the model was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from effc import bounded, causal, intuition
from effc.calib.data import Batch, Record
from effc.errors import CalibrationError, SourceError, first_line, is_failure

log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

LONGEST = 512
"""Calibration texts are cut here even where the model takes more."""


TOGETHER = 1 << 22
"""Values in pictures of one size that are brought to the model's size together; larger ones are so one by one."""


def whole(settings: Mapping[str, Any], key: str, absent: int) -> int:
    """A whole number of a model's settings, `absent` where it is not there. Raises SourceError for anything else."""
    value = settings.get(key)
    if value is None:
        return absent
    is_whole = (
        isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    )
    if not is_whole or not 0 <= value < 2**31:
        raise SourceError(
            f"the model's settings say {key}: {str(value)[:40]}, which is no number of anything",
            hint="repair config.json and its like in the model directory",
        )
    return int(value)


def kind_of(config: Mapping[str, Any]) -> str:
    """encoder, classifier or causal-lm, from the class that config.json names."""
    name = (config.get("architectures") or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    return "classifier" if name.endswith("Classification") else "encoder"


def pools(directory: Path) -> bool:
    """Whether a directory says how token vectors become a sentence vector."""
    return (directory / "modules.json").exists()


POOLING = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}
"""Ways of pooling by the flag `pooling_mode_…` of `1_Pooling/config.json`, in the order in which they are joined."""
DONE = ("Transformer", "Pooling", "Normalize", "Dropout")
"""Modules of `modules.json` that the engine and `Pooling` do between them; others follow the engine or precede it."""


@dataclass(frozen=True)
class Pooling:
    """How a sentence encoder turns token vectors into one: as its own `1_Pooling/config.json` says.

    Several modes are joined at their ends.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False

    def __call__(self, hidden: Array, mask: Array) -> Array:
        """hidden [batch, length, size], mask [batch, length] → [batch, size times modes]"""
        pooled = np.concatenate([_pooled(mode, hidden, mask) for mode in self.modes], axis=-1)
        if self.normalize:
            pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
        return np.asarray(pooled)


def _pooled(mode: str, hidden: Array, mask: Array) -> Array:
    if mode == "cls":
        return hidden[:, 0]
    if mode == "max":
        return np.asarray(np.where(mask[..., None] > 0, hidden, -np.inf).max(axis=1))
    if mode == "lasttoken":
        last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1] > 0, axis=1)
        return np.asarray(hidden[np.arange(len(hidden)), last])
    weights = mask[..., None].astype(hidden.dtype)
    if mode == "weightedmean":
        weights = weights * np.arange(1, 1 + hidden.shape[1], dtype=hidden.dtype)[:, None]
    total = np.maximum(weights.sum(axis=1), 1e-9)
    if mode == "mean_sqrt_len_tokens":
        total = np.sqrt(total)
    return np.asarray((hidden * weights).sum(axis=1) / total)


class Teller(Protocol):
    """What says of texts what they are about: scores [texts, clusters]."""

    @property
    def digest(self) -> str: ...

    def by(self, run: Callable[[Mapping[str, Any]], Mapping[str, Array]]) -> Teller: ...

    def __call__(self, texts: Sequence[str]) -> Array: ...


class Processor:
    """A model directory's tokenizer, picture settings and pooling, loaded when first needed."""

    def __init__(
        self, directory: Path, config: Mapping[str, Any], inputs: Sequence[str] = ()
    ) -> None:
        self.directory, self.config = directory, config
        self.input_names = tuple(inputs)
        self.kind = kind_of(config)
        self.cache: tuple[tuple[int, int], ...] = ()
        """Heads and head size of every layer's keys and values, where the model takes them."""
        self.gives_bytes = False
        """Whether the model scales pixels itself."""
        self.teller: Teller | None = None
        """Who says what texts are about, where the model is told that."""
        self._pooling, self._unpooled = _pooling(directory)
        if self._unpooled is not None:
            log.warning("%s", self._unpooled)
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
            except BaseException as error:
                if not is_failure(error):
                    raise
                self._why_not = first_line(error)
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
        return value if isinstance(value, int) else None

    @property
    def max_length(self) -> int | None:
        """The longest input that the model takes, in tokens."""
        places = whole(self.config, "max_position_embeddings", 0)
        places = places or whole(self.config, "n_positions", 0)
        if self.config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
            places -= 2
        own = _read(self.directory / "sentence_bert_config.json", {})
        limits = [places, whole(own, "max_seq_length", 0)]
        if self._tokenizer is not None:
            given = self._tokenizer.model_max_length  # 10³⁰ where nobody said it
            limits.append(int(given) if isinstance(given, int | float) and given < 10**9 else 0)
        return min((n for n in limits if n > 0), default=None)

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> dict[str, Array]:
        """Token ids [batch, length] and their mask, padded at the right to the longest text."""
        return self.told(self.pad(self.token_ids(texts, max_length=max_length)), texts)

    def told(self, feeds: dict[str, Array], texts: Sequence[str]) -> dict[str, Array]:
        """Inputs of texts, and what the texts are about where the model takes that."""
        return feeds if self.teller is None else {**feeds, intuition.INPUT: self.teller(texts)}

    def token_ids(self, texts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        """The tokens of each text with the model's marks around them, cut to the model's length."""
        begin = self.bos_id if self.kind == "causal-lm" else None
        limit = self.limit(max_length)
        rows = [list(ids) for ids in self._encoded(list(texts), max_length=limit)["input_ids"]]
        if begin is not None:
            rows = [ids if ids[:1] == [begin] else [begin, *ids][:limit] for ids in rows]
        return [ids or [begin or 0] for ids in rows]

    def words(
        self, sentences: Sequence[Sequence[str]]
    ) -> tuple[dict[str, Array], list[dict[int, int]]]:
        """Inputs of sentences that are words already, and for each the place of every word's first token.

        A word that was cut off, or that the tokenizer makes nothing of, has no place.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise SourceError(
                f"the tokenizer in {self.directory} does not say which word a token is of",
                hint="save it as tokenizer.json",
            )
        encoded = self._encoded(
            [list(words) for words in sentences],
            is_split_into_words=True,
            max_length=self.limit(None),
        )
        places: list[dict[int, int]] = []
        for i in range(len(sentences)):
            places.append({})
            for place, word in enumerate(encoded.word_ids(i)):
                if word is not None:
                    places[-1].setdefault(word, place)
        feeds = self.pad([list(ids) for ids in encoded["input_ids"]])
        return self.told(feeds, [" ".join(words) for words in sentences]), places

    def _encoded(self, texts: list[Any], **options: Any) -> Any:
        """What the tokenizer makes of texts. Raises SourceError where it fails: its files may not belong together."""
        try:
            return self.tokenizer(texts, truncation=True, **options)
        except BaseException as error:
            if isinstance(error, SourceError) or not is_failure(error):
                raise
            raise SourceError(
                f"the tokenizer in {self.directory} fails on {texts[0]!r:.60}: {first_line(error)}",
                hint="calibrate with an .npz of ready inputs, or repair the tokenizer files",
            ) from error

    def limit(self, max_length: int | None = None) -> int:
        """How many tokens of a text are kept."""
        return min(n for n in (max_length, self.max_length, LONGEST) if n)

    def pad(self, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
        """Rows of token ids as the model's inputs [batch, length], padded at the right."""
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = np.full((len(rows), max(map(len, rows))), pad, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        wanted = self.input_names or ("input_ids", "attention_mask")
        found = {name: known[name] for name in wanted if name in known}
        return causal.complete(found, self.cache) if self.cache else found

    @property
    def pooling(self) -> Pooling:
        """From token vectors to one. Raises SourceError where the directory wants what effc does not do."""
        if self._unpooled is not None:
            raise SourceError(
                self._unpooled,
                hint="leave the metric out, or write one that does it: file.py:function:FILE",
            )
        return self._pooling

    def pool(self, hidden: Array, mask: Array) -> Array:
        return self.pooling(hidden, mask)

    def images(self, pictures: Iterable[Array]) -> dict[str, Array]:
        """Pictures of any sizes, uint8 [h, w] or [h, w, c] → float32 `pixel_values` [n, c, height, width].

        Resized, cropped and scaled as preprocessor_config.json says; what is not of the model's size then is resized.
        Where the model scales pixels itself (`gives_bytes`), they are uint8 and not scaled here.
        """
        import torch

        settings = self._image_settings()
        arrays = [np.asarray(p) for p in pictures]
        alike = [[a] for a in arrays]
        if len({a.shape for a in arrays}) == 1 and sum(a.size for a in arrays) <= TOGETHER:
            alike = [arrays]
        values = torch.cat([self._sized(np.stack(group), settings) for group in alike])
        if self.gives_bytes:
            return {
                "pixel_values": values.round().clamp(0, 255).to(torch.uint8).contiguous().numpy()
            }
        scale, shift = self.affine(values.shape[1])
        values = values * scale + shift
        return {"pixel_values": values.contiguous().numpy()}

    def affine(self, channels: int) -> tuple[Any, Any]:
        """What preprocessor_config.json makes of a pixel: times the first, plus the second, [1, c, 1, 1]."""
        import torch

        settings = self._image_settings()
        scale, shift = torch.ones(1, channels, 1, 1), torch.zeros(1, channels, 1, 1)
        if settings.get("do_rescale", True):
            scale = scale * _numbers(settings, "rescale_factor", 1 / 255, channels)
        if settings.get("do_normalize", True):
            deviation = _numbers(settings, "image_std", 0.5, channels)
            shift = shift - _numbers(settings, "image_mean", 0.5, channels) / deviation
            scale = scale / deviation
        return scale, shift

    def _sized(self, pictures: Array, settings: Mapping[str, Any]) -> Any:
        """Pictures of one size, [n, h, w] or [n, h, w, c], as a tensor [n, c, height, width] that the model takes."""
        import torch

        values = torch.from_numpy(pictures.astype(np.float32))
        values = values[:, None] if values.ndim == 3 else values.permute(0, 3, 1, 2)
        values = _with_channels(values, whole(self.config, "num_channels", 3))
        resample = settings.get("resample", 2)
        size, crop = _steps(settings, *values.shape[2:])
        if size is not None:
            values = _resized(values, size, resample)
        if crop is not None:
            values = _cropped(values, crop)
        return _resized(values, self.image_size(), resample)

    def _image_settings(self) -> dict[str, Any]:
        nested = _read(self.directory / "processor_config.json", {}).get("image_processor")
        if isinstance(nested, dict) and nested:
            return nested
        return dict(_read(self.directory / "preprocessor_config.json", {}))

    def image_size(self) -> tuple[int, int]:
        """Height and width that the model takes."""
        size = self.config.get("image_size")
        if size is None:
            settings = self._image_settings()
            size = settings.get("crop_size") or settings.get("size") or 224
        return _pair(size)

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
            return Batch(inputs=self.images([r.pixels for r in records if r.pixels is not None]))
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


def _read(file: Path, absent: Any) -> Any:
    """The settings in a JSON file. Raises SourceError where it is none."""
    if not file.exists():
        return absent
    found = bounded.read_json(file, SourceError)
    if not isinstance(found, type(absent)):
        raise SourceError(
            f"{file} holds a {type(found).__name__}, not a {type(absent).__name__}",
            hint=bounded.HINT,
        )
    return found


def _pooling(path: Path) -> tuple[Pooling, str | None]:
    """How a directory pools, and what of it effc does not do."""
    listed = [m if isinstance(m, dict) else {} for m in _read(path / "modules.json", [])]
    types = [str(m.get("type", "")) for m in listed]
    files = sorted(path.glob("*_Pooling/config.json"))
    settings = _read(files[0], {}) if files else {}
    flags = [k.removeprefix("pooling_mode_") for k in settings if k.startswith("pooling_mode_")]
    asked = settings.get("pooling_mode") or [
        POOLING.get(flag, flag)
        for flag in sorted(flags, key=[*POOLING, *flags].index)
        if settings[f"pooling_mode_{flag}"]
    ]
    modes = (asked,) if isinstance(asked, str) else tuple(map(str, asked)) or ("mean",)
    strange = [t for t in types if not t.startswith(PACKAGE) or t.rpartition(".")[2] not in DONE]
    why = None
    if strange:
        why = f"{path / 'modules.json'} lists {', '.join(strange)}, which effc does not do"
    elif wrong := [mode for mode in modes if mode not in POOLING.values()]:
        why = f"{files[0]} pools by {', '.join(wrong)}, which effc does not do"
    return Pooling(modes, any(t.endswith(".Normalize") for t in types)), why


PACKAGE = "sentence_transformers."


def _pair(size: Any) -> tuple[int, int]:
    """Height and width, as settings write them: a number, two, or by name."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = size.get("height") or edge, size.get("width") or edge
    try:
        height, width = (size, size) if isinstance(size, int) else size
        found = int(height), int(width)
        if not 0 < min(found) <= max(found) <= LARGEST_SIDE:
            raise ValueError(f"{found} is out of range")
        return found
    except (TypeError, ValueError, OverflowError) as error:
        raise SourceError(
            f"{str(size)[:60]} is no size of a picture that effc reads",
            hint="repair `size` and `crop_size` in preprocessor_config.json, `image_size` in config.json",
        ) from error


LARGEST_SIDE = 1 << 14
LARGEST_PICTURE = 1 << 26
"""Sides and values of a picture on its way to the model; settings that ask for more are taken for damaged."""


def _numbers(settings: Mapping[str, Any], key: str, absent: float, channels: int) -> Any:
    """A number, or one for each channel, as a tensor [1, channels or 1, 1, 1]. Raises SourceError."""
    import torch

    value = settings.get(key, absent)
    try:
        found = torch.tensor(value, dtype=torch.float32).reshape(1, -1, 1, 1)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.tensor([])
    fits = found.numel() in (1, channels) and bool(torch.isfinite(found).all())
    if not fits or (key == "image_std" and not bool(found.all())):
        raise SourceError(
            f"the model's settings say {key}: {str(value)[:40]}, which is no number for each of {channels} channels",
            hint="repair preprocessor_config.json",
        )
    return found


Size = tuple[int, int]
RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which are those of preprocessor_config.json, in torch's words."""


def _steps(settings: Mapping[str, Any], height: int, width: int) -> tuple[Size | None, Size | None]:
    """What a picture is resized to and then cropped to, as the image processors of transformers do it."""
    wanted, percent = settings.get("size"), settings.get("crop_pct")
    crop = None
    if settings.get("do_center_crop") and settings.get("crop_size"):
        crop = _pair(settings["crop_size"])
    if wanted is None or not settings.get("do_resize", True):
        return None, crop
    if isinstance(wanted, Mapping):
        edge = _pair(shortest)[0] if (shortest := wanted.get("shortest_edge")) else None
    else:
        edge = _pair(wanted)[0] if isinstance(wanted, int) and (crop or percent) else None
    if edge is None:
        return _pair(wanted), crop
    if percent and crop is None:  # ConvNeXT and ResNet
        crop = (edge, edge)
        if edge >= 384:
            return crop, None
    if percent:
        edge = int(edge / _share(percent))
    short = min(height, width)
    return (int(edge * height / short), int(edge * width / short)), crop


def _share(percent: Any) -> float:
    """`crop_pct`, the share of a side that is kept."""
    if isinstance(percent, int | float) and 0.01 <= percent <= 1:
        return percent
    raise SourceError(
        f"the model's settings say crop_pct: {str(percent)[:40]}, which is no share",
        hint="repair preprocessor_config.json",
    )


def _with_channels(values: Any, wanted: int) -> Any:
    """[n, c, h, w] → [n, wanted, h, w]: alpha is dropped, grey repeated, colour becomes its luma (ITU-R BT.601)."""
    if values.shape[1] == wanted:
        return values
    if values.shape[1] in (2, 4):
        values = values[:, :-1]
    if values.shape[1] == 3 and wanted == 1:
        red, green, blue = values.split(1, dim=1)
        values = (0.299 * red + 0.587 * green + 0.114 * blue).round()
    if values.shape[1] == 1:
        values = values.expand(-1, wanted, -1, -1)
    if values.shape[1] != wanted:
        raise CalibrationError(
            f"pictures have {values.shape[1]} channels, the model takes {wanted}",
            hint="feed the model with an .npz of ready inputs",
        )
    return values


def _resized(values: Any, size: Size, resample: int) -> Any:
    """[n, c, h, w] of bytes at another size: across, then down, bytes between, as Pillow does it."""
    from torch.nn.functional import interpolate

    height, width = values.shape[2:]
    if (height, width) == size:
        return values
    between = values.shape[1] * max(height, size[0]) * size[1]
    if min(size) < 1 or between > LARGEST_PICTURE:
        raise CalibrationError(
            f"a picture of {width} × {height} would be made {size[1]} × {size[0]}",
            hint="take out pictures that are much longer than wide, or repair preprocessor_config.json",
        )
    if not isinstance(resample, int) or resample not in RESAMPLE:
        raise SourceError(
            f"preprocessor_config.json: resample {resample} is not one of {', '.join(map(str, RESAMPLE))}",
            hint="feed the model with an .npz of ready inputs",
        )
    mode = RESAMPLE[resample]
    if resample == 0:
        return interpolate(values, size=size, mode=mode)
    for step in ((height, size[1]), size):
        values = interpolate(values, size=step, mode=mode, antialias=True, align_corners=False)
        values = (values + 0.5).floor().clamp(0, 255)
    return values


def _cropped(values: Any, size: Size) -> Any:
    """The middle of [n, c, h, w]; what lies outside is black."""
    from torch.nn.functional import pad

    height, width = values.shape[2:]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return pad(values, (-left, size[1] - width + left, -top, size[0] - height + top))
