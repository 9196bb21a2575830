"""`anima-peft merge` into an adapter file: the sum of the deltas, by float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anima_peft.adapters.factors import FullDelta, LoraFactors, NormDelta
from anima_peft.adapters.low_rank import Keep, exact_pair
from anima_peft.adapters.merging import merge
from anima_peft.errors import InputError
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import (
    KINDS_OF_FACTORS,
    TO_Q,
    dense,
    factors_of_kind,
    random_factors,
    table,
    tensors_by_key,
)
from tests.adapters.commanding import (
    adapter_file,
    added,
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

ADDABLE = [kind for kind in KINDS_OF_FACTORS if kind != "DoRA"]


@pytest.mark.parametrize(
    ("one", "other"), [*zip(ADDABLE, ADDABLE, strict=True), *zip(ADDABLE, ADDABLE[1:] + ADDABLE[:1], strict=True)]
)
def test_the_deltas_are_summed(one: str, other: str, model: AnimaTransformerModel, tmp_path: Path) -> None:
    first, second = factors_of_kind(model, one), factors_of_kind(model, other, seed=1, rank=3)
    files = [adapter_file(f, tmp_path / f"{n}.safetensors") for n, f in enumerate((first, second))]
    done = merge([(files[0], 0.7), (files[1], -1.5)], tmp_path / "sum.safetensors", table=table(model))
    assert done.kept == 1.0
    assert_same_deltas(deltas(parsed(done.path, model)), added(deltas(first, 0.7), deltas(second, -1.5)))


@pytest.mark.parametrize("kind", ADDABLE)
def test_the_best_of_a_rank_is_kept(kind: str, model: AnimaTransformerModel, tmp_path: Path) -> None:
    """Against torch's SVD of the explicit sum."""
    first, second = factors_of_kind(model, kind), factors_of_kind(model, "LoRA", seed=1, rank=3)
    files = [adapter_file(f, tmp_path / f"{n}.safetensors") for n, f in enumerate((first, second))]
    path = tmp_path / "sum.safetensors"
    assert run("merge", *files, "--output", path, "--rank", 2) == 0
    found, expected = parsed(path, model), added(deltas(first), deltas(second))
    for (name, parameter), delta in expected.items():
        if parameter == "bias":
            assert torch.allclose(found[name].bias.double(), delta)
        elif name in table(model).norms:
            assert torch.allclose(dense(found[name]), delta)
        else:
            values = torch.linalg.svdvals(delta)
            factors = found[name]
            assert isinstance(factors, LoraFactors)
            assert factors.rank == 2
            assert factors.alpha == 2.0
            error = float((dense(factors) - delta).norm())
            assert error == pytest.approx(float(values[2:].norm()), rel=1e-4, abs=1e-6 * float(values.norm()))


def test_loras_are_joined_rank_beside_rank_and_not_averaged(model: AnimaTransformerModel, tmp_path: Path) -> None:
    first, second = random_factors(model, rank=2), random_factors(model, seed=1, rank=3, alpha=1.5)
    files = [adapter_file(f, tmp_path / f"{n}.safetensors") for n, f in enumerate((first, second))]
    path = merge([(file, 0.5) for file in files], tmp_path / "sum.safetensors").path
    merged = parsed(path, model)
    for name in first:
        factors = merged[name]
        assert isinstance(factors, LoraFactors)
        assert factors.rank == 5
        averaged = (first[name].up.double()[:, :2] + second[name].up.double()[:, :2]) / 2
        wrong = averaged @ ((first[name].down.double() + second[name].down.double()[:2]) / 2)
        assert float((dense(factors) - wrong).norm() / dense(factors).norm()) > 0.1


def test_ranks_that_outgrow_the_matrix_become_a_whole_difference(model: AnimaTransformerModel, tmp_path: Path) -> None:
    first, second = random_factors(model, (TO_Q,), rank=20), random_factors(model, (TO_Q,), rank=20, seed=1)
    files = [adapter_file(f, tmp_path / f"{n}.safetensors") for n, f in enumerate((first, second))]
    merged = parsed(merge([(f, 1.0) for f in files], tmp_path / "sum.safetensors").path, model)
    assert isinstance(merged[table(model).by_native[TO_Q]], FullDelta)
    assert_same_deltas(deltas(merged), added(deltas(first), deltas(second)))


