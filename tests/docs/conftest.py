"""The working folder that executed blocks of a page find themselves in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from anima_peft import AnimaTransformerModel, LoKrConfig, LoraConfig
from anima_peft.miniature import MiniatureFiles

_TRAIN_ARGS = """
anima_transformer = "miniature/anima_miniature.safetensors"
vae = "miniature/qwen_image_vae_miniature.safetensors"
qwen = "miniature/qwen_3_miniature.safetensors"
qwen_tokenizer_dir = "miniature/qwen_tokenizer"
t5_tokenizer_dir = "miniature/t5_tokenizer"
network_module = "networks.lora_anima"
learning_rate = 1e-4
max_train_steps = 3
mixed_precision = "no"
output_dir = "output"
output_name = "my_lora"
"""
_DATASET = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "miniature/pictures"\n'


@pytest.fixture(scope="session")
def example_adapters(miniature: MiniatureFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter files under the names that pages use, each with values in it."""
    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "my_lora": LoraConfig(r=4, lora_alpha=4, train_norm=True),
        "style": LoraConfig(r=2, lora_alpha=2),
        "my_lokr": LoKrConfig(r=100_000, alpha=100_000),
    }
    for name, config in configs.items():
        model = AnimaTransformerModel.from_pretrained(miniature.transformer)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(3)
            for parameter in model.add_adapter(config):
                parameter.normal_(std=0.05)
        model.save_lora_adapter(folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def workplace(
    miniature: MiniatureFiles, example_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder, with what pages may name: the miniature of random weights in `miniature/`, the adapters
    `my_lora.safetensors` (LoRA with norms), `style.safetensors` (LoRA) and `my_lokr.safetensors` (full LoKr), and
    `train_args.toml` and `dataset.toml`, which train on it for three steps."""
    shutil.copytree(miniature.transformer.parent, tmp_path / "miniature")
    for file in example_adapters.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "train_args.toml").write_text(_TRAIN_ARGS, encoding="utf-8")
    (tmp_path / "dataset.toml").write_text(_DATASET, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path
