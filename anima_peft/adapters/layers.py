"""The layers of one adapter on a model, of whatever kind they are, and their factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from .deltas import DeltaLayer
from .factors import Factors, FullDelta, LoraFactors, NormDelta, Weights, tensors_of
from .loha import LoHaLinear
from .lokr import LoKrLinear
from .naming import Components, ModuleName, ModuleTable
from .quantized import plain_weight

_LAYERS = (LoraLayer, LoKrLinear, LoHaLinear, DeltaLayer)


def adapter_layers_of(model: torch.nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """Path in the bare model and layer of everything that carries `adapter_name`.

    Where adapters of different kinds sit on one module, their layers are nested; the path is the module's all the same.
    One adapter, too, can have two: LoRA for the weight, and a delta of the bias.
    """
    for path, module in model.named_modules():
        if isinstance(module, _LAYERS) and adapter_name in module.scaling:
            yield path.replace(".base_layer", ""), module


@dataclass(frozen=True)
class AdapterParameter:
    """One parameter of an adapter.

    Attributes:
        module: what it adapts.
        part: which of the layer's parts it is, by PEFT's name: `lora_A`, `lora_B`, `lora_magnitude_vector`,
            `lokr_w1`, `lokr_w2_b`, `lora_delta`, …
        parameter: the leaf.
    """

    module: ModuleName
    part: str
    parameter: torch.nn.Parameter

    @property
    def is_decayed(self) -> bool:
        """Whether weight decay may shrink it.

        Not deltas of norms, and not DoRA's magnitudes: these start at the base weights' norms, and decay would shrink
        the base.
        """
        return "delta" not in self.part and "magnitude" not in self.part

    @property
    def is_up(self) -> bool:
        """Whether LoRA+ gives it the higher rate: LoRA's up matrix (Hayou et al. 2024), and of LoKr's factors w1, as
        in sd-scripts (networks/network_base.py)."""
        return self.part == "lora_B" or self.part.startswith("lokr_w1")


def parts_of(components: Components, table: ModuleTable, adapter_name: str) -> Iterator[AdapterParameter]:
    """The parameters of one adapter with what they are, in the model's order."""
    for component, model in components.items():
        for path, layer in adapter_layers_of(model, adapter_name):
            module = table.by_diffusers[f"{component}.{path}"]
            for part in dict.fromkeys(layer.adapter_layer_names):  # PEFT lists DoRA's magnitudes twice
                by_adapter = getattr(layer, part)
                if adapter_name in by_adapter:
                    held = by_adapter[adapter_name]
                    for parameter in held.parameters() if isinstance(held, torch.nn.Module) else [held]:
                        yield AdapterParameter(module, part, parameter)


def adapter_parameters(components: Components, adapter_name: str) -> list[torch.nn.Parameter]:
    """The parameters of one adapter, in the model's order."""
    return [part.parameter for part in parts_of(components, ModuleTable(components), adapter_name)]


def read_weights(components: Components, table: ModuleTable, adapter_name: str) -> dict[ModuleName, Factors]:
    """The adapter's factors, detached, in the model's order. The strength set by `set_adapters` is not part of them."""
    weights: dict[ModuleName, Factors] = {}
    for component, model in components.items():
        for path, layer in adapter_layers_of(model, adapter_name):
            name, factors = table.by_diffusers[f"{component}.{path}"], read_factors(layer, adapter_name)
            weights[name] = factors if name not in weights else _joined(weights[name], factors)
    return weights


def _joined(one: Factors, other: Factors) -> Factors:
    """The factors of two nested layers of one adapter, of which one is a delta of the bias alone."""
    linear, delta = (other, one) if isinstance(one, FullDelta) else (one, other)
    assert isinstance(delta, FullDelta)
    assert delta.weight is None
    return replace(linear, bias=delta.bias)


def write_weights(components: Components, weights: Weights, adapter_name: str) -> None:
    """Copy factors into an injected adapter of the same shapes, in the dtype the adapter's parameters have."""
    pairs = []
    for component, model in components.items():
        by_path = {name.path: factors for name, factors in weights.items() if name.component == component}
        for path, layer in adapter_layers_of(model, adapter_name):
            if path in by_path:
                targets = tensors_of(read_factors(layer, adapter_name))
                sources = tensors_of(_share_of(layer, by_path[path]))
                # All that can fail, for want of memory, comes before the first copy.
                pairs += [(a, b.to(a.device, a.dtype)) for a, b in zip(targets, sources, strict=True)]
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)


def _share_of(layer: Any, factors: Factors) -> Factors:
    """The part of a module's factors that this one of its layers holds."""
    if not isinstance(layer, DeltaLayer):
        return replace(factors, bias=None)
    return factors if isinstance(factors, (FullDelta, NormDelta)) else FullDelta(bias=factors.bias)


def relative_delta(components: Components, adapter_name: str) -> float:
    """|delta W| / |W|, Frobenius norms over all layers of the adapter: zero before training, about 1e-2 after it."""
    delta = weight = 0.0
    for model in components.values():
        for _, layer in adapter_layers_of(model, adapter_name):
            factors = read_factors(layer, adapter_name)
            if isinstance(factors, FullDelta) and factors.weight is None:
                continue  # a bias beside the weight that another layer counts
            delta += factors.delta_norm() ** 2
            weight += float(plain_weight(layer.get_base_layer()).float().square().sum())
    return (delta / weight) ** 0.5 if weight else 0.0


def read_factors(layer: Any, adapter_name: str) -> Factors:
    """One layer's factors, detached: they share the parameters' memory."""
    if isinstance(layer, LoraLayer):
        alpha = float(layer.lora_alpha[adapter_name])
        if layer.use_rslora.get(adapter_name, False):
            alpha *= layer.r[adapter_name] ** 0.5  # scale = alpha / sqrt(rank), written as alpha' / rank
        down, up = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
        magnitude = None
        if layer.use_dora.get(adapter_name, False):
            magnitude = layer.lora_magnitude_vector[adapter_name].weight.detach()
        return LoraFactors(down, up, alpha, magnitude)
    if isinstance(layer, (LoKrLinear, LoHaLinear)):
        return layer.factors(adapter_name)
    weight, bias = (None if part is None else part.detach() for part in layer.delta(adapter_name))
    if isinstance(layer.get_base_layer(), torch.nn.Linear):
        return FullDelta(weight, bias)
    assert weight is not None
    return NormDelta(weight, bias)
