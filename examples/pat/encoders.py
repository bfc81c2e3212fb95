"""Pruning while tuning on encoders: a vision transformer, and an encoder of sentences.

    python examples/pat/encoders.py [--smoke] [--json FILE]

Both have LayerNorms in front of their blocks, which are written as RMSNorms first; an encoder with norms behind its
blocks (BERT, MiniLM) is refused with the reason. A quarter of the residual width goes while the model is held to its
own outputs (no labels), by adapters and hybrid sparsification modules, or by adapters alone behind pruning. The vision
transformer is tuned on half of Fashion-MNIST's test pictures and judged by the others. The encoder of sentences is
trained here first, on SST-2, tuned on the same sentences, and judged by the test sentences. The data and the
vision transformer are read from `$EFFC_DATA`, or `../shared/data` beside the repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import arms as made_of  # noqa: E402
import numpy as np  # noqa: E402
import run as language  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

Json = dict[str, Any]
ARMS = ("lora", "magnitude then lora", "pca then lora", "pca then pat", "pca then pat, random mask")
BATCH, CALIBRATED = 64, 256
LENGTH, HEADS, HIDDEN = 32, 4, 0.2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with what it is tuned on and judged by."""

    name: str
    program: Any
    rows: list[Json]
    score: Callable[[Any], float]
    """Of what runs the model on inputs."""
    align: int
    lr: float


