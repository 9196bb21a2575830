"""The keys of each style in which an adapter is written."""

from __future__ import annotations

import json
from typing import Literal

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from .factors import Factors, FullDelta, LoHaFactors, LoKrFactors, LoraFactors, NormDelta, Weights, rescaled
from .naming import COMFY_PREFIX, TEXT_ENCODER, ModuleName
from .planning import lora_file_config

Format = Literal["kohya", "comfy", "diffusers", "comfy-hybrid", "original"]
FORMATS: tuple[Format, ...] = ("kohya", "comfy", "diffusers", "comfy-hybrid", "original")
FOLDING: tuple[Format, ...] = ("comfy", "diffusers")
"""Styles without `.alpha`: the scale goes into one of the factors."""


def serialize(
    weights: Weights, style: Format, dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and style-specific metadata of an adapter file.

    kohya, comfy-hybrid and original keep `.alpha`, in float32 whatever the dtype, so that they are each other's
    renaming; comfy and diffusers fold the scale into one factor, computed in float32, so that a reader without alphas
    gets the same delta.

    Args:
        weights: factors by module.
        style: one of `FORMATS`.
        dtype: dtype of the factors written; None keeps each tensor's own.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, factors in weights.items():
        stem, own = _stem(name, style), _parts(factors, style)
        parts = _parts(rescaled(factors, 1.0), style) if style in FOLDING else own
        for part, tensor in parts.items():
            tensors[f"{stem}.{part}"] = tensor.to(dtype or own[part].dtype)
        if style not in FOLDING and not isinstance(factors, (NormDelta, FullDelta)):
            alpha = factors.written_alpha if isinstance(factors, LoKrFactors) else factors.alpha
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    folded = {name: rescaled(factors, 1.0) for name, factors in weights.items() if isinstance(factors, LoraFactors)}
    return tensors, _diffusers_metadata(folded) if style == "diffusers" else {}


def _stem(name: ModuleName, style: Format) -> str:
    if style == "diffusers":
        return name.diffusers
    # ComfyUI has no names of its own for a text encoder's adapter and reads kohya's.
    if style == "kohya" or name.component == TEXT_ENCODER:
        return name.kohya
    return name.native if style == "original" else COMFY_PREFIX + name.native


def _parts(factors: Factors, style: Format) -> dict[str, torch.Tensor]:
    """A module's tensors by the ends of their keys."""
    if isinstance(factors, NormDelta):
        return {"w_norm": factors.weight} | ({} if factors.bias is None else {"b_norm": factors.bias})
    parts: dict[str, torch.Tensor] = {}
    if isinstance(factors, LoKrFactors):
        for name, factor in (("lokr_w1", factors.w1), ("lokr_w2", factors.w2)):
            if isinstance(factor, torch.Tensor):
                parts[name] = factor
            else:
                parts[f"{name}_a"], parts[f"{name}_b"] = factor
    elif isinstance(factors, LoHaFactors):
        parts["hada_w1_a"], parts["hada_w1_b"] = factors.w1
        parts["hada_w2_a"], parts["hada_w2_b"] = factors.w2
    elif isinstance(factors, LoraFactors):
        down, up = ("lora_A", "lora_B") if style in FOLDING else ("lora_down", "lora_up")
        parts |= {f"{down}.weight": factors.down, f"{up}.weight": factors.up}
        if factors.magnitude is not None and style == "diffusers":
            parts["lora_magnitude_vector"] = factors.magnitude
        elif factors.magnitude is not None:
            parts["dora_scale"] = factors.magnitude[:, None]
    elif factors.weight is not None:
        parts["diff"] = factors.weight
    if factors.bias is not None:
        parts["diff_b"] = factors.bias
    return parts


def _diffusers_metadata(weights: Weights) -> dict[str, str]:
    """The LoRA config of each component, packed as `LoraBaseMixin._save_lora_weights` packs it.

    LoKr has none: diffusers reads its factors' sizes from the tensors, and takes a config's word over them.
    """
    by_component: dict[str, dict[str, LoraFactors]] = {}
    for name, factors in weights.items():
        if isinstance(factors, LoraFactors):
            by_component.setdefault(name.component, {})[name.path] = factors
    packed = {
        f"{component}.{option}": sorted(value) if isinstance(value, set) else value
        for component, lora in by_component.items()
        for option, value in lora_file_config(lora).to_dict().items()
    }
    return {LORA_ADAPTER_METADATA_KEY: json.dumps(packed, indent=2, sort_keys=True)} if packed else {}
