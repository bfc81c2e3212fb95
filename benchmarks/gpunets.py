"""Nets with free sizes that TensorRT must take: a decoder with a cache of keys and values, and a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import effc

LAYERS, HEADS, SIZE = 2, 2, 16
"""Of the decoder: layers, heads of keys and values, and the size of a head."""


WIDTH = 4096
"""Of the layers of the large net."""


class Cached(nn.Module):
    """A Llama that takes and gives keys and values: past ≥ 0 positions, and some more."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.body = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=211, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
                num_key_value_heads=HEADS, head_dim=SIZE, intermediate_size=128,
                max_position_embeddings=256,
            )
        )  # fmt: skip

    def forward(
        self, input_ids: Tensor, position_ids: Tensor,
        key_0: Tensor, value_0: Tensor, key_1: Tensor, value_1: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        from transformers import DynamicCache

        cache = DynamicCache(config=self.body.config)
        for layer, pair in enumerate(((key_0, value_0), (key_1, value_1))):
            cache.update(*pair, layer)
        places = torch.arange(key_0.shape[2] + input_ids.shape[1])
        found = self.body(
            input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True,
            attention_mask=places <= position_ids[:, None, :, None],
        )  # fmt: skip
        made = {"logits": found.logits}
        for number, layer in enumerate(found.past_key_values.layers):
            made |= {f"new_key_{number}": layer.keys, f"new_value_{number}": layer.values}
        return made


def cached_inputs(batch: int, length: int = 3, past: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(batch)
    inputs = {
        "input_ids": torch.randint(3, 211, (batch, length), generator=draw),
        "position_ids": torch.arange(past, past + length).expand(batch, -1).contiguous(),
    }
    for layer in range(LAYERS):
        for name in (f"key_{layer}", f"value_{layer}"):
            inputs[name] = torch.randn(batch, HEADS, past, SIZE, generator=draw)
    return inputs


def llama_cache() -> effc.Source:
    torch.manual_seed(0)
    inputs = cached_inputs(2)
    dims = {
        "input_ids": {0: "batch", 1: "length"},
        "position_ids": {0: "batch", 1: "length"},
    }
    dims |= {name: {0: "batch", 2: "past"} for name in inputs if name not in dims}
    return effc.Source(
        modules={"main": Cached().eval()}, inputs={"main": inputs}, dims={"main": dims}
    )


def convnet() -> effc.Source:
    """A ResNet on pictures of any number and size."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=10)
    )
    inputs = pictures(2)
    dims = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
    return effc.Source(modules={"main": awake(model)}, inputs={"main": inputs}, dims={"main": dims})


def pictures(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 48, 56)}


class Denoiser(nn.Module):
    """A small U-Net with attention in the middle; wants diffusers."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.body = UNet2DModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        found: Tensor = self.body(sample, timestep).sample
        return found


def unet() -> effc.Source:
    torch.manual_seed(0)
    inputs = noisy(2)
    dims = {"sample": {0: "batch"}, "timestep": {0: "batch"}}
    return effc.Source(
        modules={"main": awake(Denoiser())}, inputs={"main": inputs}, dims={"main": dims}
    )


def noisy(count: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(count)
    return {
        "sample": torch.randn(count, 3, 16, 16, generator=draw),
        "timestep": torch.randint(0, 1000, (count,), generator=draw),
    }


def awake(model: nn.Module) -> nn.Module:
    """Weights that keep a signal alive through many convolutions."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model.eval()


def large() -> effc.Source:
    """Weights of 2.2 GB, more than one file of protobuf holds."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(33))).eval()
    return effc.Source(
        modules={"main": model}, inputs={"main": wide(2)}, dims={"main": {"input": {0: "batch"}}}
    )


def wide(count: int) -> dict[str, Tensor]:
    return {"input": torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))}


SAMPLES = {"convnet": pictures, "unet": noisy, "llama_cache": cached_inputs, "large": wide}
"""Inputs by net: so many rows of them."""
