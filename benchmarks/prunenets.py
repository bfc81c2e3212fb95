"""Networks of ten families in the sizes that people use, with random weights; transformers have four layers.

module, inputs, dims = NETS["ResNet-50"]()
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import common
import torch
from torch import nn

sys.path.insert(0, str(common.ROOT / "tests"))
from architectures import TEXT, Built, Denoiser, Only, Text, mixed, shaken

LAYERS = 4
WORDS = 8192


def text(kind: str, config: str, output: str, **options: Any) -> Callable[[], Built]:
    """A language model or encoder of transformers on two sentences, one of them padded."""

    def make() -> Built:
        import transformers

        model = getattr(transformers, kind)(getattr(transformers, config)(**options))
        ids = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, 11:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        more = {"use_cache": False} if "LM" in kind else {}
        return shaken(Text(model, output, **more)), inputs, TEXT

    return make


def vision(kind: str, config: str, pixels: int, **options: Any) -> Callable[[], Built]:
    """A classifier of transformers on two pictures."""

    def make() -> Built:
        import transformers

        model = getattr(transformers, kind)(getattr(transformers, config)(**options))
        draw = torch.Generator().manual_seed(0)
        pictures = torch.randn(2, 3, pixels, pixels, generator=draw)
        return shaken(Only(model, "logits")), {"pixel_values": pictures}, None

    return make


def denoiser(kind: str, words: int = 0, **options: Any) -> Callable[[], Built]:
    """A UNet of diffusers on two pictures of 32 × 32, with a text of as many states as `words`."""

    def make() -> Built:
        import diffusers

        body: nn.Module = getattr(diffusers, kind)(sample_size=32, **options)
        draw = torch.Generator().manual_seed(0)
        channels = options.get("in_channels", 4)
        inputs = {
            "sample": torch.randn(2, channels, 32, 32, generator=draw),
            "timestep": torch.tensor([3, 500]),
        }
        if words:
            inputs["states"] = torch.randn(2, words, 768, generator=draw)
        return shaken(Denoiser(body)), inputs, None

    return make


NETS: dict[str, Callable[[], Built]] = {
    "Llama (GQA, tied)": text(
        "LlamaForCausalLM",
        "LlamaConfig",
        "logits",
        vocab_size=WORDS,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "GPT-2": text(
        "GPT2LMHeadModel", "GPT2Config", "logits", vocab_size=WORDS, n_layer=LAYERS,
        bos_token_id=0, eos_token_id=0,
    ),
    "BERT": text(
        "BertModel", "BertConfig", "pooler_output", vocab_size=WORDS, num_hidden_layers=LAYERS
    ),
    "ViT": vision("ViTForImageClassification", "ViTConfig", 224, num_hidden_layers=LAYERS),
    "Swin-T": vision("SwinForImageClassification", "SwinConfig", 224),
    "ResNet-50": vision("ResNetForImageClassification", "ResNetConfig", 64),
    "MobileNetV2": vision("MobileNetV2ForImageClassification", "MobileNetV2Config", 64),
    "ConvNeXt-T": vision("ConvNextForImageClassification", "ConvNextConfig", 64),
    "UNet2DModel": denoiser(
        "UNet2DModel",
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
    "UNet2DConditionModel": denoiser(
        "UNet2DConditionModel",
        words=9,
        block_out_channels=(160, 320, 640),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "hand-written": lambda: mixed(random.Random(0)),
}  # fmt: skip
