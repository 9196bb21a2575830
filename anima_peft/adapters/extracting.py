"""An adapter out of two checkpoints: what one of them has learned beyond the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ..errors import InputError
from ..models.dit import DitFile, open_dit
from .factors import Factors, FullDelta, LoKrFactors, NormDelta, describe_factors, summary
from .kronecker import factorize
from .lokr import FULL_MATRIX_SENTINEL
from .low_rank import Keep, lora_of, spectrum_of_matrix
from .naming import ModuleName, ModuleTable
from .output import Bar, origin, require_new_file, write_modules
from .resizing import Approximation, Kept
from .single_file import key_of, require_unquantized, table_of
from .streaming import TensorFile
from .targets import ALL_LINEAR, select_targets
from .writing import Format

Method = Literal["lora", "lokr"]
METHODS: tuple[Method, ...] = ("lora", "lokr")


@dataclass(frozen=True)
class Extraction:
    """What is to be made of the differences.

    Attributes:
        method: "lora", or "lokr".
        keep: rank or energy of each LoRA, or of LoKr's larger factor; None, for LoKr only, keeps it full.
        factor: LoKr's, see `kronecker.factorize`.
        targets: presets or patterns of the linear layers to approximate; see `targets.select_targets`.
        whole: patterns of the linear layers whose difference is kept as it is.
        norms: whether the differences of norms and biases are kept.
        device: where matrices are decomposed.
    """

    method: Method
    keep: Keep | None
    factor: int = 8
    targets: Sequence[str] = (ALL_LINEAR,)
    whole: Sequence[str] = ()
    norms: bool = True
    device: torch.device | str = "cpu"


def extract(
    base: Path,
    tuned: Path,
    path: Path,
    how: Extraction,
    *,
    style: Format = "kohya",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    bar: Bar = lambda names: names,
) -> Approximation:
    """Write the adapter that makes a base checkpoint as much as possible into a tuned one.

    Two tensors at a time are in memory. Where the tuned checkpoint has a narrower dtype, the base is rounded to it
    first, so that mere rounding is not taken for learning.

    Args:
        base, tuned: DiT and text conditioner in one safetensors file each.
        path: the new file.
        how: what is to be made of the differences.
        style: one of `writing.FORMATS`.
        dtype: dtype of the factors; None is float32.
        overwrite: whether a file that is there may be replaced.
        bar: shows how far it is.

    Returns:
        What was written, with the kept energy of every layer that differs, also of those left out.

    Raises:
        InputError: not two Anima checkpoints of one size, they do not differ, a weight is not finite or quantized, or
            the output may not be written.
        OSError: the output cannot be written.
    """
    require_new_file(path, [base, tuned], overwrite=overwrite)
    models = (open_dit(base), open_dit(tuned))
    table = table_of(models[0])
    _require_same_sizes(*models)
    chosen = set(select_targets(table, how.targets, train_text_conditioner=True))
    whole = set(select_targets(table, how.whole, train_text_conditioner=True)) if how.whole else set()
    report = _Report()
    with ExitStack() as stack:
        first, second = (stack.enter_context(TensorFile(file)) for file in (base, tuned))
        pair = _Pair(models, first, second)

        def modules() -> Iterator[tuple[ModuleName, Factors]]:
            """One factor set after the other, made when it is asked for."""
            empty = True
            for name in bar((*table.linears, *table.norms)):
                factors = _module(name, table, pair, how, chosen, whole, report)
                if factors is not None:
                    empty = False
                    yield name, factors
            if empty:
                raise InputError(f"{base} and {tuned}: no layer that was chosen differs; there is nothing to extract.")

        made = {"base": base.name, "tuned": tuned.name, "method": how.method}
        written = write_modules(path, modules(), style, dtype, origin("extract", **made))
        notes = [*report.notes(), *pair.beyond(table)]
    return Approximation(path, summary(written), tuple(report.kept), tuple(notes))


@dataclass
class _Report:
    kept: list[Kept] = field(default_factory=list)
    left_out: list[ModuleName] = field(default_factory=list)
    norms_left_out: int = 0

    def notes(self) -> Iterator[str]:
        """What differs and was not taken, in sentences."""
        if self.left_out:
            yield f"{len(self.left_out)} linear layers differ and were not chosen, such as {self.left_out[0].native}"
        if self.norms_left_out:
            yield f"{self.norms_left_out} norms or biases differ and were left out"


class _Pair:
    """The two checkpoints.

    Raises:
        InputError: one of them is quantized.
    """

    def __init__(self, models: tuple[DitFile, DitFile], base: TensorFile, tuned: TensorFile):
        for model, file in zip(models, (base, tuned), strict=True):
            require_unquantized(file, (*model.transformer_keys.values(), *model.conditioner_keys.values()))
        self._models, self._files = models, (base, tuned)

    def difference(self, name: ModuleName, parameter: str) -> torch.Tensor | None:
        """tuned - base, in float64; None where they do not differ."""
        keys = [key_of(model, name, parameter) for model in self._models]
        return self._subtract(keys[0], keys[1])

    def _subtract(self, base_key: str, tuned_key: str) -> torch.Tensor | None:
        base, tuned = self._files[0].read(base_key), self._files[1].read(tuned_key)
        for file, key, tensor in zip(self._files, (base_key, tuned_key), (base, tuned), strict=True):
            if not tensor.isfinite().all():
                raise InputError(f"{file.path}: {key} holds values that are not finite.")
        if tuned.element_size() < base.element_size():
            base = base.to(tuned.dtype)
        difference = tuned.double() - base.double()
        return difference if difference.any() else None

    def beyond(self, table: ModuleTable) -> Iterator[str]:
        """What differs and has no place in any adapter."""
        known = {key_of(self._models[0], name, "weight") for name in table.adaptable}
        for ours, theirs in (
            (self._models[0].transformer_keys, self._models[1].transformer_keys),
            (self._models[0].conditioner_keys, self._models[1].conditioner_keys),
        ):
            for parameter, key in ours.items():
                is_other = key not in known and not parameter.endswith(".bias")
                if is_other and self._subtract(key, theirs[parameter]) is not None:
                    yield f"{key} differs, and adapters have no place for it"


def _require_same_sizes(base: DitFile, tuned: DitFile) -> None:
    for one, other in ((base.transformer, tuned.transformer), (base.conditioner, tuned.conditioner)):
        sizes, others = ({key: tuple(t.shape) for key, t in model.state_dict().items()} for model in (one, other))
        unlike = [key for key in {**sizes, **others} if sizes.get(key) != others.get(key)]
        if unlike:
            raise InputError(
                f"{base.checkpoint.path} and {tuned.checkpoint.path} are models of different sizes: {unlike[0]} is "
                f"{sizes.get(unlike[0], 'absent')} and {others.get(unlike[0], 'absent')}."
            )


def _module(
    name: ModuleName,
    table: ModuleTable,
    pair: _Pair,
    how: Extraction,
    chosen: set[ModuleName],
    whole: set[ModuleName],
    report: _Report,
) -> Factors | None:
    """What a module has learned; None where it is nothing, or left out."""
    weight = pair.difference(name, "weight")
    bias = pair.difference(name, "bias") if table.has_bias(name) else None
    if not how.norms and (bias is not None or (weight is not None and table.is_norm(name))):
        report.norms_left_out += 1
        weight, bias = (None if table.is_norm(name) else weight), None
    bias = None if bias is None else bias.float()
    if table.is_norm(name):
        if weight is None and bias is None:
            return None
        return NormDelta(torch.zeros(table.shape(name) or ()) if weight is None else weight.float(), bias)
    if weight is None:
        return None if bias is None else FullDelta(bias=bias)
    energy = float(weight.square().sum())
    if name in whole:
        factors: Factors = FullDelta(weight.float(), bias)
        kept = energy
    elif name not in chosen:
        report.left_out.append(name)
        report.kept.append(Kept(name, "left out", 0.0, energy))
        return None if bias is None else FullDelta(bias=bias)
    elif how.method == "lokr":
        factors, kept = nearest_lokr(weight.to(how.device), how.factor, how.keep, bias)
    else:
        assert how.keep is not None
        two, kept = spectrum_of_matrix(weight.to(how.device)).cut(how.keep)
        factors = lora_of((two[0].cpu(), two[1].cpu()), bias)
    report.kept.append(Kept(name, describe_factors(factors), kept, energy))
    return factors


def nearest_lokr(
    matrix: torch.Tensor, factor: int, keep: Keep | None = None, bias: torch.Tensor | None = None
) -> tuple[LoKrFactors, float]:
    """The Kronecker product nearest to a matrix, and the squared Frobenius norm that it keeps.

    Its entries rearranged so that each block is a row, kron(w1, w2) is the outer product of w1 and w2, and the nearest
    one is the leading singular pair (Van Loan & Pitsianis 1993). With `keep`, w2 is then cut to a low rank.

    Args:
        matrix: (a*b, c*d), float64.
        factor: how out and in are split; see `kronecker.factorize`.
        keep: rank or energy of w2; None keeps it full.
        bias: added to the factors.
    """
    (a, b), (c, d) = factorize(matrix.shape[0], factor), factorize(matrix.shape[1], factor)
    rearranged = matrix.reshape(a, b, c, d).permute(0, 2, 1, 3).reshape(a * c, b * d)
    (left, right), kept = spectrum_of_matrix(rearranged).cut(Keep(rank=1))
    w1, w2 = left.reshape(a, c).float().cpu(), right.reshape(b, d)
    if keep is not None:
        spectrum = spectrum_of_matrix(w2)
        rank = keep.count(spectrum.squares)
        if rank * (b + d) < b * d:
            two, part = spectrum.cut(keep)
            low = (two[0].float().cpu().contiguous(), two[1].float().cpu().contiguous())
            return LoKrFactors(w1, low, float(rank), rank, bias), kept * part / (spectrum.energy or 1.0)
    full = w2.float().cpu().contiguous()
    return LoKrFactors(w1, full, float(FULL_MATRIX_SENTINEL), FULL_MATRIX_SENTINEL, bias), kept
