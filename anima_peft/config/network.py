"""The options of the adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..adapters.targets import ATTN_MLP, PRESETS
from .arguments import read_by_pattern
from .checks import check_factor, check_patterns, check_ranks, check_rates, check_targets
from .foreign import OTHER_NETWORKS
from .options import Needs, option
from .reading import shown

# The list of `key=value` texts whose keys are the fields that say `inside`.
ARGUMENT_LISTS = {"network_args": "Further options of the adapter, each written key=value."}

LORA, LOKR = "networks.lora_anima", "networks.lokr_anima"

_LORA = (Needs("network_module", values=(LORA,)),)
_LOKR = (Needs("network_module", values=(LOKR,)),)
_OWN_DIMS = (Needs("dim_from_weights", values=(False,)),)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Adapter to train."""

    network_module: str = option(choices=(LORA, LOKR), refused=OTHER_NETWORKS, help="Kind of adapter.")
    network_dim: int = option(
        4,
        minimum=1,
        only_with=_OWN_DIMS,
        help="Rank of the adapter. For LoKr, 100000 and above make both factors full matrices.",
    )
    network_alpha: float = option(
        1.0,
        minimum=0,
        only_with=_OWN_DIMS,
        help="The adapter is scaled by network_alpha / network_dim; 0 stands for network_dim. "
        "LoKr with full factors is not scaled.",
    )
    dim_from_weights: bool = option(
        False,
        only_with=(Needs("network_weights", unless=(None,)),),
        help="Take the adapted layers, ranks and alphas from network_weights.",
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
        (ATTN_MLP,),
        inside="network_args",
        check=check_targets,
        only_with=_OWN_DIMS,
        help=f"Layers to adapt: {', '.join(shown(preset) for preset in PRESETS)}, or patterns of module names.",
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
    rank_dropout: float = option(
        0.0,
        inside="network_args",
        aliases=("lokr_rank_dropout",),
        minimum=0,
        below=1,
        only_with=(Needs("use_dora", values=(False,)),),
        help="Share of LoRA's ranks, or of LoKr's output rows, that is dropped in each step.",
    )
    module_dropout: float = option(
        0.0,
        inside="network_args",
        aliases=("lokr_module_dropout",),
        minimum=0,
        below=1,
        only_with=(Needs("use_dora", values=(False,)),),
        help="Chance for each layer's adapter to be dropped in a step.",
    )
    exclude_patterns: tuple[str, ...] = option(
        (),
        inside="network_args",
        check=check_patterns,
        only_with=_OWN_DIMS,
        help="Layers of target_modules to leave out: patterns of whole module names.",
    )
    include_patterns: tuple[str, ...] = option(
        (),
        inside="network_args",
        check=check_patterns,
        only_with=_OWN_DIMS,
        help="Layers to adapt beside target_modules, also where exclude_patterns names them.",
    )
    network_reg_dims: tuple[str, ...] = option(
        (),
        inside="network_args",
        check=check_ranks,
        only_with=_OWN_DIMS,
        help="Ranks by pattern of whole module names, pattern=rank; the first that matches counts, and 0 leaves out.",
    )
    network_reg_lrs: tuple[str, ...] = option(
        (),
        inside="network_args",
        check=check_rates,
        help="Learning rates by pattern of whole module names, pattern=rate; the first that matches counts, and 0 "
        "leaves a module as it starts.",
    )
    loraplus_lr_ratio: float = option(
        1.0,
        inside="network_args",
        above=0,
        help="LoRA+: the rate of LoRA's up matrices, or of LoKr's smaller factors, is so many times the others'.",
    )
    base_weights: tuple[str, ...] = option(
        (),
        convert=os.path.expanduser,
        help="Adapter files to merge into the model before training; they are not part of what is saved.",
    )
    base_weights_multiplier: tuple[float, ...] = option(
        (),
        only_with=(Needs("base_weights", unless=((),)),),
        help="Strength of each of base_weights, 1.0 where none is given.",
    )
    scale_weight_norms: float | None = option(
        None, above=0, help="Keep the Frobenius norm of each layer's delta at this or below; 1.0 is usual."
    )

    @property
    def dims_by_pattern(self) -> dict[str, float]:
        """`network_reg_dims` by pattern."""
        return read_by_pattern(self.network_reg_dims, int)

    @property
    def rates_by_pattern(self) -> dict[str, float]:
        """`network_reg_lrs` by pattern."""
        return read_by_pattern(self.network_reg_lrs, float)

    @property
    def merged_weights(self) -> tuple[tuple[str, float], ...]:
        """`base_weights` with their strengths."""
        strengths = (*self.base_weights_multiplier, *[1.0] * len(self.base_weights))
        return tuple(zip(self.base_weights, strengths, strict=False))

    @property
    def is_lokr(self) -> bool:
        """Whether a LoKr is trained, and not a LoRA."""
        return self.network_module == LOKR
