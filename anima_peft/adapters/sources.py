"""Where adapter files are: paths, folders, hub repos; and reading them whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..limited import read_json
from ..models.checkpoints import read_header
from ..models.hub_errors import cause
from .file_config import PEFT_CONFIG_NAME
from .reading import AdapterFile

DIFFUSERS_FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE_NAME = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_CONFIG_BYTES = 2**24
Source = str | os.PathLike[str] | Mapping[str, torch.Tensor]


def read_source(source: Source, **where: Any) -> AdapterFile:
    """All that there is to read of an adapter.

    Args:
        source: safetensors file; folder or hub repo with one; or a mapping from key to tensor.
        where: `weight_name`, `subfolder` and the hub's options; see `locate_adapter`.

    Raises:
        InputError: the file is missing or is not safetensors, or the config beside it cannot be read.
    """
    if isinstance(source, Mapping):
        return AdapterFile("the given tensors", source)
    return read_adapter_file(locate_adapter(source, **where))


def locate_adapter(
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The local safetensors file for a path, a folder or a hub repo id; the options are diffusers' and the hub's.

    Raises:
        InputError: nothing there, several files to choose from, or the hub refuses.
    """
    path = Path(source).expanduser()
    # Not the methods of Path, which fail over names that are too long.
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        folder = path / subfolder if subfolder else path
        # Not hidden ones: a file that is being written is called so.
        found = [folder / weight_name] if weight_name else sorted(folder.glob("[!.]*.safetensors"))
        if len(found) == 1 and found[0].is_file():
            return found[0]
        pickled = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES)
        if pickled and not any(file.is_file() for file in found):
            raise InputError(
                f"{folder}: no .safetensors file, but {', '.join(pickled[:4])}. Pickled files can run code and are not "
                "loaded; save the adapter again with safe_serialization=True, or convert it."
            )
        names = ", ".join(file.name for file in found) or "none"
        raise InputError(f"{folder}: expected one .safetensors file, found {names}; give weight_name.")
    repo = os.fspath(source)
    if repo.count("/") != 1 or repo.endswith(".safetensors"):
        raise InputError(f"{repo}: no such adapter file.")
    fetch = partial(
        hf_hub_download,
        repo,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    try:
        path = Path(fetch(weight_name or DIFFUSERS_FILE_NAME))
        if path.name == PEFT_FILE_NAME:
            fetch(PEFT_CONFIG_NAME)  # lands beside it
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{repo}: no such file here, and the hub cannot give it ({cause(error, token)}).") from error
    return path


def read_adapter_file(path: Path, *, mapped: bool = False) -> AdapterFile:
    """All tensors, the text metadata and PEFT's config, if there is one, of a safetensors file.

    Args:
        path: the file.
        mapped: whether the tensors stay views of the file, which then must not change while they are in use, instead
            of taking memory of their own.

    Raises:
        InputError: the file is missing or is not safetensors, or the config beside it cannot be read.
    """
    checkpoint = read_header(path)
    config = _read_peft_config(path.with_name(PEFT_CONFIG_NAME)) if path.name == PEFT_FILE_NAME else None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in checkpoint.shapes}
    except SafetensorError as error:  # a dtype that torch does not have
        raise InputError(f"{path}: its tensors cannot be read ({error}).") from error
    if not mapped:
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    return AdapterFile(str(path), tensors, dict(checkpoint.metadata), config)


def _read_peft_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None  # the keys may be of another style, which needs none
    try:
        config = read_json(path, _MOST_CONFIG_BYTES)
        if not isinstance(config, dict):
            raise ValueError("it is no table of options")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is not a PEFT config ({error}).") from error
    return config
