"""What saves memory changes nothing, or as little as is said."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from anima_peft import LoKrConfig, LoraConfig
from anima_peft.errors import InputError
from anima_peft.miniature.random_weights import build_dit
from anima_peft.training.block_swap import ALL_BLOCKS, BlockSwap, stop_swapping, swap_blocks
from anima_peft.training.checkpointing import checkpoint_blocks
from anima_peft.training.prepare import prepare_model
from anima_peft.transformer import AnimaTransformerModel

BLOCKS = 5
CPU = torch.device("cpu")
CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA with dropout": partial(LoraConfig, r=4, lora_dropout=0.2, rank_dropout=0.1, module_dropout=0.1),
    "LoRA everywhere": partial(
        LoraConfig, r=2, target_modules="all-linear", train_norm=True, train_text_conditioner=True
    ),
    "DoRA": partial(LoraConfig, r=2, use_dora=True),
    "LoKr": partial(LoKrConfig, r=100_000, decompose_factor=4, train_norm=True),
    "LoKr with dropout": partial(LoKrConfig, r=2, decompose_factor=4, rank_dropout=0.2, module_dropout=0.1),
}
Losses = list[float]


@pytest.fixture(scope="module")
def base() -> AnimaTransformerModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AnimaTransformerModel(*build_dit(50, layers=BLOCKS))


def adapted(base: AnimaTransformerModel, config: Any) -> tuple[AnimaTransformerModel, list[torch.nn.Parameter]]:
    model = copy.deepcopy(base)
    torch.manual_seed(1)
    return model, model.add_adapter(config)


def train(model: AnimaTransformerModel, parameters: list[torch.nn.Parameter], steps: int = 4) -> Losses:
    """Losses of a few steps, with a forward pass without a graph after each, as previews and validation make one."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    width = model.text_conditioner.config.target_dim
    losses = []
    torch.manual_seed(3)  # of the dropouts
    for _ in range(steps):
        text = {
            "qwen_hidden_states": torch.randn(2, 6, width, generator=generator),
            "qwen_attention_mask": torch.ones(2, 6),
            "t5_input_ids": torch.randint(1, 50, (2, 5), generator=generator),
            "t5_attention_mask": torch.ones(2, 5),
        }
        noisy, target = torch.randn(2, 2, 16, 8, 6, generator=generator)
        sigma = torch.rand(2, generator=generator)
        model.train()
        loss = (model(noisy, sigma, **text) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            seen = (model(noisy, sigma, **text) - target).square().mean()
        losses += [loss.item(), seen.item()]
    return losses


WAYS = ({"every": 2}, {"every": 1, "swapped": ALL_BLOCKS}, {"every": 1}, {"every": 1, "swapped": 1})
CASES = [
    pytest.param(name, dtype, WAYS[:2] if few else WAYS, id=f"{name}, {dtype}", marks=() if few else pytest.mark.slow)
    for dtype in (torch.float32, torch.bfloat16)
    for name in CONFIGS
    for few in [(name, dtype) in (("LoRA with dropout", torch.bfloat16), ("LoKr", torch.float32))]
]


@pytest.mark.parametrize(("name", "dtype", "ways"), CASES)
def test_checkpointed_and_swapped_runs_are_bit_equal(
    base: AnimaTransformerModel, name: str, dtype: torch.dtype, ways: tuple[dict[str, int], ...]
) -> None:
    def run(every: int = 0, swapped: int = 0) -> tuple[Losses, list[torch.Tensor]]:
        model, parameters = adapted(base, CONFIGS[name]())
        for part in (model.transformer, model.text_conditioner):
            for parameter in part.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        if every:
            checkpoint_blocks(model, every)
        if swapped:
            swap_blocks(model.transformer, swapped, CPU)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            losses = train(model, parameters, steps=2)
        return losses, [parameter.detach() for parameter in parameters]

    losses, weights = run()
    assert losses[-1] != losses[1]
    for way in ways:
        other_losses, other_weights = run(**way)
        assert other_losses == losses, way
        assert all(map(torch.equal, other_weights, weights)), way


@pytest.mark.parametrize(("every", "runs"), [(0, [1, 1, 1, 1, 1]), (1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2])])
def test_every_nth_block_is_computed_twice(base: AnimaTransformerModel, every: int, runs: list[int]) -> None:
    model, parameters = adapted(base, LoraConfig(r=2))
    counts = [0] * BLOCKS
    if every:
        checkpoint_blocks(model, every)
    for number, block in enumerate(model.transformer.transformer_blocks):
        block.attn1.register_forward_pre_hook(lambda *_, n=number: counts.__setitem__(n, counts[n] + 1))
    model.train()
    embeds = torch.randn(1, 8, model.text_conditioner.config.target_dim)
    model(torch.randn(1, 16, 4, 4), torch.rand(1), embeds).sum().backward()
    assert counts == runs
    assert all(parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize("count", [1, ALL_BLOCKS])
def test_no_more_blocks_are_present_than_allowed(base: AnimaTransformerModel, count: int) -> None:
    model, parameters = adapted(base, LoraConfig(r=2, train_norm=True))
    blocks = list(model.transformer.transformer_blocks)
    full = [_linear_bytes(block) for block in blocks]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    homes = {p.data_ptr() for block in blocks for p in block.parameters()}
    checkpoint_blocks(model)
    swap_blocks(model.transformer, count, CPU)
    swapped = BLOCKS - 2 if count == ALL_BLOCKS else count
    (swap,) = [module for module in vars(model.transformer).values() if isinstance(module, BlockSwap)]
    seen = []

    def look(block: torch.nn.Module) -> None:
        # A slot's memory is none that the model had before.
        present = [b for b in blocks if not _lie_in(b, homes)]
        assert len(present) <= 2
        assert len(swap.present) <= 2
        seen.append(blocks.index(block))

    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: look(block))
    train(model, parameters, steps=2)
    assert len(seen) == 2 * 3 * BLOCKS  # forward, again in the backward pass, and without a graph
    slots = sum(tensor.nbytes for slot in swap._slots for tensor in slot)
    on_device = slots + sum(full) - (swapped + 2) * full[0]
    assert on_device == (BLOCKS - swapped) * full[0]
    for name, parameter in model.named_parameters():  # can be read at any time, and are what they were
        assert parameter.requires_grad or torch.equal(parameter, before[name])
    assert stop_swapping(model.transformer)
    assert all(_lie_in(block, homes) for block in blocks)
    assert not stop_swapping(model.transformer)


