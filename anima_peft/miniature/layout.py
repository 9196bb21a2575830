"""Where the parts of a miniature lie, and pictures with their captions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ..errors import InputError
from ..files import write_atomically


@dataclass(frozen=True)
class MiniatureFiles:
    """Where the parts of a written miniature are."""

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    t5_tokenizer: Path
    pictures: Path

    @property
    def figure(self) -> Path:
        """Folder of the figure's pictures, beside a trained miniature."""
        return self.pictures / "figure"

    @property
    def style(self) -> Path:
        """Folder of the style's pictures, beside a trained miniature."""
        return self.pictures / "style"


def miniature_files(folder: str | Path) -> MiniatureFiles:
    """The paths of a miniature in `folder`, whether or not it has been written."""
    folder = Path(folder)
    return MiniatureFiles(
        transformer=folder / "anima_miniature.safetensors",
        vae=folder / "qwen_image_vae_miniature.safetensors",
        text_encoder=folder / "qwen_3_miniature.safetensors",
        tokenizer=folder / "qwen_tokenizer",
        t5_tokenizer=folder / "t5_tokenizer",
        pictures=folder / "pictures",
    )


def require_free(files: MiniatureFiles, *, overwrite: bool) -> None:
    """Refuse to write where something is.

    Raises:
        InputError: a file is there already and `overwrite` is false.
    """
    present = [path for path in vars(files).values() if path.exists()]
    if present and not overwrite:
        raise InputError(f"{present[0]} exists already; choose another folder or add --overwrite.")


def save_captioned(picture: Image.Image, caption: str, folder: Path, number: int) -> None:
    """Write `NN.png` and, beside it, its caption as `NN.txt`."""
    text = (caption + "\n").encode()
    write_atomically(folder / f"{number:02d}.png", picture.save)
    write_atomically(folder / f"{number:02d}.txt", partial(Path.write_bytes, data=text))
