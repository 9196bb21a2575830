"""Checks of the training's options together: optimizer with schedule and rates, and what else excludes each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import InputError
from ..training import optimizers, schedules
from .arguments import read_arguments
from .checks import value_of
from .network import LORA
from .options import Option
from .reading import FAULTY, Faults, nearest, shown
from .schema import Found

_RATES = ("unet_lr", "llm_adapter_lr", "network_reg_lrs", "loraplus_lr_ratio")
_ELSEWHERE = {
    "lr": "is learning_rate",
    "params": "is the adapter",
    "differentiable": "would keep a graph through the step, which training cannot",
}


class _Values:
    """The options' values in this run by name, and where each was given."""

    def __init__(self, options: Mapping[str, Option], found: Mapping[str, Found]):
        self._options, self._found = options, found

    def __getitem__(self, name: str) -> Any:
        return value_of(self._options[name], self._found)

    def path(self, name: str) -> str:
        return self._found[name].path if name in self._found else name

    def is_set(self, name: str) -> bool:
        """Whether it is away from its default, and without a fault."""
        return self[name] is not FAULTY and self[name] != self._options[name].default


def check_training(options: Mapping[str, Option], found: Mapping[str, Found], faults: Faults) -> None:
    """Report what cannot be had in this run, as far as no model is needed to know it."""
    values = _Values(options, found)
    _check_single_values(values, faults)
    _check_schedule(values, faults)
    _check_optimizer(values, faults)


def _check_single_values(values: _Values, faults: Faults) -> None:
    times = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
    if values.is_set("sample_prompts") and not any(values.is_set(time) or values[time] is FAULTY for time in times):
        faults.add(values.path("sample_prompts"), f"has no effect without one of {', '.join(times)}")
    scheme, sampling = values["weighting_scheme"], values["timestep_sampling"]
    if scheme in ("logit_normal", "mode") and sampling not in ("sigma", FAULTY):
        faults.add(
            values.path("weighting_scheme"),
            f'{shown(scheme)} shapes the density of timestep_sampling = "sigma" and has no effect with '
            f"{shown(sampling)}; remove it or set timestep_sampling",
        )
    least, most = values["min_timestep"], values["max_timestep"]
    if FAULTY not in (least, most) and least >= most:
        faults.add(values.path("min_timestep"), f"expected less than max_timestep = {most}, got {least}")
    files, strengths = values["base_weights"], values["base_weights_multiplier"]
    if FAULTY not in (files, strengths) and files and len(strengths) > len(files):
        faults.add(
            values.path("base_weights_multiplier"), f"{len(strengths)} numbers for {len(files)} files of base_weights"
        )
    for name in ("rank_dropout", "module_dropout"):
        path = values.path(name)
        if path.endswith(f"lokr_{name}") and values["network_module"] == LORA and values.is_set(name):
            faults.add(path, f"has no effect with network_module = {shown(LORA)}; a LoRA's is called {name}")


def _check_schedule(values: _Values, faults: Faults) -> None:
    name, path, texts = values["lr_scheduler"], values["lr_scheduler_type"], values["lr_scheduler_args"]
    if FAULTY in (name, path, texts):
        return
    arguments = read_arguments(texts)
    where = values.path("lr_scheduler_args")
    if path is not None:
        with _Reported(values.path("lr_scheduler_type"), faults):
            known, any_other = schedules.custom_keywords(path)
            if any_other or _check_keys(where, arguments, known, faults):
                schedules.build_custom_scheduler(torch.optim.SGD([_leaf()], lr=1.0), path, arguments)
        return
    _check_keys(where, arguments, schedules.schedule_keywords(name), faults)
    has_least = values["lr_scheduler_min_lr_ratio"] is not None
    if name == "cosine_with_min_lr" and has_least == ("min_lr" in arguments):
        faults.add(
            values.path("lr_scheduler"), f'"{name}" needs lr_scheduler_min_lr_ratio, where the rate ends; 0.1 is usual'
        )
    if name == "warmup_stable_decay" and not values["lr_decay_steps"]:
        faults.add(values.path("lr_scheduler"), f'"{name}" needs lr_decay_steps, the steps of its fall at the end')


def _check_optimizer(values: _Values, faults: Faults) -> None:
    name, texts, rate = values["optimizer_type"], values["optimizer_args"], values["learning_rate"]
    if FAULTY in (name, texts):
        return
    arguments = read_arguments(texts)
    with _Reported(values.path("optimizer_type"), faults):
        cls = optimizers.optimizer_class(name)
        known, any_other = optimizers.keywords(cls)
        if _check_keys(values.path("optimizer_args"), arguments, known, faults, any_other=any_other):
            with _Reported(values.path("optimizer_args"), faults):
                plain = {"lr": rate} if isinstance(rate, float) else {}
                optimizers.construct(name, [{"params": [_leaf()], **plain}], plain.get("lr", 1e-4), arguments)
        _check_partners(cls, name, arguments, values, faults)


def _check_partners(cls: type, name: str, arguments: Mapping[str, object], values: _Values, faults: Faults) -> None:
    """Report options that this optimizer cannot be with."""
    free, own_rate = optimizers.is_schedule_free(cls), optimizers.sets_own_rate(cls, arguments)
    schedule = values["lr_scheduler"]
    allowed = ("constant",) if free else ("constant", schedules.ADAFACTOR)
    if (free or own_rate) and (schedule not in (*allowed, FAULTY) or values.is_set("lr_scheduler_type")):
        option = "lr_scheduler_type" if values.is_set("lr_scheduler_type") else "lr_scheduler"
        faults.add(values.path(option), f"{name} needs no schedule and must have none; remove it")
    if schedule == schedules.ADAFACTOR and not own_rate:
        faults.add(values.path("lr_scheduler"), '"adafactor" is for Adafactor with relative_step; choose another')
    for option in ("use_ema", "scale_weight_norms") if free else ():
        if values.is_set(option):
            faults.add(values.path(option), f"cannot be used with {name}, which averages the weights by itself")
    for option in _RATES if optimizers.takes_one_rate(cls, arguments) else ():
        frozen = option == "llm_adapter_lr" and not values[option]
        if values.is_set(option) and not frozen and values[option] != values["learning_rate"]:
            faults.add(values.path(option), f"{name} has one rate for all parameters; remove it")


def _check_keys(
    path: str, arguments: Mapping[str, object], known: Iterable[str], faults: Faults, *, any_other: bool = False
) -> bool:
    """Whether all keys are known; those that are not are reported."""
    known, good = tuple(known), True
    for key in arguments:
        if key in _ELSEWHERE:
            faults.add(f"{path}.{key}", f"{_ELSEWHERE[key]}; remove it")
        elif key not in known and not any_other:
            names = f"; known are {', '.join(known)}" if known else "; there are none here"
            faults.add(f"{path}.{key}", f"unknown argument{nearest(key, known) or names}")
        else:
            continue
        good = False
    return good


class _Reported:
    """Puts the InputError that is raised inside among the faults."""

    def __init__(self, path: str, faults: Faults):
        self._path, self._faults = path, faults

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, InputError):
            self._faults.add(self._path, str(error))
            return True
        return False


def _leaf() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1, 1))
