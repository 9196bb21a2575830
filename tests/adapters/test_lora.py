"""LoRA on the model: what is trained, its gradients against float64 autograd on W + delta, and refused settings."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

from anima_peft.adapters.exchange import read_adapter
from anima_peft.adapters.layers import relative_delta
from anima_peft.adapters.lora import LoraConfig
from anima_peft.errors import InputError
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    add_explicitly,
    as_file,
    assert_close,
    assert_same_weights,
    base_weights,
    call,
    explicit,
    output,
    random_factors,
    tiny_model,
)


def trained(model: AnimaTransformerModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("conditioner", [False, True], ids=["DiT", "with conditioner"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_new_adapter_is_all_that_is_trained_and_changes_nothing(dtype: torch.dtype, conditioner: bool) -> None:
    model = tiny_model(dtype).requires_grad_(True)
    before, weights = output(model), base_weights(model)
    parameters = model.add_adapter(LoraConfig(r=3, train_text_conditioner=conditioner))
    assert {id(parameter) for parameter in trained(model).values()} == {id(parameter) for parameter in parameters}
    assert all("lora_" in name for name in trained(model))
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert len(parameters) == 2 * (2 * 10 + (2 * 10 if conditioner else 0))
    assert sum("text_conditioner" in name for name in trained(model)) == (2 * 20 if conditioner else 0)
    assert torch.equal(output(model), before)
    assert_same_weights(base_weights(model), weights)


def loss(velocity: torch.Tensor) -> torch.Tensor:
    """Mean squared error against fixed noise, as in training."""
    target = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(11))
    return (velocity.float() - target).square().mean()


def gradients_of_explicit_weights(model: AnimaTransformerModel) -> dict[str, torch.Tensor]:
    """Float64 autograd through W + up @ down * scale; keyed by the adapted layer and the factor."""
    exact = tiny_model().double()
    leaves: dict[str, torch.Tensor] = {}
    weights = dict(exact.named_parameters())
    for name, factors in read_adapter(model.components, "default").items():
        down = leaves[f"{name.diffusers}.lora_A"] = factors.down.double().requires_grad_(True)
        up = leaves[f"{name.diffusers}.lora_B"] = factors.up.double().requires_grad_(True)
        key = f"{name.diffusers}.weight"
        weights[key] = weights[key] + up @ down * (factors.alpha / factors.down.shape[0])
    arguments = {name: a.double() if a.is_floating_point() else a for name, a in call().items()}
    velocity = torch.func.functional_call(exact, weights, kwargs=arguments)
    target = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(11)).double()
    (velocity - target).square().mean().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


CONFIGS: dict[str, dict[str, Any]] = {
    "attn-mlp": {},
    "every linear layer of both": {"target_modules": "all-linear", "train_text_conditioner": True},
    "alpha": {"lora_alpha": 0.7},
    "ranks and alphas by pattern": {
        "target_modules": "attn-mlp-adaln",
        "rank_pattern": {"to_q": 5, r"transformer_blocks\.1\.ff.*": 1},
        "alpha_pattern": {"to_v": 9.0, r"blocks.0.mlp.layer2": 1.0},
    },
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3.0},
    "recomputed activations": {"train_text_conditioner": True, "checkpointing": True},
}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_every_gradient_equals_float64_autograd_on_the_explicit_weights(settings: dict[str, Any]) -> None:
    model = tiny_model()
    torch.manual_seed(0)
    checkpointing = "checkpointing" in settings
    options = {name: value for name, value in settings.items() if name != "checkpointing"}
    for parameter in model.add_adapter(LoraConfig(r=3, init_lora_weights=False, **options)):
        torch.nn.init.normal_(parameter, std=0.1)  # as after some training
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    loss(model(**call())).backward()
    found = {name.removesuffix(".default.weight"): p.grad for name, p in trained(model).items()}
    expected = gradients_of_explicit_weights(model)
    assert found.keys() == expected.keys()
    assert len(found) >= 40
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() / gradient.norm() < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_over_a_narrow_base_moves_float32_parameters(dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    weights = base_weights(model)
    torch.manual_seed(0)
    parameters = model.add_adapter(LoraConfig(r=2))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for _ in range(3):
        loss(model(**call(dtype))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert all((p != 0).any() for p in parameters)
    assert any(not torch.equal(p, p.to(dtype).float()) for p in parameters)
    assert_same_weights(base_weights(model), weights)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_model()
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
    assert torch.equal(output(model), output(model))
    model.train()
    assert not torch.equal(output(model), output(model))


@torch.no_grad()
def test_size_of_what_was_learned() -> None:
    model = tiny_model()
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["to_q", "proj_out"]))
    assert relative_delta(model.components, "default") == 0
    weight = {
        name.removesuffix(".base_layer.weight"): p for name, p in model.named_parameters() if "base_layer" in name
    }
    delta = {}
    for name in weight:
        layer = model.get_submodule(name)
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        delta[name] = layer.get_delta_weight("default")
    expected = sum(d.square().sum() for d in delta.values()) / sum(w.square().sum() for w in weight.values())
    assert relative_delta(model.components, "default") == pytest.approx(float(expected) ** 0.5, rel=1e-5)
    assert relative_delta(model.components, "another") == 0


def test_a_new_adapter_acts_beside_loaded_ones_and_leaves_them_as_they_are() -> None:
    model = tiny_model()
    first = random_factors(model)
    model.load_lora_adapter(as_file(first, "kohya"), "loaded")
    model.set_adapters("loaded", 0.5)
    expected = output(explicit(first, 0.5))
    assert_close(output(model), expected)
    loaded = read_adapter(model.components, "loaded")

    torch.manual_seed(0)
    parameters = model.add_adapter(LoraConfig(r=2, target_modules="all-linear"), "new")
    assert len(trained(model)) == len(parameters) == 2 * (6 + 2 * 16)
    assert_close(output(model), expected)
    loss(model(**call())).backward()
    torch.optim.SGD(parameters, lr=1.0).step()
    assert (output(model) - expected).abs().max() > 1e-3
    for name, factors in read_adapter(model.components, "loaded").items():
        assert torch.equal(factors.down, loaded[name].down)
        assert torch.equal(factors.up, loaded[name].up)

    both = explicit(first, 0.5)
    add_explicitly(both, read_adapter(model.components, "new"))
    assert_close(output(model), output(both))


def test_loading_beside_an_adapter_in_training_leaves_its_training_alone() -> None:
    model = tiny_model()
    parameters = model.add_adapter(LoraConfig(r=2), "new")
    for number in range(2):
        model.load_lora_adapter(as_file(random_factors(model, seed=number), "kohya"), f"loaded {number}")
    model.set_adapters(["new", "loaded 1"], [1.0, 0.3])
    model.delete_adapters("loaded 0")
    model.set_adapters("loaded 1")
    model.set_adapters(["loaded 1", "new"])
    assert {id(parameter) for parameter in trained(model).values()} == {id(parameter) for parameter in parameters}


def test_pefts_own_config_means_the_same() -> None:
    ours, theirs = tiny_model(), tiny_model()
    torch.manual_seed(0)
    ours.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    torch.manual_seed(0)
    theirs.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False))
    assert torch.equal(output(ours), output(theirs))
    assert len(trained(ours)) == len(trained(theirs)) == 40


def test_the_config_is_not_changed_and_serves_again() -> None:
    config = LoraConfig(r=2, target_modules="all-linear", train_text_conditioner=True)
    before = copy.deepcopy(config)
    for _ in range(2):
        tiny_model().add_adapter(config)
    assert config == before


UNSUPPORTED: dict[str, Any] = {
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["proj_out"],
    "target_parameters": ["proj_out.weight"],
    "trainable_token_indices": [1],
    "inference_mode": True,
    "init_lora_weights": "pissa",
}


@pytest.mark.parametrize(("setting", "value"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_settings_that_no_adapter_file_would_hold_are_refused(setting: str, value: Any) -> None:
    model = tiny_model()
    weights = base_weights(model)
    with pytest.raises(InputError, match=setting):
        model.add_adapter(LoraConfig(r=2, **{setting: value}))
    assert_untouched(model, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"config": LoraConfig(r=2, target_modules=["nothing"])}, "matches no linear layer", id="targets"),
        pytest.param({"config": peft.LoHaConfig(r=2)}, "LoraConfig or LoKrConfig, not LoHaConfig", id="another method"),
        pytest.param({"config": {"r": 2}}, "must be a LoraConfig or LoKrConfig, not dict", id="no config"),
        pytest.param({"adapter_name": ""}, "cannot be an adapter's name", id="no name"),
        pytest.param({"adapter_name": "a.b"}, "cannot be an adapter's name", id="a name with a dot"),
        pytest.param(
            {"config": LoraConfig(r=2, rank_pattern={"to_q": 3, "proj_out": 1})}, "rank_pattern: 'proj_out'", id="ranks"
        ),
        pytest.param(
            {"config": LoraConfig(r=2, alpha_pattern={"(": 3})}, "alpha_pattern: a key is not a reg", id="alphas"
        ),
        pytest.param({"config": LoraConfig(r=0)}, "positive integer", id="rank 0"),
        pytest.param({"config": LoraConfig(r=2, lora_dropout=2.0)}, "probability", id="dropout beyond 1"),
        pytest.param({"config": LoraConfig(r=2, rank_pattern={"net.2": -1})}, "positive integer", id="a late fault"),
    ],
)
def test_a_config_that_cannot_be_used_leaves_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    weights = base_weights(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter(**{"config": LoraConfig(r=2)} | options)
    assert_untouched(model, weights)


def assert_untouched(model: AnimaTransformerModel, weights: dict[str, torch.Tensor]) -> None:
    assert model.state_dict().keys() == weights.keys()
    assert_same_weights(base_weights(model), weights)
    model.add_adapter(LoraConfig(r=2))


def test_a_fault_beside_other_adapters_leaves_them_as_they_were() -> None:
    model = tiny_model()
    first = random_factors(model)
    model.load_lora_adapter(as_file(first, "kohya"), "loaded")
    model.set_adapters("loaded", 0.5)
    before = output(model)
    with pytest.raises(ValueError, match="positive integer"):
        model.add_adapter(LoraConfig(r=2, rank_pattern={"net.2": -1}), "new")
    assert torch.equal(output(model), before)
    with pytest.raises(InputError, match="'loaded' is loaded already"):
        model.add_adapter(LoraConfig(r=2), "loaded")
    assert torch.equal(output(model), before)
