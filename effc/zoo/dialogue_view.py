"""What was found in a dialogue, for people: lines for a terminal, and a page of HTML that loads nothing.

A quadruple has a number. On the page it stands beside each of its three spans, and leads to the list and back. Words
come from strangers: control characters are not shown, and on a page everything is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from effc.zoo import shown
from effc.zoo.dialogue_files import Dialogue, Span, Truth

Json = dict[str, Any]
KINDS = ("target", "aspect", "opinion")
COLOURS = {"target": "36", "aspect": "33", "opinion": "35"}
"""Of a terminal (ECMA-48)."""
STYLE = """
body{font:16px/1.6 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h2{font-size:1.05rem;margin:2rem 0 .5rem}
p.u{margin:.3rem 0;padding-left:.6rem;border-left:3px solid #ddd}
.who{color:#666;font-size:.8rem;margin-right:.5rem}
.m{border-radius:.25rem;padding:0 .15rem}
.target{background:#cfe8ff}.aspect{background:#ffe9b8}.opinion{background:#ecd5ff}
.m.several{outline:2px solid #888}
a{font-size:.7rem;vertical-align:super;text-decoration:none;color:#555;margin-left:.1rem}
td a{font-size:1rem;vertical-align:baseline}
table{border-collapse:collapse}td,th{padding:.2rem .6rem;text-align:left;border-bottom:1px solid #eee}
.pos{color:#0a6b2d}.neg{color:#a11}.other{color:#555}
tr:target,span:target{outline:3px solid #f80}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}.target{background:#234a6b}
.aspect{background:#6b5218}.opinion{background:#55347a}p.u{border-color:#444}a,.who,.other{color:#aaa}
.pos{color:#6d9}.neg{color:#f88}}
""".strip()


def answer(dialogue: Dialogue, said: Truth) -> Json:
    """Quadruples and mentions as plain values: spans as [start, end] over tokens of the dialogue, and their texts."""
    return {
        "doc_id": dialogue.name,
        "quads": [
            {
                **{kind: list(span) for kind, span in zip(KINDS, quad[:3], strict=True)},
                "polarity": quad.polarity,
                "texts": [dialogue.text(span) for span in quad[:3]],
                "distance": dialogue.distance(quad[:3]),
            }
            for quad in sorted(said.quads)
        ],
        **{
            name: [list(span) for span in sorted(getattr(said, name))]
            for name in ("targets", "aspects", "opinions")
        },
    }


def lines(dialogue: Dialogue, found: Json, *, in_colour: bool) -> list[str]:
    """Utterances with what was found in them, and below each dialogue its quadruples."""
    kinds = _kinds(dialogue, found)
    made = [f"dialogue {shown.plain(dialogue.name)}"]
    for number, tokens in enumerate(dialogue.utterances):
        words = []
        for place, token in enumerate(tokens, dialogue.starts[number]):
            kind = next(iter(kinds.get(place, ())), None)
            word = shown.plain(token)
            words.append(f"\x1b[{COLOURS[kind]}m{word}\x1b[0m" if kind and in_colour else word)
        indent = "  " * (1 + dialogue.depths[number])
        made.append(f"{indent}{dialogue.speakers[number]}: {' '.join(words)}")
    for quad in found["quads"]:
        made.append(f"    {' | '.join(map(shown.plain, quad['texts']))} | {quad['polarity']}")
    if not found["quads"]:
        made.append("    no quadruple")
    return made


def page(dialogues: Sequence[Dialogue], found: Sequence[Json]) -> str:
    """A page with every dialogue, its spans coloured, and its quadruples."""
    body = "\n".join(
        part
        for number, (dialogue, each) in enumerate(zip(dialogues, found, strict=True))
        for part in _dialogue(number, dialogue, each)
    )
    return shown.page("Quadruples", STYLE, body)


def _dialogue(number: int, dialogue: Dialogue, found: Json) -> Iterator[str]:
    yield f"<h2>Dialogue {shown.shown(dialogue.name or str(number))}</h2>"
    kinds, links = _kinds(dialogue, found), _links(found)
    for i, tokens in enumerate(dialogue.utterances):
        first = dialogue.starts[i]
        words = []
        for mentioned, places in groupby(
            range(first, first + len(tokens)), lambda place: kinds.get(place, ())
        ):
            for run in _runs(list(places), links):
                text = shown.shown(" ".join(tokens[place - first] for place in run))
                words.append(_mention(text, mentioned, links.get(run[-1], ()), number))
        indent = 1.5 * dialogue.depths[i]
        yield (
            f'<p class="u" style="margin-left:{indent}rem"><span class="who">{dialogue.speakers[i]}</span>'
            f"{' '.join(words)}</p>"
        )
    rows = [
        f'<tr id="q{number}-{q}"><td><a href="#m{number}-{q}-target">{q}</a></td>'
        + "".join(f"<td>{shown.shown(text)}</td>" for text in quad["texts"])
        + f'<td class="{escape(quad["polarity"])}">{escape(quad["polarity"])}</td></tr>'
        for q, quad in enumerate(found["quads"], 1)
    ]
    head = "".join(f"<th>{word}</th>" for word in ("", *KINDS, "polarity"))
    yield f"<table><tr>{head}</tr>{''.join(rows)}</table>" if rows else "<p>No quadruple.</p>"


def _runs(places: list[int], links: Mapping[int, Sequence[tuple[int, str]]]) -> Iterator[list[int]]:
    """Tokens of one colour, cut behind each at which a span ends."""
    run: list[int] = []
    for place in places:
        run.append(place)
        if place in links:
            yield run
            run = []
    if run:
        yield run


def _mention(text: str, kinds: Sequence[str], ends: Sequence[tuple[int, str]], number: int) -> str:
    """Text of one colour, with the numbers of the quadruples that a span of it ends for."""
    if not kinds:
        return text
    several = " several" if len(kinds) > 1 else ""
    title = ", ".join(kinds)
    marks = "".join(
        f'<span id="m{number}-{q}-{kind}"><a href="#q{number}-{q}">{q}</a></span>'
        for q, kind in ends
    )
    return f'<span class="m {kinds[0]}{several}" title="{title}">{text}</span>{marks}'


def _kinds(dialogue: Dialogue, found: Json) -> dict[int, tuple[str, ...]]:
    """What every token is part of."""
    made: dict[int, set[str]] = {}
    for kind in KINDS:
        spans = [*found[f"{kind}s"], *(quad[kind] for quad in found["quads"])]
        for start, end in spans:
            for place in range(start, end):
                made.setdefault(place, set()).add(kind)
    return {place: tuple(kind for kind in KINDS if kind in kinds) for place, kinds in made.items()}


def _links(found: Json) -> dict[int, list[tuple[int, str]]]:
    """Numbers of quadruples and kinds of the spans that end at each token."""
    made: dict[int, list[tuple[int, str]]] = {}
    for number, quad in enumerate(found["quads"], 1):
        for kind in KINDS:
            made.setdefault(Span(*quad[kind]).end - 1, []).append((number, kind))
    return made
