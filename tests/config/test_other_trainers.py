"""Files of sd-scripts and of its fork run as they are, or each option that cannot be had is named with advice."""

from __future__ import annotations

import pytest

from anima_peft.config import foreign, load
from anima_peft.config.command_line import FileOptions
from anima_peft.config.dataset_options import BatchKeys, DatasetKeys, PlaceKeys, SubsetKeys
from anima_peft.config.loading import OPTIONS
from anima_peft.config.network import ARGUMENT_LISTS
from anima_peft.config.options import options_of
from anima_peft.errors import InputError

from .other_trainers import (
    DATASET_KEYS,
    FORK_FILE,
    FORK_OPTIONS,
    NETWORK_ARGUMENTS,
    SD_SCRIPTS_FILE,
    SD_SCRIPTS_OPTIONS,
)

PICTURES = [
    name for cls in (DatasetKeys, BatchKeys, SubsetKeys, PlaceKeys) for o in options_of(cls) for name in o.names
]
OURS = {
    *(name for option in OPTIONS.values() if option.rules.inside is None for name in option.names),
    *ARGUMENT_LISTS,
    *(option.name for option in options_of(FileOptions)),
    *PICTURES,
}


def test_no_option_of_theirs_is_unknown(load_with) -> None:
    names = [*SD_SCRIPTS_OPTIONS.split(), *FORK_OPTIONS.split()]
    assert len(names) == len(set(names)) > 200
    assert [name for name in names if (name in OURS) == (name in foreign.TRAIN_OPTIONS)] == []
    theirs = [name for name in names if name not in OURS]
    with pytest.raises(InputError) as report:
        load_with(dict.fromkeys(theirs, "something else"))
    faults = str(report.value).split("\n  - ")[1:]
    advice = {name: foreign.TRAIN_OPTIONS[name].advice for name in theirs}
    assert faults == [f"{name}: not supported in this version: {advice[name]}" for name in theirs]
    assert all(len(text) > 8 for text in advice.values())


def test_no_network_argument_of_theirs_is_unknown() -> None:
    inside = {n for o in OPTIONS.values() for n in o.names if "network_args" in (o.rules.inside, o.rules.also_inside)}
    theirs = foreign.ARGUMENTS["network_args"]
    assert [name for name in NETWORK_ARGUMENTS.split() if (name in inside) == (name in theirs)] == []


def test_no_dataset_key_of_theirs_is_unknown() -> None:
    theirs = foreign.CAPTION_AND_PICTURE_OPTIONS
    assert [name for name in DATASET_KEYS.split() if (name in PICTURES) == (name in theirs)] == []


def test_a_file_of_sd_scripts_runs_unchanged(load_with) -> None:
    run = load_with(SD_SCRIPTS_FILE)
    assert run.train.model.qwen == "models/qwen3"
    assert run.train.flow.discrete_flow_shift == 3.0
    assert run.warnings == ()


def test_a_file_of_the_fork_runs_unchanged(load_with) -> None:
    run = load_with(FORK_FILE)
    assert (run.train.network.network_dim, run.train.network.network_alpha) == (100000, 16.0)
    assert (run.train.flow.timestep_sampling, run.train.loop.xformers) == ("sigmoid", True)
    assert run.datasets[0].batch_size == 8
    assert run.warnings == ()


def test_all_options_that_cannot_be_had_are_in_one_report(load_with) -> None:
    more = 'cpu_offload_checkpointing = true\nfp8_scaled = true\nclip_skip = 2\ntrain_data_dir = "pictures"\n'
    more += 'deepspeed = true\nhuggingface_repo_id = "me/lora"\n'
    with pytest.raises(InputError) as report:
        load_with(more + SD_SCRIPTS_FILE)
    faults = str(report.value).split("\n  - ")[1:]
    assert [fault.split(":")[0] for fault in faults] == [line.split(" =")[0] for line in more.splitlines()]
    assert all(": not supported in this version: " in fault for fault in faults)


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        ("networks.lora", 'use "networks.lora_anima"'),
        ("networks.lokr", 'is named "networks.lokr_anima" here'),
        ("networks.loha", "not supported in this version"),
        ("lycoris.kohya", 'use "networks.lokr_anima"'),
    ],
)
def test_other_kinds_of_adapters_are_named(load_with, module: str, advice: str) -> None:
    with pytest.raises(InputError, match="network_module: ") as report:
        load_with({"network_module": module})
    assert advice in str(report.value)


def test_their_flags_are_taken_too(load_with) -> None:
    load_with(argv=("--qwen3", "q", "--attn_mode", "torch", "--weighting_scheme", "none", "--no-fp8_scaled"))
    with pytest.raises(InputError, match="--cpu_offload_checkpointing: not supported in this version: use"):
        load_with(argv=("--cpu_offload_checkpointing",))
    with pytest.raises(InputError, match='--learning_r: unknown option; did you mean "--learning_rate"'):
        load_with(argv=("--learning_r", "1"))


def test_a_config_file_of_the_older_flag_is_refused() -> None:
    with pytest.raises(InputError, match=r"--input old_root\.toml --output_dir converted"):
        load(["--config=x.toml", "--nonsense"])
