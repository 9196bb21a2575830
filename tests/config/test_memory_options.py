"""The presets of `memory`, and what cannot be combined."""

from __future__ import annotations

from typing import Any

import pytest

from anima_peft.errors import InputError

from .conftest import values_of

OURS = ("gradient_checkpointing", "gradient_checkpointing_every", "blocks_to_swap", "base_quantization")


@pytest.mark.parametrize(
    ("given", "kept", "said"),
    [
        ({}, (False, 1, 0, "none"), None),
        ({"memory": "fast"}, (False, 1, 0, "none"), None),
        ({"memory": "balanced"}, (True, 1, 0, "none"), "gradient_checkpointing = true"),
        ({"memory": "low"}, (True, 1, -1, "none"), "gradient_checkpointing = true, blocks_to_swap = -1"),
        # What is given wins, also over what would have no effect beside it.
        (
            {"memory": "balanced", "gradient_checkpointing_every": 2},
            (True, 2, 0, "none"),
            "gradient_checkpointing = true",
        ),
        ({"memory": "low", "blocks_to_swap": 4}, (True, 1, 4, "none"), "gradient_checkpointing = true"),
        ({"memory": "low", "base_quantization": "nf4"}, (True, 1, 0, "nf4"), "gradient_checkpointing = true"),
        ({"memory": "low", "gradient_checkpointing_every": 3}, (True, 3, 0, "none"), "gradient_checkpointing = true"),
        ({"memory": "low", "gradient_checkpointing": False}, (False, 1, 0, "none"), None),
        ({"memory": "low", "gradient_checkpointing": True}, (True, 1, -1, "none"), "blocks_to_swap = -1"),
    ],
)
def test_presets_set_what_is_not_given(load_with, given: dict[str, Any], kept: tuple[Any, ...], said: str) -> None:
    run = load_with(given)
    assert tuple(values_of(run)[name] for name in OURS) == kept
    assert run.warnings == ((f'memory = "{given["memory"]}" sets {said}.',) if said else ())


def test_the_printed_configuration_says_what_the_preset_set(load_with, tmp_path) -> None:
    run = load_with({"memory": "low", "blocks_to_swap": 3})
    lines = run.resolved.splitlines()
    assert 'memory = "low"  # train args' in lines
    assert 'gradient_checkpointing = true  # memory = "low"' in lines
    assert "blocks_to_swap = 3  # train args" in lines
    again = load_with(run.resolved)
    assert values_of(again) == values_of(run)
    assert again.warnings == ()


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"memory": "lo"}, 'memory: expected one of "fast", "balanced", "low"'),
        (
            {"blocks_to_swap": 4},
            "blocks_to_swap: has no effect with gradient_checkpointing = false; it needs true; set",
        ),
        (
            {"blocks_to_swap": 4, "gradient_checkpointing": True, "gradient_checkpointing_every": 2},
            "blocks_to_swap: has no effect with gradient_checkpointing_every = 2; it needs 1",
        ),
        (
            {"blocks_to_swap": 4, "gradient_checkpointing": True, "base_quantization": "int8"},
            'blocks_to_swap: has no effect with base_quantization = "int8"; it needs "none"',
        ),
        ({"blocks_to_swap": -2}, "blocks_to_swap: expected"),
        (
            {"gradient_checkpointing_every": 2},
            "gradient_checkpointing_every: has no effect with gradient_checkpointing",
        ),
        (
            {"base_quantization": "fp8", "network_args": ["use_dora=true"]},
            'base_quantization: "fp8" cannot be used with use_dora',
        ),
    ],
)
def test_faults(load_with, given: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError) as report:
        load_with(given)
    assert fault in str(report.value)
    assert "1 fault" in str(report.value)
