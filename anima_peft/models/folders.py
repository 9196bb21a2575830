"""Diffusers folders of the whole model: which parts they have, where they come from, and whether the weights fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AnimaTextConditioner, AutoencoderKLQwenImage, CosmosTransformer3DModel
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import (  # type: ignore[attr-defined]  # T5TokenizerFast is an alias made at run time
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5TokenizerFast,
)
from transformers.quantizers import AutoHfQuantizer

from ..errors import InputError
from .checkpoints import build_empty, read_header, require_all_keys
from .hub_errors import cause
from .part_configs import (
    CONFIG_ERRORS,
    check_scheduler,
    read_config,
    require_own_weights,
    require_plausible,
    require_statistics,
)

PARTS: dict[str, Any] = {
    "text_encoder": Qwen3Model,
    "tokenizer": Qwen2Tokenizer,
    "t5_tokenizer": T5TokenizerFast,
    "text_conditioner": AnimaTextConditioner,
    "transformer": CosmosTransformer3DModel,
    "vae": AutoencoderKLQwenImage,
    "scheduler": FlowMatchEulerDiscreteScheduler,
}
"""The model's parts: subfolder and pipeline argument -> stock class."""

_WITH_WEIGHTS = ("text_encoder", "text_conditioner", "transformer", "vae")
INDEXES = ("model_index.json", "modular_model_index.json")
FILE_TYPES = ("*.json", "*.safetensors", "*.txt", "*.model")  # no pickled weights and no code


def fetch_folder(path_or_repo: str | Path, parts: Collection[str], **hub_options: Any) -> Path:
    """The local folder for a path or a hub repo id; of a repo only what the `parts` need is downloaded.

    Args:
        path_or_repo: existing folder, or a repo id.
        parts: names out of `PARTS`.
        hub_options: passed to `huggingface_hub.snapshot_download` (revision, token, cache_dir, …).

    Raises:
        InputError: a file instead of a folder, or neither a folder nor a repo that can be had.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(
            f"{path}: is a file. Expected a diffusers folder or a hub repo id; single files are loaded by "
            "AnimaPipeline.from_single_files."
        )
    patterns = [*INDEXES, *(f"{part}/{files}" for part in parts for files in FILE_TYPES)]
    try:
        return Path(snapshot_download(str(path_or_repo), allow_patterns=patterns, **hub_options))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"{path_or_repo}: no such folder here, and the hub repo of this name cannot be had "
            f"({cause(error, hub_options.get('token'))})."
        ) from error


def stock_index(pipeline_class: str) -> dict[str, Any]:
    """What `model_index.json` says of a folder whose parts are all of the stock classes."""
    parts = {part: [stock.__module__.split(".")[0], stock.__name__] for part, stock in PARTS.items()}
    return {"_class_name": pipeline_class, **parts}


def check_folder(folder: Path, parts: Collection[str], variant: str | None = None) -> None:
    """Refuse a folder before anything is loaded from it unless the `parts` are there and their weights fit.

    diffusers and transformers only warn of missing or unexpected weights, and then draw with random ones. Only the
    headers of the weight files are read. A part whose weights were saved quantized is left to its quantizer, which
    has its own keys.

    Args:
        folder: a diffusers folder.
        parts: names out of `PARTS`.
        variant: the files' middle name, such as "fp16", as diffusers uses it.

    Raises:
        InputError: a subfolder is missing or holds another model; no safetensors; a missing, unexpected or misshapen
            key.
    """
    absent = [part for part in PARTS if part in parts and not (folder / part).is_dir()]
    if absent:
        raise InputError.from_faults(
            f"{folder}: not a complete Anima folder; give the missing parts as arguments, or a complete folder:",
            [f"subfolder `{part}` is missing" for part in absent],
        )
    for part in _WITH_WEIGHTS:
        if part in parts:
            check_part(folder / part, part, variant)
    if "scheduler" in parts:
        check_scheduler(folder / "scheduler")


def load_part(folder: Path, part: str, torch_dtype: torch.dtype | None = None) -> Any:
    """Load one of diffusers' models from its own folder, frozen and in eval mode, on the CPU.

    Args:
        folder: the part's folder, with `config.json` and safetensors.
        part: name out of `PARTS`, of a diffusers model.
        torch_dtype: dtype of all weights; None means float32, as in diffusers.

    Raises:
        InputError: another model, or its weights do not fit.
    """
    check_part(folder, part)
    try:
        model = PARTS[part].from_pretrained(
            str(folder), torch_dtype=torch_dtype or torch.float32, use_safetensors=True, local_files_only=True
        )
    except CONFIG_ERRORS as error:
        raise cannot_load(folder, error) from error
    for parameter in model.parameters():
        # Unless the dtype changed it is a view of the mapped file: what is written there would change the model.
        parameter.data = parameter.data.clone()
    return model.requires_grad_(False).eval()


def check_part(folder: Path, part: str, variant: str | None = None) -> None:
    """Refuse a part's folder unless its config is that of the part and its weights fit; only headers are read.

    Args:
        folder: the part's own folder.
        part: name out of `PARTS`, of a model.
        variant: the files' middle name, such as "fp16".

    Raises:
        InputError: no config, no safetensors, another model, or a missing, unexpected or misshapen key.
    """
    config = read_config(folder)
    stock = PARTS[part]
    kind = config.get("model_type" if stock is Qwen3Model else "_class_name")
    expected_kind = Qwen3Config.model_type if stock is Qwen3Model else stock.__name__
    if kind != expected_kind:
        raise InputError(f"{folder}: the config is that of a `{kind}`. Expected `{expected_kind}`.")

    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if variant and f".{variant}" in file.name] or files
    if not files:
        raise InputError(f"{folder}: no .safetensors file. Pickled weights (.bin, .pt) are not loaded; convert them.")
    require_own_weights(folder)
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        stored |= read_header(file).shapes
    require_plausible(config, len(stored), folder)
    if _is_quantized(config, stock, folder):
        return

    if stock is Qwen3Model:
        # A causal language model's folder serves as well: `model.` in front, and a head that is not needed.
        stored = {key.removeprefix("model."): shape for key, shape in stored.items() if key != "lm_head.weight"}
    try:
        model = build_empty(
            lambda: Qwen3Model(Qwen3Config.from_dict(config)) if stock is Qwen3Model else stock.from_config(config)
        )
    except CONFIG_ERRORS as error:
        raise InputError(f"{folder}: config.json does not describe a `{expected_kind}` ({error}).") from error
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    misshapen = [
        f"{key} is {list(stored[key])}, expected {list(shape)}"
        for key, shape in expected.items()
        if stored.get(key, shape) != shape
    ]
    require_all_keys(folder, stock.__name__, expected.keys() - stored, stored.keys() - expected.keys(), misshapen)

    if stock is AutoencoderKLQwenImage:
        require_statistics(model.config, folder)


def _is_quantized(config: Mapping[str, Any], stock: Any, folder: Path) -> bool:
    """Whether the part's library will have its quantizer load the weights."""
    if "quantization_config" not in config or stock is not Qwen3Model:
        return "quantization_config" in config  # diffusers refuses a method that it does not know
    try:
        # Of such a method transformers only warns, and takes the weights as they are.
        return AutoHfQuantizer.supports_quant_method(config["quantization_config"])
    except CONFIG_ERRORS as error:
        raise cannot_load(folder, error) from error


def cannot_load(folder: Path, error: Exception) -> InputError:
    """The fault of a folder that passed `check_part` and that the library cannot make the part of."""
    return InputError(f"{folder}: cannot be loaded ({type(error).__name__}: {error}); get the folder's files again.")
