"""What is computed again in the backward pass changes nothing, and is not kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from anima_peft import LoKrConfig, LoraConfig
from anima_peft.miniature.random_weights import build_dit
from anima_peft.models.precision import enable_fp32_residual
from anima_peft.training.recomputing import recompute_cheap_values
from anima_peft.transformer import AnimaTransformerModel
from benchmarks.counting import Allocated

MODULATION = ["attn-mlp-adaln"]
CONFIGS: dict[str, Any] = {
    "LoRA": lambda: LoraConfig(r=4, train_norm=True),
    "LoRA without norms": lambda: LoraConfig(r=4),
    "LoRA of the modulation": lambda: LoraConfig(r=2, target_modules=MODULATION, train_norm=True),
    "LoRA that drops": lambda: LoraConfig(r=2, target_modules=MODULATION, lora_dropout=0.3, rank_dropout=0.3),
    "LoKr": lambda: LoKrConfig(r=100_000, decompose_factor=4, train_norm=True),
}


@pytest.fixture(scope="module")
def base() -> AnimaTransformerModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AnimaTransformerModel(*build_dit(50, layers=3)).requires_grad_(False)


def adapted(
    base: AnimaTransformerModel, kind: str, dtype: torch.dtype, *, frozen: torch.dtype | None = None
) -> tuple[AnimaTransformerModel, list[torch.nn.Parameter]]:
    """A model with an adapter that acts, in training."""
    model = copy.deepcopy(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(frozen or dtype)
    torch.manual_seed(1)
    parameters = model.add_adapter(CONFIGS[kind]())
    for parameter in parameters:
        parameter.data = (parameter.data + 0.05 * torch.randn(parameter.shape)).to(dtype)
    for module in model.modules():
        module.cast_input_dtype_enabled = False  # type: ignore[assignment]  # as in a run
    return model.train(), parameters


def recompute(model: AnimaTransformerModel, kind: str, every: int = 1) -> None:
    recompute_cheap_values(list(model.transformer.transformer_blocks)[::every], draws="drops" in kind)


def gradients(model: AnimaTransformerModel, parameters: list[torch.nn.Parameter], size: int = 6) -> list[torch.Tensor]:
    """The loss and the gradients of two samples."""
    generator = torch.Generator().manual_seed(2)
    dtype = torch.float64 if parameters[0].dtype is torch.float64 else torch.float32
    noisy = torch.randn(2, 16, 4, size, generator=generator).to(dtype)
    embeds = torch.randn(2, 8, model.text_conditioner.config.target_dim, generator=generator)
    torch.manual_seed(3)  # of the dropouts
    sigma = torch.rand(2, generator=generator)
    loss = model(noisy, sigma, embeds.to(model.transformer.dtype)).to(dtype).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients_keep_every_bit(base: AnimaTransformerModel, kind: str, dtype: torch.dtype) -> None:
    model, parameters = adapted(base, kind, dtype)
    plain, others = adapted(base, kind, dtype)
    recompute(model, kind)
    for size in (6, 4):
        ours, theirs = gradients(model, parameters, size), gradients(plain, others, size)
        assert all(map(torch.equal, ours, theirs))
        assert any(gradient.any() for gradient in theirs[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["LoRA", "LoKr"])
def test_mixed_precision_keeps_every_bit(base: AnimaTransformerModel, kind: str, dtype: torch.dtype) -> None:
    outcomes = []
    for recomputed in (True, False):
        model, parameters = adapted(base, kind, torch.float32, frozen=dtype)
        if dtype is torch.float16:
            enable_fp32_residual(model.transformer)
        if recomputed:
            recompute(model, kind)
        with torch.autocast("cpu", dtype):
            outcomes.append(gradients(model, parameters))
    assert all(map(torch.equal, *outcomes))


def test_a_second_backward_pass_and_passes_without_a_graph(base: AnimaTransformerModel) -> None:
    model, parameters = adapted(base, "LoRA", torch.float32)
    plain, _ = adapted(base, "LoRA", torch.float32)
    recompute(model, "LoRA", every=2)
    inputs = torch.randn(1, 16, 4, 4), torch.rand(1), torch.randn(1, 8, model.text_conditioner.config.target_dim)
    with torch.no_grad():
        assert torch.equal(model(*inputs), plain(*inputs))
    loss = model(*inputs).square().mean()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize(("kind", "most"), [("LoRA without norms", 13), ("LoRA", 16), ("LoKr", 17)])
def test_how_much_a_block_keeps(base: AnimaTransformerModel, kind: str, most: int) -> None:
    """In activations of the model's width, of which plain operations keep 22 and, with trained norms, 28.

    These are three norms' inputs; query, key, value and result of the self-attention, query and result of the
    cross-attention; the input of the activation, which is four times as wide; where the modulation is trained, what
    three gates multiply; and in a LoKr what is between two products of the last layer.
    """
    model, _ = adapted(base, kind, torch.float32)
    recompute(model, kind)
    tokens, width = 4096, model.transformer.config.num_attention_heads * model.transformer.config.attention_head_dim
    one = tokens * width * 4
    block = model.transformer.transformer_blocks[1]
    modulated = "norms" not in kind
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    time = torch.randn(1, width, requires_grad=modulated), torch.randn(1, 3 * width, requires_grad=modulated)
    text = torch.randn(1, 8, model.transformer.config.text_embed_dim)
    rope = tuple(torch.randn(tokens, model.transformer.config.attention_head_dim) for _ in range(2))
    with Allocated() as memory:
        memory.note([*block.parameters(), *time, text, *rope])
        before = memory.now
        memory.note([hidden])
        result = block(hidden, text, *time, rope)
    kept = (memory.now - before - result.nbytes) / one
    assert most <= kept < most + 1  # of ranks, of attention's sums, and of the text
