"""A recipe: YAML at the border, frozen dataclasses inside.

Unknown keys are refused with the nearest known word, and every error names its path (`passes[1].bits`) and line.
A section that decides quality has no silent default: passes that measure must be told with what data.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from effc import bounded, metrics, peers
from effc.backends import TARGETS
from effc.backends.dialect import DIALECTS
from effc.backends.options import OPTIONS
from effc.errors import PreconditionError, RecipeError, UsageError
from effc.machine import default_threads
from effc.passes import PASSES
from effc.passes.base import Pass, of_files
from effc.source import import_code
from effc.table import nearest, unknown
from effc.tasks import TASKS

VERSION = 1
MOST_BYTES, MOST_VALUES = 1 << 18, 10_000
"""Of a recipe, aliases written out; more is no recipe."""
QUANTIZE_WORDS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "int8": {"pass": "quantize", "bits": 8, "activation_bits": 8},
    "w8a8": {"pass": "quantize", "bits": 8, "activation_bits": 8},
    "w6a6": {"pass": "quantize", "bits": 6, "activation_bits": 6},
    "w4a8": {"pass": "quantize", "bits": 4, "activation_bits": 8, "weight_range": "mse"},
    "w8a16": {"pass": "quantize", "bits": 8, "activation_bits": 16, "group": 32},
    "w4a16": {
        "pass": "quantize", "bits": 4, "activation_bits": 16, "group": 32, "weight_range": "mse",
    },
    "w4a16-gptq": {
        "pass": "quantize", "bits": 4, "activation_bits": 16, "group": 32, "weight_range": "mse",
        "rounding": "gptq",
    },
    "w4a16-awq": {
        "pass": "quantize", "bits": 4, "activation_bits": 16, "group": 32, "weight_range": "mse",
    },
    "fp8": {"pass": "quantize", "dtype": "fp8"},
    "fp16": {"pass": "mixed-precision", "dtype": "fp16"},
    "bf16": {"pass": "mixed-precision", "dtype": "bf16"},
}  # fmt: skip
"""What `--quantize` may say, and the pass that it stands for."""
IN_FRONT: dict[str, dict[str, Any]] = {"w4a16-awq": {"pass": "awq", "bits": 4, "group": 32}}
"""What goes in front of the pass of a word."""


def passes_of(word: str, targets: Sequence[str], *, checks: bool = False) -> list[Any]:
    """What a word for `--quantize` stands for. Where all targets want it, what stays in float is in 16 bit.

    `checks` says that there are data to see by what does not fit into fp16.
    """
    rests = {DIALECTS[target].rest if target in DIALECTS else None for target in targets}
    rest = rests.pop() if len(rests) == 1 else None
    chosen = QUANTIZE_WORDS[word]
    wanted = [chosen]
    if rest is not None and (chosen is None or chosen["pass"] == "quantize"):
        wanted.append(QUANTIZE_WORDS[rest])
    passes: list[Any] = [pass_ for pass_ in wanted if pass_ is not None]
    if checks:
        passes = [{**p, "check_range": True} if p.get("dtype") == "fp16" else p for p in passes]
    if chosen is not None and chosen.get("activation_bits", 16) != 16:
        passes.insert(0, "smooth")
    if word in IN_FRONT:
        passes.insert(0, IN_FRONT[word])
    return passes


Count = Annotated[int, Field(ge=1)]
WORDS = ("transformers", "diffusers", "gguf", "onnx", "python", "task")
"""Where a model may come from."""
BESIDE = ("intuition", "embedder")
"""What a source names beside the model."""
OF_FILE = ("tokenizer",)
"""What makes inputs for a model that is a file."""
OF_TASK = ("encoder", "checkpoint")
"""What the model of a task is: untrained over an encoder, or trained."""
NAMED = (*OF_TASK, *BESIDE, *OF_FILE)
PLACES = (*(word for word in WORDS if word not in ("python", "task")), *NAMED)
"""Words of a source that name a file or a directory."""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where the model comes from: one of the words, with options for a factory or a task.

    `cache` says whether a causal language model of a directory takes and gives its keys and values; `roles`, prefill
    and decode, makes two graphs of it. `pixels` uint8 has a model of pictures take bytes and scale them itself.
    `intuition`, a file of centroids, has a model take what requests are about, which `embedder`, a directory of a
    sentence encoder, works out for texts. `tokenizer` is the directory of what makes inputs for an ONNX file, where
    that is not beside it.
    """

    transformers: str | None = None
    diffusers: str | None = None
    gguf: str | None = None
    onnx: str | None = None
    python: str | None = None
    task: str | None = None
    encoder: str | None = None
    checkpoint: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    cache: bool = True
    roles: tuple[Literal["prefill"], Literal["decode"]] | None = None
    pixels: Literal["float", "uint8"] = "float"
    intuition: str | None = None
    embedder: str | None = None
    tokenizer: str | None = None

    def as_mapping(self) -> dict[str, Any]:
        named = {word: getattr(self, word) for word in (*WORDS, *NAMED)}
        given: dict[str, Any] = {k: v for k, v in named.items() if v is not None}
        if not self.cache:
            given["cache"] = False
        if self.roles is not None:
            given["roles"] = list(self.roles)
        if self.pixels != "float":
            given["pixels"] = self.pixels
        return {**given, **self.options}


