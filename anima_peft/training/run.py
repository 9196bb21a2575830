"""One training run from a parsed configuration to the files it leaves."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch.utils.data import DataLoader

from ..adapters.exchange import start_from
from ..adapters.layers import relative_delta, undecayed_parameters
from ..adapters.lokr import LoKrConfig
from ..adapters.lora import LoraConfig
from ..adapters.strengths import adapter_layers
from ..data.cache import FileIndex, cache_folder
from ..data.dataset import BucketBatchSampler, CachedDataset, collate
from ..data.pictures import Picture, scan
from ..errors import InputError
from ..files import require_writable
from ..generation import Request
from ..models.encoders import check_encoders
from ..models.precision import enable_fp32_residual
from ..models.sources import ModelSources, resolve_sources
from ..transformer import AnimaTransformerModel
from .attention import use_xformers
from .comparison import draw_comparison
from .encoding import ModelHashes, cache_captions, cache_latents, hash_model
from .engine import engine
from .flow import SigmaSampler
from .loop import Parts, run_loop
from .metadata import RunFacts, training_metadata
from .optimizers import build_adamw, build_scheduler, warmup_steps
from .outputs import Outputs, require_free, resolve_folder
from .saving import Saver
from .state import ADAPTER_NAME, Progress, load_state, read_progress, register, require_same_settings

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
        TrainingError: the loss is not finite.
    """
    options, now = config.train, datetime.now()
    outputs = Outputs(resolve_folder(options.save.output_dir, now), options.save.output_name)
    log_root = Path(options.log.logging_dir) if options.log.logging_dir else outputs.folder / "logs"
    with engine(options, log_root) as accelerator:
        resume = Path(options.save.resume) if options.save.resume else None
        progress = read_progress(resume) if resume else Progress()
        settings = _state_settings(options)
        if resume:
            require_same_settings(progress, settings, resume)
        progress.settings = settings
        continued = resume is not None and resume.resolve().parent == outputs.folder.resolve()
        if not continued:  # what another folder's run has saved is not this one's to drop
            progress.saved_steps, progress.saved_epochs = [], []
        require_free(outputs, overwrite=options.save.overwrite, resume=continued)
        require_writable("output_dir", outputs.folder)
        if options.log.log_with != "none":
            require_writable("logging_dir", log_root)
        for warning in config.warnings:
            logger.warning(warning)
        with accelerator.local_main_process_first():  # one process of a machine fetches what is missing
            sources = _sources(options)
        check_encoders(sources.text_encoder, sources.vae)
        cache_dir = Path(options.loop.cache_dir) if options.loop.cache_dir else None
        pictures = scan(config.datasets, cache_dir=cache_dir)

        dtype = DTYPES[options.loop.mixed_precision]
        model = AnimaTransformerModel.from_pretrained(sources.transformer, torch_dtype=dtype)
        set_seed(options.loop.seed)  # for the adapter's initial values; samples have generators of their own
        parameters = add_network(model, options)
        hashes = hash_model(sources, FileIndex(cache_folder(pictures[0].path.parent, cache_dir)))
        dataset = _cached_dataset(options, sources, hashes, model, pictures, dtype, accelerator.device, cache_dir)
        sampler = BucketBatchSampler(dataset.groups, dataset.batch_sizes, seed=options.loop.seed)
        facts = _plan(options, sources, hashes, batches=len(sampler))
        if resume and progress.step >= facts.total_steps:
            raise InputError(
                f"resume: {resume} stands at step {progress.step}, and the run ends at step {facts.total_steps}; "
                "raise max_train_steps or max_train_epochs to go on."
            )

        _prepare_model(model, options, accelerator)
        parts = _prepare_parts(accelerator, options, model, parameters, dataset, sampler, facts.total_steps)
        register(accelerator, model, progress)
        if resume:
            load_state(accelerator, resume)
            logger.warning("Resumed %s at step %d of %d.", resume, progress.step, facts.total_steps)
        metadata = partial(training_metadata, options, pictures, facts, config.summary)
        saver = _saver(accelerator, options, model, outputs, progress, metadata, config.resolved)
        log_folder = _start_tracking(accelerator, options, log_root, now)
        run_loop(
            accelerator,
            parts,
            progress,
            total_steps=facts.total_steps,
            max_grad_norm=options.optimizer.max_grad_norm,
            on_step=saver.after_step,
            on_epoch=saver.after_epoch,
        )
        saver.at_end()
        learned = relative_delta(model.components, ADAPTER_NAME)
        comparison = _compare(accelerator, options, model, sources, outputs, dtype)
    return Result(outputs.final, progress.step, learned, log_folder, comparison)


def _state_settings(options: TrainOptions) -> dict[str, Any]:
    """What a state fixes for the run that goes on with it."""
    optimizer, loop = options.optimizer, options.loop
    return {
        **{f.name: getattr(optimizer, f.name) for f in fields(optimizer) if f.name != "max_grad_norm"},
        "mixed_precision": loop.mixed_precision,
        "gradient_accumulation_steps": loop.gradient_accumulation_steps,
        "seed": loop.seed,
    }


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