def cases(data: Path, tested: int) -> Iterator[Case]:
    """The models, after the exact passes of every compile and the conversion of their norms."""
    import effc
    from effc.compiler import trace_source
    from effc.passes import PASSES
    from effc.source import load

    def ready(program: Any) -> Any:
        language.cleaned(program)
        effc.apply(PASSES["layernorm-to-rmsnorm"](), program)
        return program

    images, labels = pictures(data / "fashion-mnist")
    shown = (images[:, None] / 255 - 0.5) / 0.5  # as the processor of the model does it
    seen, seen_labels = shown[1 : 2 * tested : 2], labels[1 : 2 * tested : 2]

    def top_1(run: Any) -> float:
        made = [
            run({"pixel_values": x})["logits"]
            for x in np.array_split(seen, max(1, len(seen) // 250))
        ]
        return float((np.concatenate(made).argmax(-1) == seen_labels).mean())

    yield Case(
        name="vision transformer", align=8, lr=2e-3, score=top_1,
        program=ready(trace_source(load({"transformers": str(data / "vit-fashion-mnist")}))),
        rows=[{"pixel_values": x[None]} for x in shown[::2]],
    )  # fmt: skip
    yield sentences(data / "sst2", ready, tested)


class Encoder(nn.Module):
    """input_ids [batch, length], 0 where there is no word → logits [batch, 2]; norms in front of the blocks."""

    def __init__(self, words: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        seen = input_ids != 0
        x = self.words(input_ids) + self.places.weight
        for block in self.blocks:
            x = block(x, seen)
        votes = self.head(self.norm(x)) * seen[..., None]
        return {"logits": votes.sum(1) / seen.sum(1, keepdim=True)}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, width // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def sentences(place: Path, ready: Callable[[Any], Any], tested: int) -> Case:
    import effc

    read = {word: lines(place / f"{word}.tsv") for word in ("train", "test")}
    counted = Counter(w for text, _ in read["train"] for w in text.split())
    known = {
        word: number for number, word in enumerate(sorted(w for w in counted if counted[w] > 2), 2)
    }

    def coded(text: str) -> list[int]:
        ids = [known.get(word, 1) for word in text.split()[:LENGTH]]
        return ids + [0] * (LENGTH - len(ids))

    ids = {word: np.array([coded(text) for text, _ in of], np.int64) for word, of in read.items()}
    right = {word: np.array([label for _, label in of]) for word, of in read.items()}
    model = trained(
        Encoder(len(known) + 2), ids["train"], right["train"], 1 if tested < 1000 else 8
    )

    def top_1(run: Any) -> float:
        made = [run({"input_ids": part})["logits"] for part in np.array_split(ids["test"], 8)]
        return float((np.concatenate(made).argmax(-1) == right["test"]).mean())

    program = effc.trace(model, {"input_ids": torch.from_numpy(ids["train"][:2])})
    return Case(
        name="sentence encoder", align=8, lr=2e-3, score=top_1, program=ready(program),
        rows=[{"input_ids": row[None]} for row in ids["train"]],
    )  # fmt: skip


def lines(file: Path) -> list[tuple[str, int]]:
    """Sentences and their labels."""
    rows = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines()]
    return [(text, int(label)) for text, label in rows]


def trained(model: Encoder, ids: Any, labels: Any, epochs: int) -> Encoder:
    """The model behind so many rounds over the sentences, a fifth of the words hidden in each."""
    torch.manual_seed(0)
    inputs, wanted = torch.from_numpy(ids), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(epochs):
        for part in torch.randperm(len(inputs)).split(BATCH):
            shown = inputs[part]
            hidden = (torch.rand(shown.shape) < HIDDEN) & (shown > 0)
            loss = functional.cross_entropy(
                model(shown.masked_fill(hidden, 1))["logits"], wanted[part]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def pictures(place: Path) -> tuple[Any, Any]:
    """Pictures [n, 28, 28] as floats from 0 to 255, and labels [n], out of idx files."""

    def bytes_of(word: str, skip: int) -> Any:
        with gzip.open(next(place.glob(f"*{word}*.gz"))) as stream:
            return np.frombuffer(stream.read(), np.uint8, offset=skip)

    return bytes_of("images", 16).reshape(-1, 28, 28).astype(np.float32), bytes_of("labels", 8)


def unit(case: Case, arm: str, seed: int, steps: int, rank: int, hsm_rank: int) -> Json:
    """One arm and seed: pruned and tuned towards what it was, and judged in an engine."""
    import tempfile

    import effc
    from effc import measure
    from effc.backends.ort import Ort
    from effc.calib.data import Batch
    from effc.passes import PASSES

    program = case.program.clone()
    width = language.stream(program.only())
    plan = SimpleNamespace(rank=rank, hsm_rank=hsm_rank, align=case.align)
    alone = language.alone(program.only(), width, plan)
    training = {
        "task": "none",
        "distill": 1.0,
        "steps": steps,
        "lr": case.lr,
        "batch": BATCH,
        "held": BATCH,
    }
    asked = made_of.arms(width.name, rank, alone, hsm_rank, case.align, seed, training)[arm]
    order = np.random.default_rng([5, seed]).permutation(len(case.rows))
    drawn = [
        joined([case.rows[i] for i in part])
        for part in np.array_split(order, max(2, len(order) // BATCH))
    ]
    calib = [Batch(inputs=one) for one in drawn[: max(1, CALIBRATED // BATCH)]]
    teacher, seconds = case.program, 0.0
    for given in asked:
        options = {"pass": given} if isinstance(given, str) else dict(given)
        pass_ = PASSES[options.pop("pass")](**typed(options))
        if pass_.trains:
            seconds += effc.apply(pass_, program, train=effc.trainer(teacher, drawn)).seconds
        else:
            effc.apply(pass_, program, calib)
    with tempfile.TemporaryDirectory(prefix="effc-") as place:
        lowered = Ort().lower(program.only(), Path(place))
        with measure.opened(lowered, language.THREADS) as engine:
            score = case.score(engine)
    return {
        "score": score, "seconds": round(seconds, 2), "linear_parameters": language.linear(program.only()),
        "width": language.stream(program.only()).size,
    }  # fmt: skip


def typed(options: Json) -> Json:
    """Options as Python takes them; adapters are for all layers but the one that gives the classes."""
    import effc
    from effc.train.hsm import Hsm

    made = {**options, "terms": (Hsm(),)} if "terms" in options else options
    return (
        {**made, "select": effc.Select(exclude=("head", "*classifier"))}
        if "alpha" in made
        else made
    )


def joined(rows: list[Json]) -> Json:
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def refused() -> str:
    """What a compile says to an encoder whose norms stand behind its blocks."""
    import transformers

    import effc
    from effc.errors import PreconditionError
    from effc.passes import PASSES

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    model = transformers.BertModel(config).eval()
    ids = torch.arange(16).reshape(2, 8)
    program = effc.trace(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    language.cleaned(program)
    try:
        effc.apply(PASSES["insert-hsm"](ratio=made_of.RATIO), program)
    except PreconditionError as error:
        return str(error)
    raise SystemExit("an encoder with norms behind its blocks was pruned")


def main() -> int:
    parser = argparse.ArgumentParser(description="Pruning while tuning, on encoders.")
    parser.add_argument("--smoke", action="store_true", help="a few steps of two arms")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured as JSON")
    given = parser.parse_args()
    data, started = language.data_root(), time.perf_counter()
    found: Json = {"example": "pat-encoders", "refused": refused()}
    if data is None:
        found["skipped"] = "there are no data sets: set EFFC_DATA"
        print(found["skipped"])
    else:
        arms, seeds, steps, tested = (
            (("lora", "pca then pat"), 1, 4, 250) if given.smoke else (ARMS, 3, 150, 5000)
        )
        for case in cases(data, tested):
            own = case.score(runs(case.program))
            made: Json = {"whole": own, "arms": {}}
            for arm in arms:
                units = [unit(case, arm, seed, steps, rank=4, hsm_rank=2) for seed in range(seeds)]
                made["arms"][arm] = {key: [u[key] for u in units] for key in units[0]}
                print(
                    f"{case.name}, {arm}: {made['arms'][arm]['score']} of {own:.4f} whole",
                    flush=True,
                )
            found[case.name] = made
    found["wall_s"] = round(time.perf_counter() - started, 1)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


def runs(program: Any) -> Callable[[Json], Json]:
    """A graph as what takes arrays and gives them."""

    def run(given: Json) -> Json:
        made = program.only().run({name: torch.from_numpy(value) for name, value in given.items()})
        return {name: value.numpy() for name, value in made.items()}

    return run


if __name__ == "__main__":
    raise SystemExit(main())
