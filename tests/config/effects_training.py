"""For each option of the training, what changes when it does: from the option's text through the run's own wiring."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from anima_peft.adapters.exchange import read_adapter
from anima_peft.adapters.factors import LoKrFactors, LoraFactors, NormDelta
from anima_peft.adapters.layers import parts_of
from anima_peft.adapters.max_norm import limit_norms
from anima_peft.adapters.naming import ModuleTable
from anima_peft.config import TrainOptions
from anima_peft.errors import InputError
from anima_peft.training import attention
from anima_peft.training.groups import reported_rates
from anima_peft.training.network import add_network, merge_base_weights
from anima_peft.training.optimizers import OPTIMIZERS
from anima_peft.training.prepare import flow_loss, noise_sampler, optimization, sigma_sampler
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import call, output, tiny_model

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


def draws(bench: Bench, count: int = 200, **given: Any) -> torch.Tensor:
    sampler, generator = sigma_sampler(bench.options(**given)), torch.Generator().manual_seed(0)
    return torch.tensor([sampler(generator, (16, 16)) for _ in range(count)], dtype=torch.float64)


def noises(bench: Bench, seed: int = 0, **given: Any) -> dict[str, torch.Tensor]:
    return noise_sampler(bench.options(**given))(torch.Generator().manual_seed(seed), SHAPE)


# Optimizer


def optimizer_type(bench: Bench) -> None:
    for name, source in OPTIMIZERS.items():
        library = source.path.partition(".")[0]
        if library == "bitsandbytes":
            continue
        pytest.importorskip(library)
        trained = bench.course(steps=6, optimizer_type=name, train_norm=True)
        cls = type(trained.optimizer)
        assert f"{cls.__module__}.{cls.__name__}".startswith(library)
        assert cls.__name__ == source.path.rpartition(".")[2]
        with trained.average.in_place():
            moved = [parameter.abs().max() > 0 for parameter in trained.parameters]
        assert all(moved), name
        # norms never decay
        decays = {len(group["params"][0].shape): group["weight_decay"] for group in trained.optimizer.param_groups}
        assert decays[1] == 0.0


def optimizer_args(bench: Bench) -> None:
    given = {"optimizer_args": ["weight_decay=0.3", "betas=(0.5, 0.6)"]}
    optimizer = bench.course(steps=1, **given).optimizer
    assert {len(group["params"][0].shape): group["weight_decay"] for group in optimizer.param_groups} == {1: 0, 2: 0.3}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.6)}
    assert optimizer.defaults["fused"]


def learning_rate(bench: Bench) -> None:
    assert bench.course(steps=1, learning_rate=0.5).rates == [{"lr": 0.5}]


def unet_lr(bench: Bench) -> None:
    both = bench.course("train_llm_adapter=true", steps=1, unet_lr=0.25)
    assert both.rates == [{"lr": 0.25, "lr/dit": 0.25, "lr/text_conditioner": RATE}]


def llm_adapter_lr(bench: Bench) -> None:
    both = bench.course("train_llm_adapter=true", steps=1, llm_adapter_lr=0.25)
    assert both.rates == [{"lr": RATE, "lr/dit": RATE, "lr/text_conditioner": 0.25}]
    off = bench.network("train_llm_adapter=true", llm_adapter_lr=0)
    assert not any(name.startswith("llm_adapter") for name in modules_of(off))


def network_reg_lrs(bench: Bench) -> None:
    optimizer = bench.course(r"network_reg_lrs=.*mlp.*=0.5,blocks\.0\..*=0,.*=0.125", steps=1).optimizer
    assert rates_of(optimizer) == {"reg_0": 0.5, "reg_2": 0.125}
    model = bench.course("network_reg_lrs=.*self_attn.*=0", steps=2).model
    moved = {name for name, f in modules_of(model).items() if f.delta_norm() > 0}
    assert {name for name in modules_of(model) if "self_attn" not in name} == moved
    with pytest.raises(InputError, match=r"network_reg_lrs: '\.\*x\.\*' matches no adapted module"):
        bench.course("network_reg_lrs=.*x.*=1", steps=1)


def loraplus_lr_ratio(bench: Bench) -> None:
    for given, up in (({}, "lora_B"), (LOKR, "lokr_w1")):
        course = bench.course("loraplus_lr_ratio=16", steps=1, **given)
        rate = {id(p): group["lr"] for group in course.optimizer.param_groups for p in group["params"]}
        components = course.model.components
        for part in parts_of(components, ModuleTable(components), "default"):
            assert rate[id(part.parameter)] == (RATE * 16 if part.part.startswith(up) else RATE), part.part
        assert course.rates[0]["lr/dit_plus"] == RATE * 16


# Schedule


def lr_scheduler(bench: Bench) -> None:
    assert bench.schedule() == [1.0] * STEPS
    assert bench.schedule(lr_scheduler="linear") == pytest.approx([1 - step / STEPS for step in range(STEPS)])


def lr_warmup_steps(bench: Bench) -> None:
    shares = bench.schedule(lr_scheduler="constant_with_warmup", lr_warmup_steps=0.4)
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, *[1.0] * 6])


def lr_decay_steps(bench: Bench) -> None:
    shares = bench.schedule(lr_scheduler="warmup_stable_decay", lr_decay_steps=5, lr_warmup_steps=2)
    falling = [(1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    assert shares == pytest.approx([0, 0.5, 1, 1, 1, *falling])
    with pytest.raises(InputError, match="more than the run's 10 steps"):
        bench.schedule(lr_scheduler="warmup_stable_decay", lr_decay_steps=11)


def lr_scheduler_num_cycles(bench: Bench) -> None:
    restarts = bench.schedule(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=2)
    assert restarts == pytest.approx([(1 + math.cos(math.pi * (step % 5) / 5)) / 2 for step in range(STEPS)])
    waves = bench.schedule(lr_scheduler="cosine", lr_scheduler_num_cycles=2)
    assert waves == pytest.approx([(1 + math.cos(2 * math.pi * step / STEPS)) / 2 for step in range(STEPS)])


def lr_scheduler_power(bench: Bench) -> None:
    shares = bench.schedule(lr_scheduler="polynomial", lr_scheduler_power=2)
    assert shares == pytest.approx([(1 - step / STEPS) ** 2 for step in range(STEPS)], abs=1e-4)


def lr_scheduler_timescale(bench: Bench) -> None:
    shares = bench.schedule(lr_scheduler="inverse_sqrt", lr_scheduler_timescale=3)
    assert shares == pytest.approx([math.sqrt(3 / (step + 3)) for step in range(STEPS)])


def lr_scheduler_min_lr_ratio(bench: Bench) -> None:
    shares = bench.schedule(lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.2)
    cosine = [(1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    assert shares == pytest.approx([0.2 + 0.8 * share for share in cosine])


def lr_scheduler_type(bench: Bench) -> None:
    given = {"lr_scheduler_type": "ExponentialLR", "lr_scheduler_args": ["gamma=0.5"]}
    assert bench.schedule(**given) == pytest.approx([0.5**step for step in range(STEPS)])


def lr_scheduler_args(bench: Bench) -> None:
    shares = bench.schedule(lr_scheduler="polynomial", lr_scheduler_args=[f"lr_end={RATE / 2}"])
    assert shares == pytest.approx([1 - step / STEPS / 2 for step in range(STEPS)])


# Average, norms


def use_ema(bench: Bench) -> None:
    course = bench.course(use_ema=True, ema_decay=0.5)
    averages = [tensor.double() for tensor in course.seen[0]]  # the first step's decay is 0
    for step, weights in enumerate(course.seen[1:], start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        averages = [decay * old + (1 - decay) * new.double() for old, new in zip(averages, weights, strict=True)]
    with course.average.in_place():
        held = [parameter.detach().clone() for parameter in course.parameters]
    for found, average, last in zip(held, averages, course.seen[-1], strict=True):
        torch.testing.assert_close(found.double(), average, atol=1e-6, rtol=1e-5)
        assert not torch.equal(found, last)
    assert all(torch.equal(p, last) for p, last in zip(course.parameters, course.seen[-1], strict=True))


def ema_decay(bench: Bench) -> None:
    held = []
    for decay in (0.3, 0.9):
        course = bench.course(use_ema=True, ema_decay=decay)
        with course.average.in_place():
            held.append(torch.cat([parameter.detach().flatten() for parameter in course.parameters]))
    last = torch.cat([weights.flatten() for weights in course.seen[-1]])
    assert (held[0] - last).norm() < 0.8 * (held[1] - last).norm()


def scale_weight_norms(bench: Bench) -> None:
    for given in ({}, LOKR, {**LOKR, "network_dim": 100_000}):
        limit = 0.02
        free = modules_of(bench.course(steps=4, train_norm=False, **given).model)
        assert max(factors.delta_norm() for factors in free.values()) > limit
        held = modules_of(bench.course(steps=4, train_norm=False, scale_weight_norms=limit, **given).model)
        norms = [factors.delta_norm() for factors in held.values()]
        assert max(norms) == pytest.approx(limit, rel=1e-4)
        deltas = [f.delta() if isinstance(f, LoKrFactors) else f.up @ f.down * f.scale for f in held.values()]
        assert max(float(delta.norm()) for delta in deltas) == pytest.approx(limit, rel=1e-4)


# Loss and noise levels


def losses(bench: Bench, sigma: float = 0.3, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours, and the difference in float64."""
    generator = torch.Generator().manual_seed(3)
    prediction, target = torch.randn(2, 2, 16, 8, 6, generator=generator)
    found = flow_loss(bench.options(**given))(prediction, target, torch.full((2,), sigma))
    return found, (prediction - target).double()