@dataclass(frozen=True, kw_only=True)
class CalibSpec:
    """Samples that ranges are measured on: a file or folder, or `callable: module:function` giving batches.

    Of a diffusion model `trajectories` of its own sampler, of `steps` each, of which `keep` are shown, spread as `at`
    says; the file then holds prompts.
    """

    file: str | None = None
    callable: str | None = None
    column: str | int | None = None
    samples: Count = 128
    seed: int = 0
    batch: Count = 16
    max_length: Count | None = None
    trajectories: Count | None = None
    steps: Count = 20
    keep: Count | None = None
    at: Literal["uniform", "first", "middle", "last"] = "uniform"
    guidance: Annotated[float, Field(ge=0, le=1000)] | None = None
    correct: bool | Literal["mean"] = False
    """Give the sampler a table that puts right what the engine of the denoiser is off by: mean and share, or mean."""


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """Shapes to time as [batch, length] or [batch, length, past], on how many threads.

    Length and past are ignored by models without one.
    """

    shapes: tuple[tuple[Count, Count] | tuple[Count, Count, Count], ...] = (
        (1, 16), (1, 128), (8, 128), (1, 1, 128),
    )  # fmt: skip
    threads: Count | None = None
    budget_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 9.5
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, kw_only=True)
class MetricGate:
    """What a metric may lose: absolutely where higher is better, relatively where lower is (perplexity).

    0.005 and 0.02 where nothing is said.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """What an engine must meet to be shipped; `false` leaves a question out. `strict` refuses what cannot be told."""

    latency: Literal["not-slower", False] = "not-slower"
    metric: MetricGate | Literal[False] = field(default_factory=MetricGate)
    size: Literal["smaller", False] = False
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what comes out."""

    source: SourceSpec
    calib: CalibSpec | None = None
    passes: tuple[Pass, ...] = ()
    targets: tuple[str, ...] = ("ort",)
    target_options: Mapping[str, Any] = field(default_factory=dict)
    """What is asked of targets that have options, see `effc.backends.options`."""
    metric: str | None = None
    bench: BenchSpec | None = field(default_factory=BenchSpec)
    gate: GateSpec | None = field(default_factory=GateSpec)
    gate_asks: frozenset[str] = frozenset()
    """What the recipe's own gate asks for by name: where nobody measured that, it is a warning."""
    canonicalize: bool = True
    """Run the exact clean-up passes first."""
    plugins: tuple[str, ...] = ()
    text: str = ""
    """The recipe as YAML, in one canonical form."""

    def threads(self, given: int | None = None) -> int:
        """How many threads engines have: those given, else those of `bench`, else one for every core."""
        return given or (self.bench.threads if self.bench else None) or default_threads()

    def portable(self) -> str:
        """The recipe as it travels in a package: folders of this machine left out of its paths."""
        data = _without_folders(yaml.safe_load(self.text))
        for section, *keys in (
            ("source", *WORDS, *NAMED),
            ("calib", "file", "callable"),
        ):
            part = data.get(section) or {}
            part.update({key: Path(part[key]).name for key in keys if part.get(key)})
        data["source"] = _of_task_files(data["source"], lambda word: Path(word).name)
        for pass_ in data.get("passes") or ():
            if isinstance(pass_, dict):
                pass_.update(of_files(pass_, lambda word: Path(word).name))
        if self.metric is not None:
            data["metric"] = {Path(n).name: Path(file).name for n, file in data["metric"].items()}
        if self.plugins:
            data["plugins"] = [Path(p).name for p in self.plugins]
        return canonical(data)


