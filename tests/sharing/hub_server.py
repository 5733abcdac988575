"""A Hugging Face hub on loopback: the endpoints that huggingface_hub 2 uses for making, filling and reading a model
repository without Xet, with commits, branches, tokens, large-file storage, and faults on demand.

What it answers follows the client's own code (`_commit_api.py`, `lfs.py`, `file_download.py`, `hf_api.py`); a request
it does not know is answered 501, so that a client that asks for more is noticed.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_the_writers_token", "hf_the_readers_token"
LARGE = (".safetensors", ".npz", ".png")


class Repo:
    """A model repository: commits by id, branches, and whether it is private."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.add({".gitattributes": b"*.safetensors filter=lfs\n"}, "main")

    def add(self, files: dict[str, bytes], branch: str) -> str:
        """A new commit at the head of a branch."""
        text = repr((len(self.commits), sorted(files.items()), self.branches.get(branch)))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def at(self, revision: str) -> str | None:
        """The commit that a revision means."""
        return revision if revision in self.commits else self.branches.get(revision)

    def head(self, branch: str = "main") -> dict[str, bytes]:
        """Files at the head of a branch."""
        return self.commits[self.branches[branch]]


class Fault:
    """What goes wrong, where, and how often."""

    def __init__(self, method: str, path: str, act: str | int, times: int = 1000) -> None:
        """`act`: a status to answer; "reset": the connection is cut in the middle of the answer's body; "garble": the
        body's last byte is another one."""
        self.method, self.path, self.act, self.times = method, re.compile(path), act, times
        self.met = 0

    def hits(self, method: str, path: str) -> bool:
        if method == self.method and self.path.search(path) and self.met < self.times:
            self.met += 1
            return True
        return False


class HubServer(ThreadingHTTPServer):
    """The hub's state, and the server."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.before_commit: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def cdn(self, content: bytes) -> str:
        """Where a large file is fetched: another host, as at the real hub, which must not be told the token."""
        return f"http://localhost:{self.server_address[1]}/cdn/{sha256(content)}"

    def fail(self, *args: Any) -> Fault:
        """Let something go wrong from now on; arguments of `Fault`."""
        self.faults.append(Fault(*args))
        return self.faults[-1]


@contextmanager
def serving():
    """A running hub."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class AnswerError(Exception):
    """An HTTP answer, good or bad: raised where it is known, which ends the route."""

    def __init__(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, headers or {}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def not_found(code: str) -> AnswerError:
    return AnswerError(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        """Silence."""

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if "chunked" not in self.headers.get("Transfer-Encoding", "") else self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        fault = next((fault for fault in self.server.faults if fault.hits(self.command, path)), None)
        try:
            if fault is not None and isinstance(fault.act, int):
                raise AnswerError(fault.act, {"error": "injected"})
            self._route(path, body)
            raise AnswerError(501, {"error": f"{self.command} {path} is not part of this hub"})
        except AnswerError as answer:
            self._send(answer, fault)

    def _chunks(self) -> bytes:
        out = b""
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def _send(self, answer: AnswerError, fault: Fault | None) -> None:
        body, status = answer.body, answer.status
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if ranged and status == 200:
            body, status = body[int(ranged[1]) :], 206
        act = None if fault is None else fault.act
        if act == "garble":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if act == "reset":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        self.wfile.write(body)

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _writer(self) -> None:
        if self._token is None:
            raise AnswerError(401, {"error": "no token"})
        if self._token != WRITER:
            raise AnswerError(403, {"error": "this token reads only"})

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self._token is None):
            raise not_found("RepoNotFound") if self._token else AnswerError(401, b"", {"X-Error-Code": "RepoNotFound"})
        return repo

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(name)
        commit = repo.at(revision)
        if commit is None:
            raise not_found("RevisionNotFound")
        return commit, repo.commits[commit]

    def _route(self, path: str, body: bytes) -> None:
        for method, pattern, act in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                act(self, body, *found.groups())

    def make(self, body: bytes) -> None:
        self._writer()
        told = json.loads(body)
        name = f"{told['organization']}/{told['name']}"
        if name in self.server.repos:
            raise AnswerError(409, {"error": "there already", "url": f"{self.server.url}/{name}"})
        self.server.repos[name] = Repo(told.get("visibility") == "private" or bool(told.get("private")))
        raise AnswerError(200, {"url": f"{self.server.url}/{name}"})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        self._writer()
        repo = self._repo(name)
        if branch in repo.branches:
            raise AnswerError(409, {"error": "there already"})
        repo.branches[branch] = repo.branches["main"]
        raise AnswerError(200, {})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        commit, files = self._files(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        private = self._repo(name).private
        raise AnswerError(200, {"id": name, "sha": commit, "private": private, "siblings": siblings, "tags": []})

    def validate(self, body: bytes) -> None:
        raise card_answer(json.loads(body)["content"])

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self._writer()
        _, held = self._files(name, revision)
        files = []
        for file in json.loads(body)["files"]:
            large, there = file["path"].endswith(LARGE), held.get(file["path"])
            oid = None if there is None else sha256(there) if large else git_id(there)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise AnswerError(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        self._writer()
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        raise AnswerError(200, {"objects": objects, "transfer": "basic"})

    def store(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid:
            raise AnswerError(400, {"error": "other bytes than announced"})
        self.server.blobs[oid] = body
        raise AnswerError(200, {})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        self._writer()
        self.server.before_commit()
        repo = self._repo(name)
        header, *steps = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, repo.branches[branch]):
            raise AnswerError(412, {"error": "a commit has happened since"})
        files = dict(repo.head(branch))
        for step in steps:
            value = step["value"]
            if step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif step["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AnswerError(501, {"error": step["key"]})
        made = repo.add(files, branch)
        raise AnswerError(200, {"commitUrl": f"{self.server.url}/{name}/commit/{made}", "commitOid": made})

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        commit, files = self._files(name, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            raise AnswerError(404, b"", {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"})
        content = files[path]
        if path.endswith(LARGE):
            self.server.blobs[sha256(content)] = content
            headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            raise AnswerError(302, b"", {**headers, "Location": self.server.cdn(content), "ETag": '"x"'})
        raise AnswerError(200, content, {**headers, "ETag": f'"{git_id(content)}"'})

    def blob(self, body: bytes, oid: str) -> None:
        if self._token is not None:
            raise AnswerError(400, {"error": "the token was sent to another host"})
        raise AnswerError(200, self.server.blobs[oid], {"ETag": f'"{oid}"'})


for method in ("GET", "HEAD", "POST", "PUT"):
    setattr(Handler, f"do_{method}", Handler._serve)

_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", Handler.make),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", Handler.branch),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(\w+)", Handler.store),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{_NAME}", Handler.info),
    ("GET HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("GET HEAD", r"/cdn/(\w+)", Handler.blob),
]


def card_answer(text: str) -> AnswerError:
    """Whether a card's head is what the hub takes: YAML, known types, and a model-index with all its parts."""
    errors = []
    head = yaml.safe_load(text.split("---\n")[1])
    for key, kind in {"license": str, "library_name": str, "tags": list, "datasets": list, "model-index": list}.items():
        if key in head and not isinstance(head[key], kind):
            errors.append(f"{key} must be a {kind.__name__}")
    for model in head.get("model-index", []):
        for result in model["results"]:
            good = result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            if not good or not all(isinstance(metric["value"], int | float) for metric in result["metrics"]):
                errors.append("model-index is not whole")
    return AnswerError(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    """How git calls a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