def pseudo_huber(difference: torch.Tensor, c: float) -> torch.Tensor:
    return (2 * c * ((difference**2 + c**2).sqrt() - c)).flatten(1).mean(1).float()


def loss_type(bench: Bench) -> None:
    functional, close = torch.nn.functional, torch.testing.assert_close
    for kind, reference in (("l2", functional.mse_loss), ("l1", functional.l1_loss)):
        found, difference = losses(bench, loss_type=kind)
        close(found.mean().double(), reference(difference, torch.zeros_like(difference)))
    constant = {"huber_schedule": "constant", "huber_c": 0.2}
    found, difference = losses(bench, loss_type="huber", **constant)
    close(found, pseudo_huber(difference, 0.2))
    close(losses(bench, loss_type="smooth_l1", **constant)[0], pseudo_huber(difference, 0.2) / 0.2)
    # far below the threshold it is the squared error, far beyond it the absolute one
    close(losses(bench, loss_type="huber", huber_schedule="constant", huber_c=1e3)[0], losses(bench)[0])
    close(
        losses(bench, loss_type="smooth_l1", huber_schedule="constant", huber_c=1e-6)[0],
        2 * losses(bench, loss_type="l1")[0],
    )


def huber_c(bench: Bench) -> None:
    found, difference = losses(bench, loss_type="huber", huber_c=0.5)
    torch.testing.assert_close(found, pseudo_huber(difference, 0.5 * 0.7**2 + 0.5))


