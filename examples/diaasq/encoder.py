"""The small multilingual encoder of `$EFFC_DATA/encoders` as a directory that transformers, and so effc, reads.

    python examples/diaasq/encoder.py OUT [--data DIR]

It is multilingual-e5-small (MIT; 12 layers of 384) whose weights were stored in 4 bit and whose vocabulary was cut to
the pieces that the corpora use: a lossy copy, which training takes on from. The tokenizer is a unigram model. A word
that is one Chinese character is looked up without the mark of a word's beginning, or it would be two pieces.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NAMES = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "ao": "attention.output.dense", "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
}  # fmt: skip
MARK = "\u2581"
"""What stands before the first piece of a word."""
ENDS = {"w": "weight", "b": "bias"}
EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


def data_root() -> Path | None:
    places = [os.environ.get("EFFC_DATA"), HERE.parents[2] / "shared" / "data"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def write(place: Path, folder: Path) -> Path:
    """The directory, from the two files in `folder`, whose reader is run."""
    import numpy as np
    import torch
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    spec = importlib.util.spec_from_file_location("me5_small", folder / "me5_small.py")
    assert spec is not None and spec.loader is not None
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    file = folder / "me5_small_q4_pruned.npz"
    weights, sizes, words = reader.load_pruned(file)
    config = BertConfig(
        vocab_size=len(weights["emb.word"]), hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"],
        intermediate_size=sizes["ffn"], max_position_embeddings=len(weights["emb.pos"]),
        type_vocab_size=len(weights["emb.type"]), layer_norm_eps=sizes["eps"],
        pad_token_id=words.ids["pad"],
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    state = {_name(name): torch.from_numpy(value) for name, value in weights.items()}
    model.load_state_dict(state)
    model.save_pretrained(place)
    with np.load(file) as arrays:
        pieces = json.loads(bytes(arrays["meta"]).decode())["pieces"]
    marks = {"cls": "bos", "sep": "eos", "pad": "pad", "unk": "unk"}
    names = {f"{name}_token": pieces[words.ids[own]] for name, own in marks.items()}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(words, pieces), model_max_length=len(weights["emb.pos"]), **names
    ).save_pretrained(place)
    return place


def _name(word: str) -> str:
    if word in EMBEDDINGS:
        return EMBEDDINGS[word]
    layer, part, end = word.split(".")
    return f"encoder.layer.{layer[1:]}.{NAMES[part]}.{ENDS[end]}"


def tokenizer(words: Any, pieces: list[str]) -> Any:
    """The unigram model. Characters are made alike by NFKC, which the model's own table goes a little beyond."""
    from tokenizers import Regex, Tokenizer, models, normalizers

    scored = list(zip(pieces, map(float, words.s), strict=True))
    made = Tokenizer(models.Unigram(scored, unk_id=words.ids["unk"], byte_fallback=False))
    made.normalizer = normalizers.Sequence([
        normalizers.NFKC(),
        normalizers.Prepend(MARK),
        normalizers.Replace(" ", MARK),
        normalizers.Replace(Regex(rf"^{MARK}(?=[\u3400-\u9fff]$)"), ""),
    ])  # fmt: skip
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description="The small multilingual encoder as a directory.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="where encoders/me5_small_q4_pruned.npz is")
    given = parser.parse_args()
    root = given.data or data_root()
    if root is None or not (root / "encoders" / "me5_small_q4_pruned.npz").is_file():
        print("there is no encoders/me5_small_q4_pruned.npz: name its folder with --data")
        return 1
    write(given.out, root / "encoders")
    print(json.dumps({"out": str(given.out)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
