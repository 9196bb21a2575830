"""The hashes in an adapter file's metadata."""

from __future__ import annotations

import hashlib
from io import BytesIO

import torch
from safetensors.torch import save

from anima_peft.adapters.metadata import with_hashes


def test_hashes_are_those_of_sd_scripts_for_files_beyond_the_legacy_window() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"lora_{i}": torch.randn(300, 400, generator=generator) for i in range(3)}
    metadata = {"ss_network_dim": "4", "modelspec.title": "long " * 100, "sshs_model_hash": "an old one"}
    hashed = with_hashes(tensors, metadata)

    # library/train_util.py: precalculate_safetensors_hashes, addnet_hash_safetensors and addnet_hash_legacy
    file = BytesIO(save(tensors, {"ss_network_dim": "4"}))
    file.seek(8 + int.from_bytes(file.read(8), "little"))
    assert hashed["sshs_model_hash"] == hashlib.sha256(file.read()).hexdigest()
    file.seek(0x100000)
    window = file.read(0x10000)
    assert len(window) == 0x10000
    assert hashed["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]
    assert hashed["modelspec.hash_sha256"] == "0x" + hashed["sshs_model_hash"]
    assert {key: hashed[key] for key in ("ss_network_dim", "modelspec.title")} == {
        key: metadata[key] for key in ("ss_network_dim", "modelspec.title")
    }
