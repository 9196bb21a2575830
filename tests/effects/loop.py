"""Effects of `LoopOptions`."""

from __future__ import annotations

import torch

from .bench import Built, Effect, Refused

CACHED = "false is not supported in this version: what is cached is always on disk"


def total_steps(built: Built) -> int:
    return built.seen.loop["total_steps"]


def compiled_blocks(built: Built) -> int:
    return sum(block._compiled_call_impl is not None for block in built.model.transformer.transformer_blocks)


EFFECTS = {
    "max_train_steps": Effect(("--max_train_steps", "6"), total_steps, 1600, 6, without=("max_train_steps",)),
    "max_train_epochs": Effect(
        ("--max_train_epochs", "1"),
        lambda built: (total_steps(built), any("the shorter counts" in text for text in built.seen.warnings)),
        (8, False),
        (4, True),
        ("--max_train_steps", "8"),
    ),
    "train_batch_size": Effect(("--train_batch_size", "2"), lambda built: built.dataset.batch_sizes, {0: 1}, {0: 2}),
    "gradient_accumulation_steps": Effect(
        ("--gradient_accumulation_steps", "2"),
        lambda built: (built.seen.accelerator.gradient_accumulation_steps, total_steps(built)),
        (1, 8),
        (2, 4),
        ("--max_train_epochs", "2"),
        ("max_train_steps",),
    ),
    "gradient_checkpointing": Effect(
        ("--gradient_checkpointing",), lambda built: built.model.transformer.gradient_checkpointing, False, True
    ),
    "mixed_precision": Effect(
        ("--mixed_precision", "bf16"),
        lambda built: (built.model.transformer.dtype, built.seen.precision),
        (torch.float32, "no"),
        (torch.bfloat16, "bf16"),
    ),
    "seed": Effect(("--seed", "7"), lambda built: torch.stack([sample["noise"].mean() for sample in built.samples()])),
    "max_grad_norm": Effect(("--max_grad_norm", "0.5"), lambda built: built.seen.loop["max_grad_norm"], 1.0, 0.5),
    "skip_nonfinite_steps": Effect(
        ("--skip_nonfinite_steps", "3"), lambda built: built.seen.loop["health"].skip_limit, 0, 3
    ),
    "torch_compile": Effect(("--torch_compile",), compiled_blocks, 0, 2),
    "dynamo_backend": Effect(
        ("--dynamo_backend", "eager"), lambda built: built.seen.compiler, "inductor", "eager", ("--torch_compile",)
    ),
    "max_data_loader_n_workers": Effect(
        ("--max_data_loader_n_workers", "1"), lambda built: built.seen.parts.loader.num_workers, 0, 1
    ),
    "persistent_data_loader_workers": Effect(
        ("--persistent_data_loader_workers",),
        lambda built: built.seen.parts.loader.persistent_workers,
        False,
        True,
        ("--max_data_loader_n_workers", "1"),
    ),
    "vae_batch_size": Effect(("--vae_batch_size", "2"), lambda built: built.seen.latents["batch_size"], 1, 2),
    "cache_latents": Effect(("--no-cache_latents",), lambda built: "pixels" in built.samples()[0], False, True),
    "cache_text_encoder_outputs": Effect(
        ("--no-cache_text_encoder_outputs",), lambda built: "caption" in built.samples()[0], False, True
    ),
    "cache_latents_to_disk": Refused(("--no-cache_latents_to_disk",), CACHED),
    "cache_text_encoder_outputs_to_disk": Refused(("--no-cache_text_encoder_outputs_to_disk",), CACHED),
    "cache_dir": Effect(
        ("--cache_dir", "{folder}/cache"),
        lambda built: (built.result.steps, (built.folder.parent / "cache").is_dir()),
        (4, False),
        (4, True),
    ),
}
