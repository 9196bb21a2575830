"""Anima's module names without a model at hand, for reading adapter files by themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable

from diffusers.models import AnimaTextConditioner, CosmosTransformer3DModel
from transformers import Qwen3Config, Qwen3Model

from ..errors import InputError
from ..models.checkpoints import build_empty
from .naming import TEXT_CONDITIONER, TEXT_ENCODER, TRANSFORMER, ModuleTable

_BLOCK = re.compile(r"(?:blocks|layers)[._](\d+)[._]")
_MOST_BLOCKS = 128
_TINY = 4


def nominal_table(keys: Iterable[str], source: str) -> ModuleTable:
    """The names of an Anima that has as many blocks as the keys of a file mention. Its sizes are not known.

    Raises:
        InputError: a block's number that no model has.
    """
    numbers = [number for key in keys for number in _BLOCK.findall(key)]
    highest = max((int(number) for number in numbers if len(number) < 6), default=0)
    if highest >= _MOST_BLOCKS or any(len(number) >= 6 for number in numbers):
        raise InputError(f"{source}: names a block beyond number {_MOST_BLOCKS - 1}; this is no adapter of Anima.")
    blocks = highest + 1
    transformer = build_empty(
        lambda: CosmosTransformer3DModel(
            num_layers=blocks,
            num_attention_heads=1,
            attention_head_dim=_TINY * 3,
            text_embed_dim=_TINY,
            adaln_lora_dim=_TINY,
            extra_pos_embed_type=None,
        )
    )
    conditioner = build_empty(
        lambda: AnimaTextConditioner(
            source_dim=_TINY,
            target_dim=_TINY,
            model_dim=_TINY,
            num_layers=blocks,
            num_attention_heads=1,
            target_vocab_size=_TINY,
        )
    )
    config = Qwen3Config(
        vocab_size=_TINY,
        hidden_size=_TINY,
        intermediate_size=_TINY,
        num_hidden_layers=blocks,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=_TINY,
    )
    parts = {
        TRANSFORMER: transformer,
        TEXT_CONDITIONER: conditioner,
        TEXT_ENCODER: build_empty(lambda: Qwen3Model(config)),
    }
    return ModuleTable(parts, sized=False)
