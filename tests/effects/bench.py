"""Runs without steps: everything that a run builds and writes, for the price of its set-up."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import T5TokenizerFast

from anima_peft.adapters.strengths import adapter_layers
from anima_peft.config import RunConfig, load
from anima_peft.data.pictures import Picture, scan
from anima_peft.errors import InputError
from anima_peft.generation import Request
from anima_peft.miniature import MiniatureFiles
from anima_peft.miniature.random_weights import build_dit, native_state_dict
from anima_peft.models.sources import ModelSources
from anima_peft.training import device, network, prepare, samples, watch
from anima_peft.training import run as training
from anima_peft.transformer import AnimaTransformerModel
from tests.wandb_stand_in import WandbStandIn

DIFFERS = object()
"""In place of both values: that they differ is all there is to say."""
STEPS = 4
BASE = {
    "network_module": "networks.lora_anima",
    "network_dim": "4",
    "learning_rate": "0.005",
    "mixed_precision": "no",
    "max_train_steps": str(STEPS),
    "output_name": "test",
    "log_with": "none",
    "resolution": "64",
    "enable_bucket": "",
    "min_bucket_reso": "32",
    "max_bucket_reso": "128",
    "bucket_reso_steps": "16",
}
DATASET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{pictures}'\n"


@dataclass(frozen=True)
class Effect:
    """What an option changes.

    Attributes:
        change: words that set it on the command line.
        observe: what shows its effect.
        before, after: what is seen without and with `change`.
        beside: words on both sides, for what it needs to have an effect.
        without: options of BASE that are left out on both sides.
        dataset: the dataset TOML that sets it, where it has no flag.
        base: the dataset TOML where `dataset` does not stand in for it.
    """

    change: tuple[str, ...]
    observe: Callable[[Built], object]
    before: object = DIFFERS
    after: object = DIFFERS
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    dataset: str | None = None
    base: str = DATASET


@dataclass(frozen=True)
class Refused:
    """An option of which one value cannot be had, at least not with this dataset; it is refused by name."""

    change: tuple[str, ...]
    message: str
    dataset: str = DATASET


@contextmanager
def _in_place_of_wandb(stand_in: WandbStandIn) -> Iterator[None]:
    """Not by `mock.patch.dict`, which would take away again every module that a run imports."""
    real = sys.modules.get("wandb")
    sys.modules["wandb"] = stand_in  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["wandb"]
        if real is not None:
            sys.modules["wandb"] = real


@dataclass
class Recorded:
    """What passed through the seams of a run."""

    parts: Any = None
    started_at: int = 0
    precision: str = ""
    loop: Mapping[str, Any] = field(default_factory=dict)
    accelerator: Any = None
    located: Mapping[str, Any] = field(default_factory=dict)
    sources: ModelSources | None = None
    latents: Mapping[str, Any] = field(default_factory=dict)
    captions: Mapping[str, Any] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    compiler: str = ""
    wandb: WandbStandIn = field(default_factory=WandbStandIn)


@dataclass
class Built:
    """A configuration and, once asked for, what a run of it builds and leaves."""

    config: RunConfig
    folder: Path

    @cached_property
    def pictures(self) -> list[Picture]:
        """What the dataset options make of the pictures; nothing is encoded."""
        return list(scan(self.config.datasets))

    @cached_property
    def _run(self) -> tuple[Recorded, training.Result | InputError]:
        seen = Recorded()
        with ExitStack() as stack:
            for name, stand_in in _stand_ins(seen, self.folder).items():
                room = _rooms()[name]
                stack.enter_context(mock.patch.object(room, name, stand_in))
            stack.enter_context(_in_place_of_wandb(seen.wandb))
            handler = _Listener(seen.warnings)
            logger = logging.getLogger("anima_peft")
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
            try:
                return seen, training.train(self.config)
            except InputError as error:
                return seen, error

    @property
    def seen(self) -> Recorded:
        self.result  # noqa: B018  # an error must not pass for an empty record
        return self._run[0]

    @property
    def result(self) -> training.Result:
        assert isinstance(self._run[1], training.Result), self._run[1]
        return self._run[1]

    @property
    def error(self) -> str:
        """Why the run was refused, or ""."""
        return str(self._run[1]) if isinstance(self._run[1], InputError) else ""

    @property
    def model(self) -> AnimaTransformerModel:
        model = self.seen.parts.model
        return getattr(model, "module", model)

    @property
    def layers(self) -> list[Any]:
        """The adapted linear layers."""
        return [layer for _, _, layer in adapter_layers(self.model.components) if hasattr(layer, "r")]

    @property
    def dataset(self) -> Any:
        return self.seen.parts.loader.dataset

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Of the final adapter file."""
        return load_file(self.result.adapter)

    @cached_property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.result.adapter, framework="pt") as file:
            return dict(file.metadata())

    @property
    def files(self) -> list[str]:
        """What lies in the output folder."""
        return sorted(path.name for path in self.result.adapter.parent.iterdir())

    @property
    def parts_of_layers(self) -> set[str]:
        """The ends of the adapter file's keys."""
        return {key.split(".", 1)[1] for key in self.tensors}

    def rates(self, group: int = 0) -> list[float]:
        """The learning rate of each step."""
        scheduler = self.seen.parts.scheduler.scheduler
        factors = [scheduler.lr_lambdas[group](step) for step in range(self.seen.loop["total_steps"])]
        return [round(factor * scheduler.base_lrs[group], 6) for factor in factors]

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """The settings of the first parameter group."""
        return self.seen.parts.optimizer.param_groups[0]

    def samples(self) -> list[dict[str, torch.Tensor]]:
        """All samples of the first epoch."""
        return [self.dataset[0, index] for index in range(len(self.dataset))]


