"""Adapters on a base in 8 or 4 bits. Each case needs its library: pip install -e ".[quant]"."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer
from diffusers.utils import is_bitsandbytes_available, is_torchao_available
from safetensors.torch import load_file

from anima_peft import LoKrConfig, LoraConfig
from anima_peft.adapters.layers import relative_delta
from anima_peft.adapters.quantized import plain_weight
from anima_peft.errors import InputError
from anima_peft.miniature.random_weights import build_dit
from anima_peft.models import quantization
from anima_peft.models.quantization import quantize_dit, require_quantization
from anima_peft.training.checkpointing import checkpoint_blocks
from anima_peft.training.run import train as run
from anima_peft.transformer import AnimaTransformerModel

from .conftest import Configure
from .test_memory import CPU, train

KINDS = [
    pytest.param("int8", 0.02, marks=pytest.mark.skipif(not is_torchao_available(), reason="needs torchao")),
    pytest.param("fp8", 0.08, marks=pytest.mark.skipif(not is_torchao_available(), reason="needs torchao")),
    pytest.param("nf4", 0.30, marks=pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")),
]
CONFIGS = {
    "LoRA": partial(LoraConfig, r=4, train_norm=True),
    "LoKr": partial(LoKrConfig, r=100_000, decompose_factor=4, train_norm=True),
}


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Imported once, where their own warnings are no errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_torchao_available():
            import torchao.quantization  # noqa: F401
        if is_bitsandbytes_available():
            import bitsandbytes  # noqa: F401


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> AnimaTransformerModel:
    # bitsandbytes computes on a CPU as well, which diffusers does not believe.
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AnimaTransformerModel(*build_dit(50, layers=2))


def quantized(base: AnimaTransformerModel, kind: str) -> AnimaTransformerModel:
    model = copy.deepcopy(base)
    model.transformer = quantize_dit(model.transformer, kind)
    for _, layer in _linears(model):
        # On some CPUs bitsandbytes packs weights anew for inference, and then cannot train.
        layer.support_avx512bf16_for_cpu = False
    return model


def predict(model: AnimaTransformerModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    embeds = torch.randn(1, 8, model.text_conditioner.config.target_dim, generator=generator)
    with torch.no_grad():
        return model(torch.randn(1, 16, 8, 8, generator=generator), torch.full((1,), 0.4), embeds)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
def test_an_adapter_learns_on_it_and_is_used_without_it(
    base: AnimaTransformerModel, tmp_path: Path, kind: str, tolerance: float, name: str
) -> None:
    model = quantized(base, kind)
    rounded = predict(model)
    assert 0 < distance(rounded, predict(base)) < tolerance
    kept = model.transformer.transformer_blocks[0].norm1.linear_1.weight
    assert torch.equal(kept, base.transformer.transformer_blocks[0].norm1.linear_1.weight)
    torch.manual_seed(1)
    parameters = model.add_adapter(CONFIGS[name]())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert torch.equal(predict(model), rounded)
    checkpoint_blocks(model)
    losses = train(model, parameters, steps=8)
    assert sum(losses[-4:]) < sum(losses[:4])
    learned = relative_delta(model.components, "default")
    assert learned > 1e-3

    file = model.save_lora_adapter(tmp_path / "adapter.safetensors")
    plain = copy.deepcopy(base)
    plain.load_lora_adapter(file)
    delta, on_plain = predict(model) - rounded, predict(plain) - predict(base)
    assert delta.norm() > 0.1 * rounded.norm()
    assert distance(on_plain, delta) < tolerance
    assert relative_delta(plain.components, "default") == pytest.approx(learned, rel=tolerance)


@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
def test_it_computes_with_the_weights_it_says(base: AnimaTransformerModel, kind: str, tolerance: float) -> None:
    """The base with its weights rounded beforehand gives the same, and so does an adapter on it."""
    model, rounded = quantized(base, kind), copy.deepcopy(base)
    for (_, layer), (_, own) in zip(_linears(model), _linears(rounded), strict=True):
        own.weight.data = plain_weight(layer).clone()
    assert distance(predict(model), predict(rounded)) < 1e-5
    outcomes = []
    for each in (model, rounded):
        torch.manual_seed(1)
        parameters = each.add_adapter(LoKrConfig(r=100_000, decompose_factor=4))
        outcomes.append(train(each, parameters, steps=2))
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-4)


def _linears(model: AnimaTransformerModel) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.transformer.named_modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize(("kind", "tolerance"), KINDS[:1])
def test_only_a_lora_can_be_fused_into_it(base: AnimaTransformerModel, kind: str, tolerance: float) -> None:
    model = quantized(base, kind)
    model.add_adapter(LoKrConfig(r=100_000, decompose_factor=4))
    before = predict(model)
    with pytest.raises(InputError, match=r"fuse_lora: transformer\..* is quantized"):
        model.fuse_lora()
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize(
    ("kind", "package"), [("int8", "is_torchao_available"), ("fp8", "is_torchao_available"), ("nf4", "is_bitsandbytes")]
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, kind: str, package: str) -> None:
    for name in ("is_torchao_available", "is_bitsandbytes_available"):
        monkeypatch.setattr(quantization, name, lambda name=name: not name.startswith(package))
    with pytest.raises(InputError, match=rf'"{kind}" needs the package .* \(pip install anima-peft\[quant\]\)'):
        require_quantization(kind, CPU)
    require_quantization("none", CPU)


def test_nf4_needs_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)
    with pytest.raises(InputError, match='"nf4" needs a graphics card'):
        require_quantization("nf4", CPU)
    require_quantization("nf4", torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.skipif(not is_torchao_available(), reason="needs torchao")
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_a_whole_run_in_bf16_draws_validates_and_goes_on(configure: Configure, tmp_path: Path) -> None:
    flags = ["--base_quantization", "int8", "--mixed_precision", "bf16", "--save_state_on_train_end"]
    flags += [
        "--validation_split",
        "0.1",
        "--validate_every_n_steps",
        "2",
        "--compare_prompts",
        "a --w 32 --h 32 --s 1",
    ]
    whole = run(configure(*flags, "--max_train_steps", "4", output_dir=tmp_path / "whole"))
    run(configure(*flags, "--max_train_steps", "2", output_dir=tmp_path / "half"))
    resumed = ["--max_train_steps", "4", "--resume", str(tmp_path / "half" / "test-state")]
    rest = run(configure(*flags, *resumed, output_dir=tmp_path / "rest"))
    one, other = load_file(whole.adapter), load_file(rest.adapter)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole.relative_delta == rest.relative_delta > 1e-3
    assert whole.comparison is not None
