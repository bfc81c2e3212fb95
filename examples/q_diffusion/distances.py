"""How far a set of pictures is from another as a set, on what a small classifier of digits sees in them.

    fréchet = ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ Σ')^½)            mean and covariance of the features (Heusel et al. 2017)
    kid     = unbiased MMD² with the kernel (x·y / d + 1)³     (Bińkowski et al. 2018)

Two sets of one law are apart too, the more so the fewer they are, so what is told is the difference to that: pictures
of a quantised model against other pictures of the float model, less what the float model's pictures from the same noise
are from these. The classifier is trained on digits of a test set, in seconds; no model is calibrated on them.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import linalg
from torch import Tensor, nn

Array = np.ndarray[Any, np.dtype[Any]]
Json = dict[str, Any]

WIDTH = 16
"""Features: covariances of so few are known from some hundred pictures."""
SPLITS = 20
"""Ways to halve the pictures, of which the mean is taken."""
NEIGHBOURS = 3


class Classifier(nn.Module):
    """Ten digits of 28 × 28; `features` [n, WIDTH] is what stands in front of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * 49, WIDTH), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found

    def features(self, pictures: Array) -> Array:
        with torch.no_grad():
            found: Array = self.body(torch.from_numpy(np.clip(pictures, -1, 1))).double().numpy()
        return found


def digits(folder: Path) -> tuple[Array, Array]:
    """Pictures [n, 1, 28, 28] in −1 … 1 and their digits, from the two idx files in a folder."""
    found = []
    for word, ahead in (("images-idx3", 16), ("labels-idx1", 8)):
        (place,) = folder.glob(f"*{word}-ubyte.gz")
        with gzip.open(place) as file:
            found.append(np.frombuffer(file.read(), np.uint8, offset=ahead))
    pictures = found[0].reshape(-1, 1, 28, 28).astype(np.float32) / 127.5 - 1
    return pictures, found[1].astype(np.int64)


def trained(pictures: Array, labels: Array, *, epochs: int = 3, seed: int = 0) -> Classifier:
    """A classifier of these pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier()
        x, y = torch.from_numpy(pictures), torch.from_numpy(labels)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(len(x)).split(100):
                loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def frechet(first: Array, second: Array) -> float:
    """Of two sets of features [n, d] and [m, d]."""
    middle = first.mean(0) - second.mean(0)
    spreads = [np.atleast_2d(np.cov(part, rowvar=False)) for part in (first, second)]
    root = linalg.sqrtm(spreads[0] @ spreads[1])
    return float(middle @ middle + np.trace(spreads[0] + spreads[1]) - 2 * np.trace(root.real))


def kid(first: Array, second: Array) -> float:
    """Of two sets of features [n, d] and [m, d]; around 0 for two of one law, and below it as often."""

    def kernel(a: Array, b: Array) -> Array:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)

    def within(a: Array) -> float:
        k, n = kernel(a, a), len(a)
        return float((k.sum() - np.trace(k)) / (n * (n - 1)))

    return within(first) + within(second) - 2 * float(kernel(first, second).mean())


def within_reach(first: Array, second: Array) -> float:
    """The share of `first` that is as near to one of `second` as the third neighbour of that one is (Kynkäänniemi et
    al. 2019): precision of generated pictures before wanted ones, recall the other way round."""
    own = np.linalg.norm(second[:, None] - second[None], axis=2)
    reach = np.sort(own, axis=1)[:, min(NEIGHBOURS, len(second) - 1)]
    apart = np.linalg.norm(first[:, None] - second[None], axis=2)
    return float((apart <= reach).any(axis=1).mean())


def beside_null(found: Array, wanted: Array, draws: int = 200) -> Json:
    """Distances of features `found` from those `wanted`, of the same noise row by row, less what is there anyway.

    Rows are halved: of one half the found ones, of the other the wanted ones. The null is the same of wanted ones
    alone. The interval is the middle 95 % over halves of rows that are drawn again, both sides of a pair together.
    """
    draw = np.random.default_rng(0)
    n, told = len(wanted), {}
    for word, distance in (("frechet", frechet), ("kid", kid)):

        def less(rows: Array, distance: Any = distance) -> tuple[float, float]:
            half = len(rows) // 2
            here, other = rows[:half], wanted[rows[half:]]
            null = distance(wanted[here], other)
            return distance(found[here], other) - null, null

        halves = np.array([less(draw.permutation(n)) for _ in range(SPLITS)])
        again = np.array([less(_drawn_again(draw, n))[0] for _ in range(draws)])
        low, high = np.quantile(again, [0.025, 0.975])
        told[f"{word}_minus_null"] = {
            "mean": float(halves[:, 0].mean()), "low": float(low), "high": float(high),
            "null": float(halves[:, 1].mean()), "n": n,
        }  # fmt: skip
    return {**told, "precision": within_reach(found, wanted), "recall": within_reach(wanted, found)}


def _drawn_again(draw: np.random.Generator, n: int) -> Array:
    """Rows of two halves, each drawn again from its own, so that none is on both sides."""
    rows = draw.permutation(n)
    return np.concatenate([draw.choice(half, len(half)) for half in np.split(rows, [n // 2])])
