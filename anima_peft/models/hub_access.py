"""A repo's files by the hubs' own libraries: listed, fetched, compared with the listing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from .hub_folders import HubFolder

_TIMEOUT = 10.0  # seconds for a hub's first answer; where it is blocked, the other hub is not long in coming


class NotFetchedError(Exception):
    """Why a hub does not serve; kept for the final report."""


def list_repo(api: HfApi, source: HubFolder) -> tuple[str | None, dict[str, RepoSibling]]:
    """The commit of a repo on Hugging Face, and its files by their paths.

    It is the one request without retries. Made first, it tells after one time-out that the hub is out of reach.

    Raises:
        one of `hub_errors.HUGGING_FACE_ERRORS`.
    """
    repo = api.model_info(source.repo_id, revision=source.revision, files_metadata=True, timeout=_TIMEOUT)
    return repo.sha, {sibling.rfilename: sibling for sibling in repo.siblings or []}


def fetch_listed(api: HfApi, source: HubFolder, revision: str | None, listed: RepoSibling, folder: Path) -> Path:
    """Fetch one file of a repo on Hugging Face below a folder; what broke off there before goes on.

    Raises:
        NotFetchedError: what came is not the listed file; it is gone again, or the next attempt would take it for one.
        one of `hub_errors.HUGGING_FACE_ERRORS`.
    """
    file = Path(api.hf_hub_download(source.repo_id, listed.rfilename, revision=revision, local_dir=folder))
    if not is_listed(file, listed):
        file.unlink()
        raise NotFetchedError(f"what came for {listed.rfilename} is not the file of the repo's listing (hashes differ)")
    return file


def is_listed(file: Path, listed: RepoSibling) -> bool:
    """Whether a file is the one of a repo's listing: LFS files by their SHA-256, others by git's hash."""
    if listed.size is not None and file.stat().st_size != listed.size:
        return False
    if listed.lfs is not None:
        with file.open("rb") as content:
            return bool(sha_fileobj(content).hex() == listed.lfs.sha256)
    return listed.blob_id in (None, git_hash(file.read_bytes()))


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without the libraries' logs, which repeat a server's answer as it is: with the token, if the server echoes it."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
