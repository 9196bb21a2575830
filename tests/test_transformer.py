"""`AnimaTransformerModel` against the stock classes, called by hand as every implementation of Anima calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from safetensors.torch import load_file, save_file

from anima_peft.adapters.lora import LoraConfig
from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from anima_peft.models import folders
from anima_peft.models.precision import set_qk_norm_eps
from anima_peft.transformer import AnimaTransformerModel
from tests.components import TEXT_WIDTH, tiny_conditioner, tiny_transformer


@pytest.fixture
def model() -> AnimaTransformerModel:
    transformer = tiny_transformer()
    set_qk_norm_eps(transformer)
    return AnimaTransformerModel(transformer, tiny_conditioner())


def text(rows: int = 2) -> dict[str, torch.Tensor]:
    """The conditioner's inputs for prompts of different lengths, with values in the rows of padding."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.arange(rows).unsqueeze(1)
    return {
        "qwen_hidden_states": torch.randn(rows, 7, TEXT_WIDTH, generator=generator),
        "qwen_attention_mask": (torch.arange(7) < 7 - 3 * lengths).long(),
        "t5_input_ids": torch.randint(3, 100, (rows, 5), generator=generator),
        "t5_attention_mask": (torch.arange(5) < 5 - 2 * lengths).long(),
    }


def latents(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 16, 4, 6, generator=torch.Generator().manual_seed(3))


SIGMA = torch.tensor([0.2, 0.95])


def by_hand(model: AnimaTransformerModel, latents: torch.Tensor, sigma: torch.Tensor, **text: Any) -> torch.Tensor:
    context = model.text_conditioner(
        source_hidden_states=text["qwen_hidden_states"] * text["qwen_attention_mask"].unsqueeze(-1),
        target_input_ids=text["t5_input_ids"],
        target_attention_mask=text["t5_attention_mask"],
        source_attention_mask=text["qwen_attention_mask"],
    )
    return model.transformer(
        hidden_states=latents.unsqueeze(2),
        timestep=sigma,
        encoder_hidden_states=context,
        padding_mask=torch.zeros(1, 1, *latents.shape[-2:]),
        fps=None,
        return_dict=False,
    )[0].squeeze(2)


@torch.no_grad()
def test_the_call_is_the_one_that_all_implementations_agree_on(model: AnimaTransformerModel) -> None:
    expected = by_hand(model, latents(), SIGMA, **text())
    assert torch.equal(model(latents(), SIGMA, **text()), expected)
    assert torch.equal(model(latents(), SIGMA, model.encode_prompt_embeds(**text())), expected)
    assert expected.abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_pictures_with_and_without_a_frame_axis(model: AnimaTransformerModel, rows: int) -> None:
    sigma = torch.linspace(0.1, 0.9, rows)
    flat = model(latents(rows), sigma, **text(rows))
    framed = model(latents(rows).unsqueeze(2), sigma, **text(rows))
    assert flat.shape == latents(rows).shape
    assert framed.shape == (rows, 16, 1, 4, 6)
    assert torch.equal(framed.squeeze(2), flat)


@torch.no_grad()
def test_each_picture_of_a_batch_stands_alone(model: AnimaTransformerModel) -> None:
    together = model(latents(), SIGMA, **text())
    for row in range(2):
        alone = model(
            latents()[row : row + 1], SIGMA[row : row + 1], **{k: v[row : row + 1] for k, v in text().items()}
        )
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_conditioning_rows_of_padding_are_zero_and_others_are_not(model: AnimaTransformerModel) -> None:
    embeds = model.encode_prompt_embeds(**text())
    assert embeds.shape == (2, 512, TEXT_WIDTH)
    real = torch.nn.functional.pad(text()["t5_attention_mask"], (0, 512 - 5)).bool()
    assert (embeds[~real] == 0).all()
    assert (embeds[real].abs().amax(-1) > 0.1).all()


@torch.no_grad()
def test_the_conditioner_reads_zeros_at_qwens_padding(model: AnimaTransformerModel) -> None:
    given: list[dict[str, torch.Tensor]] = []
    model.text_conditioner.register_forward_pre_hook(lambda _, __, kwargs: given.append(kwargs), with_kwargs=True)
    model.encode_prompt_embeds(**text())
    (kwargs,) = given
    states, mask = kwargs["source_hidden_states"], text()["qwen_attention_mask"].bool()
    assert (states[~mask] == 0).all()
    assert torch.equal(states[mask], text()["qwen_hidden_states"][mask])
    assert torch.equal(kwargs["source_attention_mask"], text()["qwen_attention_mask"])
    assert torch.equal(kwargs["target_attention_mask"], text()["t5_attention_mask"])


@torch.no_grad()
def test_what_stands_in_padding_does_not_matter(model: AnimaTransformerModel) -> None:
    changed = text()
    changed["qwen_hidden_states"][1, 4:] = 7.0
    changed["t5_input_ids"][1, 3:] = 99
    torch.testing.assert_close(
        model.encode_prompt_embeds(**changed), model.encode_prompt_embeds(**text()), rtol=0, atol=1e-6
    )


@torch.no_grad()
def test_long_captions_lengthen_the_conditioning(model: AnimaTransformerModel) -> None:
    long = text(1) | {"t5_input_ids": torch.ones(1, 600).long(), "t5_attention_mask": torch.ones(1, 600).long()}
    assert model.encode_prompt_embeds(**long).shape == (1, 600, TEXT_WIDTH)


