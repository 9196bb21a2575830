"""The options that name the model's parts, and where what is missing of its tokenizers is fetched."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.hub_folders import (
    QWEN_REPO,
    T5_MODELSCOPE_REPO,
    T5_REPO,
    T5_SUBFOLDER,
    HubFolder,
    check_hub_folder,
    check_modelscope_folder,
    check_subfolder,
    download_order,
)
from .options import Needs, option

_FETCHES_QWEN = (Needs("auto_download_qwen_tokenizer", values=(True,)),)
_FETCHES_T5 = (Needs("auto_download_t5_tokenizer", values=(True,)),)
_FETCHES_T5_FROM_MODELSCOPE = (*_FETCHES_T5, Needs("t5_tokenizer_modelscope_fallback", values=(True,)))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model and its parts."""

    anima_transformer: str = option(
        aliases=("pretrained_model_name_or_path",),
        is_path=True,
        help="Anima to train on: a single safetensors file, a diffusers folder, or a hub repo id.",
    )
    vae: str | None = option(None, is_path=True, help="VAE: a safetensors file or folder. Overrides a folder's own.")
    qwen: str | None = option(
        None,
        aliases=("qwen3",),
        is_path=True,
        help="Qwen3 text encoder: a Hugging Face folder or a single safetensors file. Overrides a folder's own.",
    )
    qwen_tokenizer_dir: str | None = option(
        None,
        is_path=True,
        help="Folder of the Qwen tokenizer, where qwen is a single file; unset, one in Hugging Face's cache.",
    )
    auto_download_qwen_tokenizer: bool = option(
        True, help="Fetch what qwen_tokenizer_dir lacks, from Hugging Face or else ModelScope."
    )
    qwen_tokenizer_repo_id: str = option(
        QWEN_REPO,
        check=check_hub_folder,
        only_with=_FETCHES_QWEN,
        help="Repo of the Qwen tokenizer: an id on Hugging Face, or an address of a repo or folder on either hub.",
    )
    qwen_tokenizer_modelscope_fallback: bool = option(
        True,
        only_with=_FETCHES_QWEN,
        help="Fetch the Qwen tokenizer from ModelScope where qwen_tokenizer_repo_id fails.",
    )
    qwen_tokenizer_modelscope_repo_id: str = option(
        QWEN_REPO,
        check=check_modelscope_folder,
        only_with=(*_FETCHES_QWEN, Needs("qwen_tokenizer_modelscope_fallback", values=(True,))),
        help="Repo of the Qwen tokenizer on ModelScope: an id or an address.",
    )
    t5_tokenizer_dir: str | None = option(
        None,
        aliases=("t5_tokenizer_path",),
        is_path=True,
        help="Folder of the T5 tokenizer; unset, one in Hugging Face's cache. No T5 model is needed.",
    )
    auto_download_t5_tokenizer: bool = option(
        True, help="Fetch what t5_tokenizer_dir lacks, from Hugging Face or else ModelScope."
    )
    t5_tokenizer_repo_id: str = option(
        T5_REPO,
        check=check_hub_folder,
        only_with=_FETCHES_T5,
        help="Repo of the T5 tokenizer: an id on Hugging Face, or an address of a repo or folder on either hub.",
    )
    t5_tokenizer_subfolder: str = option(
        T5_SUBFOLDER,
        check=check_subfolder,
        only_with=_FETCHES_T5,
        help='Folder in t5_tokenizer_repo_id where that names none; "/" is its root.',
    )
    t5_tokenizer_modelscope_fallback: bool = option(
        True, only_with=_FETCHES_T5, help="Fetch the T5 tokenizer from ModelScope where t5_tokenizer_repo_id fails."
    )
    t5_tokenizer_modelscope_repo_id: str = option(
        T5_MODELSCOPE_REPO,
        check=check_modelscope_folder,
        only_with=_FETCHES_T5_FROM_MODELSCOPE,
        help="Repo of the T5 tokenizer on ModelScope: an id or an address.",
    )
    t5_tokenizer_modelscope_revision: str = option(
        "master", only_with=_FETCHES_T5_FROM_MODELSCOPE, help="Branch of t5_tokenizer_modelscope_repo_id."
    )
    t5_tokenizer_modelscope_subfolder: str = option(
        T5_SUBFOLDER,
        check=check_subfolder,
        only_with=_FETCHES_T5_FROM_MODELSCOPE,
        help='Folder in t5_tokenizer_modelscope_repo_id where that names none; "/" is its root.',
    )
    anima_seq_len: int = option(
        512,
        aliases=("qwen3_max_token_length", "t5_max_token_length"),
        minimum=16,
        help="Tokens of a caption that are kept, in both tokenizers; above 512 the conditioning grows with it.",
    )

    @property
    def qwen_tokenizer_sources(self) -> tuple[HubFolder, ...]:
        """Where Qwen's tokenizer may be fetched from, in order; empty where nothing is to be fetched."""
        if not self.auto_download_qwen_tokenizer:
            return ()
        modelscope = self.qwen_tokenizer_modelscope_repo_id if self.qwen_tokenizer_modelscope_fallback else None
        return download_order(self.qwen_tokenizer_repo_id, modelscope_repo_id=modelscope)

    @property
    def t5_tokenizer_sources(self) -> tuple[HubFolder, ...]:
        """Where the T5 tokenizer may be fetched from, in order; empty where nothing is to be fetched."""
        if not self.auto_download_t5_tokenizer:
            return ()
        return download_order(
            self.t5_tokenizer_repo_id,
            self.t5_tokenizer_subfolder,
            modelscope_repo_id=self.t5_tokenizer_modelscope_repo_id if self.t5_tokenizer_modelscope_fallback else None,
            modelscope_revision=self.t5_tokenizer_modelscope_revision,
            modelscope_subfolder=self.t5_tokenizer_modelscope_subfolder,
        )
