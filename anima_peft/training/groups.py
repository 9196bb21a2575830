"""Which rate and which weight decay each part of the adapter is trained with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters.layers import AdapterParameter
from ..adapters.naming import TEXT_CONDITIONER
from ..adapters.targets import first_matches

DIT, CONDITIONER = "dit", "text_conditioner"


@dataclass(frozen=True)
class Rates:
    """Learning rates of the adapter's parts.

    Attributes:
        base: of everything that nothing else is said of.
        transformer, text_conditioner: of the adapter on either component; None means `base`.
        by_pattern: of modules by regular expression, before all others; 0 leaves a module as it starts.
        plus_ratio: LoRA+ (Hayou et al. 2024): the up matrices' rate is so many times the others'.
    """

    base: float
    transformer: float | None = None
    text_conditioner: float | None = None
    by_pattern: Mapping[str, float] = field(default_factory=dict)
    plus_ratio: float = 1.0

    def of_component(self, component: str) -> float:
        """The rate of a component's adapter."""
        own = self.text_conditioner if component == TEXT_CONDITIONER else self.transformer
        return self.base if own is None else own


def group_parameters(parts: Iterable[AdapterParameter], rates: Rates) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, in the model's order; what has the rate 0 is in none and is frozen.

    Returns:
        Groups with `params`, `lr`, the rate's `name` for logs, and a `weight_decay` of 0 for what must not decay.

    Raises:
        InputError: a pattern of `rates` matches no module.
    """
    parts = list(parts)
    modules = list(dict.fromkeys(part.module for part in parts))
    by_module = first_matches("network_reg_lrs", rates.by_pattern, modules)
    numbers = {pattern: number for number, pattern in enumerate(rates.by_pattern)}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for part in parts:
        if part.module in by_module:
            pattern, rate = by_module[part.module]
            name = f"reg_{numbers[pattern]}"
        else:
            rate = rates.of_component(part.module.component)
            name = CONDITIONER if part.module.component == TEXT_CONDITIONER else DIT
        if rates.plus_ratio != 1 and part.is_up:
            rate, name = rate * rates.plus_ratio, f"{name}_plus"
        if not rate:
            part.parameter.requires_grad_(False)
            continue
        group = groups.setdefault((name, part.is_decayed), {"params": [], "lr": rate, "name": name})
        group["params"].append(part.parameter)
        if not part.is_decayed:
            group["weight_decay"] = 0.0
    return list(groups.values())


def reported_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What to log of an optimizer's rates: `lr`, `lr/<name>` where groups differ, and Prodigy's estimate times them.

    Args:
        groups: the optimizer's `param_groups`.
    """
    by_name = {group["name"]: _rate(group) for group in groups}
    rates = {"lr": next(iter(by_name.values()))}
    if len(by_name) > 1:
        rates |= {f"lr/{name}": rate for name, rate in by_name.items()}
    if "d" in groups[0]:
        rates["lr_times_d"] = rates["lr"] * _number(groups[0]["d"])
    return rates


def _rate(group: Mapping[str, Any]) -> float:
    # A schedule-free optimizer warms up by itself and notes the rate that it has used.
    return _number(group.get("scheduled_lr", group["lr"]))


def _number(value: float | torch.Tensor) -> float:
    return float(value)
