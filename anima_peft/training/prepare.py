"""Model, optimizer, schedule and data brought into the form that the loop drives."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..adapters.layers import parts_of
from ..adapters.max_norm import limit_norms
from ..adapters.naming import ModuleTable
from ..adapters.strengths import adapter_layers
from ..data.dataset import MIN_PROMPT_ROWS, BucketBatchSampler, collate
from ..errors import InputError
from ..models.precision import enable_fp32_residual
from ..transformer import AnimaTransformerModel
from .attention import set_attention
from .averages import AdapterAverage
from .block_swap import swap_blocks
from .checkpointing import checkpoint_blocks
from .compiling import compile_blocks
from .groups import Rates, group_parameters
from .loop import Parts
from .objective import flow_loss
from .optimizers import build_optimizer, sets_own_rate
from .processes import Processes
from .recomputing import recompute_cheap_values
from .requests import leave_signals_to_parent
from .samples import Samples
from .schedules import ADAFACTOR, as_steps, build_custom_scheduler, build_scheduler
from .state import ADAPTER_NAME

if TYPE_CHECKING:
    from ..config import LoopOptions, TrainOptions


def prepare_model(model: AnimaTransformerModel, options: TrainOptions, accelerator: Accelerator) -> None:
    """Bring the model into the form it is trained in, on its device."""
    if options.loop.mixed_precision == "fp16":
        enable_fp32_residual(model.transformer)
    if options.loop.gradient_checkpointing:
        checkpoint_blocks(model, options.memory.gradient_checkpointing_every)
    set_attention(model, options.loop.attn_mode, accelerator.device, xformers=options.loop.xformers)
    if options.loop.mixed_precision != "no":
        # Autocast brings the adapter's float32 weights to the activations' dtype; PEFT would do it the other way
        # round, and compute the adapter in float32.
        for _, _, layer in adapter_layers(model.components):
            layer.cast_input_dtype_enabled = False
    # Every process loads the same weights. DistributedDataParallel would send them around, which it can do neither with
    # those that wait in main memory nor with quantized ones.
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    if options.memory.blocks_to_swap:
        swap_blocks(model.transformer, options.memory.blocks_to_swap, accelerator.device)
    else:
        model.transformer.to(accelerator.device)
    if options.trains_conditioner:  # frozen, it has done its work
        model.text_conditioner.to(accelerator.device)
    if options.loop.compiler is not None:
        compile_blocks(model, options.loop.compiler)  # last: all that is on the blocks becomes part of their graphs
    else:
        blocks = list(model.transformer.transformer_blocks)
        if options.loop.gradient_checkpointing:
            del blocks[:: options.memory.gradient_checkpointing_every]
        network = options.network
        draws = bool(network.network_dropout or network.rank_dropout or network.module_dropout)
        recompute_cheap_values(blocks, draws=draws)


def prepare_parts(
    accelerator: Accelerator,
    processes: Processes,
    options: TrainOptions,
    model: AnimaTransformerModel,
    parameters: list[torch.nn.Parameter],
    samples: Samples,
    sampler: BucketBatchSampler,
    total_steps: int,
) -> Parts:
    """Build what the loop drives, prepared by accelerate.

    Args:
        parameters: the adapter's, all that may be trained.
        samples: what is trained on; `sampler` decides the order.
        total_steps: where the schedule ends.

    Raises:
        InputError: a pattern of rates matches nothing, nothing would be trained, or the schedule cannot be built.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in parameters}, "something besides the adapter would be trained"
    optimizer, scheduler, average = optimization(model, options, total_steps)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ready_model, ready_optimizer, ready_scheduler = accelerator.prepare(
        model, optimizer, scheduler, device_placement=[False, True, True]
    )
    return Parts(
        ready_model,
        ready_optimizer,
        ready_scheduler,
        _loader(accelerator, options.loop, samples, sampler),
        sampler,
        parameters,
        average,
        flow_loss(options),
        partial(_limit_norms, model, options.network.scale_weight_norms),
        samples.complete,
        processes,
        options.model.anima_seq_len > MIN_PROMPT_ROWS,
    )


def _loader(
    accelerator: Accelerator, options: LoopOptions, samples: Samples, sampler: BucketBatchSampler
) -> DataLoaderShard:
    """Batches of `collate` on the device, those that the sampler has shared out to this process."""
    loader = DataLoader(
        samples.dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=options.max_data_loader_n_workers,
        persistent_workers=options.persistent_data_loader_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_parent,
        # Each start of a loader draws a number. Out of torch's own generator, a resumed run would be one draw ahead.
        generator=torch.Generator(),
    )
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,  # more would share the batches out a second time
        process_index=0,
        put_on_device=True,
        non_blocking=True,  # out of pinned memory, while the card computes
    )


def optimization(
    model: AnimaTransformerModel, options: TrainOptions, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, AdapterAverage]:
    """Optimizer, schedule and average of the adapter that is on the model; what has the rate 0 is frozen.

    Raises:
        InputError: a pattern of rates matches nothing, or nothing would be trained.
    """
    network, settings = options.network, options.optimizer
    rates = Rates(
        settings.learning_rate,
        settings.unet_lr,
        settings.llm_adapter_lr,
        network.rates_by_pattern,
        network.loraplus_lr_ratio,
    )
    components = model.components
    groups = group_parameters(parts_of(components, ModuleTable(components), ADAPTER_NAME), rates)
    if not groups:
        raise InputError("network_reg_lrs: the rate is 0 everywhere, so that nothing would be trained.")
    optimizer = build_optimizer(settings.optimizer_type, groups, settings.learning_rate, settings.arguments)
    scheduler = _scheduler(optimizer, options, total_steps)
    parameters = [parameter for group in groups for parameter in group["params"]]
    average = AdapterAverage(parameters, optimizer, options.ema.ema_decay if options.ema.use_ema else None)
    return optimizer, scheduler, average


def _scheduler(
    optimizer: torch.optim.Optimizer, options: TrainOptions, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    schedule = options.schedule
    if schedule.lr_scheduler_type is not None:
        return build_custom_scheduler(optimizer, schedule.lr_scheduler_type, schedule.arguments)
    return build_scheduler(
        optimizer,
        ADAFACTOR if sets_own_rate(type(optimizer), options.optimizer.arguments) else schedule.lr_scheduler,
        total_steps,
        warmup=as_steps(schedule.lr_warmup_steps, total_steps),
        decay=as_steps(schedule.lr_decay_steps, total_steps),
        num_cycles=schedule.lr_scheduler_num_cycles,
        power=schedule.lr_scheduler_power,
        timescale=schedule.lr_scheduler_timescale,
        min_lr_ratio=schedule.lr_scheduler_min_lr_ratio,
        arguments=schedule.arguments,
    )


def _limit_norms(model: AnimaTransformerModel, limit: float | None) -> dict[str, float]:
    """Max-norm regularization after a step, and what to log of it under sd-scripts' names."""
    if limit is None:
        return {}
    norms = limit_norms(model.components, ADAPTER_NAME, limit)
    return {
        "max_norm/keys_scaled": norms.scaled,
        "max_norm/average_key_norm": norms.mean,
        "max_norm/max_key_norm": norms.largest,
    }
