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

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image

from ..adapters.layers import relative_delta
from ..data.cache import MODEL_INDEX_NAME, FileIndex, cache_folder, remove_abandoned
from ..data.dataset import BucketBatchSampler, SampleTable
from ..data.pictures import scan
from ..data.summary import summary
from ..errors import InputError
from ..files import require_writable
from ..generation import Request
from ..models.encoders import check_encoders
from ..models.quantization import require_quantization
from ..models.sources import ModelSources, resolve_sources
from ..transformer import AnimaTransformerModel
from .attention import require_attention
from .averages import AdapterAverage
from .comparison import draw_comparison
from .compiling import require_compiler, uncompiled
from .encoding import ModelHashes, TextModels, hash_model
from .engine import engine
from .metadata import RunFacts, dataset_metadata, training_metadata
from .network import add_network, hash_merged, load_base, require_weights
from .optimizers import needs_card
from .outputs import Outputs, is_final_state, require_free, resolve_folder
from .overview import held_out_note, overview, overview_text, run_facts
from .prepare import prepare_model, prepare_parts
from .previews import Previews
from .record import Record
from .report import reporting
from .requests import Requests
from .samples import Samples, planned_steps, prepare_held_out, prepare_samples, steps_of_epoch
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
from .tracking import log_picture, make_trackers, place_of_logs, record_of, start_tracking
from .validation import Validation
from .watch import run_watched

if TYPE_CHECKING:
    from ..config import RunConfig, TrainOptions
    from ..config.prompts import PromptLine

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
        previews: the pictures of `sample_prompts` over time in one, if there were several times.
        report: the page about the run.
    """

    adapter: Path
    steps: int
    relative_delta: float
    log_folder: Path | None
    comparison: Path | None
    previews: Path | None
    report: Path


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
    logs, record = place_of_logs(config, outputs.folder, now), Record(outputs.record)
    requests = Requests(outputs)
    with engine(options, make_trackers(config, logs, record)) as accelerator, reporting(record, outputs):
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
            require_writable("logging_dir", logs.root)
        for warning in config.warnings:
            logger.warning(warning)
        dtype = DTYPES[options.loop.mixed_precision]
        _require_device(options, accelerator.device, dtype)
        require_weights(options)
        with accelerator.local_main_process_first():  # one process of a machine fetches what is missing
            sources = locate_sources(options)
        check_encoders(sources.text_encoder, sources.vae)
        cache_dir = Path(options.loop.cache_dir) if options.loop.cache_dir else None
        found = scan(config.datasets, cache_dir=cache_dir)
        pictures = tuple(picture for picture in found if not picture.held_out)
        held_out = tuple(picture for picture in found if picture.held_out)
        settings, noted = state_settings(options, found), other_settings(options)
        if resume:
            require_same_settings(progress, settings, resume)
            warn_of_changes(progress, noted, resume)
        progress.settings, progress.noted = settings, noted

        model = load_base(sources.transformer, options, dtype, accelerator.device)
        set_seed(options.loop.seed)  # for the adapter's initial values; samples have generators of their own
        parameters = add_network(model, options)
        index = FileIndex(cache_folder(pictures[0].path.parent, cache_dir), MODEL_INDEX_NAME)
        merged = hash_merged(options, index)
        hashes = hash_model(sources, index)
        text_hash = "/".join(filter(None, (hashes.text, hashes.transformer, merged)))
        table = SampleTable(pictures)
        sampler = BucketBatchSampler(table.groups, table.batch_sizes, seed=options.loop.seed)
        facts = _plan(options, sources, hashes, batches=len(sampler))
        # At the last step there may be files to write yet, if the run was killed there.
        if resume and (progress.step > facts.total_steps or _is_done(resume, progress, facts)):
            raise InputError(
                f"resume: {resume} stands at step {progress.step}, and the run ends at step {facts.total_steps}; "
                "raise max_train_steps or max_train_epochs to go on."
            )

        text = TextModels(
            sources,
            model,
            text_hash,
            dtype,
            accelerator.device,
            max_length=options.model.anima_seq_len,
            train_conditioner=options.trains_conditioner,
        )
        for folder in {cache_folder(picture.path.parent, cache_dir) for picture in found}:
            remove_abandoned(folder)
        samples = prepare_samples(
            options, pictures, sampler, sources.vae, hashes.vae, text, total_steps=facts.total_steps
        )
        validation = None
        if held_out:
            seed = config.datasets[held_out[0].dataset_index].validation_seed
            measured = prepare_held_out(options, held_out, sources.vae, hashes.vae, text, seed=seed)
            validation = _validation(accelerator, model, measured, options)
        previews = _previews(config, accelerator, model, sources, outputs, dtype)
        prepare_model(model, options, accelerator)
        parts = prepare_parts(accelerator, options, model, parameters, samples, sampler, facts.total_steps)
        register(accelerator, model, progress, parts.average)
        if resume:
            load_state(accelerator, resume)
            logger.warning("Resumed %s at step %d of %d.", resume, progress.step, facts.total_steps)
        metadata = partial(training_metadata, options, dataset_metadata(pictures), facts, config.summary)
        saver = _saver(accelerator, options, model, outputs, progress, parts.average, metadata, config.resolved)
        saver.drop_old()
        about = overview(options, facts, parts.parameters, model, accelerator.device, outputs)
        if accelerator.is_main_process:
            accumulation = options.loop.gradient_accumulation_steps
            notes = [*samples.notes, *held_out_note(held_out)]
            print(overview_text(about), summary(pictures, facts.total_steps, accumulation, notes), sep="\n\n")
            record.begin(progress.step, run_facts(config, pictures, facts, about, notes), continued=continued)
        log_folder = start_tracking(accelerator, logs, options.log.log_with)
        run_watched(
            accelerator, options, parts, progress, facts, saver, requests, samples.dataset, previews, validation
        )
        with parts.average.in_place():
            learned = relative_delta(model.components, ADAPTER_NAME)
        strip = previews.strip() if previews is not None else None
        comparison = _compare(accelerator, options, model, sources, outputs, dtype, progress.step)
    return Result(outputs.final, progress.step, learned, log_folder, comparison, strip, outputs.report)


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


def locate_sources(options: TrainOptions) -> ModelSources:
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
        InputError: attention kernels, a compiler, an optimizer or a quantization that need another device or a package.
    """
    require_attention(options.loop.attn_mode, device, dtype)
    require_compiler(options.loop.compiler, device)
    require_quantization(options.memory.base_quantization, device)
    name = options.optimizer.optimizer_type
    if needs_card(name) and device.type == "cpu":
        raise InputError(f'optimizer_type: {name} needs a graphics card, and none is in use; "AdamW" runs everywhere.')


