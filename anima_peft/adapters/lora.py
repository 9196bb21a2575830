"""LoRA's configuration, and the two dropouts that PEFT has not. The layers are PEFT's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import peft
import torch

from ..errors import InputError
from .targets import ATTN_MLP


@dataclass
class LoraConfig(peft.LoraConfig):
    """PEFT's `LoraConfig` with Anima's targets, trainable norms and two more dropouts.

    `target_modules` takes a preset ("attn-mlp", the default, "attn-mlp-adaln", "all-linear") or a list of patterns
    (see `select_targets`). Rank, alpha, their patterns, dropout, rsLoRA, DoRA and initialisation are PEFT's.

    Attributes:
        include_modules: patterns of layers to adapt in any case, also where `exclude_modules` names them.
        rank_dropout: chance for each rank of each sample to be dropped in a step; the others are scaled up.
        module_dropout: chance for each layer's LoRA to be dropped in a step.
        train_norm: also train a delta on every affine norm of what is adapted.
        train_text_conditioner: adapt the text conditioner's layers too.

    Raises:
        InputError: rank or module dropout with DoRA, whose magnitudes know nothing of what is dropped.
    """

    target_modules: list[str] | str | None = field(
        default=ATTN_MLP, metadata={"help": "Preset, or patterns of module names."}
    )
    include_modules: list[str] | None = field(default=None, metadata={"help": "Patterns that win over exclusion."})
    rank_dropout: float = field(default=0.0, metadata={"help": "Chance for each rank to be dropped."})
    module_dropout: float = field(default=0.0, metadata={"help": "Chance for each layer's LoRA to be dropped."})
    train_norm: bool = field(default=False, metadata={"help": "Train the affine norms as deltas."})
    train_text_conditioner: bool = field(default=False, metadata={"help": "Adapt the text conditioner's layers too."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora and (self.rank_dropout or self.module_dropout):
            raise InputError("rank_dropout and module_dropout cannot be used with DoRA; use lora_dropout.")


class _Dropout:
    """A hook that masks what a layer's down projection gives (B, …, rank), in training only.

    sd-scripts' two dropouts (networks/lora_anima.py) as masks: every parameter stays in the graph, as several
    processes need it.
    """

    def __init__(self, rank: float, module: float):
        self._rank, self._module = rank, module

    def __call__(self, layer: torch.nn.Module, _: Any, down: torch.Tensor) -> torch.Tensor:
        if not layer.training:
            return down
        if self._rank:
            shape = (down.shape[0], *[1] * (down.ndim - 2), down.shape[-1])
            kept = torch.rand(shape, device=down.device) > self._rank
            down = down * (kept / (1 - self._rank)).to(down.dtype)
        if self._module:
            down = down * (torch.rand((), device=down.device) > self._module)
        return down


def add_dropouts(layer: Any, adapter_name: str, config: LoraConfig) -> None:
    """Let `rank_dropout` and `module_dropout` act on one of PEFT's LoRA layers."""
    if config.rank_dropout or config.module_dropout:
        layer.lora_A[adapter_name].register_forward_hook(_Dropout(config.rank_dropout, config.module_dropout))
