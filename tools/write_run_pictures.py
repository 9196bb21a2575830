"""Draw the pictures of docs/report.md: a run on the miniature as a terminal shows it, its previews, its report.

pip install -e ".[browser]"                  # and a Chromium; CHROMIUM names it if it is not on the PATH
python tools/write_run_pictures.py           # minutes; --steps 60 for a look at once

The terminal's text is what the command has written to a terminal of 100 columns (of POSIX systems).
"""

from __future__ import annotations

import argparse
import fcntl
import html
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from anima_peft.miniature.trained import write_miniature

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "pictures"
COLUMNS, ROWS = 100, 40
PROMPTS = """momo, white background --w 64 --h 64 --s 12 --l 3 --d 1
two momo, grey background --w 64 --h 64 --s 12 --l 3 --d 2
"""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "chrome")
TERMINAL = """<!DOCTYPE html><meta charset="utf-8"><style>
body {{ margin: 0; padding: 16px; width: max-content; background: #14181f; color: #dce3ee; }}
pre {{ margin: 0; font: 14px/1.45 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; }}
</style><pre>{text}</pre>"""


def command(steps: int | None) -> list[str]:
    """The quickstart with previews and validation."""
    words = ["anima-peft", "train", "--config_file", "configs/examples/anima_miniature_train_args.toml"]
    words += ["--dataset_config", "configs/examples/anima_miniature_dataset.toml", "--output_dir", "output"]
    every = 100 if steps is None else max(steps // 6, 1)
    words += ["--sample_prompts", "prompts.txt", "--sample_at_first", "--sample_every_n_steps", str(every)]
    words += ["--validation_split", "0.15", "--validate_every_n_steps", str(every)]
    return words if steps is None else [*words, "--max_train_steps", str(steps)]


def run_in_terminal(words: list[str], folder: Path) -> str:
    """What the command has left on a terminal's screen.

    Raises:
        RuntimeError: it has failed.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    started = [sys.executable, "-m", "anima_peft.cli", *words[1:]]
    process = subprocess.Popen(started, cwd=folder, stdin=its, stdout=its, stderr=its, close_fds=True)
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # so Linux tells the end
            break
        if not part:
            break
        written += part
    os.close(ours)
    text = screen(written.decode("utf-8", errors="replace"))
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(words)}:\n{text}")
    return text


def screen(written: str) -> str:
    """The lines that stay when carriage returns have written over others; cursor movements of nested bars go."""
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", written.replace("\r\n", "\n")).split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in lines)


def shown_command(words: list[str]) -> str:
    """The command as one would type it, a pair of words to a line where it is long."""
    text = " ".join(words)
    return "$ " + re.sub(r" (--(?:dataset_config|sample_prompts|validation_split))", r" \\\n    \1", text)


def photograph(browser: Any, page_file: Path, target: Path, **options: Any) -> None:
    """Screenshot of a page; of the report up to the comparison."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.goto(page_file.as_uri())
    body, pairs = page.locator("body").bounding_box(), page.locator(".pairs")
    end = pairs.bounding_box() if pairs.count() else None
    height = end["y"] + end["height"] + 24 if end else body["height"]
    clip = {"x": 0, "y": 0, "width": max(body["width"], options["viewport"]["width"]), "height": height}
    page.screenshot(path=target, full_page=True, clip=clip)
    context.close()
    _shrink(target)


def _shrink(path: Path) -> None:
    """256 colours are enough for pages, and a third of the bytes."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main() -> None:
    """Train in a fresh folder, and write its pictures to docs/pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="a shorter run")
    steps = parser.parse_args().steps
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, INSTALLED)), None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_miniature(folder / "miniature")
        shutil.copytree(ROOT / "configs", folder / "configs")
        (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
        words = command(steps)
        text = f"{shown_command(words)}\n{run_in_terminal(words, folder)}"
        terminal = folder / "terminal.html"
        terminal.write_text(TERMINAL.format(text=html.escape(text)), encoding="utf-8")
        output = folder / "output"
        shutil.copy(output / "miniature_lora-previews.png", TARGET / "run_previews.png")
        _shrink(TARGET / "run_previews.png")
        report = output / "miniature_lora-report.html"
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
            photograph(browser, terminal, TARGET / "run_terminal.png", viewport={"width": 400, "height": 400})
            photograph(browser, report, TARGET / "run_report.png", viewport={"width": 1100, "height": 800})
            dark = {"color_scheme": "dark", "viewport": {"width": 390, "height": 800}}
            photograph(browser, report, TARGET / "run_report_phone.png", **dark)
            browser.close()


if __name__ == "__main__":
    main()