def _plan(options: TrainOptions, sources: ModelSources, hashes: ModelHashes, *, batches: int) -> RunFacts:
    loop = options.loop
    total, steps_per_epoch = planned_steps(loop, batches), steps_of_epoch(loop, batches)
    if loop.max_train_steps is not None and loop.max_train_epochs is not None:
        by_epochs = loop.max_train_epochs * steps_per_epoch
        logger.warning(
            "max_train_steps = %d, max_train_epochs = %d steps: the shorter counts.", loop.max_train_steps, by_epochs
        )
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


def _requests(lines: Sequence[PromptLine], seed: int) -> list[Request]:
    """What to draw; lines without a seed get the run's, so that pictures of one line can be compared."""
    return [
        Request(**values | {"seed": seed if values["seed"] is None else values["seed"]})
        for values in map(asdict, lines)
    ]


def _validation(
    accelerator: Accelerator, model: AnimaTransformerModel, samples: Samples, options: TrainOptions
) -> Validation:
    log = options.log
    return Validation(
        accelerator,
        model,
        samples.dataset,
        every_steps=log.validate_every_n_steps,
        every_epochs=log.validate_every_n_epochs,
        limit=log.max_validation_steps,
    )


def _previews(
    config: RunConfig,
    accelerator: Accelerator,
    model: AnimaTransformerModel,
    sources: ModelSources,
    outputs: Outputs,
    dtype: torch.dtype,
) -> Previews | None:
    """What draws `sample_prompts`, with their texts encoded; only the main process draws."""
    if not config.previews or not accelerator.is_main_process:
        return None
    log = config.train.log
    return Previews(
        accelerator,
        model,
        sources,
        outputs,
        _requests(config.previews, config.train.loop.seed),
        at_first=log.sample_at_first,
        every_steps=log.sample_every_n_steps,
        every_epochs=log.sample_every_n_epochs,
        max_length=config.train.model.anima_seq_len,
        dtype=dtype,
    )


def _compare(
    accelerator: Accelerator,
    options: TrainOptions,
    model: AnimaTransformerModel,
    sources: ModelSources,
    outputs: Outputs,
    dtype: torch.dtype,
    step: int,
) -> Path | None:
    """The pictures that `compare_prompts` asks for, in the folder and in the log."""
    lines = options.log.compare_prompts
    if not lines or not accelerator.is_main_process:
        return None
    model.eval()
    requests = _requests(lines, options.loop.seed)
    try:
        with uncompiled():
            grid = draw_comparison(model, sources, outputs, requests, dtype=dtype, device=accelerator.device)
    except torch.OutOfMemoryError as error:
        logger.warning("The adapter is saved; there was no memory to draw compare_prompts (%s).", error)
        return None
    with Image.open(grid) as picture:
        log_picture(accelerator, "without and with the adapter", picture, step)
    for number, request in enumerate(requests, start=1):
        pair = outputs.compared(number, "without"), outputs.compared(number, "with")
        record_of(accelerator).compared(request.prompt, *pair)
    return grid
