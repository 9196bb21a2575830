"""LoRA on Anima's components through PEFT: configuration, injection, and the factors as plain tensors."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key

from ..errors import InputError
from .naming import TEXT_CONDITIONER, TRANSFORMER, Components, ModuleName, ModuleTable
from .targets import ATTN_MLP, select_targets

_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
_SUPPORTED = frozenset((*_SETTINGS, "init_lora_weights", "task_type", "base_model_name_or_path", "revision"))
# The others that PEFT knows change the base's weights.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


@dataclass
class LoraConfig(peft.LoraConfig):
    """PEFT's `LoraConfig` with Anima's targets.

    `target_modules` takes a preset ("attn-mlp", the default, "attn-mlp-adaln", "all-linear") or a list of patterns
    (see `select_targets`). Rank, alpha, their patterns, dropout, rsLoRA and initialisation are PEFT's.

    Attributes:
        train_text_conditioner: adapt the text conditioner's layers too.
    """

    target_modules: list[str] | str | None = field(
        default=ATTN_MLP, metadata={"help": "Preset, or patterns of module names."}
    )
    train_text_conditioner: bool = field(default=False, metadata={"help": "Adapt the text conditioner's layers too."})


@dataclass(frozen=True)
class LoraFactors:
    """One module's LoRA: delta W = up @ down * alpha / rank (Hu et al. 2021, section 4.1; kohya's naming).

    Attributes:
        down: (rank, in_features).
        up: (out_features, rank).
        alpha: numerator of the scale; equal to the rank where a file names none.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


LoraWeights = Mapping[ModuleName, LoraFactors]


def component_configs(config: peft.LoraConfig, table: ModuleTable) -> dict[str, peft.LoraConfig]:
    """PEFT's plain config for each component, with the targets spelt out as module paths.

    Raises:
        InputError: a target pattern matches nothing, or a setting asks for more than two factors and a scale.
    """
    _require_supported(config)
    targets = select_targets(
        table,
        config.target_modules if config.target_modules is not None else ATTN_MLP,
        train_text_conditioner=getattr(config, "train_text_conditioner", False),
    )
    ranks = _resolve_pattern("rank_pattern", config.rank_pattern, targets)
    alphas = _resolve_pattern("alpha_pattern", config.alpha_pattern, targets)
    settings = {f.name: getattr(config, f.name) for f in fields(peft.LoraConfig) if f.init}
    return {
        component: peft.LoraConfig(
            **settings | {"target_modules": paths, "rank_pattern": ranks[component], "alpha_pattern": alphas[component]}
        )
        for component, paths in _paths_by_component(targets).items()
    }


def _resolve_pattern(
    option: str, pattern: Mapping[str, float], targets: Iterable[ModuleName]
) -> dict[str, dict[str, float]]:
    """PEFT's pattern, which may name modules natively too, spelt out for each component's own modules.

    Raises:
        InputError: a key is no regular expression, or matches none of the targets.
    """
    resolved: dict[str, dict[str, float]] = {TRANSFORMER: {}, TEXT_CONDITIONER: {}}
    used = set()
    for name in targets:
        for full in (name.path, name.native):
            try:
                key = get_pattern_key(list(pattern), full)
            except re.error as error:
                raise InputError(f"{option}: a key is not a regular expression: {error}") from error
            if key in pattern:
                resolved[name.component][f"^{name.path}"] = pattern[key]
                used.add(key)
                break
    unused = [key for key in pattern if key not in used]
    if unused:
        raise InputError(f"{option}: {', '.join(map(repr, unused))} matches none of the target modules.")
    return resolved


def _require_supported(config: peft.LoraConfig) -> None:
    """Refuse settings whose parameters or changed base weights no adapter file of ours would hold."""
    plain = peft.LoraConfig()
    faults = [
        f"{setting.name} is not supported"
        for setting in fields(peft.LoraConfig)
        if setting.name not in _SUPPORTED and getattr(config, setting.name) != getattr(plain, setting.name)
    ]
    if config.init_lora_weights not in _INITIALISATIONS:
        faults.append(f"init_lora_weights is {config.init_lora_weights!r}, expected one of {_INITIALISATIONS}")
    if faults:
        raise InputError.from_faults("The adapter's config cannot be used:", faults)


