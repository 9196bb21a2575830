"""`anima-peft extract`: what a checkpoint has learned, found again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_peft.adapters.baking import bake
from anima_peft.adapters.extracting import Extraction, extract, nearest_lokr
from anima_peft.adapters.factors import FullDelta, LoKrFactors, LoraFactors, NormDelta
from anima_peft.adapters.low_rank import Keep
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    MLP,
    SOME_MODULES,
    TO_Q,
    add_explicitly,
    assert_close,
    dense,
    factors_of_kind,
    output,
    random_factors,
    table,
    tiny_model,
)
from tests.adapters.commanding import assert_same_deltas, checkpoint, contents, deltas, origin_of, parsed, run
from tests.components import tiny_conditioner, tiny_transformer

pytestmark = pytest.mark.usefixtures("unflushed")

LORA = Extraction("lora", Keep(rank=64))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tiny_model(), tmp_path_factory.mktemp("base") / "基 base.safetensors")


def tuned_by(folder: Path, *kinds: str) -> tuple[Path, dict]:  # type: ignore[type-arg]
    """A checkpoint with deltas of these kinds, under another prefix, and the deltas."""
    model = tiny_model()
    factors = {name: f for kind in kinds for name, f in factors_of_kind(model, kind).items()}
    add_explicitly(model, factors)
    return checkpoint(model, folder / "tuned.safetensors", prefix=""), factors


@pytest.mark.parametrize("kinds", [("LoRA",), ("LoKr low-rank", "norms"), ("full difference and biases",), ("biases",)])
def test_at_full_rank_everything_is_found_again(kinds: tuple[str, ...], base: Path, tmp_path: Path) -> None:
    tuned, factors = tuned_by(tmp_path, *kinds)
    done = extract(base, tuned, tmp_path / "found.safetensors", LORA)
    assert_same_deltas(deltas(parsed(done.path, tiny_model())), deltas(factors), 1e-5)
    assert done.share == pytest.approx(1.0)
    model = AnimaTransformerModel.from_single_file(base)
    model.load_lora_adapter(done.path)
    assert_close(output(model), output(AnimaTransformerModel.from_single_file(tuned)), 1e-5)


def test_extracting_turns_baking_round(base: Path, tmp_path: Path) -> None:
    tuned, _ = tuned_by(tmp_path, "LoRA", "norms")
    found = extract(base, tuned, tmp_path / "found.safetensors", LORA).path
    again = bake([(found, 1.0)], base, tmp_path / "again.safetensors").path
    expected = load_file(tuned)
    for key, tensor in load_file(again).items():
        assert_close(tensor, expected[key.removeprefix("net.")])


def test_the_best_lora_of_a_rank(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, factors = tuned_by(tmp_path, "full difference")
    path = tmp_path / "found.safetensors"
    assert run("extract", "--base", base, "--tuned", tuned, "--output", path, "--rank", 3, "--verbose") == 0
    printed = capsys.readouterr().out
    shares = {native: float(percent) / 100 for percent, native in re.findall(r"([\d.]+)%  (\S+):", printed)}
    kept = whole = 0.0
    for name, found in parsed(path, tiny_model()).items():
        assert isinstance(found, LoraFactors)
        squares = torch.linalg.svdvals(dense(factors[name])).square()
        share = 1 - float((dense(found) - dense(factors[name])).square().sum() / squares.sum())
        assert share == pytest.approx(float(squares[:3].sum() / squares.sum()), abs=1e-5)
        assert shares[name.native] == pytest.approx(share, abs=1e-5)
        kept, whole = kept + float(squares[:3].sum()), whole + float(squares.sum())
    (total,) = re.findall(r"kept energy: ([\d.]+)%", printed)
    assert float(total) / 100 == pytest.approx(kept / whole, abs=1e-5)
    assert origin_of(path)["method"] == "lora"


def test_a_lokr_is_found_again(base: Path, tmp_path: Path) -> None:
    """What is a Kronecker product of the given split is found exactly."""
    model = tiny_model()
    names = table(model).by_native
    generator = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator)
    factors = {names[TO_Q]: LoKrFactors(w1, w2, 8.0, 8)}
    add_explicitly(model, factors)
    tuned = checkpoint(model, tmp_path / "tuned.safetensors")
    done = extract(base, tuned, tmp_path / "found.safetensors", Extraction("lokr", None, factor=8))
    found = parsed(done.path, model)
    assert isinstance(found[names[TO_Q]], LoKrFactors)
    assert_same_deltas(deltas(found), deltas(factors), 1e-5)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_no_kronecker_product_is_nearer(factor: int) -> None:
    """Against alternating least squares from several starts."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(32, 24, generator=generator).double()
    found, kept = nearest_lokr(matrix, factor)
    w1, w2 = found.w1, found.w2
    assert isinstance(w1, torch.Tensor)
    assert isinstance(w2, torch.Tensor)
    error = float((dense(found) - matrix).square().sum())
    assert kept == pytest.approx(float(matrix.square().sum()) - error, rel=1e-5)
    (a, c), (b, d) = w1.shape, w2.shape
    blocks = matrix.reshape(a, b, c, d).permute(0, 2, 1, 3)
    for _ in range(5):
        other = torch.randn(b, d, generator=generator).double()
        for _ in range(200):
            first = (blocks * other).sum((2, 3)) / other.square().sum()
            other = (blocks * first[:, :, None, None]).sum((0, 1)) / first.square().sum()
        assert error <= float((torch.kron(first, other) - matrix).square().sum()) * (1 + 1e-6)


