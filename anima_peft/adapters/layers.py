"""The layers of one adapter on a model, of whatever kind they are, and their factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from .factors import Factors, LoraFactors, NormDelta, Weights
from .lokr import LoKrLinear
from .naming import Components, ModuleName, ModuleTable
from .norms import NormLayer

_LAYERS = (LoraLayer, LoKrLinear, NormLayer)


def adapter_layers_of(model: torch.nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """Path in the bare model and layer of everything that carries `adapter_name`.

    Where adapters of different kinds sit on one module, their layers are nested; the path is the module's all the same.
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
            `lokr_w1`, `lokr_w2_b`, `lora_norm`, …
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
        return "norm" not in self.part and "magnitude" not in self.part

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
    return {
        table.by_diffusers[f"{component}.{path}"]: read_factors(layer, adapter_name)
        for component, model in components.items()
        for path, layer in adapter_layers_of(model, adapter_name)
    }


def write_weights(components: Components, weights: Weights, adapter_name: str) -> None:
    """Copy factors into an injected adapter of the same shapes, in the dtype the adapter's parameters have."""
    layers = {
        (component, path): layer
        for component, model in components.items()
        for path, layer in adapter_layers_of(model, adapter_name)
    }
    with torch.no_grad():
        for name, factors in weights.items():
            present = read_factors(layers[name.component, name.path], adapter_name)
            for target, source in zip(tensors_of(present), tensors_of(factors), strict=True):
                target.copy_(source)


def relative_delta(components: Components, adapter_name: str) -> float:
    """|delta W| / |W|, Frobenius norms over all layers of the adapter: zero before training, about 1e-2 after it."""
    delta = weight = 0.0
    for model in components.values():
        for _, layer in adapter_layers_of(model, adapter_name):
            delta += read_factors(layer, adapter_name).delta_norm() ** 2
            weight += float(layer.get_base_layer().weight.detach().float().square().sum())
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
    if isinstance(layer, LoKrLinear):
        return layer.factors(adapter_name)
    weight, bias = layer.delta(adapter_name)
    assert weight is not None
    return NormDelta(weight.detach(), None if bias is None else bias.detach())


def tensors_of(factors: Factors) -> list[torch.Tensor]:
    """All tensors of a module's factors, in a fixed order."""
    if isinstance(factors, LoraFactors):
        return [factors.down, factors.up] + ([] if factors.magnitude is None else [factors.magnitude])
    if isinstance(factors, NormDelta):
        return [factors.weight] + ([] if factors.bias is None else [factors.bias])
    parts = [factors.w1, factors.w2]
    return [tensor for part in parts for tensor in ([part] if isinstance(part, torch.Tensor) else part)]
