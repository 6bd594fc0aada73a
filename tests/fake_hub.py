"""The hub's HTTP interface on this machine, as far as an upload and a download use it; it keeps what it is sent."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_may_write"
LARGE = (".bin",)


class Refused(Exception):
    """A status, and what the hub says with it."""

    def __init__(self, status: int, message: str, **body: object) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}


class FakeHub:
    """Repositories by name: whether they are private, and by branch their files.

    Attributes:
        failures: by a pattern of "METHOD /path", the status that such a request is answered with.
        role: of the account's token.
        requests: every "METHOD /path", in their order.
    """

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}
        self.failures: dict[str, int] = {}
        self.role = "write"
        self.requests: list[str] = []
        self.url = ""

    def make(self, repository: str, *, private: bool = False) -> None:
        self.private[repository] = private
        self.branches[repository, "main"] = {}

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> object:
        """What to say: bytes of a file, or a JSON document."""
        self.requests.append(f"{method} {path}")
        for pattern, status in self.failures.items():
            if re.search(pattern, f"{method} {path}"):
                raise Refused(status, f"made to fail\nwith {status}")
        for verb, pattern, action in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                if not path.startswith("/large/") and authorization != f"Bearer {TOKEN}":
                    raise Refused(401, "Invalid username or password.")
                return action(self, body, *map(unquote, match.groups()))
        raise Refused(404, f"no such page: {method} {path}")

    def who_am_i(self, _body: bytes) -> object:
        return {"name": "org", "type": "user", "auth": {"accessToken": {"role": self.role}}}

    def create(self, body: bytes) -> object:
        asked = json.loads(body)
        repository = f"{asked['organization']}/{asked['name']}"
        url = f"{self.url}/{repository}"
        if repository in self.private:
            raise Refused(409, "You already created this model repo", url=url)
        self.make(repository, private=asked.get("visibility") == "private")
        return {"url": url}

    def branch(self, _body: bytes, repository: str, name: str) -> object:
        if (repository, name) in self.branches:
            raise Refused(409, "Reference already exists")
        self.branches[repository, name] = dict(self.branches[repository, "main"])
        return {}

    def validate(self, body: bytes) -> object:
        """Refuse what the hub refuses: no metadata that can be read, or a base model that is no model's name."""
        text = json.loads(body)["content"]
        metadata = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
        if not isinstance(metadata, dict):
            raise Refused(400, "no metadata", errors=[{"message": "no metadata"}])
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", metadata.get("base_model", "none")):
            raise Refused(400, "invalid", errors=[{"message": '"base_model" is not valid'}])
        return {"errors": [], "warnings": [] if "license" in metadata else [{"message": "no license is named"}]}

    def preupload(self, body: bytes, repository: str, branch: str) -> object:
        held = self._files(repository, branch)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(file["path"], held[file["path"]]) if file["path"] in held else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def batch(self, body: bytes, _repository: str) -> object:
        return {
            "transfer": "basic",
            "objects": [
                one if one["oid"] in self.large else one | {"actions": self._actions(one["oid"])}
                for one in json.loads(body)["objects"]
            ],
        }

    def _actions(self, oid: str) -> object:
        return {"upload": {"href": f"{self.url}/large/{oid}"}, "verify": {"href": f"{self.url}/verify"}}

    def put(self, body: bytes, oid: str) -> object:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "not what was announced")
        self.large[oid] = body
        return {}

    def verify(self, body: bytes) -> object:
        asked = json.loads(body)
        if len(self.large.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "not here")
        return {}

    def commit(self, body: bytes, repository: str, branch: str) -> object:
        header, *operations = (json.loads(line) for line in body.splitlines())
        files = self._files(repository, branch)
        for operation in operations:
            value = operation["value"]
            large = operation["key"] == "lfsFile"
            files[value["path"]] = self.large[value["oid"]] if large else base64.b64decode(value["content"])
        self.commits.append(header["value"]["summary"])
        return {"commitUrl": f"{self.url}/{repository}/commit/{self.sha()}", "commitOid": self.sha()}

    def information(self, _body: bytes, repository: str, branch: str = "main") -> object:
        files = self._files(repository, branch)
        return {
            "id": repository,
            "private": self.private[repository],
            "sha": self.sha(),
            "siblings": [{"rfilename": name} for name in files],
        }

    def resolve(self, _body: bytes, repository: str, _commit: str, name: str) -> bytes:
        return self._files(repository, "main")[name]

    def _files(self, repository: str, branch: str) -> dict[str, bytes]:
        try:
            return self.branches[repository, branch]
        except KeyError:
            raise Refused(404, "Repository not found") from None

    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    ROUTES = (
        ("GET", r"/api/whoami-v2", who_am_i),
        ("POST", r"/api/repos/create", create),
        ("POST", r"/api/validate-yaml", validate),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", branch),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", preupload),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", commit),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
        ("PUT", r"/large/([0-9a-f]{64})", put),
        ("POST", r"/verify", verify),
        ("GET", r"/api/models/([^/]+/[^/]+)", information),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", information),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", resolve),
    )


def _oid(name: str, content: bytes) -> str:
    """What git calls a file: SHA-256 of a large one, SHA-1 of a blob."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self._body()
            status, etag = 200, ""
            try:
                said = hub.answer(self.command, urlsplit(self.path).path, self.headers.get("Authorization"), body)
            except Refused as refusal:
                status, said = refusal.status, refusal.body
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            if isinstance(said, bytes):
                etag = hashlib.sha256(said).hexdigest()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if etag:
                self.send_header("ETag", f'"{etag}"')
                self.send_header("X-Repo-Commit", hub.sha())
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _do

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
