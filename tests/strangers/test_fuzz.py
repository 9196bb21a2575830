"""Ten minutes of random input: no error but the documented ones, nothing that hangs, no memory beyond reason."""

from __future__ import annotations

import contextlib
import io
import json
import random
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from anima_peft.adapters.inspection import as_json, as_text, inspect_adapter
from anima_peft.adapters.naming import ModuleTable
from anima_peft.config import load
from anima_peft.config.dataset_options import BatchKeys, DatasetKeys, PlaceKeys, SubsetKeys
from anima_peft.config.loading import OPTIONS
from anima_peft.config.network import ARGUMENT_LISTS
from anima_peft.config.options import options_of
from anima_peft.config.prompt_files import read_prompts
from anima_peft.config.prompts import parse_prompt_line, prompt_text
from anima_peft.data import CaptionSpec, FileIndex, TensorCache, cache_key
from anima_peft.data.caption_choice import process_caption
from anima_peft.data.captions import read_caption, read_metadata
from anima_peft.data.pixels import DECODE_ERRORS, decode_alpha, decode_rgb, look_over
from anima_peft.errors import InputError
from anima_peft.miniature import MiniatureFiles
from anima_peft.models.encoders import load_text_encoder, load_vae
from anima_peft.models.folders import check_part
from anima_peft.texts import escaped
from anima_peft.transformer import AnimaTransformerModel
from tests.adapters.adapting import diffusers_stem, factors_of_kind, kohya_stem, table, tensors_by_key, tiny_model
from tests.config.conftest import TRAIN_ARGS

from .fuzzing import fuzz, json_values, mutated, texts
from .hostile import picture

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.timeout(0),  # of the whole; each input has its own
    pytest.mark.filterwarnings("ignore"),  # libraries warn of what they see
]
MOST_MEMORY = 6 * 2**30
_LONGEST_MESSAGE = 20_000


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """What wants more is told that there is none, which no test here takes for an answer."""
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc").exists() else 0
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, before[1]) if used else before)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def faults_are_told() -> Iterator[None]:
    """Lets through what the documentation says, in a message of bounded length."""
    told: list[InputError] = []
    try:
        yield
    except InputError as error:
        told.append(error)
    assert all(0 < len(str(error)) < _LONGEST_MESSAGE for error in told)


# ---- adapters


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


# ---- models


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


# ---- configurations

_DATASET_KEYS = (DatasetKeys, BatchKeys, SubsetKeys, PlaceKeys)
NAMES = st.sampled_from(
    [*OPTIONS, *ARGUMENT_LISTS, *(option.name for keys in _DATASET_KEYS for option in options_of(keys)), "general"]
)


