"""Folders of model parts, indexes and schedules that lie: refused by name, before anything large is built."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anima_peft import AnimaPipeline
from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from anima_peft.models import folders
from anima_peft.models.encoders import load_text_encoder, load_vae
from anima_peft.models.folders import load_part
from anima_peft.models.sources import locate_model, resolve_sources
from tests.components import miniature_pipeline

from .hostile import POSIX, container, opened, sparse


@pytest.fixture(scope="module")
def whole(miniature: MiniatureFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder."""
    folder = tmp_path_factory.mktemp("diffusers")
    pipe = miniature_pipeline(miniature)
    pipe.save_pretrained(folder)
    return folder


def says(**settings: Any) -> Callable[[Path], object]:
    """A `config.json` with other settings."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def holds(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def indexed(name: str) -> Callable[[Path], object]:
    """An index by which the weights are in another file."""

    def change(folder: Path) -> None:
        (weights,) = folder.glob("*.safetensors")
        shutil.copy(weights, folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(opened(weights.read_bytes())[0], name)}
        weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
        weights.rename(weights.with_name("other.safetensors"))

    return change


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def piped(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


NO_MODEL = "config.json does not describe a"
ABSURD = "config.json has an absurd "
OWN = "expected files of its own folder"
KERNELS = "which may fetch code to run; expected sdpa or eager"
# part -> case -> what becomes of its folder, and words of the fault
PARTS: dict[str, dict[str, tuple[Callable[[Path], object], str]]] = {
    "transformer": {
        "no config": (lambda folder: (folder / "config.json").unlink(), "no readable config.json"),
        "an empty config": (holds("config.json", b""), "no readable config.json"),
        "a deep config": (holds("config.json", b'{"a":' * 100_000), "no readable config.json (nested too deeply)"),
        "a config in another encoding": (holds("config.json", b"\xff\xfe{\0}\0"), "no readable config.json"),
        "a list": (holds("config.json", b"[]"), "config.json holds no table of settings"),
        "a huge config": (lambda folder: sparse(folder / "config.json", 2**40), "expected at most"),
        "endless layers": (says(num_layers=10**9), "num_layers = 1000000000, and the weight files"),
        "endless layers in floats": (says(num_layers=1e300), "num_layers = 1e+300, and the weight files"),
        "layers in words": (says(num_layers="many"), NO_MODEL),
        "negative layers": (says(num_layers=-1), "the keys do not fit"),
        "negative heads": (says(num_attention_heads=-4), NO_MODEL),
        "no heads": (says(num_attention_heads=0), "the keys do not fit"),
        "an endless head": (says(attention_head_dim=10**12), ABSURD + "attention_head_dim"),
        "endless positions": (says(max_size=[10**12] * 3), ABSURD + "max_size"),
        "a list of everything": (says(max_size=[1] * 100_000), ABSURD + "max_size"),
        "patches of nothing": (says(patch_size=[0, 0, 0]), NO_MODEL),
        "patches in words": (says(patch_size="abc"), NO_MODEL),
        "null": (says(attention_head_dim=None), NO_MODEL),
        "another model": (
            says(_class_name="FluxTransformer2DModel"),
            "the config is that of a `FluxTransformer2DModel`",
        ),
        "a class in a list": (says(_class_name=["a"]), "the config is that of a `['a']`"),
        "a quantiser that is none": (says(quantization_config=7), "a quantization_config that is no table"),
        "an unknown quantiser": (says(quantization_config={"quant_method": "x"}), "cannot be loaded (ValueError"),
        "pickled weights": (pickled, "no .safetensors file. Pickled weights (.bin, .pt) are not loaded"),
        "weights above it": (indexed("../outside.safetensors"), OWN),
        "weights at the root": (indexed("/etc/passwd"), OWN),
        "weights by a backslash": (indexed("..\\outside.safetensors"), OWN),
        "the folder above as weights": (indexed(".."), OWN),
        "an index without files": (holds("a.safetensors.index.json", b"{}"), "no readable index of weight files"),
        "a deep index": (holds("a.safetensors.index.json", b"[" * 100_000), "no readable index of weight files"),
        "an index of numbers": (
            holds("a.safetensors.index.json", b'{"weight_map": {"a": [1]}}'),
            "no readable index of weight files",
        ),
    },
    "text_encoder": {
        "weights above it": (indexed("../outside.safetensors"), OWN),
        "an adapter's folder": (
            holds("adapter_config.json", b'{"base_model_name_or_path": "/etc", "peft_type": "LORA"}'),
            "has an adapter_config.json, which names another model as its base",
        ),
        "code for its attention": (says(attn_implementation="evil/kernel"), KERNELS),
        "code under the other name": (says(_attn_implementation="evil/kernel@v1:main"), KERNELS),
        "another kernel": (says(attn_implementation="flash_attention_3"), KERNELS),
        "endless layers": (says(num_hidden_layers=10**9, layer_types=None), "num_hidden_layers = 1000000000, and the"),
        "an endless head": (says(head_dim=10**12), ABSURD + "head_dim"),
        "a negative vocabulary": (says(vocab_size=-1), NO_MODEL),
        "an unknown activation": (says(hidden_act="nope"), NO_MODEL),
        "an unknown kind of layer": (says(layer_types=["a", "b"]), NO_MODEL),
        "positions in words": (says(rope_parameters="x"), NO_MODEL),
        "no heads": (says(num_attention_heads=0), NO_MODEL),
        "padding beyond the vocabulary": (says(pad_token_id=10**7), NO_MODEL),
        "a quantiser without a name": (says(quantization_config={}), "cannot be loaded (ValueError"),
        "a quantiser that nobody knows, and no weights": (
            lambda folder: (says(quantization_config={"quant_method": "x"})(folder), says(num_hidden_layers=1)(folder)),
            "does not describe",
        ),
        "another model": (says(model_type="llama"), "the config is that of a `llama`"),
    },
    "vae": {
        "endless layers": (says(num_res_blocks=10**9), "num_res_blocks = 1000000000, and the weight files"),
        "an endless width": (says(base_dim=10**12), ABSURD + "base_dim"),
        "widths in words": (says(dim_mult="abc"), NO_MODEL),
        "no widths": (says(dim_mult=[]), NO_MODEL),
        "no mean": (says(latents_mean=None), "config.json has no latents_mean with a number for each"),
        "a short mean": (says(latents_mean=[1.0]), "config.json has no latents_mean with a number for each"),
        "a std of zero": (says(latents_std=[0.0] * 16), "config.json has no latents_std with a number for each"),
        "a std in words": (says(latents_std=["a"] * 16), "config.json has no latents_std with a number for each"),
        "weights above it": (indexed("../outside.safetensors"), OWN),
    },
}
LOADERS: dict[str, Callable[[Path], object]] = {
    "transformer": lambda folder: load_part(folder, "transformer"),
    "text_encoder": load_text_encoder,
    "vae": load_vae,
}
CASES = [(part, case) for part, cases in PARTS.items() for case in cases]


@pytest.mark.filterwarnings("ignore")  # the libraries' own, of what is refused anyway
@pytest.mark.parametrize(("part", "case"), CASES)
def test_folders_that_are_refused(part: str, case: str, whole: Path, tmp_path: Path) -> None:
    change, words = PARTS[part][case]
    folder = tmp_path / "part"
    shutil.copytree(whole / part, folder)
    change(folder)
    with pytest.raises(InputError) as error:
        LOADERS[part](folder)
    assert str(error.value).startswith(str(folder))
    assert words in str(error.value)


# file of the whole folder, what becomes of its settings, and words of the fault
Settings = dict[str, Any]
OUTSIDE = "names classes outside diffusers"
INDEX, SCHEDULE = "model_index.json", "scheduler/scheduler_config.json"
PIPELINES: dict[str, tuple[str, Callable[[Settings], object], str]] = {
    "a list": (INDEX, lambda said: [], "model_index.json holds no table of settings"),
    "a part that is empty": (INDEX, lambda said: said | {"vae": []}, "a library and one of its classes as vae"),
    "a part that is a table": (INDEX, lambda said: said | {"vae": {"a": 1}}, "a library and one of its classes as vae"),
    "a part that is null": (INDEX, lambda said: said | {"vae": None}, "a library and one of its classes as vae"),
    "an unknown class": (INDEX, lambda said: said | {"vae": ["diffusers", "X"]}, "one of its classes as vae"),
    "a class of numbers": (INDEX, lambda said: said | {"vae": ["diffusers", 1]}, "one of its classes as vae"),
    "a part that is a command": (
        INDEX,
        lambda said: said | {"vae": ["os", "system"]},
        OUTSIDE,
    ),
    "a part that is a path": (INDEX, lambda said: said | {"vae": ["../x", "Y"]}, OUTSIDE),
    "a pipeline of its own": (
        INDEX,
        lambda said: said | {"_class_name": ["evil", "X"]},
        OUTSIDE,
    ),
    "no schedule": (SCHEDULE, lambda said: [], "scheduler_config.json holds no table of settings"),
    "an endless schedule": (SCHEDULE, lambda said: said | {"num_train_timesteps": 10**12}, "an absurd num_train_times"),
    "a negative schedule": (SCHEDULE, lambda said: said | {"num_train_timesteps": -4}, "describes no schedule"),
    "a schedule in words": (SCHEDULE, lambda said: said | {"shift": "a"}, "describes no schedule"),
}


@pytest.mark.parametrize("case", PIPELINES)
def test_indexes_and_schedules_that_are_refused(case: str, whole: Path, tmp_path: Path) -> None:
    name, change, words = PIPELINES[case]
    folder = tmp_path / "whole"
    shutil.copytree(whole, folder)
    file = folder / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError, match=re.escape(words)) as error:
        AnimaPipeline.from_pretrained(folder)
    assert str(file.parent) in str(error.value)


@POSIX
def test_a_pipe_in_place_of_a_config_is_not_waited_for(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(whole / "transformer", folder)
    piped(folder)
    with pytest.raises(InputError, match=r"no readable config\.json .*a pipe, socket or device"):
        load_part(folder, "transformer")


def test_a_quantiser_that_transformers_does_not_know_hides_no_missing_weights(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    shutil.copytree(whole / "text_encoder", folder)
    says(quantization_config={"quant_method": "unheard of"})(folder)
    (weights,) = folder.glob("*.safetensors")
    header, data = opened(weights.read_bytes())
    renamed = {f"{key}_" if key.endswith("norm.weight") else key: value for key, value in header.items()}
    weights.write_bytes(container(renamed, data))
    with pytest.raises(InputError, match="the keys do not fit Qwen3Model"):
        folders.check_part(folder, "text_encoder")


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "\ud800", "x.safetensors", "a/b/c", "~nobody/x"])
def test_paths_that_cannot_be(name: str) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        locate_model(name)
    with pytest.raises(InputError, match="anima_transformer: ") as error:
        resolve_sources(name, vae=name, qwen=name, t5_tokenizer_dir=name, qwen_tokenizer_dir=name)
    assert "vae: no such file or folder" in str(error.value)
