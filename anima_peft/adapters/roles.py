"""What one tensor of an adapter file is to its module, and a module's tensors together as its factors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch

from .factors import (
    Factor,
    Factors,
    FullDelta,
    LinearFactors,
    LoHaFactors,
    LoKrFactors,
    LoraFactors,
    NormDelta,
    product,
    scaled_factor,
)

ALPHA = "alpha"
_DOWN, _UP, _MAGNITUDE = "down", "up", "DoRA magnitude"
_W1, _W2 = "lokr_w1", "lokr_w2"
_LOKR = tuple(f"{factor}{part}" for factor in (_W1, _W2) for part in ("", "_a", "_b"))
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_DIFFERENCE, _BIAS_DIFFERENCE = "diff", "diff_b"
_NORM, _NORM_BIAS = "w_norm", "b_norm"
ABSOLUTE, ABSOLUTE_BIAS = "norm weight", "norm bias"

_SUFFIXES = {
    ".lora_down.weight": _DOWN,
    ".lora_up.weight": _UP,
    ".lora_A.weight": _DOWN,
    ".lora_B.weight": _UP,
    ".dora_scale": _MAGNITUDE,
    ".lora_magnitude_vector": _MAGNITUDE,
    ".lora_magnitude_vector.weight": _MAGNITUDE,
    **{f".{role}": role for role in (*_LOKR, *_LOHA, _DIFFERENCE, _BIAS_DIFFERENCE, _NORM, _NORM_BIAS, ALPHA)},
}
_LORA_ROLES = frozenset((_DOWN, _UP, _MAGNITUDE))
_KINDS = {
    "LoRA": _LORA_ROLES,
    "LoKr": frozenset(_LOKR),
    "LoHa": frozenset(_LOHA),
    "a full difference": frozenset((_DIFFERENCE,)),
}
_NORM_ROLES = frozenset((_NORM, _NORM_BIAS, ABSOLUTE, ABSOLUTE_BIAS))
_MOST_ENTRIES = 2**27
"""Of a weight whose size is not known: small factors can declare one that no memory holds. Anima's have up to 2**24."""
_PACKED = {getattr(torch, "float4_e2m1fn_x2", None)}
"""Two numbers in a byte, which torch itself cannot convert."""
_MOST_AXES = 4
"""A linear's factors stored as those of a 1x1 convolution; torch itself goes up to 64."""
_LARGEST = torch.finfo(torch.float32).max
# PEFT puts an adapter's name between a parameter's name and what follows, and takes it away again when it saves.
_PEFT_INFIX = re.compile(
    r"\.(lora_A|lora_B|lora_magnitude_vector|lokr_w[12](?:_[ab])?|hada_w[12]_[ab])\.default(?=\.|$)"
)
_ABSOLUTE_NORM = re.compile(r"__anima_norm__\.(.+)\.(weight|bias)")


class Scales(Protocol):
    """What a file's config, rather than its tensors, says about one module's scale."""

    def alpha(self, rank: int) -> float:
        """The alpha where no tensor names one."""

    def full(self) -> float:
        """The scale of a LoKr whose factors are both full."""


def split_key(key: str) -> tuple[str, str | None]:
    """A key's module part and the role of its tensor, or None for a role that is not known."""
    absolute = _ABSOLUTE_NORM.fullmatch(key)
    if absolute:
        return absolute[1], ABSOLUTE if absolute[2] == "weight" else ABSOLUTE_BIAS
    key = _PEFT_INFIX.sub(r".\1", key)
    for suffix, role in _SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), role
    return key, None


