"""What becomes of captions, by a table; and that the table's captions are the same however text is cached."""

from __future__ import annotations

import dataclasses
import random
from itertools import permutations
from pathlib import Path

import pytest

from anima_peft.data import BucketBatchSampler, CaptionChoice, CaptionSpec, captions_of_run, process_caption
from anima_peft.data.caption_choice import is_random
from anima_peft.data.randomness import sample_random


@dataclasses.dataclass(frozen=True)
class Text:
    """Stands for a picture."""

    caption: str
    captions: CaptionSpec


def orders(*tags: str, before: str = "", after: str = "") -> set[str]:
    """Every order of some tags, with what is kept."""
    return {before + ", ".join(order) + after for order in permutations(tags)}


# text, options, every caption that may come of it, and where not the first: (epoch, step, total steps)
Case = tuple[str, dict[str, object], set[str], tuple[int, int, int]]


def case(text: str, options: dict[str, object], expected: set[str] | str, *place: int) -> Case:
    return text, options, {expected} if isinstance(expected, str) else expected, (*place, *(0, 0, 100)[len(place) :])  # type: ignore[return-value]


SHUFFLE = {"shuffle_caption": True}
KEEP = {"keep_tokens_separator": "|||"}
WILD = {"enable_wildcard": True}
WARM = {"token_warmup_step": 10}
CASES = [
    # as written
    case("", {}, ""),
    case("a cat", {}, "a cat"),
    case("a,b ,  c", {}, "a,b ,  c"),
    case("one\ntwo", {}, "one"),
    case("{a|b}", {}, "{a|b}"),
    case("日本語、中文", {}, "日本語、中文"),
    # prefix and suffix
    case("a", {"caption_prefix": "p"}, "p a"),
    case("a", {"caption_suffix": "s"}, "a s"),
    case("a", {"caption_prefix": "p,", "caption_suffix": ", s"}, "p, a , s"),
    case("a", {"caption_prefix": "masterpiece, "}, "masterpiece,  a"),
    case("", {"caption_prefix": "p", "caption_suffix": "s"}, "p s"),
    case("one\ntwo", {"caption_prefix": "p", "caption_suffix": "s"}, "p one s"),
    case("one\ntwo", {"caption_prefix": "p", "caption_suffix": "s", **WILD}, {"p one s", "p two s"}),
    case("a", {"caption_prefix": "{x|y}", **WILD}, {"x a", "y a"}),
    case("a, b", {"caption_prefix": "p,", **SHUFFLE}, orders("p", "a", "b")),
    # dropout
    case("a", {"caption_dropout_rate": 1.0}, ""),
    case("a", {"caption_dropout_rate": 0.5}, {"", "a"}),
    case("a", {"caption_dropout_rate": 1.0, "caption_prefix": "p", "caption_suffix": "s"}, ""),
    case("a, b", {"caption_dropout_rate": 1.0, **SHUFFLE, **KEEP}, ""),
    case("a;b", {"caption_dropout_rate": 1.0, "secondary_separator": ";"}, ""),
    case("a", {"caption_dropout_every_n_epochs": 1}, ""),
    case("a", {"caption_dropout_every_n_epochs": 2}, "a", 0),
    case("a", {"caption_dropout_every_n_epochs": 2}, "", 1),
    case("a", {"caption_dropout_every_n_epochs": 2}, "a", 2),
    case("a", {"caption_dropout_every_n_epochs": 3}, "", 5),
    case("a", {"caption_dropout_every_n_epochs": 0}, "a", 7),
    # wildcards
    case("one\ntwo\nthree", WILD, {"one", "two", "three"}),
    case("{a|b} c", WILD, {"a c", "b c"}),
    case("{a|b} {a|b}", WILD, {"a a", "a b", "b a", "b b"}),
    case("{a}", WILD, "a"),
    case("{a|}x", WILD, {"ax", "x"}),
    case("{}", WILD, "{}"),
    case("{{retro style}}", WILD, "{retro style}"),
    case("{{{a|b}}}", WILD, {"{a}", "{b}"}),
    case("1girl, {simple|white} background", WILD, {"1girl, simple background", "1girl, white background"}),
    case("{a|b}\nc", WILD, {"a", "b", "c"}),
    case("{a|b, c}", {**WILD, **SHUFFLE}, {"a", "b, c", "c, b"}),
    # shuffle and keep_tokens
    case("a, b, c", SHUFFLE, orders("a", "b", "c")),
    case("a,b , c ", SHUFFLE, orders("a", "b", "c")),
    case("a, , b,", SHUFFLE, orders("a", "b")),
    case("a", SHUFFLE, "a"),
    case("", SHUFFLE, ""),
    case("a, b, c", {**SHUFFLE, "keep_tokens": 1}, orders("b", "c", before="a, ")),
    case("a, b, c", {**SHUFFLE, "keep_tokens": 2}, "a, b, c"),
    case("a, b, c", {**SHUFFLE, "keep_tokens": 9}, "a, b, c"),
    case("a; b; c", {**SHUFFLE, "caption_separator": ";"}, orders("a", "b", "c")),
    case("a, b; c", {**SHUFFLE, "caption_separator": ";"}, {"a, b, c", "c, a, b"}),
    case("a. b. c", {**SHUFFLE, "caption_separator": ". ", "keep_tokens": 1}, orders("b", "c", before="a, ")),
    # keep_tokens_separator
    case("a, b ||| c, d", {**SHUFFLE, **KEEP}, orders("c", "d", before="a, b, ")),
    case("a ||| b, c ||| d, e", {**SHUFFLE, **KEEP}, orders("b", "c", before="a, ", after=", d, e")),
    case("a|||b, c|||d|||e, f", {**SHUFFLE, **KEEP}, orders("b", "c", before="a, ", after=", d|||e, f")),
    case("||| a, b", {**SHUFFLE, **KEEP}, orders("a", "b")),
    case("a, b |||", {**SHUFFLE, **KEEP}, "a, b"),
    case("a, b ||| c, d", {**SHUFFLE, **KEEP, "keep_tokens": 1}, orders("c", "d", before="a, b, ")),
    case("a, b, c", {**SHUFFLE, **KEEP, "keep_tokens": 1}, orders("b", "c", before="a, ")),
    case(
        "blue hair, smile",
        {
            **SHUFFLE,
            **KEEP,
            "caption_prefix": "1girl, hatsune miku, vocaloid |||",
            "caption_suffix": ", anime screencap ||| masterpiece, rating: general",
        },
        orders(
            "blue hair",
            "smile",
            "anime screencap",
            before="1girl, hatsune miku, vocaloid, ",
            after=", masterpiece, rating: general",
        ),
    ),
    # tag dropout
    case("a, b, c", {"caption_tag_dropout_rate": 1.0}, ""),
    case("a, b", {"caption_tag_dropout_rate": 0.5}, {"", "a", "b", "a, b"}),
    case("a, b, c", {"caption_tag_dropout_rate": 1.0, "keep_tokens": 2}, "a, b"),
    case("a ||| b ||| c", {"caption_tag_dropout_rate": 1.0, **KEEP}, "a, c"),
    case("a, b", {"caption_tag_dropout_rate": 0.5, **SHUFFLE}, {"", "a", "b", "a, b", "b, a"}),
    case("a ,b", {"caption_tag_dropout_rate": 0.0}, "a ,b"),
    # warmup
    case("a, b, c, d, e", WARM, "a", 0, 0),
    case("a, b, c, d, e", WARM, "a, b, c", 0, 5),
    case("a, b, c, d, e", WARM, "a, b, c, d", 0, 9),
    case("a, b, c, d, e", WARM, "a, b, c, d, e", 0, 10),
    case("a, b, c, d, e", {**WARM, "token_warmup_min": 3}, "a, b, c", 0, 0),
    case("a, b, c, d, e", {**WARM, "token_warmup_min": 0}, "", 0, 0),
    case("a, b, c, d, e", {**WARM, "keep_tokens": 2}, "a, b, c", 0, 0),
    case("a, b", {**WARM, "token_warmup_min": 5}, "a, b", 0, 3),
    case("a, b, c, d, e", {"token_warmup_step": 0.1}, "a, b, c", 0, 5),
    case("a, b, c, d, e", {"token_warmup_step": 0.1}, "a", 0, 0, 1000),
    case("a, b, c", {**WARM, **SHUFFLE}, {"a"}, 0, 0),
    # the secondary separator
    case("a;;;b;;;c", {"secondary_separator": ";;;"}, "a,b,c"),
    case("x, sky;;;cloud", {**SHUFFLE, "secondary_separator": ";;;"}, {"x, sky,cloud", "sky,cloud, x"}),
    case(
        "sky;;;day, x",
        {"caption_tag_dropout_rate": 0.5, "secondary_separator": ";;;"},
        {"", "sky,day", "x", "sky,day, x"},
    ),
    case("a+b; c", {**SHUFFLE, "caption_separator": ";", "secondary_separator": "+"}, {"a;b, c", "c, a;b"}),
]


