"""Scales that stand in a config and not in tensors: diffusers' metadata, PEFT's `adapter_config.json`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from ..errors import InputError
from .naming import ModuleName

PEFT_CONFIG_NAME = "adapter_config.json"
_PEFT_KINDS = ("LORA", "LOKR", "LOHA")
# What PEFT writes and users need: names, `^`, `$`, escaped dots, `.*`, `|`. A file's pattern is not run beyond that:
# nested repetitions can take years.
_HARMLESS_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.|\.\*|\|)+\$?")
_MOST_REPETITIONS = 2
# Every module is held against every pattern, so that their number counts too. Anima has some 700 linear layers.
_MOST_PATTERNS, _MOST_PATTERN_CHARACTERS, _MOST_REPETITIONS_OF_ALL = 4096, 2**18, 64
# These start from a base that PEFT changes; beside any other their factors give another model.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class FileConfig:
    """PEFT's configs as a file has them.

    Attributes:
        by_component: component -> options, with modules named by their paths in it; or "" -> options for all of the
            model, with modules named as in the file. `alpha_pattern` and `rank_pattern` are compiled.
        scales_full: whether LoKr with two full factors is scaled by alpha / r too, as PEFT does.
    """

    by_component: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scales_full: bool = False

    def of(self, name: ModuleName, stem: str) -> ModuleScales:
        """What is said about one module, to which the file gives the name `stem`."""
        if "" in self.by_component:
            return ModuleScales(self.by_component[""], stem, self.scales_full)
        return ModuleScales(self.by_component.get(name.component, {}), name.path, self.scales_full)


@dataclass(frozen=True)
class ModuleScales:
    """What a config says about one module's scale.

    Attributes:
        options: the config's.
        path: the module's name in it.
        scales_full: see `FileConfig`.
    """

    options: Mapping[str, Any]
    path: str
    scales_full: bool

    def alpha(self, rank: int) -> float:
        """The alpha; the rank itself, for a scale of 1, where there is none.

        Raises:
            ValueError: the config is not one.
        """
        alpha = self._number(("lora_alpha", "alpha"), "alpha_pattern")
        if alpha is None:
            return float(rank)
        return alpha * math.sqrt(rank) if self.options.get("use_rslora") else alpha

    def full(self) -> float:
        """The scale of a LoKr whose factors are both full.

        Raises:
            ValueError: the config is not one.
        """
        if not self.scales_full:
            return 1.0
        alpha, rank = self._number(("alpha",), "alpha_pattern"), self._number(("r",), "rank_pattern")
        return 1.0 if alpha is None or not rank else alpha / rank

    def _number(self, names: tuple[str, ...], pattern: str) -> float | None:
        name = next((name for name in names if name in self.options), None)
        if name is None:
            return None
        by_pattern = self.options.get(pattern, {})
        value = next((value for key, value in by_pattern.items() if key.match(self.path)), self.options[name])
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"the adapter config gives it no {name}, but {str(value)[:80]!r}")
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"the adapter config's {name} is too large for a number") from error


def read_config(metadata: Mapping[str, str], peft_config: Mapping[str, Any] | None, source: str) -> FileConfig:
    """The config that belongs to a file.

    Args:
        metadata: the file's text metadata.
        peft_config: content of the `adapter_config.json` beside it, if there is one.
        source: what to call the file in messages.

    Raises:
        InputError: the metadata or the config is not what it should be, or is of a kind that is not supported.
    """
    if peft_config is not None:
        kind = peft_config.get("peft_type")
        if kind not in _PEFT_KINDS:
            raise InputError(
                f"{source}: {PEFT_CONFIG_NAME} is of the kind {str(kind)[:80]!r}, which is not supported; "
                f"supported are {', '.join(_PEFT_KINDS)}."
            )
        initialisation = peft_config.get("init_lora_weights")
        if isinstance(initialisation, str) and initialisation.lower().startswith(_CHANGES_BASE):
            raise InputError(
                f"{source}: {PEFT_CONFIG_NAME} has the initialisation {initialisation[:80]!r}, which changes the "
                "base's weights too; save the adapter with PEFT's path_initial_model_for_weight_conversion."
            )
        return FileConfig({"": _parsed(peft_config, source)}, scales_full=True)
    text = metadata.get(LORA_ADAPTER_METADATA_KEY)
    if not text:
        return FileConfig()
    try:
        packed = json.loads(text)
        configs: dict[str, dict[str, Any]] = {}
        for key, value in packed.items():
            component, _, option = key.partition(".")
            configs.setdefault(component, {})[option] = value
    except (ValueError, AttributeError, RecursionError) as error:  # ValueError: no JSON, or a number of 5000 digits
        raise InputError(f"{source}: the metadata `{LORA_ADAPTER_METADATA_KEY}` is not an adapter config.") from error
    return FileConfig({key: _parsed(options, source) for key, options in configs.items()}, scales_full=True)


def _parsed(options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The options with compiled patterns.

    Raises:
        InputError: what should be patterns is not, or would take too long.
    """
    patterns = {name: _compiled(options.get(name) or {}, name, source) for name in ("alpha_pattern", "rank_pattern")}
    return dict(options) | patterns


def _compiled(by_pattern: object, option: str, source: str) -> dict[re.Pattern[str], Any]:
    """Pattern -> value, to be matched as PEFT does (peft.utils.other.get_pattern_key): at the end of a path."""
    if not isinstance(by_pattern, Mapping):
        raise InputError(f"{source}: the adapter config's {option} is not a table.")
    text = "".join(by_pattern)
    if (
        len(by_pattern) > _MOST_PATTERNS
        or len(text) > _MOST_PATTERN_CHARACTERS
        or text.count("*") > _MOST_REPETITIONS_OF_ALL
    ):
        raise InputError(f"{source}: the adapter config's {option} has more patterns than a model has modules.")
    for key in by_pattern:
        if not _HARMLESS_PATTERN.fullmatch(key) or key.count("*") > _MOST_REPETITIONS:
            raise InputError(
                f"{source}: the adapter config's {option} has the pattern {key[:80]!r}, expected module names."
            )
    return {re.compile(rf"(.*\.)?({key})$"): value for key, value in by_pattern.items()}
