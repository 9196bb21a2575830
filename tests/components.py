"""A tiny Anima out of the stock classes, with random weights.

Every weight is random, those of norms and of layers that start at zero included, so that no silent branch hides a
mistake. Seeds are fixed and the global random state is left as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimaTextConditioner,
    AutoencoderKLQwenImage,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model, T5TokenizerFast

from anima_peft.miniature import MiniatureFiles
from anima_peft.miniature.random_weights import write_tokenizers
from anima_peft.pipeline import AnimaPipeline

TEXT_WIDTH = 32
QWEN_VOCABULARY = 320
T5_VOCABULARY = 128

CORPUS = [
    "a red circle on a white background",
    "two blue squares beside a green triangle",
    "a watercolour painting of a cat in the garden, soft light",
    "one yellow star above the sea; masterpiece, best quality",
    "worst quality, blurry, low resolution",
]


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every parameter anew: 1 + noise for the norms' scales, noise with the fan-in's scale for the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and parameter.squeeze().ndim <= 1 and not name.endswith("bias"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.eval()


def tiny_transformer(seed: int = 0) -> CosmosTransformer3DModel:
    """DiT with 2 blocks of 2 heads of 32, and diffusers' own eps in the query and key norms."""
    model = CosmosTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        text_embed_dim=TEXT_WIDTH,
        adaln_lora_dim=16,
        max_size=(128, 240, 240),
        patch_size=(1, 2, 2),
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=True,
        extra_pos_embed_type=None,
    )
    return randomise(model, seed)


def tiny_conditioner(seed: int = 1) -> AnimaTextConditioner:
    """Text conditioner with 2 layers of width 32 and the real 512 rows."""
    model = AnimaTextConditioner(
        source_dim=TEXT_WIDTH,
        target_dim=TEXT_WIDTH,
        model_dim=TEXT_WIDTH,
        num_layers=2,
        num_attention_heads=2,
        target_vocab_size=T5_VOCABULARY,
    )
    return randomise(model, seed)


def tiny_text_encoder(seed: int = 2) -> Qwen3Model:
    """Qwen3 with 2 layers of width 32."""
    config = Qwen3Config(
        vocab_size=QWEN_VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return randomise(Qwen3Model(config), seed)


def tiny_vae(seed: int = 3) -> AutoencoderKLQwenImage:
    """VAE of base width 8 with the real latent channels, strides and normalisation."""
    return randomise(AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1, z_dim=16), seed)


def tiny_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The published model's scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def tiny_tokenizers(folder: Path) -> tuple[Qwen2Tokenizer, T5TokenizerFast]:
    """Tokenizers trained on `CORPUS`, saved to `tokenizer/` and `t5_tokenizer/` in `folder` and loaded from there."""
    write_tokenizers(folder / "tokenizer", folder / "t5_tokenizer", CORPUS)
    return (
        Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        T5TokenizerFast.from_pretrained(folder / "t5_tokenizer"),
    )


def miniature_pipeline(files: MiniatureFiles) -> AnimaPipeline:
    """A pipeline of a written miniature's single files."""
    return AnimaPipeline.from_single_files(
        transformer=files.transformer,
        text_encoder=files.text_encoder,
        vae=files.vae,
        tokenizer=files.tokenizer,
        t5_tokenizer=files.t5_tokenizer,
    )


def tiny_pipeline_components(folder: Path) -> dict[str, Any]:
    """All parts by the pipelines' argument names; `folder` receives the tokenizers."""
    tokenizer, t5_tokenizer = tiny_tokenizers(folder)
    with torch.random.fork_rng(devices=[]):
        return {
            "text_encoder": tiny_text_encoder(),
            "tokenizer": tokenizer,
            "t5_tokenizer": t5_tokenizer,
            "text_conditioner": tiny_conditioner(),
            "transformer": tiny_transformer(),
            "vae": tiny_vae(),
            "scheduler": tiny_scheduler(),
        }
