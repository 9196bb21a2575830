"""What the tests of the commands on adapter files share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anima_peft.adapters.factors import Factors, FullDelta, NormDelta
from anima_peft.adapters.naming import ModuleName
from anima_peft.adapters.reading import AdapterFile, parse
from anima_peft.cli import main
from anima_peft.miniature.random_weights import native_state_dict
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import Tensors, dense, table, tensors_by_key

Deltas = dict[tuple[ModuleName, str], torch.Tensor]


def run(*arguments: object) -> int:
    """Exit code of `anima-peft` with these arguments; argparse's own exit is one, too."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)


def adapter_file(factors: Mapping[ModuleName, Factors], path: Path, metadata: dict[str, str] | None = None) -> Path:
    return tensor_file(tensors_by_key(factors), path, metadata)


def tensor_file(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def checkpoint(
    model: AnimaTransformerModel, path: Path, metadata: dict[str, str] | None = None, prefix: str = "net."
) -> Path:
    """The model as the single file that ComfyUI users have."""
    native = native_state_dict(model.transformer, model.text_conditioner, prefix)
    return tensor_file(native, path, metadata)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def origin_of(path: Path) -> dict[str, Any]:
    return json.loads(metadata_of(path)["anima_peft.origin"])


def parsed(path: Path, model: AnimaTransformerModel) -> dict[ModuleName, Factors]:
    return parse(AdapterFile(str(path), load_file(path), metadata_of(path)), table(model))


def deltas(factors: Mapping[ModuleName, Factors], strength: float = 1.0) -> Deltas:
    """What is added to every weight and bias, in float64."""
    found: Deltas = {}
    for name, f in factors.items():
        if not (isinstance(f, (NormDelta, FullDelta)) and f.weight is None):
            found[name, "weight"] = strength * dense(f)
        if f.bias is not None:
            found[name, "bias"] = strength * f.bias.double()
    return found


def added(*parts: Deltas) -> Deltas:
    total: Deltas = {}
    for part in parts:
        for key, delta in part.items():
            total[key] = total[key] + delta if key in total else delta
    return total


def assert_same_deltas(found: Deltas, expected: Deltas, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        assert float((found[key] - delta).norm() / delta.norm()) <= tolerance, key


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
