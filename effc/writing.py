"""`effc run`: text from the package of a causal language model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from effc import bounded, causal, chain, diffusion, package
from effc.backends.base import Port
from effc.engine import Engine, entry_of
from effc.errors import PackageError, SourceError, UsageError
from effc.generate import Counts, Sampling, Texts, tokens
from effc.intuition import ROLE
from effc.processor import Processor
from effc.progress import peak_mb

Json = dict[str, Any]
Show = Callable[[int, str], None]


def write(
    out: Path,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    chat: bool = False,
    target: str | None = None,
    threads: int | None = None,
    show: Show = lambda row, text: None,
) -> Json:
    """Continue every prompt with an engine of a package; `show` is given what is new of each as it comes.

    `chat` puts a prompt into the model's own template, as what a user says. Raises UsageError for a package or prompts
    that do not fit, VerifyError for a package that is not whole.
    """
    manifest = package.read(out)
    entry = entry_of(out, manifest, target)
    cache = _cache(out, manifest.kind, entry.inputs, entry.outputs)
    own = {e.role: e for e in manifest.engines if e.target == entry.target and e.role != ROLE}
    if len(own) > 1 and set(own) != set(causal.ROLES):
        raise PackageError(f"{out} has engines for {', '.join(own)}", hint=package.UNHARMED)
    config = bounded.read_json(out / "config.json", PackageError)
    processor = Processor(out, config)
    ids = [_ids(processor, prompt, chat) for prompt in prompts]
    _check_vocabulary(out, processor, ids, entry.outputs)
    counts, texts = Counts(), Texts(processor.tokenizer, len(ids), sampling.stop)
    with ExitStack() as stack:
        words = [manifest.label(own[r]) for r in (causal.ROLES if len(own) > 1 else own)]
        engines = [stack.enter_context(Engine.open(out, word, threads=threads)) for word in words]
        tell = chain.teller(stack, out, manifest, entry, threads)

        def run(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
            engine = engines[-1] if feeds["input_ids"].shape[1] == 1 else engines[0]
            return engine.carry(feeds, ("logits",))

        steps = tokens(
            run, cache, ids, sampling=sampling,
            ends=_ends(out, processor, config),
            pad=processor.tokenizer.pad_token_id or 0, context=processor.max_length, counts=counts,
            dtype=next(p.dtype for p in entry.inputs if p.name.startswith(f"{causal.PAST}.")),
            beside=tell(prompts) if tell is not None else None,
        )  # fmt: skip
        done: Iterable[int] | None = None
        while True:
            try:
                step = steps.send(done)
            except StopIteration:
                break
            for row, token in enumerate(step):
                if token is not None and (new := texts.add(row, token)):
                    show(row, new)
            done = [row for row, reply in enumerate(texts.replies) if reply.done]
    for row in range(len(ids)):
        if new := texts.rest(row):
            show(row, new)
    return {
        "texts": [reply.shown for reply in texts.replies],
        "tokens": [reply.ids for reply in texts.replies],
        "prompt_tokens": counts.prompt_tokens,
        "new_tokens": counts.new_tokens,
        "first_token_s": round(counts.prefill_s, 4),
        "prefill_per_s": round(counts.prompt_tokens / max(counts.prefill_s, 1e-9), 1),
        "decode_per_s": round((counts.new_tokens - len(ids)) / counts.decode_s, 1)
        if counts.decode_s
        else None,
        "peak_mb": peak_mb(),
    }


def line(found: Json) -> str:
    """What a run took, in one line."""
    decode = found["decode_per_s"]
    return (
        f"{found['prompt_tokens']} tokens read at {found['prefill_per_s']:.0f}/s, first after "
        f"{found['first_token_s'] * 1e3:.0f} ms; {found['new_tokens']} written"
        + (f" at {decode:.0f}/s" if decode else "")
        + (f"; peak memory {found['peak_mb']:.0f} MB" if found["peak_mb"] else "")
    )


def _cache(
    out: Path, kind: str, inputs: Sequence[Port], outputs: Sequence[Port]
) -> list[tuple[int, int]]:
    """Heads and head size of every layer. Raises UsageError where an engine is no language model with a cache."""
    past = {p.name: p.shape for p in inputs if p.name.startswith(f"{causal.PAST}.")}
    if kind == diffusion.KIND:
        raise UsageError(
            f"{out} holds a diffusion pipeline, which writes no text", hint="-o image.png"
        )
    if kind != "causal-lm" or not past:
        raise UsageError(
            f"{out} holds a {kind} without a cache of keys and values, which writes no text",
            hint="compile a directory of a causal language model, without `cache: false`",
        )
    present = {p.name: p.shape for p in outputs if p.name.startswith(f"{causal.PRESENT}.")}
    layers = len(past) // 2
    found = []
    for number in range(layers):
        sides = [
            (
                past.get(f"{causal.PAST}.{number}.{side}"),
                present.get(f"{causal.PRESENT}.{number}.{side}"),
            )
            for side in causal.SIDES
        ]
        sizes = {
            (shape[1], shape[3]) for side in sides for shape in side if shape and len(shape) == 4
        }
        if len(sizes) != 1 or any(shape is None for side in sides for shape in side):
            raise PackageError(
                f"layer {number} of {out} gives another cache than it takes", hint=package.UNHARMED
            )
        (size,) = sizes
        found.append((int(size[0]), int(size[1])))
    if set(past) != set(causal.names(layers)):
        raise PackageError(f"{out} takes a cache that lacks layers", hint=package.UNHARMED)
    return found


def _ids(processor: Processor, prompt: str, chat: bool) -> list[int]:
    """The tokens of a prompt, with the marks that the tokenizer puts around it."""
    tokenizer = processor.tokenizer
    if not chat:
        return list(tokenizer(prompt, verbose=False)["input_ids"]) if prompt else []
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the tokenizer has no chat template",
            hint="leave --chat out: the prompt is then continued",
        )
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check_vocabulary(
    out: Path, processor: Processor, ids: Sequence[Sequence[int]], outputs: Sequence[Port]
) -> None:
    words = next((p.shape[-1] for p in outputs if p.name == "logits"), None)
    most = max((max(row) for row in ids if row), default=0)
    if isinstance(words, int) and most >= words:
        raise SourceError(
            f"the tokenizer in {out} gives token {most}, and the model knows {words}",
            hint="it is the tokenizer of another model",
        )


def _ends(out: Path, processor: Processor, config: Json) -> list[int]:
    """The tokens that end a text: of generation_config.json, else of config.json, else the tokenizer's."""
    place = out / "generation_config.json"
    own = bounded.read_json(place, PackageError) if place.exists() else {}
    for value in (
        own.get("eos_token_id"),
        config.get("eos_token_id"),
        processor.tokenizer.eos_token_id,
    ):
        if isinstance(value, int):
            return [value]
        if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            return list(value)
    return []


def read_prompts(file: Path) -> list[str]:
    """A prompt a line of a UTF-8 file; empty lines do not count. `\\n` stands for a new line in a prompt."""
    text = bounded.content(file.open("rb"), str(file), UsageError).decode("utf-8")
    return [re.sub(r"\\n", "\n", line) for line in text.splitlines() if line.strip()]
