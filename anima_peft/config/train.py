"""The options of a training run, one frozen dataclass per concern; flags, checks and help come from the fields."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_cached, check_file_name
from .memory import MemoryOptions
from .model import ModelOptions
from .network import NetworkOptions
from .optimization import EmaOptions, FlowOptions, LossOptions, OptimizerOptions, ScheduleOptions
from .options import Needs, option
from .picture_loss import PictureLossOptions
from .prompts import MAX_SEED, PromptLine, parse_prompt_line

DEFAULT_TRAIN_STEPS = 1600  # sd-scripts' length of a run for which neither steps nor epochs are named

_WITH_METADATA = (Needs("no_metadata", unless=(True,)),)
_WITH_PROMPTS = (Needs("sample_prompts", unless=(None,)),)
_WITH_LOGS = (Needs("log_with", unless=("none",)),)
_WITH_WANDB = (Needs("log_with", values=("wandb", "all")),)


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
    skip_nonfinite_steps: int = option(
        0, minimum=0, help="Steps whose loss or gradient is not finite and that are left out before the run stops."
    )
    xformers: bool = option(
        False,
        aliases=("xfomers",),
        only_with=(Needs("attn_mode", values=(None, "xformers")),),
        help="Use xformers' attention in the transformer; where it cannot be had, PyTorch's own, with a warning.",
    )
    attn_mode: str | None = option(
        None,
        aliases=("anima_attention_backend",),
        choices=("torch", "flash", "xformers"),
        synonyms={"native": "torch", "sdpa": "torch"},
        refused=dict.fromkeys(
            ("sageattn", "sage"), 'has no backward pass, so that nothing could be trained; use "torch" or "flash"'
        ),
        help="Attention kernels of the transformer; what cannot be had is an error. Unset, torch, or see xformers.",
    )
    torch_compile: bool = option(
        False,
        aliases=("compile",),
        help="Compile the transformer's blocks: less time a step, after a minute or more at the first ones.",
    )
    dynamo_backend: str = option(
        "inductor",
        aliases=("compile_backend",),
        choices=("inductor", "aot_eager", "eager"),
        only_with=(Needs("torch_compile", values=(True,)),),
        help="What compiles them; inductor is the one that makes them faster, the others are for finding faults.",
    )
    max_data_loader_n_workers: int = option(0, minimum=0, help="Processes that load data; 0 loads in the main one.")
    persistent_data_loader_workers: bool = option(
        False,
        only_with=(Needs("max_data_loader_n_workers", unless=(0,)),),
        help="Keep the loading processes alive between epochs.",
    )
    vae_batch_size: int = option(1, minimum=1, help="Pictures that the VAE encodes at once.")
    cache_latents: bool = option(
        True,
        help="Encode latents once and keep them, but for what color_aug and random_crop vary; otherwise the VAE stays "
        "in memory and encodes in every step.",
    )
    cache_latents_to_disk: bool = option(True, check=check_cached, help="Always on: kept latents are on disk.")
    cache_text_encoder_outputs: bool | None = option(
        None,
        help="Encode every caption of the run before it and keep it, however captions vary; otherwise the text "
        "encoder stays in memory and encodes in every step. Unset, captions are kept unless they would take more than "
        "8 GiB.",
    )
    cache_text_encoder_outputs_to_disk: bool = option(
        True, check=check_cached, help="Always on: kept captions are on disk."
    )
    cache_dir: str | None = option(
        None, is_path=True, help="Folder of the caches; unset, .anima_cache in each picture folder."
    )

    @property
    def compiler(self) -> str | None:
        """What compiles the transformer's blocks; None if nothing does."""
        return self.dynamo_backend if self.torch_compile else None


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
    save_last_n_epochs_state: int | None = option(
        None,
        minimum=1,
        only_with=(Needs("save_every_n_epochs", unless=(None,)), Needs("save_state", values=(True,))),
        help="Of the states saved by epoch, keep those of the last so many epochs; unset, as long as their adapter.",
    )
    save_last_n_steps_state: int | None = option(
        None,
        minimum=1,
        only_with=(Needs("save_every_n_steps", unless=(None,)), Needs("save_state", values=(True,))),
        help="Of the states saved by step, keep those of the last so many steps; unset, as long as their adapter.",
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
    resume: str | None = option(
        None, is_path=True, help='Folder of a saved state to go on from; "latest" finds the one that got furthest.'
    )
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
        choices=("tensorboard", "wandb", "all", "none"),
        synonyms={"": "tensorboard"},
        help="Where to log to besides the run's own record and report: TensorBoard, Weights & Biases (wandb, a package "
        "of its own), both (all), or nothing more.",
    )
    log_prefix: str | None = option(
        None, check=check_file_name, only_with=_WITH_LOGS, help="First part of a run's log folder name."
    )
    log_tracker_name: str = option("anima_peft", only_with=_WITH_WANDB, help="Project in Weights & Biases.")
    wandb_run_name: str | None = option(
        None, only_with=_WITH_WANDB, help="Name of the run in Weights & Biases; unset, that of the log folder."
    )
    wandb_api_key: str | None = option(
        None,
        secret=True,
        only_with=_WITH_WANDB,
        help="Key for Weights & Biases; better is `wandb login` or the environment's WANDB_API_KEY. It is written "
        "nowhere.",
    )
    log_tracker_config: str | None = option(
        None,
        is_path=True,
        only_with=_WITH_WANDB,
        help="TOML file with a table [wandb] of further arguments of wandb.init, such as entity or tags.",
    )
    sample_prompts: str | None = option(
        None,
        is_path=True,
        help="File of prompts to draw while training: .txt in the syntax of compare_prompts, .toml or .json.",
    )
    sample_every_n_steps: int | None = option(
        None, minimum=1, only_with=_WITH_PROMPTS, help="Draw sample_prompts every so many optimizer steps."
    )
    sample_every_n_epochs: int | None = option(
        None, minimum=1, only_with=_WITH_PROMPTS, help="Draw sample_prompts every so many epochs."
    )
    sample_at_first: bool = option(False, only_with=_WITH_PROMPTS, help="Draw sample_prompts before the first step.")
    validate_every_n_steps: int | None = option(
        None, minimum=1, help="Measure the loss of the pictures held out by validation_split every so many steps."
    )
    validate_every_n_epochs: int | None = option(
        None, minimum=1, help="Measure the loss of the pictures held out by validation_split every so many epochs."
    )
    max_validation_steps: int | None = option(
        None, minimum=1, help="Of the pictures held out, measure at most so many each time; unset, all of them."
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
    loss: LossOptions
    picture_loss: PictureLossOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    ema: EmaOptions
    loop: LoopOptions
    memory: MemoryOptions
    save: SaveOptions
    log: LogOptions

    @property
    def trains_conditioner(self) -> bool:
        """Whether the adapter reaches the text conditioner."""
        return self.network.train_llm_adapter and self.optimizer.llm_adapter_lr != 0
