"""Which attention kernels the DiT uses."""

from __future__ import annotations

import logging

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import is_flash_attn_available, is_xformers_available

from ..errors import InputError
from ..transformer import AnimaTransformerModel

logger = logging.getLogger(__name__)

_BACKENDS = {"flash": AttentionBackendName.FLASH, "xformers": AttentionBackendName.XFORMERS}
_PACKAGES = {"flash": "pip install flash-attn --no-build-isolation", "xformers": "pip install anima-peft[xformers]"}


def require_attention(mode: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse kernels that were asked for by name and cannot be had, before anything is loaded.

    Args:
        mode: `attn_mode`.
        dtype: what the model computes in.

    Raises:
        InputError: no graphics card or no package for them, or flash in float32.
    """
    missing = _missing(mode, device) if mode in _BACKENDS else ""
    if not missing and mode == "flash" and dtype == torch.float32:
        missing = 'it computes in bf16 or fp16 only, and mixed_precision is "no"'
    if missing:
        raise InputError(f'attn_mode: "{mode}" cannot be had: {missing}. "torch" runs everywhere.')


def set_attention(model: AnimaTransformerModel, mode: str | None, device: torch.device, *, xformers: bool) -> str:
    """Choose the DiT's kernels.

    The conditioner stays native in any case: it passes a mask. diffusers' `set_attention_backend` also sets a
    process-wide default, so the conditioner is set first. `enable_xformers_memory_efficient_attention` is not used:
    it swaps in a processor that ignores Anima's rotary embeddings.

    Args:
        mode: `attn_mode`, which `require_attention` has let pass.
        xformers: whether xformers is wished for where it can be had; elsewhere one warning says what is missing.

    Returns:
        What is in use: `torch`, `flash` or `xformers`.
    """
    if mode is None and xformers:
        missing = _missing("xformers", device)
        if missing:
            logger.warning("xformers = true: %s, so torch's own attention is used; the result is the same.", missing)
        mode = "torch" if missing else "xformers"
    if mode not in _BACKENDS:
        return "torch"
    model.text_conditioner.set_attention_backend(AttentionBackendName.NATIVE)
    model.transformer.set_attention_backend(_BACKENDS[mode])
    return mode


def _missing(mode: str | None, device: torch.device) -> str:
    """What these kernels lack here, or nothing."""
    if device.type != "cuda":
        return "it needs a CUDA device, and none is in use"
    installed = is_xformers_available() if mode == "xformers" else is_flash_attn_available()
    return "" if installed else f"the package is not installed ({_PACKAGES[mode or '']})"