def _linears(block: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    return (p for name, p in block.named_parameters() if not p.requires_grad and p.ndim == 2 and "lora" not in name)


def _linear_bytes(block: torch.nn.Module) -> int:
    return sum(p.nbytes for p in _linears(block))


def _lie_in(block: torch.nn.Module, homes: set[int]) -> bool:
    places = {p.data_ptr() in homes for p in _linears(block)}
    assert len(places) == 1, "half of a block"
    return places.pop()


def test_blocks_come_one_ahead(base: AnimaTransformerModel) -> None:
    """Forwards, backwards, and forwards again: what is needed is always there or was sent for one block earlier."""
    model, parameters = adapted(base, LoraConfig(r=2))
    checkpoint_blocks(model)
    swap_blocks(model.transformer, ALL_BLOCKS, CPU)
    swap: Any = vars(model.transformer)["_block_swap"]
    brought: list[tuple[int, int]] = []
    bring, last = swap._bring, BLOCKS - 1

    def noted(number: int, slot: int) -> None:
        brought.append((swap._last, number))
        bring(number, slot)

    swap._bring = noted
    embeds = torch.randn(1, 8, model.text_conditioner.config.target_dim)
    for _ in range(2):
        brought.clear()
        model(torch.randn(1, 16, 4, 4), torch.rand(1), embeds).sum().backward()
    # The first two are there from the backward pass before, the last two from the forward pass.
    forwards, backwards = brought[: last - 1], brought[last - 1 :]
    assert forwards == [(n - 2, n) for n in range(2, last + 1)]
    assert backwards == [(n + 2, n) for n in range(last - 2, -1, -1)]
    assert all(parameter.grad is not None for parameter in parameters)


def test_more_blocks_than_there_are(base: AnimaTransformerModel) -> None:
    with pytest.raises(InputError, match="blocks_to_swap: 4 is more than 3"):
        swap_blocks(copy.deepcopy(base).transformer, 4, CPU)
    small = build_dit(50, layers=2)[0]
    swap_blocks(small, ALL_BLOCKS, CPU)
    assert not stop_swapping(small)


def test_an_interrupted_forward_pass_leaves_whole_weights(base: AnimaTransformerModel) -> None:
    model, parameters = adapted(base, LoraConfig(r=2))
    reference, others = adapted(base, LoraConfig(r=2))
    checkpoint_blocks(model)
    swap_blocks(model.transformer, ALL_BLOCKS, CPU)
    hook = model.transformer.transformer_blocks[3].ff.register_forward_pre_hook(_interrupt)
    embeds = torch.randn(1, 8, model.text_conditioner.config.target_dim)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(1, 16, 4, 4), torch.rand(1), embeds)
    hook.remove()
    assert train(model, parameters, steps=1) == train(reference, others, steps=1)


@pytest.mark.parametrize("network", ["LoRA everywhere", "LoKr"])
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.slow
def test_compiled_blocks_are_swapped(base: AnimaTransformerModel, network: str) -> None:
    outcomes = []
    for swapped in (0, ALL_BLOCKS):
        model, parameters = adapted(base, CONFIGS[network]())
        checkpoint_blocks(model)
        swap_blocks(model.transformer, swapped, CPU)
        torch.compiler.reset()
        model.compile_repeated_blocks(backend="aot_eager")
        outcomes.append(train(model, parameters, steps=2))
    torch.compiler.reset()
    assert outcomes[0] == outcomes[1]


def test_several_processes_train_the_adapter_alone(base: AnimaTransformerModel, tmp_path: Path) -> None:
    """One process stands for them: what the others would be sent is what the reducer looks after."""
    model, parameters = adapted(base, LoraConfig(r=2, train_norm=True))
    reference, others = adapted(base, LoraConfig(r=2, train_norm=True))
    options: Any = SimpleNamespace(
        loop=SimpleNamespace(
            mixed_precision="no", gradient_checkpointing=True, attn_mode=None, xformers=False, compiler=None
        ),
        memory=SimpleNamespace(gradient_checkpointing_every=1, blocks_to_swap=ALL_BLOCKS),
        network=SimpleNamespace(network_dropout=0.0, rank_dropout=0.0, module_dropout=0.0),
        trains_conditioner=False,
    )
    prepare_model(model, options, SimpleNamespace(device=CPU))  # type: ignore[arg-type]
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "meet").as_uri(), rank=0, world_size=1)
    try:
        wrapped: Any = DistributedDataParallel(model)
        assert {id(parameter) for parameter in wrapped._module_parameters} == {id(p) for p in parameters}
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(1, 16, 4, 4, generator=generator), torch.rand(1, generator=generator)
        embeds = torch.randn(1, 8, model.text_conditioner.config.target_dim, generator=generator)
        for each in (wrapped, reference):
            each(*inputs, embeds).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(parameters, others, strict=True))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
