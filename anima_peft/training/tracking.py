"""Where a run logs to: accelerate's trackers for TensorBoard and Weights & Biases, and the run's own record."""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker, on_main_process
from PIL import Image

from ..errors import InputError
from .record import Record

if TYPE_CHECKING:
    from ..config import RunConfig

TENSORBOARD = ("tensorboard", "all")
WANDB = ("wandb", "all")


@dataclass(frozen=True)
class LogPlace:
    """Where the logs of a run go.

    Attributes:
        root: `logging_dir`.
        run: `<log_prefix><output_name>_YYYYMMDD_HHMMSS_ffffff`, TensorBoard's folder in `root`.
        key: of Weights & Biases; kept out of everything that is shown or written.
    """

    root: Path
    run: str
    key: str | None = field(default=None, repr=False)


class _Wandb(WandBTracker):
    """accelerate's, with its faults told in one sentence."""

    @on_main_process
    def start(self) -> None:
        """Open the run.

        Raises:
            InputError: Weights & Biases refuses, cannot be reached, or does not know who this is.
        """
        import wandb

        try:
            super().start()
        except (wandb.errors.Error, TypeError, ValueError) as error:  # the last two: values of log_tracker_config
            raise InputError(
                f"log_with: Weights & Biases cannot be started ({error}). Log in by `wandb login` or WANDB_API_KEY, "
                'set WANDB_MODE=offline to upload later, or use log_with = "tensorboard".'
            ) from error

    @on_main_process
    def finish(self) -> None:
        """Close the run, if it was opened."""
        if hasattr(self, "run"):
            super().finish()


def place_of_logs(config: RunConfig, folder: Path, now: datetime) -> LogPlace:
    """Where this run logs to, if it logs.

    Args:
        folder: the run's.
    """
    log = config.train.log
    root = Path(log.logging_dir) if log.logging_dir else folder / "logs"
    return LogPlace(
        root, f"{log.log_prefix or ''}{config.train.save.output_name}_{now:%Y%m%d_%H%M%S_%f}", log.wandb_api_key
    )


def make_trackers(config: RunConfig, place: LogPlace, record: Record) -> list[GeneralTracker]:
    """What the options ask for, and the record. Nothing is opened before accelerate starts them.

    Raises:
        InputError: wandb is not installed, or does not take what `log_tracker_config` gives it.
    """
    log = config.train.log
    trackers: list[GeneralTracker] = [record]
    if log.log_with in TENSORBOARD:
        trackers.append(TensorBoardTracker(place.run, place.root))
    if log.log_with in WANDB:
        if importlib.util.find_spec("wandb") is None:
            raise InputError(
                f'log_with: "{log.log_with}" needs the package wandb (pip install wandb); '
                '"tensorboard" works without it.'
            )
        trackers.append(_Wandb(log.log_tracker_name, **_wandb_arguments(config, place)))
    return trackers


def _wandb_arguments(config: RunConfig, place: LogPlace) -> dict[str, Any]:
    """What `wandb.init` is called with; what `log_tracker_config` says of it wins.

    Raises:
        InputError: it names an argument that wandb does not have.
    """
    import wandb

    unknown = config.wandb.keys() - inspect.signature(wandb.init).parameters.keys()
    if unknown:
        raise InputError(f"log_tracker_config: wandb.init takes no {', '.join(sorted(unknown))}")
    return {
        "name": config.train.log.wandb_run_name or place.run,
        "dir": str(place.root),
        "config": json.loads(config.summary),
        # Not through wandb.login, which would write the key into the user's netrc file.
        **({"settings": wandb.Settings(api_key=place.key)} if place.key else {}),
        **config.wandb,
    }


def start_tracking(accelerator: Accelerator, place: LogPlace, log_with: str) -> Path | None:
    """Open the logs; returns TensorBoard's folder.

    Raises:
        InputError: Weights & Biases cannot be started.
    """
    if log_with != "none" and accelerator.is_main_process:
        place.root.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers(place.run)
    return place.root / place.run if log_with in TENSORBOARD else None


def log_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Show a picture under its name in every log that can."""
    pixels = np.asarray(picture)[None]
    for tracker in accelerator.trackers:
        if isinstance(tracker, TensorBoardTracker):
            tracker.log_images({name: pixels}, step=step, dataformats="NHWC")
        elif isinstance(tracker, WandBTracker):
            tracker.log_images({name: pixels}, step=step)


def record_of(accelerator: Accelerator) -> Record:
    """The run's record among the trackers."""
    return next(tracker for tracker in accelerator.trackers if isinstance(tracker, Record))
