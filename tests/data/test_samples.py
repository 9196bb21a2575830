"""What a sample holds where pictures vary, have masks or are for regularisation; and no sample lost or twice."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from torch.utils.data import DataLoader

from anima_peft.data import (
    BucketBatchSampler,
    CachedDataset,
    CaptionChoice,
    CaptionSpec,
    DatasetSpec,
    SubsetSpec,
    collate,
    load_pixels,
    plan_captions,
    plan_latents,
    plan_masks,
    scan,
)
from anima_peft.data.buckets import place
from anima_peft.data.variation import Variation, change_colors, draw_variation

from .encoders import draw_sigma, encode_captions, encode_latents

MakePictures = Callable[..., Path]


def built(*subsets: SubsetSpec, keep_text: bool = True, keep_latents: bool = True, **options: Any) -> CachedDataset:
    """Samples of pictures in a bucket of 64 x 64, with stand-ins for the encoders."""
    pictures = scan([DatasetSpec(subsets, (64, 64))], progress=False)
    latents, masks = plan_latents(pictures, model="vae"), plan_masks(pictures)
    latents.encode(encode_latents, progress=False)
    masks.encode(progress=False)
    captions = plan_captions(((p, p.caption) for p in pictures), model="qwen", options={})
    captions.encode(encode_captions, progress=False)
    return CachedDataset(
        pictures,
        latents.files if keep_latents else [None] * len(pictures),
        captions.of_caption if keep_text else None,
        masks.files,
        seed=3,
        draw_sigma=draw_sigma,
        choose_caption=CaptionChoice(3),
        **options,
    )


@pytest.fixture
def wide(make_pictures: MakePictures) -> Path:
    """Pictures of which the half is cropped."""
    return make_pictures("wide", {"a.png": (128, 64), "b.png": (128, 64)})


def test_a_picture_that_varies_comes_as_pixels(wide: Path) -> None:
    dataset = built(SubsetSpec(wide, random_crop=True))
    sample = dataset[0, 0]
    assert sample.keys() == {"latents", "pixels", "noise", "sigma", "prompt_embeds"}
    assert sample["pixels"].shape == (3, 64, 64)
    assert sample["latents"].shape == sample["noise"].shape == (16, 8, 8)
    assert not sample["latents"].any()
    assert torch.equal(sample["pixels"], dataset[0, 0]["pixels"])
    crops = {tuple(dataset[epoch, 0]["pixels"][:, 0, 0].tolist()) for epoch in range(8)}
    assert len(crops) > 4


def test_only_what_is_cropped_varies_by_its_crop(make_pictures: MakePictures) -> None:
    folder = make_pictures("set", {"square.png": (64, 64), "wide.png": (128, 64)})
    dataset = built(SubsetSpec(folder, random_crop=True))
    assert ["pixels" in dataset[0, index] for index in range(2)] == [False, True]
    batch = collate([dataset[0, 0], dataset[0, 1]])
    assert batch["pixel_rows"].tolist() == [1]
    assert batch["pixels"].shape == (1, 3, 64, 64)
    assert torch.equal(batch["latents"][0], dataset[0, 0]["latents"])


def test_noise_and_sigma_are_the_same_whether_latents_are_kept(wide: Path) -> None:
    kept, live = (built(SubsetSpec(wide, flip_aug=True), keep_latents=keep) for keep in (True, False))
    for epoch in range(6):
        one, other = kept[epoch, 1], live[epoch, 1]
        assert torch.equal(one["noise"], other["noise"])
        assert one["sigma"] == other["sigma"]
        assert torch.equal(one["latents"], encode_latents(other["pixels"][None])[0])


def test_captions_are_the_same_whether_text_is_kept(wide: Path) -> None:
    (wide / "a.txt").write_text("a, b, c, d", encoding="utf-8")
    spec = SubsetSpec(wide, captions=CaptionSpec(shuffle_caption=True, caption_dropout_rate=0.3))
    dataset = built(spec, keep_text=False)
    captions = [dataset[epoch, 0]["caption"] for epoch in range(12)]
    assert captions == [CaptionChoice(3)(dataset.pictures[0], epoch, 0, 0) for epoch in range(12)]
    assert "" in captions
    assert collate([dataset[0, 0], dataset[0, 1]])["captions"] == [dataset[0, i]["caption"] for i in range(2)]


def test_masks_turn_and_move_with_their_pictures(wide: Path, tmp_path: Path) -> None:
    """A picture that is its own mask: what is white in it counts, wherever it is cropped and however it is turned."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        blocks = np.random.default_rng(seed).integers(0, 2, (8, 16), dtype=np.uint8) * 255
        Image.fromarray(np.repeat(np.repeat(blocks, 8, 0), 8, 1)).convert("RGB").save(wide / f"{name}.png")
        (masks / f"{name}.png").write_bytes((wide / f"{name}.png").read_bytes())
    for subset in (
        SubsetSpec(wide, conditioning_data_dir=masks, flip_aug=True),
        SubsetSpec(wide, conditioning_data_dir=masks, flip_aug=True, random_crop=True),
    ):
        dataset = built(subset)
        for epoch in range(8):
            sample = dataset[epoch, 1]
            seen = sample["latents"] if "pixels" not in sample else encode_latents(sample["pixels"][None])[0]
            assert torch.allclose(sample["mask"][0], (seen[0] + 1) / 2, atol=1e-6)


