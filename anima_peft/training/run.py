"""One training run from a parsed configuration to the files it leaves."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image

from ..adapters.layers import relative_delta
from ..data.cache import FileIndex, cache_folder, remove_abandoned
from ..data.dataset import BucketBatchSampler, CachedDataset
from ..data.pictures import Picture, scan
from ..errors import InputError
from ..files import require_writable
from ..generation import Request
from ..models.encoders import check_encoders
from ..models.sources import ModelSources, resolve_sources
from ..transformer import AnimaTransformerModel
from .attention import require_attention
from .averages import AdapterAverage
from .comparison import draw_comparison
from .encoding import ModelHashes, cache_captions, cache_latents, hash_model
from .engine import engine
from .metadata import RunFacts, training_metadata
from .network import add_network, hash_merged, merge_base_weights, require_weights
from .optimizers import needs_card
from .outputs import Outputs, is_final_state, require_free, resolve_folder
from .prepare import noise_sampler, prepare_model, prepare_parts, sigma_sampler
from .requests import Requests
from .saving import Saver
from .settings import other_settings, state_settings
from .state import (
    ADAPTER_NAME,
    Progress,
    latest_state,
    load_state,
    read_progress,
    register,
    require_same_settings,
    settle,
    warn_of_changes,
)
from .watch import run_watched

if TYPE_CHECKING:
    from ..config import RunConfig, TrainOptions

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Attributes:
        adapter: the final file.
        steps: optimizer steps done.
        relative_delta: size of what was learned, |delta W| / |W| over all adapted layers.
        log_folder: where TensorBoard's files are, if it was on.
        comparison: grid of pictures without and with the adapter, if `compare_prompts` asked for one.
    """

    adapter: Path
    steps: int
    relative_delta: float
    log_folder: Path | None
    comparison: Path | None


def train(config: RunConfig) -> Result:  # long by its steps: one call each, in the order in which they happen
    """Train an adapter.

    The configuration's values, model files, pictures and captions are looked at, and everything is encoded, before the
    first step and before anything appears in `output_dir`.

    Raises:
        InputError: a fault in the configuration's values, the model's files, the pictures or the captions.
        TrainingError: the loss is not finite, or there is not enough memory.
        Interrupted: a signal or a file asked for the end; adapter and state are saved.
    """
    options, now = config.train, datetime.now()
    outputs = Outputs(resolve_folder(options.save.output_dir, now), options.save.output_name)
    log_root = Path(options.log.logging_dir) if options.log.logging_dir else outputs.folder / "logs"
    requests = Requests(outputs)
    with engine(options, log_root) as accelerator:
        resume = _resume_from(options.save.resume, outputs)
        progress = read_progress(resume) if resume else Progress()
        continued = resume is not None and resume.resolve().parent == outputs.folder.resolve()
        if not continued:  # what another folder's run has saved is not this one's to drop
            progress.saved_steps, progress.saved_epochs = [], []
        progress.started = progress.started or datetime.now(UTC).isoformat()
        require_free(outputs, overwrite=options.save.overwrite, resume=continued)
        require_writable("output_dir", outputs.folder)
        requests.forget_earlier()
        if options.log.log_with != "none":
            require_writable("logging_dir", log_root)
        for warning in config.warnings:
            logger.warning(warning)
        dtype = DTYPES[options.loop.mixed_precision]
        _require_device(options, accelerator.device, dtype)
        require_weights(options)
        with accelerator.local_main_process_first():  # one process of a machine fetches what is missing
            sources = _sources(options)
        check_encoders(sources.text_encoder, sources.vae)
        cache_dir = Path(options.loop.cache_dir) if options.loop.cache_dir else None
        pictures = scan(config.datasets, cache_dir=cache_dir)
        settings, noted = state_settings(options, pictures), other_settings(options)
        if resume:
            require_same_settings(progress, settings, resume)
            warn_of_changes(progress, noted, resume)
        progress.settings, progress.noted = settings, noted

        model = AnimaTransformerModel.from_pretrained(sources.transformer, torch_dtype=dtype)
        merge_base_weights(model, options)
        set_seed(options.loop.seed)  # for the adapter's initial values; samples have generators of their own
        parameters = add_network(model, options)
        index = FileIndex(cache_folder(pictures[0].path.parent, cache_dir))
        merged = hash_merged(options, index)
        hashes = hash_model(sources, index)
        text_hash = "/".join(filter(None, (hashes.text, hashes.transformer, merged)))
        dataset = _cached_dataset(
            options, sources, hashes.vae, text_hash, model, pictures, dtype, accelerator.device, cache_dir
        )
        sampler = BucketBatchSampler(dataset.groups, dataset.batch_sizes, seed=options.loop.seed)
        facts = _plan(options, sources, hashes, batches=len(sampler))
        # At the last step there may be files to write yet, if the run was killed there.
        if resume and (progress.step > facts.total_steps or _is_done(resume, progress, facts)):
            raise InputError(
                f"resume: {resume} stands at step {progress.step}, and the run ends at step {facts.total_steps}; "
                "raise max_train_steps or max_train_epochs to go on."
            )

        prepare_model(model, options, accelerator)
        parts = prepare_parts(accelerator, options, model, parameters, dataset, sampler, facts.total_steps)
        register(accelerator, model, progress, parts.average)
        if resume:
            load_state(accelerator, resume)
            logger.warning("Resumed %s at step %d of %d.", resume, progress.step, facts.total_steps)
        metadata = partial(training_metadata, options, pictures, facts, config.summary)
        saver = _saver(accelerator, options, model, outputs, progress, parts.average, metadata, config.resolved)
        saver.drop_old()
        log_folder = _start_tracking(accelerator, options, log_root, now)
        run_watched(accelerator, options, parts, progress, facts, saver, requests, dataset)
        with parts.average.in_place():
            learned = relative_delta(model.components, ADAPTER_NAME)
        comparison = _compare(accelerator, options, model, sources, outputs, dtype)
    return Result(outputs.final, progress.step, learned, log_folder, comparison)


