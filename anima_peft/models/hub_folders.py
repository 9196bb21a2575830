"""How users name a folder on a hub: a repo id, or the address of its page on Hugging Face or ModelScope."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

from ..errors import InputError

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)")  # a mistyped file is not looked for on the hub

T5_REPO = "nvidia/Cosmos-Predict2-2B-Text2Image"
T5_MODELSCOPE_REPO = "nv-community/Cosmos-Predict2-2B-Text2Image"
T5_SUBFOLDER = "tokenizer"
QWEN_REPO = "Qwen/Qwen3-0.6B-Base"  # of the same name on both hubs

_EXPECTED = (
    "expected a repo id (owner/name), https://huggingface.co/OWNER/NAME[/tree/REVISION/FOLDER], or "
    "https://modelscope.cn/models/OWNER/NAME[/resolve/REVISION/FOLDER]"
)
_TO_A_FILE = re.compile(r".*\.(json|model|txt)", re.IGNORECASE)  # an address that ends in a file means its folder


class Hub(StrEnum):
    """A hub, by the name that messages give it."""

    HUGGING_FACE = "Hugging Face"
    MODELSCOPE = "ModelScope"


_HOSTS = {
    "huggingface.co": Hub.HUGGING_FACE,
    "hf.co": Hub.HUGGING_FACE,
    "modelscope.cn": Hub.MODELSCOPE,
    "www.modelscope.cn": Hub.MODELSCOPE,
}
_QUERIES = {Hub.HUGGING_FACE: {"download"}, Hub.MODELSCOPE: {"Revision", "FilePath"}}


@dataclass(frozen=True)
class HubFolder:
    """A folder in a model repo.

    Attributes:
        hub: where the repo is.
        repo_id: `owner/name`.
        revision: branch, tag or commit; None is the hub's default branch.
        subfolder: path inside the repo, with `/`; empty for its root.
        names_folder: whether what was read was the address of a folder or file, and not a whole repo.
    """

    hub: Hub
    repo_id: str
    revision: str | None = None
    subfolder: str = ""
    names_folder: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.hub} ({self.page})"

    @property
    def page(self) -> str:
        """Address at which a person sees the folder's files."""
        root, branch = {
            Hub.HUGGING_FACE: ("https://huggingface.co/", "main"),
            Hub.MODELSCOPE: ("https://modelscope.cn/models/", "master"),
        }[self.hub]
        revision = quote(self.revision or branch, safe="")
        return "/".join([f"{root}{self.repo_id}", "tree", revision, *filter(None, [quote(self.subfolder)])])


def parse_hub_folder(
    text: str, hub: Hub = Hub.HUGGING_FACE, revision: str | None = None, subfolder: str = ""
) -> HubFolder:
    """Read a repo id or an address.

    Args:
        text: `owner/name`, or the http(s) address of a repo, folder or file on one of the two hubs.
        hub: the hub of a bare repo id.
        revision: what holds where the text names none.
        subfolder: what holds where the text is a repo id or the address of a whole repo.

    Raises:
        InputError: neither of the two, another host, or a path that leaves the repo. What an address may carry of
            passwords and tokens is not repeated.
    """
    if "://" not in text:
        if not REPO_ID.fullmatch(text):
            raise InputError(_EXPECTED if "@" in text else f'{_EXPECTED}, got "{text}"')
        return HubFolder(hub, text, revision, _inside_repo(subfolder))

    try:
        url = urlsplit(text)
    except ValueError as error:
        raise InputError(f"{_EXPECTED}; the address cannot be read ({error})") from None
    named = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
    if "@" in url.netloc:
        raise InputError(f"expected an address without user name and password: {named}")
    if url.scheme not in ("http", "https") or url.netloc.lower() not in _HOSTS:
        raise InputError(
            f"{_EXPECTED}; {named} is neither of the two. For a mirror, set HF_ENDPOINT and give a repo id"
        )
    hub = _HOSTS[url.netloc.lower()]
    query = parse_qs(url.query)
    if not query.keys() <= _QUERIES[hub]:
        raise InputError(f"expected an address without parameters (?...): {named}")
    parts = [unquote(part) for part in url.path.split("/") if part]
    if hub is Hub.MODELSCOPE:
        if parts[:2] == ["api", "v1"]:
            parts = parts[2:]
        if parts[:1] != ["models"]:
            raise InputError(f"{_EXPECTED}, got {named}")
        parts = parts[1:]
        if len(parts) == 3 and parts[2] in ("files", "summary", "repo"):  # views of the whole repo
            parts = parts[:2]
        if len(parts) == 2 and query:
            parts += ["resolve", query.get("Revision", [revision or "master"])[0], *query.get("FilePath", [])]
    repo_id, place = "/".join(parts[:2]), parts[2:]
    if not REPO_ID.fullmatch(repo_id) or repo_id.split("/")[0] in ("datasets", "spaces"):
        raise InputError(f"{_EXPECTED}, got {named}")
    if not place:
        return HubFolder(hub, repo_id, revision, _inside_repo(subfolder))
    if place[0] not in ("tree", "blob", "resolve") or len(place) == 1:
        raise InputError(f"{_EXPECTED}, got {named}")
    folder = _inside_repo("/".join(place[2:]))
    if _TO_A_FILE.fullmatch(folder):
        folder = folder.rpartition("/")[0]
    return HubFolder(hub, repo_id, place[1], folder, names_folder=True)


def download_order(
    repo_id: str,
    subfolder: str = "",
    *,
    modelscope_repo_id: str | None,
    modelscope_revision: str = "master",
    modelscope_subfolder: str = "",
) -> tuple[HubFolder, ...]:
    """The folders to fetch from, in the order in which they are tried.

    Args:
        repo_id: repo id on Hugging Face, or an address on either hub.
        subfolder: folder in it, where `repo_id` does not name one.
        modelscope_repo_id: repo id or address on ModelScope, tried after the first; None leaves it out.
        modelscope_revision: its branch.
        modelscope_subfolder: folder in it.

    Raises:
        InputError: a repo id or an address that cannot be read.
    """
    first = parse_hub_folder(repo_id, subfolder=subfolder)
    if modelscope_repo_id is None:
        return (first,)
    second = parse_hub_folder(modelscope_repo_id, Hub.MODELSCOPE, modelscope_revision, modelscope_subfolder)
    return (first,) if second == first else (first, second)


def check_hub_folder(text: str) -> None:
    """Raises InputError where the text is neither a repo id nor an address on one of the two hubs."""
    parse_hub_folder(text)


def check_modelscope_folder(text: str) -> None:
    """Raises InputError where the text is neither a repo id nor an address on ModelScope."""
    if parse_hub_folder(text, Hub.MODELSCOPE).hub is not Hub.MODELSCOPE:
        raise InputError(f"expected a repo id or an address on ModelScope, got {text}")


def check_subfolder(text: str) -> None:
    """Raises InputError where the text is no path inside a repo."""
    _inside_repo(text)


def _inside_repo(subfolder: str) -> str:
    """The path without slashes at its ends; of forms that leave the repo, an error."""
    cleaned = subfolder.strip("/")
    if "\\" in cleaned or any(part in ("", ".", "..") for part in cleaned.split("/") if cleaned):
        raise InputError(f'expected a folder inside the repo, such as "tokenizer", got "{subfolder}"')
    return str(PurePosixPath(cleaned)) if cleaned else ""
