"""What is wrong is named: where it stands, what was expected, what came, and the nearest known name."""

from __future__ import annotations

from typing import Any

import pytest

from anima_peft.errors import InputError

from .conftest import PROMPTS, faults_of

LONG = "a" * 201
LOKR = "networks.lokr_anima"

# train args, and the one fault that they have
TRAIN_FAULTS: list[tuple[dict[str, Any], str]] = [
    # names
    ({"learningrate": 1.0}, 'learningrate: unknown option; did you mean "learning_rate"?'),
    ({"Network_Dim": 4}, 'Network_Dim: unknown option; did you mean "network_dim"?'),
    ({"zzz": 1}, "zzz: unknown option"),
    ({"target_modules": ["a"]}, 'target_modules: belongs into network_args: network_args = ["target_modules=..."]'),
    ({"batch_size": 2}, "batch_size: belongs into the dataset TOML; here it is train_batch_size"),
    ({"config_file": "x"}, "config_file: belongs on the command line"),
    # types
    ({"xformers": "false"}, 'xformers: expected true or false, got "false"; write it without quotes'),
    ({"xformers": 1}, "xformers: expected true or false, got 1"),
    ({"network_dim": True}, "network_dim: expected an integer of at least 1, got true"),
    ({"network_dim": 4.0}, "network_dim: expected an integer of at least 1, got 4.0"),
    ({"network_dim": "4"}, 'network_dim: expected an integer of at least 1, got "4"; write it without quotes'),
    ({"learning_rate": "1e-4"}, 'learning_rate: expected a number above 0, got "1e-4"; write it without quotes'),
    ({"learning_rate": True}, "learning_rate: expected a number above 0, got true"),
    ({"vae": ["a"]}, 'vae: expected a text, got ["a"]'),
    ({"output_dir": 3}, "output_dir: expected a text, got 3"),
    ({"output_dir": ""}, 'output_dir: expected a text, got ""'),
    ({"network_args": "target_modules=a"}, 'network_args: expected a list of texts, got "target_modules=a"'),
    ({"compare_prompts": ["a", ""]}, 'compare_prompts[1]: expected a text, got ""'),
    # ranges
    ({"learning_rate": 0}, "learning_rate: expected a number above 0, got 0"),
    ({"learning_rate": float("nan")}, "learning_rate: expected a number above 0, got nan"),
    ({"sigmoid_scale": float("inf")}, "sigmoid_scale: expected a number above 0, got inf"),
    ({"network_dropout": 1}, "network_dropout: expected a number of at least 0 and below 1, got 1"),
    ({"anima_seq_len": 15}, "anima_seq_len: expected an integer of at least 16, got 15"),
    ({"max_grad_norm": 10**400}, "max_grad_norm: expected a number of at least 0, got a number of hundreds of digits"),
    ({"seed": 2**32}, "seed: expected an integer from 0 to 4294967295, got 4294967296"),
    ({"save_every_n_epochs": 0}, "save_every_n_epochs: expected an integer of at least 1, got 0"),
    # choices
    (
        {"timestep_sampling": "sigmiod"},
        'timestep_sampling: expected one of "sigmoid", "uniform", "shift", "flux_shift", "sigma", got '
        '"sigmiod"; '
        'did you mean "sigmoid"?',
    ),
    ({"attn_mode": "sageattn"}, 'attn_mode: "sageattn" has no backward pass, so that nothing could be trained; use'),
    ({"network_module": "networks.lorra"}, 'expected one of "networks.lora_anima", "networks.lokr_anima", got'),
    ({"network_args": ["use_dora=true"], "network_module": LOKR}, "network_args.use_dora: has no effect with"),
    (
        {"network_dim": 100000},
        "network_dim: 100000 stands for full matrices in LoKr; a LoRA's rank is usually 4 to 128",
    ),
    ({"network_weights": "a", "resume": "b"}, 'network_weights: has no effect with resume = "b"'),
    ({"compare_prompts": ["x --w 40000"]}, "--w: expected an integer from 16 to 2048, got 40000"),
    ({"network_args": ["lokr_factor=4"]}, "network_args.lokr_factor: has no effect with network_module ="),
    ({"network_args": ["lokr_full_matrix=true"]}, "network_args.lokr_full_matrix: has no effect with"),
    (
        {"network_args": ["lokr_decompose_both=true", "lokr_full_matrix=true"], "network_module": LOKR},
        "network_args.lokr_decompose_both: has no effect with lokr_full_matrix = true",
    ),
    (
        {"network_args": ["lokr_decompose_both=true"], "network_module": LOKR, "network_dim": 100000},
        "network_args.lokr_decompose_both: has no effect with network_dim = 100000",
    ),
    ({"print_config": True}, "print_config: belongs on the command line"),
    ({"network_args": ["lokr_factor=0"], "network_module": LOKR}, "expected a positive integer or -1, got 0"),
    ({"network_args": ["rank_dropout=1"], "network_module": LOKR}, "network_args.rank_dropout: expected a number"),
    ({"network_dropout": 0.1, "network_module": LOKR}, "network_dropout: has no effect with network_module ="),
    (
        {"train_norm": True, "network_args": ["train_norm=false"]},
        "network_args.train_norm: false differs from train_norm = true, and both set the same option",
    ),
    ({"optimizer_type": "AdamX"}, "optimizer_type: expected one of AdamW, AdamW8bit, PagedAdamW8bit, Lion, Lion8bit"),
    ({"optimizer_type": "radam-schedulefre"}, 'got "radam-schedulefre"; did you mean "RAdamScheduleFree"?'),
    ({"optimizer_type": "nadam"}, 'got "nadam"; PyTorch\'s own is "torch.optim.NAdam"'),
    ({"optimizer_type": "no_such.Optimizer"}, "no_such.Optimizer needs a package that is not installed"),
    ({"optimizer_type": "torch.optim.Adem"}, "optimizer_type: there is no class torch.optim.Adem"),
    ({"optimizer_type": "torch.optim.LBFGS"}, "torch.optim.LBFGS evaluates the loss several times a step"),
    ({"optimizer_type": "torch.nn.Linear"}, "optimizer_type: torch.nn.Linear is no torch.optim.Optimizer"),
    ({"lr_scheduler": "piecewise_constant"}, 'lr_scheduler: "piecewise_constant" needs step rules'),
    ({"mixed_precision": "fp8"}, 'mixed_precision: expected one of "no", "fp16", "bf16", got "fp8"'),
    ({"log_with": "comet"}, 'log_with: expected one of "tensorboard", "wandb", "all", "none", got "comet"'),
    ({"wandb_api_key": "0123"}, 'wandb_api_key: has no effect with log_with = "tensorboard"'),
    ({"log_with": "all", "log_tracker_config": "no such.toml"}, "log_tracker_config: no such.toml: cannot be read"),
    # file names
    ({"output_name": "a/b"}, 'output_name: expected a file name without "/", got "a/b"'),
    ({"output_name": 'a"<\n'}, r'output_name: expected a file name without "\n" """ "<"'),
    ({"output_name": "nul.v1"}, 'output_name: "nul.v1" is a device on Windows'),
    ({"output_name": "lora."}, "output_name: expected a file name without spaces at its ends or a dot at its end"),
    ({"output_name": LONG}, "output_name: expected a file name of at most 200 bytes, got 201"),
    ({"log_prefix": "a\\b"}, r'log_prefix: expected a file name without "\"'),
    # no effect
    (
        {"timestep_sampling": "uniform", "sigmoid_scale": 2.0},
        'sigmoid_scale: has no effect with timestep_sampling = "u',
    ),
    (
        {"discrete_flow_shift": 3},
        'has no effect with timestep_sampling = "sigmoid"; it needs "shift" or "sigma"; remove it',
    ),
    (
        {"lr_warmup_steps": 10},
        'lr_warmup_steps: has no effect with lr_scheduler = "constant"; use lr_scheduler = "const',
    ),
    ({"weighting_scheme": "mode"}, 'shapes the density of timestep_sampling = "sigma" and has no effect with "sigm'),
    ({"min_timestep": 500, "max_timestep": 500}, "min_timestep: expected less than max_timestep = 500, got 500"),
    ({"base_weights": ["a"], "base_weights_multiplier": [1, 2]}, "base_weights_multiplier: 2 numbers for 1 files"),
    ({"base_weights_multiplier": [1]}, "base_weights_multiplier: has no effect with base_weights = []"),
    ({"network_args": ["lokr_rank_dropout=0.1"]}, "network_args.lokr_rank_dropout: has no effect with network_module"),
    ({"network_args": ["rank_dropout=0.1", "use_dora=true"]}, "rank_dropout: has no effect with use_dora = true"),
    ({"network_args": ["exclude_patterns=['(']"]}, 'exclude_patterns: "(" is not a regular expression'),
    ({"network_args": ["network_reg_dims=.*=x"]}, 'expected "pattern=integer of at least 0", got ".*=x"'),
    ({"network_args": ["network_reg_lrs=.*"]}, 'expected "pattern=number of at least 0", got ".*"'),
    ({"dim_from_weights": True}, "dim_from_weights: has no effect without network_weights"),
    (
        {"dim_from_weights": True, "network_weights": "a", "network_dim": 8},
        "network_dim: has no effect with dim_from_weights = true",
    ),
    ({"llm_adapter_lr": 1e-5}, "llm_adapter_lr: has no effect with train_llm_adapter = false"),
    ({"huber_c": 0.5}, 'huber_c: has no effect with loss_type = "l2"'),
    ({"ema_decay": 0.5}, "ema_decay: has no effect with use_ema = false"),
    ({"xformers": True, "attn_mode": "torch"}, 'xformers: has no effect with attn_mode = "torch"'),
    # optimizer, schedule and rates
    ({"lr_scheduler": "cosine_with_min_lr"}, '"cosine_with_min_lr" needs lr_scheduler_min_lr_ratio'),
    ({"lr_scheduler": "warmup_stable_decay"}, '"warmup_stable_decay" needs lr_decay_steps'),
    ({"lr_scheduler": "adafactor"}, '"adafactor" is for Adafactor with relative_step; choose another'),
    ({"lr_scheduler_args": ["lr_end=0"]}, "lr_scheduler_args.lr_end: unknown argument; there are none here"),
    ({"lr_scheduler_type": "StepLRR"}, "lr_scheduler_type: there is no class torch.optim.lr_scheduler.StepLRR"),
    ({"lr_scheduler_type": "StepLR"}, "lr_scheduler_type: StepLR cannot be built: "),
    ({"lr_scheduler_type": "ReduceLROnPlateau"}, "ReduceLROnPlateau follows a metric, and training measures none"),
    (
        {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_siz=3"]},
        'lr_scheduler_args.step_siz: unknown argument; did you mean "step_size"?',
    ),
    (
        {"lr_scheduler_type": "ExponentialLR", "lr_scheduler_args": ["gamma=0.9"], "lr_scheduler": "cosine"},
        'lr_scheduler: has no effect with lr_scheduler_type = "ExponentialLR"',
    ),
    (
        {"optimizer_type": "Adafactor", "lr_scheduler": "cosine"},
        "lr_scheduler: Adafactor needs no schedule and must have none; remove it",
    ),
    ({"optimizer_type": "Adafactor", "unet_lr": 1e-5}, "unet_lr: Adafactor has one rate for all parameters; remove it"),
    (
        {"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False", "warmup_init=True"]},
        "optimizer_args: Adafactor cannot be built with relative_step=False, warmup_init=True",
    ),
    ({"lr_scheduler_num_cycles": 2}, 'lr_scheduler_num_cycles: has no effect with lr_scheduler = "constant"'),
    ({"lr_scheduler": "cosine", "lr_scheduler_power": 2}, 'lr_scheduler_power: has no effect with lr_scheduler = "cos'),
    ({"persistent_data_loader_workers": True}, "has no effect with max_data_loader_n_workers = 0; remove it"),
    ({"save_last_n_epochs": 2}, "save_last_n_epochs: has no effect without save_every_n_epochs; remove it"),
    ({"save_last_n_steps": 2, "save_every_n_epochs": 1}, "save_last_n_steps: has no effect without save_every_n_steps"),
    ({"no_metadata": True, "metadata_author": "me"}, "metadata_author: has no effect with no_metadata = true"),
    ({"log_with": "none", "logging_dir": "logs"}, 'logging_dir: has no effect with log_with = "none"'),
    # other rules
    (
        {"lr_scheduler": "linear", "lr_warmup_steps": 1.5},
        "lr_warmup_steps: expected an integer number of steps or a sh",
    ),
    (
        {"cache_latents_to_disk": False},
        "cache_latents_to_disk: false is not supported in this version: what is cached is always",
    ),
    ({"anima_seq_len": 256, "qwen3_max_token_length": 512}, "qwen3_max_token_length: 512 differs from anima_seq_len ="),
    # parts of arguments
    ({"network_args": ["attn-mlp"]}, 'network_args[0]: expected "key=value", got "attn-mlp"'),
    (
        {"network_args": ["target_module=a"]},
        'network_args.target_module: unknown option; did you mean "target_modules"',
    ),
    ({"network_args": ["target_modules=attn_mlp"]}, "network_args.target_modules: expected a preset or a pattern, got"),
    ({"network_args": ["target_modules=a,,b"]}, 'network_args.target_modules[1]: expected a text, got ""'),
    ({"network_args": ["train_llm_adapter=yes"]}, 'network_args.train_llm_adapter: expected true or false, got "yes"'),
    ({"network_args": ["conv_dim=4"]}, "network_args.conv_dim: not supported in this version: remove it"),
    (
        {"network_args": ["target_modules=a", "target_modules=b"]},
        '["b"] differs from network_args.target_modules = ["a',
    ),
    ({"network_args": ["target_modules=[]"]}, 'network_args.target_modules[0]: expected a text, got ""'),
    ({"optimizer_args": ["betas=0.9"]}, "optimizer_args: AdamW cannot be built with fused=True, betas=0.9: "),
    ({"optimizer_args": ["betas=0.9,1"]}, "betas=(0.9, 1): Invalid beta parameter at index 1"),
    ({"optimizer_args": ["eps=nan"]}, "optimizer_args: AdamW cannot be built with fused=True, eps=nan: "),
    ({"optimizer_args": ["eps=1", "eps=2"]}, "optimizer_args: eps is given twice"),
    ({"optimizer_args": ["eps"]}, 'optimizer_args: expected "key=value", got "eps"'),
    ({"optimizer_args": ["lr=1"]}, "optimizer_args.lr: is learning_rate; remove it"),
    ({"optimizer_args": ["differentiable=true"]}, "optimizer_args.differentiable: would keep a graph"),
    (
        {"optimizer_args": ["weight_dacay=0"]},
        'optimizer_args.weight_dacay: unknown argument; did you mean "weight_decay"?',
    ),
    # prompts
    ({"compare_prompts": ["a --w 8"]}, "compare_prompts[0]: --w: expected an integer from 16 to 2048, got 8"),
    # options of other trainers
    ({"face_crop_aug_range": "1,2"}, "face_crop_aug_range: not supported in this version: use random_crop"),
    ({"keep_tokens": 1}, "keep_tokens: has no effect without shuffle_caption, caption_tag_dropout_rate or token_warm"),
    ({"prior_loss_weight": 0.5}, "prior_loss_weight: has no effect, because no subset has is_reg = true"),
    ({"masked_loss": True}, "masked_loss: has no effect, because no subset has a conditioning_data_dir; remove it"),
    ({"is_reg": True}, "is_reg: belongs into the dataset TOML"),
    ({"min_snr_gamma": 5}, "min_snr_gamma: not supported in this version: remove it; loss_type and weighting"),
    (
        {"save_model_as": "ckpt"},
        "save_model_as: not supported in this version: remove it; files are always safetensors",
    ),
    ({"sample_every_n_steps": 10}, "sample_every_n_steps: has no effect without sample_prompts"),
    ({"sample_prompts": PROMPTS}, "sample_prompts: has no effect without one of sample_every_n_steps, "),
    ({"sample_prompts": "nothing.txt", "sample_at_first": True}, "sample_prompts: nothing.txt: cannot be read"),
    ({"sample_sampler": "dpm"}, "sample_sampler: not supported in this version: remove it; pictures are drawn with"),
    ({"text_encoder_lr": [0, 1e-5]}, "text_encoder_lr: not supported in this version"),
    # missing
    ({"learning_rate": None}, "learning_rate: required, but not given."),
    ({"anima_transformer": None}, "anima_transformer: required, but not given."),
]


