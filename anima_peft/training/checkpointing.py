"""Gradient checkpointing of all blocks, or of every n-th."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..transformer import AnimaTransformerModel


def checkpoint_blocks(model: AnimaTransformerModel, every: int = 1) -> None:
    """Recompute the activations of every `every`-th block of DiT and conditioner in the backward pass.

    Losses and gradients are those without it to the last bit where kernels are deterministic: the same operations run
    on the same values, and dropout draws the same numbers again.
    """
    parts = (model.transformer.transformer_blocks, model.text_conditioner.blocks)
    chosen = {id(block) for blocks in parts for block in list(blocks)[::every]}

    def run(block: torch.nn.Module, *inputs: Any) -> Any:
        if id(block) not in chosen:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)

    model.enable_gradient_checkpointing(run)
