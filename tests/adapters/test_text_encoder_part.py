"""The text encoder's part of an adapter: it acts through the pipeline, and the transformer alone refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anima_peft.errors import InputError
from anima_peft.pipeline import AnimaPipeline
from tests.adapters.adapting import (
    Tensors,
    add_explicitly,
    assert_close,
    factors_of_kind,
    output,
    tensors_by_key,
    tiny_model,
)
from tests.components import tiny_text_encoder

TOLERANCE = 1e-5


def text_encoder_file(style: str = "kohya") -> tuple[Tensors, dict[str, torch.Tensor]]:
    """LoRA on Qwen3, with its deltas by path."""
    encoder, generator = tiny_text_encoder(), torch.Generator().manual_seed(5)
    tensors, deltas = {}, {}
    for path in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        out, into = encoder.get_submodule(path).weight.shape
        down, up = torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator) / into**0.5
        stem = "lora_te_" + path.replace(".", "_") if style == "kohya" else f"text_encoder.{path}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
        deltas[path] = up @ down / 2
    return tensors, deltas


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_the_text_encoders_part_acts_through_the_pipeline(parts: dict[str, Any], style: str) -> None:
    model = tiny_model()
    pipe = AnimaPipeline(**parts | model.components | {"text_encoder": tiny_text_encoder()})
    tensors, deltas = text_encoder_file(style)
    of_dit = factors_of_kind(model, "LoRA")
    before = pipe.encode_prompt("a red circle")
    pipe.load_lora_weights(tensors | tensors_by_key(of_dit), adapter_name="both")
    changed = tiny_model()
    add_explicitly(changed, of_dit)
    encoder = tiny_text_encoder()
    with torch.no_grad():
        for path, delta in deltas.items():
            encoder.get_submodule(path).weight += delta
    explicit_pipe = AnimaPipeline(**parts | changed.components | {"text_encoder": encoder})
    assert_close(pipe.encode_prompt("a red circle"), explicit_pipe.encode_prompt("a red circle"), TOLERANCE)
    assert_close(output(model), output(changed), TOLERANCE)
    assert (pipe.encode_prompt("a red circle") - before).abs().max() > 1e-2
    assert pipe.get_list_adapters().keys() == {"transformer", "text_conditioner", "text_encoder"}
    pipe.unload_lora_weights()
    assert torch.equal(pipe.encode_prompt("a red circle"), before)


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_the_transformer_alone_refuses_the_text_encoders_part(style: str) -> None:
    tensors, _ = text_encoder_file(style)
    with pytest.raises(InputError, match="the text encoder's part") as error:
        tiny_model().load_lora_adapter(tensors)
    assert "load it through the whole pipeline" in str(error.value)
