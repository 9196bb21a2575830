"""Every kind of adapter, with norms and without, on every part and base: what all of them must do."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from anima_peft.adapters.exchange import read_adapter
from anima_peft.adapters.factors import LoKrFactors, NormDelta
from anima_peft.adapters.layers import adapter_parameters, relative_delta
from anima_peft.adapters.lokr import LoKrConfig
from anima_peft.adapters.lora import LoraConfig
from anima_peft.adapters.strengths import set_enabled
from anima_peft.adapters.writing import FORMATS
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    add_explicitly,
    assert_close,
    assert_same_weights,
    base_weights,
    call,
    output,
    tiny_model,
)
from tests.several import in_processes


@dataclass(frozen=True)
class Case:
    config: Any
    options: dict[str, Any]


KINDS = {
    "LoRA": Case(LoraConfig, {"r": 2, "lora_alpha": 3}),
    "LoKr low-rank": Case(LoKrConfig, {"r": 2, "alpha": 3}),
    "LoKr full by rank": Case(LoKrConfig, {"r": 64, "alpha": 1}),
    "LoKr sentinel": Case(LoKrConfig, {"r": 100_000, "alpha": 1}),
    "LoKr decompose both": Case(LoKrConfig, {"r": 2, "alpha": 1, "decompose_both": True}),
    "LoKr factor 16": Case(LoKrConfig, {"r": 100_000, "alpha": 1, "decompose_factor": 16}),
}
everything = pytest.mark.parametrize("kind", KINDS)
norms = pytest.mark.parametrize("with_norms", [False, True], ids=["linears", "norms"])
parts = pytest.mark.parametrize("conditioner", [False, True], ids=["DiT", "DiT and conditioner"])
bases = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Differences relative to the largest number of the output.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def config(kind: str, with_norms: bool = True, conditioner: bool = True) -> Any:
    case = KINDS[kind]
    return case.config(**case.options, train_norm=with_norms, train_text_conditioner=conditioner)


def adapted(kind: str, with_norms: bool = True, conditioner: bool = True, dtype: Any = torch.float32) -> Any:
    model = tiny_model(dtype)
    torch.manual_seed(0)
    model.add_adapter(config(kind, with_norms, conditioner))
    return model


@torch.no_grad()
def shake(model: AnimaTransformerModel, name: str = "default", seed: int = 3) -> None:
    """Give an adapter random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model.components, name):
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def train(model: AnimaTransformerModel, steps: int, rate: float) -> list[float]:
    dtype = model.transformer.proj_out.weight.dtype
    target = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(11))
    optimizer = torch.optim.AdamW(adapter_parameters(model.components, "default"), lr=rate)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = (model(**call(dtype)).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@bases
@parts
@norms
@everything
def test_it_starts_as_the_base_and_learns(kind: str, with_norms: bool, conditioner: bool, dtype: torch.dtype) -> None:
    model = adapted(kind, with_norms, conditioner, dtype)
    assert torch.equal(output(model), output(tiny_model(dtype)))
    assert relative_delta(model.components, "default") == 0
    weights = read_adapter(model.components, "default")
    assert any(isinstance(factors, NormDelta) for factors in weights.values()) == with_norms
    assert {name.component for name in weights} == (
        {"transformer", "text_conditioner"} if conditioner else {"transformer"}
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in adapter_parameters(model.components, "default")}
    assert {parameter.dtype for parameter in trained} == {torch.float32}

    losses = train(model, steps=12, rate=2e-2)
    assert losses[-1] < 0.8 * losses[0]
    assert relative_delta(model.components, "default") > 1e-3
    moved = read_adapter(model.components, "default")
    silent = [name.native for name, factors in moved.items() if factors.delta_norm() == 0]
    assert not silent


@pytest.mark.parametrize("style", FORMATS)
@norms
@everything
def test_a_saved_file_gives_the_same_output(kind: str, with_norms: bool, style: Any, tmp_path: Path) -> None:
    model = adapted(kind, with_norms)
    shake(model)
    path = model.save_lora_adapter(tmp_path / "a.safetensors", format=style)
    loaded = tiny_model()
    name = loaded.load_lora_adapter(path)
    assert_close(output(loaded), output(model), 1e-6)
    before, after = read_adapter(model.components, "default"), read_adapter(loaded.components, name)
    assert list(before) == list(after)


@bases
@norms
@everything
def test_strengths_and_sums_are_those_of_explicit_deltas(kind: str, with_norms: bool, dtype: torch.dtype) -> None:
    model = adapted(kind, with_norms, dtype=dtype)
    shake(model)
    base = base_weights(tiny_model(dtype))
    first = read_adapter(model.components, "default")
    for strength in (1.0, 0.5):
        model.set_adapters("default", strength)
        explicit = tiny_model()
        add_explicitly(explicit, first, strength)
        assert_close(output(model).float(), output(explicit), TOLERANCE[dtype])

    model.add_adapter(config("LoRA" if kind != "LoRA" else "LoKr sentinel", with_norms), "second")
    shake(model, "second", seed=9)
    second = read_adapter(model.components, "second")
    model.set_adapters(["default", "second"], [0.7, -0.4])
    explicit = tiny_model()
    add_explicitly(explicit, first, 0.7)
    add_explicitly(explicit, second, -0.4)
    assert_close(output(model).float(), output(explicit), TOLERANCE[dtype])
    assert read_adapter(model.components, "default").keys() == first.keys(), "nesting must not hide an adapter's names"

    model.delete_adapters("default")
    model.delete_adapters("second")
    assert_same_weights(dict(model.state_dict()), base)
    assert torch.equal(output(model), output(tiny_model(dtype)))


@norms
@everything
def test_fusing_adds_the_delta_and_unfusing_takes_it_back(kind: str, with_norms: bool) -> None:
    model = adapted(kind, with_norms)
    shake(model)
    model.set_adapters("default", 0.6)
    expected, base = output(model), base_weights(tiny_model())
    model.fuse_lora()
    assert_close(output(model), expected, 1e-5)
    model.unfuse_lora()
    assert_close(output(model), expected, 1e-5)
    model.unload_lora()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, base[name], atol=1e-6, rtol=0)


