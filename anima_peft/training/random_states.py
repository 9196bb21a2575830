"""The random generators that dropout draws from: each of several processes has its own, and a state holds all."""

from __future__ import annotations

import tempfile
from pathlib import Path

from accelerate import Accelerator
from accelerate.checkpointing import save_accelerator_state
from accelerate.utils import RNG_STATE_NAME, set_seed

from ..data.randomness import mix


def start_random_states(seed: int, step: int, process: int) -> None:
    """Give a process other than the first generators of its own: its dropout must not be the first one's."""
    if process:
        set_seed(mix(seed, step, process, "process") % 2**32)  # NumPy takes no more


def random_states_file(folder: Path, process: int) -> Path:
    """Where accelerate keeps a process's generators in a state."""
    return folder / f"{RNG_STATE_NAME}_{process}.pkl"


def own_random_states(accelerator: Accelerator) -> bytes:
    """What accelerate would write of this process's generators."""
    with tempfile.TemporaryDirectory() as folder:
        save_accelerator_state(folder, [], [], [], [], accelerator.process_index, accelerator.step)
        return random_states_file(Path(folder), accelerator.process_index).read_bytes()
