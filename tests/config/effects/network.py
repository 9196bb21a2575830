"""Options of the adapter's layers, and of attention."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anima_peft.adapters.factors import LoKrFactors, LoraFactors, NormDelta
from anima_peft.errors import InputError
from anima_peft.training import attention
from anima_peft.training.network import add_network, merge_base_weights
from tests.adapters.adapting import output, tiny_model

from .bench import LOKR, Bench, linears_of, modules_of


def network_module(bench: Bench) -> None:
    assert {type(f) for f in modules_of(bench.network()).values()} == {LoraFactors, NormDelta}
    assert {type(f) for f in modules_of(bench.network(**LOKR)).values()} == {LoKrFactors, NormDelta}


def network_dim(bench: Bench) -> None:
    ranks = {f.rank for f in modules_of(bench.network(network_dim=3)).values() if isinstance(f, LoraFactors)}
    assert ranks == {3}


def network_alpha(bench: Bench) -> None:
    scales = {f.scale for f in modules_of(bench.network(network_alpha=2)).values() if isinstance(f, LoraFactors)}
    assert scales == {0.5}
    assert next(iter(modules_of(bench.network(network_alpha=0)).values())).scale == 1.0


def network_dropout(bench: Bench) -> None:
    layer = bench.network(network_dropout=0.5).transformer.transformer_blocks[0].attn1.to_q
    dropped = (layer.lora_dropout["default"](torch.ones(1000)) == 0).float().mean()
    assert dropped.item() == pytest.approx(0.5, abs=0.1)


def network_weights(bench: Bench) -> None:
    path, source = bench.adapter_file()
    started = bench.network(network_weights=path).eval()
    torch.testing.assert_close(output(started), output(source))
    assert not torch.allclose(output(started), output(tiny_model()), atol=1e-3)


def train_norm(bench: Bench) -> None:
    norms = [f for f in modules_of(bench.network(train_norm=True)).values() if isinstance(f, NormDelta)]
    assert len(norms) == 9
    assert not any(isinstance(f, NormDelta) for f in modules_of(bench.network(train_norm=False)).values())


def target_modules(bench: Bench) -> None:
    assert linears_of(bench.network(r"target_modules=blocks\.0\.mlp\..*")) == {
        "blocks.0.mlp.layer1",
        "blocks.0.mlp.layer2",
    }


def train_llm_adapter(bench: Bench) -> None:
    names = {network: linears_of(bench.network(f"train_llm_adapter={network}")) for network in ("false", "true")}
    assert all(name.startswith("llm_adapter.") for name in names["true"] - names["false"])
    assert len(names["true"]) > len(names["false"])


def use_dora(bench: Bench) -> None:
    factors = modules_of(bench.network("use_dora=true")).values()
    assert all(f.magnitude is not None for f in factors if isinstance(f, LoraFactors))


def lokr_shapes(bench: Bench, *network_args: str) -> set[tuple[int, bool, bool]]:
    """Each layer's smaller factor, and whether the factors are low-rank."""
    factors = modules_of(bench.network(*network_args, train_norm=False, **LOKR | {"network_dim": 1})).values()
    shapes = [f.shape for f in factors if isinstance(f, LoKrFactors)]
    return {(shape.a, shape.rank1 is not None, shape.rank2 is not None) for shape in shapes}


def lokr_factor(bench: Bench) -> None:
    assert {a for a, _, _ in lokr_shapes(bench, "lokr_factor=2")} == {2}
    assert {a for a, _, _ in lokr_shapes(bench, "lokr_factor=4")} == {4}


def lokr_full_matrix(bench: Bench) -> None:
    assert lokr_shapes(bench, "lokr_factor=4") == {(4, False, True)}
    assert lokr_shapes(bench, "lokr_factor=4", "lokr_full_matrix=true") == {(4, False, False)}


def lokr_decompose_both(bench: Bench) -> None:
    assert lokr_shapes(bench, "lokr_factor=4", "lokr_decompose_both=true") == {(4, True, True)}


