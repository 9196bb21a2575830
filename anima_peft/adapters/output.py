"""Writing an adapter file module by module, so that none but the one at work is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from .._version import __version__
from ..errors import InputError
from ..files import require_writable
from .factors import Factors, converted
from .metadata import describe, with_hashes_of
from .naming import ModuleName
from .streaming import TensorSpool
from .writing import Format, serialize

Bar = Callable[[Iterable[ModuleName]], Iterable[ModuleName]]
"""Shows how far a loop over modules is."""

ORIGIN_KEY = "anima_peft.origin"
"""Metadata key under which a file says what made it, from which files."""
_OF_THE_TENSORS = (
    "format",
    LORA_ADAPTER_METADATA_KEY,
    ORIGIN_KEY,
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
    "modelspec.date",
    "modelspec.architecture",
    "modelspec.implementation",
)
"""What a file says that is not true of other tensors."""


def write_modules(
    path: Path,
    modules: Iterable[tuple[ModuleName, Factors]],
    style: Format,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> dict[ModuleName, Factors]:
    """Write an adapter file, whole or not at all.

    Args:
        path: the new file.
        modules: what is in it; each is asked for when the one before has been written.
        style: one of `writing.FORMATS`.
        dtype: dtype of the factors; None keeps each tensor's own.
        metadata: text that is added to what the weights say of themselves, which wins.

    Returns:
        The modules, their tensors on the meta device.

    Raises:
        InputError: there is no module, or the dtype cannot hold a number.
        OSError: the file cannot be written.
    """
    written: dict[ModuleName, Factors] = {}
    with TensorSpool(path.parent) as spool:
        for name, factors in modules:
            for key, tensor in serialize({name: factors}, style, dtype)[0].items():
                if not tensor.isfinite().all():
                    kind = str(tensor.dtype).removeprefix("torch.")
                    raise InputError(f"{key}: holds numbers that {kind} cannot; nothing was written. Use --dtype fp32.")
                spool.add(key, tensor)
            written[name] = converted(factors, None, "meta")
        if not written:
            raise InputError(f"{path}: there is nothing to write; the adapter would be empty.")
        text = {"format": "pt"} | dict(metadata) | describe(written) | serialize(written, style, dtype)[1]
        spool.save(path, with_hashes_of(spool, text))
    return written


def origin(command: str, **details: object) -> dict[str, str]:
    """The metadata that say what made a file."""
    made = {"anima_peft": __version__, "command": command, **details}
    return {ORIGIN_KEY: json.dumps(made, ensure_ascii=False)}


def still_true(texts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Of the metadata of several files what all of them say, less what belongs to their tensors."""
    first, *others = texts
    return {
        key: value
        for key, value in first.items()
        if key not in _OF_THE_TENSORS and all(other.get(key) == value for other in others)
    }


def require_new_file(path: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output before any work is done.

    Raises:
        InputError: it is one of the inputs, is called otherwise than a safetensors file, exists and may not be
            replaced, or cannot be written.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: expected a name that ends in .safetensors.")
    if any(path.resolve() == given.resolve() for given in inputs):
        raise InputError(f"{path} is an input; choose another name for the output.")
    if path.is_dir():
        raise InputError(f"{path} is a folder; choose another name.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; choose another name or add --overwrite.")
    require_writable("output", path.parent)
