"""Where each part of Anima is read from: single files, a diffusers folder, a hub repo, or a mixture."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .folders import PARTS, fetch_folder

_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)")  # a mistyped file is not looked for on the hub


@dataclass(frozen=True)
class ModelSources:
    """One existing path for each part.

    Attributes:
        transformer: single file with DiT and conditioner, or a diffusers folder with `transformer/` and
            `text_conditioner/`.
        vae: single file, or folder with `config.json`.
        text_encoder: single file, or Hugging Face model folder.
        tokenizer: folder of Qwen's tokenizer.
        t5_tokenizer: folder of the T5 tokenizer.
    """

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    t5_tokenizer: Path


def is_diffusers_folder(path: Path) -> bool:
    """Whether `path` holds at least the two parts that an adapter lives on, in diffusers' layout."""
    return (path / "transformer" / "config.json").is_file() and (path / "text_conditioner" / "config.json").is_file()


def locate_model(
    path_or_repo: str | os.PathLike[str], parts: Collection[str] = tuple(PARTS), **hub_options: Any
) -> Path:
    """The local file or folder for a path or a hub repo id; of a repo only what the `parts` need is downloaded.

    Raises:
        InputError: no such path, and no such repo can be had.
    """
    path = Path(path_or_repo).expanduser()
    if path.exists():
        return path
    if not _REPO_ID.fullmatch(os.fspath(path_or_repo)):
        raise InputError(
            f"{path_or_repo}: no such file or folder. Expected a .safetensors file with DiT and `llm_adapter`, a "
            "diffusers folder, or a hub repo id such as circlestone-labs/Anima-Base-v1.0-Diffusers."
        )
    return fetch_folder(os.fspath(path_or_repo), parts, **hub_options)


def resolve_sources(
    anima_transformer: str | os.PathLike[str],
    *,
    vae: str | os.PathLike[str] | None = None,
    qwen: str | os.PathLike[str] | None = None,
    qwen_tokenizer_dir: str | os.PathLike[str] | None = None,
    t5_tokenizer_dir: str | os.PathLike[str] | None = None,
) -> ModelSources:
    """Find every part, and report all that is missing together.

    A diffusers folder or repo brings all parts; the other options then override single ones. A single file brings
    the DiT and the conditioner only. `qwen` as a folder brings its own tokenizer unless `qwen_tokenizer_dir` is given.

    Raises:
        InputError: one or more parts are not given or not there, each named by its option.
    """
    faults: list[str] = []
    base: Path | None = None
    try:
        base = locate_model(anima_transformer)
    except InputError as error:
        faults.append(f"anima_transformer: {error}")
    if base is not None and base.is_dir() and not is_diffusers_folder(base):
        faults.append(
            f"anima_transformer: {base} is a folder without `transformer/config.json` and "
            "`text_conditioner/config.json`; give a diffusers folder or a single .safetensors file."
        )
    folder = base if base is not None and base.is_dir() else None

    def part(option: str, given: str | os.PathLike[str] | None, subfolder: str, missing_hint: str) -> Path:
        if given is None and folder is not None:
            given = folder / subfolder
        if given is None:
            # Without a base nothing is known about the layout; its own fault is enough.
            if base is not None:
                faults.append(f"{option}: required, since anima_transformer is a single file: {missing_hint}")
            return Path()
        path = Path(given).expanduser()
        if not path.exists():
            faults.append(f"{option}: no such file or folder: {path}")
        return path

    vae_path = part("vae", vae, "vae", "give qwen_image_vae.safetensors")
    text_encoder = part("qwen", qwen, "text_encoder", "give qwen_3_06b_base.safetensors or a Qwen3 folder")
    if qwen_tokenizer_dir is None and qwen is not None and text_encoder.is_dir():
        qwen_tokenizer_dir = text_encoder
    hint = "give the folder of Qwen3's tokenizer (qwen is a single file, which holds none)"
    tokenizer = part("qwen_tokenizer_dir", qwen_tokenizer_dir, "tokenizer", hint)
    t5_tokenizer = part("t5_tokenizer_dir", t5_tokenizer_dir, "t5_tokenizer", "give the folder of the T5 tokenizer")
    if faults:
        raise InputError.from_faults("The model cannot be put together:", faults)
    assert base is not None
    return ModelSources(base, vae_path, text_encoder, tokenizer, t5_tokenizer)
