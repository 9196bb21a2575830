"""DiT and conditioner of any size, and their keys."""

from __future__ import annotations

from typing import Any

from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

from anima_peft.models.precision import set_qk_norm_eps

from .conftest import Tensors


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def transformer_of(changes: dict[str, Any]) -> CosmosTransformer3DModel:
    """A DiT of 2 blocks but for `changes`, with the norms' eps of the published model."""
    plain = {"num_layers": 2, "text_embed_dim": 32, "adaln_lora_dim": 16, "extra_pos_embed_type": None}
    model = CosmosTransformer3DModel(**plain | {"rope_scale": (1.0, 4.0, 4.0)} | changes)
    set_qk_norm_eps(model)
    return model


def conditioner_of(changes: dict[str, Any]) -> AnimaTextConditioner:
    """A conditioner of 2 layers of width 32 but for `changes`."""
    plain = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 2, "num_attention_heads": 2}
    return AnimaTextConditioner(**plain | {"target_vocab_size": 64} | changes)