_SECTIONS = (
    "effc",
    "source",
    "calib",
    "passes",
    "targets",
    "metric",
    "bench",
    "gate",
    "canonicalize",
    "plugins",
)


def read(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    replayed: bool = False,
    data_place: Path | None = None,
) -> Recipe:
    """A recipe file. Relative paths in it are relative to it. Raises RecipeError with path and line.

    Files are looked for in `data_place` first.
    """
    text = bounded.text_of(path, RecipeError, MOST_BYTES)
    return parse(
        text, name=str(path), base=path.parent, overrides=overrides, replayed=replayed,
        data_place=data_place,
    )  # fmt: skip


def parse(
    text: str,
    *,
    name: str = "recipe",
    base: Path | None = None,
    overrides: Sequence[str] = (),
    replayed: bool = False,
    data_place: Path | None = None,
) -> Recipe:
    """A recipe from YAML text; `overrides` are `passes.0.bits=6`.

    Where decisions are `replayed` nothing is measured, and passes that measure need no calibration data.
    """
    node, data = load_yaml(text, name)
    if not isinstance(data, dict):
        raise RecipeError(f"{name} is not a mapping of sections", hint="see docs/recipes.md")
    for override in overrides:
        _override(data, override)
    return _Reader(name, node, base, data_place).recipe(data, replayed)


def build(data: dict[str, Any], *, overrides: Sequence[str] = (), replayed: bool = False) -> Recipe:
    """A recipe from plain values: what the flags of the command line make."""
    data = copy.deepcopy(data)
    for override in overrides:
        _override(data, override)
    return _Reader("the command line", None, None).recipe(data, replayed)


def without_bench(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, bench=None)


def load_yaml(text: str, name: str) -> tuple[yaml.Node | None, Any]:
    """YAML as nodes, which know their lines, and as values."""
    try:
        node, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{name}{line} is not YAML: {getattr(error, 'problem', error)}",
            hint="docs/recipes.md has an example with everything in it",
        ) from error
    if node is not None:
        _refuse_growth(node, name)
        _refuse_twins(node, name)
    return node, data


