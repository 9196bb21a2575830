"""The options that treat pictures apart: regularisation sets, masks, and those that are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..data.specs import DatasetSpec
from .options import option
from .reading import FAULTY, Faults
from .schema import Found


@dataclass(frozen=True, kw_only=True)
class PictureLossOptions:
    """Loss of regularisation sets and masked pictures."""

    prior_loss_weight: float = option(
        1.0, minimum=0, help="Weight of regularisation pictures (is_reg in the dataset TOML) in the loss."
    )
    masked_loss: bool = option(
        False, help="Weight the loss by the masks in the subsets' conditioning_data_dir. alpha_mask needs no switch."
    )


def check_picture_loss(found: Mapping[str, Found], datasets: Sequence[DatasetSpec], faults: Faults) -> None:
    """Report loss options that no subset heeds, and masks that the loss does not heed."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    weight, masked = found.get("prior_loss_weight"), found.get("masked_loss")
    if weight is not None and weight.value not in (FAULTY, 1.0) and not any(subset.is_reg for subset in subsets):
        faults.add(weight.path, "has no effect, because no subset has is_reg = true; remove it")
    has_masks = any(subset.conditioning_data_dir for subset in subsets)
    is_on = masked is not None and masked.value is True
    if masked is not None and is_on and not has_masks:
        instead = "alpha_mask works without it; remove it" if any(s.alpha_mask for s in subsets) else "remove it"
        faults.add(masked.path, f"has no effect, because no subset has a conditioning_data_dir; {instead}")
    if has_masks and not is_on and (masked is None or masked.value is not FAULTY):
        faults.add("conditioning_data_dir", "has no effect without masked_loss = true in the train args; add it")
    _check_validation(found, datasets, faults)


def _check_validation(found: Mapping[str, Found], datasets: Sequence[DatasetSpec], faults: Faults) -> None:
    """Report pictures that are held out and never looked at, and the other way round."""
    times = ("validate_every_n_steps", "validate_every_n_epochs")
    given = {name: found[name] for name in (*times, "max_validation_steps") if name in found}
    given = {name: each for name, each in given.items() if each.value is not None}
    is_split = any(dataset.validation_split for dataset in datasets)
    if is_split and not any(name in given for name in times):
        faults.add("validation_split", f"has no effect without one of {', '.join(times)} in the train args; add one")
    if not is_split:
        for each in given.values():
            faults.add(each.path, "has no effect, because no dataset has a validation_split; remove it")
