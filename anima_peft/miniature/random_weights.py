"""A small Anima with random weights, in the layout of the real one, written in a second: what tests run on.

Same classes, same three files, same key names, small tokenizers of the same classes, and a few drawn pictures with
captions: whatever runs on this runs on the real model, without a download or a GPU.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import torch
from diffusers import AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model, T5TokenizerFast

from ..files import save_tensors
from ..models.compat import ensure_cosmos_without_torchvision
from ..models.names import CONDITIONER_PREFIX, native_to_diffusers
from ..models.precision import set_qk_norm_eps
from .drawing import BACKGROUNDS, COLOURS, COUNTS, SHAPES, Scene
from .layout import MiniatureFiles, miniature_files, require_free, save_captioned

_PICTURE_SIZES = ((64, 64), (96, 64), (64, 96))

_TEXT_WIDTH = 64
_DIT: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 32,
    "text_embed_dim": _TEXT_WIDTH,
    "adaln_lora_dim": 16,
    "rope_scale": (1.0, 4.0, 4.0),
    "extra_pos_embed_type": None,
}
_VAE_BASE_DIM = 8


def write_random_miniature(folder: str | Path, *, seed: int = 0, overwrite: bool = False) -> MiniatureFiles:
    """Write a model with random weights, tokenizers and twelve pictures.

    Args:
        folder: made if missing.
        seed: of the random weights.
        overwrite: whether files of an earlier miniature may be replaced.

    Raises:
        InputError: a file is there already and `overwrite` is false.
    """
    files = miniature_files(folder)
    require_free(files, overwrite=overwrite)
    ensure_cosmos_without_torchvision()
    write_tokenizers(files.tokenizer, files.t5_tokenizer, [scene.caption for scene in scenes()])
    qwen = Qwen2Tokenizer.from_pretrained(files.tokenizer)
    t5 = T5TokenizerFast.from_pretrained(files.t5_tokenizer)
    # A generator of its own: the caller's random state is not ours to change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer, conditioner = build_dit(len(t5))
        text_encoder, vae = build_text_encoder(len(qwen)), build_vae()
    # One entry: safetensors writes several in an order that changes from file to file.
    what = {"modelspec.title": "Anima miniature with random weights, for trying things out"}
    save_tensors(files.transformer, native_state_dict(transformer, conditioner), what)
    save_tensors(files.vae, wan_state_dict(vae), what)
    save_tensors(files.text_encoder, {f"model.{k}": v for k, v in text_encoder.state_dict().items()}, what)
    write_pictures(files.pictures)
    return files


def build_dit(
    t5_vocabulary: int, *, heads: int = 2, layers: int = 2
) -> tuple[CosmosTransformer3DModel, AnimaTextConditioner]:
    """DiT and conditioner, 0.3 M parameters; nothing is zero, so that no branch is silent.

    Args:
        t5_vocabulary: how many token ids the conditioner knows.
        heads: of the DiT, each 32 wide.
        layers: the DiT's blocks.
    """
    transformer = CosmosTransformer3DModel(**_DIT, num_attention_heads=heads, num_layers=layers)
    set_qk_norm_eps(transformer)
    conditioner = AnimaTextConditioner(
        source_dim=_TEXT_WIDTH,
        target_dim=_TEXT_WIDTH,
        model_dim=_TEXT_WIDTH,
        num_layers=2,
        num_attention_heads=4,
        target_vocab_size=t5_vocabulary,
    )
    for model in (transformer, conditioner):
        model.requires_grad_(False).eval()
    return transformer, conditioner


def build_text_encoder(vocabulary: int) -> Qwen3Model:
    """Qwen3 with two layers, 0.1 M parameters."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    return Qwen3Model(config).requires_grad_(False).eval()


def build_vae() -> AutoencoderKLQwenImage:
    """The VAE at a twelfth of its width, with the real one's latent channels, strides and normalisation."""
    return AutoencoderKLQwenImage(base_dim=_VAE_BASE_DIM).requires_grad_(False).eval()


