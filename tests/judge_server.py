"""A local server that speaks the chat completions protocol, and misbehaves as it is told to."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer_of(body):
    """The answer that a request asks to grade."""
    text = body["messages"][-1]["content"]
    return re.search(r"\[answer (\w+)\]\n(.*)\n\[end of answer \1\]", text, re.S)[2]


def by_length(body):
    """A grade from 0 to 10, for the length of the answer, as JSON."""
    return json.dumps({"reason": "its length", "score": len(answer_of(body)) % 11})


class JudgeServer(ThreadingHTTPServer):
    """``behave(body)`` gives the text of a reply, or ``(status, headers, bytes)``; ``requests`` is what came."""

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.requests, self.headers = behave, [], []
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        self.pause = 0.0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            time.sleep(server.pause)
            found = server.behave(body)
        finally:
            with server.lock:
                server.now -= 1
        if isinstance(found, str):
            message = {"role": "assistant", "content": found}
            found = 200, {}, json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
        status, headers, content = found
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def judging(behave=by_length):
    """A server that runs in a thread for the length of a block."""
    server = JudgeServer(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
