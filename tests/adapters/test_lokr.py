"""LoKr's layer, its agreement with LyCORIS, and what else only some kinds of adapters have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import load_file, save_file

from anima_peft import InputError, LoKrConfig, LoraConfig, inject_adapter
from anima_peft.adapters.exchange import read_adapter, start_from
from anima_peft.adapters.factors import LoKrFactors, LoraFactors, NormDelta
from anima_peft.adapters.layers import adapter_parameters, parts_of
from anima_peft.adapters.lokr import FULL_MATRIX_SENTINEL, LoKrLinear, plan_shape
from anima_peft.adapters.naming import ModuleTable
from tests.adapters.adapting import MLP, TO_Q, assert_close, call, dense, output, tiny_model
from tests.adapters.test_kinds import shake

SHAPES = {"full": 100_000, "low-rank": 2}


def weight_of(module: Any, linear: torch.nn.Linear) -> torch.Tensor:
    """The delta that LyCORIS' forward adds (its `get_diff_weight` multiplies by the scale a second time)."""
    return module.get_weight(linear.weight.shape).detach()


@pytest.mark.parametrize("decompose_both", [False, True])
@pytest.mark.parametrize("factor", [-1, 2, 4, 8, 16])
@pytest.mark.parametrize("rank", [1, 2, 3, 8, 100_000])
def test_lycoris_files_give_the_same_delta_here(rank: int, factor: int, decompose_both: bool, tmp_path: Path) -> None:
    """Its state dict under its own prefix, on layers of three shapes of the tiny model, and a norm."""
    model = tiny_model()
    paths = {"blocks_0_self_attn_q_proj": "attn1.to_q", "blocks_0_mlp_layer1": "ff.net.0.proj"}
    paths["blocks_0_cross_attn_k_proj"] = "attn2.to_k"
    tensors, expected = {}, {}
    torch.manual_seed(rank)
    for native, path in paths.items():
        linear = model.transformer.transformer_blocks[0].get_submodule(path)
        module: Any = LokrModule(
            "x", linear, lora_dim=rank, alpha=3, factor=factor, decompose_both=decompose_both, full_matrix=rank > 99
        )
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        tensors |= {f"lycoris_{native}.{key}": value for key, value in module.state_dict().items()}
        expected[native] = weight_of(module, linear)
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    name = model.load_lora_adapter(tmp_path / "a.safetensors")
    for module_name, factors in read_adapter(model.components, name).items():
        found = dense(factors)  # type: ignore[arg-type]
        torch.testing.assert_close(found.float(), expected[module_name.native.replace(".", "_")], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decompose_both", [False, True])
@pytest.mark.parametrize("rank", [2, 100_000])
def test_our_kohya_files_give_the_same_delta_in_lycoris(rank: int, decompose_both: bool, tmp_path: Path) -> None:
    model = tiny_model()
    model.add_adapter(LoKrConfig(r=rank, alpha=3, decompose_both=decompose_both, target_modules=["attn1.to_q"]))
    shake(model)
    tensors = load_file(model.save_lora_adapter(tmp_path / "a.safetensors"))
    for name, factors in read_adapter(model.components, "default").items():
        linear = model.components[name.component].get_submodule(name.path).get_base_layer()
        parts = [tensors.get(f"{name.kohya}.{part}") for part in LokrModule.weight_list]
        with torch.no_grad():
            theirs = LokrModule.make_module_from_state_dict("x", linear, *parts)
        torch.testing.assert_close(
            weight_of(theirs, linear),
            dense(factors).float(),
            atol=1e-5,
            rtol=1e-5,  # type: ignore[arg-type]
        )


def test_norms_agree_with_lycoris() -> None:
    norm = torch.nn.LayerNorm(16)
    theirs: Any = NormModule("x", norm)
    torch.nn.init.normal_(theirs.w_norm)
    torch.nn.init.normal_(theirs.b_norm)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16))
    inject_adapter(LoraConfig(r=1, target_modules=["0"], train_norm=True), model)
    layer = model[1]
    with torch.no_grad():
        layer.lora_delta["default"].copy_(theirs.w_norm)
        layer.lora_delta_bias["default"].copy_(theirs.b_norm)
    weight, bias = theirs.get_merged_weight(0.5)
    layer.set_scale("default", 0.5)
    x = torch.randn(3, 16)
    expected = torch.nn.functional.layer_norm(x, (16,), weight, bias, norm.eps)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rank", "full_matrix", "both", "expected"),
    [
        (4, False, False, (8, 256, 8, 1024, None, 4)),
        (511, False, False, (8, 256, 8, 1024, None, 511)),
        (512, False, False, (8, 256, 8, 1024, None, None)),  # half of 1024
        (3, False, True, (8, 256, 8, 1024, 3, 3)),
        (4, False, True, (8, 256, 8, 1024, None, 4)),  # half of 8
        (4, True, True, (8, 256, 8, 1024, None, None)),
        (FULL_MATRIX_SENTINEL, False, True, (8, 256, 8, 1024, None, None)),
    ],
)
def test_a_factor_is_low_rank_below_half_its_size(rank: int, full_matrix: bool, both: bool, expected: tuple) -> None:
    shape = plan_shape(2048, 8192, rank=rank, factor=8, full_matrix=full_matrix, decompose_both=both)
    assert (shape.a, shape.b, shape.c, shape.d, shape.rank1, shape.rank2) == expected


