"""Samples and batches: the same for any workers and processes, every sample once an epoch, padding as the model's."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from anima_peft.data import (
    BucketBatchSampler,
    CachedDataset,
    CaptionChoice,
    DatasetSpec,
    collate,
    plan_captions,
    plan_latents,
    sample_generator,
    scan,
)
from anima_peft.errors import InputError

from .conftest import written
from .encoders import draw_sigma, encode_captions, encode_latents


@pytest.fixture
def dataset(spec: DatasetSpec) -> CachedDataset:
    pictures = scan([spec], progress=False)
    latents = plan_latents(pictures, model="vae")
    captions = plan_captions(written(pictures), model="qwen", options={})
    latents.encode(encode_latents, progress=False)
    captions.encode(encode_captions, progress=False)
    return CachedDataset(
        pictures, latents.files, captions.of_caption, seed=3, draw_sigma=draw_sigma, choose_caption=CaptionChoice(3)
    )


def test_a_sample(dataset: CachedDataset) -> None:
    assert len(dataset) == 6
    assert dataset.picture_of_sample == [0, 0, 1, 1, 2, 2]
    assert dataset.groups == [(0, (64, 64))] * 4 + [(0, (128, 32))] * 2
    sample = dataset[0, 5]
    assert sample["latents"].shape == sample["noise"].shape == (16, 4, 16)
    assert {sample[name].dtype for name in ("latents", "noise", "sigma")} == {torch.float32}
    assert sample["sigma"].shape == ()
    assert 0 <= sample["sigma"] <= 4 / 64
    assert sample["prompt_embeds"].shape == (len("caption of 10 十.png"), 4)


def test_randomness_depends_on_seed_epoch_and_sample_only(dataset: CachedDataset) -> None:
    torch.manual_seed(0)
    before = dataset[1, 2]
    torch.manual_seed(1)
    dataset[0, 0]
    again = dataset[1, 2]
    assert all(torch.equal(before[name], again[name]) for name in before)
    for other in ((1, 3), (2, 2)):
        assert not torch.equal(before["noise"], dataset[other]["noise"])
        assert before["sigma"] != dataset[other]["sigma"]


def test_generators_are_fixed_for_all_time() -> None:
    def draw(*parts: int | str) -> int:
        return torch.randint(2**62, (), generator=sample_generator(*parts)).item()  # type: ignore[arg-type]

    # A change of these numbers changes the training of everybody who resumes a run.
    assert sample_generator(0, 0, 0).initial_seed() == 3337179353960953875
    assert sample_generator(42, 7, 123456, "noise").initial_seed() == 6862638799836318518
    drawn = [draw(s, e, i, p) for s in (0, 1, -1) for e in (0, 1, 11) for i in (0, 1, 11) for p in ("noise", "sigma")]
    assert len(set(drawn)) == len(drawn)


def test_flips_and_noise_are_distributed_as_said(dataset: CachedDataset) -> None:
    files = dataset._latents[0]
    assert files is not None
    assert files.plain != files.flipped
    first = dataset[0, 0]["latents"]
    samples = [dataset[epoch, 0] for epoch in range(200)]
    assert 70 <= sum(torch.equal(sample["latents"], first) for sample in samples) <= 130
    noise = torch.stack([sample["noise"] for sample in samples])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_no_flip_without_flip_aug(dataset: CachedDataset) -> None:
    unflipped = CachedDataset(
        [dataclasses.replace(picture, flip_aug=False) for picture in dataset.pictures],
        dataset._latents,
        dataset._captions,
        seed=3,
        draw_sigma=draw_sigma,
        choose_caption=CaptionChoice(3),
    )
    first = unflipped[0, 0]
    assert all(torch.equal(unflipped[epoch, 0]["latents"], first["latents"]) for epoch in range(20))
    assert torch.equal(first["noise"], dataset[0, 0]["noise"])


def test_a_lost_cache_file_is_named(dataset: CachedDataset) -> None:
    assert dataset._captions is not None
    path = Path(dataset._captions[dataset.pictures[0].caption])
    path.unlink()
    with pytest.raises(InputError, match=path.name):
        dataset[0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_once_an_epoch_and_one_group_in_a_batch(seed: int) -> None:
    rng = random.Random(seed)
    batch_sizes = {index: rng.randint(1, 7) for index in range(rng.randint(1, 3))}
    groups = [
        (rng.choice(list(batch_sizes)), rng.choice([(64, 64), (128, 32), (32, 128)]))
        for _ in range(rng.randint(1, 150))
    ]
    sampler = BucketBatchSampler(groups, batch_sizes, seed=seed)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(key[:2] for batch in batches for key in batch) == [(epoch, i) for i in range(len(groups))]
        assert all(key.batch == number for number, batch in enumerate(batches) for key in batch)
        incomplete: Counter[object] = Counter()
        for batch in batches:
            members = {groups[key.sample] for key in batch}
            assert len(members) == 1
            group = members.pop()
            assert 1 <= len(batch) <= batch_sizes[group[0]]
            incomplete[group] += len(batch) < batch_sizes[group[0]]
        assert max(incomplete.values()) <= 1
        epochs.append([[key.sample for key in batch] for batch in batches])
    sampler.set_epoch(1)
    assert [[key.sample for key in batch] for batch in sampler] == epochs[1]
    fresh = BucketBatchSampler(groups, batch_sizes, seed=seed)
    fresh.set_epoch(1)
    assert list(fresh) == list(sampler)


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_a_batch_and_each_sample_counts_the_same(processes: int) -> None:
    groups = [(0, (64, 64))] * 17 + [(1, (64, 64))] * 3 + [(1, (32, 64))]
    batch_sizes = {0: 2, 1: 3}
    whole = BucketBatchSampler(groups, {index: size * processes for index, size in batch_sizes.items()}, seed=5)
    parts = [
        BucketBatchSampler(groups, batch_sizes, seed=5, processes=processes, process=process)
        for process in range(processes)
    ]
    for sampler in parts:
        assert len(sampler) == len(whole)
        assert sampler.batches(2) == whole.batches(2)
        sampler.set_epoch(2)
    for batch, own in zip(whole.batches(2), zip(*parts, strict=True), strict=True):
        assert all(own), "every process takes part in every step"
        counting = [key for part in own for key in part if key.share]
        assert [key._replace(share=None) for key in counting] == batch
        # DistributedDataParallel takes the mean over the processes.
        assert [key.share / processes for key in counting] == pytest.approx([1 / len(batch)] * len(batch))
        assert max(map(len, own)) <= batch_sizes[groups[batch[0].sample][0]]


def test_order_differs_by_epoch_and_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = BucketBatchSampler([(0, (64, 64))] * 40, {0: 2}, seed=seed)
        sampler.set_epoch(epoch)
        return [key.sample for batch in sampler for key in batch]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(item) for item in orders}) == 4


def sample(**text: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"latents": torch.ones(16, 4, 4), "noise": torch.ones(16, 4, 4), "sigma": torch.tensor(0.5), **text}


@pytest.mark.parametrize(("lengths", "rows"), [((3, 5), 512), ((1,), 512), ((512, 2), 512), ((700, 3), 700)])
def test_prompt_embeds_end_in_zero_rows(lengths: tuple[int, ...], rows: int) -> None:
    batch = collate([sample(prompt_embeds=torch.full((n, 4), 2.0, dtype=torch.bfloat16)) for n in lengths])
    assert batch.keys() == {"latents", "noise", "sigma", "prompt_embeds"}
    assert batch["latents"].shape == (len(lengths), 16, 4, 4)
    assert batch["sigma"].shape == (len(lengths),)
    embeds = batch["prompt_embeds"]
    assert (embeds.shape, embeds.dtype) == ((len(lengths), rows, 4), torch.bfloat16)
    for row, n in zip(embeds, lengths, strict=True):
        assert (row[:n] == 2).all()
        assert (row[n:] == 0).all()


@pytest.mark.parametrize(("qwen", "t5"), [((3, 1), (2, 6)), ((0, 2), (1, 1)), ((0, 0), (1, 0)), ((600,), (3,))])
def test_tokens_are_padded_to_the_longest_with_masks(qwen: tuple[int, ...], t5: tuple[int, ...]) -> None:
    batch = collate(
        [
            sample(qwen_hidden_states=torch.full((n, 4), 2.0), t5_input_ids=torch.full((m,), 9))
            for n, m in zip(qwen, t5, strict=True)
        ]
    )
    names = {"qwen_hidden_states", "qwen_attention_mask", "t5_input_ids", "t5_attention_mask"}
    assert batch.keys() == {"latents", "noise", "sigma"} | names
    assert batch["qwen_hidden_states"].shape == (len(qwen), max(1, *qwen), 4)
    assert batch["t5_input_ids"].shape == batch["t5_attention_mask"].shape == (len(t5), max(1, *t5))
    assert {batch[name].dtype for name in names - {"qwen_hidden_states"}} == {torch.int64}
    assert batch["qwen_attention_mask"].sum(1).tolist() == list(qwen)
    assert batch["t5_attention_mask"].sum(1).tolist() == list(t5)
    assert torch.equal(batch["qwen_hidden_states"], 2.0 * batch["qwen_attention_mask"][..., None].expand(-1, -1, 4))
    assert torch.equal(batch["t5_input_ids"], 9 * batch["t5_attention_mask"])
    assert (batch["t5_attention_mask"].diff(dim=1) <= 0).all()
