"""The command's help: every option with its text and default."""

from __future__ import annotations

import pytest

from anima_peft.config import TrainOptions, build_parser, load
from anima_peft.config.loading import GROUPS, OPTIONS


def test_help_names_every_option_and_its_default() -> None:
    text = " ".join(build_parser("anima-peft train").format_help().split())
    assert text.startswith("usage: anima-peft train --config_file")
    for option in OPTIONS.values():
        assert (f" {option.name}: " if option.rules.inside else f"--{option.name}") in text
    assert "Default: 512." in text
    assert "--shuffle_caption" in text
    assert "--min_snr_gamma" not in text


def test_help_is_printed_and_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        load(["--help"], prog="anima-peft train")
    assert leaving.value.code == 0
    assert "usage: anima-peft train" in capsys.readouterr().out


def test_every_option_has_a_help_text() -> None:
    assert all(len(option.rules.help) > 10 and option.rules.help.endswith(".") for option in OPTIONS.values())
    assert set(GROUPS) == set(TrainOptions.__dataclass_fields__)
