"""Which modules an adapter is put on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..errors import InputError
from .naming import TEXT_CONDITIONER, TRANSFORMER, ModuleName, ModuleTable

ATTN_MLP = "attn-mlp"
"""Attention and MLP of every block, as sd-scripts trains them: 280 modules of the 28-block model."""
ATTN_MLP_ADALN = "attn-mlp-adaln"
"""The above and each block's modulation: 448 modules of the 28-block model."""
ALL_LINEAR = "all-linear"
"""Every linear layer."""

_ATTENTION_MLP = r"(self_attn|cross_attn)\.(q|k|v|output|o)_proj|mlp\.(layer1|layer2|0|2)"
_PRESETS = {
    ATTN_MLP: re.compile(rf"(llm_adapter\.)?blocks\.\d+\.({_ATTENTION_MLP})"),
    ATTN_MLP_ADALN: re.compile(
        rf"(llm_adapter\.)?blocks\.\d+\.({_ATTENTION_MLP}|adaln_modulation_(self_attn|cross_attn|mlp)\.[12])"
    ),
    ALL_LINEAR: re.compile(r".*"),
}
PRESETS = tuple(_PRESETS)


def select_targets(
    table: ModuleTable, patterns: str | Iterable[str], *, train_text_conditioner: bool = False
) -> list[ModuleName]:
    """The linear layers that `patterns` name, in the model's order.

    Args:
        table: the model's modules.
        patterns: each a preset's name, a regular expression that matches a module's whole dotted name (native such as
            `blocks.0.self_attn.q_proj`, or diffusers' such as `transformer_blocks.0.attn1.to_q`), or the end of such
            a name from a dot on (`to_q`), as in PEFT.
        train_text_conditioner: whether layers of the text conditioner may be chosen at all.

    Raises:
        InputError: a pattern is no regular expression, or matches no layer.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    candidates = [name for name in table.linears if train_text_conditioner or name.component != TEXT_CONDITIONER]
    components = list(dict.fromkeys(name.component for name in candidates)) or [TRANSFORMER]
    chosen: set[ModuleName] = set()
    faults = []
    for pattern in patterns:
        try:
            matched = [name for name in candidates if _matches(pattern, name)]
        except re.error as error:
            faults.append(f"{pattern!r} is not a regular expression: {error}")
            continue
        if not matched:
            faults.append(f"{pattern!r} matches no linear layer of {' or '.join(components)}")
        chosen.update(matched)
    if not patterns:
        faults.append("the list is empty")
    if faults:
        hint = "" if train_text_conditioner else "; the text conditioner's layers need train_llm_adapter"
        example = candidates[0].native if candidates else "blocks.0.self_attn.q_proj"
        raise InputError.from_faults(
            f"target_modules: expected {', '.join(PRESETS)}, or patterns for names such as {example}{hint}:", faults
        )
    return [name for name in candidates if name in chosen]


def _matches(pattern: str, name: ModuleName) -> bool:
    preset = _PRESETS.get(pattern)
    if preset is not None:
        return preset.fullmatch(name.native) is not None
    full_names: Sequence[str] = (name.native, name.path)
    return any(re.fullmatch(pattern, full) is not None or full.endswith("." + pattern) for full in full_names)
