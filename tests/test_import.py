"""`import anima_peft` brings in what diffusers' table of pipelines has, the package's public rooms, and little more."""

from __future__ import annotations

import json
import subprocess
import sys

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
    assert not rooms & {f"anima_peft.{room}" for room in ("training", "data", "config", "miniature", "cli")}
    others = [name for name in added if not name.startswith("anima_peft")]
    assert {name.split(".")[0] for name in others} <= {"diffusers", "packaging"}
    # Anima's own modules of diffusers, and what those import.
    assert len(others) <= 30, others
