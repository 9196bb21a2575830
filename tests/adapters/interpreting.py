"""A second reading of adapter files, by the definitions and for kohya's keys only, to hold the product's against."""

from __future__ import annotations

import re

import torch

from anima_peft.adapters.naming import ModuleTable
from tests.adapters.adapting import Tensors, kohya_stem

Deltas = dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]
"""Native name -> what is added to the weight and to the bias, in float64."""

PART = re.compile(
    r"(.+)\.(lora_(?:down|up)\.weight|alpha|lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|diff|diff_b|w_norm|b_norm)"
)


def interpret(tensors: Tensors, modules: ModuleTable) -> Deltas | None:
    """What the tensors add to the model, by the definitions; None if they are no adapter of it."""
    by_stem = {kohya_stem(name.native): name for name in (*modules.linears, *modules.norms)}
    grouped: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        match = PART.fullmatch(key)
        if match is None or match[1] not in by_stem:
            return None
        if match[2] != "alpha" and not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            return None
        grouped.setdefault(match[1], {})[match[2]] = tensor if match[2] == "alpha" else tensor.double()
    deltas: Deltas = {}
    for stem, parts in grouped.items():
        name = by_stem[stem]
        shape = modules.shape(name)
        assert shape is not None
        try:
            weight, bias = delta_of(parts, is_norm=modules.is_norm(name))
        except (RuntimeError, KeyError, ValueError, ZeroDivisionError):
            return None
        if weight is not None and tuple(weight.shape) != shape:
            return None
        if bias is not None and (tuple(bias.shape) != shape[:1] or not modules.has_bias(name)):
            return None
        deltas[name.native] = weight, bias
    return deltas or None


def delta_of(parts: Tensors, *, is_norm: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A module's two deltas. Raises what torch and dictionaries raise where parts are missing or do not multiply."""
    rest = dict(parts)
    if is_norm:
        bias = rest.pop("b_norm", None)
        return only(rest, "w_norm"), bias
    bias, alpha = rest.pop("diff_b", None), rest.pop("alpha", None)
    kinds = {key.split("_")[0] for key in rest}
    if not rest and bias is not None:
        return None, bias
    if kinds == {"diff"}:
        return only(rest, "diff"), bias
    if kinds == {"lora"}:
        down, up = rest.pop("lora_down.weight"), rest.pop("lora_up.weight")
        return matrix(up) @ matrix(down) * scale(alpha, len(down)), bias
    if kinds == {"hada"}:
        (a, b), (c, d) = ((rest.pop(f"hada_w{n}_a"), rest.pop(f"hada_w{n}_b")) for n in (1, 2))
        if len(b) != len(d) or a.shape != c.shape or b.shape != d.shape:
            raise ValueError
        return (matrix(a) @ matrix(b)) * (matrix(c) @ matrix(d)) * scale(alpha, len(b)), bias
    if kinds != {"lokr"}:
        raise ValueError
    ranks, full = [], []
    for n in (2, 1):
        if f"lokr_w{n}" in rest:
            full.append(matrix(rest.pop(f"lokr_w{n}")))
        else:
            left, right = matrix(rest.pop(f"lokr_w{n}_a")), matrix(rest.pop(f"lokr_w{n}_b"))
            ranks.append(len(right))
            full.append(left @ right)
    if rest:
        raise ValueError
    return torch.kron(full[1], full[0]) * (scale(alpha, ranks[0]) if ranks else 1.0), bias


def only(parts: Tensors, key: str) -> torch.Tensor:
    if parts.keys() != {key}:
        raise ValueError
    return parts[key]


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError
    return tensor


def scale(alpha: torch.Tensor | None, rank: int) -> float:
    if alpha is None:
        return 1.0
    if alpha.numel() != 1 or alpha.is_complex() or not alpha.float().isfinite().all():
        raise ValueError
    return float(alpha.float()) / rank
