"""Effects of `FlowOptions`."""

from __future__ import annotations

import torch

from .bench import Built, Effect


def sigmas(built: Built) -> torch.Tensor:
    return torch.stack([sample["sigma"] for sample in built.samples()])


def odds(built: Built) -> list[float]:
    """(1 - sigma) / sigma of each sample."""
    values = sigmas(built).double()
    return ((1 - values) / values).tolist()


EFFECTS = {
    "timestep_sampling": Effect(("--timestep_sampling", "uniform"), sigmas),
    "sigmoid_scale": Effect(("--sigmoid_scale", "2"), sigmas),
    "discrete_flow_shift": Effect(("--discrete_flow_shift", "3"), sigmas, beside=("--timestep_sampling", "shift")),
}
