"""A DiT whose frozen weights are kept in 8 or 4 bits, by diffusers' quantizers.

They attach while a model is loaded and know their own files. Here what is loaded are the weights of a model that has
been loaded already, from whatever file or folder and with whatever was merged into it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import BitsAndBytesConfig, CosmosTransformer3DModel, TorchAoConfig
from diffusers.models.model_loading_utils import load_model_dict_into_meta
from diffusers.quantizers import DiffusersAutoQuantizer
from diffusers.utils import is_bitsandbytes_available, is_torchao_available

from ..errors import InputError
from .checkpoints import build_empty
from .precision import set_qk_norm_eps

# All but the attention's and the MLP's matrices: a twelfth of the weights, and what every token passes through.
_KEPT = ["patch_embed", "time_embed", "norm1", "norm2", "norm3", "norm_out", "proj_out"]


def require_quantization(kind: str, device: torch.device) -> None:
    """Refuse a type of weights that cannot be had here, before anything is loaded.

    Args:
        kind: "int8", "fp8", "nf4", or "none".

    Raises:
        InputError: its package is not installed, or nf4 without a graphics card.
    """
    if kind == "none":
        return
    package, installed = (
        ("bitsandbytes", is_bitsandbytes_available()) if kind == "nf4" else ("torchao", is_torchao_available())
    )
    if not installed:
        raise InputError(
            f'base_quantization: "{kind}" needs the package {package}, which is not installed '
            "(pip install anima-peft[quant])."
        )
    if kind == "nf4" and device.type == "cpu":
        raise InputError('base_quantization: "nf4" needs a graphics card, and none is in use; "int8" runs everywhere.')


def quantize_dit(
    transformer: CosmosTransformer3DModel, kind: str, device: torch.device | str = "cpu"
) -> CosmosTransformer3DModel:
    """The same DiT with the matrices of attention and MLP in `kind`; embeddings, modulation, norms and output stay.

    Weights are scaled by row (int8, and fp8 as e4m3) or by 64 values (nf4). In a layer they are brought back to the
    model's dtype and multiplied as usual.

    Args:
        transformer: without adapters; its weights that stay are shared with the result.
        kind: "int8", "fp8" or "nf4", which `require_quantization` has let pass.
        device: where it is computed; the result is on the CPU.
    """
    dtype = transformer.dtype
    quantizer: Any = DiffusersAutoQuantizer.from_config(_config(kind, dtype), pre_quantized=False)
    quantizer.validate_environment()
    quantized = build_empty(lambda: CosmosTransformer3DModel.from_config(transformer.config))
    quantizer.preprocess_model(model=quantized, device_map=None, keep_in_fp32_modules=[])
    load_model_dict_into_meta(
        quantized,
        transformer.state_dict(),
        dtype=dtype,
        device_map={"": torch.device(device)},
        hf_quantizer=quantizer,
        unexpected_keys=[],
    )
    quantizer.postprocess_model(quantized)
    quantized.hf_quantizer = quantizer  # where PEFT looks for how weights are quantized
    set_qk_norm_eps(quantized)
    return quantized.requires_grad_(False).eval().to("cpu")


def _config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig:
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=_KEPT
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    weights = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    return TorchAoConfig(weights, modules_to_not_convert=_KEPT)
