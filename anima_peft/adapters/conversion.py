"""Rewriting an adapter file in another style, and how much its deltas change by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from ..errors import InputError
from ..files import save_tensors
from .factors import Factors, FullDelta, LoraFactors, NormDelta, Weights, converted, tensors_of
from .metadata import describe, with_hashes
from .naming import ModuleName, ModuleTable
from .nominal import nominal_table
from .output import require_new_file
from .reading import AdapterFile, parse
from .sources import locate_adapter, read_adapter_file
from .writing import FORMATS, Format, serialize

_STYLE_METADATA = (LORA_ADAPTER_METADATA_KEY, "format")
NEGLIGIBLE = 1e-6
"""Relative change of a delta that float32's own rounding explains."""


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        path: the new file.
        modules: how many it has parts for.
        change: the largest relative change |delta' - delta| / |delta| of any module.
        changed: the module with that change.
    """

    path: Path
    modules: int
    change: float
    changed: ModuleName | None


def convert(
    source: str | Path,
    path: str | Path,
    style: Format,
    *,
    dtype: torch.dtype | None = None,
    table: ModuleTable | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write an adapter file of any supported style in another one.

    kohya, comfy-hybrid and original are renamings of each other: the tensors stay the same to the last bit, and alphas
    keep their value (beside full LoKr factors, where none counts, one that every loader survives). Where comfy and
    diffusers fold the scale in, that is computed in float32. The file's own metadata is kept as far as it is true of
    the new one.

    Args:
        source: file, folder or hub repo.
        path: the new file.
        style: one of `FORMATS`.
        dtype: dtype of the factors written; None keeps each tensor's own.
        table: the base model's modules: shapes are then checked, and absolute norms understood.
        overwrite: whether a file that is there may be replaced.

    Raises:
        InputError: the source cannot be read as a whole, the style is unknown, or the output may not be written.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if style not in FORMATS:
        raise InputError(f"format {style!r}: expected one of {', '.join(FORMATS)}.")
    source = locate_adapter(source)
    require_new_file(path, [source], overwrite=overwrite)
    file = read_adapter_file(source)
    weights = parse(file, table or nominal_table(file.tensors, file.source))
    tensors, style_metadata = serialize(weights, style, dtype)
    kept = {key: value for key, value in file.metadata.items() if key not in _STYLE_METADATA}
    text = {"format": "pt"} | describe(weights) | kept | style_metadata
    again = AdapterFile(f"{path} with these numbers", tensors, style_metadata)
    # Before it is written: a narrow dtype may not hold the numbers.
    change, changed = _largest_change(weights, parse(again, table or nominal_table(tensors, again.source)))
    save_tensors(path, tensors, with_hashes(tensors, text))
    return Conversion(path, len(weights), change, changed)


def _largest_change(before: Weights, after: Mapping[ModuleName, Factors]) -> tuple[float, ModuleName | None]:
    largest: tuple[float, ModuleName | None] = (0.0, None)
    for name, factors in before.items():
        if _same(factors, after[name]):
            continue  # forming the deltas of a full-size file takes a minute
        for old, new in zip(_deltas(factors), _deltas(after[name]), strict=True):
            size = float(old.norm())
            change = float((new - old).norm()) / size if size else float(new.norm())
            if change > largest[0]:
                largest = change, name
    return largest


def _same(one: Factors, other: Factors) -> bool:
    parts = (tensors_of(one), tensors_of(other))
    return one.scale == other.scale and all(map(torch.equal, *parts))


def _deltas(factors: Factors) -> list[torch.Tensor]:
    """What is added to the weight and to the bias, and DoRA's magnitudes, in float64."""
    exact = converted(factors, torch.float64)
    if isinstance(exact, (NormDelta, FullDelta)):
        parts = [exact.weight, exact.bias]
    else:
        parts = [exact.delta(), exact.bias, exact.magnitude if isinstance(exact, LoraFactors) else None]
    return [part for part in parts if part is not None]
