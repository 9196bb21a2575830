"""Proof that a cache entry holds what was written under its name: disks fail, and folders come from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

_NAME = "seal"


def seal(key: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What an entry says of itself: its own key, and the sha256 of names, dtypes, shapes and bytes of its tensors.

    Both in one text: safetensors writes several in any order, and equal entries are to be equal files.

    Args:
        key: of the entry.
        tensors: contiguous, on the CPU.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode("utf-8", "surrogatepass"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return {_NAME: f"{key} {digest.hexdigest()}"}


def is_seal_of(key: str, metadata: Mapping[str, str] | None) -> bool:
    """Whether an entry says that it is the one of this key; its tensors are not looked at."""
    return metadata is not None and metadata.get(_NAME, "").startswith(f"{key} ")


def metadata_of(data: bytes) -> Any:
    """The text metadata of a safetensors file that has been read without fault."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__")


def require_shape(
    path: str | Path, tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]
) -> torch.Tensor:
    """One tensor of an entry: `shape`, float32, finite.

    Args:
        path: of the entry, for the message.
        tensors: the entry's.
        name: which of them.
        shape: where it is 0, any number will do.

    Raises:
        InputError: it is missing or another. Whoever made the entry sealed it, but did not make it of that picture.
    """
    tensor = tensors.get(name)
    if (
        tensor is None
        or tensor.dtype != torch.float32
        or tensor.ndim != len(shape)
        or any(wanted not in (0, side) for wanted, side in zip(shape, tensor.shape, strict=True))
        or not tensor.isfinite().all()
    ):
        raise damaged(path, f"expected finite `{name}` of the shape {list(shape)}")
    return tensor


def damaged(path: str | Path, reason: object) -> InputError:
    """The fault of an entry that cannot be used."""
    return InputError(
        f"{path}: this cache entry is missing or damaged ({reason}); remove it and start anew to renew it"
    )
