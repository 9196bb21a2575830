"""Which attention kernels the DiT uses."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import is_flash_attn_available, is_sageattention_available, is_xformers_available

from ..errors import InputError
from ..transformer import AnimaTransformerModel

logger = logging.getLogger(__name__)

_BACKENDS = {
    "flash": AttentionBackendName.FLASH,
    "xformers": AttentionBackendName.XFORMERS,
    "sage": AttentionBackendName.SAGE,  # has no backward pass: for drawing only
}
_PACKAGES = {
    "flash": "pip install flash-attn --no-build-isolation",
    "xformers": "pip install anima-peft[xformers]",
    "sage": "pip install sageattention",
}
_NOT_IN_FLOAT32 = ("flash", "sage")


def require_attention(mode: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse kernels that were asked for by name and cannot be had, before anything is loaded.

    Args:
        mode: `attn_mode`.
        dtype: what the model computes in.

    Raises:
        InputError: no graphics card or no package for them, or flash or sage in float32.
    """
    missing = _missing(mode, device) if mode in _BACKENDS else ""
    if not missing and mode in _NOT_IN_FLOAT32 and dtype == torch.float32:
        missing = "it computes in bf16 or fp16 only, and this is float32"
    if missing:
        raise InputError(f'attn_mode: "{mode}" cannot be had: {missing}. "torch" runs everywhere.')


def set_attention(model: AnimaTransformerModel, mode: str | None, device: torch.device, *, xformers: bool) -> str:
    """Choose the DiT's kernels.

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
    use_backend(model.transformer, model.text_conditioner, mode)
    return mode


def use_backend(transformer: Any, text_conditioner: Any, mode: str | None) -> None:
    """Let the DiT use the kernels of that name, which `require_attention` has let pass.

    The conditioner stays native in any case: it passes a mask. diffusers' `set_attention_backend` also sets a
    process-wide default, so the conditioner is set first. `enable_xformers_memory_efficient_attention` is not used:
    it swaps in a processor that ignores Anima's rotary embeddings.
    """
    if mode in _BACKENDS:
        text_conditioner.set_attention_backend(AttentionBackendName.NATIVE)
        transformer.set_attention_backend(_BACKENDS[mode])


def _missing(mode: str | None, device: torch.device) -> str:
    """What these kernels lack here, or nothing."""
    if device.type != "cuda":
        return "it needs a CUDA device, and none is in use"
    installed = {
        "flash": is_flash_attn_available,
        "xformers": is_xformers_available,
        "sage": is_sageattention_available,
    }
    name = mode or ""
    return "" if installed[name]() else f"the package is not installed ({_PACKAGES[name]})"
