"""Answers of a package to texts: its tokenizer, who says what they are about, and its engine, one behind the other.

    with effc.Chain.open("OUT") as chain:
        outputs = chain(["a warm film", "nobody laughed"])

What a request is about comes from an engine of its own, which lies in the package with its tokenizer and the centroids
(`effc.intuition`). A model that is told nothing is its tokenizer and its engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Self

from effc import bounded, intuition, package
from effc.backends.base import Engine as OpenEngine
from effc.engine import Engine, entry_of
from effc.errors import PackageError, UsageError
from effc.intuition import INPUT, ROLE, Array
from effc.processor import Processor

Json = dict[str, Any]
KINDS = ("classifier", "encoder")
"""Packages that answer a text in one run."""
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
Tell = Callable[[Sequence[str]], dict[str, Array]]
"""Of texts `intuition` [texts, clusters]."""


class Chain(AbstractContextManager["Chain"]):
    """The engines of a package that texts alone are enough for; `open` makes one."""

    def __init__(
        self, engine: OpenEngine, processor: Processor, tell: Tell | None, stack: ExitStack
    ) -> None:
        self._engine, self._processor, self._tell, self._stack = engine, processor, tell, stack

    @classmethod
    def open(
        cls,
        out: str | os.PathLike[str],
        target: str | None = None,
        *,
        threads: int | None = None,
    ) -> Self:
        """The engines for `target`, those of the first where None.

        Raises VerifyError where the package is not what its manifest says, and UsageError where its engine takes
        something that texts do not bring.
        """
        place = Path(out)
        manifest = package.read(place)
        entry = entry_of(place, manifest, target)
        strange = [p.name for p in entry.inputs if p.name not in (*TOKENS, INPUT)]
        if strange or not entry.inputs:
            raise UsageError(
                f"{place}: the engine takes {(strange or ['nothing'])[0]!r}, which texts do not bring",
                hint="effc.Engine.open(OUT) takes arrays",
            )
        with ExitStack() as stack:
            tell = teller(stack, place, manifest, entry, threads)
            own = _opened(stack, place, place, manifest.label(entry), threads)
            return cls(*own, tell, stack.pop_all())

    def __call__(self, texts: Sequence[str]) -> dict[str, Array]:
        """The outputs of the engine by name, a row for each text; `intuition` among them where it is worked out."""
        if not texts:
            raise UsageError("there is no text", hint='--prompt "a warm film"')
        told = self._tell(texts) if self._tell is not None else {}
        return told | self._engine({**self._processor.encode(list(texts)), **told})

    def close(self) -> None:
        self._stack.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def teller(
    stack: ExitStack, place: Path, manifest: package.Manifest, entry: package.EngineEntry, threads: int | None
) -> Tell | None:  # fmt: skip
    """What says of texts what they are about, as `entry` takes it; None where it takes nothing of the kind.

    Raises UsageError where the package has nothing that says so, and PackageError where that is for another engine.
    """
    if not any(port.name == INPUT for port in entry.inputs):
        return None
    found = manifest.engine(entry.target, ROLE)
    if found is None:
        raise UsageError(
            f"{place} takes {INPUT!r} beside a text, and has nothing that says what a text is about",
            hint="compile with source.embedder: DIR, or feed effc.Engine.open(OUT) an array of that name",
        )
    _refuse_other(place, entry.inputs, found.outputs)
    engine, processor = _opened(stack, place, place / ROLE, manifest.label(found), threads)
    return lambda texts: {INPUT: engine(processor.encode(list(texts)))[INPUT]}


def _opened(
    stack: ExitStack, place: Path, folder: Path, word: str, threads: int | None
) -> tuple[OpenEngine, Processor]:
    """An engine of a package, and what makes its inputs of texts."""
    engine = stack.enter_context(Engine.open(place, word, threads=threads))
    names = [port.name for port in engine.inputs if port.name != INPUT]
    config = bounded.read_json(folder / "config.json", PackageError)
    return engine, Processor(folder, config, names)


def _refuse_other(place: Path, taken: Sequence[Any], given: Sequence[Any]) -> None:
    """Raise PackageError where the centroids of a package are not those that its engines were made with."""
    clusters = intuition.read(place / intuition.FILE)
    counts = {p.shape[-1] for p in (*taken, *given) if p.name == INPUT}
    if counts != {len(clusters.centroids)}:
        raise PackageError(
            f"{place}: {len(clusters.centroids)} centroids, and engines for {', '.join(map(str, sorted(counts)))}",
            hint=package.UNHARMED,
        )


def answer(
    out: Path, texts: Sequence[str], *, target: str | None = None, threads: int | None = None
) -> Json:
    """What a package says of texts, as JSON: outputs, and the class of each where it gives one row of logits a text."""
    with Chain.open(out, target, threads=threads) as chain:
        made = chain(texts)
    found: Json = {"outputs": {name: array.tolist() for name, array in made.items()}}
    logits = made.get("logits")
    if logits is not None and logits.ndim == 2:
        config = bounded.read_json(Path(out) / "config.json", PackageError)
        names = config.get("id2label") if isinstance(config.get("id2label"), dict) else {}
        found["labels"] = [str(names.get(str(i), i)) for i in logits.argmax(-1).tolist()]
    if INPUT in made:
        found["clusters"] = made[INPUT].argmax(-1).tolist()
    return found


def lines(texts: Sequence[str], found: Json) -> list[str]:
    """A line for each text: its class where it has one, and the cluster that it is nearest to."""
    told = []
    for row, text in enumerate(texts):
        words = [found["labels"][row]] if "labels" in found else ["--json has the outputs"]
        words += [f"cluster {found['clusters'][row]}"] if "clusters" in found else []
        told.append(f"{', '.join(words)}    {text}")
    return told