def test_the_sentinel_is_announced_once_with_its_shapes(caplog: pytest.LogCaptureFixture) -> None:
    tiny_model().add_adapter(LoKrConfig(r=100_000, alpha=1, target_modules=[TO_Q, MLP]))
    (message,) = [message for message in caplog.messages if "LoKr" in message]
    assert "1 x (w1 8x8, w2 8x8)" in message
    assert "rank and alpha scale nothing" in message


@pytest.mark.parametrize("rank", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dropout", ["rank_dropout", "module_dropout"])
def test_dropout_masks_and_skips_no_parameter(dropout: str, rank: int) -> None:
    model = tiny_model().train()
    model.add_adapter(LoKrConfig(r=rank, alpha=1, target_modules=[TO_Q], **{dropout: 0.5}))
    shake(model)
    layer = model.transformer.transformer_blocks[0].attn1.to_q
    x = torch.randn(2, 64)
    torch.manual_seed(0)
    outputs = [layer(x) - layer.base_layer(x) for _ in range(40)]
    kept = torch.stack([out.abs().sum(0) > 0 for out in outputs])
    if dropout == "rank_dropout":
        assert 0.3 < kept.float().mean() < 0.7
        assert not (kept.all(1) | ~kept.any(1)).all()
    else:
        assert (kept.all(1) | ~kept.any(1)).all(), "a module is dropped as a whole"
        assert 5 < kept.all(1).sum() < 35
    torch.manual_seed(0)
    while layer(x).sub(layer.base_layer(x)).abs().sum() > 0 and dropout == "module_dropout":
        pass  # the next draw drops it
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model.components, "default"))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert (layer(x) - layer.base_layer(x)).abs().sum() > 0


def test_low_precision_activations_keep_float32_parameters() -> None:
    linear = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    model = torch.nn.Sequential(linear)
    parameters = inject_adapter(LoKrConfig(r=100_000, target_modules="all-linear"), model)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)
    x = torch.randn(5, 64)
    narrow = model(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(x)
    assert torch.equal(narrow, under_autocast)
    exact = x.double() @ (linear.weight.double() + model[0].get_delta_weight("default").double()).T
    assert_close(narrow.double(), exact, 2e-2)


def test_norms_move_on_a_bf16_base_and_are_not_decayed() -> None:
    model = tiny_model(torch.bfloat16)
    model.add_adapter(LoKrConfig(r=100_000, target_modules=[TO_Q], train_norm=True))
    parts = parts_of(model.components, ModuleTable(model.components), "default")
    norms = [part.parameter for part in parts if not part.is_decayed]
    assert len(norms) == len(
        [n for n in read_adapter(model.components, "default").values() if isinstance(n, NormDelta)]
    )
    assert len(norms) == 9  # four in each of two blocks, and the time embedding's
    optimizer = torch.optim.AdamW(norms, lr=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(20):
            model(**call(torch.bfloat16)).float().square().mean().backward()
            optimizer.step()
    assert all(parameter.abs().min() > 0 for parameter in norms)
    assert all(1e-4 < parameter.abs().max() < 3e-3 for parameter in norms)


def test_dora_trains_and_is_saved_in_every_style(tmp_path: Path) -> None:
    model = tiny_model()
    parameters = model.add_adapter(LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=[TO_Q, MLP]))
    assert len({id(parameter) for parameter in parameters}) == len(parameters) == 2 * 3
    assert_close(output(model), output(tiny_model()), 1e-6)
    shake(model)
    for style, key in (("kohya", ".dora_scale"), ("comfy", ".dora_scale"), ("diffusers", ".lora_magnitude_vector")):
        path = model.save_lora_adapter(tmp_path / f"{style}.safetensors", format=style)  # type: ignore[arg-type]
        assert sum(name.endswith(key) for name in load_file(path)) == 2
        loaded = tiny_model()
        loaded.load_lora_adapter(path)
        assert_close(output(loaded), output(model), 1e-6)


def test_a_file_in_which_some_modules_are_dora_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=[TO_Q, MLP]))
    tensors = load_file(model.save_lora_adapter(tmp_path / "a.safetensors"))
    del tensors[next(key for key in tensors if key.endswith("dora_scale"))]
    with pytest.raises(InputError, match="1 of 2 LoRA modules are DoRA"):
        tiny_model().load_lora_adapter(tensors)