def file_configs(weights: LoraWeights) -> dict[str, peft.LoraConfig]:
    """PEFT configs that fit weights of a file: ranks and alphas may differ from module to module."""
    configs = {}
    for component, paths in _paths_by_component(weights).items():
        factors = {name.path: weights[name] for name in weights if name.component == component}
        rank = Counter(f.rank for f in factors.values()).most_common(1)[0][0]
        alpha = Counter(f.alpha for f in factors.values() if f.rank == rank).most_common(1)[0][0]
        # `^`: PEFT matches patterns at the end of a path otherwise (peft.utils.get_pattern_key).
        configs[component] = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=paths,
            rank_pattern={f"^{path}": f.rank for path, f in factors.items() if f.rank != rank},
            alpha_pattern={f"^{path}": f.alpha for path, f in factors.items() if f.alpha != alpha},
        )
    return configs


def inject(components: Components, configs: Mapping[str, peft.LoraConfig], adapter_name: str) -> None:
    """Put a new adapter that changes nothing yet (up = 0) on the configs' exact targets."""
    for component, config in configs.items():
        model = components[component]
        targets = len(config.target_modules)  # before: PEFT shortens long lists to suffixes in place
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # a second adapter is meant
            peft.inject_adapter_in_model(config, model, adapter_name)
        model._hf_peft_config_loaded = True  # type: ignore[assignment]  # read by diffusers' PeftAdapterMixin
        layers = [layer for _, layer in lora_layers(model, adapter_name)]
        assert len(layers) == targets, f"{len(layers)} layers for {targets} targets"
        for layer in layers:
            layer.train(model.training)  # a new dropout would act in a model that is in eval mode


def lora_layers(model: torch.nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """Path and layer of every module that carries `adapter_name`."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            yield path, module


def read_factors(components: Components, table: ModuleTable, adapter_name: str) -> dict[ModuleName, LoraFactors]:
    """The adapter's factors, detached, in the model's order. The strength set by `set_adapters` is not part of them."""
    by_name = {}
    for component, model in components.items():
        for path, layer in lora_layers(model, adapter_name):
            by_name[table.by_diffusers[f"{component}.{path}"]] = _factors_of(layer, adapter_name)
    return by_name


def _factors_of(layer: LoraLayer, adapter_name: str) -> LoraFactors:
    alpha = float(layer.lora_alpha[adapter_name])
    if layer.use_rslora.get(adapter_name, False):
        alpha *= layer.r[adapter_name] ** 0.5  # scale = alpha / sqrt(rank), written as alpha' / rank
    return LoraFactors(layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach(), alpha)


def relative_delta(components: Components, adapter_name: str) -> float:
    """|delta W| / |W|, Frobenius norms over all layers of the adapter: zero before training, about 1e-2 after it."""
    delta = weight = 0.0
    for model in components.values():
        for _, layer in lora_layers(model, adapter_name):
            factors = _factors_of(layer, adapter_name)
            down, up = factors.down.double(), factors.up.double()
            # |up @ down|^2 = trace((up' up) (down down')): rank x rank instead of out x in
            gram = (up.T @ up) * (down @ down.T)
            delta += float(gram.sum()) * factors.scale**2
            weight += float(layer.get_base_layer().weight.detach().float().square().sum())
    return (delta / weight) ** 0.5 if weight else 0.0


def write_factors(components: Components, weights: LoraWeights, adapter_name: str) -> None:
    """Copy factors into an injected adapter, in the dtype the adapter's parameters have."""
    with torch.no_grad():
        for name, factors in weights.items():
            layer = components[name.component].get_submodule(name.path)
            assert isinstance(layer, LoraLayer)
            layer.lora_A[adapter_name].weight.copy_(factors.down)
            layer.lora_B[adapter_name].weight.copy_(factors.up)


def _paths_by_component(names: Mapping[ModuleName, object] | list[ModuleName]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(name.component, []).append(name.path)
    return grouped