def _resume_from(given: str | None, outputs: Outputs) -> Path | None:
    """The state folder that `resume` names; what a crash has left of the run, and of that one, is put right before."""
    settle(outputs)
    if given == "latest":
        return latest_state(outputs)
    if given is None:
        return None
    settle(Outputs.of_state(Path(given)))
    return Path(given)


def _is_done(state: Path, progress: Progress, facts: RunFacts) -> bool:
    return progress.step == facts.total_steps and is_final_state(state)


def _sources(options: TrainOptions) -> ModelSources:
    """Where each part is; what the tokenizers' folders lack is fetched."""
    model = options.model
    return resolve_sources(
        model.anima_transformer,
        vae=model.vae,
        qwen=model.qwen,
        qwen_tokenizer_dir=model.qwen_tokenizer_dir,
        t5_tokenizer_dir=model.t5_tokenizer_dir,
        qwen_tokenizer_sources=model.qwen_tokenizer_sources,
        t5_tokenizer_sources=model.t5_tokenizer_sources,
    )


def _require_device(options: TrainOptions, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what the options ask for and this machine has not.

    Raises:
        InputError: attention kernels or an optimizer that need another device or a package.
    """
    require_attention(options.loop.attn_mode, device, dtype)
    name = options.optimizer.optimizer_type
    if needs_card(name) and device.type == "cpu":
        raise InputError(f'optimizer_type: {name} needs a graphics card, and none is in use; "AdamW" runs everywhere.')


def _cached_dataset(
    options: TrainOptions,
    sources: ModelSources,
    vae_hash: str,
    text_hash: str,
    model: AnimaTransformerModel,
    pictures: Sequence[Picture],
    dtype: torch.dtype,
    device: torch.device,
    cache_dir: Path | None,
) -> CachedDataset:
    """Fill the cache and build the data set over it. VAE and text encoder are gone afterwards."""
    for folder in {cache_folder(picture.path.parent, cache_dir) for picture in pictures}:
        remove_abandoned(folder)
    latents = cache_latents(
        pictures,
        sources.vae,
        model_hash=vae_hash,
        dtype=dtype,
        device=device,
        batch_size=options.loop.vae_batch_size,
        cache_dir=cache_dir,
    )
    captions = cache_captions(
        pictures,
        sources,
        model,
        model_hash=text_hash,
        dtype=dtype,
        device=device,
        max_length=options.model.anima_seq_len,
        train_conditioner=options.trains_conditioner,
        cache_dir=cache_dir,
    )
    return CachedDataset(
        pictures,
        latents.files,
        captions.files,
        seed=options.loop.seed,
        draw_sigma=sigma_sampler(options),
        draw_noise=noise_sampler(options),
    )


def _plan(options: TrainOptions, sources: ModelSources, hashes: ModelHashes, *, batches: int) -> RunFacts:
    """How long the run is: of `max_train_steps` and `max_train_epochs` the shorter."""
    steps_per_epoch = math.ceil(batches / options.loop.gradient_accumulation_steps)
    limits = [options.loop.max_train_steps]
    if options.loop.max_train_epochs is not None:
        limits.append(options.loop.max_train_epochs * steps_per_epoch)
    total = min(limit for limit in limits if limit is not None)
    if len(limits) == 2 and limits[0] is not None:
        logger.warning("max_train_steps = %d, max_train_epochs = %d steps: the shorter counts.", *limits)
    return RunFacts(sources, hashes, batches, total, epochs=math.ceil(total / steps_per_epoch))


def _saver(
    accelerator: Accelerator,
    options: TrainOptions,
    model: AnimaTransformerModel,
    outputs: Outputs,
    progress: Progress,
    average: AdapterAverage,
    metadata: partial[dict[str, str]],
    resolved: str,
) -> Saver:
    save = options.save
    return Saver(
        accelerator,
        model,
        outputs,
        progress,
        average,
        metadata,
        resolved,
        format=save.save_format,  # type: ignore[arg-type]  # one of its choices
        dtype=DTYPES[save.save_precision],
        every_steps=save.save_every_n_steps,
        every_epochs=save.save_every_n_epochs,
        keep_steps=save.save_last_n_steps,
        keep_epochs=save.save_last_n_epochs,
        keep_states_steps=save.save_last_n_steps_state,
        keep_states_epochs=save.save_last_n_epochs_state,
        with_state=save.save_state,
        state_at_end=save.save_state_on_train_end,
    )


def _start_tracking(accelerator: Accelerator, options: TrainOptions, root: Path, now: datetime) -> Path | None:
    """Open the log; returns `<logging_dir>/<log_prefix><output_name>_YYYYMMDD_HHMMSS_ffffff`."""
    if options.log.log_with == "none":
        return None
    name = f"{options.log.log_prefix or ''}{options.save.output_name}_{now:%Y%m%d_%H%M%S_%f}"
    if accelerator.is_main_process:
        root.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers(name)
    return root / name


def _compare(
    accelerator: Accelerator,
    options: TrainOptions,
    model: AnimaTransformerModel,
    sources: ModelSources,
    outputs: Outputs,
    dtype: torch.dtype,
) -> Path | None:
    """The pictures that `compare_prompts` asks for, in the folder and in the log."""
    lines = options.log.compare_prompts
    if not lines or not accelerator.is_main_process:
        return None
    values = [asdict(line) for line in lines]
    model.eval()
    requests = [Request(**v | {"seed": options.loop.seed if v["seed"] is None else v["seed"]}) for v in values]
    try:
        grid = draw_comparison(model, sources, outputs, requests, dtype=dtype, device=accelerator.device)
    except torch.OutOfMemoryError as error:
        logger.warning("The adapter is saved; there was no memory to draw compare_prompts (%s).", error)
        return None
    with Image.open(grid) as picture:
        pixels = np.asarray(picture)[None]
    for tracker in accelerator.trackers:
        tracker.log_images({"without and with the adapter": pixels}, step=0, dataformats="NHWC")
    return grid