@pytest.mark.parametrize(
    "config", [LoraConfig(r=3, target_modules="all-linear"), LoKrConfig(r=100_000, target_modules=["0", "2"])]
)
def test_inject_adapter_on_any_module(config: peft.PeftConfig) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    x, target = torch.randn(16, 12), torch.randn(16, 4)
    before = model(x).detach()
    config.train_norm = True  # type: ignore[attr-defined]
    parameters = inject_adapter(config, model)
    assert torch.equal(model(x), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(InputError, match="matches no linear layer of module"):
        inject_adapter(LoraConfig(r=1), torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LoraConfig(r=2, lora_alpha=8), LoraConfig(r=2, lora_alpha=1)),
        (LoKrConfig(r=2, alpha=8), LoKrConfig(r=2, alpha=1)),
        (LoKrConfig(r=100_000, alpha=1, train_norm=True), LoKrConfig(r=64, alpha=5, train_norm=True)),
    ],
)
def test_starting_from_a_file_takes_its_delta(first: Any, second: Any, tmp_path: Path) -> None:
    model = tiny_model()
    model.add_adapter(first)
    shake(model)
    path = model.save_lora_adapter(tmp_path / "a.safetensors")
    fresh = tiny_model()
    fresh.add_adapter(second)
    said = start_from(fresh.components, path)
    assert_close(output(fresh), output(model), 1e-6)
    assert " 20 x " in said
    assert "0 modules of the network are not in the file" in said
    trained = adapter_parameters(fresh.components, "default")
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in trained)


@pytest.mark.parametrize("other", [LoraConfig(r=3), LoKrConfig(r=100_000), LoraConfig(r=2, use_dora=True)])
def test_starting_from_another_network_is_refused(other: Any, tmp_path: Path) -> None:
    model = tiny_model()
    model.add_adapter(LoraConfig(r=2))
    path = model.save_lora_adapter(tmp_path / "a.safetensors")
    fresh = tiny_model()
    fresh.add_adapter(other)
    with pytest.raises(InputError, match=r"cannot be started from: it holds 20 x LoRA of rank 2"):
        start_from(fresh.components, path)


def test_what_the_layers_are() -> None:
    model = tiny_model()
    model.add_adapter(LoKrConfig(r=2, alpha=1, target_modules=[TO_Q]))
    model.add_adapter(LoraConfig(r=2, target_modules=[TO_Q]), "second")
    kinds = {type(f) for n in ("default", "second") for f in read_adapter(model.components, n).values()}
    assert kinds == {LoKrFactors, LoraFactors}
    assert isinstance(model.transformer.transformer_blocks[0].attn1.to_q.base_layer, LoKrLinear)
    assert isinstance(model.transformer.peft_config["default"], peft.LoKrConfig)
    assert type(model.transformer.peft_config["default"]) is peft.LoKrConfig, "stock diffusers must know its fields"


def test_a_module_that_is_itself_the_target_is_refused() -> None:
    linear = torch.nn.Linear(8, 8)
    for config in (LoKrConfig(r=2, target_modules="all-linear"), LoraConfig(r=2, target_modules="all-linear")):
        with pytest.raises(InputError, match="Sequential"):
            inject_adapter(config, linear)
    assert [name for name, _ in linear.named_modules()] == [""]


def test_decompose_both_without_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tiny_model().add_adapter(LoKrConfig(r=4, alpha=1, decompose_both=True, decompose_factor=4, target_modules=[TO_Q]))
    assert any("decompose_both changes nothing" in message for message in caplog.messages)
