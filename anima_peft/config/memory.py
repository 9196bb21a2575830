"""The options that trade time for memory, and the presets that set several of them at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..training.block_swap import ALL_BLOCKS
from .checks import missing_effect, value_of
from .options import Needs, Option, option
from .reading import FAULTY, Faults, shown
from .schema import Found

_PRESETS: dict[str, dict[str, object]] = {
    "fast": {},
    "balanced": {"gradient_checkpointing": True},
    "low": {"gradient_checkpointing": True, "blocks_to_swap": ALL_BLOCKS},
}
_ORIGIN = "memory = "
_CHECKPOINTED = Needs("gradient_checkpointing", values=(True,), hint="set gradient_checkpointing = true")
_EVERY_BLOCK = Needs("gradient_checkpointing_every", values=(1,))


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Memory."""

    memory: str = option(
        "fast",
        choices=tuple(_PRESETS),
        help="Sets the options below that are not set themselves: balanced turns on gradient_checkpointing, low also "
        "blocks_to_swap = -1, fast nothing. Results are the same with all three.",
    )
    gradient_checkpointing_every: int = option(
        1,
        minimum=1,
        only_with=(_CHECKPOINTED,),
        help="Recompute the activations of every n-th block only: 2 costs half the time and saves half the "
        "memory of 1.",
    )
    blocks_to_swap: int = option(
        0,
        minimum=ALL_BLOCKS,
        only_with=(_CHECKPOINTED, _EVERY_BLOCK, Needs("base_quantization", values=("none",))),
        help="Blocks of the transformer whose frozen weights are in main memory instead of on the graphics card at any "
        "time; they come in turn, one block ahead. -1: all but two, as many as can be.",
    )
    base_quantization: str = option(
        "none",
        choices=("none", "int8", "fp8", "nf4"),
        help="Type that the frozen weights of the transformer's blocks are kept in: 8 bits (torchao) or 4 "
        "(bitsandbytes) instead of those of mixed_precision. The adapter stays in float32; what it learns differs a "
        "little.",
    )
    vae_tiling: bool = option(
        False,
        help="Encode pictures with a side above 512 pixels in overlapping tiles, which takes less memory; their "
        "latents differ a little.",
    )


def apply_preset(options: Mapping[str, Option], found: dict[str, Found]) -> tuple[str, ...]:
    """Add what `memory` sets to what was given, which wins; also over what then has no effect.

    Args:
        options: all of a run, by name.
        found: what was given; changed in place.

    Returns:
        What was set, as a sentence; nothing where nothing was.
    """
    given = found.get("memory")
    if given is None or given.value is FAULTY:
        return ()
    origin, added = _ORIGIN + shown(given.value), []
    for name, value in _PRESETS[given.value].items():
        if name not in found and not missing_effect(options[name], options, found):
            found[name] = Found(value, origin)
            added.append(f"{name} = {shown(value)}")
    return (f"{origin} sets {', '.join(added)}.",) if added else ()


def set_by_preset(given: Found) -> bool:
    """Whether a value comes from `apply_preset`."""
    return given.path.startswith(_ORIGIN)


def check_memory(options: Mapping[str, Option], found: Mapping[str, Found], faults: Faults) -> None:
    """Report what cannot be had with a quantized base."""
    kind = value_of(options["base_quantization"], found)
    if kind not in ("none", FAULTY) and value_of(options["use_dora"], found) is True:
        faults.add(
            found["base_quantization"].path,
            f"{shown(kind)} cannot be used with use_dora, whose magnitudes would be those of the rounded weights; "
            "remove one of them",
        )
