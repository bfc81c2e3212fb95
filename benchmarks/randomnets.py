"""Convolutional nets with random weights, as factories for effc: their shapes are real, and nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import effc


def resnet() -> effc.Source:
    """ResNet-18's shape on 64×64 pictures."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2],
        layer_type="basic", num_labels=100,
    )  # fmt: skip
    return _seen(ResNetForImageClassification(config))


def mobilenet() -> effc.Source:
    """MobileNetV2 on 64×64 pictures: depthwise convolutions, which few integer kernels are made for."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=64, num_labels=100)
    return _seen(MobileNetV2ForImageClassification(config))


def _seen(model: nn.Module) -> effc.Source:
    """A random net whose norms have seen data, so that its values are of a usual size."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.from_numpy(pixels(64, 1)))
    model.eval()
    example = torch.from_numpy(pixels(2, 2))
    return effc.Source(modules={"main": model}, inputs={"main": {"pixel_values": example}})


def pixels(count: int, seed: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Smooth random pictures [count, 3, 64, 64]."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, 3, 8, 8)).astype(np.float32)
    return np.repeat(np.repeat(coarse, 8, axis=2), 8, axis=3)