def huber_schedule(bench: Bench) -> None:
    for schedule, threshold in (("constant", 0.1), ("exponential", 0.1**0.3), ("snr", 0.9 * 0.7**2 + 0.1)):
        found, difference = losses(bench, loss_type="huber", huber_schedule=schedule)
        torch.testing.assert_close(found, pseudo_huber(difference, threshold))


def huber_scale(bench: Bench) -> None:
    found, difference = losses(bench, loss_type="huber", huber_schedule="exponential", huber_scale=3)
    torch.testing.assert_close(found, pseudo_huber(difference, 3 * 0.1**0.3))


def weighting_scheme(bench: Bench) -> None:
    plain = losses(bench)[0]
    for scheme in ("sigma_sqrt", "cosmap"):
        weight = compute_loss_weighting_for_sd3(scheme, torch.tensor(0.3))
        torch.testing.assert_close(losses(bench, weighting_scheme=scheme)[0], plain * weight)
    assert losses(bench, sigma=0.0, weighting_scheme="sigma_sqrt")[0].isfinite().all()
    density = {"timestep_sampling": "sigma", "weighting_scheme": "mode"}
    assert torch.equal(losses(bench, **density)[0], plain)
    assert not torch.equal(draws(bench, **density), draws(bench, timestep_sampling="sigma"))


