"""How many bad inputs stand in the tables of this room."""

from __future__ import annotations

from . import test_adapters, test_caches, test_captions, test_commands, test_configs, test_models, test_pictures

TABLES = {
    "pictures": (test_pictures.PICTURES, test_pictures.ON_POSIX, test_pictures.MASKS),
    "captions": (test_captions.CAPTIONS, test_captions.ON_POSIX, test_captions.METADATA),
    "caches": (test_caches.ENTRIES, test_caches.FORGED, test_caches.INDEXES),
    "models": (test_models.CHECKPOINTS, test_models.LAYERS, test_models.CASES, test_models.TOKENIZERS),
    "adapters": (test_adapters.ADAPTERS,),
    "configurations": (
        test_configs.TOMLS,
        test_configs.FILES,
        test_configs.ON_POSIX,
        test_configs.TRAIN_ARGS,
        test_configs.DATASETS,
        test_configs.PROMPTS,
    ),
    "states": (test_commands.PROGRESS,),
}


def test_there_are_cases_enough() -> None:
    counts = {room: sum(len(table) for table in tables) for room, tables in TABLES.items()}
    assert sum(counts.values()) >= 250, counts
    assert min(counts.values()) >= 8, counts