def toml_text(value: object) -> str:
    """A value as TOML writes it; what TOML lacks as something near."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return '""'
    if isinstance(value, str):
        return json.dumps(value.encode("utf-8", "replace").decode(), ensure_ascii=True).replace("\\/", "/")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_text(key)} = {toml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    return repr(value)


TABLES = st.dictionaries(NAMES | texts, json_values | st.lists(texts, max_size=3), max_size=6)
HEADS = "[[datasets]]\n", "[[datasets.subsets]]\nimage_dir = 'p'\n", "[general]\n", "[a]\n", ""


def lines_of(found: Mapping[str, object]) -> str:
    return "".join(f"{toml_text(key)} = {toml_text(value)}\n" for key, value in found.items())


def test_configurations(tmp_path: Path) -> None:
    train, dataset = tmp_path / "train.toml", tmp_path / "dataset.toml"
    valid = lines_of(TRAIN_ARGS)
    shipped = (Path(__file__).parents[2] / "configs").rglob("*.toml")
    texts_of_files = (
        valid,
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'p'\n",
        *(f.read_text("utf-8") for f in shipped),
    )
    originals = tuple(text.encode() for text in texts_of_files)
    built = st.lists(st.tuples(st.sampled_from(HEADS), TABLES), max_size=3).map(
        lambda parts: "".join(head + lines_of(found) for head, found in parts).encode()
    )
    merged = TABLES.map(lambda found: lines_of({**TRAIN_ARGS, **found}).encode())
    files = st.tuples(merged | built | mutated(originals), built | mutated(originals) | st.just(originals[1]))

    def check(case: tuple[bytes, bytes]) -> None:
        train.write_bytes(case[0])
        dataset.write_bytes(case[1])
        with faults_are_told():
            load(["--config_file", str(train), "--dataset_config", str(dataset)])

    fuzz(files, check)


def test_command_lines() -> None:
    flags = st.builds("--{}".format, NAMES) | st.just("--no-xformers") | texts
    words = st.lists(flags | texts | st.integers().map(str) | st.floats().map(str), max_size=8)

    def check(argv: list[str]) -> None:
        if any(word in ("-h", "--help") for word in argv):
            return
        with faults_are_told(), contextlib.redirect_stderr(io.StringIO()):
            load(argv)

    fuzz(words, check)


def test_prompts(tmp_path: Path) -> None:
    line = st.builds(" ".join, st.lists(st.sampled_from(("--w", "--h", "--d", "--s", "--l", "--n", "--fs")) | texts))
    entry = st.dictionaries(st.sampled_from(("prompt", "width", "seed", "scale", "flow_shift", "x")), json_values)
    as_txt = st.tuples(st.just(".txt"), st.lists(line | texts).map(lambda lines: "\n".join(lines)))
    as_json_text = st.tuples(st.just(".json"), (st.lists(entry) | json_values).map(json.dumps))
    as_toml = st.tuples(
        st.just(".toml"),
        st.lists(entry).map(lambda all_of: "".join("[[prompt.subset]]\n" + lines_of(e) for e in all_of)),
    )

    def check(case: tuple[str, str]) -> None:
        path = tmp_path / f"p{case[0]}"
        path.write_bytes(case[1].encode("utf-8", "surrogatepass"))
        with faults_are_told():
            for prompt in read_prompts(path):
                prompt.prompt.encode()
                assert parse_prompt_line(prompt_text(prompt) or "--s 30") == prompt or not prompt.prompt

    fuzz(as_txt | as_json_text | as_toml, check)


# ---- pictures and captions


def test_headers_of_pictures() -> None:
    forms: list[bytes] = [
        picture(form, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
        for form in ("PNG", "JPEG", "WEBP")
    ]
    forms += [
        picture("BMP"),
        picture("GIF", frames=2),
        picture(frames=2),
        picture("WEBP", frames=2),
        picture("MPO", frames=2),
    ]
    with contextlib.suppress(KeyError, OSError, ValueError):
        forms.append(picture("AVIF"))

    def check(data: bytes) -> None:
        try:
            look = look_over(data)
        except DECODE_ERRORS:
            return
        # What was looked over is decoded as well, as the same.
        assert decode_rgb(data).size == look.size
        alpha = decode_alpha(data)
        assert alpha is None or alpha.size == look.size

    known = [picture("GIF")[:-1] + b"!", *(form[:-40] + bytes(40) for form in forms[-1:])]  # GIF, and AVIF if there is
    fuzz(mutated(tuple(forms)), check, known)


SPECS = st.builds(
    CaptionSpec,
    caption_prefix=st.none() | texts,
    caption_suffix=st.none() | texts,
    caption_dropout_rate=st.floats(0, 1),
    caption_dropout_every_n_epochs=st.integers(0, 3),
    enable_wildcard=st.booleans(),
    caption_separator=texts.filter(bool),
    shuffle_caption=st.booleans(),
    caption_tag_dropout_rate=st.floats(0, 1),
    token_warmup_step=st.integers(0, 20) | st.floats(0, 0.99),
    token_warmup_min=st.integers(0, 5),
    keep_tokens=st.integers(0, 5),
    keep_tokens_separator=st.none() | texts,
    secondary_separator=st.none() | texts,
)


def test_captions(tmp_path: Path) -> None:
    encodings = st.sampled_from(("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030", "shift-jis", "latin-1"))
    encoded = st.builds(lambda text, name: text.encode(name, "ignore"), texts | st.text(), encodings)
    path = tmp_path / "a.txt"

    def check(case: tuple[bytes, CaptionSpec, int]) -> None:
        data, spec, seed = case
        path.write_bytes(data)
        with faults_are_told():
            text = read_caption(path)
            assert text is not None
            text.encode()
            assert "\0" not in text
            made = [
                process_caption(text, spec, random.Random(seed), epoch=1, step=step, total_steps=9)
                for step in (0, 4, 9)
            ]
            assert made == [
                process_caption(text, spec, random.Random(seed), epoch=1, step=step, total_steps=9)
                for step in (0, 4, 9)
            ]

    fuzz(st.tuples(encoded | st.binary(max_size=80), SPECS, st.integers(0, 9)), check)


def test_metadata_files(tmp_path: Path) -> None:
    keys = st.sampled_from(("caption", "tags", "text", "image_path", "file_name", "x"))
    entries = st.dictionaries(keys, json_values | st.lists(texts), max_size=4)
    document = st.dictionaries(texts, entries | json_values, max_size=4) | json_values
    lines = st.lists(entries | json_values, max_size=4).map(lambda found: "\n".join(map(json.dumps, found)))
    files = st.tuples(st.just("m.json"), document.map(json.dumps)) | st.tuples(st.just("m.jsonl"), lines | texts)

    def check(case: tuple[str, str]) -> None:
        path = tmp_path / case[0]
        path.write_bytes(case[1].encode("utf-8", "surrogatepass"))
        with faults_are_told():
            for entry in read_metadata(path):
                for text in (entry.caption, entry.tags, entry.text(CaptionSpec())):
                    assert text is None or text.encode() is not None

    fuzz(files, check)


# ---- caches


def test_caches(tmp_path: Path) -> None:
    cache, key = TensorCache(tmp_path, "latents"), cache_key(a=1)
    tensors = {"latents": torch.randn(2, 4, 4), "ids": torch.arange(5)}
    path = cache.write(key, tensors)
    entry = path.read_bytes()
    picture_file, index = tmp_path / "a.png", tmp_path / "cache" / "index.json"
    picture_file.write_bytes(b"x")
    facts = FileIndex(index.parent)
    facts.hash(picture_file)
    facts.save()
    indexes = (index.read_bytes(), json.dumps({"version": 1, "files": {string.ascii_letters: {}}}).encode())

    def check(case: tuple[bytes, bytes]) -> None:
        path.write_bytes(case[0])
        try:
            found = cache.read(key)
        except InputError:
            # Refused, and made anew by the next run.
            assert not cache.contains(key)
            cache.write(key, tensors)
            found = cache.read(key)
        assert cache.contains(key)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        index.write_bytes(case[1])
        known = FileIndex(index.parent).known(picture_file)
        assert known is None or len(known.sha256) == 64

    fuzz(st.tuples(mutated((entry,)), mutated(indexes) | json_values.map(lambda v: json.dumps(v).encode())), check)