def by_diffusers(scheme: str, shift: float = 1.0, **numbers: float) -> torch.Tensor:
    """The same draws as sd-scripts and diffusers' training scripts make them: an index into the scheduler's sigmas."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    generator = torch.Generator().manual_seed(0)
    places = [
        compute_density_for_timestep_sampling(
            scheme,
            1,
            numbers.get("logit_mean", 0.0),
            numbers.get("logit_std", 1.0),
            numbers.get("mode_scale", 1.29),
            generator=generator,
        )
        for _ in range(200)
    ]
    return scheduler.sigmas[(torch.cat(places) * 1000).long()].double()


def timestep_sampling(bench: Bench) -> None:
    found = draws(bench, timestep_sampling="sigma", discrete_flow_shift=3)
    torch.testing.assert_close(found, by_diffusers("none", shift=3.0), atol=1e-6, rtol=0)


def logit_mean(bench: Bench) -> None:
    given = {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal", "logit_mean": 0.7}
    torch.testing.assert_close(draws(bench, **given), by_diffusers("logit_normal", logit_mean=0.7), atol=1e-6, rtol=0)


def logit_std(bench: Bench) -> None:
    given = {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal", "logit_std": 2}
    torch.testing.assert_close(draws(bench, **given), by_diffusers("logit_normal", logit_std=2.0), atol=1e-6, rtol=0)


def mode_scale(bench: Bench) -> None:
    given = {"timestep_sampling": "sigma", "weighting_scheme": "mode", "mode_scale": 0.5}
    torch.testing.assert_close(draws(bench, **given), by_diffusers("mode", mode_scale=0.5), atol=1e-6, rtol=0)


def min_timestep(bench: Bench) -> None:
    for sampling in ("sigmoid", "uniform", "shift", "flux_shift", "sigma"):
        whole, upper = (draws(bench, timestep_sampling=sampling, min_timestep=least) for least in (0, 600))
        torch.testing.assert_close(upper, 0.6 + 0.4 * whole)


def max_timestep(bench: Bench) -> None:
    for sampling in ("sigmoid", "uniform", "shift", "flux_shift", "sigma"):
        whole, lower = (draws(bench, timestep_sampling=sampling, max_timestep=most) for most in (1000, 250))
        torch.testing.assert_close(lower, 0.25 * whole)


def noise_offset(bench: Bench) -> None:
    offsets = torch.stack([noises(bench, s, noise_offset=0.5)["noise"] - noises(bench, s)["noise"] for s in range(40)])
    torch.testing.assert_close(offsets, offsets[..., :1, :1].expand_as(offsets), atol=1e-6, rtol=0)
    assert offsets[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.1)


def noise_offset_random_strength(bench: Bench) -> None:
    given = {"noise_offset": 0.5, "noise_offset_random_strength": True}
    offsets = torch.stack([noises(bench, s, **given)["noise"] - noises(bench, s)["noise"] for s in range(40)])
    spread = offsets[..., 0, 0].std(dim=1)
    assert spread.min() < 0.1 < 0.4 < spread.max()
    assert offsets[..., 0, 0].std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.2)


def ip_noise_gamma(bench: Bench) -> None:
    plain, perturbed = noises(bench), noises(bench, ip_noise_gamma=0.2)
    assert plain.keys() == {"noise"}
    assert torch.equal(perturbed["noise"], plain["noise"])
    assert (perturbed["input_noise"] - perturbed["noise"]).std().item() == pytest.approx(0.2, rel=0.1)


def ip_noise_gamma_random_strength(bench: Bench) -> None:
    given = {"ip_noise_gamma": 0.2, "ip_noise_gamma_random_strength": True}
    found = [noises(bench, seed, **given) for seed in range(20)]
    spread = torch.stack([(noise["input_noise"] - noise["noise"]).std() for noise in found])
    assert spread.min() < 0.06 < 0.14 < spread.max() < 0.22


def sigmoid_scale(bench: Bench) -> None:
    plain, wide = draws(bench), draws(bench, sigmoid_scale=1.3)
    torch.testing.assert_close(torch.logit(wide), 1.3 * torch.logit(plain))


def discrete_flow_shift(bench: Bench) -> None:
    plain, shifted = draws(bench), draws(bench, timestep_sampling="shift", discrete_flow_shift=3)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


# Layers of the adapter


def network_module(bench: Bench) -> None:
    assert {type(f) for f in modules_of(bench.network()).values()} == {LoraFactors, NormDelta}
    assert {type(f) for f in modules_of(bench.network(**LOKR)).values()} == {LoKrFactors, NormDelta}


def network_dim(bench: Bench) -> None:
    ranks = {f.rank for f in modules_of(bench.network(network_dim=3)).values() if isinstance(f, LoraFactors)}
    assert ranks == {3}


def network_alpha(bench: Bench) -> None:
    scales = {f.scale for f in modules_of(bench.network(network_alpha=2)).values() if isinstance(f, LoraFactors)}
    assert scales == {0.5}
    assert next(iter(modules_of(bench.network(network_alpha=0)).values())).scale == 1.0


def network_dropout(bench: Bench) -> None:
    layer = bench.network(network_dropout=0.5).transformer.transformer_blocks[0].attn1.to_q
    dropped = (layer.lora_dropout["default"](torch.ones(1000)) == 0).float().mean()
    assert dropped.item() == pytest.approx(0.5, abs=0.1)


def network_weights(bench: Bench) -> None:
    path, source = bench.adapter_file()
    started = bench.network(network_weights=path).eval()
    torch.testing.assert_close(output(started), output(source))
    assert not torch.allclose(output(started), output(tiny_model()), atol=1e-3)


def train_norm(bench: Bench) -> None:
    norms = [f for f in modules_of(bench.network(train_norm=True)).values() if isinstance(f, NormDelta)]
    assert len(norms) == 9
    assert not any(isinstance(f, NormDelta) for f in modules_of(bench.network(train_norm=False)).values())


def target_modules(bench: Bench) -> None:
    assert linears_of(bench.network(r"target_modules=blocks\.0\.mlp\..*")) == {
        "blocks.0.mlp.layer1",
        "blocks.0.mlp.layer2",
    }


def train_llm_adapter(bench: Bench) -> None:
    names = {network: linears_of(bench.network(f"train_llm_adapter={network}")) for network in ("false", "true")}
    assert all(name.startswith("llm_adapter.") for name in names["true"] - names["false"])
    assert len(names["true"]) > len(names["false"])


def use_dora(bench: Bench) -> None:
    factors = modules_of(bench.network("use_dora=true")).values()
    assert all(f.magnitude is not None for f in factors if isinstance(f, LoraFactors))


def lokr_shapes(bench: Bench, *network_args: str) -> set[tuple[int, bool, bool]]:
    """Each layer's smaller factor, and whether the factors are low-rank."""
    factors = modules_of(bench.network(*network_args, train_norm=False, **LOKR | {"network_dim": 1})).values()
    shapes = [f.shape for f in factors if isinstance(f, LoKrFactors)]
    return {(shape.a, shape.rank1 is not None, shape.rank2 is not None) for shape in shapes}


