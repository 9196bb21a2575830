"""A run's state on the disk: adapter, optimizer, schedule, scaler and random states, and where the run stands."""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import load as load_file_of_accelerate
from safetensors import SafetensorError

from ..adapters import exchange
from ..adapters.factors import Weights, alike, summary
from ..adapters.layers import write_weights
from ..adapters.naming import ModuleTable
from ..adapters.reading import parse
from ..adapters.sources import read_adapter_file
from ..errors import InputError
from ..files import flush_folder, flush_tree, unfinished_name, write_atomically
from ..limited import read_json
from ..transformer import AnimaTransformerModel
from .averages import AdapterAverage
from .outputs import STATE_SUFFIX, Outputs
from .processes import Processes
from .random_states import own_random_states, random_states_file, start_random_states

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.safetensors"
PROGRESS_FILE = "progress.json"
ADAPTER_NAME = "default"
BATCH_SIZES = "batch sizes"
"""The setting that is known by this name."""
_NEW, _OLD = "-new", "-old"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        batch: batches done of the present epoch.
        saved_steps, saved_epochs: (number, file name) of the adapters this run wrote and has not dropped.
        recent_losses: of the last steps, for the mean that is shown.
        settings: what a state cannot be continued without, by name.
        noted: the other options of the run, by name; they may change.
        skipped_steps: those whose numbers were not finite, so that the optimizer left them out.
        started: when the run began, before any resuming, ISO 8601 in UTC.
        processes: how many trained; a batch is that many times `batch_size`.
        whole: whether the weights are those after `step`; not so inside of the next one. Not part of a state.
    """

    whole = True

    step: int = 0
    epoch: int = 0
    batch: int = 0
    saved_steps: list[tuple[int, str]] = field(default_factory=list)
    saved_epochs: list[tuple[int, str]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    noted: dict[str, Any] = field(default_factory=dict)
    skipped_steps: int = 0
    started: str = ""
    processes: int = 1


def register(
    accelerator: Accelerator, model: AnimaTransformerModel, progress: Progress, average: AdapterAverage
) -> None:
    """Make accelerate's `save_state` and `load_state` carry the adapter and the progress instead of the whole model.

    The adapter is the one that steps are taken at; averages over it stand beside it.
    """

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()  # the frozen base is not part of a state
        if accelerator.is_main_process:
            exchange.save_adapter(model.components, Path(folder) / ADAPTER_FILE, ADAPTER_NAME)
            average.save(Path(folder))
            text = json.dumps(asdict(progress), indent=2)
            write_atomically(Path(folder) / PROGRESS_FILE, lambda path: path.write_text(text, encoding="utf-8"))

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        table = ModuleTable(model.components)
        file = Path(folder) / ADAPTER_FILE
        weights = parse(read_adapter_file(file), table)
        _require_same_network(model, weights, file)
        write_weights(model.components, weights, ADAPTER_NAME)
        average.load(Path(folder), progress.step)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _require_same_network(model: AnimaTransformerModel, weights: Weights, file: Path) -> None:
    present = exchange.read_adapter(model.components, ADAPTER_NAME)
    if present.keys() == weights.keys() and all(
        # Files keep alpha in float32.
        alike(present[name], weights[name]) and math.isclose(present[name].scale, weights[name].scale, rel_tol=1e-6)
        for name in present
    ):
        return
    raise InputError(
        f"resume: {file.parent} was made with another network: {summary(weights)}, but this run has "
        f"{summary(present)}. Resume with the network options that the run was started with."
    )


def read_progress(folder: Path) -> Progress:
    """Where the run stood that a state folder belongs to.

    Raises:
        InputError: the folder is missing or is no state folder.
    """
    file = folder / PROGRESS_FILE
    if not file.is_file():
        raise InputError(f"resume: {folder} is not a state folder (no {PROGRESS_FILE}); expected one named …-state.")
    try:
        values = read_json(file)
        for key in ("saved_steps", "saved_epochs"):
            values[key] = [(int(number), str(name)) for number, name in values[key]]
        return Progress(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"resume: {file} cannot be read ({error}); use an earlier state.") from error


def load_state(accelerator: Accelerator, progress: Progress, folder: Path, *, seed: int) -> None:
    """Bring a state back into what `register` and accelerate know of.

    A process that the state knows nothing of gets random generators of its own, from `seed` and the step.

    Raises:
        InputError: a file of the state is missing, damaged, or of another network.
    """
    random_states = random_states_file(folder, accelerator.process_index)
    is_known = random_states.exists() or accelerator.is_main_process
    try:
        if is_known:  # accelerate goes on without a word where it cannot restore these
            load_file_of_accelerate(random_states)
        accelerator.load_state(str(folder))
        if not is_known:
            start_random_states(seed, progress.step, accelerator.process_index)
        accelerator.step = 0  # batches since an optimizer step; those of a step that failed are not in the state
    except InputError:
        raise
    except pickle.UnpicklingError as error:  # whose text advises to read it all the same
        raise InputError(
            f"resume: {folder} holds more than tensors and numbers, which is not read; use an earlier state."
        ) from error
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"resume: {folder} is incomplete or damaged ({error}); use an earlier state.") from error


def warn_of_changes(progress: Progress, noted: Mapping[str, Any], folder: Path) -> None:
    """Say which of the other options differ from those that the state was made with; the new ones count."""
    now = json.loads(json.dumps(noted))
    changes = [f"{k} = {now[k]!r} (was {v!r})" for k, v in progress.noted.items() if k in now and now[k] != v]
    if changes:
        logger.warning("Resumed from %s with other options: %s.", folder, "; ".join(changes))


def require_same_settings(progress: Progress, settings: Mapping[str, Any], folder: Path, *, processes: int = 1) -> None:
    """Refuse to go on with other settings than the state was made with: accelerate restores those of the state.

    With another number of processes, the batch sizes of all of them together may stay instead of those of each.

    Raises:
        InputError: some differ; all are listed.
    """
    now = json.loads(json.dumps(settings))
    faults = [
        f"{name} is {now[name]!r}, and was {value!r}"
        for name, value in progress.settings.items()
        if name in now and now[name] != value
        if name != BATCH_SIZES or [size * processes for size in now[name]] != [n * progress.processes for n in value]
    ]
    if faults:
        raise InputError.from_faults(
            f"resume: {folder} was made with other settings. Give the state's, or start anew with network_weights:",
            faults,
        )


def save_state(accelerator: Accelerator, processes: Processes, folder: Path) -> None:
    """Write the state beside its place, then put it there; an earlier state of that name goes only then.

    Only the main process writes, with the others' random generators.

    Raises:
        OSError: it cannot be written; what was there before is left.
    """
    random_states = processes.gather(b"" if processes.is_main else own_random_states(accelerator))
    with processes.together():
        if processes.is_main:
            _write_state(accelerator, folder, random_states)


def _write_state(accelerator: Accelerator, folder: Path, random_states: list[bytes]) -> None:
    fresh, old = folder.with_name(f".{folder.name}{_NEW}"), folder.with_name(f".{folder.name}{_OLD}")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        accelerator.save_state(str(fresh))
        for process, content in enumerate(random_states[1:], start=1):
            random_states_file(fresh, process).write_bytes(content)
        flush_tree(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        flush_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (RuntimeError, SafetensorError) as error:  # so torch reports a disk that is full
        raise OSError(f"{folder}: the state cannot be written ({error})") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)


def settle(outputs: Outputs) -> None:
    """Put right what a killed run of this name has left: an earlier state comes back, what is half-written goes.

    Files of other runs in the same folder are left alone; they may be at work.
    """
    if not outputs.folder.is_dir():
        return
    for leftover in list(outputs.folder.glob(".*")):
        unfinished = unfinished_name(leftover)
        if unfinished is not None and outputs.owns(unfinished):
            leftover.unlink(missing_ok=True)
        for suffix in (_OLD, _NEW):
            place = leftover.with_name(leftover.name.removeprefix(".").removesuffix(suffix))
            if leftover.name.endswith(STATE_SUFFIX + suffix) and outputs.owns(place.name):
                if suffix == _OLD and not place.exists():
                    leftover.rename(place)
                else:
                    shutil.rmtree(leftover, ignore_errors=True)


def latest_state(outputs: Outputs) -> Path:
    """The state that has got furthest, of the run of this name that was started last.

    Raises:
        InputError: there is none.
    """
    states = [path for path in outputs.existing() if _is_state(path)]
    if not states:
        raise InputError(
            f'resume = "latest": {outputs.folder} holds no state of {outputs.name}; name a state folder, or start '
            "anew without resume. (An output_dir with {time} is another folder each time.)"
        )

    def order(path: Path) -> tuple[str, int, float]:
        progress = read_progress(path)
        # Of several at one step, such as the last epoch's and the run's end, the one that knows most of the files.
        return progress.started, progress.step, path.stat().st_mtime

    return max(states, key=order)


def _is_state(path: Path) -> bool:
    return path.name.endswith(STATE_SUFFIX) and (path / PROGRESS_FILE).is_file()
