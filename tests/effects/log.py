"""Effects of `LogOptions`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from .bench import Built, Effect

WANDB = ("--log_with", "wandb")
LOGGED = ("--log_with", "tensorboard")
PROMPTS, TWO, TRACKER = (
    str(Path(__file__).with_name(name)) for name in ("prompts.txt", "two_prompts.txt", "tracker.toml")
)
HELD_OUT = ("--validation_split", "0.5")
AT_FIRST = ("--sample_prompts", PROMPTS, "--sample_at_first")


def previews(built: Built) -> list[str]:
    """Step and number of each."""
    folder = built.result.adapter.parent / "sample"
    return sorted(path.stem.removeprefix("test-step000000") for path in folder.glob("*"))


def _logged(built: Built) -> list[tuple[int, float]]:
    events = EventAccumulator(str(built.result.log_folder)).Reload()
    tag = "validation/loss"
    return [(e.step, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def told(name: str) -> Callable[[Built], object]:
    """What wandb.init was given."""
    return lambda built: built.seen.wandb.arguments[name]


def measured(built: Built) -> list[int]:
    return [step for step, _ in _logged(built)]


def losses(built: Built) -> list[float]:
    return [loss for _, loss in _logged(built)]


EFFECTS = {
    "log_with": Effect(LOGGED, lambda built: built.result.log_folder is not None, False, True),
    "logging_dir": Effect(
        ("--logging_dir", "{folder}/my logs"),
        lambda built: (built.result.log_folder.parent.name, built.result.log_folder.is_dir()),
        ("logs", True),
        ("my logs", True),
        LOGGED,
    ),
    "log_prefix": Effect(
        ("--log_prefix", "mine_"),
        lambda built: built.result.log_folder.name.startswith("mine_test_"),
        False,
        True,
        LOGGED,
    ),
    "log_tracker_name": Effect(("--log_tracker_name", "mine"), told("project"), "anima_peft", "mine", WANDB),
    "wandb_run_name": Effect(
        ("--wandb_run_name", "third try"),
        lambda built: built.seen.wandb.arguments["name"].startswith("test_2"),
        True,
        False,
        WANDB,
    ),
    "wandb_api_key": Effect(("--wandb_api_key", "0" * 40), told("key"), None, "0" * 40, WANDB),
    "log_tracker_config": Effect(("--log_tracker_config", TRACKER), told("tags"), None, ["a tag"], WANDB),
    "sample_prompts": Effect(("--sample_prompts", TWO), previews, ["00-01"], ["00-01", "00-02"], AT_FIRST),
    "sample_every_n_steps": Effect(
        ("--sample_every_n_steps", "2"), previews, ["00-01"], ["00-01", "02-01", "04-01"], AT_FIRST
    ),
    "sample_every_n_epochs": Effect(
        ("--sample_every_n_epochs", "1"), previews, ["00-01"], ["00-01", "04-01"], AT_FIRST
    ),
    "sample_at_first": Effect(
        ("--sample_at_first",),
        previews,
        ["04-01"],
        ["00-01", "04-01"],
        ("--sample_prompts", PROMPTS, "--sample_every_n_steps", "4"),
    ),
    "validate_every_n_steps": Effect(
        ("--validate_every_n_steps", "2"), measured, [], [2, 4], (*LOGGED, *HELD_OUT, "--validate_every_n_epochs", "9")
    ),
    "validate_every_n_epochs": Effect(
        ("--validate_every_n_epochs", "1"),
        measured,
        [3],
        [2, 3, 4],
        (*LOGGED, *HELD_OUT, "--validate_every_n_steps", "3"),
    ),
    "max_validation_steps": Effect(
        ("--max_validation_steps", "1"), losses, beside=(*LOGGED, *HELD_OUT, "--validate_every_n_steps", "4")
    ),
    "compare_prompts": Effect(
        ("--compare_prompts", "a cat --w 64 --s 2", "a dog"),
        lambda built: [(request.prompt, request.width, request.steps, request.seed) for request in built.seen.requests],
        [],
        [("a cat", 64, 2, 42), ("a dog", 512, 30, 42)],
    ),
}
