"""The options of how is trained: noise levels, loss, optimizer, schedule, averages."""

from __future__ import annotations

from dataclasses import dataclass

from ..training.optimizers import canonical_name
from ..training.schedules import SCHEDULES
from .arguments import read_arguments
from .checks import check_warmup
from .options import Needs, option

_BY_NAME = Needs("lr_scheduler_type", values=(None,))
_HUBER = (Needs("loss_type", values=("huber", "smooth_l1")),)


def _with_schedule(*names: str) -> tuple[Needs, ...]:
    return (Needs("lr_scheduler", values=names), _BY_NAME)


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Noise of the training pictures."""

    timestep_sampling: str = option(
        "sigmoid",
        aliases=("anima_timestep_sampling",),
        choices=("sigmoid", "uniform", "shift", "flux_shift", "sigma"),
        synonyms={"logit_normal": "sigmoid"},
        help="Density of the noise levels in training; sigmoid is logit-normal, and sigma follows weighting_scheme.",
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
        only_with=(Needs("timestep_sampling", values=("shift", "sigma")),),
        help="Shift of the noise levels towards noise.",
    )
    logit_mean: float = option(
        0.0,
        only_with=(Needs("weighting_scheme", values=("logit_normal",)),),
        help="Mean of the logit-normal density of weighting_scheme; above 0 is towards the picture.",
    )
    logit_std: float = option(
        1.0,
        above=0,
        only_with=(Needs("weighting_scheme", values=("logit_normal",)),),
        help="Spread of the logit-normal density of weighting_scheme.",
    )
    mode_scale: float = option(
        1.29,
        minimum=-1,
        maximum=1.75,
        only_with=(Needs("weighting_scheme", values=("mode",)),),
        help="How much the density of weighting_scheme = mode favours the middle.",
    )
    min_timestep: int = option(
        0, minimum=0, maximum=999, help="Least noise level, in thousandths; the density is stretched over the range."
    )
    max_timestep: int = option(1000, minimum=1, maximum=1000, help="Greatest noise level, in thousandths.")
    noise_offset: float = option(
        0.0,
        aliases=("anima_noise_offset",),
        minimum=0,
        help="Deviation of a shift of each channel's noise as a whole, for darker and brighter pictures.",
    )
    noise_offset_random_strength: bool = option(
        False,
        only_with=(Needs("noise_offset", unless=(0.0,)),),
        help="Vary noise_offset between 0 and its value from sample to sample.",
    )
    ip_noise_gamma: float = option(
        0.0, minimum=0, help="Deviation of noise that is added to the model's input and not to its target."
    )
    ip_noise_gamma_random_strength: bool = option(
        False,
        only_with=(Needs("ip_noise_gamma", unless=(0.0,)),),
        help="Vary ip_noise_gamma between 0 and its value from sample to sample.",
    )


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Loss."""

    loss_type: str = option(
        "l2",
        choices=("l2", "l1", "huber", "smooth_l1"),
        help="Squared or absolute error, or pseudo-Huber: squared below a threshold and absolute beyond.",
    )
    huber_c: float = option(0.1, above=0, only_with=_HUBER, help="Threshold of the Huber losses at pure noise.")
    huber_schedule: str = option(
        "snr",
        choices=("snr", "exponential", "constant"),
        only_with=_HUBER,
        help="Threshold by noise level sigma: (1 - huber_c) (1 - sigma)^2 + huber_c, huber_c^sigma, or huber_c.",
    )
    huber_scale: float = option(1.0, above=0, only_with=_HUBER, help="Multiplies the threshold at every noise level.")
    weighting_scheme: str = option(
        "none",
        choices=("none", "sigma_sqrt", "cosmap", "logit_normal", "mode"),
        synonyms={"": "none", "uniform": "none"},
        help="Weight of the loss by noise level (sigma_sqrt, cosmap), or density of the noise levels (logit_normal, "
        'mode; they need timestep_sampling = "sigma").',
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer."""

    optimizer_type: str = option(
        "AdamW",
        synonyms={"": "AdamW"},
        convert=canonical_name,
        help="Optimizer: AdamW, AdamW8bit, PagedAdamW8bit, Lion, Lion8bit, Adafactor, Prodigy, AdamWScheduleFree, "
        "RAdamScheduleFree, CAME, or the path of a class such as torch.optim.NAdam.",
    )
    optimizer_args: tuple[str, ...] = option(
        (), check=read_arguments, help="Arguments of the optimizer, each written key=value; weight_decay=0.01, say."
    )
    learning_rate: float = option(above=0, help="Learning rate; 2e-5 to 1e-4 is usual for a LoRA.")
    unet_lr: float | None = option(
        None, aliases=("transformer_lr",), above=0, help="Learning rate of the adapter on the transformer."
    )
    llm_adapter_lr: float | None = option(
        None,
        minimum=0,
        only_with=(Needs("train_llm_adapter", values=(True,)),),
        help="Learning rate of the adapter on the text conditioner; 0 is as if train_llm_adapter were off.",
    )
    max_grad_norm: float = option(1.0, minimum=0, help="Gradients are clipped to this norm; 0 turns it off.")

    @property
    def arguments(self) -> dict[str, object]:
        """`optimizer_args` by key."""
        return read_arguments(self.optimizer_args)


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Learning rate over time."""

    lr_scheduler: str = option(
        "constant",
        choices=SCHEDULES,
        synonyms={"": "constant"},
        refused={
            "piecewise_constant": 'needs step rules, which are not taken here; use "constant_with_warmup"',
            "reduce_lr_on_plateau": "follows a metric, and training measures none",
            "greedy": "follows a metric, and training measures none",
        },
        only_with=(_BY_NAME,),
        help="Course of the learning rate, by transformers' names.",
    )
    lr_warmup_steps: int | float = option(
        0,
        minimum=0,
        check=check_warmup,
        only_with=(
            Needs("lr_scheduler", unless=("constant", "adafactor"), hint='use lr_scheduler = "constant_with_warmup"'),
            _BY_NAME,
        ),
        help="Steps of linear warmup; a number below 1 is a share of all steps.",
    )
    lr_decay_steps: int | float = option(
        0,
        minimum=0,
        check=check_warmup,
        only_with=_with_schedule("warmup_stable_decay"),
        help="Steps of the fall at the end; a number below 1 is a share of all steps.",
    )
    lr_scheduler_num_cycles: float = option(
        1.0,
        above=0,
        only_with=_with_schedule("cosine_with_restarts", "cosine", "cosine_with_min_lr", "warmup_stable_decay"),
        help="Number of restarts; of the other cosines, of half waves.",
    )
    lr_scheduler_power: float = option(
        1.0, above=0, only_with=_with_schedule("polynomial"), help="Power of the polynomial."
    )
    lr_scheduler_timescale: int | None = option(
        None, minimum=1, only_with=_with_schedule("inverse_sqrt"), help="Time scale; unset, lr_warmup_steps or 10000."
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None,
        minimum=0,
        below=1,
        only_with=_with_schedule("cosine_with_min_lr", "warmup_stable_decay"),
        help="Where the rate ends, as a share of learning_rate.",
    )
    lr_scheduler_type: str | None = option(
        None, help="A scheduler's class instead of lr_scheduler: its path, or a name in torch.optim.lr_scheduler."
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (), check=read_arguments, help="Further arguments of the scheduler, each written key=value."
    )

    @property
    def arguments(self) -> dict[str, object]:
        """`lr_scheduler_args` by key."""
        return read_arguments(self.lr_scheduler_args)


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """Average of the adapter."""

    use_ema: bool = option(
        False, aliases=("ema",), help="Save an exponential moving average of the adapter instead of its last weights."
    )
    ema_decay: float = option(
        0.999,
        above=0,
        below=1,
        only_with=(Needs("use_ema", values=(True,)),),
        help="Decay of the average; in the first steps it is (1 + step) / (10 + step) at most.",
    )
