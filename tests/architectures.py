"""Small networks of many families with random sizes and weights, built offline from their own libraries.

    module, inputs, dims = FAMILIES["llama"](random.Random(0))

Gains, shifts and running statistics are random too, so that nothing cancels by chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import effc
from effc.cached import cached, example
from effc.ir.program import Program
from effc.passes import CANONICAL, PASSES
from effc.passes.pipeline import apply

Built = tuple[nn.Module, dict[str, Tensor], dict[str, dict[int, str]] | None]
VOCABULARY = 61
TEXT = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}


def program_of(built: Built) -> tuple[Program, dict[str, Tensor]]:
    """The network traced and cleaned up as every compile does it, and its inputs."""
    module, inputs, dims = built
    program = effc.trace(module, inputs, dims=dims)
    for word in CANONICAL:
        apply(PASSES[word](), program)
    return program, inputs


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random gains, shifts and statistics; for evaluation."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.dim() != 1 or not value.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.rand(value.shape, generator=draw)
            value.copy_(0.5 + noise if "var" in name else value + noise - 0.3)
    return module.eval()


class Only(nn.Module):
    """The first output of a library's model, called with pictures."""

    def __init__(self, body: nn.Module, output: str) -> None:
        super().__init__()
        self.body, self.output = body, output

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = getattr(self.body(pixel_values), self.output)
        return found


class Text(nn.Module):
    """Logits or hidden states of a library's model, called with tokens."""

    def __init__(self, body: nn.Module, output: str, **options: Any) -> None:
        super().__init__()
        self.body, self.output, self.options = body, output, options

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.body(input_ids=input_ids, attention_mask=attention_mask, **self.options)
        return found if isinstance(found, Tensor) else getattr(found, self.output)


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def picture(size: int = 32, channels: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, channels, size, size, generator=draw)}


def llama_config(draw: random.Random, **more: Any) -> Any:
    from transformers import LlamaConfig

    kv, again, size = draw.choice([1, 2, 3]), draw.choice([1, 2]), draw.choice([4, 8])
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=draw.choice([24, 48]),
        intermediate_size=draw.choice([36, 56]),
        num_hidden_layers=2,
        num_attention_heads=kv * again,
        num_key_value_heads=kv,
        head_dim=size,
        max_position_embeddings=64,
        tie_word_embeddings=draw.choice([True, False]),
        attention_bias=draw.choice([True, False]),
        mlp_bias=draw.choice([True, False]),
        rms_norm_eps=1e-3,
        **more,
    )


def llama(draw: random.Random) -> Built:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama_config(draw))
    return shaken(Text(model, "logits", use_cache=False)), tokens(), TEXT


def gemma(draw: random.Random) -> Built:
    from transformers import GemmaConfig, GemmaForCausalLM

    kv, again, size = draw.choice([1, 2]), draw.choice([1, 2]), draw.choice([4, 8])
    config = GemmaConfig(
        vocab_size=VOCABULARY, hidden_size=draw.choice([24, 48]), intermediate_size=draw.choice([36, 56]),
        num_hidden_layers=2, num_attention_heads=kv * again, num_key_value_heads=kv, head_dim=size,
        max_position_embeddings=64, rms_norm_eps=1e-3,
    )  # fmt: skip
    return shaken(Text(GemmaForCausalLM(config), "logits", use_cache=False)), tokens(), TEXT


def llama_with_cache(draw: random.Random) -> Built:
    from transformers import LlamaForCausalLM

    model = shaken(LlamaForCausalLM(llama_config(draw)))
    config: Any = model.config
    layers = [(config.num_key_value_heads, config.head_dim)] * config.num_hidden_layers
    feeds, dims = example(tokens(), layers)
    return cached(model).eval(), feeds, dims


def gpt2(draw: random.Random) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    heads = draw.choice([2, 3])
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=heads * draw.choice([8, 12]),
        n_layer=2,
        n_head=heads,
        n_inner=draw.choice([40, 64]),
        bos_token_id=0,
        eos_token_id=0,
    )
    return shaken(Text(GPT2LMHeadModel(config), "logits", use_cache=False)), tokens(), TEXT


def bert(draw: random.Random) -> Built:
    from transformers import BertConfig, BertModel

    heads = draw.choice([2, 4])
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=heads * draw.choice([8, 12]),
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=draw.choice([40, 64]),
        max_position_embeddings=32,
    )
    return shaken(Text(BertModel(config), "pooler_output")), tokens(), TEXT


def siglip(draw: random.Random) -> Built:
    """A pre-LN encoder of text."""
    from transformers import SiglipTextConfig, SiglipTextModel

    heads = draw.choice([2, 4])
    width = heads * draw.choice([8, 12])
    config = SiglipTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        projection_size=7,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=draw.choice([40, 64]),
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    return shaken(Text(SiglipTextModel(config), "pooler_output")), tokens(), TEXT


def vit(draw: random.Random) -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    heads = draw.choice([2, 4])
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=heads * draw.choice([8, 12]),
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=draw.choice([40, 64]),
        num_labels=7,
    )
    return shaken(Only(ViTForImageClassification(config), "logits")), picture(), None


