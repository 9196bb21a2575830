"""What the cases of effects work with: options from their texts, through the run's own wiring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anima_peft.adapters.exchange import read_adapter
from anima_peft.adapters.factors import NormDelta
from anima_peft.adapters.layers import parts_of
from anima_peft.adapters.max_norm import limit_norms
from anima_peft.adapters.naming import ModuleTable
from anima_peft.config import TrainOptions
from anima_peft.training.groups import reported_rates
from anima_peft.training.network import add_network
from anima_peft.training.prepare import optimization
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import call, tiny_model

RATE, STEPS = 0.01, 10
SHAPE = torch.Size((16, 8, 6))
LOKR = {"network_module": "networks.lokr_anima", "network_dim": 2}


class Bench:
    """What a case works with: options from train args, and a folder for files."""

    def __init__(self, load_with: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch):
        self._load, self.folder, self.monkeypatch = load_with, folder, monkeypatch

    def options(self, *network_args: str, **given: Any) -> TrainOptions:
        arguments = {"network_args": list(network_args)} if network_args else {}
        return self._load({"learning_rate": RATE, "network_dim": 4, **arguments, **given}).train

    def network(self, *network_args: str, **given: Any) -> AnimaTransformerModel:
        torch.manual_seed(0)
        model = tiny_model()
        add_network(model, self.options(*network_args, **given))
        return model.train()

    def course(self, *network_args: str, steps: int = STEPS, **given: Any) -> SimpleNamespace:
        """Steps on one batch, as the loop takes them; `rates` holds each step's, `seen` the weights after each."""
        model, options = self.network(*network_args, **given), self.options(*network_args, **given)
        optimizer, scheduler, average = optimization(model, options, STEPS)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        rates, seen = [], []
        for _ in range(steps):
            model(**call()).square().mean().backward()
            optimizer.step()
            if options.network.scale_weight_norms:
                limit_norms(model.components, "default", options.network.scale_weight_norms)
            average.after_step()
            rates.append(reported_rates(optimizer.param_groups))
            scheduler.step()
            optimizer.zero_grad()
            seen.append([parameter.detach().clone() for parameter in parameters])
        return SimpleNamespace(
            model=model, optimizer=optimizer, average=average, parameters=parameters, rates=rates, seen=seen
        )

    def schedule(self, **given: Any) -> list[float]:
        """The rate of each step as a share of the learning rate."""
        optimizer, scheduler, _ = optimization(self.network(**given), self.options(**given), STEPS)
        shares = []
        for _ in range(STEPS):
            shares.append(optimizer.param_groups[0]["lr"] / RATE)
            optimizer.step()
            scheduler.step()
        return shares

    def adapter_file(self, *network_args: str, **given: Any) -> tuple[str, AnimaTransformerModel]:
        """A file of an adapter with random weights, and the model that carries it."""
        model = self.network(*network_args, **given).eval()
        for part in parts_of(model.components, ModuleTable(model.components), "default"):
            torch.nn.init.normal_(part.parameter, std=0.3)
        return str(model.save_lora_adapter(self.folder / "start.safetensors")), model


def modules_of(model: AnimaTransformerModel) -> dict[str, Any]:
    return {name.native: factors for name, factors in read_adapter(model.components, "default").items()}


def linears_of(model: AnimaTransformerModel) -> set[str]:
    return {name for name, factors in modules_of(model).items() if not isinstance(factors, NormDelta)}


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
