"""`AnimaPipeline` from folders and repos, through its own class and through diffusers' general ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.modular_pipelines.anima import AnimaAutoBlocks
from safetensors.torch import load_file, save_file

from anima_peft.errors import InputError
from anima_peft.models import folders
from anima_peft.pipeline import AnimaPipeline, register_with_diffusers
from tests.components import tiny_pipeline_components, tiny_vae

register_with_diffusers()

MODELS = ["text_encoder", "text_conditioner", "transformer", "vae"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> AnimaPipeline:
    return AnimaPipeline(**tiny_pipeline_components(tmp_path_factory.mktemp("components")))


@pytest.fixture(scope="module")
def saved(pipe: AnimaPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model_index.json`."""
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_modular(pipe: AnimaPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `modular_model_index.json` alone, as the stock modular pipeline writes it."""
    folder = tmp_path_factory.mktemp("modular")
    stock = AnimaAutoBlocks().init_pipeline()
    stock.update_components(**pipe.components)
    stock.save_pretrained(str(folder), overwrite_modular_index=True)
    assert not (folder / "model_index.json").exists()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to do harm to."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def modular_folder(saved_modular: Path, tmp_path: Path) -> Path:
    """A copy of `saved_modular` to do harm to."""
    return Path(shutil.copytree(saved_modular, tmp_path / "modular"))


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    return pipe("a red circle", **call, generator=torch.Generator().manual_seed(0)).images


def assert_same(loaded: AnimaPipeline, pipe: AnimaPipeline) -> None:
    for name in MODELS:
        weights, expected = loaded.components[name].state_dict(), pipe.components[name].state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
    # Not equal to the last bit: CPU kernels choose by the alignment of the weights in memory.
    torch.testing.assert_close(draw(loaded), draw(pipe), atol=1e-5, rtol=1e-5)


def edit_weights(part: Path, drop: str = "", add: str = "") -> str:
    """Drop the first key with `drop` in its name, or add a key; returns the key."""
    (file,) = part.glob("*.safetensors")
    tensors = load_file(file)
    key = add or next(name for name in tensors if drop in name)
    if add:
        tensors[add] = torch.zeros(2)
    else:
        del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    return key


@pytest.mark.parametrize(
    "loader", [AnimaPipeline, DiffusionPipeline, AutoPipelineForText2Image, AutoPipelineForImage2Image]
)
def test_diffusers_finds_the_pipeline_of_a_saved_folder(pipe: AnimaPipeline, saved: Path, loader: Any) -> None:
    loaded = loader.from_pretrained(str(saved))
    assert type(loaded) is AnimaPipeline
    assert {norm.eps for norm in _qk_norms(loaded)} == {1e-6}
    assert_same(loaded, pipe)


def _qk_norms(pipe: AnimaPipeline) -> list[torch.nn.Module]:
    named = pipe.transformer.named_modules()
    return [module for name, module in named if name.endswith(("norm_q", "norm_k"))]


@pytest.mark.parametrize("loader", [AnimaPipeline, AutoPipelineForText2Image, AutoPipelineForImage2Image])
def test_from_pipe_shares_the_components(pipe: AnimaPipeline, loader: Any) -> None:
    other = loader.from_pipe(pipe)
    assert type(other) is AnimaPipeline
    assert all(other.components[name] is part for name, part in pipe.components.items())


def test_components_pass_to_and_from_the_stock_modular_pipeline(pipe: AnimaPipeline) -> None:
    stock = AnimaAutoBlocks().init_pipeline()
    stock.update_components(**pipe.components)
    back = AnimaPipeline.from_pipe(stock)
    assert all(back.components[name] is part for name, part in pipe.components.items())


def test_registering_twice_changes_nothing() -> None:
    register_with_diffusers()
    assert diffusers.AnimaPipeline is AnimaPipeline


def test_a_modular_folder_loads_the_same(pipe: AnimaPipeline, saved_modular: Path) -> None:
    loaded = AnimaPipeline.from_pretrained(saved_modular)
    assert {norm.eps for norm in _qk_norms(loaded)} == {1e-6}
    assert_same(loaded, pipe)


def test_places_named_in_a_modular_index_are_not_followed(
    pipe: AnimaPipeline, modular_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((modular_folder / "modular_model_index.json").read_text())
    for entry in index.values():
        if isinstance(entry, list):
            entry[2]["pretrained_model_name_or_path"] = "somebody/else"
            entry[2]["subfolder"] = "../elsewhere"
    (modular_folder / "modular_model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(folders, "snapshot_download", None)
    assert_same(AnimaPipeline.from_pretrained(modular_folder), pipe)


@pytest.mark.parametrize("index", ["saved", "saved_modular"])
def test_dtype_and_given_parts_are_honoured(index: str, request: pytest.FixtureRequest) -> None:
    vae, scheduler = tiny_vae(seed=9), FlowMatchEulerDiscreteScheduler(shift=5.0)
    loaded = AnimaPipeline.from_pretrained(
        request.getfixturevalue(index), torch_dtype=torch.bfloat16, vae=vae, scheduler=scheduler, text_encoder=None
    )
    assert (loaded.vae, loaded.scheduler, loaded.text_encoder) == (vae, scheduler, None)
    assert loaded.transformer.dtype == loaded.text_conditioner.dtype == torch.bfloat16


def test_given_parts_need_no_subfolder(folder: Path) -> None:
    for part in ("vae", "tokenizer"):
        shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=r"(?s)`tokenizer` is missing.*`vae` is missing"):
        AnimaPipeline.from_pretrained(folder)
    vae = tiny_vae()
    assert AnimaPipeline.from_pretrained(folder, vae=vae, tokenizer=None).vae is vae


@pytest.mark.parametrize("which", ["folder", "modular_folder"])
@pytest.mark.parametrize("part", MODELS)
def test_missing_and_unexpected_weights_are_refused_by_name(
    part: str, which: str, request: pytest.FixtureRequest
) -> None:
    harmed = request.getfixturevalue(which)
    dropped = edit_weights(harmed / part, drop="norm")
    added = edit_weights(harmed / part, add="stray.weight")
    with pytest.raises(InputError) as caught:
        AnimaPipeline.from_pretrained(harmed)
    assert dropped in str(caught.value)
    assert added in str(caught.value)
    assert str(harmed / part) in str(caught.value)


def test_weights_of_a_wrong_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"text_embed_dim": 64}))
    with pytest.raises(InputError, match=r"attn2\.to_k\.weight is \[64, 32\], expected \[64, 64\]"):
        AnimaPipeline.from_pretrained(folder)


def test_a_causal_language_models_folder_serves_as_text_encoder(pipe: AnimaPipeline, folder: Path) -> None:
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = {f"model.{key}": tensor for key, tensor in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert_same(AnimaPipeline.from_pretrained(folder), pipe)


@pytest.mark.parametrize("options", [{"max_shard_size": "300KB"}, {"variant": "fp16"}], ids=["shards", "variant"])
def test_shards_and_variants(pipe: AnimaPipeline, tmp_path: Path, options: dict[str, Any]) -> None:
    pipe.save_pretrained(tmp_path, **options)
    names = [file.name for file in (tmp_path / "transformer").glob("*.safetensors")]
    assert len(names) > 1 or "fp16" in names[0]
    loaded = AnimaPipeline.from_pretrained(tmp_path, variant=options.get("variant"))
    assert_same(loaded, pipe)


@pytest.mark.parametrize("part", MODELS)
def test_pickled_weights_are_not_loaded(folder: Path, part: str) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        AnimaPipeline.from_pretrained(folder)
    with pytest.raises(InputError, match="use_safetensors=False"):
        AnimaPipeline.from_pretrained(folder, use_safetensors=False)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "Expected `CosmosTransformer3DModel`"),
        ("text_encoder", {"model_type": "llama"}, "`llama`. Expected `qwen3`"),
    ],
)
def test_parts_of_another_model_are_refused(folder: Path, part: str, change: dict[str, str], message: str) -> None:
    config = json.loads((folder / part / "config.json").read_text())
    (folder / part / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        AnimaPipeline.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[1]"])
def test_unreadable_configs_are_refused(folder: Path, text: str) -> None:
    (folder / "vae" / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"vae: .*config\.json"):
        AnimaPipeline.from_pretrained(folder)


def test_classes_of_other_libraries_are_not_imported(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["this", "Scheduler"]}))
    with pytest.raises(InputError, match="scheduler: this"):
        AnimaPipeline.from_pretrained(folder)


def test_a_repo_is_fetched_without_pickles_and_code(
    pipe: AnimaPipeline, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(saved)

    monkeypatch.setattr(folders, "snapshot_download", download)
    options = {"revision": "main", "token": "secret", "cache_dir": str(tmp_path), "local_files_only": True}
    loaded = AnimaPipeline.from_pretrained("somebody/anima", **options, vae=pipe.vae)
    patterns = asked.pop("allow_patterns")
    assert asked == {"repo": "somebody/anima", **options}
    assert {pattern.rpartition(".")[2] for pattern in patterns} == {"json", "safetensors", "txt", "model"}
    assert {pattern.partition("/")[0] for pattern in patterns if "/" in pattern} == set(pipe.components) - {"vae"}
    assert loaded.config["_name_or_path"] == "somebody/anima"
    assert_same(loaded, pipe)


def test_nothing_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder here"):
        AnimaPipeline.from_pretrained(tmp_path / "nothing" / "there")
    (tmp_path / "file.safetensors").touch()
    with pytest.raises(InputError, match="from_single_files"):
        AnimaPipeline.from_pretrained(tmp_path / "file.safetensors")
    with pytest.raises(InputError, match="subfolder `transformer` is missing"):
        AnimaPipeline.from_pretrained(tmp_path)
