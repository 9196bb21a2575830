"""Presets and patterns of target modules."""

from __future__ import annotations

import re

import pytest
import torch

from anima_peft.adapters.layers import adapter_layers_of
from anima_peft.adapters.lora import LoraConfig
from anima_peft.adapters.naming import ModuleTable
from anima_peft.adapters.targets import PRESETS, select_targets
from anima_peft.errors import InputError
from anima_peft.transformer import AnimaTransformerModel
from tests.full_size import BLOCKS, full_size_conditioner, full_size_transformer

COUNTS = {"attn-mlp": (280, 60), "attn-mlp-adaln": (448, 60), "all-linear": (454, 61)}


@pytest.fixture(scope="module")
def table() -> ModuleTable:
    return ModuleTable({"transformer": full_size_transformer(), "text_conditioner": full_size_conditioner()})


def natives(table: ModuleTable, *patterns: str, conditioner: bool = False) -> list[str]:
    return [name.native for name in select_targets(table, patterns, train_text_conditioner=conditioner)]


@pytest.mark.parametrize(("preset", "counts"), COUNTS.items())
def test_presets_have_the_documented_sizes(table: ModuleTable, preset: str, counts: tuple[int, int]) -> None:
    in_dit, in_conditioner = counts
    assert len(select_targets(table, preset)) == in_dit
    with_conditioner = select_targets(table, preset, train_text_conditioner=True)
    assert sum(name.component == "text_conditioner" for name in with_conditioner) == in_conditioner
    assert len(with_conditioner) == in_dit + in_conditioner


def test_there_is_no_other_preset() -> None:
    assert set(PRESETS) == set(COUNTS)


def test_the_default_preset_is_what_sd_scripts_trains(table: ModuleTable) -> None:
    block = [f"{a}.{p}_proj" for a in ("self_attn", "cross_attn") for p in ("q", "k", "v", "output")]
    block += ["mlp.layer1", "mlp.layer2"]
    assert set(natives(table, "attn-mlp")) == {f"blocks.{i}.{module}" for i in range(BLOCKS) for module in block}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        pytest.param(["blocks.3.mlp.layer1"], ["blocks.3.mlp.layer1"], id="native name"),
        pytest.param(["transformer_blocks.3.ff.net.2"], ["blocks.3.mlp.layer2"], id="diffusers name"),
        pytest.param(
            [r"blocks\.[01]\.cross_attn\.q_proj"], [f"blocks.{i}.cross_attn.q_proj" for i in (0, 1)], id="regex"
        ),
        pytest.param(["proj_out"], ["final_layer.linear"], id="end of a diffusers name"),
        pytest.param(["27.mlp.layer1"], ["blocks.27.mlp.layer1"], id="end of a native name"),
        pytest.param(
            [r"blocks\.1\.mlp\..*", "final_layer.linear", r"blocks\.0\.mlp\..*", r"blocks\.0\.mlp\.layer1"],
            [*(f"blocks.{block}.mlp.layer{layer}" for block in (0, 1) for layer in (1, 2)), "final_layer.linear"],
            id="several, in the model's order and each once",
        ),
    ],
)
def test_patterns(table: ModuleTable, patterns: list[str], expected: list[str]) -> None:
    assert natives(table, *patterns) == expected


def test_the_end_of_a_name_counts_in_every_block(table: ModuleTable) -> None:
    expected = [f"blocks.{i}.{a}_attn.q_proj" for i in range(BLOCKS) for a in ("self", "cross")]
    assert natives(table, "to_q") == natives(table, "q_proj") == expected


def test_a_preset_beside_a_pattern(table: ModuleTable) -> None:
    assert len(natives(table, "attn-mlp", "final_layer.linear", r"blocks\.0\..*")) == 280 + 1 + 6


def test_the_conditioners_layers_need_to_be_asked_for(table: ModuleTable) -> None:
    pattern = r"llm_adapter\.blocks\.\d\.mlp\.0"
    assert len(natives(table, pattern, conditioner=True)) == 6
    with pytest.raises(InputError, match="need train_llm_adapter"):
        natives(table, pattern)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        pytest.param(["blocks.28.mlp.layer1"], ["'blocks.28.mlp.layer1' matches no linear"], id="no such block"),
        pytest.param(["q_pro"], ["'q_pro' matches no linear"], id="a part of a name"),
        pytest.param([""], ["'' matches no linear"], id="empty text"),
        pytest.param([r".*\.q_norm"], ["matches no linear"], id="a norm"),
        pytest.param(["llm_adapter.embed"], ["matches no linear"], id="an embedding"),
        pytest.param(["*.q_proj"], ["'*.q_proj' is not a regular expression"], id="a wildcard"),
        pytest.param([], ["the list is empty"], id="nothing"),
        pytest.param(["to_q", "nothing", "[", "attn"], ["'nothing'", "'['", "'attn'"], id="every fault is listed"),
        pytest.param(["attn_mlp"], ["attn-mlp, attn-mlp-adaln, all-linear"], id="a preset misspelt"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(table: ModuleTable, patterns: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        natives(table, *patterns, conditioner=True)
    assert [word for word in words if word not in str(error.value)] == []
    assert not re.search("'to_q'", str(error.value))


@pytest.mark.parametrize("preset", PRESETS)
def test_peft_puts_its_layers_on_exactly_the_targets_at_full_size(preset: str) -> None:
    model = AnimaTransformerModel(full_size_transformer(), full_size_conditioner())
    expected = select_targets(ModuleTable(model.components), preset, train_text_conditioner=True)
    model.add_adapter(LoraConfig(r=1, target_modules=preset, train_text_conditioner=True))
    found = {(c, path) for c, part in model.components.items() for path, _ in adapter_layers_of(part, "default")}
    assert found == {(name.component, name.path) for name in expected}
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}
