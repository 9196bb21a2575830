"""What steps are measured: ours through the product's own loop, and others' adapters in a hand-written one.

The references are LoRA by PEFT on diffusers' stock model, PEFT's LoKr and LyCORIS' LoKr, all on the same layers, with
the same frozen base and optimizer, in a loop of forward, backward and AdamW and nothing else: no data, no clipping, no
log. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from diffusers.training_utils import cast_training_params
from torch.utils.data import Dataset

from anima_peft.adapters.strengths import adapter_layers
from anima_peft.config import TrainOptions, load
from anima_peft.data.cache import TensorCache
from anima_peft.data.dataset import LATENT_CHANNELS, MIN_PROMPT_ROWS, BucketBatchSampler, plain_noise
from anima_peft.models.checkpoints import build_empty
from anima_peft.models.precision import set_qk_norm_eps
from anima_peft.training import loop
from anima_peft.training.engine import engine
from anima_peft.training.health import Health
from anima_peft.training.network import add_network
from anima_peft.training.prepare import prepare_model, prepare_parts
from anima_peft.training.processes import Processes
from anima_peft.training.state import Progress
from anima_peft.transformer import AnimaTransformerModel

from .models import fill, transformer_model

REFERENCE, PEFT_LOKR = "PEFT LoRA", "PEFT LoKr"
BASE = "no adapter"
FACTOR = 8
FULL = 100_000
_RATE = 1e-4
_HEAD = 128
_TEXT = 256  # width of the small model's conditioning

Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """What all candidates train on.

    Attributes:
        base: the frozen model; its weights are everybody's.
        latents: (h, w); a quarter of it are tokens.
        batch: samples in a step.
        rank: of LoRA; LoKr has full factors.
        precision: "no" or "bf16".
        checkpointing: whether blocks are computed anew in the backward pass.
        device: where all of them run.
    """

    base: AnimaTransformerModel
    latents: tuple[int, int]
    batch: int
    rank: int
    precision: str
    checkpointing: bool
    device: torch.device

    def model(self) -> AnimaTransformerModel:
        """Modules of one's own around the same weights."""
        return copy.deepcopy(self.base, {id(parameter): parameter for parameter in self.base.parameters()})

    @property
    def tokens(self) -> int:
        """Of one sample."""
        height, width = self.latents
        return height // 2 * (width // 2)

    def text(self) -> torch.Tensor:
        """A caption's conditioning (512, D)."""
        width = self.base.transformer.config.text_embed_dim
        return torch.randn(MIN_PROMPT_ROWS, width, dtype=self.base.transformer.dtype)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 inside of this, if that is the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


class _Samples(Dataset[dict[str, torch.Tensor]]):
    """One picture, read from files as the cache's are."""

    def __init__(self, case: Case, folder: Path):
        self._cache = TensorCache(folder, "step")
        self._cache.write("latents", {"latents": torch.randn(LATENT_CHANNELS, *case.latents)})
        self._cache.write("text", {"prompt_embeds": case.text()})

    def __getitem__(self, _: object) -> dict[str, torch.Tensor]:
        latents = self._cache.read("latents")["latents"]
        noise = plain_noise(torch.Generator().manual_seed(0), latents.shape)
        return {"latents": latents, **noise, "sigma": torch.tensor(0.5), **self._cache.read("text")}


@dataclass(frozen=True)
class _Prepared:
    """What stands for `Samples` in `prepare_parts`."""

    dataset: _Samples

    def complete(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Nothing is left to encode."""
        return batch


def ours(case: Case, accelerator: Accelerator, folder: Path, flags: Sequence[str]) -> Step:
    """A step of the product's loop, with all that belongs to it: data, clipping, health, schedule and log."""
    folder.mkdir()
    options = _options(case, folder, flags)
    model = case.model()
    torch.manual_seed(0)
    parameters = add_network(model, options)
    prepare_model(model, options, accelerator)
    sampler = BucketBatchSampler([(0, case.latents)] * case.batch, {0: case.batch}, seed=0)
    samples: Any = _Prepared(_Samples(case, folder))
    parts = prepare_parts(accelerator, Processes(accelerator), options, model, parameters, samples, sampler, FULL)
    progress = Progress()
    health = Health(0, progress, lambda batches: [["picture"] * case.batch] * batches)

    def step() -> None:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stderr(nowhere),
        ):  # the progress bar
            loop.run_loop(
                accelerator,
                parts,
                progress,
                total_steps=progress.step + 1,
                max_grad_norm=options.optimizer.max_grad_norm,
                health=health,
                on_step=lambda: None,
                on_epoch=lambda: None,
            )

    return step


@contextlib.contextmanager
def case_engine(case: Case, folder: Path) -> Iterator[Accelerator]:
    """One for all that is measured side by side: accelerate keeps one state for a process."""
    with engine(_options(case, folder, NETWORKS["LoRA"](case)), [TensorBoardTracker("log", folder)]) as accelerator:
        accelerator.init_trackers("log")
        yield accelerator


def _options(case: Case, folder: Path, flags: Sequence[str]) -> TrainOptions:
    (folder / "dataset.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'none'\n", encoding="utf-8")
    words = ["--dataset_config", str(folder / "dataset.toml"), "--output_dir", str(folder), "--output_name", "step"]
    words += [
        "--anima_transformer",
        "none",
        "--learning_rate",
        str(_RATE),
        "--optimizer_type",
        "AdamW",
        "--no-train_norm",
    ]
    words += ["--mixed_precision", case.precision, "--log_with", "tensorboard", *flags]
    return load([*words, "--gradient_checkpointing"] if case.checkpointing else words).train


