"""The small Anima of random weights: complete, the same every time, and readable by every loader."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from PIL import Image
from safetensors.torch import load_file

from anima_peft.errors import InputError
from anima_peft.miniature import BACKGROUNDS, COLOURS, MiniatureFiles, scenes, wan_state_dict, write_random_miniature
from anima_peft.models.checkpoints import build_empty
from anima_peft.models.encoders import check_encoders, load_text_encoder, load_vae
from anima_peft.models.sources import resolve_sources
from anima_peft.models.text import encode_text
from anima_peft.models.tokenizers import load_qwen_tokenizer, load_t5_tokenizer
from anima_peft.transformer import AnimaTransformerModel


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_writes_the_same_bytes(miniature: MiniatureFiles, tmp_path: Path) -> None:
    torch.manual_seed(17)
    state = torch.random.get_rng_state()
    write_random_miniature(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again = contents(miniature.transformer.parent), contents(tmp_path / "again")
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_another_seed_draws_other_weights_and_nothing_else(miniature: MiniatureFiles, tmp_path: Path) -> None:
    write_random_miniature(tmp_path, seed=1)
    first, other = contents(miniature.transformer.parent), contents(tmp_path)
    assert {name for name in first if first[name] != other[name]} == {
        path.name for path in (miniature.transformer, miniature.vae, miniature.text_encoder)
    }


def test_every_loader_reads_it_and_its_parts_fit_together(miniature: MiniatureFiles) -> None:
    paths = asdict(miniature)
    sources = resolve_sources(
        paths["transformer"],
        vae=paths["vae"],
        qwen=paths["text_encoder"],
        qwen_tokenizer_dir=paths["tokenizer"],
        t5_tokenizer_dir=paths["t5_tokenizer"],
    )
    check_encoders(sources.text_encoder, sources.vae)
    model = AnimaTransformerModel.from_pretrained(sources.transformer)
    text_encoder, vae = load_text_encoder(sources.text_encoder), load_vae(sources.vae)
    tokenizer, t5_tokenizer = load_qwen_tokenizer(sources.tokenizer), load_t5_tokenizer(sources.t5_tokenizer)
    assert len(tokenizer) == text_encoder.config.vocab_size
    assert len(t5_tokenizer) == model.text_conditioner.config.target_vocab_size
    assert vae.config.latents_mean == AutoencoderKLQwenImage().config.latents_mean

    captions = [scene.caption for scene in scenes()]
    text = encode_text(text_encoder, tokenizer, t5_tokenizer, captions, 512, "cpu")
    pixels = torch.rand(1, 3, 1, 16, 16)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
        assert vae.decode(latents).sample.shape == pixels.shape
        conditioning = model.encode_prompt_embeds(*text)
        latents = latents.expand(len(captions), -1, -1, -1, -1)
        velocity = model(latents, torch.full((len(captions),), 0.5), conditioning)
    assert velocity.shape == latents.shape
    assert velocity.isfinite().all()
    assert len({row.numpy().tobytes() for row in velocity}) == len(captions)  # each caption counts


def test_tokenizers_know_every_caption(miniature: MiniatureFiles) -> None:
    tokenizer, t5_tokenizer = load_qwen_tokenizer(miniature.tokenizer), load_t5_tokenizer(miniature.t5_tokenizer)
    for scene in scenes():
        assert tokenizer.decode(tokenizer(scene.caption).input_ids) == scene.caption
        ids = t5_tokenizer(scene.caption).input_ids
        assert ids[-1] == t5_tokenizer.eos_token_id
        assert t5_tokenizer.unk_token_id not in ids
        assert t5_tokenizer.decode(ids, skip_special_tokens=True) == scene.caption


def test_no_weight_is_silent(miniature: MiniatureFiles) -> None:
    weights = load_file(miniature.transformer) | load_file(miniature.text_encoder)
    silent = {key for key, tensor in weights.items() if not tensor.any()}
    assert {key for key in silent if not key.endswith(".bias")} == set()


@pytest.mark.parametrize("base_dim", [8, 96], ids=["miniature", "full size"])
def test_wan_names_are_the_inverse_of_diffusers_conversion(base_dim: int) -> None:
    vae = build_empty(lambda: AutoencoderKLQwenImage(base_dim=base_dim))
    shapes = {key: tensor.shape for key, tensor in vae.state_dict().items()}
    wan = {key: tensor.shape for key, tensor in wan_state_dict(vae).items()}
    assert len(wan) == len(shapes)
    assert convert_wan_vae_to_diffusers(wan) == shapes
    assert not {"encoder.conv_in.weight", "quant_conv.weight", "decoder.mid_block.resnets.0.conv1.weight"} & wan.keys()


def test_pictures_and_captions(miniature: MiniatureFiles) -> None:
    pictures = sorted(miniature.pictures.glob("*.png"))
    assert len(pictures) == len(scenes()) == 12
    sizes = set()
    for path, scene in zip(pictures, scenes(), strict=True):
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        assert caption == scene.caption
        assert {scene.colour, scene.background} < set(re.findall(r"\w+", caption))
        assert scene.thing in caption
        with Image.open(path) as picture:
            sizes.add(picture.size)
            colours = {colour for _, colour in picture.getcolors()}
            assert colours == {COLOURS[scene.colour], BACKGROUNDS[scene.background]}
            assert picture.getpixel((0, 0)) == BACKGROUNDS[scene.background]
    assert len({scene.caption for scene in scenes()}) == 12
    assert sizes == {(64, 64), (96, 64), (64, 96)}


def test_captions_count() -> None:
    assert [scene.caption for scene in scenes()[:3]] == [
        "red circle, white background",
        "two green circles, grey background",
        "three blue circles, white background",
    ]


@pytest.mark.parametrize(
    "present", ["anima_miniature.safetensors", "qwen_3_miniature.safetensors", "t5_tokenizer/own.txt", "pictures/1.png"]
)
def test_what_is_there_is_not_overwritten(tmp_path: Path, present: str) -> None:
    path = tmp_path / present
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(InputError, match=r"exists already; choose another folder or add --overwrite"):
        write_random_miniature(tmp_path)
    assert contents(tmp_path) == {str(Path(present)): b"mine"}


def test_overwriting_when_asked(miniature: MiniatureFiles, tmp_path: Path) -> None:
    write_random_miniature(tmp_path, seed=1)
    write_random_miniature(tmp_path, overwrite=True)
    assert contents(tmp_path) == contents(miniature.transformer.parent)
