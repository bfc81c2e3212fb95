"""A pipeline directory of diffusers as modules by role, each with example inputs and the names of its free dimensions.

Classes are looked up by the words of model_index.json in a table, and made by diffusers and transformers from
safetensors alone. The table is short on purpose: a directory says which class is made, and must not say which code is
run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from effc import bounded, diffusion
from effc.diffusion import (
    HIDDEN,
    INDEX,
    LABELS,
    LAST,
    LATENT,
    OUT_SAMPLE,
    PENULTIMATE,
    POOLED,
    SAMPLE,
    SIZES,
    TIMESTEP,
)  # fmt: skip
from effc.errors import BackendUnavailable, SourceError, first_line
from effc.table import unknown

Json = dict[str, Any]
Dims = dict[str, dict[int, str]]

ROWS = 2
BATCH = {0: "batch"}
PICTURE = {0: "batch", 2: "height", 3: "width"}
IDLE = (
    "scheduler",
    "tokenizer",
    "tokenizer_2",
    "feature_extractor",
    "safety_checker",
    "image_encoder",
)
"""Components that are no graph of a program; of these only the first three travel with it."""


class Denoiser(nn.Module):
    """`out_sample` of a UNet or a transformer, for one time of all rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Unguided(Denoiser):
    def forward(self, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        return {OUT_SAMPLE: self.model(sample, timestep).sample}


class Labelled(Denoiser):
    """Of classes, which a UNet or a DiT takes by name."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> dict[str, Tensor]:
        return {OUT_SAMPLE: self.model(sample, timestep=timestep, class_labels=class_labels).sample}


class TextGuided(Denoiser):
    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> dict[str, Tensor]:
        return {OUT_SAMPLE: self.model(sample, timestep, encoder_hidden_states).sample}


class TextAndSizeGuided(Denoiser):
    """SDXL's, which is told a summary of the text and the size of the picture as well."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
    ) -> dict[str, Tensor]:
        more = {POOLED: text_embeds, SIZES: time_ids}
        made = self.model(sample, timestep, encoder_hidden_states, added_cond_kwargs=more)
        return {OUT_SAMPLE: made.sample}


class Coder(nn.Module):
    """One half of an autoencoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model


class Decoder(Coder):
    def forward(self, latent_sample: Tensor) -> dict[str, Tensor]:
        return {SAMPLE: self.model.decode(latent_sample).sample}


class Encoder(Coder):
    """Mean and log variance of the latents; the latents themselves where the encoder has no spread."""

    def forward(self, sample: Tensor) -> dict[str, Tensor]:
        made = self.model.encode(sample)
        spread = getattr(made, "latent_dist", None)
        return {"latent_parameters": made.latents if spread is None else spread.parameters}


class Text(nn.Module):
    """What a denoiser reads of a text: all token vectors, and a summary where the encoder has one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        made = self.model(input_ids)
        return {LAST: made.last_hidden_state, "pooler_output": made.pooler_output}


class EarlyText(Text):
    """Token vectors in front of the last layer, as SDXL reads them, and the projected summary where there is one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._seen: list[Tensor] = []
        inner: Any = getattr(model, "text_model", model)
        inner.encoder.layers[-1].register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: nn.Module, given: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        self._seen = [given[0] if given else named["hidden_states"]]

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        made = self.model(input_ids)
        found = {PENULTIMATE: self._seen.pop()}
        summary = getattr(made, POOLED, None)
        return found if summary is None else {POOLED: summary, **found}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A graph of a pipeline: module, example inputs and free dimensions."""

    module: nn.Module
    inputs: Mapping[str, Tensor]
    dims: Dims


@dataclass(frozen=True, kw_only=True)
class Component:
    """A component of model_index.json that graphs are made of, and where its weights and settings lie."""

    word: str
    kind: str
    place: Path
    settings: Json


