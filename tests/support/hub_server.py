"""
A Hub on the loopback address: the part of its HTTP interface by which `huggingface_hub` makes repositories of models and
datasets, pushes folders and downloads them.

    with Hub() as hub:
        hub.call(__file__, "train", folder)
        hub.files("someone/model")  # path -> content, after the last commit

`huggingface_hub` reads the address when it is imported, so what talks to this Hub runs in a process of its own.
"""

import base64
import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from conftest import child_environment


USER = "someone"
TOKENS = {"hf_of_someone", "hf_of_someone_else"}
DROP = 0  # what `on_request` answers to end a connection without an answer
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
PIPELINES = ("text-generation", "image-text-to-text")
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".parquet")  # what the Hub wants as LFS objects, whatever their size


@dataclass(frozen=True)
class Commit:
    """All files of a repository after one commit."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """The commits of one branch, the oldest first."""

    name: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)

    def __post_init__(self):
        self.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, message: str, files: dict[str, bytes]) -> Commit:
        oid = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


class Hub:
    """
    A server that runs while this context lasts.

    Attributes:
        repositories (`dict[str, Repository]`): By name, "owner/name", of datasets "datasets/owner/name".
        unknown (`list[str]`): Requests that it has no answer for; a test may want there to be none.
        on_commit (`Callable[[Commit], None]`, *optional*): Called before a commit is made, on a thread of the server's; it may
            take its time, or raise, which the client sees as an error 500.
        on_request (`Callable[[str, str], int | None]`, *optional*): Called with the method and the path of each request; what
            is not `None` is the status of the answer, or `DROP`.
        forbidden (`set[str]`): Names of repositories that nobody may make.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.unknown: list[str] = []
        self.on_commit: Callable[[Commit], None] | None = None
        self.on_request: Callable[[str, str], int | None] | None = None
        self.forbidden: set[str] = set()
        self._objects: dict[str, bytes] = {}  # of git LFS, by their SHA-256
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def call(self, file: str, function: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess:
        """Let a test file, run as a script, call one of its functions in a process for which this is the Hub."""
        environment = child_environment(**self.environment(folder / "cache"))
        command = [sys.executable, file, function, str(folder)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert not check or result.returncode == 0, result.stderr[-3000:]
        return result

    def environment(self, cache: Path) -> dict[str, str]:
        """Environment variables of a process that takes this for the Hub, and keeps what it downloads in a folder."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_of_someone",
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # a protocol of its own, which this server does not speak
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repository: str) -> dict[str, bytes]:
        """Path -> content, after the last commit."""
        return self.repositories[repository].commits[-1].files

    def messages(self, repository: str) -> list[str]:
        """Of all commits but the one that made the repository."""
        return [commit.message for commit in self.repositories[repository].commits[1:]]

    # What the requests ask for: each gives JSON, or None if there is no such thing

    def create(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        key = f"datasets/{name}" if asked.get("type") == "dataset" else name
        if name in self.forbidden:
            return None
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        with self._lock:
            self.repositories.setdefault(key, Repository(key, private))
        return {"url": f"{self.url}/{key}", "name": name, "id": name}

    def info(self, name: str, revision: str) -> dict[str, Any] | None:
        commit = self._commit(name, revision)
        if commit is None:
            return None
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self.repositories[name].private
        name = name.removeprefix("datasets/")
        return {"id": name, "modelId": name, "sha": commit.oid, "private": private, "tags": [], "siblings": siblings}

    def tree(self, name: str, revision: str) -> list[dict[str, Any]] | None:
        commit = self._commit(name, revision)
        if commit is None:
            return None
        entries = []
        for path, content in sorted(commit.files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def content(self, name: str, revision: str, path: str) -> tuple[Commit, bytes | None] | None:
        commit = self._commit(name, revision)
        return commit and (commit, commit.files.get(path))

    def upload_modes(self, asked: dict[str, Any]) -> dict[str, Any]:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        return {"files": modes}

    def lfs_batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for wanted in asked["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self._objects:
                answer["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def keep(self, oid: str, content: bytes) -> bool:
        """Take in an LFS object; whether it is what it is called."""
        if _sha256(content) != oid:
            return False
        self._objects[oid] = content
        return True

    def push(self, name: str, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
        if name not in self.repositories:
            return None
        added, deleted, message = {}, [], ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                added[value["path"]] = self._objects[value["oid"]]
            elif key in ("deletedFile", "deletedFolder"):
                deleted.append(value["path"])
            else:
                raise NotImplementedError(key)
        if errors := metadata_errors(added.get("README.md", b"").decode()):
            raise ValueError(errors)
        if self.on_commit is not None:
            self.on_commit(Commit("", message, added))
        with self._lock:
            repository = self.repositories[name]
            kept = {
                path: content
                for path, content in repository.commits[-1].files.items()
                if not any(path == gone or path.startswith(gone.rstrip("/") + "/") for gone in deleted)
            }
            commit = repository.commit(message, kept | added)
        return {"commitUrl": f"{self.url}/{name}/commit/{commit.oid}", "commitOid": commit.oid, "success": True}

    def _commit(self, name: str, revision: str) -> Commit | None:
        return self.repositories[name].at(revision) if name in self.repositories else None


class _Handler(BaseHTTPRequestHandler):
    """Takes requests apart; what they ask for is up to the `hub`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if self._fails(path, writes=False):
            return
        if path == "/api/whoami-v2":
            return self._send_json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._send_json(self.hub.info(_key(match[1], match[2]), match[3] or "main"))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)", path):
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
            name = _key(match[1], match[2])
            return self._send_json(self.hub.tree(name, match[3])) if recursive else self._not_known()
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/[^/]+/additional_chat_templates", path):
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})  # a folder that these models do not have
        if match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._send_file(self.hub.content(*match.groups()))
        return self._not_known()

    do_HEAD = do_GET

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self._body()
        if self._fails(path, writes=path != "/api/validate-yaml"):
            return None
        if path == "/api/repos/create":
            return self._send_json(self.hub.create(json.loads(body)))
        if path == "/api/validate-yaml":
            errors = metadata_errors(json.loads(body)["content"])
            answer = {"errors": [{"message": error} for error in errors], "warnings": []}
            return self._send(400 if errors else 200, json.dumps(answer).encode())
        if re.fullmatch(r"/api/(models|datasets)/[^/]+/[^/]+/preupload/main", path):
            return self._send_json(self.hub.upload_modes(json.loads(body)))
        if re.fullmatch(r"/(datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self._send_json(self.hub.lfs_batch(json.loads(body)))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/commit/main", path):
            try:
                lines = [json.loads(line) for line in body.splitlines()]
                return self._send_json(self.hub.push(_key(match[1], match[2]), lines))
            except Exception as error:
                return self._send(500, repr(error).encode(), {"X-Error-Message": repr(error)})
        return self._not_known()

    def do_PUT(self):
        path, body = urlsplit(self.path).path, self._body()
        if self._fails(path, writes=False):  # the address of an upload is a secret of its own
            return None
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self._send(200 if self.hub.keep(match[1], body) else 400, b"")
        return self._not_known()

    def _fails(self, path: str, writes: bool) -> bool:
        """Whether the request was answered with a fault: one that a test asks for, or of a missing or wrong token."""
        status = self.hub.on_request(self.command, path) if self.hub.on_request is not None else None
        if status == DROP and status is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return True
        if status is None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            private = (repository in path and of.private for repository, of in list(self.hub.repositories.items()))
            needs_token = writes or (any(private) and self.command != "PUT")
            status = 401 if token not in TOKENS and (token or needs_token) else None
        if status is not None:
            self._send(status, json.dumps({"error": f"the Hub says {status}"}).encode())
        return status is not None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, answer: Any) -> None:
        if answer is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "Content-Type": "application/json"})
        else:
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, found: tuple[Commit, bytes | None] | None) -> None:
        if found is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        commit, content = found
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid})
        return self._send(200, content, {"X-Repo-Commit": commit.oid, "ETag": f'"{_sha256(content)}"'})

    def _not_known(self) -> None:
        self.hub.unknown.append(f"{self.command} {self.path}")
        self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def log_message(self, *args) -> None:
        pass


def metadata_errors(card: str) -> list[str]:
    """What the Hub would not take in the front matter of a card."""
    parts = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if parts is None:
        return []
    data = yaml.safe_load(parts[1]) or {}
    errors = []
    for key in ("base_model", "datasets"):
        names = data.get(key, [])
        for name in [names] if isinstance(names, str) else names:
            if not isinstance(name, str) or not REPOSITORY.fullmatch(name):
                errors.append(f'"{key}" with value "{name}" is not valid.')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be texts')
    if "library_name" in data and not re.fullmatch(r"[a-z0-9-]+", data["library_name"]):
        errors.append('"library_name" is not valid')
    if data.get("pipeline_tag", PIPELINES[0]) not in PIPELINES:
        errors.append('"pipeline_tag" is not valid')
    return errors


def _key(kind: str, name: str) -> str:
    return f"datasets/{name}" if kind == "datasets" else name


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
