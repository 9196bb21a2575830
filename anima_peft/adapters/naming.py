"""One table of every adaptable module under each of its names, built from the model at hand.

Files name modules in several styles. All of them are decoded by looking a name up here, never by splitting strings:
flat kohya names such as `lora_unet_blocks_0_self_attn_q_proj` cannot be split without guessing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..models.names import CONDITIONER_PREFIX, native_to_diffusers
from .norms import is_affine_norm

TRANSFORMER = "transformer"
TEXT_CONDITIONER = "text_conditioner"
KOHYA_PREFIX = "lora_unet_"

Components = Mapping[str, torch.nn.Module]
"""The stock models an adapter lives on, by component name: `transformer` and `text_conditioner`."""


@dataclass(frozen=True)
class ModuleName:
    """One module of Anima under its names.

    Attributes:
        component: `transformer` or `text_conditioner`.
        path: dotted path inside the diffusers component.
        native: dotted path in the original checkpoint (the conditioner below `llm_adapter.`).
    """

    component: str
    path: str
    native: str

    @property
    def kohya(self) -> str:
        """The flat name that sd-scripts, ComfyUI and Forge use."""
        return KOHYA_PREFIX + self.native.replace(".", "_")

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
        components: the transformer and, where there is one, the text conditioner.
    """

    def __init__(self, components: Components):
        self._linears: list[ModuleName] = []
        self._norms: list[ModuleName] = []
        self._shapes: dict[ModuleName, tuple[int, ...]] = {}
        for component, model in components.items():
            natives = _native_names(component, model)
            for path, module in base_modules(model):
                weight = getattr(module, "weight", None)
                if path in natives and isinstance(weight, torch.Tensor):
                    name = ModuleName(component, path, natives[path])
                    self._shapes[name] = tuple(weight.shape)
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

    def shape(self, name: ModuleName) -> tuple[int, ...]:
        """Shape of the module's weight; (out, in) for linears."""
        return self._shapes[name]

    @cached_property
    def by_kohya(self) -> dict[str, ModuleName]:
        return {name.kohya: name for name in self._shapes}

    @cached_property
    def by_native(self) -> dict[str, ModuleName]:
        return {name.native: name for name in self._shapes}

    @cached_property
    def by_diffusers(self) -> dict[str, ModuleName]:
        return {name.diffusers: name for name in self._shapes}


def _native_names(component: str, model: torch.nn.Module) -> dict[str, str]:
    """Path in the component -> native name; a model that is not Anima's has no other names than its paths."""
    if component == TRANSFORMER:
        blocks = model.get_submodule("transformer_blocks")
        assert isinstance(blocks, torch.nn.ModuleList)
        return {ours: native for native, ours in native_to_diffusers(len(blocks)).items()}
    prefix = CONDITIONER_PREFIX if component == TEXT_CONDITIONER else ""
    return {path: prefix + path for path, _ in base_modules(model)}