class _Listener(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())


def _stand_ins(seen: Recorded, folder: Path) -> dict[str, Callable[..., Any]]:
    """The loop counts and saves and computes nothing, the comparison draws nothing; the rest is passed on."""

    def run_loop(accelerator: Any, parts: Any, progress: Any, **options: Any) -> None:
        seen.accelerator, seen.parts, seen.loop, seen.started_at = accelerator, parts, options, progress.step
        seen.precision = accelerator.mixed_precision  # gone with the run
        per_epoch = math.ceil(len(parts.sampler) / accelerator.gradient_accumulation_steps)
        while progress.step < options["total_steps"]:
            progress.step += 1
            options["on_step"]()
            if progress.step % per_epoch == 0:
                progress.epoch += 1
                options["on_epoch"]()

    def draw_comparison(model: Any, sources: Any, outputs: Any, requests: list[Request], **_: Any) -> Path:
        seen.requests += requests
        Image.new("RGB", (8, 8)).save(folder / "grid.png")
        return folder / "grid.png"

    def resolve_sources(*values: Any, **options: Any) -> ModelSources:
        seen.located = options
        return real["resolve_sources"](*values, **options)

    def hash_model(sources: ModelSources, *rest: Any) -> Any:
        seen.sources = sources
        return real["hash_model"](sources, *rest)

    def cache_latents(*values: Any, **options: Any) -> Any:
        seen.latents = options
        return real["cache_latents"](*values, **options)

    def cache_captions(captions: Any, models: Any, **options: Any) -> Any:
        seen.captions = {"max_length": models.max_length}
        return real["cache_captions"](captions, models, **options)

    def require_compiler(backend: str | None, device: Any) -> None:
        """No machine needs one for these tests."""

    def compile_blocks(model: Any, backend: str) -> None:
        seen.compiler = backend
        real["compile_blocks"](model, backend)

    stand_ins = (run_loop, draw_comparison, resolve_sources, hash_model, cache_latents, cache_captions)
    stand_ins = (*stand_ins, require_compiler, compile_blocks)
    real = {function.__name__: getattr(_rooms()[function.__name__], function.__name__) for function in stand_ins}
    return {function.__name__: function for function in stand_ins}


