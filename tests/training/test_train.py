"""Whole runs on the miniature, in one process."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from anima_peft.errors import InputError, TrainingError
from anima_peft.miniature import MiniatureFiles
from anima_peft.training import encoding, loop
from anima_peft.training.run import train
from anima_peft.transformer import AnimaTransformerModel

from .conftest import Configure
from .outcomes import events_of, losses_of


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_a_run_leaves_its_files_and_nothing_else(configure: Configure, tmp_path: Path) -> None:
    flags = ["--max_train_epochs", "4", "--save_every_n_epochs", "1", "--save_last_n_epochs", "1"]
    config = configure(*flags, "--save_every_n_steps", "5", "--output_dir", str(tmp_path / "out"))
    result = train(config)

    assert result.steps == 4 * 3  # three buckets of four pictures
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "test-000003.safetensors",
        "test-000004.safetensors",
        "test-config.toml",
        "test-log.jsonl",
        "test-report.html",
        "test-step00000005.safetensors",
        "test-step00000010.safetensors",
        "test.safetensors",
    ]
    assert result.relative_delta > 1e-3
    resolved = (tmp_path / "out" / "test-config.toml").read_text(encoding="utf-8")
    assert resolved == config.resolved
    assert tomllib.loads(resolved)["train_args"]["save_every_n_steps"] == 5
    final, last = load_file(result.adapter), load_file(tmp_path / "out" / "test-000004.safetensors")
    assert final.keys() == last.keys()
    assert all(torch.equal(final[key], last[key]) for key in final)


def test_metadata_says_what_happened(configure: Configure, miniature: MiniatureFiles) -> None:
    flags = ["--max_train_steps", "3", "--gradient_accumulation_steps", "2", "--network_alpha", "2"]
    text = ["--metadata_title", "图", "--training_comment", "a comment", "--timestep_sampling", "uniform"]
    metadata = metadata_of(train(configure(*flags, *text)).adapter)
    expected = {
        "ss_network_module": "networks.lora_anima",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_steps": "3",
        "ss_epoch": "1",
        "ss_num_train_images": "12",
        "ss_num_batches_per_epoch": "3",
        "ss_gradient_accumulation_steps": "2",
        "ss_timestep_sampling": "uniform",
        "ss_training_comment": "a comment",
        "modelspec.title": "图",
        "modelspec.architecture": "anima/lora",
        "modelspec.prediction_type": "flow",
        "modelspec.resolution": "64x64",
    }
    assert {key: metadata.get(key) for key in expected} == expected
    given = json.loads(metadata["anima_peft_config"])
    assert (given["network_alpha"], given["max_train_steps"], given["vae"]) == (2.0, 3, miniature.vae.name)
    assert json.loads(metadata["ss_tag_frequency"])["set"]["white background"] == 6
    assert json.loads(metadata["ss_dataset_dirs"]) == {"set": {"n_repeats": 1, "img_count": 12}}
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"].values()
    assert sum(bucket["count"] for bucket in buckets) == 12


def test_no_metadata_keeps_the_network_only(configure: Configure) -> None:
    metadata = metadata_of(train(configure("--max_train_steps", "1", "--no_metadata")).adapter)
    assert "anima_peft_config" not in metadata
    assert {key for key in metadata if key.startswith("ss_")} == {
        "ss_base_model_version",
        "ss_network_alpha",
        "ss_network_dim",
        "ss_network_module",
    }


def test_encoders_are_loaded_for_what_is_missing_only(
    configure: Configure, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder, ignore=shutil.ignore_patterns(".anima_cache"))
    loaded: list[str] = []
    for name in ("load_vae", "load_text_encoder"):
        real = getattr(encoding, name)
        monkeypatch.setattr(encoding, name, lambda *args, real=real, name=name: (loaded.append(name), real(*args))[1])

    def run(*flags: str) -> list[str]:
        loaded.clear()
        train(configure("--max_train_steps", "1", "--overwrite", *flags, image_dir=folder))
        return list(loaded)

    assert run() == ["load_vae", "load_text_encoder"]
    assert run() == []
    (folder / "00.txt").write_text("another caption", encoding="utf-8")
    assert run() == ["load_text_encoder"]
    (folder / "00.png").write_bytes((folder / "03.png").read_bytes())
    # The same picture in the same bucket has been encoded already, under whatever name.
    assert run() == []
    assert run("--mixed_precision", "bf16") == ["load_vae", "load_text_encoder"]


def test_cached_text_gives_the_same_loss_as_the_conditioner_in_the_loop(configure: Configure, tmp_path: Path) -> None:
    """While it is frozen its output is cached; trained, its inputs are. At the first step both are one function."""
    flags = ["--max_train_epochs", "1", "--learning_rate", "1e-12", "--log_with", "tensorboard"]
    frozen = train(configure(*flags, output_dir=tmp_path / "a"))
    network = ["--network_args", "train_llm_adapter=true"]
    trained = train(configure(*flags, *network, output_dir=tmp_path / "b"))
    assert frozen.log_folder is not None
    assert trained.log_folder is not None
    assert losses_of(trained.log_folder) == pytest.approx(losses_of(frozen.log_folder), abs=1e-5)
    keys = load_file(trained.adapter)
    assert any(key.startswith("lora_unet_llm_adapter_") for key in keys)
    assert not any(key.startswith("lora_unet_llm_adapter_") for key in load_file(frozen.adapter))
    ups = [value for key, value in keys.items() if "llm_adapter" in key and "lora_up" in key]
    assert ups


def test_the_log_holds_every_step(configure: Configure) -> None:
    result = train(configure("--max_train_steps", "4", "--log_with", "tensorboard", "--log_prefix", "p_"))
    assert result.log_folder is not None
    assert result.log_folder.parent.name == "logs"
    assert result.log_folder.name.startswith("p_test_2")
    events = events_of(result.log_folder)
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "gradient_norm", "samples_per_second", "peak_memory_gib"}
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4]
    assert {round(event.value, 6) for event in events.Scalars("lr")} == {5e-3}


def test_gradient_checkpointing_changes_no_number(configure: Configure, tmp_path: Path) -> None:
    flags = ["--max_train_steps", "4"]
    plain = load_file(train(configure(*flags, output_dir=tmp_path / "a")).adapter)
    checkpointed = load_file(train(configure(*flags, "--gradient_checkpointing", output_dir=tmp_path / "b")).adapter)
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)


def test_accumulation_is_the_mean_over_its_batches(configure: Configure, tmp_path: Path) -> None:
    """Three batches of four accumulated give one step; the gradient is that of their mean."""
    flags = ["--max_train_epochs", "1", "--gradient_accumulation_steps", "3"]
    assert train(configure(*flags, output_dir=tmp_path / "a")).steps == 1
    two = train(configure("--max_train_epochs", "1", "--gradient_accumulation_steps", "2", output_dir=tmp_path / "b"))
    assert two.steps == 2  # the last, incomplete group of batches steps too


def test_seed_decides_everything(configure: Configure, tmp_path: Path) -> None:
    def run(name: str, seed: str, *flags: str) -> dict[str, torch.Tensor]:
        flags = ("--max_train_steps", "3", "--seed", seed, *flags)
        return load_file(train(configure(*flags, output_dir=tmp_path / name)).adapter)

    first, again, other = run("a", "1"), run("b", "1", "--max_data_loader_n_workers", "1"), run("c", "2")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_resuming_goes_on_where_the_run_stopped(configure: Configure, tmp_path: Path) -> None:
    through = train(configure("--max_train_steps", "8", output_dir=tmp_path / "through"))
    half = ["--max_train_steps", "5", "--save_state_on_train_end"]
    stopped = train(configure(*half, output_dir=tmp_path / "stopped"))
    state = stopped.adapter.with_name("test-state")
    assert not list(state.glob("model*")), "the frozen base has no place in a state"
    resumed = train(configure("--max_train_steps", "8", "--resume", str(state), output_dir=tmp_path / "stopped"))
    assert resumed.steps == 8
    expected, got = load_file(through.adapter), load_file(resumed.adapter)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_resuming_another_network_is_refused(configure: Configure, tmp_path: Path) -> None:
    state = train(configure("--max_train_steps", "1", "--save_state")).adapter.with_name("test-state")
    with pytest.raises(InputError, match=r"another network: .*LoRA of rank 4.*LoRA of rank 8"):
        train(configure("--max_train_steps", "2", "--network_dim", "8", "--resume", str(state)))


@pytest.mark.parametrize("content", [None, "no json", '{"step": "many", "foo": 1}', "[]"])
def test_what_is_no_state_is_refused(configure: Configure, tmp_path: Path, content: str | None) -> None:
    state = tmp_path / "x-state"
    state.mkdir()
    if content is not None:
        (state / "progress.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="resume"):
        train(configure("--resume", str(state)))


def test_bf16_keeps_the_adapter_in_float32_and_learns(configure: Configure) -> None:
    result = train(configure("--max_train_steps", "6", "--mixed_precision", "bf16"))
    tensors = load_file(result.adapter)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert result.relative_delta > 1e-3
    # Steps as small as these would be lost in bfloat16 numbers of this size.
    down = tensors["lora_unet_blocks_0_self_attn_q_proj.lora_down.weight"]
    assert not torch.equal(down, down.bfloat16().float())


def test_float16_on_the_cpu_says_why_not(configure: Configure) -> None:
    with pytest.raises(InputError, match="graphics card"):
        train(configure("--mixed_precision", "fp16"))


def test_a_loss_that_is_not_finite_stops_the_run(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.batch_loss
    monkeypatch.setattr(loop, "batch_loss", lambda *args: real(*args) * float("nan"))
    with pytest.raises(TrainingError, match=r"loss is nan in step 1.*learning_rate"):
        train(configure("--max_train_steps", "3"))


def test_a_second_run_needs_overwrite(configure: Configure) -> None:
    train(configure("--max_train_steps", "1"))
    with pytest.raises(InputError, match=r"test\.safetensors.*--overwrite"):
        train(configure("--max_train_steps", "1"))
    train(configure("--max_train_steps", "1", "--overwrite"))


def test_captions_over_the_limit_are_reported_by_file(
    configure: Configure, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder, ignore=shutil.ignore_patterns(".anima_cache"))
    (folder / "07.txt").write_text("red circle, " * 40, encoding="utf-8")
    train(configure("--max_train_steps", "1", "--anima_seq_len", "64", image_dir=folder))
    assert any("07.png" in message and "anima_seq_len = 64" in message for message in caplog.messages)


def test_an_empty_caption_trains(configure: Configure, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder, ignore=shutil.ignore_patterns(".anima_cache"))
    captions = list(folder.glob("*.txt"))
    assert len(captions) == 12
    for path in captions:
        path.write_text("", encoding="utf-8")
    for number, network in enumerate(([], ["--network_args", "train_llm_adapter=true"])):
        flags = ["--max_train_epochs", "1", *network]
        result = train(configure(*flags, image_dir=folder, output_dir=tmp_path / str(number)))
        assert result.steps == 3
        assert result.relative_delta > 0


def test_xformers_without_a_card_is_native_with_one_warning(
    configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load_file(train(configure("--max_train_steps", "2", output_dir=tmp_path / "a")).adapter)
    caplog.clear()
    asked = load_file(train(configure("--max_train_steps", "2", "--xformers", output_dir=tmp_path / "b")).adapter)
    assert all(torch.equal(plain[key], asked[key]) for key in plain)
    assert sum("xformers" in message for message in caplog.messages) == 1


def test_only_the_adapter_changes(configure: Configure, miniature: MiniatureFiles, monkeypatch: Any) -> None:
    """The base that was trained on, with its adapter taken off, is bit for bit the file's."""
    models: list[AnimaTransformerModel] = []
    real = AnimaTransformerModel.from_pretrained
    monkeypatch.setattr(
        AnimaTransformerModel, "from_pretrained", lambda *a, **k: models.append(real(*a, **k)) or models[-1]
    )
    train(configure("--max_train_steps", "5"))
    models[0].unload_lora()
    trained, base = models[0].state_dict(), real(miniature.transformer).state_dict()
    assert trained.keys() == base.keys()
    assert all(torch.equal(trained[key], base[key]) for key in base)


