"""A stand-in for the Hugging Face hub on this machine: it makes repositories and keeps what is pushed."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_standin"


class Hub:
    """What the server was told: ``repos`` (name to whether it is private) and ``files`` (name and path to bytes).

    ``full`` makes commits fail; ``role`` is that of the token.
    """

    def __init__(self):
        self.repos, self.files = {}, {}
        self.full, self.role, self.endpoint = False, "write", ""

    def answer(self, method, path, body):
        """Status and JSON."""
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if name in self.repos else 200
            self.repos.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
            return status, {"url": f"{self.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return 200, {"files": [{**file, "shouldIgnore": False} for file in files]}
        if "/commit/" in path:
            if self.full:
                return 403, {"error": "Storage quota exceeded"}
            lines = [json.loads(line) for line in body.splitlines()]
            for file in (line["value"] for line in lines if line["key"] == "file"):
                self.files[name, file["path"]] = base64.b64decode(file["content"])
            return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": "1"}
        return 404, {"error": f"no {method} {path} here"}


@contextmanager
def serve():
    """A running :class:`Hub`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            path = self.path.partition("?")[0]
            status, said = hub.answer(self.command, path, body) if known else (401, {"error": "Invalid credentials"})
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 403:
                self.send_header("X-Error-Message", said["error"])
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = reply

        def log_message(self, *_):
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
