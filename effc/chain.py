"""Answers of a package to texts: its tokenizer, who says what they are about, and its engine, one behind the other.

    with effc.Chain.open("OUT") as chain:
        outputs = chain(["a warm film", "nobody laughed"])

What a request is about comes from an engine of its own, which lies in the package with its tokenizer and the centroids
(`effc.intuition`). A model that is told nothing is its tokenizer and its engine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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


class Chain(AbstractContextManager["Chain"]):
    """The engines of a package that texts alone are enough for; `open` makes one."""

    def __init__(self, links: Sequence[tuple[OpenEngine, Processor]], stack: ExitStack) -> None:
        self._links, self._stack = links, stack

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
        told = any(port.name == INPUT for port in entry.inputs)
        strange = [p.name for p in entry.inputs if p.name not in (*TOKENS, INPUT)]
        if strange or not entry.inputs:
            raise UsageError(
                f"{place}: the engine takes {(strange or ['nothing'])[0]!r}, which texts do not bring",
                hint="effc.Engine.open(OUT) takes arrays",
            )
        folders = [place]
        words = [manifest.label(entry)]
        if told:
            teller = manifest.engine(entry.target, ROLE)
            if teller is None:
                raise UsageError(
                    f"{place} takes {INPUT!r} beside a text, and has nothing that says what a text is about",
                    hint="compile with source.embedder: DIR, or feed effc.Engine.open(OUT) an array of that name",
                )
            folders.insert(0, place / ROLE)
            words.insert(0, manifest.label(teller))
            _refuse_other(place, entry.inputs, teller.outputs)
        with ExitStack() as stack:
            links = []
            for folder, word in zip(folders, words, strict=True):
                engine = stack.enter_context(Engine.open(place, word, threads=threads))
                names = [port.name for port in engine.inputs if port.name != INPUT]
                config = bounded.read_json(folder / "config.json", PackageError)
                links.append((engine, Processor(folder, config, names)))
            return cls(links, stack.pop_all())

    def __call__(self, texts: Sequence[str]) -> dict[str, Array]:
        """The outputs of the engine by name, a row for each text; `intuition` among them where it is worked out."""
        if not texts:
            raise UsageError("there is no text", hint='--prompt "a warm film"')
        made: dict[str, Array] = {}
        for engine, processor in self._links:
            feeds = processor.encode(list(texts))
            told = {name: made[name] for name in made if name == INPUT}
            made |= engine({**feeds, **told})
        return made

    def close(self) -> None:
        self._stack.close()

    def __exit__(self, *_: object) -> None:
        self.close()


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
