"""Effects of `SaveOptions`."""

from __future__ import annotations

import torch

from .bench import Built, Effect

FINAL = ["test-config.toml", "test.safetensors"]
LONG = ("--max_train_steps", "9", "--train_batch_size", "2")  # three epochs


def files(built: Built) -> list[str]:
    return built.files


def said(key: str, option: str) -> Effect:
    return Effect((f"--{option}", "some text"), lambda built: built.metadata.get(key), None, "some text")


def states(built: Built) -> list[str]:
    return [name for name in built.files if name.endswith("-state")]


EFFECTS = {
    "output_dir": Effect(
        ("--output_dir", "{folder}/elsewhere"), lambda built: built.result.adapter.parent.name, "out", "elsewhere"
    ),
    "output_name": Effect(("--output_name", "图"), files, FINAL, ["图-config.toml", "图.safetensors"]),
    "save_every_n_epochs": Effect(("--save_every_n_epochs", "1"), files, FINAL, ["test-000001.safetensors", *FINAL]),
    "save_every_n_steps": Effect(
        ("--save_every_n_steps", "3"),
        files,
        FINAL,
        ["test-config.toml", "test-step00000003.safetensors", "test.safetensors"],
    ),
    "save_last_n_epochs": Effect(
        ("--save_last_n_epochs", "1"),
        files,
        [*(f"test-00000{n}.safetensors" for n in (1, 2, 3)), *FINAL],
        [*(f"test-00000{n}.safetensors" for n in (2, 3)), *FINAL],
        (*LONG, "--save_every_n_epochs", "1"),
    ),
    "save_last_n_steps": Effect(
        ("--save_last_n_steps", "1"),
        lambda built: [name for name in built.files if "step" in name],
        [f"test-step0000000{n}.safetensors" for n in (1, 2, 3, 4)],
        [f"test-step0000000{n}.safetensors" for n in (3, 4)],
        ("--save_every_n_steps", "1"),
    ),
    "save_last_n_epochs_state": Effect(
        ("--save_last_n_epochs_state", "1"),
        states,
        [*(f"test-00000{n}-state" for n in (1, 2, 3)), "test-state"],
        [*(f"test-00000{n}-state" for n in (2, 3)), "test-state"],
        (*LONG, "--save_every_n_epochs", "1", "--save_state"),
    ),
    "save_last_n_steps_state": Effect(
        ("--save_last_n_steps_state", "1"),
        states,
        ["test-state", *(f"test-step0000000{n}-state" for n in (1, 2, 3, 4))],
        ["test-state", *(f"test-step0000000{n}-state" for n in (3, 4))],
        ("--save_every_n_steps", "1", "--save_state"),
    ),
    "save_precision": Effect(
        ("--save_precision", "bf16"),
        lambda built: {tensor.dtype for key, tensor in built.tensors.items() if key.endswith("weight")},
        {torch.float32},
        {torch.bfloat16},
    ),
    "save_format": Effect(
        ("--save_format", "diffusers"),
        lambda built: {key.split(".")[0] for key in built.tensors if "lora" in key} & {"transformer"},
        set(),
        {"transformer"},
    ),
    "save_state": Effect(
        ("--save_state",),
        states,
        [],
        ["test-000001-state", "test-state"],
        ("--save_every_n_epochs", "1"),
    ),
    "save_state_on_train_end": Effect(
        ("--save_state_on_train_end",),
        states,
        [],
        ["test-state"],
        ("--save_every_n_epochs", "1"),
    ),
    "resume": Effect(("--resume", "{state}"), lambda built: built.seen.started_at, 0, 2),
    "overwrite": Effect(
        ("--overwrite",),
        lambda built: "add `--overwrite`" in built.error,
        True,
        False,
        ("--output_dir", "{occupied}"),
    ),
    "no_metadata": Effect(
        ("--no_metadata",),
        lambda built: {"ss_seed", "anima_peft_config"} & built.metadata.keys(),
        {"ss_seed", "anima_peft_config"},
        set(),
    ),
    "training_comment": said("ss_training_comment", "training_comment"),
    "metadata_title": Effect(
        ("--metadata_title", "some text"), lambda built: built.metadata["modelspec.title"], "test", "some text"
    ),
    "metadata_author": said("modelspec.author", "metadata_author"),
    "metadata_description": said("modelspec.description", "metadata_description"),
    "metadata_license": said("modelspec.license", "metadata_license"),
    "metadata_tags": said("modelspec.tags", "metadata_tags"),
}