def lokr_factor(bench: Bench) -> None:
    assert {a for a, _, _ in lokr_shapes(bench, "lokr_factor=2")} == {2}
    assert {a for a, _, _ in lokr_shapes(bench, "lokr_factor=4")} == {4}


def lokr_full_matrix(bench: Bench) -> None:
    assert lokr_shapes(bench, "lokr_factor=4") == {(4, False, True)}
    assert lokr_shapes(bench, "lokr_factor=4", "lokr_full_matrix=true") == {(4, False, False)}


def lokr_decompose_both(bench: Bench) -> None:
    assert lokr_shapes(bench, "lokr_factor=4", "lokr_decompose_both=true") == {(4, True, True)}


def exclude_patterns(bench: Bench) -> None:
    everything, fewer = linears_of(bench.network()), linears_of(bench.network(r"exclude_patterns=['.*mlp.*','q_proj']"))
    assert fewer == {name for name in everything if "mlp" not in name and not name.endswith("q_proj")}
    with pytest.raises(InputError, match=r"exclude_patterns: expected .*\n.*'nothing' matches no linear layer"):
        bench.network("exclude_patterns=nothing")


def include_patterns(bench: Bench) -> None:
    everything = linears_of(bench.network())
    arguments = ("exclude_patterns=['.*']", r"include_patterns=['blocks\.0\.mlp\..*', '.*_modulation_mlp\.1']")
    found = linears_of(bench.network(*arguments))
    assert {name for name in found if name in everything} == {"blocks.0.mlp.layer1", "blocks.0.mlp.layer2"}
    assert {name for name in found if name not in everything} == {
        f"blocks.{number}.adaln_modulation_mlp.1" for number in range(2)
    }
    with pytest.raises(InputError, match="include_patterns: "):
        bench.network("include_patterns=nothing")