LOKR = ["--network_module", "networks.lokr_anima", "--network_dim", "100000", "--network_alpha", "1"]


@pytest.mark.parametrize("style", ["kohya", "comfy", "diffusers"])
def test_lokr_sentinel_trains_and_loads_back(configure: Configure, miniature: MiniatureFiles, style: str) -> None:
    result = train(configure("--max_train_steps", "6", *LOKR, "--save_format", style))
    assert result.relative_delta > 1e-3, "alpha 1 over dimension 100000 must not scale the adapter away"
    metadata = metadata_of(result.adapter)
    assert metadata["ss_network_module"] == "networks.lokr_anima"
    assert metadata["ss_network_dim"] == "100000"
    assert metadata["ss_network_alpha"] == "1.0"
    assert json.loads(metadata["ss_network_args"])["full_matrix"] == "True"
    tensors = load_file(result.adapter)
    assert sum(key.endswith(".w_norm") for key in tensors) == 9
    assert sum(key.endswith(".lokr_w1") for key in tensors) == sum(key.endswith(".lokr_w2") for key in tensors) == 20
    model = AnimaTransformerModel.from_pretrained(miniature.transformer)
    inputs = (torch.randn(1, 16, 8, 8), torch.tensor([0.5]), torch.randn(1, 512, 64))
    with torch.no_grad():
        before = model(*inputs)
        model.load_lora_adapter(result.adapter)
        assert (model(*inputs) - before).norm() > 1e-3 * before.norm()


