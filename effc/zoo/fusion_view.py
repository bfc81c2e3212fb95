"""Lexical fusions of a paragraph, for people: lines for a terminal, and a page of HTML that loads nothing.

A fusion has a number. On the page it stands beside the fusion word and each of its separation words, and leads to the
list and back. Words come from strangers: control characters are not shown, and on a page everything is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from effc.zoo import shown
from effc.zoo.fusion_files import Paragraph, Span, Truth

Json = dict[str, Any]
COLOURS = {"fusion": "35", "separation": "36"}
"""Of a terminal (ECMA-48)."""
STYLE = """
body{font:17px/1.9 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h2{font-size:1.05rem;margin:2rem 0 .5rem}
.m{border-radius:.25rem;padding:0 .15rem}
.fusion{background:#ecd5ff}.separation{background:#cfe8ff}
a{font-size:.7rem;vertical-align:super;text-decoration:none;color:#555;margin-left:.1rem}
li a{font-size:1rem;vertical-align:baseline}
li:target,span:target{outline:3px solid #f80}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}.fusion{background:#55347a}
.separation{background:#234a6b}a{color:#aaa}}
""".strip()


def answer(paragraph: Paragraph, said: Truth) -> Json:
    """Fusions and mentions as plain values: spans as [start, end] over characters, and their texts."""
    text = paragraph.text

    def word(span: Span) -> Json:
        return {"span": list(span), "text": text[span.start : span.end]}

    return {
        "id": paragraph.name,
        "text": text,
        "fusions": [
            {
                **word(fusion),
                "separations": [
                    {**word(part), "characters": sorted(
                        c for c, s in said.characters if s == part and fusion.start <= c < fusion.end)}
                    for part in sorted(s for f, s in said.pairs if f == fusion)
                ],
            }
            for fusion in sorted({f for f, _ in said.pairs})
        ],
        "mentions": {
            "fusion": [list(span) for span in sorted(said.fusions)],
            "separation": [list(span) for span in sorted(said.separations)],
        },
    }  # fmt: skip


def lines(found: Json, *, in_colour: bool) -> list[str]:
    """The text with what was found in it, and below it its fusions."""
    made = [f"paragraph {shown.plain(found['id'])}"]
    words = []
    for text, kind, _ in _runs(found):
        word = shown.plain(text)
        words.append(f"\x1b[{COLOURS[kind]}m{word}\x1b[0m" if kind and in_colour else word)
    made.append("  " + "".join(words))
    for fusion in found["fusions"]:
        parts = " + ".join(shown.plain(part["text"]) for part in fusion["separations"])
        made.append(f"    {shown.plain(fusion['text'])} = {parts}")
    if not found["fusions"]:
        made.append("    no fusion")
    return made


def page(found: Sequence[Json]) -> str:
    """A page with every paragraph, its words coloured, and its fusions."""
    body = "\n".join(part for number, each in enumerate(found) for part in _paragraph(number, each))
    return shown.page("Lexical fusions", STYLE, body)


def _paragraph(number: int, found: Json) -> Iterator[str]:
    yield f"<h2>Paragraph {shown.shown(found['id'] or str(number))}</h2>"
    ends: dict[int, list[tuple[int, int]]] = {}
    for n, fusion in enumerate(found["fusions"], 1):
        for i, word in enumerate([fusion, *fusion["separations"]]):
            ends.setdefault(word["span"][1], []).append((n, i))
    words = []
    for text, kind, end in _runs(found):
        marks = "".join(
            f'<span id="m{number}-{n}-{i}"><a href="#f{number}-{n}">{n}</a></span>'
            for n, i in ends.get(end, ())
        )
        inner = shown.shown(text)
        words.append(f'<span class="m {kind}" title="{kind}">{inner}</span>{marks}' if kind else inner)  # fmt: skip
    yield f"<p>{''.join(words)}</p>"
    rows = [
        f'<li id="f{number}-{n}"><a href="#m{number}-{n}-0">{shown.shown(fusion["text"])}</a> = '
        + " + ".join(shown.shown(part["text"]) for part in fusion["separations"])
        + "</li>"
        for n, fusion in enumerate(found["fusions"], 1)
    ]
    yield f"<ol>{''.join(rows)}</ol>" if rows else "<p>No fusion.</p>"


def _runs(found: Json) -> Iterator[tuple[str, str | None, int]]:
    """The text in pieces: what each is, and where it ends."""
    text, place = found["text"], 0
    words = sorted((s, e, kind) for kind in COLOURS for s, e in found["mentions"][kind])
    for start, end, kind in words:
        if start > place:
            yield text[place:start], None, start
        yield text[start:end], kind, end
        place = end
    if place < len(text):
        yield text[place:], None, len(text)
