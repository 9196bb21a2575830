"""Which adapters act, and how strongly: activation, strengths per block, fusing, deleting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import InputError
from ..models.names import CONDITIONER_PREFIX
from .naming import TEXT_CONDITIONER, TEXT_ENCODER, TRANSFORMER, Components
from .quantized import is_quantized

Strength = float | Mapping[str, float]
"""One number, or numbers by place: a component (`transformer`), or a block (`transformer_blocks.3`, `blocks.3`)."""


def adapter_layers(components: Components) -> Iterator[tuple[str, str, BaseTunerLayer]]:
    """Component, path and layer of everything that carries adapters."""
    for component, model in components.items():
        for path, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                yield component, path, module


def list_adapters(components: Components) -> dict[str, list[str]]:
    """Component -> names of the adapters it carries; components without any are left out."""
    return {c: list(names) for c, model in components.items() if (names := getattr(model, "peft_config", None))}


def adapter_names(components: Components) -> list[str]:
    """Names of all adapters, in the order of loading."""
    return list(dict.fromkeys(name for names in list_adapters(components).values() for name in names))


def active_adapters(components: Components) -> list[str]:
    """Names of the adapters that act on the next forward pass."""
    active = {name for _, _, layer in adapter_layers(components) for name in layer.active_adapters}
    return [name for name in adapter_names(components) if name in active]


def activate(components: Components, names: Sequence[str]) -> None:
    """Let exactly `names` act, without touching strengths or which parameters are trained."""
    for _, _, layer in adapter_layers(components):
        with _trained_as_before(layer):
            layer.set_adapter(list(names))  # copied: PEFT keeps the list it is given, and layers must not share one


@contextmanager
def _trained_as_before(layer: BaseTunerLayer) -> Iterator[None]:
    """PEFT's switches also decide which parameters are trained; inside of this they do not."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    yield
    layer.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def set_adapters(
    components: Components, names: str | Sequence[str], weights: Strength | Sequence[Strength | None] | None = None
) -> None:
    """Let exactly `names` act, each with its strength (default 1.0), also where adapters were switched off.

    A strength is a number, or a mapping from a place to a number: a component's name, or a block's path
    (`transformer_blocks.3` or its native name `blocks.3`; the conditioner's `llm_adapter.blocks.3`). The longest
    matching place counts; what no entry names has 1.0.

    Raises:
        InputError: an unknown or doubled adapter, a place that is not in the model, a wrong number of weights, or
            fused adapters.
    """
    names = _as_list(names)
    listed: list[Any] = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
    known = adapter_names(components)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"no adapter named {', '.join(map(repr, unknown))}; loaded are: {', '.join(known) or 'none'}.")
    if len(set(names)) != len(names):
        raise InputError(f"an adapter is named twice: {', '.join(names)}; its strength would be counted twice.")
    if len(listed) != len(names):
        raise InputError(f"{len(names)} adapters but {len(listed)} strengths; give one for each, or a single one.")
    _require_unfused(components, "set_adapters")
    strengths = [_Strengths(1.0 if weight is None else weight, components) for weight in listed]
    set_enabled(components, True)
    activate(components, names)
    for component, path, layer in adapter_layers(components):
        for name, strength in zip(names, strengths, strict=True):
            layer.set_scale(name, strength.at(component, path))


def set_strength(components: Components, name: str, strength: Strength) -> None:
    """Set one adapter's strength, whatever else acts.

    Raises:
        InputError: see `check`.
    """
    resolved = _Strengths(strength, components)
    for component, path, layer in adapter_layers(components):
        layer.set_scale(name, resolved.at(component, path))


def check(strength: Strength, components: Components) -> None:
    """Refuse what is no strength.

    Raises:
        InputError: not a finite number, or a place that is not in the model.
    """
    _Strengths(strength, components)


class _Strengths:
    """A strength resolved to one number for each layer."""

    def __init__(self, strength: Strength, components: Components):
        self._places: dict[str, float] = {}
        self._default = 1.0
        if not isinstance(strength, Mapping):
            self._default = _number(strength)
            return
        known = {f"{c}.{path}" if path else c for c, model in components.items() for path, _ in model.named_modules()}
        for place, value in strength.items():
            full = _full_place(place)
            if full not in known:
                raise InputError(
                    f"no place named {place!r} in the model; expected a component ({', '.join(components)}) or a block "
                    "such as transformer_blocks.0 or llm_adapter.blocks.0."
                )
            self._places[full] = _number(value)

    def at(self, component: str, path: str) -> float:
        """The number for the layer at `path`: that of the longest place it lies in."""
        full = f"{component}.{path}."
        matching = [place for place in self._places if full.startswith(place + ".")]
        return self._places[max(matching, key=len)] if matching else self._default


def _full_place(place: str) -> str:
    if place.partition(".")[0] in (TRANSFORMER, TEXT_CONDITIONER, TEXT_ENCODER):
        return place
    if place.startswith(CONDITIONER_PREFIX):
        return f"{TEXT_CONDITIONER}.{place.removeprefix(CONDITIONER_PREFIX)}"
    if place.startswith("blocks."):
        return f"{TRANSFORMER}.transformer_{place}"
    return f"{TRANSFORMER}.{place}"


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"a strength must be a finite number, not {value!r}.")
    return float(value)


def set_enabled(components: Components, enabled: bool) -> None:
    """Switch all adapters off or on again without forgetting which were active.

    Raises:
        InputError: adapters are to be switched off, but are fused.
    """
    if not enabled:
        _require_unfused(components, "disable_lora")
    for _, _, layer in adapter_layers(components):
        with _trained_as_before(layer):
            layer.enable_adapters(enabled)


