"""The trained miniature that comes with the package; data/card.md says how it was made and what it scores."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..files import write_atomically
from .layout import MiniatureFiles, miniature_files, require_free

DATA = Path(__file__).parent / "data"
"""The files as `miniature_files` names them, and the card."""


def write_miniature(folder: str | Path, *, overwrite: bool = False) -> MiniatureFiles:
    """Copy the trained model, its tokenizers, and the two small sets of pictures with captions.

    Args:
        folder: made if missing.
        overwrite: whether files of an earlier miniature may be replaced.

    Raises:
        InputError: a file is there already and `overwrite` is false.
    """
    files = miniature_files(folder)
    require_free(files, overwrite=overwrite)
    for path in sorted(DATA.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            write_atomically(Path(folder) / path.relative_to(DATA), partial(Path.write_bytes, data=content))
    return files
