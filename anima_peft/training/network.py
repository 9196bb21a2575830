"""From the options to the adapter that is trained, and to the model that it is trained on."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.exchange import merge_adapter, parse_source, start_from
from ..adapters.factors import LoKrFactors, LoraFactors, Weights
from ..adapters.lokr import LoKrConfig
from ..adapters.lora import LoraConfig
from ..adapters.naming import TRANSFORMER, ModuleName, ModuleTable
from ..adapters.sources import locate_adapter
from ..adapters.targets import first_matches, select_targets
from ..data.cache import FileIndex, cache_key
from ..errors import InputError
from ..models.quantization import quantize_dit
from ..models.sources import ModelSources, resolve_sources
from ..transformer import AnimaTransformerModel
from .block_swap import require_swappable
from .state import ADAPTER_NAME

if TYPE_CHECKING:
    from ..config import TrainOptions

logger = logging.getLogger(__name__)


def locate_sources(options: TrainOptions) -> ModelSources:
    """Where each part of the model is; what the tokenizers' folders lack is fetched.

    Raises:
        InputError: a part is missing, or cannot be fetched.
    """
    model = options.model
    return resolve_sources(
        model.anima_transformer,
        vae=model.vae,
        qwen=model.qwen,
        qwen_tokenizer_dir=model.qwen_tokenizer_dir,
        t5_tokenizer_dir=model.t5_tokenizer_dir,
        qwen_tokenizer_sources=model.qwen_tokenizer_sources,
        t5_tokenizer_sources=model.t5_tokenizer_sources,
    )


def require_weights(options: TrainOptions) -> None:
    """Refuse adapter files that are not there, before anything is loaded.

    Raises:
        InputError: a file of `network_weights` or `base_weights` is missing.
    """
    for file in (options.network.network_weights, *options.network.base_weights):
        if file is not None:
            locate_adapter(file)


def hash_merged(options: TrainOptions, index: FileIndex) -> str:
    """What identifies the adapters that are merged into the base; nothing where there are none."""
    merged = [(index.hash(locate_adapter(file)), strength) for file, strength in options.network.merged_weights]
    return cache_key(merged=merged) if merged else ""


def load_base(path: Path, options: TrainOptions, dtype: torch.dtype, device: torch.device) -> AnimaTransformerModel:
    """The model that is trained on, on the CPU: what is merged is merged before anything is quantized.

    Args:
        path: the model's file or folder.
        device: where weights are quantized.

    Raises:
        InputError: the model cannot be loaded or has too few blocks to swap, or a file of `base_weights` is no adapter
            for it.
    """
    model = AnimaTransformerModel.from_pretrained(path, torch_dtype=dtype)
    require_swappable(model.transformer, options.memory.blocks_to_swap)
    merge_base_weights(model, options)
    if options.memory.base_quantization != "none":
        model.transformer = quantize_dit(model.transformer, options.memory.base_quantization, device)
    return model


def merge_base_weights(model: AnimaTransformerModel, options: TrainOptions) -> None:
    """Merge `base_weights` into the model.

    Raises:
        InputError: a file is no adapter for this model.
    """
    for file, strength in options.network.merged_weights:
        merge_adapter(model.components, file, strength)
        logger.warning("Merged %s into the model with strength %g.", file, strength)


def add_network(model: AnimaTransformerModel, options: TrainOptions) -> list[torch.nn.Parameter]:
    """Put the adapter that the options describe on the model; returns its parameters, all float32.

    Raises:
        InputError: a pattern matches nothing, or `network_weights` does not fit.
    """
    network = options.network
    shared: dict[str, Any] = {
        "r": network.network_dim,
        **(_layers_of_file(model, options) if network.dim_from_weights else _layers(model, options)),
        "rank_dropout": network.rank_dropout,
        "module_dropout": network.module_dropout,
        "train_norm": network.train_norm,
        "train_text_conditioner": options.trains_conditioner,
    }
    config: LoraConfig | LoKrConfig
    if network.is_lokr:
        config = LoKrConfig(
            alpha=network.network_alpha,
            decompose_factor=network.lokr_factor,
            full_matrix=network.lokr_full_matrix,
            decompose_both=network.lokr_decompose_both,
            **shared,
        )
    else:
        config = LoraConfig(
            lora_alpha=network.network_alpha, lora_dropout=network.network_dropout, use_dora=network.use_dora, **shared
        )
    parameters = model.add_adapter(config, ADAPTER_NAME)
    if network.network_weights is not None:
        logger.warning(start_from(model.components, network.network_weights, ADAPTER_NAME))
    return parameters


def _layers(model: AnimaTransformerModel, options: TrainOptions) -> dict[str, Any]:
    """The layers that the options name, with the ranks that differ from `network_dim`."""
    network = options.network
    layers: dict[str, Any] = {
        "target_modules": list(network.target_modules),
        "exclude_modules": list(network.exclude_patterns) or None,
        "include_modules": list(network.include_patterns) or None,
    }
    if not network.network_reg_dims:
        return layers
    targets = select_targets(
        ModuleTable(model.components),
        network.target_modules,
        train_text_conditioner=options.trains_conditioner,
        exclude=network.exclude_patterns,
        include=network.include_patterns,
    )
    found = first_matches("network_reg_dims", network.dims_by_pattern, targets)
    return layers | {"rank_pattern": {_exactly(name): int(rank) for name, (_, rank) in found.items()}}


def _layers_of_file(model: AnimaTransformerModel, options: TrainOptions) -> dict[str, Any]:
    """The layers of `network_weights` with their ranks and alphas."""
    assert options.network.network_weights is not None
    weights, source = parse_source(model.components, options.network.network_weights)
    linears = _linears(weights, with_conditioner=options.trains_conditioner)
    if not linears:
        raise InputError(f"dim_from_weights: {source} holds no layer that this run would train.")
    return {
        "target_modules": [re.escape(name.native) for name in linears],
        "rank_pattern": {_exactly(name): rank for name, (rank, _) in linears.items()},
        "alpha_pattern": {_exactly(name): alpha for name, (_, alpha) in linears.items()},
    }


def _linears(weights: Weights, *, with_conditioner: bool) -> Mapping[ModuleName, tuple[int, float]]:
    found = {}
    for name, factors in weights.items():
        if name.component != TRANSFORMER and not with_conditioner:
            continue
        if isinstance(factors, LoraFactors):
            found[name] = (factors.rank, factors.alpha)
        elif isinstance(factors, LoKrFactors):
            found[name] = (factors.dim, factors.alpha)
    return found


def _exactly(name: ModuleName) -> str:
    """A key of PEFT's patterns for this module alone: the conditioner's paths are native names of the transformer."""
    return "^" + re.escape(name.path if name.component == TRANSFORMER else name.native)
