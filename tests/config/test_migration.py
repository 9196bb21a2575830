"""The older one-file layout: converted key by key, refused clearly, read as it is."""

from __future__ import annotations

import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import toml

from anima_peft.cli import DONE, FAULTY_INPUT, report_faults
from anima_peft.commands.migrate import migrate_file
from anima_peft.config import load
from anima_peft.config.migration import Migration, is_root_style, migrate
from anima_peft.config.reading import Faults
from anima_peft.errors import InputError

from .conftest import values_of
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


def run(*words: str | Path) -> int:
    return report_faults(lambda: migrate_file([str(word) for word in words], prog="convert"))


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "旧 root.toml"
    path.write_text(OLDER.format(**PLACES), encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [OLDER, NEWER], ids=["older", "newer"])
def test_the_command_writes_what_the_trainer_takes(
    text: str, old_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_file.write_text(text.format(**PLACES), encoding="utf-8")
    assert run("--input", old_file, "--output_dir", tmp_path / "new") == DONE
    out, _ = capsys.readouterr()
    train_args, dataset = tmp_path / "new" / "train_args.toml", tmp_path / "new" / "dataset.toml"
    assert out.startswith(f"train args: {train_args}\ndataset: {dataset}\n")
    config = load(["--config_file", str(train_args)])
    assert f"# dataset: {dataset}" in config.resolved.splitlines()
    assert config.datasets[0].subsets[0].image_dir == Path(PLACES["pictures"])
    said = [line for line in out.splitlines() if line.startswith("left out: ")]
    if text is OLDER:
        assert config.train.save.save_every_n_epochs == 1
        assert config.train.save.output_name == "old_lora"
        for key in (
            "dataset.max_ar",
            "lora.lokr_use_tucker",
            "training.log_every",
            "wandb.enabled",
            "lora.lokr_factor",
        ):
            assert any(line.startswith(f"left out: {key} = ") for line in said), key
        assert any("training.lr_warmup_ratio" in line and "has no effect with lr_scheduler" in line for line in said)
    else:
        assert config.train.save.save_every_n_steps == 200
        assert config.train.network.network_dim == 100000
        assert [line.split(" = ")[0].removeprefix("left out: ") for line in said] == [
            "training.epochs",
            "training.persistent_data_loader_workers",
        ]


def test_the_tool_is_the_command(old_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = Path(__file__).parents[2] / "tools" / "convert_anima_root_to_kohya.py"
    monkeypatch.setattr(sys, "argv", [tool.name, "--input", str(old_file), "--output_dir", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(tool), run_name="__main__")
    assert leaving.value.code == DONE
    assert (tmp_path / "new" / "train_args.toml").is_file()


def test_names_and_the_default_folder(old_file: Path) -> None:
    assert run("--input", old_file, "--train_args_name", "a.toml", "--dataset_name", "b.toml") == DONE
    assert sorted(path.name for path in (old_file.parent / "kohya_converted").iterdir()) == ["a.toml", "b.toml"]


def test_outputs_are_not_overwritten_unless_asked(
    old_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").mkdir()
    mine = tmp_path / "new" / "dataset.toml"
    mine.write_text("mine")
    assert run("--input", old_file, "--output_dir", tmp_path / "new") == FAULTY_INPUT
    assert "dataset.toml exist already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dataset.toml"]
    assert mine.read_text() == "mine"
    assert run("--input", old_file, "--output_dir", tmp_path / "new", "--overwrite") == DONE
    assert "[[datasets]]" in mine.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        ((), None, "cannot be read"),
        ((), "a = ", "line 1: not TOML"),
        ((), "seed = 1\n", "not of the older one-file layout"),
        ((), '[model]\ntransformer_path = "t"\n[dataset]\ndata_dir = "p"\n', "model.t5_tokenizer_dir: required"),
        (("--train_args_name", "a/b.toml"), OLDER, '--train_args_name: expected a file name without "/"'),
        (("--train_args_name", "x.toml", "--dataset_name", "x.toml"), OLDER, "are both x.toml"),
    ],
)
def test_clear_errors_and_nothing_written(
    words: tuple[str, ...], content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "old.toml"
    if content is not None:
        source.write_text(content, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    assert run("--input", source, *words) == FAULTY_INPUT
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_input_is_never_overwritten(old_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = old_file.read_bytes()
    words = ("--output_dir", old_file.parent, "--dataset_name", old_file.name, "--overwrite")
    assert run("--input", old_file, *words) == FAULTY_INPUT
    assert "is the input" in capsys.readouterr().err
    assert old_file.read_bytes() == before


def test_what_the_trainer_does_not_take_is_said(
    old_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tomllib.loads(OLDER.format(**PLACES))
    document["lora"]["lora_rank"] = 0
    document["training"].pop("learning_rate")
    old_file.write_text(toml.dumps(document).replace("C:\\p", "C:/p"), encoding="utf-8")
    assert run("--input", old_file, "--output_dir", tmp_path / "new") == DONE
    out, err = capsys.readouterr()
    assert "dataset.toml" in out
    assert err.startswith("to mend before training, in the new files: The configuration has 2 faults")
    assert "network_dim: expected an integer of at least 1, got 0" in err
    assert "learning_rate: required" in err


@pytest.mark.parametrize("text", [OLDER, NEWER], ids=["older", "newer"])
def test_a_single_file_is_the_same_as_its_conversion(text: str, old_file: Path, tmp_path: Path) -> None:
    old_file.write_text(text.format(**PLACES), encoding="utf-8")
    assert run("--input", old_file, "--output_dir", tmp_path / "new") == DONE
    files = sorted(tmp_path.rglob("*"))
    single = load(["--config_file", str(old_file)])
    two = load(["--config_file", str(tmp_path / "new" / "train_args.toml")])
    assert (single.train, single.datasets) == (two.train, two.datasets)
    assert single.warnings[0].startswith("The file has the older one-file layout")
    assert any("output.save_every" in warning for warning in single.warnings)
    assert any(warning.startswith(("wandb.enabled", "training.epochs")) for warning in single.warnings)
    assert sorted(tmp_path.rglob("*")) == files
    assert load(["--config_file", str(old_file), "--seed", "9"]).train.loop.seed == 9


def test_flags_give_an_effect_to_what_had_none(old_file: Path) -> None:
    """The file's warmup does nothing at a constant rate, which the command line changes."""
    words = ["--config_file", str(old_file)]
    assert values_of(load(words))["lr_warmup_steps"] == 0
    changed = load([*words, "--lr_scheduler", "cosine"])
    assert values_of(changed)["lr_warmup_steps"] == 0.05
    assert not any("lr_warmup_ratio" in warning for warning in changed.warnings)


def test_its_pictures_yield_to_another_dataset_config(old_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "elsewhere"\n')
    run_config = load(["--config_file", str(old_file), "--dataset_config", str(other)])
    (dataset,) = run_config.datasets
    assert (dataset.subsets[0].image_dir, dataset.resolution) == (Path("elsewhere"), (1024, 1024))
    assert dataset.batch_size == 2  # [training] still says so
    assert any(text.startswith('dataset.data_dir = "C:') for text in run_config.warnings)
    without = tomllib.loads(OLDER.format(**PLACES))
    del without["dataset"]
    old_file.write_text(toml.dumps(without), encoding="utf-8")
    assert load(["--config_file", str(old_file), "--dataset_config", str(other)]).datasets == run_config.datasets


def test_faults_of_a_single_file_name_its_own_keys(old_file: Path) -> None:
    document = tomllib.loads(OLDER.format(**PLACES))
    document["lora"] |= {"lora_rank": 0, "network_type": "lokr", "lokr_factor": 0}
    document["training"] |= {"learning_rate": "fast", "batch_size": 0}
    document["dataset"] |= {"resolution": 1, "reso_step": 24, "data_dir": ""}
    old_file.write_text(toml.dumps(document), encoding="utf-8")
    with pytest.raises(InputError) as report:
        load(["--config_file", str(old_file)])
    assert [fault.split(":")[0] for fault in str(report.value).split("\n  - ")[1:]] == [
        "dataset.data_dir",
        "lora.lora_rank",
        "training.learning_rate",
        "lora.lokr_factor",
        "dataset.resolution",
        "training.batch_size",
        "dataset.reso_step",
    ]
