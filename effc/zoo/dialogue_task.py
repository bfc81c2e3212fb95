"""DiaASQ as a task: files of dialogues in, quadruples out (Li et al., 2023).

What a package needs beside its engine stands in its config.json: the settings that inputs are laid out by, the words of
the tags, and how many mentions the decoder looks at. Nothing here needs torch but the model and its loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field

from effc.errors import CalibrationError, SourceError
from effc.task import Array, Json, Run, Task
from effc.zoo import dialogue_files as files
from effc.zoo import dialogue_layout as layout
from effc.zoo import dialogue_scores as scores
from effc.zoo import dialogue_tags as tags
from effc.zoo import dialogue_view as view
from effc.zoo import options
from effc.zoo.dialogue_files import Dialogue, Truth
from effc.zoo.dialogue_layout import Laid

if TYPE_CHECKING:
    from torch import Tensor, nn

LABELS = {
    "entity": ["none", "target", "aspect", "opinion"],
    "relation": ["none", "heads", "tails"],
    "polarity": ["none", *files.POLARITIES],
}
MOST_UTTERANCES = 8
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a dialogue model is made of beside its encoder, and what it is trained by.

    `split` gives heads and tails of relations tables of their own; `views` and `rotary` can be left out;
    `released_masks` are those of the authors' program, faults included (see `dialogue_layout`). The weights are those
    of every class but the first in the loss of each table. `seed` draws what the encoder does not bring.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    inner: Annotated[int, Field(ge=2, multiple_of=2)] = 256
    split: bool = True
    views: bool = True
    rotary: bool = True
    released_masks: bool = False
    entity_weight: Positive = 1.0
    relation_weight: Positive = 5.0
    polarity_weight: Positive = 3.0
    seed: int = 0

    @property
    def weights(self) -> dict[str, float]:
        return {
            "entity": self.entity_weight, "relation": self.relation_weight,
            "polarity": self.polarity_weight,
        }  # fmt: skip


class Dialogues(Task):
    """Dialogues and their quadruples; a sample is a dialogue in pieces (`Laid`)."""

    word = "diaasq"
    dims: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "input_ids": {0: "utterances", 1: "pieces"},
        "attention_mask": {0: "utterances", 1: "pieces"},
        **{name: {0: "batch", 1: "sequence"} for name in layout.PLACES},
    }
    parts = ("identified", "intra", "inter")

    def __init__(self, directory: Path, config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        super().__init__(directory, config, own)
        self.settings = options.read(Settings, own.get("settings", {}), self.word)
        self.most_mentions = _decoder(own, directory)

    def own(self) -> Json:
        return {
            "task": self.word, "settings": asdict(self.settings), "labels": LABELS,
            "decoder": {"most_mentions": self.most_mentions},
        }  # fmt: skip

    def read(self, file: Path, *, labelled: bool = True) -> list[Laid]:
        found = []
        for dialogue in files.read(file, labelled=labelled):
            try:
                found.append(layout.lay(dialogue, self.tokenizer, self.longest_row))
            except CalibrationError as error:
                raise CalibrationError(
                    f"{file} line {dialogue.line}: {error.what}", hint=error.hint
                ) from error
        return found

    def feeds(self, items: Sequence[Laid]) -> dict[str, Array]:
        pad = self.tokenizer.pad_token_id or 0
        return layout.inputs(items, pad, released=self.settings.released_masks)

    def shaped(self, batch: int, length: int, tokens: Array) -> dict[str, Array]:
        """Dialogues of two threads, of `length` places each but for the shortest."""
        count = max(1, min(MOST_UTTERANCES, length // 4))
        sizes = [len(part) for part in np.array_split(np.arange(max(length, 3)), count)]
        ids = np.resize(tokens, (batch, max(length, 3)))
        half = 1 + count // 2
        replies = tuple(-1 if i == 0 else 0 if i in (1, half) else i - 1 for i in range(count))
        made = []
        for row in ids:
            dialogue = Dialogue(
                name="", utterances=tuple(("·",) * (size - 2) for size in sizes), replies=replies,
                speakers=tuple(i % 3 for i in range(count)),
            )  # fmt: skip
            rows = np.split(row, np.cumsum(sizes)[:-1])
            places = np.arange(sum(sizes) - 2 * count)
            owners = [
                [-1, *part, -1] for part in np.split(places, np.cumsum([s - 2 for s in sizes])[:-1])
            ]
            made.append(
                Laid(
                    dialogue=dialogue, rows=tuple(tuple(map(int, r)) for r in rows),
                    tokens=np.array([t for part in owners for t in part], np.int64),
                )
            )  # fmt: skip
        return layout.inputs(made, released=self.settings.released_masks)

    def said(self, run: Run, item: Laid) -> Truth:
        """What an engine finds in a dialogue."""
        outputs = run(self.feeds([item]))
        if lacks := sorted({"entity", "relation", "polarity"} - set(outputs)):
            raise CalibrationError(
                f"the engine has no output {lacks[0]!r}", hint="it is of another task than diaasq"
            )
        return tags.decode(tags.of_logits(outputs, 0, item), item, self.most_mentions)

    def is_labelled(self, item: Laid) -> bool:
        return item.dialogue.truth is not None

    def tally(self, items: Sequence[Laid], said: Sequence[Truth]) -> dict[str, Array]:
        pairs = zip(items, said, strict=True)
        return scores.table([scores.counts(item.dialogue, each) for item, each in pairs])

    @classmethod
    def value(cls, columns: Mapping[str, Array], part: str | None = None) -> float:
        """Micro F1 of whole quadruples, or that of a part."""
        return scores.f1(*columns[part or "quads"].sum(axis=0))

    def scores(self, columns: Mapping[str, Array]) -> Json:
        """Precision, recall and F1 of everything, see `dialogue_scores`."""
        return dict(scores.scores(columns))

    def answer(self, item: Laid, said: Truth) -> Json:
        return view.answer(item.dialogue, said)

    def lines(self, item: Laid, answer: Json, *, in_colour: bool) -> list[str]:
        return view.lines(item.dialogue, answer, in_colour=in_colour)

    def page(self, items: Sequence[Laid], answers: Sequence[Json]) -> str:
        return view.page([item.dialogue for item in items], answers)

    def model(self, encoder: nn.Module) -> nn.Module:
        import torch

        from effc.zoo.dialogue import DialogueModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return DialogueModel(encoder, self.settings)

    def wanted(self, items: Sequence[Laid]) -> dict[str, Array]:
        return tags.targets(list(items), split=self.settings.split)

    def loss(self, outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
        from effc.zoo.dialogue import loss

        return loss(outputs, wanted, self.settings.weights)


def _decoder(own: Mapping[str, Any], place: Path) -> int:
    """How many mentions are looked at. Raises SourceError for labels of another effc."""
    if own.get("labels", LABELS) != LABELS:
        raise SourceError(
            f"the labels of {place} are not those that this effc decodes",
            hint="use the effc that wrote it",
        )
    decoder = own.get("decoder", {})
    most = decoder.get("most_mentions", tags.MOST_MENTIONS) if isinstance(decoder, dict) else None
    if type(most) is not int or most < 1:
        raise SourceError(
            f"the decoder of {place} looks at {most!r} mentions", hint="a whole number, 1 or more"
        )
    return most