def network_reg_dims(bench: Bench) -> None:
    patterns = r"network_reg_dims=blocks\.0\.mlp\..*=0,.*mlp.*=2,llm_adapter\..*attn.*=3"
    model = bench.network(patterns, "train_llm_adapter=true", network_alpha=8)
    for name, factors in modules_of(model).items():
        if isinstance(factors, LoraFactors):
            expected = 2 if "mlp" in name else 3 if name.startswith("llm_adapter") else 4
            assert (factors.rank, factors.alpha) == (expected, 8.0), name
    assert not any(name.startswith("blocks.0.mlp") for name in modules_of(model))
    lokr = modules_of(bench.network("network_reg_dims=.*mlp.*=1", "lokr_factor=2", **LOKR))
    assert {f.shape.rank2 for name, f in lokr.items() if "mlp" in name and isinstance(f, LoKrFactors)} == {1}
    with pytest.raises(InputError, match="network_reg_dims: 'nothing' matches no adapted module"):
        bench.network("network_reg_dims=nothing=4")


def rank_dropout(bench: Bench) -> None:
    layer = bench.network("rank_dropout=0.5", network_dim=64).transformer.transformer_blocks[0].attn1.to_q
    down, x = layer.lora_A["default"], torch.randn(3, 5, layer.in_features)
    whole = x @ down.weight.T
    kept = (down(x) / whole).detach()
    assert torch.equal(kept, kept[:, :1].expand_as(kept)), "one mask for all tokens of a sample"
    assert not torch.equal(kept[0], kept[1])
    assert set(kept.flatten().tolist()) <= {0.0} | {v for v in kept.flatten().tolist() if abs(v - 2) < 1e-5}
    assert 0.3 < (kept == 0).float().mean() < 0.7
    assert torch.equal(down.eval()(x), torch.nn.functional.linear(x, down.weight))


def module_dropout(bench: Bench) -> None:
    model = bench.network("module_dropout=0.5")
    down = model.transformer.transformer_blocks[0].attn1.to_q.lora_A["default"]
    x = torch.randn(3, 5, down.in_features)
    dropped = [bool((down(x) == 0).all()) for _ in range(40)]
    assert 8 < sum(dropped) < 32
    assert down(x).requires_grad
    assert (down.eval()(x) != 0).all()


def dim_from_weights(bench: Bench) -> None:
    path, source = bench.adapter_file("network_reg_dims=.*mlp.*=2", "exclude_patterns=['.*cross_attn.*']")
    model = bench.network(network_dim=None, network_weights=path, dim_from_weights=True)
    expected, found = modules_of(source), modules_of(model)
    assert expected.keys() == found.keys()
    for name, factors in expected.items():
        if isinstance(factors, LoraFactors):
            assert (found[name].rank, found[name].alpha) == (factors.rank, factors.alpha)
            assert torch.equal(found[name].up, factors.up)
    lokr, source = bench.adapter_file("lokr_factor=2", **LOKR)
    model = bench.network(
        "lokr_factor=2",
        network_module=LOKR["network_module"],
        network_dim=None,
        network_weights=lokr,
        dim_from_weights=True,
    )
    assert {name: f.delta_norm() for name, f in modules_of(model).items()} == {
        name: f.delta_norm() for name, f in modules_of(source).items()
    }


def merged(bench: Bench, **given: Any) -> torch.Tensor:
    model = tiny_model()
    merge_base_weights(model, bench.options(**given))
    assert not any("lora" in name for name, _ in model.named_parameters()), "merged, and nothing left of it"
    add_network(model, bench.options())
    assert all(f.delta_norm() == 0 for f in modules_of(model).values())
    return output(model)


