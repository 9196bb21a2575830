"""The options of a training run, one frozen dataclass per concern; flags, checks and help come from the fields."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import (
    check_betas,
    check_cached,
    check_factor,
    check_file_name,
    check_targets,
    check_warmup,
)
from .foreign import OTHER_NETWORKS
from .model import ModelOptions
from .options import Needs, option
from .prompts import MAX_SEED, PromptLine, parse_prompt_line

DEFAULT_TRAIN_STEPS = 1600  # sd-scripts' length of a run for which neither steps nor epochs are named

# The lists of `key=value` texts; their keys are the fields that say `inside`.
ARGUMENT_LISTS = {
    "network_args": "Further options of the adapter, each written key=value.",
    "optimizer_args": "Further options of the optimizer, each written key=value.",
}

LORA, LOKR = "networks.lora_anima", "networks.lokr_anima"

_LORA = (Needs("network_module", values=(LORA,)),)
_LOKR = (Needs("network_module", values=(LOKR,)),)
_WITH_METADATA = (Needs("no_metadata", unless=(True,)),)
_WITH_LOGS = (Needs("log_with", unless=("none",)),)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Adapter to train."""

    network_module: str = option(choices=(LORA, LOKR), refused=OTHER_NETWORKS, help="Kind of adapter.")
    network_dim: int = option(
        4, minimum=1, help="Rank of the adapter. For LoKr, 100000 and above make both factors full matrices."
    )
    network_alpha: float = option(
        1.0,
        minimum=0,
        help="The adapter is scaled by network_alpha / network_dim; 0 stands for network_dim. "
        "LoKr with full factors is not scaled.",
    )
    network_dropout: float = option(
        0.0, minimum=0, below=1, only_with=_LORA, help="Share of the adapter's inputs that is dropped in each step."
    )
    network_weights: str | None = option(
        None,
        is_path=True,
        only_with=(Needs("resume", values=(None,)),),
        help="Adapter file to start from: weights only, not optimizer or schedule (see resume).",
    )
    train_norm: bool = option(
        True, also_inside="network_args", help="Train the affine norms of what is adapted, as deltas in the adapter."
    )
    target_modules: tuple[str, ...] = option(
        ("attn-mlp",),
        inside="network_args",
        check=check_targets,
        help='Layers to adapt: "attn-mlp", "attn-mlp-adaln", "all-linear", or patterns of module names.',
    )
    train_llm_adapter: bool = option(False, inside="network_args", help="Also adapt the text conditioner.")
    use_dora: bool = option(
        False, inside="network_args", only_with=_LORA, help="Train DoRA: the weights' magnitudes apart from the rest."
    )
    lokr_factor: int = option(
        8,
        inside="network_args",
        aliases=("factor",),
        check=check_factor,
        only_with=_LOKR,
        help="Size of LoKr's smaller factor where it divides the layer's width; -1 takes the most balanced pair.",
    )
    lokr_full_matrix: bool = option(
        False, inside="network_args", only_with=_LOKR, help="Both of LoKr's factors are full matrices."
    )
    lokr_decompose_both: bool = option(
        False,
        inside="network_args",
        only_with=(*_LOKR, Needs("lokr_full_matrix", unless=(True,))),
        help="Low rank for LoKr's smaller factor too.",
    )
    lokr_rank_dropout: float = option(
        0.0,
        inside="network_args",
        aliases=("rank_dropout",),
        minimum=0,
        below=1,
        only_with=_LOKR,
        help="Share of LoKr's output rows that is dropped in each step.",
    )
    lokr_module_dropout: float = option(
        0.0,
        inside="network_args",
        aliases=("module_dropout",),
        minimum=0,
        below=1,
        only_with=_LOKR,
        help="Chance for each layer's LoKr to be dropped in a step.",
    )

    @property
    def is_lokr(self) -> bool:
        """Whether a LoKr is trained, and not a LoRA."""
        return self.network_module == LOKR


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Noise levels of the training pictures."""

    timestep_sampling: str = option(
        "sigmoid",
        aliases=("anima_timestep_sampling",),
        choices=("sigmoid", "uniform", "shift", "flux_shift"),
        synonyms={"logit_normal": "sigmoid"},
        refused={"sigma": 'is not supported in this version; use "uniform" or "sigmoid"'},
        help="Density of the noise levels in training; sigmoid is logit-normal.",
    )
    sigmoid_scale: float = option(
        1.0,
        aliases=("anima_sigmoid_scale",),
        above=0,
        only_with=(Needs("timestep_sampling", values=("sigmoid", "shift", "flux_shift")),),
        help="Spread of the logit-normal density; the model's authors advise 1.3 for LoRA.",
    )
    discrete_flow_shift: float = option(
        1.0,
        aliases=("anima_flow_shift",),
        above=0,
        only_with=(Needs("timestep_sampling", values=("shift",)),),
        help="Shift of the noise levels towards noise.",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer and learning rate."""

    optimizer_type: str = option(
        "AdamW", choices=("AdamW",), synonyms={"": "AdamW"}, ignore_case=True, help="Kind of optimizer."
    )
    betas: tuple[float, float] = option(
        (0.9, 0.999), inside="optimizer_args", check=check_betas, help="Decay of AdamW's two running means."
    )
    weight_decay: float = option(0.01, inside="optimizer_args", minimum=0, help="Decoupled weight decay.")
    eps: float = option(1e-8, inside="optimizer_args", above=0, help="Term in AdamW's denominator.")
    learning_rate: float = option(above=0, help="Learning rate; 2e-5 to 1e-4 is usual for a LoRA.")
    lr_scheduler: str = option(
        "constant",
        choices=("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
        refused={"piecewise_constant": 'needs step rules, which are not taken here; use "constant_with_warmup"'},
        help="Course of the learning rate, by diffusers' names.",
    )
    lr_warmup_steps: int | float = option(
        0,
        minimum=0,
        check=check_warmup,
        only_with=(Needs("lr_scheduler", unless=("constant",), hint='use lr_scheduler = "constant_with_warmup"'),),
        help="Steps of linear warmup; a number below 1 is a share of all steps.",
    )
    lr_scheduler_num_cycles: float = option(
        1.0,
        above=0,
        only_with=(Needs("lr_scheduler", values=("cosine_with_restarts",)),),
        help="Number of cosine cycles.",
    )
    lr_scheduler_power: float = option(
        1.0, above=0, only_with=(Needs("lr_scheduler", values=("polynomial",)),), help="Power of the polynomial."
    )
    max_grad_norm: float = option(1.0, minimum=0, help="Gradients are clipped to this norm; 0 turns it off.")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Course of the training."""

    max_train_steps: int | None = option(
        None, minimum=1, help=f"Optimizer steps. Where neither steps nor epochs are given: {DEFAULT_TRAIN_STEPS}."
    )
    max_train_epochs: int | None = option(
        None, minimum=1, help="Passes over the pictures. Where max_train_steps is given too, the shorter run counts."
    )
    train_batch_size: int = option(
        1, minimum=1, help="Pictures per device and step, in datasets that name no batch_size of their own."
    )
    gradient_accumulation_steps: int = option(1, minimum=1, help="Batches per optimizer step.")
    gradient_checkpointing: bool = option(
        False, help="Recompute activations in the backward pass: less memory, about a third more time."
    )
    mixed_precision: str = option(
        "bf16",
        choices=("no", "fp16", "bf16"),
        synonyms={"fp32": "no"},
        help='Type that the model computes in; "no" (or "fp32") is float32.',
    )
    seed: int = option(
        42,
        minimum=0,
        maximum=MAX_SEED,
        help="Seed of all random choices. Fixed unless set; sd-scripts draws one where none is given.",
    )
    xformers: bool = option(False, aliases=("xfomers",), help="Use xformers' attention in the transformer.")
    max_data_loader_n_workers: int = option(0, minimum=0, help="Processes that load data; 0 loads in the main one.")
    persistent_data_loader_workers: bool = option(
        False,
        only_with=(Needs("max_data_loader_n_workers", unless=(0,)),),
        help="Keep the loading processes alive between epochs.",
    )
    vae_batch_size: int = option(1, minimum=1, help="Pictures that the VAE encodes at once.")
    cache_latents: bool = option(True, check=check_cached, help="Always on: latents are encoded once and kept.")
    cache_latents_to_disk: bool = option(True, check=check_cached, help="Always on: latents are kept on disk.")
    cache_text_encoder_outputs: bool = option(
        True, check=check_cached, help="Always on: captions are encoded once and kept."
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        True, check=check_cached, help="Always on: encoded captions are kept on disk."
    )
    cache_dir: str | None = option(
        None, is_path=True, help="Folder of the caches; unset, .anima_cache in each picture folder."
    )


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """What is saved, and where."""

    output_dir: str = option(is_path=True, help="Folder of what is written; {time} in it becomes YYYYMMDD_HHMMSS.")
    output_name: str = option(check=check_file_name, help="Name of the adapter's files, without folder and suffix.")
    save_every_n_epochs: int | None = option(None, minimum=1, help="Save the adapter every so many epochs.")
    save_every_n_steps: int | None = option(None, minimum=1, help="Save the adapter every so many optimizer steps.")
    save_last_n_epochs: int | None = option(
        None,
        minimum=1,
        only_with=(Needs("save_every_n_epochs", unless=(None,)),),
        help="Of the files saved by epoch, keep those of the last so many epochs.",
    )
    save_last_n_steps: int | None = option(
        None,
        minimum=1,
        only_with=(Needs("save_every_n_steps", unless=(None,)),),
        help="Of the files saved by step, keep those of the last so many steps.",
    )
    save_precision: str = option(
        "fp32",
        choices=("fp32", "fp16", "bf16"),
        synonyms={"float": "fp32"},
        help='Type of the saved weights ("float" is fp32).',
    )
    save_format: str = option(
        "kohya", choices=("kohya", "comfy", "diffusers"), help="Names of the weights in the saved file."
    )
    save_state: bool = option(False, help="With each saved adapter, save all that --resume needs.")
    save_state_on_train_end: bool = option(False, help="Save what --resume needs when training ends.")
    resume: str | None = option(None, is_path=True, help="Folder of a saved state to go on from.")
    overwrite: bool = option(False, help="Replace files of an earlier run with this name.")
    no_metadata: bool = option(False, help="Write only what is needed to use the file, not how it was trained.")
    training_comment: str | None = option(None, only_with=_WITH_METADATA, help="Comment kept in the file.")
    metadata_title: str | None = option(None, only_with=_WITH_METADATA, help="Title kept in the file.")
    metadata_author: str | None = option(None, only_with=_WITH_METADATA, help="Author kept in the file.")
    metadata_description: str | None = option(None, only_with=_WITH_METADATA, help="Description kept in the file.")
    metadata_license: str | None = option(None, only_with=_WITH_METADATA, help="License kept in the file.")
    metadata_tags: str | None = option(
        None, only_with=_WITH_METADATA, help="Tags kept in the file, separated by commas."
    )


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """Logs and pictures of the run."""

    logging_dir: str | None = option(
        None, is_path=True, only_with=_WITH_LOGS, help="Folder of the logs; unset, logs in output_dir."
    )
    log_with: str = option(
        "tensorboard",
        choices=("tensorboard", "none"),
        synonyms={"": "tensorboard"},
        refused=dict.fromkeys(("wandb", "all"), 'is not supported in this version; use "tensorboard"'),
        help="Where to log to.",
    )
    log_prefix: str | None = option(
        None, check=check_file_name, only_with=_WITH_LOGS, help="First part of a run's log folder name."
    )
    compare_prompts: tuple[PromptLine, ...] = option(
        (),
        convert=parse_prompt_line,
        help="After training, draw each of these prompts without and with the adapter. Each may end in "
        "--n NEGATIVE --w WIDTH --h HEIGHT --d SEED --s STEPS --l GUIDANCE --fs SHIFT.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """All options of a run but its datasets."""

    model: ModelOptions
    network: NetworkOptions
    flow: FlowOptions
    optimizer: OptimizerOptions
    loop: LoopOptions
    save: SaveOptions
    log: LogOptions
