"""`import anima_peft` brings in what diffusers' table of pipelines has, the package's public rooms, and little more.

The command's own help does without any of it.
"""

from __future__ import annotations

import ast
import configparser
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from anima_peft_command import COMMANDS

ROOT = Path(__file__).parents[1]

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


def test_what_is_imported_is_declared() -> None:
    """Not only brought in by other packages, which may cease to do so."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    declared = {name.replace("-", "_") for text in texts for name in re.findall(r"^[\w-]+", text, re.M)}
    imported: set[str] = set()
    for file in (ROOT / "anima_peft").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.split(".")[0])
    others = {"pillow" if name == "PIL" else name for name in imported - set(sys.stdlib_module_names)}
    assert {"torch", "diffusers", "peft"} <= others
    assert others <= declared | {"anima_peft", "anima_peft_command"}
