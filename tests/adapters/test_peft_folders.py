"""Folders that PEFT wrote give PEFT's own output, and what their config says is taken or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_peft.adapters.conversion import convert
from anima_peft.adapters.inspection import inspect_adapter
from anima_peft.errors import InputError
from tests.adapters.adapting import (
    assert_close,
    output,
    tiny_model,
)

TOLERANCE = 1e-5

SOME = ["attn1.to_q", "attn2.to_k", "ff.net.2", "norm_out.linear_2"]
PEFT_CONFIGS: dict[str, peft.PeftConfig] = {
    "LoRA": peft.LoraConfig(r=3, lora_alpha=5, target_modules=SOME),
    "rsLoRA": peft.LoraConfig(r=3, lora_alpha=5, target_modules=SOME, use_rslora=True),
    "DoRA": peft.LoraConfig(r=3, lora_alpha=5, target_modules=SOME, use_dora=True),
    "patterns": peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=SOME,
        rank_pattern={"attn1.to_q": 2, r".*\.1\.ff\.net\.2": 4},
        alpha_pattern={"to_k": 7, "^transformer_blocks.0.ff.net.2": 0.5},
    ),
    "LoKr": peft.LoKrConfig(r=2, alpha=5, target_modules=SOME, init_weights=False),
    "LoKr both low-rank": peft.LoKrConfig(r=1, alpha=5, target_modules=SOME, decompose_both=True, init_weights=False),
    "LoKr full, which PEFT scales": peft.LoKrConfig(r=64, alpha=16, target_modules=SOME, init_weights=False),
    "LoHa": peft.LoHaConfig(r=3, alpha=5, target_modules=SOME, init_weights=False, alpha_pattern={"to_k": 2}),
}


@pytest.fixture
def peft_folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder that PEFT wrote, and the output of PEFT's own model."""
    reference = tiny_model()
    torch.manual_seed(0)
    with torch.random.fork_rng():
        wrapped = peft.get_peft_model(reference.transformer, PEFT_CONFIGS[request.param])
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter) * (parameter if "magnitude" in name else 1)
    wrapped.save_pretrained(str(tmp_path))
    return tmp_path, output(reference.eval())


@pytest.mark.parametrize("peft_folder", PEFT_CONFIGS, indirect=True)
def test_pefts_own_folders_give_pefts_own_output(peft_folder: tuple[Path, torch.Tensor]) -> None:
    folder, expected = peft_folder
    model = tiny_model()
    model.load_lora_adapter(folder)
    assert_close(output(model), expected, TOLERANCE)
    assert (expected - output(tiny_model())).abs().max() > 1e-2
    with_infix = {
        key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor
        for key, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(with_infix, folder / "adapter_model.safetensors")
    again = tiny_model()
    again.load_lora_adapter(folder)
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("peft_folder", ["rsLoRA", "LoKr full, which PEFT scales", "LoHa"], indirect=True)
def test_pefts_folders_are_converted_and_inspected(peft_folder: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = peft_folder
    assert inspect_adapter(folder).refusal is None
    assert set(inspect_adapter(folder).styles) == {"PEFT"}
    model = tiny_model()
    model.load_lora_adapter(convert(folder, tmp_path / "kohya.safetensors", "kohya").path)
    assert_close(output(model), expected, TOLERANCE)


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "OFT"}, "is of the kind 'OFT', which is not supported"),
    "no kind": ({"peft_type": None}, "is of the kind 'None'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base's weights"),
    "DoRA without magnitudes": ({"use_dora": True}, "its config says that it is DoRA, but the magnitude is missing"),
    "alpha in words": ({"lora_alpha": "many"}, "gives it no lora_alpha, but 'many'"),
    "a huge alpha": ({"lora_alpha": 1e300}, "alpha is 1e+300, expected a finite number"),
    "a pattern that never ends": ({"alpha_pattern": {"(a+)+$": 1}}, "has the pattern '(a+)+$'"),
    "patterns without end": ({"alpha_pattern": {f"m{i}": 1 for i in range(5000)}}, "more patterns than a model has"),
    "repetitions without end": ({"alpha_pattern": {f".*{i}.*": 1 for i in range(99)}}, "more patterns than a model"),
    "a long pattern": ({"alpha_pattern": {"a|" * 200_000: 1}}, "more patterns than a model has"),
}


@pytest.mark.parametrize("peft_folder", ["LoRA"], indirect=True)
def test_what_pefts_config_says_is_taken_or_refused(peft_folder: tuple[Path, torch.Tensor]) -> None:
    folder, _ = peft_folder
    path = folder / "adapter_config.json"
    plain = json.loads(path.read_text())
    for change, words in CONFIG_FAULTS.values():
        path.write_text(json.dumps(plain | change))
        with pytest.raises(InputError) as error:
            tiny_model().load_lora_adapter(folder)
        assert words in str(error.value)
    for text in ("{", "[]", "[" * 100_000, '{"lora_alpha": ' + "9" * 5000 + "}"):
        path.write_text(text)
        with pytest.raises(InputError, match="is not a PEFT config"):
            tiny_model().load_lora_adapter(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"PEFT's scale stands in adapter_config\.json"):
        tiny_model().load_lora_adapter(folder)
