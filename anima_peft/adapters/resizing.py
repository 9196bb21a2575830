"""Adapters of another rank: the nearest ones, from the factors alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import InputError
from .factors import Factors, LoKrFactors, LoraFactors, NormDelta, converted, describe_factors, scaled_factor, summary
from .low_rank import Keep, has_weight, lora_of, spectrum_of, spectrum_of_matrix, spectrum_of_pair
from .naming import ModuleName, ModuleTable
from .nominal import nominal_table
from .output import Bar, origin, require_new_file, still_true, write_modules
from .reading import parse
from .sources import locate_adapter, read_adapter_file
from .writing import Format


@dataclass(frozen=True)
class Kept:
    """How well one module's delta was approximated.

    Attributes:
        name: the module.
        contents: what it is now, in words.
        kept, whole: squared Frobenius norms of what was kept and of the whole delta.
    """

    name: ModuleName
    contents: str
    kept: float
    whole: float

    @property
    def share(self) -> float:
        """Kept energy, 0 to 1; of a delta of zero all."""
        return self.kept / self.whole if self.whole else 1.0


@dataclass(frozen=True)
class Approximation:
    """What was written.

    Attributes:
        path: the new file.
        contents: kinds, ranks and scales in words.
        modules: each module's.
        notes: what else there is to know.
    """

    path: Path
    contents: str
    modules: tuple[Kept, ...]
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Kept energy of all deltas together."""
        whole = sum(module.whole for module in self.modules)
        return sum(module.kept for module in self.modules) / whole if whole else 1.0


def resize(
    source: str | Path,
    path: Path,
    keep: Keep,
    *,
    style: Format = "kohya",
    dtype: torch.dtype | None = None,
    table: ModuleTable | None = None,
    overwrite: bool = False,
    bar: Bar = lambda names: names,
) -> Approximation:
    """Write an adapter of lower rank that is as near to another one as any of its kind and rank is.

    Args:
        source: file, folder or hub repo.
        path: the new file.
        keep: rank or energy of each module.
        style: one of `writing.FORMATS`.
        dtype: dtype of the factors; None keeps what does not change as it is, and gives float32 for the rest.
        table: the base model's modules: shapes are then checked, and absolute norms understood.
        overwrite: whether a file that is there may be replaced.
        bar: shows how far it is.

    Raises:
        InputError: the source cannot be read as a whole, or the output may not be written.
        OSError: the output cannot be written.
    """
    file = read_adapter_file(locate_adapter(source), mapped=True)
    require_new_file(path, [Path(file.source)], overwrite=overwrite)
    weights = parse(file, table or nominal_table(file.tensors, file.source))
    if all(isinstance(factors, NormDelta) or not has_weight(factors) for factors in weights.values()):
        raise InputError(f"{file.source}: holds norms and biases only, which have no rank.")
    report: list[Kept] = []

    def modules() -> Iterator[tuple[ModuleName, Factors]]:
        """One factor set after the other, made when it is asked for."""
        for name in bar(weights):
            resized, kept, whole = resize_module(weights[name], keep)
            if whole:
                report.append(Kept(name, describe_factors(resized), kept, whole))
            yield name, resized

    made = {"file": Path(file.source).name, "rank": keep.rank, "energy": keep.energy}
    text = still_true([file.metadata]) | origin("resize", **made)
    written = write_modules(path, modules(), style, dtype, text)
    return Approximation(path, summary(written), tuple(report))


def resize_module(factors: Factors, keep: Keep) -> tuple[Factors, float, float]:
    """One module's factors with a lower rank, and the squared Frobenius norms of what is kept and of the whole delta.

    LoRA (and DoRA's directions, whose magnitudes stay) is cut by QR and SVD of its thin factors. LoKr stays LoKr: its
    larger factor is cut, which is the best there is as the Kronecker product of the two has the product of their
    norms; a full one becomes a pair where that is smaller. LoHa and whole differences become LoRA. Norms and biases
    stay, and count for nothing.
    """
    if isinstance(factors, NormDelta) or not has_weight(factors):
        return factors, 0.0, 0.0
    exact = converted(factors, torch.float64)
    if isinstance(exact, LoKrFactors):
        return _resized_lokr(exact, factors, keep)  # type: ignore[arg-type]
    spectrum = spectrum_of(exact)
    if isinstance(factors, LoraFactors) and keep.count(spectrum.squares) >= factors.rank:
        return factors, spectrum.energy, spectrum.energy  # as it is, to the last bit
    pair, kept = spectrum.cut(keep)
    resized = replace(lora_of(pair), bias=factors.bias)
    if isinstance(factors, LoraFactors):
        resized = replace(resized, magnitude=factors.magnitude)
    return resized, kept, spectrum.energy


def _resized_lokr(exact: LoKrFactors, factors: LoKrFactors, keep: Keep) -> tuple[Factors, float, float]:
    full = isinstance(exact.w2, torch.Tensor)
    spectrum = spectrum_of_matrix(exact.w2) if full else spectrum_of_pair(*exact.w2)  # type: ignore[arg-type]
    whole = exact.delta_norm() ** 2
    rank, shape = keep.count(spectrum.squares), factors.shape
    if rank >= (shape.rank2 or shape.b * shape.d / (shape.b + shape.d)):
        return factors, whole, whole
    (left, right), kept = spectrum.cut(keep)
    resized = LoKrFactors(
        scaled_factor(factors.w1, exact.scale),
        (left.float().contiguous(), right.float().contiguous()),
        alpha=float(rank),
        dim=rank,
        bias=factors.bias,
    )
    return resized, whole * kept / spectrum.energy if spectrum.energy else 0.0, whole
