"""The caption that a sample is trained with: chosen, shortened and shuffled as the options say.

The order of things is sd-scripts' (library/train_util.py, `BaseDataset.process_caption`). It differs from it in three
points: prefix and suffix go to each of several captions and not to the first and last line; empty tags vanish; and
what is random derives from the sample and not from the process.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from .randomness import sample_random
from .specs import CaptionSpec

UNCONDITIONAL = ""
"""The prompt of a sample without caption: what the pipeline encodes where no negative prompt is given."""

_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


class Captioned(Protocol):
    """What captions are chosen for: a `Picture`."""

    @property
    def caption(self) -> str:
        """The text it has: one caption a line."""

    @property
    def captions(self) -> CaptionSpec:
        """What becomes of it."""


@dataclass(frozen=True)
class CaptionChoice:
    """Chooses the caption of each sample of a run, the same in every process and after every interruption.

    Attributes:
        seed: of the run.
        batches_per_epoch, batches_per_step, total_steps: where the run stands at a batch, for the warmup of tags.
    """

    seed: int = 0
    batches_per_epoch: int = 1
    batches_per_step: int = 1
    total_steps: int = 1

    def __call__(self, picture: Captioned, epoch: int, index: int, batch: int) -> str:
        """The caption of the sample `index` in the batch of this number of an epoch; all count from 0."""
        steps_per_epoch = -(-self.batches_per_epoch // self.batches_per_step)
        return process_caption(
            picture.caption,
            picture.captions,
            sample_random(self.seed, epoch, index, "caption"),
            epoch=epoch,
            step=epoch * steps_per_epoch + batch // self.batches_per_step,
            total_steps=self.total_steps,
        )


def process_caption(
    text: str, spec: CaptionSpec, draw: random.Random, *, epoch: int = 0, step: int = 0, total_steps: int = 1
) -> str:
    """The caption of one sample.

    Args:
        text: what the picture has: one caption a line. Without wildcards only the first line counts.
        spec: what becomes of it.
        draw: the sample's own.
        epoch: from 0.
        step: optimizer steps done before the sample's.
        total_steps: of the run.
    """
    # Drawn in any case, so that a change of the rate leaves all other choices as they were.
    dropped = draw.random() < spec.caption_dropout_rate
    every = spec.caption_dropout_every_n_epochs
    if dropped or (every > 0 and (epoch + 1) % every == 0):
        return UNCONDITIONAL
    lines = [_with_ends(line, spec) for line in text.split("\n")]
    caption = _fill_wildcards(draw.choice(lines), draw) if spec.enable_wildcard else lines[0]
    if spec.varies_tags:
        caption = _vary_tags(caption, spec, draw, step, total_steps)
    if spec.secondary_separator:
        caption = caption.replace(spec.secondary_separator, spec.caption_separator)
    return caption


def is_random(picture: Captioned) -> bool:
    """Whether its captions can differ from sample to sample."""
    spec = picture.captions
    has_choices = spec.enable_wildcard and ("\n" in picture.caption or "{" in _with_ends(picture.caption, spec))
    return spec.drops_captions or spec.varies_tags or has_choices


def captions_of_run(
    pictures: Sequence[Captioned],
    picture_of_sample: Sequence[int],
    batches: Iterable[Sequence[tuple[int, int, int, *tuple[object, ...]]]],
    choose: CaptionChoice,
) -> Iterator[tuple[int, str]]:
    """Every caption that a run trains with, beside the number of its picture; one that never changes comes once.

    Args:
        pictures: of the samples.
        picture_of_sample: for each sample the number of its picture.
        batches: those of the whole run in their order, each of (epoch, index of the sample, number of the batch, …).
        choose: as the run chooses.
    """
    varying = [is_random(picture) for picture in pictures]
    yield from ((number, choose(picture, 0, 0, 0)) for number, picture in enumerate(pictures) if not varying[number])
    if not any(varying):
        return
    for batch in batches:
        for epoch, index, position, *_ in batch:
            number = picture_of_sample[index]
            if varying[number]:
                yield number, choose(pictures[number], epoch, index, position)


def _with_ends(line: str, spec: CaptionSpec) -> str:
    return " ".join(part for part in (spec.caption_prefix, line, spec.caption_suffix) if part)


def _fill_wildcards(caption: str, draw: random.Random) -> str:
    """One of the choices for each {a|b}, and single braces for double ones."""

    def fill(match: re.Match[str]) -> str:
        choices = match[1]
        return match[0][0] if choices is None else draw.choice(choices.split("|"))

    return _WILDCARD.sub(fill, caption)


def _vary_tags(caption: str, spec: CaptionSpec, draw: random.Random, step: int, total_steps: int) -> str:
    first, flexible, last = _parts(caption, spec)
    warmup = spec.token_warmup_step
    steps = int(warmup * total_steps) if warmup < 1 else int(warmup)
    if step < steps:
        least = spec.token_warmup_min
        flexible = flexible[: step * (len(flexible) - least) // steps + least]
    if spec.shuffle_caption:
        draw.shuffle(flexible)
    if spec.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if draw.random() >= spec.caption_tag_dropout_rate]
    return ", ".join(first + flexible + last)


def _parts(caption: str, spec: CaptionSpec) -> tuple[list[str], list[str], list[str]]:
    """Tags that are kept at the start, those that may change, and those that are kept at the end."""

    def tags(part: str) -> list[str]:
        return [tag for tag in (tag.strip() for tag in part.split(spec.caption_separator)) if tag]

    if spec.keep_tokens_separator and spec.keep_tokens_separator in caption:
        first, flexible, *last = caption.split(spec.keep_tokens_separator, 2)
        return tags(first), tags(flexible), tags(last[0]) if last else []
    every = tags(caption)
    return every[: spec.keep_tokens], every[spec.keep_tokens :], []