def _rooms() -> dict[str, Any]:
    """The module in which each stand-in takes the place of the real function."""
    rooms = {**dict.fromkeys(("draw_comparison", "hash_model"), training), "resolve_sources": network}
    rooms |= {**dict.fromkeys(("cache_latents", "cache_captions"), samples), "require_compiler": device}
    return {**rooms, "run_loop": watch, "compile_blocks": prepare}


class Bench:
    """Builds configurations on the miniature, each once.

    Words may name `{pictures}`, `{other_pictures}`, copies of the model's parts such as `{other_vae}`, a
    `{deep_transformer}` of 4 blocks, a saved `{state}` and `{adapter}`, an `{occupied}` output folder, and `{folder}`.
    """

    def __init__(self, miniature: MiniatureFiles, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Path] = {"folder": folder, **self._pictures(miniature), **_copies(miniature, folder)}
        self._model = {
            "anima_transformer": str(miniature.transformer),
            "vae": str(miniature.vae),
            "qwen": str(miniature.text_encoder),
            "qwen_tokenizer_dir": str(miniature.tokenizer),
            "t5_tokenizer_dir": str(miniature.t5_tokenizer),
        }
        self.places["deep_transformer"] = folder / "deep.safetensors"
        tokens = len(T5TokenizerFast.from_pretrained(miniature.t5_tokenizer))
        save_file(native_state_dict(*build_dit(tokens, layers=4)), self.places["deep_transformer"])
        self._built: dict[tuple[Any, ...], Built] = {}
        self._numbers = itertools.count()
        made = self.build(("--max_train_steps", "2", "--save_state_on_train_end", "--no-train_norm"))
        self.places["adapter"] = made.result.adapter
        self.places["state"] = self.build(("--max_train_steps", "2", "--save_state_on_train_end")).result.adapter
        self.places["state"] = self.places["state"].with_name("test-state")
        self.places["occupied"] = made.result.adapter.parent

    def _pictures(self, miniature: MiniatureFiles) -> dict[str, Path]:
        """Four pictures of three shapes, and two others."""
        folders = {"pictures": range(4), "other_pictures": range(4, 6)}
        for name, numbers in folders.items():
            (self.folder / name).mkdir()
            for number in numbers:
                for suffix in (".png", ".txt"):
                    shutil.copy(miniature.pictures / f"{number:02d}{suffix}", self.folder / name)
        (self.folder / "pictures" / "00.cap").write_text("another caption", encoding="utf-8")
        (self.folder / "pictures" / "00.tags").write_text("a, b;c, {d|e}\nsecond line", encoding="utf-8")
        (self.folder / "pictures" / "meta.json").write_text('{"02": {"caption": "named"}}', encoding="utf-8")
        (self.folder / "masks").mkdir()
        for picture in (self.folder / "pictures").glob("*.png"):
            shutil.copy(picture, self.folder / "masks")
        return {name: self.folder / name for name in (*folders, "masks")}

    def build(self, words: tuple[str, ...], without: tuple[str, ...] = (), dataset: str = DATASET) -> Built:
        """The configuration of the base and these words, which win over it.

        Raises:
            InputError: it is not valid.
        """
        key = (words, without, dataset)
        if key not in self._built:
            folder = self.folder / f"run{next(self._numbers)}"
            folder.mkdir()
            (folder / "dataset.toml").write_text(dataset.format(**self.places), encoding="utf-8")
            words = tuple(word.format(**self.places) for word in words)
            base = {**self._model, **BASE, "output_dir": str(folder / "out")}
            flags = [
                word
                for name, value in base.items()
                if name not in without and not {f"--{name}", f"--no-{name}"} & set(words)
                for word in ((f"--{name}", value) if value else (f"--{name}",))
            ]
            self._built[key] = Built(load([*flags, "--dataset_config", str(folder / "dataset.toml"), *words]), folder)
        return self._built[key]


def _copies(miniature: MiniatureFiles, folder: Path) -> dict[str, Path]:
    copies = {}
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "t5_tokenizer"):
        source = getattr(miniature, name)
        target = folder / f"other_{name}{source.suffix}"
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        copies[f"other_{name}"] = target
    return copies
