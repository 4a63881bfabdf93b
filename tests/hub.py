"""A stand-in for the Hugging Face Hub on loopback: repositories of datasets with commits, LFS objects and tags.

It speaks as much of the protocol as `huggingface_hub` uses to push without Xet.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_token-of-the-tests"


class Hub:
    """The server.

    Attributes:
        files: repository → path → content, at the newest commit.
        tags: repository → tag → the files of its commit.
        commits: (repository, paths added, paths deleted) of each commit.
        sent: sha256 of each object that was uploaded.
        refuse: called with method and path of each request; if true, it is answered with status 403.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.tags: dict[str, dict[str, dict[str, bytes]]] = {}
        self.commits: list[tuple[str, list[str], list[str]]] = []
        self.objects: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.private: dict[str, bool] = {}
        self.refuse: Any = lambda method, path: False
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing is logged."""

    def _answer(self, status: int, value: Any = None, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _serve(self) -> None:
        hub, path = self.server_hub, self.path.partition("?")[0]
        body = self._body()
        if path.startswith("/objects/"):
            if hub.refuse(self.command, path):
                return self._answer(403, {"error": "no more today"})
            content = path.removeprefix("/objects/")
            assert hashlib.sha256(body).hexdigest() == content
            hub.objects[content] = body
            hub.sent.append(content)
            return self._answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if hub.refuse(self.command, path):
            return self._answer(403, {"error": "no more today"})
        return self._api(path, body)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _api(self, path: str, body: bytes) -> None:
        hub = self.server_hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            hub.files.setdefault(repo, {})
            hub.tags.setdefault(repo, {})
            hub.private.setdefault(repo, asked.get("visibility") == "private" or bool(asked.get("private")))
            return self._answer(200, {"url": f"{hub.url}/datasets/{repo}"})
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self._answer(200, {"errors": [], "warnings": []})
        found = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+?)(?:\.git)?/(.*)", path)
        assert found is not None, path
        repo, rest = found.groups()
        if repo not in hub.files:
            return self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = hub.files[repo]
        match rest.split("/"):
            case ["tree", *_]:
                return self._answer(200, [_entry(path, content) for path, content in files.items()])
            case ["preupload", _]:
                return self._answer(200, {"files": [_mode(one, files) for one in json.loads(body)["files"]]})
            case ["info", "lfs", "objects", "batch"]:
                return self._answer(
                    200, {"transfer": "basic", "objects": [*map(self._action, json.loads(body)["objects"])]}
                )
            case ["commit", _]:
                self._commit(repo, [json.loads(line) for line in body.splitlines()])
                return self._answer(200, {"commitUrl": f"{hub.url}/datasets/{repo}/commit/1", "commitOid": "1" * 40})
            case ["refs"]:
                tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": "1" * 40} for tag in hub.tags[repo]]
                return self._answer(200, {"branches": [], "converts": [], "tags": tags})
            case ["tag", tag] if self.command == "DELETE":
                del hub.tags[repo][tag]
                return self._answer(200)
            case ["tag", _]:
                hub.tags[repo][json.loads(body)["tag"]] = dict(files)
                return self._answer(200)
        raise AssertionError(path)

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        known = asked["oid"] in self.server_hub.objects
        href = f"{self.server_hub.url}/objects/{asked['oid']}"
        return {**asked, **({} if known else {"actions": {"upload": {"href": href, "header": {}}}})}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        hub, added, deleted = self.server_hub, list[str](), list[str]()
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                    added.append(value["path"])
                case "lfsFile":
                    hub.files[repo][value["path"]] = hub.objects[value["oid"]]
                    added.append(value["path"])
                case "deletedFile":
                    del hub.files[repo][value["path"]]
                    deleted.append(value["path"])
        hub.commits.append((repo, added, deleted))


def _is_large(path: str) -> bool:
    return path.endswith((".tar", ".parquet", ".webp"))


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
    oid = hashlib.sha256(content).hexdigest()
    return {**entry, "lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if _is_large(path) else entry


def _mode(asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    mode = "lfs" if _is_large(asked["path"]) else "regular"
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}
