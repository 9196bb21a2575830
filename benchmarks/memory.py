"""What each memory option saves and costs: peak memory of a training step, and its time beside the plain step's.

Every candidate is a model of its own, driven as in a training run. The plain one stays; the others come and go, each
measured in turn with it. "off by" is the largest relative difference of the losses of the first steps from the plain
run's: 0 where the kernels are deterministic and nothing is rounded. `--counted` needs no graphics card: it adds up what
a step of the real size would allocate, see `counting`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from anima_peft.config import TrainOptions, load
from anima_peft.data.dataset import LATENT_CHANNELS, MIN_PROMPT_ROWS
from anima_peft.errors import InputError
from anima_peft.models.quantization import quantize_dit
from anima_peft.training.device import DTYPES, require_device
from anima_peft.training.engine import engine
from anima_peft.training.loop import batch_loss
from anima_peft.training.network import add_network
from anima_peft.training.objective import flow_loss
from anima_peft.training.prepare import optimization, prepare_model

from .counting import count_step
from .measure import PeakMemory, let_go, median_ratio, paired_times
from .models import transformer_model
from .reporting import Row

PLAIN = "fast"
CHECKPOINTED = ("--gradient_checkpointing",)
CANDIDATES: Mapping[str, Sequence[str]] = {
    PLAIN: (),
    "every 2nd block": (*CHECKPOINTED, "--gradient_checkpointing_every", "2"),
    "balanced": ("--memory", "balanced"),
    "balanced, 8-bit AdamW": ("--memory", "balanced", "--optimizer_type", "AdamW8bit"),
    "half of the blocks swapped": (*CHECKPOINTED, "--blocks_to_swap", "{half}"),
    "low": ("--memory", "low"),
    "low, 8-bit AdamW": ("--memory", "low", "--optimizer_type", "AdamW8bit"),
    **{f"balanced, {kind}": ("--memory", "balanced", "--base_quantization", kind) for kind in ("int8", "fp8", "nf4")},
}
NETWORKS = {
    "lora": ("--network_module", "networks.lora_anima"),
    "lokr": ("--network_module", "networks.lokr_anima"),
}
COUNTED = (PLAIN, "every 2nd block", "balanced")
_FULL_RANK = 100_000  # LoKr's factors whole
_MINIATURE_BLOCKS = 6
_FIRST_STEPS = 3

Step = Callable[[], float]


@dataclass(frozen=True)
class Candidate:
    """A model being trained.

    Attributes:
        step: trains it by one step and gives the loss.
        losses: of its first steps.
        bytes: most memory in use in a step, of the device what this model alone brought; on a CPU the process's.
    """

    step: Step
    losses: list[float]
    bytes: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, and on what."""
    parser.add_argument("--resolution", type=int, help="side of the pictures (default: 64, full size 1024)")
    parser.add_argument("--batch", type=int, default=1, help="pictures in a step (default: 1)")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="lora")
    parser.add_argument("--rank", type=int, default=32, help="of a LoRA; a LoKr has whole factors (default: 32)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "no"), default="bf16")
    parser.add_argument("--no-train-norm", action="store_true", help="leave the norms as they are")
    parser.add_argument("--counted", action="store_true", help="count the real size's memory, computing nothing")
    parser.add_argument("--blocks", type=int, help="of what is counted (default: 2, full size 28)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=tuple(CANDIDATES), help="only these candidates")


def run(arguments: argparse.Namespace) -> Iterator[Row]:
    """Measure the plain step, then every candidate in turn with it."""
    if arguments.counted:
        yield from _counted(arguments)
        return
    device: torch.device = arguments.device
    side = arguments.resolution or (1024 if arguments.size == "full" else 64)
    case = f"{arguments.size}, {arguments.network}, {side} x {side}, batch {arguments.batch}, {arguments.precision}"
    names = [name for name in CANDIDATES if name != PLAIN and (not arguments.only or name in arguments.only)]
    with tempfile.TemporaryDirectory() as folder:
        options = _options(Path(folder), PLAIN, arguments)
        with engine(options) as accelerator:
            plain = _prepare(options, accelerator, arguments, side)
            times = paired_times({PLAIN: plain.step}, arguments.rounds, device)[PLAIN]
            yield Row(case, PLAIN, 1e3 * statistics.median(times), "ms", 1.0, PLAIN, plain.bytes)
            for name in names:
                yield _measure(name, case, Path(folder), plain, accelerator, arguments, side)


def _counted(arguments: argparse.Namespace) -> Iterator[Row]:
    """What a step of the real width allocates."""
    blocks = arguments.blocks or (28 if arguments.size == "full" else 2)
    side = arguments.resolution or 1024
    case = f"counted, {blocks} blocks, {arguments.network}, {side} x {side}, batch {arguments.batch}"
    with tempfile.TemporaryDirectory() as folder:
        for name in COUNTED:
            if not arguments.only or name in arguments.only:
                options = _options(Path(folder), name, arguments)
                bytes_of = count_step(options, blocks, side, arguments.batch, DTYPES[arguments.precision])
                gib = {"before GiB": bytes_of.before / 2**30, "kept GiB": bytes_of.kept / 2**30}
                yield Row(case, name, bytes_of.peak / 2**30, "GiB at most", figures=gib)


def _measure(
    name: str,
    case: str,
    folder: Path,
    plain: Candidate,
    accelerator: Accelerator,
    arguments: argparse.Namespace,
    side: int,
) -> Row:
    try:
        options = _options(folder, name, arguments)
        require_device(options, arguments.device)
    except InputError as missing:
        return Row(case, name, None, "ms", figures={"off by": str(missing).partition(" (")[0]})
    candidate = None
    try:
        candidate = _prepare(options, accelerator, arguments, side)
        off = max(abs(one - other) / other for one, other in zip(candidate.losses, plain.losses, strict=True))
        times = paired_times({PLAIN: plain.step, name: candidate.step}, arguments.rounds, arguments.device)
        median, ratio = statistics.median(times[name]), median_ratio(times, name, PLAIN)
        return Row(case, name, 1e3 * median, "ms", ratio, PLAIN, candidate.bytes, {"off by": f"{off:.1e}"})
    except torch.OutOfMemoryError:
        return Row(case, name, None, "ms", figures={"off by": "does not fit"})
    finally:
        del candidate
        let_go()


def _prepare(options: TrainOptions, accelerator: Accelerator, arguments: argparse.Namespace, side: int) -> Candidate:
    """A model as training prepares it, after its first steps."""
    device: torch.device = arguments.device
    dtype = DTYPES[arguments.precision]
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    model = transformer_model(arguments.size, device, dtype, layers=_MINIATURE_BLOCKS)
    if options.memory.base_quantization != "none":
        model.transformer = quantize_dit(model.transformer, options.memory.base_quantization, device)
    model.text_conditioner.to("cpu")  # frozen, it is not needed in a step
    torch.manual_seed(0)
    add_network(model, options)
    prepare_model(model, options, accelerator)
    optimizer, _, _ = optimization(model, options, 1000)
    ready, optimizer = accelerator.prepare(model, optimizer, device_placement=[False, True])
    ready.train()
    loss_of = flow_loss(options)
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.batch, LATENT_CHANNELS, side // 8, side // 8)
    rows = (arguments.batch, MIN_PROMPT_ROWS, model.text_conditioner.config.target_dim)
    batch = {
        "latents": torch.randn(shape, generator=generator).to(device),
        "noise": torch.randn(shape, generator=generator).to(device),
        "sigma": torch.full((arguments.batch,), 0.5, device=device),
        "prompt_embeds": torch.randn(rows, generator=generator).to(device, dtype),
    }
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> float:
        loss = batch_loss(ready, batch, loss_of)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, options.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    losses = [step() for _ in range(_FIRST_STEPS)]
    let_go()
    with PeakMemory(device) as memory:
        step()
    return Candidate(step, losses, memory.peak - before)


def _options(folder: Path, name: str, arguments: argparse.Namespace) -> TrainOptions:
    dataset = folder / "dataset.toml"
    dataset.write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'none'\n", encoding="utf-8")
    blocks = 28 if arguments.size == "full" else _MINIATURE_BLOCKS
    flags = [word.format(half=blocks // 2) for word in CANDIDATES[name]]
    rank = _FULL_RANK if arguments.network == "lokr" else arguments.rank
    given = {
        "dataset_config": dataset,
        "anima_transformer": "none",
        "output_dir": folder,
        "output_name": "memory",
        "learning_rate": 1e-4,
        "network_dim": rank,
        "mixed_precision": arguments.precision,
        "log_with": "none",
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    words += ["--no-train_norm"] if arguments.no_train_norm else []
    return load([*words, *NETWORKS[arguments.network], *flags]).train
