"""Memory of a training step of the real size, counted on a CPU without computing anything.

Every operation runs on fake tensors, which have shapes and dtypes and no memory; what each allocates is added up, and
taken off when it is freed. That is what torch would ask its allocator for, without what the allocator adds. Under
autocast a graphics card computes norms in float32 where a CPU does not: here they are computed as there.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anima_peft.adapters import lokr
from anima_peft.config import TrainOptions
from anima_peft.data.dataset import LATENT_CHANNELS, MIN_PROMPT_ROWS
from anima_peft.training.loop import batch_loss
from anima_peft.training.network import add_network
from anima_peft.training.objective import flow_loss
from anima_peft.training.prepare import optimization, prepare_model
from anima_peft.transformer import AnimaTransformerModel
from tests.full_size import full_size_conditioner, full_size_transformer

_CPU = torch.device("cpu")


class Allocated(TorchDispatchMode):
    """Adds up the memory of tensors, while it is entered.

    Attributes:
        now: bytes of what was noted or made meanwhile and is not freed.
        peak: the most of it at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def note(self, tensors: Iterable[Any]) -> None:
        """Count tensors, each storage once."""
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            place = storage._cdata  # fake tensors have no address
            if place not in self._sizes:
                self._sizes[place] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, place)

    def _freed(self, place: int) -> None:
        self.now -= self._sizes.pop(place)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self.note(tree_leaves(results))
        return results


@dataclass(frozen=True)
class Counted:
    """Bytes of a training step.

    Attributes:
        before: weights of the DiT, adapter and optimizer's state.
        kept: what the forward pass keeps for the backward pass.
        peak: the most of all at any time.
    """

    before: int
    kept: int
    peak: int


def count_step(options: TrainOptions, blocks: int, side: int, batch: int, dtype: torch.dtype) -> Counted:
    """The second step of a model of the real width.

    Args:
        options: of the run; blocks that are swapped, or quantized, cannot be counted.
        blocks: of the DiT; the model has 28.
        side: of the pictures, in pixels.
        dtype: of the weights, bfloat16 or float32.
    """
    # On the meta device: torch exchanges no parameters of modules for fake ones.
    model = AnimaTransformerModel(full_size_transformer(blocks), full_size_conditioner()).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    add_network(model, options)
    with FakeTensorMode(), _card_autocast(), mock.patch.object(lokr, "is_quantized", return_value=False):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        with mock.patch.object(torch.nn.Module, "to", lambda module, *_: module):
            prepare_model(model, options, SimpleNamespace(device=_CPU))  # type: ignore[arg-type]
        optimizer, _, _ = optimization(model, options, 1000)
        shape = (batch, LATENT_CHANNELS, side // 8, side // 8)
        given = {"latents": torch.empty(shape), "noise": torch.empty(shape), "sigma": torch.empty(batch)}
        width = model.text_conditioner.config.target_dim
        given["prompt_embeds"] = torch.empty(batch, MIN_PROMPT_ROWS, width, dtype=dtype)
        step = _step(model.train(), optimizer, given, options, dtype)
        step(Allocated())  # makes the optimizer's state
        return step(Allocated())


def _step(
    model: AnimaTransformerModel, optimizer: Any, given: dict[str, torch.Tensor], options: TrainOptions, dtype: Any
) -> Callable[[Allocated], Counted]:
    loss_of = flow_loss(options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(memory: Allocated) -> Counted:
        with memory:
            memory.note(model.transformer.parameters())
            memory.note(tree_leaves([list(state.values()) for state in optimizer.state.values()]))
            before = memory.now
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                loss = batch_loss(model, given, loss_of)
            kept = memory.now - before
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, options.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return Counted(before, kept, memory.peak)

    return step


@contextlib.contextmanager
def _card_autocast() -> Iterator[None]:
    """Norms in float32 under autocast, as torch's list for CUDA has them (ATen/autocast_mode.h, AT_FORALL_FP32)."""
    functional = torch.nn.functional
    with contextlib.ExitStack() as stack:
        for name in ("layer_norm", "rms_norm"):
            stack.enter_context(mock.patch.object(functional, name, _wide(getattr(functional, name))))
        yield


def _wide(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **options: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(value.float() if isinstance(value, torch.Tensor) else value for value in args)
            options = {
                key: value.float() if isinstance(value, torch.Tensor) else value for key, value in options.items()
            }
        return norm(*args, **options)

    return call
