"""The emotions of a conversation, for people: lines for a terminal, and a page of HTML that loads nothing.

Words come from strangers: control characters are not shown, and on a page everything is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from effc.zoo import shown
from effc.zoo.conversation_files import Conversation

Json = dict[str, Any]
HUES = {
    "neutral": 0, "surprise": 48, "fear": 275, "scared": 275, "sadness": 215, "sad": 215, "joy": 130,
    "joyful": 130, "peaceful": 170, "powerful": 25, "anger": 2, "mad": 2, "disgust": 80,
}  # fmt: skip
"""Of the circle of colours, in degrees; the neutral one is grey."""
COLOURS = {
    "neutral": "37", "surprise": "33", "fear": "35", "scared": "35", "sadness": "34", "sad": "34",
    "joy": "32", "joyful": "32", "peaceful": "36", "powerful": "93", "anger": "31", "mad": "31",
    "disgust": "92",
}  # fmt: skip
"""Of a terminal (ECMA-48)."""
STYLE = """
body{font:16px/1.6 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h2{font-size:1.05rem;margin:2rem 0 .5rem}
p.u{margin:.3rem 0;padding-left:.6rem;border-left:.35rem solid var(--c)}
.who{color:#666;font-size:.8rem;margin-right:.5rem}
.m{font-size:.8rem;margin-left:.5rem;padding:0 .35rem;border-radius:.25rem;background:var(--c);color:#111}
.there{font-size:.8rem;color:#a11;margin-left:.5rem}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}.who{color:#aaa}.there{color:#f88}}
""".strip()


def answer(conversation: Conversation, said: Sequence[int], emotions: Sequence[str]) -> Json:
    """Every utterance with its emotion as plain values; what the file says of it is `there`."""
    return {
        "dialogue": conversation.name,
        "utterances": [
            {
                "speaker": " & ".join(utterance.speakers), "text": utterance.text,
                "emotion": emotions[place],
                "there": None if utterance.emotion is None else emotions[utterance.emotion],
            }
            for utterance, place in zip(conversation.utterances, said, strict=True)
        ],
    }  # fmt: skip


def lines(found: Json, *, in_colour: bool) -> list[str]:
    """Every utterance behind its emotion."""
    made = [f"dialogue {shown.plain(found['dialogue'])}"]
    for each in found["utterances"]:
        word = f"{each['emotion']:<8}"
        mark = f"\x1b[{COLOURS[each['emotion']]}m{word}\x1b[0m" if in_colour else word
        made.append(f"  {mark}  {shown.plain(each['speaker'])}: {shown.plain(each['text'])}")
    return made


def page(found: Sequence[Json]) -> str:
    """A page with every conversation, its utterances in the colours of their emotions."""
    body = "\n".join(part for each in found for part in _conversation(each))
    style = STYLE + "\n" + "".join(_rule(word, hue) for word, hue in HUES.items())
    return shown.page("Emotions", style, body)


def _rule(word: str, hue: int) -> str:
    return f".{word}{{--c:hsl({hue},{0 if word == 'neutral' else 70}%,72%)}}"


def _conversation(found: Json) -> Iterator[str]:
    yield f"<h2>Dialogue {shown.shown(found['dialogue'])}</h2>"
    for each in found["utterances"]:
        other = each["there"] not in (None, each["emotion"])
        there = f'<span class="there">{each["there"]} in the file</span>' if other else ""
        yield (
            f'<p class="u {each["emotion"]}"><span class="who">{shown.shown(each["speaker"])}</span>'
            f'{shown.shown(each["text"])}<span class="m">{each["emotion"]}</span>{there}</p>'
        )
