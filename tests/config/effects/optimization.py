"""Options of optimizer, rates, schedule and averages."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from anima_peft.adapters.factors import LoKrFactors
from anima_peft.adapters.layers import parts_of
from anima_peft.adapters.naming import ModuleTable
from anima_peft.errors import InputError
from anima_peft.training.optimizers import OPTIMIZERS

from .bench import LOKR, RATE, STEPS, Bench, modules_of, rates_of


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
    )
}
"""By option."""
