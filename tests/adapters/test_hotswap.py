"""Exchanging a loaded adapter's weights in place: the new file's output, no recompilation, and nothing by halves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from anima_peft import load_adapter
from anima_peft.adapters.exchange import read_adapter
from anima_peft.errors import InputError
from anima_peft.pipeline import AnimaPipeline
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    KINDS_OF_FACTORS,
    MLP,
    SOME_MODULES,
    TO_Q,
    Snapshot,
    Tensors,
    add_explicitly,
    as_file,
    assert_close,
    explicit,
    factors_of_kind,
    kohya_stem,
    output,
    random_factors,
    tensors_by_key,
    tiny_model,
)

TOLERANCE = 1e-5
kinds = pytest.mark.parametrize("kind", KINDS_OF_FACTORS)


def swap(model: AnimaTransformerModel, tensors: Tensors, name: str = "one") -> None:
    assert model.load_lora_adapter(tensors, name, hotswap=True) == name


def loaded(kind: str, rank: int = 2) -> AnimaTransformerModel:
    model = tiny_model()
    model.load_lora_adapter(tensors_by_key(factors_of_kind(model, kind, rank=rank)), "one")
    return model


@kinds
def test_the_new_files_output_without_a_new_layer(kind: str) -> None:
    model = loaded(kind)
    model.set_adapters("one", 0.6)
    layers, parameters = Snapshot.of(model.components).layers, [id(p) for p in model.parameters()]
    other = factors_of_kind(model, kind, seed=1)
    swap(model, tensors_by_key(other, "diffusers"))
    assert_close(output(model), output(explicit(other, 0.6)), TOLERANCE)
    assert Snapshot.of(model.components).layers == layers
    assert [id(p) for p in model.parameters()] == parameters
    assert not any(parameter.requires_grad for parameter in model.parameters())


# With other kinds there is no scale to differ in.
@pytest.mark.parametrize("kind", [k for k in KINDS_OF_FACTORS if k.startswith(("LoRA", "DoRA", "LoHa", "LoKr"))])
def test_another_alpha_goes_into_the_factors(kind: str) -> None:
    model = loaded(kind)
    other = factors_of_kind(model, kind, seed=1, alpha=0.7)
    scaling = [entry[2] for entry in Snapshot.of(model.components).adapters]
    swap(model, tensors_by_key(other))
    assert_close(output(model), output(explicit(other)), TOLERANCE)
    assert [entry[2] for entry in Snapshot.of(model.components).adapters] == scaling
    model.set_adapters("one", 0.25)
    assert_close(output(model), output(explicit(other, 0.25)), TOLERANCE)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoRA and biases"])
def test_ranks_fit_into_the_room_that_was_asked_for(kind: str) -> None:
    model = tiny_model()
    model.enable_lora_hotswap(target_rank=5)
    model.load_lora_adapter(tensors_by_key(factors_of_kind(model, kind, rank=1)), "one")
    for rank in (5, 2, 4):
        other = factors_of_kind(model, kind, seed=rank, rank=rank)
        swap(model, tensors_by_key(other))
        assert_close(output(model), output(explicit(other)), TOLERANCE)
        back = read_adapter(model.components, "one")
        assert {factors.rank for factors in back.values()} == {5}  # type: ignore[union-attr]
    with pytest.raises(InputError, match=f"{TO_Q if kind != 'LoRA and biases' else 'llm_adapter'}.*it has rank 6"):
        swap(model, tensors_by_key(factors_of_kind(model, kind, rank=6)))
    with pytest.raises(InputError, match=r"it has rank 6, and room is for 5 \(enable_lora_hotswap\)"):
        model.load_lora_adapter(tensors_by_key(factors_of_kind(model, kind, rank=6)), "two")


def test_a_smaller_rank_needs_no_room() -> None:
    model = loaded("LoRA", rank=4)
    other = random_factors(model, SOME_MODULES, seed=3, rank=1)
    swap(model, as_file(other, "kohya"))
    assert_close(output(model), output(explicit(other)), TOLERANCE)


def test_room_is_asked_for_before_the_first_adapter() -> None:
    with pytest.raises(InputError, match=r"call it before loading adapters \(one are loaded\)"):
        loaded("LoRA").enable_lora_hotswap(8)
    with pytest.raises(InputError, match="target_rank is 0, expected a positive number"):
        tiny_model().enable_lora_hotswap(0)


def test_one_of_two_adapters_is_swapped_and_the_other_stays() -> None:
    model = loaded("LoRA")
    fixed, other = factors_of_kind(model, "LoHa", seed=5), factors_of_kind(model, "LoRA", seed=6)
    model.load_lora_adapter(tensors_by_key(fixed), "two")
    model.set_adapters(["one", "two"], [0.5, 0.8])
    swap(model, tensors_by_key(other))
    expected = tiny_model()
    add_explicitly(expected, other, 0.5)
    add_explicitly(expected, fixed, 0.8)
    assert_close(output(model), output(expected), TOLERANCE)
    model.set_adapters("two")
    swap(model, tensors_by_key(factors_of_kind(model, "LoRA")))  # the one that is not active
    assert_close(output(model), output(explicit(fixed)), TOLERANCE)


def without(tensors: Tensors, part: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if part not in key}


STEM = kohya_stem(MLP)
OTHER_LAYOUTS: dict[str, tuple[str, Callable[[AnimaTransformerModel], Tensors], str]] = {
    "a larger rank": (
        "LoRA",
        lambda m: tensors_by_key(factors_of_kind(m, "LoRA", rank=3)),
        f"{TO_Q}: it has rank 3, and room is for 2",
    ),
    "another kind": (
        "LoRA",
        lambda m: tensors_by_key(factors_of_kind(m, "LoHa")),
        f"{TO_Q}: LoHa of rank 2 and scale 1.5 cannot take the place of LoRA of rank 2",
    ),
    "DoRA for LoRA": ("LoRA", lambda m: tensors_by_key(factors_of_kind(m, "DoRA")), f"{TO_Q}: DoRA"),
    "LoRA for DoRA": ("DoRA", lambda m: tensors_by_key(factors_of_kind(m, "LoRA")), f"{TO_Q}: LoRA"),
    "other factor shapes": (
        "LoKr full",
        lambda m: tensors_by_key(factors_of_kind(m, "LoKr low-rank")),
        f"{TO_Q}: LoKr of rank 2",
    ),
    "another LoHa rank": ("LoHa", lambda m: tensors_by_key(factors_of_kind(m, "LoHa", rank=1)), f"{TO_Q}: LoHa"),
    "a module less": (
        "LoRA",
        lambda m: without(tensors_by_key(factors_of_kind(m, "LoRA")), STEM),
        f"{MLP}: only the loaded adapter has it",
    ),
    "a module more": (
        "LoRA",
        lambda m: tensors_by_key(factors_of_kind(m, "LoRA") | factors_of_kind(m, "norms")),
        "blocks.0.self_attn.q_norm: only the new one has it",
    ),
    "a bias less": (
        "LoRA and biases",
        lambda m: without(tensors_by_key(factors_of_kind(m, "LoRA and biases")), "diff_b"),
        "llm_adapter.out_proj: LoRA of rank 2 and scale 1.5 cannot take the place of LoRA",
    ),
    "a file with a fault": (
        "LoRA",
        lambda m: tensors_by_key(factors_of_kind(m, "LoRA")) | {f"{STEM}.lora_up.weight": torch.zeros(3, 2)},
        f"{MLP}: factors for a 3x",
    ),
    "NaN in the last factor": (
        "norms",
        lambda m: {key: t * float("nan") for key, t in tensors_by_key(factors_of_kind(m, "norms")).items()},
        "holds values that are not finite",
    ),
    "nothing": ("LoRA", lambda m: {}, "no key belongs to the Anima transformer"),
}


@pytest.mark.parametrize(("kind", "tensors", "words"), OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_what_does_not_fit_is_refused_and_changes_nothing(kind: str, tensors: Any, words: str) -> None:
    model = loaded(kind)
    model.set_adapters("one", 0.7)
    given, before = tensors(model), Snapshot.of(model.components)
    with pytest.raises(InputError) as error:
        swap(model, given)
    assert words in str(error.value)
    assert Snapshot.of(model.components) == before
    swap(model, tensors_by_key(factors_of_kind(model, kind, seed=4)))  # it can still be swapped


def test_a_long_list_of_what_differs_is_cut() -> None:
    model = tiny_model()
    modules = tuple(f"blocks.{i}.{m}" for i in range(2) for m in ATTENTION)
    model.load_lora_adapter(as_file(random_factors(model, modules), "kohya"), "one")
    with pytest.raises(InputError, match=r"'one' was left as it was:") as error:
        swap(model, as_file(random_factors(model, modules, rank=3), "kohya"))
    assert len(str(error.value).splitlines()) == 1 + 10 + 1
    assert "… and 6 more" in str(error.value)


ATTENTION = [f"{part}.{layer}_proj" for part in ("self_attn", "cross_attn") for layer in ("q", "k", "v", "output")]


def test_a_copy_that_runs_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("LoRA")
    before, given = Snapshot.of(model.components), tensors_by_key(factors_of_kind(model, "LoRA", seed=1))
    calls = iter(range(5))
    original = torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if arguments and isinstance(arguments[0], torch.device) and next(calls, None) is None:
            raise MemoryError
        return original(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(MemoryError):
        swap(model, given)
    monkeypatch.undo()
    assert Snapshot.of(model.components) == before


def test_through_pipelines(parts: dict[str, Any]) -> None:
    model = tiny_model()
    pipe = AnimaPipeline(**parts | model.components)
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(tensors_by_key(factors_of_kind(model, "LoRA")), "one")
    other = factors_of_kind(model, "LoRA", seed=1, rank=3)
    pipe.load_lora_weights(tensors_by_key(other), "one", hotswap=True)
    assert_close(output(model), output(explicit(other)), TOLERANCE)
    other = factors_of_kind(tiny_model(), "LoRA", seed=2, rank=4)
    load_adapter(model.components, tensors_by_key(other), "one", hotswap=True)
    assert_close(output(model), output(explicit(other)), TOLERANCE)


@pytest.mark.parametrize("name", ["two", None])
def test_the_adapter_to_replace_must_be_named(name: str | None) -> None:
    model = loaded("LoRA")
    with pytest.raises(InputError, match="is loaded; name the one to replace"):
        model.load_lora_adapter(tensors_by_key(factors_of_kind(model, "LoRA")), name, hotswap=True)


def test_a_fused_adapter_is_not_swapped() -> None:
    model = loaded("LoRA")
    model.fuse_lora()
    before = Snapshot.of(model.components)
    with pytest.raises(InputError, match="'one' is fused; call unfuse_lora"):
        swap(model, tensors_by_key(factors_of_kind(model, "LoRA", seed=1)))
    assert Snapshot.of(model.components) == before


def test_a_scale_of_zero_takes_only_its_like() -> None:
    model = tiny_model()
    silent = {name: replace(f, alpha=0.0) for name, f in random_factors(model).items()}
    model.load_lora_adapter(as_file(silent, "kohya"), "one")
    with pytest.raises(InputError, match="the loaded adapter has the scale 0"):
        swap(model, as_file(random_factors(model, seed=1), "kohya"))
    swap(model, as_file(silent, "comfy-hybrid"))
    assert_close(output(model), output(tiny_model()), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_base(dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    model.load_lora_adapter(tensors_by_key(factors_of_kind(tiny_model(), "LoRA")), "one")
    other = factors_of_kind(tiny_model(), "LoRA", seed=1, alpha=0.9)
    swap(model, tensors_by_key(other))
    assert_close(output(model).float(), output(explicit(other)), 20 * torch.finfo(dtype).eps)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("kind", ["LoRA", "LoKr low-rank", "LoHa", "LoRA and biases", "norms"])
def test_compiled_blocks_are_not_compiled_again(kind: str) -> None:
    torch._dynamo.reset()
    model = tiny_model()
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(tensors_by_key(factors_of_kind(model, kind)), "one")
    counter = CompileCounter()
    for block in (model.transformer.transformer_blocks[0], model.text_conditioner.blocks[0]):
        block.compile(fullgraph=True, backend=counter)
    output(model)
    compiled = counter.frame_count
    assert compiled > 0
    for seed, rank in ((1, 2), (2, 4 if "LoRA" in kind else 2)):
        other = factors_of_kind(model, kind, seed=seed, rank=rank, alpha=1.0 + seed)
        swap(model, tensors_by_key(other))
        assert_close(output(model), output(explicit(other)), TOLERANCE)
        assert counter.frame_count == compiled


def test_a_wholly_compiled_transformer_takes_swaps_and_is_not_compiled_again() -> None:
    torch._dynamo.reset()
    model, counter = tiny_model(), CompileCounter()
    model.load_lora_adapter(tensors_by_key(factors_of_kind(model, "LoRA")), "one")
    model.transformer = torch.compile(model.transformer, backend=counter)
    output(model)
    compiled = counter.frame_count
    assert compiled > 0
    other = factors_of_kind(tiny_model(), "LoRA", seed=1)
    swap(model, tensors_by_key(other))
    assert_close(output(model), output(explicit(other)), TOLERANCE)
    assert counter.frame_count == compiled
