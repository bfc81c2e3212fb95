"""What tags of a dialogue can say at most: the truth of a file written as tags, decoded again and scored.

    python benchmarks/ceiling.py DIALOGUES.json... [--tokenizer DIR] [--json FILE]

Once with one table for heads and tails of relations, as published, and once with a table for each. Without a tokenizer
every token is one piece, where the first loses most.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from effc.zoo import dialogue_files, dialogue_layout, dialogue_scores, dialogue_tags


class Words:
    """A tokenizer that leaves every token whole."""

    cls_token_id, sep_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[3] for _ in text]}


def ceiling(file: Path, tokenizer: Any, *, split: bool) -> dict[str, dict[str, float]]:
    rows = []
    for dialogue in dialogue_files.read(file):
        laid = dialogue_layout.lay(dialogue, tokenizer)
        tags = dialogue_tags.encode(laid, split=split)
        rows.append(dialogue_scores.counts(dialogue, dialogue_tags.decode(tags, laid)))
    return dialogue_scores.scores(dialogue_scores.table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a transformers directory")
    parser.add_argument("--json", metavar="FILE", type=Path)
    given = parser.parse_args()
    tokenizer: Any = Words()
    if given.tokenizer is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(given.tokenizer), local_files_only=True)
    found: dict[str, Any] = {}
    print(f"{'file':28} {'tables':8} {'quads':>6} {'intra':>6} {'inter':>6} {'there':>6}")
    for file in given.files:
        for split in (False, True):
            word = "two" if split else "one"
            made = found[f"{file.parent.name}/{file.name}, {word}"] = ceiling(
                file, tokenizer, split=split
            )
            shown = " ".join(f"{made[name]['f1']:6.3f}" for name in ("quads", "intra", "inter"))
            print(
                f"{file.parent.name + '/' + file.name:28} {word:8} {shown} {made['quads']['there']:6.0f}"
            )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
