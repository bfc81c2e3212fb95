"""The small Chinese character encoder of `$EFFC_DATA/encoders` as a directory that transformers, and so effc, reads.

    python examples/lexical_fusion/encoder.py OUT [--data DIR] [--layers N]

It has the table of characters of Baidu's LAC (from jieba's package, MIT; headers Apache-2.0): 20,940 of them, 128
numbers each. LAC's recurrences behind it have no form of a free length, so that layers of BERT stand in their place,
drawn by chance: the characters are trained, how they are read is not. The tokenizer has a piece for every character.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import task_runs  # noqa: E402  the folder above has what examples of tasks share

FILE = "lac_small_zh_char.npz"
MARKS = task_runs.MARKS


def write(place: Path, folder: Path, layers: int = 2) -> Path:
    """The directory, from the file in `folder`."""
    import numpy as np
    import torch
    from tokenizers import Regex, pre_tokenizers
    from transformers import BertConfig, BertModel

    with np.load(folder / FILE) as arrays:
        numbers = json.loads(bytes(arrays["char2id"]).decode())
        table = torch.from_numpy(arrays["word_emb"].astype(np.float32))
    characters = sorted((c for c in numbers if len(c) == 1), key=numbers.__getitem__)
    task_runs.tokenizer(place, (*MARKS, *characters), pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"))  # fmt: skip
    config = BertConfig(
        vocab_size=len(MARKS) + len(characters), hidden_size=table.shape[1], num_hidden_layers=layers,
        num_attention_heads=4, intermediate_size=4 * table.shape[1], max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False)
    words, places = (
        model.embeddings.word_embeddings.weight,
        model.embeddings.position_embeddings.weight,
    )
    with torch.no_grad():
        words[len(MARKS) :] = table[[numbers[c] for c in characters]]
        words[1 : len(MARKS)] *= table.std() / words[1 : len(MARKS)].std()
        # sines, from which attention learns how far places are apart, as it hardly does from what is drawn
        steps = 10_000 ** -(torch.arange(0, places.shape[1], 2) / places.shape[1])
        angles = torch.arange(len(places))[:, None] * steps
        places[:] = torch.stack((angles.sin(), angles.cos()), -1).flatten(1) * table.std()
    model.save_pretrained(place)
    return place


def main() -> int:
    parser = argparse.ArgumentParser(description="The small Chinese encoder as a directory.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help=f"where encoders/{FILE} is")
    parser.add_argument("--layers", type=int, default=2)
    given = parser.parse_args()
    root = given.data or task_runs.data_root(HERE)
    if root is None or not (root / "encoders" / FILE).is_file():
        print(f"there is no encoders/{FILE}: name its folder with --data")
        return 1
    write(given.out, root / "encoders", given.layers)
    print(json.dumps({"out": str(given.out)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
