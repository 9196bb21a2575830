"""What is in an adapter file, in words: for people, without a model."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from ..errors import InputError
from ..texts import escaped
from .factors import Factors, LoKrFactors, describe_factors
from .naming import ModuleName, ModuleTable
from .nominal import nominal_table
from .reading import parse, styles
from .sources import locate_adapter, read_adapter_file

_MOST_SHOWN = 400


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        path: the file.
        bytes: its size.
        styles: naming style -> keys.
        dtypes: dtype -> tensors.
        parameters: numbers in all tensors.
        kinds: kind, rank and scale -> modules.
        shapes: LoKr's factor shapes -> modules.
        components: component -> modules.
        blocks: component and block -> Frobenius norm of all its deltas.
        metadata: the file's text, escaped and shortened.
        refusal: why it would not load; None if it would.
    """

    path: Path
    bytes: int
    styles: Mapping[str, int]
    dtypes: Mapping[str, int]
    parameters: int
    kinds: Mapping[str, int]
    shapes: Mapping[str, int]
    components: Mapping[str, int]
    blocks: Mapping[str, float]
    metadata: Mapping[str, str]
    refusal: str | None


def inspect_adapter(source: str | Path, table: ModuleTable | None = None) -> Inspection:
    """Read a file and say what it is, whether or not it could be loaded.

    Args:
        source: file, folder or hub repo.
        table: the modules of the model it is meant for; without one the sizes are not checked.

    Raises:
        InputError: there is no such file, or it is not safetensors.
    """
    path = locate_adapter(source)
    file = read_adapter_file(path)
    weights: Mapping[ModuleName, Factors] = {}
    refusal = None
    try:
        weights = parse(file, table or nominal_table(file.tensors, file.source))
    except InputError as error:
        refusal = str(error)
    blocks: dict[str, float] = defaultdict(float)
    for name, factors in weights.items():
        blocks[_block(name)] = math.hypot(blocks[_block(name)], factors.delta_norm())
    return Inspection(
        path=path,
        bytes=path.stat().st_size,
        styles=styles(file.tensors),
        dtypes=Counter(str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values()),
        parameters=sum(tensor.numel() for tensor in file.tensors.values()),
        kinds=Counter(describe_factors(factors) for factors in weights.values()),
        shapes=Counter(_lokr_shape(f) for f in weights.values() if isinstance(f, LoKrFactors)),
        components=Counter(name.component for name in weights),
        blocks=blocks,
        metadata={shown(key): shown(value) for key, value in file.metadata.items()},
        refusal=refusal,
    )


def _block(name: ModuleName) -> str:
    """The component and its block, such as `transformer.transformer_blocks.3`; all that is outside of them together."""
    inside = re.match(r"(?:transformer_blocks|blocks|layers)\.\d+", name.path)
    return f"{name.component}.{inside[0] if inside else '*'}"


def _lokr_shape(factors: LoKrFactors) -> str:
    shape = factors.shape
    ranks = [f"{side} of rank {rank}" for side, rank in (("w1", shape.rank1), ("w2", shape.rank2)) if rank is not None]
    return f"w1 {shape.a}x{shape.c}, w2 {shape.b}x{shape.d}" + (f" ({', '.join(ranks)})" if ranks else "")


def shown(text: str) -> str:
    """A file's own text on one line: control characters and line breaks escaped, and not endless."""
    plain = escaped(text[: _MOST_SHOWN + 1])
    return plain if len(plain) <= _MOST_SHOWN else f"{plain[:_MOST_SHOWN]}… ({len(text)} characters)"


def as_text(found: Inspection) -> Iterator[str]:
    """The lines that `anima-peft inspect` prints."""
    yield f"{shown(str(found.path))}"
    yield f"  size: {found.bytes:,} bytes, {found.parameters:,} numbers in {_counts(found.dtypes)}"
    yield f"  keys named as: {_counts(found.styles)}"
    if found.refusal is None:
        yield f"  loads: yes, on {_counts(found.components)}"
    else:
        yield "  loads: no"
        yield from (f"    {escaped(line)}" for line in found.refusal.split("\n"))
    for title, counts in (("holds", found.kinds), ("LoKr factors", found.shapes)):
        for text, count in counts.items():
            yield f"  {title}: {count} x {text}"
    if found.blocks:
        largest = max(filter(math.isfinite, found.blocks.values()), default=0.0) or 1.0
        yield "  size of the delta by block (Frobenius norm):"
        for block, norm in found.blocks.items():
            yield f"    {block:44} {norm:10.4g} {'#' * round(30 * min(norm / largest, 1.0))}"
    if found.metadata:
        yield "  metadata, as the file has it:"
        yield from (
            f"    {key}: {value}" for key, value in sorted(found.metadata.items()) if key != LORA_ADAPTER_METADATA_KEY
        )
        if LORA_ADAPTER_METADATA_KEY in found.metadata:
            yield f"    {LORA_ADAPTER_METADATA_KEY}: an adapter config"


def as_json(found: Inspection) -> str:
    """The same for programs."""
    blocks = {block: norm if math.isfinite(norm) else None for block, norm in found.blocks.items()}  # JSON has no inf
    return json.dumps(vars(found) | {"path": str(found.path), "blocks": blocks}, indent=2)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items()) or "nothing"
