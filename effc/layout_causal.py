"""`effc package --layout onnxruntime-genai` and `--layout transformers.js` of a causal language model.

    onnxruntime-genai    genai_config.json, model.onnx, tokenizer
    transformers.js      config.json, onnx/model_q4.onnx (or what its dtype is called), tokenizer

Both hand out the cache that they were given and make position_ids and the mask themselves, so what they need beside the
engine are names: of its ports, of its free sizes, and of its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effc import bounded, causal, package, paths
from effc.errors import PackageError, UsageError
from effc.intuition import INPUT
from effc.layout_plan import JS_SUFFIXES, Json, Plan, beside, own_entries, settings
from effc.processor import Processor, whole

if TYPE_CHECKING:
    import onnx_ir as ir

KIND = "causal-lm"
SIZES = {
    "batch": "batch_size",
    "sequence": "sequence_length",
    "past": "past_sequence_length",
    "total": "total_sequence_length",
}
"""Free sizes as optimum names them; transformers.js makes an empty cache by these words."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """An engine of a package with what its files say of it."""

    graph: ir.Model
    config: Json
    generation: Json
    tokenizer: Json
    template: str | None
    """A chat template that has a file of its own."""
    context: int | None
    entry: package.EngineEntry
    is_outside: bool
    """Whether its weights lie beside the file."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the engine lies, and settings by the name of their file."""

    engine: str
    data: str
    settings: Mapping[str, Json]


def genai(out: Path, manifest: package.Manifest) -> Plan:
    """For onnxruntime-genai. Raises UsageError where the package holds no causal language model that it can feed."""
    return _plan(out, manifest, _genai, "genai_config.json")


def transformers_js(out: Path, manifest: package.Manifest) -> Plan:
    """For transformers.js. Raises UsageError as `genai` does."""
    return _plan(out, manifest, _transformers_js, "config.json")


def _plan(
    out: Path, manifest: package.Manifest, arrange: Callable[[Model], Layout], last: str
) -> Plan:
    entry = _engine(out, manifest)

    def fill(place: Path) -> None:
        import onnx_ir as ir

        made = _model(out, entry)
        arranged = arrange(made)
        package.copy_files(out, beside(manifest), place)
        for name, content in arranged.settings.items():
            (place / name).write_text(package.dump(content), encoding="utf-8")
        target = place / arranged.engine
        target.parent.mkdir(exist_ok=True)
        ir.save(made.graph, target, external_data=arranged.data if made.is_outside else None)

    return Plan(last=last, fill=fill)


def _engine(out: Path, manifest: package.Manifest) -> package.EngineEntry:
    """The engine for ONNX Runtime that takes any number of tokens behind any past; of two the one that writes."""
    if manifest.kind != KIND:
        raise UsageError(
            f"{out} holds a model of kind {manifest.kind}, and this layout is for causal language models",
            hint="its model.onnx is all that a tool needs: docs/deploy.md",
        )
    own = own_entries(out, manifest)
    for entry in sorted(own, key=lambda entry: entry.role != causal.DECODE):
        shapes = {port.name: port.shape for port in entry.inputs}
        past = shapes.get(f"{causal.PAST}.0.key")
        if INPUT in shapes:
            raise UsageError(
                f"{out} is told what a request is about, which these tools do not work out",
                hint="compile without source.intuition",
            )
        if "int8" in (p.dtype for p in entry.inputs if p.name.startswith(f"{causal.PAST}.")):
            raise UsageError(
                f"{out} has a cache of integers, which these tools do not carry",
                hint="compile without quantize-cache",
            )
        if past and all(isinstance(size, str) for size in (*shapes["input_ids"], past[2])):
            return entry
    raise UsageError(
        f"{out} has no engine that takes prompts of any length and a cache of keys and values",
        hint="compile a directory of a causal language model, without `cache: false`",
    )


