"""Safetensors files of other people: their headers, an audit of every key, and weights without a second copy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..texts import cut, escaped

Module = TypeVar("Module", bound=torch.nn.Module)
_SHOWN_KEYS = 8
_LONGEST_KEY = 200
_MOST_BLOCKS = 1000


@dataclass(frozen=True)
class Checkpoint:
    """One safetensors file's header. Nothing of its data has been read.

    Attributes:
        path: the file.
        shapes: key as stored -> shape.
        metadata: the file's own text metadata; never trusted, only shown.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def with_prefix(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the keys below `prefix`, under their names without it."""
        return {key.removeprefix(prefix): shape for key, shape in self.shapes.items() if key.startswith(prefix)}


def read_header(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the names and shapes of a safetensors file.

    safetensors checks the declared sizes against the file's length before anything is allocated.

    Raises:
        InputError: the file is missing, is not a safetensors file, or its header does not hold.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file. Expected a .safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({error}). "
            "Pickled checkpoints (.pt, .pth, .bin, .ckpt) are not loaded; download the file again or convert it."
        ) from error
    return Checkpoint(path, shapes, metadata)


def count_numbers(keys: Iterable[str], prefix: str, path: str | os.PathLike[str]) -> int:
    """How many different numbers stand after `prefix`, such as "blocks."; gaps show up as missing keys later.

    Raises:
        InputError: more than any model has; to build one would take hours.
    """
    count = len({key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)})
    if count > _MOST_BLOCKS:
        raise InputError(f"{path}: has {count} different numbers after `{prefix}`, expected at most {_MOST_BLOCKS}.")
    return count


class Sizes:
    """A model's sizes out of its weights' shapes; what is not as expected names the file and the key.

    Args:
        shapes: key -> shape.
        path: the file, for messages.
        prefix: what stands before the keys in the file.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], path: str | os.PathLike[str], prefix: str = ""):
        self._shapes, self._path, self._prefix = shapes, path, prefix

    def __call__(self, key: str, dim: int, rank: int = 2) -> int:
        """The length of one axis of a weight that has `rank` of them.

        Raises:
            InputError: there is no such weight, or it has other axes, or one of length zero.
        """
        key = self._prefix + key
        shape = self._shapes.get(key)
        if shape is None:
            raise InputError(f"{self._path}: missing key `{key}`; the file is incomplete or of another model.")
        if len(shape) != rank or 0 in shape:
            raise InputError(f"{self._path}: `{key}` has shape {list(shape)}, expected {rank} dimensions above zero.")
        return shape[dim]


def build_empty(build: Callable[[], Module]) -> Module:
    """Build a module whose parameters lie on the meta device: no memory, no random numbers.

    Buffers that are not part of checkpoints (rotary frequencies) are computed as usual.
    """
    with no_init_weights(), init_empty_weights(include_buffers=False):
        return build()


def require_fit(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    keys: Mapping[str, str],
    *,
    surplus: Iterable[str] = (),
    what: str,
) -> None:
    """Refuse a file unless it has a tensor of the right shape for every parameter, and nothing else.

    Args:
        module: as `build_empty` makes it.
        checkpoint: the file's header.
        keys: the module's state-dict name -> key in the file.
        surplus: keys of the file that belong nowhere.
        what: the part's name for messages, such as "Anima DiT".

    Raises:
        InputError: a missing, unexpected or misshapen key; the message lists them.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [keys.get(name, name) for name in expected if keys.get(name) not in checkpoint.shapes]
    unexpected = [*surplus, *(key for name, key in keys.items() if name not in expected)]
    misshapen = [
        f"{keys[name]} is {list(checkpoint.shapes[keys[name]])}, expected {list(shape)}"
        for name, shape in expected.items()
        if keys.get(name) in checkpoint.shapes and checkpoint.shapes[keys[name]] != shape
    ]
    require_all_keys(checkpoint.path, what, missing, unexpected, misshapen)


def load_weights(
    module: torch.nn.Module, checkpoint: Checkpoint, keys: Mapping[str, str], torch_dtype: torch.dtype | None = None
) -> None:
    """Give every parameter of an empty `module` its tensor from the file, one at a time, straight in its dtype.

    Args:
        module: built by `build_empty`; the file fits it (`require_fit`).
        checkpoint: the file's header.
        keys: the module's state-dict name -> key in the file.
        torch_dtype: dtype of the result; None keeps the file's.

    Raises:
        InputError: a tensor holds integers; to scale them back is the business of the format that made them.
    """
    tensors = {}
    with safe_open(checkpoint.path, framework="pt") as file:
        for name in module.state_dict():
            # The tensor is a view of the mapped file. A copy of its own keeps the model whole when the file is
            # replaced, and lets Windows users delete it.
            try:
                stored = file.get_tensor(keys[name])
            except SafetensorError as error:  # a dtype that torch does not have
                raise InputError(f"{checkpoint.path}: `{keys[name]}` cannot be read ({error}).") from error
            if not stored.is_floating_point():
                raise InputError(f"{checkpoint.path}: `{keys[name]}` is {stored.dtype}, expected floating point.")
            tensors[name] = stored.to(torch_dtype or stored.dtype, copy=True)
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False).eval()


def require_all_keys(
    path: Path, what: str, missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str] = ()
) -> None:
    """Raise InputError naming the keys if any list is not empty.

    A model with random weights in the place of missing ones would run without a word and draw noise.
    """
    faults = [
        f"{len(keys)} {kind}: {_some(keys)}"
        for kind, keys in (
            ("missing", sorted(missing)),
            ("unexpected", sorted(unexpected)),
            ("with a wrong shape", sorted(misshapen)),
        )
        if keys
    ]
    if faults:
        raise InputError.from_faults(f"{path}: the keys do not fit {what}:", faults)


def _some(keys: list[str]) -> str:
    rest = len(keys) - _SHOWN_KEYS
    shown = [escaped(cut(key, _LONGEST_KEY)) for key in keys[:_SHOWN_KEYS]]
    return ", ".join(shown) + (f" … and {rest} more" if rest > 0 else "")


def guess_content(shapes: Iterable[str]) -> str:
    """A few words on what a checkpoint seems to be, for the message that refuses it."""
    keys = list(shapes)

    def any_key(*parts: str) -> bool:
        """Whether some key has one of the parts in it."""
        return any(part in key for key in keys for part in parts)

    if any_key("lora_down", "lora_A", "lora_up", "lokr_w", "hada_w"):
        return "an adapter (LoRA or LoKr)"
    if any_key("transformer_blocks."):
        return "a transformer in diffusers' layout (give the whole diffusers folder instead)"
    if any_key("x_embedder.proj.1"):
        return "a Cosmos DiT"
    if any_key("embed_tokens", "gate_proj"):
        return "a language model such as Qwen3"
    if any_key("decoder.", "encoder."):
        return "a VAE"
    return "something else"
