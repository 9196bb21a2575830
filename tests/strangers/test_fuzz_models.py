"""Random input for what reads adapters and models."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from anima_peft.adapters.inspection import as_json, as_text, inspect_adapter
from anima_peft.adapters.naming import ModuleTable
from anima_peft.miniature import MiniatureFiles
from anima_peft.models.encoders import load_text_encoder, load_vae
from anima_peft.models.folders import check_part
from anima_peft.texts import escaped
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import diffusers_stem, factors_of_kind, kohya_stem, table, tensors_by_key, tiny_model

from .fuzzing import FUZZ, faults_are_told, fuzz, json_values, mutated, texts

pytestmark = FUZZ


@pytest.fixture(scope="module")
def model() -> AnimaTransformerModel:
    return tiny_model()


@pytest.fixture(scope="module")
def modules(model: AnimaTransformerModel) -> ModuleTable:
    return table(model)


def look_into(path: Path, modules: ModuleTable) -> None:
    with faults_are_told():
        found = inspect_adapter(path, modules)
        lines = list(as_text(found))
        assert all(escaped(line) == line for line in lines)
        assert json.loads(as_json(found))["bytes"] == path.stat().st_size


def test_bytes_of_adapters(model: AnimaTransformerModel, modules: ModuleTable, tmp_path: Path) -> None:
    config = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"a": 1}})}
    originals = tuple(
        save(tensors_by_key(dict(list(factors_of_kind(model, kind).items())[:2])), config)
        for kind in ("LoRA", "LoKr low-rank", "LoKr full", "LoHa", "norms")
    )
    path = tmp_path / "a.safetensors"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        look_into(path, modules)

    fuzz(mutated(originals), check)


ROLES = (
    *("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "alpha", "dora_scale", "diff", "diff_b"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "w_norm", "b_norm"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lora_magnitude_vector", "weight", "lora_A.default.weight"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn)


def test_structures_of_adapters(modules: ModuleTable, tmp_path: Path) -> None:
    natives = [name.native for name in (*modules.linears, *modules.norms)][::7]
    stems = [kohya_stem(name) for name in natives] + [f"diffusion_model.{name}" for name in natives] + natives
    with contextlib.suppress(KeyError):
        stems += [diffusers_stem(name) for name in natives]
    stems += ["__anima_norm__.blocks.0", "lora_te_layers_0_mlp_up_proj", "base_model.model.blocks.0.mlp.layer1", ""]
    keys = st.builds("{}.{}".format, st.sampled_from(stems), st.sampled_from(ROLES)) | texts
    sizes = st.lists(st.sampled_from((0, 1, 2, 4, 16, 32, 64, 256)), max_size=4)
    shapes = sizes.filter(lambda shape: torch.Size(shape).numel() <= 2**20)
    tensors = st.dictionaries(
        keys, st.tuples(shapes, st.sampled_from(DTYPES), st.sampled_from((0.0, 1.0, -3.0, float("nan")))), max_size=8
    )
    options = st.dictionaries(
        st.builds(
            "transformer.{}".format,
            st.sampled_from(("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_dora", "use_rslora")),
        )
        | texts,
        json_values,
        max_size=4,
    )
    metadata = st.dictionaries(texts, texts, max_size=3) | st.builds(
        lambda found: {"lora_adapter_metadata": json.dumps(found)}, options
    )
    path = tmp_path / "a.safetensors"

    def check(file: tuple[dict[str, tuple[list[int], torch.dtype, float]], dict[str, str]]) -> None:
        made = {
            key.encode("utf-8", "replace").decode(): torch.full(shape, value if dtype.is_floating_point else 1).to(
                dtype
            )
            for key, (shape, dtype, value) in file[0].items()
        }
        said = {
            k.encode("utf-8", "replace").decode(): v.encode("utf-8", "replace").decode() for k, v in file[1].items()
        }
        save_file(made, path, said)
        look_into(path, modules)

    fuzz(st.tuples(tensors, metadata), check)


def test_settings_of_parts(miniature: MiniatureFiles, tmp_path: Path) -> None:
    AnimaTransformerModel.from_single_file(miniature.transformer).save_pretrained(tmp_path)
    load_text_encoder(miniature.text_encoder).save_pretrained(tmp_path / "text_encoder")
    load_vae(miniature.vae).save_pretrained(tmp_path / "vae")
    parts = ("transformer", "text_conditioner", "text_encoder", "vae")
    whole = {part: json.loads((tmp_path / part / "config.json").read_text()) for part in parts}
    numbers = st.sampled_from((0, -1, 1, 7, 2**24, 2**31, 2**63, 10**30, 1.5, float("inf"), float("nan")))
    value = json_values | numbers | st.lists(numbers, max_size=4)
    changes = st.sampled_from(parts).flatmap(
        lambda part: st.tuples(
            st.just(part), st.dictionaries(st.sampled_from(sorted(whole[part])), value, min_size=1, max_size=3)
        )
    )

    def check(case: tuple[str, dict[str, Any]]) -> None:
        part, settings = case
        (tmp_path / part / "config.json").write_text(json.dumps(whole[part] | settings))
        with faults_are_told():
            check_part(tmp_path / part, part)

    fuzz(changes, check)
