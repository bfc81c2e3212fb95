"""Made-up conversations in the format of MELD, and a tiny encoder that knows their words.

    python examples/cer/made.py DIR          # DIR/train.csv, DIR/valid.csv and DIR/encoder

Everybody has a word of their own, and some say things that mean another emotion from another mouth; "me too" takes the
emotion of what was said before. Who speaks is not told, so whoever learns to tell speakers apart, and to look back,
does better. A small model learns it in a minute: it shows that all runs, and no more.
"""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import task_runs  # the folder above has what examples of tasks share

SPEAKERS = {
    "Chandler": "could it be", "Joey": "how you doing", "Monica": "i know", "Phoebe": "oh no no",
    "Rachel": "oh my god", "Ross": "we were", "Gunther": "coffee",
}  # fmt: skip
"""Everybody with what they like to say; the last is none of the six."""
FEELINGS = {
    "neutral": ("see you at nine", "the table is here", "it was monday"),
    "joy": ("i am so happy", "we won", "best day ever"),
    "sadness": ("i miss her", "it is over", "i feel so low"),
    "anger": ("get out", "how dare you", "stop it now"),
    "surprise": ("you did what", "no way", "i did not see that"),
    "fear": ("i am scared", "what was that noise"),
    "disgust": ("that is gross", "it smells awful"),
}
IRONY = {
    "great just great": {"Chandler": "anger", "Joey": "joy", "Phoebe": "joy", "Ross": "sadness"}
}
"""What several say, and what each means by it; from all others it is neutral."""
ECHO = "me too"


def conversation(draw: random.Random) -> list[tuple[str, str, str]]:
    """Text, speaker and emotion of three to ten utterances."""
    who = draw.sample(sorted(SPEAKERS), 3)
    found: list[tuple[str, str, str]] = []
    for _ in range(draw.randint(3, 10)):
        speaker = draw.choice(who)
        chance = draw.random()
        if found and chance < 0.2:
            text, emotion = ECHO, found[-1][2]
        elif chance < 0.35:
            text = draw.choice(sorted(IRONY))
            emotion = IRONY[text].get(speaker, "neutral")
        else:
            emotion = draw.choice((*FEELINGS, "neutral", "neutral"))
            text = draw.choice(FEELINGS[emotion])
        if draw.random() < 0.8:
            text = f"{SPEAKERS[speaker]} , {text}"
        found.append((text, speaker, emotion))
    return found


def write(file: Path, count: int, seed: int) -> Path:
    """A file of so many conversations."""
    draw = random.Random(seed)
    with file.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("Sr No.", "Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"))
        number = 0
        for dialogue in range(count):
            for place, said in enumerate(conversation(draw)):
                number += 1
                rows.writerow((number, *said, dialogue, place))
    return file


def encoder(place: Path, hidden: int = 32) -> Path:
    """A transformers directory of a tiny BERT, with a tokenizer that knows the words."""
    phrases = (
        ECHO,
        ",",
        *SPEAKERS.values(),
        *IRONY,
        *(p for all_ in FEELINGS.values() for p in all_),
    )
    return task_runs.tiny_encoder(place, phrases, hidden)


def main() -> int:
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    write(place / "train.csv", 400, 0)
    write(place / "valid.csv", 60, 1)
    encoder(place / "encoder")
    print(f"{place} is ready")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
