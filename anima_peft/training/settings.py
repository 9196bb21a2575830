"""What a saved state fixes for the run that goes on with it, and what may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..data.buckets import Placement
from ..data.masks import MaskSource
from ..data.pictures import Picture
from ..data.specs import CaptionSpec
from .state import BATCH_SIZES

if TYPE_CHECKING:
    from ..config import TrainOptions

_NAMES = tuple(field.name for field in fields(Picture))
_FREE_TO_CHANGE = ("save", "log")  # where to and how often, not what is trained


def state_settings(options: TrainOptions, pictures: Sequence[Picture]) -> dict[str, Any]:
    """What a state cannot be continued without: accelerate restores it, or it decides what a step is.

    The network itself is not here: its tensors are compared.
    """
    network, loop = options.network, options.loop
    fixed = asdict(options.optimizer) | asdict(options.schedule) | asdict(options.ema)
    fixed.pop("max_grad_norm")
    return {
        **fixed,
        "network_reg_lrs": network.network_reg_lrs,
        "loraplus_lr_ratio": network.loraplus_lr_ratio,
        "mixed_precision": loop.mixed_precision,
        "gradient_accumulation_steps": loop.gradient_accumulation_steps,
        "seed": loop.seed,
        "number of pictures": len(pictures),
        BATCH_SIZES: sorted({picture.batch_size for picture in pictures}),
        "buckets": sorted({f"{picture.placement.bucket[0]}x{picture.placement.bucket[1]}" for picture in pictures}),
        "content of the pictures, captions and subsets (sha256)": _fingerprint(pictures),
    }


def other_settings(options: TrainOptions) -> dict[str, Any]:
    """All the other options that have to do with training, by name."""
    fixed = state_settings(options, ())
    groups = {name: asdict(group) for name, group in vars(options).items() if name not in _FREE_TO_CHANGE}
    return {key: value for group in groups.values() for key, value in group.items() if key not in fixed}


def _fingerprint(pictures: Sequence[Picture]) -> str:
    """Of all that is known of each picture but places, as folders may move, and batch sizes, compared by themselves.

    The sha256 of a JSON list, made in parts.
    """
    encoder = json.JSONEncoder(sort_keys=True, default=str)
    digest = hashlib.sha256(b"[")
    for number, picture in enumerate(pictures):
        known = {name: getattr(picture, name) for name in _NAMES}
        known |= {
            "path": None,
            "batch_size": None,
            "placement": _as_dict(picture.placement),
            "captions": _as_dict(picture.captions),
            "mask": _without_place(picture.mask),
        }
        digest.update(b", " if number else b"")
        digest.update(encoder.encode(known).encode("utf-8"))
    digest.update(b"]")
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _as_dict(shared: Placement | CaptionSpec) -> dict[str, Any]:
    """What many pictures have in common; `asdict` is slow."""
    return asdict(shared)


def _without_place(mask: MaskSource | None) -> object:
    return mask and (mask.sha256, mask.from_alpha)
