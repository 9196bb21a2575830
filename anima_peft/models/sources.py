"""Where each part of Anima is read from: single files, a diffusers folder, a hub repo, or a mixture."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from .folders import PARTS, fetch_folder
from .hub_folders import REPO_ID, HubFolder
from .tokenizer_downloads import complete_tokenizer, default_folder
from .tokenizers import QWEN, T5, TokenizerKind


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
    if os.path.exists(path):  # not the method of Path, which fails over names that are too long
        return path
    if not REPO_ID.fullmatch(os.fspath(path_or_repo)):
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
    qwen_tokenizer_sources: Sequence[HubFolder] = (),
    t5_tokenizer_sources: Sequence[HubFolder] = (),
) -> ModelSources:
    """Find every part, and report all that is missing together; only then a tokenizer is fetched.

    A diffusers folder or repo brings all parts; the other options then override single ones. A single file brings
    the DiT and the conditioner only. `qwen` as a folder brings its own tokenizer unless `qwen_tokenizer_dir` is given.

    Args:
        anima_transformer: single file, diffusers folder or hub repo id.
        vae: file or folder.
        qwen: file or folder.
        qwen_tokenizer_dir: folder.
        t5_tokenizer_dir: folder.
        qwen_tokenizer_sources: where Qwen's tokenizer is fetched from if its folder is missing or incomplete, or if it
            is needed and no folder is given (see `tokenizer_downloads.default_folder`); empty fetches nothing.
        t5_tokenizer_sources: the same for the T5 tokenizer.

    Raises:
        InputError: one or more parts are not given or not there, each named by its option, or cannot be fetched.
    """
    search = _Search()
    search.locate_base(anima_transformer)
    vae_path = search.part("vae", vae, "vae", "give qwen_image_vae.safetensors")
    text_encoder = search.part("qwen", qwen, "text_encoder", "give qwen_3_06b_base.safetensors or a Qwen3 folder")
    if qwen_tokenizer_dir is None and qwen is not None and text_encoder.is_dir():
        tokenizer = text_encoder
    else:
        tokenizer = search.tokenizer(QWEN, qwen_tokenizer_dir, qwen_tokenizer_sources, "tokenizer")
    t5_tokenizer = search.tokenizer(T5, t5_tokenizer_dir, t5_tokenizer_sources, "t5_tokenizer")
    if search.faults:
        raise InputError.from_faults("The model cannot be put together:", search.faults)
    assert search.base is not None
    search.complete_tokenizers()
    return ModelSources(search.base, vae_path, text_encoder, tokenizer, t5_tokenizer)


@dataclass
class _Search:
    """What was found so far, and all that is wrong with it."""

    base: Path | None = None
    faults: list[str] = field(default_factory=list)
    to_complete: list[tuple[TokenizerKind, Path, Sequence[HubFolder]]] = field(default_factory=list)

    def locate_base(self, anima_transformer: str | os.PathLike[str]) -> None:
        """Find the file or folder that brings the DiT."""
        try:
            self.base = locate_model(anima_transformer)
        except InputError as error:
            self.faults.append(f"anima_transformer: {error}")
            return
        if self.base.is_dir() and not is_diffusers_folder(self.base):
            self.faults.append(
                f"anima_transformer: {self.base} is a folder without `transformer/config.json` and "
                "`text_conditioner/config.json`; give a diffusers folder or a single .safetensors file."
            )

    def part(self, option: str, given: str | os.PathLike[str] | None, subfolder: str, missing_hint: str) -> Path:
        """A part's path: what was given, else the subfolder of a diffusers folder."""
        if given is None and self.base is not None and self.base.is_dir():
            given = self.base / subfolder
        if given is None:
            # Without a base nothing is known about the layout; its own fault is enough.
            if self.base is not None:
                self.faults.append(f"{option}: required, since anima_transformer is a single file: {missing_hint}")
            return Path()
        path = Path(given).expanduser()
        if not os.path.exists(path):
            self.faults.append(f"{option}: no such file or folder: {path}")
        return path

    def tokenizer(
        self, kind: TokenizerKind, given: str | os.PathLike[str] | None, sources: Sequence[HubFolder], subfolder: str
    ) -> Path:
        """A tokenizer's folder, which need not be there where it may be fetched."""
        if not sources or (given is None and (self.base is None or self.base.is_dir())):
            return self.part(kind.option, given, subfolder, f"give the folder of the {kind.name} tokenizer")
        path = default_folder(kind, sources[0]) if given is None else Path(given).expanduser()
        if os.path.exists(path) and not path.is_dir():
            self.faults.append(f"{kind.option}: expected a folder, got a file: {path}")
        self.to_complete.append((kind, path, sources))
        return path

    def complete_tokenizers(self) -> None:
        """Fetch what the tokenizers' folders lack."""
        failures = []
        for kind, path, sources in self.to_complete:
            try:
                complete_tokenizer(kind, path, sources)
            except InputError as error:
                failures.append(str(error))
        if failures:
            raise InputError("\n".join(failures))
