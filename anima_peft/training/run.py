"""One training run from a parsed configuration to the files it leaves."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
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
from ..data.pictures import Picture, scan
from ..data.summary import summary
from ..errors import InputError
from ..generation import Request
from ..models.encoders import check_encoders
from ..models.sources import ModelSources
from ..transformer import AnimaTransformerModel
from .comparison import draw_comparison
from .compiling import uncompiled
from .device import DTYPES, require_device
from .encoding import ModelHashes, TextModels, hash_model
from .engine import engine
from .metadata import RunFacts, dataset_metadata, training_metadata
from .network import add_network, hash_merged, load_base, locate_sources, require_weights
from .outputs import Outputs, is_final_state, resolve_folder
from .overview import held_out_note, overview, overview_text, run_facts
from .prepare import prepare_model, prepare_parts
from .previews import Previews
from .processes import Processes
from .random_states import start_random_states
from .record import Record
from .report import reporting
from .requests import Requests
from .resuming import begin, take_up
from .run_lock import run_lock
from .samples import planned_steps, prepare_held_out, prepare_samples, steps_ahead, steps_of_epoch
from .saving import Saver
from .state import ADAPTER_NAME, Progress, load_state, register
from .tracking import log_picture, make_trackers, place_of_logs, record_of, start_tracking
from .validation import Validation
from .watch import run_watched

if TYPE_CHECKING:
    from ..config import RunConfig, TrainOptions
    from ..config.prompts import PromptLine

logger = logging.getLogger(__name__)


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
    first step and before anything but the run's lock appears in `output_dir`.

    Raises:
        InputError: a fault in the configuration's values, the model's files, the pictures or the captions, or another
            run that is at work under the same name in the same folder.
        TrainingError: the loss is not finite, or there is not enough memory.
        Interrupted: a signal or a file asked for the end; adapter and state are saved.
    """
    options, now = config.train, datetime.now()
    own = _outputs(options, now)  # those of the main process count
    logs, record = place_of_logs(config, own.folder, now), Record(own.record)
    trackers = make_trackers(config, logs, record)
    # The lock is let go last, when the report is written.
    with ExitStack() as held, engine(options, trackers) as accelerator, reporting(record, own):
        processes = Processes(accelerator)
        outputs = _outputs(options, processes.from_main(now))
        with processes.together():
            if processes.is_main:
                held.enter_context(run_lock(outputs))
        requests = Requests(outputs, processes)
        resume, progress, continued = begin(options, outputs, logs.root, requests, processes)
        for warning in config.warnings:
            logger.warning(warning)
        with processes.together():
            require_device(options, accelerator.device)
            require_weights(options)
        cache_dir = Path(options.loop.cache_dir) if options.loop.cache_dir else None
        with processes.local_main_first():  # one process of a machine fetches what is missing, and fills the index
            sources = locate_sources(options)
            check_encoders(sources.text_encoder, sources.vae)
            found = scan(config.datasets, cache_dir=cache_dir)
        pictures = tuple(picture for picture in found if not picture.held_out)
        held_out = tuple(picture for picture in found if picture.held_out)
        table = SampleTable(pictures)
        sampler = BucketBatchSampler(
            table.groups,
            table.batch_sizes,
            seed=options.loop.seed,
            processes=processes.count,
            process=processes.index,
        )
        take_up(progress, resume, options, found, table, processes)

        with processes.together():
            dtype = DTYPES[options.loop.mixed_precision]
            model = load_base(sources.transformer, options, dtype, accelerator.device)
            set_seed(options.loop.seed)  # for the adapter's initial values; samples have generators of their own
            parameters = add_network(model, options)
        start_random_states(options.loop.seed, progress.step, processes.index)
        with processes.local_main_first():
            index = FileIndex(cache_folder(pictures[0].path.parent, cache_dir), MODEL_INDEX_NAME)
            merged = hash_merged(options, index)
            hashes = hash_model(sources, index)
        ahead = steps_ahead(options.loop, len(sampler), progress)
        facts = _plan(options, sources, hashes, batches=len(sampler), ahead=ahead)
        _require_steps_left(resume, progress, facts)

        text = TextModels(
            sources,
            model,
            "/".join(filter(None, (hashes.text, hashes.transformer, merged))),
            dtype,
            accelerator.device,
            max_length=options.model.anima_seq_len,
            train_conditioner=options.trains_conditioner,
        )
        if processes.is_local_main:
            for folder in {cache_folder(picture.path.parent, cache_dir) for picture in found}:
                remove_abandoned(folder)
        samples = prepare_samples(
            options,
            pictures,
            sampler,
            sources.vae,
            hashes.vae,
            text,
            processes=processes,
            total_steps=facts.total_steps,
            ahead=ahead,
        )
        validation = _validation(config, accelerator, processes, held_out, sources.vae, hashes.vae, text)
        with processes.together():
            previews = _previews(config, accelerator, model, sources, outputs, dtype)
            prepare_model(model, options, accelerator)
        parts = prepare_parts(accelerator, processes, options, model, parameters, samples, sampler, facts.total_steps)
        register(accelerator, model, progress, parts.average)
        if resume:
            with processes.together():
                load_state(accelerator, progress, resume, seed=options.loop.seed)
            logger.warning("Resumed %s at step %d of %d.", resume, progress.step, facts.total_steps)
        metadata = partial(training_metadata, options, dataset_metadata(pictures), facts, config.summary)
        saver = Saver(
            accelerator, processes, model, outputs, progress, parts.average, metadata, config.resolved, options.save
        )
        saver.drop_old()
        about = overview(options, facts, parts.parameters, model, accelerator.device, outputs)
        if processes.is_main:
            notes = [*samples.notes, *held_out_note(held_out)]
            print(overview_text(about), _summary(pictures, facts, options, notes, processes), sep="\n\n")
            record.begin(progress.step, run_facts(config, pictures, facts, about, notes), continued=continued)
        with processes.together():
            log_folder = start_tracking(accelerator, logs, options.log.log_with)
        run_watched(
            accelerator, options, parts, progress, facts, saver, requests, samples.dataset, previews, validation
        )
        with parts.average.in_place():
            learned = relative_delta(model.components, ADAPTER_NAME)
        with processes.together():
            strip = previews.strip() if previews is not None else None
            comparison = _compare(accelerator, options, model, sources, outputs, dtype, progress.step)
    return Result(outputs.final, progress.step, learned, log_folder, comparison, strip, outputs.report)


