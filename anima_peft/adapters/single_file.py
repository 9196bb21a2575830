"""The modules of a model in a checkpoint file, by name: their sizes, and the keys under which their tensors are."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import InputError
from ..models.dit import DitFile
from .naming import TEXT_CONDITIONER, TRANSFORMER, ModuleName, ModuleTable
from .streaming import TensorFile

_PLAIN = ("F64", "F32", "BF16", "F16")


def table_of(model: DitFile) -> ModuleTable:
    """The modules of a checkpoint with their sizes; of their weights only the norms', which are small, are read.

    Raises:
        InputError: a norm holds integers.
    """
    components = {TRANSFORMER: model.transformer, TEXT_CONDITIONER: model.conditioner}
    table = ModuleTable(components)
    with TensorFile(model.checkpoint.path) as source:
        for name in table.norms:
            norm = components[name.component].get_submodule(name.path)
            own = {part: source.read(key_of(model, name, part)).float() for part in norm.state_dict()}
            norm.load_state_dict(own, assign=True)
    return table


def key_of(model: DitFile, name: ModuleName, parameter: str) -> str:
    """The key of a module's `weight` or `bias` in the checkpoint."""
    keys = model.transformer_keys if name.component == TRANSFORMER else model.conditioner_keys
    return keys[f"{name.path}.{parameter}"]


def require_unquantized(file: TensorFile, keys: Iterable[str]) -> None:
    """Refuse weights too coarse for an adapter's deltas, by the file's header.

    Raises:
        InputError: one of the keys is of fewer than 16 bits, or no floating point.
    """
    coarse = [key for key in keys if file.entries[key].dtype not in _PLAIN]
    if coarse:
        raise InputError(
            f"{file.path}: {len(coarse)} of the weights in question are quantized, such as {coarse[0]} "
            f"({file.entries[coarse[0]].dtype}), and too coarse for an adapter's deltas; give the bf16 checkpoint."
        )
