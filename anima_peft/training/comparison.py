"""The proof at the end of a run: the same prompts and seeds without and with the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..generation import Request, draw, labelled_grid, save_picture
from ..models.sources import ModelSources
from ..pipeline import AnimaPipeline
from ..transformer import AnimaTransformerModel
from .block_swap import stop_swapping
from .outputs import Outputs


def draw_comparison(
    model: AnimaTransformerModel,
    sources: ModelSources,
    outputs: Outputs,
    requests: Sequence[Request],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Path:
    """Draw each request without and with the saved adapter, and write the pictures and a labelled grid of them.

    The adapter is taken off the model and read back from its file through `pipe.load_lora_weights`: what is shown is
    what anyone gets who loads the file.

    Returns:
        The grid's path.
    """
    swapped = stop_swapping(model.transformer)
    model.unload_lora()
    model.disable_gradient_checkpointing()
    pipe = AnimaPipeline.around(model, sources, dtype)
    # Where training fits, this must fit too: one part, or layer, on the card at a time, and large pictures in tiles.
    if device.type == "cuda" and swapped:
        pipe.enable_sequential_cpu_offload(device=device)
    elif device.type == "cuda":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_vae_tiling()
    without = [draw(pipe, request) for request in requests]
    pipe.load_lora_weights(outputs.final, adapter_name="trained")
    with_adapter = [draw(pipe, request) for request in requests]
    for number, pair in enumerate(zip(without, with_adapter, strict=True), start=1):
        for picture, label in zip(pair, ("without", "with"), strict=True):
            save_picture(picture, outputs.compared(number, label))
    rows = [list(pair) for pair in zip(without, with_adapter, strict=True)]
    grid = labelled_grid(rows, [request.prompt for request in requests], ["without", "with adapter"])
    save_picture(grid, outputs.comparison)
    return outputs.comparison
