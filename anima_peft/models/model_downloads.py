"""Fetching the model itself into a folder: resumed where it broke off, checked, and nothing overwritten."""

from __future__ import annotations

import errno
import glob
import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants

from ..errors import InputError
from .folders import FILE_TYPES, INDEXES, PARTS
from .hub_access import NotFetchedError, fetch_listed, is_listed, list_repo, quiet
from .hub_errors import HUGGING_FACE_ERRORS, cause
from .hub_folders import Hub, HubFolder

logger = logging.getLogger(__name__)

CHECKPOINT = "anima-base-v1.0.safetensors"
SINGLE_FILES_REPO = "circlestone-labs/Anima"  # of the same name on both hubs
DIFFUSERS_REPO = "circlestone-labs/Anima-Base-v1.0-Diffusers"

_STAGING = ".anima_download"
"""Folder in the target's, in which files grow. It stays after a failure, so that the next attempt goes on."""

Choice = Callable[[Collection[str]], Mapping[str, str]]
"""Paths in a repo -> those that are wanted, each with its path in the folder."""


@dataclass(frozen=True)
class Fetched:
    """What a download did.

    Attributes:
        written: new files.
        there: files that were there already, and are those of the hub.
    """

    written: tuple[Path, ...]
    there: tuple[Path, ...]


def single_files(checkpoint: str = CHECKPOINT) -> Choice:
    """The three files that ComfyUI uses, side by side.

    Args:
        checkpoint: name of the file with DiT and conditioner.
    """
    wanted = {
        f"split_files/diffusion_models/{checkpoint}": checkpoint,
        "split_files/text_encoders/qwen_3_06b_base.safetensors": "qwen_3_06b_base.safetensors",
        "split_files/vae/qwen_image_vae.safetensors": "qwen_image_vae.safetensors",
    }

    def choose(paths: Collection[str]) -> Mapping[str, str]:
        """All three, or NotFetchedError."""
        missing = [path for path in wanted if path not in paths]
        if missing:
            there = sorted(path.rpartition("/")[2] for path in paths if fnmatchcase(path, "*/diffusion_models/*"))
            hint = f"; its checkpoints are: {', '.join(there)}" if there else ""
            raise NotFetchedError(f"the repo has no {', '.join(missing)}{hint}")
        return wanted

    return choose


def diffusers_folder(paths: Collection[str]) -> Mapping[str, str]:
    """Every part of a diffusers folder, without pickled weights and code."""
    patterns = [*INDEXES, *(f"{part}/{files}" for part in PARTS for files in FILE_TYPES)]
    chosen = [path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)]
    absent = [part for part in PARTS if not any(path.startswith(f"{part}/") for path in chosen)]
    if absent:
        raise NotFetchedError(f"the repo has no {', '.join(absent)}; it is no diffusers folder of Anima")
    return {path: path for path in chosen}


def fetch_files(folder: Path, sources: Sequence[HubFolder], choose: Choice) -> Fetched:
    """Fetch files of a repo into a folder.

    Each grows in a hidden folder beside its place, is compared with the size and the hash that the hub lists, and is
    then moved there. Files that are there and are the hub's are left alone.

    Args:
        folder: made if missing.
        sources: repos, tried in order; at least one.
        choose: which files.

    Raises:
        InputError: a file is there and is another one, there is no room, or no source serves.
        OSError: the folder cannot be written.
    """
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so nothing is downloaded; unset it to allow it.")
    folder.mkdir(parents=True, exist_ok=True)
    causes = []
    for source in sources:
        logger.warning("Fetching from %s into %s", source, folder)
        try:
            done = _FETCH[source.hub](source, folder, choose)
        except NotFetchedError as error:
            logger.warning("%s: %s", source, error)
            causes.append(f"{source}: {error}")
            continue
        shutil.rmtree(folder / _STAGING, ignore_errors=True)
        return done
    by_hand = f"what came so far is kept in {folder / _STAGING}, and the same command goes on from there"
    raise InputError.from_faults(f"{folder}: the files cannot be downloaded:", [*causes, by_hand])


