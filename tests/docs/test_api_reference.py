"""The API reference builds without a warning, as docs/README.md says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.mark.slow
def test_the_api_reference_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason='pip install -e ".[docs]"')
    words = [sys.executable, str(ROOT / "tools" / "write_api_reference.py"), str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "load_lora_weights" in (tmp_path / "site" / "anima_peft.html").read_text(encoding="utf-8")
    assert (tmp_path / "site" / "anima_peft" / "adapters" / "exchange.html").is_file()
