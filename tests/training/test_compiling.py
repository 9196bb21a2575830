"""Compiled blocks: how often they are compiled, and that the numbers stay."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from anima_peft.adapters.layers import adapter_parameters
from anima_peft.adapters.lokr import LoKrConfig
from anima_peft.adapters.lora import LoraConfig
from anima_peft.errors import InputError
from anima_peft.models.precision import enable_fp32_residual
from anima_peft.training import run
from anima_peft.training.compiling import compile_blocks, require_compiler, uncompiled
from anima_peft.training.run import train
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import assert_close, tiny_model

from .conftest import Configure

# torch's own, where what goes into a block has a gradient and is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

BUCKETS = ((4, 4), (4, 6), (8, 4), (6, 6), (8, 8), (2, 8), (4, 6))  # latents' height and width
DROPOUTS = {"rank_dropout": 0.3, "module_dropout": 0.3}
KINDS: dict[str, Any] = {
    "LoKr": lambda: LoKrConfig(r=100_000, alpha=1, train_norm=True),
    "LoKr with dropouts": lambda: LoKrConfig(r=2, alpha=1, train_norm=True, **DROPOUTS),
    "LoRA": lambda: LoraConfig(r=2, lora_alpha=3),
    "LoRA with dropouts": lambda: LoraConfig(r=2, lora_alpha=3, lora_dropout=0.3, train_norm=True, **DROPOUTS),
}


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Graphs, and torch's settings, of no other test."""
    names = ("used_far_apart", "long_fusible_chains", "materialized_backward")
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit),
        torch._functorch.config.patch({f"ban_recompute_{name}": True for name in names}),
    ):
        yield
    torch._dynamo.reset()


def adapted(kind: str) -> AnimaTransformerModel:
    model = tiny_model()
    torch.manual_seed(0)
    model.requires_grad_(False)
    for parameter in model.add_adapter(KINDS[kind]()):
        parameter.requires_grad_(True)
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.train()


def step(model: AnimaTransformerModel, size: tuple[int, int], batch: int) -> list[torch.Tensor]:
    """The loss of one batch, and the gradients of the adapter."""
    torch.manual_seed(size[0])
    latents, sigma, text = torch.randn(batch, 16, *size), torch.rand(batch), torch.randn(batch, 512, 32)
    loss = model(latents, sigma, prompt_embeds=text).float().square().mean()
    parameters = adapter_parameters(model.components, "default")
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def check(kind: str, *, batch: int, checkpointing: bool, fp32_residual: bool = False, blocks: int = 2) -> None:
    """No graph after the third bucket, none broken, and the plain model's losses and gradients."""
    plain, compiled = adapted(kind), adapted(kind)
    for model in (plain, compiled):
        del model.transformer.transformer_blocks[blocks:]
        if checkpointing:
            model.enable_gradient_checkpointing()
        if fp32_residual:
            enable_fp32_residual(model.transformer)
    names = list(compiled.state_dict())
    counter = CompileCounterWithBackend("eager")
    compile_blocks(compiled, counter)
    graphs = []
    counters.clear()
    for size in BUCKETS:
        for ours, theirs in zip(step(compiled, size, batch), step(plain, size, batch), strict=True):
            # Compiled, a LoKr is the same products in another order. Where a whole layer is dropped, all is zero.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[2] == graphs[-1], graphs
    assert not counters["graph_break"]
    assert list(compiled.state_dict()) == names
    with uncompiled(), torch.no_grad():
        compiled.eval()(torch.randn(3, 16, 10, 10), torch.rand(3), prompt_embeds=torch.randn(3, 512, 32))
    assert counter.frame_count == graphs[-1]


def test_buckets_after_the_third_are_not_compiled() -> None:
    check("LoKr", batch=1, checkpointing=True, blocks=1)


