"""What a run computes in, and whether this machine can do what its options ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..models.quantization import require_quantization
from .attention import require_attention
from .compiling import require_compiler
from .optimizers import needs_card

if TYPE_CHECKING:
    from ..config import TrainOptions

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""By the names that `mixed_precision` and `save_precision` have for them."""


def require_device(options: TrainOptions, device: torch.device) -> None:
    """Refuse what the options ask for and this machine has not, before anything is loaded.

    Raises:
        InputError: attention kernels, a compiler, an optimizer or a quantization that need another device or a package.
    """
    require_attention(options.loop.attn_mode, device, DTYPES[options.loop.mixed_precision])
    require_compiler(options.loop.compiler, device)
    require_quantization(options.memory.base_quantization, device)
    name = options.optimizer.optimizer_type
    if needs_card(name) and device.type == "cpu":
        raise InputError(f'optimizer_type: {name} needs a graphics card, and none is in use; "AdamW" runs everywhere.')