def base_weights(bench: Bench) -> None:
    path, model = bench.adapter_file()
    assert not torch.allclose(output(model), output(tiny_model()), atol=1e-3)
    torch.testing.assert_close(merged(bench, base_weights=[path]), output(model), atol=1e-4, rtol=1e-4)


def base_weights_multiplier(bench: Bench) -> None:
    path, model = bench.adapter_file()
    model.set_adapters("default", 0.5)
    found = merged(bench, base_weights=[path, path], base_weights_multiplier=[-0.5])
    torch.testing.assert_close(found, output(model), atol=1e-4, rtol=1e-4)


# Attention


class Recorder:
    def __init__(self) -> None:
        self.backends: list[str] = []

    def set_attention_backend(self, backend: Any) -> None:
        self.backends.append(backend.value)


def backends(bench: Bench, **given: Any) -> tuple[list[str], list[str]]:
    """What the transformer and the conditioner are set to on a graphics card with all packages."""
    for package in ("xformers", "flash_attn"):
        bench.monkeypatch.setattr(attention, f"is_{package}_available", lambda: True)
    loop, device = bench.options(**given).loop, torch.device("cuda")
    attention.require_attention(loop.attn_mode, device, torch.bfloat16)
    model: Any = SimpleNamespace(transformer=Recorder(), text_conditioner=Recorder())
    attention.set_attention(model, loop.attn_mode, device, xformers=loop.xformers)
    return model.transformer.backends, model.text_conditioner.backends


def xformers(bench: Bench) -> None:
    assert backends(bench) == ([], [])
    assert backends(bench, xformers=True) == (["xformers"], ["native"])


def attn_mode(bench: Bench) -> None:
    assert backends(bench, attn_mode="torch") == ([], [])
    assert backends(bench, attn_mode="flash") == (["flash"], ["native"])
    assert backends(bench, attn_mode="xformers") == (["xformers"], ["native"])
    for mode, device, dtype, reason in (
        ("flash", "cpu", torch.bfloat16, "needs a CUDA device"),
        ("flash", "cuda", torch.float32, "bf16 or fp16 only"),
    ):
        with pytest.raises(InputError, match=f'attn_mode: "{mode}" cannot be had: .*{reason}'):
            attention.require_attention(mode, torch.device(device), dtype)
    bench.monkeypatch.setattr(attention, "is_flash_attn_available", lambda: False)
    with pytest.raises(InputError, match="pip install flash-attn"):
        attention.require_attention("flash", torch.device("cuda"), torch.bfloat16)


EFFECTS: dict[str, Callable[[Bench], None]] = {
    case.__name__: case
    for case in (
        optimizer_type,
        optimizer_args,
        learning_rate,
        unet_lr,
        llm_adapter_lr,
        network_reg_lrs,
        loraplus_lr_ratio,
        lr_scheduler,
        lr_warmup_steps,
        lr_decay_steps,
        lr_scheduler_num_cycles,
        lr_scheduler_power,
        lr_scheduler_timescale,
        lr_scheduler_min_lr_ratio,
        lr_scheduler_type,
        lr_scheduler_args,
        use_ema,
        ema_decay,
        scale_weight_norms,
        loss_type,
        huber_c,
        huber_schedule,
        huber_scale,
        weighting_scheme,
        timestep_sampling,
        logit_mean,
        logit_std,
        mode_scale,
        min_timestep,
        max_timestep,
        noise_offset,
        noise_offset_random_strength,
        ip_noise_gamma,
        ip_noise_gamma_random_strength,
        sigmoid_scale,
        discrete_flow_shift,
        network_module,
        network_dim,
        network_alpha,
        network_dropout,
        network_weights,
        train_norm,
        target_modules,
        train_llm_adapter,
        use_dora,
        lokr_factor,
        lokr_full_matrix,
        lokr_decompose_both,
        exclude_patterns,
        include_patterns,
        network_reg_dims,
        rank_dropout,
        module_dropout,
        dim_from_weights,
        base_weights,
        base_weights_multiplier,
        xformers,
        attn_mode,
    )
}
"""By option."""