def add_network(model: AnimaTransformerModel, options: TrainOptions) -> list[torch.nn.Parameter]:
    """Put the adapter that the options describe on the model; returns its parameters, all float32."""
    network = options.network
    shared: dict[str, Any] = {
        "r": network.network_dim,
        "target_modules": list(network.target_modules),
        "train_norm": network.train_norm,
        "train_text_conditioner": network.train_llm_adapter,
    }
    config: LoraConfig | LoKrConfig
    if network.is_lokr:
        config = LoKrConfig(
            alpha=network.network_alpha,
            decompose_factor=network.lokr_factor,
            full_matrix=network.lokr_full_matrix,
            decompose_both=network.lokr_decompose_both,
            rank_dropout=network.lokr_rank_dropout,
            module_dropout=network.lokr_module_dropout,
            **shared,
        )
    else:
        config = LoraConfig(
            lora_alpha=network.network_alpha, lora_dropout=network.network_dropout, use_dora=network.use_dora, **shared
        )
    parameters = model.add_adapter(config, ADAPTER_NAME)
    if network.network_weights is not None:
        logger.warning(start_from(model.components, network.network_weights, ADAPTER_NAME))
    return parameters


def _cached_dataset(
    options: TrainOptions,
    sources: ModelSources,
    hashes: ModelHashes,
    model: AnimaTransformerModel,
    pictures: Sequence[Picture],
    dtype: torch.dtype,
    device: torch.device,
    cache_dir: Path | None,
) -> CachedDataset:
    """Fill the cache and build the data set over it. VAE and text encoder are gone afterwards."""
    latents = cache_latents(
        pictures,
        sources.vae,
        model_hash=hashes.vae,
        dtype=dtype,
        device=device,
        batch_size=options.loop.vae_batch_size,
        cache_dir=cache_dir,
    )
    captions = cache_captions(
        pictures,
        sources,
        model,
        model_hash=f"{hashes.text}/{hashes.transformer}",
        dtype=dtype,
        device=device,
        max_length=options.model.anima_seq_len,
        train_conditioner=options.network.train_llm_adapter,
        cache_dir=cache_dir,
    )
    flow = options.flow
    draw_sigma = SigmaSampler(flow.timestep_sampling, flow.sigmoid_scale, flow.discrete_flow_shift)  # type: ignore[arg-type]
    return CachedDataset(pictures, latents.files, captions.files, seed=options.loop.seed, draw_sigma=draw_sigma)


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


def _prepare_model(model: AnimaTransformerModel, options: TrainOptions, accelerator: Accelerator) -> None:
    """Bring the model into the form it is trained in, on its device."""
    if options.loop.mixed_precision == "fp16":
        enable_fp32_residual(model.transformer)
    if options.loop.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if options.loop.xformers:
        use_xformers(model, accelerator.device)
    if options.loop.mixed_precision != "no":
        # Autocast brings the adapter's float32 weights to the activations' dtype; PEFT would do it the other way
        # round, and compute the adapter in float32.
        for _, _, layer in adapter_layers(model.components):
            layer.cast_input_dtype_enabled = False
    model.transformer.to(accelerator.device)
    if options.network.train_llm_adapter:  # frozen, it has done its work
        model.text_conditioner.to(accelerator.device)


def _prepare_parts(
    accelerator: Accelerator,
    options: TrainOptions,
    model: AnimaTransformerModel,
    parameters: list[torch.nn.Parameter],
    dataset: CachedDataset,
    sampler: BucketBatchSampler,
    total_steps: int,
) -> Parts:
    settings, loop = options.optimizer, options.loop
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in parameters}, "something besides the adapter would be trained"
    optimizer = build_adamw(
        parameters,
        settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        undecayed=undecayed_parameters(model.components, ADAPTER_NAME),
    )
    scheduler = build_scheduler(
        optimizer,
        settings.lr_scheduler,
        total_steps,
        warmup=warmup_steps(settings.lr_warmup_steps, total_steps),
        num_cycles=settings.lr_scheduler_num_cycles,
        power=settings.lr_scheduler_power,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=loop.max_data_loader_n_workers,
        persistent_workers=loop.persistent_data_loader_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    ready_model, ready_optimizer, ready_scheduler, ready_loader = accelerator.prepare(
        model, optimizer, scheduler, loader, device_placement=[False, True, True, True]
    )
    return Parts(ready_model, ready_optimizer, ready_scheduler, ready_loader, sampler, parameters)


def _saver(
    accelerator: Accelerator,
    options: TrainOptions,
    model: AnimaTransformerModel,
    outputs: Outputs,
    progress: Progress,
    metadata: partial[dict[str, str]],
    resolved: str,
) -> Saver:
    save = options.save
    return Saver(
        accelerator,
        model,
        outputs,
        progress,
        metadata,
        resolved,
        format=save.save_format,  # type: ignore[arg-type]  # one of its choices
        dtype=DTYPES[save.save_precision],
        every_steps=save.save_every_n_steps,
        every_epochs=save.save_every_n_epochs,
        keep_steps=save.save_last_n_steps,
        keep_epochs=save.save_last_n_epochs,
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
