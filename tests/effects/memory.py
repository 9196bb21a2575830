"""Effects of `MemoryOptions`."""

from __future__ import annotations

import torch

from .bench import Built, Effect

DEEP = ("--anima_transformer", "{deep_transformer}")  # 4 blocks
CHECKPOINTED = (*DEEP, "--gradient_checkpointing")


def runs_of_blocks(built: Built) -> list[int]:
    """How often each block is computed for one step."""
    transformer = built.model.transformer
    counts = [0] * len(transformer.transformer_blocks)

    def count(number: int) -> None:
        counts[number] += 1

    hooks = [
        block.attn1.register_forward_pre_hook(lambda *_, number=number: count(number))
        for number, block in enumerate(transformer.transformer_blocks)
    ]
    text = torch.zeros(1, 4, built.model.text_conditioner.config.target_dim)
    built.model(torch.zeros(1, 16, 4, 4), torch.full((1,), 0.5), text).sum().backward()
    for hook in hooks:
        hook.remove()
    return counts


def swapped(built: Built) -> int:
    """Blocks that are not in the two slots, of those that take turns."""
    swap = vars(built.model.transformer).get("_block_swap")
    return 0 if swap is None else len(swap._weights) - 2


def kind_of_weights(built: Built) -> str:
    """Of the base, or the package that is missing for it."""
    return built.error or type(built.layers[0].get_base_layer().weight).__name__


EFFECTS = {
    "memory": Effect(
        ("--memory", "low"),
        lambda built: (runs_of_blocks(built), swapped(built)),
        ([1, 1, 1, 1], 0),
        ([2, 2, 2, 2], 2),
        DEEP,
    ),
    "gradient_checkpointing_every": Effect(
        ("--gradient_checkpointing_every", "2"), runs_of_blocks, [2, 2, 2, 2], [2, 1, 2, 1], CHECKPOINTED
    ),
    "blocks_to_swap": Effect(("--blocks_to_swap", "1"), swapped, 0, 1, CHECKPOINTED),
    "base_quantization": Effect(("--base_quantization", "int8"), kind_of_weights),
    "vae_tiling": Effect(("--vae_tiling",), lambda built: built.seen.latents["tiling"], False, True),
}