def exclude_patterns(bench: Bench) -> None:
    everything, fewer = linears_of(bench.network()), linears_of(bench.network(r"exclude_patterns=['.*mlp.*','q_proj']"))
    assert fewer == {name for name in everything if "mlp" not in name and not name.endswith("q_proj")}
    with pytest.raises(InputError, match=r"exclude_patterns: expected .*\n.*'nothing' matches no linear layer"):
        bench.network("exclude_patterns=nothing")


def include_patterns(bench: Bench) -> None:
    everything = linears_of(bench.network())
    arguments = ("exclude_patterns=['.*']", r"include_patterns=['blocks\.0\.mlp\..*', '.*_modulation_mlp\.1']")
    found = linears_of(bench.network(*arguments))
    assert {name for name in found if name in everything} == {"blocks.0.mlp.layer1", "blocks.0.mlp.layer2"}
    assert {name for name in found if name not in everything} == {
        f"blocks.{number}.adaln_modulation_mlp.1" for number in range(2)
    }
    with pytest.raises(InputError, match="include_patterns: "):
        bench.network("include_patterns=nothing")


def network_reg_dims(bench: Bench) -> None:
    patterns = r"network_reg_dims=blocks\.0\.mlp\..*=0,.*mlp.*=2,llm_adapter\..*attn.*=3"
    model = bench.network(patterns, "train_llm_adapter=true", network_alpha=8)
    for name, factors in modules_of(model).items():
        if isinstance(factors, LoraFactors):
            expected = 2 if "mlp" in name else 3 if name.startswith("llm_adapter") else 4
            assert (factors.rank, factors.alpha) == (expected, 8.0), name
    assert not any(name.startswith("blocks.0.mlp") for name in modules_of(model))
    lokr = modules_of(bench.network("network_reg_dims=.*mlp.*=1", "lokr_factor=2", **LOKR))
    assert {f.shape.rank2 for name, f in lokr.items() if "mlp" in name and isinstance(f, LoKrFactors)} == {1}
    with pytest.raises(InputError, match="network_reg_dims: 'nothing' matches no adapted module"):
        bench.network("network_reg_dims=nothing=4")


def rank_dropout(bench: Bench) -> None:
    layer = bench.network("rank_dropout=0.5", network_dim=64).transformer.transformer_blocks[0].attn1.to_q
    down, x = layer.lora_A["default"], torch.randn(3, 5, layer.in_features)
    whole = x @ down.weight.T
    kept = (down(x) / whole).detach()
    assert torch.equal(kept, kept[:, :1].expand_as(kept)), "one mask for all tokens of a sample"
    assert not torch.equal(kept[0], kept[1])
    assert set(kept.flatten().tolist()) <= {0.0} | {v for v in kept.flatten().tolist() if abs(v - 2) < 1e-5}
    assert 0.3 < (kept == 0).float().mean() < 0.7
    assert torch.equal(down.eval()(x), torch.nn.functional.linear(x, down.weight))


def module_dropout(bench: Bench) -> None:
    model = bench.network("module_dropout=0.5")
    down = model.transformer.transformer_blocks[0].attn1.to_q.lora_A["default"]
    x = torch.randn(3, 5, down.in_features)
    dropped = [bool((down(x) == 0).all()) for _ in range(40)]
    assert 8 < sum(dropped) < 32
    assert down(x).requires_grad
    assert (down.eval()(x) != 0).all()


def dim_from_weights(bench: Bench) -> None:
    path, source = bench.adapter_file("network_reg_dims=.*mlp.*=2", "exclude_patterns=['.*cross_attn.*']")
    model = bench.network(network_dim=None, network_weights=path, dim_from_weights=True)
    expected, found = modules_of(source), modules_of(model)
    assert expected.keys() == found.keys()
    for name, factors in expected.items():
        if isinstance(factors, LoraFactors):
            assert (found[name].rank, found[name].alpha) == (factors.rank, factors.alpha)
            assert torch.equal(found[name].up, factors.up)
    lokr, source = bench.adapter_file("lokr_factor=2", **LOKR)
    model = bench.network(
        "lokr_factor=2",
        network_module=LOKR["network_module"],
        network_dim=None,
        network_weights=lokr,
        dim_from_weights=True,
    )
    assert {name: f.delta_norm() for name, f in modules_of(model).items()} == {
        name: f.delta_norm() for name, f in modules_of(source).items()
    }