LIBRARIES = {
    "UNet2DModel": "diffusers",
    "UNet2DConditionModel": "diffusers",
    "DiTTransformer2DModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "AutoencoderTiny": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
}
"""Classes that graphs are made of, and whose they are."""
OLD_NAMES = {"Transformer2DModel": "DiTTransformer2DModel"}
WORDS = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "transformer": ("DiTTransformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
"""Which classes a component may be of."""


def is_pipeline(path: Path) -> bool:
    return (path / INDEX).is_file()


def components(path: Path) -> list[Component]:
    """What of a pipeline becomes graphs. Raises SourceError for a component that is unknown or not there."""
    index = bounded.read_json(path / INDEX, SourceError)
    if not isinstance(index, dict):
        raise SourceError(f"{path / INDEX} holds no components", hint=bounded.HINT)
    found = []
    for word, value in index.items():
        if word.startswith("_") or not isinstance(value, list) or not any(value):
            continue  # a setting, or a component that was left out
        if len(value) != 2 or not all(isinstance(v, str) for v in value):
            raise SourceError(f"{path / INDEX} says {word}: {str(value)[:60]}", hint=bounded.HINT)
        if word in IDLE:
            continue
        if word not in WORDS:
            raise SourceError(
                unknown("component", word, [*WORDS, *IDLE]),
                where=str(path / INDEX),
                hint="effc compiles DDPM, DDIM, Stable Diffusion, SDXL and DiT; other parts by module:factory",
            )
        library, kind = value[0], OLD_NAMES.get(value[1], value[1])
        if kind not in WORDS[word] or LIBRARIES[kind] != library:
            raise SourceError(
                f"{word} is {library}.{value[1]}; known are {', '.join(WORDS[word])}",
                where=str(path / INDEX),
                hint="effc runs no code from a model directory; use module:factory with code that you trust",
            )
        found.append(_component(path, word, kind))
    words = {component.word for component in found}
    if len(words & set(diffusion.DENOISERS)) != 1:
        raise SourceError(
            f"{path / INDEX} names no denoiser: {', '.join(sorted(words)) or 'nothing'}",
            hint="a pipeline has a unet or a transformer, and a scheduler",
        )
    if not (path / diffusion.SCHEDULER).is_file():
        raise SourceError(
            f"{path} has no {diffusion.SCHEDULER}",
            hint="save the whole pipeline: pipe.save_pretrained(DIR)",
        )
    return found


def _component(path: Path, word: str, kind: str) -> Component:
    place = path / word
    if not (place / "config.json").is_file():
        raise SourceError(
            f"{path / INDEX} names {word}, and {place} has no config.json",
            hint="get a whole copy of the directory, all of its folders",
        )
    settings = bounded.read_json(place / "config.json", SourceError)
    if not isinstance(settings, dict):
        raise SourceError(f"{place / 'config.json'} holds no settings", hint=bounded.HINT)
    return Component(word=word, kind=kind, place=place, settings=settings)


def parts(found: Sequence[Component]) -> dict[str, Part]:
    """Every graph of a pipeline by its role, in the order in which they run."""
    _require()
    models = {component.word: _loaded(component) for component in found}
    kinds = {component.word: component.kind for component in found}
    made: dict[str, Part] = {}
    (word,) = set(models) & set(diffusion.DENOISERS)
    is_early = getattr(models[word].config, "addition_embed_type", None) == "text_time"
    for role in diffusion.TEXTS:
        if role in models:
            made[role] = _text(models[role], is_early)
    made[word] = MAKERS[kinds[word]](models[word], made)
    if "vae" in models:
        made |= _autoencoder(models["vae"])
    return made


def links(found: Mapping[str, Part]) -> list[dict[str, str]]:
    """What the denoiser takes as the one text encoder gives it. Of two, the vectors are laid side by side first."""
    if [role for role in found if role in diffusion.TEXTS] != [diffusion.TEXT]:
        return []
    given = PENULTIMATE if isinstance(found[diffusion.TEXT].module, EarlyText) else LAST
    return [{
        "producer": diffusion.TEXT, "output": given, "consumer": diffusion.UNET, "input": HIDDEN,
        "layout": diffusion.LAYOUT,
    }]  # fmt: skip


def _require() -> None:
    try:
        import diffusers
    except ImportError as error:
        raise BackendUnavailable(
            "a pipeline directory needs diffusers", hint="pip install 'effc[diffusion]'"
        ) from error
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def _loaded(component: Component) -> Any:
    """The model of a component in float32. Raises SourceError where its weights are not those of its settings."""
    import diffusers
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    is_own = LIBRARIES[component.kind] == "diffusers"
    kind: Any = getattr(diffusers if is_own else transformers, component.kind)
    _check_size(component, kind, is_own)
    how: Json = {"torch_dtype" if is_own else "dtype": torch.float32}
    if is_own:
        how["low_cpu_mem_usage"] = False
    try:
        model, info = kind.from_pretrained(
            str(component.place), local_files_only=True, use_safetensors=True,
            output_loading_info=True, **how,
        )  # fmt: skip
    except Exception as error:
        raise SourceError(
            f"{component.kind} does not load from {component.place}: {first_line(error)}",
            hint="config.json and the weights must be whole and of one model; --debug shows more",
        ) from error
    if missing := sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])]):
        raise SourceError(
            f"{component.place} lacks weights that {component.kind} needs: {', '.join(missing[:3])}",
            hint="config.json and the weights are of two models",
        )
    return model.eval()


