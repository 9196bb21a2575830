"""`import anima_peft` brings in what diffusers' table of pipelines has, the package's public rooms, and little more.

The command's own help does without any of it.
"""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

from anima_peft_command import COMMANDS

_SCRIPT = """
import json, sys
import diffusers.pipelines.auto_pipeline
before = set(sys.modules)
import anima_peft
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_the_package_adds_few_modules() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    added = json.loads(done.stdout.splitlines()[-1])
    rooms = {".".join(name.split(".")[:2]) for name in added if name.startswith("anima_peft")}
    # Training, pictures and their caches, options, and the miniature wait until they are asked for.
    assert not rooms & {f"anima_peft.{room}" for room in ("training", "data", "config", "miniature", "commands", "cli")}
    others = [name for name in added if not name.startswith("anima_peft")]
    assert {name.split(".")[0] for name in others} <= {"diffusers", "packaging"}
    # Anima's own modules of diffusers, and what those import.
    assert len(others) <= 30, others


_COMMAND = """
import sys
import anima_peft_command
try:
    anima_peft_command.main(sys.argv[1:])
except SystemExit as end:
    assert not {"anima_peft", "torch", "diffusers"} & set(sys.modules)
    raise
"""


@pytest.mark.parametrize(
    ("word", "code", "shown"),
    [("--help", 0, "draw pictures"), ("--version", 0, "anima-peft 0."), ("genrate", 2, "invalid choice: 'genrate'")],
)
def test_the_commands_first_words_need_no_imports(word: str, code: int, shown: str) -> None:
    done = subprocess.run([sys.executable, "-c", _COMMAND, word], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert shown in done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        pkgutil.resolve_name(COMMANDS[name].entry)(["--help"])
    assert end.value.code == 0
    assert f"anima-peft {name}" in capsys.readouterr().out
