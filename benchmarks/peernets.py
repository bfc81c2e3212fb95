"""Nets of real size with random weights, as factories for effc: what speed hangs on is their shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import effc

WORDS = 30522


def bert_base() -> effc.Source:
    """BERT-base: 12 layers of 768."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    ids = torch.from_numpy(token_ids(2, 16, 0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dims = {name: {0: "batch", 1: "sequence"} for name in inputs}
    model = BertModel(BertConfig(attn_implementation="sdpa"), add_pooling_layer=False).eval()
    return effc.Source(modules={"main": model}, inputs={"main": inputs}, dims={"main": dims})


def vit_base() -> effc.Source:
    """ViT-base on 224×224 pictures in patches of 16."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return _pictures(ViTForImageClassification(ViTConfig(num_labels=1000)).eval())


def resnet50() -> effc.Source:
    """ResNet-50 on 224×224 pictures, its norms as if they had seen data."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.from_numpy(pixels(16, 1)))
    return _pictures(model.eval())


def unet() -> effc.Source:
    """The denoiser of DDPM on 32×32 pictures (Ho et al. 2020), as diffusers builds it."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    inputs = {name: torch.from_numpy(value) for name, value in noisy(2, 0).items()}
    return effc.Source(modules={"main": _Denoiser(model)}, inputs={"main": inputs})


class _Denoiser(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.body(sample, timestep).sample
        return found


def _pictures(model: nn.Module) -> effc.Source:
    example = torch.from_numpy(pixels(2, 2))
    return effc.Source(modules={"main": model}, inputs={"main": {"pixel_values": example}})


def token_ids(count: int, length: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(1000, WORDS, (count, length))


def pixels(count: int, seed: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Smooth random pictures [count, 3, 224, 224]."""
    coarse = np.random.default_rng(seed).standard_normal((count, 3, 14, 14)).astype(np.float32)
    return np.repeat(np.repeat(coarse, 16, axis=2), 16, axis=3)


def noisy(count: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Noise [count, 3, 32, 32] and steps [count]."""
    rng = np.random.default_rng(seed)
    sample = rng.standard_normal((count, 3, 32, 32)).astype(np.float32)
    return {"sample": sample, "timestep": rng.integers(0, 1000, count)}


SAMPLES: dict[str, Any] = {
    "bert_base": lambda count, seed: {
        "input_ids": token_ids(count, 64, seed),
        "attention_mask": np.ones((count, 64), np.int64),
    },
    "vit_base": lambda count, seed: {"pixel_values": pixels(count, seed)},
    "resnet50": lambda count, seed: {"pixel_values": pixels(count, seed)},
    "unet": noisy,
}
"""Inputs by model, for calibration."""
