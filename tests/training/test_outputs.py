"""Names of a run's files, which of them stop a new run, and which go."""

from datetime import datetime
from pathlib import Path

import pytest

from anima_peft.errors import InputError
from anima_peft.training.outputs import (
    Outputs,
    files_to_drop,
    is_final_state,
    remove,
    require_free,
    resolve_folder,
    state_folder,
)


def test_names_are_those_of_sd_scripts(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, "角色 v1")
    assert outputs.final.name == "角色 v1.safetensors"
    assert outputs.after_epoch(1).name == "角色 v1-000001.safetensors"
    assert outputs.after_step(100).name == "角色 v1-step00000100.safetensors"
    assert state_folder(outputs.after_step(100)).name == "角色 v1-step00000100-state"
    assert outputs.config.name == "角色 v1-config.toml"
    assert state_folder(outputs.final).name == "角色 v1-state"


def test_time_is_filled_in() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    assert resolve_folder("runs/{time}/a", now) == Path("runs/20260102_030405/a")
    assert resolve_folder("runs/a", now) == Path("runs/a")


@pytest.mark.parametrize(
    ("existing", "stops"),
    [
        ("name.safetensors", True),
        ("name-000003.safetensors", True),
        ("name-step00000010.safetensors", True),
        ("name-state", True),
        ("name-comparison.png", True),
        ("name-config.toml", True),
        ("name2-config.toml", False),
        ("name-01-without.png", True),
        ("name-02-with.png", True),
        ("name2.safetensors", False),
        ("name-b-01-with.png", False),
        ("name-b-state", False),
        ("name-step00000010-state", True),
        ("name-final.safetensors", False),
        ("other.safetensors", False),
        ("logs", False),
    ],
)
def test_an_earlier_run_of_the_name_stops_a_new_one(tmp_path: Path, existing: str, stops: bool) -> None:
    (tmp_path / existing).touch()
    outputs = Outputs(tmp_path, "name")
    if stops:
        with pytest.raises(InputError, match="--overwrite"):
            require_free(outputs, overwrite=False, resume=False)
    else:
        require_free(outputs, overwrite=False, resume=False)
    require_free(outputs, overwrite=True, resume=False)
    require_free(outputs, overwrite=False, resume=True)


def test_brackets_in_a_name_are_letters(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    assert Outputs(tmp_path, "[abc]").existing() == []
    (tmp_path / "[abc]-000001.safetensors").touch()
    assert [path.name for path in Outputs(tmp_path, "[abc]").existing()] == ["[abc]-000001.safetensors"]


@pytest.mark.parametrize("file", ["after_epoch", "after_step"])
@pytest.mark.parametrize("name", ["a", "a-000001", "[b] -state"])
def test_a_states_run_is_known_by_its_name(tmp_path: Path, name: str, file: str) -> None:
    outputs = Outputs(tmp_path, name)
    state = state_folder(getattr(outputs, file)(7))
    assert Outputs.of_state(state) == outputs
    assert not is_final_state(state)


def test_the_last_n_steps_stay() -> None:
    saved = [(10, "a"), (20, "b"), (30, "c"), (40, "d")]
    assert files_to_drop(saved, now=40, keep_last=20) == [(10, "a")]
    assert files_to_drop(saved, now=40, keep_last=None) == []


def test_removing_takes_the_state_along(tmp_path: Path) -> None:
    path = Outputs(tmp_path, "x").after_step(5)
    path.touch()
    state_folder(path).mkdir()
    (state_folder(path) / "file").touch()
    remove(path)
    remove(path)
    assert list(tmp_path.iterdir()) == []
