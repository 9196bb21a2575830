"""Effects of the caption options, on a caption of tags with a wildcard and a second line."""

from __future__ import annotations

import random
from collections.abc import Callable

from anima_peft.data import process_caption

from .bench import Built, Effect

TEXT = "a, b;c, {d|e}"
BESIDE = ("--caption_extension", ".tags")
SHUFFLED = (*BESIDE, "--shuffle_caption")


def captions(built: Built) -> set[str]:
    """All captions that samples of the first picture get in the first step."""
    picture = built.pictures[0]
    draws = (random.Random(seed) for seed in range(200))
    return {process_caption(picture.caption, picture.captions, draw, total_steps=100) for draw in draws}


def count(built: Built) -> int:
    return len(captions(built))


def _effect(change: tuple[str, ...], *after: str, beside: tuple[str, ...] = BESIDE, before: str = TEXT) -> Effect:
    return Effect(change, captions, {before}, set(after), beside)


def firsts(built: Built) -> set[str]:
    return {caption.split(", ")[0] for caption in captions(built)}


def _counted(change: tuple[str, ...], observe: Callable[[Built], object], before: object, after: object) -> Effect:
    return Effect(change, observe, before, after, SHUFFLED)


EFFECTS = {
    "caption_prefix": _effect(("--caption_prefix", "p,"), f"p, {TEXT}"),
    "caption_suffix": _effect(("--caption_suffix", "s"), f"{TEXT} s"),
    "caption_dropout_rate": _effect(("--caption_dropout_rate", "0.5"), TEXT, ""),
    "caption_dropout_every_n_epochs": _effect(("--caption_dropout_every_n_epochs", "1"), ""),
    "enable_wildcard": _effect(("--enable_wildcard",), "a, b;c, d", "a, b;c, e", "second line"),
    "secondary_separator": _effect(("--secondary_separator", ";"), "a, b,c, {d|e}"),
    "caption_tag_dropout_rate": _effect(("--caption_tag_dropout_rate", "1"), ""),
    "token_warmup_step": _effect(("--token_warmup_step", "0.1"), "a"),
    "token_warmup_min": _effect(
        ("--token_warmup_min", "2"), "a, b;c", beside=(*BESIDE, "--token_warmup_step", "10"), before="a"
    ),
    "keep_tokens_separator": _effect(
        ("--keep_tokens_separator", ", b"), "a", beside=(*BESIDE, "--caption_tag_dropout_rate", "1"), before=""
    ),
    "shuffle_caption": Effect(("--shuffle_caption",), count, 1, 6, BESIDE),
    "caption_separator": _counted(("--caption_separator", ";"), count, 6, 2),
    "keep_tokens": _counted(("--keep_tokens", "1"), firsts, {"a", "b;c", "{d|e}"}, {"a"}),
}
