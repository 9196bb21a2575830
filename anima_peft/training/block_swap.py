"""Frozen weights of the DiT's blocks that wait in main memory and come to the device in turn, one block ahead.

What diffusers' streamed group offloading does for whole modules, for frozen weights alone: it restores parameters from
copies of its own, and what an adapter there had learned would be lost.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..adapters.naming import base_modules
from ..errors import InputError

logger = logging.getLogger(__name__)

ALL_BLOCKS = -1
"""As many blocks as can be swapped."""
_SLOTS = 2


def swap_blocks(transformer: Any, count: int, device: torch.device) -> None:
    """Move a DiT to a device but for frozen weights of its blocks, of which `count` blocks' are never there.

    As in sd-scripts, at most two blocks less than there are can be swapped. Each backward pass must compute its block
    anew (`checkpoint_blocks`), else it would keep every block's weights. `stop_swapping` must come before anything
    writes to the weights (fusing, merging); they can be read at any time, on the device that they are on.

    Args:
        transformer: a `CosmosTransformer3DModel`, with or without adapters.
        count: blocks, or `ALL_BLOCKS` for as many as can be.

    Raises:
        InputError: the model has too few blocks.
    """
    blocks = list(transformer.transformer_blocks)
    count = require_swappable(transformer, count)
    if not count:
        transformer.to(device)
        return
    if device.type == "cpu":
        logger.warning("blocks_to_swap saves nothing without a graphics card: blocks are copied in main memory.")
    taking_turns = count + _SLOTS
    # Evenly: the blocks between are computed while the next one is on its way.
    chosen = [blocks[number * len(blocks) // taking_turns] for number in range(taking_turns)]
    weights = [_frozen_weights(block) for block in chosen]
    waiting = [[_waiting(weight.data, device) for weight in of_block] for of_block in weights]
    for weight in (weight for of_block in weights for weight in of_block):
        weight.data = weight.data.new_empty(0)
    transformer.to(device)
    transformer._block_swap = BlockSwap(chosen, weights, waiting, device)


def require_swappable(transformer: Any, count: int) -> int:
    """How many blocks of this DiT are swapped.

    Raises:
        InputError: the model has too few blocks.
    """
    blocks = len(transformer.transformer_blocks)
    most = max(blocks - _SLOTS, 0)
    if count > most:
        raise InputError(
            f"blocks_to_swap: {count} is more than {most}, two less than this model's {blocks} blocks; "
            "-1 stands for as many as can be."
        )
    return most if count == ALL_BLOCKS else count


def stop_swapping(transformer: Any) -> bool:
    """Leave all weights where they wait, with nothing that moves them; whether any were swapped."""
    swap: BlockSwap | None = vars(transformer).pop("_block_swap", None)
    if swap is not None:
        swap.stop()
    return swap is not None


class BlockSwap:
    """Lets blocks take turns in two slots on the device.

    A slot is written to again only when the block after next is on its way, and on the device that write waits for
    all that was asked for before: by then everything that reads the slot was asked for, the backward pass of the slot's
    block included. No host synchronisation is needed, and no memory but the two slots.

    Args:
        blocks: in the order in which they run; all of the same sizes.
        weights: the parameters of each that take turns.
        waiting: their values in main memory.
        device: where the slots are.
    """

    def __init__(
        self,
        blocks: Sequence[torch.nn.Module],
        weights: Sequence[list[torch.nn.Parameter]],
        waiting: Sequence[list[torch.Tensor]],
        device: torch.device,
    ):
        self._weights, self._waiting, self._device = weights, waiting, device
        self._slots = [[torch.empty_like(tensor, device=device) for tensor in waiting[0]] for _ in range(_SLOTS)]
        self._occupants: list[int | None] = [None] * _SLOTS
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._arrived = [torch.cuda.Event() for _ in range(_SLOTS)] if cuda else []
        self._last = 0
        for number in range(len(weights)):
            self._leave(number)
        use = torch.compiler.disable(self._use)  # a compiled block begins after it
        self._hooks = [
            block.register_forward_pre_hook(lambda *_, number=number: use(number))  # type: ignore[misc]
            for number, block in enumerate(blocks)
        ]

    @property
    def present(self) -> list[int]:
        """Numbers of the blocks whose weights are in a slot, or on their way."""
        return [number for number in self._occupants if number is not None]

    def stop(self) -> None:
        """Leave all weights where they wait."""
        for hook in self._hooks:
            hook.remove()
        for number in range(len(self._weights)):
            self._leave(number)

    def _use(self, number: int) -> None:
        """Called before a block runs: its weights are brought if they are not there, and the next one's are sent for.

        They stay until their slot is needed: at both ends of the row the last two blocks are the next two as well.
        """
        if number not in self._occupants:
            in_use = self._occupants.index(self._last) if self._last in self._occupants else 1
            self._bring(number, 1 - in_use)
        slot = self._occupants.index(number)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])
        for weight, tensor in zip(self._weights[number], self._slots[slot], strict=True):
            weight.data = tensor
        following = self._following(number)
        if following not in self._occupants:
            self._bring(following, 1 - slot)
        self._last = number

    def _following(self, number: int) -> int:
        """Which block is next: forwards from the first one, backwards from the last."""
        last = len(self._weights) - 1
        if number == 0:
            return 1
        if number == last:
            return last - 1 if torch.is_grad_enabled() else 0
        return number + 1 if number > self._last else number - 1

    def _bring(self, number: int, slot: int) -> None:
        occupant = self._occupants[slot]
        if occupant is not None:
            self._leave(occupant)
        self._occupants[slot] = number
        if self._stream is None:
            self._copy(number, slot)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy(number, slot)
        self._arrived[slot].record(self._stream)

    @torch.no_grad()
    def _copy(self, number: int, slot: int) -> None:
        for target, source in zip(self._slots[slot], self._waiting[number], strict=True):
            target.copy_(source, non_blocking=True)

    def _leave(self, number: int) -> None:
        for weight, tensor in zip(self._weights[number], self._waiting[number], strict=True):
            weight.data = tensor


def _frozen_weights(block: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Of the linear layers, without what adapters added: all of a block's size but its norms'."""
    return [
        parameter
        for _, module in base_modules(block)
        if isinstance(module, torch.nn.Linear)
        for parameter in module.parameters(recurse=False)
        if not parameter.requires_grad
    ]


def _waiting(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The weight in main memory, from where a graphics card can fetch it by itself.

    Each has a piece of its own: torch takes such memory in powers of two, which the sizes of Anima's weights are.
    """
    weight = weight.cpu()
    return weight.pin_memory() if device.type == "cuda" else weight
