"""Pictures and captions into the cache: which models are loaded for it, and only as long as something is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import free_memory

from ..adapters.naming import TEXT_CONDITIONER, TRANSFORMER
from ..data.cache import FileIndex, cache_key
from ..data.caching import CaptionsPlan, LatentsPlan, plan_captions, plan_latents
from ..data.pictures import Picture
from ..errors import TrainingError
from ..models.encoders import load_text_encoder, load_vae
from ..models.latents import encode_latents
from ..models.precision import encoder_dtype
from ..models.sources import ModelSources, is_diffusers_folder
from ..models.text import encode_qwen, find_cut_prompts, tokenize_t5
from ..models.tokenizers import load_qwen_tokenizer, load_t5_tokenizer
from ..transformer import AnimaTransformerModel

logger = logging.getLogger(__name__)

_CAPTION_BATCH = 8
_MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
_SHOWN_FILES = 10


@dataclass(frozen=True)
class ModelHashes:
    """What identifies the model's parts: a file's sha256, or one hash over a folder's model files."""

    transformer: str
    vae: str
    text: str


def hash_model(sources: ModelSources, index: FileIndex) -> ModelHashes:
    """Hash the model's parts; files that `index` knows unchanged are not read again."""

    def fingerprint(*paths: Path) -> str:
        if len(paths) == 1 and paths[0].is_file():
            return index.hash(paths[0])
        files = [f for path in paths for f in (_model_files(path) if path.is_dir() else [path])]
        return cache_key(files=[(file.name, index.hash(file)) for file in files])

    hashes = ModelHashes(
        transformer=fingerprint(sources.transformer),
        vae=fingerprint(sources.vae),
        text=fingerprint(sources.text_encoder, sources.tokenizer, sources.t5_tokenizer),
    )
    index.save()
    return hashes


def _model_files(folder: Path) -> list[Path]:
    # A diffusers folder holds all parts; its adapters live on two of them.
    parts = [folder / TRANSFORMER, folder / TEXT_CONDITIONER] if is_diffusers_folder(folder) else [folder]
    return sorted(file for part in parts for pattern in _MODEL_FILES for file in part.glob(pattern))


def cache_latents(
    pictures: Sequence[Picture],
    vae: Path,
    *,
    model_hash: str,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    cache_dir: Path | None,
) -> LatentsPlan:
    """Encode the pictures that the cache lacks. The VAE is loaded only if there are any, and gone afterwards.

    Raises:
        InputError: the VAE cannot be loaded, a picture cannot be read, the cache cannot be written.
        TrainingError: there is not enough memory.
    """
    compute = encoder_dtype(dtype)
    plan = plan_latents(pictures, model=f"{model_hash}/{compute}", cache_dir=cache_dir)
    if plan.missing:
        model = load_vae(vae, compute).to(device)
        try:
            plan.encode(lambda pixels: encode_latents(model, pixels.to(device)), batch_size=batch_size)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "There is not enough memory to encode the pictures: lower vae_batch_size, or the dataset's resolution. "
                f"Those that are done stay in the cache. ({error})"
            ) from error
        del model
        free_memory()
    return plan


def cache_captions(
    pictures: Sequence[Picture],
    sources: ModelSources,
    model: AnimaTransformerModel,
    *,
    model_hash: str,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    train_conditioner: bool,
    cache_dir: Path | None,
) -> CaptionsPlan:
    """Encode the captions that the cache lacks. Qwen3 is loaded only if there are any, and gone afterwards.

    While the text conditioner is frozen its output is what is kept (`prompt_embeds`, real rows only); otherwise its
    inputs are (`qwen_hidden_states`, `t5_input_ids`).

    Raises:
        InputError: a part cannot be loaded, or the cache cannot be written.
    """
    conditioner = "trained" if train_conditioner else "frozen"
    options = {"max_length": max_length, "dtype": str(dtype), "conditioner": conditioner}
    plan = plan_captions(pictures, model=model_hash, options=options, cache_dir=cache_dir)
    if plan.missing:
        tokenizer, t5_tokenizer = load_qwen_tokenizer(sources.tokenizer), load_t5_tokenizer(sources.t5_tokenizer)
        _report_cut_captions(pictures, tokenizer, t5_tokenizer, max_length)
        text_encoder = load_text_encoder(sources.text_encoder, encoder_dtype(dtype)).to(device)
        encode = _caption_encoder(text_encoder, tokenizer, t5_tokenizer, max_length, dtype, device)
        if not train_conditioner:
            model.text_conditioner.to(device)
            encode = _with_conditioner(encode, model)
        plan.encode(encode, batch_size=_CAPTION_BATCH)
        model.text_conditioner.to("cpu")
        del text_encoder, encode
        free_memory()
    return plan


_Rows = list[dict[str, torch.Tensor]]


def _caption_encoder(
    text_encoder: Any, tokenizer: Any, t5_tokenizer: Any, max_length: int, dtype: torch.dtype, device: torch.device
) -> Callable[[list[str]], _Rows]:
    def encode(captions: list[str]) -> _Rows:
        hidden, mask = encode_qwen(text_encoder, tokenizer, captions, max_length, device)
        ids, ids_mask = tokenize_t5(t5_tokenizer, captions, max_length, device)
        lengths, id_lengths = mask.sum(1).tolist(), ids_mask.sum(1).tolist()
        return [
            {"qwen_hidden_states": hidden[i, : lengths[i]].to(dtype), "t5_input_ids": ids[i, : id_lengths[i]]}
            for i in range(len(captions))
        ]

    return encode


def _with_conditioner(
    encode: Callable[[list[str]], _Rows], model: AnimaTransformerModel
) -> Callable[[list[str]], _Rows]:
    @torch.no_grad()
    def encode_further(captions: list[str]) -> _Rows:
        rows = []
        for text in encode(captions):
            hidden, ids = text["qwen_hidden_states"], text["t5_input_ids"]
            # An empty caption is one row of padding, as in diffusers' pipeline; attention over no row at all is NaN.
            states = hidden if len(hidden) else hidden.new_zeros(1, hidden.shape[1])
            mask = torch.full((1, len(states)), bool(len(hidden)), device=states.device)
            embeds = model.encode_prompt_embeds(states[None], mask, ids[None], torch.ones_like(ids[None]))
            rows.append({"prompt_embeds": embeds[0, : len(ids)]})
        return rows

    return encode_further


def _report_cut_captions(pictures: Sequence[Picture], tokenizer: Any, t5_tokenizer: Any, max_length: int) -> None:
    cut: Mapping[int, Any] = find_cut_prompts(tokenizer, t5_tokenizer, [p.caption for p in pictures], max_length)
    if cut:
        shown = [f"{pictures[i].path.name} ({max(counts)} tokens)" for i, counts in list(cut.items())[:_SHOWN_FILES]]
        more = f" and {len(cut) - _SHOWN_FILES} more" if len(cut) > _SHOWN_FILES else ""
        logger.warning("Captions cut at anima_seq_len = %d: %s%s.", max_length, ", ".join(shown), more)