@pytest.mark.parametrize(("text", "options", "expected", "place"), CASES, ids=range(len(CASES)))
def test_captions_by_the_table(
    text: str, options: dict[str, object], expected: set[str], place: tuple[int, ...]
) -> None:
    spec = CaptionSpec(**options)  # type: ignore[arg-type]
    epoch, step, total = place
    seen = {
        process_caption(text, spec, random.Random(seed), epoch=epoch, step=step, total_steps=total)
        for seed in range(400)
    }
    assert seen == expected
    assert len(seen) == 1 or is_random(Text(text, spec))


def test_the_table_is_as_long_as_promised() -> None:
    assert len(CASES) >= 60


def test_dropout_leaves_the_other_choices_as_they_were() -> None:
    text, plain = "a, b, c, d, e", CaptionSpec(shuffle_caption=True)
    dropping = dataclasses.replace(plain, caption_dropout_rate=0.3)
    both = [
        (process_caption(text, plain, random.Random(s)), process_caption(text, dropping, random.Random(s)))
        for s in range(300)
    ]
    assert all(dropped in ("", kept) for kept, dropped in both)
    assert 60 <= sum(not dropped for _, dropped in both) <= 120


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_tags_are_dropped_at_the_rate_that_was_asked_for(rate: float) -> None:
    text = ", ".join(str(number) for number in range(50))
    spec = CaptionSpec(caption_tag_dropout_rate=rate)
    captions = [process_caption(text, spec, sample_random(0, 0, index, "caption")) for index in range(200)]
    left = sum(len(caption.split(",")) for caption in captions if caption)
    assert left / 10_000 == pytest.approx(1 - rate, abs=0.02)


