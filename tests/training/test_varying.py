"""Runs whose captions and pictures vary by sample: kept beforehand or encoded in the steps, it is the same run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from anima_peft.data.dataset import stack_text
from anima_peft.miniature import MiniatureFiles
from anima_peft.models.sources import resolve_sources
from anima_peft.training import encoding, loop, text_plan
from anima_peft.training.encoding import TextModels
from anima_peft.training.losses import FlowLoss
from anima_peft.training.run import train
from anima_peft.transformer import AnimaTransformerModel
from tests.components import miniature_pipeline

from .conftest import Configure
from .outcomes import losses_of

CAPTIONS = """
shuffle_caption = true
caption_tag_dropout_rate = 0.2
caption_dropout_rate = 0.2
token_warmup_step = 0.5
enable_wildcard = true
caption_prefix = "{one|another} drawing,"
"""
PICTURES = "color_aug = true\nrandom_crop = true\nflip_aug = true\n"
# so small a rate that the losses are those of the model as it was
STILL = ["--log_with", "tensorboard", "--learning_rate", "1e-12", "--max_train_epochs", "2"]


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """Pictures with a cache of their own."""
    target = tmp_path / "own 图"
    shutil.copytree(pictures, target, ignore=shutil.ignore_patterns(".anima_cache"))
    return target


def losses(configure: Configure, name: Path, *flags: str, **options: Any) -> list[float]:
    return losses_of(train(configure(*STILL, *flags, output_dir=name, **options)).log_folder)


@pytest.mark.parametrize("network", [[], ["--network_args", "train_llm_adapter=true"]], ids=["frozen", "trained"])
def test_varying_captions_kept_and_in_the_steps(
    configure: Configure, folder: Path, tmp_path: Path, network: list[str]
) -> None:
    options = {"image_dir": folder, "subset": CAPTIONS}
    kept = losses(configure, tmp_path / "a", "--cache_text_encoder_outputs", *network, **options)
    live = losses(configure, tmp_path / "b", "--no-cache_text_encoder_outputs", *network, **options)
    assert live == pytest.approx(kept, abs=2e-5)
    plain = losses(configure, tmp_path / "c", *network, image_dir=folder)
    assert max(abs(one - other) for one, other in zip(kept, plain, strict=True)) > 1e-4


def test_varying_pictures_whatever_is_kept(configure: Configure, folder: Path, tmp_path: Path) -> None:
    kept = losses(configure, tmp_path / "a", image_dir=folder, subset="flip_aug = true")
    live = losses(configure, tmp_path / "b", "--no-cache_latents", image_dir=folder, subset="flip_aug = true")
    assert live == pytest.approx(kept, abs=2e-5)
    varied = losses(configure, tmp_path / "c", image_dir=folder, subset=PICTURES)
    assert varied != pytest.approx(kept, abs=1e-4)
    assert varied == losses(
        configure, tmp_path / "d", "--max_data_loader_n_workers", "1", image_dir=folder, subset=PICTURES
    )


def test_resuming_goes_on_with_the_same_captions(configure: Configure, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_dir": folder, "subset": CAPTIONS.replace("0.5", "6") + PICTURES}
    through = train(configure("--max_train_steps", "8", output_dir=tmp_path / "a", **options))
    half = ["--max_train_steps", "5", "--save_state_on_train_end"]
    state = train(configure(*half, output_dir=tmp_path / "b", **options)).adapter.with_name("test-state")
    resumed = train(configure("--max_train_steps", "8", "--resume", str(state), output_dir=tmp_path / "b", **options))
    expected, got = load_file(through.adapter), load_file(resumed.adapter)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_what_is_kept_is_decided_and_said(
    configure: Configure,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded: list[list[str]] = []
    real = encoding._caption_encoder

    def counting(*args: Any) -> Any:
        encode = real(*args)
        return lambda captions: (encoded.append(captions), encode(captions))[1]

    monkeypatch.setattr(encoding, "_caption_encoder", counting)

    def said(name: str, *flags: str, subset: str) -> str:
        encoded.clear()
        train(configure(*flags, "--max_train_steps", "3", output_dir=tmp_path / name, image_dir=folder, subset=subset))
        return capsys.readouterr().out

    text = said("a", subset="")
    assert "Captions are encoded before training and kept: 12 different captions, about" in text
    assert "Latents are encoded before training and kept: those of all 12 pictures." in text
    assert "3 steps in an epoch; 3 steps in all, 1 epochs." in text
    text = said("b", subset=CAPTIONS)
    assert "different captions of 12 pictures, those of 12 vary, about" in text
    monkeypatch.setattr(text_plan, "MOST_KEPT", 1000)
    text = said("c", subset=CAPTIONS)
    assert "Captions are encoded in every step, because kept they would take more than 1 KiB" in text
    assert len(encoded) == 3  # one batch a step
    text = said("d", "--cache_text_encoder_outputs", subset=CAPTIONS)
    assert "Captions are encoded before training and kept" in text
    assert encoded == []  # they were kept by the second run
    text = said("e", "--no-cache_text_encoder_outputs", subset="random_crop = true\n")
    assert "Captions are encoded in every step: the text encoder stays in memory (" in text
    assert "pictures are encoded in every step (color_aug or random_crop vary them): the VAE stays" in text
    assert "The pixels of 12 of 12 pictures are encoded in every step (cache_latents = false)" in said(
        "f", "--no-cache_latents", subset=""
    )


def test_a_dropped_caption_is_the_pipelines_empty_prompt(miniature: MiniatureFiles) -> None:
    """What guidance subtracts is what dropout trains: same rows, same padding, to the last bit."""
    sources = resolve_sources(
        str(miniature.transformer),
        vae=str(miniature.vae),
        qwen=str(miniature.text_encoder),
        qwen_tokenizer_dir=str(miniature.tokenizer),
        t5_tokenizer_dir=str(miniature.t5_tokenizer),
    )
    model = AnimaTransformerModel.from_pretrained(sources.transformer)
    text = TextModels(sources, model, "", torch.float32, torch.device("cpu"), max_length=512, train_conditioner=False)
    trained = stack_text(text.encoder()(["", "red circle"]))["prompt_embeds"]
    pipe = miniature_pipeline(miniature)
    assert torch.equal(trained[:1], pipe.encode_prompt(""))
    assert not torch.equal(trained[:1], trained[1:])


def test_captions_cut_in_the_steps_are_reported_too(
    configure: Configure, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "07.txt").write_text("red circle, " * 40, encoding="utf-8")
    train(
        configure(
            "--max_train_steps", "1", "--anima_seq_len", "64", "--no-cache_text_encoder_outputs", image_dir=folder
        )
    )
    assert any("07.png" in message and "anima_seq_len = 64" in message for message in caplog.messages)


def test_a_masked_loss_counts_only_what_is_white() -> None:
    prediction, target = torch.randn(3, 16, 4, 6), torch.randn(3, 16, 4, 6)
    mask = torch.rand(3, 1, 4, 6)
    mask[0], mask[1] = 0, 1
    for kind in ("l2", "l1", "huber", "smooth_l1"):
        loss = FlowLoss(kind)  # type: ignore[arg-type]
        sigma = torch.tensor([0.0, 0.5, 1.0])
        whole, masked = loss(prediction, target, sigma), loss(prediction, target, sigma, mask)
        assert masked[0] == 0
        assert masked[1] == whole[1]
        assert 0 < masked[2] < whole[2]
    expected = ((prediction - target).double().square() * mask).mean((1, 2, 3))
    assert torch.allclose(FlowLoss()(prediction, target, torch.ones(3), mask).double(), expected)


def test_an_empty_mask_trains_nothing_and_breaks_nothing(configure: Configure, folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for picture in folder.glob("*.png"):
        with Image.open(picture) as image:
            Image.new("L", image.size, 0).save(masks / picture.name)
    subset = f"conditioning_data_dir = '{masks}'\n"
    flags = ["--masked_loss", "--max_train_steps", "2", "--optimizer_args", "weight_decay=0"]
    result = train(configure(*flags, image_dir=folder, subset=subset))
    assert result.relative_delta == 0
    assert all(tensor.isfinite().all() for tensor in load_file(result.adapter).values())


def test_regularisation_pictures_weigh_what_was_asked_for(
    configure: Configure, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 pictures and 12 for regularisation; what reaches the model and the loss of each batch."""
    others = tmp_path / "others"
    shutil.copytree(folder, others)
    weights: list[float] = []
    real = loop.batch_loss

    def recording(model: Any, batch: dict[str, torch.Tensor], loss: Any) -> torch.Tensor:
        weights.extend(batch["loss_weight"].tolist())
        whole = real(model, {**batch, "loss_weight": torch.ones_like(batch["loss_weight"])}, loss)
        assert (real(model, batch, loss) < whole) == bool((batch["loss_weight"] < 1).any())
        return whole

    monkeypatch.setattr(loop, "batch_loss", recording)
    subset = f"[[datasets.subsets]]\nimage_dir = '{others}'\nis_reg = true\n"
    train(configure("--max_train_epochs", "1", "--prior_loss_weight", "0.25", image_dir=folder, subset=subset))
    assert sorted(weights) == [0.25] * 12 + [1.0] * 12
