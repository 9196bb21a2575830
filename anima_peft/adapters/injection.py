"""Putting an adapter's layers on a model, as planned."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import peft
import torch

from .deltas import DeltaLayer
from .layers import adapter_layers_of
from .loha import LoHaLinear
from .lokr import LoKrLinear
from .naming import Components
from .planning import LoKrSettings, Parts, Plan


def inject(components: Components, plans: Mapping[str, Plan], adapter_name: str) -> None:
    """Put a new adapter that changes nothing yet on the plans' exact modules."""
    for component, plan in plans.items():
        model: Any = components[component]
        planned = len(plan.lokr) + len(plan.loha) + len(plan.deltas)
        if isinstance(plan.config, peft.LoraConfig) and plan.config.target_modules:
            planned += len(plan.config.target_modules)  # before: PEFT shortens long lists to suffixes in place
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # a second one is meant
                peft.inject_adapter_in_model(plan.config, model, adapter_name)
        for path, settings in plan.lokr.items():
            _add_lokr(model, path, settings, plan.config, adapter_name)
        for path, (rank, alpha) in plan.loha.items():
            _add_loha(model, path, rank, alpha, adapter_name)
        for path, parts in plan.deltas.items():
            _add_delta(model, path, parts, plan.config, adapter_name)
        if not hasattr(model, "peft_config"):
            model.peft_config = {}
        model.peft_config[adapter_name] = plan.config
        model._hf_peft_config_loaded = True  # read by diffusers' PeftAdapterMixin
        layers = [layer for _, layer in adapter_layers_of(model, adapter_name)]
        assert len(layers) == planned, f"{len(layers)} layers, {planned} planned"
        for layer in layers:
            layer.train(model.training)  # a new dropout would act in a model that is in eval mode


def _add_lokr(model: torch.nn.Module, path: str, settings: LoKrSettings, config: Any, adapter_name: str) -> None:
    target = model.get_submodule(path)
    # A LoRA config kept for a file of several kinds says nothing about LoKr's dropouts: there are none in files.
    options = config if isinstance(config, peft.LoKrConfig) else peft.LoKrConfig(target_modules=[])
    made_with: dict[str, Any] = {"r": settings.r, "alpha": settings.alpha, "shape": settings.shape}
    if isinstance(target, LoKrLinear):
        target.update_layer(adapter_name, config=options, **made_with)
    else:
        _replace(model, path, LoKrLinear(target, adapter_name, options, **made_with))


def _add_loha(model: torch.nn.Module, path: str, rank: int, alpha: float, adapter_name: str) -> None:
    target = model.get_submodule(path)
    if isinstance(target, LoHaLinear):
        target.add(adapter_name, rank, alpha)
    else:
        _replace(model, path, LoHaLinear.on(target, adapter_name, rank, alpha))


def _add_delta(model: torch.nn.Module, path: str, parts: Parts, config: peft.PeftConfig, adapter_name: str) -> None:
    target = model.get_submodule(path)
    layer = target if isinstance(target, DeltaLayer) else DeltaLayer(target)
    method = "lokr" if isinstance(config, peft.LoKrConfig) else "lora"
    layer.add_delta(adapter_name, method, weight=parts.weight, bias=parts.bias)
    if layer is not target:
        _replace(model, path, layer)


def _replace(model: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