def delete_adapters(components: Components, names: str | Sequence[str]) -> None:
    """Remove adapters; the others stay as active and as strong as they were. Base weights are not touched.

    Raises:
        InputError: an unknown name, or an adapter that is fused.
    """
    names = _as_list(names)
    unknown = [name for name in names if name not in adapter_names(components)]
    if unknown:
        raise InputError(f"no adapter named {', '.join(map(repr, unknown))} to delete.")
    _require_unfused(components, "delete_adapters")
    remove(components, names)


def remove(components: Components, names: Sequence[str]) -> None:
    """Take adapters off the model, as far as they are on it."""
    # First: PEFT would otherwise choose another adapter as the active one.
    activate(components, [name for name in active_adapters(components) if name not in names])
    for _, _, layer in adapter_layers(components):
        for name in names:
            layer.delete_adapter(name)
    for model in components.values():
        for name in names:
            getattr(model, "peft_config", {}).pop(name, None)
        if getattr(model, "peft_config", None):
            _unwrap_empty(model)
        else:
            _unwrap(model)


def _unwrap_empty(model: torch.nn.Module) -> None:
    """Take off the layers that no adapter uses any more, so that the model is what it was before they came."""
    # The innermost first: layers of several kinds are nested.
    for path, layer in reversed([*model.named_modules()]):
        if isinstance(layer, BaseTunerLayer) and not layer.scaling:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)


def unload(components: Components) -> None:
    """Remove all adapters and their layers; the model is then what it was before the first one.

    Raises:
        InputError: adapters are fused: their deltas are in the weights.
    """
    _require_unfused(components, "unload")
    for model in components.values():
        _unwrap(model)


def _unwrap(model: torch.nn.Module) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        recurse_remove_peft_layers(model)
    vars(model).pop("peft_config", None)
    model._hf_peft_config_loaded = False  # type: ignore[assignment]


def fuse(components: Components, lora_scale: float = 1.0, names: Sequence[str] | None = None) -> None:
    """Add the active adapters' deltas (or those of `names`) to the base weights, so that they cost nothing more.

    Args:
        lora_scale: multiplies the strengths set by `set_adapters`, for this fusing only.
        names: adapters to fuse; None means the active ones.

    Raises:
        InputError: no such adapter, none active, or an active one is left out: it would cease to act, since a layer
            with a fused adapter applies no other. Or some are fused already, the sum is not finite, or another kind
            than LoRA sits on a quantized layer.
    """
    active = active_adapters(components)
    names = active if names is None else list(dict.fromkeys(_as_list(names)))
    unknown = [name for name in names if name not in adapter_names(components)]
    if unknown or not names:
        raise InputError(f"no adapter to fuse: {', '.join(map(repr, unknown)) or 'none is active'}.")
    left_out = [name for name in active if name not in names]
    if left_out:
        raise InputError(f"{', '.join(left_out)} would cease to act: fuse all active adapters, or set_adapters first.")
    require_ready(components, "fuse_lora")
    _require_writable(components, names)
    try:
        for _, _, layer in adapter_layers(components):
            present = [name for name in names if name in layer.scaling]
            if present:
                layer.scaling_before_fusing = dict(layer.scaling)
                for name in present:
                    layer.scaling[name] *= lora_scale
                layer.merge(safe_merge=True, adapter_names=present)
    except ValueError as error:
        _unfuse_layers(components)
        raise InputError(f"fuse_lora: {error}") from error


def _require_writable(components: Components, names: Sequence[str]) -> None:
    """Only PEFT's LoRA layers know how to add to a quantized weight."""
    for component, path, layer in adapter_layers(components):
        acts = any(name in layer.scaling for name in names)
        if acts and not isinstance(layer, LoraLayer) and is_quantized(layer.get_base_layer()):
            raise InputError(
                f"fuse_lora: {component}.{path} is quantized, and what would be added to it is no LoRA; load the model "
                "without quantization."
            )


def merge_and_unload(components: Components, name: str, strength: float) -> None:
    """Fuse one adapter and take all layers off, so that the weights cannot be had back.

    Raises:
        InputError: as `fuse`.
    """
    set_adapters(components, name, strength)
    fuse(components)
    for model in components.values():
        _unwrap(model)


def unfuse(components: Components) -> None:
    """Subtract fused deltas again. The weights return to within rounding: about 1e-7 in fp32, 1e-2 in bf16 (relative).

    Raises:
        InputError: nothing is fused.
    """
    if not fused_adapters(components):
        raise InputError("unfuse_lora: no adapter is fused.")
    _unfuse_layers(components)


def _unfuse_layers(components: Components) -> None:
    for _, _, layer in adapter_layers(components):
        if layer.merged_adapters:
            layer.unmerge()
        layer.scaling.update(vars(layer).pop("scaling_before_fusing", {}))


def fused_adapters(components: Components) -> set[str]:
    """Names of adapters whose deltas are in the base weights at the moment."""
    return {name for _, _, layer in adapter_layers(components) for name in layer.merged_adapters}


def require_ready(components: Components, action: str) -> None:
    """Refuse what would put an adapter on a model where it cannot act beside the others.

    Raises:
        InputError: adapters are fused or switched off.
    """
    _require_unfused(components, action)
    if any(layer.disable_adapters for _, _, layer in adapter_layers(components)):
        raise InputError(f"{action}: the adapters are switched off; call enable_lora() first.")


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _require_unfused(components: Components, action: str) -> None:
    fused = fused_adapters(components)
    if fused:
        raise InputError(f"{action}: adapters are fused ({', '.join(sorted(fused))}); call unfuse_lora() first.")
