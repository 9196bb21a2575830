"""The models that are measured: small ones for a CPU, and the published sizes with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from transformers import Qwen3Config, Qwen3Model

from anima_peft import AnimaTransformerModel
from anima_peft.miniature.random_weights import build_dit, build_text_encoder, build_vae
from anima_peft.models.checkpoints import build_empty
from anima_peft.models.precision import set_qk_norm_eps
from tests.full_size import full_size_conditioner, full_size_transformer

# Of Qwen3-0.6B-Base (its config.json on the hub).
_QWEN: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
_T5_VOCABULARY = 256  # of the small conditioner


def transformer_model(
    size: str, device: torch.device, dtype: torch.dtype, *, heads: int = 2, layers: int = 2
) -> AnimaTransformerModel:
    """DiT and conditioner, frozen, with random weights.

    Args:
        size: "miniature" or "full".
        device: where the weights lie.
        dtype: of the weights.
        heads, layers: of the miniature's DiT, each head 32 wide.
    """
    if size == "miniature":
        torch.manual_seed(0)
        parts: list[torch.nn.Module] = [*build_dit(_T5_VOCABULARY, heads=heads, layers=layers)]
        parts = [part.to(device, dtype) for part in parts]
    else:
        parts = [fill(part, device, dtype) for part in (full_size_transformer(), full_size_conditioner())]
        set_qk_norm_eps(parts[0])
    return AnimaTransformerModel(*parts)


def vae(size: str, device: torch.device, dtype: torch.dtype) -> AutoencoderKLQwenImage:
    """The VAE, frozen, with random weights."""
    if size == "miniature":
        return build_vae().to(device, dtype)
    return fill(build_empty(AutoencoderKLQwenImage), device, dtype)


def text_encoder(size: str, device: torch.device, dtype: torch.dtype, *, vocabulary: int = 512) -> Qwen3Model:
    """Qwen3, frozen, with random weights; `vocabulary` is the miniature's."""
    if size == "miniature":
        return build_text_encoder(vocabulary).to(device, dtype)
    return fill(build_empty(lambda: Qwen3Model(Qwen3Config(**_QWEN))), device, dtype)


def fill(model: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """Give a model from the meta device random weights: normal with a deviation of 0.02, and ones for norms."""
    # Buffers are no weights: they were computed where the model was built.
    model = model._apply(lambda t: torch.empty_like(t, device=device, dtype=dtype) if t.is_meta else t.to(device))
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02, generator=generator)
        else:
            parameter.data.fill_(1.0)
    return model.requires_grad_(False).eval()
