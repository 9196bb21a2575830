"""A run in a few lines, before it starts; and what its record says of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .._version import __version__
from ..adapters.lokr import FULL_MATRIX_SENTINEL
from ..adapters.strengths import adapter_layers
from ..data.pictures import Picture
from ..data.summary import table_rows
from ..transformer import AnimaTransformerModel
from .metadata import RunFacts
from .outputs import Outputs
from .samples import steps_of_epoch

if TYPE_CHECKING:
    from ..config import RunConfig, TrainOptions

Overview = list[tuple[str, str]]
"""A heading and a text each, in the order in which they are shown."""


def overview(
    options: TrainOptions,
    facts: RunFacts,
    parameters: Iterable[torch.nn.Parameter],
    model: AnimaTransformerModel,
    device: torch.device,
    outputs: Outputs,
) -> Overview:
    """What is trained, how, on what, and where to.

    Args:
        parameters: all that is trained; `model` has the adapter.
    """
    optimizer, loop = options.optimizer, options.loop
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    checkpointing = ", gradient checkpointing" if loop.gradient_checkpointing else ""
    layers = sum(hasattr(layer, "r") for _, _, layer in adapter_layers(model.components))
    count = sum(parameter.numel() for parameter in parameters)
    return [
        ("model", facts.sources.transformer.name),
        ("adapter", f"{_adapter(options)}: {layers} layers, {_short(count)} parameters"),
        ("optimizer", f"{optimizer.optimizer_type}, learning rate {optimizer.learning_rate:g}, {_schedule(options)}"),
        ("steps", _steps(options, facts)),
        ("precision", f"{'fp32' if loop.mixed_precision == 'no' else loop.mixed_precision} on {name}{checkpointing}"),
        ("output", str(outputs.final)),
    ]


def overview_text(rows: Overview) -> str:
    """As lines for a terminal."""
    width = max(len(heading) for heading, _ in rows)
    return "\n".join(f"{heading:<{width}}  {text}" for heading, text in rows)


def held_out_note(pictures: Sequence[Picture]) -> list[str]:
    """A sentence about the pictures that are held out, if there are any."""
    return [f"Held out for validation and not trained on: {len(pictures)} pictures."] if pictures else []


def run_facts(
    config: RunConfig,
    pictures: Sequence[Picture],
    facts: RunFacts,
    about: Overview,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What the record keeps of a run: `about`, the table and notes of its pictures, the configuration."""
    return {
        "version": __version__,
        "name": config.train.save.output_name,
        "total_steps": facts.total_steps,
        "steps_per_epoch": steps_of_epoch(config.train.loop, facts.batches_per_epoch),
        "overview": [list(row) for row in about],
        "pictures": table_rows(pictures),
        "notes": list(notes),
        "config": config.resolved,
    }


def _adapter(options: TrainOptions) -> str:
    network = options.network
    if not network.is_lokr:
        kind = "DoRA" if network.use_dora else "LoRA"
        return f"{kind}, rank {network.network_dim}, alpha {network.network_alpha:g}"
    if network.lokr_full_matrix or network.network_dim >= FULL_MATRIX_SENTINEL:
        return f"LoKr, full matrices, factor {network.lokr_factor}"
    return f"LoKr, rank {network.network_dim}, alpha {network.network_alpha:g}, factor {network.lokr_factor}"


def _schedule(options: TrainOptions) -> str:
    schedule = options.schedule
    name = schedule.lr_scheduler_type or schedule.lr_scheduler
    return f"{name}, warmup {schedule.lr_warmup_steps:g}" if schedule.lr_warmup_steps else name


def _steps(options: TrainOptions, facts: RunFacts) -> str:
    accumulated = options.loop.gradient_accumulation_steps
    per_epoch = steps_of_epoch(options.loop, facts.batches_per_epoch)
    of = f" of {accumulated} batches" if accumulated > 1 else ""
    return f"{facts.total_steps}{of} ({facts.total_steps / per_epoch:.3g} epochs)"


def _short(count: int) -> str:
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return str(count)
