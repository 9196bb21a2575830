"""How a run begins: anew, or where a state stands, perhaps with another number of processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.dataset import BucketBatchSampler, SampleTable
from ..data.pictures import Picture
from ..files import require_writable
from .outputs import Outputs, require_free
from .processes import Processes
from .requests import Requests
from .run_lock import is_running
from .settings import other_settings, state_settings
from .state import (
    BATCH_SIZES,
    Progress,
    latest_state,
    read_progress,
    require_same_settings,
    settle,
    warn_of_changes,
)

if TYPE_CHECKING:
    from ..config import TrainOptions

logger = logging.getLogger(__name__)


def begin(
    options: TrainOptions, outputs: Outputs, log_root: Path, requests: Requests, processes: Processes
) -> tuple[Path | None, Progress, bool]:
    """The state that the run goes on from, if it does, where it stands, and whether the state is of this very run.

    Called with the lock of these outputs.

    Raises:
        InputError: there is no such state, or it cannot be read; the run's files cannot be written, or are there.
    """
    with processes.together():
        found = _resume_from(options.save.resume, outputs) if processes.is_main else None
    resume = processes.from_main(found)
    with processes.together():
        progress = read_progress(resume) if resume else Progress()
        continued = resume is not None and _is_of(resume.resolve(), outputs)
        if not continued:  # what another run has saved is not this one's to drop
            progress.saved_steps, progress.saved_epochs = [], []
        progress.started = progress.started or datetime.now(UTC).isoformat()
        if processes.is_main:
            require_free(outputs, overwrite=options.save.overwrite, resume=continued)
            requests.forget_earlier()
            if options.log.log_with != "none":
                require_writable("logging_dir", log_root)
    return resume, progress, continued


def _is_of(state: Path, outputs: Outputs) -> bool:
    """Whether a run of this name in this folder has written a state."""
    return state.parent == outputs.folder.resolve() and outputs.owns(state.name)


def _resume_from(given: str | None, outputs: Outputs) -> Path | None:
    """The state folder that `resume` names; what a crash has left of the run, and of that one, is put right before."""
    settle(outputs)
    if given == "latest":
        return latest_state(outputs)
    if given is None:
        return None
    other = Outputs.of_state(Path(given))
    if not is_running(other):  # neither this run, whose outputs are settled, nor one that is writing there
        settle(other)
    return Path(given)


def take_up(
    progress: Progress,
    resume: Path | None,
    options: TrainOptions,
    pictures: Sequence[Picture],
    table: SampleTable,
    processes: Processes,
) -> None:
    """Compare what the state was made with to what is asked for now, and note the latter in `progress`.

    Args:
        progress: changed in place.
        resume: the state's folder; None for a run that begins.
        options: of the run.
        pictures: all that were found, those that are held out among them.
        table: of the samples that are trained on.
        processes: that train now.

    Raises:
        InputError: settings differ that a state cannot be continued without.
    """
    settings, noted = state_settings(options, pictures), other_settings(options)
    if resume is not None:
        require_same_settings(progress, settings, resume, processes=processes.count)
        warn_of_changes(progress, noted, resume)
    change_processes(
        progress,
        table,
        seed=options.loop.seed,
        processes=processes.count,
        batches_per_step=options.loop.gradient_accumulation_steps,
    )
    progress.settings, progress.noted = settings, noted


def change_processes(
    progress: Progress, table: SampleTable, *, seed: int, processes: int, batches_per_step: int
) -> None:
    """Bring a state's place to what an epoch is with so many processes.

    Where batches have another size now, the epoch goes on after about as many samples; a warning says so.

    Args:
        progress: changed in place. It still has the state's settings, which `require_same_settings` has looked at.
        table: of the run's samples.
        processes: that train now.
        batches_per_step: gradient accumulation.
    """
    before, progress.processes = progress.processes, processes
    sizes = sorted(set(table.batch_sizes.values()))
    if not progress.settings or [size * processes for size in sizes] == [
        size * before for size in progress.settings[BATCH_SIZES]
    ]:
        return
    old, new = (
        BucketBatchSampler(table.groups, table.batch_sizes, seed=seed, processes=count) for count in (before, processes)
    )
    done = sum(map(len, old.batches(progress.epoch)[: progress.batch]))
    whole = sum(samples <= done for samples in accumulate(map(len, new.batches(progress.epoch))))
    progress.batch = whole if whole == len(new) else whole - whole % batches_per_step
    logger.warning(
        "The state was made with %d process(es), and there are %d now: batches are of another size, and an epoch has "
        "%d of them instead of %d. The epoch goes on after %d; some of its pictures may come twice in it, others not "
        "at all. Schedules go on at step %d. With the same batch_size x processes, all of this would stay as it was.",
        before,
        processes,
        len(new),
        len(old),
        progress.batch,
        progress.step,
    )
