"""What a request is about, as numbers that gates of experts read: how near its embedding is to clusters of them.

    s = C e            C [clusters, size], e [size], both of length 1: cosines
    s = softmax(C e / T)                                       with a temperature T, which tells clusters further apart

The centroids C come from K-means over the embeddings of training prompts alone, and lie in one safetensors file, with
the name of what embedded them and their own sha256.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from effc import paths
from effc.errors import CalibrationError, SourceError, first_line

Array = np.ndarray[Any, np.dtype[Any]]
INPUT, EMBEDDING = "intuition", "embedding"
"""The input of a graph that takes s [batch, clusters], and of one that has the centroids and takes e [batch, size]."""
ROLE = INPUT
"""The graph that makes s of a request's tokens, beside the model; its folder in a package."""
FILE = f"{ROLE}/centroids.safetensors"
"""Where a package has the centroids."""
TENSOR, RECORD = "centroids", "effc"
TRIES = 10
SHORTEST = 1e-12
_HINT = "effc.intuition.fit(embeddings, clusters) and its write(FILE) make one"


@dataclass(frozen=True, kw_only=True, eq=False)
class Intuition:
    """Centroids [clusters, size] of length 1, what embedded the prompts, and the temperature; None for cosines."""

    centroids: Array
    embedder: str = ""
    temperature: float | None = None

    @property
    def digest(self) -> str:
        """sha256 over the centroids, the embedder and the temperature."""
        record = json.dumps([self.embedder, self.temperature, list(self.centroids.shape)])
        total = hashlib.sha256(record.encode())
        total.update(np.ascontiguousarray(self.centroids, np.float32).tobytes())
        return total.hexdigest()

    def scores(self, embeddings: Array) -> Array:
        """s [n, clusters] of embeddings [n, size], float32. Raises CalibrationError where those are of another size."""
        found = unit(embeddings)
        if found.shape[1] != self.centroids.shape[1]:
            raise CalibrationError(
                f"embeddings are {found.shape[1]} long, and the centroids {self.centroids.shape[1]}",
                hint="embed requests with what embedded the training prompts"
                + (f": {self.embedder}" if self.embedder else ""),
            )
        cosines = found @ self.centroids.astype(np.float64).T
        if self.temperature is not None:
            powers = np.exp((cosines - cosines.max(1, keepdims=True)) / self.temperature)
            cosines = powers / powers.sum(1, keepdims=True)
        return cosines.astype(np.float32)

    def nearest(self, embeddings: Array) -> Array:
        """The cluster of each embedding [n]."""
        found: Array = self.scores(embeddings).argmax(1)
        return found

    def write(self, file: Path) -> None:
        record = {"embedder": self.embedder, "temperature": self.temperature, "digest": self.digest}
        tensors = {TENSOR: np.ascontiguousarray(self.centroids, np.float32)}
        file.write_bytes(save(tensors, metadata={RECORD: json.dumps(record, sort_keys=True)}))


def fit(
    embeddings: Array,
    clusters: int,
    *,
    seed: int = 0,
    embedder: str = "",
    temperature: float | None = None,
) -> Intuition:
    """Centroids of embeddings [n, size] of training prompts by K-means, none of them without a prompt.

    Raises CalibrationError where there are too few different prompts, or where one is no number.
    """
    from scipy.cluster.vq import ClusterError, kmeans2

    found = unit(embeddings)
    several = len(np.unique(found, axis=0))
    if not 1 < clusters <= several:
        raise CalibrationError(
            f"{several} different prompts do not make {clusters} clusters",
            hint="cluster more prompts, or into fewer clusters: at least 2",
        )
    for attempt in range(TRIES):
        draw = np.random.default_rng([seed, attempt])
        try:
            centres, _ = kmeans2(found, clusters, iter=50, minit="++", missing="raise", rng=draw)
        except ClusterError:
            continue
        if float(np.linalg.norm(centres, axis=1).min()) > SHORTEST:
            return Intuition(
                centroids=unit(centres).astype(np.float32),
                embedder=embedder,
                temperature=temperature,
            )
    raise CalibrationError(
        f"K-means leaves a cluster of {clusters} without a prompt, from {TRIES} beginnings",
        hint="cluster into fewer, or name another seed",
    )


def read(file: Path) -> Intuition:
    """Centroids from a file. Raises SourceError where it is none, damaged, or holds what is no number."""
    try:
        paths.plain(file, SourceError).close()
        with safe_open(file, framework="numpy") as held:
            record = json.loads((held.metadata() or {}).get(RECORD, "null"))
            centroids = held.get_tensor(TENSOR) if TENSOR in held.keys() else None  # noqa: SIM118
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{file} holds no centroids: {first_line(error)}", hint=_HINT) from error
    if centroids is None or not isinstance(record, dict):
        raise SourceError(f"{file} holds no centroids", hint=_HINT)
    if centroids.ndim != 2 or min(centroids.shape) < 1 or not np.isfinite(centroids).all():
        raise SourceError(
            f"{file}: the centroids {list(centroids.shape)} are not all numbers (NaN or infinite), or no matrix",
            hint=_HINT,
        )
    made = Intuition(
        centroids=centroids, embedder=str(record.get("embedder", "")), temperature=record.get("temperature")
    )  # fmt: skip
    heat = made.temperature
    if heat is not None and not (isinstance(heat, float | int) and 0 < heat < np.inf):
        raise SourceError(f"{file}: the temperature is no number above 0", hint=_HINT)
    if made.digest != record.get("digest"):
        raise SourceError(f"{file} is not what it was written as", hint="get a whole copy of it")
    return made


def unit(embeddings: Array) -> Array:
    """Rows [n, size] of length 1, in float64. Raises CalibrationError where one has no direction."""
    found = np.asarray(embeddings, np.float64)
    if found.ndim != 2 or not np.isfinite(found).all():
        raise CalibrationError(
            "embeddings are no matrix of numbers", hint="one row a prompt: [prompts, size]"
        )
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    if len(found) and float(lengths.min()) <= SHORTEST:
        raise CalibrationError(
            f"the embedding of prompt {int(lengths.argmin())} is 0", hint="is its text empty?"
        )
    made: Array = found / lengths
    return made
