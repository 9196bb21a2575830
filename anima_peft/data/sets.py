"""Which pictures of a dataset are held out for validation, and how often those of regularisation sets are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .randomness import mix
from .specs import DatasetSpec

if TYPE_CHECKING:
    from .pictures import Picture


def hold_out(pictures: Sequence[Picture], datasets: Sequence[DatasetSpec]) -> list[Picture]:
    """The pictures, of which each dataset's share for validation is held out, and shown there as it is.

    Which they are depends on the seed and the content alone: the order decides nothing, and a picture that is added
    puts at most one other on the other side. Regularisation pictures are not held out.
    """
    held: set[tuple[int, Path]] = set()
    for index, dataset in enumerate(datasets):
        own = [p for p in pictures if p.dataset_index == index and not p.is_reg]
        if dataset.validation_split and len(own) > 1:
            order = sorted(own, key=lambda p: (mix(dataset.validation_seed, p.sha256, "validation"), p.path))
            count = min(max(round(len(own) * dataset.validation_split), 1), len(own) - 1)
            held |= {(index, picture.path) for picture in order[:count]}
    return [_held_out(p) if (p.dataset_index, p.path) in held else p for p in pictures]


def _held_out(picture: Picture) -> Picture:
    captions = replace(
        picture.captions,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        shuffle_caption=False,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )
    return replace(
        picture,
        held_out=True,
        num_repeats=1,
        flip_aug=False,
        color_aug=False,
        random_crop=False,
        captions=captions,
    )


def balance(pictures: Sequence[Picture]) -> tuple[list[Picture], list[Path]]:
    """The pictures, with regularisation pictures repeated to the number of the others in their dataset.

    As sd-scripts does it (library/train_util.py, `DreamBoothDataset`): each with its own repeats in turn until there
    are enough, the rest left out; if there are too few, one repeat more for each in turn.

    Returns:
        The pictures, and the files of those that are left out.
    """
    kept: list[Picture] = []
    unused: list[Path] = []
    for index in dict.fromkeys(picture.dataset_index for picture in pictures):
        own = [picture for picture in pictures if picture.dataset_index == index]
        wanted = sum(picture.num_repeats for picture in own if not picture.is_reg and not picture.held_out)
        taken: list[Picture] = []
        lacking = wanted
        for picture in (picture for picture in own if picture.is_reg):
            if lacking > 0:
                taken.append(picture)
                lacking -= picture.num_repeats
            else:
                unused.append(picture.path)
        if taken and lacking > 0:
            each, rest = divmod(lacking, len(taken))
            taken = [replace(p, num_repeats=p.num_repeats + each + (i < rest)) for i, p in enumerate(taken)]
        kept += [picture for picture in own if not picture.is_reg] + taken
    return kept, unused
