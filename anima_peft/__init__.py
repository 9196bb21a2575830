"""Train LoRA and LoKr adapters for the Anima image model through PEFT and diffusers, and use them anywhere.

Importing this package registers `AnimaPipeline` with diffusers, so that `DiffusionPipeline.from_pretrained` and
`AutoPipelineForText2Image.from_pretrained` find it.
"""

from ._version import __version__
from .adapters.anywhere import delete_adapters, load_adapter, set_adapters, unload_adapters
from .adapters.exchange import inject_adapter
from .adapters.lokr import LoKrConfig
from .adapters.lora import LoraConfig
from .errors import InputError, TrainingError
from .pipeline import AnimaPipeline, register_with_diffusers
from .transformer import AnimaTransformerModel

register_with_diffusers()

__all__ = [
    "AnimaPipeline",
    "AnimaTransformerModel",
    "InputError",
    "LoKrConfig",
    "LoraConfig",
    "TrainingError",
    "__version__",
    "delete_adapters",
    "inject_adapter",
    "load_adapter",
    "set_adapters",
    "unload_adapters",
]