@everything
def test_switching_off_gives_the_base(kind: str) -> None:
    model = adapted(kind)
    shake(model)
    set_enabled(model.components, False)
    assert torch.equal(output(model), output(tiny_model()))
    set_enabled(model.components, True)
    assert not torch.equal(output(model), output(tiny_model()))


@everything
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(kind)
        shake(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**call()).square().mean().backward()
        gradients.append([p.grad for p in adapter_parameters(model.components, "default")])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@everything
def test_gradients_are_those_of_float64(kind: str) -> None:
    model = adapted(kind)
    shake(model)
    model(**call()).square().sum().backward()
    found = [p.grad for p in adapter_parameters(model.components, "default")]
    model.zero_grad()
    model.double()
    arguments = {k: v.double() if v.is_floating_point() and k != "sigma" else v for k, v in call().items()}
    model(**arguments).square().sum().backward()
    for ours, exact in zip(found, adapter_parameters(model.components, "default"), strict=True):
        assert ours is not None
        assert_close(ours.double(), exact.grad, 1e-4)


@everything
def test_several_processes_find_every_parameter_used(kind: str) -> None:
    """DistributedDataParallel refuses the second step if a parameter had no gradient in the first."""
    model = adapted(kind).train()
    for layer in model.modules():
        if hasattr(layer, "module_dropout") and "default" in layer.module_dropout:
            layer.module_dropout["default"] = 0.9
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            parallel(**call()).square().mean().backward()
        assert all(p.grad is not None for p in adapter_parameters(model.components, "default"))
    finally:
        torch.distributed.destroy_process_group()


def gradients_of_two_processes() -> None:
    """In one of two processes: half of a batch each gives the gradients of the whole one."""
    torch.distributed.init_process_group("gloo")
    for kind in KINDS:
        model = adapted(kind)
        shake(model)
        whole = call()
        model(**whole).square().mean().backward()
        expected = [parameter.grad for parameter in adapter_parameters(model.components, "default")]
        model.zero_grad()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        half = len(whole["sigma"]) // 2
        mine = slice(half, None) if torch.distributed.get_rank() else slice(half)
        for _ in range(2):  # it refuses the second step if a parameter had no gradient in the first
            model.zero_grad()
            parallel(**{name: tensor[mine] for name, tensor in whole.items()}).square().mean().backward()
        for parameter, gradient in zip(adapter_parameters(model.components, "default"), expected, strict=True):
            assert parameter.grad is not None
            assert gradient is not None
            assert_close(parameter.grad, gradient, 1e-5)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has imported torch")
def test_two_processes_have_the_gradients_of_one() -> None:
    in_processes(2, gradients_of_two_processes)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("LoRA", "LoKr sentinel") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_blocks_compile_in_one_graph(kind: str) -> None:
    model = adapted(kind)
    shake(model)
    expected = output(model)
    torch._dynamo.reset()
    for block in model.transformer.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    assert_close(output(model), expected, 1e-6)


def test_the_sentinel_has_its_full_effect_whatever_alpha_says(tmp_path: Path) -> None:
    model = adapted("LoKr sentinel", with_norms=False, conditioner=False)
    shake(model)
    weights = read_adapter(model.components, "default")
    assert all(isinstance(factors, LoKrFactors) and factors.scale == 1.0 for factors in weights.values())
    path = model.save_lora_adapter(tmp_path / "a.safetensors", dtype=torch.float16)
    with safe_open(path, framework="pt") as file:
        metadata, alphas = file.metadata(), [file.get_tensor(key) for key in file.keys() if key.endswith(".alpha")]  # noqa: SIM118
    assert metadata["ss_network_dim"] == "100000"
    assert metadata["ss_network_alpha"] == "1.0"
    assert metadata["ss_network_module"] == "networks.lokr_anima"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert all(0 < float(alpha.to(dtype)) < 1e4 for alpha in alphas)


def wide_layers_only(kind: str) -> AnimaTransformerModel:
    """Adapters on layers whose widths have a root of at least the factor: PEFT splits narrower ones another way."""
    case = KINDS[kind]
    model = tiny_model()
    model.add_adapter(case.config(**case.options, target_modules=["attn1.to_q", "ff.net.2"]))
    shake(model)
    return model


stock_kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "LoKr factor 16"])


@stock_kinds
def test_stock_diffusers_reads_our_diffusers_files(kind: str, tmp_path: Path) -> None:
    model = wide_layers_only(kind)
    path = model.save_lora_adapter(tmp_path / "a.safetensors", format="diffusers")
    stock = tiny_model()
    stock.transformer.load_lora_adapter(load_file(path), prefix="transformer", adapter_name="stock")
    assert_close(output(stock), output(model), 1e-5)


@stock_kinds
def test_stock_diffusers_reloads_what_it_saved_of_ours(kind: str, tmp_path: Path) -> None:
    model = wide_layers_only(kind)
    model.transformer.save_lora_adapter(tmp_path, adapter_name="default")
    stock = tiny_model()
    stock.transformer.load_lora_adapter(str(tmp_path), prefix=None, adapter_name="stock", use_safetensors=True)
    assert_close(output(stock), output(model), 1e-5)
