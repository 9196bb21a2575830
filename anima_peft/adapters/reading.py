"""Adapter files: which key belongs to which module, and what the keys of a module are together.

Reading either understands every key or raises an error that lists those it does not: an adapter that loads in part
draws almost the right picture, which is worse than none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InputError
from ..models.dit import PREFIXES
from ..models.names import CONDITIONER_PREFIX, native_to_diffusers
from ..texts import cut, escaped
from .factors import Factors, LoraFactors, Weights
from .file_config import PEFT_CONFIG_NAME, read_config
from .naming import COMFY_PREFIX, KOHYA_PREFIX, KOHYA_TEXT_ENCODER_PREFIX, ModuleName, ModuleTable
from .roles import ABSOLUTE, ABSOLUTE_BIAS, ALPHA, build_factors, split_key

_LYCORIS_PREFIX = "lycoris_"
_PEFT_PREFIX = "base_model.model."
_NOT_SUPPORTED = [
    (re.compile(pattern), kind)
    for pattern, kind in {
        r"\.lokr_t2$": "LoKr of convolutions",
        r"\.hada_t[12]$": "LoHa of convolutions",
        r"\.lora_mid(\.|$)": "LoRA of convolutions (CP decomposition)",
        r"\.(oft_|coft|boft_)": "OFT",
        r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
        r"\.(on_input|ia3_)": "(IA)^3",
        r"\.vera_": "VeRA",
        r"\.lora_embedding_[AB]": "LoRA of embeddings",
        r"\.lora_B\.(.+\.)?bias$": "LoRA with trained biases",
        r"\.modules_to_save\.": "PEFT's modules_to_save",
        r"^emb_params$|^string_to_param": "textual inversion",
        rf"^({KOHYA_TEXT_ENCODER_PREFIX}|text_encoder\.)": (
            "the text encoder's part (load it through the whole pipeline)"
        ),
        r"^lora_te\d_": "another model's text encoder",
    }.items()
]
_MOST_FAULTS = 10
_LONGEST_NAME = 400
_NATIVE_ROOTS = {name.partition(".")[0] for name in (*native_to_diffusers(1), CONDITIONER_PREFIX)}


@dataclass(frozen=True)
class AdapterFile:
    """What was read of an adapter file.

    Attributes:
        source: what to call it in messages.
        tensors: key -> tensor.
        metadata: its text metadata; never trusted.
        peft_config: the `adapter_config.json` beside it, if it is in PEFT's layout.
    """

    source: str
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    peft_config: Mapping[str, Any] | None = None


def parse(file: AdapterFile, table: ModuleTable) -> dict[ModuleName, Factors]:
    """Understand every key of an adapter file.

    Accepted names: kohya (`lora_unet_blocks_0_…`, `lora_te_…`), LyCORIS (`lycoris_…`), native after
    `diffusion_model.`, `net.`, `model.diffusion_model.` or nothing, diffusers (`transformer.…`,
    `text_conditioner.…`, `text_encoder.…`), and PEFT's (`base_model.model.…` before any of these). LoRA as `lora_down`
    / `lora_up` or `lora_A` / `lora_B`, DoRA's magnitudes, LoKr in every shape of its factors, LoHa, whole differences,
    and norms as deltas or as the old absolute values; with or without `.alpha` (missing: scale 1, unless diffusers'
    metadata or PEFT's config names one).

    Args:
        file: tensors, metadata and config.
        table: the model's modules.

    Returns:
        Factors by module, in the model's order.

    Raises:
        InputError: unknown, missing, doubled or misshapen keys, or nothing at all; the message lists them.
    """
    config = read_config(file.metadata, file.peft_config, file.source)
    parts, stems, faults, unknown = _by_module(file, table)
    faults += _describe_unknown(unknown)
    weights = {}
    for name, by_role in parts.items():
        if (unknown or faults) and by_role.keys() <= {ALPHA}:
            continue  # its factors are of a kind reported above
        try:
            scales = config.of(name, stems[name].removeprefix(_PEFT_PREFIX))
            weights[name] = factors = build_factors(
                by_role,
                scales,
                is_norm=table.is_norm(name),
                shape=table.shape(name),
                base={parameter: table.own(name, parameter) for parameter in ("weight", "bias")},
            )
            if isinstance(factors, LoraFactors) and factors.magnitude is None and scales.options.get("use_dora"):
                faults.append(f"{name.native}: its config says that it is DoRA, but the magnitude is missing")
        except ValueError as error:
            faults.append(f"{name.native}: {error}")
    if not parts and not faults:
        faults.append("no key belongs to the Anima transformer or its text conditioner")
    faults += _mixed_dora(weights)
    if faults:
        raise InputError.from_faults(f"{file.source}: not loaded, nothing was changed:", faults, most=_MOST_FAULTS)
    return {name: weights[name] for name in (*table.linears, *table.norms) if name in weights}


def _by_module(
    file: AdapterFile, table: ModuleTable
) -> tuple[dict[ModuleName, dict[str, torch.Tensor]], dict[ModuleName, str], list[str], list[str]]:
    """The tensors of each module by their roles, the name that the file gives to each, faults, and unknown keys."""
    parts: dict[ModuleName, dict[str, torch.Tensor]] = {}
    stems: dict[ModuleName, str] = {}
    faults: list[str] = []
    unknown: list[str] = []
    for key, tensor in file.tensors.items():
        stem, role = split_key(key)
        name = _find(stem, table) if role else None
        if name is None or role is None:
            unknown.append(key)
        elif name not in table.adaptable:
            faults.append(f"{_shown(key)}: {name.native} is neither a linear layer nor a norm, so it cannot be adapted")
        elif role in parts.setdefault(name, {}):
            faults.append(f"{_shown(key)}: a second `{role}` for {name.native}, under another style's name")
        elif stems.setdefault(name, stem) != stem:
            faults.append(f"{_shown(key)}: {name.native} is named in two styles, here and as {_shown(stems[name])}")
        elif file.peft_config is None and stem.startswith(_PEFT_PREFIX) and role != ALPHA:
            faults.append(f"{_shown(key)}: PEFT's scale stands in {PEFT_CONFIG_NAME}; load the folder with both files")
        else:
            parts[name][role] = tensor
    return parts, stems, faults, unknown


def styles(keys: Iterable[str]) -> Counter[str]:
    """How many keys are named in which style: kohya, lycoris, comfy, comfy-hybrid, original, diffusers, PEFT, or ?."""
    return Counter(_style(key) for key in keys)


def _style(key: str) -> str:
    stem, role = split_key(key)
    if role in (ABSOLUTE, ABSOLUTE_BIAS):
        return "absolute norms"
    if stem.startswith(_PEFT_PREFIX):
        return "PEFT"
    if stem.startswith(_LYCORIS_PREFIX):
        return "lycoris"
    if stem.startswith((KOHYA_PREFIX, KOHYA_TEXT_ENCODER_PREFIX)):
        return "kohya"
    if stem.startswith(("transformer.", "text_conditioner.", "text_encoder.", "transformer_blocks.")):
        return "diffusers"
    if stem.startswith(COMFY_PREFIX):
        return "comfy" if ".lora_A." in key or ".lora_B." in key else "comfy-hybrid"
    if stem.startswith(tuple(filter(None, PREFIXES))) or stem.partition(".")[0] in _NATIVE_ROOTS:
        return "original"
    return "?"


def _mixed_dora(weights: Weights) -> list[str]:
    lora = [factors for factors in weights.values() if isinstance(factors, LoraFactors)]
    with_magnitude = sum(factors.magnitude is not None for factors in lora)
    if with_magnitude in (0, len(lora)):
        return []
    return [f"{with_magnitude} of {len(lora)} LoRA modules are DoRA; expected all or none"]


def _find(stem: str, table: ModuleTable) -> ModuleName | None:
    stem = stem.removeprefix(_PEFT_PREFIX)
    if stem.startswith(_LYCORIS_PREFIX):
        stem = KOHYA_PREFIX + stem.removeprefix(_LYCORIS_PREFIX)
    if stem.startswith((KOHYA_PREFIX, KOHYA_TEXT_ENCODER_PREFIX)):
        return table.by_kohya.get(stem)
    if stem in table.by_diffusers:
        return table.by_diffusers[stem]
    for prefix in (COMFY_PREFIX, *PREFIXES):
        if stem.startswith(prefix) and (name := table.by_native.get(stem.removeprefix(prefix))):
            return name
    return table.by_path.get(stem)


def _describe_unknown(keys: Iterable[str]) -> list[str]:
    by_kind: dict[str, list[str]] = {}
    for key in keys:
        # Cut: the time that a search takes grows with the square of a key's length.
        start = key[:_LONGEST_NAME]
        kind = next((kind for pattern, kind in _NOT_SUPPORTED if pattern.search(start)), "")
        by_kind.setdefault(kind, []).append(_shown(key))
    return [
        (f"{kind} cannot be loaded here: " if kind else "names no known module or part: ")
        + ", ".join(found[:4])
        + (f" … and {len(found) - 4} more keys" if len(found) > 4 else "")
        for kind, found in by_kind.items()
    ]


def _shown(key: str) -> str:
    """A file's own text, fit for a terminal: control characters escaped, and not endless."""
    return cut(escaped(key[:_LONGEST_NAME]), 118)
