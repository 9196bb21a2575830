"""What an adapter file says of itself: kohya's `ss_*` keys and the model spec. True values only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import torch
from safetensors.torch import save

from .._version import __version__
from .factors import FullDelta, LoHaFactors, LoKrFactors, NormDelta, Weights
from .streaming import TensorSpool

_LEGACY_OFFSET, _LEGACY_END = 0x100000, 0x110000


def describe(weights: Weights) -> dict[str, str]:
    """The metadata that follows from the weights alone: network, rank and alpha, what kind of model spec.

    Ranks or alphas that differ between modules are written as "Dynamic", as sd-scripts' resize tool does. LoKr's are
    those it was configured with, 100000 and more for full matrices.
    """
    linears = [factors for factors in weights.values() if not isinstance(factors, (NormDelta, FullDelta))]
    dims = {factors.dim if isinstance(factors, LoKrFactors) else factors.rank for factors in linears}
    alphas = {factors.alpha for factors in linears}
    kinds = {LoKrFactors: "lokr", LoHaFactors: "loha"}
    kind = next((name for kind, name in kinds.items() if any(isinstance(factors, kind) for factors in linears)), "lora")
    text = {
        "ss_network_module": f"networks.{kind}_anima",
        "ss_base_model_version": "anima",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"anima/{kind}",
        "modelspec.implementation": f"https://github.com/huggingface/diffusers (anima_peft {__version__})",
        "modelspec.prediction_type": "flow",
        "modelspec.date": datetime.now(UTC).replace(microsecond=0, tzinfo=None).isoformat(),
    }
    if linears:
        text["ss_network_dim"] = str(dims.pop()) if len(dims) == 1 else "Dynamic"
        text["ss_network_alpha"] = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    return text


def with_hashes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Add kohya's two hashes and the model spec's.

    `sshs_model_hash` is the sha256 of everything behind the safetensors header, `sshs_legacy_hash` the first eight
    digits over 64 KiB at 1 MiB, both of the file as it is with only the `ss_*` metadata
    (sd-scripts, library/train_util.py, precalculate_safetensors_hashes).
    """
    ready = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    content = save(ready, _hashed_text(metadata))
    start = 8 + int.from_bytes(content[:8], "little")
    return _hashed(metadata, content[:start], [memoryview(content)[start:]])


def with_hashes_of(spool: TensorSpool, metadata: Mapping[str, str]) -> dict[str, str]:
    """The same for tensors that lie on the disk."""
    return _hashed(metadata, spool.header(_hashed_text(metadata)), spool.data())


def _hashed_text(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


def _hashed(metadata: Mapping[str, str], header: bytes, data: Iterable[bytes | memoryview]) -> dict[str, str]:
    whole, window, position = hashlib.sha256(), hashlib.sha256(), len(header)
    window.update(header[_LEGACY_OFFSET:_LEGACY_END])
    for chunk in data:
        whole.update(chunk)
        window.update(chunk[max(0, _LEGACY_OFFSET - position) : max(0, _LEGACY_END - position)])
        position += len(chunk)
    model_hash, legacy = whole.hexdigest(), window.hexdigest()[:8]
    return dict(metadata) | {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy,
        "modelspec.hash_sha256": f"0x{model_hash}",
    }