def swin(draw: random.Random) -> Built:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=draw.choice([8, 16]),
        depths=[2, 2],
        num_heads=draw.choice([[2, 4], [2, 2]]),
        window_size=4,
        mlp_ratio=draw.choice([2.0, 3.0]),
        num_labels=7,
    )
    return shaken(Only(SwinForImageClassification(config), "logits")), picture(), None


def resnet(draw: random.Random) -> Built:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=draw.choice([8, 12]),
        hidden_sizes=draw.choice([[8, 16], [16, 24, 32]]),
        depths=[2, 1, 1],
        layer_type=draw.choice(["basic", "bottleneck"]),
        num_labels=7,
    )
    config.depths = config.depths[: len(config.hidden_sizes)]
    return shaken(Only(ResNetForImageClassification(config), "logits")), picture(), None


def mobilenet(draw: random.Random) -> Built:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=draw.choice([0.25, 0.35]), num_labels=7)
    return shaken(Only(MobileNetV2ForImageClassification(config), "logits")), picture(), None


def convnext(draw: random.Random) -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=draw.choice([[8, 16], [12, 16]]),
        depths=[2, 1],
        num_stages=2,
        num_labels=7,
        layer_scale_init_value=0.5,
    )
    return shaken(Only(ConvNextForImageClassification(config), "logits")), picture(), None


class Denoiser(nn.Module):
    """A UNet of diffusers with named inputs and one output."""

    def __init__(self, body: nn.Module, text: int = 0) -> None:
        super().__init__()
        self.body, self.text = body, text

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor | None = None) -> Tensor:
        more = {} if states is None else {"encoder_hidden_states": states}
        found: Tensor = self.body(sample, timestep, **more).sample
        return found


def noisy(size: int = 16) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, size, size, generator=draw),
        "timestep": torch.tensor([3, 500]),
    }


def unet(draw: random.Random) -> Built:
    from diffusers import UNet2DModel

    groups = draw.choice([2, 4])
    widths = draw.choice([(16, 32), (16, 24)])
    body = UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=groups,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return shaken(Denoiser(body)), noisy(), None


def unet_with_text(draw: random.Random) -> Built:
    from diffusers import UNet2DConditionModel

    body = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=draw.choice([(16, 32), (16, 24)]),
        layers_per_block=1,
        norm_num_groups=draw.choice([2, 4]),
        cross_attention_dim=24,
        attention_head_dim=draw.choice([2, 4]),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    states = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    return shaken(Denoiser(body)), {**noisy(), "states": states}, None


class Mixed(nn.Module):
    """Concatenation, splits, a gate, grouped and depthwise convolutions, a norm of groups, padding, flattening."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        a, b, wide = draw.choice([8, 12]), draw.choice([4, 6]), draw.choice([8, 16])
        self.left, self.right = nn.Conv2d(3, a, 3, padding=1), nn.Conv2d(3, b, 1)
        self.norm = nn.BatchNorm2d(a + b)
        self.up = nn.Conv2d(a + b, 2 * wide, 1)
        self.depth = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.groups = nn.Conv2d(wide, 2 * wide, 3, padding=1, groups=4)
        self.group_norm = nn.GroupNorm(4, 2 * wide)
        self.short = nn.Conv2d(2 * wide, wide, 1)
        self.shuffle = nn.Conv2d(2 * wide, 4 * 5, 1)
        self.squeeze, self.excite = nn.Conv2d(5, 3, 1), nn.Conv2d(3, 5, 1)
        self.last = nn.Linear(5 * 8 * 8, 6)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.cat([self.left(pixel_values), self.right(pixel_values)], 1)
        value, gate = self.up(torch.relu(self.norm(x))).chunk(2, 1)
        x = self.depth(value * torch.sigmoid(gate))
        y = nn.functional.silu(self.group_norm(self.groups(x)))
        z = self.short(y)
        y = y + nn.functional.pad(z, (0, 0, 0, 0, 0, z.shape[1]))
        y = nn.functional.pixel_shuffle(self.shuffle(y), 2)
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        found: Tensor = self.last(y.flatten(1))
        return found


def mixed(draw: random.Random) -> Built:
    return shaken(Mixed(draw)), picture(4), None


FAMILIES: dict[str, Callable[[random.Random], Built]] = {
    "llama": llama,
    "llama with cache": llama_with_cache,
    "gemma": gemma,
    "gpt2": gpt2,
    "bert": bert,
    "siglip text": siglip,
    "vit": vit,
    "swin": swin,
    "resnet": resnet,
    "mobilenet": mobilenet,
    "convnext": convnext,
    "unet": unet,
    "unet with text": unet_with_text,
    "mixed": mixed,
}
CONVERTED = ("gpt2", "siglip text", "vit", "swin")
"""Families with a stream whose LayerNorms can become RMSNorms."""
NEEDS = {"unet": "diffusers", "unet with text": "diffusers"}
"""What must be installed beside effc for a family."""