def native_state_dict(
    transformer: CosmosTransformer3DModel, conditioner: AnimaTextConditioner, prefix: str = "net."
) -> dict[str, torch.Tensor]:
    """Weights under the original checkpoint's names, DiT and `llm_adapter` together."""
    weights = transformer.state_dict()
    tensors = {
        f"{prefix}{native}.weight": weights[f"{ours}.weight"]
        for native, ours in native_to_diffusers(len(transformer.transformer_blocks)).items()
    }
    tensors |= {f"{prefix}{CONDITIONER_PREFIX}{key}": tensor for key, tensor in conditioner.state_dict().items()}
    return tensors


_WAN_RENAMES = (
    (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"\.norm1\.", ".residual.0."),
    (r"\.conv1\.(weight|bias)$", r".residual.2.\1"),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
)


def wan_state_dict(vae: AutoencoderKLQwenImage) -> dict[str, torch.Tensor]:
    """The VAE's weights under Wan's names, as qwen_image_vae.safetensors has them.

    The inverse of diffusers' `convert_wan_vae_to_diffusers`, which knows the real depth of two resnets a block.
    """
    return {_wan_name(key): tensor for key, tensor in vae.state_dict().items()}


def _wan_name(key: str) -> str:
    # Four flat entries an up block: three resnets, then the upsampler.
    key = re.sub(r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda m: f".upsamples.{4 * int(m[1]) + int(m[2])}.", key)
    key = re.sub(r"\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f".upsamples.{4 * int(m[1]) + 3}.", key)
    top_level = re.match(r"^(quant_conv|post_quant_conv|(encoder|decoder)\.conv_(in|out))\.", key)
    for pattern, replacement in _WAN_RENAMES:
        # `encoder.conv1` has just been made of `encoder.conv_in`; it is not a resnet's first convolution.
        if top_level and replacement.startswith(".residual"):
            continue
        key = re.sub(pattern, replacement, key)
    return key


def write_tokenizers(qwen_folder: Path, t5_folder: Path, corpus: list[str]) -> None:
    """Small tokenizers of the real classes: byte-level BPE for Qwen, Unigram for T5."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    quiet: dict[str, Any] = {"show_progress": False}
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=special, **quiet)
    )
    end = "<|endoftext|>"
    Qwen2Tokenizer(tokenizer_object=bpe, pad_token=end, eos_token=end).save_pretrained(qwen_folder)

    T5TokenizerFast(vocab=_unigram_vocabulary(corpus), extra_ids=0).save_pretrained(t5_folder)


def _unigram_vocabulary(corpus: list[str]) -> list[tuple[str, float]]:
    """Pieces with their log probabilities: the corpus' words, and letters for all other words.

    The tokenizers library's own trainer orders pieces of equal frequency at random.
    """
    words = Counter(word for caption in corpus for word in re.findall(r"\w+", caption))
    total = words.total()
    known = [(f"▁{word}", math.log(count / total)) for word, count in sorted(words.items())]
    letters = [(letter, math.log(0.1 / total)) for letter in "▁" + ascii_lowercase + digits + ",."]
    return [(special, 0.0) for special in ("<pad>", "</s>", "<unk>")] + known + letters


def scenes() -> list[Scene]:
    """The small set: every shape in four colours, with varying number and background."""
    colours, backgrounds = list(COLOURS)[:4], list(BACKGROUNDS)[:2]
    kinds = [(colour, shape) for shape in SHAPES for colour in colours]
    return [
        Scene(shape, backgrounds[number % len(backgrounds)], number % len(COUNTS) + 1, colour)
        for number, (colour, shape) in enumerate(kinds)
    ]


def write_pictures(folder: Path) -> None:
    """Twelve drawn pictures of three sizes, each with its caption beside it."""
    for number, scene in enumerate(scenes()):
        save_captioned(scene.paint(*_PICTURE_SIZES[number % len(_PICTURE_SIZES)]), scene.caption, folder, number)