@pytest.mark.parametrize("kind", KINDS_OF_FACTORS)
def test_what_one_adapter_alone_changes_keeps_its_kind_and_bits(
    kind: str, model: AnimaTransformerModel, tmp_path: Path
) -> None:
    factors = factors_of_kind(model, kind)
    file = adapter_file(factors, tmp_path / "one.safetensors")
    merged = merge([(file, 1.0)], tmp_path / "same.safetensors", table=table(model)).path
    before, after = load_file(file), load_file(merged)
    assert before.keys() == after.keys()
    assert [key for key in before if not key.endswith(".alpha") and not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize("kind", ["LoRA", "LoKr low-rank", "LoKr decompose both", "LoHa"])
def test_exact_pairs(kind: str, model: AnimaTransformerModel) -> None:
    for factors in factors_of_kind(model, kind).values():
        double = type(factors)(
            *(
                tuple(p.double() for p in v) if isinstance(v, tuple) else v.double() if torch.is_tensor(v) else v
                for v in vars(factors).values()
            )
        )
        pair = exact_pair(double)
        assert pair is not None
        assert torch.allclose(pair[0] @ pair[1], dense(factors), atol=1e-14)


@pytest.mark.parametrize(
    ("style", "dtype", "tolerance"),
    [
        ("kohya", "fp16", 1e-3),
        ("comfy", "fp32", 1e-6),
        ("diffusers", "fp32", 1e-6),
        ("comfy-hybrid", "bf16", 1e-2),
        ("original", "fp32", 1e-6),
    ],
)
def test_styles_and_dtypes(
    style: str, dtype: str, tolerance: float, model: AnimaTransformerModel, tmp_path: Path
) -> None:
    factors = factors_of_kind(model, "LoRA")
    file = adapter_file(factors, tmp_path / "one.safetensors")
    path = tmp_path / "包 含" / "sum.safetensors"
    assert run("merge", f"{file}=0.5", file, "--output", path, "--format", style, "--dtype", dtype) == 0
    assert_same_deltas(deltas(parsed(path, model)), deltas(factors, 1.5), tolerance)


def test_metadata(model: AnimaTransformerModel, tmp_path: Path) -> None:
    """What both say of themselves stays, what belonged to their tensors does not."""
    both = {"ss_base_model_version": "anima", "ss_sd_model_name": "base", "sshs_model_hash": "0" * 64}
    one = {**both, "ss_network_dim": "2", "ss_steps": "10", "format": "pt"}
    other = {**both, "ss_network_dim": "2", "ss_steps": "20"}
    files = [
        adapter_file(random_factors(model, seed=n), tmp_path / f"{n}.safetensors", text)
        for n, text in enumerate((one, other))
    ]
    path = merge([(files[0], 0.5), (files[1], 1.0)], tmp_path / "sum.safetensors").path
    text = metadata_of(path)
    assert text["ss_sd_model_name"] == "base"
    assert "ss_steps" not in text
    assert text["ss_network_dim"] == "4"
    assert text["modelspec.merged_from"] == "0, 1"
    assert text["sshs_model_hash"] != "0" * 64
    assert text["modelspec.hash_sha256"] == "0x" + text["sshs_model_hash"]
    assert origin_of(path)["adapters"] == [
        {"file": "0.safetensors", "strength": 0.5},
        {"file": "1.safetensors", "strength": 1.0},
    ]


def test_three_adapters_on_different_modules(model: AnimaTransformerModel, tmp_path: Path) -> None:
    parts = [factors_of_kind(model, kind, seed=n) for n, kind in enumerate(("LoRA", "norms", "biases"))]
    files = [adapter_file(f, tmp_path / f"{n}.safetensors") for n, f in enumerate(parts)]
    path = merge([(file, 2.0) for file in files], tmp_path / "sum.safetensors").path
    assert_same_deltas(deltas(parsed(path, model)), added(*(deltas(f, 2.0) for f in parts)))


def test_energy(model: AnimaTransformerModel, tmp_path: Path) -> None:
    first, second = factors_of_kind(model, "LoKr full"), factors_of_kind(model, "LoKr full", seed=1)
    files = [adapter_file(f, tmp_path / f"{n}.safetensors") for n, f in enumerate((first, second))]
    done = merge([(f, 1.0) for f in files], tmp_path / "sum.safetensors", keep=Keep(energy=0.9))
    assert 0.9 <= done.kept < 1.0
    found, expected = parsed(done.path, model), added(deltas(first), deltas(second))
    for (name, _), delta in expected.items():
        lost = float((dense(found[name]) - delta).square().sum() / delta.square().sum())
        values = torch.linalg.svdvals(delta).square()
        rank = found[name].rank  # type: ignore[union-attr]
        assert lost <= 0.1 + 1e-6
        assert float(values[: rank - 1].sum() / values.sum()) < 0.9  # and no rank more than needed


def tensors_of(model: AnimaTransformerModel, kind: str = "LoRA") -> dict[str, torch.Tensor]:
    return tensors_by_key(factors_of_kind(model, kind))


FAULTS = {
    "nothing there": (["{tmp}/absent.safetensors"], "no such adapter file"),
    "not safetensors": (["{tmp}/noise.safetensors"], "not a readable safetensors file"),
    "empty": (["{tmp}/empty.safetensors"], "no key belongs"),
    "lying header": (["{tmp}/lying.safetensors"], "not a readable safetensors file"),
    "no adapter": (["{tmp}/picture.safetensors"], "names no known module"),
    "unknown module": (["{tmp}/unknown.safetensors"], "names no known module"),
    "missing piece": (["{tmp}/missing.safetensors"], "the `up` factor is missing"),
    "not a number": (["{tmp}/nan.safetensors"], "not finite"),
    "strength of no number": (["{one}=strong"], "is no number"),
    "strength zero": (["{one}=0"], "finite strength other than zero"),
    "strength nan": (["{one}=nan"], "finite strength other than zero"),
    "strength inf": (["{one}=inf"], "finite strength other than zero"),
    "another model's": (["{one}", "{tmp}/wide.safetensors"], "of different models"),
    "dora and another": (["{tmp}/dora.safetensors", "{one}"], "is DoRA"),
    "dora stronger": (["{tmp}/dora.safetensors=2"], "is DoRA"),
    "dora cut": (["{tmp}/dora.safetensors", "--rank", "1"], "is DoRA"),
    "rank zero": (["{one}", "--rank", "0"], "above zero"),
    "rank negative": (["{one}", "--rank=-1"], "above zero"),
    "energy zero": (["{one}", "--energy", "0"], "above 0 and up to 1"),
    "energy nan": (["{one}", "--energy", "nan"], "above 0 and up to 1"),
    "too much for fp16": (["{one}=1e9", "{one}", "--dtype", "fp16"], "cannot; nothing was written"),
    "another suffix": (["{one}", "--output", "{tmp}/out.pt"], "ends in .safetensors"),
    "output is input": (["{one}", "--output", "{one}", "--overwrite"], "is an input"),
    "output exists": (["{one}", "--output", "{tmp}/dora.safetensors"], "exists already"),
    "output is a folder": (["{one}", "--output", "{tmp}/folder.safetensors", "--overwrite"], "is a folder"),
    "folder is a file": (["{one}", "--output", "{one}/out.safetensors"], "cannot be written to"),
    "no format": (["{one}", "--format", "onnx"], "invalid choice"),
    "model is no model": (["{one}", "--model", "{one}"], "not an Anima transformer"),
}


@pytest.fixture
def faulty(model: AnimaTransformerModel, tmp_path: Path) -> Path:
    """A folder of good and bad files."""
    good = tensors_of(model)
    stem = next(iter(good)).partition(".")[0]
    tensor_file(good, tmp_path / "one.safetensors")
    tensor_file({}, tmp_path / "empty.safetensors")
    tensor_file({"picture": torch.zeros(3)}, tmp_path / "picture.safetensors")
    tensor_file(good | {"lora_unet_blocks_0_tail.lora_up.weight": torch.ones(2, 2)}, tmp_path / "unknown.safetensors")
    tensor_file({k: t for k, t in good.items() if k != f"{stem}.lora_up.weight"}, tmp_path / "missing.safetensors")
    tensor_file(good | {f"{stem}.lora_up.weight": good[f"{stem}.lora_up.weight"] / 0}, tmp_path / "nan.safetensors")
    tensor_file(good | {f"{stem}.lora_down.weight": torch.ones(2, 999)}, tmp_path / "wide.safetensors")
    tensor_file(tensors_of(model, "DoRA"), tmp_path / "dora.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)))
    whole = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "lying.safetensors").write_bytes(whole[:-8])
    (tmp_path / "folder.safetensors").mkdir()
    return tmp_path


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One clear error, exit code 2, and every file as it was."""
    arguments, message = FAULTS[fault]
    filled = [text.format(tmp=faulty, one=faulty / "one.safetensors") for text in arguments]
    filled += [] if "--output" in filled else ["--output", str(faulty / "new" / "out.safetensors")]
    before = contents(faulty)
    assert run("merge", *filled) == 2
    assert message in capsys.readouterr().err
    assert contents(faulty) == before


def test_overwrite_and_names_with_an_equals_sign(model: AnimaTransformerModel, tmp_path: Path) -> None:
    factors = factors_of_kind(model, "LoRA")
    file = adapter_file(factors, tmp_path / "a=2.safetensors")
    path = tmp_path / "sum.safetensors"
    path.write_text("old")
    assert run("merge", file, "--output", path) == 2
    assert path.read_text() == "old"
    assert run("merge", file, "--output", path, "--overwrite") == 0
    assert_same_deltas(deltas(parsed(path, model)), deltas(factors))


def test_nothing_is_left_when_a_sum_cannot_be_finished(
    model: AnimaTransformerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = adapter_file(factors_of_kind(model, "LoRA"), tmp_path / "one.safetensors")
    before = contents(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anima_peft.streaming.TensorSpool.add", full)
    assert run("merge", file, "--output", tmp_path / "sum.safetensors") == 1
    assert contents(tmp_path) == before


def test_norms_need_no_linear(model: AnimaTransformerModel, tmp_path: Path) -> None:
    files = [adapter_file(factors_of_kind(model, "norms", seed=n), tmp_path / f"{n}.safetensors") for n in (0, 1)]
    merged = parsed(merge([(f, 1.0) for f in files], tmp_path / "sum.safetensors").path, model)
    assert all(isinstance(factors, NormDelta) for factors in merged.values())


def test_a_hub_error_is_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the hub cannot give it"):
        merge([("owner/name", 1.0)], tmp_path / "sum.safetensors")