def _from_hugging_face(source: HubFolder, folder: Path, choose: Choice) -> Fetched:
    api = HfApi()
    try:
        revision, listing = list_repo(api, source)
    except HUGGING_FACE_ERRORS as error:
        raise NotFetchedError(cause(error)) from error
    wanted = _checked(choose(listing))
    missing, there = _split(folder, wanted, lambda path, file: is_listed(file, listing[path]))
    _require_room(folder, sum(listing[path].size or 0 for path in missing))
    written = []
    for path, name in missing.items():
        try:
            file = fetch_listed(api, source, revision, listing[path], folder / _STAGING)
        except HUGGING_FACE_ERRORS as error:
            raise _no_room(error) or NotFetchedError(cause(error)) from error
        written.append(_move_in(file, folder / name))
    return Fetched(tuple(written), there)


def _from_modelscope(source: HubFolder, folder: Path, choose: Choice) -> Fetched:
    from modelscope.hub.api import HubApi  # takes a second, and is rarely needed
    from modelscope.hub.snapshot_download import snapshot_download

    revision = source.revision or "master"
    try:
        with quiet("modelscope", "modelscope_hub"):
            listed = HubApi().get_model_files(source.repo_id, revision=revision, recursive=True)
    except Exception as error:  # modelscope's releases have no base class in common
        raise NotFetchedError(cause(error)) from error
    sizes = {file["Path"]: file["Size"] for file in listed}
    wanted = _checked(choose(sizes))
    missing, there = _split(folder, wanted, lambda path, file: file.stat().st_size == sizes[path])
    _require_room(folder, sum(sizes[path] or 0 for path in missing))
    staging = folder / _STAGING
    if missing:
        try:
            with quiet("modelscope", "modelscope_hub"):
                snapshot_download(
                    source.repo_id,
                    revision=revision,
                    local_dir=str(staging),
                    allow_patterns=[glob.escape(path) for path in missing],
                )
        except Exception as error:  # as above
            raise _no_room(error) or NotFetchedError(cause(error)) from error
    lost = [path for path in missing if not (staging / path).is_file()]
    if lost:
        raise NotFetchedError(f"{lost[0]} did not come")
    return Fetched(tuple(_move_in(staging / path, folder / name) for path, name in missing.items()), there)


_FETCH: Mapping[Hub, Callable[[HubFolder, Path, Choice], Fetched]] = {
    Hub.HUGGING_FACE: _from_hugging_face,
    Hub.MODELSCOPE: _from_modelscope,
}


def _checked(wanted: Mapping[str, str]) -> Mapping[str, str]:
    """Raises NotFetchedError where a repo names a file that would lie outside of the folder."""
    for name in wanted.values():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise NotFetchedError(f"the repo names a file {name!r}, which would lie elsewhere")
    return wanted


def _split(
    folder: Path, wanted: Mapping[str, str], same: Callable[[str, Path], bool]
) -> tuple[dict[str, str], tuple[Path, ...]]:
    """What is missing, and what is there.

    Raises:
        InputError: something else is there.
    """
    there = {path: folder / name for path, name in wanted.items() if (folder / name).exists()}
    others = [file for path, file in there.items() if not file.is_file() or not same(path, file)]
    if others:
        raise InputError(
            f"{others[0]} is there and is not the hub's file; move it away, or choose another --output_dir. Nothing is "
            "overwritten."
        )
    return {path: name for path, name in wanted.items() if path not in there}, tuple(there.values())


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(f"{folder}: {size / 1e9:.1f} GB are to come, and {free / 1e9:.1f} GB are free.")


def _no_room(error: BaseException) -> InputError | None:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return InputError(f"the disk is full ({error}); what came so far is kept, and the same command goes on.")
    return None


def _move_in(file: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # made meanwhile, by another program
        raise InputError(f"{target} is there; nothing is overwritten.")
    file.replace(target)
    return target
