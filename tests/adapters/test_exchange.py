"""Adapters from and to files: the same output after every way there and back, and nothing changed by what fails."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers
from diffusers.modular_pipelines.anima import AnimaAutoBlocks
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from anima_peft.adapters import sources
from anima_peft.adapters.lora import LoraConfig
from anima_peft.adapters.writing import FORMATS
from anima_peft.errors import InputError
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    STYLES,
    TO_Q,
    Factors,
    as_file,
    assert_close,
    assert_same_weights,
    explicit,
    kohya_stem,
    output,
    random_factors,
    tiny_model,
)


@pytest.fixture
def model() -> AnimaTransformerModel:
    return tiny_model()


@pytest.fixture
def factors() -> Factors:
    """An adapter of both components with another rank and alpha in every module."""
    return random_factors(tiny_model(), mixed=True)


def trained_adapter(**options: Any) -> AnimaTransformerModel:
    """A model with an adapter made by `add_adapter`, as training leaves it."""
    model = tiny_model()
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 1, "target_modules": "all-linear", "train_text_conditioner": True}
    for parameter in model.add_adapter(LoraConfig(**config | options)):
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alphas", [True, False], ids=["alphas", "folded"])
def test_every_style_loads_to_the_explicit_weights_output(
    model: AnimaTransformerModel, factors: Factors, tmp_path: Path, style: str, alphas: bool
) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file(as_file(factors, style, alphas=alphas), path)
    base = output(model)
    assert model.load_lora_adapter(path) == "default"
    assert_close(output(model), output(explicit(factors)))
    assert (output(model) - base).abs().max() > 0.1
    assert not any(parameter.requires_grad for parameter in model.parameters())


OPTIONS: dict[str, dict[str, Any]] = {
    "alpha below the rank": {},
    "alpha above the rank": {"lora_alpha": 7.3},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "ranks and alphas by module": {
        "rank_pattern": {"to_q": 6, "net.2": 1, r"blocks\.1\.mlp\.0": 3},
        "alpha_pattern": {"to_k": 9.0, "q_proj": 0.5},
    },
    "the DiT alone": {"train_text_conditioner": False},
    "the conditioner alone": {"target_modules": r"llm_adapter\..*"},
}


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_saved_adapter_loads_back_to_the_same_output(
    model: AnimaTransformerModel, tmp_path: Path, style: Any, options: dict[str, Any]
) -> None:
    source = trained_adapter(**options)
    path = source.save_lora_adapter(tmp_path / "adapter.safetensors", format=style)
    model.load_lora_adapter(path)
    assert_close(output(model), output(source))
    assert (output(model) - output(tiny_model())).abs().max() > 1e-3
    again = model.save_lora_adapter(tmp_path / "again.safetensors", format=style)
    first, second = load_file(path), load_file(again)
    if "use_rslora" in options:  # its alpha is written as alpha times the root of the rank
        assert first.keys() == second.keys()
    else:
        assert_same_weights(second, first)


@pytest.mark.parametrize("style", ["comfy", "diffusers"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_diffusers_own_pipeline_loads_our_files_to_the_same_output(
    model: AnimaTransformerModel, tmp_path: Path, style: Any, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    source = trained_adapter(**options)
    path = source.save_lora_adapter(tmp_path / "adapter.safetensors", format=style)
    pipe = AnimaAutoBlocks().init_pipeline()
    pipe.update_components(transformer=model.transformer, text_conditioner=model.text_conditioner)
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(str(path))
    assert [record.message for record in caplog.records if "lora" in record.message.lower()] == []
    assert_close(output(model), output(source))


def test_diffusers_own_model_loads_the_transformers_part(tmp_path: Path) -> None:
    source = trained_adapter(train_text_conditioner=False)
    expected = output(source)
    comfy = load_file(source.save_lora_adapter(tmp_path / "comfy.safetensors", format="comfy"))
    diffusers_file = source.save_lora_adapter(tmp_path / "diffusers.safetensors", format="diffusers")
    for given in (_convert_non_diffusers_anima_lora_to_diffusers(comfy), str(diffusers_file)):
        model = tiny_model()
        transformer: CosmosTransformer3DModel = model.transformer
        transformer.load_lora_adapter(given, prefix="transformer")
        assert_close(output(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_base_takes_the_adapter_in_its_own_dtype(factors: Factors, dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    model.load_lora_adapter(as_file(factors, "kohya"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert_close(output(model).float(), output(explicit(factors)), 10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_hold_the_wanted_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source = trained_adapter()
    tensors = load_file(source.save_lora_adapter(tmp_path / "adapter.safetensors", dtype=dtype))
    assert {tensor.dtype for key, tensor in tensors.items() if not key.endswith("alpha")} == {dtype}
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")} == {1.0}


@pytest.mark.parametrize("style", FORMATS)
def test_metadata_is_true(tmp_path: Path, style: Any) -> None:
    source = trained_adapter(lora_alpha=2.5)
    given = {"ss_steps": "7", "modelspec.title": "mine", "ss_network_module": "my.module"}
    path = source.save_lora_adapter(tmp_path / "adapter.safetensors", format=style, metadata=given)
    metadata = metadata_of(path)
    assert metadata.items() >= given.items()
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "2.5"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "anima/lora"
    assert metadata["modelspec.prediction_type"] == "flow"
    assert metadata["format"] == "pt"
    assert ("lora_adapter_metadata" in metadata) == (style == "diffusers")

    # sd-scripts, library/train_util.py: precalculate_safetensors_hashes
    alone = save(load_file(path), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    header = 8 + int.from_bytes(alone[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(alone[header:]).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(alone[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content[header:]).hexdigest()


def test_metadata_of_ranks_that_differ(tmp_path: Path) -> None:
    source = trained_adapter(rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 3.0})
    metadata = metadata_of(source.save_lora_adapter(tmp_path / "adapter.safetensors"))
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_the_strength_is_not_saved(tmp_path: Path) -> None:
    source = trained_adapter()
    expected = load_file(source.save_lora_adapter(tmp_path / "full.safetensors"))
    source.set_adapters("default", 0.25)
    source.fuse_lora(0.5)
    assert_same_weights(load_file(source.save_lora_adapter(tmp_path / "weak.safetensors")), expected)


def test_of_several_adapters_the_named_one_is_saved(model: AnimaTransformerModel, tmp_path: Path) -> None:
    files = [as_file(random_factors(model, (TO_Q,), seed=seed), "kohya") for seed in range(2)]
    for number, tensors in enumerate(files):
        model.load_lora_adapter(tensors, f"number {number}")
    for number, tensors in enumerate(files):
        path = model.save_lora_adapter(tmp_path / f"{number}.safetensors", f"number {number}")
        assert_same_weights(load_file(path), tensors)
    with pytest.raises(InputError, match="no adapter named 'default'; loaded are: number 0, number 1"):
        model.save_lora_adapter(tmp_path / "2.safetensors")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_receives_diffusers_file_name(tmp_path: Path) -> None:
    source = trained_adapter()
    path = source.save_lora_adapter(tmp_path / "new" / "folder", format="diffusers")
    assert path == tmp_path / "new" / "folder" / "pytorch_lora_weights.safetensors"
    model = tiny_model()
    model.load_lora_adapter(tmp_path / "new" / "folder")
    assert_close(output(model), output(source))


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'peft': expected one of kohya, comfy, diffusers"):
        trained_adapter().save_lora_adapter(tmp_path / "adapter.safetensors", format="peft")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained_adapter()
    path = source.save_lora_adapter(tmp_path / "adapter.safetensors")
    before = path.read_bytes()
    source.delete_adapters("default")
    source.add_adapter(LoraConfig(r=1))

    def full_disk(_: Any, file: Path, metadata: Any = None) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("anima_peft.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        source.save_lora_adapter(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def damaged(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = as_file(random_factors(tiny_model(), mixed=True), "kohya")
        change(tensors)
        save_file(tensors, path)

    return write


BROKEN: dict[str, Callable[[Path], Any]] = {
    "an unknown key": damaged(lambda t: t.update({"lora_unet_blocks_7_mlp_layer1.alpha": torch.ones(())})),
    "a missing factor": damaged(lambda t: t.pop(f"{kohya_stem(TO_Q)}.lora_up.weight")),
    "a misshapen factor": damaged(lambda t: t.update({f"{kohya_stem(TO_Q)}.lora_up.weight": torch.zeros(3, 2)})),
    "a module twice": damaged(lambda t: t.update({f"net.{TO_Q}.alpha": torch.ones(())})),
    "NaN alpha": damaged(lambda t: t.update({f"{kohya_stem(TO_Q)}.alpha": torch.tensor(float("nan"))})),
    "NaN in the last factor": damaged(lambda t: t[list(t)[-2]].fill_(float("nan"))),
    "DoRA": damaged(lambda t: t.update({f"{kohya_stem(TO_Q)}.dora_scale": torch.zeros(64, 1)})),
    "no keys": lambda path: save_file({}, path),
    "another model's keys": lambda path: save_file({"lora_unet_down_blocks_0.alpha": torch.ones(())}, path),
    "no safetensors": lambda path: path.write_text("text"),
    "a model": lambda path: save_file({"net.x_embedder.proj.1.weight": torch.zeros(2, 2)}, path),
    "nothing there": lambda path: None,
}


@pytest.mark.parametrize("beside", [False, True], ids=["first adapter", "beside another"])
@pytest.mark.parametrize("write", BROKEN.values(), ids=BROKEN)
def test_a_load_that_fails_changes_nothing(
    model: AnimaTransformerModel, tmp_path: Path, write: Callable[[Path], Any], beside: bool
) -> None:
    if beside:
        model.load_lora_adapter(as_file(random_factors(model, seed=3), "kohya"), "other")
        model.set_adapters("other", 0.5)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modules, before = [type(module) for module in model.modules()], output(model)
    write(tmp_path / "broken.safetensors")
    with pytest.raises(InputError, match=r"broken\.safetensors"):
        model.load_lora_adapter(tmp_path / "broken.safetensors", "new")
    assert_same_weights(dict(model.state_dict()), state)
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(output(model), before)
    model.load_lora_adapter(as_file(random_factors(model), "kohya"), "new")  # the name is still free


def test_names_of_adapters(model: AnimaTransformerModel) -> None:
    tensors = as_file(random_factors(model, (TO_Q,)), "kohya")
    names = [model.load_lora_adapter(tensors, None) for _ in range(3)]
    assert names == ["default_0", "default_1", "default_2"]
    model.delete_adapters("default_1")
    assert model.load_lora_adapter(tensors, None) == "default_1"
    for taken in ("default_0", "", "a.b"):
        with pytest.raises(InputError):
            model.load_lora_adapter(tensors, taken)


def test_the_given_tensors_stay_the_givers(model: AnimaTransformerModel) -> None:
    tensors = as_file(random_factors(model), "kohya")
    model.load_lora_adapter(tensors)
    before = output(model)
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(output(model), before)


def test_loaded_factors_are_not_the_files(model: AnimaTransformerModel, tmp_path: Path) -> None:
    path, tensors = tmp_path / "adapter.safetensors", as_file(random_factors(model), "kohya")
    save_file(tensors, path)
    read = sources.read_adapter_file(path).tensors
    model.load_lora_adapter(path)
    before = output(model)
    with path.open("r+b") as file:  # in place: a mapping of the file would see it
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    assert torch.equal(output(model), before)
    assert_same_weights(read, tensors)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two adapters, one of them in a subfolder, and a file that is still being written."""
    (tmp_path / "sub").mkdir()
    for name in ("a.safetensors", ".a-123.tmp.safetensors", "sub/b.safetensors"):
        save_file(as_file(random_factors(tiny_model(), (TO_Q,)), "kohya"), tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "options", "found"),
    [
        ("a.safetensors", {}, "a.safetensors"),
        ("", {}, "a.safetensors"),
        ("", {"weight_name": "a.safetensors"}, "a.safetensors"),
        ("", {"subfolder": "sub"}, "sub/b.safetensors"),
        ("", {"subfolder": "sub", "weight_name": "b.safetensors"}, "sub/b.safetensors"),
    ],
)
def test_files_are_found_as_in_diffusers(folder: Path, given: str, options: dict[str, str], found: str) -> None:
    assert sources.locate_adapter(folder / given, **options) == folder / found
    assert sources.locate_adapter(str(folder / given), **options) == folder / found
    tiny_model().load_lora_adapter(folder / given, **options)


