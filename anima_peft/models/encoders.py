"""The text encoder (Qwen3) and the VAE (Qwen-Image), from the single files or folders people have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from transformers import Qwen3Config, Qwen3Model

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
from .folders import cannot_load, check_part, load_part
from .part_configs import CONFIG_ERRORS

# Constants of Qwen3-0.6B-Base that no weight tells (its config.json on the hub).
_QWEN_CONSTANTS: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_LATENT_CHANNELS = 16

Fitted = tuple[Any, Checkpoint, dict[str, str]]
"""An empty model, the header of the file that fits it, and the model's names -> the file's keys."""


def load_text_encoder(path: str | Path, torch_dtype: torch.dtype | None = None) -> Qwen3Model:
    """Load Qwen3 from a Hugging Face model folder or from a single safetensors file.

    Args:
        path: folder with `config.json`, or a file with keys `model.…` or bare ones (an `lm_head` is left out).
        torch_dtype: dtype of all weights; None keeps the file's.

    Returns:
        The encoder on the CPU, frozen, in eval mode.

    Raises:
        InputError: nothing there, another model, or a key is missing, unexpected or misshapen.
    """
    path = Path(path)
    if path.is_dir():
        check_part(path, "text_encoder")
        try:
            encoder = Qwen3Model.from_pretrained(
                path, dtype=torch_dtype or "auto", use_safetensors=True, local_files_only=True
            )
        except CONFIG_ERRORS as error:
            raise cannot_load(path, error) from error
        return encoder.requires_grad_(False).eval()
    return _load(_fit_text_encoder(path), torch_dtype)


def load_vae(path: str | Path, torch_dtype: torch.dtype | None = None) -> AutoencoderKLQwenImage:
    """Load the VAE from a diffusers folder or from a single file in Wan's or diffusers' layout.

    The per-channel mean and std of the latents come from diffusers' class (single file) or the folder's config.

    Args:
        path: folder with `config.json`, or a safetensors file.
        torch_dtype: dtype of all weights; None keeps the file's, and means float32 for a folder, as in diffusers.

    Returns:
        The VAE on the CPU, frozen, in eval mode.

    Raises:
        InputError: nothing there, another model, or a key is missing, unexpected or misshapen.
    """
    path = Path(path)
    return load_part(path, "vae", torch_dtype) if path.is_dir() else _load(_fit_vae(path), torch_dtype)


def check_encoders(text_encoder: Path, vae: Path) -> None:
    """Look at the headers of both models' files, in a moment, so that a wrong one is found before hours of work.

    Raises:
        InputError: what `load_text_encoder` or `load_vae` would refuse; both are reported together.
    """
    faults = []
    for path, part, fit in ((text_encoder, "text_encoder", _fit_text_encoder), (vae, "vae", _fit_vae)):
        try:
            check_part(path, part) if path.is_dir() else fit(path)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))


def _load(fitted: Fitted, torch_dtype: torch.dtype | None) -> Any:
    model, checkpoint, keys = fitted
    load_weights(model, checkpoint, keys, torch_dtype)
    return model


def _fit_text_encoder(path: Path) -> Fitted:
    checkpoint = read_header(path)
    prefix = "model." if "model.embed_tokens.weight" in checkpoint.shapes else ""
    if prefix + "embed_tokens.weight" not in checkpoint.shapes:
        raise InputError(
            f"{path}: not a Qwen3 text encoder; it looks like {guess_content(checkpoint.shapes)}. "
            "Expected a checkpoint such as qwen_3_06b_base.safetensors, or a Qwen3 folder with config.json."
        )
    config = _qwen_config(checkpoint, prefix)
    encoder = build_empty(lambda: Qwen3Model(config))
    keys = {name: prefix + name for name in encoder.state_dict()}
    surplus = [key for key in checkpoint.shapes.keys() - keys.values() if key != "lm_head.weight"]
    require_fit(encoder, checkpoint, keys, surplus=surplus, what="the Qwen3 text encoder")
    return encoder, checkpoint, keys


def _fit_vae(path: Path) -> Fitted:
    checkpoint = read_header(path)
    # Wan's names are mapped by diffusers' own table; the "weights" given to it are the names themselves.
    original = {key: key for key in checkpoint.shapes}
    try:
        keys = convert_wan_vae_to_diffusers(original) if "conv1.weight" in checkpoint.shapes else original
    except ValueError:  # a block that has no number
        keys = original
    if len(checkpoint.shapes.get(keys.get("encoder.conv_in.weight", ""), ())) != 5 or "quant_conv.weight" not in keys:
        raise InputError(
            f"{path}: not the Qwen-Image VAE; it looks like {guess_content(checkpoint.shapes)}. "
            "Expected a checkpoint such as qwen_image_vae.safetensors."
        )
    resnets = count_numbers(keys, "decoder.up_blocks.0.resnets.", path)
    vae = build_empty(
        lambda: AutoencoderKLQwenImage(
            base_dim=checkpoint.shapes[keys["encoder.conv_in.weight"]][0],
            z_dim=_LATENT_CHANNELS,
            num_res_blocks=max(resnets - 1, 0),
        )
    )
    surplus = checkpoint.shapes.keys() - keys.values()  # two names for one weight
    require_fit(vae, checkpoint, keys, surplus=surplus, what="the Qwen-Image VAE")
    return vae, checkpoint, keys


def _qwen_config(checkpoint: Checkpoint, prefix: str) -> Qwen3Config:
    size = Sizes(checkpoint.shapes, checkpoint.path, prefix)
    layers = count_numbers(checkpoint.with_prefix(prefix), "layers.", checkpoint.path)
    head_dim = size("layers.0.self_attn.q_norm.weight", 0, rank=1)
    return Qwen3Config(
        **_QWEN_CONSTANTS,
        vocab_size=size("embed_tokens.weight", 0),
        hidden_size=size("embed_tokens.weight", 1),
        intermediate_size=size("layers.0.mlp.gate_proj.weight", 0),
        num_hidden_layers=layers,
        num_attention_heads=size("layers.0.self_attn.q_proj.weight", 0) // head_dim,
        num_key_value_heads=size("layers.0.self_attn.k_proj.weight", 0) // head_dim,
        head_dim=head_dim,
    )
