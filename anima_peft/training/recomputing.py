"""Values that cost little are not kept for the backward pass: it computes them again from what is kept anyway.

These are what the modulated norms, the norms of query and key with their rotation, and the activation of the MLP give;
their results are bit for bit those of the forward pass. What takes a large product to compute is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

Tensors = tuple[torch.Tensor, ...]


def recompute_cheap_values(blocks: Sequence[Any], *, draws: bool) -> None:
    """Let blocks of the DiT keep less for their backward pass, in place.

    Not for blocks that are checkpointed, which keep nothing, nor for compiled ones: there the compiler decides.

    Args:
        blocks: with their adapters.
        draws: whether adapters' linear layers draw random numbers; a modulation that has such layers is kept as it is.
    """
    for block in blocks:
        _keep_less(block)
        for norm in (block.norm1, block.norm2, block.norm3):
            forward, parameters = _narrowed(norm.forward), _trained(norm)
            norm.forward = forward if draws and parameters else _again(forward, parameters)
        for attention in (block.attn1, block.attn2):
            attention.set_processor(_Processor(attention))
        activation = block.ff.net[0]
        activation.gelu = _again(activation.gelu, [])


class _Recomputed:
    """The results of a function, computed when they are asked for, from inputs that are kept.

    Args:
        function: of the inputs; gives a tensor or several, and draws no random numbers.
        inputs: tensors of a graph; the function's results are computed apart from it.
    """

    def __init__(self, function: Callable[..., Any], inputs: Tensors):
        self._function = function
        self._inputs = [(value.detach(), value.requires_grad) for value in inputs]
        device = inputs[0].device.type
        self._autocast: dict[str, Any] = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        self._graph: tuple[Tensors, Tensors] | None = None

    def values(self) -> Tensors:
        """The results without a graph, forgotten again."""
        with torch.no_grad():
            return _tuple(self._function(*(value for value, _ in self._inputs)))

    def graph(self) -> tuple[Tensors, Tensors]:
        """Inputs as leaves and results in a graph of their own, computed once: consumers come before `forget`."""
        if self._graph is None:
            with torch.enable_grad(), torch.autocast(**self._autocast):
                leaves = tuple(value.detach().requires_grad_(needed) for value, needed in self._inputs)
                self._graph = leaves, _tuple(self._function(*leaves))
        return self._graph

    def forget(self) -> None:
        """Let go of the results."""
        self._graph = None


class _Again(torch.autograd.Function):
    """A function whose backward pass runs through a graph that is made then."""

    @staticmethod
    def forward(ctx: Any, recomputed: _Recomputed, count: int, *tensors: torch.Tensor) -> Tensors:
        ctx.recomputed, ctx.parameters = recomputed, tensors[count:]
        ctx.set_materialize_grads(False)
        results = recomputed.values()
        if not any(ctx.needs_input_grad[3:]):
            ctx.mark_non_differentiable(*results[1:])  # else what they are multiplied with would be kept for nothing
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        leaves, results = ctx.recomputed.graph()
        given = [
            (result, gradient)
            for result, gradient in zip(results, gradients, strict=True)
            if gradient is not None and result.requires_grad
        ]
        sources = (*leaves, *ctx.parameters)
        wanted = [source for source in sources if source.requires_grad]
        outputs, gradients = zip(*given, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        ctx.recomputed.forget()
        return None, None, *(next(found) if source.requires_grad else None for source in sources)


class _Kept:
    """Saved tensors' hooks around one block: what comes out of `_again` is replaced by a way to compute it."""

    current: _Kept | None = None
    """Of the block that is being computed."""

    def __init__(self) -> None:
        self._recomputed: dict[StorageWeakRef, _Recomputed] = {}  # a weak reference keeps its address from others

    def add(self, value: torch.Tensor, recomputed: _Recomputed) -> None:
        """Note that the first result of `recomputed` lies in the memory of `value`."""
        self._recomputed[StorageWeakRef(value.untyped_storage())] = recomputed

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        recomputed = self._recomputed.get(StorageWeakRef(tensor.untyped_storage()))
        if recomputed is None:
            return tensor
        place = tensor.shape, tensor.stride(), tensor.storage_offset()
        return lambda: recomputed.graph()[1][0].detach().as_strided(*place)

    @staticmethod
    def unpack(kept: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept()


class _Processor:
    """diffusers' `CosmosAttnProcessor2_0` with query and key normed and rotated again in the backward pass."""

    def __init__(self, attention: Any):
        self._parameters = _trained(attention.norm_q), _trained(attention.norm_k)

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Tensors | None = None,
    ) -> torch.Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(2, (attn.heads, -1))
            for projected in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )

        def normed(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
            def function(projected: torch.Tensor) -> torch.Tensor:
                result = norm(projected.transpose(1, 2))
                if image_rotary_emb is not None:
                    result = apply_rotary_emb(result, image_rotary_emb, use_real=True, use_real_unbind_dim=-2)
                return result.transpose(1, 2)  # type: ignore[no-any-return]

            return function

        of_query, of_key = self._parameters
        query, key = _again(normed(attn.norm_q), of_query)(query), _again(normed(attn.norm_k), of_key)(key)
        result = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, dropout_p=0.0, is_causal=False)
        result = result.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](result))  # type: ignore[no-any-return]


def _keep_less(block: Any) -> None:
    forward = block.forward

    def with_hooks(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        _Kept.current = kept = _Kept()
        try:
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
                return forward(*inputs, **options)
        finally:
            _Kept.current = None

    block.forward = with_hooks


def _again(function: Callable[..., Any], parameters: Sequence[torch.nn.Parameter]) -> Callable[..., Any]:
    """The function, which keeps its inputs alone; its first result is not kept by others either.

    Args:
        function: of tensors; results beyond the first come from inputs beyond the first, and from parameters, alone.
        parameters: trained ones that it uses besides.
    """

    def call(*inputs: torch.Tensor) -> Any:
        kept = _Kept.current
        if kept is None:
            return function(*inputs)
        recomputed = _Recomputed(function, inputs)
        results = _Again.apply(recomputed, len(inputs), *inputs, *parameters)
        kept.add(results[0], recomputed)
        return results if len(results) > 1 else results[0]

    return call


def _narrowed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A modulated norm that gives its result in autocast's dtype.

    On a graphics card autocast computes norms in float32. Each of the linear layers that follow, and each adapter on
    them, would make a narrow copy of its own.
    """

    def call(hidden_states: torch.Tensor, *modulation: torch.Tensor) -> Tensors:
        result, gate = forward(hidden_states, *modulation)
        device = result.device.type
        return result.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else result, gate

    return call


def _trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _tuple(results: Any) -> Tensors:
    return results if isinstance(results, tuple) else (results,)
