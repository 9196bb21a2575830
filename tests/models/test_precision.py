"""The query and key norms' eps, and the residual stream in float32."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import pytest
import torch

from anima_peft.models.precision import enable_fp32_residual, set_qk_norm_eps
from tests.components import TEXT_WIDTH, tiny_conditioner, tiny_transformer

FLOAT16_MAX = 65504.0


def qk_norms(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for name, module in transformer.named_modules() if name.endswith(("norm_q", "norm_k"))]


def test_sets_every_query_and_key_norm_and_no_other() -> None:
    transformer = tiny_transformer()
    others = {
        name: module.eps
        for name, module in transformer.named_modules()
        if hasattr(module, "eps") and not name.endswith(("norm_q", "norm_k"))
    }
    assert [norm.eps for norm in qk_norms(transformer)] == [1e-5] * 8  # what diffusers builds
    set_qk_norm_eps(transformer)
    assert [norm.eps for norm in qk_norms(transformer)] == [1e-6] * 8
    assert others == {name: module.eps for name, module in transformer.named_modules() if name in others}
    set_qk_norm_eps(transformer, 1e-5)
    assert [norm.eps for norm in qk_norms(transformer)] == [1e-5] * 8


def test_reaches_the_norm_below_an_adapter() -> None:
    transformer = tiny_transformer()
    attention = transformer.transformer_blocks[0].attn1
    norm = attention.norm_q
    attention.norm_q = torch.nn.Module()
    attention.norm_q.base_layer = norm
    set_qk_norm_eps(transformer)
    assert norm.eps == 1e-6


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="norm_q"):
        set_qk_norm_eps(tiny_conditioner())


# Weights in a narrow dtype as they are trained, with and without autocast, and float32 weights under autocast.
MODES = [
    pytest.param(weights, autocast, id=f"{weights}, autocast to {autocast}".replace("torch.", ""))
    for narrow in (torch.float16, torch.bfloat16)
    for weights, autocast in ((narrow, None), (narrow, narrow), (torch.float32, narrow))
]


def in_autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 1, 4, 6, generator=generator).to(dtype),
        "timestep": torch.tensor([0.3, 0.9]),
        "encoder_hidden_states": torch.randn(2, 8, TEXT_WIDTH, generator=generator).to(dtype),
        "padding_mask": torch.zeros(1, 1, 4, 6, dtype=dtype),
        "return_dict": False,
    }


def velocity(transformer: torch.nn.Module, autocast: torch.dtype | None = None) -> torch.Tensor:
    dtype = transformer.proj_out.weight.dtype
    with torch.no_grad(), in_autocast(autocast):
        return transformer(**inputs(dtype))[0]


def overflowing_transformer() -> torch.nn.Module:
    """Its residual stream passes float16's largest number after the last block; no matrix product does."""
    transformer = tiny_transformer()
    block = transformer.transformer_blocks[-1]
    with torch.no_grad():
        block.ff.net[2].weight.mul_(5e3)
        block.norm3.linear_2.weight[-64:].mul_(20)  # the gate's rows
    return transformer


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("weights", "autocast"), MODES)
def test_the_stream_is_float32_and_the_layers_compute_in_the_narrow_dtype(
    weights: torch.dtype, autocast: torch.dtype | None
) -> None:
    transformer = tiny_transformer().to(weights)
    enable_fp32_residual(transformer)
    between_blocks: list[torch.dtype] = []
    computed: dict[str, torch.dtype] = {}
    attended: list[torch.dtype] = []
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args: between_blocks.append(args[0].dtype))
        block.register_forward_hook(lambda _, __, output: between_blocks.append(output.dtype))
        for attention in (block.attn1, block.attn2):
            attention.to_out[0].register_forward_pre_hook(lambda _, args: attended.append(args[0].dtype))
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, output, name=name: computed.update({name: output.dtype}))
    result = velocity(transformer, autocast)
    narrow = autocast or weights
    assert between_blocks == [torch.float32] * 4
    assert set(computed.values()) == {narrow}
    assert len(computed) == 7 - 1 + 2 * 16  # the seven outside the blocks but for the norm, sixteen in each block
    assert weights == torch.float32 or set(attended) == {narrow}
    assert result.dtype == narrow


@pytest.mark.parametrize(("weights", "autocast"), MODES)
def test_the_result_is_close_to_float32s(weights: torch.dtype, autocast: torch.dtype | None) -> None:
    expected = velocity(tiny_transformer())
    transformer = tiny_transformer().to(weights)
    enable_fp32_residual(transformer)
    epsilon = torch.finfo(autocast or weights).eps
    error = relative_error(velocity(transformer, autocast), expected)
    assert 0.1 * epsilon < error < 5 * epsilon


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=["weights alone", "autocast"])
def test_a_stream_beyond_float16_stays_finite_and_right(autocast: torch.dtype | None) -> None:
    original = overflowing_transformer()
    last: list[float] = []
    products: list[float] = []
    original.transformer_blocks[-1].register_forward_hook(lambda _, __, out: last.append(float(out.abs().max())))
    for module in original.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, __, output: products.append(float(output.abs().max())))
    expected = velocity(original)
    assert last[0] > 2 * FLOAT16_MAX > 2 * max(products)

    plain = overflowing_transformer().half()
    assert not velocity(plain, autocast).isfinite().all()
    enable_fp32_residual(plain)
    result = velocity(plain, autocast)
    assert result.isfinite().all()
    assert relative_error(result, expected) < 0.02


def test_a_float32_model_is_unchanged() -> None:
    transformer = tiny_transformer()
    expected = velocity(transformer)
    enable_fp32_residual(transformer)
    assert torch.equal(velocity(transformer), expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(("weights", "autocast"), MODES)
def test_gradients_flow_to_every_adapter(
    weights: torch.dtype, autocast: torch.dtype | None, checkpointing: bool
) -> None:
    def gradients(transformer: Any, autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with in_autocast(autocast):
            output = transformer(**inputs(transformer.proj_out.weight.dtype))[0]
            output.float().square().sum().backward()  # large enough for float16 without scaling
        return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}

    torch.manual_seed(0)
    exact = tiny_transformer()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2", "proj", "linear_2"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, exact)
    narrow = copy.deepcopy(exact)
    for name, parameter in narrow.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(weights)
    enable_fp32_residual(narrow)
    expected = gradients(exact, None)
    found = gradients(narrow, autocast)
    assert found.keys() == expected.keys()
    limit = 30 * torch.finfo(autocast or weights).eps
    assert {name: error for name in expected if (error := relative_error(found[name], expected[name])) > limit} == {}