def test_shuffles_are_uniform() -> None:
    spec = CaptionSpec(shuffle_caption=True)
    counts: dict[str, int] = {}
    for index in range(6000):
        caption = process_caption("a, b, c", spec, sample_random(0, 0, index, "caption"))
        counts[caption] = counts.get(caption, 0) + 1
    assert len(counts) == 6
    assert all(850 <= count <= 1150 for count in counts.values())


def test_choices_are_fixed_for_all_time() -> None:
    """A change of these captions changes the training of everybody who resumes a run."""
    spec = CaptionSpec(shuffle_caption=True, caption_tag_dropout_rate=0.3)
    choose = CaptionChoice(seed=42)
    picture = Text("a, b, c, d, e, f", spec)
    assert [choose(picture, epoch, index, 0) for epoch, index in ((0, 0), (0, 1), (3, 0))] == [
        "c, e, a, b, d",
        "a, c, e, f, b",
        "d, b, a, f",
    ]


def test_the_step_of_a_batch_counts_accumulated_batches_and_partial_ones() -> None:
    """7 batches in an epoch, 3 to a step: steps 0 0 0 1 1 1 2, then 3."""
    spec = CaptionSpec(token_warmup_step=5, token_warmup_min=0)
    choose = CaptionChoice(0, batches_per_epoch=7, batches_per_step=3, total_steps=20)
    lengths = [
        len(choose(Text("a, b, c, d, e", spec), epoch, 0, batch).replace(", ", ""))
        for epoch in (0, 1)
        for batch in range(7)
    ]
    assert lengths == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_captions_of_a_run_are_those_of_its_samples(number: int) -> None:
    """Text is encoded beforehand for exactly the captions that the samples then ask for."""
    text, options, _, _ = CASES[number]
    pictures = [Text(text, CaptionSpec(**options)), Text("plain", CaptionSpec())]  # type: ignore[arg-type]
    picture_of_sample = [0, 0, 0, 1, 1]
    sampler = BucketBatchSampler([(0, (64, 64))] * 5, {0: 2}, seed=1)
    choose = CaptionChoice(1, len(sampler), 1, 4 * len(sampler))
    batches = [batch for epoch in range(4) for batch in sampler.batches(epoch)]
    known = set(captions_of_run(pictures, picture_of_sample, batches, choose))
    asked = {
        (picture_of_sample[key.sample], choose(pictures[picture_of_sample[key.sample]], *key[:3]))
        for batch in batches
        for key in batch
    }
    assert known == asked


def test_captions_that_never_change_are_not_looked_for_in_every_epoch(tmp_path: Path) -> None:
    def never() -> object:
        raise AssertionError
        yield

    pictures = [Text("a, {b|c}", CaptionSpec()), Text("one\ntwo", CaptionSpec())]
    found = list(captions_of_run(pictures, [0, 1], never(), CaptionChoice()))  # type: ignore[arg-type]
    assert found == [(0, "a, {b|c}"), (1, "one")]