def _outputs(options: TrainOptions, now: datetime) -> Outputs:
    return Outputs(resolve_folder(options.save.output_dir, now), options.save.output_name)


def _summary(
    pictures: tuple[Picture, ...], facts: RunFacts, options: TrainOptions, notes: Sequence[str], processes: Processes
) -> str:
    """What the run trains on, with the batches that all processes do together."""
    if processes.count > 1:
        pictures = tuple(replace(picture, batch_size=picture.batch_size * processes.count) for picture in pictures)
        notes = [*notes, f"{processes.count} processes train together: a batch is {processes.count} x batch_size."]
    return summary(pictures, facts.total_steps, options.loop.gradient_accumulation_steps, notes)


def _require_steps_left(resume: Path | None, progress: Progress, facts: RunFacts) -> None:
    """Raises InputError where a state stands at the run's end already, or beyond it."""
    # At the last step there may be files to write yet, if the run was killed there.
    if resume and (
        progress.step > facts.total_steps or (progress.step == facts.total_steps and is_final_state(resume))
    ):
        raise InputError(
            f"resume: {resume} stands at step {progress.step}, and the run ends at step {facts.total_steps}; "
            "raise max_train_steps or max_train_epochs to go on."
        )


def _plan(options: TrainOptions, sources: ModelSources, hashes: ModelHashes, *, batches: int, ahead: int) -> RunFacts:
    loop = options.loop
    total, steps_per_epoch = planned_steps(loop, batches, ahead), steps_of_epoch(loop, batches)
    if loop.max_train_steps is not None and loop.max_train_epochs is not None:
        by_epochs = loop.max_train_epochs * steps_per_epoch + ahead
        logger.warning(
            "max_train_steps = %d, max_train_epochs = %d steps: the shorter counts.", loop.max_train_steps, by_epochs
        )
    return RunFacts(sources, hashes, batches, total, epochs=math.ceil((total - ahead) / steps_per_epoch))


def _requests(lines: Sequence[PromptLine], seed: int) -> list[Request]:
    """What to draw; lines without a seed get the run's, so that pictures of one line can be compared."""
    return [
        Request(**values | {"seed": seed if values["seed"] is None else values["seed"]})
        for values in map(asdict, lines)
    ]


def _validation(
    config: RunConfig,
    accelerator: Accelerator,
    processes: Processes,
    pictures: tuple[Picture, ...],
    vae: Path,
    vae_hash: str,
    text: TextModels,
) -> Validation | None:
    """What measures the loss of the pictures that are held out, with these encoded; None if there are none."""
    if not pictures:
        return None
    seed, log = config.datasets[pictures[0].dataset_index].validation_seed, config.train.log
    samples = prepare_held_out(config.train, pictures, vae, vae_hash, text, seed=seed, processes=processes)
    return Validation(
        accelerator,
        processes,
        text.model,
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
