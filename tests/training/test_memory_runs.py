"""Whole runs with what saves memory: the same losses, files, pictures and states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5TokenizerFast

from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from anima_peft.miniature.random_weights import build_dit, native_state_dict
from anima_peft.training import samples
from anima_peft.training.run import train

from .conftest import Configure
from .outcomes import events_of

LOKR = ("--network_module", "networks.lokr_anima", "--network_dim", "100000", "--network_args", "lokr_factor=4")
PLAIN = ("--log_with", "tensorboard", "--save_state_on_train_end", "--use_ema")
PROMPTS = str(Path(__file__).parents[1] / "effects" / "prompts.txt")
DRAWN = ("--sample_prompts", PROMPTS, "--sample_every_n_steps", "1", "--compare_prompts", "a cat --w 32 --h 32 --s 1")
MEASURED = ("--validation_split", "0.1", "--validate_every_n_steps", "2")


@pytest.fixture(scope="module")
def deep(miniature: MiniatureFiles, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformer of four blocks."""
    path = tmp_path_factory.mktemp("deep") / "深 transformer.safetensors"
    tokens = len(T5TokenizerFast.from_pretrained(miniature.t5_tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(native_state_dict(*build_dit(tokens, layers=4)), path)
    return str(path)


class Outcome:
    """What a run leaves that must not depend on how memory was saved."""

    def __init__(self, configure: Configure, folder: Path, *flags: str) -> None:
        result = train(configure(*PLAIN, *flags, output_dir=folder))
        events = events_of(result.log_folder)
        tags = [tag for tag in ("loss", "validation/loss") if tag in events.Tags()["scalars"]]
        self.logged = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
        self.weights = load_file(result.adapter)
        self.relative_delta = result.relative_delta
        self.pictures = {path.name: path.read_bytes() for path in sorted(folder.rglob("*.png"))}
        self.state = folder / "test-state"

    def require_equal(self, other: Outcome) -> None:
        assert self.logged == other.logged
        assert self.weights.keys() == other.weights.keys()
        assert all(torch.equal(self.weights[key], other.weights[key]) for key in self.weights)
        assert self.relative_delta == other.relative_delta
        assert self.pictures == other.pictures


@pytest.mark.parametrize("network", [LOKR, pytest.param((), marks=pytest.mark.slow)], ids=["LoKr", "LoRA"])
def test_low_memory_gives_the_same_run(configure: Configure, deep: str, tmp_path: Path, network: tuple[str]) -> None:
    flags = ("--max_train_steps", "2", "--anima_transformer", deep, *network, *DRAWN, *MEASURED)
    plain = Outcome(configure, tmp_path / "plain", *flags)
    assert len(plain.pictures) == 2 + 1 + 3  # previews and their strip, the comparison's two and their grid
    assert (len(plain.logged["loss"]), len(plain.logged["validation/loss"])) == (2, 1)
    low = Outcome(configure, tmp_path / "low", *flags, "--memory", "low")
    low.require_equal(plain)


@pytest.mark.slow
def test_a_run_goes_on_with_other_memory_options(configure: Configure, deep: str, tmp_path: Path) -> None:
    flags = ("--anima_transformer", deep, *LOKR)
    whole = Outcome(configure, tmp_path / "whole", *flags, "--max_train_steps", "4")
    half = Outcome(configure, tmp_path / "half", *flags, "--max_train_steps", "2", "--memory", "low")
    more = ("--max_train_steps", "4", "--memory", "balanced", "--resume", str(half.state))
    rest = Outcome(configure, tmp_path / "rest", *flags, *more)
    assert half.logged["loss"] + rest.logged["loss"] == whole.logged["loss"]
    assert all(torch.equal(rest.weights[key], whole.weights[key]) for key in whole.weights)


def test_too_many_blocks_are_refused_before_anything_is_encoded(
    configure: Configure, deep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "cache_latents", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(InputError, match="blocks_to_swap: 3 is more than 2"):
        train(configure("--anima_transformer", deep, "--gradient_checkpointing", "--blocks_to_swap", "3"))
    assert not (tmp_path / "output").exists()
