"""Whether the captions of a run are encoded before it and kept, or in every step: which, why, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..data.caption_choice import is_random
from ..data.pictures import Picture
from ..data.summary import size_text

MOST_KEPT = 8 * 2**30  # bytes of encoded captions that a program may put on a disk unasked
# Of UTF-8, with the tokenizer that makes more of a text; 3.7 to 4.0 for English, Chinese and Japanese captions.
_BYTES_PER_TOKEN = 3.5


@dataclass(frozen=True)
class TextPlan:
    """The captions that a run keeps encoded, or that it keeps none.

    Attributes:
        captions: each that is kept, with the number of its picture; None where captions are encoded in every step.
        pictures: how many pictures the run has.
        varying: how many of them have captions that vary.
        size: about how many bytes the kept captions take; where none are kept, how many they would take at least.
        is_asked_for: whether an option decided, and not the size.
    """

    captions: dict[str, int] | None
    pictures: int
    varying: int
    size: int
    is_asked_for: bool

    def sentence(self, encoder_size: int | None = None) -> str:
        """What was decided and what it costs.

        Args:
            encoder_size: bytes of the text encoder in memory, if they are known.
        """
        if self.captions is None:
            why = "" if self.is_asked_for else f", because kept they would take more than {size_text(MOST_KEPT)}"
            memory = "" if encoder_size is None else f" ({size_text(encoder_size)})"
            return f"Captions are encoded in every step{why}: the text encoder stays in memory{memory}."
        count = f"{len(self.captions)} different captions"
        if self.varying:
            count += f" of {self.pictures} pictures, those of {self.varying} vary"
        return f"Captions are encoded before training and kept: {count}, about {size_text(self.size)} on disk."


def plan_text(
    pictures: tuple[Picture, ...],
    captions: Iterable[tuple[int, str]],
    *,
    keep: bool | None,
    max_length: int,
    width: int,
    dtype: torch.dtype,
) -> TextPlan:
    """Decide how a run gets its encoded captions.

    Everything random about captions derives from (seed, epoch, sample), so that all captions of a run are known before
    it. Encoding them beforehand costs no more time than in the steps, and room on the disk instead of memory.

    Args:
        pictures: of the run.
        captions: `captions_of_run`; it is gone through only as far as needed.
        keep: what an option asks for; None keeps captions as long as they take `MOST_KEPT` bytes at most.
        max_length: of a caption in tokens.
        width: numbers for each token.
        dtype: of these.
    """
    varying = sum(is_random(picture) for picture in pictures)
    needed: dict[str, int] = {}
    size = 0
    if keep is not False:
        for number, caption in captions:
            if caption not in needed:
                needed[caption] = number
                size += entry_size(caption, max_length, width, dtype)
                if keep is None and size > MOST_KEPT:
                    return TextPlan(None, len(pictures), varying, size, is_asked_for=False)
    return TextPlan(needed if keep is not False else None, len(pictures), varying, size, is_asked_for=keep is not None)


def entry_size(caption: str, max_length: int, width: int, dtype: torch.dtype) -> int:
    """About how many bytes an encoded caption takes."""
    tokens = min(max_length, int(len(caption.encode()) / _BYTES_PER_TOKEN) + 1)
    return tokens * width * dtype.itemsize
