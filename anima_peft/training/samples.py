"""The samples of a run: what of them is encoded beforehand and kept, and what in every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.caching import CaptionEncoder, LatentFiles
from ..data.caption_choice import CaptionChoice, captions_of_run
from ..data.dataset import BucketBatchSampler, CachedDataset, SampleKey, SampleTable
from ..data.pictures import Picture
from ..terminal import progress_bar
from .encoding import TextModels, cache_captions, cache_latents, cache_masks, latent_encoder, report_cut_captions
from .live import LiveEncoders
from .objective import noise_sampler, sigma_sampler
from .processes import Processes
from .state import Progress
from .text_plan import TextPlan, plan_text

if TYPE_CHECKING:
    from ..config import LoopOptions, TrainOptions


@dataclass(frozen=True)
class Samples:
    """What a run trains on.

    Attributes:
        dataset: its samples.
        complete: encodes what of them is not kept.
        notes: what was decided about captions and latents, and what it costs; a sentence each.
    """

    dataset: CachedDataset
    complete: LiveEncoders
    notes: tuple[str, ...]


def steps_of_epoch(loop: LoopOptions, batches: int) -> int:
    """Optimizer steps in an epoch of so many batches; the last may have fewer than the others."""
    return math.ceil(batches / loop.gradient_accumulation_steps)


def planned_steps(loop: LoopOptions, batches: int, ahead: int = 0) -> int:
    """How long a run with so many batches in an epoch is: of `max_train_steps` and `max_train_epochs` the shorter.

    Args:
        ahead: steps that the run has done beyond those that its epochs would have had; see `steps_ahead`.
    """
    limits = [loop.max_train_steps]
    if loop.max_train_epochs is not None:
        limits.append(loop.max_train_epochs * steps_of_epoch(loop, batches) + ahead)
    return min(limit for limit in limits if limit is not None)


def steps_ahead(loop: LoopOptions, batches: int, progress: Progress) -> int:
    """How many more steps a run has done than it would have with so many batches in each epoch.

    Zero, unless it began with another number of processes.
    """
    steps = progress.epoch * steps_of_epoch(loop, batches) + steps_of_epoch(loop, progress.batch)
    return progress.step - steps


def batches_of_run(
    sampler: BucketBatchSampler, batches_per_step: int, total_steps: int, ahead: int = 0
) -> Iterator[list[SampleKey]]:
    """Every batch of the epochs that a run enters: data loaders read on beyond its last step.

    Args:
        ahead: steps done beyond those of the epochs that were; see `steps_ahead`.
    """
    steps_per_epoch = math.ceil(len(sampler) / batches_per_step)
    epochs = range(math.ceil((total_steps - ahead) / steps_per_epoch))
    # A bar only where it takes long: a million samples take about 15 seconds.
    for epoch in progress_bar(epochs, desc="choosing captions", unit="epoch", delay=2, leave=False):
        yield from sampler.batches(epoch)


def prepare_samples(
    options: TrainOptions,
    pictures: tuple[Picture, ...],
    sampler: BucketBatchSampler,
    vae: Path,
    vae_hash: str,
    text: TextModels,
    *,
    processes: Processes,
    total_steps: int,
    ahead: int = 0,
) -> Samples:
    """Encode what is kept, and load what encodes the rest.

    VAE and text encoder are gone afterwards unless they are needed in the steps.

    Args:
        pictures: from `scan`.
        sampler: over their `SampleTable`.
        vae: the VAE's file or folder; `vae_hash` identifies it.
        text: what captions are encoded with.
        processes: which share the work.
        total_steps: of the run; `ahead` of them done beyond those of the epochs that were, see `steps_ahead`.

    Raises:
        InputError: a model cannot be loaded, a picture or mask cannot be read, the cache cannot be written.
    """
    loop = options.loop
    cache_dir = Path(loop.cache_dir) if loop.cache_dir else None
    choose = CaptionChoice(loop.seed, len(sampler), loop.gradient_accumulation_steps, total_steps)
    latents = _latents(options, pictures, vae, vae_hash, text, cache_dir, processes)
    masks = cache_masks(pictures, cache_dir=cache_dir, processes=processes)
    batches = batches_of_run(sampler, choose.batches_per_step, total_steps, ahead)
    plan = _plan_text(options, pictures, batches, choose, text)
    captions, encode_text = _texts(plan, pictures, text, cache_dir, processes)
    dataset = CachedDataset(
        pictures,
        latents,
        captions,
        masks.files,
        seed=loop.seed,
        draw_sigma=sigma_sampler(options),
        draw_noise=noise_sampler(options),
        choose_caption=choose,
        prior_loss_weight=options.picture_loss.prior_loss_weight,
    )
    live = latents.count(None)
    encode_latents = None
    if live:
        with processes.together():
            encode_latents = latent_encoder(vae, text.dtype, text.device, tiling=options.memory.vae_tiling)
    notes = (_latents_note(live, len(pictures), loop.cache_latents), plan.sentence(_size(text.sources.text_encoder)))
    return Samples(dataset, LiveEncoders(encode_latents, encode_text), notes)


def prepare_held_out(
    options: TrainOptions,
    pictures: tuple[Picture, ...],
    vae: Path,
    vae_hash: str,
    text: TextModels,
    *,
    seed: int,
    processes: Processes,
) -> Samples:
    """Encode the pictures of the validation split, which are kept whatever the training's are.

    Args:
        pictures: those that are held out.
        seed: of the noise that they are measured with.

    Raises:
        InputError: as `prepare_samples`.
    """
    loop = replace(options.loop, seed=seed, cache_latents=True, cache_text_encoder_outputs=True)
    sampler = BucketBatchSampler(SampleTable(pictures).groups, SampleTable(pictures).batch_sizes, seed=seed)
    own = replace(options, loop=loop)
    return prepare_samples(own, pictures, sampler, vae, vae_hash, text, processes=processes, total_steps=1)


def _latents(
    options: TrainOptions,
    pictures: tuple[Picture, ...],
    vae: Path,
    vae_hash: str,
    text: TextModels,
    cache_dir: Path | None,
    processes: Processes,
) -> Sequence[LatentFiles | None]:
    """For each picture its latents, encoded; None where they are encoded in every step."""
    if not options.loop.cache_latents:
        return (None,) * len(pictures)
    plan = cache_latents(
        pictures,
        vae,
        model_hash=vae_hash,
        dtype=text.dtype,
        device=text.device,
        batch_size=options.loop.vae_batch_size,
        tiling=options.memory.vae_tiling,
        cache_dir=cache_dir,
        processes=processes,
    )
    return plan.files


def _plan_text(
    options: TrainOptions,
    pictures: tuple[Picture, ...],
    run: Iterable[list[SampleKey]],
    choose: CaptionChoice,
    text: TextModels,
) -> TextPlan:
    return plan_text(
        pictures,
        captions_of_run(pictures, SampleTable(pictures).picture_of_sample, run, choose),
        keep=options.loop.cache_text_encoder_outputs,
        max_length=text.max_length,
        width=text.model.text_conditioner.config.target_dim,
        dtype=text.dtype,
    )


def _texts(
    plan: TextPlan, pictures: tuple[Picture, ...], text: TextModels, cache_dir: Path | None, processes: Processes
) -> tuple[Mapping[str, str] | None, CaptionEncoder | None]:
    """The file of each caption that is kept, encoded; or, where none are, what encodes them in the steps."""
    if plan.captions is not None:
        needed = {caption: pictures[number] for caption, number in plan.captions.items()}
        return cache_captions(needed, text, cache_dir=cache_dir, processes=processes).of_caption, None
    with processes.together():
        report_cut_captions({picture.caption: picture for picture in pictures}, text)
        return None, text.encoder()


def _latents_note(live: int, pictures: int, kept: bool) -> str:
    if not live:
        return f"Latents are encoded before training and kept: those of all {pictures} pictures."
    why = "cache_latents = false" if not kept else "color_aug or random_crop vary them"
    return (
        f"The pixels of {live} of {pictures} pictures are encoded in every step ({why}): the VAE stays in "
        "memory, and each step takes longer by its encoding."
    )


def _size(path: Path) -> int:
    """Bytes of a model's weights."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
