"""`anima-peft check`: what it says of a dataset, what it draws, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anima_peft.cli import DONE, FAULTY_INPUT, main
from anima_peft.data import DatasetSpec, SubsetSpec, scan
from anima_peft.data.duplicates import near_duplicates
from anima_peft.miniature import MiniatureFiles
from anima_peft.training import measuring
from tests.training.conftest import DATASET

TRAIN_ARGS = """
anima_transformer = '{m.transformer}'
vae = '{m.vae}'
qwen = '{m.text_encoder}'
qwen_tokenizer_dir = '{m.tokenizer}'
t5_tokenizer_dir = '{m.t5_tokenizer}'
network_module = "networks.lora_anima"
learning_rate = 1e-3
max_train_epochs = 5
mixed_precision = "no"
output_dir = '{folder}/out'
output_name = "test"
"""

Check = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pictures(miniature: MiniatureFiles, tmp_path: Path) -> Path:
    return Path(shutil.copytree(miniature.pictures, tmp_path / "pictures 图"))


@pytest.fixture
def check(miniature: MiniatureFiles, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs the command on the pictures; `subset` and `train` are further lines of the files."""

    def run(*words: str, subset: str = "", train: str | None = None) -> tuple[int, str, str]:
        dataset = tmp_path / "dataset.toml"
        dataset.write_text(DATASET.format(image_dir=pictures) + subset, encoding="utf-8")
        argv = ["check", "--dataset_config", str(dataset)]
        if train is not None:
            file = tmp_path / "train.toml"
            file.write_text(TRAIN_ARGS.format(m=miniature, folder=tmp_path) + train, encoding="utf-8")
            argv += ["--config_file", str(file)]
        code = main([*argv, *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_dataset_on_its_own(check: Check, pictures: Path) -> None:
    (pictures / "03.txt").write_text("one red circle, white background, " + "long, " * 30, encoding="utf-8")
    (pictures / "04.txt").write_text("", encoding="utf-8")
    shutil.copy(pictures / "00.png", pictures / "copy.png")
    code, out, _ = check()
    assert code == DONE
    assert [line.split() for line in out.splitlines()[:6]] == [
        ["dataset", "bucket", "pictures", "samples", "batches", "cropped", "enlarged"],
        ["-" * 63],
        ["0", "48", "x", "80", "4", "4", "1", "9.4%", "0"],
        ["0", "64", "x", "64", "5", "5", "2", "0.0%", "0"],
        ["0", "80", "x", "48", "4", "4", "1", "9.4%", "0"],
        ["3", "sizes", "13", "13", "4", "5.8%", "0"],
    ]
    assert "4 steps in an epoch." in out
    # 8 of 48 x 80 pixels and 4 of 64 x 64: 16 channels of float32 for every 64 pixels; equal pictures once
    assert f"Latents to keep: 12, {(8 * 48 * 80 + 4 * 64 * 64) / 1024:.0f} KiB on disk." in out
    assert "Captions: 12 different, 2 empty" in out
    assert "03.png" in next(line for line in out.splitlines() if "longest" in line)
    assert "      6  white background" in out
    assert "Pictures that look alike: 1 pairs" in out
    assert f"  {pictures / '00.png'}\n  {pictures / 'copy.png'}" in out
    assert "Measured" not in out


def test_with_train_args_steps_and_captions_are_those_of_the_run(check: Check) -> None:
    code, out, _ = check(subset="caption_dropout_rate = 1.0\n", train="gradient_accumulation_steps = 2\n")
    assert code == DONE
    assert "2 steps of 2 batches in an epoch; 10 steps in all, 5 epochs." in out
    assert "Captions are encoded before training and kept: 1 different captions of 12 pictures, those of 12 vary" in out


def test_pictures_held_out_are_counted_apart(check: Check) -> None:
    code, out, _ = check(train="validation_split = 0.25\nvalidate_every_n_steps = 5\n")
    assert code == DONE
    assert "3 pictures are held out for validation and left out below." in out
    assert "9 different captions" in out or "all 9 pictures" in out


def test_pictures_that_vary_are_not_counted_as_kept(check: Check) -> None:
    _, out, _ = check(subset="random_crop = true\nflip_aug = true\n", train="")
    assert "Latents to keep: 8, " in out  # the square ones, plain and mirrored
    assert "Pictures that pass through the VAE in every step: 8." in out


def test_drawings_are_written_and_not_overwritten(check: Check, tmp_path: Path) -> None:
    folder = tmp_path / "drawn 画"
    code, _, _ = check("--save", str(folder))
    assert code == DONE
    assert sorted(path.name for path in folder.iterdir()) == ["contact_sheet.png", "summary.png"]
    with Image.open(folder / "contact_sheet.png") as sheet, Image.open(folder / "summary.png") as table:
        assert sheet.size[0] == 6 * 176 + 8
        assert sheet.size[1] == 2 * 210 + 8
        red = (np.asarray(sheet.convert("RGB")) == (220, 40, 40)).all(2)
        assert 12 * 400 < red.sum() < 12 * 168 * 8  # a frame in each cell
        assert np.asarray(table.convert("L")).std() > 10
    code, _, err = check("--save", str(folder))
    assert code == FAULTY_INPUT
    assert "contact_sheet.png" in err
    assert "--overwrite" in err
    assert check("--save", str(folder), "--overwrite")[0] == DONE


def test_all_faults_come_together(check: Check, pictures: Path) -> None:
    (pictures / "00.png").write_bytes(b"no picture")
    (pictures / "01.txt").write_bytes("日本".encode("shift-jis"))
    code, out, err = check()
    assert (code, out) == (FAULTY_INPUT, "")
    assert "00.png: cannot read this picture" in err
    assert "01.txt: this caption file is not UTF-8" in err
    code, _, err = check(subset="num_repeats = 0\nfoo = 1\n")
    assert code == FAULTY_INPUT
    assert "The configuration has 2 faults" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check"], "--dataset_config is required"),
        (["check", "--dataset_config", "d.toml", "--measure"], "--measure needs --config_file"),
    ],
)
def test_what_is_missing_is_said(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == FAULTY_INPUT
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("train", ["", "network_args = ['train_llm_adapter=true']\n"], ids=["frozen", "trained"])
def test_measuring_times_every_bucket_and_writes_nothing(
    check: Check,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    train: str,
) -> None:
    (pictures / "09.txt").write_text("red circle, " * 40, encoding="utf-8")
    seconds = iter([1.0, 2.0, 3.0, 0.5, 0.25, 4.0])  # of the VAE, then of a batch, for the three buckets
    real = measuring._seconds
    monkeypatch.setattr(measuring, "_seconds", lambda action, device: (real(action, device), next(seconds))[1])
    monkeypatch.setattr(measuring, "_STEPS", 2)
    code, out, _ = check("--measure", subset="flip_aug = true\n", train=f"anima_seq_len = 64\n{train}")
    assert code == DONE
    lines = [line.split() for line in out.partition("Measured on this machine")[2].splitlines()]
    assert ["48", "x", "80", "4", "1.000", "0.500"] in lines
    assert ["80", "x", "48", "4", "3.000", "4.000"] in lines
    assert "Encoding 24 pictures: about 48 s" in out  # 2 s on average
    assert "Training: about 24 s" in out  # 5 epochs of 4.75 s
    assert "GiB (cpu)." in out
    assert "09.png" in caplog.text
    assert "anima_seq_len = 64" in caplog.text
    assert not (tmp_path / "out").exists()
    assert not list(pictures.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("attn_mode = 'flash'\n", 'attn_mode: "flash" cannot be had: it needs a CUDA device'),
        ("network_weights = 'none.safetensors'\n", "none.safetensors: no such adapter file"),
    ],
)
def test_measuring_refuses_what_a_run_refuses_before_loading(
    check: Check, monkeypatch: pytest.MonkeyPatch, train: str, message: str
) -> None:
    monkeypatch.setattr(measuring, "locate_sources", None)  # not reached
    code, _, err = check("--measure", train=train)
    assert code == FAULTY_INPUT
    assert message in err


def drawn(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture of large patches, as no other seed gives it."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def test_copies_are_found_whatever_became_of_them_and_others_are_not(tmp_path: Path) -> None:
    for seed in range(40):
        drawn(seed).save(tmp_path / f"{seed:02d}.png")
    drawn(3).save(tmp_path / "x_format.jpg", quality=70)
    drawn(5).resize((48, 32), Image.Resampling.LANCZOS).save(tmp_path / "y_size.png")
    Image.eval(drawn(7), lambda level: min(255, level + 6)).save(tmp_path / "z_light.png")
    for name, colour in (("flat1", "white"), ("flat2", "black"), ("flat3", "red")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    specs = [DatasetSpec((SubsetSpec(tmp_path, class_tokens="x"),), (side, side)) for side in (64, 32)]
    pairs = near_duplicates(scan(specs, progress=False), progress=False)
    assert {(one.stem, other.stem) for one, other in pairs} == {
        ("03", "x_format"),
        ("05", "y_size"),
        ("07", "z_light"),
    }
