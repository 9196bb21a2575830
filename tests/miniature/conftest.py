"""The trained miniature, and adapters taught to it as the quickstart does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from anima_peft.config import load
from anima_peft.miniature import MiniatureFiles, Question, Score, draw_exam, score, write_miniature
from anima_peft.miniature.commands import load_pipeline
from anima_peft.pipeline import AnimaPipeline
from anima_peft.training.run import train

CONFIGS = Path(__file__).parents[2] / "configs" / "examples"
# At factor 8, the usual one, a LoKr has 640 numbers for a layer of the miniature, too few for the figure's shape.
_LOKR = {"network_module": "networks.lokr_anima", "network_args": "lokr_factor=2"}
NETWORKS: dict[str, dict[str, str]] = {
    "lora": {},
    "lokr full": {**_LOKR, "network_dim": "100000", "network_alpha": "100000", "learning_rate": "1.5e-3"},
    "lokr low-rank": {**_LOKR, "learning_rate": "3e-3"},
}
STYLE = {"max_train_steps": "500"}
"""What the style takes instead: more steps teach it a little better, and leave less room for a figure beside it."""
Teach = Callable[..., Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> MiniatureFiles:
    """The miniature of the package. Read-only."""
    return write_miniature(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def pipe(trained: MiniatureFiles) -> AnimaPipeline:
    return load_pipeline(trained)


@pytest.fixture
def teach(trained: MiniatureFiles, tmp_path: Path) -> Teach:
    """Train by the quickstart's configuration: `teach(folder of pictures, {"network_dim": "4"})` -> adapter file."""

    def run(pictures: Path, options: Mapping[str, str]) -> Path:
        return train(load([*quickstart(trained, pictures, tmp_path), *flags_of(options), "--overwrite"])).adapter

    return run


def flags_of(options: Mapping[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def quickstart(files: MiniatureFiles, pictures: Path, folder: Path) -> list[str]:
    """The quickstart's flags, its pictures and folders replaced."""
    text = (CONFIGS / "anima_miniature_dataset.toml").read_text(encoding="utf-8")
    dataset = folder / "dataset.toml"
    dataset.write_text(text.replace('"miniature/pictures/figure"', f"'{pictures}'"), encoding="utf-8")
    train_args = folder / "train_args.toml"
    text = (CONFIGS / "anima_miniature_train_args.toml").read_text(encoding="utf-8")
    train_args.write_text(text.partition("compare_prompts")[0], encoding="utf-8")  # tests draw what they need
    return [
        *("--config_file", str(train_args), "--dataset_config", str(dataset)),
        *("--anima_transformer", str(files.transformer), "--vae", str(files.vae), "--qwen", str(files.text_encoder)),
        *("--qwen_tokenizer_dir", str(files.tokenizer), "--t5_tokenizer_dir", str(files.t5_tokenizer)),
        *("--output_dir", str(folder / "output"), "--log_with", "none"),
    ]


def ask(pipe: AnimaPipeline, exam: list[Question]) -> Score:
    return score(draw_exam(pipe, exam), [question.scene for question in exam])
