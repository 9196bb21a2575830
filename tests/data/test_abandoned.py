"""What killed processes leave in a cache folder."""

from __future__ import annotations

import os
from pathlib import Path

from anima_peft.data.cache import remove_abandoned


def test_only_what_was_half_written_long_ago_is_removed(tmp_path: Path) -> None:
    """Other runs may be writing there."""
    young, old = ".0a-abcdefgh.tmp.safetensors", ".0b-abcdefgh.tmp.safetensors"
    kept = sorted([young, "0a.safetensors", ".hidden", ".index-old.json"])
    folders = (tmp_path, tmp_path / "latents" / "0a")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*kept, old):
            (folder / name).touch()
            if name != young:
                os.utime(folder / name, (0, 0))
    remove_abandoned(tmp_path)
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir() if path.is_file()) == kept
    remove_abandoned(tmp_path / "no such folder")
