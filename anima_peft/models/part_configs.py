"""The `config.json` of a model's part, before a library builds a model by it: whoever made it may be anybody."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from huggingface_hub.errors import StrictDataclassError

from ..errors import InputError
from ..limited import read_json

# What diffusers, transformers and torch are known to raise over a config that describes no model.
CONFIG_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
_DEPTHS = ("num_layers", "num_hidden_layers", "num_res_blocks")
_STATISTICS = ("latents_mean", "latents_std")
_LARGEST = 2**24
# Any other is looked for on the hub, as code to run: transformers.integrations.hub_kernels.
_ATTENTION = (None, "eager", "sdpa")


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The content of a folder's `config.json`, or of another file of settings.

    Raises:
        InputError: it is missing, or no table of settings.
    """
    try:
        config = read_json(folder / name)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no readable {name} ({error}).") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder}: {name} holds no table of settings.")
    return config


def check_scheduler(folder: Path) -> None:
    """Refuse a scheduler's folder whose settings no schedule can be made of.

    Raises:
        InputError: no settings, absurd ones, or such as the usual class does not take; another class is not tried.
    """
    config = read_config(folder, SCHEDULER_CONFIG_NAME)
    _require_small(config, 64, folder, SCHEDULER_CONFIG_NAME)
    if config.get("_class_name") == FlowMatchEulerDiscreteScheduler.__name__:
        try:
            FlowMatchEulerDiscreteScheduler.from_config(config)
        except CONFIG_ERRORS as error:
            raise InputError(f"{folder}: {SCHEDULER_CONFIG_NAME} describes no schedule ({error}).") from error


def require_plausible(config: Mapping[str, Any], tensors: int, folder: Path) -> None:
    """Refuse a config that would build a model far beyond its weights, or fetch code.

    Args:
        config: the folder's.
        tensors: how many the weight files hold; every layer has at least one.
        folder: for messages.

    Raises:
        InputError: more layers than tensors, an absurd size, or an attention implementation from elsewhere.
    """
    for name, value in config.items():
        if name in _DEPTHS and isinstance(value, (int, float)) and value > tensors:
            raise InputError(f"{folder}: config.json has {name} = {value}, and the weight files {tensors} tensors.")
        if name.endswith("_implementation") and value not in _ATTENTION:
            raise InputError(
                f"{folder}: config.json has {name} = {value!r}, which may fetch code to run; expected sdpa or eager."
            )
    _require_small(config, max(tensors, 64), folder, "config.json")
    if not isinstance(config.get("quantization_config", {}), dict):
        raise InputError(f"{folder}: config.json has a quantization_config that is no table.")


def _require_small(config: Mapping[str, Any], longest: int, folder: Path, file: str) -> None:
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > longest or any(isinstance(n, (int, float)) and not abs(n) <= _LARGEST for n in numbers):
            raise InputError(f"{folder}: {file} has an absurd {name}; get the folder's files again.")


def require_own_weights(folder: Path) -> None:
    """Refuse a folder that has its weights, or the model that it starts from, somewhere else.

    Raises:
        InputError: an index names a file outside of the folder, or the folder is a PEFT adapter's.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder}: has an adapter_config.json, which names another model as its base. Give the folder of the "
            "whole model, and an adapter by the options for adapters."
        )
    for file in sorted(folder.glob("*.index.json")):
        try:
            index = read_json(file)
            names = set(index["weight_map"].values())
            plain = {name for name in names if not set(name) & set("/\\:") and name != ".."}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file}: no readable index of weight files ({error}).") from error
        if names - plain:
            raise InputError(f"{file}: names {min(names - plain)!r}; expected files of its own folder.")


def require_statistics(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a VAE whose latents cannot be normalised.

    Raises:
        InputError: the latents' mean or std is not one finite number for each channel, or a std is not above 0.
    """
    for name in _STATISTICS:
        numbers = config.get(name)
        least = 0.0 if name == "latents_std" else -math.inf
        if (
            not isinstance(numbers, (list, tuple))
            or len(numbers) != config.get("z_dim")
            or not all(isinstance(n, (int, float)) and math.isfinite(n) and n > least for n in numbers)
        ):
            raise InputError(f"{folder}: config.json has no {name} with a number for each of the latents' channels.")
