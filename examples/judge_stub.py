"""A stand-in for a judge: a local server that speaks the chat completions protocol and grades by a simple rule.

    python examples/judge_stub.py     serves http://127.0.0.1:8008/v1 until Ctrl-C

It exists so that `llm_judge.py` runs without a model server. It gives 10 for at most six words, less for more, and
half of that for an answer that does not end.
"""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def grade(answer: str) -> int:
    """0 to 10."""
    words = len(answer.split())
    points = max(0, 10 - max(0, words - 6)) if words else 0
    return points if answer.strip().endswith(".") else points // 2


class Judge(BaseHTTPRequestHandler):
    """Answers ``POST .../chat/completions`` with a grade of what stands between ``[answer ...]`` and its end."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """One request: one grade."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = re.search(r"\[answer (\w+)\]\n(.*)\n\[end of answer \1\]", request["messages"][-1]["content"], re.S)
        reply = json.dumps({"reason": "its length and its end", "score": grade(answer[2])})
        message = {"role": "assistant", "content": reply}
        body = json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def server(port: int = 0) -> ThreadingHTTPServer:
    """A server that is not running yet; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), Judge)


if __name__ == "__main__":
    print("http://127.0.0.1:8008/v1")
    server(8008).serve_forever()
