"""Numerical settings in which the stock classes differ from the original model."""

from __future__ import annotations

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