@pytest.mark.parametrize(
    ("train", "fault"), TRAIN_FAULTS, ids=[f"{next(iter(t))}-{i}" for i, (t, _) in enumerate(TRAIN_FAULTS)]
)
def test_one_fault_in_the_train_args(load_with, train: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError) as report:
        load_with(train)
    assert [fault in found for found in faults_of(report.value)] == [True], str(report.value)


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (("--learning", "1"), '--learning: unknown option; did you mean "--learning_rate"?'),
        (("--zzz=1",), "--zzz: unknown option"),
        (("--network_dim", "4.5"), '--network_dim: expected an integer of at least 1, got "4.5"'),
        (("--network_dim",), "--network_dim: expected an integer of at least 1, got no value"),
        (("--network_dim", "4", "--network_dim", "8"), "--network_dim: 8 differs from --network_dim = 4"),
        (("--xformers", "true"), '--xformers: takes no value, got "true"; write --xformers or --no-xformers'),
        (("--xformers", "--no-xformers"), "--no-xformers: false differs from --xformers = true"),
        (("--qwen", "a", "--qwen3", "b"), '--qwen3: "b" differs from --qwen = "a"'),
        (("stray",), "stray: unexpected on the command line"),
        (("--vae", "a", "stray"), "stray: unexpected on the command line"),
        (("--learning_rate", "inf"), "--learning_rate: expected a number above 0, got inf"),
        (("--discrete_flow_shift", "3"), "--discrete_flow_shift: has no effect with timestep_sampling"),
        (("--min_snr_gamma", "5"), "--min_snr_gamma: not supported in this version"),
        (("--debiased_estimation_loss", "--vae", "v"), "--debiased_estimation_loss: not supported in this version"),
        (("--network_args", "x=1"), "--network_args.x: unknown option"),
        (("--compare_prompts", "a", "b --q 1"), "--compare_prompts[1]: unknown --q"),
        (
            ("--resolution", "1024x1024"),
            "--resolution: expected a side or [width, height] in pixels from 16 to 65536, got",
        ),
    ],
)
def test_one_fault_on_the_command_line(load_with, argv: tuple[str, ...], fault: str) -> None:
    with pytest.raises(InputError) as report:
        load_with(argv=argv)
    assert [fault in found for found in faults_of(report.value)] == [True], str(report.value)
    assert "without quotes" not in str(report.value)  # advice for TOML only


def test_there_are_cases_enough() -> None:
    assert len(TRAIN_FAULTS) >= 40
    assert len({fault for _, fault in TRAIN_FAULTS}) == len(TRAIN_FAULTS)