def merged(bench: Bench, **given: Any) -> torch.Tensor:
    model = tiny_model()
    merge_base_weights(model, bench.options(**given))
    assert not any("lora" in name for name, _ in model.named_parameters()), "merged, and nothing left of it"
    add_network(model, bench.options())
    assert all(f.delta_norm() == 0 for f in modules_of(model).values())
    return output(model)


def base_weights(bench: Bench) -> None:
    path, model = bench.adapter_file()
    assert not torch.allclose(output(model), output(tiny_model()), atol=1e-3)
    torch.testing.assert_close(merged(bench, base_weights=[path]), output(model), atol=1e-4, rtol=1e-4)


def base_weights_multiplier(bench: Bench) -> None:
    path, model = bench.adapter_file()
    model.set_adapters("default", 0.5)
    found = merged(bench, base_weights=[path, path], base_weights_multiplier=[-0.5])
    torch.testing.assert_close(found, output(model), atol=1e-4, rtol=1e-4)


class Recorder:
    def __init__(self) -> None:
        self.backends: list[str] = []

    def set_attention_backend(self, backend: Any) -> None:
        self.backends.append(backend.value)


def backends(bench: Bench, **given: Any) -> tuple[list[str], list[str]]:
    """What the transformer and the conditioner are set to on a graphics card with all packages."""
    for package in ("xformers", "flash_attn"):
        bench.monkeypatch.setattr(attention, f"is_{package}_available", lambda: True)
    loop, device = bench.options(**given).loop, torch.device("cuda")
    attention.require_attention(loop.attn_mode, device, torch.bfloat16)
    model: Any = SimpleNamespace(transformer=Recorder(), text_conditioner=Recorder())
    attention.set_attention(model, loop.attn_mode, device, xformers=loop.xformers)
    return model.transformer.backends, model.text_conditioner.backends


def xformers(bench: Bench) -> None:
    assert backends(bench) == ([], [])
    assert backends(bench, xformers=True) == (["xformers"], ["native"])


def attn_mode(bench: Bench) -> None:
    assert backends(bench, attn_mode="torch") == ([], [])
    assert backends(bench, attn_mode="flash") == (["flash"], ["native"])
    assert backends(bench, attn_mode="xformers") == (["xformers"], ["native"])
    for mode, device, dtype, reason in (
        ("flash", "cpu", torch.bfloat16, "needs a CUDA device"),
        ("flash", "cuda", torch.float32, "bf16 or fp16 only"),
        ("sage", "cuda", torch.bfloat16, "pip install sageattention"),
    ):
        with pytest.raises(InputError, match=f'attn_mode: "{mode}" cannot be had: .*{reason}'):
            attention.require_attention(mode, torch.device(device), dtype)
    bench.monkeypatch.setattr(attention, "is_flash_attn_available", lambda: False)
    with pytest.raises(InputError, match="pip install flash-attn"):
        attention.require_attention("flash", torch.device("cuda"), torch.bfloat16)


EFFECTS: dict[str, Callable[[Bench], None]] = {
    case.__name__: case
    for case in (
        network_module,
        network_dim,
        network_alpha,
        network_dropout,
        network_weights,
        train_norm,
        target_modules,
        train_llm_adapter,
        use_dora,
        lokr_factor,
        lokr_full_matrix,
        lokr_decompose_both,
        exclude_patterns,
        include_patterns,
        network_reg_dims,
        rank_dropout,
        module_dropout,
        dim_from_weights,
        base_weights,
        base_weights_multiplier,
        xformers,
        attn_mode,
    )
}
"""By option."""
