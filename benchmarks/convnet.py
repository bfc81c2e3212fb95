"""A small convolutional classifier of Fashion-MNIST, trained here: depthwise-separable blocks with batch norm, 0.1 M.

    python benchmarks/convnet.py            # minutes on two cores; writes benchmarks/state/convnet.safetensors

Training pictures come from Debian's package dataset-fashion-mnist (`apt-get install dataset-fashion-mnist`, MIT).
"""

from __future__ import annotations

import gzip
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import effc

WEIGHTS = Path(__file__).resolve().parent / "state" / "convnet.safetensors"
TRAIN = Path("/usr/share/datasets/fashion-mnist")


class Separable(nn.Module):
    """Depthwise 3×3, pointwise 1×1, each with its norm and a bounded activation (Howard et al. 2017)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width_in, width_in, 3, stride, 1, groups=width_in, bias=False)
        self.norm1 = nn.BatchNorm2d(width_in)
        self.pointwise = nn.Conv2d(width_in, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm1(self.depthwise(x)))
        return nn.functional.relu6(self.norm2(self.pointwise(x)))


class ConvNet(nn.Module):
    """pixel_values [batch, 1, 28, 28] → logits [batch, 10]"""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        sizes = ((32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2))
        self.blocks = nn.Sequential(*(Separable(*size) for size in sizes))
        self.head = nn.Linear(256, 10)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        x = nn.functional.relu6(self.norm(self.stem(pixel_values)))
        return {"logits": self.head(self.blocks(x).mean(dim=(2, 3)))}


def pictures(place: Path, word: str) -> tuple[Tensor, Tensor]:
    """Pictures [n, 1, 28, 28] around zero, and labels [n]."""
    with gzip.open(place / f"{word}-images-idx3-ubyte.gz") as stream:
        pixels = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(place / f"{word}-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read(), np.uint8, offset=8)
    scaled = (torch.from_numpy(pixels.copy()).float() / 255 - 0.286) / 0.353
    return scaled, torch.from_numpy(labels.copy()).long()


def train(epochs: int = 3) -> None:
    torch.manual_seed(0)
    images, labels = pictures(TRAIN, "train")
    net, size = ConvNet().train(), 128
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    started = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(size):
            if len(batch) < size:
                continue
            loss = nn.functional.cross_entropy(net(images[batch])["logits"], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: loss {loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    test, truth = pictures(TRAIN, "t10k")
    net.eval()
    with torch.no_grad():
        right = (net(test)["logits"].argmax(-1) == truth).float().mean()
    print(f"accuracy {right:.4f} over {len(test)} test pictures")
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(net.state_dict(), WEIGHTS)


def write_arrays(place: Path, calibration: int = 512) -> tuple[Path, Path, Path]:
    """Calibration pictures out of the training set, and either half of the test set with its labels, as .npz."""
    images, _ = pictures(TRAIN, "train")
    np.savez(place / "calib.npz", pixel_values=images[:calibration].numpy())
    images, labels = pictures(TRAIN, "t10k")
    for half, word in enumerate(("even", "odd")):
        chosen = slice(half, None, 2)
        np.savez(
            place / f"{word}.npz", pixel_values=images[chosen].numpy(), label=labels[chosen].numpy()
        )
    return place / "calib.npz", place / "even.npz", place / "odd.npz"


def net() -> effc.Source:
    """The trained net, for effc."""
    made = ConvNet()
    made.load_state_dict(load_file(WEIGHTS))
    example = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return effc.Source(
        modules={"main": made.eval()}, inputs={"main": {"pixel_values": example}}, kind="classifier"
    )


if __name__ == "__main__":
    if not TRAIN.is_dir():
        sys.exit("skipped: apt-get install dataset-fashion-mnist")
    train()
