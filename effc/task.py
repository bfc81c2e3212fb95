"""A task with a model and files of its own, beside what a plain encoder or classifier is.

A task is a processor that knows more: how its files are read, what its graph is trained towards, how what comes out is
read and scored. Everything but the model and its loss runs beside an engine without torch. Its config.json is that of
the encoder with one key more, `effc_source`, so that tokenizers find what they look for:

    effc_source: {task: diaasq, settings: {…}, labels: {…}, decoder: {…}}

`effc.tasks` has the tasks by word; nobody names one of them otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from effc.calib.data import Batch, Record
from effc.errors import SourceError, TuneError
from effc.processor import Processor
from effc.table import unknown
from effc.tasks import TASKS

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = np.ndarray[Any, np.dtype[Any]]
Json = dict[str, Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
KEY = "effc_source"
EXAMPLE = (2, 40)
"""Samples and places of each that a model is traced on."""


class Task(Processor):
    """What a source of a task needs beside its graph; `config` is the encoder's, `own` what stands under `KEY`."""

    word: ClassVar[str]
    dims: ClassVar[Mapping[str, Mapping[int, str]]]
    """Free dimensions of every input of the model, in the order of its inputs."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Scores beside the first, which `value` gives too."""
    files: ClassVar[tuple[str, ...]] = ()
    """Settings that name a file, which a recipe looks for where the data are."""

    def __init__(self, directory: Path, config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        super().__init__(directory, config, tuple(self.dims))

    @property
    def max_length(self) -> int | None:
        """Nothing: the encoder's bound is on rows, and a sample may have many."""
        return None

    @property
    def longest_row(self) -> int | None:
        """Pieces that the encoder takes at most."""
        return super().max_length

    def batches(
        self, records: Iterable[Record], *, size: int = 16, max_length: int | None = None
    ) -> Iterator[Batch]:
        chunk: list[Any] = []
        for record in records:
            chunk.append(record.item)
            if len(chunk) == size:
                yield Batch(inputs=self.feeds(chunk))
                chunk = []
        if chunk:
            yield Batch(inputs=self.feeds(chunk))

    def own(self) -> Json:
        """What stands in config.json under `KEY`."""
        raise NotImplementedError

    def chosen(self) -> Json:
        """The settings, as they stand in what `own` gives; nothing is read for them."""
        settings: Json = self.own()["settings"]
        return settings

    def texts(self) -> dict[str, str]:
        """Further files of a checkpoint and a package, by name, that do not lie in the encoder's directory."""
        return {}

    def read(self, file: Path, *, labelled: bool = True) -> list[Any]:
        """The samples of a file. Raises CalibrationError, with file and line."""
        raise NotImplementedError

    def beside(self, file: Path, judged: Sequence[Any]) -> list[Any]:
        """Samples of what is learnt beside the task itself, none of them like those that judge.

        Raises TuneError for a task that learns nothing beside, CalibrationError for a file that is none of its own.
        """
        raise TuneError(
            f"the task {self.word} learns nothing beside itself", hint="leave `beside` out"
        )

    def feeds(self, items: Sequence[Any]) -> dict[str, Array]:
        """Samples as one batch of inputs."""
        raise NotImplementedError

    def shaped(self, batch: int, length: int, tokens: Array) -> dict[str, Array]:
        """Inputs of made-up samples of about so many places each, filled with those token ids."""
        raise NotImplementedError

    def said(self, run: Run, item: Any) -> Any:
        """What a model or an engine says of one sample."""
        raise NotImplementedError

    def is_labelled(self, item: Any) -> bool:
        """Whether it is known what is right of a sample."""
        raise NotImplementedError

    def tally(self, items: Sequence[Any], said: Sequence[Any]) -> dict[str, Array]:
        """What is right of what was said of labelled samples: columns with the samples along their first axis."""
        raise NotImplementedError

    def counts(self, run: Run, items: Sequence[Any]) -> dict[str, Array]:
        """The same of a model or an engine."""
        return self.tally(items, [self.said(run, item) for item in items])

    @classmethod
    def value(cls, columns: Mapping[str, Array], part: str | None = None) -> float:
        """The score of counted samples, or one of the further `parts`; higher is better."""
        raise NotImplementedError

    def scores(self, columns: Mapping[str, Array]) -> Json:
        """All that is told of counted samples."""
        raise NotImplementedError

    def answer(self, item: Any, said: Any) -> Json:
        """What was said of one sample, as plain values."""
        raise NotImplementedError

    def lines(self, item: Any, answer: Json, *, in_colour: bool) -> list[str]:
        """The same for a terminal."""
        raise NotImplementedError

    def page(self, items: Sequence[Any], answers: Sequence[Json]) -> str:
        """The same as one page of HTML that loads nothing."""
        raise NotImplementedError

    def model(self, encoder: nn.Module) -> nn.Module:
        """The model over an encoder, its own tensors drawn by the seed of the settings."""
        raise NotImplementedError

    def wanted(self, items: Sequence[Any]) -> dict[str, Array]:
        """What the model should say of labelled samples, as its loss takes it."""
        raise NotImplementedError

    def loss(self, outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError


def own_of(config: Mapping[str, Any], place: Path) -> Json | None:
    """What a config.json says of a task; None for that of a plain model. Raises SourceError where it is damaged."""
    own = config.get(KEY)
    if own is None:
        return None
    if not isinstance(own, dict) or not isinstance(own.get("task"), str):
        raise SourceError(
            f"{place / 'config.json'} says {KEY}: {str(own)[:60]}, which names no task",
            hint="take it as `effc tune` wrote it",
        )
    return own


def opened(place: Path, config: Mapping[str, Any]) -> Task:
    """The task of a checkpoint or a package. Raises SourceError where it is of none, or of one that is not known."""
    own = own_of(config, place)
    if own is None:
        raise SourceError(
            f"{place} is of no task: its config.json has no {KEY}",
            hint="name a checkpoint that `effc tune` wrote of a task, or a package that was made of one",
        )
    if own["task"] not in TASKS:
        raise SourceError(unknown("task", own["task"], TASKS), hint="use the effc that wrote it")
    plain = {key: value for key, value in config.items() if key != KEY}
    made: Task = TASKS[own["task"]](place, plain, own)
    return made
