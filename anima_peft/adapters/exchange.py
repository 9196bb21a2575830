"""Adapters on a model and adapters in files: adding, loading and saving."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer

from ..errors import InputError
from ..files import save_tensors
from .factors import Factors, alike, rescaled, summary
from .hotswap import reserve_rank, swap
from .injection import inject
from .layers import adapter_layers_of, adapter_parameters, read_weights, write_weights
from .lora import LoraConfig, add_dropouts
from .metadata import describe, with_hashes
from .naming import Components, ModuleName, ModuleTable
from .planning import Plan, announce_full_matrices, plan_file, plan_training
from .reading import parse
from .sources import DIFFUSERS_FILE_NAME, Source, read_source
from .strengths import activate, active_adapters, adapter_names, merge_and_unload, remove, require_ready
from .writing import FORMATS, Format, serialize


def add_adapter(
    components: Components, config: peft.LoraConfig | peft.LoKrConfig, adapter_name: str = "default"
) -> list[torch.nn.Parameter]:
    """Put a new adapter for training on the model. Its parameters are float32 whatever the base's dtype.

    All base weights are frozen. The new adapter acts beside those already active.

    Returns:
        The adapter's parameters, all that the model now trains of it.

    Raises:
        InputError: the name is taken, a target pattern matches nothing, the config asks for what adapter files cannot
            hold, or other adapters are fused or switched off.
    """
    _require_new(components, adapter_name)
    require_ready(components, "add_adapter")
    if not isinstance(config, (peft.LoraConfig, peft.LoKrConfig)):
        raise InputError(f"config must be a LoraConfig or LoKrConfig, not {type(config).__name__}.")
    plans = plan_training(config, ModuleTable(components))
    announce_full_matrices(config, plans)
    with _wholly_or_not_at_all(components, adapter_name):
        _inject_beside(components, plans, adapter_name)
    if isinstance(config, LoraConfig):
        for model in components.values():
            for _, layer in adapter_layers_of(model, adapter_name):
                if isinstance(layer, LoraLayer):
                    add_dropouts(layer, adapter_name, config)
    for model in components.values():
        model.requires_grad_(False)
    parameters = adapter_parameters(components, adapter_name)
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


def inject_adapter(
    config: peft.LoraConfig | peft.LoKrConfig, module: torch.nn.Module, adapter_name: str = "default"
) -> list[torch.nn.Parameter]:
    """Put the same layers on any module, for people with their own loop or another model.

    `target_modules` must be "all-linear" or patterns of the module's own names. Everything else in the module is
    frozen.

    Returns:
        The adapter's parameters, float32.

    Raises:
        InputError: as `add_adapter`.
    """
    return add_adapter({"module": module}, config, adapter_name)


def start_from(components: Components, source: Source, adapter_name: str = "default") -> str:
    """Give an adapter that is about to be trained the weights of a file.

    Where the file scales differently, the difference goes into the factors: the delta is the file's.

    Returns:
        What was taken from the file and what was not, in a sentence.

    Raises:
        InputError: the file cannot be read, is of another kind, rank or factor shape, or has nothing in common with
            the adapter.
    """
    weights, label = parse_source(components, source)
    present = read_adapter(components, adapter_name)
    common = [name for name in present if name in weights]
    unlike = [name.native for name in common if not alike(present[name], weights[name])]
    if unlike or not common:
        raise InputError(
            f"{label}: cannot be started from: it holds {summary(weights)}, and the network is {summary(present)}"
            + (f" ({len(unlike)} modules differ, such as {unlike[0]})" if unlike else "")
            + ". Use the network options that the file was trained with."
        )
    write_weights(components, {name: rescaled(weights[name], present[name].scale) for name in common}, adapter_name)
    missing, unused = len(present) - len(common), len(weights) - len(common)
    return (
        f"Started from {label}: took {summary({name: weights[name] for name in common})}; "
        f"{missing} modules of the network are not in the file and start at zero, {unused} of the file are not trained."
    )


def parse_source(components: Components, source: Source, **where: Any) -> tuple[dict[ModuleName, Factors], str]:
    """What a file, a folder, a hub repo or tensors hold for this model, and what to call them in messages.

    Raises:
        InputError: the file is not there, not an Anima adapter, or a key is not understood.
    """
    file = read_source(source, **where)
    return parse(file, ModuleTable(components)), file.source


def load_adapter(
    components: Components,
    source: Source,
    adapter_name: str | None = None,
    *,
    hotswap: bool = False,
    **where: Any,
) -> str:
    """Load an adapter from a file, a folder, a hub repo or tensors, and let it act with strength 1.0.

    Adapters already active stay so: nothing that was loaded is without effect until `set_adapters` says so. The
    factors take the base's dtype, norms' deltas stay float32; with a float32 base nothing is rounded.

    Args:
        components: the stock models.
        source: safetensors file; folder or hub repo with one; or a mapping from key to tensor.
        adapter_name: name for `set_adapters`; by default the first free one of `default_0`, `default_1`, …
        hotswap: put the file's weights in the place of those of the loaded adapter `adapter_name`, which stays as
            active and as strong as it was; see `hotswap.swap`.
        where: `weight_name`, `subfolder` and the hub's options; see `locate_adapter`.

    Returns:
        The adapter's name.

    Raises:
        InputError: the file is not there, not an Anima adapter, or a key is not understood; or other adapters are
            fused or switched off; or it cannot take the other's place. Nothing was changed then.
    """
    if hotswap:
        if adapter_name not in adapter_names(components):
            raise InputError(f"hotswap: no adapter named {adapter_name!r} is loaded; name the one to replace.")
        swap(components, parse_source(components, source, **where)[0], adapter_name)
        return adapter_name
    if adapter_name is None:
        taken = adapter_names(components)
        adapter_name = next(name for number in count() if (name := f"default_{number}") not in taken)
    _require_new(components, adapter_name)
    require_ready(components, "load_lora_adapter")
    weights, label = parse_source(components, source, **where)
    weights = reserve_rank(components, weights, label)
    # From here on nothing can fail for what the file says: every key and shape has been checked.
    with _wholly_or_not_at_all(components, adapter_name):
        _inject_beside(components, plan_file(weights), adapter_name)
        write_weights(components, weights, adapter_name)
    for parameter in adapter_parameters(components, adapter_name):
        parameter.requires_grad_(False)
    return adapter_name


def merge_adapter(components: Components, source: Source, strength: float = 1.0) -> None:
    """Add an adapter to the base weights for good: the model then carries no trace of it, and no saved file holds it.

    The model must carry no adapters.

    Raises:
        InputError: as `load_adapter`, or the sum is not finite.
    """
    assert not adapter_names(components), "adapters would be merged along with it"
    name = load_adapter(components, source)
    merge_and_unload(components, name, strength)


def save_adapter(
    components: Components,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    format: Format = "kohya",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter as one safetensors file, whole or not at all.

    Args:
        path: the file; a name without `.safetensors` is taken as a folder, and the file is called
            `pytorch_lora_weights.safetensors` as in diffusers.
        format: "kohya" (sd-scripts, ComfyUI, Forge), "comfy" or "diffusers".
        dtype: dtype of the factors written.
        metadata: text added to what the weights say of themselves; wins over it.

    Returns:
        The file written.

    Raises:
        InputError: no such adapter, or no such format.
        OSError: the file cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r}: expected one of {', '.join(FORMATS)}.")
    weights = read_adapter(components, adapter_name)
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / DIFFUSERS_FILE_NAME
    tensors, style_metadata = serialize(weights, format, dtype)
    text = {"format": "pt"} | describe(weights) | dict(metadata or {}) | style_metadata
    save_tensors(path, tensors, with_hashes(tensors, text))
    return path


def read_adapter(components: Components, adapter_name: str) -> dict[ModuleName, Factors]:
    """An adapter's factors as they are on the model, whatever its strength.

    Raises:
        InputError: no such adapter.
    """
    weights = read_weights(components, ModuleTable(components), adapter_name)
    if not weights:
        loaded = ", ".join(adapter_names(components)) or "none"
        raise InputError(f"no adapter named {adapter_name!r}; loaded are: {loaded}.")
    return weights


def _require_new(components: Components, adapter_name: str) -> None:
    if adapter_name in adapter_names(components):
        raise InputError(f"an adapter named {adapter_name!r} is loaded already; choose another name or delete it.")
    if not adapter_name or "." in adapter_name:
        raise InputError(f"{adapter_name!r} cannot be an adapter's name: it must not be empty or contain a dot.")


def _inject_beside(components: Components, plans: Mapping[str, Plan], adapter_name: str) -> None:
    """Put a new adapter on the model, to act beside those that act already."""
    active = active_adapters(components)
    inject(components, plans, adapter_name)
    activate(components, [*active, adapter_name])


@contextmanager
def _wholly_or_not_at_all(components: Components, adapter_name: str) -> Iterator[None]:
    """Take a new adapter off again if what puts it there fails, for want of memory or by an interrupt."""
    active = active_adapters(components)
    try:
        yield
    except BaseException:
        remove(components, [adapter_name])
        activate(components, active)
        raise
