"""A small server on the loopback that plays Hugging Face and ModelScope, and fails as they do."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import modelscope_hub.config
import pytest
from huggingface_hub.utils.sha import git_hash

COMMIT = "c0ffee" + "0" * 34
HTML = b"<!DOCTYPE html>\n<html><body>Please log in.</body></html>"


@dataclass
class HubServer:
    """What the server has and how it fails.

    Attributes:
        files: hub ("hf" or "ms") -> path in the repo -> content.
        faults: "hf list", "hf file", "ms list" or "ms file", and "create", "blob" or "commit" of an upload -> what
            happens there: an HTTP status, "html" (a page with
            status 200), "half" (the connection ends in the middle), "hang" (no answer), "other" (other content than the
            listing says) or "redirect" (to where the file is).
        asked: method and address of every request.
        tokens: what came in `Authorization`.
        url: the server's address.
        absent: hubs on which the repo is not there until it is made.
        created: hub -> what was asked for when the repo was made.
        blobs: what was uploaded outside of commits, by its SHA-256.
    """

    files: dict[str, dict[str, bytes]]
    faults: dict[str, int | str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)
    absent: set[str] = field(default_factory=set)
    created: dict[str, dict[str, object]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)


def alone(monkeypatch: pytest.MonkeyPatch, folder: Path, timeout: float = 60.0) -> None:
    """Both libraries online, with tokens of their own, without pauses, and with what they keep in `folder`."""
    for variable in ("MODELSCOPE_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(variable, str(folder / "modelscope"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(modelscope_hub.config, "_default_config", None)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for module, name, value in (
        ("_download", "DOWNLOAD_RETRY_TIMES", 0),
        ("_download", "DOWNLOAD_HASH_RETRY_TIMES", 1),
        ("_download", "DOWNLOAD_SIZE_RETRY_TIMES", 1),
        ("_legacy_api", "REPO_TREE_PAGE_MAX_ATTEMPTS", 1),
        ("_legacy_api", "REPO_TREE_PAGE_TIMEOUT_SECONDS", timeout),
        ("_upload", "UPLOAD_COMMIT_MAX_ATTEMPTS", 1),
        ("_upload", "UPLOAD_BLOB_MAX_ATTEMPTS", 1),
        ("_upload", "UPLOAD_RECOVERY_ENABLED", False),
    ):
        monkeypatch.setattr(f"modelscope_hub.{module}.{name}", value)


@contextmanager
def hub_server(files: dict[str, dict[str, bytes]]) -> Iterator[HubServer]:
    """The server, running."""
    state = HubServer(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        state = self.state
        state.asked.append(f"{self.command} {self.path}")
        state.tokens.append(self.headers.get("Authorization"))
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        if path.startswith(("/api/v1/models/", "/openapi/v1/models/")):
            hub, file = "ms", query.get("FilePath")
        else:
            hub, file = "hf", path.partition(f"/resolve/{COMMIT}/")[2] or None
        fault = state.faults.get(f"{hub} {'file' if file else 'list'}")
        if isinstance(fault, int):
            token = self.headers.get("Authorization")
            return self.answer(json.dumps({"error": f"refused {token}", "Message": f"refused {token}"}), status=fault)
        if fault == "hang":
            state.closing.wait(5)
            self.close_connection = True
            return None
        if fault == "html":
            return self.answer(HTML)
        if hub in state.absent:
            return self.answer("{}", status=404, headers={"X-Error-Code": "RepoNotFound"})
        if path.startswith("/openapi/"):
            return self.answer(json.dumps({"success": True, "data": {"path": "owner", "name": "name"}}))
        if file is None:
            return self.answer(
                json.dumps(self.hugging_face() if hub == "hf" else self.modelscope(query.get("Root", "")))
            )
        if file not in state.files[hub]:
            return self.answer("{}", status=404, headers={"X-Error-Code": "EntryNotFound"})
        content = state.files[hub][file]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(content)}"'}
        if fault == "redirect" and "moved" not in query:
            separator = "&" if url.query else "?"
            return self.answer("", status=302, headers=headers | {"Location": f"{self.path}{separator}moved=1"})
        if fault == "other":
            content = bytes(reversed(content))
        return self.answer(content, headers=headers, half=fault == "half")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """The calls of an upload: make a repo, ask how to send each file, send large ones, commit."""
        state, path = self.state, urlsplit(self.path).path
        state.asked.append(f"{self.command} {self.path}")
        state.tokens.append(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = "ms" if path.startswith("/api/v1/") or path.startswith("/ms-blob/") else "hf"
        create, commit = path in ("/api/repos/create", "/api/v1/models"), "/commit/" in path
        place = "create" if create else "commit" if commit else "blob" if self.command == "PUT" else "other"
        fault = state.faults.get(f"{hub} {place}")
        if isinstance(fault, int):
            token = self.headers.get("Authorization")
            return self.answer(json.dumps({"error": f"refused {token}", "Message": f"refused {token}"}), status=fault)
        if self.command == "PUT":
            state.blobs[path.rpartition("/")[2]] = body
            return self.answer("")
        if create and hub not in state.absent:
            return self.answer(json.dumps({"error": "exists", "Message": "repo already exists"}), status=409)
        if create:
            state.created[hub] = json.loads(body)
            state.absent.discard(hub)
        elif commit and hub == "hf":
            self.commit_hugging_face(body)
        elif commit:
            self.commit_modelscope(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            return self.answer(json.dumps(self.how_to_send(hub, json.loads(body))))
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(json.dumps({"files": files}))
        done = {"url": f"{state.url}/owner/name", "commitUrl": f"{state.url}/owner/name/commit/{COMMIT}"}
        return self.answer(json.dumps(done | {"commitOid": COMMIT, "warnings": [], "Code": 200, "Data": {}}))

    do_PUT = do_POST

    def how_to_send(self, hub: str, asked: dict[str, list[dict[str, object]]]) -> dict[str, object]:
        objects = [
            {
                "oid": o["oid"],
                "size": o["size"],
                "actions": {"upload": {"href": f"{self.state.url}/{hub}-blob/{o['oid']}"}},
            }
            for o in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects, "Code": 200, "Data": {"objects": objects}}

    def commit_hugging_face(self, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.state.files["hf"][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.state.files["hf"][value["path"]] = self.state.blobs[value["oid"]]

    def commit_modelscope(self, body: dict[str, list[dict[str, str]]]) -> None:
        for action in body["actions"]:
            large = action["type"] == "lfs"
            content = self.state.blobs[action["sha256"]] if large else base64.b64decode(action["content"])
            self.state.files["ms"][action["path"]] = content

    def hugging_face(self) -> dict[str, object]:
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": git_hash(content)}
            | (
                {"lfs": {"sha256": _sha256(content), "size": len(content), "pointerSize": 1}}
                if ".model" in path
                else {}
            )
            for path, content in self.state.files["hf"].items()
        ]
        return {"id": "owner/name", "sha": COMMIT, "siblings": siblings}

    def modelscope(self, root: str) -> dict[str, object]:
        files = [
            {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(c), "Sha256": _sha256(c)}
            for path, c in self.state.files["ms"].items()
            if path.startswith(root)
        ]
        return {"Code": 200, "Success": True, "Data": {"Files": files}}

    def answer(
        self, content: str | bytes, status: int = 200, headers: dict[str, str] | None = None, half: bool = False
    ) -> None:
        body = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
