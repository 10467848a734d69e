"""A server on this machine that answers what huggingface_hub asks of the hub to make a repository, fill and read it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Repositories in memory: `files[repo][path]`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str) -> str:
        """The name of a repository's state."""
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = "/".join(filter(None, (wanted.get("organization") or "me", wanted["name"])))
            answer = {"url": f"{self.server.url}/{repo}", "name": repo}
            if repo in self.server.files:
                return self.answer({**answer, "error": "You already created this model repo"}, 409)
            self.server.files[repo] = {}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.server.private.add(repo)
            return self.answer(answer)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        found = re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", self.path.partition("?")[0])
        if found is None or found[1] not in self.server.files:
            return self.answer({"error": "Repository not found"}, 404)
        repo = found[1]
        if found[2] == "preupload":
            asked = json.loads(body)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self.answer({"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        oid = self.server.commit(repo)
        return self.answer({"commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "success": True})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for repo, files in self.server.files.items():
            if re.fullmatch(rf"/api/models/{repo}(/revision/[^/]+)?", path):
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                return self.answer({"id": repo, "sha": self.server.commit(repo), "siblings": siblings})
            if re.fullmatch(rf"/api/models/{repo}/tree/[^/]+", path):
                tree: Any = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                return self.answer(tree)
            file = re.fullmatch(rf"/{repo}/resolve/[^/]+/(.+)", path)
            if file and file[1] in files:
                content = files[file[1]]
                return self.answer(content, etag=hashlib.sha1(content).hexdigest(), commit=self.server.commit(repo))
        return self.answer({"error": "Repository not found"}, 404, code="RepoNotFound")

    def answer(self, what: Any, status: int = 200, etag: str = "", commit: str = "", code: str = "") -> None:
        content = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(status)
        for name, value in (("ETag", f'"{etag}"' if etag else ""), ("X-Repo-Commit", commit), ("X-Error-Code", code)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/octet-stream" if etag else "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub while the block runs."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
