"""Draw the two pictures of docs/dataset.md: a contact sheet and a summary, of drawn pictures in many shapes.

python tools/write_dataset_pictures.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from anima_peft.cli import main
from anima_peft.miniature.random_weights import scenes

TARGET = Path(__file__).parents[1] / "docs" / "pictures"
WIDTHS = (1024, 1216, 832, 1500, 1000, 2048, 768, 1920, 900, 1280, 640, 1600)
HEIGHTS = (1024, 832, 1216, 1000, 1500, 1024, 768, 1080, 2100, 960, 480, 700)
DATASET = """
[[datasets]]
resolution = 1024
batch_size = 2
enable_bucket = true
max_bucket_reso = 1536
[[datasets.subsets]]
image_dir = '{folder}'
num_repeats = 3
flip_aug = true
"""


def draw(folder: Path) -> int:
    """Write the pictures and their dataset TOML into an empty folder, and run the command on them."""
    for number, (scene, *size) in enumerate(zip(scenes(), WIDTHS, HEIGHTS, strict=True)):
        scene.paint(*size).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(scene.caption, encoding="utf-8")
    dataset = folder / "dataset.toml"
    dataset.write_text(DATASET.format(folder=folder), encoding="utf-8")
    return main(["check", "--dataset_config", str(dataset), "--save", str(TARGET), "--overwrite"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        sys.exit(draw(Path(name)))
