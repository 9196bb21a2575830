"""Lists, arguments, aliases and other trainers' options, in every spelling that is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anima_peft.config import foreign
from anima_peft.config.dataset_options import DatasetKeys, SubsetKeys
from anima_peft.config.loading import GROUPS, OPTIONS
from anima_peft.config.options import options_of
from anima_peft.training import optimizers

from .conftest import values_of


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("attn-mlp,to_q", ["attn-mlp", "to_q"]),
        ('["to_q", "to_k"]', ["to_q", "to_k"]),
        ("('to_q',)", ["to_q"]),
        (r"[qk]_proj", ["[qk]_proj"]),
        (r"(self|cross)_attn\..*", [r"(self|cross)_attn\..*"]),
        ('["x{1,2}"]', ["x{1,2}"]),
        (r"""['blocks\.\d+\.b', "mlp\\.1",]""", [r"blocks\.\d+\.b", r"mlp\.1"]),
        ("[to_q, to_k]", ["to_q", "to_k"]),
    ],
)
def test_lists_inside_arguments(load_with, text: str, kept: list[str]) -> None:
    assert values_of(load_with({"network_args": [f"target_modules={text}"]}))["target_modules"] == kept


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("betas=0.9,0.99", "betas", (0.9, 0.99)),
        ("betas = (0.9, 0.99)", "betas", (0.9, 0.99)),
        ("betas=[0.9, 0.99]", "betas", [0.9, 0.99]),
        ("amsgrad=True", "amsgrad", True),
        ("amsgrad=false", "amsgrad", False),
        ("weight_decay=1e-2", "weight_decay", 0.01),
    ],
)
def test_arguments_as_other_trainers_write_them(load_with, text: str, key: str, value: object) -> None:
    assert load_with({"optimizer_args": [text]}).train.optimizer.arguments == {key: value}


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("", "AdamW"),
        ("adamw8BIT", None),
        ("radam_schedulefree", "RAdamScheduleFree"),
        ("AdamW_ScheduleFree", "AdamWScheduleFree"),
        ("prodigy", "Prodigy"),
        ("torch.optim.NAdam", "torch.optim.NAdam"),
    ],
)
def test_optimizers_by_any_spelling(load_with, monkeypatch: pytest.MonkeyPatch, written: str, kept: str | None) -> None:
    monkeypatch.setattr(optimizers, "load_class", lambda path, extra="": torch.optim.AdamW)
    run = load_with({"optimizer_type": written})
    assert run.train.optimizer.optimizer_type == (kept or "AdamW8bit")


@pytest.mark.parametrize(
    ("alias", "name", "written", "kept"),
    [
        ("pretrained_model_name_or_path", "anima_transformer", "m", "m"),
        ("qwen3", "qwen", "q", "q"),
        ("t5_tokenizer_path", "t5_tokenizer_dir", "t", "t"),
        ("qwen3_max_token_length", "anima_seq_len", 128, 128),
        ("t5_max_token_length", "anima_seq_len", 128, 128),
        ("anima_timestep_sampling", "timestep_sampling", "uniform", "uniform"),
        ("anima_timestep_sampling", "timestep_sampling", "logit_normal", "sigmoid"),
        ("anima_sigmoid_scale", "sigmoid_scale", 2, 2.0),
        ("anima_flow_shift", "discrete_flow_shift", 1, 1.0),
        ("anima_noise_offset", "noise_offset", 0.1, 0.1),
        ("anima_attention_backend", "attn_mode", "torch", "torch"),
        ("transformer_lr", "unet_lr", 1e-5, 1e-5),
        ("compile_backend", "dynamo_backend", "inductor", "inductor"),
    ],
)
def test_aliases(load_with, alias: str, name: str, written: Any, kept: Any) -> None:
    assert values_of(load_with({name: None, alias: written}))[name] == kept
    assert values_of(load_with({name: None}, argv=(f"--{alias}", str(written))))[name] == kept
    assert values_of(load_with({name: written, alias: written}))[name] == kept


@pytest.mark.parametrize(
    "given",
    [
        {"shuffle_caption": False, "keep_tokens": 0, "caption_dropout_rate": 0.0, "base_weights": []},
        {"weighting_scheme": "none", "loss_type": "l2", "max_timestep": 1000, "multires_noise_discount": 0.3},
        {"save_model_as": "safetensors", "network_train_unet_only": True, "text_encoder_lr": [0, 0.0]},
        {"anima_noise_offset": 0.0, "sdpa": True, "huber_schedule": "snr", "loss_type": "l2"},
        {"network_args": ["rank_dropout=0", "conv_dim=0"]},
    ],
)
def test_foreign_options_that_ask_for_nothing_are_taken(load_with, given: dict[str, Any]) -> None:
    load_with(given)


def test_foreign_flags_that_ask_for_nothing_are_taken(load_with) -> None:
    load_with(argv=("--keep_tokens", "0", "--text_encoder_lr", "0", "0", "--network_train_unet_only"))


def test_no_foreign_option_is_also_ours() -> None:
    ours = {name for cls in (*GROUPS.values(), DatasetKeys, SubsetKeys) for o in options_of(cls) for name in o.names}
    assert not ours & foreign.TRAIN_OPTIONS.keys()
    for name, table in foreign.ARGUMENTS.items():
        assert not table.keys() & {o.name for o in OPTIONS.values() if o.rules.inside == name}
