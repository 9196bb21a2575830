"""From prompts to what the text conditioner reads: Qwen3's hidden states and T5's token ids.

Inference and training must turn the same text into the same numbers, so both call these functions. The rules are
those of diffusers' `AnimaTextEncoderStep`: no chat template, each prompt as it is, right padding to the longest of
the batch.

Letters: B prompts, L tokens of the longest Qwen row, T tokens of the longest T5 row, D width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..errors import InputError


class TokenCounts(NamedTuple):
    """How many tokens a text has before any cut: one count per tokenizer, T5's with its closing `</s>`."""

    qwen: int
    t5: int


class TextInputs(NamedTuple):
    """What the text conditioner reads, for B prompts.

    Attributes:
        qwen_hidden_states: (B, L, D), zero in the rows of padding.
        qwen_attention_mask: (B, L) int64, 1 for text and 0 for padding.
        t5_input_ids: (B, T) int64.
        t5_attention_mask: (B, T) int64, 1 for text and 0 for padding.
    """

    qwen_hidden_states: torch.Tensor
    qwen_attention_mask: torch.Tensor
    t5_input_ids: torch.Tensor
    t5_attention_mask: torch.Tensor

    def to(self, device: torch.device | str) -> TextInputs:
        """The same on another device."""
        return TextInputs(*(tensor.to(device) for tensor in self))


def encode_text(
    text_encoder: Any,
    tokenizer: Any,
    t5_tokenizer: Any,
    prompts: str | Sequence[str],
    max_length: int,
    device: torch.device | str,
) -> TextInputs:
    """Both encodings of B prompts; see `encode_qwen` and `tokenize_t5`."""
    return TextInputs(
        *encode_qwen(text_encoder, tokenizer, prompts, max_length, device),
        *tokenize_t5(t5_tokenizer, prompts, max_length, device),
    )


def condition_text(text_conditioner: Any, text: TextInputs) -> torch.Tensor:
    """The DiT's conditioning (B, max(512, T), D') in the conditioner's dtype; its rows after the text are zero.

    Gradients flow, so that the conditioner can be trained through it.
    """
    embeds: torch.Tensor = text_conditioner(
        source_hidden_states=text.qwen_hidden_states.to(text_conditioner.dtype),
        target_input_ids=text.t5_input_ids,
        target_attention_mask=text.t5_attention_mask,
        source_attention_mask=text.qwen_attention_mask,
    )
    return embeds


@torch.no_grad()
def encode_qwen(
    text_encoder: Any,
    tokenizer: Any,
    prompts: str | Sequence[str],
    max_length: int,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts with Qwen3.

    Args:
        text_encoder: a `Qwen3Model` on `device`.
        tokenizer: its tokenizer. The sides it was saved to pad and cut on do not matter here.
        prompts: one prompt or B prompts; empty ones are fine.
        max_length: tokens that are kept, counted from the start.
        device: where the text encoder runs.

    Returns:
        The states after the final norm (B, L, D) in the encoder's dtype, with the rows of padding zeroed, and the
        mask (B, L) int64, 1 for text and 0 for padding. L is at least 1: an empty prompt is one row of padding.

    Raises:
        InputError: no prompts, or `max_length` below 1.
    """
    rows = [ids[:max_length] for ids in _token_ids(tokenizer, prompts, max_length)]
    ids, mask = _pad_right(rows, tokenizer.pad_token_id, device)
    hidden = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state.to(text_encoder.dtype)
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, 0.0), mask


def tokenize_t5(
    t5_tokenizer: Any, prompts: str | Sequence[str], max_length: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of prompts for the text conditioner, each closed by `</s>`. There is no T5 model.

    Args:
        t5_tokenizer: a `T5TokenizerFast`.
        prompts: one prompt or B prompts; an empty one is `</s>` alone.
        max_length: tokens that are kept from the start, the closing `</s>` included.
        device: where the ids are wanted.

    Returns:
        Ids (B, T) int64, and the mask (B, T) int64, 1 for text and 0 for padding.

    Raises:
        InputError: no prompts, `max_length` below 1, or a tokenizer that does not close its texts by `</s>`.
    """
    rows = _token_ids(t5_tokenizer, prompts, max_length)
    closing = t5_tokenizer.eos_token_id
    if any(not ids or ids[-1] != closing for ids in rows):
        raise InputError(
            f"The T5 tokenizer ({t5_tokenizer.name_or_path or type(t5_tokenizer).__name__}) does not end its texts with"
            " `</s>`, which the model was trained on. Use the tokenizer published with Anima."
        )
    rows = [[*ids[: max_length - 1], closing] if len(ids) > max_length else ids for ids in rows]
    return _pad_right(rows, t5_tokenizer.pad_token_id, device)


def token_counts(tokenizer: Any, t5_tokenizer: Any, prompts: str | Sequence[str]) -> list[TokenCounts]:
    """The uncut length of every prompt, in order.

    Raises:
        InputError: no prompts.
    """
    qwen, t5 = _token_ids(tokenizer, prompts), _token_ids(t5_tokenizer, prompts)
    return [TokenCounts(len(a), len(b)) for a, b in zip(qwen, t5, strict=True)]


def find_cut_prompts(
    tokenizer: Any, t5_tokenizer: Any, prompts: str | Sequence[str], max_length: int
) -> dict[int, TokenCounts]:
    """Which prompts lose their end at `max_length`: index in `prompts` -> uncut lengths. Empty if none does.

    Raises:
        InputError: no prompts.
    """
    counts = token_counts(tokenizer, t5_tokenizer, prompts)
    return {index: count for index, count in enumerate(counts) if max(count) > max_length}


def _token_ids(tokenizer: Any, prompts: str | Sequence[str], max_length: int = 1) -> list[list[int]]:
    """Uncut, unpadded ids of every prompt.

    Cutting and padding are done in this module, not by the tokenizer, because a saved tokenizer carries its own
    `padding_side` and `truncation_side`, and either one set to "left" would change what the model sees.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise InputError("No prompts were given. Expected a text or a list with at least one; it may be empty text.")
    if max_length < 1:
        raise InputError(f"The maximum sequence length is {max_length}. Expected at least 1.")
    # verbose=False: a text over the tokenizer's own limit is reported by find_cut_prompts, with our limit.
    ids: list[list[int]] = tokenizer(texts, padding=False, truncation=False, verbose=False).input_ids
    return ids


def _pad_right(rows: list[list[int]], pad_id: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, longest row), at least one column wide: a batch of empty rows would crash the encoder."""
    width = max(1, *(len(row) for row in rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], dtype=torch.int64)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
    return ids.to(device), mask.to(device)