def test_lokr_options_reach_the_layers(configure: Configure) -> None:
    args = ["--network_args", "lokr_factor=4", "lokr_decompose_both=true", "train_norm=false"]
    network = ["--network_module", "networks.lokr_anima", "--network_dim", "1", "--network_alpha", "1"]
    tensors = load_file(train(configure("--max_train_steps", "1", *network, *args)).adapter)
    assert tensors["lora_unet_blocks_0_self_attn_q_proj.lokr_w1_a"].shape == (4, 1)
    assert tensors["lora_unet_blocks_0_self_attn_q_proj.lokr_w2_b"].shape == (1, 16)
    assert not any(key.endswith("_norm") for key in tensors)


@pytest.mark.parametrize("network", [[], LOKR], ids=["LoRA", "LoKr"])
def test_a_state_resumes_every_kind_exactly(configure: Configure, tmp_path: Path, network: list[str]) -> None:
    # An alpha that float32 cannot hold: states keep it in that precision.
    network = [*network] if network else ["--network_alpha", "0.7"]
    through = train(configure("--max_train_steps", "5", *network, output_dir=tmp_path / "a"))
    half = ["--max_train_steps", "2", "--save_state_on_train_end", *network]
    state = train(configure(*half, output_dir=tmp_path / "b")).adapter.with_name("test-state")
    resumed = train(configure("--max_train_steps", "5", "--resume", str(state), *network, output_dir=tmp_path / "b"))
    expected, got = load_file(through.adapter), load_file(resumed.adapter)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_network_weights_are_the_start(configure: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = train(configure("--max_train_steps", "4", output_dir=tmp_path / "a"))
    caplog.clear()
    flags = ["--max_train_steps", "1", "--learning_rate", "1e-12", "--network_weights", str(first.adapter)]
    second = train(configure(*flags, output_dir=tmp_path / "b"))
    assert sum("Started from" in message for message in caplog.messages) == 1
    before, after = load_file(first.adapter), load_file(second.adapter)
    for key in before:
        torch.testing.assert_close(after[key], before[key], atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match=r"cannot be started from"):
        train(configure("--network_weights", str(first.adapter), "--network_dim", "3", output_dir=tmp_path / "c"))


def test_norms_get_no_weight_decay(configure: Configure, tmp_path: Path) -> None:
    """With a decay that wipes everything out in one step, only what is not decayed is left."""
    flags = ["--max_train_steps", "2", "--optimizer_args", "weight_decay=200"]
    tensors = load_file(train(configure(*flags)).adapter)
    downs = [value for key, value in tensors.items() if key.endswith("lora_down.weight")]
    norms = [value for key, value in tensors.items() if key.endswith("w_norm")]
    assert max(value.abs().max() for value in downs) < 0.02
    assert min(value.abs().max() for value in norms) > 4e-3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "1e-3"], "learning_rate is 0.001, and was 0.005"),
        (["--optimizer_args", "betas=(0.5,0.9)"], r"optimizer_args is \['betas=\(0.5,0.9\)'\], and was \[\]"),
        (["--mixed_precision", "bf16"], "mixed_precision is 'bf16', and was 'no'"),
        (["--max_train_steps", "1"], "stands at step 1, and the run ends at step 1"),
    ],
)
def test_a_state_is_not_continued_with_what_it_would_override(
    configure: Configure, tmp_path: Path, flags: list[str], message: str
) -> None:
    state = train(configure("--max_train_steps", "1", "--save_state")).adapter.with_name("test-state")
    given = flags if "--max_train_steps" in flags else ["--max_train_steps", "2", *flags]
    with pytest.raises(InputError, match=message):
        train(configure("--resume", str(state), *given))


