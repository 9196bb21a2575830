"""Prompts to the conditioner's inputs, against diffusers' `AnimaTextEncoderStep` and against the rules themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
from transformers import Qwen2Tokenizer, T5TokenizerFast

from anima_peft.errors import InputError
from anima_peft.models.text import (
    TokenCounts,
    condition_text,
    encode_qwen,
    encode_text,
    find_cut_prompts,
    token_counts,
    tokenize_t5,
)
from tests.components import CORPUS, TEXT_WIDTH, tiny_conditioner, tiny_text_encoder, tiny_tokenizers

LONG = "a red circle " * 40
BATCHES = [["a cat"], CORPUS, ["", "a cat in the garden"], [""], ["", ""], ["a cat", LONG, ""]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def parts(folder: Path) -> Any:
    tokenizer, t5_tokenizer = tiny_tokenizers(folder)
    return SimpleNamespace(
        text_encoder=tiny_text_encoder(),
        tokenizer=tokenizer,
        t5_tokenizer=t5_tokenizer,
        text_conditioner=tiny_conditioner(),
    )


@pytest.mark.parametrize("max_length", [5, 64])
@pytest.mark.parametrize("prompts", BATCHES, ids=range(len(BATCHES)))
def test_equals_the_stock_encoder_step(parts: Any, prompts: list[str], max_length: int) -> None:
    text = encode_text(parts.text_encoder, parts.tokenizer, parts.t5_tokenizer, prompts, max_length, "cpu")
    stock = AnimaTextEncoderStep.encode_prompt(
        parts, prompts, prepare_unconditional_embeds=False, max_sequence_length=max_length, device=torch.device("cpu")
    )
    for ours, theirs in zip(
        text, ("qwen_prompt_embeds", "qwen_attention_mask", "t5_input_ids", "t5_attention_mask"), strict=True
    ):
        assert ours.dtype == stock[theirs].dtype
        assert torch.equal(ours, stock[theirs])


def test_shapes_dtypes_and_zeroed_padding(parts: Any) -> None:
    hidden, mask = encode_qwen(parts.text_encoder, parts.tokenizer, ["a cat", CORPUS[2]], 512, "cpu")
    lengths = [len(parts.tokenizer(text).input_ids) for text in ("a cat", CORPUS[2])]
    assert hidden.shape == (2, max(lengths), TEXT_WIDTH)
    assert mask.tolist() == [[1] * n + [0] * (max(lengths) - n) for n in lengths]
    assert hidden[0, lengths[0] :].abs().max() == 0
    assert hidden[0, : lengths[0]].abs().min(dim=-1).values.gt(0).all()
    assert not hidden.requires_grad


def test_one_prompt_needs_no_list(parts: Any) -> None:
    alone, _ = encode_qwen(parts.text_encoder, parts.tokenizer, "a cat", 512, "cpu")
    listed, _ = encode_qwen(parts.text_encoder, parts.tokenizer, ["a cat"], 512, "cpu")
    assert torch.equal(alone, listed)


def test_empty_prompts_are_one_zero_row_and_closing_token(parts: Any) -> None:
    hidden, mask = encode_qwen(parts.text_encoder, parts.tokenizer, ["", ""], 512, "cpu")
    assert torch.equal(hidden, torch.zeros(2, 1, TEXT_WIDTH))
    assert mask.tolist() == [[0], [0]]
    ids, ids_mask = tokenize_t5(parts.t5_tokenizer, ["", ""], 512, "cpu")
    assert ids.tolist() == [[parts.t5_tokenizer.eos_token_id]] * 2
    assert ids_mask.tolist() == [[1], [1]]


def test_conditioning_of_empty_text_is_finite_and_the_same_in_every_batch(parts: Any) -> None:
    def condition(prompts: list[str]) -> torch.Tensor:
        text = encode_text(parts.text_encoder, parts.tokenizer, parts.t5_tokenizer, prompts, 512, "cpu")
        return condition_text(parts.text_conditioner, text).detach()

    alone, among = condition([""]), condition(["a cat in the garden", ""])
    assert alone.isfinite().all()
    assert alone[0, 0].abs().max() > 0
    assert alone.shape == (1, 512, TEXT_WIDTH)
    assert alone[0, 1:].abs().max() == 0
    torch.testing.assert_close(among[1:], alone, atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_the_conditioner(parts: Any) -> None:
    text = encode_text(parts.text_encoder, parts.tokenizer, parts.t5_tokenizer, ["a cat"], 512, "cpu")
    assert condition_text(parts.text_conditioner, text).requires_grad


def test_states_come_in_the_encoders_dtype_and_are_cast_for_the_conditioner(parts: Any) -> None:
    encoder = tiny_text_encoder().to(torch.bfloat16)
    text = encode_text(encoder, parts.tokenizer, parts.t5_tokenizer, ["a cat", ""], 512, "cpu")
    assert text.qwen_hidden_states.dtype == torch.bfloat16
    assert condition_text(parts.text_conditioner, text).dtype == torch.float32


def test_sides_saved_with_a_tokenizer_do_not_matter(parts: Any, folder: Path, tmp_path: Path) -> None:
    prompts = ["a cat", LONG, ""]
    expected = encode_text(parts.text_encoder, parts.tokenizer, parts.t5_tokenizer, prompts, 20, "cpu")
    sides = {"padding_side": "left", "truncation_side": "left"}
    Qwen2Tokenizer.from_pretrained(folder / "tokenizer", **sides).save_pretrained(tmp_path / "q")
    T5TokenizerFast.from_pretrained(folder / "t5_tokenizer", **sides).save_pretrained(tmp_path / "t")
    left, t5_left = Qwen2Tokenizer.from_pretrained(tmp_path / "q"), T5TokenizerFast.from_pretrained(tmp_path / "t")
    assert (left.padding_side, t5_left.truncation_side) == ("left", "left")
    for ours, theirs in zip(encode_text(parts.text_encoder, left, t5_left, prompts, 20, "cpu"), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_cut_texts_keep_their_start_and_closing_token(parts: Any) -> None:
    whole = parts.t5_tokenizer(LONG).input_ids
    ids, mask = tokenize_t5(parts.t5_tokenizer, LONG, 10, "cpu")
    assert ids.tolist() == [[*whole[:9], parts.t5_tokenizer.eos_token_id]]
    assert mask.sum() == 10


def test_counts_are_uncut_and_name_the_texts_that_lose_their_end(parts: Any) -> None:
    prompts = ["", "a cat", LONG]
    counts = token_counts(parts.tokenizer, parts.t5_tokenizer, prompts)
    assert counts == [
        TokenCounts(len(parts.tokenizer(text).input_ids), len(parts.t5_tokenizer(text).input_ids)) for text in prompts
    ]
    assert counts[0] == TokenCounts(qwen=0, t5=1)
    assert find_cut_prompts(parts.tokenizer, parts.t5_tokenizer, prompts, 50) == {2: counts[2]}
    longest = max(counts[2])
    assert find_cut_prompts(parts.tokenizer, parts.t5_tokenizer, prompts, longest) == {}
    assert find_cut_prompts(parts.tokenizer, parts.t5_tokenizer, prompts, longest - 1) == {2: counts[2]}


def test_wrong_inputs_are_refused(parts: Any) -> None:
    with pytest.raises(InputError, match="No prompts"):
        encode_qwen(parts.text_encoder, parts.tokenizer, [], 512, "cpu")
    with pytest.raises(InputError, match="at least 1"):
        tokenize_t5(parts.t5_tokenizer, "a cat", 0, "cpu")
    with pytest.raises(InputError, match="`</s>`"):
        tokenize_t5(parts.tokenizer, "a cat", 512, "cpu")
