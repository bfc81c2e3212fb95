"""Where a model comes from: modules with example inputs, free dimensions, and what turns raw samples into batches.

A local transformers directory is read with its own head (the class that config.json's `architectures` names), from
safetensors only, and without a network; a pipeline directory of diffusers likewise, as several graphs. Anything else
comes through a factory, `module:function` or `file.py:function`, that returns a `Source` or just `(module, inputs)`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from effc import bounded, cached, causal, diffusion, gguf, intuition, paths, pipeline, schedule
from effc import task as tasks
from effc.calib.data import Batch
from effc.errors import EffcError, SourceError, TuneError, first_line
from effc.foreign import file as foreign
from effc.foreign.module import WRITTEN, module_of
from effc.foreign.ports import example, limits
from effc.foreign.quantised import quantised
from effc.foreign.steps import steps_of
from effc.guided import Embedder, Guided, Teller, guided, scorer
from effc.ir.trace import named_inputs
from effc.processor import Processor, kind_of, pools, whole
from effc.table import nearest, unknown
from effc.tasks import TASKS

log = logging.getLogger(__name__)

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
"""Files of a model directory that travel with the engine, where they end in one of `TEXTS` or are a licence."""
PIPELINE_COPIED = (
    diffusion.INDEX,
    "*/config.json",
    "scheduler/*.json",
    "feature_extractor/*.json",
    *(
        f"{folder}/{name}"
        for folder in ("tokenizer", "tokenizer_2")
        for name in ("*.json", "*.txt", "*.model")
    ),
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
"""The same of a pipeline directory."""
TEXTS = (".json", ".txt", ".model", ".jinja", ".md")
LICENCES = ("LICENSE", "LICENCE", "NOTICE")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LAYERS = re.compile(
    r"(num_|n_)?(hidden_|encoder_|decoder_|block_)?layers?(_per_block)?|depths?|transformer_layers_per_block"
)
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 16
MOST_LAYERS = 1024
"""Of a model without weights."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one graph gives and another takes as it is; `layout` names the axes."""

    producer: str
    output: str
    consumer: str
    input: str
    layout: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to compile, by role; a plain model has the one role `main`.

    A factory may give inputs as arrays too, or as a list in the order of forward's parameters. `outputs` names the
    outputs to keep, all where empty. `batches` gives calibration data where the source has its own. A model that takes
    `sample` and `timestep` and has a `scheduler` is a denoiser, which `effc run` samples with.
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
    links: tuple[Link, ...] = ()
    scheduler: Mapping[str, Any] | None = None
    """How a diffusion model is sampled, as in diffusers' scheduler_config.json."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Files of a package that are not as they lie in the directory."""
    kept: Callable[[Mapping[str, Tensor]], dict[str, bytes]] | None = None
    """The files of a source that is this one trained, from its tensors; None where it need not be trained."""
    whole: Source | None = None
    """All of a source that this is one graph of."""
    file: Path | None = None
    """The ONNX file that the model is. The module is how it was read; what engines are held against is the file."""
    beside: Mapping[str, Source] = field(default_factory=dict)
    """Sources of graphs that another directory is of, by role; their files lie in a folder of that name."""
    centroids: Path | None = None
    """The clusters of a graph that scores by them."""

    @property
    def main(self) -> tuple[str, ...]:
        """The graphs of the model itself."""
        return tuple(role for role in self.modules if role not in self.beside)

    @property
    def module(self) -> nn.Module:
        (module,) = self.modules.values()
        return module

    def stem(self, role: str) -> str:
        """What stands before the names of a model's own modules where effc has put it into a module of its own."""
        own = (cached.Cached, Guided, Pixels, pipeline.Denoiser, pipeline.Coder, pipeline.Text)
        return "model." if isinstance(self.modules[role], own) else ""

    def only(self, role: str) -> Source:
        """The same with one of its graphs."""

        def of(values: Mapping[str, Any]) -> dict[str, Any]:
            return {role: values[role]} if role in values else {}

        own = self.beside.get(role, self)
        return dataclasses.replace(
            own, modules=of(self.modules), inputs=of(self.inputs), dims=of(self.dims),
            outputs=of(self.outputs), whole=self.whole or self, beside={},
        )  # fmt: skip


