"""Text encoder and VAE from every layout people have, against the modules that the files were made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles, wan_state_dict
from anima_peft.models.encoders import check_encoders, load_text_encoder, load_vae
from tests.components import randomise, tiny_transformer

Tensors = dict[str, torch.Tensor]


def qwen(**changes: Any) -> Qwen3Model:
    """Qwen3 with random weights; heads wider than hidden size / heads, as in the real one."""
    sizes = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
    return randomise(Qwen3Model(Qwen3Config(**sizes | heads | rope | changes)), 2)


def vae(**changes: Any) -> AutoencoderKLQwenImage:
    return randomise(AutoencoderKLQwenImage(**{"base_dim": 8} | changes), 3)


def hidden_states(model: Qwen3Model) -> torch.Tensor:
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).last_hidden_state


def reconstruction(model: AutoencoderKLQwenImage) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.rand(1, 3, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.mode()
        return latents, model.decode(latents, return_dict=False)[0]


def with_prefix(model: Qwen3Model, prefix: str) -> Tensors:
    return {prefix + key: tensor for key, tensor in model.state_dict().items()}


def write_file(tensors: Tensors, path: Path) -> Path:
    save_file(tensors, path)
    return path


def qwen_layouts(model: Qwen3Model, folder: Path) -> dict[str, Path]:
    """The same encoder as files and folders."""
    head = {"lm_head.weight": torch.ones(60, 24)}
    model.save_pretrained(folder / "base")
    causal = Qwen3ForCausalLM(model.config)
    causal.model = model
    causal.save_pretrained(folder / "causal")
    return {
        "model.": write_file(with_prefix(model, "model."), folder / "prefixed.safetensors"),
        "bare": write_file(with_prefix(model, ""), folder / "bare.safetensors"),
        "model. and head": write_file(with_prefix(model, "model.") | head, folder / "head.safetensors"),
        "bare and head": write_file(with_prefix(model, "") | head, folder / "bare_head.safetensors"),
        "folder": folder / "base",
        "causal folder": folder / "causal",
    }


@pytest.mark.parametrize("layout", ["model.", "bare", "model. and head", "bare and head", "folder", "causal folder"])
def test_text_encoder_from_every_layout(tmp_path: Path, layout: str) -> None:
    original = qwen()
    loaded = load_text_encoder(qwen_layouts(original, tmp_path)[layout])
    assert type(loaded) is Qwen3Model
    assert torch.equal(hidden_states(loaded), hidden_states(original))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 12},
        {"num_attention_heads": 6, "num_key_value_heads": 1},
        {"head_dim": 8, "hidden_size": 40, "intermediate_size": 17, "vocab_size": 33},
    ],
    ids=str,
)
def test_sizes_of_the_text_encoder_are_read_from_the_weights(tmp_path: Path, changes: dict[str, int]) -> None:
    original = qwen(**changes)
    loaded = load_text_encoder(write_file(with_prefix(original, "model."), tmp_path / "qwen.safetensors"))
    assert torch.equal(hidden_states(loaded), hidden_states(original))


def vae_layouts(model: AutoencoderKLQwenImage, folder: Path) -> dict[str, Path]:
    model.save_pretrained(folder / "vae")
    return {
        "wan": write_file(wan_state_dict(model), folder / "wan.safetensors"),
        "diffusers": write_file(model.state_dict(), folder / "diffusers.safetensors"),
        "folder": folder / "vae",
    }


@pytest.mark.parametrize("layout", ["wan", "diffusers", "folder"])
def test_vae_from_every_layout(tmp_path: Path, layout: str) -> None:
    original = vae()
    loaded = load_vae(vae_layouts(original, tmp_path)[layout])
    for ours, theirs in zip(reconstruction(loaded), reconstruction(original), strict=True):
        assert torch.equal(ours, theirs)
    assert (loaded.config.latents_mean, loaded.config.latents_std) == (
        original.config.latents_mean,
        original.config.latents_std,
    )
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("changes", [{"base_dim": 16}, {"num_res_blocks": 1}, {"num_res_blocks": 3}], ids=str)
def test_sizes_of_the_vae_are_read_from_the_weights(tmp_path: Path, changes: dict[str, int]) -> None:
    original = vae(**changes)
    loaded = load_vae(write_file(original.state_dict(), tmp_path / "vae.safetensors"))
    for ours, theirs in zip(reconstruction(loaded), reconstruction(original), strict=True):
        assert torch.equal(ours, theirs)


def test_a_folders_own_normalisation_is_kept(tmp_path: Path) -> None:
    vae(latents_mean=[0.5] * 16).save_pretrained(tmp_path)
    assert load_vae(tmp_path).config.latents_mean == [0.5] * 16


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16], ids=str)
def test_dtypes(tmp_path: Path, layout: str, stored: torch.dtype, wanted: torch.dtype | None) -> None:
    text_encoder = qwen(dtype=stored).to(stored)
    narrow_vae = AutoencoderKLQwenImage(base_dim=8)
    for parameter in narrow_vae.parameters():  # .to() warns: it knows of parts that others keep in float32
        parameter.data = parameter.data.to(stored)
    loaded = (
        load_text_encoder(qwen_layouts(text_encoder, tmp_path)["model." if layout == "file" else "folder"], wanted),
        load_vae(vae_layouts(narrow_vae, tmp_path)["wan" if layout == "file" else "folder"], wanted),
    )
    unchanged = stored, (stored if layout == "file" else torch.float32)  # as diffusers does with folders
    for model, otherwise in zip(loaded, unchanged, strict=True):
        assert {parameter.dtype for parameter in model.parameters()} == {wanted or otherwise}


Change = Callable[[Tensors], Any]
QWEN_FAULTS: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop("model.norm.weight"), r"1 missing: model\.norm\.weight"),
    "missing, and sizes are read from it": (
        lambda t: t.pop("model.layers.0.self_attn.q_norm.weight"),
        r"missing key `model\.layers\.0\.self_attn\.q_norm\.weight`",
    ),
    "a layer is missing": (
        lambda t: [t.pop(key) for key in list(t) if "layers.0." in key],
        r"missing key `model\.layers\.0\.",
    ),
    "unexpected": (
        lambda t: t.update({"model.layers.0.extra": torch.zeros(1)}),
        r"unexpected: model\.layers\.0\.extra",
    ),
    "beside the model": (lambda t: t.update({"visual.proj": torch.zeros(1)}), r"unexpected: visual\.proj"),
    "biases": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "misshapen": (
        lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 4)}),
        r"wrong shape: model\.layers\.1\.mlp\.up_proj\.weight is \[3, 4\], expected \[40, 24\]",
    ),
    "no dimensions": (
        lambda t: t.update({"model.embed_tokens.weight": torch.zeros(())}),
        r"embed_tokens.*expected 2 dimensions",
    ),
    "empty": (
        lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.zeros(0)}),
        r"q_norm.*expected 1 dimensions",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.zeros(24, dtype=torch.int8)}),
        r"model\.norm\.weight` is torch\.int8",
    ),
}


@pytest.mark.parametrize(("change", "message"), QWEN_FAULTS.values(), ids=QWEN_FAULTS)
def test_a_text_encoder_that_does_not_fit_is_refused_by_key(tmp_path: Path, change: Change, message: str) -> None:
    tensors = with_prefix(qwen(), "model.")
    change(tensors)
    path = write_file(tensors, tmp_path / "qwen.safetensors")
    with pytest.raises(InputError, match=message) as error:
        load_text_encoder(path)
    assert str(path) in str(error.value)


VAE_FAULTS: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop("decoder.middle.1.proj.bias"), r"1 missing: decoder\.mid_block\.attentions\.0\.proj"),
    "unexpected": (lambda t: t.update({"encoder.extra": torch.zeros(1)}), r"1 unexpected: encoder\.extra"),
    "two names for one weight": (
        lambda t: t.update({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3, 3)}),
        r"1 unexpected: encoder\.conv1\.weight",
    ),
    "a block too many": (
        lambda t: t.update({"decoder.upsamples.99.residual.0.gamma": torch.zeros(1)}),
        r"1 unexpected: decoder\.upsamples\.99",
    ),
    "a block that has no number": (
        lambda t: t.update({"decoder.upsamples.x.residual.0.gamma": torch.zeros(1)}),
        r"not the Qwen-Image VAE",
    ),
    "misshapen": (
        lambda t: t.update({"conv2.bias": torch.zeros(3)}),
        r"wrong shape: conv2\.bias is \[3\], expected \[16\]",
    ),
    "no dimensions": (lambda t: t.update({"encoder.conv1.weight": torch.zeros(())}), r"not the Qwen-Image VAE"),
    "another VAE's latents": (
        lambda t: t.update({"conv1.weight": torch.zeros(8, 8, 1, 1, 1)}),
        r"conv1\.weight is \[8, 8, 1, 1, 1\], expected \[32, 32, 1, 1, 1\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), VAE_FAULTS.values(), ids=VAE_FAULTS)
def test_a_vae_that_does_not_fit_is_refused_by_key(tmp_path: Path, change: Change, message: str) -> None:
    tensors = wan_state_dict(vae())
    change(tensors)
    path = write_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match=message) as error:
        load_vae(path)
    assert str(path) in str(error.value)


@pytest.fixture
def wrong_paths(miniature: MiniatureFiles, tmp_path: Path) -> dict[str, Path]:
    """What may be given by mistake."""
    vae().save_pretrained(tmp_path / "vae folder")
    qwen().save_pretrained(tmp_path / "qwen folder")
    tiny_transformer().save_pretrained(tmp_path / "dit folder")
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    other = tmp_path / "llama folder"
    qwen().save_pretrained(other)
    config = json.loads((other / "config.json").read_text()) | {"model_type": "llama"}
    (other / "config.json").write_text(json.dumps(config))
    return {
        "DiT": miniature.transformer,
        "VAE": miniature.vae,
        "Qwen": miniature.text_encoder,
        "nothing": tmp_path / "nothing",
        "text": tmp_path / "text.safetensors",
        **{
            name: tmp_path / name
            for name in ("vae folder", "qwen folder", "dit folder", "empty folder", "llama folder")
        },
    }


@pytest.mark.parametrize(
    ("given", "message"),
    {
        "DiT": "looks like a Cosmos DiT",
        "VAE": "looks like a VAE",
        "nothing": "no such file",
        "text": "not a readable safetensors file",
        "vae folder": "Expected `qwen3`",
        "dit folder": "Expected `qwen3`",
        "empty folder": "no readable config.json",
        "llama folder": "config is that of a `llama`",
    }.items(),
)
def test_what_is_no_text_encoder_is_refused(wrong_paths: dict[str, Path], given: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_text_encoder(wrong_paths[given])
    assert str(wrong_paths[given]) in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    {
        "DiT": "looks like a Cosmos DiT",
        "Qwen": "looks like a language model",
        "nothing": "no such file",
        "text": "not a readable safetensors file",
        "dit folder": "config is that of a `CosmosTransformer3DModel`",
        "empty folder": "no readable config.json",
    }.items(),
)
def test_what_is_no_vae_is_refused(wrong_paths: dict[str, Path], given: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_vae(wrong_paths[given])
    assert str(wrong_paths[given]) in str(error.value)


def test_both_encoders_faults_are_found_together_and_without_loading(
    miniature: MiniatureFiles, wrong_paths: dict[str, Path]
) -> None:
    check_encoders(miniature.text_encoder, miniature.vae)
    check_encoders(wrong_paths["qwen folder"], wrong_paths["vae folder"])
    with pytest.raises(InputError, match=r"(?s)not a Qwen3 text encoder.*not the Qwen-Image VAE"):
        check_encoders(miniature.vae, miniature.text_encoder)


def test_loaded_weights_are_not_the_files(tmp_path: Path) -> None:
    original = vae()
    path = write_file(wan_state_dict(original), tmp_path / "vae.safetensors")
    loaded = load_vae(path)
    with path.open("r+b") as file:  # in place: a mapping of the file would see it
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    expected = original.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