def theirs(case: Case, adapt: Callable[[Any, list[str]], list[torch.nn.Parameter]]) -> Step:
    """A step on diffusers' stock model in the least loop there is.

    Args:
        adapt: puts an adapter on the layers of these names, and gives its parameters; none of them: only the
            gradient of the model's input is computed.
    """
    transformer: Any = case.model().transformer.train()
    if case.checkpointing:
        transformer.enable_gradient_checkpointing()
    torch.manual_seed(0)
    parameters = adapt(transformer, _targets(case))
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, fused=True) if parameters else None
    shape = (case.batch, LATENT_CHANNELS, 1, *case.latents)
    latents, noise = torch.randn(shape, device=case.device), torch.randn(shape, device=case.device)
    sigma, text = torch.full((case.batch,), 0.5, device=case.device), case.text().to(case.device)
    mask = latents.new_zeros(1, 1, *case.latents)

    def step() -> None:
        noisy = ((1 - 0.5) * latents + 0.5 * noise).requires_grad_(optimizer is None)
        with case.autocast():
            prediction = transformer(
                hidden_states=noisy,
                timestep=sigma,
                encoder_hidden_states=text.expand(case.batch, *text.shape),
                padding_mask=mask,
                return_dict=False,
            )[0]
        torch.nn.functional.mse_loss(prediction.float(), noise - latents).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _targets(case: Case) -> list[str]:
    """The layers that ours adapts, by their paths in the stock model."""
    model = case.model()
    with tempfile.TemporaryDirectory() as folder:
        add_network(model, _options(case, Path(folder), NETWORKS["LoRA"](case)))
    return [path for component, path, _ in adapter_layers(model.components) if component == "transformer"]


def _peft(config: Any) -> Callable[[Any, list[str]], list[torch.nn.Parameter]]:
    def adapt(transformer: Any, targets: list[str]) -> list[torch.nn.Parameter]:
        config.target_modules = set(targets)
        transformer.add_adapter(config)
        cast_training_params(transformer, torch.float32)
        return [parameter for parameter in transformer.parameters() if parameter.requires_grad]

    return adapt


def _lycoris(transformer: Any, targets: list[str]) -> list[torch.nn.Parameter]:
    from lycoris.modules.lokr import LokrModule

    parameters: list[torch.nn.Parameter] = []
    for name in targets:
        layer = transformer.get_submodule(name)
        module = LokrModule(name.replace(".", "_"), layer, 1.0, lora_dim=FULL, alpha=FULL, factor=FACTOR)
        module.apply_to()
        module.to(layer.weight.device)
        layer.add_module("lycoris", module)
        parameters += [parameter for parameter in module.parameters() if parameter.requires_grad]
    return parameters


NETWORKS: Mapping[str, Callable[[Case], list[str]]] = {
    "LoRA": lambda case: ["--network_module", "networks.lora_anima", "--network_dim", str(case.rank)],
    "LoKr": lambda case: ["--network_module", "networks.lokr_anima", "--network_dim", str(FULL)],
}


def candidates(
    case: Case, accelerator: Accelerator, folder: Path, backend: str | None
) -> dict[str, Callable[[], Step]]:
    """What builds each step, the references' among them; with a backend, ours compiled too."""
    lokr: dict[str, Any] = {"r": FULL, "alpha": FULL, "decompose_factor": FACTOR, "init_weights": "lycoris"}
    builders: dict[str, Callable[[], Step]] = {
        BASE: partial(theirs, case, lambda *_: []),
        REFERENCE: partial(theirs, case, _peft(peft.LoraConfig(r=case.rank, lora_alpha=case.rank))),
        PEFT_LOKR: partial(theirs, case, _peft(peft.LoKrConfig(**lokr))),
        "LyCORIS LoKr": partial(theirs, case, _lycoris),
    }
    for name, flags in NETWORKS.items():
        builders[f"ours {name}"] = partial(ours, case, accelerator, folder / name, flags(case))
        if backend is not None:
            name, words = f"{name}, compiled", [*flags(case), "--torch_compile", "--dynamo_backend", backend]
            builders[f"ours {name}"] = partial(ours, case, accelerator, folder / name, words)
    return builders


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model's and the step's sizes, but for its tokens."""
    parser.add_argument("--heads", type=int, default=6, help=f"of the small model, each {_HEAD} wide (default: 6)")
    parser.add_argument("--blocks", type=int, default=4, help="of the small model (default: 4)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, help="of LoRA (default: 16, at full size 32)")
    parser.add_argument("--precision", choices=["no", "bf16"], help="default: no on a CPU, bf16 on a GPU")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")


def build_case(arguments: argparse.Namespace, tokens: tuple[int, int]) -> Case:
    """A model as the options say, and what it is trained on: (height, width) of its tokens."""
    full, device = arguments.size == "full", arguments.device
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "no")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    base = transformer_model("full", device, dtype) if full else _small_model(arguments, device, dtype)
    rank = arguments.rank or (32 if full else 16)
    latents = (2 * tokens[0], 2 * tokens[1])
    return Case(base, latents, arguments.batch, rank, precision, arguments.checkpointing, device)


def _small_model(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> AnimaTransformerModel:
    """As the real one but for its size: heads as wide, so that products and not calls take the time."""
    transformer = build_empty(
        lambda: CosmosTransformer3DModel(
            num_attention_heads=arguments.heads,
            attention_head_dim=_HEAD,
            num_layers=arguments.blocks,
            text_embed_dim=_TEXT,
            adaln_lora_dim=32,
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
        )
    )
    conditioner = build_empty(lambda: AnimaTextConditioner(32, 32, 32, num_layers=1, num_attention_heads=1))
    set_qk_norm_eps(transformer)
    return AnimaTransformerModel(fill(transformer, device, dtype), fill(conditioner, device, dtype))