class Pixels(nn.Module):
    """A model of pictures that takes them as bytes, [batch, channels, height, width], and scales them itself."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, pixel_values: Tensor) -> Any:
        floats = pixel_values.to(torch.float32)
        return self.model(pixel_values=floats * self.scale + self.shift)


def guess(model: str) -> dict[str, str]:
    """A source from one word of the command line: a directory, a factory, or a hub id."""
    if os.path.isdir(model):
        if (word := task_of(Path(model))) is not None:
            return {"task": word, "checkpoint": model}
        return {"diffusers" if pipeline.is_pipeline(Path(model)) else "transformers": model}
    if re.fullmatch(r"[\w./-]+:[A-Za-z_]\w*", model) and not os.path.exists(model):
        return {"python": model}
    if os.path.isfile(model) and model.endswith(".gguf"):
        return {"gguf": model}
    if model.endswith(".onnx"):
        return {"onnx": model}
    if os.path.isfile(model):
        raise SourceError(
            f"{model} is a file, not a model directory",
            hint="give the directory that holds config.json and model.safetensors, a .onnx or a .gguf",
        )
    return {"transformers": model}


def load(spec: Mapping[str, Any], *, shapes: bool = False) -> Source:
    """The source that `{transformers: DIR}` or a mapping with another of the words for a source stands for.

    With `shapes` a directory may lack its weights; the model then has shapes alone.
    """
    how = {
        "cache": spec.get("cache", True),
        "roles": tuple(spec.get("roles", ())),
        "bytes_in": spec.get("pixels") == "uint8",
    }
    centroids, embedder = (Path(spec[w]) if w in spec else None for w in ("intuition", "embedder"))
    if "task" in spec:
        options = {k: v for k, v in spec.items() if k not in ("task", "encoder", "checkpoint")}
        if "checkpoint" in spec:
            return from_checkpoint(Path(spec["checkpoint"]), spec["task"])
        return from_encoder(Path(spec["encoder"]), spec["task"], options)
    if "transformers" in spec:
        return from_directory(
            Path(spec["transformers"]), **how, centroids=centroids, embedder=embedder, shapes=shapes
        )
    if "diffusers" in spec:
        return from_pipeline(Path(spec["diffusers"]))
    if "gguf" in spec:
        file = Path(spec["gguf"])
        place, digest = gguf.directory(file)
        found = from_directory(place, **how)
        return dataclasses.replace(found, name=file.stem, digest=digest)
    if "onnx" in spec:
        return from_onnx(
            Path(spec["onnx"]), Path(spec["tokenizer"]) if "tokenizer" in spec else None
        )
    options = {k: v for k, v in spec.items() if k != "python"}
    return from_factory(spec["python"], options)


def from_directory(
    path: Path,
    *,
    cache: bool = True,
    roles: Sequence[str] = (),
    shapes: bool = False,
    bytes_in: bool = False,
    centroids: Path | None = None,
    embedder: Path | None = None,
) -> Source:
    """A transformers directory, or what the hub has under its name. Raises SourceError, saying what is wrong.

    A causal language model takes and gives its cache of keys and values, unless `cache` is false; `roles` prefill and
    decode make two graphs of it, for an engine that reads prompts and one that writes. With `shapes` a directory
    without weights gives a model on torch's device `meta`. With `bytes_in` a model of pictures takes uint8 pixels
    of its own size, and scales them itself. With a file of `centroids` the model has an input `intuition`,
    which is worked out for texts where a directory of an `embedder` is named.
    """
    if not os.path.exists(path) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        path = _download(path)
    config = read_config(path)
    model, missing = _load_model(path, config, shapes)
    processor = Processor(path, config)
    inputs, dims = _example(config, model, processor)
    processor.input_names = tuple(inputs)
    keep = _outputs(path, config, model, inputs, missing)
    if bytes_in:
        if "pixel_values" not in inputs:
            raise SourceError(
                f"{path} takes {', '.join(inputs)}, and no pictures",
                hint="leave source.pixels out",
            )
        processor.gives_bytes = True
        model = Pixels(model, *processor.affine(inputs["pixel_values"].shape[1]))
        inputs = {"pixel_values": ((inputs["pixel_values"] + 1) * 127.5).round().to(torch.uint8)}
    if processor.kind == "causal-lm" and cache:
        processor.cache = tuple(causal.shapes(model.config))
        inputs, dims = cached.example(inputs, processor.cache)
        model, keep = cached.cached(model), ()
        if not model.chooses:
            del inputs[causal.KEEP]
    elif roles:
        raise SourceError(
            f"{path} is no causal language model with a cache, and has one graph",
            hint="leave source.roles out",
        )
    beside: dict[str, Source] = {}
    if centroids is not None:
        teller, beside = _teller(centroids, embedder)
        processor.teller = teller
        model = guided(model, [cached.parameter(name) for name in inputs])
        draw = torch.Generator().manual_seed(0)
        size = len(teller.clusters.centroids)
        inputs = {**inputs, intuition.INPUT: torch.rand(EXAMPLE_BATCH, size, generator=draw)}
        dims = {**dims, intuition.INPUT: {0: "batch"}}
    named = tuple(roles) or ("main",)
    links = [Link(**link) for link in causal.links(len(processor.cache))] if roles else []
    if beside:
        told = {"output": intuition.INPUT, "input": intuition.INPUT, "layout": "batch, clusters"}
        links += [Link(producer=intuition.ROLE, consumer=role, **told) for role in named]
    return Source(
        modules=dict.fromkeys(named, model) | {r: of.modules["main"] for r, of in beside.items()},
        inputs=dict.fromkeys(named, inputs) | {r: of.inputs["main"] for r, of in beside.items()},
        dims=dict.fromkeys(named, dims) | {r: of.dims["main"] for r, of in beside.items()},
        outputs=dict.fromkeys(named, keep) if keep else {},
        links=tuple(links),
        beside=beside,
        kind="encoder" if pools(path) else kind_of(config),
        name=_name(path),
        digest=directory_digest(path),
        processor=processor,
        directory=path,
        files=tuple(copied_files(path)),
    )


def _teller(file: Path, directory: Path | None) -> tuple[Teller, dict[str, Source]]:
    """Who says what texts are about, and the graph that does it in a package, where there is an encoder.

    Raises SourceError or CalibrationError where the two do not go together.
    """
    clusters = intuition.read(file)
    if directory is None:
        return Teller(clusters=clusters), {}
    source = from_directory(directory)
    if source.kind != "encoder" or source.processor is None:
        raise SourceError(
            f"{directory} is a {source.kind}, which embeds no texts",
            hint="name a sentence encoder, such as all-MiniLM-L6-v2",
        )
    inputs, processor = source.inputs["main"], source.processor
    with torch.no_grad():
        width = source.module(**inputs)["last_hidden_state"].shape[-1]
    clusters.scores(np.ones((1, width * len(processor.pooling.modes))))  # refuses another size
    module = scorer(source.module, processor.pooling, clusters, tuple(inputs))
    made = Embedder(run=module.run, processor=processor, digest=source.digest)
    teller = Teller(clusters=clusters, embedder=made)
    graph = dataclasses.replace(
        source, modules={"main": module}, outputs={}, digest=teller.digest, centroids=file
    )
    return teller, {intuition.ROLE: graph}


def from_pipeline(path: Path) -> Source:
    """A pipeline directory of diffusers, its components as graphs. Raises SourceError, saying what is wrong."""
    if not pipeline.is_pipeline(path):
        raise SourceError(
            f"{paths.word(str(path))} is no pipeline directory: it has no {diffusion.INDEX}",
            hint="give the directory that pipe.save_pretrained(DIR) wrote",
        )
    _refuse_special(path)
    found = pipeline.components(path)
    for component in found:
        _refuse_special(component.place)
        if not any(component.place.glob("*.safetensors")):
            raise _no_weights(component.place)
        _check_weights(component.place, component.settings)
    parts = pipeline.parts(found)
    for part in parts.values():
        check_finite(part.module)
    scheduler = bounded.read_json(path / diffusion.SCHEDULER, SourceError)
    return Source(
        modules={role: part.module for role, part in parts.items()},
        inputs={role: part.inputs for role, part in parts.items()},
        dims={role: part.dims for role, part in parts.items()},
        links=tuple(Link(**link) for link in pipeline.links(parts)),
        kind=diffusion.KIND,
        name=_name(path),
        digest=directory_digest(
            path, ("*/*.safetensors", "*/config.json", diffusion.INDEX, diffusion.SCHEDULER)
        ),
        directory=path,
        files=tuple(copied_files(path, PIPELINE_COPIED)),
        scheduler=scheduler,
    )


def from_onnx(path: Path, tokenizer: Path | None = None) -> Source:
    """A model that is an ONNX file in float32. Raises SourceError, saying what is wrong and with which node.

    `tokenizer` is the directory of what makes inputs of texts or pictures: where it is not named, that of the file or
    the one above it, if such files lie there.
    """
    proto = foreign.parsed(path)
    if (how := quantised(proto)) is not None:
        raise SourceError(
            f"{path} is quantised already: {how.sentence}",
            hint=f"give the float model; effc verify {path} --model FLOAT compares the two",
        )
    model = foreign.read(path, proto)
    try:
        steps = steps_of(model, WRITTEN)
        inputs, dims = example(model, steps)
        config = limits(steps, inputs)
        module = module_of(steps)
        with torch.no_grad():
            made = module(**inputs)
    except SourceError as error:
        raise SourceError(error.what, where=str(path), hint=error.hint) from error
    processor = None
    place = tokenizer if tokenizer is not None else _beside(path, inputs)
    if place is not None:
        settings = place / "config.json"
        config |= read_config(place) if settings.exists() else {}
        processor = Processor(place, config, tuple(inputs))
    return Source(
        modules={"main": module},
        inputs={"main": inputs},
        dims={"main": dims},
        kind="module" if processor is None else _kind_of_outputs(made),
        name=path.stem,
        digest=foreign.digest(path, proto),
        processor=processor,
        directory=place,
        files=tuple(copied_files(place)) if place is not None else (),
        file=path,
    )


def _beside(path: Path, inputs: Mapping[str, Tensor]) -> Path | None:
    """The directory near a file whose files make inputs of texts or pictures; None where there is none."""
    wanted: list[str] = []
    if "input_ids" in inputs:
        wanted += ["tokenizer*", "vocab*", "spiece.model", "sentencepiece*"]
    if "pixel_values" in inputs:
        wanted.append("preprocessor_config.json")
    for place in (path.parent, path.absolute().parent.parent):
        if any(any(place.glob(pattern)) for pattern in wanted):
            return place
    return None


def _kind_of_outputs(made: Mapping[str, Tensor]) -> str:
    """classifier, encoder or module, from what a model gives."""
    if "logits" in made:
        return "classifier" if made["logits"].dim() == 2 else "module"
    is_encoder = any(v.dim() == 3 and v.is_floating_point() for v in made.values())
    return "encoder" if is_encoder else "module"


def task_of(path: Path) -> str | None:
    """The task that a directory is a checkpoint of; None for any other directory, and for none."""
    file = path / "config.json"
    if not file.is_file():
        return None
    config = bounded.read_json(file, SourceError)
    own = tasks.own_of(config, path) if isinstance(config, dict) else None
    return None if own is None else str(own["task"])


def from_encoder(path: Path, word: str, settings: Mapping[str, Any]) -> Source:
    """A model of a task that is to be trained, over the encoder of a transformers directory. Raises SourceError."""
    kind = TASKS[word]
    config = read_config(path)
    if tasks.own_of(config, path) is not None:
        raise SourceError(
            f"{path} is a model of a task already, not an encoder",
            hint=f"source: {{task: {word}, checkpoint: {path}}}",
        )
    model, _ = _load_model(path, config, False)
    task = kind(path, config, {"settings": dict(settings)})
    digest = hashlib.sha256(f"{directory_digest(path)} {task.own()}".encode()).hexdigest()
    return _of_task(task, getattr(model, "base_model", model), digest, is_trained=False)


def from_checkpoint(path: Path, word: str) -> Source:
    """A trained model of a task, as `effc tune` writes it. Raises SourceError, saying what is wrong."""
    config = read_config(path)
    task = tasks.opened(path, config)
    if task.word != word:
        raise SourceError(
            f"{path} is of the task {task.word}, not of {word}",
            hint=f"source: {{task: {task.word}, checkpoint: {path}}}",
        )
    file = path / WEIGHTS
    if not file.is_file():
        raise _no_weights(path)
    _check_weights(path, config)
    import transformers

    plain = {key: value for key, value in config.items() if key != tasks.KEY}
    try:
        made = transformers.AutoConfig.for_model(**plain)
        encoder = transformers.AutoModel.from_config(made, trust_remote_code=False)
        source = _of_task(
            task, encoder, directory_digest(path, (WEIGHTS, "config.json")), is_trained=True
        )
        source.module.load_state_dict(load_file(file))
    except EffcError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"the model in {path} does not load: {first_line(error)}",
            hint="config.json and model.safetensors must be as `effc tune` wrote them",
        ) from error
    check_finite(source.module)
    return source


def check_settings(place: Path, settings: Mapping[str, Any]) -> None:
    """Raise TuneError where the model of a task in a checkpoint was trained with other settings."""
    config = read_config(place)
    task = tasks.opened(place, config)
    asked = type(task)(place, config, {"settings": dict(settings)}).chosen()
    if asked != (held := task.chosen()):
        word = next(word for word in asked if asked[word] != held.get(word))
        raise TuneError(
            f"{place} was trained with {word}: {held.get(word)}, and the recipe asks for {asked[word]}",
            hint="run `effc tune` on this recipe again",
        )


WEIGHTS = "model.safetensors"


def _of_task(task: tasks.Task, encoder: nn.Module, digest: str, *, is_trained: bool) -> Source:
    """A source of a task over an encoder, whose pooler nobody reads."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # type: ignore[assignment]
    model = task.model(_plain(encoder)).eval()
    rows, length = tasks.EXAMPLE
    feeds = task.shaped(
        rows, length, np.arange(3, 3 + length) % whole(task.config, "vocab_size", 1)
    )
    own = {**task.config, tasks.KEY: task.own()}
    config = json.dumps(own, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    texts = {**task.texts(), "config.json": config}
    files = tuple(sorted({*copied_files(task.directory), "config.json"}))

    def kept(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        state = {**model.state_dict(), **tensors}
        if strange := sorted(state.keys() - model.state_dict().keys()):
            raise TuneError(
                f"what was trained is more than the model of the task: {strange[0]}",
                hint="train the model by itself first, and let the other passes follow on its checkpoint",
            )
        plain = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
        found = {name: (task.directory / name).read_bytes() for name in files if name not in texts}
        return {**found, **{n: t.encode() for n, t in texts.items()}, WEIGHTS: save(plain)}

    return Source(
        modules={"main": model},
        inputs={"main": {name: torch.from_numpy(value) for name, value in feeds.items()}},
        dims={"main": task.dims},
        kind=f"task:{task.word}",
        name=_name(task.directory),
        digest=digest,
        processor=task,
        directory=task.directory,
        files=files,
        texts=texts,
        kept=None if is_trained else kept,
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, checked for what effc needs and refuses."""
    if not os.path.isdir(path):
        raise SourceError(
            f"there is no directory {paths.word(str(path))}",
            hint="give a transformers directory, or module:factory for a model of your own",
        )
    file = path / "config.json"
    if not file.exists():
        raise SourceError(f"{path} has no config.json", hint="give a transformers model directory")
    _refuse_special(path)
    config = bounded.read_json(file, SourceError)
    if not isinstance(config, dict):
        raise SourceError(f"{file} holds no settings", hint=bounded.HINT)
    if "auto_map" in config:
        raise SourceError(
            f"{path} wants to run code of its own (auto_map)",
            hint="effc runs no code from a model directory; use module:factory with code that you trust",
        )
    for key, value in _settings(config):
        if key.endswith("_implementation") and value not in (None, "", "eager", "sdpa"):
            raise SourceError(
                f"{file} asks for {key}: {str(value)[:60]}, which is code from elsewhere",
                hint=f"take {key} out of it; the engine has kernels of its own",
            )
    if config.get("quantization_config") is not None:
        raise SourceError(
            f"the weights in {path} are quantised already (quantization_config)",
            hint="give the model as it was trained; effc quantises it",
        )
    if (path / "adapter_config.json").exists():
        raise SourceError(
            f"{path} holds an adapter of another model (adapter_config.json)",
            hint="name its base as the source, and the adapter in a pass: {pass: attach-lora, adapter: DIR}",
        )
    return config


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All settings that are no mapping, those of models inside the model too."""
    for key, value in config.items():
        if isinstance(value, dict) and not key.endswith("_implementation"):
            yield from _settings(value)
        else:
            yield key, value


def _refuse_special(path: Path) -> None:
    """Raises SourceError for a pipe or a device in a model directory: whoever opens it waits, or reads for ever."""
    for file in sorted(path.iterdir()):
        try:
            mode = file.stat().st_mode
        except OSError:  # a link to nowhere is as good as no file
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise SourceError(
                f"{file} is not a plain file", hint="move it out of the model directory"
            )


def _check_weights(path: Path, config: Mapping[str, Any]) -> None:
    """Weights are plain files with tensors enough, and the names in an index lead nowhere but into the directory.

    transformers makes all layers of config.json before it looks for their weights, however many they are.
    """
    tensors = 0
    for file in sorted(path.glob("*.safetensors")):
        paths.plain(file, SourceError).close()
        try:
            with safe_open(file, framework="numpy") as weights:
                tensors += len(weights.keys())
        except Exception as error:
            raise SourceError(
                f"{file} does not load: {first_line(error)}",
                hint="it is damaged or cut short; get a whole copy",
            ) from error
    _check_layers(
        path, config, tensors, f"the weights have {tensors} tensors",
        "config.json and the weights are of two models",
    )  # fmt: skip
    for index in sorted(path.glob("*.safetensors.index.json")):
        _check_index(path, index)


def _check_index(path: Path, index: Path) -> None:
    content = bounded.read_json(index, SourceError)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        raise SourceError(f"{index} has no `weight_map` of file names", hint=bounded.HINT)
    for name in sorted(set(shards.values())):
        paths.parts(name, SourceError)
        if not (path / name).is_file():
            raise SourceError(
                f"{index} names {paths.shown(name)}, which is not there",
                hint="put all files of the weights into the directory",
            )


def _check_layers(path: Path, config: Mapping[str, Any], most: int, reason: str, hint: str) -> None:
    """Raises SourceError where config.json asks for more than `most` layers, all of which would be made."""
    for key, value in _settings(config):
        for count in value if isinstance(value, list) else [value]:
            if _LAYERS.fullmatch(key) and isinstance(count, int) and count > most:
                raise SourceError(
                    f"{path / 'config.json'} says {key}: {count}, and {reason}", hint=hint
                )


def _download(name: Path) -> Path:
    """A hub id as a local directory: safetensors and settings only. The one place that uses the network.

    A name in a directory that is here is a mistyped path, and the hub is not asked for it.
    """
    if os.path.isdir(name.parent):
        near = nearest(name.name, [p.name for p in name.parent.iterdir() if p.is_dir()])
        raise SourceError(
            f"there is no directory {name}",
            hint=f"did you mean {name.parent / near}?"
            if near
            else f"{name.parent} is a directory here, so the hub is not asked",
        )
    log.warning("there is no directory %s: looking for it on the hub", name)
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", *(f"*{end}" for end in TEXTS), *(f"{n}*" for n in LICENCES)]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:
        raise SourceError(
            f"there is no directory {name}, and the hub cannot be reached for it: {first_line(error)}",
            hint="give a local directory",
        ) from error


def _name(path: Path) -> str:
    """A directory's name; in the cache of the hub the model's, since the directory is called by a hash."""
    path = path.resolve()
    if path.parent.name == "snapshots":
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def _load_model(path: Path, config: Mapping[str, Any], shapes: bool) -> tuple[nn.Module, list[str]]:
    """The model in evaluation mode, and the weights that its pooler came without."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise SourceError(
            f"{path}/config.json names no architectures", hint="add the class to load"
        )
    has_weights = any(path.glob("*.safetensors"))
    if has_weights:
        _check_weights(path, config)
    else:
        if not shapes or _pickles(path):
            raise _no_weights(path)
        _check_layers(
            path, config, MOST_LAYERS, f"without weights {MOST_LAYERS} are the most",
            "put the weights beside it",
        )  # fmt: skip
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, names[0], None)
    if kind is None:
        known = [n for n in dir(transformers) if "For" in n or n.endswith("Model")]
        raise SourceError(unknown("architecture", names[0], known))
    if pools(path):
        kind = transformers.AutoModel  # token vectors are pooled: the head is not read
    if config.get("is_encoder_decoder"):
        raise SourceError(
            f"{names[0]} is an encoder with a decoder, which has no single graph",
            hint="compile its parts by module:factory",
        )
    if not has_weights:
        return _without_weights(path, kind), []
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
        if "ignore_mismatched_sizes" in str(error):
            raise SourceError(
                f"{path}: the weights have other shapes than config.json says",
                hint="config.json and the weights are of two models",
            ) from error
        raise SourceError(
            f"{names[0]} does not load from {path}: {first_line(error)}",
            hint="config.json and the weights must be whole and of one model; --debug shows more",
        ) from error
    missing = sorted(info["missing_keys"])
    if any(not key.startswith("pooler.") for key in missing):
        raise _lacks(path, model, missing)
    if info["mismatched_keys"]:
        key = str(sorted(map(str, info["mismatched_keys"]))[0])
        raise SourceError(
            f"{path}: the shape of {key} differs from config.json",
            hint="config.json and the weights are of two models",
        )
    check_finite(model)
    return _plain(model), missing


def _pickles(path: Path) -> list[str]:
    return [p.name for pattern in _PICKLES for p in sorted(path.glob(pattern))]


def _no_weights(path: Path) -> SourceError:
    if pickles := _pickles(path):
        return SourceError(
            f"{path} has its weights only as pickle ({pickles[0]}), which can run code when read",
            hint="convert it where you trust it: model.save_pretrained(DIR, safe_serialization=True)",
        )
    return SourceError(
        f"{path} has no weights (*.safetensors)",
        hint="put model.safetensors there; only --plan does without",
    )


def _without_weights(path: Path, kind: Any) -> nn.Module:
    """The model of a config.json, its tensors of shapes alone."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            made = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    except Exception as error:
        raise SourceError(
            f"{path / 'config.json'} describes no model: {first_line(error)}",
            hint="it must be whole; --debug shows more",
        ) from error
    return _plain(made.float())


def _plain(model: Any) -> nn.Module:
    """The model for use, without outputs that nobody asked for."""
    for name in ("use_cache", "output_attentions", "output_hidden_states"):
        if getattr(model.config, name, None):
            setattr(model.config, name, False)
    made: nn.Module = model.eval()
    return made


def _lacks(path: Path, model: nn.Module, missing: Sequence[str]) -> SourceError:
    return SourceError(
        f"{path} lacks weights that {type(model).__name__} needs: {', '.join(missing[:3])}"
        + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
        hint="config.json's `architectures` must name the class that was trained",
    )


def check_finite(model: nn.Module) -> None:
    """Raises SourceError naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SourceError(
                f"weights hold values that are not numbers: {name}",
                hint="the file is damaged, or training went wrong; take an earlier checkpoint",
            )


def _example(
    config: Mapping[str, Any], model: nn.Module, processor: Processor
) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Example inputs under the names that the outside world uses, and their free dimensions."""
    accepted = set(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    draw = torch.Generator().manual_seed(0)
    if main == "pixel_values":
        shape = (EXAMPLE_BATCH, whole(config, "num_channels", 3), *processor.image_size())
        pixels = torch.rand(shape, generator=draw) * 2 - 1
        return {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}
    if main != "input_ids":
        raise SourceError(
            f"{type(model).__name__} takes {main}, which effc has no reader for",
            hint="use module:factory, which gives its own example inputs",
        )
    names = ["input_ids", "attention_mask"]
    types = whole(config, "type_vocab_size", 0)
    if types > 0:
        asked = processor.tokenizer.model_input_names if processor.has_tokenizer else []
        if "token_type_ids" in asked or (not asked and types > 1):
            names.append("token_type_ids")
    names = [name for name in names if name in accepted]
    text = (EXAMPLE_BATCH, EXAMPLE_LENGTH)
    values = {
        "input_ids": torch.randint(
            3, max(4, whole(config, "vocab_size", 1000)), text, generator=draw
        ),
        "attention_mask": torch.ones(text, dtype=torch.int64),
        "token_type_ids": torch.zeros(text, dtype=torch.int64),
    }
    return {n: values[n] for n in names}, {n: {0: "batch", 1: "sequence"} for n in names}


def _outputs(
    path: Path,
    config: Mapping[str, Any],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    missing: Sequence[str],
) -> tuple[str, ...]:
    """Outputs to keep; all where empty. A pooler that nobody trained or reads is dropped."""
    is_headed = kind_of(config) in ("classifier", "causal-lm")
    if is_of_shapes(model):  # it does not run by itself: here and there it looks at values
        has: tuple[str, ...] = (
            ("logits",) if is_headed and not pools(path) else ("last_hidden_state",)
        )
    else:
        has = _output_names(model, inputs)
    if missing and "last_hidden_state" not in has:  # the head reads the pooler
        raise _lacks(path, model, missing)
    if pools(path) and "last_hidden_state" not in has:
        raise SourceError(
            f"{path} pools token vectors (modules.json), and {type(model).__name__} gives {', '.join(has)}",
            hint=f"name the class that gives `last_hidden_state` in config.json's `architectures`: "
            f"{type(getattr(model, 'base_model', model)).__name__}, it seems",
        )
    if missing or pools(path):
        return ("last_hidden_state",)
    return ("logits",) if is_headed and "logits" in has else ()


def _output_names(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[str, ...]:
    try:
        with torch.no_grad():
            made = model(**inputs)
    except Exception as error:
        raise SourceError(
            f"{type(model).__name__} does not run on example inputs: {first_line(error)}",
            hint="config.json may not be that of the weights; --debug shows where it stopped",
        ) from error
    return tuple(made) if isinstance(made, Mapping) else ()


def is_of_shapes(module: nn.Module) -> bool:
    """Whether the tensors of a module are shapes alone, without values."""
    return any(parameter.is_meta for parameter in module.parameters())


def copied_files(path: Path, patterns: Sequence[str] = COPIED) -> list[str]:
    """Relative names of the files that travel with the engine: settings and texts, no weights and no code.

    Raises SourceError for a link that leads out of the directory. In the cache of the hub, whose snapshots are links,
    it may lead into a directory `blobs` of that cache.
    """
    root = path.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        model = root.parent.parent
        homes += [model / "blobs", model.parent / "blobs"]
    found: set[str] = set()
    for pattern in patterns:
        for file in path.glob(pattern):
            licence = not file.suffix and file.name.startswith(LICENCES)
            if not file.is_file() or not (licence or file.suffix in TEXTS):
                continue
            target = file.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                raise SourceError(
                    f"{file} is a link out of the model directory, to {target}",
                    hint="put the file itself there",
                )
            name = file.relative_to(path).as_posix()
            paths.parts(name, SourceError)  # a package may hold no other
            found.add(name)
    if pair := paths.twins(found):
        raise SourceError(
            f"{pair[0]} and {pair[1]} of {path} are one file on some systems",
            hint="rename one of the two",
        )
    return sorted(found)


def directory_digest(path: Path, patterns: Sequence[str] = ("*.safetensors", "config.json")) -> str:
    """sha256 over the weights and config.json, by name."""
    total = hashlib.sha256()
    for file in sorted(file for pattern in patterns for file in path.glob(pattern)):
        total.update(file.relative_to(path).as_posix().encode())
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
    except EffcError:
        raise
    except Exception as error:
        raise SourceError(
            f"{word} failed: {type(error).__name__}: {first_line(error)}",
            hint="--debug shows where in your code",
        ) from error
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        made = Source(modules={"main": made[0]}, inputs={"main": made[1]})
    if not isinstance(made, Source):
        raise SourceError(
            f"{word} returned {type(made).__name__}",
            hint="return effc.Source(...) or (module, inputs)",
        )
    try:
        made = _checked(made)
    except EffcError as error:
        raise SourceError(error.what, where=f"what {word} returned", hint=error.hint) from error
    name = made.name if made.name != "model" else attribute
    return dataclasses.replace(made, name=name, digest=made.digest or _module_digest(made.modules))


def _checked(source: Source) -> Source:
    """A source with all its inputs as tensors by name. Raises SourceError where a part has another form."""
    modules = source.modules
    is_mapping = isinstance(modules, Mapping) and bool(modules)
    if not is_mapping or not all(isinstance(m, nn.Module) for m in modules.values()):
        raise SourceError(f"modules is {_form(modules)}", hint='modules={"main": module}')
    for module in modules.values():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            _check_tensor(name, tensor, "module")
        check_finite(module)
    inputs = _inputs(modules, source.inputs)
    _check_dims(source.dims, inputs)
    outputs = _outputs_by_role(source.outputs, inputs)
    if source.batches is not None and not callable(source.batches):
        raise SourceError(
            f"batches is {_form(source.batches)}", hint="a function that gives batches each time"
        )
    if source.metric is not None and not hasattr(source.metric, "measure"):
        raise SourceError(
            f"metric is {_form(source.metric)}, not a metric",
            hint="give an object of effc.metrics, or name it by --metric NAME:FILE",
        )
    if source.scheduler is not None:
        source = _sampled(source, inputs)
    return dataclasses.replace(source, inputs=inputs, outputs=outputs)


def _sampled(source: Source, inputs: Mapping[str, Mapping[str, Tensor]]) -> Source:
    """A source that has a denoiser and settings of a sampler. Raises SourceError where it has not."""
    assert source.scheduler is not None
    schedule.sampler(source.scheduler, 1)
    role = diffusion.denoiser(tuple(inputs))
    if lacks := {diffusion.SAMPLE, diffusion.TIMESTEP} - set(inputs[role]):
        raise SourceError(
            f"the source has a scheduler, and {role} takes no {sorted(lacks)[0]!r}",
            hint="a denoiser is called with sample [batch, channels, height, width] and timestep [1] or [batch]",
        )
    return dataclasses.replace(source, kind=diffusion.KIND)


def _form(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = (f"{key!r}: {type(part).__name__}" for key, part in value.items())
        return "{" + ", ".join(inner) + "}"
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def _inputs(modules: Mapping[str, nn.Module], inputs: Any) -> dict[str, dict[str, Tensor]]:
    """{role: {name: tensor}}, from tensors or arrays that are named, or stand in the order of forward's parameters."""
    if not isinstance(inputs, Mapping) or set(inputs) != set(modules):
        form = ", ".join(f'"{role}": {{name: tensor}}' for role in modules)
        raise SourceError(
            f"inputs is {_form(inputs)}, not one mapping for each role ({', '.join(modules)})",
            hint=f"inputs={{{form}}}",
        )
    found = {}
    for role, module in modules.items():
        given = inputs[role]
        if isinstance(given, Mapping):
            tensors: Any = {name: _tensor(name, value) for name, value in given.items()}
        elif isinstance(given, list | tuple):
            tensors = [_tensor(str(place), value) for place, value in enumerate(given)]
        else:
            tensors = _tensor("0", given)
        found[role] = named_inputs(module, tensors)
        try:
            inspect.signature(module.forward).bind(**found[role])
        except TypeError as error:
            raise SourceError(
                f"forward of {type(module).__name__} does not take these inputs: {error}",
                hint=f"it takes {inspect.signature(module.forward)}",
            ) from error
    return found


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        raise SourceError(
            f"input {name!r} is {_form(value)}, not a tensor", hint="give a tensor or an array"
        )
    _check_tensor(f"input {name!r}", value, "tensor")
    return value.detach()


def _check_tensor(name: str, tensor: Tensor, what: str) -> None:
    if tensor.is_floating_point() and tensor.element_size() < 4:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise SourceError(
            f"{name} is {dtype}, and targets take float32", hint=f"return the {what} as .float()"
        )
    if tensor.device.type != "cpu":
        raise SourceError(
            f"{name} is on {tensor.device}, not on the CPU", hint=f"return the {what} as .cpu()"
        )


def _check_dims(dims: Any, inputs: Mapping[str, Mapping[str, Tensor]]) -> None:
    hint = 'dims={"main": {"x": {0: "batch"}}}'
    for role, named in _by_role("dims", dims, inputs, hint):
        if not isinstance(named, Mapping):
            raise SourceError(f"dims of {role!r} is {_form(named)}", hint=hint)
        for name, axes in named.items():
            if name not in inputs[role]:
                raise SourceError(f"dims: {unknown('input', str(name), inputs[role])}", hint=hint)
            if not isinstance(axes, Mapping):
                raise SourceError(f"dims of {name!r} is {_form(axes)}", hint=hint)
            for axis, word in axes.items():
                if not isinstance(axis, int) or not 0 <= axis < inputs[role][name].dim():
                    raise SourceError(
                        f"dims: {name!r} has shape {list(inputs[role][name].shape)}, and no axis {axis!r}",
                        hint=hint,
                    )
                if not isinstance(word, str) or not word:
                    raise SourceError(f"dims: {word!r} is no name of a dimension", hint=hint)


def _outputs_by_role(outputs: Any, inputs: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    hint = 'outputs={"main": ("logits",)}'
    found = {}
    for role, names in _by_role("outputs", outputs, inputs, hint):
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise SourceError(f"outputs of {role!r} is {_form(names)}, not names", hint=hint)
        found[role] = tuple(names)
    return found


def _by_role(
    part: str, value: Any, roles: Mapping[str, Any], hint: str
) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        raise SourceError(f"{part} is {_form(value)}", hint=hint)
    for role in value:
        if role not in roles:
            raise SourceError(f"{part}: {unknown('role', str(role), roles)}", hint=hint)
    return value.items()


def import_code(place: str) -> Any:
    """A module by dotted name or by path to a .py file. Only ever called with what the user typed."""
    try:
        if not place.endswith(".py"):
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not os.path.exists(path):
            raise SourceError(f"there is no file {place}", hint="file.py:function, from here")
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
        raise SourceError(
            f"{place} cannot be imported: {type(error).__name__}: {error}",
            hint="--debug shows where in your code",
        ) from error


def _module_digest(modules: Mapping[str, nn.Module]) -> str:
    total = hashlib.sha256()
    for role, module in sorted(modules.items()):
        total.update(role.encode())
        for name, tensor in sorted(module.state_dict().items()):
            total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            total.update(flat.numpy().tobytes())
    return total.hexdigest()