def test_an_incomplete_state_is_refused(configure: Configure) -> None:
    state = train(configure("--max_train_steps", "1", "--save_state")).adapter.with_name("test-state")
    (state / "optimizer.bin").unlink()
    with pytest.raises(InputError, match="incomplete or damaged"):
        train(configure("--max_train_steps", "2", "--resume", str(state)))


def test_resuming_into_another_folder_touches_no_run_there(configure: Configure, tmp_path: Path) -> None:
    flags = ["--save_state", "--save_every_n_steps", "1", "--save_last_n_steps", "1"]
    first = train(configure("--max_train_steps", "2", *flags, output_dir=tmp_path / "a"))
    other = train(configure("--max_train_steps", "2", "--seed", "7", *flags, output_dir=tmp_path / "b"))
    kept = {path: path.read_bytes() for path in (tmp_path / "b").glob("*.safetensors")}
    state = str(first.adapter.with_name("test-state"))
    with pytest.raises(InputError, match="already holds"):
        train(configure("--max_train_steps", "3", "--resume", state, *flags, output_dir=tmp_path / "b"))
    assert {path: path.read_bytes() for path in other.adapter.parent.glob("*.safetensors")} == kept


def test_resuming_under_another_name_touches_no_run_of_that_name(configure: Configure) -> None:
    flags = ["--save_state", "--save_every_n_steps", "1", "--save_last_n_steps", "1"]
    first = train(configure("--max_train_steps", "2", *flags)).adapter
    of_other = first.with_name("other.safetensors")
    of_other.write_bytes(b"another run's")
    more = ["--max_train_steps", "4", "--resume", str(first.with_name("test-state")), *flags, "--output_name", "other"]
    with pytest.raises(InputError, match="already holds other"):
        train(configure(*more))
    assert of_other.read_bytes() == b"another run's"
    of_other.unlink()
    before = set(first.parent.iterdir())
    assert train(configure(*more)).steps == 4
    assert before <= set(first.parent.iterdir())


@pytest.mark.parametrize("option", ["--output_dir", "--logging_dir"])
def test_a_folder_that_cannot_be_written_is_found_first(configure: Configure, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{option[2:]}: .*cannot be written to"):
        train(configure(option, str(tmp_path / "file" / "out"), "--log_with", "tensorboard"))
