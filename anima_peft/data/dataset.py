"""Training samples out of the cache, in batches of one bucket, the same on every machine and with any workers.

Everything random about a sample derives from (seed, epoch, index of the sample): a run that is interrupted, or that
uses other numbers of processes and workers, sees the same noise, sigma, mirroring and captions.

Letters: B samples in a batch, C latent channels, H and W height and width of a bucket in pixels, h and w those of the
latents (an eighth), L rows of text, N Qwen tokens, M T5 tokens, D text width, P samples whose pixels are not encoded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from .buckets import VAE_FACTOR
from .cache import read_entry
from .caching import LatentFiles
from .caption_choice import CaptionChoice
from .masks import load_mask
from .pictures import Picture, load_pixels
from .randomness import mix, sample_generator, sample_random
from .seals import require_shape
from .variation import draw_variation

# The conditioner pads its output with zero rows to at least this many, and the DiT attends to them.
# Source: huggingface/diffusers, AnimaTextConditioner, minimum output length.
MIN_PROMPT_ROWS = 512
LATENT_CHANNELS = 16
_STACKED = ("latents", "noise", "input_noise", "sigma", "mask", "loss_weight", "share")

Group = tuple[int, tuple[int, int]]
"""(index of the dataset, bucket as (width, height)): samples of one group may share a batch."""
Sample = dict[str, Any]
"""Named tensors, and perhaps the text of the `caption`."""


class SampleKey(NamedTuple):
    """Which sample is asked for; all count from 0."""

    epoch: int
    sample: int
    batch: int = 0
    """The number of its batch in the epoch: how far the run is, for captions that grow."""
    share: float | None = None
    """Where a batch is shared out to several processes, the weight of the sample's loss in this one's."""


def plain_noise(generator: torch.Generator, shape: torch.Size) -> dict[str, torch.Tensor]:
    """Standard normal `noise` of that shape, float32."""
    return {"noise": torch.randn(shape, generator=generator, dtype=torch.float32)}


@dataclass(frozen=True)
class SampleTable:
    """The samples of an epoch: each picture `num_repeats` times, in the order of the pictures."""

    pictures: tuple[Picture, ...]

    @property
    def picture_of_sample(self) -> list[int]:
        """For each sample, the number of its picture."""
        return [i for i, picture in enumerate(self.pictures) for _ in range(picture.num_repeats)]

    @property
    def groups(self) -> list[Group]:
        """For each sample, what it may share a batch with."""
        of_picture = [(picture.dataset_index, picture.placement.bucket) for picture in self.pictures]
        return [of_picture[i] for i in self.picture_of_sample]

    @property
    def batch_sizes(self) -> dict[int, int]:
        """The batch size of each dataset, by its index."""
        return {picture.dataset_index: picture.batch_size for picture in self.pictures}


class CachedDataset(Dataset[Sample]):
    """Samples by `SampleKey`.

    A sample holds:
        latents: (C, h, w) float32; the mirrored picture's in half of the cases where `flip_aug` is on.
        pixels: (3, H, W) float32 in [-1, 1], where the latents are not kept; `latents` is zero there.
        noise: (C, h, w) float32, and what else `draw_noise` gives.
        sigma: () float32, from `draw_sigma`.
        the text tensors of its caption, as they were kept, or where they are not, the `caption` as a str.
        mask: (1, h, w) float32 in [0, 1], if any picture has one; ones for those without.
        loss_weight: () float32, if any picture is a regularisation picture and `prior_loss_weight` is not 1.
        share: () float32, if its key has one.

    Args:
        pictures: from `scan`.
        latents: for each picture its latents, `LatentsPlan.files`; all exist. None: encoded in every step.
        captions: the path of each caption's file, `CaptionsPlan.of_caption`; all exist. None: encoded in every step.
        masks: for each picture its mask, `MasksPlan.files`; all exist. None: from the picture's own mask.
        seed: of the run.
        draw_sigma: from a generator and the latents' (h, w), a sigma in [0, 1].
        draw_noise: from a generator and (C, h, w), noise tensors of that shape by name, `noise` among them. Both can be
            pickled where worker processes are spawned.
        choose_caption: the caption of a sample.
        prior_loss_weight: weight of regularisation pictures in the loss.

    Raises:
        InputError: on indexing, where a cache file is missing or damaged.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        latents: Sequence[LatentFiles | None],
        captions: Mapping[str, str] | None,
        masks: Sequence[str | None] | None = None,
        *,
        seed: int,
        draw_sigma: Callable[[torch.Generator, tuple[int, int]], float],
        draw_noise: Callable[[torch.Generator, torch.Size], Mapping[str, torch.Tensor]] = plain_noise,
        choose_caption: CaptionChoice,
        prior_loss_weight: float = 1.0,
    ) -> None:
        self.table = SampleTable(tuple(pictures))
        self.pictures = self.table.pictures
        self.picture_of_sample = self.table.picture_of_sample
        """For each sample, the number of its picture."""
        self._latents = tuple(latents)
        self._masks = tuple(masks) if masks is not None else (None,) * len(self.pictures)
        assert len(self._latents) == len(self._masks) == len(self.pictures)
        self._captions = captions
        self._seed = seed
        self._draw_sigma, self._draw_noise, self._choose_caption = draw_sigma, draw_noise, choose_caption
        self._has_masks = any(picture.mask for picture in self.pictures)
        has_weights = prior_loss_weight != 1 and any(picture.is_reg for picture in self.pictures)
        self._prior_loss_weight = prior_loss_weight if has_weights else None

    @property
    def groups(self) -> list[Group]:
        """For each sample, what it may share a batch with."""
        return self.table.groups

    @property
    def batch_sizes(self) -> dict[int, int]:
        """The batch size of each dataset, by its index."""
        return self.table.batch_sizes

    def __len__(self) -> int:
        return len(self.picture_of_sample)

    def __getitem__(self, item: tuple[Any, ...]) -> Sample:
        epoch, index, batch, share = SampleKey(*item)
        number = self.picture_of_sample[index]
        picture = self.pictures[number]

        def generator(purpose: str) -> torch.Generator:
            return sample_generator(self._seed, epoch, index, purpose)

        flip = picture.flip_aug and torch.rand((), generator=generator("flip")).item() < 0.5
        sample = self._picture(number, flip, sample_random(self._seed, epoch, index, "variation"))
        latents = sample["latents"]
        sigma = self._draw_sigma(generator("sigma"), (latents.shape[-2], latents.shape[-1]))
        sample |= self._draw_noise(generator("noise"), latents.shape)
        sample["sigma"] = torch.tensor(sigma, dtype=torch.float32)
        caption = self._choose_caption(picture, epoch, index, batch)
        sample |= {"caption": caption} if self._captions is None else read_entry(self._captions[caption])
        if self._prior_loss_weight is not None:
            sample["loss_weight"] = torch.tensor(self._prior_loss_weight if picture.is_reg else 1.0)
        if share is not None:
            sample["share"] = torch.tensor(share, dtype=torch.float32)
        return sample

    def _picture(self, number: int, flip: bool, draw: random.Random) -> Sample:
        """What is seen of a picture: its latents or pixels, and its mask."""
        picture, files = self.pictures[number], self._latents[number]
        crop = None
        if files is not None:
            file = files.flipped if flip and files.flipped else files.plain
            sample = {"latents": require_shape(file, read_entry(file), "latents", (0, *self._latent_size(picture)))}
        else:
            variation = draw_variation(picture.placement, color=picture.color_aug, crop=picture.random_crop, draw=draw)
            crop = variation.crop
            sample = {
                "latents": torch.zeros(LATENT_CHANNELS, *self._latent_size(picture)),
                "pixels": load_pixels(picture, flip, variation),
            }
        if self._has_masks:
            mask = self._mask(number, crop, sample["latents"].shape[-2:])
            sample["mask"] = mask.flip(-1) if flip else mask
        return sample

    def _mask(self, number: int, crop: tuple[int, int] | None, size: torch.Size) -> torch.Tensor:
        """(1, h, w), not mirrored."""
        source, file = self.pictures[number].mask, self._masks[number]
        if source is None:
            return torch.ones(1, *size)
        if file is None:
            return load_mask(source, self.pictures[number].placement, crop)
        return require_shape(file, read_entry(file), "mask", (1, *size))

    @staticmethod
    def _latent_size(picture: Picture) -> tuple[int, int]:
        """(h, w) of a picture's latents."""
        width, height = picture.placement.bucket
        return height // VAE_FACTOR, width // VAE_FACTOR


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack samples of one group into a batch, and give their texts a common length.

    Returns:
        latents, noise, perhaps input_noise: (B, C, h, w) float32; sigma: (B,) float32; where samples have them,
            mask: (B, 1, h, w), loss_weight and share: (B,) float32.
        Where latents have to be encoded yet, pixels: (P, 3, H, W) float32 and pixel_rows: (P,) int64, their rows in
            `latents`.
        The text: `captions` as a list of str where it has to be encoded yet, else what `stack_text` gives.
    """
    names = [name for name in _STACKED if name in samples[0]]
    batch: dict[str, Any] = {name: torch.stack([sample[name] for sample in samples]) for name in names}
    rows = [row for row, sample in enumerate(samples) if "pixels" in sample]
    if rows:
        batch["pixels"] = torch.stack([samples[row]["pixels"] for row in rows])
        batch["pixel_rows"] = torch.tensor(rows)
    if "caption" in samples[0]:
        return batch | {"captions": [sample["caption"] for sample in samples]}
    return batch | stack_text(samples)


def stack_text(texts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The encoded captions of a batch, brought to a common length.

    Returns:
        Whichever the captions were encoded to, either
        prompt_embeds: (B, max(512, longest), D), zero rows after the real ones. They are part of the model: no mask
            goes with them.
        or qwen_hidden_states (B, N, D), t5_input_ids (B, M) int64, filled with zeros on the right to the longest and
            at least 1, with qwen_attention_mask (B, N) and t5_attention_mask (B, M), int64, 1 for real tokens.
    """
    if "prompt_embeds" in texts[0]:
        return {"prompt_embeds": _pad([text["prompt_embeds"] for text in texts], MIN_PROMPT_ROWS)[0]}
    batch = {}
    for name, mask in (("qwen_hidden_states", "qwen_attention_mask"), ("t5_input_ids", "t5_attention_mask")):
        batch[name], batch[mask] = _pad([text[name] for text in texts], 1)
    return batch


