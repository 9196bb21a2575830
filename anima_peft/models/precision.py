"""Numerical settings in which the stock classes differ from the original model."""

from __future__ import annotations

from typing import Any

import torch

QK_NORM_EPS = 1e-6
"""eps of the DiT's query and key norms in the original model; diffusers' class is built with 1e-5."""


def set_qk_norm_eps(transformer: torch.nn.Module, eps: float = QK_NORM_EPS) -> None:
    """Set the eps of the query and key norm of every attention in the DiT, in place.

    Args:
        transformer: a `CosmosTransformer3DModel`, with or without adapters on its norms.
        eps: added to the mean square under the root.

    Raises:
        ValueError: the model has no such norms, so it is not the DiT.
    """
    norms = [
        getattr(norm, "base_layer", norm)  # an adapter on a norm keeps the norm itself there
        for module in transformer.modules()
        for norm in (getattr(module, "norm_q", None), getattr(module, "norm_k", None))
        if norm is not None
    ]
    if not norms:
        raise ValueError(f"{type(transformer).__name__} has no norm_q and norm_k. Expected a CosmosTransformer3DModel.")
    for norm in norms:
        norm.eps = eps


def encoder_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """What VAE and text encoder compute in: the DiT's dtype, but float32 beside float16, where both can overflow."""
    return torch.float32 if dtype is torch.float16 else dtype


def enable_fp32_residual(transformer: Any) -> None:
    """Keep the DiT's residual stream in float32 while its layers compute in the weights' dtype.

    The stream passes 65504, float16's largest number, in the last blocks; matrix products and attention stay within
    it. With this, `patch_embed` hands on float32, each block's gate is float32 and so is the sum it scales, and every
    norm brings its result back to the weights' dtype. Works with and without autocast. The same split as in ComfyUI's
    `comfy/ldm/cosmos/predict2.py`.

    Args:
        transformer: a `CosmosTransformer3DModel`; changed in place by forward hooks. Calling it again changes nothing.
    """
    if getattr(transformer, "_fp32_residual", False):
        return
    transformer._fp32_residual = True

    def compute_dtype() -> torch.dtype:
        """The weights', asked for at every call: the model may be moved to another."""
        return transformer.proj_out.weight.dtype

    def to_fp32(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        """The patches, with which the stream begins."""
        return output.float()

    def time_in_compute_dtype(_: torch.nn.Module, args: tuple) -> tuple:
        """The embedding takes only its dtype from the hidden states."""
        hidden_states, timestep = args
        return hidden_states[:0].to(compute_dtype()), timestep

    def narrow_with_wide_gate(_: torch.nn.Module, __: tuple, output: tuple) -> tuple:
        """What a layer reads, and the factor of what it adds to the stream."""
        hidden_states, gate = output
        return hidden_states.to(compute_dtype()), gate.float()

    def narrow(_: torch.nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        """The stream's end, for the last projection."""
        return output.to(compute_dtype())

    transformer.patch_embed.register_forward_hook(to_fp32)
    transformer.time_embed.register_forward_pre_hook(time_in_compute_dtype)
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2, block.norm3):
            norm.register_forward_hook(narrow_with_wide_gate)
    transformer.norm_out.register_forward_hook(narrow)
