"""A trained DDPM of MNIST digits as a source, from the folder of its weights and of `unet.py`, which loads them."""

from pathlib import Path

import torch
from torch import Tensor, nn

import effc
from effc.source import import_code

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
}


class Denoiser(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        return {"out_sample": self.model(sample, timestep)}


def make(folder: str, sampler: str = "DDPMScheduler") -> effc.Source:
    model = import_code(str(Path(folder) / "unet.py")).load("mnist", folder)
    inputs = {"sample": torch.randn(2, 1, 28, 28), "timestep": torch.tensor([500])}
    return effc.Source(
        modules={"unet": Denoiser(model)},
        inputs={"unet": inputs},
        dims={"unet": {"sample": {0: "batch"}, "timestep": {}}},
        scheduler={**SCHEDULER, "_class_name": sampler},
        name="ddpm-mnist",
    )
