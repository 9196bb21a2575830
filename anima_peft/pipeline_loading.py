"""How `AnimaPipeline` is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

from .errors import InputError
from .models.encoders import check_encoders, load_text_encoder, load_vae
from .models.folders import PARTS, check_folder, fetch_folder, stock_index
from .models.part_configs import check_scheduler, read_config
from .models.precision import encoder_dtype
from .models.sources import ModelSources, resolve_sources
from .models.tokenizer_downloads import locate_tokenizer
from .models.tokenizers import QWEN, T5, load_qwen_tokenizer, load_t5_tokenizer
from .transformer import AnimaTransformerModel

_HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
_SHIFT = 3.0  # the published model's scheduler
_LIBRARIES = ("diffusers", "transformers", None)  # None stands for a part that the folder does not have


def _names_a_class(entry: object) -> bool:
    """Whether an entry of the index is [library, class]; one of another library is left to its own message."""
    if not (isinstance(entry, list) and len(entry) == 2):
        return False
    library, name = entry
    if library in ("diffusers", "transformers"):
        return isinstance(name, str) and hasattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    return library is None or isinstance(library, str)


class AnimaPipelineLoader(DiffusionPipeline):
    """The loading half of `AnimaPipeline`, which alone can be instantiated."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load from a diffusers folder or a hub repo, with `model_index.json` or only `modular_model_index.json`.

        Weights are read from safetensors alone, and no path written inside either index is followed.

        Args:
            pretrained_model_name_or_path: folder, or repo id such as "circlestone-labs/Anima-Base-v1.0-Diffusers".
            kwargs: as for `DiffusionPipeline.from_pretrained`: torch_dtype, variant, quantization_config, revision,
                token, cache_dir, local_files_only, …, and any part by its name, which then is not read.

        Raises:
            InputError: no such folder or repo, a part is missing or of another model, or its weights do not fit.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise InputError("use_safetensors=False was given. Pickled weights can run code and are not loaded.")
        if "torch_dtype" in kwargs:  # the name that everybody knows, which diffusers 0.42 began to deprecate
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        if kwargs.get("dtype") is torch.float16:
            kwargs["dtype"] = {"default": torch.float16} | dict.fromkeys(("vae", "text_encoder"), torch.float32)
        hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        parts = [part for part in PARTS if part not in kwargs]
        folder = fetch_folder(str(pretrained_model_name_or_path), parts, **hub_options)
        check_folder(folder, parts, kwargs.get("variant"))
        if "tokenizer" in parts:
            kwargs["tokenizer"] = load_qwen_tokenizer(folder / "tokenizer")
        if "t5_tokenizer" in parts:
            kwargs["t5_tokenizer"] = load_t5_tokenizer(folder / "t5_tokenizer")
        pipe = super().from_pretrained(str(folder), use_safetensors=True, **kwargs)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    @classmethod
    def from_single_files(
        cls,
        *,
        transformer: str | os.PathLike[str],
        text_encoder: str | os.PathLike[str],
        vae: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | None = None,
        t5_tokenizer: str | os.PathLike[str],
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load from the files that ComfyUI users have.

        Args:
            transformer: safetensors with DiT and `llm_adapter`.
            text_encoder: Qwen3 as a safetensors file, or its Hugging Face folder.
            vae: the Qwen-Image VAE as a safetensors file.
            tokenizer: folder of Qwen's tokenizer, or a hub repo id or address that it is fetched from; None takes
                `text_encoder` if that is a folder.
            t5_tokenizer: the same of the T5 tokenizer, such as
                "https://huggingface.co/nvidia/Cosmos-Predict2-2B-Text2Image/tree/main/tokenizer".
            torch_dtype: dtype of all weights; None keeps the files'.

        Raises:
            InputError: a file is missing or holds another model, or its weights do not fit.
        """
        sources = resolve_sources(
            transformer,
            vae=vae,
            qwen=text_encoder,
            qwen_tokenizer_dir=None if tokenizer is None else locate_tokenizer(QWEN, tokenizer),
            t5_tokenizer_dir=locate_tokenizer(T5, t5_tokenizer),
        )
        return cls.from_sources(sources, torch_dtype)

    @classmethod
    def from_sources(cls, sources: ModelSources, torch_dtype: torch.dtype | None = None) -> Self:
        """Load each part from where `resolve_sources` found it.

        Raises:
            InputError: a file holds another model, or its weights do not fit.
        """
        check_encoders(sources.text_encoder, sources.vae)
        model = AnimaTransformerModel.from_pretrained(sources.transformer, torch_dtype)
        return cls.around(model, sources, torch_dtype)

    @classmethod
    def around(
        cls, model: AnimaTransformerModel, sources: ModelSources, torch_dtype: torch.dtype | None = None
    ) -> Self:
        """A pipeline that draws with `model` as it is, its adapters included; the other parts come from `sources`.

        Raises:
            InputError: a file holds another model, or its weights do not fit.
        """
        settings = sources.transformer / "scheduler"
        if settings.is_dir():
            check_scheduler(settings)
        beside = encoder_dtype(torch_dtype)
        return cls(
            text_encoder=load_text_encoder(sources.text_encoder, beside),
            tokenizer=load_qwen_tokenizer(sources.tokenizer),
            t5_tokenizer=load_t5_tokenizer(sources.t5_tokenizer),
            text_conditioner=model.text_conditioner,
            transformer=model.transformer,
            vae=load_vae(sources.vae, beside),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(str(settings), local_files_only=True)
            if settings.is_dir()
            else FlowMatchEulerDiscreteScheduler(shift=_SHIFT),
        )

    @classmethod
    def load_config(  # type: ignore[override]  # the base class lists two flags that pass through here
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """The folder's `model_index.json`, or, where there is none, the stock classes in the usual subfolders.

        A `modular_model_index.json` is not read: all it could add are other places to load the parts from.

        Raises:
            InputError: the index names a class of another library than diffusers and transformers, which to load
                would run code.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / cls.config_name).is_file():
            return stock_index(cls.__name__)
        written = read_config(folder, cls.config_name) if folder.is_dir() else {}
        unnamed = [part for part in PARTS if part in written and not _names_a_class(written[part])]
        if unnamed:
            raise InputError(f"{folder / cls.config_name}: expected a library and one of its classes as {unnamed[0]}.")
        index: Any = super().load_config(pretrained_model_name_or_path, **kwargs)
        libraries = {part: entry[0] for part, entry in index.items() if isinstance(entry, list)}
        foreign = {part: library for part, library in libraries.items() if library not in _LIBRARIES}
        if foreign:
            raise InputError.from_faults(
                f"{folder / cls.config_name}: names classes outside diffusers and transformers; load those parts "
                "yourself and give them as arguments:",
                [f"{part}: {library}" for part, library in foreign.items()],
            )
        return index