@pytest.mark.parametrize("keep", [Keep(rank=2), Keep(energy=0.6)])
def test_a_low_rank_lokr_says_what_it_keeps(keep: Keep) -> None:
    matrix = torch.randn(64, 48, generator=torch.Generator().manual_seed(2)).double()
    found, kept = nearest_lokr(matrix, 4, keep)
    assert found.shape.rank2 is not None
    lost = float((dense(found) - matrix).square().sum())
    assert kept == pytest.approx(float(matrix.square().sum()) - lost, rel=1e-5)


def test_choices(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, _ = tuned_by(tmp_path, "full difference", "norms")
    tensors = load_file(tuned)
    save_file(tensors | {"llm_adapter.embed.weight": tensors["llm_adapter.embed.weight"] + 1}, tuned)
    path, names = tmp_path / "found.safetensors", table(tiny_model()).by_native
    options = ["--rank", 2, "--target_modules", "attn-mlp", "--whole_modules", MLP, "--no-norms"]
    assert run("extract", "--base", base, "--tuned", tuned, "--output", path, *options) == 0
    found = parsed(path, tiny_model())
    assert isinstance(found[names[TO_Q]], LoraFactors)
    assert isinstance(found[names[MLP]], FullDelta)
    assert not any(isinstance(factors, NormDelta) for factors in found.values())
    assert len(found) < len(SOME_MODULES)
    printed = capsys.readouterr().out
    assert "2 linear layers differ and were not chosen" in printed
    assert "2 norms or biases differ and were left out" in printed
    assert "llm_adapter.embed.weight differs, and adapters have no place for it" in printed


def test_rounding_is_not_taken_for_learning(base: Path, tmp_path: Path) -> None:
    """A bf16 copy of a float32 checkpoint, in which one layer has learned."""
    model = tiny_model()
    add_explicitly(model, random_factors(model, (TO_Q,)))
    tuned = checkpoint(model, tmp_path / "tuned.safetensors")
    save_file({key: tensor.bfloat16() for key, tensor in load_file(tuned).items()}, tuned)
    found = parsed(extract(base, tuned, tmp_path / "found.safetensors", LORA).path, tiny_model())
    assert [name.native for name in found] == [TO_Q]


FAULTS = {
    "no rank": (["--tuned", "{tuned}"], "a LoRA needs --rank"),
    "rank zero": (["--tuned", "{tuned}", "--rank", "0"], "above zero"),
    "factor of lora": (["--tuned", "{tuned}", "--rank", "1", "--factor", "4"], "--factor has no effect"),
    "factor zero": (["--tuned", "{tuned}", "--method", "lokr", "--factor", "0"], "above zero"),
    "no such pattern": (["--tuned", "{tuned}", "--rank", "1", "--target_modules", "nothing"], "matches no linear"),
    "broken pattern": (["--tuned", "{tuned}", "--rank", "1", "--whole_modules", "("], "not a regular expression"),
    "the same": (["--tuned", "{base}", "--rank", "1"], "there is nothing to extract"),
    "nothing there": (["--tuned", "{tmp}/absent.safetensors", "--rank", "1"], "no such file"),
    "an adapter": (["--tuned", "{tmp}/adapter.safetensors", "--rank", "1"], "looks like an adapter"),
    "lying header": (["--tuned", "{tmp}/lying.safetensors", "--rank", "1"], "not a readable safetensors"),
    "not finite": (["--tuned", "{tmp}/nan.safetensors", "--rank", "1"], "values that are not finite"),
    "quantised": (["--tuned", "{tmp}/fp8.safetensors", "--rank", "1"], "is quantised"),
    "integers": (["--tuned", "{tmp}/int8.safetensors", "--rank", "1"], "expected floating point"),
    "another size": (["--tuned", "{tmp}/large.safetensors", "--rank", "1"], "models of different sizes"),
    "output is input": (["--tuned", "{tuned}", "--rank", "1", "--output", "{base}", "--overwrite"], "is an input"),
}


@pytest.fixture(scope="module")
def faulty(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good and bad checkpoints; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("faulty")
    tuned, _ = tuned_by(folder, "LoRA")
    tensors = load_file(tuned)
    key = f"{TO_Q}.weight"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, folder / "adapter.safetensors")
    (folder / "lying.safetensors").write_bytes(tuned.read_bytes()[:-1])
    save_file(tensors | {key: tensors[key] * float("nan")}, folder / "nan.safetensors")
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, folder / "fp8.safetensors")
    save_file(tensors | {key: tensors[key].to(torch.int8)}, folder / "int8.safetensors")
    large = tiny_transformer()
    large.transformer_blocks.append(tiny_transformer().transformer_blocks[0])
    checkpoint(AnimaTransformerModel(large, tiny_conditioner()), folder / "large.safetensors")
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, base: Path, faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One clear error, exit code 2, and every file as it was."""
    arguments, message = FAULTS[fault]
    filled = [text.format(tmp=faulty, base=base, tuned=faulty / "tuned.safetensors") for text in arguments]
    filled += [] if "--output" in filled else ["--output", str(tmp_path / "out.safetensors")]
    before = contents(faulty), contents(base.parent)
    assert run("extract", "--base", base, *filled) == 2
    assert message in capsys.readouterr().err
    assert (contents(faulty), contents(base.parent)) == before
    assert contents(tmp_path) == {}
