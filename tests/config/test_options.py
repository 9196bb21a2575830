"""Every option, read from the train args and from the command line."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from anima_peft.adapters.writing import Format
from anima_peft.config.loading import GROUPS, OPTIONS
from anima_peft.errors import InputError
from anima_peft.training import flow, losses
from anima_peft.training.device import DTYPES

from .conftest import DATASET, PROMPTS, values_of

TRACKER = str(Path(__file__).parents[1] / "effects" / "tracker.toml")

# option: (value in the TOML, words on the command line, value kept)
CASES: dict[str, tuple[Any, list[str], Any]] = {
    "anima_transformer": ("other/model", ["other/model"], "other/model"),
    "vae": ("v.safetensors", ["v.safetensors"], "v.safetensors"),
    "qwen": ("q", ["q"], "q"),
    "qwen_tokenizer_dir": ("t", ["t"], "t"),
    "auto_download_qwen_tokenizer": (True, [], True),
    "qwen_tokenizer_repo_id": ("a/b", ["a/b"], "a/b"),
    "qwen_tokenizer_modelscope_fallback": (True, [], True),
    "qwen_tokenizer_modelscope_repo_id": ("a/b", ["a/b"], "a/b"),
    "t5_tokenizer_dir": ("t5", ["t5"], "t5"),
    "auto_download_t5_tokenizer": (True, [], True),
    "t5_tokenizer_repo_id": ("https://hf.co/a/b", ["https://hf.co/a/b"], "https://hf.co/a/b"),
    "t5_tokenizer_subfolder": ("/", ["/"], "/"),
    "t5_tokenizer_modelscope_fallback": (True, [], True),
    "t5_tokenizer_modelscope_repo_id": ("a/b", ["a/b"], "a/b"),
    "t5_tokenizer_modelscope_revision": ("v1", ["v1"], "v1"),
    "t5_tokenizer_modelscope_subfolder": ("t5", ["t5"], "t5"),
    "anima_seq_len": (256, ["256"], 256),
    "network_module": ("networks.lora_anima", ["networks.lora_anima"], "networks.lora_anima"),
    "network_dim": (16, ["16"], 16),
    "network_alpha": (2, ["2"], 2.0),
    "network_dropout": (0.5, ["0.5"], 0.5),
    "dim_from_weights": (True, [], True),
    "base_weights": (["a.safetensors"], ["a.safetensors"], ["a.safetensors"]),
    "base_weights_multiplier": ([0.5, 1], ["0.5", "1"], [0.5, 1.0]),
    "scale_weight_norms": (1, ["1"], 1.0),
    "network_weights": ("start.safetensors", ["start.safetensors"], "start.safetensors"),
    "train_norm": (True, [], True),
    "timestep_sampling": ("flux_shift", ["flux_shift"], "flux_shift"),
    "sigmoid_scale": (1.3, ["1.3"], 1.3),
    "discrete_flow_shift": (3, ["3"], 3.0),
    "logit_mean": (-0.5, ["-0.5"], -0.5),
    "logit_std": (2, ["2"], 2.0),
    "mode_scale": (1, ["1"], 1.0),
    "prior_loss_weight": (0.5, ["0.5"], 0.5),
    "masked_loss": (True, [], True),
    "min_timestep": (100, ["100"], 100),
    "max_timestep": (900, ["900"], 900),
    "noise_offset": (0.05, ["0.05"], 0.05),
    "noise_offset_random_strength": (True, [], True),
    "ip_noise_gamma": (0.1, ["0.1"], 0.1),
    "ip_noise_gamma_random_strength": (True, [], True),
    "loss_type": ("huber", ["huber"], "huber"),
    "huber_c": (0.2, ["0.2"], 0.2),
    "huber_schedule": ("constant", ["constant"], "constant"),
    "huber_scale": (2, ["2"], 2.0),
    "weighting_scheme": ("cosmap", ["cosmap"], "cosmap"),
    "optimizer_type": ("adamw", ["ADAMW"], "AdamW"),
    "optimizer_args": (["weight_decay=0"], ["weight_decay=0"], ["weight_decay=0"]),
    "learning_rate": (1, ["1"], 1.0),
    "unet_lr": (1e-5, ["1e-5"], 1e-5),
    "llm_adapter_lr": (0, ["0"], 0.0),
    "lr_scheduler": ("cosine", ["cosine"], "cosine"),
    "lr_warmup_steps": (0.1, ["0.1"], 0.1),
    "lr_scheduler_num_cycles": (3, ["3"], 3.0),
    "lr_decay_steps": (0.2, ["0.2"], 0.2),
    "lr_scheduler_timescale": (20, ["20"], 20),
    "lr_scheduler_min_lr_ratio": (0.1, ["0.1"], 0.1),
    "lr_scheduler_type": ("ConstantLR", ["ConstantLR"], "ConstantLR"),
    "lr_scheduler_args": (["lr_end=1e-8"], ["lr_end=1e-8"], ["lr_end=1e-8"]),
    "use_ema": (True, [], True),
    "ema_decay": (0.9, ["0.9"], 0.9),
    "lr_scheduler_power": (2, ["2"], 2.0),
    "max_grad_norm": (0, ["0"], 0.0),
    "max_train_steps": (10, ["10"], 10),
    "max_train_epochs": (5, ["5"], 5),
    "train_batch_size": (4, ["4"], 4),
    "gradient_accumulation_steps": (2, ["2"], 2),
    "gradient_checkpointing": (True, [], True),
    "mixed_precision": ("fp32", ["fp32"], "no"),
    "seed": (2**32 - 1, ["4294967295"], 2**32 - 1),
    "xformers": (True, [], True),
    "attn_mode": ("sdpa", ["sdpa"], "torch"),
    "torch_compile": (True, [], True),
    "dynamo_backend": ("aot_eager", ["aot_eager"], "aot_eager"),
    "max_data_loader_n_workers": (2, ["2"], 2),
    "persistent_data_loader_workers": (True, [], True),
    "vae_batch_size": (4, ["4"], 4),
    "cache_latents": (True, [], True),
    "cache_latents_to_disk": (True, [], True),
    "cache_text_encoder_outputs": (True, [], True),
    "cache_text_encoder_outputs_to_disk": (True, [], True),
    "cache_dir": ("~/cache", ["~/cache"], str(Path("~/cache").expanduser())),
    "memory": ("low", ["balanced"], None),
    "gradient_checkpointing_every": (2, ["2"], 2),
    "blocks_to_swap": (-1, ["-1"], -1),
    "base_quantization": ("int8", ["nf4"], None),
    "vae_tiling": (True, [], True),
    "output_dir": ("runs/{time}", ["runs/{time}"], "runs/{time}"),
    "output_name": ("我的 LoRA v1.2", ["我的 LoRA v1.2"], "我的 LoRA v1.2"),
    "save_every_n_epochs": (2, ["2"], 2),
    "save_every_n_steps": (100, ["100"], 100),
    "save_last_n_epochs": (3, ["3"], 3),
    "save_last_n_steps": (300, ["300"], 300),
    "save_last_n_epochs_state": (3, ["3"], 3),
    "save_last_n_steps_state": (300, ["300"], 300),
    "skip_nonfinite_steps": (3, ["3"], 3),
    "save_precision": ("float", ["bf16"], None),
    "save_format": ("comfy", ["diffusers"], None),
    "save_state": (True, [], True),
    "save_state_on_train_end": (True, [], True),
    "resume": ("out/lora-state", ["out/lora-state"], "out/lora-state"),
    "overwrite": (True, [], True),
    "no_metadata": (True, [], True),
    "training_comment": ("a comment", ["a comment"], "a comment"),
    "metadata_title": ("Title", ["Title"], "Title"),
    "metadata_author": ("Author", ["Author"], "Author"),
    "metadata_description": ("Text", ["Text"], "Text"),
    "metadata_license": ("MIT", ["MIT"], "MIT"),
    "metadata_tags": ("a, b", ["a, b"], "a, b"),
    "logging_dir": ("logs", ["logs"], "logs"),
    "log_with": ("none", ["none"], "none"),
    "log_prefix": ("mine_", ["mine_"], "mine_"),
    "log_tracker_name": ("mine", ["mine"], "mine"),
    "wandb_run_name": ("third try", ["third try"], "third try"),
    "wandb_api_key": ("0123", ["0123"], "0123"),
    "log_tracker_config": (TRACKER, [TRACKER], TRACKER),
    "sample_prompts": (PROMPTS, [PROMPTS], PROMPTS),
    "sample_every_n_steps": (10, ["10"], 10),
    "sample_every_n_epochs": (2, ["2"], 2),
    "sample_at_first": (True, [], True),
    "validate_every_n_steps": (10, ["10"], 10),
    "validate_every_n_epochs": (2, ["2"], 2),
    "max_validation_steps": (3, ["3"], 3),
    "compare_prompts": (["a cat --s 8", "a dog"], ["a cat --s 8", "a dog"], None),
}
# kept, but neither shown nor written
SECRET = {option.name for option in OPTIONS.values() if option.rules.secret}
# written inside the `key=value` list of another option
INSIDE_CASES: dict[str, tuple[str, str, Any]] = {
    "target_modules": ("network_args", "attn-mlp-adaln", ["attn-mlp-adaln"]),
    "train_llm_adapter": ("network_args", "True", True),
    "use_dora": ("network_args", "true", True),
    "lokr_factor": ("network_args", "-1", -1),
    "lokr_full_matrix": ("network_args", "True", True),
    "lokr_decompose_both": ("network_args", "True", True),
    "rank_dropout": ("network_args", "0.1", 0.1),
    "module_dropout": ("network_args", "0.2", 0.2),
    "exclude_patterns": ("network_args", "['.*mlp.*']", [".*mlp.*"]),
    "include_patterns": ("network_args", r"['.*_modulation_mlp\.1', 'x.*']", [r".*_modulation_mlp\.1", "x.*"]),
    "network_reg_dims": ("network_args", ".*mlp.*=8,.*attn.*=0", [".*mlp.*=8", ".*attn.*=0"]),
    "network_reg_lrs": ("network_args", ".*mlp.*=1e-4, .*attn.*=0", [".*mlp.*=1e-4", ".*attn.*=0"]),
    "loraplus_lr_ratio": ("network_args", "16", 16.0),
}
# what an option needs beside it to have an effect
LOKR = {"network_module": "networks.lokr_anima"}
BESIDE: dict[str, dict[str, Any]] = {
    "lokr_factor": LOKR,
    "lokr_full_matrix": LOKR,
    "lokr_decompose_both": LOKR,
    "dim_from_weights": {"network_weights": "start.safetensors"},
    "base_weights_multiplier": {"base_weights": ["a.safetensors", "b.safetensors"]},
    "llm_adapter_lr": {"network_args": ["train_llm_adapter=true"]},
    "logit_mean": {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal"},
    "logit_std": {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal"},
    "mode_scale": {"timestep_sampling": "sigma", "weighting_scheme": "mode"},
    "noise_offset_random_strength": {"noise_offset": 0.1},
    "ip_noise_gamma_random_strength": {"ip_noise_gamma": 0.1},
    "huber_c": {"loss_type": "huber"},
    "huber_schedule": {"loss_type": "huber"},
    "huber_scale": {"loss_type": "smooth_l1"},
    "lr_decay_steps": {"lr_scheduler": "warmup_stable_decay"},
    "lr_scheduler_timescale": {"lr_scheduler": "inverse_sqrt"},
    "lr_scheduler_min_lr_ratio": {"lr_scheduler": "cosine_with_min_lr"},
    "lr_scheduler_args": {"lr_scheduler": "polynomial"},
    "ema_decay": {"use_ema": True},
    "discrete_flow_shift": {"timestep_sampling": "shift"},
    "lr_warmup_steps": {"lr_scheduler": "constant_with_warmup"},
    "lr_scheduler_num_cycles": {"lr_scheduler": "cosine_with_restarts"},
    "lr_scheduler_power": {"lr_scheduler": "polynomial"},
    "persistent_data_loader_workers": {"max_data_loader_n_workers": 1},
    "dynamo_backend": {"torch_compile": True},
    "gradient_checkpointing_every": {"gradient_checkpointing": True},
    "blocks_to_swap": {"gradient_checkpointing": True},
    "sample_prompts": {"sample_at_first": True},
    **{f"sample_{time}": {"sample_prompts": PROMPTS} for time in ("every_n_steps", "every_n_epochs", "at_first")},
    **{
        name: {"log_with": "wandb"}
        for name in ("log_tracker_name", "wandb_run_name", "wandb_api_key", "log_tracker_config")
    },
    "validate_every_n_steps": {"validation_split": 0.1},
    "validate_every_n_epochs": {"validation_split": 0.1},
    "max_validation_steps": {"validation_split": 0.1, "validate_every_n_steps": 1},
    "save_last_n_epochs": {"save_every_n_epochs": 1},
    "save_last_n_steps": {"save_every_n_steps": 100},
    "save_last_n_epochs_state": {"save_every_n_epochs": 1, "save_state": True},
    "save_last_n_steps_state": {"save_every_n_steps": 100, "save_state": True},
}
KEPT = {
    "memory": {"low": "low", "balanced": "balanced"},
    "base_quantization": {"int8": "int8", "nf4": "nf4"},
    "save_precision": {"float": "fp32", "bf16": "bf16"},
    "save_format": {"comfy": "comfy", "diffusers": "diffusers"},
}


def expected(name: str, written: Any) -> Any:
    if name == "compare_prompts":
        return [
            {**PROMPT_DEFAULTS, "prompt": "a cat", "steps": 8},
            {**PROMPT_DEFAULTS, "prompt": "a dog"},
        ]
    return KEPT[name][written] if name in KEPT else CASES[name][2]


PROMPT_DEFAULTS = {
    "negative_prompt": "",
    "width": 512,
    "height": 512,
    "seed": None,
    "steps": 30,
    "guidance_scale": 7.5,
    "flow_shift": 3.0,
}


# what the dataset TOML has to say for an option to have an effect
DATASETS = {
    "prior_loss_weight": DATASET + '[[datasets.subsets]]\nimage_dir = "others"\nis_reg = true\n',
    "masked_loss": DATASET + 'conditioning_data_dir = "masks"\n',
}


def test_every_option_has_a_case() -> None:
    assert CASES.keys() | INSIDE_CASES.keys() == OPTIONS.keys()
    assert not CASES.keys() & INSIDE_CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_option_from_toml(load_with, name: str) -> None:
    written = CASES[name][0]
    run = load_with({**BESIDE.get(name, {}), name: written}, DATASETS.get(name, DATASET))
    if name in SECRET:
        assert getattr(run.train.log, name) == written
        assert name not in values_of(run)
        return
    assert values_of(run)[name] == expected(name, written)
    assert type(values_of(run)[name]) is type(expected(name, written))
    group = next(group for group, cls in GROUPS.items() if name in cls.__dataclass_fields__)
    kept = getattr(getattr(run.train, group), name)
    if isinstance(kept, tuple):
        kept = [asdict(item) if is_dataclass(item) else item for item in kept]
    assert values_of(run)[name] == kept


@pytest.mark.parametrize("name", sorted(CASES.keys() - SECRET))
def test_option_from_the_command_line(load_with, name: str) -> None:
    words = CASES[name][1]
    run = load_with(BESIDE.get(name), DATASETS.get(name, DATASET), argv=(f"--{name}", *words))
    assert values_of(run)[name] == expected(name, words[0] if words else True)


@pytest.mark.parametrize("name", INSIDE_CASES)
def test_argument_from_toml_and_command_line(load_with, name: str) -> None:
    listed, text, kept = INSIDE_CASES[name]
    beside = BESIDE.get(name, {})
    assert values_of(load_with({**beside, listed: [f"{name}={text}"]}))[name] == kept
    assert values_of(load_with(beside, argv=(f"--{listed}", f"{name} = {text}")))[name] == kept


@pytest.mark.parametrize("name", [o.name for o in OPTIONS.values() if o.kind.name == "SWITCH" and not o.rules.inside])
def test_a_switch_can_be_turned_off_on_the_command_line(load_with, name: str) -> None:
    if name.endswith("_to_disk"):
        with pytest.raises(InputError, match=f"--no-{name}: false is not supported"):
            load_with(argv=(f"--no-{name}",))
    else:
        beside = BESIDE.get(name, {})
        if name == "sample_at_first":
            beside = {**beside, "sample_every_n_steps": 1}  # without any, the prompts would have no effect
        assert values_of(load_with({**beside, name: True}, argv=(f"--no-{name}",)))[name] is False


def test_defaults_are_those_that_users_know(load_with) -> None:
    values = values_of(load_with())
    known = {
        "anima_seq_len": 512,
        "network_dim": 4,
        "network_alpha": 1.0,
        "timestep_sampling": "sigmoid",
        "sigmoid_scale": 1.0,
        "discrete_flow_shift": 1.0,
        "optimizer_type": "AdamW",
        "lr_scheduler": "constant",
        "max_grad_norm": 1.0,
        "vae_batch_size": 1,
        "seed": 42,
        "mixed_precision": "bf16",
        "save_precision": "fp32",
    }
    assert {name: values[name] for name in known} == known


@pytest.mark.parametrize(
    ("given", "steps", "epochs"),
    [
        ({}, 1600, None),
        ({"max_train_epochs": 3}, None, 3),
        ({"max_train_steps": 5}, 5, None),
        ({"max_train_steps": 5, "max_train_epochs": 3}, 5, 3),
    ],
)
def test_length_of_the_run(load_with, given: dict[str, int], steps: int | None, epochs: int | None) -> None:
    loop = load_with(given).train.loop
    assert (loop.max_train_steps, loop.max_train_epochs) == (steps, epochs)


def test_alpha_zero_stands_for_the_dim(load_with) -> None:
    assert load_with({"network_alpha": 0, "network_dim": 8}).train.network.network_alpha == 8.0


def test_empty_text_leaves_an_optional_option_unset(load_with) -> None:
    assert load_with({"vae": "", "resume": ""}).train.model.vae is None


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("timestep_sampling", flow.SigmaMethod),
        ("loss_type", losses.LossType),
        ("huber_schedule", losses.HuberSchedule),
        ("weighting_scheme", losses.WeightingScheme),
    ],
)
def test_choices_are_what_training_knows(name: str, kinds: Any) -> None:
    assert OPTIONS[name].rules.choices == get_args(kinds)


def test_choices_of_formats_and_precisions_can_be_written() -> None:
    assert set(OPTIONS["save_format"].rules.choices) <= set(get_args(Format))
    for name in ("mixed_precision", "save_precision"):
        assert set(OPTIONS[name].rules.choices) <= DTYPES.keys()
