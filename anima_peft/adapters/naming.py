"""One table of every adaptable module under each of its names, built from the model at hand.

Files name modules in several styles. All of them are decoded by looking a name up here, never by splitting strings:
flat kohya names such as `lora_unet_blocks_0_self_attn_q_proj` cannot be split without guessing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..models.names import CONDITIONER_PREFIX, native_to_diffusers
from .deltas import is_affine_norm
from .quantized import is_quantized, plain_weight, weight_shape

TRANSFORMER = "transformer"
TEXT_CONDITIONER = "text_conditioner"
TEXT_ENCODER = "text_encoder"
COMFY_PREFIX = "diffusion_model."
KOHYA_PREFIX = "lora_unet_"
KOHYA_TEXT_ENCODER_PREFIX = "lora_te_"

Components = Mapping[str, torch.nn.Module]
"""The stock models an adapter lives on, by component name: `transformer`, `text_conditioner`, `text_encoder`."""


@dataclass(frozen=True)
class ModuleName:
    """One module of Anima under its names.

    Attributes:
        component: `transformer`, `text_conditioner` or `text_encoder`.
        path: dotted path inside the diffusers component.
        native: dotted path in the original checkpoint (the conditioner below `llm_adapter.`); the text encoder, which
            has a checkpoint of its own, below `text_encoder.`.
    """

    component: str
    path: str
    native: str

    @property
    def kohya(self) -> str:
        """The flat name that sd-scripts, ComfyUI and Forge use."""
        flat = self.path if self.component == TEXT_ENCODER else self.native
        return (KOHYA_TEXT_ENCODER_PREFIX if self.component == TEXT_ENCODER else KOHYA_PREFIX) + flat.replace(".", "_")

    @property
    def diffusers(self) -> str:
        """The name in diffusers' adapter files: component and path."""
        return f"{self.component}.{self.path}"


def base_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Path and module of everything in `model`, as if it carried no adapters."""
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        inside = None
        if isinstance(module, BaseTunerLayer):
            inside = path + "."
            module = module.get_base_layer()
        yield path, module


def base_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that `model` would have without adapters; deltas fused into a weight are part of it."""
    return {
        f"{path}.{name}": parameter.detach()
        for path, module in base_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
    }


class ModuleTable:
    """Look-up of the modules that hold a weight, by any of their names.

    Args:
        components: the transformer and, where there are some, the text conditioner and the text encoder.
        sized: whether the models' sizes are those of the model at hand; a table of names alone has none.
    """

    def __init__(self, components: Components, *, sized: bool = True):
        self._linears: list[ModuleName] = []
        self._norms: list[ModuleName] = []
        self._modules: dict[ModuleName, torch.nn.Module] = {}
        self._sized = sized
        for component, model in components.items():
            natives = _native_names(component, model)
            for path, module in base_modules(model):
                if path in natives and isinstance(getattr(module, "weight", None), torch.Tensor):
                    name = ModuleName(component, path, natives[path])
                    self._modules[name] = module
                    if isinstance(module, torch.nn.Linear):
                        self._linears.append(name)
                    elif is_affine_norm(module):
                        self._norms.append(name)

    @property
    def linears(self) -> tuple[ModuleName, ...]:
        """All linear layers, in the model's order."""
        return tuple(self._linears)

    @property
    def norms(self) -> tuple[ModuleName, ...]:
        """All norms with a weight, in the model's order."""
        return tuple(self._norms)

    @cached_property
    def adaptable(self) -> frozenset[ModuleName]:
        """All modules that an adapter can have a part on."""
        return frozenset((*self._linears, *self._norms))

    def is_norm(self, name: ModuleName) -> bool:
        """Whether the module is a norm."""
        return is_affine_norm(self._modules[name])

    def shape(self, name: ModuleName) -> tuple[int, ...] | None:
        """Shape of the module's weight, (out, in) for linears; None where the table knows names alone."""
        return weight_shape(self._modules[name]) if self._sized else None

    def own(self, name: ModuleName, parameter: str) -> torch.Tensor | None:
        """The module's own `weight` or `bias`; None where it has none, or the table knows names alone."""
        module = self._modules[name]
        if self._sized and parameter == "weight" and is_quantized(module):
            return plain_weight(module)
        return getattr(module, parameter, None) if self._sized else None

    def has_bias(self, name: ModuleName) -> bool:
        """Whether the module has a bias."""
        return getattr(self._modules[name], "bias", None) is not None

    @cached_property
    def by_kohya(self) -> dict[str, ModuleName]:
        """By the flat name that sd-scripts, ComfyUI and Forge use."""
        return {name.kohya: name for name in self._modules}

    @cached_property
    def by_native(self) -> dict[str, ModuleName]:
        """By the name in the original checkpoint."""
        return {name.native: name for name in self._modules}

    @cached_property
    def by_diffusers(self) -> dict[str, ModuleName]:
        """By component and path."""
        return {name.diffusers: name for name in self._modules}

    @cached_property
    def by_path(self) -> dict[str, ModuleName]:
        """By the path inside the component, where no other component has the same one, and by no other's name."""
        counts = Counter(name.path for name in self._modules)
        return {
            name.path: name
            for name in self._modules
            if counts[name.path] == 1 and self.by_native.get(name.path, name) == name
        }


def _native_names(component: str, model: torch.nn.Module) -> dict[str, str]:
    """Path in the component -> native name; a model that is not Anima's has no other names than its paths."""
    if component == TRANSFORMER:
        blocks = model.get_submodule("transformer_blocks")
        assert isinstance(blocks, torch.nn.ModuleList)
        return {ours: native for native, ours in native_to_diffusers(len(blocks)).items()}
    prefix = {TEXT_CONDITIONER: CONDITIONER_PREFIX, TEXT_ENCODER: f"{TEXT_ENCODER}."}.get(component, "")
    return {path: prefix + path for path, _ in base_modules(model)}