def _refuse_growth(root: yaml.Node, name: str) -> None:
    """A few aliases of aliases stand for more values than fit into memory, and one may stand in itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MOST_VALUES + 1  # for who meets it again on the way down
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            pairs = [part if isinstance(part, tuple) else (part,) for part in parts]
            sizes[id(node)] = 1 + sum(size(inner) for pair in pairs for inner in pair)
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise RecipeError(
            f"{name} holds more than {MOST_VALUES} values, or an alias that stands in itself",
            hint="write it without aliases",
        )


_ODD = {f"tag:yaml.org,2002:{word}" for word in ("binary", "set", "omap", "pairs")}


def _refuse_twins(root: yaml.Node, name: str) -> None:
    """Of two keys that are the same PyYAML would take the last without a word, and of `!!binary` it makes bytes."""
    todo: list[tuple[tuple[Any, ...], yaml.Node]] = [((), root)]
    seen = set()
    while todo:
        place, node = todo.pop()
        if id(node) in seen:  # an alias, perhaps to what it stands in
            continue
        seen.add(id(node))
        if node.tag in _ODD:
            raise RecipeError(
                f"{_dotted(place)}: a recipe holds no {node.tag.rpartition(':')[2]}",
                where=f"line {node.start_mark.line + 1} of {name}",
                hint="write text, numbers, lists and mappings",
            )
        if isinstance(node, yaml.SequenceNode):
            todo += [((*place, i), item) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                if (key.tag, key.value) in keys:
                    raise RecipeError(
                        f"{_dotted((*place, key.value))}: stands here for the second time",
                        where=f"line {key.start_mark.line + 1} of {name}",
                        hint="keep one of the two",
                    )
                keys.add((key.tag, key.value))
                todo.append(((*place, key.value), value))


def _override(data: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    *parents, last = path.split(".")
    if not equals or not all((*parents, last)):
        raise UsageError(f"--set {text!r} is not PATH=VALUE", hint="--set passes.0.bits=6")
    _, new = load_yaml(value, f"--set {path}")
    place: Any = data
    try:
        for part in parents:
            place = place[_index(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[_index(last) if isinstance(place, list) else last] = new
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"--set {path}: the recipe has no such place",
            hint="passes.0.bits is a place where the first pass is a mapping",
        ) from error


def _index(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is no place in a list")
    return int(text)


class _Reader:
    """Turns plain values into a recipe, remembering where each stood."""

    def __init__(
        self, name: str, node: yaml.Node | None, base: Path | None, data_place: Path | None = None
    ) -> None:
        self.name, self.node, self.base, self.data_place = name, node, base, data_place

    def recipe(self, data: dict[str, Any], replayed: bool) -> Recipe:
        self._known(data, _SECTIONS, ())
        if data.get("effc", VERSION) != VERSION:
            raise self._error(
                ("effc",), f"this is a recipe of version {data['effc']!r}; effc reads {VERSION}"
            )
        if "source" not in data:
            raise self._error((), "a recipe needs a source", hint="source: {transformers: DIR}")
        plugins = self._strings(data.get("plugins", []), "plugins")
        for plugin in plugins:
            import_code(self._path(plugin) if plugin.endswith(".py") else plugin)
        metric = self._metric(data.get("metric"))
        data = self._resolve_paths({**data, "metric": metric} if metric else data)
        targets = self._targets(data.get("targets", ["ort"]))
        recipe = Recipe(
            source=self._source(data["source"]),
            calib=self._calib(data.get("calib")),
            passes=tuple(
                self._pass(p, i) for i, p in enumerate(self._list(data.get("passes"), "passes"))
            ),
            targets=tuple(targets),
            target_options={word: asked for word, asked in targets.items() if asked is not None},
            metric=":".join(*data["metric"].items()) if metric else None,
            bench=self._bench(data),
            gate=self._gate(data),
            gate_asks=frozenset(data["gate"])
            if isinstance(data.get("gate"), dict)
            else frozenset(),
            canonicalize=self._flag(data.get("canonicalize", True), "canonicalize"),
            plugins=tuple(plugins),
            text=canonical(data),
        )
        if not replayed:
            self._check_measured(recipe)
        for i, pass_ in enumerate(recipe.passes):
            try:
                pass_.agrees(recipe.passes[i + 1 :])
            except PreconditionError as error:
                raise self._error(("passes", i), error.what, hint=error.hint) from error
        return recipe

    def _check_measured(self, recipe: Recipe) -> None:
        if recipe.calib is not None or recipe.source.python is not None:
            return  # a factory may bring batches of its own
        for i, pass_ in enumerate(recipe.passes):
            if pass_.measures:
                raise self._error(
                    ("passes", i),
                    f"{pass_.name} measures activations but the recipe names no calibration data",
                    hint="add `calib: {file: FILE}`, or --calib FILE",
                )

    def _source(self, value: Any) -> SourceSpec:
        made: SourceSpec = self._section(SourceSpec, value, ("source",))
        if [getattr(made, word) for word in WORDS].count(None) != len(WORDS) - 1:
            raise self._error(("source",), f"a source is one of {', '.join(WORDS)}")
        for word in BESIDE:
            if getattr(made, word) is not None and made.transformers is None:
                raise self._error(
                    ("source", word),
                    "is for a model directory of transformers",
                    hint="a factory's model can have an input `intuition` of its own",
                )
        asked = {"cache": not made.cache, "roles": made.roles, "pixels": made.pixels != "float"}
        for word in asked if made.onnx is not None else ():
            if asked[word]:
                raise self._error(
                    ("source", word),
                    "is for a model directory; an ONNX file is taken as it is",
                    hint="leave it out",
                )
        if made.tokenizer is not None and made.onnx is None:
            raise self._error(
                ("source", "tokenizer"),
                "is for an ONNX file; other models have theirs in their directory",
                hint="source: {onnx: model.onnx, tokenizer: DIR}",
            )
        if made.embedder is not None and made.intuition is None:
            raise self._error(
                ("source", "embedder"),
                "embeddings are scored by centroids, and none are named",
                hint="add `intuition: FILE`, which effc.intuition writes",
            )
        self._of_task(made)
        if made.options and made.python is None and made.encoder is None:
            raise self._error(
                ("source", "options"),
                "options are what a factory is called with; a model directory takes none",
                hint="leave them out, or name a factory: source: {python: module:function}",
            )
        if not made.cache and made.python is not None:
            raise self._error(
                ("source", "cache"),
                "a factory says itself what its model takes and gives",
                hint="leave it out",
            )
        for word in (*WORDS, *OF_TASK):
            if word in made.options:
                raise self._error(
                    ("source", "options", word),
                    f"{word!r} says where a model comes from, and cannot be an option",
                    hint="give the factory's argument another name",
                )
        try:
            json.dumps(made.options)
        except (TypeError, ValueError, RecursionError) as error:
            raise self._error(
                ("source", "options"), f"options are text, numbers, lists and mappings: {error}"
            ) from error
        return made

    def _of_task(self, made: SourceSpec) -> None:
        given = [word for word in OF_TASK if getattr(made, word) is not None]
        if made.task is None:
            if given:
                raise self._error(
                    ("source", given[0]),
                    "is of a task",
                    hint="source: {task: diaasq, encoder: DIR}",
                )
            return
        if made.task not in TASKS:
            raise self._error(("source", "task"), unknown("task", made.task, TASKS))
        if len(given) != 1:
            raise self._error(
                ("source",),
                "the model of a task is over an encoder or in a checkpoint: one of the two",
                hint="source: {task: diaasq, encoder: DIR}, and of a trained one {task: diaasq, checkpoint: CKPT}",
            )

    def _calib(self, value: Any) -> CalibSpec | None:
        if value is None:
            return None
        made: CalibSpec = self._section(CalibSpec, value, ("calib",))
        if [made.file, made.callable].count(None) != 1 and made.trajectories is None:
            raise self._error(("calib",), "calibration data is one of file, callable, trajectories")
        if made.trajectories is not None and made.callable is not None:
            raise self._error(
                ("calib", "callable"), "trajectories are drawn by the sampler", hint="leave it out"
            )
        if made.trajectories is None:
            for key in ("steps", "keep", "at", "guidance", "correct"):
                if key in value:
                    raise self._error(
                        ("calib", key), "is for trajectories", hint="trajectories: 64"
                    )
        return made

    def _flag(self, value: Any, name: str) -> bool:
        if not isinstance(value, bool):
            raise self._error((name,), f"{value!r} is not true or false")
        return value

    def _bench(self, data: Mapping[str, Any]) -> BenchSpec | None:
        value = data.get("bench", {})
        if value is False or value is None:
            return None
        made: BenchSpec = self._section(BenchSpec, value, ("bench",))
        return made

    def _gate(self, data: Mapping[str, Any]) -> GateSpec | None:
        value = data.get("gate", {})
        if value is False or value is None:
            return None
        made: GateSpec = self._section(GateSpec, value, ("gate",))
        if value.get("latency") and data.get("bench", {}) in (False, None):
            raise self._error(
                ("gate", "latency"),
                "the recipe asks for latency, and does not measure it",
                hint="leave `bench: false` out",
            )
        from_factory = isinstance(data["source"], dict) and "python" in data["source"]
        if value.get("metric") and data.get("metric") is None and not from_factory:
            raise self._error(
                ("gate", "metric"),
                "the recipe asks what the metric loses, and names no metric",
                hint="metric: {accuracy: FILE}",
            )
        return made

    def _targets(self, value: Any) -> dict[str, Any]:
        """Targets in order, each with its options where it was given any."""
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not words:
            raise self._error(("targets",), "targets is a list of words", hint="targets: [ort]")
        found: dict[str, Any] = {}
        for i, item in enumerate(words):
            place: tuple[Any, ...] = ("targets", i)
            word, asked = item, None
            if isinstance(item, dict) and len(item) == 1:
                ((word, asked),) = item.items()
                place = (*place, word)
            if not isinstance(word, str) or word not in TARGETS:
                told = peers.hint(str(word))
                raise self._error(place, unknown("target", str(word), TARGETS), hint=told)
            if isinstance(item, dict):
                if word not in OPTIONS:
                    raise self._error(
                        place, f"target {word} has no options", hint=f"targets: [{word}]"
                    )
                if (short := getattr(OPTIONS[word], "short", None)) and isinstance(asked, list):
                    asked = {short: asked}
                asked = self._section(OPTIONS[word], asked, place)
            if found.setdefault(word, asked) != asked:
                raise self._error(place, f"target {word} is asked for twice, with unlike options")
        return found

    def _metric(self, value: Any) -> dict[str, str] | None:
        if value is None:
            return None
        named = dict([metrics.split(value)]) if isinstance(value, str) else value
        if isinstance(named, dict) and len(named) == 1:
            ((name, file),) = named.items()
            if isinstance(name, str) and isinstance(file, str) and name and file:
                if not metrics.is_known(name):
                    raise self._error(("metric",), unknown("metric", name, metrics.METRICS))
                return {name: file}
        raise self._error(
            ("metric",), "a metric is one NAME: FILE", hint="metric: {accuracy: FILE}"
        )

    def _pass(self, value: Any, index: int) -> Pass:
        place = ("passes", index)
        if isinstance(value, str):
            value = {"pass": value}
        if not isinstance(value, dict) or "pass" not in value:
            raise self._error(place, "a pass is {pass: NAME, options …}")
        word = value["pass"]
        if not isinstance(word, str) or word not in PASSES:
            raise self._error((*place, "pass"), unknown("pass", str(word), PASSES))
        options = {k: v for k, v in value.items() if k != "pass"}
        made = self._section(PASSES[word], options, place, suffix=f"in {word}")
        assert isinstance(made, Pass)
        return made

    def _section(
        self, kind: type[Any], value: Any, place: tuple[Any, ...], suffix: str = ""
    ) -> Any:
        if not isinstance(value, dict):
            raise self._error(place, f"{_dotted(place)} is a mapping, not {value!r}")
        self._known(value, [f.name for f in dataclasses.fields(kind) if f.init], place)
        try:
            return adapter(kind).validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            inner = [p for p in first["loc"] if not _is_type_word(p)]
            if first["type"] == "unexpected_keyword_argument":
                if _is_type_word(key := first["loc"][-1]):
                    inner.append(key)
                what = unknown("key", str(inner[-1]), _fields_of(kind, inner[:-1]))
            else:
                what = _plain(first)
            raise self._error((*place, *inner), what, suffix=suffix) from error

    def _known(
        self, value: Mapping[Any, Any], known: Sequence[str], place: tuple[Any, ...]
    ) -> None:
        for key in value:
            if key not in known:
                raise self._error((*place, key), unknown("key", str(key), known), key=True)

    def _list(self, value: Any, name: str) -> list[Any]:
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._error((name,), f"{name} is a list")
        return value

    def _strings(self, value: Any, name: str) -> list[str]:
        items = self._list(value, name)
        for i, item in enumerate(items):
            if not isinstance(item, str):
                raise self._error((name, i), "a plugin is module or file.py")
        return items

    def _resolve_paths(self, data: dict[str, Any]) -> dict[str, Any]:
        """Relative paths of a recipe file become relative to where the command runs."""
        data = dict(data)
        for section, key, find in (
            *(("source", word, self._path) for word in PLACES),
            ("source", "python", self._code),
            ("calib", "file", self._path),
            ("calib", "callable", self._code),
        ):
            value = data.get(section)
            if isinstance(value, dict) and isinstance(value.get(key), str):
                data[section] = {**value, key: find(value[key])}
        data["source"] = _of_task_files(data["source"], self._path)
        if isinstance(data.get("passes"), list):
            data["passes"] = [self._beside(pass_) for pass_ in data["passes"]]
        if data.get("metric"):
            data["metric"] = {self._code(n): self._path(file) for n, file in data["metric"].items()}
        return data

    def _beside(self, pass_: Any) -> Any:
        """A pass with the files that its options name."""
        if not isinstance(pass_, dict):
            return pass_
        return of_files(pass_, self._path)

    def _code(self, text: str) -> str:
        """`file.py:function` is a path, `module:function` is none."""
        return self._path(text) if ".py:" in text else text

    def _path(self, text: str) -> str:
        path = Path(text)
        if not path.parts or path.is_absolute():
            return text
        places = [place for place in (self.data_place, self.base) if place is not None]
        for place in places:
            if os.path.exists(place / path):
                return str(place / path)
        first = path.parts[0]
        names = (first, first.rpartition("#")[0], first.rpartition(":")[0])
        for place in places:
            if any(name and os.path.exists(place / name) for name in names):
                return str(place / path)
        return text

    def _error(
        self,
        place: tuple[Any, ...],
        what: str,
        *,
        hint: str | None = None,
        suffix: str = "",
        key: bool = False,
    ) -> RecipeError:
        line = self._line(place, key=key)
        where = f"line {line} of {self.name}" if line else self.name
        dotted = _dotted(place)
        return RecipeError(
            f"{dotted}: {what}" if dotted else what,
            where=f"{suffix.removeprefix('in ')}, {where}" if suffix else where,
            hint=hint,
        )

    def _line(self, place: tuple[Any, ...], *, key: bool = False) -> int | None:
        node, line = self.node, None
        for part in place:
            found = None
            if isinstance(node, yaml.MappingNode):
                for name, value in node.value:
                    if name.value == str(part):
                        found, line = value, name.start_mark.line + 1
            elif (
                isinstance(node, yaml.SequenceNode)
                and isinstance(part, int)
                and part < len(node.value)
            ):
                found = node.value[part]
                line = found.start_mark.line + 1
            if found is None:
                break
            node = found
        return line


def _of_task_files(source: Any, place: Callable[[str], str]) -> Any:
    """A source with the files that options of its task name."""
    if not isinstance(source, dict):
        return source
    word, options = source.get("task"), source.get("options")
    if not isinstance(word, str) or word not in TASKS or not isinstance(options, dict):
        return source
    named = [n for n in TASKS[word].files if isinstance(options.get(n), str)]
    return {**source, "options": {**options, **{n: place(options[n]) for n in named}}}


def _without_folders(value: Any) -> Any:
    """The value with every absolute path in it cut to its last name."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and os.path.isabs(value):
        return Path(value).name or value
    return value


def adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """pydantic's reader for a dataclass, unknown keys refused."""
    return TypeAdapter(kind)


def canonical(data: Mapping[str, Any]) -> str:
    """The recipe as sorted YAML, the form that travels in a package."""
    text = yaml.safe_dump({"effc": VERSION, **data}, sort_keys=True, allow_unicode=True, width=110)
    return str(text)


def pass_schema() -> dict[str, Any]:
    """JSON Schema of every pass by its word."""
    schemas = {}
    for word in PASSES:
        schema = adapter(PASSES[word]).json_schema()
        schema.setdefault("properties", {})["pass"] = {"const": word}
        schema["required"] = ["pass", *schema.get("required", [])]
        schema["additionalProperties"] = False
        schemas[word] = schema
    return schemas


def schema() -> dict[str, Any]:
    """JSON Schema of a whole recipe file. Passes that it does not know are accepted where there are plugins."""
    passes = pass_schema()
    definitions: dict[str, Any] = {}
    for word, part in passes.items():
        definitions.update(part.pop("$defs", {}))
        definitions[word] = part
    sections = {}
    kinds = {"source": SourceSpec, "calib": CalibSpec, "bench": BenchSpec, "gate": GateSpec}
    for name, kind in kinds.items():
        section = adapter(kind).json_schema()
        definitions.update(section.pop("$defs", {}))
        section["additionalProperties"] = False
        sections[name] = section
    null, text = {"type": "null"}, {"type": "string", "minLength": 1}
    known = [{"enum": sorted(passes)}, *({"$ref": f"#/$defs/{word}"} for word in sorted(passes))]
    others = {"type": "string", "not": {"enum": sorted(passes)}}
    own = [others, {"type": "object", "required": ["pass"], "properties": {"pass": others}}]
    plain = {"enum": sorted(TARGETS)}
    asked = {}
    for word, kind in OPTIONS.items():
        section = {**adapter(kind).json_schema(), "additionalProperties": False}
        short = getattr(kind, "short", None)
        asked[word] = {"anyOf": [section, section["properties"][short]]} if short else section
    chosen = {"type": "object", "minProperties": 1, "maxProperties": 1}
    chosen |= {"properties": asked, "additionalProperties": False}
    targets = {"anyOf": [plain, chosen]}
    one = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": text}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "effc recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["source"],
        "properties": {
            "effc": {"const": VERSION},
            "source": sections["source"],
            "calib": {"anyOf": [sections["calib"], null]},
            "bench": {"anyOf": [sections["bench"], {"const": False}, null]},
            "gate": {"anyOf": [sections["gate"], {"const": False}, null]},
            "passes": {"type": ["array", "null"]},
            "targets": {"anyOf": [plain, {"type": "array", "minItems": 1, "items": targets}]},
            "metric": {"anyOf": [one, {"type": "string", "pattern": "^[^:]+:."}, null]},
            "canonicalize": {"type": "boolean"},
            "plugins": {"type": ["array", "null"], "items": {"type": "string"}},
        },
        "if": {
            "required": ["plugins"],
            "properties": {"plugins": {"type": "array", "minItems": 1}},
        },
        "then": {"properties": {"passes": {"items": {"anyOf": [*known, *own]}}}},
        "else": {"properties": {"passes": {"items": {"anyOf": known}}}},
        "$defs": definitions,
    }