def build_factors(
    tensors: Mapping[str, torch.Tensor],
    scales: Scales,
    *,
    is_norm: bool,
    shape: tuple[int, ...] | None,
    base: Mapping[str, torch.Tensor | None],
) -> Factors:
    """A module's factors out of its tensors.

    Args:
        tensors: role -> tensor.
        scales: what the file's config says.
        is_norm: whether the module is a norm, and not a linear layer.
        shape: of the module's weight: (out, in) of a linear, (width,) of a norm; None if it is not known.
        base: the module's own `weight` and `bias`, from which absolute norms are subtracted.

    Raises:
        ValueError: a factor is missing, misshapen, not finite, or does not belong to this kind of module.
    """
    roles = tensors.keys() - {ALPHA}
    for role in sorted(roles):
        if not tensors[role].is_floating_point() or tensors[role].dtype in _PACKED:
            raise ValueError(f"`{role}` has dtype {tensors[role].dtype}, expected floating point")
        if tensors[role].ndim > _MOST_AXES:
            raise ValueError(f"`{role}` has {tensors[role].ndim} axes, expected a matrix or a vector")
        if not tensors[role].float().isfinite().all():
            raise ValueError(f"`{role}` holds values that are not finite")
    if is_norm:
        return _norm(tensors, roles, shape, base)
    if roles & _NORM_ROLES:
        raise ValueError("it is not a norm, so it cannot carry a norm's delta")
    bias = tensors.get(_BIAS_DIFFERENCE)
    roles -= {_BIAS_DIFFERENCE}
    if bias is not None:
        _require_bias(bias, shape, base)
    kinds = [kind for kind, of_kind in _KINDS.items() if roles & of_kind]
    if len(kinds) > 1:
        if "LoRA" in kinds and roles & _LORA_ROLES == {_MAGNITUDE}:
            raise ValueError(f"DoRA is supported on LoRA, not on {kinds[-1]}")
        raise ValueError(f"it has parts of {' and of '.join(kinds)}")
    if not roles and bias is None:
        raise ValueError(f"it has an `{ALPHA}` and no factors")
    factors: LinearFactors
    if not roles or kinds == ["a full difference"]:
        factors = FullDelta(_difference(tensors, shape))
    elif kinds == ["LoRA"]:
        factors = _lora(tensors, shape, scales)
    else:
        factors = (_lokr if kinds == ["LoKr"] else _loha)(tensors, shape, scales)
    return replace(factors, bias=bias)


def _require_bias(bias: torch.Tensor, shape: tuple[int, ...] | None, base: Mapping[str, torch.Tensor | None]) -> None:
    if bias.ndim != 1 or (shape is not None and len(bias) != shape[0]):
        raise ValueError(
            f"a bias difference of shape {list(bias.shape)}, expected {[shape[0]] if shape else 'a vector'}"
        )
    if shape is not None and base["bias"] is None:
        raise ValueError("a bias difference, but the layer has no bias")


def _difference(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...] | None) -> torch.Tensor | None:
    weight = tensors.get(_DIFFERENCE)
    if weight is not None and (weight.ndim != 2 or (shape is not None and tuple(weight.shape) != shape)):
        raise ValueError(f"a full difference of {list(weight.shape)}, expected {list(shape) if shape else 'a matrix'}")
    return weight


def _require_size(out_features: int, in_features: int, shape: tuple[int, ...] | None) -> None:
    if shape is None and out_features * in_features > _MOST_ENTRIES:
        raise ValueError(f"factors for a {out_features}x{in_features} layer, which is larger than any of Anima's")
    if shape is not None and (out_features, in_features) != shape:
        raise ValueError(f"factors for a {out_features}x{in_features} layer, but it is {shape[0]}x{shape[1]}")


def _lora(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...] | None, scales: Scales) -> LoraFactors:
    down, up = _required(tensors, _DOWN), _required(tensors, _UP)
    if down.ndim == 4 and up.ndim == 4 and down.shape[2:] == up.shape[2:] == (1, 1):
        down, up = down.flatten(1), up.flatten(1)  # some writers store linears as 1x1 convolutions
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise ValueError(f"factors of shapes {list(down.shape)} and {list(up.shape)} do not multiply")
    _require_size(up.shape[0], down.shape[1], shape)
    magnitude = tensors.get(_MAGNITUDE)
    if magnitude is not None:
        if magnitude.numel() != up.shape[0]:
            # LyCORIS can also keep norms of columns; PEFT's layer knows those of rows only.
            raise ValueError(f"a DoRA magnitude of {list(magnitude.shape)}; supported is one number for each output")
        magnitude = magnitude.flatten()
    return LoraFactors(down, up, _finite_alpha(tensors, down.shape[0], scales), magnitude)


def _lokr(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...] | None, scales: Scales) -> LoKrFactors:
    w1, w2 = _lokr_factor(tensors, _W1), _lokr_factor(tensors, _W2)
    (a, c), (b, d) = (tuple(product(_on_meta(factor)).shape) for factor in (w1, w2))
    _require_size(a * b, c * d, shape)
    factors = LoKrFactors(w1, w2, alpha=0.0, dim=max(b, d))
    rank = factors.shape.rank
    if rank is not None:
        return LoKrFactors(w1, w2, _finite_alpha(tensors, rank, scales), rank)
    # Any alpha may stand beside full factors, and none of them counts; only PEFT's config scales them.
    scale = scales.full()
    if not abs(scale) <= _LARGEST:
        raise ValueError(f"its config scales it by {scale}")
    return LoKrFactors(w1 if scale == 1 else scaled_factor(w1, scale), w2, alpha=float(max(b, d)), dim=max(b, d))


