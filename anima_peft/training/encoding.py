"""Pictures and captions into the cache: which models are loaded for it, and only as long as something is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.training_utils import free_memory

from ..adapters.naming import TEXT_CONDITIONER, TRANSFORMER
from ..data.cache import FileIndex, cache_key
from ..data.caching import (
    CaptionEncoder,
    CaptionsPlan,
    LatentEncoder,
    LatentsPlan,
    MasksPlan,
    plan_captions,
    plan_latents,
    plan_masks,
)
from ..data.pictures import Picture
from ..errors import TrainingError
from ..models.encoders import load_text_encoder, load_vae
from ..models.latents import encode_latents
from ..models.precision import encoder_dtype
from ..models.sources import ModelSources, is_diffusers_folder
from ..models.text import encode_qwen, find_cut_prompts, tokenize_t5
from ..models.tokenizers import load_qwen_tokenizer, load_t5_tokenizer
from ..transformer import AnimaTransformerModel
from .processes import Processes

logger = logging.getLogger(__name__)

_CAPTION_BATCH = 8
_TILE, _TILE_STRIDE = 512, 384  # pixels
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
    tiling: bool,
    cache_dir: Path | None,
    processes: Processes,
) -> LatentsPlan:
    """Encode the pictures that the cache lacks. The VAE is loaded only if there are any, and gone afterwards.

    Each process encodes its part of them.

    Args:
        tiling: see `latent_encoder`; what is encoded so is kept beside what is not.

    Raises:
        InputError: the VAE cannot be loaded, a picture cannot be read, the cache cannot be written.
        TrainingError: there is not enough memory.
    """
    compute = encoder_dtype(dtype)
    with processes.together():
        plan = plan_latents(pictures, model=f"{model_hash}/{compute}{'/tiled' if tiling else ''}", cache_dir=cache_dir)

    def encode_part(part: LatentsPlan) -> None:
        """Encode what is missing of this process's part, with the VAE on the device for as long."""
        encode = latent_encoder(vae, dtype, device, tiling=tiling)
        try:
            part.encode(encode, batch_size=batch_size, progress=processes.is_local_main)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "There is not enough memory to encode the pictures: lower vae_batch_size, set vae_tiling = true, "
                "or lower the dataset's resolution. "
                f"Those that are done stay in the cache. ({error})"
            ) from error
        del encode
        free_memory()

    _share_out(plan, encode_part, processes)
    return plan


def cache_masks(pictures: Sequence[Picture], *, cache_dir: Path | None, processes: Processes) -> MasksPlan:
    """Make the masks that the cache lacks; each process its part of them.

    Raises:
        InputError: a mask cannot be read, or the cache cannot be written.
    """
    with processes.together():
        plan = plan_masks(pictures, cache_dir=cache_dir)
    _share_out(plan, lambda part: part.encode(progress=processes.is_local_main), processes)
    return plan


_Plan = TypeVar("_Plan", LatentsPlan, MasksPlan, CaptionsPlan)


def _share_out(plan: _Plan, encode: Callable[[_Plan], None], processes: Processes) -> None:
    """Let each process make its part of what is missing.

    Machines need not share a disk: what the others have made and is not to be seen here is made here, too.
    """
    shares = [(processes.index, processes.count), (processes.local_index, processes.local_count)]
    for index, count in shares if processes.count > 1 else shares[:1]:
        part = plan.share(index, count)
        with processes.together():
            if part.missing:
                encode(part)
        with processes.together():
            if processes.count > 1:
                plan.look_again()


def latent_encoder(vae: Path, dtype: torch.dtype, device: torch.device, *, tiling: bool = False) -> LatentEncoder:
    """The VAE, loaded, as what it does to pictures.

    Args:
        tiling: encode pictures that are larger than a tile in overlapping tiles, blended where they meet.

    Raises:
        InputError: it cannot be loaded.
    """
    model = load_vae(vae, encoder_dtype(dtype)).to(device)
    if tiling:
        model.enable_tiling(_TILE, _TILE, _TILE_STRIDE, _TILE_STRIDE)
    return lambda pixels: encode_latents(model, pixels.to(device))


