"""Pipeline directories of diffusers that fit in a megabyte, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch

LENGTH = 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_ddpm(place: Path, **changes: Any) -> Path:
    """One channel of 8 x 8, without text."""
    import diffusers

    torch.manual_seed(0)
    sizes = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    unet = diffusers.UNet2DModel(**{**sizes, **changes})
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(place)
    return place


def save_sd(place: Path) -> Path:
    """Text, a UNet on latents of 8 x 8, an autoencoder: Stable Diffusion's shape."""
    import diffusers

    torch.manual_seed(0)
    diffusers.StableDiffusionPipeline(
        text_encoder=_text("CLIPTextModel"), tokenizer=tokenizer(place.parent), unet=_guided(),
        vae=_autoencoder(), scheduler=diffusers.PNDMScheduler(
            skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear"
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(place)  # fmt: skip
    return place


def save_xl(place: Path) -> Path:
    """Two text encoders, of which the second gives a summary too: SDXL's shape."""
    import diffusers

    torch.manual_seed(0)
    unet = _guided(
        cross_attention_dim=48, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8, use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    words = tokenizer(place.parent)
    diffusers.StableDiffusionXLPipeline(
        text_encoder=_text("CLIPTextModel"), tokenizer=words, tokenizer_2=words, unet=unet,
        text_encoder_2=_text("CLIPTextModelWithProjection"), vae=_autoencoder(),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    ).save_pretrained(place)  # fmt: skip
    return place


def save_dit(place: Path) -> Path:
    """Classes, a transformer that gives a variance too, an autoencoder."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    diffusers.DiTPipeline(
        transformer=transformer,
        vae=_autoencoder(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    ).save_pretrained(place)
    return place


def tokenizer(place: Path) -> Any:
    """CLIP's, of letters alone."""
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab, merges = place / "vocab.json", place / "merges.txt"
    vocab.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(str(vocab), str(merges), model_max_length=LENGTH)


def _text(kind: str) -> Any:
    import transformers

    words = 2 * len(LETTERS) + 2
    config = transformers.CLIPTextConfig(
        vocab_size=words, hidden_size=24, intermediate_size=32, num_hidden_layers=2, projection_dim=24,
        num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=words - 2,
        eos_token_id=words - 1, pad_token_id=words - 1,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def _guided(**changes: Any) -> Any:
    import diffusers

    sizes = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 24,
        "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**sizes, **changes}).eval()


def _autoencoder() -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    ).eval()  # fmt: skip


FACTORY = """
import torch
from torch import nn
import effc


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 4)
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, sample, timestep):
        return self.b(torch.relu(self.a(sample) + self.table(timestep)[:, :, None, None]))


def make(name="DDPMScheduler", word="sample"):
    torch.manual_seed(0)
    inputs = {word: torch.randn(2, 1, 6, 6), "timestep": torch.tensor([3, 7])}
    model = Tiny()
    if word != "sample":
        model.forward = lambda x, timestep: Tiny.forward(model, x, timestep)
    return effc.Source(
        modules={"unet": model}, inputs={"unet": inputs}, scheduler={"_class_name": name}
    )
"""
