"""Adapters into one: their deltas are added, never their factors averaged.

The mean of two products is not the product of the means: (B1 A1 + B2 A2) / 2 has the rank of both together, and
averaging B and A apart adds the cross terms B1 A2 and B2 A1, which neither adapter has learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import InputError
from .factors import Factors, FullDelta, LoKrFactors, LoraFactors, NormDelta, Weights, converted, scaled_factor, summary
from .low_rank import Keep, Pair, Spectrum, exact_pair, has_weight, lora_of, spectrum_of_matrix, spectrum_of_pair
from .naming import ModuleName, ModuleTable
from .nominal import nominal_table
from .output import Bar, origin, require_new_file, still_true, write_modules
from .reading import AdapterFile, parse
from .sources import locate_adapter, read_adapter_file
from .writing import Format


@dataclass(frozen=True)
class Merge:
    """What was written.

    Attributes:
        path: the new file.
        contents: kinds, ranks and scales in words.
        kept: share of the deltas' squared Frobenius norm that was kept; 1 where the sum is exact.
    """

    path: Path
    contents: str
    kept: float


def merge(
    adapters: Sequence[tuple[str | Path, float]],
    path: Path,
    *,
    keep: Keep | None = None,
    style: Format = "kohya",
    dtype: torch.dtype | None = None,
    table: ModuleTable | None = None,
    overwrite: bool = False,
    bar: Bar = lambda names: names,
) -> Merge:
    """Write one adapter file with the sum of several adapters' deltas, each times its strength.

    What only one adapter changes stays as it is, with the strength in its scale. Several deltas of low rank are joined
    exactly, rank beside rank; where that would take more room than the whole matrix, or one of them has no low rank,
    the sum is written as a whole difference. With `keep`, every delta becomes the LoRA nearest to it.

    Args:
        adapters: file, folder or hub repo, and strength.
        path: the new file.
        keep: rank or energy of the result; None for the exact sum.
        style: one of `writing.FORMATS`.
        dtype: dtype of the factors; None rounds nothing: what is new is float32, what is not keeps its own.
        table: the base model's modules: shapes are then checked, and absolute norms understood.
        overwrite: whether a file that is there may be replaced.
        bar: shows how far it is.

    Raises:
        InputError: a file cannot be read as a whole, is DoRA and to be more than copied, a strength is zero or not
            finite, or the output may not be written.
        OSError: the output cannot be written.
    """
    files, strengths = read_adapters(adapters)
    require_new_file(path, [Path(file.source) for file in files], overwrite=overwrite)
    keys = [key for file in files for key in file.tensors]
    table = table or nominal_table(keys, ", ".join(file.source for file in files))
    weights = [parse(file, table) for file in files]
    changed = [name for name in (*table.linears, *table.norms) if any(name in of_one for of_one in weights)]
    _require_sums(changed, weights, strengths, keep)
    energies: list[tuple[float, float]] = []

    def modules() -> Iterator[tuple[ModuleName, Factors]]:
        """One factor set after the other, made when it is asked for."""
        for name in bar(changed):
            parts = [(of_one[name], s) for of_one, s in zip(weights, strengths, strict=True) if name in of_one]
            try:
                merged, kept, whole = merge_module(parts, keep)
            except ValueError as error:
                raise InputError(f"{name.native}: {error}.") from error
            energies.append((kept, whole))
            yield name, merged

    sources = [{"file": Path(file.source).name, "strength": s} for file, s in zip(files, strengths, strict=True)]
    text = still_true([file.metadata for file in files]) | origin("merge", adapters=sources)
    text["modelspec.merged_from"] = ", ".join(Path(file.source).stem for file in files)
    written = write_modules(path, modules(), style, dtype, text)
    whole = sum(whole for _, whole in energies)
    return Merge(path, summary(written), sum(kept for kept, _ in energies) / whole if whole else 1.0)


def read_adapters(adapters: Sequence[tuple[str | Path, float]]) -> tuple[list[AdapterFile], list[float]]:
    """The files, whose tensors stay on the disk until they are needed, and their strengths.

    Raises:
        InputError: a file is missing or not safetensors, or a strength is zero or not finite.
    """
    for source, strength in adapters:
        if not math.isfinite(strength) or strength == 0:
            raise InputError(f"{source}={strength:g}: expected a finite strength other than zero.")
    files = [read_adapter_file(locate_adapter(source), mapped=True) for source, _ in adapters]
    return files, [strength for _, strength in adapters]


def merge_module(parts: Sequence[tuple[Factors, float]], keep: Keep | None = None) -> tuple[Factors, float, float]:
    """The sum of one module's deltas, each times its strength.

    Args:
        parts: factors and strengths; at least one.
        keep: rank or energy of what the sum becomes; None for the exact sum.

    Returns:
        The sum, the squared Frobenius norm that is kept of the weight's delta, and that of the whole one; zeros where
        nothing was cut.

    Raises:
        ValueError: DoRA, whose delta depends on the base's weights.
    """
    if all(isinstance(factors, NormDelta) for factors, _ in parts):
        return _merged_norms(parts), 0.0, 0.0
    if len(parts) == 1 and (keep is None or not has_weight(parts[0][0])):  # type: ignore[arg-type]
        return times(*parts[0]), 0.0, 0.0
    if any(isinstance(factors, LoraFactors) and factors.magnitude is not None for factors, _ in parts):
        raise ValueError("DoRA's delta depends on the base's weights and cannot be added; bake it in with --into")
    exact = [(converted(factors, torch.float64), strength) for factors, strength in parts]
    bias = _sum([None if f.bias is None else f.bias * s for f, s in exact])
    changing = [(f, s) for f, s in exact if has_weight(f)]  # type: ignore[arg-type]
    if not changing:
        return FullDelta(bias=None if bias is None else bias.float()), 0.0, 0.0
    pair = _joined(changing)
    if pair is not None:
        rank, (rows, columns) = pair[1].shape[0], (pair[0].shape[0], pair[1].shape[1])
        if keep is None and rank * (rows + columns) <= rows * columns:
            return lora_of(pair, bias), 0.0, 0.0
        if keep is not None and rank < min(rows, columns):
            return _cut(spectrum_of_pair(*pair), keep, bias)
    delta = _sum([f.delta() * s for f, s in changing])  # type: ignore[union-attr]
    assert delta is not None
    if keep is None:
        return FullDelta(delta.float(), None if bias is None else bias.float()), 0.0, 0.0
    return _cut(spectrum_of_matrix(delta), keep, bias)


def times(factors: Factors, strength: float) -> Factors:
    """The same delta `strength` times as strong; where there is an alpha, it alone changes.

    Raises:
        ValueError: DoRA with another strength than 1.
    """
    if strength == 1:
        return factors
    bias = None if factors.bias is None else factors.bias.float() * strength
    if isinstance(factors, NormDelta):
        return NormDelta(factors.weight.float() * strength, bias)
    if isinstance(factors, FullDelta):
        return FullDelta(None if factors.weight is None else factors.weight.float() * strength, bias)
    if isinstance(factors, LoraFactors) and factors.magnitude is not None:
        raise ValueError("DoRA's delta depends on the base's weights and has no strength in a file; use strength 1")
    if isinstance(factors, LoKrFactors) and factors.shape.rank is None:
        return replace(factors, w1=scaled_factor(factors.w1, strength), bias=bias)
    return replace(factors, alpha=factors.alpha * strength, bias=bias)


def _require_sums(
    names: Sequence[ModuleName], weights: Sequence[Weights], strengths: Sequence[float], keep: Keep | None
) -> None:
    """Refuse before the work what `merge_module` would refuse in the middle of it."""
    for name in names:
        parts = [(of_one[name], s) for of_one, s in zip(weights, strengths, strict=True) if name in of_one]
        dora = any(isinstance(factors, LoraFactors) and factors.magnitude is not None for factors, _ in parts)
        if dora and (len(parts) > 1 or keep is not None or parts[0][1] != 1):
            raise InputError(
                f"{name.native}: is DoRA, whose delta depends on the base's weights, so that it cannot be added to "
                "others, cut or made stronger in a file; bake it into a checkpoint with --into."
            )
        shapes = {shape for factors, _ in parts if (shape := _shape(factors)) is not None}
        if len(shapes) > 1:
            sizes = " and ".join("x".join(map(str, shape)) for shape in sorted(shapes))
            raise InputError(f"{name.native}: the adapters are of different models (sizes {sizes}).")


def _shape(factors: Factors) -> tuple[int, ...] | None:
    """Of the weight that the factors change; None where they do not say."""
    if isinstance(factors, (NormDelta, FullDelta)):
        weight = factors.weight
        return None if weight is None else tuple(weight.shape)
    return tuple(converted(factors, None, "meta").delta().shape)


def _merged_norms(parts: Iterable[tuple[Factors, float]]) -> NormDelta:
    exact = [(converted(f, torch.float64), strength) for f, strength in parts if isinstance(f, NormDelta)]
    weight = _sum([f.weight * s for f, s in exact])
    bias = _sum([None if f.bias is None else f.bias * s for f, s in exact])
    assert weight is not None
    return NormDelta(weight.float(), None if bias is None else bias.float())


def _joined(parts: Sequence[tuple[Factors, float]]) -> Pair | None:
    """All deltas as one product, rank beside rank; None where one of them is a whole matrix."""
    pairs = [(exact_pair(factors), strength) for factors, strength in parts]  # type: ignore[arg-type]
    lefts = [pair[0] * strength for pair, strength in pairs if pair is not None]
    rights = [pair[1] for pair, _ in pairs if pair is not None]
    return (torch.cat(lefts, dim=1), torch.cat(rights)) if len(lefts) == len(parts) else None


def _cut(spectrum: Spectrum, keep: Keep, bias: torch.Tensor | None) -> tuple[LoraFactors, float, float]:
    pair, kept = spectrum.cut(keep)
    return lora_of(pair, bias), kept, spectrum.energy


def _sum(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return sum(present[1:], present[0]) if present else None
