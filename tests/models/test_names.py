"""The name table against diffusers' own conversion of the original checkpoints, at full size."""

from __future__ import annotations

import pytest
import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers

from anima_peft.models.names import native_to_diffusers
from tests.full_size import BLOCKS, full_size_conditioner, full_size_transformer


@pytest.fixture(scope="module")
def transformer() -> CosmosTransformer3DModel:
    return full_size_transformer()


@pytest.fixture(scope="module")
def conditioner() -> AnimaTextConditioner:
    return full_size_conditioner()


def test_the_full_size_models_have_the_published_sizes(transformer, conditioner) -> None:
    assert transformer.num_parameters() == 1_956_405_248
    assert conditioner.num_parameters() == 134_663_680


def test_every_weight_has_a_native_name_and_no_name_is_left_over(transformer) -> None:
    table = native_to_diffusers(BLOCKS)
    assert {f"{path}.weight" for path in table.values()} == set(transformer.state_dict())
    assert len(table) == len(set(table.values())) == 454 + 113  # linears and affine norms


@pytest.mark.parametrize("blocks", [1, BLOCKS, 40])
def test_names_are_those_of_diffusers_conversion(blocks: int) -> None:
    ours = native_to_diffusers(blocks)
    theirs = convert_cosmos_transformer_checkpoint_to_diffusers({f"net.{name}.weight": name for name in ours})
    assert {name: path.removesuffix(".weight") for path, name in theirs.items()} == ours


@pytest.mark.parametrize(
    ("native", "shape"),
    {
        "x_embedder.proj.1": (2048, 68),
        "t_embedder.1.linear_1": (2048, 2048),
        "t_embedder.1.linear_2": (6144, 2048),
        "t_embedding_norm": (2048,),
        "blocks.0.adaln_modulation_self_attn.1": (256, 2048),
        "blocks.0.adaln_modulation_mlp.2": (6144, 256),
        "blocks.27.self_attn.output_proj": (2048, 2048),
        "blocks.27.self_attn.q_norm": (128,),
        "blocks.3.cross_attn.v_proj": (2048, 1024),
        "blocks.3.mlp.layer1": (8192, 2048),
        "blocks.3.mlp.layer2": (2048, 8192),
        "final_layer.adaln_modulation.2": (4096, 256),
        "final_layer.linear": (64, 2048),
    }.items(),
)
def test_shapes_of_the_original_modules(transformer, native: str, shape: tuple[int, ...]) -> None:
    weight = transformer.get_submodule(native_to_diffusers(BLOCKS)[native]).weight
    assert tuple(weight.shape) == shape
    assert weight.device == torch.device("meta")
