"""`AnimaPipeline` against diffusers' `AnimaModularPipeline` over the same components, which is the reference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines.anima import AnimaAutoBlocks
from PIL import Image

from anima_peft.errors import InputError
from anima_peft.models.latents import decode_latents
from anima_peft.pipeline import AnimaPipeline
from tests.components import TEXT_WIDTH, tiny_pipeline_components

SIZE = {"height": 64, "width": 96}
SHORT = SIZE | {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_pipeline_components(tmp_path_factory.mktemp("components"))


@pytest.fixture(scope="module")
def shared_pipe(components: dict[str, Any]) -> AnimaPipeline:
    return quiet(AnimaPipeline(**components))


@pytest.fixture
def pipe(shared_pipe: AnimaPipeline) -> AnimaPipeline:
    """The pipeline without the traces of an earlier test's settings."""
    shared_pipe.disable_vae_slicing()
    shared_pipe.disable_vae_tiling()
    return shared_pipe


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int, size: tuple[int, int] = (70, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def reference(components: dict[str, Any], output: str, guidance_scale: float = 4.0, **inputs: Any) -> torch.Tensor:
    """The stock modular pipeline's `output`, "latents" or "images", for the same call."""
    stock = quiet(AnimaAutoBlocks().init_pipeline())
    stock.update_components(**components, guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
    return stock(**inputs, output_type="pt", output=output)


TEXT_TO_IMAGE: dict[str, dict[str, Any]] = {
    "one prompt": {"prompt": "a red circle"},
    "prompts of different lengths": {"prompt": ["a cat", "two blue squares beside a green triangle"]},
    "a negative prompt for all": {"prompt": ["a cat", "a star"], "negative_prompt": "worst quality, blurry"},
    "a negative prompt for each": {"prompt": ["a cat", "a star"], "negative_prompt": ["blurry", "low resolution"]},
    "empty prompt and negative": {"prompt": "", "negative_prompt": ""},
    "empty among others": {"prompt": ["", "a cat in the garden"], "negative_prompt": ["blurry", ""]},
    "images per prompt": {"prompt": ["a cat", "a star"], "num_images_per_prompt": 2},
    "a generator for each": {"prompt": ["a cat", "a star"], "num_images_per_prompt": 2, "seeds": 4},
    "no guidance": {"prompt": "a cat", "guidance_scale": 1.0},
    "strong guidance": {"prompt": "a cat", "guidance_scale": 7.5},
    "own sigmas": {"prompt": "a cat", "sigmas": [1.0, 0.6, 0.1]},
    "one step": {"prompt": "a cat", "num_inference_steps": 1},
    "a prompt that is cut": {"prompt": "a red circle " * 20, "max_sequence_length": 8},
}
IMAGE_TO_IMAGE: dict[str, dict[str, Any]] = {
    "one picture": {"prompt": "a cat", "image": picture(0), "strength": 0.5},
    "default strength": {"prompt": "a cat", "image": picture(0), "num_inference_steps": 10},
    "full strength": {"prompt": "a cat", "image": picture(0), "strength": 1.0},
    "little strength": {"prompt": "a cat", "image": picture(0), "strength": 0.01},
    "one picture for all": {"prompt": ["a cat", "a star"], "image": picture(0), "strength": 0.6},
    "a picture for each": {
        "prompt": ["a cat", "a star"],
        "image": [picture(0), picture(1)],
        "strength": 0.5,
        "num_images_per_prompt": 2,
    },
    "pictures and generators": {"prompt": ["a cat", "a star"], "image": [picture(0), picture(1)], "seeds": 2},
    "a tensor": {"prompt": "a cat", "image": torch.rand(1, 3, 32, 48, generator=seeded()), "strength": 0.5},
    "no guidance": {"prompt": "a cat", "image": picture(0), "strength": 0.5, "guidance_scale": 1.0},
}


@pytest.mark.parametrize(
    "call",
    [*TEXT_TO_IMAGE.values(), *IMAGE_TO_IMAGE.values()],
    ids=[*(f"txt2img-{name}" for name in TEXT_TO_IMAGE), *(f"img2img-{name}" for name in IMAGE_TO_IMAGE)],
)
def test_equals_the_stock_modular_pipeline_bit_for_bit(
    pipe: AnimaPipeline, components: dict[str, Any], call: dict[str, Any]
) -> None:
    call = SHORT | ({"strength": 0.6} if "image" in call else {}) | call
    seeds = call.pop("seeds", None)

    def generator() -> Any:
        return [seeded(seed) for seed in range(seeds)] if seeds else seeded()

    ours = pipe(**call, generator=generator(), output_type="pt").images
    stock = reference(components, "images", **call, generator=generator())
    assert ours.shape == stock.shape
    assert (ours - stock).abs().max().item() == 0.0
    assert ours.std() > 0.05  # neither black nor clamped throughout

    latents = pipe(**call, generator=generator(), output_type="latent").images
    assert (latents - reference(components, "latents", **call, generator=generator())).abs().max().item() == 0.0


@pytest.mark.parametrize("image", [None, picture(0)], ids=["txt2img", "img2img"])
def test_the_default_size_is_1024(pipe: AnimaPipeline, image: Any) -> None:
    call = {"prompt": "a cat", "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    assert pipe(**call, image=image).images.shape == (1, 16, 1, 128, 128)


def test_bf16_differs_from_the_reference_in_sigma_alone(components: dict[str, Any]) -> None:
    # These sigmas, and the timesteps of the reference, are numbers that bf16 holds exactly: nothing is left to differ.
    exact = {"sigmas": [1.0, 0.5, 0.25, 0.125], "prompt": ["a cat", ""], "negative_prompt": "blurry"}
    in_bf16 = {
        name: copy.deepcopy(part).to(torch.bfloat16) if isinstance(part, torch.nn.Module) else part
        for name, part in components.items()
    }
    in_bf16["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = quiet(AnimaPipeline(**in_bf16))
    ours = pipe(**exact, **SIZE, generator=seeded(), output_type="latent").images
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, reference(in_bf16, "latents", **exact, **SIZE, generator=seeded()))

    told = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True
    )
    pipe("a cat", **SHORT, generator=seeded(), guidance_scale=1.0, output_type="latent")
    hook.remove()
    sigmas = torch.stack(told)[:, 0]
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, pipe.scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    assert (sigmas - sigmas.bfloat16().float()).abs().max() > 1e-4


def test_sets_the_original_eps_in_the_query_and_key_norms(pipe: AnimaPipeline) -> None:
    blocks = pipe.transformer.transformer_blocks
    norms = [norm for block in blocks for attn in (block.attn1, block.attn2) for norm in (attn.norm_q, attn.norm_k)]
    assert [norm.eps for norm in norms] == [1e-6] * 8


def test_prompt_embeds_stand_for_prompts(pipe: AnimaPipeline) -> None:
    given = {
        "prompt_embeds": pipe.encode_prompt(["a cat", "a star"]),
        "negative_prompt_embeds": pipe.encode_prompt(["blurry"] * 2),
    }
    assert given["prompt_embeds"].shape == (2, 512, TEXT_WIDTH)
    call = SHORT | {"num_images_per_prompt": 2, "output_type": "latent"}
    by_embeds = pipe(**given, **call, generator=seeded()).images
    by_text = pipe(["a cat", "a star"], "blurry", **call, generator=seeded()).images
    assert torch.equal(by_embeds, by_text)


def test_without_text_parts_embeds_are_needed_and_enough(pipe: AnimaPipeline, components: dict[str, Any]) -> None:
    absent = dict.fromkeys(("text_encoder", "tokenizer", "t5_tokenizer", "text_conditioner"))
    bare = quiet(AnimaPipeline(**components | absent))
    embeds = pipe.encode_prompt("a cat")
    call = SHORT | {"guidance_scale": 1.0, "output_type": "latent"}
    assert torch.equal(
        bare(prompt_embeds=embeds, **call, generator=seeded()).images, pipe("a cat", **call, generator=seeded()).images
    )
    with pytest.raises(InputError, match="negative_prompt_embeds"):
        bare(prompt_embeds=embeds, **SHORT)


def test_given_latents_are_the_noise_and_the_size(pipe: AnimaPipeline) -> None:
    noise = torch.randn(1, 16, 1, 8, 12, generator=seeded())
    call: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(pipe(**call, latents=noise).images, pipe(**call, **SIZE, generator=seeded()).images)


@pytest.mark.parametrize(("guidance_scale", "passes"), [(1.0, 3), (4.0, 6)])
def test_guidance_of_one_halves_the_passes(pipe: AnimaPipeline, guidance_scale: float, passes: int) -> None:
    seen = []
    hook = pipe.transformer.register_forward_hook(lambda *_: seen.append(1))
    pipe("a cat", **SHORT, guidance_scale=guidance_scale, output_type="latent")
    hook.remove()
    assert (len(seen), pipe.guidance_scale, pipe.num_timesteps) == (passes, guidance_scale, 3)


def test_output_types(pipe: AnimaPipeline) -> None:
    def run(output_type: str) -> Any:
        return pipe("a cat", **SHORT, generator=seeded(), output_type=output_type).images

    pixels = run("pt")
    assert pixels.shape == (1, 3, 64, 96)
    np.testing.assert_array_equal(run("np"), pixels.permute(0, 2, 3, 1).numpy())
    assert run("pil")[0].size == (96, 64)
    torch.testing.assert_close(decode_latents(pipe.vae, run("latent")) / 2 + 0.5, pixels)
    as_tuple = pipe("a cat", **SHORT, generator=seeded(), output_type="pt", return_dict=False)
    assert torch.equal(as_tuple[0], pixels)


def test_callback_sees_and_changes_tensors(pipe: AnimaPipeline) -> None:
    seen: list[tuple[int, float, tuple[str, ...]]] = []

    def callback(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, timestep.item(), tuple(tensors)))
        return {"latents": torch.full_like(tensors["latents"], 0.25)}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    latents = pipe(
        "a cat",
        **SHORT,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    ).images
    assert seen == [(i, t.item(), tuple(names)) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert torch.equal(latents, torch.full_like(latents, 0.25))


@pytest.mark.parametrize("name", ["interrupt", "_interrupt"])
def test_interrupt_stops_after_the_step_at_hand(pipe: AnimaPipeline, name: str) -> None:
    steps = []

    def callback(pipeline: AnimaPipeline, step: int, *_: Any) -> None:
        steps.append(step)
        if step == 1:
            setattr(pipeline, name, True)

    call: dict[str, Any] = {"prompt": "a cat", **SIZE, "output_type": "pt"}
    stopped = pipe(**call, num_inference_steps=6, callback_on_step_end=callback).images
    assert steps == [0, 1]
    assert stopped.shape == (1, 3, 64, 96)
    pipe(**call, num_inference_steps=2)
    assert not pipe.interrupt


def test_vae_slicing_is_close_and_tiling_used(pipe: AnimaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(2, 16, 1, 8, 12, generator=seeded())
    whole = decode_latents(pipe.vae, latents)
    pipe.enable_vae_slicing()
    torch.testing.assert_close(decode_latents(pipe.vae, latents), whole, atol=1e-5, rtol=1e-5)

    tiled = []
    original: Callable[..., Any] = pipe.vae.tiled_decode
    monkeypatch.setattr(pipe.vae, "tiled_decode", lambda *a, **k: tiled.append(1) or original(*a, **k))
    monkeypatch.setattr(pipe.vae, "tile_sample_min_width", 64)
    monkeypatch.setattr(pipe.vae, "tile_sample_stride_width", 48)
    decode_latents(pipe.vae, latents)
    assert not tiled
    pipe.enable_vae_tiling()
    assert decode_latents(pipe.vae, latents).shape == whole.shape
    assert tiled


def test_cpu_offload_covers_all_models_and_changes_nothing(tmp_path: Path) -> None:
    components = tiny_pipeline_components(tmp_path)
    pipe = quiet(AnimaPipeline(**components))
    call = {"prompt": "a cat", "image": picture(0), "strength": 0.5, **SHORT, "output_type": "pt"}
    plain = pipe(**call, generator=seeded()).images
    modules = {name for name, part in components.items() if isinstance(part, torch.nn.Module)}
    assert set(pipe.model_cpu_offload_seq.split("->")) == modules

    # Without an accelerator the hooks "move" to the CPU; they run all the same, once per call.
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(pipe(**call, generator=seeded()).images, plain)
    pipe.remove_all_hooks()
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(pipe(**call, generator=seeded()).images, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate offloads sequentially only to an accelerator")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload_on_an_accelerator(tmp_path: Path, method: str) -> None:
    call = {"prompt": "a cat", "image": picture(0), "strength": 0.5, **SHORT, "output_type": "pt"}
    plain = quiet(AnimaPipeline(**tiny_pipeline_components(tmp_path)).to("cuda"))(**call, generator=seeded()).images
    pipe = quiet(AnimaPipeline(**tiny_pipeline_components(tmp_path)))
    getattr(pipe, method)()
    torch.testing.assert_close(pipe(**call, generator=seeded()).images, plain, atol=1e-4, rtol=1e-4)


def test_a_cut_prompt_is_reported(pipe: AnimaPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="anima_peft"):
        pipe.encode_prompt(["a cat", "a red circle " * 20], max_sequence_length=16)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cut at max_sequence_length = 16" in caplog.text


def test_longer_prompts_lengthen_the_conditioning(pipe: AnimaPipeline) -> None:
    text = "red circle " * 300
    assert pipe.encode_prompt(text, max_sequence_length=600).shape == (1, 600, TEXT_WIDTH)
    assert pipe.encode_prompt(text).shape == (1, 512, TEXT_WIDTH)


EMBEDS = torch.zeros(1, 512, TEXT_WIDTH)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "height no multiple of 16": ({"height": 72}, "`height` is 72. Expected a multiple of 16"),
    "width of zero or less": ({"width": -16}, "`width` is -16"),
    "height no integer": ({"height": 64.0}, "`height` is 64.0"),
    "size past the positions": ({"width": 2064}, "2048 pixels"),
    "prompt of a wrong type": ({"prompt": 5}, "`prompt` is 5"),
    "no prompts": ({"prompt": []}, r"`prompt` is \[\]"),
    "no text in a list": ({"prompt": ["a", None]}, "`prompt` is"),
    "neither prompt nor embeds": ({"prompt": None}, "Neither"),
    "prompt and embeds": ({"prompt_embeds": EMBEDS}, "Both `prompt` and `prompt_embeds`"),
    "both negatives": ({"negative_prompt": "", "negative_prompt_embeds": EMBEDS}, "Both `negative_prompt`"),
    "short embeds": ({"prompt": None, "prompt_embeds": EMBEDS[:, :77]}, "rows of zeros"),
    "narrow embeds": ({"prompt": None, "prompt_embeds": EMBEDS[..., :8]}, r"Expected \(prompts, 512 or more, 32\)"),
    "too few negatives": ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "2 prompts and 1 negative"),
    "too few negative embeds": ({"prompt": ["a", "b"], "negative_prompt_embeds": EMBEDS}, "2 prompts and 1 negative"),
    "strength zero": ({"strength": 0.0}, "`strength` is 0.0"),
    "strength above one": ({"strength": 1.5}, "`strength` is 1.5"),
    "no steps": ({"num_inference_steps": 0}, "`num_inference_steps`"),
    "no sigmas": ({"sigmas": []}, "`sigmas`"),
    "timesteps as sigmas": ({"sigmas": [1000.0, 500.0]}, "`sigmas`"),
    "guidance not a number": ({"guidance_scale": float("nan")}, "`guidance_scale`"),
    "no images": ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
    "too few generators": ({"generator": [seeded()], "num_images_per_prompt": 2}, "1 generators were given for 2"),
    "latents of a wrong shape": ({"latents": torch.zeros(1, 16, 1, 8, 8)}, r"Expected \(1, 16, 1, 8, 12\)"),
    "output type": ({"output_type": "jpg"}, "pil, np, pt, latent"),
    "callback tensors": ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    "no tokens": ({"max_sequence_length": 0}, "`max_sequence_length`"),
    "too many tokens": ({"max_sequence_length": 5000}, "`max_sequence_length`"),
    "too many pictures": (
        {"image": [picture(0), picture(1)], "num_images_per_prompt": 2},
        "2 pictures of 3 channels.*each of the 1 prompts",
    ),
    "channels": ({"image": torch.zeros(1, 16, 8, 12)}, "16 channels"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_inputs_are_refused(pipe: AnimaPipeline, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a cat", **SHORT} | change)


def test_pictures_with_alpha_are_taken_without_it(pipe: AnimaPipeline) -> None:
    call: dict[str, Any] = {"prompt": "a cat", "strength": 0.5, **SHORT, "output_type": "latent"}
    rgb = picture(0, (96, 64))
    rgba = rgb.convert("RGBA")
    assert torch.equal(
        pipe(**call, image=rgba, generator=seeded()).images, pipe(**call, image=rgb, generator=seeded()).images
    )
