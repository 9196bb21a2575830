"""The model card of an adapter: what it is, how it draws, and how to load it. Nothing of a file's text is trusted."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from ..adapters.inspection import shown
from ..models.hub_folders import Hub

BASE_MODEL = "circlestone-labs/Anima"
DIFFUSERS_BASE = "circlestone-labs/Anima-Base-v1.0-Diffusers"
PICTURE_FOLDER = "images"

_FACTS = {
    "ss_sd_model_name": "Base checkpoint",
    "ss_num_train_images": "Pictures",
    "ss_steps": "Steps",
    "ss_num_epochs": "Epochs",
    "ss_learning_rate": "Learning rate",
    "ss_optimizer": "Optimizer",
    "ss_mixed_precision": "Precision",
    "modelspec.resolution": "Resolution",
    "modelspec.author": "Author",
}
"""What of the file's metadata the card shows. Folders, tags and comments are the trainer's own business."""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~^$:@-])")


@dataclass(frozen=True)
class Example:
    """A picture and how it came to be.

    Attributes:
        file: its name in `PICTURE_FOLDER`.
        prompt: empty where it is not known.
    """

    file: str
    prompt: str = ""


@dataclass(frozen=True)
class Card:
    """What a model card is written from.

    Attributes:
        repo_id: where it will be.
        hub: on which hub.
        file: name of the adapter's file.
        title: heading.
        description: the author's own text; its Markdown is kept.
        license: id as the hubs know it, such as "mit" or "other".
        license_name, license_link: of a licence that has no id.
        base_model: repo id of the model the adapter is for.
        trigger: words that call up what was learned.
        contents: kinds, ranks and scales in words.
        kind: "lora", "lokr", …, as a tag.
        strength: the one to start with.
        stock_diffusers: whether stock diffusers reads the file's style.
        metadata: the file's.
        examples: pictures.
    """

    repo_id: str
    hub: Hub
    file: str
    title: str
    license: str
    contents: str
    kind: str
    description: str = ""
    license_name: str = ""
    license_link: str = ""
    base_model: str = BASE_MODEL
    trigger: str = ""
    strength: float = 1.0
    stock_diffusers: bool = False
    metadata: Mapping[str, str] | None = None
    examples: Sequence[Example] = ()


def model_card(card: Card) -> str:
    """The text of README.md: YAML for the hub, then Markdown."""
    return "\n".join(["---", _front_matter(card), "---", "", *_body(card)]) + "\n"


def _front_matter(card: Card) -> str:
    tags = ["text-to-image", "anima", card.kind, "template:diffusion-lora"]
    known: dict[str, Any] = {
        "license": card.license,
        "license_name": _plain(card.license_name),
        "license_link": card.license_link,
        "base_model": card.base_model,
        "base_model_relation": "adapter",
        "pipeline_tag": "text-to-image",
        "library_name": "diffusers",
        "instance_prompt": _plain(card.trigger),
        "tags": tags,
    }
    if card.hub is Hub.MODELSCOPE:
        known["tasks"] = ["text-to-image-synthesis"]
    widget = [
        {"text": _plain(example.prompt) or " ", "output": {"url": f"{PICTURE_FOLDER}/{example.file}"}}
        for example in card.examples
    ]
    return ModelCardData(**{key: value for key, value in (known | {"widget": widget}).items() if value}).to_yaml()


def _body(card: Card) -> Iterator[str]:
    yield f"# {escaped(card.title)}"
    yield ""
    if card.description:
        yield card.description
        yield ""
    yield f"An adapter for [Anima](https://huggingface.co/{BASE_MODEL}): {escaped(card.contents)}."
    yield ""
    if card.trigger:
        yield f"**Trigger words:** {escaped(card.trigger)}"
        yield ""
    for example in card.examples:
        yield f"![{escaped(example.prompt)}]({PICTURE_FOLDER}/{example.file})"
        yield ""
        if example.prompt:
            yield f"*{escaped(example.prompt)}*"
            yield ""
    yield from _loading(card)
    facts = [(text, card.metadata[key]) for key, text in _FACTS.items() if card.metadata and card.metadata.get(key)]
    if facts:
        yield "## Training"
        yield ""
        yield "| | |"
        yield "| --- | --- |"
        yield from (f"| {name} | {escaped(value)} |" for name, value in facts if value != "None")
        yield ""
        yield "From the file's own metadata."
        yield ""
    yield "## Licence"
    yield ""
    name = escaped(card.license_name or card.license)
    yield f"[{name}]({card.license_link})" if card.license_link else f"{name}."
    yield "The base model's licence holds as well."


def _loading(card: Card) -> Iterator[str]:
    repo, file, prompt = json.dumps(card.repo_id), json.dumps(card.file, ensure_ascii=False), "1girl, solo, smile"
    prompt = json.dumps(f"{_plain(card.trigger)}, {prompt}" if card.trigger else prompt, ensure_ascii=False)
    yield "## Use it"
    yield ""
    yield "With diffusers and `anima_peft`:"
    yield ""
    yield "```python"
    yield "import torch"
    yield "from anima_peft import AnimaPipeline"
    source = f"{repo}, weight_name={file}"
    if card.hub is Hub.MODELSCOPE:
        yield "from modelscope import snapshot_download"
        source = f"snapshot_download({repo}), weight_name={file}"
    yield ""
    yield f'pipe = AnimaPipeline.from_pretrained("{DIFFUSERS_BASE}", torch_dtype=torch.bfloat16).to("cuda")'
    yield f'pipe.load_lora_weights({source}, adapter_name="it")'
    yield f'pipe.set_adapters("it", {card.strength:g})'
    yield f'pipe({prompt}, height=1024, width=1024).images[0].save("picture.png")'
    yield "```"
    yield ""
    if not card.stock_diffusers:
        yield (
            "diffusers without `anima_peft` needs the keys under other names: "
            "`anima-peft convert FILE NEW_FILE --format diffusers` writes them."
        )
        yield ""
    yield (
        f"**ComfyUI:** put `{_plain(card.file).replace('`', '')}` into `ComfyUI/models/loras` and add the node *Load "
        f"LoRA (Model Only)* behind the one that loads the model, with strength {card.strength:g}."
    )
    yield ""
    yield "**sd-scripts:**"
    yield ""
    yield "```bash"
    yield (
        "python anima_minimal_inference.py --dit anima.safetensors --vae qwen_image_vae.safetensors --text_encoder "
        f"qwen_3_06b_base.safetensors --lora_weight {_quoted(card.file)} --lora_multiplier {card.strength:g} --prompt "
        f"{_quoted(json.loads(prompt))} --save_path pictures"
    )
    yield "```"
    yield ""


def escaped(text: str) -> str:
    """A text that Markdown and HTML show as it stands, on one line."""
    return _MARKDOWN.sub(r"\\\1", html.escape(_plain(text), quote=False))


def _plain(text: str) -> str:
    """One line without control characters, and not endless."""
    return " ".join(shown(" ".join(text.split())).split())


def _quoted(text: str) -> str:
    """For a shell inside a code block."""
    return "'" + _plain(text).replace("'", "'\\''").replace("```", "") + "'"
