"""What a run trains on, as a table to look at before it starts: buckets, pictures, batches, steps, what is cropped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .buckets import Placement
from .pictures import Picture


@dataclass(frozen=True)
class BucketRow:
    """One bucket of one dataset."""

    dataset_index: int
    bucket: tuple[int, int]
    pictures: int
    regularisation: int
    """How many of the pictures are regularisation pictures."""
    samples: int
    """In an epoch, repeats counted."""
    batches: int
    """In an epoch."""
    cropped: float
    """Share of the resized pictures' area that is cut off, on average, in [0, 1)."""
    enlarged: int
    """How many pictures are enlarged."""


def bucket_rows(pictures: Sequence[Picture]) -> list[BucketRow]:
    """The buckets in the order of their datasets, the widest last."""
    groups: dict[tuple[int, tuple[int, int]], list[Picture]] = {}
    for picture in pictures:
        groups.setdefault((picture.dataset_index, picture.placement.bucket), []).append(picture)
    rows = []
    for index, bucket in sorted(groups, key=lambda group: (group[0], group[1][0] / group[1][1])):
        own = groups[index, bucket]
        samples = sum(picture.num_repeats for picture in own)
        rows.append(
            BucketRow(
                index,
                bucket,
                len(own),
                sum(picture.is_reg for picture in own),
                samples,
                -(-samples // own[0].batch_size),
                sum(cropped_share(picture.placement) for picture in own) / len(own),
                sum(picture.placement.resized[0] > picture.size[0] for picture in own),
            )
        )
    return rows


def cropped_share(placement: Placement) -> float:
    """Which share of a resized picture its bucket leaves out, in [0, 1)."""
    return 1 - placement.bucket[0] * placement.bucket[1] / (placement.resized[0] * placement.resized[1])


def summary(
    pictures: Sequence[Picture], total_steps: int | None, batches_per_step: int, notes: Iterable[str] = ()
) -> str:
    """The table, and under it the steps and `notes`.

    Args:
        pictures: from `scan`.
        total_steps: optimizer steps of the run; None where it is not known.
        batches_per_step: gradient accumulation.
        notes: further sentences.
    """
    return "\n".join([table(table_rows(pictures)), steps_sentence(pictures, total_steps, batches_per_step), *notes])


def table_rows(pictures: Sequence[Picture]) -> list[list[str]]:
    """The heading, a row for each bucket, and the totals."""
    rows = bucket_rows(pictures)
    lines = [
        [
            str(row.dataset_index),
            f"{row.bucket[0]} x {row.bucket[1]}",
            f"{row.pictures}" + (f" ({row.regularisation} reg)" if row.regularisation else ""),
            str(row.samples),
            str(row.batches),
            f"{row.cropped:.1%}",
            str(row.enlarged),
        ]
        for row in rows
    ]
    total = [
        "",
        f"{len({row.bucket for row in rows})} sizes",
        *(str(sum(getattr(row, name) for row in rows)) for name in ("pictures", "samples", "batches")),
        f"{sum(cropped_share(p.placement) for p in pictures) / len(pictures):.1%}",
        str(sum(row.enlarged for row in rows)),
    ]
    return [["dataset", "bucket", "pictures", "samples", "batches", "cropped", "enlarged"], *lines, total]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns; a rule under the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def size_text(size: int) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor / 2:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 2**10:.0f} KiB"


def steps_sentence(pictures: Sequence[Picture], total_steps: int | None, batches_per_step: int) -> str:
    """How many steps an epoch has, and the run if that is known."""
    per_epoch = -(-sum(row.batches for row in bucket_rows(pictures)) // batches_per_step)
    accumulated = f" of {batches_per_step} batches" if batches_per_step > 1 else ""
    text = f"{per_epoch} steps{accumulated} in an epoch"
    if total_steps is None:
        return f"{text}."
    return f"{text}; {total_steps} steps in all, {total_steps / per_epoch:.3g} epochs."
