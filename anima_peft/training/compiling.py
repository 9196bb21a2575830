"""The DiT's blocks compiled one by one, in place: modules, their names and what is saved stay as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from ..errors import InputError
from ..transformer import AnimaTransformerModel

_GRAPHS_PER_BLOCK = 4  # the first bucket, any length, any batch size, and what else may differ
_ADVICE = {
    "cuda": "it needs Triton (on Windows: pip install triton-windows)",
    "cpu": "on the CPU it needs a C++ compiler (Linux: g++; macOS: the command line tools; Windows: cl of MSVC)",
}


def require_compiler(backend: str | None, device: torch.device) -> None:
    """Compile a sum, so that what is missing is found before anything is loaded.

    Args:
        backend: `dynamo_backend`; None compiles nothing.

    Raises:
        InputError: the backend does not work here.
    """
    if backend is None:
        return
    compiled = torch.compile(torch.add, backend=backend)
    try:
        compiled(torch.ones(2, device=device), 1)
    except RuntimeError as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        advice = _ADVICE.get(device.type, "it does not know this device") if backend == "inductor" else ""
        raise InputError(
            f'torch_compile: "{backend}" does not work here{advice and ": " + advice}. Leave torch_compile out to '
            f"train without it. ({cause})"
        ) from error


def compile_blocks(model: AnimaTransformerModel, backend: str) -> None:
    """Compile each block of the DiT, with the adapter and the hooks that are on it, when it is next called.

    Blocks of the same structure share their graphs. The first bucket is compiled at its size, the second one for any
    size; from then on a bucket costs nothing. Only a last batch that is smaller than the others can cost one more.
    torch keeps what inductor has compiled in a folder of its own (`TORCHINDUCTOR_CACHE_DIR`) for the next run.

    Their backward pass computes again what is cheap, as `recompute_cheap_values` lets that of other blocks do; torch
    would keep half as much again by itself.

    Args:
        model: with its adapter; `components` and their names do not change.
        backend: one of `torch.compiler.list_backends`.
    """
    # Blocks differ where patterns give them ranks or alphas of their own. Beyond the limit torch would not compile.
    blocks = len(model.transformer.transformer_blocks)
    limit = blocks * _GRAPHS_PER_BLOCK
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    # torch computes again only what is on a list of its own, which has no products and no attention. These would keep
    # some of the list's all the same, to save a little time.
    torch._functorch.config.ban_recompute_used_far_apart = False
    torch._functorch.config.ban_recompute_long_fusible_chains = False
    torch._functorch.config.ban_recompute_materialized_backward = False
    # Dropout draws from torch's own generator, as without a compiler.
    model.compile_repeated_blocks(backend=backend, options={"fallback_random": True} if backend == "inductor" else None)


def uncompiled() -> AbstractContextManager[object]:
    """Inside of this, compiled blocks run as written: pictures and validation are not worth graphs of their own."""
    return torch.compiler.set_stance("force_eager")
