"""Effects of `LogOptions`."""

from __future__ import annotations

from .bench import Effect

LOGGED = ("--log_with", "tensorboard")

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
    "compare_prompts": Effect(
        ("--compare_prompts", "a cat --w 64 --s 2", "a dog"),
        lambda built: [(request.prompt, request.width, request.steps, request.seed) for request in built.seen.requests],
        [],
        [("a cat", 64, 2, 42), ("a dog", 512, 30, 42)],
    ),
}
