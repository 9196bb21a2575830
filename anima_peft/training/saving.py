"""When the run writes its adapter, and which earlier files go."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from ..adapters.writing import Format
from ..files import write_atomically
from ..transformer import AnimaTransformerModel
from .averages import AdapterAverage
from .metadata import MetadataWriter
from .outputs import Outputs, files_to_drop, remove, remove_state, state_folder
from .processes import Processes
from .state import ADAPTER_NAME, Progress, save_state


class Saver:
    """Writes adapters and states as the options ask for; only the main process writes.

    Args:
        model: the bare model.
        outputs: names in the run's folder.
        progress: where the run stands; remembers what was saved.
        average: what the adapter's files hold; states hold what steps are taken at.
        metadata: text of each file.
        resolved: the configuration, written beside the first file.
        format, dtype: of the files.
        every_steps, every_epochs: None for never.
        keep_steps, keep_epochs: of the adapters; None for all.
        keep_states_steps, keep_states_epochs: of the states beside them; None for all.
        with_state: save the state beside every adapter; `state_at_end`: beside the last.
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
        *,
        format: Format,
        dtype: torch.dtype,
        every_steps: int | None,
        every_epochs: int | None,
        keep_steps: int | None,
        keep_epochs: int | None,
        keep_states_steps: int | None,
        keep_states_epochs: int | None,
        with_state: bool,
        state_at_end: bool,
    ):
        self._accelerator, self._processes, self._model = accelerator, processes, model
        self._outputs, self._progress = outputs, progress
        self._average, self._metadata, self._format, self._dtype = average, metadata, format, dtype
        self._resolved: str | None = resolved
        self._written: tuple[Path, bool] | None = None
        self._every_steps, self._every_epochs = every_steps, every_epochs
        self._keep_steps, self._keep_epochs = keep_steps, keep_epochs
        self._keep_states = {"steps": keep_states_steps, "epochs": keep_states_epochs}
        self._with_state, self._state_at_end = with_state, with_state or state_at_end

    def after_step(self) -> None:
        """Save if `every_steps` divides the steps done."""
        step = self._progress.step
        if self._every_steps and step % self._every_steps == 0:
            self._save(self._outputs.after_step(step), self._progress.saved_steps, step, self._keep_steps, "steps")

    def after_epoch(self) -> None:
        """Save if `every_epochs` divides the epochs done."""
        epoch = self._progress.epoch
        if self._every_epochs and epoch % self._every_epochs == 0:
            self._save(
                self._outputs.after_epoch(epoch), self._progress.saved_epochs, epoch, self._keep_epochs, "epochs"
            )

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
        self._write(self._outputs.final, state=self._state_at_end)
        return self._outputs.final

    def _save(self, path: Path, saved: list[tuple[int, str]], number: int, keep: int | None, unit: str) -> None:
        if number not in dict(saved):
            saved.append((number, path.name))
        # The state remembers also what goes next: should the process end in between, `drop_old` finds it.
        self._write(path, state=self._with_state)
        self._drop(saved, number, keep, unit)

    def drop_old(self) -> None:
        """Remove what the run would have removed by now, had it not been killed."""
        for saved, keep, unit in (
            (self._progress.saved_steps, self._keep_steps, "steps"),
            (self._progress.saved_epochs, self._keep_epochs, "epochs"),
        ):
            if saved:
                self._drop(saved, max(number for number, _ in saved), keep, unit)

    def _drop(self, saved: list[tuple[int, str]], number: int, keep: int | None, unit: str) -> None:
        dropped = files_to_drop(saved, number, keep)
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
                        path, ADAPTER_NAME, self._format, metadata=self._metadata(self._progress), dtype=self._dtype
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
