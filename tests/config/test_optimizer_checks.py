"""Optimizers of libraries that need not be installed: what goes with them, and what is said where they are missing."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from anima_peft.errors import InputError


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("AdamW8bit", "bitsandbytes", "pip install anima-peft[bitsandbytes]"),
        ("PagedAdamW8bit", "bitsandbytes", "pip install anima-peft[bitsandbytes]"),
        ("Lion8bit", "bitsandbytes", "pip install anima-peft[bitsandbytes]"),
        ("lion", "lion_pytorch", "pip install anima-peft[optimizers]"),
        ("Prodigy", "prodigyopt", "pip install anima-peft[optimizers]"),
        ("CAME", "came_pytorch", "pip install anima-peft[optimizers]"),
        ("radam_schedulefree", "schedulefree", "pip install anima-peft[optimizers]"),
        ("AdamWScheduleFree", "schedulefree", "pip install anima-peft[optimizers]"),
    ],
)
def test_a_missing_library_is_named_with_its_command(
    load_with, monkeypatch: pytest.MonkeyPatch, name: str, module: str, install: str
) -> None:
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"1 fault") as report:
        load_with({"optimizer_type": name})
    assert install in str(report.value)


@pytest.mark.parametrize(
    ("module", "given", "fault"),
    [
        ("schedulefree", {"lr_scheduler": "cosine"}, "lr_scheduler: RAdamScheduleFree needs no schedule"),
        ("schedulefree", {"lr_scheduler_type": "ConstantLR"}, "lr_scheduler_type: RAdamScheduleFree needs no schedule"),
        ("schedulefree", {"lr_warmup_steps": 5}, "lr_warmup_steps: has no effect with lr_scheduler"),
        ("schedulefree", {"use_ema": True}, "use_ema: cannot be used with RAdamScheduleFree, which averages"),
        ("schedulefree", {"scale_weight_norms": 1.0}, "scale_weight_norms: cannot be used with RAdamScheduleFree"),
        ("schedulefree", {"optimizer_args": ["warmup_steps=5"]}, "optimizer_args.warmup_steps: unknown argument"),
        ("prodigyopt", {"unet_lr": 0.5}, "unet_lr: Prodigy has one rate for all parameters"),
        ("prodigyopt", {"network_args": ["loraplus_lr_ratio=4"]}, "loraplus_lr_ratio: Prodigy has one rate"),
        ("prodigyopt", {"network_args": ["network_reg_lrs=.*=1"]}, "network_reg_lrs: Prodigy has one rate"),
        ("prodigyopt", {"optimizer_args": ["d0=-1"]}, "Invalid d0 value: -1"),
        ("prodigyopt", {"optimizer_args": ["decuple=True"]}, 'unknown argument; did you mean "decouple"?'),
    ],
)
def test_what_an_optimizer_cannot_be_with(load_with, module: str, given: dict[str, Any], fault: str) -> None:
    pytest.importorskip(module)
    name = {"schedulefree": "RAdamScheduleFree", "prodigyopt": "Prodigy"}[module]
    with pytest.raises(InputError, match=r"1 fault") as report:
        load_with({"optimizer_type": name, "learning_rate": 1.0, **given})
    assert fault in str(report.value)


def test_one_rate_for_all_may_be_said_twice(load_with) -> None:
    """sd-scripts' users set unet_lr beside learning_rate."""
    pytest.importorskip("prodigyopt")
    assert load_with({"optimizer_type": "Prodigy", "learning_rate": 1, "unet_lr": 1}).train.optimizer.unet_lr == 1
