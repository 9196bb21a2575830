"""The options that say what becomes of captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..data.specs import AS_WRITTEN
from .checks import check_warmup, value_of
from .options import Needs, Option, option, options_of
from .reading import FAULTY
from .schema import Found

_SPLITTING = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")
_ONLY_SPLIT = f"It has an effect with {', '.join(_SPLITTING[:-1])} or {_SPLITTING[-1]}."


@dataclass(frozen=True, kw_only=True)
class CaptionKeys:
    """Captions, where the dataset TOML does not say."""

    caption_prefix: str | None = option(
        AS_WRITTEN.caption_prefix, help="Text before each caption, with a space between."
    )
    caption_suffix: str | None = option(
        AS_WRITTEN.caption_suffix, help="Text after each caption, with a space between."
    )
    caption_dropout_rate: float = option(
        AS_WRITTEN.caption_dropout_rate,
        minimum=0,
        maximum=1,
        help="Share of the samples that are trained with an empty caption, as the model sees no prompt.",
    )
    caption_dropout_every_n_epochs: int = option(
        AS_WRITTEN.caption_dropout_every_n_epochs,
        minimum=0,
        help="Every so many epochs, all captions are empty; 0 for never.",
    )
    enable_wildcard: bool = option(
        AS_WRITTEN.enable_wildcard,
        help="Take one of a caption file's lines at random, and one of the choices in {a|b}; {{ and }} are braces.",
    )
    caption_separator: str = option(AS_WRITTEN.caption_separator, help="What stands between tags.")
    shuffle_caption: bool = option(AS_WRITTEN.shuffle_caption, help="Shuffle the tags anew for each sample.")
    caption_tag_dropout_rate: float = option(
        AS_WRITTEN.caption_tag_dropout_rate, minimum=0, maximum=1, help="Chance for each tag to be left out."
    )
    token_warmup_step: int | float = option(
        AS_WRITTEN.token_warmup_step,
        minimum=0,
        check=check_warmup,
        help="Over so many steps the number of tags grows from token_warmup_min to all; a number below 1 is a share "
        "of all steps.",
    )
    token_warmup_min: int = option(
        AS_WRITTEN.token_warmup_min,
        minimum=0,
        only_with=(Needs("token_warmup_step", unless=(0,)),),
        help="Number of tags at the start of the warmup, besides those that are kept.",
    )
    keep_tokens: int = option(
        AS_WRITTEN.keep_tokens,
        minimum=0,
        help=f"So many tags at the start are neither shuffled nor left out. {_ONLY_SPLIT}",
    )
    keep_tokens_separator: str | None = option(
        AS_WRITTEN.keep_tokens_separator,
        help="What closes the kept tags at the start, and where it stands twice, opens those at the end; a caption "
        f"with it does not heed keep_tokens. {_ONLY_SPLIT}",
    )
    secondary_separator: str | None = option(
        AS_WRITTEN.secondary_separator,
        help="What stands between tags that are shuffled and left out as one; becomes caption_separator.",
    )


CAPTION_OPTIONS = options_of(CaptionKeys)
_NEED_TAGS = ("keep_tokens", "keep_tokens_separator", "caption_separator")


def unheeded(options: Mapping[str, Option], found: Mapping[str, Found]) -> Iterator[tuple[str, str]]:
    """Caption options of a subset that are set and have no effect because captions are not taken apart, and why."""

    def is_off(name: str) -> bool:
        value = value_of(options[name], found)
        return value is not FAULTY and value == options[name].default

    if not all(is_off(name) for name in _SPLITTING):
        return
    uses_separator = not (is_off("secondary_separator") and is_off("metadata_file"))
    for name in _NEED_TAGS:
        if is_off(name) or (name == "caption_separator" and uses_separator):
            continue
        yield name, f"has no effect without {', '.join(_SPLITTING[:-1])} or {_SPLITTING[-1]}; remove it"
