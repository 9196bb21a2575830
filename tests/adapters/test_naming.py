"""The table of modules under all their names."""

from __future__ import annotations

import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers

from anima_peft.adapters.lora import LoraConfig
from anima_peft.adapters.naming import ModuleTable, base_weights
from tests.adapters.adapting import assert_same_weights, tiny_model
from tests.full_size import full_size_conditioner, full_size_transformer


def full_size_table(blocks: int = 40) -> ModuleTable:
    return ModuleTable({"transformer": full_size_transformer(blocks), "text_conditioner": full_size_conditioner()})


def test_every_name_of_a_full_size_model_is_unambiguous() -> None:
    table = full_size_table()
    count = 7 + 40 * 20 + 61 + 43 + 1  # DiT: outside and inside the blocks; conditioner: linears, norms, embedding
    assert len(table.by_native) == len(table.by_kohya) == len(table.by_diffusers) == count
    assert len(table.linears) == 6 + 40 * 16 + 61


def test_names_of_the_same_module() -> None:
    table = full_size_table()
    for native, kohya, diffusers in (
        (
            "blocks.39.self_attn.output_proj",
            "lora_unet_blocks_39_self_attn_output_proj",
            "transformer.transformer_blocks.39.attn1.to_out.0",
        ),
        (
            "llm_adapter.blocks.0.cross_attn.o_proj",
            "lora_unet_llm_adapter_blocks_0_cross_attn_o_proj",
            "text_conditioner.blocks.0.cross_attn.o_proj",
        ),
        ("t_embedder.1.linear_2", "lora_unet_t_embedder_1_linear_2", "transformer.time_embed.t_embedder.linear_2"),
    ):
        assert table.by_native[native] == table.by_kohya[kohya] == table.by_diffusers[diffusers]


def test_comfy_names_become_diffusers_names_by_diffusers_own_conversion() -> None:
    table = full_size_table()
    comfy = {f"diffusion_model.{name.native}": name for name in table.linears}
    converted = _convert_non_diffusers_anima_lora_to_diffusers(comfy)
    assert {key: name.diffusers for key, name in converted.items()} == {key: key for key in converted}
    assert len(converted) == len(table.linears)


def test_adapters_change_neither_the_table_nor_the_base_weights() -> None:
    model = tiny_model()
    before, weights = ModuleTable(model.components), {c: base_weights(m) for c, m in model.components.items()}
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(r=2, target_modules="all-linear", train_text_conditioner=True), name)
    after = ModuleTable(model.components)
    assert after.linears == before.linears
    assert {name: after.shape(name) for name in after.linears} == {name: before.shape(name) for name in before.linears}
    assert after.by_native.keys() == before.by_native.keys()
    for component, part in model.components.items():
        assert_same_weights(base_weights(part), weights[component])
        assert weights[component].keys() == getattr(tiny_model(), component).state_dict().keys()
    assert weights["transformer"]["proj_out.weight"].dtype == torch.float32
