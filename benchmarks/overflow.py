"""What the overflow fix buys and costs: sums on this processor with and without it, and the error it adds to weights.

Kernels for x86 without VNNI add two products of uint8 and int8 in 16 bit and saturate. The fix widens the scales of a
weight until no pair can; the usual remedy is 7-bit weights.

    python benchmarks/overflow.py            # seconds; writes benchmarks/results/overflow-FEATURES.json
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import effc
from effc.backends.dialect import ORT
from effc.backends.ort import Ort
from effc.calib.data import Batch
from effc.passes.quantize import Quantize
from effc.quant.affine import fake_quantize, weight_qparams
from effc.quant.scheme import Scheme

SIZES = ((64, 48), (384, 384), (384, 1536))


def engine_error(inputs: int, outputs: int, seed: int, *, fix: bool) -> float:
    """Relative L2 between a quantised layer in torch and its engine, weights and inputs uniform."""
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs)
    program = effc.trace(layer, torch.randn(2, inputs))
    x = torch.rand(16, inputs) * 2 - 1
    batch = Batch(inputs={"input": x.numpy()})
    effc.apply(Quantize(overflow_fix=fix, range="minmax"), program, [batch], dialect=ORT)
    wanted = program.run(input=x)["output"].numpy()
    with tempfile.TemporaryDirectory(prefix="effc-overflow-") as place:
        backend = Ort()
        with backend.open(backend.lower(program.only(), Path(place)), threads=1) as engine:
            found = engine({"input": x.numpy()})["output"]
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def weight_error(weight: Tensor, bits: int, limit: int | None) -> float:
    """Squared error of a quantised weight over the squared weight."""
    scheme = Scheme(bits=bits, axis=0)
    grid = weight_qparams(weight, scheme, pair_limit=limit)
    gap = fake_quantize(weight, *grid, scheme) - weight
    return float(gap.double().square().sum() / weight.double().square().sum())


def main() -> int:
    rows: list[dict[str, Any]] = []
    for inputs, outputs in SIZES:
        found = {
            fix: [engine_error(inputs, outputs, s, fix=fix) for s in range(3)]
            for fix in (True, False)
        }
        rows.append(
            {"inputs": inputs, "outputs": outputs, "fixed": found[True], "free": found[False]}
        )
        print(
            f"{inputs}x{outputs}: engine off by {max(found[True]):.1e} with the fix, {max(found[False]):.1e} without"
        )
    (file,) = common.minilm().glob("*.safetensors")
    layers = {n: w for n, w in load_file(file).items() if n.startswith("encoder.") and w.dim() == 2}
    errors = {
        name: float(np.mean([weight_error(w, bits, limit) for w in layers.values()]))
        for name, bits, limit in (("8 bit", 8, None), ("8 bit, fixed", 8, 128), ("7 bit", 7, None))
    }
    cost = {name: 0.5 * math.log2(error / errors["8 bit"]) for name, error in errors.items()}
    for name, bits in cost.items():
        print(
            f"{name:14} mean squared error {errors[name]:.2e}, {bits:.2f} bit lost (n = {len(layers)} layers)"
        )
    content = {
        "name": "overflow",
        "engine": rows,
        "weight_errors": errors,
        "bits_lost": cost,
        "layers": len(layers),
    }
    print(common.write(f"overflow-{common.features()}", content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
