"""Which modules an adapter is put on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

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
    table: ModuleTable,
    patterns: str | Iterable[str],
    *,
    train_text_conditioner: bool = False,
    exclude: str | Iterable[str] | None = None,
    include: str | Iterable[str] | None = None,
) -> list[ModuleName]:
    """The linear layers that `patterns` name, less those that `exclude` names, and those that `include` names.

    Args:
        table: the model's modules.
        patterns: each a preset's name, a regular expression that matches a module's whole dotted name (native such as
            `blocks.0.self_attn.q_proj`, or diffusers' such as `transformer_blocks.0.attn1.to_q`), or the end of such
            a name from a dot on (`to_q`), as in PEFT.
        train_text_conditioner: whether layers of the text conditioner may be chosen at all.
        exclude: patterns of the same kind for layers to leave out.
        include: patterns for layers to choose in any case, also where `exclude` names them (sd-scripts' order,
            networks/lora_anima.py).

    Raises:
        InputError: a pattern is no regular expression, or matches no layer.
    """
    candidates = [name for name in table.linears if train_text_conditioner or name.component != TEXT_CONDITIONER]
    hint = "" if train_text_conditioner else "; the text conditioner's layers need train_llm_adapter"
    example = candidates[0].native if candidates else "blocks.0.self_attn.q_proj"
    chosen = _matched(
        "target_modules",
        f"expected {', '.join(PRESETS)}, or patterns for names such as {example}{hint}",
        _as_list(patterns),
        candidates,
    )
    for option, named, combine in (
        ("exclude_patterns", exclude, chosen.difference_update),
        ("include_patterns", include, chosen.update),
    ):
        if named:
            combine(
                _matched(option, f"expected patterns for names such as {example}{hint}", _as_list(named), candidates)
            )
    if not chosen:
        raise InputError("exclude_patterns: they leave no layer to adapt.")
    return [name for name in candidates if name in chosen]


def _as_list(patterns: str | Iterable[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _matched(option: str, expected: str, patterns: list[str], candidates: Sequence[ModuleName]) -> set[ModuleName]:
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
        raise InputError.from_faults(f"{option}: {expected}:", faults)
    return chosen


def _matches(pattern: str, name: ModuleName) -> bool:
    preset = _PRESETS.get(pattern)
    if preset is not None:
        return preset.fullmatch(name.native) is not None
    return any(re.fullmatch(pattern, full) is not None or full.endswith("." + pattern) for full in _full_names(name))


def _full_names(name: ModuleName) -> Sequence[str]:
    # The conditioner's paths are the transformer's native names: a pattern for one must not reach the other.
    return (name.native,) if name.component == TEXT_CONDITIONER else (name.native, name.path)


def first_matches(
    option: str, values: Mapping[str, float], names: Iterable[ModuleName]
) -> dict[ModuleName, tuple[str, float]]:
    """For each module the first regular expression that matches its whole name, and the value that it stands before.

    Modules that none matches are left out (sd-scripts' `network_reg_dims` and `network_reg_lrs`).

    Args:
        option: what to call the patterns in messages.

    Raises:
        InputError: a key is no regular expression, or is the first to match for no module.
    """
    found: dict[ModuleName, tuple[str, float]] = {}
    used = set()
    for name in names:
        for pattern, value in values.items():
            try:
                matched = any(re.fullmatch(pattern, full) for full in _full_names(name))
            except re.error as error:
                raise InputError(f"{option}: {pattern!r} is not a regular expression: {error}") from error
            if matched:
                found[name] = (pattern, value)
                used.add(pattern)
                break
    unused = [repr(pattern) for pattern in values if pattern not in used]
    if unused:
        raise InputError(f"{option}: {', '.join(unused)} matches no adapted module that an earlier one does not.")
    return found
