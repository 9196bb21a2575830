"""When the run writes its adapter, and which earlier files go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from ..files import write_atomically
from ..transformer import AnimaTransformerModel
from .averages import AdapterAverage
from .device import DTYPES
from .metadata import MetadataWriter
from .outputs import Outputs, files_to_drop, remove, remove_state, state_folder
from .processes import Processes
from .state import ADAPTER_NAME, Progress, save_state

if TYPE_CHECKING:
    from ..config import SaveOptions


class Saver:
    """Writes adapters and states as the options ask for; only the main process writes.

    Args:
        model: the bare model.
        outputs: names in the run's folder.
        progress: where the run stands; remembers what was saved.
        average: what the adapter's files hold; states hold what steps are taken at.
        metadata: text of each file.
        resolved: the configuration, written beside the first file.
        options: when, in which form, and how much of it is kept.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        processes: Processes,
        model: AnimaTransformerModel,
        outputs: Outputs,
        progress: Progress,
        average: AdapterAverage,
        metadata: MetadataWriter,
        resolved: str,
        options: SaveOptions,
    ):
        self._accelerator, self._processes, self._model = accelerator, processes, model
        self._outputs, self._progress = outputs, progress
        self._average, self._metadata, self._options = average, metadata, options
        self._resolved: str | None = resolved
        self._written: tuple[Path, bool] | None = None
        self._keep = {"steps": options.save_last_n_steps, "epochs": options.save_last_n_epochs}
        self._keep_states = {"steps": options.save_last_n_steps_state, "epochs": options.save_last_n_epochs_state}

    def after_step(self) -> None:
        """Save if `save_every_n_steps` divides the steps done."""
        step, every = self._progress.step, self._options.save_every_n_steps
        if every and step % every == 0:
            self._save(self._outputs.after_step(step), self._progress.saved_steps, step, "steps")

    def after_epoch(self) -> None:
        """Save if `save_every_n_epochs` divides the epochs done."""
        epoch, every = self._progress.epoch, self._options.save_every_n_epochs
        if every and epoch % every == 0:
            self._save(self._outputs.after_epoch(epoch), self._progress.saved_epochs, epoch, "epochs")

    def now(self) -> Path:
        """Save adapter and state of the present step, whatever the options say; returns the state's folder."""
        path = self._outputs.after_step(self._progress.step)
        if self._written != (path, True):
            if path.name not in dict(self._progress.saved_steps).values():
                self._progress.saved_steps.append((self._progress.step, path.name))
            self._write(path, state=True)
        return state_folder(path)

    def at_end(self) -> Path:
        """Save under the run's plain name."""
        self._write(self._outputs.final, state=self._options.save_state or self._options.save_state_on_train_end)
        return self._outputs.final

    def _save(self, path: Path, saved: list[tuple[int, str]], number: int, unit: str) -> None:
        if number not in dict(saved):
            saved.append((number, path.name))
        # The state remembers also what goes next: should the process end in between, `drop_old` finds it.
        self._write(path, state=self._options.save_state)
        self._drop(saved, number, unit)

    def drop_old(self) -> None:
        """Remove what the run would have removed by now, had it not been killed."""
        for saved, unit in ((self._progress.saved_steps, "steps"), (self._progress.saved_epochs, "epochs")):
            if saved:
                self._drop(saved, max(number for number, _ in saved), unit)

    def _drop(self, saved: list[tuple[int, str]], number: int, unit: str) -> None:
        dropped = files_to_drop(saved, number, self._keep[unit])
        saved[:] = [entry for entry in saved if entry not in dropped]
        with self._processes.together():
            if self._processes.is_main:
                for _, name in dropped:
                    remove(self._outputs.folder / name)
                for _, name in files_to_drop(saved, number, self._keep_states[unit]):
                    remove_state(self._outputs.folder / name)

    def _write(self, path: Path, *, state: bool) -> None:
        with self._processes.together():
            if self._processes.is_main:
                self._write_config()
                with self._average.in_place():
                    self._model.save_lora_adapter(
                        path,
                        ADAPTER_NAME,
                        self._options.save_format,  # type: ignore[arg-type]  # one of its choices
                        metadata=self._metadata(self._progress),
                        dtype=DTYPES[self._options.save_precision],
                    )
        if state:
            save_state(self._accelerator, self._processes, state_folder(path))
        self._written = (path, state)

    def _write_config(self) -> None:
        """Once, and not before there is an adapter: a run that fails in its first steps leaves nothing to overwrite."""
        if self._resolved is not None:
            text = self._resolved
            write_atomically(self._outputs.config, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
            self._resolved = None