def _dotted(place: Sequence[Any]) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _is_type_word(part: Any) -> bool:
    """Whether a step of pydantic's path names a branch of a union rather than a key."""
    return isinstance(part, str) and (
        part[:1].isupper()  # a dataclass; keys are small
        or part in ("str", "int", "float", "bool", "none")
        or "[" in part
        or "(" in part
    )


def _fields_of(kind: Any, path: Sequence[Any]) -> list[str]:
    """Names of the fields of the dataclass that lies at `path` inside `kind`."""
    for part in path:
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
        kind = next(
            (k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)), None
        )
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _plain(error: Any) -> str:
    """pydantic's complaint in our words."""
    kind, given = error["type"], error.get("input")
    context = error.get("ctx", {})
    if kind == "union_tag_invalid":
        given, context = context["tag"], {"expected": context["expected_tags"]}
    if kind in ("literal_error", "union_tag_invalid"):
        words = str(context.get("expected", "")).replace(" or ", ", ").replace("'", "")
        words = words.replace("False", "false")
        guess = nearest(str(given), words.split(", ")) if isinstance(given, str) else None
        tail = f"; did you mean {guess!r}?" if guess else ""
        return f"{given!r} is not one of {words}{tail}"
    if kind == "missing":
        return "is missing"
    return f"{error['msg'].lower().replace('input should be', 'should be')}, not {given!r}"


def defaults_of(kind: type[Any]) -> dict[str, Any]:
    """Options of a pass with their defaults, for `effc passes`."""
    hints = typing.get_type_hints(kind)
    found = {}
    for item in dataclasses.fields(kind):
        if item.default is not dataclasses.MISSING:
            value: Any = item.default
        elif item.default_factory is not dataclasses.MISSING:
            value = item.default_factory()
        else:
            value = None
        found[item.name] = (hints.get(item.name), value)
    return found