def _check_size(component: Component, kind: Any, is_own: bool) -> None:
    """Raises SourceError where settings ask for many more values than there are, all of which would be made."""
    held = 0
    for file in component.place.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                shape = weights.get_slice(name).get_shape()
                held += torch.Size(shape).numel()
    try:
        with torch.device("meta"):
            made = (
                kind.from_config(dict(component.settings))
                if is_own
                else kind(kind.config_class.from_dict(component.settings))
            )
    except Exception as error:
        raise SourceError(
            f"{component.place / 'config.json'} describes no {component.kind}: {first_line(error)}",
            hint="it must be whole; --debug shows more",
        ) from error
    wanted = sum(tensor.numel() for tensor in made.parameters())
    if wanted > 1.01 * held:
        raise SourceError(
            f"{component.place / 'config.json'} asks for {wanted} values, and the weights have {held}",
            hint="config.json and the weights are of two models",
        )


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _side(config: Any) -> tuple[int, int]:
    size = config.sample_size
    if size is None:
        raise SourceError(
            "the denoiser's config.json says no sample_size", hint="add the size it was trained on"
        )
    return (size, size) if isinstance(size, int) else tuple(size)


def _sample(config: Any) -> dict[str, Tensor]:
    time = torch.tensor([500.0])
    return {SAMPLE: _drawn(ROWS, config.in_channels, *_side(config)), TIMESTEP: time}


def _plain(model: Any, _: Mapping[str, Part]) -> Part:
    inputs, dims = _sample(model.config), {SAMPLE: BATCH, TIMESTEP: {}}
    if getattr(model, "class_embedding", None) is None:
        return Part(module=Unguided(model), inputs=inputs, dims=dims)
    return _labelled(model, inputs, dims)


def _labelled(model: Any, inputs: dict[str, Tensor], dims: Dims) -> Part:
    inputs[LABELS] = torch.arange(ROWS)
    return Part(module=Labelled(model), inputs=inputs, dims={**dims, LABELS: BATCH})


def _dit(model: Any, _: Mapping[str, Part]) -> Part:
    return _labelled(model, _sample(model.config), {SAMPLE: BATCH, TIMESTEP: {}})


ODD = ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "num_class_embeds")


def _guided(model: Any, texts: Mapping[str, Part]) -> Part:
    config = model.config
    extra = config.addition_embed_type
    if extra not in (None, "text_time") or any(getattr(config, key, None) for key in ODD):
        raise SourceError(
            "the UNet is told more than text, or another thing (class, picture, guidance)",
            hint="compile it by module:factory",
        )
    tokens = min((part.inputs["input_ids"].shape[1] for part in texts.values()), default=77)
    inputs, dims = _sample(config), {SAMPLE: PICTURE, TIMESTEP: {}, HIDDEN: BATCH}
    inputs[HIDDEN] = _drawn(ROWS, tokens, config.cross_attention_dim)
    if extra is None:
        return Part(module=TextGuided(model), inputs=inputs, dims=dims)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    height, width = _side(config)
    inputs[POOLED] = _drawn(ROWS, pooled)
    inputs[SIZES] = torch.from_numpy(diffusion.sizes(height, width, ROWS))
    dims |= {POOLED: BATCH, SIZES: BATCH}
    return Part(module=TextAndSizeGuided(model), inputs=inputs, dims=dims)


MAKERS: dict[str, Callable[[Any, Mapping[str, Part]], Part]] = {
    "UNet2DModel": _plain,
    "UNet2DConditionModel": _guided,
    "DiTTransformer2DModel": _dit,
}


def _autoencoder(model: Any) -> dict[str, Part]:
    config = model.config
    blocks = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
    side = 8 * 2 ** (len(blocks) - 1)
    latent = _drawn(ROWS, config.latent_channels, 8, 8)
    picture = _drawn(ROWS, config.in_channels, side, side).clamp(-1, 1)
    return {
        diffusion.DECODER: Part(module=Decoder(model), inputs={LATENT: latent}, dims={LATENT: PICTURE}),
        diffusion.ENCODER: Part(module=Encoder(model), inputs={SAMPLE: picture}, dims={SAMPLE: PICTURE}),
    }  # fmt: skip


def _text(model: Any, is_early: bool) -> Part:
    config = getattr(model.config, "text_config", model.config)
    shape = (ROWS, config.max_position_embeddings)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, shape, generator=draw, dtype=torch.int32)
    ids[:, -1] = (
        config.vocab_size - 1
    )  # the summary is taken at the largest number, which ends the text
    model.config.use_cache = False
    module: nn.Module = EarlyText(model) if is_early else Text(model)
    return Part(module=module, inputs={"input_ids": ids}, dims={"input_ids": dict(BATCH)})
