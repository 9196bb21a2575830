"""Pushing a folder to Hugging Face or ModelScope, by their own libraries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from ..errors import InputError, TrainingError
from ..models.hub_access import quiet
from ..models.hub_errors import HUGGING_FACE_ERRORS, cause
from ..models.hub_folders import Hub

_MESSAGE = "Upload by anima_peft"
_LOGINS = {
    Hub.HUGGING_FACE: "`hf auth login` or HF_TOKEN",
    Hub.MODELSCOPE: "`modelscope login` or MODELSCOPE_API_TOKEN",
}


@dataclass(frozen=True)
class Pushed:
    """Where an adapter went.

    Attributes:
        page: its address.
        created: whether the repo is new; otherwise its visibility is what it was.
    """

    page: str
    created: bool


class _RefusedError(Exception):
    """What a hub said."""


def push(folder: Path, repo_id: str, hub: Hub, *, private: bool, license: str, overwrite: bool) -> Pushed:
    """Make the repo if it is not there, and put the folder's files into it.

    The token is the hub's own: `HF_TOKEN` or `hf auth login`; `MODELSCOPE_API_TOKEN` or `modelscope login`. It is
    shown nowhere.

    Args:
        folder: what is pushed.
        repo_id: `owner/name`.
        hub: which one; `HF_ENDPOINT` and `MODELSCOPE_ENDPOINT` name mirrors.
        private: whether a new repo is private.
        license: of a new repo, where the hub asks for one.
        overwrite: whether files of the same names in the repo may be replaced.

    Raises:
        InputError: no token, or the repo has files of the same names.
        TrainingError: the hub refuses or cannot be reached.
    """
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so nothing is pushed; unset it, or use --dry_run.")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        return _PUSH[hub](folder, repo_id, private, license, _Conflicts(repo_id, hub, files, overwrite))
    except _RefusedError as error:
        raise TrainingError(
            f"{hub} does not take {repo_id}: {error}. It needs a token with write access ({_LOGINS[hub]}); the same "
            "command may be run again."
        ) from error


@dataclass(frozen=True)
class _Conflicts:
    """Refuses files that a repo has already."""

    repo_id: str
    hub: Hub
    files: Collection[str]
    overwrite: bool

    def check(self, there: Collection[str]) -> None:
        """Raises InputError if any of ours is there and may not be replaced."""
        taken = sorted(set(self.files) & set(there))
        if taken and not self.overwrite:
            raise InputError(
                f"{self.repo_id} on {self.hub} has {', '.join(taken)} already; choose another --repo or add "
                "--overwrite."
            )


def _to_hugging_face(folder: Path, repo_id: str, private: bool, license: str, conflicts: _Conflicts) -> Pushed:
    if get_token() is None:
        raise InputError("no token for Hugging Face: run `hf auth login` or set HF_TOKEN to one with write access.")
    try:
        api = HfApi()
        try:
            there = api.model_info(repo_id).siblings
            conflicts.check([file.rfilename for file in there or []])
            created = False
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private)
            created = True
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=_MESSAGE)
    except InputError:
        raise
    except HUGGING_FACE_ERRORS as error:
        raise _RefusedError(cause(error)) from error
    return Pushed(f"{api.endpoint}/{repo_id}", created)


def _to_modelscope(folder: Path, repo_id: str, private: bool, license: str, conflicts: _Conflicts) -> Pushed:
    from modelscope.hub.api import HubApi  # takes a second, and is rarely needed

    try:
        with quiet("modelscope", "modelscope_hub"):
            api = HubApi()
            created = not api.repo_exists(repo_id, repo_type="model")
            if created:
                visibility = "private" if private else "public"
                api.create_repo(repo_id, repo_type="model", visibility=visibility, license=license)
            else:
                conflicts.check([file["Path"] for file in api.get_model_files(repo_id, recursive=True)])
            api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=_MESSAGE, repo_type="model")
    except InputError:
        raise
    except Exception as error:  # modelscope's releases have no base class in common
        raise _RefusedError(cause(error)) from error
    return Pushed(f"{api.endpoint}/models/{repo_id}", created)


_PUSH: Mapping[Hub, Callable[[Path, str, bool, str, _Conflicts], Pushed]] = {
    Hub.HUGGING_FACE: _to_hugging_face,
    Hub.MODELSCOPE: _to_modelscope,
}
