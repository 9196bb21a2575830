"""Adapter files: which key belongs to which module, and the keys that each style writes.

Reading either understands every key or raises an error that lists those it does not: an adapter that loads in part
draws almost the right picture, which is worse than none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key

from ..errors import InputError
from ..models.dit import PREFIXES
from .lora import LoraFactors, LoraWeights, file_configs
from .naming import KOHYA_PREFIX, ModuleName, ModuleTable

Format = Literal["kohya", "comfy", "diffusers"]
FORMATS: tuple[Format, ...] = ("kohya", "comfy", "diffusers")

_COMFY_PREFIX = "diffusion_model."
_DOWN, _UP, _ALPHA = "down", "up", "alpha"
_SUFFIXES = {
    ".lora_down.weight": _DOWN,
    ".lora_up.weight": _UP,
    ".lora_A.weight": _DOWN,
    ".lora_B.weight": _UP,
    ".alpha": _ALPHA,
}
_NOT_SUPPORTED = {
    r"\.dora_scale|lora_magnitude_vector": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.oft_": "OFT",
    r"\.[wb]_norm$": "norm differences",
    r"^__anima_norm__": "absolute norms",
    r"\.diff(_b)?$": "full differences",
    r"^lora_te\d?_": "text encoder adapters",
}
_MAX_SHOWN = 10


def parse(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], table: ModuleTable, source: str
) -> dict[ModuleName, LoraFactors]:
    """Understand every key of an adapter file.

    Accepted names: kohya (`lora_unet_blocks_0_…`), native after `diffusion_model.`, `net.`, `model.diffusion_model.`
    or nothing, and diffusers (`transformer.…`, `text_conditioner.…`); factors as `lora_down` / `lora_up` or `lora_A` /
    `lora_B`, with or without `.alpha` (missing: scale 1, unless diffusers' metadata names one).

    Args:
        tensors: key -> tensor.
        metadata: the file's text metadata; only diffusers' adapter config is looked at.
        table: the model's modules.
        source: what to call the file in messages.

    Returns:
        Factors by module, in the model's order.

    Raises:
        InputError: unknown, missing, doubled or misshapen keys, or nothing at all; the message lists them.
    """
    parts: dict[ModuleName, dict[str, torch.Tensor]] = {}
    faults: list[str] = []
    unknown: list[str] = []
    linears = frozenset(table.linears)
    for key, tensor in tensors.items():
        stem, role = _split(key)
        name = _find(stem, table) if role else None
        if name is None or role is None:
            unknown.append(key)
        elif name not in linears:
            faults.append(f"{key}: {name.native} is not a linear layer, so it cannot carry LoRA factors")
        elif role in parts.setdefault(name, {}):
            faults.append(f"{key}: a second `{role}` for {name.native}, under another style's name")
        else:
            parts[name][role] = tensor
    faults += _describe_unknown(unknown)
    config_alphas = _diffusers_alphas(metadata, source)
    weights = {}
    for name, by_role in parts.items():
        if unknown and by_role.keys() == {_ALPHA}:
            continue  # its factors are of a kind reported above
        try:
            weights[name] = _factors(name, by_role, table.shape(name), config_alphas)
        except ValueError as error:
            faults.append(f"{name.native}: {error}")
    if not parts and not faults:
        faults.append("no key belongs to the Anima transformer or its text conditioner")
    if faults:
        shown = faults[:_MAX_SHOWN]
        if len(faults) > _MAX_SHOWN:
            shown.append(f"… and {len(faults) - _MAX_SHOWN} more")
        raise InputError.from_faults(f"{source}: not loaded, nothing was changed:", shown)
    return {name: weights[name] for name in table.linears if name in weights}


def _split(key: str) -> tuple[str, str | None]:
    """A key's module part and the role of its tensor, or None for a role this version does not know."""
    for suffix, role in _SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), role
    return key, None


def _find(stem: str, table: ModuleTable) -> ModuleName | None:
    if stem.startswith(KOHYA_PREFIX):
        return table.by_kohya.get(stem)
    if stem in table.by_diffusers:
        return table.by_diffusers[stem]
    for prefix in (_COMFY_PREFIX, *PREFIXES):
        if stem.startswith(prefix) and (name := table.by_native.get(stem.removeprefix(prefix))):
            return name
    return None


def _describe_unknown(keys: Iterable[str]) -> list[str]:
    by_kind: dict[str, list[str]] = {}
    for key in keys:
        kind = next((kind for pattern, kind in _NOT_SUPPORTED.items() if re.search(pattern, key)), "")
        by_kind.setdefault(kind, []).append(key)
    return [
        (f"{kind} is not supported by this version: " if kind else "names no known module or part: ")
        + ", ".join(found[:4])
        + (f" … and {len(found) - 4} more keys" if len(found) > 4 else "")
        for kind, found in by_kind.items()
    ]


