"""Effects of `NetworkOptions`."""

from __future__ import annotations

import torch

from .bench import Built, Effect

LOKR = ("--network_module", "networks.lokr_anima")
SMALL_LOKR = (*LOKR, "--network_dim", "2")  # small enough for low-rank factors


def first(built: Built, end: str) -> torch.Tensor:
    return next(tensor for key, tensor in built.tensors.items() if key.endswith(end))


def targets(built: Built) -> int:
    return sum(key.endswith(".alpha") for key in built.tensors)


EFFECTS = {
    "network_module": Effect(
        LOKR,
        lambda built: (built.parts_of_layers, built.metadata["ss_network_module"]),
        ({"alpha", "lora_down.weight", "lora_up.weight", "w_norm"}, "networks.lora_anima"),
        ({"alpha", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "w_norm"}, "networks.lokr_anima"),
    ),
    "network_dim": Effect(("--network_dim", "8"), lambda built: len(first(built, "lora_down.weight")), 4, 8),
    "network_alpha": Effect(
        ("--network_alpha", "2"),
        lambda built: (first(built, ".alpha").item(), built.layers[0].scaling["default"]),
        (1.0, 0.25),
        (2.0, 0.5),
    ),
    "network_dropout": Effect(
        ("--network_dropout", "0.5"),
        lambda built: getattr(built.layers[0].lora_dropout["default"], "p", 0.0),
        0.0,
        0.5,
    ),
    "network_weights": Effect(
        ("--network_weights", "{adapter}"),
        lambda built: any("starts from" in text or "test.safetensors" in text for text in built.seen.warnings),
        False,
        True,
    ),
    "train_norm": Effect(("--no-train_norm",), lambda built: "w_norm" in built.parts_of_layers, True, False),
    "target_modules": Effect(("--network_args", "target_modules=attn-mlp-adaln"), targets, 20, 32),
    "train_llm_adapter": Effect(
        ("--network_args", "train_llm_adapter=true"),
        lambda built: any("llm_adapter" in key for key in built.tensors),
        False,
        True,
    ),
    "use_dora": Effect(
        ("--network_args", "use_dora=true"), lambda built: "dora_scale" in built.parts_of_layers, False, True
    ),
    "lokr_factor": Effect(
        ("--network_args", "lokr_factor=4"), lambda built: tuple(first(built, "lokr_w1").shape), (8, 8), (4, 4), LOKR
    ),
    "lokr_full_matrix": Effect(
        ("--network_args", "lokr_full_matrix=true"),
        lambda built: {"lokr_w2", "lokr_w2_a"} & built.parts_of_layers,
        {"lokr_w2_a"},
        {"lokr_w2"},
        SMALL_LOKR,
    ),
    "lokr_decompose_both": Effect(
        ("--network_args", "lokr_decompose_both=true"),
        lambda built: "lokr_w1_a" in built.parts_of_layers,
        False,
        True,
        SMALL_LOKR,
    ),
    "lokr_rank_dropout": Effect(
        ("--network_args", "lokr_rank_dropout=0.5"),
        lambda built: built.layers[0].rank_dropout["default"],
        0.0,
        0.5,
        LOKR,
    ),
    "lokr_module_dropout": Effect(
        ("--network_args", "lokr_module_dropout=0.5"),
        lambda built: built.layers[0].module_dropout["default"],
        0.0,
        0.5,
        LOKR,
    ),
}
