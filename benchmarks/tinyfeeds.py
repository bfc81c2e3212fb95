"""Values for the parameters of a transformers model's `forward`, told by their names and by its configuration."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tinyconfigs import FIRST_ID, WIDTH, is_int
from torch import Tensor, nn


class Unknown(Exception):
    """A parameter that nobody knows a value for."""


@dataclass
class Sizes:
    """How large inputs are; `form` says which of several shapes an input has that models do not agree on."""

    batch: int = 2
    length: int = 12
    form: int = 0


class Feeds:
    """Values for the parameters of a model's `forward`, by their names."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model, self.config = model, config
        parameters = inspect.signature(model.forward).parameters.values()
        self.known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        self.required = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]

    def setting(self, *names: str, default: Any = None) -> Any:
        """The first of these numbers that the configuration or a part of it has."""
        parts = [self.config, *(v for v in vars(self.config).values() if hasattr(v, "to_dict"))]
        parts += [v for part in parts[1:] for v in vars(part).values() if hasattr(v, "to_dict")]
        for part, name in itertools.product(parts, names):
            value = getattr(part, name, None)
            if value is not None:
                return value
        return default

    def part(self, word: str) -> Any:
        return getattr(self.config, f"{word}_config", None) or self.config

    def forms(self) -> Iterator[tuple[str, ...]]:
        """Names of parameters to give values for, the likeliest first."""
        main = self.model.main_input_name
        mains = [main] if isinstance(main, str) else list(main)
        named = [n for n in dict.fromkeys([*mains, *self.required]) if n in self.known]
        text = [n for n in ("attention_mask",) if "input_ids" in named and n in self.known]
        decoder = [n for n in ("decoder_input_ids",) if n in self.known]
        audio = [
            n for n in ("input_features_mask",) if "input_features" in named and n in self.required
        ]
        picture = [
            n
            for n in (
                "pixel_values",
                "image_grid_thw",
                "mm_token_type_ids",
                "pixel_attention_mask",
                "spatial_shapes",
            )
            if n in self.known and "input_ids" in named and n not in named
        ]
        picture += [n for n in ("image_sizes",) if n in self.known and "pixel_values" in picture]
        sound = [
            n
            for n in ("input_features", "feature_attention_mask", "input_values")
            if n in self.known and "input_ids" in named and n not in named
        ]
        if sound:
            yield (*named, *text, *decoder, *sound)
        if picture:
            yield (*named, *text, *decoder, *picture)
        yield tuple(dict.fromkeys([*named, *text, *decoder, *audio]))
        if "input_ids" in self.known:
            yield tuple(
                dict.fromkeys(
                    [
                        "input_ids",
                        *self.required,
                        *(n for n in ("attention_mask",) if n in self.known),
                    ]
                )
            )
        yield tuple(named)
        yield tuple(dict.fromkeys([*named, *text]))
        if "input_ids" in self.known and "input_ids" not in named:
            yield tuple(
                dict.fromkeys(
                    [*named, "input_ids", *[n for n in ("attention_mask",) if n in self.known]]
                )
            )
        for other in (
            "input_features",
            "input_values",
            "pixel_values",
            "pixel_values_videos",
            "inputs_embeds",
        ):
            if other in self.known and other not in named:
                yield tuple(dict.fromkeys([*self.required, other]))

    def values(self, names: Iterable[str], sizes: Sizes) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(sizes.batch * 100 + sizes.length)
        names = list(names)
        found: dict[str, Tensor] = {}
        for name in names:
            if name in ("pixel_values", "hidden_states") and any(
                n.endswith("grid_thw") for n in names
            ):
                found[name] = _patches(self, sizes, draw, name)
            else:
                found[name] = self.value(name, sizes, draw)
        found = self.marked(found, sizes)
        if "mm_token_type_ids" in found:
            token = self.setting("image_token_id", "image_token_index")
            found["mm_token_type_ids"] = (found["input_ids"] == token).to(torch.int32)
        return found

    def marked(self, found: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        """The text with as many places for a picture or a sound as the model makes of it."""
        text = found.get("input_ids")
        for word, get in (("image", "get_image_features"), ("audio", "get_audio_features")):
            token = self.setting(f"{word}_token_id", f"{word}_token_index")
            make = getattr(self.model, get, None)
            if text is None or text.dim() != 2 or make is None or not is_int(token):
                continue
            given = {
                n: v
                for n, v in found.items()
                if n in inspect.signature(make).parameters and "ids" not in n
            }
            if not given or ("attention_mask" in given and len(given) == 1):
                continue
            given.pop("attention_mask", None)
            with torch.no_grad():
                made = make(**given)
            made = getattr(made, "pooler_output", made)
            rows = (
                sum(v.shape[:-1].numel() for v in made)
                if isinstance(made, list | tuple)
                else made.shape[:-1].numel()
            )
            each = rows // sizes.batch
            marks = torch.full((sizes.batch, each), token, dtype=text.dtype)
            found["input_ids"] = text = torch.cat([text[:, :4], marks, text[:, 4:]], 1)
            if "attention_mask" in found:
                more = torch.ones_like(marks)
                found["attention_mask"] = torch.cat([more, found["attention_mask"]], 1)
        return found

    def value(self, name: str, s: Sizes, draw: torch.Generator) -> Tensor:
        for pattern, make in _MAKERS:
            if re.fullmatch(pattern, name):
                found: Tensor = make(self, s, draw, name)
                return found
        raise Unknown(f"nobody knows what goes into {name}")

    def width(self) -> int:
        return int(
            self.setting(
                "hidden_size", "d_model", "embed_dim", "n_embd", "dim", "hidden_dim", default=WIDTH
            )
        )

    def square(self) -> tuple[int, int]:
        size = self.setting("image_size", "img_size", "resolution", default=64)
        if isinstance(size, Mapping):
            size = list(size.values())
        if isinstance(size, list | tuple):
            return int(size[0]), int(size[-1])
        return int(size), int(size)


def _ids(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    text = f.config.get_text_config() if hasattr(f.config, "get_text_config") else f.config
    size = getattr(text, "vocab_size", None) or f.setting("vocab_size", default=99)
    high = max(4, min(int(size), FIRST_ID) - 1)
    books = f.setting("num_codebooks", "num_channels", default=8)
    shape: tuple[int, ...] = (s.batch, s.length)
    if s.form % 3 == 1 and is_int(books):
        shape = (s.batch, s.length, books)
    if s.form % 3 == 2 and is_int(books):
        shape = (s.batch, books, s.length)
    return torch.randint(min(3, high - 1), high, shape, generator=draw)


def _mask(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    made = torch.ones(s.batch, s.length, dtype=torch.int64)
    if s.batch > 1:
        made[1, s.length - 3 :] = 0
    return made


def _pixels(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    channels = (
        int(f.setting("num_channels", "in_channels", "in_chans", default=3))
        if is_int(f.setting("num_channels", "in_channels", "in_chans", default=3))
        else 3
    )
    frames = f.setting("num_frames", default=None)
    height, width = f.square()
    forms: list[tuple[int, ...]] = [(s.batch, channels, height, width)]
    forms += [
        (s.batch, int(frames or 2), channels, height, width),
        (s.batch, 1, channels, height, width),
    ]
    patch = f.setting("patch_size", default=16)
    if "spatial_shapes" in f.known and is_int(patch):
        forms.insert(0, (s.batch, 16, channels * patch * patch))
    if "video" in name or frames:
        forms = [forms[1], forms[0], (s.batch, channels, int(frames or 2), height, width)]
    return torch.randn(forms[s.form % len(forms)], generator=draw)


def _features(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    words = (
        "num_mel_bins",
        "n_mels",
        "feature_size",
        "input_feat_size",
        "input_feat_per_channel",
        "mel_dim",
        "input_dim",
        "feature_projection_input_dim",
    )
    mels = int(f.setting(*words, default=80))
    other = int(f.setting(*reversed(words), default=80))
    positions = f.setting("max_source_positions", default=None)
    fixed = 2 * positions if is_int(positions) else None
    time = s.length * 8
    forms = [
        (s.batch, mels, fixed or time),
        (s.batch, time, mels),
        (s.batch, mels, time),
        (s.batch, time, other),
        (s.batch, 1, mels, time),
        (s.batch, 1, time, mels),
    ]
    return torch.randn(forms[s.form % len(forms)], generator=draw)


def _wave(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    mels = f.setting("num_mel_bins", default=None)
    tall = f.setting("max_length", default=128)
    samples = s.length * 400
    forms: list[tuple[int, ...]] = [(s.batch, samples), (s.batch, 1, samples)]
    forms += [
        (s.batch, int(tall), int(mels or 80)),
        (s.batch, s.length * 8, int(mels or 80)),
        (s.batch, 2, samples),
    ]
    return torch.randn(forms[s.form % len(forms)], generator=draw)


def _hidden(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    width = f.width()
    side = 8
    forms: list[tuple[int, ...]] = [
        (s.batch, s.length, width),
        (s.batch, width, s.length),
        (s.batch, width, side, side),
        (s.batch, side, side, width),
        (s.length, width),
    ]
    return torch.randn(forms[s.form % len(forms)], generator=draw)


def _past(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    lags = f.setting("lags_sequence", default=None)
    length = f.setting("context_length", "history_length", default=s.length)
    time = int(length) + (max(lags) if lags else 0)
    channels = int(f.setting("num_input_channels", "input_size", default=1))
    forms: list[tuple[int, ...]] = [
        (s.batch, time) if channels == 1 and lags else (s.batch, time, channels),
        (s.batch, time),
        (s.batch, time, channels),
    ]
    shape = forms[s.form % len(forms)]
    return torch.ones(shape) if "mask" in name else torch.randn(shape, generator=draw)


def _times(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    lags = f.setting("lags_sequence", default=None)
    length = (
        f.setting("context_length", default=s.length)
        if "past" in name
        else f.setting("prediction_length", default=s.length)
    )
    time = int(length) + (max(lags) if lags and "past" in name else 0)
    features = int(f.setting("num_time_features", default=1) or 0) + int(
        f.setting("num_dynamic_real_features", default=0) or 0
    )
    return torch.randn((s.batch, time, features), generator=draw)


def _grid(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    return torch.tensor([[1, 4, 4]] * s.batch)


def _square_sizes(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    return torch.tensor([list(f.square())] * s.batch)


def _patches(f: Feeds, s: Sizes, draw: torch.Generator, name: str) -> Tensor:
    """[patches, values of a patch], or tokens of it, of pictures of 4×4 patches."""
    p = f.setting("patch_size", default=14)
    p = int(p[0] if isinstance(p, list | tuple) else p)
    t, c = (
        int(f.setting("temporal_patch_size", default=1) or 1),
        int(f.setting("in_channels", "in_chans", "num_channels", default=3)),
    )
    rows = 16 * s.batch
    forms: list[tuple[int, ...]] = [
        (rows, c * t * p * p),
        (rows, f.width()),
        (rows, c, p, p),
        (rows, c * p * p),
        (1, rows, c * p * p),
    ]
    return torch.randn(forms[s.form % len(forms)], generator=draw)


_MAKERS: list[tuple[str, Callable[[Feeds, Sizes, torch.Generator, str], Tensor]]] = [
    (r"spatial_shapes", lambda f, s, d, n: torch.tensor([[4, 4]] * s.batch)),
    (r"pixel_attention_mask", lambda f, s, d, n: torch.ones(s.batch, 16, dtype=torch.int64)),
    (
        r"(\w+_)?input_ids|inputs|token_index|audio_input_ids|input_ids_\w+|\w+_ids|audio_codes|codes",
        _ids,
    ),
    (r"(\w+_)?attention_mask|input_features_mask|mask", _mask),
    (r"(\w*_)?pixel_values(_videos)?|image|images", _pixels),
    (r"input_features|audio_mel|spectrogram|mel_spectrogram", _features),
    (r"input_values|audio_values|waveform", _wave),
    (r"past_values|past_observed_mask|future_values", _past),
    (r"(past|future)_time_features", _times),
    (r"(image_|video_)?grid_thw", _grid),
    (r"past_values_padding", lambda f, s, d, n: torch.zeros(_past(f, s, d, n).shape)),
    (r"freq", lambda f, s, d, n: torch.zeros(s.batch, 1, dtype=torch.int64)),
    (r"image_sizes|original_sizes", _square_sizes),
    (
        r"hidden_states|inputs_embeds|query_embeds|latents|\w+_embeds|\w+_hidden_states|image_features|context|vision_features|text_features",
        _hidden,
    ),
]
