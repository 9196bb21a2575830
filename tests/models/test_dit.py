"""DiT and conditioner from a single file: names and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anima_peft.miniature import native_state_dict
from anima_peft.models.dit import dit_sizes, load_dit
from tests.components import randomise, tiny_conditioner, tiny_transformer
from tests.full_size import full_size_conditioner, full_size_transformer

from .conftest import Save, Tensors
from .dit_files import conditioner_of, prefixed, transformer_of


def run(transformer: torch.nn.Module, conditioner: torch.nn.Module, width: int) -> torch.Tensor:
    """One call of both models; `width` is that of the text encoder's states."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        context = conditioner(
            torch.randn(1, 3, width, generator=generator),
            torch.tensor([[4, 9, 1]]),
            torch.tensor([[1, 1, 0]]),
            torch.tensor([[1, 1, 0]]),
        )
        return transformer(
            torch.randn(1, transformer.config.in_channels, 1, 4, 6, generator=generator),
            torch.tensor([0.3]),
            context,
            padding_mask=torch.zeros(1, 1, 4, 6),
            return_dict=False,
        )[0]


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
def test_every_prefix_gives_the_same_model(native: Tensors, save: Save, prefix: str) -> None:
    transformer, conditioner = load_dit(save(prefixed(native, prefix)))
    for loaded, original in ((transformer, tiny_transformer()), (conditioner, tiny_conditioner())):
        assert type(loaded) is type(original)
        expected = original.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("prefix", ["net.", ""])
def test_keys_that_hold_no_weights_are_ignored(native: Tensors, save: Save, prefix: str) -> None:
    noise = {
        "blocks.0.self_attn.q_proj.comfy_quant": torch.zeros(3, dtype=torch.uint8),
        "blocks.0.self_attn._extra_state": torch.zeros(1, dtype=torch.uint8),
        "llm_adapter.blocks.0.cross_attn.q_norm._extra_state": torch.zeros(1),
        "pos_embedder.dim_spatial_range": torch.zeros(4),
        "pos_embedder.seq": torch.zeros(4),
    }
    transformer, conditioner = load_dit(save(prefixed(native | noise, prefix)))
    assert run(transformer, conditioner, 32).isfinite().all()


def test_full_size_config_is_the_published_one() -> None:
    weights = native_state_dict(full_size_transformer(), full_size_conditioner(), prefix="")
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items() if not key.startswith("llm_adapter.")}
    config = dict(full_size_transformer().config)
    assert {key: config[key] for key in dit_sizes(shapes, "file")} == dit_sizes(shapes, "file")


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "one block of one head": {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 24},
    "more blocks than ten": {"num_layers": 11, "num_attention_heads": 2, "attention_head_dim": 16},
    "a narrow MLP": {"num_attention_heads": 3, "attention_head_dim": 16, "mlp_ratio": 0.75},
    "an MLP that is no multiple": {"num_attention_heads": 1, "attention_head_dim": 26, "mlp_ratio": 15.5 / 26},
    "wide modulation": {"num_attention_heads": 2, "attention_head_dim": 16, "adaln_lora_dim": 40},
    "another width of text": {"num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 48},
    "other channels": {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8},
}
CONDITIONERS: dict[str, dict[str, Any]] = {
    "one layer": {"num_layers": 1},
    "twelve layers": {"num_layers": 12},
    "four heads": {"num_attention_heads": 4},
    "a wide MLP": {"mlp_ratio": 5.5},
    "an MLP that is no multiple": {"model_dim": 26, "num_attention_heads": 1, "mlp_ratio": 15.5 / 26},
    "a width of its own": {"model_dim": 16},
    "another text encoder": {"source_dim": 40},
    "another vocabulary": {"target_vocab_size": 50},
    "no self-attention": {"use_self_attention": False},
    "layer norms": {"use_layer_norm": True},
}


@pytest.mark.parametrize(
    ("of_transformer", "of_conditioner"),
    [pytest.param(changes, {}, id=f"DiT: {name}") for name, changes in TRANSFORMERS.items()]
    + [pytest.param(TRANSFORMERS["wide modulation"], c, id=f"conditioner: {n}") for n, c in CONDITIONERS.items()],
)
def test_sizes_are_read_from_the_weights(save: Save, of_transformer: Any, of_conditioner: Any) -> None:
    if "text_embed_dim" in of_transformer:
        of_conditioner = {"target_dim": of_transformer["text_embed_dim"], "model_dim": 32}
    originals = randomise(transformer_of(of_transformer), 3), randomise(conditioner_of(of_conditioner), 4)
    loaded = load_dit(save(native_state_dict(*originals)))
    width = originals[1].config.source_dim
    assert torch.equal(run(*loaded, width), run(*originals, width))
    assert len(loaded[0].transformer_blocks) == of_transformer.get("num_layers", 2)
    assert loaded[1].config.min_sequence_length == 512


def test_mlp_sizes_survive_the_way_through_a_ratio() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.1.weight": (704, 68),
        "blocks.0.self_attn.q_norm.weight": (64,),
        "final_layer.linear.weight": (64, 704),
        "blocks.0.cross_attn.k_proj.weight": (704, 32),
        "blocks.0.adaln_modulation_self_attn.1.weight": (16, 704),
    }
    for inner in range(1, 4 * 704):  # diffusers computes int(width * ratio)
        ratio = dit_sizes(shapes | {"blocks.0.mlp.layer1.weight": (inner, 704)}, "file")["mlp_ratio"]
        assert int(704 * ratio) == inner