def test_a_picture_without_mask_counts_everywhere(make_pictures: MakePictures) -> None:
    plain, clear = make_pictures("plain", {"a.png": (64, 64)}), make_pictures("clear", {})
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(clear / "b.png")
    dataset = built(SubsetSpec(plain), SubsetSpec(clear, alpha_mask=True, class_tokens="x"))
    batch = collate([dataset[0, 0], dataset[0, 1]])
    assert batch["mask"].shape == (2, 1, 8, 8)
    assert [mask.unique().tolist() for mask in batch["mask"]] == [[1.0], [0.0]]
    assert "mask" not in built(SubsetSpec(plain))[0, 0]


def test_the_weight_of_regularisation_pictures(make_pictures: MakePictures) -> None:
    own, others = make_pictures("own", {"a.png": (64, 64)}), make_pictures("others", {"b.png": (64, 64)})
    subsets = (SubsetSpec(own), SubsetSpec(others, is_reg=True))
    dataset = built(*subsets, prior_loss_weight=0.25)
    assert collate([dataset[0, 0], dataset[0, 1]])["loss_weight"].tolist() == [1.0, 0.25]
    assert "loss_weight" not in built(*subsets)[0, 0]
    assert "loss_weight" not in built(subsets[0], prior_loss_weight=0.25)[0, 0]


def test_crops_reach_every_place_and_colours_change_in_a_third(wide: Path) -> None:
    placement = place((128, 64), DatasetSpec((), (64, 64)))
    drawn = [draw_variation(placement, color=True, crop=True, draw=random.Random(seed)) for seed in range(4000)]
    assert {variation.crop for variation in drawn} == {(left, 0) for left in range(65)}
    changed = [variation for variation in drawn if variation.hue or variation.gamma != 1]
    assert 1150 <= len(changed) <= 1450
    hues, gammas = {v.hue for v in changed if v.gamma == 1}, [v.gamma for v in changed if v.gamma != 1]
    assert hues == set(range(-11, 12)) - {0}
    assert 0.95 <= min(gammas) < 0.952
    assert 1.048 < max(gammas) <= 1.05
    assert draw_variation(placement, color=False, crop=False, draw=random.Random(0)) == Variation(placement.crop)


def test_colours(wide: Path) -> None:
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    assert change_colors(red, Variation((0, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert change_colors(red, Variation((0, 0), hue=85)).getpixel((0, 0)) == (0, 255, 0)
    grey = change_colors(Image.new("RGB", (1, 1), (64, 128, 255)), Variation((0, 0), gamma=2.0))
    assert grey.getpixel((0, 0)) == (16, 64, 255)
    picture = scan([DatasetSpec((SubsetSpec(wide),), (64, 64))], progress=False)[0]
    varied = load_pixels(picture, True, Variation((5, 0)))
    whole = load_pixels(dataclasses.replace(picture, placement=place((128, 64), DatasetSpec((), (128, 64)))), False)
    assert torch.equal(varied, whole[:, :, 5:69].flip(-1))


@pytest.mark.parametrize("seed", range(25))
def test_no_epoch_loses_or_repeats_a_sample_across_processes(seed: int) -> None:
    """Each process takes its share of the batches, by accelerate's own sharding."""
    rng = random.Random(seed)
    batch_sizes = {index: rng.randint(1, 6) for index in range(rng.randint(1, 3))}
    groups = [(rng.choice(list(batch_sizes)), rng.choice([(64, 64), (96, 32)])) for _ in range(rng.randint(1, 90))]
    processes = rng.randint(1, 5)
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for process in range(processes):
            sampler = BucketBatchSampler(groups, batch_sizes, seed=seed)
            sampler.set_epoch(epoch)
            shard = BatchSamplerShard(sampler, processes, process, even_batches=False)
            seen.update(key.sample for batch in shard for key in batch)
        assert seen == Counter(range(len(groups)))


def test_workers_of_their_own_processes_change_nothing(wide: Path) -> None:
    """Everything that is random, in processes started anew, which share nothing with this one."""
    (wide / "a.txt").write_text("a, b, c, d", encoding="utf-8")
    captions = CaptionSpec(shuffle_caption=True, caption_tag_dropout_rate=0.3)
    varied = SubsetSpec(wide, 5, flip_aug=True, color_aug=True, random_crop=True, alpha_mask=True, captions=captions)
    dataset = built(varied, keep_text=False)
    sampler = BucketBatchSampler(dataset.groups, {0: 3}, seed=3)
    sampler.set_epoch(2)
    alone, spawned = (
        list(
            DataLoader(
                dataset,
                batch_sampler=sampler,
                collate_fn=collate,
                num_workers=workers,
                multiprocessing_context="spawn" if workers else None,
            )
        )
        for workers in (0, 2)
    )
    assert sum(len(batch["sigma"]) for batch in spawned) == len({s.item() for b in spawned for s in b["sigma"]}) == 10
    for one, other in zip(alone, spawned, strict=True):
        assert one.keys() == other.keys()
        assert one["captions"] == other["captions"]
        assert all(torch.equal(one[name], other[name]) for name in one if name != "captions")
