"""What is encoded in every step, because it is not kept: pictures that vary, and captions where an option says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.caching import CaptionEncoder
from ..data.dataset import stack_text


@dataclass(frozen=True)
class LiveEncoders:
    """Completes batches of `collate`; the encoders it holds stay in memory.

    Attributes:
        latents: encodes pixels (P, 3, H, W), if any latents are not kept.
        text: encodes captions, if they are not kept.
    """

    latents: Callable[[torch.Tensor], torch.Tensor] | None = None
    text: CaptionEncoder | None = None

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with latents and text in place of pixels and captions, on its device."""
        complete = dict(batch)
        device = complete["latents"].device
        if "pixels" in complete:
            assert self.latents is not None
            pixels, rows = complete.pop("pixels"), complete.pop("pixel_rows")
            complete["latents"] = complete["latents"].index_copy(0, rows, self.latents(pixels).float().to(device))
        if "captions" in complete:
            assert self.text is not None
            captions: Sequence[str] = complete.pop("captions")
            text = stack_text(self.text(list(captions)))
            complete |= {name: tensor.to(device) for name, tensor in text.items()}
        return complete
