"""Random numbers that depend on (seed, epoch, sample) alone: never on process, worker, order, or what was drawn before.

Each purpose ("noise", "sigma", "flip", "caption", …) has a stream of its own, so that a draw added for one leaves the
others as they were.
"""

from __future__ import annotations

import hashlib
import random

import torch


def sample_generator(seed: int, epoch: int, index: int, purpose: str = "") -> torch.Generator:
    """A CPU generator for one sample of one epoch.

    Its seed is the first 63 bits of the sha256 of "seed/epoch/index/purpose"; torch's CPU generator heeds the lower 32
    of them, so that among very many samples two may share their noise, which does no harm.
    """
    return torch.Generator().manual_seed(mix(seed, epoch, index, purpose))


def sample_random(seed: int, epoch: int, index: int, purpose: str) -> random.Random:
    """The same for choices and shuffles, by the standard library, which keeps its streams between versions."""
    return random.Random(mix(seed, epoch, index, purpose))


def mix(*parts: int | str) -> int:
    """63 bits that depend on every part; Python's own hash differs between processes."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1
