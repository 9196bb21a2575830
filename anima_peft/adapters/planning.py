"""Which layers an adapter needs on each component, from a config or from a file."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import peft
from peft.utils.other import get_pattern_key

from ..errors import InputError
from .factors import Factors, FullDelta, LoHaFactors, LoKrFactors, LoKrShape, LoraFactors, NormDelta, Weights
from .lokr import plan_shape
from .naming import ModuleName, ModuleTable
from .targets import ATTN_MLP, select_targets

logger = logging.getLogger(__name__)

_COMMON = (
    "r",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "task_type",
    "base_model_name_or_path",
    "revision",
)
_SUPPORTED = {
    peft.LoraConfig: (*_COMMON, "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"),
    peft.LoKrConfig: (
        *_COMMON,
        "alpha",
        "rank_dropout",
        "rank_dropout_scale",
        "module_dropout",
        "decompose_both",
        "decompose_factor",
    ),
}
# The others that PEFT knows change the base's weights.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class LoKrSettings:
    """What one linear's LoKr is made with: `r` and `alpha` as configured, and the factors' shape."""

    r: int
    alpha: float
    shape: LoKrShape


@dataclass(frozen=True)
class Parts:
    """Which parameters of a layer get a delta of their own shape; bias None: if the layer has one."""

    weight: bool = True
    bias: bool | None = None


@dataclass(frozen=True)
class Plan:
    """What one adapter puts on one component.

    Attributes:
        config: PEFT's plain config, kept on the component. A `LoraConfig` names the linears that get LoRA.
        lokr: path -> settings of the linears that get LoKr.
        loha: path -> rank and alpha of the linears that get LoHa.
        deltas: path -> parts of the norms and linears that get a delta of the parameter's own shape.
    """

    config: peft.PeftConfig
    lokr: Mapping[str, LoKrSettings] = field(default_factory=dict)
    loha: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    deltas: Mapping[str, Parts] = field(default_factory=dict)


def plan_training(config: peft.LoraConfig | peft.LoKrConfig, table: ModuleTable) -> dict[str, Plan]:
    """The layers that a config asks for, by component, with the targets spelt out as module paths.

    A rank of 0 in `rank_pattern` takes a layer out.

    Raises:
        InputError: a target or pattern matches nothing, or a setting asks for what no adapter file can hold.
    """
    _require_supported(config)
    with_conditioner = getattr(config, "train_text_conditioner", False)
    targets = select_targets(
        table,
        config.target_modules if config.target_modules is not None else ATTN_MLP,
        train_text_conditioner=with_conditioner,
        exclude=config.exclude_modules,
        include=getattr(config, "include_modules", None),
    )
    if any(not name.path for name in targets):
        raise InputError(
            "the module itself is a linear layer and cannot be replaced; wrap it in a torch.nn.Sequential."
        )
    ranks = _resolve_pattern("rank_pattern", config.rank_pattern, targets)
    alphas = _resolve_pattern("alpha_pattern", config.alpha_pattern, targets)
    targets = [name for name in targets if ranks.get(name.component, {}).get(f"^{name.path}") != 0]
    if not targets:
        raise InputError("rank_pattern: rank 0 leaves no layer to adapt.")
    components = list(dict.fromkeys(name.component for name in targets))
    with_norms = getattr(config, "train_norm", False)
    norms = [name for name in table.norms if with_norms and name.component in components]
    plans = {}
    for component in components:
        names = [name for name in targets if name.component == component]
        deltas = {name.path: Parts() for name in norms if name.component == component}
        if isinstance(config, peft.LoraConfig):
            plain = _plain(config, [name.path for name in names], ranks.get(component, {}), alphas.get(component, {}))
            plan = Plan(plain, deltas=deltas)
        else:
            settings = {
                name.path: _lokr_settings(config, table, name, ranks.get(component, {}), alphas.get(component, {}))
                for name in names
            }
            plan = Plan(_lokr_config(config, settings), settings, deltas=deltas)
        plans[component] = plan
    return plans


def plan_file(weights: Weights) -> dict[str, Plan]:
    """The layers that fit weights of a file: ranks, alphas and kinds may differ from module to module."""
    plans = {}
    for component in dict.fromkeys(name.component for name in weights):
        of_component = {name.path: factors for name, factors in weights.items() if name.component == component}
        lora = {path: factors for path, factors in of_component.items() if isinstance(factors, LoraFactors)}
        lokr = {
            path: LoKrSettings(factors.dim, factors.alpha, factors.shape)
            for path, factors in of_component.items()
            if isinstance(factors, LoKrFactors)
        }
        loha = {
            path: (factors.rank, factors.alpha)
            for path, factors in of_component.items()
            if isinstance(factors, LoHaFactors)
        }
        deltas = {path: _parts(factors) for path, factors in of_component.items() if _parts(factors) is not None}
        plans[component] = Plan(_file_config(lora, lokr, loha), lokr, loha, deltas)  # type: ignore[arg-type]
    return plans


def _parts(factors: Factors) -> Parts | None:
    """What of a module's factors is a delta of a parameter's own shape."""
    if isinstance(factors, (NormDelta, FullDelta)):
        return Parts(factors.weight is not None, factors.bias is not None)
    return Parts(weight=False, bias=True) if factors.bias is not None else None


def _file_config(
    lora: Mapping[str, LoraFactors], lokr: Mapping[str, LoKrSettings], loha: Mapping[str, tuple[int, float]]
) -> peft.PeftConfig:
    """The config that is kept on the component, of the first kind that there is."""
    if lora:
        return lora_file_config(lora)
    if lokr:
        return _lokr_config(peft.LoKrConfig(target_modules=[]), lokr)
    if loha:
        (rank, alpha), _ = Counter(loha.values()).most_common(1)[0]
        others = {path: values for path, values in loha.items() if values != (rank, alpha)}
        return peft.LoHaConfig(
            r=rank,
            alpha=alpha,
            target_modules=list(loha),
            rank_pattern={f"^{path}": values[0] for path, values in others.items()},
            alpha_pattern={f"^{path}": values[1] for path, values in others.items()},
        )
    return peft.LoraConfig(target_modules=[])


def lora_file_config(factors: Mapping[str, LoraFactors]) -> peft.LoraConfig:
    """PEFT's config for LoRA factors of one component, by path."""
    rank = Counter(f.rank for f in factors.values()).most_common(1)[0][0]
    alpha = Counter(f.alpha for f in factors.values() if f.rank == rank).most_common(1)[0][0]
    # `^`: PEFT matches patterns at the end of a path otherwise (peft.utils.get_pattern_key).
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(factors),
        rank_pattern={f"^{path}": f.rank for path, f in factors.items() if f.rank != rank},
        alpha_pattern={f"^{path}": f.alpha for path, f in factors.items() if f.alpha != alpha},
        use_dora=any(f.magnitude is not None for f in factors.values()),
    )


