"""Training samples out of the cache, in batches of one bucket, the same on every machine and with any workers.

Everything random about a sample derives from (seed, epoch, index of the sample): a run that is interrupted, or that
uses other numbers of processes and workers, sees the same noise, sigma and mirroring.

Letters: B samples in a batch, C latent channels, h and w height and width of the latents (an eighth of the bucket's),
L rows of text, N Qwen tokens, M T5 tokens, D text width.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from .cache import read_entry
from .caching import LatentFiles
from .pictures import Picture

# The conditioner pads its output with zero rows to at least this many, and the DiT attends to them.
# Source: huggingface/diffusers, AnimaTextConditioner, minimum output length.
MIN_PROMPT_ROWS = 512

Group = tuple[int, tuple[int, int]]
"""(index of the dataset, bucket as (width, height)): samples of one group may share a batch."""


def sample_generator(seed: int, epoch: int, index: int, purpose: str = "") -> torch.Generator:
    """A CPU generator for one sample of one epoch, independent of process, worker and order.

    Its seed is the first 63 bits of the sha256 of "seed/epoch/index/purpose"; torch's CPU generator heeds the lower 32
    of them, so that among very many samples two may share their noise, which does no harm. Each purpose ("noise",
    "sigma", …) has a stream of its own, so that a draw added for one leaves the others as they were.
    """
    return torch.Generator().manual_seed(_mix(seed, epoch, index, purpose))


def plain_noise(generator: torch.Generator, shape: torch.Size) -> dict[str, torch.Tensor]:
    """Standard normal `noise` of that shape, float32."""
    return {"noise": torch.randn(shape, generator=generator, dtype=torch.float32)}


class CachedDataset(Dataset[dict[str, torch.Tensor]]):
    """Samples by (epoch, index): each picture `num_repeats` times, in the order of the pictures.

    A sample holds:
        latents: (C, h, w) float32; the mirrored picture's in half of the cases where `flip_aug` is on.
        noise: (C, h, w) float32, and what else `draw_noise` gives.
        sigma: () float32, from `draw_sigma`.
        the picture's text tensors, as they were cached.

    Args:
        pictures: from `scan`.
        latents: for each picture its latents, `LatentsPlan.files`; all exist.
        captions: for each picture its text, `CaptionsPlan.files`; all exist.
        seed: of the run.
        draw_sigma: from a generator and the latents' (h, w), a sigma in [0, 1].
        draw_noise: from a generator and (C, h, w), noise tensors of that shape by name, `noise` among them. Both can be
            pickled where worker processes are spawned.

    Raises:
        InputError: on indexing, where a cache file is missing or damaged.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        latents: Sequence[LatentFiles],
        captions: Sequence[Path],
        *,
        seed: int,
        draw_sigma: Callable[[torch.Generator, tuple[int, int]], float],
        draw_noise: Callable[[torch.Generator, torch.Size], Mapping[str, torch.Tensor]] = plain_noise,
    ) -> None:
        self.pictures = tuple(pictures)
        self.picture_of_sample = [i for i, picture in enumerate(pictures) for _ in range(picture.num_repeats)]
        """For each sample, the number of its picture."""
        self._files = tuple(zip(latents, captions, strict=True))
        assert len(self._files) == len(self.pictures)
        self._seed = seed
        self._draw_sigma, self._draw_noise = draw_sigma, draw_noise

    @property
    def groups(self) -> list[Group]:
        """For each sample, what it may share a batch with."""
        of_picture = [(picture.dataset_index, picture.placement.bucket) for picture in self.pictures]
        return [of_picture[i] for i in self.picture_of_sample]

    @property
    def batch_sizes(self) -> dict[int, int]:
        """The batch size of each dataset, by its index."""
        return {picture.dataset_index: picture.batch_size for picture in self.pictures}

    def __len__(self) -> int:
        return len(self.picture_of_sample)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = item
        files, text = self._files[self.picture_of_sample[index]]

        def generator(purpose: str) -> torch.Generator:
            return sample_generator(self._seed, epoch, index, purpose)

        flip = files.flipped is not None and torch.rand((), generator=generator("flip")).item() < 0.5
        latents = read_entry(files.flipped if flip and files.flipped else files.plain)["latents"]
        height, width = latents.shape[-2:]
        sigma = self._draw_sigma(generator("sigma"), (height, width))
        return {
            **read_entry(text),
            "latents": latents,
            **self._draw_noise(generator("noise"), latents.shape),
            "sigma": torch.tensor(sigma, dtype=torch.float32),
        }


def collate(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack samples of one group into a batch, and give their texts a common length.

    Returns:
        latents, noise, perhaps input_noise: (B, C, h, w) float32; sigma: (B,) float32; and, whichever the samples
            carry, either
        prompt_embeds: (B, max(512, longest), D), zero rows after the real ones. They are part of the model: no mask
            goes with them.
        or qwen_hidden_states (B, N, D), t5_input_ids (B, M) int64, filled with zeros on the right to the longest and
            at least 1, with qwen_attention_mask (B, N) and t5_attention_mask (B, M), int64, 1 for real tokens.
    """
    stacked = [name for name in ("latents", "noise", "input_noise", "sigma") if name in samples[0]]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in stacked}
    if "prompt_embeds" in samples[0]:
        batch["prompt_embeds"], _ = _pad([sample["prompt_embeds"] for sample in samples], MIN_PROMPT_ROWS)
        return batch
    for name, mask in (("qwen_hidden_states", "qwen_attention_mask"), ("t5_input_ids", "t5_attention_mask")):
        batch[name], batch[mask] = _pad([sample[name] for sample in samples], 1)
    return batch


class BucketBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for `CachedDataset`: each sample once an epoch, one group in a batch.

    The order depends on (seed, epoch) only: samples are shuffled within their group, then the batches. A group's last
    batch may be smaller than the others.

    Args:
        groups: for each sample its group, `CachedDataset.groups`.
        batch_sizes: for each index of a dataset its batch size, `CachedDataset.batch_sizes`.
        seed: of the run.
    """

    def __init__(self, groups: Sequence[Group], batch_sizes: Mapping[int, int], *, seed: int) -> None:
        members: dict[Group, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        # Sorted, so that the order of the groups is theirs and not that of the samples.
        self._groups = [(batch_sizes[group[0]], members[group]) for group in sorted(members)]
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration goes through."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch, the same in each."""
        return sum(-(-len(members) // batch_size) for batch_size, members in self._groups)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self._epoch
        order = random.Random(_mix(self._seed, epoch, "order"))
        batches = []
        for batch_size, members in self._groups:
            shuffled = list(members)
            order.shuffle(shuffled)
            batches += [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]
        order.shuffle(batches)
        return iter([[(epoch, index) for index in batch] for batch in batches])


def _mix(*parts: int | str) -> int:
    """63 bits that depend on every part; Python's own hash differs between processes."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _pad(rows: list[torch.Tensor], at_least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros after each (n_i, …) tensor to the common length L >= `at_least`: (B, L, …) and its mask (B, L) int64."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence(rows, batch_first=True)
    lacking = max(at_least - padded.shape[1], 0)
    if lacking:
        padded = torch.cat([padded, padded.new_zeros(len(rows), lacking, *padded.shape[2:])], dim=1)
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()
