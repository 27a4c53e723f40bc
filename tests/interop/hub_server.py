"""A Hugging Face Hub in this process: the endpoints that pushing and opening a model needs, over HTTP."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Repositories by name; each is a list of commits, and each commit its files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.gated: set[str] = set()
        self.read_only: set[str] = set()

    def files(self, repo: str) -> dict[str, bytes]:
        return self.commits[repo][-1]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, content: bytes | dict[str, Any] = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"X_Request_Id": "1", "Content_Length": str(len(body)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0].strip("/").split("/")
        if path == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if path == ["api", "repos", "create"]:
            request = json.loads(body)
            repo = f"{request['organization']}/{request['name']}"
            existed = repo in self.server.commits
            if not existed:
                self.server.commits[repo] = []
                self.server.private[repo] = request["visibility"] == "private"
            return self.answer(409 if existed else 200, {"url": f"{self.server.url}/{repo}"})
        _, _, user, name, action, _ = path
        repo = f"{user}/{name}"
        if repo in self.server.read_only:
            return self.answer(403, X_Error_Message="You have no write access")
        if action == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer(200, {"files": modes})
        assert action == "commit"
        files = dict(self.server.files(repo)) if self.server.commits[repo] else {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.server.commits[repo].append(files)
        commit = oid(len(self.server.commits[repo]))
        return self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        kind = "resolve"
        if path.startswith("api/models/"):  # user/name/revision/main describes a commit, user/name/tree/main its files
            user, name, kind, revision, file = (*[*path.split("/")[2:], "revision", "main"][:4], "")
        else:
            user, name, _, revision, file = path.split("/", 4)
        repo, signed = f"{user}/{name}", self.headers["Authorization"] == f"Bearer {TOKEN}"
        if repo not in self.server.commits or (self.server.private[repo] and not signed):
            return self.answer(401, X_Error_Code="RepoNotFound")
        if repo in self.server.gated and kind != "revision":
            return self.answer(403, X_Error_Code="GatedRepo")
        commits = self.server.commits[repo]
        revisions = {oid(k + 1): k for k in range(len(commits))} | {f"v{k + 1}": k for k in range(len(commits))}
        number = revisions.get(revision, len(commits) - 1 if revision == "main" else None)
        if number is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        commit = oid(number + 1)
        if kind == "revision":
            return self.answer(200, {"id": repo, "sha": commit, "siblings": []})
        if kind == "tree":
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in commits[number].items()
            ]
            return self.answer(200, json.dumps(files).encode(), Content_Type="application/json")
        if file not in commits[number]:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = commits[number][file]
        return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


def oid(number: int) -> str:
    """Return the hash of the commit with this number."""
    return f"{number:040x}"


@contextmanager
def running_hub(cache: str, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a Hub that the library uses, with an empty cache and a login."""
    from huggingface_hub import constants

    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    # The library reads these variables when it is imported.
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", cache)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/token")
    patch.setenv("HF_TOKEN", TOKEN)
    patch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
