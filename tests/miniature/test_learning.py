"""Adapters learn on the trained miniature, and faults of old keep them from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file

from anima_peft.adapters.lokr import LoKrLinear
from anima_peft.data.dataset import CachedDataset
from anima_peft.miniature import MiniatureFiles, figure_exam
from anima_peft.pipeline import AnimaPipeline
from anima_peft.training import loop, run
from anima_peft.transformer import AnimaTransformerModel

from .conftest import NETWORKS, Teach, ask

Options = Mapping[str, str]
SHORT = {"max_train_steps": "150", "learning_rate": "2.5e-3"}
ALPHA = {"network_alpha": "4", "learning_rate": "8e-3"}
STEADY = {"lr_scheduler": "constant", "lr_warmup_steps": "0"}
SENTINEL = NETWORKS["lokr full"] | {"network_alpha": "1", "max_train_steps": "400", "learning_rate": "1e-2"}


def check_learns(teach: Teach, trained: MiniatureFiles, pipe: AnimaPipeline, folder: Path, options: Options) -> None:
    """A short run teaches the figure and leaves the rest: what must fail where something is wrong.

    The folder's captions are wrong at first, and cached, the figure's those of other pictures; then they are put right.
    """
    pictures = folder / "figure"
    shutil.copytree(trained.figure, pictures)
    captions = sorted(pictures.glob("*.txt"))
    right = [path.read_bytes() for path in captions]
    for path, other in zip(captions, right[16:] + right[:16], strict=True):
        path.write_bytes(other)
    teach(pictures, STEADY | {"max_train_steps": "8"})  # an epoch: every caption
    for path, own in zip(captions, right, strict=True):
        path.write_bytes(own)
    adapter = teach(pictures, SHORT | options)

    figure = figure_exam()[:16]
    pipe.load_lora_weights(adapter, adapter_name="figure")
    result = ask(pipe, figure)
    assert result.share >= 0.2, result
    pipe.disable_lora()
    assert ask(pipe, figure).right == 0


def check_small_steps(teach: Teach, trained: MiniatureFiles, *_: Any) -> None:
    """Steps far smaller than bfloat16's distance between numbers are not lost."""
    slow = STEADY | {"learning_rate": "1e-6"}
    one, four = (load_file(teach(trained.figure, slow | {"max_train_steps": steps})) for steps in ("1", "4"))
    downs = [key for key in one if key.endswith("lora_down.weight")]
    assert all((one[key] != four[key]).float().mean() > 0.5 for key in downs)


def test_miniature_learns_a_figure_in_a_minute(
    teach: Teach, trained: MiniatureFiles, pipe: AnimaPipeline, tmp_path: Path
) -> None:
    check_learns(teach, trained, pipe, tmp_path, {})


def test_miniature_small_steps_count(teach: Teach, trained: MiniatureFiles) -> None:
    check_small_steps(teach, trained)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [ALPHA, SENTINEL], ids=["alpha", "sentinel"])
def test_miniature_learns_with_another_scale(
    options: Options, teach: Teach, trained: MiniatureFiles, pipe: AnimaPipeline, tmp_path: Path
) -> None:
    check_learns(teach, trained, pipe, tmp_path, options)


def plant_sigma_times_1000(patch: pytest.MonkeyPatch) -> None:
    forward = AnimaTransformerModel.forward
    patch.setattr(
        AnimaTransformerModel, "forward", lambda self, x, sigma, *a, **k: forward(self, x, sigma * 1000, *a, **k)
    )


def plant_target_sign(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loop, "velocity", lambda latents, noise: latents - noise)


def plant_alpha_ignored(patch: pytest.MonkeyPatch) -> None:
    real = AnimaPipeline.load_lora_weights

    def load(self: AnimaPipeline, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        for part in (self.transformer, self.text_conditioner):
            for module in part.modules():
                if isinstance(module, LoraLayer):
                    module.scaling = dict.fromkeys(module.scaling, 1.0)

    patch.setattr(AnimaPipeline, "load_lora_weights", load)


def plant_text_padding(patch: pytest.MonkeyPatch) -> None:
    """The rows after the text hold what the last row of it holds."""
    from anima_peft import pipeline

    real = pipeline.condition_text

    def padded(conditioner: Any, text: Any) -> torch.Tensor:
        embeds = real(conditioner, text)
        for row, length in zip(embeds, text.t5_attention_mask.sum(1).tolist(), strict=True):
            row[length:] = row[length - 1]
        return embeds

    patch.setattr(pipeline, "condition_text", padded)


def plant_bf16_adapter(patch: pytest.MonkeyPatch) -> None:
    real = run.add_network

    def narrow(*args: Any) -> list[torch.nn.Parameter]:
        parameters = real(*args)
        for parameter in parameters:
            parameter.data = parameter.data.bfloat16()
        return parameters

    patch.setattr(run, "add_network", narrow)


def change_captions(patch: pytest.MonkeyPatch, change: Callable[[Any, dict[str, str]], dict[str, str]]) -> None:
    """Let the entries of encoded captions, by their texts, be others: `change(pictures, entries)`."""
    real = CachedDataset.__init__

    def changed(self: CachedDataset, pictures: Any, latents: Any, captions: Any, *rest: Any, **options: Any) -> None:
        real(self, pictures, latents, change(pictures, captions), *rest, **options)

    patch.setattr(CachedDataset, "__init__", changed)


def plant_captions_mixed_up(patch: pytest.MonkeyPatch) -> None:
    def mixed(pictures: Any, captions: dict[str, str]) -> dict[str, str]:
        entries = list(captions.values())
        return dict(zip(captions, entries[10:] + entries[:10], strict=True))

    change_captions(patch, mixed)


def plant_stale_cache(patch: pytest.MonkeyPatch) -> None:
    """A picture keeps the encoded caption that it had first."""
    first: dict[Path, str] = {}

    def stale(pictures: Any, captions: dict[str, str]) -> dict[str, str]:
        return captions | {
            picture.caption: first.setdefault(picture.path, captions[picture.caption])
            for picture in pictures
            if picture.caption in captions
        }

    change_captions(patch, stale)


def plant_sentinel_scale(patch: pytest.MonkeyPatch) -> None:
    real = LoKrLinear.update_layer

    def scaled(self: LoKrLinear, name: str, r: int, alpha: float, config: Any, shape: Any, **rest: Any) -> None:
        real(self, name, r, alpha, config, shape, **rest)
        self.scaling[name] = alpha / r

    patch.setattr(LoKrLinear, "update_layer", scaled)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("plant", "check", "options"),
    [
        (plant_sigma_times_1000, check_learns, {}),
        (plant_target_sign, check_learns, {}),
        (plant_alpha_ignored, check_learns, ALPHA),
        (plant_text_padding, check_learns, {}),
        (plant_bf16_adapter, check_small_steps, {}),
        (plant_captions_mixed_up, check_learns, {}),
        (plant_stale_cache, check_learns, {}),
        (plant_sentinel_scale, check_learns, SENTINEL),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_miniature_shows_a_planted_fault(
    plant: Callable[[pytest.MonkeyPatch], None],
    check: Callable[..., None],
    options: Options,
    teach: Teach,
    trained: MiniatureFiles,
    pipe: AnimaPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same checks that pass above fail, by what they assert and not by an error elsewhere."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(teach, trained, pipe, tmp_path, options)
