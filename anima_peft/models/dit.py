"""The DiT and its text conditioner from one checkpoint file, sized by the weights themselves."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

from ..errors import InputError
from .checkpoints import (
    Checkpoint,
    Sizes,
    build_empty,
    count_numbers,
    guess_content,
    load_weights,
    read_header,
    require_fit,
)
from .compat import ensure_cosmos_without_torchvision
from .names import CONDITIONER_PREFIX, native_to_diffusers
from .precision import set_qk_norm_eps

PREFIXES = ("net.", "model.diffusion_model.", "")
"""What stands before the native names: the authors' files, ComfyUI's checkpoints, bare ones."""

_ANCHOR = "x_embedder.proj.1.weight"
_IGNORED_SUFFIXES = (".comfy_quant", "_extra_state")
_IGNORED_PREFIX = "pos_embedder."

# Constants of the family that no weight tells (Cosmos-Predict2 2B image model; the authors' inference code).
_DIT_CONSTANTS: dict[str, Any] = {
    "max_size": (128, 240, 240),
    "patch_size": (1, 2, 2),
    "rope_scale": (1.0, 4.0, 4.0),
    "concat_padding_mask": True,
    "extra_pos_embed_type": None,
}
_PATCH_AREA = 4
_MIN_SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class DitFile:
    """A checkpoint that was found to be Anima's, before its weights are read.

    Attributes:
        checkpoint: its header.
        transformer, conditioner: the stock models on the meta device.
        transformer_keys, conditioner_keys: the models' state-dict names -> keys in the file.
    """

    checkpoint: Checkpoint
    transformer: CosmosTransformer3DModel
    conditioner: AnimaTextConditioner
    transformer_keys: Mapping[str, str]
    conditioner_keys: Mapping[str, str]


def load_dit(
    path: str | os.PathLike[str], torch_dtype: torch.dtype | None = None
) -> tuple[CosmosTransformer3DModel, AnimaTextConditioner]:
    """Load DiT and conditioner from the single file that ComfyUI users have.

    Args:
        path: safetensors with native names, below `net.`, `model.diffusion_model.` or nothing.
        torch_dtype: dtype of all weights; None keeps the file's.

    Returns:
        The two stock diffusers models on the CPU, in eval mode, frozen, with the q/k norms' eps at 1e-6.

    Raises:
        InputError: not an Anima checkpoint, or a key is missing, unexpected or misshapen.
    """
    file = open_dit(path)
    load_weights(file.transformer, file.checkpoint, file.transformer_keys, torch_dtype)
    load_weights(file.conditioner, file.checkpoint, file.conditioner_keys, torch_dtype)
    set_qk_norm_eps(file.transformer)
    return file.transformer, file.conditioner


def open_dit(path: str | os.PathLike[str]) -> DitFile:
    """Check a single file's keys and shapes as `load_dit` does, and read no weights.

    Raises:
        InputError: not an Anima checkpoint, or a key is missing, unexpected or misshapen.
    """
    ensure_cosmos_without_torchvision()
    checkpoint = read_header(path)
    prefix = _prefix_of(checkpoint)
    native = {
        key: shape
        for key, shape in checkpoint.with_prefix(prefix).items()
        if not key.endswith(_IGNORED_SUFFIXES) and not key.startswith(_IGNORED_PREFIX)
    }
    in_conditioner = {
        key.removeprefix(CONDITIONER_PREFIX): shape
        for key, shape in native.items()
        if key.startswith(CONDITIONER_PREFIX)
    }
    in_dit = {key: shape for key, shape in native.items() if not key.startswith(CONDITIONER_PREFIX)}
    if not in_conditioner:
        raise InputError(
            f"{path}: has no `{CONDITIONER_PREFIX}*` weights (the text conditioner). A plain Cosmos-Predict2 DiT is "
            "not an Anima model; use a checkpoint that contains both, as published by Anima's authors."
        )
    dit_config, conditioner_config = dit_sizes(in_dit, path), conditioner_sizes(in_conditioner, path)

    modules = native_to_diffusers(dit_config["num_layers"])
    weights = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in modules.items()}
    foreign = [key for key in checkpoint.shapes if not key.startswith(prefix)]
    surplus = [f"{prefix}{key}" for key in in_dit if key not in weights] + foreign

    transformer = build_empty(lambda: CosmosTransformer3DModel(**dit_config))
    keys = {ours: prefix + theirs for theirs, ours in weights.items()}
    require_fit(transformer, checkpoint, keys, surplus=surplus, what="the Anima DiT")

    conditioner = build_empty(lambda: AnimaTextConditioner(**conditioner_config))
    conditioner_keys = {key: prefix + CONDITIONER_PREFIX + key for key in conditioner.state_dict()}
    surplus = [prefix + CONDITIONER_PREFIX + key for key in in_conditioner if key not in conditioner_keys]
    require_fit(conditioner, checkpoint, conditioner_keys, surplus=surplus, what="the Anima text conditioner")

    return DitFile(checkpoint, transformer, conditioner, keys, conditioner_keys)


def _prefix_of(checkpoint: Checkpoint) -> str:
    for prefix in PREFIXES:
        if prefix + _ANCHOR in checkpoint.shapes:
            return prefix
    raise InputError(
        f"{checkpoint.path}: not an Anima transformer; it looks like {guess_content(checkpoint.shapes)}. "
        f"Expected a checkpoint with the key `{_ANCHOR}` (alone or after `net.` or `model.diffusion_model.`)."
    )


def dit_sizes(shapes: dict[str, tuple[int, ...]], path: str | os.PathLike[str]) -> dict[str, Any]:
    """`CosmosTransformer3DModel`'s arguments for native keys and shapes (without prefix)."""
    size = Sizes(shapes, path)
    hidden = size(_ANCHOR, 0)
    head_dim = size("blocks.0.self_attn.q_norm.weight", 0, rank=1)
    if hidden % head_dim or head_dim < 12:  # below 12, the rotary split of the head leaves no frequencies
        raise InputError(f"{path}: hidden size {hidden} and head size {head_dim} do not belong together.")
    return _DIT_CONSTANTS | {
        "in_channels": size(_ANCHOR, 1) // _PATCH_AREA - 1,  # one channel is the padding mask
        "out_channels": size("final_layer.linear.weight", 0) // _PATCH_AREA,
        "num_attention_heads": hidden // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": count_numbers(shapes, "blocks.", path),
        "mlp_ratio": _mlp_ratio(size("blocks.0.mlp.layer1.weight", 0), hidden),
        "text_embed_dim": size("blocks.0.cross_attn.k_proj.weight", 1),
        "adaln_lora_dim": size("blocks.0.adaln_modulation_self_attn.1.weight", 0),
    }


