"""`anima-peft resize`, against SVDs of the explicit deltas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anima_peft.adapters.factors import LoKrFactors, LoraFactors
from anima_peft.adapters.low_rank import Keep, spectrum_of_matrix, spectrum_of_pair
from anima_peft.adapters.resizing import resize
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import KINDS_OF_FACTORS, dense, factors_of_kind, random_factors, table
from tests.adapters.commanding import (
    adapter_file,
    assert_same_deltas,
    contents,
    deltas,
    metadata_of,
    origin_of,
    parsed,
    run,
    tensor_file,
)

pytestmark = pytest.mark.usefixtures("unflushed")

WITH_RANK = [kind for kind in KINDS_OF_FACTORS if kind not in ("norms", "biases")]


@pytest.mark.parametrize("kind", WITH_RANK)
def test_each_module_is_the_nearest_of_its_rank(kind: str, model: AnimaTransformerModel, tmp_path: Path) -> None:
    before = factors_of_kind(model, kind, rank=4, alpha=3.0)
    file = adapter_file(before, tmp_path / "one.safetensors")
    done = resize(file, tmp_path / "small.safetensors", Keep(rank=2), table=table(model))
    after = parsed(done.path, model)
    assert after.keys() == before.keys()
    shares = {module.name: module.share for module in done.modules}
    for name, old in before.items():
        new, exact = after[name], dense(old)
        if isinstance(old, LoKrFactors):
            assert isinstance(new, LoKrFactors)
            assert new.shape.rank2 in (2, None)  # none: full was smaller than the pair
            w2 = old.w2.double() if torch.is_tensor(old.w2) else old.w2[0].double() @ old.w2[1].double()
            squares = torch.linalg.svdvals(w2).square()
            rank = new.shape.rank2 or len(squares)
            best = 1 - float(squares[rank:].sum() / squares.sum())
        else:
            assert isinstance(new, LoraFactors)
            assert new.rank == 2
            squares = torch.linalg.svdvals(exact).square()
            best = float(squares[:2].sum() / squares.sum())
        kept = 1 - float((dense(new) - exact).square().sum() / exact.square().sum())
        assert kept == pytest.approx(best, abs=1e-6)
        assert shares[name] == pytest.approx(best, abs=1e-6)
        for part in ("bias", "magnitude"):
            own = getattr(old, part, None)
            assert own is None or torch.equal(own, getattr(new, part))


@pytest.mark.parametrize("kind", ["LoRA", "LoKr low-rank", "LoHa"])
@pytest.mark.parametrize("energy", [0.5, 0.95, 1.0])
def test_energy_keeps_the_lowest_rank_that_suffices(
    kind: str, energy: float, model: AnimaTransformerModel, tmp_path: Path
) -> None:
    before = factors_of_kind(model, kind, rank=6)
    file = adapter_file(before, tmp_path / "one.safetensors")
    done = resize(file, tmp_path / "small.safetensors", Keep(energy=energy), table=table(model))
    assert done.share >= energy - 1e-9
    for name, new in parsed(done.path, model).items():
        squares = torch.linalg.svdvals(dense(before[name])).square()
        total = float(squares.sum())
        lost = float((dense(new) - dense(before[name])).square().sum()) / total
        assert lost <= 1 - energy + 1e-9
        if isinstance(new, LoraFactors):
            assert float(squares[: new.rank - 1].sum()) / total < energy or new.rank == 1


def test_a_rank_that_is_not_lower_changes_no_bit(model: AnimaTransformerModel, tmp_path: Path) -> None:
    before = factors_of_kind(model, "LoRA", rank=3, alpha=0.7) | factors_of_kind(model, "norms")
    file = adapter_file(before, tmp_path / "one.safetensors")
    done = resize(file, tmp_path / "same.safetensors", Keep(rank=64))
    old, new = load_file(file), load_file(done.path)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert done.share == 1.0


def test_a_redundant_rank_is_found(model: AnimaTransformerModel, tmp_path: Path) -> None:
    """Half of the ranks repeat the other half."""
    before = random_factors(model, rank=2, alpha=5.0)
    doubled = {
        name: replace(f, up=torch.cat([f.up, f.up], dim=1), down=torch.cat([f.down, f.down]))
        for name, f in before.items()
    }
    file = adapter_file(doubled, tmp_path / "one.safetensors")
    done = resize(file, tmp_path / "small.safetensors", Keep(energy=1.0), table=table(model))
    after = parsed(done.path, model)
    assert {factors.rank for factors in after.values()} == {2}  # type: ignore[union-attr]
    assert_same_deltas(deltas(after), deltas(doubled))


def test_a_delta_of_zero_keeps_a_rank(model: AnimaTransformerModel, tmp_path: Path) -> None:
    before = {name: replace(f, up=torch.zeros_like(f.up)) for name, f in random_factors(model, rank=3).items()}
    file = adapter_file(before, tmp_path / "one.safetensors")
    done = resize(file, tmp_path / "small.safetensors", Keep(energy=0.9), table=table(model))
    assert all(not dense(factors).any() for factors in parsed(done.path, model).values())


def test_spectra_agree_with_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(*size, generator=generator).double() for size in ((30, 5), (5, 12)))
    for matrix in (left @ right, (left @ right).T):
        expected = torch.linalg.svdvals(matrix).square()
        spectrum = spectrum_of_matrix(matrix)
        assert torch.allclose(spectrum.squares, expected, atol=1e-9)
        (one, other), kept = spectrum.cut(Keep(rank=3))
        assert float((one @ other - matrix).square().sum()) == pytest.approx(float(expected[3:].sum()), rel=1e-9)
        assert kept == pytest.approx(float(expected[:3].sum()))
        assert torch.allclose(one.norm(dim=0), other.norm(dim=1))
    pair = spectrum_of_pair(left, right)
    assert torch.allclose(pair.squares, torch.linalg.svdvals(left @ right).square()[:5])


def test_metadata_and_report(model: AnimaTransformerModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"ss_network_dim": "6", "ss_network_args": "{}", "ss_steps": "10", "modelspec.title": "Mine"}
    file = adapter_file(random_factors(model, rank=6), tmp_path / "大 one.safetensors", text)
    path = tmp_path / "小 small.safetensors"
    assert run("resize", file, path, "--rank", 3, "--dtype", "bf16", "--format", "comfy", "--verbose") == 0
    printed = capsys.readouterr().out
    assert "6 x LoRA of rank 3" in printed
    assert printed.count("%  ") == 6
    made = metadata_of(path)
    assert made["ss_network_dim"] == "3"
    assert made["ss_steps"] == "10"
    assert made["modelspec.title"] == "Mine"
    assert "ss_network_args" not in made
    assert origin_of(path)["rank"] == 3
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(key.startswith("diffusion_model.") for key in tensors)


FAULTS = {
    "no size": ([], "give --rank, --energy"),
    "rank zero": (["--rank", "0"], "above zero"),
    "rank of a fraction": (["--rank", "1.5"], "above zero"),
    "energy above one": (["--energy", "1.5"], "up to 1"),
    "energy inf": (["--energy", "inf"], "up to 1"),
    "norms only": (["--rank", "1"], "which have no rank"),
    "nothing there": (["--rank", "1"], "no such adapter file"),
    "not an adapter": (["--rank", "1"], "names no known module"),
    "mixed kinds": (["--rank", "1"], "it has parts of LoRA and of LoKr"),
    "lying header": (["--rank", "1"], "not a readable safetensors file"),
    "not finite": (["--rank", "1"], "not finite"),
    "output is input": (["--rank", "1", "--overwrite"], "is an input"),
    "output exists": (["--rank", "1"], "exists already"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, model: AnimaTransformerModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = FAULTS[fault]
    stem = "lora_unet_blocks_0_self_attn_q_proj"
    good = {f"{stem}.lora_down.weight": torch.ones(2, 64), f"{stem}.lora_up.weight": torch.ones(64, 2)}
    file, path = tmp_path / "one.safetensors", tmp_path / "new" / "small.safetensors"
    tensors = {
        "not an adapter": {"x": torch.ones(1)},
        "mixed kinds": good | {f"{stem}.lokr_w1": torch.ones(2, 2)},
        "not finite": {key: tensor / 0 for key, tensor in good.items()},
    }.get(fault, good)
    if fault == "norms only":
        adapter_file(factors_of_kind(model, "norms"), file)
    elif fault != "nothing there":
        tensor_file(tensors, file)
    if fault == "lying header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    if fault == "output is input":
        path = file
    elif fault == "output exists":
        path = tensor_file(good, tmp_path / "small.safetensors")
    before = contents(tmp_path)
    assert run("resize", file, path, *arguments) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before
