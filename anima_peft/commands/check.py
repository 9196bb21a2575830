"""`anima-peft check`: a dataset looked over before training."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import RunConfig, load, load_datasets
from ..errors import InputError
from ..files import write_atomically
from ..texts import cut, escaped
from .parts import command_parser

if TYPE_CHECKING:
    from PIL import Image

    from ..data import BucketBatchSampler, Picture

logger = logging.getLogger(__name__)

SHEET_NAME, SUMMARY_NAME = "contact_sheet.png", "summary.png"
_MOST_TAGS = 30
_LONGEST_TAG = 200
_MOST_PAIRS = 20
_MOST_CROPPED = 5


def run(argv: Sequence[str]) -> None:
    """Check the dataset that the command line names, and print what was found.

    Raises:
        InputError: the configuration, the pictures or the captions have faults; all are in the one message.
    """
    arguments = _parser().parse_args(argv)
    if arguments.measure and arguments.config_file is None:
        raise InputError("--measure needs --config_file, which names the model and how it is trained.")
    targets = [arguments.save.expanduser() / name for name in (SHEET_NAME, SUMMARY_NAME)] if arguments.save else []
    _require_free(targets, overwrite=arguments.overwrite)
    config = _run_config(arguments)
    datasets, warnings = (config.datasets, config.warnings) if config else load_datasets(arguments.dataset_config)
    for warning in warnings:
        logger.warning(warning)
    from ..data import scan

    cache_dir = Path(config.train.loop.cache_dir) if config and config.train.loop.cache_dir else None
    found = scan(datasets, cache_dir=cache_dir)
    pictures = tuple(picture for picture in found if not picture.held_out)
    if len(pictures) < len(found):
        print(f"{len(found) - len(pictures)} pictures are held out for validation and left out below.")
    _print_pictures(pictures, config)
    _print_captions(pictures)
    _print_likenesses(found)  # a copy on the other side of the split would be measured as well known
    if arguments.save:
        _save_drawings(pictures, config, targets)
    if config and arguments.measure:
        from ..training.measuring import measure

        print("\nMeasured on this machine")
        print(measure(config.train, pictures).report())


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "check",
        "Look a dataset over before training: pictures, captions, buckets, likenesses, and what a run will take.",
    )
    parser.add_argument("--dataset_config", type=Path, metavar="DATASET.toml", help="dataset TOML")
    parser.add_argument(
        "--config_file",
        type=Path,
        metavar="TRAIN_ARGS.toml",
        help="train args, for the steps and caches of a run",
    )
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help=f"write {SHEET_NAME} (what is cropped) and {SUMMARY_NAME} there"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace these files")
    parser.add_argument(
        "--measure", action="store_true", help="load the model and time encoding and training steps of each bucket"
    )
    return parser


def _run_config(arguments: argparse.Namespace) -> RunConfig | None:
    if arguments.config_file is None:
        if arguments.dataset_config is None:
            raise InputError("--dataset_config is required: the dataset TOML to check.")
        return None
    words = ["--config_file", str(arguments.config_file)]
    if arguments.dataset_config is not None:
        words += ["--dataset_config", str(arguments.dataset_config)]
    return load(words)


def _require_free(targets: Sequence[Path], *, overwrite: bool) -> None:
    present = [str(path) for path in targets if path.exists()]
    if present and not overwrite:
        raise InputError(f"{', '.join(present)}: there already; choose another folder, or add --overwrite to replace.")


def _print_pictures(pictures: tuple[Picture, ...], config: RunConfig | None) -> None:
    from ..data.summary import cropped_share, summary

    total, accumulated = _plan(pictures, config)
    print(summary(pictures, total, accumulated, _costs(pictures, config)))
    most = sorted(pictures, key=lambda picture: -cropped_share(picture.placement))[:_MOST_CROPPED]
    most = [picture for picture in most if cropped_share(picture.placement) > 0]
    if most:
        print("Cropped most:")
        for picture in most:
            print(f"  {cropped_share(picture.placement):.0%}  {escaped(str(picture.path))}")


def _plan(pictures: tuple[Picture, ...], config: RunConfig | None) -> tuple[int | None, int]:
    """Optimizer steps of the run, None where they are not known, and batches to a step."""
    if config is None:
        return None, 1
    from ..training.samples import planned_steps

    loop = config.train.loop
    return planned_steps(loop, len(_sampler(pictures, loop.seed))), loop.gradient_accumulation_steps


def _costs(pictures: tuple[Picture, ...], config: RunConfig | None) -> Iterator[str]:
    """What will be kept on the disk: latents and masks to the byte, captions about."""
    from ..data.buckets import VAE_FACTOR
    from ..data.dataset import LATENT_CHANNELS
    from ..data.summary import size_text

    def latents(picture: Picture) -> int:
        """Bytes of one channel in float32."""
        width, height = (side // VAE_FACTOR for side in picture.placement.bucket)
        return width * height * 4

    keeps = config is None or config.train.loop.cache_latents
    kept = [picture for picture in pictures if keeps and not picture.varies]
    entries = {(p.sha256, p.placement, flip): latents(p) for p in kept for flip in (False, True)[: 1 + p.flip_aug]}
    size = LATENT_CHANNELS * sum(entries.values())
    yield f"Latents to keep: {len(entries)}, {size_text(size)} on disk."
    live = len(pictures) - len(kept)
    if live:
        yield f"Pictures that pass through the VAE in every step: {live}."
    if config is not None:
        yield _caption_cost(pictures, config)


def _caption_cost(pictures: tuple[Picture, ...], config: RunConfig) -> str:
    import torch

    from ..data import CaptionChoice, SampleTable, captions_of_run
    from ..training.samples import batches_of_run
    from ..training.text_plan import plan_text

    loop = config.train.loop
    sampler, (total, accumulated) = _sampler(pictures, loop.seed), _plan(pictures, config)
    assert total is not None
    captions = captions_of_run(
        pictures,
        SampleTable(pictures).picture_of_sample,
        batches_of_run(sampler, accumulated, total),
        CaptionChoice(loop.seed, len(sampler), accumulated, total),
    )
    plan = plan_text(
        pictures,
        captions,
        keep=loop.cache_text_encoder_outputs,
        max_length=config.train.model.anima_seq_len,
        width=1024,  # Anima's
        dtype=torch.float32 if loop.mixed_precision == "no" else torch.bfloat16,
    )
    return plan.sentence()


def _sampler(pictures: tuple[Picture, ...], seed: int) -> BucketBatchSampler:
    from ..data import BucketBatchSampler, SampleTable

    table = SampleTable(pictures)
    return BucketBatchSampler(table.groups, table.batch_sizes, seed=seed)


def _print_captions(pictures: Sequence[Picture]) -> None:
    tags: Counter[str] = Counter()
    for picture in pictures:
        lines = picture.caption.split("\n")
        separator = picture.captions.caption_separator
        tags.update({tag.strip() for line in lines for tag in line.split(separator)} - {""})
    longest = max(pictures, key=lambda picture: len(picture.caption))
    empty = sum(not picture.caption for picture in pictures)
    print(f"\nCaptions: {len({picture.caption for picture in pictures})} different, {empty} empty")
    print(f"  longest: {len(longest.caption)} characters, {escaped(str(longest.path))}")
    print(f"Tags: {len(tags)} different; in how many pictures:")
    for tag, count in tags.most_common(_MOST_TAGS):
        print(f"  {count:5}  {escaped(cut(tag, _LONGEST_TAG))}")
    if len(tags) > _MOST_TAGS:
        print(f"  and {len(tags) - _MOST_TAGS} more, {sum(count == 1 for count in tags.values())} of all only once")


def _print_likenesses(pictures: Sequence[Picture]) -> None:
    from ..data.duplicates import near_duplicates

    pairs = near_duplicates(pictures)
    print(f"\nPictures that look alike: {len(pairs)} pairs")
    for one, other in pairs[:_MOST_PAIRS]:
        print(f"  {escaped(str(one))}\n  {escaped(str(other))}\n")


def _save_drawings(pictures: tuple[Picture, ...], config: RunConfig | None, targets: Sequence[Path]) -> None:
    from ..data.drawings import contact_sheet, draw_table
    from ..data.summary import steps_sentence, table_rows

    notes = [steps_sentence(pictures, *_plan(pictures, config)), *_costs(pictures, config)]
    for path, picture in zip(targets, (contact_sheet(pictures), draw_table(table_rows(pictures), notes)), strict=True):
        _write(path, picture)
        print(path)


def _write(path: Path, picture: Image.Image) -> None:
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG", optimize=True))
