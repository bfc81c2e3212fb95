"""A small model that multiplies what its layers give, as attention does with its queries."""

import torch
from torch import Tensor, nn


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 32)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.query(x) * 0.125)) * 3


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and one example of its inputs, which is all that `source: {python: …}` asks for."""
    torch.manual_seed(0)
    return Scaled(), {"x": torch.randn(8, 16)}
