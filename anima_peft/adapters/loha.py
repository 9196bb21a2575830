"""LoHa on linear layers: PEFT's layer, for files that others trained."""

from __future__ import annotations

import peft
import torch
from peft.tuners.loha.layer import Linear as PeftLoHaLinear

from .factors import LoHaFactors


class LoHaLinear(PeftLoHaLinear):
    """PEFT's LoHa layer, whose factors can be read. Its forward pass forms the delta, one layer at a time."""

    @classmethod
    def on(cls, base: torch.nn.Module, adapter_name: str, rank: int, alpha: float) -> LoHaLinear:
        """A new layer around a linear one, with an adapter whose delta is zero."""
        return cls(base, adapter_name, _plain_config(), r=rank, alpha=alpha)

    def add(self, adapter_name: str, rank: int, alpha: float) -> None:
        """Add one more adapter whose delta is zero."""
        self.update_layer(adapter_name, rank, alpha, config=_plain_config())

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> torch.Tensor:
        """The delta at the present strength, (out, in), in plain operations; a compiler cannot follow PEFT's own."""
        w1 = self.hada_w1_a[adapter_name] @ self.hada_w1_b[adapter_name]
        w2 = self.hada_w2_a[adapter_name] @ self.hada_w2_b[adapter_name]
        return w1 * w2 * self.scaling[adapter_name]

    def factors(self, adapter_name: str) -> LoHaFactors:
        """The adapter's parameters, detached, whatever its strength."""
        parts = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        w1_a, w1_b, w2_a, w2_b = (part[adapter_name].detach() for part in parts)
        return LoHaFactors((w1_a, w1_b), (w2_a, w2_b), float(self.alpha[adapter_name]))


def _plain_config() -> peft.LoHaConfig:
    return peft.LoHaConfig(target_modules=[])