def _plain(
    config: peft.LoraConfig, paths: list[str], ranks: Mapping[str, float], alphas: Mapping[str, float]
) -> peft.LoraConfig:
    """PEFT's own config without our additions, so that stock diffusers can read what it finds on the model."""
    settings = {f.name: getattr(config, f.name) for f in fields(peft.LoraConfig) if f.init}
    exact = {
        "target_modules": paths,
        "exclude_modules": None,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank},
        "alpha_pattern": dict(alphas),
    }
    return peft.LoraConfig(**settings | exact)


def _lokr_settings(
    config: peft.LoKrConfig, table: ModuleTable, name: ModuleName, ranks: Mapping[str, Any], alphas: Mapping[str, Any]
) -> LoKrSettings:
    path, shape = name.path, table.shape(name)
    assert shape is not None
    rank = ranks.get(f"^{path}", config.r)
    planned = plan_shape(
        shape[0],
        shape[1],
        rank=rank,
        factor=config.decompose_factor,
        full_matrix=getattr(config, "full_matrix", False),
        decompose_both=config.decompose_both,
    )
    return LoKrSettings(rank, alphas.get(f"^{path}", config.alpha), planned)


def _lokr_config(config: peft.LoKrConfig, settings: Mapping[str, LoKrSettings]) -> peft.LoKrConfig:
    """PEFT's plain config, with alpha = r wherever nothing is scaled: stock diffusers divides one by the other."""
    scaled = [s for s in settings.values() if s.shape.rank is not None]
    common = Counter((s.r, s.alpha) for s in scaled or settings.values()).most_common(1)
    r, alpha = common[0][0] if common else (config.r, config.alpha)
    full_rank = {path: max(s.shape.b, s.shape.d) for path, s in settings.items() if s.shape.rank is None}
    others = {path: s for path, s in settings.items() if s.shape.rank is not None and (s.r, s.alpha) != (r, alpha)}
    if not scaled and full_rank:
        r = alpha = max(full_rank.values())
    return peft.LoKrConfig(
        r=r,
        alpha=alpha,
        target_modules=list(settings),
        rank_dropout=config.rank_dropout,
        rank_dropout_scale=config.rank_dropout_scale,
        module_dropout=config.module_dropout,
        decompose_both=any(s.shape.rank1 is not None for s in settings.values()),
        decompose_factor=config.decompose_factor,
        rank_pattern={f"^{path}": rank for path, rank in full_rank.items() if rank != r}
        | {f"^{path}": s.r for path, s in others.items()},
        alpha_pattern={f"^{path}": rank for path, rank in full_rank.items() if rank != alpha}
        | {f"^{path}": s.alpha for path, s in others.items()},
        init_weights="lycoris",
    )


