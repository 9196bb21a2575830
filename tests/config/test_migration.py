"""The older one-file layout, converted key by key: what is moved, what is decided, what has no home."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from anima_peft.config.migration import Migration, is_root_style, migrate
from anima_peft.config.reading import Faults

from .root_style import NEWER, OLDER, PLACES

MODEL = {"transformer_path": "t", "t5_tokenizer_dir": "t5"}
PICTURES = {"data_dir": "p"}


def converted(document: dict[str, Any], **options: Any) -> Migration:
    faults = Faults()
    base = {"model": MODEL, "dataset": PICTURES}
    merged = {table: {**base.get(table, {}), **document.get(table, {})} for table in {**base, **document}}
    migration = migrate(merged, faults, **options)
    assert faults.texts == []
    return migration


# the table of the migration: tables of the old file, what the train args get
TRAIN_ARGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"model": {"transformer_path": "a"}}, {"anima_transformer": "a"}),
    ({"model": {"vae_path": "v", "text_encoder_path": "q"}}, {"vae": "v", "qwen": "q"}),
    ({"model": {"t5_tokenizer_dir": "d"}}, {"t5_tokenizer_dir": "d"}),
    ({"model": {"t5_tokenizer_dir": "", "t5_tokenizer_path": "p"}}, {"t5_tokenizer_dir": "p"}),
    ({"lora": {"network_type": "lokr"}}, {"network_module": "networks.lokr_anima"}),
    ({"lora": {"network_type": "LoKr"}}, {"network_module": "networks.lokr_anima"}),
    ({"lora": {"network_type": "lora"}}, {"network_module": "networks.lora_anima"}),
    ({"lora": {"network_type": "loha"}}, {"network_module": "networks.lora_anima"}),
    ({}, {"network_module": "networks.lora_anima"}),
    (
        {"lora": {"lora_rank": 8, "lora_alpha": 4, "lora_dropout": 0.1}},
        {"network_dim": 8, "network_alpha": 4, "network_dropout": 0.1},
    ),
    ({"lora": {"lora_targets": "q_proj,k_proj"}}, {"network_args": ["target_modules=q_proj,k_proj"]}),
    ({"lora": {"lora_targets": ["q_proj", "a{1,2}"]}}, {"network_args": ['target_modules=["q_proj", "a{1,2}"]']}),
    (
        {
            "lora": {
                "network_type": "lokr",
                "lokr_factor": 4,
                "lokr_full_matrix": True,
                "lokr_decompose_both": False,
                "lokr_rank_dropout": 0.1,
                "lokr_module_dropout": 0.2,
            }
        },
        {
            "network_args": [
                "lokr_factor=4",
                "lokr_full_matrix=true",
                "lokr_decompose_both=false",
                "lokr_rank_dropout=0.1",
                "lokr_module_dropout=0.2",
            ]
        },
    ),
    (
        {"output": {"output_dir": "o", "output_name": "n", "save_state": True}},
        {"output_dir": "o", "output_name": "n", "save_state": True},
    ),
    ({"lora": {"lora_name": "n"}}, {"output_name": "n"}),
    ({"output": {"save_every": 1}, "training": {"epochs": 10}}, {"save_every_n_epochs": 1}),
    ({"output": {"save_every": 10}, "training": {"epochs": 10}}, {"save_every_n_epochs": 10}),
    ({"output": {"save_every": 11}, "training": {"epochs": 10}}, {"save_every_n_steps": 11}),
    ({"output": {"save_every": 200}}, {"save_every_n_steps": 200}),
    ({"output": {"save_every": 0}}, {}),
    ({"training": {"max_steps": 5, "epochs": 3}}, {"max_train_steps": 5}),
    ({"training": {"max_steps": 0, "epochs": 3}}, {"max_train_epochs": 3}),
    (
        {"training": {"grad_accum": 2, "learning_rate": 1e-4, "mixed_precision": "bf16", "grad_checkpoint": True}},
        {
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-4,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
        },
    ),
    (
        {"training": {"num_workers": 2, "persistent_data_loader_workers": True, "xformers": True, "seed": 7}},
        {"max_data_loader_n_workers": 2, "persistent_data_loader_workers": True, "xformers": True, "seed": 7},
    ),
    (
        {"training": {"seq_len": 256, "noise_offset": 0.1, "resume": "state"}},
        {"anima_seq_len": 256, "anima_noise_offset": 0.1, "resume": "state"},
    ),
    ({"training": {"lr_scheduler": "linear"}}, {"lr_scheduler": "linear"}),
    (
        {"training": {"lr_scheduler": "cosine", "lr_min_ratio": 0.1}},
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1},
    ),
    ({"training": {"lr_scheduler": "cosine", "lr_min_ratio": 0.0}}, {"lr_scheduler": "cosine"}),
    ({"training": {"lr_warmup_steps": 5, "lr_warmup_ratio": 0.1}}, {"lr_warmup_steps": 5}),
    ({"training": {"lr_warmup_ratio": 0.1}}, {"lr_warmup_steps": 0.1}),
    ({"training": {"lr_warmup_ratio": 0}}, {}),
    ({"training": {"lr_scheduler_num_cycles": 2}}, {"lr_scheduler_num_cycles": 2.0}),
    ({"optimizer": {"type": "adamw"}}, {"optimizer_type": "adamw"}),
    ({"optimizer": {"type": "radam_schedulefree"}}, {"optimizer_type": "RAdamScheduleFree"}),
    (
        {"optimizer": {"weight_decay": 0.1, "eps": 1e-8, "beta1": 0.9, "beta2": 0.99}},
        {"optimizer_args": ["weight_decay=0.1", "eps=1e-08", "betas=(0.9,0.99)"]},
    ),
    (
        {"optimizer": {"type": "Prodigy", "prodigy_d_coef": 0.8, "prodigy_decouple": True}},
        {"optimizer_args": ["d_coef=0.8", "decouple=true"]},
    ),
    ({"dataset": {"cache_latents": True}}, {"cache_latents": True}),
]
ALWAYS = {"anima_transformer": "t", "t5_tokenizer_dir": "t5", "network_module": "networks.lora_anima"}


@pytest.mark.parametrize(("old", "new"), TRAIN_ARGS, ids=range(len(TRAIN_ARGS)))
def test_train_args(old: dict[str, Any], new: dict[str, Any]) -> None:
    document = converted(old).train_args_document()
    optional = {"network_args", "optimizer_type", "lr_scheduler", "max_train_epochs"} - new.keys()
    assert {key: document[key] for key in document if key not in optional} == {**ALWAYS, **new} | (
        {"network_module": document["network_module"]} if "network_args" in new else {}
    )
    kinds = {key: type(document[key]) for key in new}
    assert kinds == {key: type(value) for key, value in new.items()}


DATASETS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"dataset": {"resolution": 512}}, {}, {"resolution": 512}, {}),
    ({"training": {"batch_size": 4}}, {}, {"batch_size": 4}, {}),
    (
        {"dataset": {"min_reso": 256, "max_reso": 1536, "reso_step": 32}},
        {},
        {"enable_bucket": True, "min_bucket_reso": 256, "max_bucket_reso": 1536, "bucket_reso_steps": 32},
        {},
    ),
    ({"dataset": {"max_ar": 2.0}}, {}, {"enable_bucket": True}, {}),
    ({"dataset": {"repeats": 3}}, {}, {}, {"num_repeats": 3}),
    (
        {
            "dataset": {
                "shuffle_caption": True,
                "keep_tokens": 1,
                "keep_tokens_separator": "|||",
                "caption_extension": ".cap",
                "flip_augment": True,
            },
            "training": {"caption_tag_dropout_rate": 0.1},
        },
        {
            "shuffle_caption": True,
            "keep_tokens": 1,
            "keep_tokens_separator": "|||",
            "caption_extension": ".cap",
            "flip_aug": True,
            "caption_tag_dropout_rate": 0.1,
        },
        {},
        {},
    ),
]


@pytest.mark.parametrize(("old", "general", "dataset", "subset"), DATASETS, ids=range(len(DATASETS)))
def test_dataset(old: dict[str, Any], general: dict[str, Any], dataset: dict[str, Any], subset: dict[str, Any]) -> None:
    subset = {"image_dir": "p", "num_repeats": 1, **subset}
    expected = {"datasets": [{**dataset, "subsets": [subset]}], **({"general": general} if general else {})}
    assert converted(old).dataset_document() == expected


@pytest.mark.parametrize(
    ("old", "left_out"),
    [
        ({"dataset": {"max_ar": 4}}, "dataset.max_ar = 4"),
        ({"dataset": {"cache_dir": "c"}}, 'dataset.cache_dir = "c"'),
        ({"output": {"save_state_every": 5}}, "output.save_state_every = 5"),
        ({"training": {"max_steps": 5, "epochs": 3}}, "training.epochs = 3"),
        ({"training": {"lr_scheduler": "linear", "lr_min_ratio": 0.1}}, "training.lr_min_ratio = 0.1"),
        ({"training": {"lr_warmup_steps": 5, "lr_warmup_ratio": 0.1}}, "training.lr_warmup_ratio = 0.1"),
        ({"model": {"t5_tokenizer_path": "other"}}, 'model.t5_tokenizer_path = "other"'),
        ({"output": {"output_name": "n"}, "lora": {"lora_name": "m"}}, 'lora.lora_name = "m"'),
        ({"optimizer": {"beta1": 0.8}}, "optimizer.beta1 = 0.8"),
        ({"optimizer": {"type": "AdamW", "prodigy_d0": 1e-6}}, "optimizer.prodigy_d0 = 1e-06"),
        ({"training": {"never_heard_of": [1, 2]}}, "training.never_heard_of = [1, 2]"),
        ({"monitor": {"deep": {"er": True}}}, "monitor.deep.er = true"),
        ({"top": 1}, "top = 1"),
    ],
)
def test_what_has_no_home_is_listed(old: dict[str, Any], left_out: str) -> None:
    migration = migrate(
        {**{"model": MODEL, "dataset": PICTURES}, **old, "model": {**MODEL, **old.get("model", {})}}, Faults()
    )
    assert left_out in migration.left_out
    assert len(migration.left_out[left_out]) > 8


@pytest.mark.parametrize("text", [OLDER, NEWER], ids=["older", "newer"])
def test_every_key_is_moved_or_listed(text: str) -> None:
    """Whatever its name: each key of the file is changed in turn, and the outcome must change with it."""
    document = tomllib.loads(text.format(**PLACES))

    def outcome() -> tuple[Any, ...]:
        migration = migrate(document, Faults())
        return migration.train_args_document(), migration.dataset_document(), migration.decisions, migration.left_out

    before = outcome()
    for table in document.values():
        for key, value in list(table.items()):
            changed = (
                (not value) if isinstance(value, bool) else value + 3 if isinstance(value, (int, float)) else "changed"
            )
            table[key] = changed
            assert outcome() != before, key
            table[key] = value
        table["a_new_key"] = 1
        assert outcome() != before
        del table["a_new_key"]
    assert outcome() == before


def test_save_every_is_decided_and_said_or_set() -> None:
    old = {"output": {"save_every": 5}, "training": {"epochs": 16}}
    (decision,) = converted({**old, "lora": {"network_type": "lora"}}).decisions
    assert decision.startswith("output.save_every = 5 is not above training.epochs = 16, so it counts epochs")
    assert "--save_every_unit steps" in decision
    chosen = converted({**old, "lora": {"network_type": "lora"}}, save_every_unit="steps")
    assert chosen.decisions == []
    assert chosen.train_args_document()["save_every_n_steps"] == 5


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"model": {"transformer_path": "t"}, "dataset": PICTURES}, "model.t5_tokenizer_dir: required"),
        ({"model": MODEL}, "dataset.data_dir: required"),
        (
            {"model": MODEL, "dataset": PICTURES, "training": {"max_steps": "10"}},
            "training.max_steps: expected a number",
        ),
        ({"model": MODEL, "dataset": PICTURES, "output": {"save_every": -1}}, "output.save_every: expected a number"),
        (
            {"model": MODEL, "dataset": PICTURES, "lora": {"network_type": 1}},
            "lora.network_type: expected a text, got 1",
        ),
    ],
)
def test_what_cannot_be_converted(document: dict[str, Any], fault: str) -> None:
    faults = Faults()
    migrate(document, faults)
    assert [text.startswith(fault) for text in faults.texts] == [True]


def test_which_files_are_of_the_layout() -> None:
    assert is_root_style(tomllib.loads(OLDER))
    assert is_root_style(tomllib.loads(NEWER))
    assert not is_root_style(tomllib.loads('[model]\nvae = "v"\n[training]\nseed = 1\nlearning_rate = 1.0\n'))
    assert not is_root_style({"model": 1, "lora": [{"lora_rank": 3}]})
