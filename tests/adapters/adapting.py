"""What the tests of adapters share: a tiny model, random factors, and the same adapter as explicit weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from anima_peft.adapters.factors import Factors as AnyFactors
from anima_peft.adapters.factors import FullDelta, LoHaFactors, LoKrFactors, LoraFactors, NormDelta
from anima_peft.adapters.naming import ModuleName, ModuleTable
from anima_peft.models.names import native_to_diffusers
from anima_peft.models.precision import set_qk_norm_eps
from anima_peft.transformer import AnimaTransformerModel
from tests.components import TEXT_WIDTH, tiny_conditioner, tiny_transformer

Factors = Mapping[ModuleName, LoraFactors]
Tensors = dict[str, torch.Tensor]

TO_Q = "blocks.0.self_attn.q_proj"
MLP = "blocks.1.mlp.layer2"
MODULATION = "blocks.0.adaln_modulation_mlp.2"
OUT = "final_layer.linear"
CONDITIONER_O = "llm_adapter.blocks.1.cross_attn.o_proj"
CONDITIONER_MLP = "llm_adapter.blocks.0.mlp.2"
SOME_MODULES = (TO_Q, MLP, MODULATION, OUT, CONDITIONER_O, CONDITIONER_MLP)


def tiny_model(dtype: torch.dtype = torch.float32) -> AnimaTransformerModel:
    """DiT and conditioner with random weights, as the loaders give them."""
    transformer = tiny_transformer()
    set_qk_norm_eps(transformer)
    model = AnimaTransformerModel(transformer, tiny_conditioner())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


def call(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Arguments of one call with text, so that both components take part."""
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(2, 16, 4, 6, generator=generator).to(dtype),
        "sigma": torch.tensor([0.2, 0.9]),
        "qwen_hidden_states": torch.randn(2, 5, TEXT_WIDTH, generator=generator).to(dtype),
        "qwen_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        "t5_input_ids": torch.randint(3, 100, (2, 4), generator=generator),
        "t5_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }


@torch.no_grad()
def output(model: AnimaTransformerModel) -> torch.Tensor:
    return model(**call(model.transformer.proj_out.weight.dtype))