def announce_full_matrices(config: peft.PeftConfig, plans: Mapping[str, Plan]) -> None:
    """Say once where LoKr's rank and alpha, or its second decomposition, come to nothing."""
    if not isinstance(config, peft.LoKrConfig):
        return
    shapes = Counter(settings.shape for plan in plans.values() for settings in plan.lokr.values())
    if all(shape.rank is None for shape in shapes):
        text = ", ".join(f"{n} x (w1 {s.a}x{s.c}, w2 {s.b}x{s.d})" for s, n in shapes.items())
        logger.warning("LoKr with full matrices (rank and alpha scale nothing): %s.", text)
    if config.decompose_both and all(shape.rank1 is None for shape in shapes):
        logger.warning("decompose_both changes nothing: rank %d is not below half of any smaller factor.", config.r)


def _resolve_pattern(
    option: str, pattern: Mapping[str, float] | None, targets: Iterable[ModuleName]
) -> dict[str, dict[str, float]]:
    """PEFT's pattern, which may name modules natively too, spelt out for each component's own modules.

    Raises:
        InputError: a key is no regular expression, or matches none of the targets.
    """
    pattern = pattern or {}
    resolved: dict[str, dict[str, float]] = {}
    used = set()
    for name in targets:
        for full in (name.path, name.native):
            try:
                key = get_pattern_key(list(pattern), full)
            except re.error as error:
                raise InputError(f"{option}: a key is not a regular expression: {error}") from error
            if key in pattern:
                resolved.setdefault(name.component, {})[f"^{name.path}"] = pattern[key]
                used.add(key)
                break
    unused = [key for key in pattern if key not in used]
    if unused:
        raise InputError(f"{option}: {', '.join(map(repr, unused))} matches none of the target modules.")
    return resolved


def _require_supported(config: peft.LoraConfig | peft.LoKrConfig) -> None:
    """Refuse settings whose parameters or changed base weights no adapter file of ours would hold."""
    stock: Any = peft.LoraConfig if isinstance(config, peft.LoraConfig) else peft.LoKrConfig
    plain = stock()
    faults = [
        f"{setting.name} is not supported"
        for setting in fields(stock)
        if setting.name not in _SUPPORTED[stock] and getattr(config, setting.name) != getattr(plain, setting.name)
    ]
    if isinstance(config, peft.LoraConfig) and config.init_lora_weights not in _INITIALISATIONS:
        faults.append(f"init_lora_weights is {config.init_lora_weights!r}, expected one of {_INITIALISATIONS}")
    if faults:
        raise InputError.from_faults("The adapter's config cannot be used:", faults)
