"""Where an option may stand: train args, sections, flags, another file; and which place wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from anima_peft.config import load

from .conftest import values_of


@pytest.mark.parametrize(
    ("flat", "listed", "argv", "kept"),
    [
        (None, None, (), True),
        (False, None, (), False),
        (None, "false", (), False),
        (False, "false", (), False),
        (True, None, ("--no-train_norm",), False),
        (None, "true", ("--no-train_norm",), False),
        (False, None, ("--network_args", "train_norm=true"), True),
    ],
)
def test_train_norm_may_stand_in_two_places(load_with, flat, listed, argv, kept) -> None:
    values = {} if flat is None else {"train_norm": flat}
    values |= {} if listed is None else {"network_args": [f"train_norm={listed}"]}
    assert values_of(load_with(values, argv=argv))["train_norm"] is kept


def test_command_line_beats_train_args_beats_default(load_with) -> None:
    assert values_of(load_with())["network_dim"] == 4
    assert values_of(load_with({"network_dim": 8}))["network_dim"] == 8
    assert values_of(load_with({"network_dim": 8}, argv=("--network_dim", "16")))["network_dim"] == 16
    beaten = load_with({"qwen3": "from/toml"}, argv=("--qwen=from/flags",))
    assert values_of(beaten)["qwen"] == "from/flags"


def test_sections_are_flattened(load_with) -> None:
    text = '[a]\nanima_transformer = "m"\nlearning_rate = 1\n[b]\nnetwork_module = "networks.lora_anima"\n'
    run = load_with(text + 'output_dir = "o"\noutput_name = "n"\nseed = 1\n')
    assert (run.train.loop.seed, run.train.save.output_name) == (1, "n")


def test_the_whole_configuration_may_stand_on_the_command_line(tmp_path: Path) -> None:
    dataset = tmp_path / "d.toml"
    dataset.write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "p"\n')
    words = ["--anima_transformer", "m", "--network_module", "networks.lora_anima", "--learning_rate", "1e-4"]
    run = load([*words, "--output_dir", "o", "--output_name", "n", "--dataset_config", str(dataset)])
    assert run.resolved.splitlines()[1:3] == ["# train args: none", f"# dataset: {dataset}"]
    assert run.train.optimizer.learning_rate == 1e-4


def test_train_args_may_name_the_dataset_config(tmp_path: Path, load_with) -> None:
    named = tmp_path / "named.toml"
    named.write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "named"\n')
    load_with({"dataset_config": str(named)})  # writes train.toml; its own flag wins here
    run = load(["--config_file", str(tmp_path / "train.toml")])
    assert run.datasets[0].subsets[0].image_dir == Path("named")


def test_nothing_is_created_or_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_with) -> None:
    monkeypatch.chdir(tmp_path)
    load_with()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.toml", "train.toml"]
