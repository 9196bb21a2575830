"""What is wrong is named: where it stands, what was expected, what came, and the nearest known name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anima_peft.config import load
from anima_peft.errors import InputError

LONG = "a" * 201
LOKR = "networks.lokr_anima"
PROMPTS = str(Path(__file__).with_name("prompts.txt"))

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


def faults_of(error: InputError) -> list[str]:
    """The faults of a report, whose heading counts them."""
    heading, *lines = str(error).split("\n  - ")
    count = "1 fault " if len(lines) == 1 else f"{len(lines)} faults "
    assert f"The configuration has {count}" in heading + " "
    return lines


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


def test_all_faults_of_all_sources_are_in_one_report(load_with) -> None:
    dataset = "[general]\nfoo = 1\n[[datasets]]\nbatch_size = 0\n[[datasets.subsets]]\nnum_repeats = 0\n"
    train = {"network_dim": 0, "xformers": "true", "output_dir": None, "seed": 1.5}
    with pytest.raises(InputError) as report:
        load_with(train, dataset, ("--learning_rate", "fast", "--sede", "1"))
    assert [fault.split(":")[0] for fault in faults_of(report.value)] == [
        "--learning_rate",
        "--sede",
        "network_dim",
        "xformers",
        "seed",
        "output_dir",
        "general.foo",
        "datasets[0].batch_size",
        "datasets[0].subsets[0].num_repeats",
        "datasets[0].subsets[0].image_dir",
    ]
    assert "train.toml" in str(report.value)
    assert "dataset.toml" in str(report.value)


PICTURES = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "p"\n'
# train args, dataset TOML, words of the command line: the faults in their order
SEVERAL: list[tuple[dict[str, Any], str, tuple[str, ...], list[str]]] = [
    (
        {"learning_rate": "1e-4", "network_dim": 0, "optimiser_type": "AdamW"},
        PICTURES,
        (),
        [
            'learning_rate: expected a number above 0, got "1e-4"; write it without quotes',
            "network_dim: expected an integer of at least 1, got 0",
            'optimiser_type: unknown option; did you mean "optimizer_type"?',
        ],
    ),
    (
        {"network_args": ["lokr_factr=4", "use_dora=maybe"], "optimizer_args": ["momentum"]},
        PICTURES,
        (),
        [
            'network_args.lokr_factr: unknown option; did you mean "lokr_factor"?',
            'network_args.use_dora: expected true or false, got "maybe"',
            "optimizer_args",
        ],
    ),
    (
        {"compare_prompts": ["a --w 1 --s 0", "b --x 1"], "lr_warmup_steps": 5, "vae": ["v"]},
        PICTURES,
        (),
        [
            "compare_prompts[0]: --w: expected an integer from 16 to 2048, got 1; --s: expected an integer",
            "compare_prompts[1]: unknown --x",
            'vae: expected a text, got ["v"]',
            'lr_warmup_steps: has no effect with lr_scheduler = "constant"',
        ],
    ),
    (
        {"seed": 1},
        "[genral]\n[general]\nkeep_tokn = 1\n[[datasets]]\nresolution = 7\nimage_dir = 'x'\n"
        "[[datasets.subsets]]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = 'p'\nflip_aug = 'no'\n",
        (),
        [
            'genral: unknown in a dataset TOML, which holds [general] and [[datasets]]; did you mean "general"?',
            "general.keep_tokn: unknown option",
            "datasets[0].resolution: expected a side or [width, height] in pixels from 16 to 65536, got 7",
            "datasets[0].image_dir: belongs into [[datasets.subsets]]",
            "datasets[0].subsets[0].batch_size: belongs into [[datasets]] or [general]",
            'datasets[0].subsets[1].flip_aug: expected true or false, got "no"',
            "datasets[0].subsets[0].image_dir: required, but not given. Folder of the pictures; with "
            "metadata_file, where its relative paths start.",
        ],
    ),
    (
        {"qwen": "a", "qwen3": "b", "fp8_base": True, "train_batch_size": 2, "output_name": "a/b"},
        '[[datasets]]\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = "p"\n',
        ("--timestep_sampling", "sigmiod", "--no-cache_latents_to_disk", "--learning", "1"),
        [
            '--timestep_sampling: expected one of "sigmoid", ',
            "--no-cache_latents_to_disk: false is not supported in this version",
            '--learning: unknown option; did you mean "--learning_rate"?',
            'output_name: expected a file name without "/", got "a/b"',
            'qwen3: "b" differs from qwen = "a", and both set the same option; keep one of them',
            "fp8_base: not supported in this version: use base_quantization",
            "train_batch_size: has no effect, because the dataset TOML sets datasets[0].batch_size = 4",
        ],
    ),
]


@pytest.mark.parametrize(("train", "dataset", "argv", "faults"), SEVERAL, ids=range(len(SEVERAL)))
def test_several_faults_are_one_report(
    load_with, train: dict[str, Any], dataset: str, argv: tuple[str, ...], faults: list[str]
) -> None:
    with pytest.raises(InputError) as report:
        load_with(train, dataset, argv)
    found = faults_of(report.value)
    missing = [fault for fault in faults if not any(text.startswith(fault) for text in found)]
    assert (missing, len(found)) == ([], len(faults)), str(report.value)


def test_there_are_cases_enough() -> None:
    assert len(TRAIN_FAULTS) >= 40
    assert len({fault for _, fault in TRAIN_FAULTS}) == len(TRAIN_FAULTS)
    assert len(SEVERAL) >= 5


def test_a_fault_causes_no_further_faults(load_with) -> None:
    with pytest.raises(InputError) as report:
        load_with({"timestep_sampling": "shfit", "discrete_flow_shift": 3.0})
    assert len(faults_of(report.value)) == 1


def test_two_faulty_prompts_are_both_named(load_with) -> None:
    with pytest.raises(InputError) as report:
        load_with({"compare_prompts": ["a --s x", "fine", "b --l x --q 1"]})
    first, second = faults_of(report.value)
    assert first.startswith("compare_prompts[0]: --s: expected an integer of at least 1")
    assert second.startswith("compare_prompts[2]: --l: expected a number of at least 0")
    assert "unknown --q" in second


def test_a_value_equal_to_its_default_is_never_without_effect(load_with) -> None:
    load_with({"discrete_flow_shift": 1, "lr_warmup_steps": 0, "lr_scheduler_num_cycles": 1, "lr_scheduler_power": 1.0})


def test_the_fault_names_the_section_it_stands_in(load_with) -> None:
    with pytest.raises(InputError, match=r"optimizer\.learning_rate: expected a number above 0, got -1"):
        load_with("[optimizer]\nlearning_rate = -1\n")


def test_equal_settings_in_two_sections_are_fine_and_others_are_named(load_with) -> None:
    text = 'anima_transformer = "m"\nlearning_rate = 1\noutput_dir = "o"\noutput_name = "n"\nseed = 1\n'
    text += 'network_module = "networks.lora_anima"\n[a]\nseed = {}\n'
    assert load_with(text.format(1)).train.loop.seed == 1
    with pytest.raises(InputError, match=r"a\.seed: 2 differs from seed = 1, and both set the same option"):
        load_with(text.format(2))


def test_single_files_need_all_parts(load_with) -> None:
    off = {"auto_download_qwen_tokenizer": False, "auto_download_t5_tokenizer": False}
    with pytest.raises(InputError) as report:
        load_with({"anima_transformer": "anima.safetensors", "qwen": "qwen.safetensors"} | off)
    assert [fault.split(", because")[0] for fault in faults_of(report.value)] == [
        "vae: required",
        "t5_tokenizer_dir: required",
        "qwen_tokenizer_dir: required",
    ]
    load_with({"anima_transformer": "folder", "qwen": "qwen.safetensors"} | off)


@pytest.mark.parametrize("argv", [["--config", "old.toml"], ["--seed", "1", "--config=old.toml"]])
def test_the_old_flag_names_the_migration(argv: list[str]) -> None:
    with pytest.raises(InputError) as report:
        load(argv)
    assert "python tools/convert_anima_root_to_kohya.py --input old_root.toml --output_dir converted" in str(
        report.value
    )


def test_no_dataset_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dataset_config: required, but not given"):
        load(["--learning_rate", "1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 1\nb = \n", "train.toml, line 2: not TOML: Invalid value"),
        (b"a = 1\na = 2\n", "train.toml, line 2: not TOML: Cannot overwrite a value"),
        (b'vae = "C:\\models\\vae.safetensors"\n', "line 1: not TOML: Unescaped '\\' in a string; write Windows paths"),
        (b"a = 1\nb = '''\nx", "train.toml, line 3: not TOML"),
        (b"a = 1\nb = '\xe9'\n", "train.toml, line 2: not UTF-8; save the file as UTF-8"),
        (b"a = " + b"9" * 5000, "train.toml, not TOML"),
        (None, "train.toml: cannot be read (No such file or directory)"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    train, dataset = tmp_path / "train.toml", tmp_path / "dataset.toml"
    if content is not None:
        train.write_bytes(content)
    dataset.write_bytes(b"[[datasets]]\n")
    with pytest.raises(InputError) as report:
        load(["--config_file", str(train), "--dataset_config", str(dataset)])
    first, second = faults_of(report.value)
    assert message in first
    assert second.startswith("datasets[0].subsets: expected at least one table")


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, load_with) -> None:
    load_with({"seed": 7})
    for name in ("train.toml", "dataset.toml"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    run = load(["--config_file", str(tmp_path / "train.toml"), "--dataset_config", str(tmp_path / "dataset.toml")])
    assert run.train.loop.seed == 7


def test_files_in_each_others_place(tmp_path: Path, load_with) -> None:
    load_with()
    train, dataset = str(tmp_path / "train.toml"), str(tmp_path / "dataset.toml")
    with pytest.raises(InputError) as report:
        load(["--config_file", dataset, "--dataset_config", train])
    first, second = faults_of(report.value)
    assert first == f"datasets: belongs into the dataset TOML; {dataset} was given as the train args"
    assert second == f"datasets: missing, and {train}, which was given as the dataset TOML, holds train args"