def text_rows(batch: Mapping[str, torch.Tensor]) -> int:
    """How many rows the texts of a batch have, L or M."""
    return batch["prompt_embeds" if "prompt_embeds" in batch else "t5_input_ids"].shape[1]


def lengthen_text(batch: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """The batch with zeros after its texts up to so many rows: as part of a batch that has a longer one."""
    names = [name for name in ("prompt_embeds", "t5_input_ids", "t5_attention_mask") if name in batch]
    lacking = {name: (len(batch[name]), rows - batch[name].shape[1], *batch[name].shape[2:]) for name in names}
    return {**batch, **{name: torch.cat([batch[name], batch[name].new_zeros(lacking[name])], dim=1) for name in names}}


class BucketBatchSampler(Sampler[list[SampleKey]]):
    """Batches of `SampleKey` for `CachedDataset`: each sample once an epoch, one group in a batch.

    The order depends on (seed, epoch) only: samples are shuffled within their group, then the batches. A group's last
    batch may be smaller than the others.

    Several processes train on one batch together, which is so many times as large: iterating gives the part of one of
    them. Its samples have shares in the loss so that the mean over the processes, which is what
    DistributedDataParallel makes of gradients, is the mean over all samples of the batch, also where these do not go
    round evenly.

    Args:
        groups: for each sample its group, `CachedDataset.groups`.
        batch_sizes: for each index of a dataset its batch size in one process, `CachedDataset.batch_sizes`.
        seed: of the run.
        processes: how many there are; `process` is the number of this one.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        batch_sizes: Mapping[int, int],
        *,
        seed: int,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        members: dict[Group, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        # Sorted, so that the order of the groups is theirs and not that of the samples.
        self._groups = [(batch_sizes[group[0]] * processes, members[group]) for group in sorted(members)]
        self._processes, self._process = processes, process
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration goes through."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch, the same in each."""
        return sum(-(-len(members) // batch_size) for batch_size, members in self._groups)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        batches = self.batches(self._epoch)
        return iter(batches) if self._processes == 1 else map(self._part, batches)

    def _part(self, batch: list[SampleKey]) -> list[SampleKey]:
        """What this process has to do of a batch."""
        start, end = (len(batch) * process // self._processes for process in (self._process, self._process + 1))
        if start == end:  # fewer samples than processes: all take part in a step, with one that counts for nothing
            return [batch[0]._replace(share=0.0)]
        return [key._replace(share=self._processes / len(batch)) for key in batch[start:end]]

    def batches(self, epoch: int) -> list[list[SampleKey]]:
        """The whole batches of an epoch, from 0, in their order."""
        order = random.Random(mix(self._seed, epoch, "order"))
        batches = []
        for batch_size, members in self._groups:
            shuffled = list(members)
            order.shuffle(shuffled)
            batches += [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]
        order.shuffle(batches)
        return [[SampleKey(epoch, index, number) for index in batch] for number, batch in enumerate(batches)]


def _pad(rows: list[torch.Tensor], at_least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros after each (n_i, …) tensor to the common length L >= `at_least`: (B, L, …) and its mask (B, L) int64."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = pad_sequence(rows, batch_first=True)
    lacking = max(at_least - padded.shape[1], 0)
    if lacking:
        padded = torch.cat([padded, padded.new_zeros(len(rows), lacking, *padded.shape[2:])], dim=1)
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()
