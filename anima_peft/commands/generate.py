"""`anima-peft generate`: prompts and seeds, with any adapters, to pictures and a labelled grid."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.sources import locate_adapter
from ..errors import InputError
from ..files import require_writable
from ..generation import Request, draw, labelled_grid, save_picture
from ..models.sources import resolve_sources
from ..models.tokenizers import QWEN, T5
from ..pipeline import AnimaPipeline
from ..training.attention import require_attention, use_backend
from .parts import DTYPES, adapter_and_strength, command_parser, device_of

_MULTIPLE = 16  # pixels along each side that one token of the DiT covers
_SEEDS = range(-(2**63), 2**64)  # torch's


def run(argv: Sequence[str]) -> None:
    """Draw what the flags ask for, and print the files: the pictures, then `grid.png`.

    Raises:
        InputError: the model or an adapter cannot be loaded, a size is wrong, or a picture would be overwritten.
    """
    arguments = _parser().parse_args(argv)
    adapters = [adapter_and_strength(text, "--adapter") for text in arguments.adapter]
    if arguments.compare and not adapters:
        raise InputError("--compare has no effect without --adapter.")
    requests = _requests(arguments)
    _require_sound(requests[0], arguments.seed, adapters)
    columns = ["without", "with adapters"] if arguments.compare else ["with adapters" if adapters else "pictures"]
    folder: Path = arguments.output_dir.expanduser()
    files = _files(folder, len(requests), columns)
    taken = [path for row in files for path in row if path.exists()]
    if taken and not arguments.overwrite:
        raise InputError(f"{taken[0]} exists already; choose another --output_dir or add --overwrite.")
    require_writable("--output_dir", folder)
    located = [locate_adapter(file) for file, _ in adapters]  # before a model is fetched or read
    pipe = _pipeline(arguments)
    for number, path in enumerate(located):  # all, so that a fault in a file is found before anything is drawn
        pipe.load_lora_weights(path, adapter_name=f"adapter_{number}")
    if adapters:
        pipe.set_adapters([f"adapter_{n}" for n in range(len(adapters))], [strength for _, strength in adapters])
    drawn: list[list[Any]] = []
    for request, paths in zip(requests, files, strict=False):  # the last row of files is the grid
        row = []
        for path, with_adapters in zip(paths, [False, True] if arguments.compare else [True], strict=True):
            if adapters:
                pipe.enable_lora() if with_adapters else pipe.disable_lora()
            row.append(draw(pipe, request))
            save_picture(row[-1], path)
            print(path)
        drawn.append(row)
    labels = [f"seed {request.seed}: {request.prompt}" for request in requests]
    grid = files[-1][0]
    save_picture(labelled_grid(drawn, labels, columns), grid)
    print(grid)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "generate",
        "Draw one picture for every prompt and seed, and a labelled grid of them all.",
        'anima-peft generate --model Anima-Base-v1.0-Diffusers --prompt "1girl, solo" --output_dir pictures',
        "anima-peft generate --anima_transformer anima.safetensors --vae qwen_image_vae.safetensors \\\n"
        "    --qwen qwen_3_06b_base.safetensors --qwen_tokenizer_dir qwen --t5_tokenizer_dir t5 \\\n"
        '    --prompt "1girl, solo" --seed 1 2 3 --adapter style.safetensors=0.8 --compare --output_dir pictures',
    )
    _add_model_options(parser)
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[=STRENGTH]",
        help="adapter file and its strength (default 1.0); may be repeated",
    )
    adapters.add_argument("--compare", action="store_true", help="draw every picture without the adapters as well")
    picture = parser.add_argument_group("pictures")
    picture.add_argument("--prompt", action="append", required=True, help="may be repeated")
    picture.add_argument("--negative_prompt", default="", help="for all prompts")
    picture.add_argument("--seed", type=int, nargs="+", default=[0], help="one picture for each (default 0)")
    picture.add_argument("--width", type=int, default=1024, help="pixels, a multiple of 16 (default 1024)")
    picture.add_argument("--height", type=int, default=1024, help="pixels, a multiple of 16 (default 1024)")
    picture.add_argument("--steps", type=int, default=30, help="default 30")
    picture.add_argument("--guidance_scale", type=float, default=4.0, help="1 turns guidance off (default 4)")
    picture.add_argument("--flow_shift", type=float, help="shift of the noise schedule (default 3)")
    picture.add_argument("--output_dir", type=Path, required=True, help="folder for the pictures; made if missing")
    picture.add_argument("--overwrite", action="store_true", help="replace pictures that are there already")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--anima_transformer",
        "--model",
        required=True,
        metavar="PATH",
        help="single file with DiT and conditioner, diffusers folder, or hub repo id",
    )
    for option, text in (
        ("--vae", "VAE file or folder"),
        ("--qwen", "Qwen3 file or folder"),
        ("--qwen_tokenizer_dir", "folder of Qwen's tokenizer"),
        ("--t5_tokenizer_dir", "folder of the T5 tokenizer"),
    ):
        model.add_argument(option, metavar="PATH", help=f"{text}; a diffusers folder brings its own")
    for kind in (QWEN, T5):
        model.add_argument(
            f"--auto_download_{kind.option.removesuffix('_dir')}",
            action=argparse.BooleanOptionalAction,
            default=True,
            help=f"fetch what {kind.option} lacks from Hugging Face or ModelScope (default: on)",
        )
    model.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    model.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a graphics card, fp32 on the CPU")
    model.add_argument(
        "--attn_mode",
        choices=("torch", "flash", "xformers", "sage"),
        default="torch",
        help="attention kernels of the transformer; all but torch need a graphics card and a package (default torch)",
    )
    model.add_argument(
        "--offload", action="store_true", help="keep on the graphics card only the part at work, and decode in tiles"
    )


def _requests(arguments: argparse.Namespace) -> list[Request]:
    return [
        Request(
            prompt=prompt,
            negative_prompt=arguments.negative_prompt,
            width=arguments.width,
            height=arguments.height,
            seed=seed,
            steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            flow_shift=arguments.flow_shift,
        )
        for prompt in arguments.prompt
        for seed in arguments.seed
    ]


def _require_sound(request: Request, seeds: Sequence[int], adapters: Sequence[tuple[str, float]]) -> None:
    """Refuse numbers that nothing can be drawn with, before a model is fetched or read.

    Args:
        request: any of them; they differ in prompt and seed.
        seeds: all.
        adapters: files and strengths.
    """
    faults = [
        f"--{name} {side}: expected a multiple of {_MULTIPLE}"
        for name, side in (("width", request.width), ("height", request.height))
        if side < _MULTIPLE or side % _MULTIPLE
    ]
    if request.steps < 1:
        faults.append(f"--steps {request.steps}: expected at least 1")
    if not math.isfinite(request.guidance_scale):
        faults.append(f"--guidance_scale {request.guidance_scale}: expected a finite number; 1 turns guidance off")
    if request.flow_shift is not None and not 0 < request.flow_shift < math.inf:
        faults.append(f"--flow_shift {request.flow_shift}: expected a finite number above zero")
    faults += [f"--seed {seed}: expected less than 2**64" for seed in seeds if seed not in _SEEDS]
    faults += [
        f"--adapter {file}={number}: expected a finite strength"
        for file, number in adapters
        if not math.isfinite(number)
    ]
    if faults:
        raise InputError.from_faults("These pictures cannot be drawn:", faults)


def _files(folder: Path, requests: int, columns: Sequence[str]) -> list[list[Path]]:
    """A file for every picture, row by row, and last the grid's."""
    names = [f"-{column.split()[0]}" for column in columns] if len(columns) > 1 else [""]
    rows = [[folder / f"{number:03d}{name}.png" for name in names] for number in range(1, requests + 1)]
    return [*rows, [folder / "grid.png"]]


def _pipeline(arguments: argparse.Namespace) -> AnimaPipeline:
    device = device_of(arguments.device)
    if arguments.offload and device.type == "cpu":
        raise InputError("--offload has no effect on the CPU: it frees a graphics card's memory.")
    dtype = DTYPES[arguments.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    require_attention(arguments.attn_mode, device, dtype)
    sources = resolve_sources(  # last: it may fetch a model
        arguments.anima_transformer,
        vae=arguments.vae,
        qwen=arguments.qwen,
        qwen_tokenizer_dir=arguments.qwen_tokenizer_dir,
        t5_tokenizer_dir=arguments.t5_tokenizer_dir,
        qwen_tokenizer_sources=QWEN.sources if arguments.auto_download_qwen_tokenizer else (),
        t5_tokenizer_sources=T5.sources if arguments.auto_download_t5_tokenizer else (),
    )
    pipe = AnimaPipeline.from_sources(sources, torch_dtype=dtype)
    use_backend(pipe.transformer, pipe.text_conditioner, arguments.attn_mode)
    if arguments.offload:
        pipe.enable_vae_tiling()
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)