def _loha(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...] | None, scales: Scales) -> LoHaFactors:
    w1, w2 = (_pair(tensors, name) for name in ("hada_w1", "hada_w2"))
    sizes = [(left.shape[0], right.shape[1], left.shape[1]) for left, right in (w1, w2)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"factors of sizes {list(sizes[0][:2])} and {list(sizes[1][:2])} (ranks {sizes[0][2]} and "
            f"{sizes[1][2]}), expected equal ones"
        )
    _require_size(*sizes[0][:2], shape)
    return LoHaFactors(w1, w2, _finite_alpha(tensors, sizes[0][2], scales))


def _lokr_factor(tensors: Mapping[str, torch.Tensor], name: str) -> Factor:
    low_rank = [tensors[role] for role in (f"{name}_a", f"{name}_b") if role in tensors]
    if name in tensors:
        if low_rank:
            raise ValueError(f"`{name}` is there both whole and as a low-rank pair")
        if tensors[name].ndim != 2 or 0 in tensors[name].shape:
            raise ValueError(f"`{name}` has shape {list(tensors[name].shape)}, expected a matrix")
        return tensors[name]
    return _pair(tensors, name)


def _pair(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = _required(tensors, f"{name}_a", name), _required(tensors, f"{name}_b", name)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0] or 0 in (*left.shape, *right.shape):
        raise ValueError(f"`{name}`'s parts of shapes {list(left.shape)} and {list(right.shape)} do not multiply")
    return left, right


def _norm(
    tensors: Mapping[str, torch.Tensor],
    roles: set[str],
    shape: tuple[int, ...] | None,
    base: Mapping[str, torch.Tensor | None],
) -> NormDelta:
    differences = {_DIFFERENCE, _BIAS_DIFFERENCE}
    if not roles <= _NORM_ROLES | differences or ALPHA in tensors:
        raise ValueError("it is a norm, which can carry `w_norm` and `b_norm` (or `diff` and `diff_b`) only")
    forms = [{_NORM, _NORM_BIAS}, differences, {ABSOLUTE, ABSOLUTE_BIAS}]
    present = [form for form in forms if roles & form]
    if len(present) > 1:
        raise ValueError(f"its delta is there in several forms: {', '.join(sorted(roles))}")
    parts = (_NORM, _NORM_BIAS) if forms[0] & roles else (_DIFFERENCE, _BIAS_DIFFERENCE)
    if forms[2] & roles:
        parts = (ABSOLUTE, ABSOLUTE_BIAS)
    weight, bias = _required(tensors, parts[0]), tensors.get(parts[1])
    for tensor in (weight, bias):
        if tensor is not None and (tensor.ndim != 1 or (shape is not None and tuple(tensor.shape) != shape)):
            raise ValueError(f"a norm's delta of shape {list(tensor.shape)}, expected {list(shape or ['width'])}")
    if bias is not None and shape is not None and base["bias"] is None:
        raise ValueError("a norm's bias, but this norm has none")
    if parts[0] == ABSOLUTE:
        return NormDelta(_minus_base(weight, base["weight"]), None if bias is None else _minus_base(bias, base["bias"]))
    return NormDelta(weight, bias)


def _minus_base(value: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    if base is None:
        raise ValueError("a norm's own value and not a difference: it can be understood only with the base model")
    return value.float() - base.detach().float().to(value.device)


def _required(tensors: Mapping[str, torch.Tensor], role: str, instead: str | None = None) -> torch.Tensor:
    if role not in tensors:
        raise ValueError(f"the `{instead or role}` factor is missing" + (f" (`{role}`)" if instead else ""))
    return tensors[role]


def _finite_alpha(tensors: Mapping[str, torch.Tensor], rank: int, scales: Scales) -> float:
    given = tensors.get(ALPHA)
    if given is not None and (given.numel() != 1 or given.ndim > _MOST_AXES):
        raise ValueError(f"alpha has shape {list(given.shape)[:8]}, expected one number")
    if given is not None and (given.is_complex() or given.dtype in _PACKED):
        raise ValueError(f"alpha has dtype {given.dtype}, expected a plain number")
    alpha = scales.alpha(rank) if given is None else float(given.float())
    if not abs(alpha) <= _LARGEST:
        raise ValueError(f"alpha is {alpha}, expected a finite number")
    return alpha


def _on_meta(factor: Factor) -> Factor:
    return factor.to("meta") if isinstance(factor, torch.Tensor) else (factor[0].to("meta"), factor[1].to("meta"))
