"""The adapter methods of `AnimaPipeline`: diffusers' names over both components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook, apply_group_offloading
from safetensors.torch import load_file, save_file

from anima_peft.errors import InputError
from anima_peft.pipeline import AnimaPipeline
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    MLP,
    TO_Q,
    Factors,
    as_file,
    assert_close,
    assert_same_weights,
    base_weights,
    explicit,
    output,
    random_factors,
    tiny_model,
)


@pytest.fixture
def model() -> AnimaTransformerModel:
    """The two parts that adapters live on."""
    return tiny_model()


@pytest.fixture
def pipe(model: AnimaTransformerModel, other_parts: dict[str, Any]) -> AnimaPipeline:
    pipe = AnimaPipeline(**other_parts, **model.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def factors() -> Factors:
    return random_factors(tiny_model(), mixed=True)


@pytest.fixture
def file(factors: Factors, tmp_path: Path) -> Path:
    save_file(as_file(factors, "kohya"), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def draw(pipe: AnimaPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = {"height": 32, "width": 48, "num_inference_steps": 2}
    return pipe("a red circle", generator=generator, output_type="latent", **sizes).images


def test_a_loaded_file_acts_in_the_picture(pipe: AnimaPipeline, factors: Factors, file: Path, other_parts) -> None:
    before = draw(pipe)
    pipe.load_lora_weights(str(file))
    expected = draw(AnimaPipeline(**other_parts, **explicit(factors).components))
    assert_close(draw(pipe), expected, 1e-5)
    assert (draw(pipe) - before).abs().max() > 0.01
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)


def test_names_and_strengths(pipe: AnimaPipeline, model: AnimaTransformerModel, file: Path, factors: Factors) -> None:
    pipe.load_lora_weights(file)
    pipe.load_lora_weights(file, adapter_name="mine")
    pipe.load_lora_weights(as_file(factors, "diffusers"))
    assert pipe.get_active_adapters() == ["default_0", "mine", "default_1"]
    names = ["default_0", "mine", "default_1"]
    assert pipe.get_list_adapters() == {"transformer": names, "text_conditioner": names}
    pipe.set_adapters(["mine", "default_1"], [0.5, {"text_conditioner": 0.5, "transformer": 0.25}])
    assert pipe.get_active_adapters() == ["mine", "default_1"]
    in_conditioner = {name: f for name, f in factors.items() if name.component == "text_conditioner"}
    expected = explicit({name: f for name, f in factors.items() if name not in in_conditioner}, 0.75)
    for name, f in in_conditioner.items():
        expected.text_conditioner.get_submodule(name.path).weight += f.up @ f.down * f.scale
    assert_close(output(model), output(expected))
    pipe.delete_adapters(["mine", "default_0"])
    assert pipe.get_active_adapters() == ["default_1"]


def test_fusing(pipe: AnimaPipeline, model: AnimaTransformerModel, file: Path, factors: Factors) -> None:
    pipe.load_lora_weights(file, adapter_name="mine")
    assert pipe.num_fused_loras == 0
    pipe.fuse_lora(lora_scale=0.5)
    assert (pipe.num_fused_loras, pipe.fused_loras) == (1, {"mine"})
    assert_close(output(model), output(explicit(factors, 0.5)))
    with pytest.raises(InputError, match="adapters are fused"):
        pipe.unload_lora_weights()
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert_close(output(model), output(explicit(factors)))


def test_switching_off_and_on(pipe: AnimaPipeline, model: AnimaTransformerModel, file: Path, factors: Factors) -> None:
    pipe.load_lora_weights(file)
    pipe.disable_lora()
    assert torch.equal(output(model), output(tiny_model()))
    pipe.enable_lora()
    assert_close(output(model), output(explicit(factors)))


def test_saving_to_a_folder_and_loading_from_it(
    pipe: AnimaPipeline, model: AnimaTransformerModel, file: Path, factors: Factors, tmp_path: Path
) -> None:
    pipe.load_lora_weights(file)
    path = pipe.save_lora_weights(tmp_path / "saved")
    assert path.name == "pytorch_lora_weights.safetensors"
    assert all(key.startswith(("transformer.", "text_conditioner.")) for key in load_file(path))
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "saved", weight_name="pytorch_lora_weights.safetensors")
    assert_close(output(model), output(explicit(factors)))
    with pytest.raises(InputError, match="no adapter named 'mine'"):
        pipe.save_lora_weights(tmp_path / "saved", "mine")


def test_a_file_that_is_refused_leaves_the_pipeline_as_it_was(
    pipe: AnimaPipeline, model: AnimaTransformerModel, tmp_path: Path
) -> None:
    base = base_weights(model)
    save_file({"lora_unet_blocks_9_mlp_layer1.alpha": torch.ones(())}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="blocks_9"):
        pipe.load_lora_weights(tmp_path / "a.safetensors")
    assert_same_weights(dict(model.state_dict()), base)
    assert pipe.get_list_adapters() == {}


def test_a_pipeline_without_a_part_takes_adapters_of_the_other(other_parts, factors: Factors) -> None:
    model = tiny_model()
    pipe = AnimaPipeline(**other_parts, transformer=model.transformer, text_conditioner=None)
    with pytest.raises(InputError, match="lora_unet_llm_adapter"):
        pipe.load_lora_weights(as_file(factors, "kohya"))
    of_dit = random_factors(model, (TO_Q, MLP))
    pipe.load_lora_weights(as_file(of_dit, "kohya"))
    assert_close(output(model), output(explicit(of_dit)))
    pipe.unload_lora_weights()


def test_layers_change_below_group_offloading(
    pipe: AnimaPipeline, model: AnimaTransformerModel, file: Path, factors: Factors
) -> None:
    before = draw(pipe)
    for part in model.components.values():
        apply_group_offloading(part, onload_device=torch.device("cpu"), offload_type="leaf_level")
    pipe.load_lora_weights(file)
    assert_close(output(model), output(explicit(factors)))
    assert hasattr(model.transformer.proj_out.lora_A["default_0"], "_diffusers_hook")  # it is offloaded like the others
    pipe.delete_adapters("default_0")
    assert torch.equal(draw(pipe), before)
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    assert_close(output(model), output(explicit(factors)))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    for part in model.components.values():
        assert _get_top_level_group_offload_hook(part) is not None