def _factors(
    name: ModuleName, by_role: Mapping[str, torch.Tensor], shape: tuple[int, ...], config_alphas: _Alphas
) -> LoraFactors:
    missing = [role for role in (_DOWN, _UP) if role not in by_role]
    if missing:
        raise ValueError(f"the `{missing[0]}` factor is missing")
    down, up = by_role[_DOWN], by_role[_UP]
    if down.ndim == 4 and up.ndim == 4 and down.shape[2:] == up.shape[2:] == (1, 1):
        down, up = down.flatten(1), up.flatten(1)  # some writers store linears as 1x1 convolutions
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise ValueError(f"factors of shapes {list(down.shape)} and {list(up.shape)} do not multiply")
    if (up.shape[0], down.shape[1]) != shape:
        raise ValueError(f"factors for a {up.shape[0]}x{down.shape[1]} layer, but it is {shape[0]}x{shape[1]}")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"factors of dtypes {down.dtype} and {up.dtype}, expected floating point")
    if not all(factor.float().isfinite().all() for factor in (down, up)):
        raise ValueError("the factors hold values that are not finite")
    rank = down.shape[0]
    if _ALPHA in by_role:
        if by_role[_ALPHA].numel() != 1:
            raise ValueError(f"alpha has shape {list(by_role[_ALPHA].shape)}, expected one number")
        alpha = float(by_role[_ALPHA].float())
    else:
        alpha = config_alphas.alpha(name, rank)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}, expected a finite number")
    return LoraFactors(down, up, alpha)


class _Alphas:
    """Alphas that diffusers' `lora_adapter_metadata` names, component by component."""

    def __init__(self, configs: Mapping[str, Mapping[str, Any]]):
        self._configs = configs

    def alpha(self, name: ModuleName, rank: int) -> float:
        config = self._configs.get(name.component)
        if config is None or "lora_alpha" not in config:
            return float(rank)
        pattern = config.get("alpha_pattern") or {}
        try:
            alpha = float(pattern.get(get_pattern_key(list(pattern), name.path), config["lora_alpha"]))
        except (TypeError, AttributeError, ValueError, re.error) as error:
            raise ValueError(f"the metadata `{LORA_ADAPTER_METADATA_KEY}` gives it no alpha: {error}") from error
        return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _diffusers_alphas(metadata: Mapping[str, str], source: str) -> _Alphas:
    text = metadata.get(LORA_ADAPTER_METADATA_KEY)
    if not text:
        return _Alphas({})
    try:
        packed = json.loads(text)
        configs: dict[str, dict[str, Any]] = {}
        for key, value in packed.items():
            component, _, option = key.partition(".")
            configs.setdefault(component, {})[option] = value
    except (json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{source}: the metadata `{LORA_ADAPTER_METADATA_KEY}` is not an adapter config.") from error
    return _Alphas(configs)


def serialize(
    weights: LoraWeights, style: Format, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and style-specific metadata of an adapter file.

    kohya keeps `.alpha`, in float32 whatever the dtype; comfy and diffusers fold alpha / rank into the up factor,
    computed in float32, so that a reader without alphas gets the same delta.

    Args:
        weights: factors by module.
        style: one of `FORMATS`.
        dtype: dtype of the factors written.
    """
    if style == "kohya":
        tensors = {}
        for name, factors in weights.items():
            tensors[f"{name.kohya}.lora_down.weight"] = factors.down.to(dtype)
            tensors[f"{name.kohya}.lora_up.weight"] = factors.up.to(dtype)
            tensors[f"{name.kohya}.alpha"] = torch.tensor(factors.alpha, dtype=torch.float32)
        return tensors, {}
    folded = {
        name: LoraFactors(
            factors.down.to(dtype), (factors.up.float() * factors.scale).to(dtype), alpha=float(factors.rank)
        )
        for name, factors in weights.items()
    }
    tensors = {}
    for name, factors in folded.items():
        stem = _COMFY_PREFIX + name.native if style == "comfy" else name.diffusers
        tensors[f"{stem}.lora_A.weight"] = factors.down
        tensors[f"{stem}.lora_B.weight"] = factors.up
    return tensors, ({} if style == "comfy" else _diffusers_metadata(folded))


def _diffusers_metadata(weights: LoraWeights) -> dict[str, str]:
    """The PEFT config of each component, packed as `LoraBaseMixin._save_lora_weights` packs it."""
    packed = {
        f"{component}.{option}": sorted(value) if isinstance(value, set) else value
        for component, config in file_configs(weights).items()
        for option, value in config.to_dict().items()
    }
    return {LORA_ADAPTER_METADATA_KEY: json.dumps(packed, indent=2, sort_keys=True)}
