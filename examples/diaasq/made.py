"""Made-up dialogues in the format of DiaASQ, and a tiny encoder that knows their words.

    python examples/diaasq/made.py DIR          # DIR/train.json, DIR/valid.json and DIR/encoder

Somebody names a phone; in two threads others praise or blame parts of it, or of a phone that they name themselves.
The word of an opinion says its polarity, so a small model learns it in a minute. It shows that all runs, and no more.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import task_runs  # the folder above has what examples of tasks share

PHONES = ("nova", "mate", "pixel", "edge", "note pro")
PARTS = ("camera", "screen", "battery", "sound", "price tag")
OPINIONS = {
    "good": "pos", "great": "pos", "very bright": "pos", "bad": "neg", "weak": "neg",
    "too slow": "neg", "average": "other", "so so": "neu",
}  # fmt: skip
FILLERS = ("well", "i think", "honestly", "oh", "so")
OTHERS = ("has", "the", "of", "is", "a", "what", "about", "?", "yes", "no", "me", "too")


class _Writer:
    """A dialogue on its way: utterances, and where things are in them."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.tokens: list[str] = []

    def say(self, *parts: str) -> list[tuple[int, int]]:
        """An utterance of parts; gives the place of each over the whole dialogue."""
        places = []
        for part in parts:
            start = len(self.tokens)
            self.tokens += part.split()
            places.append((start, len(self.tokens)))
        self.sentences.append(" ".join(parts))
        return places


def dialogue(draw: random.Random, name: str) -> dict[str, Any]:
    """One dialogue of four to seven utterances."""
    made = _Writer()
    phone = draw.choice(PHONES)
    _, target, _ = made.say("what about the", phone, "?")
    replies, speakers = [-1], [0]
    quads: list[list[Any]] = []
    mentions: dict[str, list[list[Any]]] = {
        "targets": [[*target, phone]], "aspects": [], "opinions": [],
    }  # fmt: skip
    for _ in range(2):
        for depth in range(draw.randint(1, 3)):
            replies.append(0 if depth == 0 else len(replies) - 1)
            speakers.append(draw.randint(1, 3))
            if draw.random() < 0.2:
                made.say(draw.choice(FILLERS), draw.choice(("yes", "no", "me too")))
                continue
            part, opinion = draw.choice(PARTS), draw.choice(sorted(OPINIONS))
            about, named = target, phone
            if draw.random() < 0.4:
                named = draw.choice(PHONES)
                _, about, _, aspect, _, said = made.say(
                    draw.choice(FILLERS), named, "has", part, "is", opinion
                )
                mentions["targets"].append([*about, named])
            else:
                _, aspect, _, said = made.say(f"{draw.choice(FILLERS)} the", part, "is", opinion)
            polarity = OPINIONS[opinion]
            mentions["aspects"].append([*aspect, part])
            mentions["opinions"].append([*said, opinion, polarity])
            quads.append([*about, *aspect, *said, polarity, named, part, opinion])
    return {
        "doc_id": name, "sentences": made.sentences, "replies": replies, "speakers": speakers,
        "triplets": quads, **mentions,
    }  # fmt: skip


def write(file: Path, count: int, seed: int) -> Path:
    """A file of so many dialogues."""
    draw = random.Random(seed)
    file.write_text(
        json.dumps([dialogue(draw, f"{seed}-{i}") for i in range(count)], indent=1),
        encoding="utf-8",
    )
    return file


def encoder(place: Path, hidden: int = 32) -> Path:
    """A transformers directory of a tiny BERT, with a tokenizer that knows the words."""
    phrases = (*PHONES, *PARTS, *OPINIONS, *FILLERS, *OTHERS)
    return task_runs.tiny_encoder(place, phrases, hidden)


def main() -> int:
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    write(place / "train.json", 400, 0)
    write(place / "valid.json", 60, 1)
    encoder(place / "encoder")
    print(f"{place} is ready")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
