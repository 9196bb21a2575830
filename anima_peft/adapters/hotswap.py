"""Exchanging a loaded adapter's weights for a file's, in place: no layer changes, so compiled models stay compiled."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import InputError
from .factors import Factors, LoraFactors, describe_factors, layout, padded, rescaled
from .layers import read_weights, write_weights
from .naming import Components, ModuleName, ModuleTable
from .strengths import adapter_names, fused_adapters

_RESERVED = "_lora_rank_reserved"


def reserve(components: Components, target_rank: int) -> None:
    """Load LoRA from now on with room for `target_rank`, filled with zeros: other ranks can then be swapped in.

    Raises:
        InputError: the rank is not positive, or adapters are loaded already, without that room.
    """
    if target_rank < 1:
        raise InputError(f"enable_lora_hotswap: target_rank is {target_rank}, expected a positive number.")
    loaded = adapter_names(components)
    if loaded:
        raise InputError(f"enable_lora_hotswap: call it before loading adapters ({', '.join(loaded)} are loaded).")
    for model in components.values():
        setattr(model, _RESERVED, target_rank)


def reserve_rank(
    components: Components, weights: Mapping[ModuleName, Factors], source: str
) -> dict[ModuleName, Factors]:
    """The factors as they are to be loaded: with the room that `reserve` asked for.

    Raises:
        InputError: a LoRA of a larger rank.
    """
    ranks = {component: getattr(model, _RESERVED, None) for component, model in components.items()}
    fitted = {}
    for name, factors in weights.items():
        rank = ranks[name.component]
        try:
            fitted[name] = factors if rank is None else padded(factors, rank)
        except ValueError as error:
            raise InputError(f"{source}: {name.native}: {error} (enable_lora_hotswap).") from error
    return fitted


def swap(components: Components, weights: Mapping[ModuleName, Factors], adapter_name: str) -> None:
    """Put other weights in the place of a loaded adapter's.

    The modules, the kinds and the shapes must be the same; smaller LoRA ranks are filled up with zeros. A difference
    of scale goes into the factors, so that neither the strength nor a constant of a compiled graph changes.

    Raises:
        InputError: the adapter is fused, or something differs; the message names the modules. Nothing was changed then.
    """
    if adapter_name in fused_adapters(components):
        raise InputError(f"hotswap: {adapter_name!r} is fused; call unfuse_lora() first.")
    present = read_weights(components, ModuleTable(components), adapter_name)
    faults = []
    ready: dict[ModuleName, Factors] = {}
    for name in dict.fromkeys((*present, *weights)):
        if name not in weights or name not in present:
            where = "loaded adapter" if name in present else "new one"
            faults.append(f"{name.native}: only the {where} has it")
            continue
        old, new = present[name], weights[name]
        try:
            new = padded(new, old.rank) if isinstance(old, LoraFactors) else new
        except ValueError as error:
            faults.append(f"{name.native}: {error}")
            continue
        if layout(new) != layout(old):
            faults.append(f"{name.native}: {describe_factors(new)} cannot take the place of {describe_factors(old)}")
            continue
        if old.scale == 0 != new.scale:
            faults.append(f"{name.native}: the loaded adapter has the scale 0, which nothing can be brought to")
            continue
        ready[name] = new if old.scale == 0 else rescaled(new, old.scale)
    if faults:
        raise InputError.from_faults(f"hotswap: {adapter_name!r} was left as it was:", faults, most=10)
    write_weights(components, ready, adapter_name)
