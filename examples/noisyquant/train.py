"""Train a small vision transformer on Fashion-MNIST: what the example quantises where no other model is at hand.

    python examples/noisyquant/train.py vit OUT [--minutes 8] [--data DIR]
    python examples/noisyquant/train.py swin OUT
    python examples/noisyquant/train.py deit OUT

The pictures are those of Debian's package `dataset-fashion-mnist` (Xiao et al. 2017, MIT), four idx files in
/usr/share/datasets/fashion-mnist or in DIR. Training stops after so many minutes of the processor, and OUT becomes a
directory that transformers, and so effc, reads.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SIZE, CLASSES, BATCH, RATE, WARM = 28, 10, 64, 2e-3, 0.1


def model_of(kind: str) -> Any:
    """An untrained model: `deit` has a token for distillation too, `swin` windows that move."""
    import transformers

    shared = {"image_size": SIZE, "num_channels": 1, "num_labels": CLASSES}
    width = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}  # fmt: skip
    match kind:
        case "swin":
            config: Any = transformers.SwinConfig(
                **shared, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=7,
                mlp_ratio=2.0, drop_path_rate=0.0,
            )  # fmt: skip
            return transformers.SwinForImageClassification(config)
        case "deit":
            config = transformers.DeiTConfig(**shared, **width, patch_size=4)
            return transformers.DeiTForImageClassification(config)
    config = transformers.ViTConfig(**shared, **width, patch_size=4)
    return transformers.ViTForImageClassification(config)


def pictures(folder: Path, part: str) -> tuple[Any, Any]:
    """Pictures [n, 1, 28, 28] in −1 … 1 and labels of `train` or `t10k`."""
    import gzip

    import numpy as np
    import torch

    def content(word: str, head: int) -> Any:
        return np.frombuffer(gzip.decompress((folder / word).read_bytes()), np.uint8, offset=head)

    pixels = content(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 1, SIZE, SIZE)
    labels = content(f"{part}-labels-idx1-ubyte.gz", 8).astype(np.int64)
    return torch.from_numpy(pixels.copy()).float() / 127.5 - 1, torch.from_numpy(labels)


def batches(x: Any, y: Any) -> Iterator[tuple[Any, Any]]:
    """For ever, in a new order each time, every second picture seen from the other side."""
    import torch

    draw = torch.Generator().manual_seed(0)
    while True:
        for chosen in torch.randperm(len(x), generator=draw).split(BATCH):
            seen = x[chosen]
            seen[::2] = seen[::2].flip(-1)
            yield seen, y[chosen]


def trained(kind: str, folder: Path, minutes: float) -> tuple[Any, float]:
    """The model after so many minutes of the processor, and its accuracy on the test pictures."""
    import torch

    torch.manual_seed(0)
    model = model_of(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    started, seconds = time.process_time(), 60 * minutes
    for step, (x, y) in enumerate(batches(*pictures(folder, "train")), 1):
        done = (time.process_time() - started) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(done / WARM + 1e-3, (1 - done) / (1 - WARM))
        loss = torch.nn.functional.cross_entropy(model(pixel_values=x).logits, y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"{100 * done:.0f} %: step {step}, loss {loss.item():.3f}", flush=True)
    model.eval()
    x, y = pictures(folder, "t10k")
    with torch.no_grad():
        found = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in x.split(250)])
    return model, float((found == y).float().mean())


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train a small vision transformer on Fashion-MNIST."
    )
    parser.add_argument("kind", choices=("vit", "swin", "deit"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="of the processor")
    parser.add_argument("--data", type=Path, default=DEBIAN, help="where the four idx files are")
    given = parser.parse_args()
    if not (given.data / "train-images-idx3-ubyte.gz").is_file():
        print(
            f"there are no pictures in {given.data}: apt install dataset-fashion-mnist",
            file=sys.stderr,
        )
        return 1
    model, accuracy = trained(given.kind, given.data, given.minutes)
    model.save_pretrained(given.out)
    settings = {"do_resize": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                "image_mean": [0.5], "image_std": [0.5]}  # fmt: skip
    (given.out / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    print(f"{given.out}: accuracy {accuracy:.4f} on the test pictures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
