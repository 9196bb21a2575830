"""What one tensor of an adapter file is to its module, and a module's tensors together as its factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from .factors import Factor, Factors, LoKrFactors, LoraFactors, NormDelta, product

ALPHA = "alpha"
_DOWN, _UP, _MAGNITUDE = "down", "up", "DoRA magnitude"
_W1, _W2 = "lokr_w1", "lokr_w2"
_LOKR = {f".{factor}{part}": f"{factor}{part}" for factor in (_W1, _W2) for part in ("", "_a", "_b")}
_NORM, _NORM_BIAS = "w_norm", "b_norm"

_SUFFIXES = {
    ".lora_down.weight": _DOWN,
    ".lora_up.weight": _UP,
    ".lora_A.weight": _DOWN,
    ".lora_B.weight": _UP,
    ".dora_scale": _MAGNITUDE,
    ".lora_magnitude_vector": _MAGNITUDE,
    **_LOKR,
    ".w_norm": _NORM,
    ".b_norm": _NORM_BIAS,
    ".alpha": ALPHA,
}
_LORA_ROLES = frozenset((_DOWN, _UP, _MAGNITUDE))
_NORM_ROLES = frozenset((_NORM, _NORM_BIAS))


def split_key(key: str) -> tuple[str, str | None]:
    """A key's module part and the role of its tensor, or None for a role that is not known."""
    for suffix, role in _SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), role
    return key, None


def build_factors(
    tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...], default_alpha: Callable[[int], float]
) -> Factors:
    """A module's factors out of its tensors.

    Args:
        tensors: role -> tensor.
        shape: of the module's weight: (out, in) of a linear, (width,) of a norm.
        default_alpha: from the rank, the alpha where the file has none.

    Raises:
        ValueError: a factor is missing, misshapen, not finite, or does not belong to this kind of module.
    """
    roles = tensors.keys() - {ALPHA}
    for role in sorted(roles):
        if not tensors[role].is_floating_point():
            raise ValueError(f"`{role}` has dtype {tensors[role].dtype}, expected floating point")
        if not tensors[role].float().isfinite().all():
            raise ValueError(f"`{role}` holds values that are not finite")
    if len(shape) == 1:
        return _norm(tensors, roles, shape)
    if roles & _NORM_ROLES:
        raise ValueError("it is not a norm, so it cannot carry a norm's delta")
    if not roles <= _LORA_ROLES and roles & _LORA_ROLES:
        raise ValueError("it has factors of LoRA and of LoKr")
    if roles <= _LORA_ROLES:
        return _lora(tensors, shape, default_alpha)
    return _lokr(tensors, shape, default_alpha)


def _lora(
    tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...], default_alpha: Callable[[int], float]
) -> LoraFactors:
    down, up = _required(tensors, _DOWN), _required(tensors, _UP)
    if down.ndim == 4 and up.ndim == 4 and down.shape[2:] == up.shape[2:] == (1, 1):
        down, up = down.flatten(1), up.flatten(1)  # some writers store linears as 1x1 convolutions
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise ValueError(f"factors of shapes {list(down.shape)} and {list(up.shape)} do not multiply")
    if (up.shape[0], down.shape[1]) != shape:
        raise ValueError(f"factors for a {up.shape[0]}x{down.shape[1]} layer, but it is {shape[0]}x{shape[1]}")
    magnitude = tensors.get(_MAGNITUDE)
    if magnitude is not None:
        if magnitude.numel() != shape[0]:
            # LyCORIS can also keep norms of columns; PEFT's layer knows those of rows only.
            raise ValueError(f"a DoRA magnitude of {list(magnitude.shape)}; supported is one number for each output")
        magnitude = magnitude.flatten()
    return LoraFactors(down, up, _finite_alpha(tensors, down.shape[0], default_alpha), magnitude)


def _lokr(
    tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...], default_alpha: Callable[[int], float]
) -> LoKrFactors:
    w1, w2 = _lokr_factor(tensors, _W1), _lokr_factor(tensors, _W2)
    (a, c), (b, d) = (tuple(product(_on_meta(factor)).shape) for factor in (w1, w2))
    if (a * b, c * d) != shape:
        raise ValueError(f"factors for a {a * b}x{c * d} layer, but it is {shape[0]}x{shape[1]}")
    factors = LoKrFactors(w1, w2, alpha=0.0, dim=max(b, d))
    rank = factors.shape.rank
    if rank is None:  # any alpha may stand in the file, and none of them counts
        return LoKrFactors(w1, w2, alpha=float(max(b, d)), dim=max(b, d))
    return LoKrFactors(w1, w2, _finite_alpha(tensors, rank, default_alpha), rank)


def _lokr_factor(tensors: Mapping[str, torch.Tensor], name: str) -> Factor:
    low_rank = [tensors[role] for role in (f"{name}_a", f"{name}_b") if role in tensors]
    if name in tensors:
        if low_rank:
            raise ValueError(f"`{name}` is there both whole and as a low-rank pair")
        if tensors[name].ndim != 2 or 0 in tensors[name].shape:
            raise ValueError(f"`{name}` has shape {list(tensors[name].shape)}, expected a matrix")
        return tensors[name]
    left, right = _required(tensors, f"{name}_a", name), _required(tensors, f"{name}_b", name)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0] or 0 in (*left.shape, *right.shape):
        raise ValueError(f"`{name}`'s parts of shapes {list(left.shape)} and {list(right.shape)} do not multiply")
    return left, right


def _norm(tensors: Mapping[str, torch.Tensor], roles: set[str], shape: tuple[int, ...]) -> NormDelta:
    if not roles <= _NORM_ROLES or ALPHA in tensors:
        raise ValueError("it is a norm, which can carry `w_norm` and `b_norm` only")
    weight, bias = _required(tensors, _NORM), tensors.get(_NORM_BIAS)
    for tensor in (weight, bias):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"a norm's delta of shape {list(tensor.shape)}, but it is {list(shape)}")
    return NormDelta(weight, bias)


def _required(tensors: Mapping[str, torch.Tensor], role: str, instead: str | None = None) -> torch.Tensor:
    if role not in tensors:
        raise ValueError(f"the `{instead or role}` factor is missing" + (f" (`{role}`)" if instead else ""))
    return tensors[role]


def _finite_alpha(tensors: Mapping[str, torch.Tensor], rank: int, default: Callable[[int], float]) -> float:
    given = tensors.get(ALPHA)
    if given is not None and given.numel() != 1:
        raise ValueError(f"alpha has shape {list(given.shape)}, expected one number")
    alpha = default(rank) if given is None else float(given.float())
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}, expected a finite number")
    return alpha


def _on_meta(factor: Factor) -> Factor:
    return factor.to("meta") if isinstance(factor, torch.Tensor) else (factor[0].to("meta"), factor[1].to("meta"))
