"""Runs that are killed at random moments, in saving, caching and logging too, and gone on with."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anima_peft.cli import FAULTY_INPUT
from anima_peft.data.cache import remove_abandoned
from anima_peft.files import unfinished_name
from anima_peft.miniature import MiniatureFiles

from .conftest import DATASET
from .outcomes import events_of, same_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="killed runs are forked")

ROOT = Path(__file__).parents[2]
# Four steps in two epochs; adapter and state after each of them, the earlier ones dropped; dropout and an average.
FLAGS = (
    "--max_train_epochs 2 --gradient_accumulation_steps 2 --save_every_n_steps 1 --save_every_n_epochs 1 --save_state"
)
FLAGS += " --save_last_n_steps 1 --save_last_n_steps_state 1 --use_ema --network_args rank_dropout=0.3"
FLAGS += " --log_with tensorboard --network_dim 4 --network_module networks.lora_anima --mixed_precision no"
FLAGS += " --learning_rate 5e-3 --output_name test"
MOMENTS = ("before", "half", "after")
DAYS = 2 * 24 * 60 * 60


class Forks:
    """Runs in forks of one process that has imported everything."""

    def __init__(self, folder: Path, miniature: MiniatureFiles):
        self._folder, self._miniature, self._runs = folder, miniature, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forks"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )

    def run(self, folder: Path, *flags: str, kill: dict[str, Any] | None = None) -> tuple[int, dict[str, Any], str]:
        """Train on `folder`/set into `folder`/output; exit code, what was passed, and what was printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._runs += 1
        dataset = folder / "dataset.toml"
        dataset.write_text(DATASET.format(image_dir=folder / "set"), encoding="utf-8")
        model = self._miniature
        words = ["--dataset_config", dataset, "--anima_transformer", model.transformer, "--vae", model.vae]
        words += ["--qwen", model.text_encoder, "--qwen_tokenizer_dir", model.tokenizer]
        words += ["--t5_tokenizer_dir", model.t5_tokenizer, "--output_dir", folder / "output", *FLAGS.split(), *flags]
        counts, output = (self._folder / f"{self._runs}{suffix}" for suffix in (".json", ".txt"))
        given = {"words": list(map(str, words)), "kill": kill or {}, "counts": str(counts), "output": str(output)}
        print(json.dumps(given), file=self._process.stdin, flush=True)
        code = json.loads(self._process.stdout.readline())
        passed = json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else {}
        return code, passed, output.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        if self._process.stdout is not None:
            self._process.stdout.close()


class Killing:
    """The undisturbed run, and others that are killed and compared with it."""

    def __init__(self, forks: Forks, folder: Path, pictures: Path):
        self._forks, self._folder, self._pictures = forks, folder, pictures
        self._through = self._new("through")
        code, facts, text = forks.run(self._through)
        assert code == 0, text
        self.passed: dict[str, int] = facts["passed"]
        self.seconds: float = facts["seconds"]
        assert self.passed["writing a cache entry"] > 10
        self._losses = self._logged(self._through)
        assert sorted(self._losses) == [1, 2, 3, 4]

    def draw(self, seed: int) -> dict[str, Any]:
        """When and how to kill a run: by the clock, or at a call of one of the functions that write."""
        chance = random.Random(seed)
        kill: dict[str, Any] = {"signal": chance.choice(["SIGKILL", "SIGKILL", "SIGTERM"])}
        if chance.random() < 0.2:
            return kill | {"after": chance.uniform(0, self.seconds)}
        point = chance.choice(sorted(self.passed))
        return kill | {
            "point": point,
            "count": chance.randint(1, self.passed[point]),
            "moment": chance.choice(MOMENTS),
        }

    def check(self, name: str, kill: dict[str, Any]) -> None:
        """Kill a run, go on with it, compare."""
        folder = self._new(name)
        code, _, text = self._forks.run(folder, kill=kill)
        print(f"{name}: {kill} -> {code}")
        assert code in (-9, -15, 143, 0), text  # 0: the clock was too slow
        output = folder / "output"
        states = [*output.glob("*-state/progress.json"), *output.glob(".*-state-old/progress.json")]
        resumed, _, text = self._forks.run(folder, *(["--resume", "latest"] if states else ["--overwrite"]))
        done = (output / "test-state").exists() and "raise max_train_steps" in text
        assert resumed == (FAULTY_INPUT if resumed and done else 0), text

        expected = self._through / "output"
        assert self._names(output) == self._names(expected)
        for path in expected.rglob("*.safetensors"):
            assert same_tensors(path, output / path.relative_to(expected)), path.name
        losses = self._logged(folder)
        assert {step: set(values) for step, values in losses.items()} == {
            step: set(values) for step, values in self._losses.items()
        }
        self._check_cache(folder / "set" / ".anima_cache")
        shutil.rmtree(folder)

    def _check_cache(self, cache: Path) -> None:
        """What a kill has left there goes when it is old, as others may be writing there; there is nothing else."""
        leftovers = list(cache.rglob(".*"))
        assert all(unfinished_name(path) for path in leftovers)
        for path in leftovers:
            old = path.stat().st_mtime - DAYS
            os.utime(path, (old, old))
        remove_abandoned(cache)
        assert not list(cache.rglob(".*"))
        through = self._through / "set" / ".anima_cache"
        assert self._names(cache) == self._names(through)

    def _new(self, name: str) -> Path:
        folder = self._folder / name
        shutil.copytree(self._pictures, folder / "set")
        return folder

    @staticmethod
    def _names(folder: Path) -> list[str]:
        return sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if "logs" not in path.relative_to(folder).parts and not path.name.endswith("-report.html")
        )

    @staticmethod
    def _logged(folder: Path) -> dict[int, list[float]]:
        values: dict[int, list[float]] = {}
        for log in (folder / "output" / "logs").iterdir():
            events = events_of(log)
            for event in events.Scalars("loss") if "loss" in events.Tags()["scalars"] else []:
                values.setdefault(event.step, []).append(event.value)
        return values


@pytest.fixture(scope="module")
def killing(miniature: MiniatureFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killing]:
    folder = tmp_path_factory.mktemp("killed")
    forks = Forks(folder, miniature)
    try:
        yield Killing(forks, folder, miniature.pictures)
    finally:
        forks.close()


@pytest.mark.parametrize(
    "kill",
    [
        {"point": "writing with torch", "count": 5, "moment": "half", "signal": "SIGKILL"},
        {"point": "writing a cache entry", "count": 9, "moment": "after", "signal": "SIGTERM"},
    ],
    ids=["in a state", "in the cache"],
)
def test_a_killed_run_goes_on_exactly(killing: Killing, kill: dict[str, Any]) -> None:
    killing.check(kill["point"], kill)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_at_every_point(killing: Killing) -> None:
    for point in killing.passed:
        for moment in MOMENTS[:: 1 if "writing" in point else 2]:
            kill = {"point": point, "count": max(1, killing.passed[point] * 2 // 3), "moment": moment}
            killing.check(f"{point} {moment}", kill | {"signal": "SIGKILL"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [int(seed) for seed in os.environ.get("KILL_SEEDS", "1 2 3 4 5").split()])
def test_kill_at_random(killing: Killing, seed: int) -> None:
    """`KILL_SEEDS="6 7" pytest -m slow -k kill_at_random -s` tries others."""
    for number in range(12):
        each = 1000 * seed + number
        killing.check(f"seed {each}", killing.draw(each))
