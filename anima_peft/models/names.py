"""The original checkpoint's module names and diffusers' names for the same modules.

"Native" names are those of the original DiT (Cosmos-Predict2) as trained by the model's authors; every trainer and
ComfyUI name adapter keys after them. The tables are built for a given number of blocks, so that both directions are
plain dictionary look-ups and nothing is ever decoded by splitting strings.
"""

from __future__ import annotations

CONDITIONER_PREFIX = "llm_adapter."
"""Native prefix of the text conditioner; behind it, native and diffusers names are the same."""

# native -> diffusers, as in diffusers' scripts/convert_cosmos_to_diffusers.py
_OUTSIDE_BLOCKS = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
_INSIDE_BLOCK = {
    "adaln_modulation_self_attn.1": "norm1.linear_1",
    "adaln_modulation_self_attn.2": "norm1.linear_2",
    "adaln_modulation_cross_attn.1": "norm2.linear_1",
    "adaln_modulation_cross_attn.2": "norm2.linear_2",
    "adaln_modulation_mlp.1": "norm3.linear_1",
    "adaln_modulation_mlp.2": "norm3.linear_2",
    "self_attn.q_proj": "attn1.to_q",
    "self_attn.k_proj": "attn1.to_k",
    "self_attn.v_proj": "attn1.to_v",
    "self_attn.output_proj": "attn1.to_out.0",
    "self_attn.q_norm": "attn1.norm_q",
    "self_attn.k_norm": "attn1.norm_k",
    "cross_attn.q_proj": "attn2.to_q",
    "cross_attn.k_proj": "attn2.to_k",
    "cross_attn.v_proj": "attn2.to_v",
    "cross_attn.output_proj": "attn2.to_out.0",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
}


def native_to_diffusers(num_blocks: int) -> dict[str, str]:
    """Every DiT module that holds a weight: native name -> name in `CosmosTransformer3DModel`."""
    table = dict(_OUTSIDE_BLOCKS)
    for block in range(num_blocks):
        table |= {
            f"blocks.{block}.{native}": f"transformer_blocks.{block}.{ours}" for native, ours in _INSIDE_BLOCK.items()
        }
    return table