def test_which_file_of_a_folder_must_be_said(folder: Path) -> None:
    (folder / "sub" / "c.safetensors").touch()
    (folder / "empty").mkdir()
    for options, message in (
        ({"subfolder": "sub"}, r"found b\.safetensors, c\.safetensors; give weight_name"),
        ({"subfolder": "empty"}, "found none"),
        ({"weight_name": "d.safetensors"}, r"found d\.safetensors|expected one"),
    ):
        with pytest.raises(InputError, match=message):
            sources.locate_adapter(folder, **options)


@pytest.mark.parametrize("given", ["nothing.safetensors", "folder/nothing.safetensors", "nothing", "a/b/c"])
def test_what_is_no_repo_id_is_not_looked_for_on_the_hub(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "hf_hub_download", None)
    with pytest.raises(InputError, match="no such adapter file"):
        sources.locate_adapter(given)


def test_an_adapter_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repo: str, name: str, **options: Any) -> str:
        asked.append((repo, name, {key: value for key, value in options.items() if value}))
        return str(folder / "a.safetensors")

    monkeypatch.setattr(sources, "hf_hub_download", download)
    model = tiny_model()
    model.load_lora_adapter("someone/adapter", "one")
    model.load_lora_adapter("someone/adapter", "two", weight_name="x.safetensors", subfolder="s", revision="r")
    assert asked == [
        ("someone/adapter", "pytorch_lora_weights.safetensors", {}),
        ("someone/adapter", "x.safetensors", {"subfolder": "s", "revision": "r"}),
    ]
    with pytest.raises(TypeError, match="adapter_weight"):
        model.load_lora_adapter("someone/adapter", "three", adapter_weight=0.5)


def test_the_hubs_refusal_is_one_clear_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise ConnectionError("offline")

    monkeypatch.setattr(sources, "hf_hub_download", download)
    with pytest.raises(
        InputError, match=r"someone/adapter: no such file here, .* cannot give it \(ConnectionError: offline\)"
    ):
        sources.locate_adapter("someone/adapter")


def test_diffusers_metadata_is_pefts_config(tmp_path: Path) -> None:
    path = trained_adapter(rank_pattern={"to_q": 2}).save_lora_adapter(tmp_path / "a.safetensors", format="diffusers")
    config = json.loads(metadata_of(path)["lora_adapter_metadata"])
    assert {key.split(".")[0] for key in config} == {"transformer", "text_conditioner"}
    assert config["transformer.peft_type"] == "LORA"
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (4, 4.0)
    assert set(config["transformer.rank_pattern"].values()) == {2}
    assert len(config["transformer.target_modules"]) == 6 + 2 * 16
