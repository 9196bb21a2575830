"""The configuration as one TOML text: complete, with origins, and readable again."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from anima_peft.cli import DONE, main
from anima_peft.config import RunConfig, load, parse_prompt_line
from anima_peft.config.loading import OPTIONS
from anima_peft.config.prompts import PromptLine, prompt_text
from anima_peft.config.resolved import argument, toml_value

from .conftest import values_of

PICTURES = """
[general]
num_repeats = 2
[[datasets]]
resolution = [768, 512]
enable_bucket = true
[[datasets.subsets]]
image_dir = 'C:\\图片\\set "1"'
class_tokens = "a cat"
[[datasets.subsets]]
image_dir = "other"
num_repeats = 3
[[datasets]]
batch_size = 3
[[datasets.subsets]]
image_dir = "third"
"""
LORA: dict[str, Any] = {
    "qwen3": "C:\\new\\qwen",
    "network_args": [r"target_modules=['blocks\.\d+\.b{1,2}', to_q]", "train_llm_adapter=true"],
    "optimizer_args": ["betas=0.9,0.99"],
    "lr_scheduler": "cosine_with_restarts",
    "lr_warmup_steps": 0.1,
    "max_train_epochs": 3,
    "compare_prompts": ["a {cat|dog} --n blurry, \x7f --w 64", "--d 0"],
    "training_comment": 'two\nlines "quoted"',
    "cache_dir": "~/cache",
}
LOKR: dict[str, Any] = {
    "network_module": "networks.lokr_anima",
    "network_alpha": 0,
    "network_dim": 8,
    "network_args": ["factor=4", "lokr_rank_dropout=0.1", "train_norm=false"],
    "log_with": "none",
    "no_metadata": True,
}


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("given", [{}, LORA, LOKR], ids=["least", "lora", "lokr"])
def test_reading_it_again_gives_the_same_run(load_with, tmp_path: Path, given: dict[str, Any]) -> None:
    flags = ("--train_batch_size", "4", "--flip_aug")
    run: RunConfig = load_with(given, PICTURES, flags)
    again = load(["--config_file", write(tmp_path / "again.toml", run.resolved)])
    assert (again.train, again.datasets) == (run.train, run.datasets)
    assert (values_of(again), again.summary) == (values_of(run), run.summary)
    assert again.warnings == run.warnings


def test_every_option_is_in_it(load_with) -> None:
    text = load_with(LORA, PICTURES).resolved
    document = tomllib.loads(text)
    listed = [
        text.split("=")[0] for name in ("network_args", "optimizer_args") for text in document["train_args"][name]
    ]
    unset = [line.strip("# ").removesuffix(": not set") for line in text.splitlines() if line.endswith(": not set")]
    assert {*document["train_args"], *listed, *unset} >= OPTIONS.keys()
    assert [len(dataset["subsets"]) for dataset in document["datasets"]] == [2, 1]


@pytest.mark.parametrize(
    "line",
    [
        'qwen = "C:\\\\new\\\\qwen"  # train args: qwen3',
        "learning_rate = 0.5  # command line",
        "seed = 42  # default",
        "discrete_flow_shift = 1.0  # default, without effect in this run",
        "# vae: not set",
        '    "train_llm_adapter=true",  # train args: network_args.train_llm_adapter',
        '    "use_dora=false",  # default',
        "resolution = [768, 512]  # dataset TOML: datasets[0].resolution",
        "batch_size = 2  # command line: --train_batch_size",
        "batch_size = 3  # dataset TOML: datasets[1].batch_size",
        "num_repeats = 2  # dataset TOML: general.num_repeats",
        "num_repeats = 3  # dataset TOML: datasets[0].subsets[1].num_repeats",
        'caption_extension = ".cap"  # train args: caption_extention',
        "max_bucket_reso = 1024  # default",
    ],
)
def test_where_a_value_comes_from(load_with, line: str) -> None:
    given = {**LORA, "caption_extention": "cap"}
    flags = ("--learning_rate", "0.5", "--train_batch_size", "2")
    assert line in load_with(given, PICTURES, flags).resolved.splitlines()


def test_print_config_shows_it_and_touches_nothing(
    load_with, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = load_with({"train_batch_size": 2}, PICTURES)
    before = sorted(tmp_path.rglob("*"))
    words = ["--config_file", "train.toml", "--dataset_config", "dataset.toml", "--print_config", "--seed", "7"]
    assert main(["train", *words]) == DONE
    printed = capsys.readouterr().out
    assert tomllib.loads(printed)["train_args"]["seed"] == 7
    assert "seed = 7  # command line" in printed
    assert not run.print_config
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["train", *words, "--network_dim", "0"]) != DONE
    assert capsys.readouterr().out == ""


def test_pictures_in_the_file_yield_to_another_dataset_config(load_with, tmp_path: Path) -> None:
    single = write(tmp_path / "single.toml", load_with({}, PICTURES).resolved)
    other = write(tmp_path / "other.toml", '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "elsewhere"\n')
    (dataset,) = load(["--config_file", single, "--dataset_config", other]).datasets
    assert dataset.subsets[0].image_dir == Path("elsewhere")


def test_the_summary_holds_what_differs_and_no_folders(load_with) -> None:
    given = {"vae": "/home/me/models/vae.safetensors", "cache_dir": "C:\\me\\cache", "network_dim": 4, "seed": 3}
    summary = json.loads(load_with(given, PICTURES).summary)
    assert summary["vae"] == "vae.safetensors"
    assert summary["cache_dir"] == "cache"
    assert summary["seed"] == 3
    assert "network_dim" not in summary  # its default
    assert summary["datasets"][1] == {"batch_size": 3, "subsets": [{"image_dir": "third", "num_repeats": 2}]}
    text = load_with(given, PICTURES).summary
    assert "home" not in text
    assert "me" not in text.split('"')


@pytest.mark.parametrize(
    "value",
    [
        "a\\x41",
        "C:\\new\\x",
        "\x7f\x01",
        "q\"'x",
        "一只猫 🐈",
        "a\nb",
        1e-8,
        1e20,
        float("inf"),
        3,
        True,
        [0.5, 1],
        ["a"],
        [],
    ],
)
def test_toml_values(value: Any) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


def test_no_toml_for_other_things() -> None:
    with pytest.raises(TypeError):
        toml_value(object())


@pytest.mark.parametrize("targets", [["attn-mlp"], ["a", "b"], [r"x\.\d{1,2}"], ["it's", 'a"b'], ["a b", "[qk]"]])
def test_arguments_are_read_back(load_with, targets: list[str]) -> None:
    text = argument("target_modules", targets)
    assert values_of(load_with({"network_args": [text]}))["target_modules"] == targets


@pytest.mark.parametrize(
    "line",
    [
        PromptLine("a cat, 1girl", "blurry", 768, 1024, 42, 28, 4.5, 1.0),
        PromptLine("", width=64),
        PromptLine("x"),
        PromptLine("well-known", seed=0, guidance_scale=0.0),
    ],
)
def test_prompts_are_read_back(line: PromptLine) -> None:
    assert parse_prompt_line(prompt_text(line)) == line


def test_a_secret_is_written_nowhere(load_with) -> None:
    key = "f00d" * 10
    run = load_with({"log_with": "wandb", "wandb_api_key": key})
    assert run.train.log.wandb_api_key == key
    assert "# wandb_api_key: train args, and not written here" in run.resolved.splitlines()
    assert key not in f"{run.resolved} {run.summary} {values_of(run)} {run!r}"
