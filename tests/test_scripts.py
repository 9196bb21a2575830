"""The scripts and commands as a user runs them, as processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import anima_peft
from anima_peft.adapters.naming import ModuleTable
from anima_peft.adapters.targets import select_targets
from anima_peft.cli import FAULTY_INPUT, main
from anima_peft.miniature import MiniatureFiles
from anima_peft.models.sources import resolve_sources

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]

TRAIN_ARGS = """
{model}
network_module = "networks.lora_anima"
network_dim = 32
network_alpha = 16
learning_rate = 1e-2
max_train_steps = 200
mixed_precision = "no"
output_dir = '{folder}/输出 out'
output_name = "learned"
save_every_n_steps = 100
{more}
"""
DATASET = """
[[datasets]]
resolution = 64
batch_size = 6
[[datasets.subsets]]
image_dir = '{folder}/pictures'
"""


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    environment.pop("PYTHONWARNINGS", None)
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
    )


@pytest.fixture
def folder(miniature: MiniatureFiles, tmp_path: Path) -> Path:
    """A working folder with six pictures to learn by heart, and its dataset TOML."""
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        for suffix in (".png", ".txt"):
            shutil.copy(miniature.pictures / f"{number:02d}{suffix}", tmp_path / "pictures")
    (tmp_path / "dataset.toml").write_text(DATASET.format(folder=tmp_path), encoding="utf-8")
    return tmp_path


def single_files(miniature: MiniatureFiles) -> dict[str, Path]:
    return {
        "anima_transformer": miniature.transformer,
        "vae": miniature.vae,
        "qwen": miniature.text_encoder,
        "qwen_tokenizer_dir": miniature.tokenizer,
        "t5_tokenizer_dir": miniature.t5_tokenizer,
    }


@pytest.fixture(scope="session")
def diffusers_folder(miniature: MiniatureFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "Anima 模型"
    sources = resolve_sources(**single_files(miniature))  # type: ignore[arg-type]
    anima_peft.AnimaPipeline.from_sources(sources).save_pretrained(folder)
    return folder


def write_train_args(folder: Path, model: dict[str, Path], more: str = "") -> Path:
    lines = "\n".join(f"{option} = '{path}'" for option, path in model.items())
    path = folder / "train args.toml"
    path.write_text(TRAIN_ARGS.format(model=lines, folder=folder, more=more), encoding="utf-8")
    return path


def check_learned(folder: Path, model_path: Path) -> None:
    """Everything that must hold of a finished run."""
    output = folder / "输出 out"
    (log_folder,) = (output / "logs").iterdir()
    losses = [event.value for event in EventAccumulator(str(log_folder)).Reload().Scalars("loss")]
    assert len(losses) == 200
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])

    tensors = load_file(output / "learned.safetensors")
    base = anima_peft.AnimaTransformerModel.from_pretrained(model_path, torch_dtype=torch.float32)
    table = ModuleTable(base.components)
    parts = (".lora_down.weight", ".lora_up.weight", ".alpha")
    targets = select_targets(table, "attn-mlp")
    norms = [name for name in table.norms if name.component == "transformer"]
    expected = {name.kohya + part for name in targets for part in parts}
    assert tensors.keys() == expected | {f"{name.kohya}.w_norm" for name in norms}
    halfway = load_file(output / "learned-step00000100.safetensors")
    ups = [key for key in tensors if key.endswith("lora_up.weight")]
    assert all(tensors[key].norm() > 0 for key in ups), "a layer has not moved from its start at zero"
    assert all(not torch.equal(tensors[key], halfway[key]) for key in ups)

    inputs = (torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.8]), torch.randn(2, 512, 64))
    with torch.no_grad():
        before = base(*inputs)
        name = base.load_lora_adapter(output / "learned.safetensors")
        adapted = base(*inputs)
        base.delete_adapters(name)
        assert torch.equal(base(*inputs), before)
        # The same by hand: the deltas added to the weights of a plain model.
        for target in targets:
            down, up, alpha = (tensors[target.kohya + part] for part in parts)
            delta = up.double() @ down.double() * alpha.double() / len(down)
            base.components[target.component].get_submodule(target.path).weight += delta
        for norm in norms:
            base.components[norm.component].get_submodule(norm.path).weight += tensors[f"{norm.kohya}.w_norm"]
        torch.testing.assert_close(adapted, base(*inputs), atol=1e-5, rtol=1e-5)
    assert (adapted - before).norm() > 0.05 * before.norm()


def test_accelerate_launch_on_single_files(folder: Path, miniature: MiniatureFiles) -> None:
    more = 'compare_prompts = ["one red circle --w 64 --h 64 --s 2 --l 1 --d 1"]'
    train_args = write_train_args(folder, single_files(miniature), more)
    script = ROOT / "examples" / "train_anima_lora.py"
    done = run(*LAUNCH, script, "--config_file", train_args, "--dataset_config", folder / "dataset.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "learned.safetensors" in done.stdout
    check_learned(folder, miniature.transformer)
    pictures = {path.name for path in (folder / "输出 out").glob("*.png")}
    assert pictures == {"learned-01-without.png", "learned-01-with.png", "learned-comparison.png"}
    without, with_adapter = (
        (folder / "输出 out" / f"learned-01-{which}.png").read_bytes() for which in ("without", "with")
    )
    assert without != with_adapter


@pytest.mark.slow
def test_anima_peft_train_on_a_diffusers_folder(folder: Path, diffusers_folder: Path) -> None:
    train_args = write_train_args(folder, {"pretrained_model_name_or_path": diffusers_folder})
    command = [sys.executable, "-m", "anima_peft.cli", "train"]
    done = run(*command, "--config_file", train_args, "--dataset_config", folder / "dataset.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    check_learned(folder, diffusers_folder)


def test_the_older_launcher_reports_faults_once(folder: Path, miniature: MiniatureFiles) -> None:
    train_args = write_train_args(folder, single_files(miniature) | {"vae": folder / "no such vae.safetensors"})
    script = ROOT / "anima_train_network.py"
    done = run(*LAUNCH, script, "--config_file", train_args, "--dataset_config", folder / "dataset.toml", cwd=folder)
    assert done.returncode != 0
    assert done.stderr.count("no such vae.safetensors") == 1
    assert not (folder / "输出 out").exists()


def without_conditioner(miniature: MiniatureFiles, folder: Path) -> Path:
    from safetensors.torch import save_file

    tensors = {k: v for k, v in load_file(miniature.transformer).items() if "llm_adapter" not in k}
    save_file(tensors, folder / "plain.safetensors")
    return folder / "plain.safetensors"


FAULTS = {
    "no such DiT": ("anima_transformer", lambda m, f: f / "gone.safetensors", "gone.safetensors"),
    "no such VAE": ("vae", lambda m, f: f / "gone.safetensors", "vae: no such file or folder"),
    "no such Qwen": ("qwen", lambda m, f: f / "gone.safetensors", "qwen: no such file or folder"),
    "no such tokenizer": ("t5_tokenizer_dir", lambda m, f: f / "gone", "gone holds no T5 tokenizer"),
    "a tokenizer folder without files": ("t5_tokenizer_dir", lambda m, f: f / "empty", "HF_HUB_OFFLINE is set"),
    "a DiT without conditioner": ("anima_transformer", without_conditioner, "llm_adapter"),
    "the VAE as the DiT": ("anima_transformer", lambda m, f: m.vae, "looks like a VAE"),
    "the DiT as the VAE": ("vae", lambda m, f: m.transformer, "not the Qwen-Image VAE"),
    "the VAE as Qwen": ("qwen", lambda m, f: m.vae, "not a Qwen3 text encoder"),
    "a picture as the DiT": (
        "anima_transformer",
        lambda m, f: m.pictures / "00.png",
        "not a readable safetensors file",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_wrong_model_files_are_one_clear_report(
    case: str, folder: Path, miniature: MiniatureFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    option, make, message = FAULTS[case]
    (folder / "empty").mkdir()
    train_args = write_train_args(folder, single_files(miniature) | {option: make(miniature, folder)})
    code = main(["train", "--config_file", str(train_args), "--dataset_config", str(folder / "dataset.toml")])
    assert code == FAULTY_INPUT
    assert message in capsys.readouterr().err
    assert not (folder / "输出 out").exists()


@pytest.mark.parametrize("case", ["no folder", "no pictures", "unreadable picture"])
def test_wrong_pictures_are_one_clear_report(
    case: str, folder: Path, miniature: MiniatureFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = folder / "pictures"
    if case == "unreadable picture":
        (pictures / "00.png").write_bytes((pictures / "00.png").read_bytes()[:100])
        (pictures / "01.png").write_bytes(b"no picture")
    else:
        shutil.rmtree(pictures)
        if case == "no pictures":
            pictures.mkdir()
    train_args = write_train_args(folder, single_files(miniature))
    code = main(["train", "--config_file", str(train_args), "--dataset_config", str(folder / "dataset.toml")])
    errors = capsys.readouterr().err
    assert code == FAULTY_INPUT
    assert str(pictures) in errors
    if case == "unreadable picture":
        assert "00.png" in errors
        assert "01.png" in errors
    assert not (folder / "输出 out").exists()
    assert not (pictures / ".anima_cache").exists()


def test_generate_draws_and_compares(miniature: MiniatureFiles, folder: Path, tmp_path: Path) -> None:
    model = anima_peft.AnimaTransformerModel.from_pretrained(miniature.transformer)
    parameters = model.add_adapter(anima_peft.LoraConfig(r=2, lora_alpha=2))
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.3)
    adapter = model.save_lora_adapter(tmp_path / "some=adapter.safetensors")
    words = ["generate", "--prompt", "红色 circle", "--prompt", "two blue squares", "--seed", "1", "2", "--steps", "2"]
    words += ["--width", "64", "--height", "64", "--guidance_scale", "1", "--output_dir", str(tmp_path / "drawn")]
    words += [word for option, path in single_files(miniature).items() for word in (f"--{option}", str(path))]
    assert main([*words, "--adapter", f"{adapter}=0.5", "--adapter", str(adapter), "--compare"]) == 0
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    rows = [f"{number:03d}-{which}.png" for number in range(1, 5) for which in ("with", "without")]
    assert names == [*rows, "grid.png"]
    assert len({(tmp_path / "drawn" / name).read_bytes() for name in rows}) == 8
    words[words.index("--output_dir") + 1] = str(tmp_path / "plain")
    assert main(words) == 0
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        *(f"{number:03d}.png" for number in range(1, 5)),
        "grid.png",
    ]


def test_generate_finds_faults_in_adapters_before_it_draws(
    miniature: MiniatureFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--prompt", "x", "--width", "64", "--height", "64", "--output_dir", str(tmp_path / "drawn")]
    words += [word for option, path in single_files(miniature).items() for word in (f"--{option}", str(path))]
    assert main([*words, "--compare", "--adapter", str(miniature.vae)]) == FAULTY_INPUT
    assert "not loaded, nothing was changed" in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


def test_float16_keeps_what_overflows_in_float32(miniature: MiniatureFiles, diffusers_folder: Path) -> None:
    sources = resolve_sources(**single_files(miniature))  # type: ignore[arg-type]
    for pipe in (
        anima_peft.AnimaPipeline.from_sources(sources, torch.float16),
        anima_peft.AnimaPipeline.from_pretrained(diffusers_folder, torch_dtype=torch.float16),
    ):
        assert (pipe.transformer.dtype, pipe.text_conditioner.dtype) == (torch.float16, torch.float16)
        assert (pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.float32, torch.float32)
        seen: list[torch.dtype] = []
        block = pipe.transformer.transformer_blocks[0]
        block.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.dtype))
        pipe("x", width=64, height=64, num_inference_steps=1, output_type="latent")
        assert set(seen) == {torch.float32}


def test_generate_overwrites_nothing(
    miniature: MiniatureFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.png").write_bytes(b"mine")
    words = ["generate", "--prompt", "x", "--model", str(miniature.transformer), "--output_dir", str(tmp_path)]
    assert main(words) == FAULTY_INPUT
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "grid.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "x.safetensors=strong"], "no number"),
        (["--compare"], "--compare has no effect"),
        (["--t5_tokenizer_dir", "gone"], "t5_tokenizer_dir: gone holds no T5 tokenizer"),
        (["--t5_tokenizer_dir", "gone", "--no-auto_download_t5_tokenizer"], "no such file or folder: gone"),
        (["--qwen_tokenizer_dir", "gone", "--no-auto_download_qwen_tokenizer"], "no such file or folder: gone"),
        (["--device", "abacus"], "--device abacus: cannot be used here"),
        (["--device", "cpu", "--offload"], "--offload has no effect on the CPU"),
        (["--device", "cpu", "--attn_mode", "sage"], 'attn_mode: "sage" cannot be had: it needs a CUDA device'),
        (["--adapter", "gone.safetensors"], "gone.safetensors"),
        (["--adapter", "gone.safetensors", "--vae", "nowhere"], "gone.safetensors: no such adapter file"),
        (["--device", "abacus", "--vae", "nowhere"], "--device abacus: cannot be used here"),
        (["--width", "100", "--vae", "nowhere"], "--width 100: expected a multiple of 16"),
        (["--height", "0", "--vae", "nowhere"], "--height 0: expected a multiple of 16"),
        (["--steps", "0", "--vae", "nowhere"], "--steps 0: expected at least 1"),
        (["--guidance_scale", "nan", "--vae", "nowhere"], "--guidance_scale nan: expected a finite number"),
        (["--flow_shift", "0"], "--flow_shift 0.0: expected a finite number above zero"),
        (["--seed", "1", str(2**64)], f"--seed {2**64}: expected less than 2**64"),
        (["--adapter", "x=inf", "--vae", "nowhere"], "--adapter x=inf: expected a finite strength"),
    ],
)
def test_generate_refuses(
    words: list[str], message: str, miniature: MiniatureFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [word for option, path in single_files(miniature).items() for word in (f"--{option}", str(path))]
    output = tmp_path / "drawn"
    assert main(["generate", *model, "--prompt", "x", "--output_dir", str(output), *words]) == FAULTY_INPUT
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_the_miniature_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["miniature", str(tmp_path / "small")]) == 0
    assert all(Path(line).exists() for line in capsys.readouterr().out.split("\n") if line)
    assert main(["miniature", str(tmp_path / "small")]) == FAULTY_INPUT
    assert main(["miniature", str(tmp_path / "small"), "--overwrite"]) == 0
