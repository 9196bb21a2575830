"""Which attention kernels the DiT uses."""

from __future__ import annotations

import logging

import torch
from diffusers.utils import is_xformers_available

from ..transformer import AnimaTransformerModel

logger = logging.getLogger(__name__)


def use_xformers(model: AnimaTransformerModel, device: torch.device) -> bool:
    """Use xformers' attention on the DiT where there is a GPU and the package; otherwise say so and stay native.

    The conditioner stays native in any case: it passes a mask. diffusers' `set_attention_backend` also sets a
    process-wide default, so the conditioner is set first. `enable_xformers_memory_efficient_attention` is not used:
    it swaps in a processor that ignores Anima's rotary embeddings.

    Returns:
        Whether xformers is in use.
    """
    if device.type != "cuda" or not is_xformers_available():
        missing = "the package is not installed (pip install anima-peft[xformers])"
        reason = "it needs a CUDA device, and none is in use" if device.type != "cuda" else missing
        logger.warning("xformers = true: %s, so torch's own attention is used; the result is the same.", reason)
        return False
    model.text_conditioner.set_attention_backend("native")
    model.transformer.set_attention_backend("xformers")
    return True
