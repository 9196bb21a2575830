"""Adapters on whatever holds Anima's parts: our pipeline, diffusers' modular one, bare models.

`AnimaPipeline` and `AnimaTransformerModel` have these as methods; the functions here do the same for others' objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from diffusers.models import AnimaTextConditioner, CosmosTransformer3DModel
from diffusers.utils.torch_utils import unwrap_module

from ..errors import InputError
from . import exchange, strengths
from .naming import TEXT_CONDITIONER, TEXT_ENCODER, TRANSFORMER, Components
from .sources import Source
from .strengths import Strength

_PARTS: dict[str, type[torch.nn.Module]] = {
    TRANSFORMER: CosmosTransformer3DModel,
    TEXT_CONDITIONER: AnimaTextConditioner,
    TEXT_ENCODER: torch.nn.Module,
}
Target = Any
"""A pipeline or model with the parts as attributes, a bare part, or a mapping from component name to part."""


def load_adapter(
    target: Target,
    source: Source,
    adapter_name: str | None = None,
    strength: Strength | None = None,
    *,
    hotswap: bool = False,
    **where: Any,
) -> str:
    """Load an adapter of any supported format; it acts at once, beside those already active.

    Args:
        target: `AnimaPipeline`, diffusers' `AnimaModularPipeline`, `AnimaTransformerModel`, a bare
            `CosmosTransformer3DModel` or `AnimaTextConditioner`, or a mapping of such components by their names.
        source: safetensors file, folder, hub repo id, or key -> tensor.
        adapter_name: name for `set_adapters`; by default the first free one of `default_0`, `default_1`, …
        strength: a number, or numbers per block; what they do not name has 1.0. See `strengths.set_adapters`. By
            default 1.0.
        hotswap: put the weights in the place of the loaded adapter `adapter_name`, whose strength stays as it was
            unless one is given.
        where: `weight_name`, `subfolder` and the hub's options.

    Returns:
        The adapter's name.

    Raises:
        InputError: the target holds none of Anima's parts, or the file cannot be loaded; nothing was changed then.
    """
    components = components_of(target)
    if strength is not None:
        strengths.check(strength, components)
    with without_offloading(target):
        name = exchange.load_adapter(components, source, adapter_name, hotswap=hotswap, **where)
        if strength is not None:
            strengths.set_strength(components, name, strength)
    return name


def set_adapters(
    target: Target, names: str | Sequence[str], weights: Strength | Sequence[Strength | None] | None = None
) -> None:
    """Let exactly these adapters act, each with its strength; see `strengths.set_adapters`."""
    strengths.set_adapters(components_of(target), names, weights)


def delete_adapters(target: Target, names: str | Sequence[str]) -> None:
    """Remove adapters; the others stay as they are."""
    with without_offloading(target):
        strengths.delete_adapters(components_of(target), names)


def unload_adapters(target: Target) -> None:
    """Remove all adapters and their layers; the model is then bit for bit what it was."""
    with without_offloading(target):
        strengths.unload(components_of(target))


def components_of(target: Target) -> Components:
    """Anima's parts in `target`, by component name.

    Raises:
        InputError: there is none, or one is of another model.
    """
    target = target if isinstance(target, Mapping) else unwrap_module(target)  # what torch.compile put around it
    if isinstance(target, Mapping):
        found = dict(target)
    elif isinstance(target, (CosmosTransformer3DModel, AnimaTextConditioner)):
        found = {TRANSFORMER if isinstance(target, CosmosTransformer3DModel) else TEXT_CONDITIONER: target}
    else:
        found = {name: getattr(target, name, None) for name in _PARTS}
    parts = {name: unwrap_module(model) for name, model in found.items() if model is not None}
    unfit = [f"{name} is a {type(m).__name__}" for name, m in parts.items() if not isinstance(m, _PARTS.get(name, ()))]
    if unfit or not parts.keys() & {TRANSFORMER, TEXT_CONDITIONER}:
        raise InputError(
            f"{type(target).__name__} cannot carry an Anima adapter ({', '.join(unfit) or 'no part of Anima in it'}); "
            "expected a pipeline or model with a transformer and a text_conditioner, or one of these two."
        )
    return parts


@contextmanager
def without_offloading(target: Target) -> Iterator[None]:
    """Layers are put in and taken out while no offloading hook hides the weights (diffusers does the same)."""
    again: list[Callable[[], None]] = []
    if isinstance(target, (DiffusionPipeline, ModularPipeline)) and getattr(target, "hf_device_map", None) is None:
        model_offload, sequential_offload, group_offload = _func_optionally_disable_offloading(target)
        if model_offload:
            again = [target.enable_model_cpu_offload]
        elif sequential_offload:
            again = [target.enable_sequential_cpu_offload]
        elif group_offload:
            again = [
                partial(_maybe_remove_and_reapply_group_offloading, model) for model in components_of(target).values()
            ]
    try:
        yield
    finally:
        for enable in again:
            enable()
