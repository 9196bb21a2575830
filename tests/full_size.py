"""The published model's two trained parts at their real size, without memory for their weights."""

from __future__ import annotations

from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

from anima_peft.models.checkpoints import build_empty

BLOCKS = 28


def full_size_transformer(blocks: int = BLOCKS) -> CosmosTransformer3DModel:
    """DiT on the meta device."""
    return build_empty(
        lambda: CosmosTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=16,
            attention_head_dim=128,
            num_layers=blocks,
            text_embed_dim=1024,
            adaln_lora_dim=256,
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
        )
    )


def full_size_conditioner() -> AnimaTextConditioner:
    """Text conditioner on the meta device; the class's defaults are the published sizes."""
    return build_empty(AnimaTextConditioner)
