"""LoRA's configuration. The layers are PEFT's own."""

from __future__ import annotations

from dataclasses import dataclass, field

import peft

from .targets import ATTN_MLP


@dataclass
class LoraConfig(peft.LoraConfig):
    """PEFT's `LoraConfig` with Anima's targets and trainable norms.

    `target_modules` takes a preset ("attn-mlp", the default, "attn-mlp-adaln", "all-linear") or a list of patterns
    (see `select_targets`). Rank, alpha, their patterns, dropout, rsLoRA, DoRA and initialisation are PEFT's.

    Attributes:
        train_norm: also train a delta on every affine norm of what is adapted.
        train_text_conditioner: adapt the text conditioner's layers too.
    """

    target_modules: list[str] | str | None = field(
        default=ATTN_MLP, metadata={"help": "Preset, or patterns of module names."}
    )
    train_norm: bool = field(default=False, metadata={"help": "Train the affine norms as deltas."})
    train_text_conditioner: bool = field(default=False, metadata={"help": "Adapt the text conditioner's layers too."})