def base_weights(model: AnimaTransformerModel) -> Tensors:
    """Copies of the base's weights by their names without adapters."""
    return {
        name.replace(".base_layer.", "."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Equal up to `tolerance` of the largest number."""
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference < tolerance, float(difference)


def assert_same_weights(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@dataclass(frozen=True)
class Snapshot:
    """All of a model that an adapter could change: every tensor's bits, every layer, who acts, and how strongly."""

    tensors: dict[str, str]
    layers: list[str]
    adapters: list[tuple[str, tuple[str, ...], dict[str, float]]]
    configs: dict[str, list[str]]

    @staticmethod
    def of(components: Mapping[str, torch.nn.Module]) -> Snapshot:
        named = [(f"{c}.{path}", module) for c, model in components.items() for path, module in model.named_modules()]
        layers = [(path, module) for path, module in named if isinstance(module, BaseTunerLayer)]
        return Snapshot(
            {
                f"{c}.{key}": hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                for c, model in components.items()
                for key, tensor in model.state_dict().items()
            },
            [f"{path}: {type(module).__name__}" for path, module in named],
            [(path, tuple(layer.active_adapters), dict(layer.scaling)) for path, layer in layers],
            {c: list(getattr(model, "peft_config", ())) for c, model in components.items()},
        )


def table(model: AnimaTransformerModel) -> ModuleTable:
    return ModuleTable(model.components)


def random_factors(
    model: AnimaTransformerModel,
    modules: tuple[str, ...] = SOME_MODULES,
    *,
    seed: int = 0,
    rank: int = 2,
    alpha: float | None = None,
    mixed: bool = False,
    size: float = 0.3,
) -> dict[ModuleName, LoraFactors]:
    """An adapter on the modules of these native names.

    Args:
        alpha: the rank if None.
        mixed: another rank and another alpha in every module.
        size: |up @ down| relative to the base weight's entries.
    """
    generator = torch.Generator().manual_seed(seed)
    names = table(model).by_native
    factors = {}
    for number, native in enumerate(modules):
        name = names[native]
        out, into = table(model).shape(name)
        r = rank + number if mixed else rank
        down = torch.randn(r, into, generator=generator) / into**0.5
        up = size * torch.randn(out, r, generator=generator) / r**0.5
        factors[name] = LoraFactors(down, up, (0.5 + number if mixed else alpha) or float(r))
    return {name: factors[name] for name in table(model).linears if name in factors}


def explicit(factors: Factors, strength: float = 1.0) -> AnimaTransformerModel:
    """The tiny model with the adapter added to its weights."""
    model = tiny_model()
    add_explicitly(model, factors, strength)
    return model


@torch.no_grad()
def add_explicitly(model: AnimaTransformerModel, factors: Mapping[ModuleName, AnyFactors], strength: float = 1) -> None:
    for name, f in factors.items():
        module = model.components[name.component].get_submodule(name.path)
        if f.bias is not None:
            module.bias += (strength * f.bias.double()).to(module.bias.dtype)
        if isinstance(f, NormDelta):
            module.weight += strength * f.weight.float()
        elif isinstance(f, LoraFactors) and f.magnitude is not None:
            direction = module.weight.double() + strength * dense(f)
            norms = direction.norm(dim=1, keepdim=True)
            module.weight.copy_((f.magnitude.double()[:, None] * direction / norms).to(module.weight.dtype))
        else:
            module.weight += (strength * dense(f)).to(module.weight.dtype)


def dense(f: AnyFactors) -> torch.Tensor:
    """The weight's delta in float64, written out as in the papers; DoRA's without its magnitude."""
    if isinstance(f, LoraFactors):
        return f.up.double() @ f.down.double() * (f.alpha / f.down.shape[0])
    if isinstance(f, LoHaFactors):
        (a, b), (c, d) = f.w1, f.w2
        return (a.double() @ b.double()) * (c.double() @ d.double()) * (f.alpha / b.shape[0])
    if isinstance(f, (FullDelta, NormDelta)):
        return torch.zeros((), dtype=torch.float64) if f.weight is None else f.weight.double()
    w1, w2 = (x.double() if isinstance(x, torch.Tensor) else x[0].double() @ x[1].double() for x in (f.w1, f.w2))
    low_rank = [x[0].shape[1] for x in (f.w2, f.w1) if isinstance(x, tuple)]
    return torch.kron(w1, w2) * (f.alpha / low_rank[0] if low_rank else 1.0)


QUERY_NORM = "blocks.0.self_attn.q_norm"
CONDITIONER_NORM = "llm_adapter.blocks.1.norm_mlp"
BIASED = (CONDITIONER_MLP, "llm_adapter.out_proj")
KINDS_OF_FACTORS = (
    "LoRA",
    "DoRA",
    "LoKr low-rank",
    "LoKr full",
    "LoKr decompose both",
    "LoHa",
    "full difference",
    "LoRA and biases",
    "full difference and biases",
    "biases",
    "norms",
)


def factors_of_kind(
    model: AnimaTransformerModel, kind: str, *, seed: int = 0, rank: int = 2, alpha: float = 3.0
) -> dict[ModuleName, AnyFactors]:
    """An adapter of one of `KINDS_OF_FACTORS` on some modules of both components, as strong as a trained one."""
    generator = torch.Generator().manual_seed(seed)
    modules = table(model)

    def draw(*shape: int, size: float = 1.0) -> torch.Tensor:
        return size * torch.randn(*shape, generator=generator)

    def of_linear(name: ModuleName) -> AnyFactors:
        out, into = modules.shape(name)  # type: ignore[misc]
        bias = draw(out, size=0.2) if kind.endswith("biases") else None
        if kind == "biases":
            return FullDelta(bias=bias)
        if kind.startswith("full difference"):
            return FullDelta(draw(out, into, size=0.3 / into**0.5), bias)
        if kind == "LoHa":
            parts = [draw(out, rank), draw(rank, into), draw(out, rank), draw(rank, into, size=0.1 / into**0.5)]
            return LoHaFactors((parts[0], parts[1]), (parts[2], parts[3]), alpha)
        if kind.startswith("LoKr"):
            (a, b), (c, d) = (2, out // 2), (4, into // 4)
            w1 = draw(a, c) if kind != "LoKr decompose both" else (draw(a, 1), draw(1, c))
            size = 0.2 / into**0.5
            w2 = draw(b, d, size=size) if kind == "LoKr full" else (draw(b, rank), draw(rank, d, size=size))
            full = kind == "LoKr full"
            return LoKrFactors(w1, w2, float(max(b, d)) if full else alpha, max(b, d) if full else rank)
        magnitude = None
        if kind == "DoRA":
            weight = model.components[name.component].get_submodule(name.path).weight
            magnitude = weight.detach().norm(dim=1) * (1 + draw(out, size=0.1))
        up = draw(out, rank, size=0.3 / rank**0.5)
        return LoraFactors(draw(rank, into, size=into**-0.5), up, alpha, magnitude, bias)

    if kind == "norms":
        norms = [modules.by_native[native] for native in (QUERY_NORM, CONDITIONER_NORM)]
        return {name: NormDelta(draw(*modules.shape(name), size=0.2)) for name in norms}  # type: ignore[misc]
    wanted = [modules.by_native[native] for native in (BIASED if kind.endswith("biases") else SOME_MODULES)]
    return {name: of_linear(name) for name in modules.linears if name in wanted}


def kohya_stem(native: str) -> str:
    return "lora_unet_" + native.replace(".", "_")


def diffusers_stem(native: str) -> str:
    if native.startswith("llm_adapter."):
        return "text_conditioner." + native.removeprefix("llm_adapter.")
    return "transformer." + native_to_diffusers(2)[native]


STYLES: dict[str, tuple[Any, str, str]] = {
    # style -> (module's name in the file, down, up)
    "kohya": (kohya_stem, "lora_down", "lora_up"),
    "comfy": ("diffusion_model.{}".format, "lora_A", "lora_B"),
    "comfy-hybrid": ("diffusion_model.{}".format, "lora_down", "lora_up"),
    "original net.": ("net.{}".format, "lora_down", "lora_up"),
    "original model.": ("model.diffusion_model.{}".format, "lora_A", "lora_B"),
    "original bare": ("{}".format, "lora_down", "lora_up"),
    "diffusers": (diffusers_stem, "lora_A", "lora_B"),
}


def as_file(factors: Factors, style: str, *, alphas: bool = True) -> Tensors:
    """The tensors of an adapter file as others write it; without alphas they are folded into the up factor."""
    stem, down, up = STYLES[style]
    tensors = {}
    for name, f in factors.items():
        scale = 1.0 if alphas else f.alpha / f.down.shape[0]
        tensors[f"{stem(name.native)}.{down}.weight"] = f.down.clone()
        tensors[f"{stem(name.native)}.{up}.weight"] = f.up * scale
        if alphas:
            tensors[f"{stem(name.native)}.alpha"] = torch.tensor(f.alpha)
    return tensors


def tensors_by_key(factors: Mapping[ModuleName, AnyFactors], style: str = "kohya") -> Tensors:
    """The tensors of a file of any kind as others write it, alphas beside the factors; see `STYLES`."""
    stem, down, up = STYLES[style]
    tensors: Tensors = {}
    for name, f in factors.items():
        parts: dict[str, Any] = {"diff_b": f.bias}
        if isinstance(f, NormDelta):
            parts = {"w_norm": f.weight}
        elif isinstance(f, FullDelta):
            parts["diff"] = f.weight
        elif isinstance(f, LoraFactors):
            magnitude = None if f.magnitude is None else f.magnitude[:, None]
            parts |= {f"{down}.weight": f.down, f"{up}.weight": f.up, "dora_scale": magnitude}
        else:
            for key, factor in zip(("1", "2"), (f.w1, f.w2), strict=True):
                word = "hada_w" if isinstance(f, LoHaFactors) else "lokr_w"
                if isinstance(factor, torch.Tensor):
                    parts[word + key] = factor
                else:
                    parts[f"{word}{key}_a"], parts[f"{word}{key}_b"] = factor
        if not isinstance(f, (NormDelta, FullDelta)):
            parts["alpha"] = torch.tensor(f.alpha)
        tensors |= {f"{stem(name.native)}.{part}": value.clone() for part, value in parts.items() if value is not None}
    return tensors
