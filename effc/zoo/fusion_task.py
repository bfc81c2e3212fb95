"""Lexical fusions of Chinese paragraphs as a task (Liu et al., COLING 2020).

What a package needs beside its engine: settings, the words of the tags and how probable a link must be stand in its
config.json, the sememes of the dictionary's words in `sememes.txt`. Nothing here needs torch but the model and its
loss.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from effc.calib import data
from effc.errors import CalibrationError, SourceError
from effc.task import Array, Json, Run, Task
from effc.zoo import fusion_files as files
from effc.zoo import fusion_layout as layout
from effc.zoo import fusion_scores as scores
from effc.zoo import fusion_tags as tags
from effc.zoo import fusion_view as view
from effc.zoo import options, sememes
from effc.zoo.dialogue_scores import f1
from effc.zoo.fusion_files import Truth
from effc.zoo.fusion_layout import Laid
from effc.zoo.sememes import Sememes

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

TABLE = "sememes.txt"
"""Of a checkpoint and a package: the sememes of words."""
Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a model of lexical fusions is made of beside its encoder, and what it is trained by.

    `dictionary` and `vectors` are files: the sememes of words, and the numbers [sememe_size] that sememes begin as,
    drawn where there is no file. `sememes` off leaves all of them out, and shuffled gives every word those of another
    one; with `singles` characters of no word in the dictionary have their own. `same` tells the model where the same
    character stands elsewhere. The graph has `heads` of `size` each,
    and links are scored over `inner`; with a `link_weight` of 0 words alone are learnt and found. `seed` draws what the
    encoder does not bring.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    dictionary: str | None = None
    vectors: str | None = None
    sememes: Literal["on", "off", "shuffled"] = "on"
    singles: bool = True
    same: bool = True
    sememe_size: Size = 200
    heads: Size = 4
    size: Size = 64
    inner: Size = 150
    link_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    positive_weight: Positive = 20.0
    seed: int = 0


class LexicalFusions(Task):
    """Paragraphs and their lexical fusions; a sample is a paragraph in characters (`Laid`)."""

    word = "lexical-fusion"
    dims: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "sequence"},
        "sememe_ids": {0: "batch", 1: "sememes"},
        "incidence": {0: "batch", 1: "sequence", 2: "sememes"},
    }
    parts = ("tuples", "mentions", "fusions", "separations", "characters")
    files = ("dictionary", "vectors")

    def __init__(self, directory: Path, config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        super().__init__(directory, config, own)
        self.settings = options.read(Settings, own.get("settings", {}), self.word)
        self._kept = own.get("sememes")
        self.threshold = _decoder(own, directory)

    @cached_property
    def sememes(self) -> Sememes:
        """Those of the dictionary, or of the checkpoint or package that this is of. Raises SourceError."""
        if self._kept is not None:
            return _kept(self.directory / TABLE, self._kept)
        if self.settings.sememes == "off":
            return Sememes(words={})
        if self.settings.dictionary is None:
            raise SourceError(
                "settings of lexical-fusion: no dictionary of sememes is named",
                hint="options: {dictionary: hownet.txt}, or {sememes: off}",
            )
        found = sememes.of_dictionary(Path(self.settings.dictionary))
        return found if self.settings.sememes == "on" else found.shuffled(self.settings.seed)

    def chosen(self) -> Json:
        settings = asdict(self.settings)
        return settings | {
            name: Path(settings[name]).name for name in self.files if settings[name] is not None
        }

    def own(self) -> Json:
        return {
            "task": self.word, "settings": self.chosen(), "labels": list(tags.LABELS),
            "decoder": {"threshold": self.threshold},
            "sememes": self._kept or self._described(),
        }  # fmt: skip

    def _described(self) -> Json:
        """What the sememes are: the sha256 of the words', and of the file of what they begin as."""
        begin = self.settings.vectors
        return {
            "count": len(self.sememes.names),
            "sha256": hashlib.sha256(self.sememes.text().encode()).hexdigest(),
            "vectors": data.digest(Path(begin))["sha256"] if begin is not None else None,
        }

    def texts(self) -> dict[str, str]:
        return {TABLE: self.sememes.text()}

    def read(self, file: Path, *, labelled: bool = True) -> list[Laid]:
        found = []
        for each in files.read(file, labelled=labelled):
            try:
                found.append(
                    layout.lay(
                        each, self.tokenizer, self.sememes, self.longest_row, singles=self.settings.singles
                    )
                )  # fmt: skip
            except CalibrationError as error:
                raise CalibrationError(
                    f"{file} line {each.line}: {error.what}", hint=error.hint
                ) from error
        return found

    def feeds(self, items: Sequence[Laid]) -> dict[str, Array]:
        return layout.inputs(items, self.tokenizer.pad_token_id or 0)

    def shaped(self, batch: int, length: int, tokens: Array) -> dict[str, Array]:
        """Paragraphs of `length` characters, with two sememes for three of them, as the published ones have."""
        count = max(2, min(sememes.MOST, 2 * length // 3))
        ids = np.resize(tokens, (batch, length)).astype(np.int64)
        numbers = np.arange(1, 1 + count) % (1 + len(self.sememes.names))
        near = np.abs(np.arange(length)[:, None] * count // length - np.arange(count)) <= 1
        return {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "sememe_ids": np.tile(numbers, (batch, 1)),
            "incidence": np.tile(near & (numbers > 0), (batch, 1, 1)),
        }

    def said(self, run: Run, item: Laid) -> Truth:
        """What an engine finds in a paragraph."""
        outputs = run(self.feeds([item]))
        if lacks := sorted({"tag_logits", "link_logits"} - set(outputs)):
            raise CalibrationError(
                f"the engine has no output {lacks[0]!r}", hint=f"it is of another task than {self.word}"
            )  # fmt: skip
        found = tags.of_outputs(outputs, 0, item, self.threshold)
        return found if self.settings.link_weight else found.alone

    def is_labelled(self, item: Laid) -> bool:
        return item.paragraph.truth is not None

    def tally(self, items: Sequence[Laid], said: Sequence[Truth]) -> dict[str, Array]:
        pairs = zip(items, said, strict=True)
        return scores.table([scores.counts(i.paragraph.truth or Truth(), each) for i, each in pairs])  # fmt: skip

    @classmethod
    def value(cls, columns: Mapping[str, Array], part: str | None = None) -> float:
        """Micro F1 of pairs, or that of a part."""
        return f1(*columns[part or "pairs"].sum(axis=0))

    def scores(self, columns: Mapping[str, Array]) -> Json:
        """Precision, recall and F1 of everything, false alarms and errors, see `fusion_scores`."""
        return scores.scores(columns)

    def answer(self, item: Laid, said: Truth) -> Json:
        return view.answer(item.paragraph, said)

    def lines(self, item: Laid, answer: Json, *, in_colour: bool) -> list[str]:
        return view.lines(answer, in_colour=in_colour)

    def page(self, items: Sequence[Laid], answers: Sequence[Json]) -> str:
        return view.page(answers)

    def model(self, encoder: nn.Module) -> nn.Module:
        import torch

        from effc.zoo.lexical_fusion import LexicalFusionModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return LexicalFusionModel(encoder, self.settings, torch.from_numpy(self._vectors()))

    def _vectors(self) -> Array:
        """What sememes begin as [1 + sememes, size]; of what is trained already only the shape counts."""
        settings, names = self.settings, self.sememes.names
        if self._kept is not None or settings.vectors is None:
            drawn = np.random.default_rng(settings.seed).normal(
                0, 0.1, (1 + len(names), settings.sememe_size)
            )
            return drawn.astype(np.float32)
        found, there = sememes.vectors(
            Path(settings.vectors), names, settings.sememe_size, settings.seed
        )
        if there < len(names):
            lacking = len(names) - there
            log.info("%d of %d sememes have no vector and begin as drawn", lacking, len(names))
        return found

    def wanted(self, items: Sequence[Laid]) -> dict[str, Array]:
        return tags.targets(items)

    def loss(self, outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
        from effc.zoo.lexical_fusion import loss

        return loss(outputs, wanted, self.settings)


def _kept(file: Path, held: Any) -> Sememes:
    """The sememes of a checkpoint or package. Raises SourceError where they are not those that were written."""
    if not file.is_file():
        raise SourceError(f"there is no {file}", hint="take the directory as `effc tune` wrote it")
    found = sememes.of_text(file)
    digest = hashlib.sha256(found.text().encode()).hexdigest()
    if not isinstance(held, dict) or held.get("sha256") != digest:
        raise SourceError(
            f"{file} is not what the model was trained with",
            hint="take the directory as `effc tune` wrote it",
        )
    return found


def _decoder(own: Mapping[str, Any], place: Path) -> float:
    """How probable a link must be. Raises SourceError for labels of another effc."""
    if own.get("labels", list(tags.LABELS)) != list(tags.LABELS):
        raise SourceError(
            f"the labels of {place} are not those that this effc decodes",
            hint="use the effc that wrote it",
        )
    decoder = own.get("decoder", {})
    least = decoder.get("threshold", tags.THRESHOLD) if isinstance(decoder, dict) else None
    if not isinstance(least, float) or not 0 < least < 1:
        raise SourceError(
            f"the decoder of {place} asks of links a probability of {least!r}",
            hint="a number between 0 and 1",
        )
    return least
