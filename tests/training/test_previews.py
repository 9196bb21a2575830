"""Pictures drawn while training: what they show, where they are, and that training does not notice them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from anima_peft.miniature import MiniatureFiles
from anima_peft.training import previews
from anima_peft.training.run import train
from tests.components import miniature_pipeline

from .conftest import Configure
from .outcomes import events_of, losses_of

PROMPTS = """# two of them
red circle, white background --w 64 --h 64 --s 2 --l 2 --d 5

blue square --w 32 --h 64 --s 2 --l 1
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "提示 词.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def test_training_is_the_same_to_the_last_bit_with_previews(
    configure: Configure, prompts: Path, tmp_path: Path
) -> None:
    """Also with dropout, which draws from the random state that previews must not touch."""
    flags = ["--max_train_steps", "4", "--log_with", "tensorboard", "--network_dropout", "0.3", "--use_ema"]
    flags += ["--network_args", "train_llm_adapter=true"]
    plain = train(configure(*flags, output_dir=tmp_path / "plain"))
    times = ["--sample_prompts", str(prompts), "--sample_at_first", "--sample_every_n_steps", "2"]
    drawn = train(configure(*flags, *times, output_dir=tmp_path / "drawn"))
    assert losses_of(plain.log_folder) == losses_of(drawn.log_folder)
    one, other = load_file(plain.adapter), load_file(drawn.adapter)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    names = sorted(path.name for path in (tmp_path / "drawn" / "sample").iterdir())
    assert names == [f"test-step0000000{step}-0{number}.png" for step in (0, 2, 4) for number in (1, 2)]
    tags = events_of(drawn.log_folder).Tags()["images"]
    assert tags == ["preview 1: red circle, white background", "preview 2: blue square"]
    assert len(events_of(drawn.log_folder).Images(tags[0])) == 3
    assert drawn.previews == tmp_path / "drawn" / "test-previews.png"
    with Image.open(drawn.previews) as strip:
        assert strip.width > 3 * 160


def test_a_preview_is_what_the_pipeline_draws_with_the_saved_file(
    configure: Configure, prompts: Path, miniature: MiniatureFiles, tmp_path: Path
) -> None:
    flags = ["--max_train_steps", "3", "--sample_prompts", str(prompts), "--sample_every_n_steps", "3", "--use_ema"]
    result = train(configure(*flags, "--learning_rate", "2e-2"))
    assert result.previews is None  # one time makes no strip
    pipe = miniature_pipeline(miniature)
    pipe.set_progress_bar_config(disable=True)

    def difference() -> int:
        generator = torch.Generator("cpu").manual_seed(5)
        size: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 2.0}
        expected = pipe("red circle, white background", generator=generator, **size).images[0]
        with Image.open(result.adapter.parent / "sample" / "test-step00000003-01.png") as found:
            return int(np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int)).max())

    without = difference()
    pipe.load_lora_weights(result.adapter)
    assert difference() <= 1 < without


def test_without_memory_training_goes_on(
    configure: Configure, prompts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(previews, "decode_latents", full)
    result = train(configure("--max_train_steps", "2", "--sample_prompts", str(prompts), "--sample_every_n_steps", "1"))
    assert result.steps == 2
    assert "there was no memory for previews (CUDA out of memory" in caplog.text
    assert not (result.adapter.parent / "sample").exists()


def test_epochs_and_a_resumed_run_share_one_strip(configure: Configure, prompts: Path, tmp_path: Path) -> None:
    times = ["--sample_prompts", str(prompts), "--sample_every_n_epochs", "1", "--save_state_on_train_end"]
    first = train(configure("--max_train_epochs", "1", *times))
    again = train(configure("--max_train_epochs", "2", *times, "--resume", "latest"))
    assert first.previews is None
    assert again.previews is not None
    assert len(list((again.adapter.parent / "sample").iterdir())) == 4


def test_an_overwritten_run_draws_anew(configure: Configure, prompts: Path) -> None:
    """Pictures of the run before are neither taken for its own nor put into its strip."""
    times = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "1"]
    first = train(configure("--max_train_steps", "3", *times))
    picture = first.adapter.parent / "sample" / "test-step00000001-01.png"
    before = picture.read_bytes()
    again = train(configure("--max_train_steps", "1", *times, "--overwrite", "--learning_rate", "0.5"))
    assert picture.read_bytes() != before
    assert again.previews is None  # one time, whatever lies beside it


def test_a_file_in_the_runs_folder_asks_for_previews(
    configure: Configure, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(self: previews.Previews, step: int, average: Any) -> None:
        if step == 2:
            self._outputs.folder.mkdir(exist_ok=True)
            (self._outputs.folder / "test-preview.txt").touch()

    monkeypatch.setattr(previews.Previews, "after_step", ask)
    result = train(configure("--max_train_steps", "3", "--sample_prompts", str(prompts), "--sample_every_n_steps", "9"))
    drawn = sorted(path.name for path in (result.adapter.parent / "sample").iterdir())
    assert drawn == ["test-step00000002-01.png", "test-step00000002-02.png"]
    assert not (result.adapter.parent / "test-preview.txt").exists()


def test_a_full_card_leaves_decoding_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device "meta" stands for a card without room."""
    places: list[str] = []

    class Vae:
        def to(self, device: torch.device | str) -> Vae:
            places.append(str(device))
            return self

    def decode(vae: Vae, latents: torch.Tensor) -> torch.Tensor:
        if latents.device.type == "meta":
            raise torch.OutOfMemoryError
        return latents + 1

    monkeypatch.setattr(previews, "decode_latents", decode)
    drawing = object.__new__(previews.Previews)
    drawing._pipe, drawing._decodes_on = SimpleNamespace(vae=Vae()), torch.device("meta")  # type: ignore[assignment]
    latents = torch.zeros(1, 16, 2, 2)
    assert torch.equal(drawing._decode(latents), latents + 1)
    assert places[-1] == "cpu"
    assert torch.equal(drawing._decode(latents), latents + 1)  # the card is not tried again
    assert places.count("meta") == 1
    assert caplog.text.count("Previews are decoded on the CPU") == 1
