"""DiT and conditioner from a single file: names, sizes, faults, dtypes, and where the weights live afterwards."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from safetensors.torch import save_file

from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles, native_state_dict
from anima_peft.models.checkpoints import build_empty
from anima_peft.models.dit import dit_sizes, load_dit
from anima_peft.models.precision import set_qk_norm_eps
from tests.components import randomise, tiny_conditioner, tiny_transformer
from tests.full_size import full_size_conditioner, full_size_transformer

Tensors = dict[str, torch.Tensor]
Save = Callable[[Tensors], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes tensors to a file and returns its path."""

    def write(tensors: Tensors) -> Path:
        path = tmp_path / "model.safetensors"
        save_file(tensors, path)
        return path

    return write


@pytest.fixture(scope="module")
def native() -> Tensors:
    """A tiny model's weights under bare native names."""
    return native_state_dict(tiny_transformer(), tiny_conditioner(), prefix="")


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def run(transformer: torch.nn.Module, conditioner: torch.nn.Module, width: int) -> torch.Tensor:
    """One call of both models; `width` is that of the text encoder's states."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        context = conditioner(
            torch.randn(1, 3, width, generator=generator),
            torch.tensor([[4, 9, 1]]),
            torch.tensor([[1, 1, 0]]),
            torch.tensor([[1, 1, 0]]),
        )
        return transformer(
            torch.randn(1, transformer.config.in_channels, 1, 4, 6, generator=generator),
            torch.tensor([0.3]),
            context,
            padding_mask=torch.zeros(1, 1, 4, 6),
            return_dict=False,
        )[0]


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", ""])
def test_every_prefix_gives_the_same_model(native: Tensors, save: Save, prefix: str) -> None:
    transformer, conditioner = load_dit(save(prefixed(native, prefix)))
    for loaded, original in ((transformer, tiny_transformer()), (conditioner, tiny_conditioner())):
        assert type(loaded) is type(original)
        expected = original.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("prefix", ["net.", ""])
def test_keys_that_hold_no_weights_are_ignored(native: Tensors, save: Save, prefix: str) -> None:
    noise = {
        "blocks.0.self_attn.q_proj.comfy_quant": torch.zeros(3, dtype=torch.uint8),
        "blocks.0.self_attn._extra_state": torch.zeros(1, dtype=torch.uint8),
        "llm_adapter.blocks.0.cross_attn.q_norm._extra_state": torch.zeros(1),
        "pos_embedder.dim_spatial_range": torch.zeros(4),
        "pos_embedder.seq": torch.zeros(4),
    }
    transformer, conditioner = load_dit(save(prefixed(native | noise, prefix)))
    assert run(transformer, conditioner, 32).isfinite().all()


def test_full_size_config_is_the_published_one() -> None:
    weights = native_state_dict(full_size_transformer(), full_size_conditioner(), prefix="")
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items() if not key.startswith("llm_adapter.")}
    config = dict(full_size_transformer().config)
    assert {key: config[key] for key in dit_sizes(shapes, "file")} == dit_sizes(shapes, "file")


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "one block of one head": {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 24},
    "more blocks than ten": {"num_layers": 11, "num_attention_heads": 2, "attention_head_dim": 16},
    "a narrow MLP": {"num_attention_heads": 3, "attention_head_dim": 16, "mlp_ratio": 0.75},
    "an MLP that is no multiple": {"num_attention_heads": 1, "attention_head_dim": 26, "mlp_ratio": 15.5 / 26},
    "wide modulation": {"num_attention_heads": 2, "attention_head_dim": 16, "adaln_lora_dim": 40},
    "another width of text": {"num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 48},
    "other channels": {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8},
}
CONDITIONERS: dict[str, dict[str, Any]] = {
    "one layer": {"num_layers": 1},
    "twelve layers": {"num_layers": 12},
    "four heads": {"num_attention_heads": 4},
    "a wide MLP": {"mlp_ratio": 5.5},
    "an MLP that is no multiple": {"model_dim": 26, "num_attention_heads": 1, "mlp_ratio": 15.5 / 26},
    "a width of its own": {"model_dim": 16},
    "another text encoder": {"source_dim": 40},
    "another vocabulary": {"target_vocab_size": 50},
    "no self-attention": {"use_self_attention": False},
    "layer norms": {"use_layer_norm": True},
}


def transformer_of(changes: dict[str, Any]) -> CosmosTransformer3DModel:
    plain = {"num_layers": 2, "text_embed_dim": 32, "adaln_lora_dim": 16, "extra_pos_embed_type": None}
    model = CosmosTransformer3DModel(**plain | {"rope_scale": (1.0, 4.0, 4.0)} | changes)
    set_qk_norm_eps(model)
    return model


def conditioner_of(changes: dict[str, Any]) -> AnimaTextConditioner:
    plain = {"source_dim": 32, "target_dim": 32, "model_dim": 32, "num_layers": 2, "num_attention_heads": 2}
    return AnimaTextConditioner(**plain | {"target_vocab_size": 64} | changes)


@pytest.mark.parametrize(
    ("of_transformer", "of_conditioner"),
    [pytest.param(changes, {}, id=f"DiT: {name}") for name, changes in TRANSFORMERS.items()]
    + [pytest.param(TRANSFORMERS["wide modulation"], c, id=f"conditioner: {n}") for n, c in CONDITIONERS.items()],
)
def test_sizes_are_read_from_the_weights(save: Save, of_transformer: Any, of_conditioner: Any) -> None:
    if "text_embed_dim" in of_transformer:
        of_conditioner = {"target_dim": of_transformer["text_embed_dim"], "model_dim": 32}
    originals = randomise(transformer_of(of_transformer), 3), randomise(conditioner_of(of_conditioner), 4)
    loaded = load_dit(save(native_state_dict(*originals)))
    width = originals[1].config.source_dim
    assert torch.equal(run(*loaded, width), run(*originals, width))
    assert len(loaded[0].transformer_blocks) == of_transformer.get("num_layers", 2)
    assert loaded[1].config.min_sequence_length == 512


def test_mlp_sizes_survive_the_way_through_a_ratio() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.1.weight": (704, 68),
        "blocks.0.self_attn.q_norm.weight": (64,),
        "final_layer.linear.weight": (64, 704),
        "blocks.0.cross_attn.k_proj.weight": (704, 32),
        "blocks.0.adaln_modulation_self_attn.1.weight": (16, 704),
    }
    for inner in range(1, 4 * 704):  # diffusers computes int(width * ratio)
        ratio = dit_sizes(shapes | {"blocks.0.mlp.layer1.weight": (inner, 704)}, "file")["mlp_ratio"]
        assert int(704 * ratio) == inner


Change = Callable[[Tensors], Any]
FAULTS: dict[str, tuple[Change, list[str]]] = {
    "a weight is missing": (lambda t: t.pop("net.blocks.1.mlp.layer2.weight"), ["1 missing", "blocks.1.mlp.layer2"]),
    "weights from which sizes are read are missing": (
        lambda t: t.pop("net.blocks.0.self_attn.q_norm.weight"),
        ["missing key", "blocks.0.self_attn.q_norm.weight"],
    ),
    "a block is missing": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith("net.blocks.0.")],
        ["missing key", "blocks.0."],
    ),
    "a block is missing in the middle": (
        lambda t: [t.update({key.replace(".1.", ".2.", 1): t.pop(key)}) for key in list(t) if "net.blocks.1." in key],
        ["20 missing", "net.blocks.1.", "20 unexpected", "net.blocks.2."],
    ),
    "a conditioner's weight is missing": (
        lambda t: t.pop("net.llm_adapter.out_proj.bias"),
        ["1 missing", "net.llm_adapter.out_proj.bias"],
    ),
    "no conditioner": (
        lambda t: [t.pop(key) for key in list(t) if "llm_adapter" in key],
        ["llm_adapter", "text conditioner"],
    ),
    "something beside the model": (
        lambda t: t.update({"vae.decoder.weight": torch.zeros(2)}),
        ["1 unexpected", "vae.decoder.weight"],
    ),
    "an unknown weight inside": (
        lambda t: t.update({"net.blocks.0.mlp.layer3.weight": torch.zeros(2)}),
        ["1 unexpected", "net.blocks.0.mlp.layer3.weight"],
    ),
    "an unknown weight in the conditioner": (
        lambda t: t.update({"net.llm_adapter.blocks.0.mlp.1.weight": torch.zeros(2)}),
        ["1 unexpected", "net.llm_adapter.blocks.0.mlp.1.weight"],
    ),
    "a bias": (
        lambda t: t.update({"net.blocks.0.self_attn.q_proj.bias": torch.zeros(64)}),
        ["1 unexpected", "net.blocks.0.self_attn.q_proj.bias"],
    ),
    "quantised weights": (
        lambda t: t.update({"net.blocks.0.self_attn.q_proj.weight_scale": torch.zeros(1)}),
        ["1 unexpected", "weight_scale"],
    ),
    "integers": (
        lambda t: t.update({"net.blocks.1.mlp.layer1.weight": torch.zeros(256, 64, dtype=torch.int8)}),
        ["net.blocks.1.mlp.layer1.weight", "int8", "floating point"],
    ),
    "a misshapen weight": (
        lambda t: t.update({"net.blocks.1.self_attn.k_proj.weight": torch.zeros(7, 5)}),
        ["1 with a wrong shape", "net.blocks.1.self_attn.k_proj.weight is [7, 5], expected [64, 64]"],
    ),
    "a misshapen weight of the conditioner": (
        lambda t: t.update({"net.llm_adapter.norm.weight": torch.zeros(31)}),
        ["1 with a wrong shape", "net.llm_adapter.norm.weight is [31], expected [32]"],
    ),
    "all three at once": (
        lambda t: t.update(
            {"net.foo": t.pop("net.final_layer.adaln_modulation.1.weight")}
            | {"net.t_embedding_norm.weight": torch.zeros(1)}
        ),
        ["1 missing", "final_layer.adaln_modulation.1", "1 unexpected", "net.foo", "wrong shape", "t_embedding_norm"],
    ),
    "a scalar": (
        lambda t: t.update({"net.x_embedder.proj.1.weight": torch.zeros(())}),
        ["x_embedder.proj.1.weight", "2 dimensions"],
    ),
    "an empty tensor": (
        lambda t: t.update({"net.blocks.0.adaln_modulation_self_attn.1.weight": torch.zeros(0, 64)}),
        ["blocks.0.adaln_modulation_self_attn.1.weight", "above zero"],
    ),
    "heads that do not divide the width": (
        lambda t: t.update({"net.blocks.0.self_attn.q_norm.weight": torch.zeros(48)}),
        ["hidden size 64", "head size 48"],
    ),
    "heads too small to turn": (
        lambda t: t.update({"net.blocks.0.self_attn.q_norm.weight": torch.zeros(8)}),
        ["hidden size 64", "head size 8"],
    ),
    "heads of the conditioner wider than itself": (
        lambda t: t.update({"net.llm_adapter.blocks.0.cross_attn.q_norm.weight": torch.zeros(48)}),
        ["conditioner", "32", "48"],
    ),
}


@pytest.mark.parametrize(("change", "words"), FAULTS.values(), ids=FAULTS)
def test_a_file_that_does_not_fit_is_refused_by_key(
    native: Tensors, save: Save, change: Change, words: list[str]
) -> None:
    tensors = prefixed(native, "net.")
    change(tensors)
    path = save(tensors)
    with pytest.raises(InputError) as error:
        load_dit(path)
    assert [word for word in [str(path), *words] if word not in str(error.value)] == []


def test_many_faulty_keys_are_counted_and_not_all_shown(native: Tensors, save: Save) -> None:
    path = save(prefixed(native, "net.") | {f"net.extra.{i:02d}": torch.zeros(1) for i in range(20)})
    with pytest.raises(InputError, match=r"20 unexpected: net\.extra\.00, .* … and 12 more$"):
        load_dit(path)


def adapter_file(_: MiniatureFiles, folder: Path) -> Path:
    save_file({"lora_unet_blocks_0_mlp_layer1.lora_down.weight": torch.zeros(4, 64)}, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def diffusers_file(_: MiniatureFiles, folder: Path) -> Path:
    tiny_transformer().save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


def empty_file(_: MiniatureFiles, folder: Path) -> Path:
    save_file({}, folder / "empty.safetensors")
    return folder / "empty.safetensors"


@pytest.mark.parametrize(
    ("choose", "word"),
    [
        pytest.param(lambda files, _: files.vae, "a VAE", id="VAE"),
        pytest.param(lambda files, _: files.text_encoder, "a language model", id="Qwen"),
        pytest.param(adapter_file, "an adapter", id="adapter"),
        pytest.param(diffusers_file, "diffusers folder", id="diffusers"),
        pytest.param(empty_file, "something else", id="empty"),
    ],
)
def test_another_model_is_refused_by_what_it_is(
    miniature: MiniatureFiles, tmp_path: Path, choose: Any, word: str
) -> None:
    with pytest.raises(InputError, match="not an Anima transformer") as error:
        load_dit(choose(miniature, tmp_path))
    assert word in str(error.value)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def cut_in_the_header(content: bytes) -> bytes:
    return content[:100]


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def rewrite(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return rewrite


_KEY = "net.x_embedder.proj.1.weight"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(truncated, id="truncated"),
        pytest.param(cut_in_the_header, id="cut in the header"),
        pytest.param(lambda content: b"", id="no content"),
        pytest.param(lambda content: b"PK\x03\x04" + content, id="pickled"),
        pytest.param(lambda content: struct.pack("<Q", 1 << 62) + content[8:], id="endless header"),
        pytest.param(lambda content: content + b"\0" * 64, id="more than declared"),
        pytest.param(with_header(lambda h: h[_KEY].update(shape=[1 << 40, 68])), id="shape beyond the data"),
        pytest.param(with_header(lambda h: h[_KEY].update(data_offsets=[0, 1 << 50])), id="data beyond the file"),
        pytest.param(with_header(lambda h: h[_KEY].update(dtype="F128")), id="unknown dtype"),
        pytest.param(with_header(lambda h: h[_KEY].pop("shape")), id="no shape"),
    ],
)
def test_a_damaged_file_is_refused_by_name(native: Tensors, save: Save, damage: Callable[[bytes], bytes]) -> None:
    path = save(prefixed(native, "net."))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="not a readable safetensors file") as error:
        load_dit(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_dit(tmp_path / name)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16], ids=str)
def test_weights_are_in_the_wanted_dtype_or_the_files(
    native: Tensors, save: Save, stored: torch.dtype, wanted: torch.dtype | None
) -> None:
    path = save({key: tensor.to(stored) for key, tensor in native.items()})
    for model in load_dit(path, wanted):
        assert {parameter.dtype for parameter in model.parameters()} == {wanted or stored}
    expected = native["blocks.1.mlp.layer1.weight"].to(stored).to(wanted or stored)
    assert torch.equal(load_dit(path, wanted)[0].transformer_blocks[1].ff.net[0].proj.weight, expected)


def test_models_are_ready_for_use_and_nothing_random_was_drawn(native: Tensors, save: Save) -> None:
    path = save(native)
    state = torch.random.get_rng_state()
    models = load_dit(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    for model in models:
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    norms = [module for name, module in models[0].named_modules() if name.endswith(("norm_q", "norm_k"))]
    assert [norm.eps for norm in norms] == [1e-6] * 8


def test_loaded_weights_are_not_the_files(native: Tensors, save: Save) -> None:
    path = save(native)
    models = load_dit(path)
    with path.open("r+b") as file:  # in place: a mapping of the file would see it
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\0" * size)
    for model, original in zip(models, (tiny_transformer(), tiny_conditioner()), strict=True):
        expected = original.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


MEASURE = """
import gc, json, sys, threading, time
import psutil, torch
from anima_peft.transformer import AnimaTransformerModel