@pytest.mark.slow
@pytest.mark.parametrize("fp32_residual", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_buckets_after_the_third_are_not_compiled_with(
    kind: str, batch: int, checkpointing: bool, fp32_residual: bool
) -> None:
    check(kind, batch=batch, checkpointing=checkpointing, fp32_residual=fp32_residual)


@pytest.mark.parametrize("kind", ["LoRA with dropouts", "LoKr"])
def test_compiled_blocks_compute_cheap_values_again(kind: str) -> None:
    """Against torch's own choice, which `aot_eager_decomp_partition` makes as `inductor` does."""
    backend, size = "aot_eager_decomp_partition", (16, 16)
    by_torch, ours = adapted(kind), adapted(kind)
    for model in (by_torch, ours):
        del model.transformer.transformer_blocks[1:]
    by_torch.compile_repeated_blocks(backend=backend)
    wanted, usual = step(by_torch, size, 1), kept_by_compiled(by_torch, size)
    torch._dynamo.reset()
    compile_blocks(ours, backend)
    for one, other in zip(step(ours, size, 1), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))
    assert 0 < kept_by_compiled(ours, size) <= 0.8 * usual


def kept_by_compiled(model: AnimaTransformerModel, size: tuple[int, int]) -> int:
    """Bytes that the compiled graphs of a forward pass keep for the backward pass, without parameters."""
    loss = model(torch.randn(1, 16, *size), torch.rand(1), prompt_embeds=torch.randn(1, 512, 32)).square().mean()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    nodes, kept = [loss.grad_fn], {}
    for node in nodes:
        if node.name().startswith("CompiledFunction"):
            kept |= {tensor.data_ptr(): tensor.nbytes for tensor in node.saved_tensors}
        nodes += [parent for parent, _ in node.next_functions if parent is not None and parent not in nodes]
    return sum(size for place, size in kept.items() if place not in parameters)


def test_what_compiles_nothing_here_is_found_before_loading(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: Any) -> None:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

    monkeypatch.setattr(run, "locate_sources", None)  # not reached
    monkeypatch.setattr(torch, "compile", lambda *_, **__: no_compiler)
    with pytest.raises(InputError, match=r"\"inductor\" does not work here: .* C\+\+ compiler .*\(InvalidCxx[^\n]*\)$"):
        train(configure("--torch_compile"))
    require_compiler(None, torch.device("cpu"))


def test_accelerates_own_compiling_is_refused(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(InputError, match=r"compile the whole model; .* set torch_compile = true"):
        train(configure())


def runs(configure: Configure, folder: Path, *flags: str) -> list[dict[str, torch.Tensor]]:
    """The adapters of a plain run and of one with these flags, over three buckets, with what comes in between."""
    both = ["--max_train_steps", "8", "--network_args", "rank_dropout=0.2", "train_norm=true", "--save_every_n_steps=4"]
    both += ["--compare_prompts", "a --w 32 --h 32 --s 1", "--sample_prompts", str(folder / "prompts.txt")]
    both += ["--sample_every_n_steps", "3", "--use_ema", "--gradient_checkpointing"]
    (folder / "prompts.txt").write_text("a --w 64 --h 32 --s 2\n", encoding="utf-8")
    results = [train(configure(*both, *more, output_dir=folder / n)) for n, more in (("plain", ()), ("other", flags))]
    previews = [sorted(path.name for path in r.adapter.parent.rglob("*.png")) for r in results]
    assert previews[0] == previews[1]
    return [load_file(result.adapter) for result in results]


@pytest.mark.slow
def test_a_compiled_run_trains_the_plain_runs_adapter(configure: Configure, tmp_path: Path) -> None:
    plain, compiled = runs(configure, tmp_path, "--torch_compile", "--dynamo_backend", "aot_eager")
    assert plain.keys() == compiled.keys()
    for key, tensor in plain.items():
        assert_close(compiled[key], tensor, 1e-4)


with_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@with_compiler
def test_inductor_trains_the_plain_runs_adapter(configure: Configure, tmp_path: Path) -> None:
    plain, compiled = runs(configure, tmp_path, "--torch_compile")
    for key, tensor in plain.items():
        assert_close(compiled[key], tensor, 1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@with_compiler
def test_inductor_keeps_what_it_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        model = adapted("LoRA")
        compile_blocks(model, "inductor")
        step(model, BUCKETS[0], batch=1)
        found.append((counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]))
    assert found == [(0, 2), (2, 0)]
