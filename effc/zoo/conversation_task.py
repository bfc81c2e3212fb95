"""Emotions of a conversation as a task, learnt beside who speaks (Li et al., arXiv 2003.01478).

What a package needs beside its engine stands in its config.json: the settings and the words of the emotions. Files that
are named `beside` another one in training are read for their speakers alone, which `Conversations.beside` prepares.
Nothing here needs torch but the model and its loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from effc.errors import CalibrationError, SourceError
from effc.task import Array, Json, Run, Task
from effc.zoo import conversation_files as files
from effc.zoo import conversation_layout as layout
from effc.zoo import conversation_scores as scores
from effc.zoo import conversation_view as view
from effc.zoo import options
from effc.zoo.conversation_files import Conversation
from effc.zoo.conversation_layout import Laid

if TYPE_CHECKING:
    from torch import Tensor, nn

FRIENDS = ("Chandler", "Joey", "Monica", "Phoebe", "Rachel", "Ross")
PIECES = 14
"""Of an utterance of made-up samples, about as many as real ones have."""
OFF = -100
"""What does not count in a loss."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a conversation model is made of beside its encoder, and what it is trained by.

    `emotions` names the corpus whose emotions are told. `speakers` are told apart beside them, all others being one
    class more; a file's speaker is one of them by the first word of the name. With none of them the model has no part
    for speakers. `size` is that of a recurrence in either direction; `seed` draws what the encoder does not bring.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    emotions: Literal["meld", "emorynlp"] = "meld"
    speakers: tuple[str, ...] = FRIENDS
    size: Annotated[int, Field(ge=16, multiple_of=16)] = 128
    speaker_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    seed: int = 0


class Conversations(Task):
    """Conversations and their emotions; a sample is a conversation in pieces (`Laid`)."""

    word = "cer"
    dims: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "input_ids": {0: "utterances", 1: "pieces"},
        "attention_mask": {0: "utterances", 1: "pieces"},
        "gather": {0: "batch", 1: "sequence"},
        "present": {0: "batch", 1: "sequence"},
    }
    parts = scores.PARTS

    def __init__(self, directory: Path, config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        super().__init__(directory, config, own)
        self.settings = options.read(Settings, own.get("settings", {}), self.word)
        self.emotions = files.EMOTIONS[self.settings.emotions]
        if own.get("labels", self.labels) != self.labels:
            raise SourceError(
                f"the labels of {directory} are not those that this effc knows",
                hint="use the effc that wrote it",
            )

    @property
    def labels(self) -> Json:
        return {"emotion": list(self.emotions)}

    def own(self) -> Json:
        settings = asdict(self.settings)
        settings["speakers"] = list(settings["speakers"])
        return {"task": self.word, "settings": settings, "labels": self.labels}

    def read(self, file: Path, *, labelled: bool = True) -> list[Laid]:
        return self._laid(file, files.read(file, self.emotions, labelled=labelled))

    def beside(self, file: Path, judged: Sequence[Laid]) -> list[Laid]:
        """Conversations for their speakers, but for those that share longer utterances with ones that judge."""
        if not self.settings.speakers:
            raise CalibrationError(
                f"{file} is to teach who speaks, and the model has no speakers",
                hint="leave `beside` out, or the option `speakers: []` of the source",
            )
        found = files.apart(files.read(file, labelled=False), [j.conversation for j in judged])
        if not found:
            raise CalibrationError(
                f"{file} holds no conversation that is apart from those that judge",
                hint="take another file for `beside`",
            )
        return [replace(each, is_beside=True) for each in self._laid(file, found)]

    def _laid(self, file: Path, conversations: Sequence[Conversation]) -> list[Laid]:
        try:
            return [layout.lay(c, self.tokenizer, self.longest_row) for c in conversations]
        except CalibrationError as error:
            raise CalibrationError(f"{file}: {error.what}", hint=error.hint) from error

    def feeds(self, items: Sequence[Laid]) -> dict[str, Array]:
        return layout.inputs([item.rows for item in items], self.tokenizer.pad_token_id or 0)

    def shaped(self, batch: int, length: int, tokens: Array) -> dict[str, Array]:
        """Conversations of `length` utterances each."""
        return layout.inputs(np.resize(tokens, (batch, length, PIECES)).tolist())

    def said(self, run: Run, item: Laid) -> tuple[int, ...]:
        """The emotion of every utterance."""
        outputs = run(self.feeds([item]))
        if "emotion" not in outputs:
            raise CalibrationError(
                "the engine has no output 'emotion'", hint="it is of another task than cer"
            )
        return tuple(map(int, outputs["emotion"][0].argmax(-1)))

    def is_labelled(self, item: Laid) -> bool:
        return item.conversation.is_known()

    def tally(self, items: Sequence[Laid], said: Sequence[Sequence[int]]) -> dict[str, Array]:
        wanted = [[u.emotion or 0 for u in item.conversation.utterances] for item in items]
        return {"counted": scores.table(wanted, said, len(self.emotions))}

    @classmethod
    def value(cls, columns: Mapping[str, Array], part: str | None = None) -> float:
        """Weighted F1 over all utterances, or a part of `conversation_scores`."""
        return scores.value(columns["counted"].sum(0), part)

    def scores(self, columns: Mapping[str, Array]) -> Json:
        return scores.scores(columns["counted"].sum(0), self.emotions)

    def answer(self, item: Laid, said: Sequence[int]) -> Json:
        return view.answer(item.conversation, said, self.emotions)

    def lines(self, item: Laid, answer: Json, *, in_colour: bool) -> list[str]:
        return view.lines(answer, in_colour=in_colour)

    def page(self, items: Sequence[Laid], answers: Sequence[Json]) -> str:
        return view.page(answers)

    def model(self, encoder: nn.Module) -> nn.Module:
        import torch

        from effc.zoo.conversation import ConversationModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return ConversationModel(encoder, self.settings, len(self.emotions))

    def wanted(self, items: Sequence[Laid]) -> dict[str, Array]:
        """Classes [batch, N] of emotions, and of speakers for what is there for them; `OFF` elsewhere."""
        shape = len(items), max(item.length for item in items)
        found = {name: np.full(shape, OFF, np.int64) for name in ("emotion", "speaker")}
        for b, item in enumerate(items):
            said = item.conversation.utterances
            if item.is_beside:
                found["speaker"][b, : len(said)] = [self._speaker(u.speakers) for u in said]
            else:
                found["emotion"][b, : len(said)] = [
                    OFF if u.emotion is None else u.emotion for u in said
                ]
        return found

    def _speaker(self, names: Sequence[str]) -> int:
        """The class of who speaks; several at once, or nobody, do not count."""
        known = self.settings.speakers
        if len(names) != 1 or not names[0].split():
            return OFF
        first = names[0].split()[0]
        return known.index(first) if first in known else len(known)

    def loss(self, outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
        from effc.zoo.conversation import loss

        return loss(outputs, wanted, {"emotion": 1.0, "speaker": self.settings.speaker_weight})
