"""Adapters baked into a checkpoint: a new single file that needs no adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError
from ..models.dit import open_dit
from .factors import Factors, LoraFactors, NormDelta, converted
from .low_rank import has_weight
from .merging import read_adapters
from .naming import ModuleName
from .output import ORIGIN_KEY, origin, require_new_file
from .reading import parse
from .single_file import key_of, require_unquantized, table_of
from .streaming import TensorFile, rewrite

_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@dataclass(frozen=True)
class Baking:
    """What was written.

    Attributes:
        path: the new checkpoint.
        modules: how many modules changed.
        lost: what rounding to the checkpoint's dtype changed, as a share of the deltas' Frobenius norm.
    """

    path: Path
    modules: int
    lost: float


@dataclass
class _Loss:
    """Squared Frobenius norms, summed over the tensors."""

    deltas: float = 0.0
    rounding: float = 0.0


def bake(
    adapters: Sequence[tuple[str | Path, float]],
    checkpoint: Path,
    path: Path,
    *,
    overwrite: bool = False,
    started: Callable[[int], Callable[[int], object]] = lambda _: lambda _: None,
) -> Baking:
    """Write a checkpoint to whose weights several adapters' deltas are added, each times its strength.

    One tensor at a time is in memory. All else of the file stays as it is, to the byte: keys, dtypes, order, and its
    metadata, to which is added what was baked in. Sums are computed in float32 for weights in half precision, and in
    float64 for others, and rounded once. The order of the adapters matters to DoRA alone.

    Args:
        adapters: file, folder or hub repo, and strength.
        checkpoint: DiT and text conditioner in one safetensors file.
        path: the new file.
        overwrite: whether a file that is there may be replaced.
        started: called with the bytes to write; what it returns is called with those of each tensor written.

    Raises:
        InputError: not an Anima checkpoint, or a quantized one; an adapter that cannot be read as a whole or fits
            another model; or a sum that the checkpoint's dtype cannot hold.
        OSError: the output cannot be written.
    """
    files, strengths = read_adapters(adapters)
    require_new_file(path, [checkpoint, *(Path(file.source) for file in files)], overwrite=overwrite)
    model = open_dit(checkpoint)
    table = table_of(model)
    changes: dict[ModuleName, list[tuple[Factors, float]]] = {}
    for file, strength in zip(files, strengths, strict=True):
        for name, factors in parse(file, table).items():
            changes.setdefault(name, []).append((factors, strength))
    loss = _Loss()
    with TensorFile(checkpoint) as source:
        by_key = {
            key: _adding(key, [part for part in parts if _touches(part[0], parameter)], parameter, loss)
            for name, parts in changes.items()
            for parameter in ("weight", "bias")
            if any(_touches(factors, parameter) for factors, _ in parts)
            for key in [key_of(model, name, parameter)]
        }
        require_unquantized(source, by_key)
        sources = [{"file": Path(file.source).name, "strength": s} for file, s in zip(files, strengths, strict=True)]
        kept = {key: value for key, value in source.metadata.items() if key not in _HASHES}
        earlier = {"before": source.metadata[ORIGIN_KEY]} if ORIGIN_KEY in source.metadata else {}
        text = kept | origin("merge --into", checkpoint=checkpoint.name, adapters=sources, **earlier)
        done = started(sum(entry.end - entry.start for entry in source.entries.values()))
        rewrite(source, path, by_key, text, done)
    return Baking(path, len(changes), math.sqrt(loss.rounding / loss.deltas) if loss.deltas else 0.0)


def _touches(factors: Factors, parameter: str) -> bool:
    if parameter == "bias":
        return factors.bias is not None
    return isinstance(factors, NormDelta) or has_weight(factors)


def _adding(
    key: str, parts: Sequence[tuple[Factors, float]], parameter: str, loss: _Loss
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes the new tensor of a checkpoint's old one."""

    def add(old: torch.Tensor) -> torch.Tensor:
        """The old tensor with all deltas, in its own dtype; what rounding costs is noted in `loss`."""
        wide = torch.float64 if old.dtype in (torch.float32, torch.float64) else torch.float32
        base = old.to(wide)
        delta = torch.zeros_like(base)
        for factors, strength in parts:
            delta += _delta(converted(factors, wide), strength, parameter, base + delta)
        exact = base + delta
        new = exact.to(old.dtype)
        if not new.isfinite().all():
            raise InputError(
                f"{key}: the sum is not finite in the checkpoint's {str(old.dtype).removeprefix('torch.')}."
            )
        loss.deltas += float(delta.square().sum(dtype=torch.float64))
        loss.rounding += float((new.to(wide) - exact).square().sum(dtype=torch.float64))
        return new

    return add


def _delta(factors: Factors, strength: float, parameter: str, so_far: torch.Tensor) -> torch.Tensor:
    """What one adapter adds. DoRA brings the rows of weight + delta to its magnitudes (Liu et al. 2024); the weight is
    that with the adapters before it, as when PEFT fuses or ComfyUI patches."""
    if parameter == "bias":
        assert factors.bias is not None
        return factors.bias * strength
    if isinstance(factors, NormDelta):
        return factors.weight * strength
    delta = factors.delta() * strength
    if not isinstance(factors, LoraFactors) or factors.magnitude is None:
        return delta
    direction = so_far + delta
    return direction * (factors.magnitude / direction.norm(dim=1))[:, None] - so_far
