"""Pictures drawn while training, always of the same prompts and seeds."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from ..generation import Request, labelled_grid, save_picture
from ..models.latents import decode_latents
from ..models.sources import ModelSources
from ..models.text import TextInputs, condition_text
from ..pipeline import AnimaPipeline
from ..transformer import AnimaTransformerModel
from .averages import AdapterAverage
from .compiling import uncompiled
from .outputs import Outputs
from .thinning import evenly
from .tracking import log_picture, record_of

logger = logging.getLogger(__name__)

_MOST_COLUMNS = 12


class Previews:
    """Draws the prompts with the model as it is, without a trace in its training.

    The texts are encoded once, before training: the text encoder then takes no memory. The VAE waits on the CPU and
    decodes in tiles, on the CPU if need be, so that a preview fits where a training step does. Random states, modes
    and weights are afterwards what they were.

    Args:
        model: the bare model; on its device when pictures are drawn.
        requests: what to draw.
        at_first: whether to draw before the first step.
        every_steps, every_epochs: None for never.
        max_length: tokens of a prompt that are kept.
        dtype: that the model computes in.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: AnimaTransformerModel,
        sources: ModelSources,
        outputs: Outputs,
        requests: Sequence[Request],
        *,
        at_first: bool,
        every_steps: int | None,
        every_epochs: int | None,
        max_length: int,
        dtype: torch.dtype,
    ):
        self._accelerator, self._model, self._outputs, self._requests = accelerator, model, outputs, list(requests)
        self._drawn: set[int] = set()
        self._decodes_on = accelerator.device
        self._told = False
        self._at_first, self._every_steps, self._every_epochs = at_first, every_steps, every_epochs
        self._pipe = AnimaPipeline.around(model, sources, dtype)
        self._pipe.set_progress_bar_config(disable=True)
        self._pipe.enable_vae_tiling()
        device = accelerator.device
        self._pipe.text_encoder.to(device)
        self._texts = [
            (self._encode(request.prompt, max_length), self._encode(request.negative_prompt, max_length))
            for request in self._requests
        ]
        self._pipe.register_modules(text_encoder=None)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _encode(self, text: str, max_length: int) -> TextInputs:
        return self._pipe.encode_text(text, self._accelerator.device, max_length).to("cpu")

    def before(self, step: int, average: AdapterAverage) -> None:
        """Call once before the loop: draws before the first step, if that is wanted and this is it."""
        if step:  # resumed: what it has drawn so far counts; an earlier run's pictures, which are overwritten, do not
            self._drawn.update(drawn for drawn in self._on_disk() if drawn <= step)
        if self._at_first and step == 0:
            self.draw(step, average)

    def after_step(self, step: int, average: AdapterAverage) -> None:
        """Draw if `every_steps` divides the steps done."""
        if self._every_steps and step % self._every_steps == 0:
            self.draw(step, average)

    def after_epoch(self, epoch: int, step: int, average: AdapterAverage) -> None:
        """Draw if `every_epochs` divides the epochs done."""
        if self._every_epochs and epoch % self._every_epochs == 0:
            self.draw(step, average)

    def draw(self, step: int, average: AdapterAverage) -> None:
        """Draw all prompts now, into the folder and the log. Where memory does not suffice, one warning says so."""
        if not self._accelerator.is_main_process or step in self._drawn:
            return  # an epoch's end and a number of steps may coincide
        device = self._accelerator.device
        was_training = self._model.training
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad(), average.in_place(), uncompiled():
                self._model.eval()
                pictures = [self._picture(number) for number in range(len(self._requests))]
        except torch.OutOfMemoryError as error:
            if not self._told:
                text = "step %d: there was no memory for previews (%s). Later failures are not reported."
                logger.warning(text, step, str(error).splitlines()[0])
            self._told = True
            return
        finally:
            self._model.train(was_training)
            self._pipe.vae.to("cpu")
        for number, (picture, request) in enumerate(zip(pictures, self._requests, strict=True), start=1):
            path, name = self._path(step, number), f"preview {number}: {request.prompt}"
            save_picture(picture, path)
            log_picture(self._accelerator, name, picture, step)
            record_of(self._accelerator).preview(step, name, path)
        self._drawn.add(step)

    def _picture(self, number: int) -> Image.Image:
        request, device = self._requests[number], self._accelerator.device
        shift = self._pipe.scheduler.shift
        self._pipe.scheduler.set_shift(shift if request.flow_shift is None else request.flow_shift)
        with self._accelerator.autocast():
            positive, negative = (
                condition_text(self._model.text_conditioner, text.to(self._model.text_conditioner.device)).to(device)
                for text in self._texts[number]
            )
            latents = self._pipe(
                prompt_embeds=positive,
                negative_prompt_embeds=negative if request.guidance_scale != 1 else None,
                width=request.width,
                height=request.height,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                output_type="latent",
                return_dict=False,
            )[0]
        self._pipe.scheduler.set_shift(shift)
        return self._pipe.image_processor.postprocess(self._decode(latents), output_type="pil")[0]

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, from the CPU where the card has no room for the VAE beside what is trained: slow, but a picture."""
        try:
            return decode_latents(self._pipe.vae.to(self._decodes_on), latents.to(self._decodes_on))
        except torch.OutOfMemoryError:
            if self._decodes_on.type == "cpu":
                raise
        logger.warning("Previews are decoded on the CPU: the card has no room for the VAE beside the training.")
        self._decodes_on = torch.device("cpu")
        self._pipe.vae.to("cpu")
        torch.cuda.empty_cache()
        return self._decode(latents)

    def strip(self) -> Path | None:
        """At the end: one picture with a row for each prompt and a column for each time; None if there was only one."""
        if not self._accelerator.is_main_process:
            return None
        steps = evenly(sorted(self._drawn), _MOST_COLUMNS)
        if len(steps) < 2:
            return None
        rows = []
        for number in range(1, len(self._requests) + 1):
            with_all = [self._path(step, number) for step in steps]
            rows.append([_read(path) for path in with_all])
        grid = labelled_grid(rows, [request.prompt for request in self._requests], [f"step {step}" for step in steps])
        save_picture(grid, self._outputs.strip)
        return self._outputs.strip

    def _on_disk(self) -> list[int]:
        """The steps of which there is a picture of every prompt."""
        last = self._path(0, len(self._requests)).name
        pattern = re.compile(re.escape(last).replace("0" * 8, r"(\d{8})", 1))
        found = [pattern.fullmatch(path.name) for path in self._outputs.previews()]
        return sorted(
            step
            for match in found
            if match is not None
            for step in [int(match[1])]
            if all(self._path(step, number).exists() for number in range(1, len(self._requests) + 1))
        )

    def _path(self, step: int, number: int) -> Path:
        return self._outputs.preview(step, number)


def _read(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
