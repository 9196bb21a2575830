"""The files a run writes: their names, as sd-scripts names them, which may exist already, which go again."""

from __future__ import annotations

import glob
import os
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ..data.summary import size_text
from ..errors import InputError

SUFFIX = ".safetensors"
STATE_SUFFIX = "-state"
RECORD_SUFFIX = "-log.jsonl"
_NUMBER = r"(-[0-9]{6}|-step[0-9]{8})"
# What follows the run's name in the names of its files.
_ENDINGS = (
    rf"{_NUMBER}?(\.safetensors|-state)|-config\.toml|-(comparison|previews)\.png|-[0-9]+-with(out)?\.png"
    r"|-log\.jsonl|-report\.html"
)


@dataclass(frozen=True)
class Outputs:
    """Names in the run's folder.

    Attributes:
        folder: `output_dir`.
        name: `output_name`.
    """

    folder: Path
    name: str

    @property
    def final(self) -> Path:
        """The adapter's file at the run's end."""
        return self.folder / f"{self.name}{SUFFIX}"

    @property
    def config(self) -> Path:
        """The configuration of the run, every option with its value and origin."""
        return self.folder / f"{self.name}-config.toml"

    @property
    def record(self) -> Path:
        """What was logged, for the report."""
        return self.folder / f"{self.name}{RECORD_SUFFIX}"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.folder / f"{self.name}-report.html"

    @property
    def comparison(self) -> Path:
        """The grid of pictures without and with the adapter."""
        return self.folder / f"{self.name}-comparison.png"

    @property
    def strip(self) -> Path:
        """The previews over time in one picture."""
        return self.folder / f"{self.name}-previews.png"

    @property
    def lock(self) -> Path:
        """What a run at work holds; see `run_lock`."""
        return self.folder / f".{self.name}.lock"

    def compared(self, number: int, label: str) -> Path:
        """Picture of the comparison's prompt with this number, from 1, "without" or "with" the adapter."""
        return self.folder / f"{self.name}-{number:02d}-{label}.png"

    def preview(self, step: int, number: int) -> Path:
        """Picture of the prompt with this number, from 1, after `step` steps."""
        return self.folder / "sample" / f"{self.name}-step{step:08d}-{number:02d}.png"

    def previews(self) -> list[Path]:
        """All of them that are there."""
        pattern = f"{glob.escape(self.name)}-step{'[0-9]' * 8}-[0-9]*.png"
        return sorted((self.folder / "sample").glob(pattern))

    def after_epoch(self, epoch: int) -> Path:
        """File saved after `epoch` epochs, counted from 1."""
        return self.folder / f"{self.name}-{epoch:06d}{SUFFIX}"

    def after_step(self, step: int) -> Path:
        """File saved after `step` optimizer steps."""
        return self.folder / f"{self.name}-step{step:08d}{SUFFIX}"

    @classmethod
    def of_state(cls, state: Path) -> Outputs:
        """Those of the run that wrote a state."""
        return cls(state.parent, re.sub(rf"{_NUMBER}?{STATE_SUFFIX}$", "", state.name))

    def owns(self, name: str) -> bool:
        """Whether a run of this name writes a file or folder called `name`."""
        pattern = re.escape(os.path.normcase(self.name)) + f"({_ENDINGS})"
        return re.fullmatch(pattern, os.path.normcase(name)) is not None

    def existing(self) -> list[Path]:
        """What an earlier run of this name left in the folder."""
        if not self.folder.is_dir():
            return []
        return [*(path for path in sorted(self.folder.iterdir()) if self.owns(path.name)), *self.previews()]


def written_text(adapter: Path, log_folder: Path | None) -> str:
    """What a finished run has written, a line each, with sizes; what there are many of together.

    Args:
        adapter: the final file.
        log_folder: TensorBoard's, if there is one.
    """
    outputs = Outputs(adapter.parent, adapter.name.removesuffix(SUFFIX))
    named = {
        "adapter": outputs.final,
        "report": outputs.report,
        "without and with it": outputs.comparison,
        "previews over time": outputs.strip,
        "configuration": outputs.config,
        "record": outputs.record,
        "TensorBoard's log": log_folder,
    }
    lines = [
        (what, f"{path} ({size_text(_size(path))})")
        for what, path in named.items()
        if path is not None and path.exists()
    ]
    others = [path for path in outputs.existing() if path not in named.values()]
    groups = {
        "earlier adapters": [path for path in others if path.suffix == SUFFIX],
        "states": [path for path in others if path.name.endswith(STATE_SUFFIX)],
        "pictures": [path for path in others if path.suffix == ".png"],
    }
    lines += [(what, f"{len(paths)} ({size_text(sum(map(_size, paths)))})") for what, paths in groups.items() if paths]
    width = max(len(what) for what, _ in lines)
    return "\n".join(f"  {what:<{width}}  {text}" for what, text in lines)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def state_folder(adapter_file: Path) -> Path:
    """Where the state that belongs to a saved adapter goes."""
    return adapter_file.with_name(adapter_file.name.removesuffix(SUFFIX) + STATE_SUFFIX)


def is_final_state(state: Path) -> bool:
    """Whether a state was saved at a run's end, beside its last adapter."""
    return state == state_folder(Outputs.of_state(state).final)


def resolve_folder(output_dir: str, now: datetime) -> Path:
    """`output_dir` with `{time}` replaced by YYYYMMDD_HHMMSS."""
    return Path(output_dir.replace("{time}", f"{now:%Y%m%d_%H%M%S}"))


def require_free(outputs: Outputs, *, overwrite: bool, resume: bool) -> None:
    """Refuse to start over an earlier run's files. A record alone is none: that run has saved nothing.

    Args:
        resume: whether the run goes on that these files are of.

    Raises:
        InputError: such files exist, and neither `--overwrite` nor `--resume` was given.
    """
    existing = [path for path in outputs.existing() if path not in (outputs.record, outputs.report)]
    if existing and not (overwrite or resume):
        names = ", ".join(path.name for path in existing[:5]) + (" …" if len(existing) > 5 else "")
        raise InputError(
            f"output_dir: {outputs.folder} already holds {names}. Choose another output_dir or output_name, go on with "
            "`--resume <state folder>`, or add `--overwrite` to replace these files."
        )


def files_to_drop(saved: list[tuple[int, str]], now: int, keep_last: int | None) -> list[tuple[int, str]]:
    """Which files saved at earlier steps or epochs are not among the last `keep_last` any more.

    A file goes once it is more than `keep_last` steps (or epochs) old, as sd-scripts' `save_last_n_steps` has it.

    Args:
        saved: (step or epoch, file name) of this run's files of one kind.
        now: the present step or epoch.
        keep_last: `save_last_n_steps` or `save_last_n_epochs`; None keeps all.
    """
    return [] if keep_last is None else [entry for entry in saved if entry[0] < now - keep_last]


def remove(path: Path) -> None:
    """Delete a saved adapter and the state beside it, if they are still there."""
    path.unlink(missing_ok=True)
    remove_state(path)


def remove_state(path: Path) -> None:
    """Delete the state beside a saved adapter, if it is still there."""
    shutil.rmtree(state_folder(path), ignore_errors=True)