@dataclass(frozen=True)
class TextModels:
    """What captions are encoded with, and how.

    Attributes:
        sources: the model's files.
        model: holds the text conditioner.
        model_hash: identifies the text encoder, the tokenizers and the conditioner.
        dtype: of the encoded captions.
        device: where the encoders run.
        max_length: tokens of a caption that are kept.
        train_conditioner: whether the conditioner is trained. While it is frozen its output is what captions are
            encoded to (`prompt_embeds`, real rows only); otherwise its inputs are (`qwen_hidden_states`,
            `t5_input_ids`).
    """

    sources: ModelSources
    model: AnimaTransformerModel
    model_hash: str
    dtype: torch.dtype
    device: torch.device
    max_length: int
    train_conditioner: bool

    def encoder(self) -> CaptionEncoder:
        """The text encoder and the tokenizers, loaded, as what they do to captions.

        Raises:
            InputError: a part cannot be loaded.
        """
        tokenizer, t5_tokenizer = self.tokenizers()
        text_encoder = load_text_encoder(self.sources.text_encoder, encoder_dtype(self.dtype)).to(self.device)
        encode = _caption_encoder(text_encoder, tokenizer, t5_tokenizer, self.max_length, self.dtype, self.device)
        if self.train_conditioner:
            return encode
        self.model.text_conditioner.to(self.device)
        return _with_conditioner(encode, self.model)

    def tokenizers(self) -> tuple[Any, Any]:
        """Qwen3's and T5's."""
        return load_qwen_tokenizer(self.sources.tokenizer), load_t5_tokenizer(self.sources.t5_tokenizer)


def cache_captions(
    captions: Mapping[str, Picture], models: TextModels, *, cache_dir: Path | None, processes: Processes
) -> CaptionsPlan:
    """Encode the captions that the cache lacks. Qwen3 is loaded only if there are any, and gone afterwards.

    Each process encodes its part of them.

    Args:
        captions: each that is needed, with a picture that has it.

    Raises:
        InputError: a part cannot be loaded, or the cache cannot be written.
    """
    conditioner = "trained" if models.train_conditioner else "frozen"
    options = {"max_length": models.max_length, "dtype": str(models.dtype), "conditioner": conditioner}
    pairs = ((picture, caption) for caption, picture in captions.items())
    with processes.together():
        plan = plan_captions(pairs, model=models.model_hash, options=options, cache_dir=cache_dir)
        if plan.missing and processes.is_local_main:
            report_cut_captions(captions, models)

    def encode_part(part: CaptionsPlan) -> None:
        """Encode what is missing of this process's part, with Qwen3 and the conditioner on the device for as long."""
        encode = models.encoder()
        part.encode(encode, batch_size=_CAPTION_BATCH, progress=processes.is_local_main)
        models.model.text_conditioner.to("cpu")
        del encode
        free_memory()

    _share_out(plan, encode_part, processes)
    return plan


_Rows = list[dict[str, torch.Tensor]]


def _caption_encoder(
    text_encoder: Any, tokenizer: Any, t5_tokenizer: Any, max_length: int, dtype: torch.dtype, device: torch.device
) -> Callable[[list[str]], _Rows]:
    """From captions to the conditioner's inputs: `qwen_hidden_states` (N, D) of `dtype`, `t5_input_ids` (M,) int64."""

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
    """What `encode` gives, brought through the conditioner: `prompt_embeds` (M, D), a row for each T5 token."""

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


def report_cut_captions(captions: Mapping[str, Picture], models: TextModels) -> None:
    """One warning that names the files whose captions lose their end, with the length of the longest of each."""
    if not captions:
        return
    tokenizer, t5_tokenizer = models.tokenizers()
    cut: Mapping[int, Any] = find_cut_prompts(tokenizer, t5_tokenizer, list(captions), models.max_length)
    files = list(captions.values())
    longest: dict[str, int] = {}
    for i, counts in cut.items():
        name = files[i].path.name
        longest[name] = max(longest.get(name, 0), *counts)
    if longest:
        shown = [f"{name} ({tokens} tokens)" for name, tokens in list(longest.items())[:_SHOWN_FILES]]
        more = f" and {len(longest) - _SHOWN_FILES} more" if len(longest) > _SHOWN_FILES else ""
        logger.warning("Captions cut at anima_seq_len = %d: %s%s.", models.max_length, ", ".join(shown), more)