def _model(out: Path, entry: package.EngineEntry) -> Model:
    import onnx_ir as ir

    from effc.backends import onnx_ports

    graph = ir.load(paths.inside(out, entry.path))
    weights = [value.const_value for value in graph.graph.initializers.values()]
    onnx_ports.rename_sizes(graph, SIZES)
    config = bounded.read_json(out / "config.json", PackageError)
    template = out / "chat_template.jinja"
    return Model(
        graph=graph,
        config=config,
        generation=settings(out / "generation_config.json"),
        tokenizer=settings(out / "tokenizer_config.json"),
        template=bounded.text_of(template, PackageError) if template.exists() else None,
        context=Processor(out, config).max_length,
        entry=entry,
        is_outside=any(isinstance(each, ir.ExternalTensor) for each in weights),
    )


SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""What both a generation_config.json and onnxruntime-genai call by these words."""


def _genai(made: Model) -> Layout:
    """Logits of every position, for which it has the memory ready before it runs (onnxruntime-genai 0.18)."""
    from effc.backends import onnx_ports

    onnx_ports.keep_all(made.graph)
    config = made.config
    if made.context is None:
        raise PackageError(
            "config.json does not say how many tokens the model takes, which onnxruntime-genai asks for",
            hint="compile a directory whose config.json has max_position_embeddings",
        )
    heads = whole(config, "num_attention_heads", 0) or whole(config, "n_head", 0)
    key = next(port for port in made.entry.inputs if port.name == f"{causal.PAST}.0.key")
    logits = next(port for port in made.entry.outputs if port.name == "logits")
    past = [port.name for port in made.entry.inputs if port.name.startswith(f"{causal.PAST}.")]
    asked = {port.name for port in made.entry.inputs} & set(causal.TOKENS)
    ends = made.generation.get("eos_token_id", config.get("eos_token_id"))
    first_end = ends[0] if isinstance(ends, list) and ends else ends
    pads = (made.generation.get("pad_token_id"), config.get("pad_token_id"), first_end, 0)
    begin = config.get("bos_token_id")
    decoder = {
        "filename": "model.onnx",
        "head_size": key.shape[3],
        "hidden_size": whole(config, "hidden_size", 0) or whole(config, "n_embd", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": key.shape[1],
        "num_hidden_layers": len(past) // len(causal.SIDES),
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "inputs": {
            **{name: name for name in causal.TOKENS if name in asked},
            **{f"past_{side}_names": f"{causal.PAST}.%d.{side}" for side in causal.SIDES},
        },
        "outputs": {
            "logits": "logits",
            **{f"present_{side}_names": f"{causal.PRESENT}.%d.{side}" for side in causal.SIDES},
        },
    }
    model = {
        "type": "decoder",
        "context_length": made.context,
        "vocab_size": logits.shape[-1],
        "pad_token_id": next(value for value in pads if isinstance(value, int)),
        **({"bos_token_id": begin} if isinstance(begin, int) else {}),
        **({"eos_token_id": ends} if ends is not None else {}),
        "decoder": decoder,
    }
    search = {
        "max_length": made.context,
        "do_sample": False,
        "past_present_share_buffer": False,
        **{name: made.generation[name] for name in SEARCH if made.generation.get(name) is not None},
    }
    files = {"genai_config.json": {"model": model, "search": search}}
    return Layout(engine="model.onnx", data="model.onnx.data", settings=files)


def _transformers_js(made: Model) -> Layout:
    """Its own word for the logits that are wanted, `num_logits_to_keep`, where the engine leaves the choice."""
    from effc.backends import onnx_ports

    onnx_ports.keep_last(made.graph, "num_logits_to_keep")
    dtype = onnx_ports.precision(made.graph)
    file = f"model{JS_SUFFIXES[dtype]}.onnx"
    own: Json = {"dtype": dtype}
    if made.is_outside:
        own["use_external_data_format"] = {file: 1}
    files = {"config.json": {**made.config, "transformers.js_config": own}}
    if made.template is not None:  # it reads no chat_template.jinja (4.3)
        files["tokenizer_config.json"] = {**made.tokenizer, "chat_template": made.template}
    return Layout(engine=f"onnx/{file}", data=f"{file}_data", settings=files)