process = psutil.Process()
kept, results = [], []

def private():
    # Without pages that belong to a mapped file: the system takes those back whenever it likes.
    memory = process.memory_info()
    return memory.rss - memory.shared

for path, dtype in json.loads(sys.argv[1]):
    gc.collect()
    before, peak, done = private(), 0, threading.Event()

    def watch():
        global peak
        while not done.wait(0.001):
            peak = max(peak, private() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept.append(AnimaTransformerModel.from_pretrained(path, getattr(torch, dtype)))
    done.set()
    watcher.join()
    held = sum(p.numel() * p.element_size() for p in kept[-1].parameters())
    results.append((max(peak, private() - before), held))
print(json.dumps(results))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells private memory from a mapped file's")
def test_loading_needs_hardly_more_private_memory_than_the_model(tmp_path: Path) -> None:
    weights = native_state_dict(
        build_empty(lambda: transformer_of({"num_attention_heads": 8, "attention_head_dim": 128})),
        build_empty(lambda: conditioner_of({"model_dim": 1024, "num_layers": 1})),
    )
    cases = []
    for stored, wanted in ((torch.float32, "float32"), (torch.float32, "bfloat16"), (torch.bfloat16, "float32")):
        path = tmp_path / f"{len(cases)}.safetensors"
        save_file({key: torch.zeros(tensor.shape, dtype=stored) for key, tensor in weights.items()}, path)
        cases.append((str(path), wanted))
    command = [sys.executable, "-c", MEASURE, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for (path, _), (peak, held) in zip(cases, results, strict=True):
        assert held > 50e6  # far above what a process takes and gives back by itself
        assert 0.8 * held < peak <= 1.2 * max(held, Path(path).stat().st_size)
