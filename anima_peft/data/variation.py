"""What `color_aug` and `random_crop` do to a picture: differently for each sample, so that its latents are not kept."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from .buckets import Placement

# sd-scripts' strengths (library/train_util.py, AugHelper): in a third of the cases, half of them a hue turned by up to
# 8 / 180 of the circle, half of them a gamma of 0.95 to 1.05.
_COLOR_CHANCE = 0.33
_HUE_STEPS = 8 * 256 // 180  # of PIL's 256
_GAMMA_RANGE = (0.95, 1.05)


@dataclass(frozen=True)
class Variation:
    """What one sample's picture is changed by."""

    crop: tuple[int, int]
    """(left, top) of the bucket within the resized picture."""
    hue: int = 0
    """Turn of the hue in 1/256 of the circle."""
    gamma: float = 1.0
    """Exponent of the colours in [0, 1]."""


def draw_variation(placement: Placement, *, color: bool, crop: bool, draw: random.Random) -> Variation:
    """A sample's own variation; without `color` and `crop` it changes nothing."""
    left, top = placement.crop
    if crop:
        spare = [resized - side for resized, side in zip(placement.resized, placement.bucket, strict=True)]
        left, top = (draw.randint(0, space) for space in spare)
    if color and draw.random() < _COLOR_CHANCE:
        if draw.random() < 0.5:
            return Variation((left, top), hue=draw.randint(-_HUE_STEPS, _HUE_STEPS))
        return Variation((left, top), gamma=draw.uniform(*_GAMMA_RANGE))
    return Variation((left, top))


def change_colors(image: Image.Image, variation: Variation) -> Image.Image:
    """An RGB picture with its hue turned and its gamma changed."""
    if variation.hue:
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point([(level + variation.hue) % 256 for level in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if variation.gamma != 1.0:
        image = image.point([round(255 * (level / 255) ** variation.gamma) for level in range(256)] * 3)
    return image
