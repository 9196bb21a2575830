"""Adapter files: which key belongs to which module, and the keys that each style writes.

Reading either understands every key or raises an error that lists those it does not: an adapter that loads in part
draws almost the right picture, which is worse than none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key

from ..errors import InputError
from ..models.dit import PREFIXES
from .factors import Factors, LoKrFactors, LoraFactors, NormDelta, Weights, rescaled
from .injection import lora_file_config
from .naming import KOHYA_PREFIX, ModuleName, ModuleTable
from .roles import ALPHA, build_factors, split_key

Format = Literal["kohya", "comfy", "diffusers"]
FORMATS: tuple[Format, ...] = ("kohya", "comfy", "diffusers")

_COMFY_PREFIX = "diffusion_model."
_LYCORIS_PREFIX = "lycoris_"
_NOT_SUPPORTED = {
    r"\.lokr_t2$": "LoKr of convolutions",
    r"\.hada_": "LoHa",
    r"\.oft_": "OFT",
    r"^__anima_norm__": "absolute norms",
    r"\.diff(_b)?$": "full differences",
    r"^lora_te\d?_": "text encoder adapters",
}
_MAX_SHOWN = 10


def parse(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], table: ModuleTable, source: str
) -> dict[ModuleName, Factors]:
    """Understand every key of an adapter file.

    Accepted names: kohya (`lora_unet_blocks_0_…`), LyCORIS (`lycoris_…`), native after `diffusion_model.`, `net.`,
    `model.diffusion_model.` or nothing, and diffusers (`transformer.…`, `text_conditioner.…`). LoRA as `lora_down` /
    `lora_up` or `lora_A` / `lora_B`, DoRA's magnitudes, LoKr in every shape of its factors, and norms' deltas; with or
    without `.alpha` (missing: scale 1, unless diffusers' metadata names one).

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
    adaptable = frozenset((*table.linears, *table.norms))
    for key, tensor in tensors.items():
        stem, role = split_key(key)
        name = _find(stem, table) if role else None
        if name is None or role is None:
            unknown.append(key)
        elif name not in adaptable:
            faults.append(f"{key}: {name.native} is neither a linear layer nor a norm, so it cannot be adapted")
        elif role in parts.setdefault(name, {}):
            faults.append(f"{key}: a second `{role}` for {name.native}, under another style's name")
        else:
            parts[name][role] = tensor
    faults += _describe_unknown(unknown)
    config_alphas = _diffusers_alphas(metadata, source)
    weights = {}
    for name, by_role in parts.items():
        if unknown and by_role.keys() == {ALPHA}:
            continue  # its factors are of a kind reported above
        try:
            weights[name] = build_factors(by_role, table.shape(name), partial(config_alphas.alpha, name))
        except ValueError as error:
            faults.append(f"{name.native}: {error}")
    if not parts and not faults:
        faults.append("no key belongs to the Anima transformer or its text conditioner")
    faults += _mixed_dora(weights)
    if faults:
        shown = faults[:_MAX_SHOWN]
        if len(faults) > _MAX_SHOWN:
            shown.append(f"… and {len(faults) - _MAX_SHOWN} more")
        raise InputError.from_faults(f"{source}: not loaded, nothing was changed:", shown)
    return {name: weights[name] for name in (*table.linears, *table.norms) if name in weights}


def _mixed_dora(weights: Weights) -> list[str]:
    lora = [factors for factors in weights.values() if isinstance(factors, LoraFactors)]
    with_magnitude = sum(factors.magnitude is not None for factors in lora)
    if with_magnitude in (0, len(lora)):
        return []
    return [f"{with_magnitude} of {len(lora)} LoRA modules are DoRA; expected all or none"]


def _find(stem: str, table: ModuleTable) -> ModuleName | None:
    if stem.startswith(_LYCORIS_PREFIX):
        stem = KOHYA_PREFIX + stem.removeprefix(_LYCORIS_PREFIX)
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


def serialize(weights: Weights, style: Format, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and style-specific metadata of an adapter file.

    kohya keeps `.alpha`, in float32 whatever the dtype; comfy and diffusers fold the scale into one factor, computed
    in float32, so that a reader without alphas gets the same delta.

    Args:
        weights: factors by module.
        style: one of `FORMATS`.
        dtype: dtype of the factors written.
    """
    if style != "kohya":
        weights = {name: rescaled(factors, 1.0) for name, factors in weights.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, factors in weights.items():
        for part, tensor in _parts(factors, style).items():
            tensors[f"{_stem(name, style)}.{part}"] = tensor.to(dtype)
        if style == "kohya" and not isinstance(factors, NormDelta):
            alpha = factors.written_alpha if isinstance(factors, LoKrFactors) else factors.alpha
            tensors[f"{_stem(name, style)}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors, _diffusers_metadata(weights) if style == "diffusers" else {}


def _stem(name: ModuleName, style: Format) -> str:
    return {"kohya": name.kohya, "comfy": _COMFY_PREFIX + name.native, "diffusers": name.diffusers}[style]


def _parts(factors: Factors, style: Format) -> dict[str, torch.Tensor]:
    """A module's tensors by the ends of their keys."""
    if isinstance(factors, NormDelta):
        return {"w_norm": factors.weight} | ({} if factors.bias is None else {"b_norm": factors.bias})
    if isinstance(factors, LoKrFactors):
        lokr: dict[str, torch.Tensor] = {}
        for name, factor in (("lokr_w1", factors.w1), ("lokr_w2", factors.w2)):
            if isinstance(factor, torch.Tensor):
                lokr[name] = factor
            else:
                lokr[f"{name}_a"], lokr[f"{name}_b"] = factor
        return lokr
    down, up = ("lora_down", "lora_up") if style == "kohya" else ("lora_A", "lora_B")
    parts = {f"{down}.weight": factors.down, f"{up}.weight": factors.up}
    if factors.magnitude is not None and style == "diffusers":
        parts["lora_magnitude_vector"] = factors.magnitude
    elif factors.magnitude is not None:
        parts["dora_scale"] = factors.magnitude[:, None]
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
