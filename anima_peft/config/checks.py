"""What cannot be said by a type and two bounds: checks of single values, and of options that depend on each other."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from ..adapters.targets import PRESETS
from ..errors import InputError
from ..models.hub_folders import parse_hub_folder
from .arguments import read_by_pattern
from .options import Option
from .reading import FAULTY, Faults, shown
from .schema import Found

# Windows refuses these in file names, with any suffix: learn.microsoft.com/windows/win32/fileio/naming-a-file
_REFUSED_CHARACTERS = '<>:"/\\|?*'
_DEVICE_NAMES = {"CON", "PRN", "AUX", "NUL"} | {f"{port}{n}" for port in ("COM", "LPT") for n in "123456789¹²³"}
_LONGEST_NAME = 200  # bytes; file systems take 255, and "-step00000100-state" and a suffix follow


def check_file_name(name: str) -> None:
    """A name that every file system takes.

    Raises:
        InputError: it has separators or characters that Windows refuses, is a device name, or is too long.
    """
    refused = sorted({c for c in name if c in _REFUSED_CHARACTERS or not c.isprintable()})
    if refused:
        raise InputError(f"expected a file name without {' '.join(shown(c) for c in refused)}, got {shown(name)}")
    if name != name.strip() or name.endswith("."):
        raise InputError(f"expected a file name without spaces at its ends or a dot at its end, got {shown(name)}")
    if name.split(".")[0].rstrip().upper() in _DEVICE_NAMES:
        raise InputError(f"{shown(name)} is a device on Windows; choose another name")
    if len(name.encode()) > _LONGEST_NAME:
        raise InputError(f"expected a file name of at most {_LONGEST_NAME} bytes, got {len(name.encode())}")


def check_targets(targets: tuple[str, ...]) -> None:
    """Patterns are left to the adapter, which knows the layers; a misspelt preset is caught here.

    Raises:
        InputError: a target differs from a preset in case or dashes only.
    """
    for target in targets:
        preset = target.lower().replace("_", "-").replace(" ", "-")
        if preset in PRESETS and target != preset:
            raise InputError(f'expected a preset or a pattern, got {shown(target)}; did you mean "{preset}"?')


def check_factor(factor: int) -> None:
    """A Kronecker factor is positive, or -1 for the most balanced pair."""
    if factor < 1 and factor != -1:
        raise InputError(f"expected a positive integer or -1, got {factor}")


def check_patterns(patterns: tuple[str, ...]) -> None:
    """Raises InputError where a pattern is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{shown(pattern)} is not a regular expression: {error}") from error


def check_ranks(texts: tuple[str, ...]) -> None:
    """Raises InputError for what is not `pattern=rank`."""
    read_by_pattern(texts, int)


def check_rates(texts: tuple[str, ...]) -> None:
    """Raises InputError for what is not `pattern=rate`."""
    read_by_pattern(texts, float)


def check_warmup(steps: float) -> None:
    """Raises InputError for a fractional number of steps; a fraction below 1 is a share of the run."""
    if isinstance(steps, float) and steps >= 1:
        raise InputError(f"expected an integer number of steps or a share below 1, got {shown(steps)}")


def check_cached(cached: bool) -> None:
    """Raises InputError where caches are wanted in memory only."""
    if not cached:
        raise InputError("false is not supported in this version: what is cached is always on disk; remove it")


def check_effects(options: Iterable[Option], found: Mapping[str, Found], faults: Faults) -> None:
    """Report every option that was set away from its default and has no effect in this run."""
    by_name = {option.name: option for option in options}
    for option in by_name.values():
        given = found.get(option.name)
        if given is not None and given.value is not FAULTY and given.value != option.default:
            text = missing_effect(option, by_name, found)
            if text:
                faults.add(given.path, text)


def missing_effect(option: Option, options: Mapping[str, Option], found: Mapping[str, Found]) -> str:
    """Why an option has no effect in this run, or nothing where it has one."""
    for needs in option.rules.only_with:
        value = value_of(options[needs.option], found)
        if value is FAULTY or needs.met_by(value):
            continue
        cause = f"without {needs.option}" if value is None else f"with {needs.option} = {shown(value)}"
        only = f"; it needs {' or '.join(shown(wanted) for wanted in needs.values)}" if needs.values else ""
        return f"has no effect {cause}{only}; {needs.hint or 'remove it'}"
    return ""


def value_of(option: Option, found: Mapping[str, Found]) -> Any:
    """What an option is in this run: what was given, else its default; FAULTY where its fault is reported."""
    return found[option.name].value if option.name in found else option.default


def check_required(options: Iterable[Option], found: Container[str], faults: Faults) -> None:
    """Report every required option that was not given."""
    for option in options:
        if option.required and option.name not in found:
            faults.add(option.name, f"required, but not given. {option.rules.help}")


def check_network(options: Mapping[str, Option], found: Mapping[str, Found], faults: Faults) -> None:
    """Report LoKr's sentinel where it means nothing: on a LoRA it would ask for hundreds of gigabytes as a rank."""
    dim, module = value_of(options["network_dim"], found), value_of(options["network_module"], found)
    if not isinstance(dim, int) or dim < 100_000:
        return
    if module == "networks.lora_anima":
        path = found["network_dim"].path
        faults.add(path, f"{dim} stands for full matrices in LoKr; a LoRA's rank is usually 4 to 128")
    elif value_of(options["lokr_decompose_both"], found) is True:
        path = found["lokr_decompose_both"].path
        faults.add(path, f"has no effect with network_dim = {dim}, which makes both factors full; remove it")


def check_model_parts(options: Mapping[str, Option], found: Mapping[str, Found], faults: Faults) -> None:
    """Report the parts that a model in single files needs and that were not given."""

    def is_single_file(name: str) -> bool:
        value = value_of(options[name], found)
        return isinstance(value, str) and value.lower().endswith(".safetensors")

    if not is_single_file("anima_transformer"):
        return  # a folder or repo brings all parts
    needed = ["vae", "qwen"]
    needed += ["t5_tokenizer_dir"] * (value_of(options["auto_download_t5_tokenizer"], found) is False)
    if is_single_file("qwen") and value_of(options["auto_download_qwen_tokenizer"], found) is False:
        needed.append("qwen_tokenizer_dir")
    for part in needed:
        if value_of(options[part], found) is None:
            cause = found["qwen" if part == "qwen_tokenizer_dir" else "anima_transformer"].path
            faults.add(part, f"required, because {cause} is a single file. {options[part].rules.help}")


def check_hub_places(options: Mapping[str, Option], found: Mapping[str, Found], faults: Faults) -> None:
    """Report what says where in a repo to look, where the repo's address says so already."""
    groups = {
        "t5_tokenizer_repo_id": ("t5_tokenizer_subfolder",),
        "t5_tokenizer_modelscope_repo_id": ("t5_tokenizer_modelscope_revision", "t5_tokenizer_modelscope_subfolder"),
    }
    for repo, places in groups.items():
        address = value_of(options[repo], found)
        if address is FAULTY or not parse_hub_folder(address).names_folder:
            continue
        for place in places:
            if place in found and found[place].value not in (FAULTY, options[place].default):
                faults.add(
                    found[place].path, f"has no effect: the address in {found[repo].path} names a folder; remove it"
                )
