"""Several faults are one report, and a fault causes no others."""

from __future__ import annotations

from typing import Any

import pytest

from anima_peft.errors import InputError

from .conftest import DATASET, faults_of


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


# train args, dataset TOML, words of the command line: the faults in their order
SEVERAL: list[tuple[dict[str, Any], str, tuple[str, ...], list[str]]] = [
    (
        {"learning_rate": "1e-4", "network_dim": 0, "optimiser_type": "AdamW"},
        DATASET,
        (),
        [
            'learning_rate: expected a number above 0, got "1e-4"; write it without quotes',
            "network_dim: expected an integer of at least 1, got 0",
            'optimiser_type: unknown option; did you mean "optimizer_type"?',
        ],
    ),
    (
        {"network_args": ["lokr_factr=4", "use_dora=maybe"], "optimizer_args": ["momentum"]},
        DATASET,
        (),
        [
            'network_args.lokr_factr: unknown option; did you mean "lokr_factor"?',
            'network_args.use_dora: expected true or false, got "maybe"',
            "optimizer_args",
        ],
    ),
    (
        {"compare_prompts": ["a --w 1 --s 0", "b --x 1"], "lr_warmup_steps": 5, "vae": ["v"]},
        DATASET,
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
