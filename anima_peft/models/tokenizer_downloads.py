"""Completes a tokenizer's folder from Hugging Face or ModelScope: whole and checked, or not at all."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants

from ..errors import InputError
from ..limited import parse_json
from .hub_access import NotFetchedError, fetch_listed, list_repo, quiet
from .hub_errors import HUGGING_FACE_ERRORS, cause
from .hub_folders import REPO_ID, Hub, HubFolder, parse_hub_folder
from .tokenizers import TokenizerKind, load_tokenizer

logger = logging.getLogger(__name__)


def default_folder(kind: TokenizerKind, source: HubFolder) -> Path:
    """Where a tokenizer goes that was given no folder: one folder for each source in Hugging Face's cache of assets.

    `HF_HOME` or `HF_ASSETS_CACHE` moves it. Nothing is made here.
    """
    parts = [*source.repo_id.split("/"), *source.subfolder.split("/"), *(source.revision or "").split("/")]
    return Path(
        constants.HF_ASSETS_CACHE, "anima_peft", kind.option.removesuffix("_dir"), "--".join(filter(None, parts))
    )


def locate_tokenizer(kind: TokenizerKind, folder_or_repo: str | os.PathLike[str]) -> Path:
    """The folder for a path, a hub repo id or an address; of the latter two the tokenizer is in `default_folder`.

    Raises:
        InputError: the hub does not serve, or the address is of another host.
    """
    text = os.fspath(folder_or_repo)
    path = Path(text).expanduser()
    if path.exists() or not ("://" in text or REPO_ID.fullmatch(text)):
        return path
    source = parse_hub_folder(text)
    folder = default_folder(kind, source)
    complete_tokenizer(kind, folder, [source])
    return folder


def complete_tokenizer(kind: TokenizerKind, folder: Path, sources: Sequence[HubFolder]) -> None:
    """Fetch a tokenizer's missing files into its folder, unless the folder has enough to load.

    The files are fetched into a temporary folder inside `folder`, checked against the hub's hashes where it gives
    any, loaded as the tokenizer, and only then moved to their places. Files that are there already stay as they are.

    Args:
        kind: which tokenizer.
        folder: its folder; made if missing.
        sources: folders on hubs, tried in order; at least one.

    Raises:
        InputError: no source serves; the message has each one's cause and what to do by hand. Nothing is left behind.
    """
    if kind.complete_in(folder):
        return
    if constants.HF_HUB_OFFLINE:
        raise _report(kind, folder, sources, ["HF_HUB_OFFLINE is set, so nothing is downloaded; unset it to allow it"])
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    causes = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            logger.warning("Fetching the %s tokenizer from %s into %s", kind.name, source, folder)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
                try:
                    fetched = _FETCH[source.hub](kind, source, Path(temporary) / "fetched")
                    checked = _checked(kind, fetched, Path(temporary) / "checked")
                except NotFetchedError as error:
                    logger.warning("%s: %s", source, error)
                    causes.append(f"{source}: {error}")
                    continue
                _move_in([checked / name for name in kind.files], folder)
                return
    except OSError as error:
        raise InputError(f"{kind.option}: {folder} cannot be written to ({error}); choose another folder.") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # a folder that holds something stays
                path.rmdir()
    raise _report(kind, folder, sources, causes)


def _report(kind: TokenizerKind, folder: Path, sources: Sequence[HubFolder], causes: list[str]) -> InputError:
    by_hand = (
        f"by hand: save {kind.needed} from {' or '.join(source.page for source in sources)} in {folder}. "
        "A gated repo needs its licence accepted on its page and `hf auth login`"
    )
    heading = f"{kind.option}: {folder} holds no {kind.name} tokenizer, and it cannot be downloaded:"
    return InputError.from_faults(heading, [*causes, by_hand])


def _from_hugging_face(kind: TokenizerKind, source: HubFolder, folder: Path) -> Mapping[str, Path]:
    """The files by their names, each compared with the hash that the repo's listing has of it."""
    wanted = {str(PurePosixPath(source.subfolder, name)): name for name in kind.files}
    try:
        api = HfApi()
        revision, listing = list_repo(api, source)
        there = [path for path in wanted if path in listing]
        _require_enough(kind, source, [wanted[path] for path in there], listing)
        return {wanted[path]: fetch_listed(api, source, revision, listing[path], folder) for path in there}
    except HUGGING_FACE_ERRORS as error:
        raise NotFetchedError(cause(error)) from error


def _from_modelscope(kind: TokenizerKind, source: HubFolder, folder: Path) -> Mapping[str, Path]:
    """The files by their names; modelscope itself compares them with the listing's sizes and hashes."""
    from modelscope.hub.snapshot_download import snapshot_download  # takes a second, and is rarely needed

    wanted = {name: str(PurePosixPath(source.subfolder, name)) for name in kind.files}
    try:
        with quiet("modelscope", "modelscope_hub"):
            snapshot_download(
                source.repo_id,
                revision=source.revision or "master",
                local_dir=str(folder),
                allow_patterns=[glob.escape(path) for path in wanted.values()],
            )
    except Exception as error:  # modelscope's releases have no base class in common
        raise NotFetchedError(cause(error)) from error
    fetched = {name: folder / path for name, path in wanted.items() if (folder / path).is_file()}
    _require_enough(kind, source, list(fetched))
    return fetched


_FETCH: Mapping[Hub, Callable[[TokenizerKind, HubFolder, Path], Mapping[str, Path]]] = {
    Hub.HUGGING_FACE: _from_hugging_face,
    Hub.MODELSCOPE: _from_modelscope,
}


def _require_enough(
    kind: TokenizerKind, source: HubFolder, names: Sequence[str], listing: Sequence[str] | Mapping[str, object] = ()
) -> None:
    if kind.complete_with(names):
        return
    vocabularies = {name for group in kind.enough for name in group}
    others = sorted({str(PurePosixPath(path).parent) for path in listing if PurePosixPath(path).name in vocabularies})
    hint = f"; there are some in: {', '.join(others)}" if others else ""
    where = f"folder `{source.subfolder}`" if source.subfolder else "root folder"
    raise NotFetchedError(f"the repo's {where} has no {kind.needed}{hint}")


def _checked(kind: TokenizerKind, fetched: Mapping[str, Path], folder: Path) -> Path:
    """The files together in one folder, proved to load as the tokenizer from there."""
    folder.mkdir()
    for name, file in fetched.items():
        content = file.read_bytes()
        if content.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower().startswith((b"<!doctype", b"<html", b"<head")):
            raise NotFetchedError(f"{name} came as an HTML page, as from a proxy or a login")
        if name.endswith(".json"):
            try:
                parse_json(content.decode("utf-8"))
            except ValueError as error:
                raise NotFetchedError(f"{name} came as something else than JSON ({error})") from error
        file.replace(folder / name)
    try:
        load_tokenizer(kind, folder)
    except InputError as error:
        raise NotFetchedError(f"what came cannot be used: {str(error).removeprefix(f'{folder}: ')}") from error
    return folder


def _move_in(files: Sequence[Path], folder: Path) -> None:
    for file in files:
        if file.is_file() and not (folder / file.name).exists():
            file.replace(folder / file.name)
