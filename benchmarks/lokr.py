"""One frozen linear layer with an adapter: LoRA, our LoKr, PEFT's and LyCORIS', forward and backward.

Needs `lycoris-lora` (pip install -e ".[test]").
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator

import peft
import torch
from peft.tuners.lokr.layer import Linear as PeftLoKrLinear
from peft.tuners.lora.layer import Linear as LoraLinear

from anima_peft.adapters.lokr import LoKrLinear, plan_shape

from .measure import median_ratio, paired_times, saved_bytes
from .reporting import Row

SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048))
FACTOR = 8
RANK = 16
FULL = 100_000
REFERENCE = "base"


def _ours(base: torch.nn.Linear, rank: int) -> torch.nn.Module:
    config = peft.LoKrConfig(r=rank, alpha=rank, target_modules=["x"])
    shape = plan_shape(
        base.out_features, base.in_features, rank=rank, factor=FACTOR, full_matrix=False, decompose_both=False
    )
    return LoKrLinear(base, "default", config, r=rank, alpha=rank, shape=shape)


def _peft_lokr(base: torch.nn.Linear, rank: int) -> torch.nn.Module:
    config = peft.LoKrConfig(r=rank, alpha=rank, target_modules=["x"], decompose_factor=FACTOR, init_weights="lycoris")
    return PeftLoKrLinear(base, "default", config, r=rank, alpha=rank)


def _lora(base: torch.nn.Linear) -> torch.nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["x"])
    return LoraLinear(base, "default", config, r=RANK, lora_alpha=RANK)


def _lycoris(base: torch.nn.Linear, rank: int, bypass: bool) -> torch.nn.Module:
    from lycoris.modules.lokr import LokrModule

    module = LokrModule("x", base, 1.0, lora_dim=rank, alpha=rank, factor=FACTOR, bypass_mode=bypass)
    module.apply_to()

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer, self.adapter = base, module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x)

    return Wrapped()


LAYERS: dict[str, Callable[[torch.nn.Linear], torch.nn.Module]] = {
    REFERENCE: lambda base: base,
    "LoRA r16": _lora,
    "ours full": lambda base: _ours(base, FULL),
    "ours r16": lambda base: _ours(base, RANK),
    "PEFT full": lambda base: _peft_lokr(base, FULL),
    "PEFT r16": lambda base: _peft_lokr(base, RANK),
    "LyCORIS full": lambda base: _lycoris(base, FULL, bypass=False),
    "LyCORIS full, bypass": lambda base: _lycoris(base, FULL, bypass=True),
}


def _steps(
    in_features: int, out_features: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """A forward and backward pass of every layer, and the bytes that each keeps between them."""
    torch.manual_seed(0)
    base = torch.nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(tokens, in_features, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, out_features, device=device, dtype=dtype)
    steps, saved = {}, {}
    for name, build in LAYERS.items():
        layer = build(copy.deepcopy(base)).to(device).train()
        for key, parameter in layer.named_parameters():
            if "base_layer" not in key and layer is not base:
                # As each is trained: ours keeps float32 parameters and computes in the activations' dtype; the others
                # get the base's dtype, which is their faster way.
                parameter.data = parameter.data.float() if name.startswith("ours") else parameter.data.to(dtype)
        layer.requires_grad_(True)
        getattr(layer, "base_layer", layer).requires_grad_(False)
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

        def forward(layer: torch.nn.Module = layer) -> torch.Tensor:
            return layer(x)

        def step(forward: Callable[[], torch.Tensor] = forward) -> None:
            forward().backward(gradient)

        saved[name] = saved_bytes(forward, own)
        steps[name] = step
    return steps, saved


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--tokens` and `--dtype`."""
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1024 4096, or 256 at miniature size")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], help="default: both, or float32")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """Measure every layer; a row for each adapter: time over the base's, over LoRA's, and saved MiB."""
    full = arguments.size == "full"
    for dtype in arguments.dtype or (["float32", "bfloat16"] if full else ["float32"]):
        for tokens in arguments.tokens or ([1024, 4096] if full else [256]):
            for in_features, out_features in SHAPES:
                yield from _layer(in_features, out_features, tokens, dtype, arguments)


def _layer(
    in_features: int, out_features: int, tokens: int, dtype: str, arguments: argparse.Namespace
) -> Iterator[Row]:
    steps, saved = _steps(in_features, out_features, tokens, getattr(torch, dtype), arguments.device)
    times = paired_times(steps, arguments.rounds, arguments.device)
    for name in steps:
        yield Row(
            case=f"{in_features}->{out_features}, {tokens} tokens, {dtype}",
            name=name,
            median=1e3 * statistics.median(times[name]),
            unit="ms",
            ratio=median_ratio(times, name, REFERENCE),
            reference=REFERENCE,
            figures={"/ LoRA": median_ratio(times, name, "LoRA r16"), "saved MiB": saved[name] / 2**20},
        )