@torch.no_grad()
def test_an_empty_prompt_gives_numbers(model: AnimaTransformerModel) -> None:
    empty = text() | {"qwen_attention_mask": torch.zeros(2, 7).long()}
    assert model(latents(), SIGMA, **empty).isfinite().all()


@torch.no_grad()
def test_sigma_is_not_rounded_to_the_weights_dtype(model: AnimaTransformerModel) -> None:
    model.to(torch.bfloat16)
    embeds = model.encode_prompt_embeds(**text(1) | {"qwen_hidden_states": torch.ones(1, 7, TEXT_WIDTH).bfloat16()})
    sigma = torch.tensor([0.9003])
    exact = model(latents(1).bfloat16(), sigma, embeds)
    assert not torch.equal(exact, model(latents(1).bfloat16(), sigma.bfloat16(), embeds))


TEXT = tuple(text())


@pytest.mark.parametrize(
    "given",
    [(), ("prompt_embeds", *TEXT), *(("prompt_embeds", name) for name in TEXT), TEXT[:1], TEXT[:3], TEXT[1:]],
    ids=" ".join,
)
def test_either_embeddings_or_all_text_inputs(model: AnimaTransformerModel, given: tuple[str, ...]) -> None:
    every = text() | {"prompt_embeds": torch.zeros(2, 512, TEXT_WIDTH)}
    with pytest.raises(ValueError, match="either prompt_embeds or all four"):
        model(latents(), SIGMA, **{name: every[name] for name in given})


def gradients(model: AnimaTransformerModel) -> dict[str, torch.Tensor]:
    model.requires_grad_(True).zero_grad()
    model(latents(), SIGMA, **text()).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_is_exact(model: AnimaTransformerModel) -> None:
    expected = gradients(model)
    assert expected.keys() == dict(model.named_parameters()).keys()
    recomputed: list[object] = []
    for block in (*model.transformer.transformer_blocks, *model.text_conditioner.blocks):
        block.register_forward_pre_hook(lambda *_: recomputed.append(None))
    model.enable_gradient_checkpointing()
    model.train()
    found = gradients(model)
    assert len(recomputed) == 2 * 4  # once forward, once on the way back
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_pretrained_and_back(model: AnimaTransformerModel, tmp_path: Path, dtype: torch.dtype) -> None:
    model.to(dtype)
    model.save_pretrained(tmp_path / "folder")
    loaded = AnimaTransformerModel.from_pretrained(tmp_path / "folder", torch_dtype=dtype)
    assert_equal_states(state(loaded), state(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.transformer.training
    assert AnimaTransformerModel.from_pretrained(str(tmp_path / "folder")).transformer.dtype == torch.float32
    norms = [module for name, module in loaded.named_modules() if name.endswith(("norm_q", "norm_k"))]
    assert {norm.eps for norm in norms} == {1e-6}
    for stock, component in ((CosmosTransformer3DModel, "transformer"), (AnimaTextConditioner, "text_conditioner")):
        part = stock.from_pretrained(tmp_path / "folder" / component, torch_dtype=dtype)
        assert_equal_states(state(part), state(getattr(model, component)))


def config_for_both() -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", train_text_conditioner=True, init_lora_weights=False)


def test_adapters_are_not_saved_with_the_model(model: AnimaTransformerModel, tmp_path: Path) -> None:
    base = state(model)
    model.add_adapter(config_for_both())
    model.save_pretrained(tmp_path)
    assert_equal_states(state(AnimaTransformerModel.from_pretrained(tmp_path)), base)
    assert any("lora_A" in name for name in model.state_dict())


@torch.no_grad()
def test_fused_adapters_are_saved_with_the_model(model: AnimaTransformerModel, tmp_path: Path) -> None:
    model.add_adapter(config_for_both())
    model.fuse_lora()
    model.save_pretrained(tmp_path)
    loaded = AnimaTransformerModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(latents(), SIGMA, **text()), model(latents(), SIGMA, **text()))


def test_from_pretrained_takes_a_single_file_too(miniature: MiniatureFiles) -> None:
    single = AnimaTransformerModel.from_single_file(miniature.transformer)
    assert_equal_states(state(AnimaTransformerModel.from_pretrained(miniature.transformer)), state(single))


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    {
        "missing": (lambda t: t.pop("proj_out.weight"), r"1 missing: proj_out\.weight"),
        "unexpected": (lambda t: t.update(extra=torch.zeros(1)), r"1 unexpected: extra"),
        "misshapen": (lambda t: t.update({"proj_out.weight": torch.zeros(2, 2)}), r"wrong shape: proj_out\.weight"),
    }.values(),
    ids=["missing", "unexpected", "misshapen"],
)
def test_a_folder_that_does_not_fit_is_refused(
    model: AnimaTransformerModel, tmp_path: Path, damage: Any, message: str
) -> None:
    model.save_pretrained(tmp_path)
    rewrite(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", damage)
    with pytest.raises(InputError, match=message):
        AnimaTransformerModel.from_pretrained(tmp_path)


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a diffusers folder with `transformer/` and `text_conditioner/`"):
        AnimaTransformerModel.from_pretrained(tmp_path)


def test_of_a_repo_only_the_two_parts_are_downloaded(
    model: AnimaTransformerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    asked: list[str] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(folders, "snapshot_download", download)
    loaded = AnimaTransformerModel.from_pretrained("someone/anima")
    assert_equal_states(state(loaded), state(model))
    assert {pattern.split("/")[0] for pattern in asked if "/" in pattern} == {"transformer", "text_conditioner"}