def conditioner_sizes(shapes: dict[str, tuple[int, ...]], path: str | os.PathLike[str]) -> dict[str, Any]:
    """`AnimaTextConditioner`'s arguments for its keys and shapes (without `llm_adapter.`)."""
    size = Sizes(shapes, path)
    model_dim = size("blocks.0.cross_attn.q_proj.weight", 1)
    inner_dim = size("blocks.0.cross_attn.q_proj.weight", 0)
    head_dim = size("blocks.0.cross_attn.q_norm.weight", 0, rank=1)
    if inner_dim % head_dim:
        raise InputError(
            f"{path}: the conditioner's attention size {inner_dim} and head size {head_dim} do not belong together."
        )
    return {
        "source_dim": size("blocks.0.cross_attn.k_proj.weight", 1),
        "target_dim": size("embed.weight", 1),
        "model_dim": model_dim,
        "num_layers": count_numbers(shapes, "blocks.", path),
        "num_attention_heads": inner_dim // head_dim,
        "mlp_ratio": _mlp_ratio(size("blocks.0.mlp.0.weight", 0), model_dim),
        "target_vocab_size": size("embed.weight", 0),
        "use_self_attention": "blocks.0.self_attn.q_proj.weight" in shapes,
        "use_layer_norm": "blocks.0.norm_mlp.bias" in shapes,
        "min_sequence_length": _MIN_SEQUENCE_LENGTH,
    }


def _mlp_ratio(inner: int, width: int) -> float:
    """The number that diffusers' `int(width * ratio)` turns back into `inner`, also where the quotient rounds down."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)
