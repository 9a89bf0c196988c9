"""An OpenAI-compatible server in this process, on loopback, that answers as a test says: well, badly or not at all."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG, DIE, HALF = "hang", "die", "half"  # never reply; hang up; hang up in the middle of the reply
Steps = Sequence[tuple[str, Mapping[str, float]]]  # emitted token, probabilities of it and of others


@dataclass
class Reply:
    """A reply of the model: text, and the probabilities of its tokens where the server gives log-probs."""

    text: str | None
    steps: Steps = ()
    finish: str = "stop"
    refusal: str | None = None


@dataclass
class Server:
    """``behave(body, number)`` says what becomes of the request: a :class:`Reply`, an HTTP status, bytes, or one of the words."""

    behave: Callable[[dict[str, Any], int], Reply | int | bytes | str]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    @property
    def prompts(self) -> list[str]:
        """The last message of each request."""
        return [r["messages"][-1]["content"] for r in self.requests]


@contextmanager
def serving(behave: Callable[[dict[str, Any], int], Reply | int | bytes | str]) -> Iterator[Server]:
    server, over, lock = Server(behave), threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.requests.append(body)
                server.keys.add(self.headers["Authorization"])
                found = server.behave(body, len(server.requests) - 1)
            self.close_connection = True
            match found:
                case "hang":
                    over.wait(20)
                case "die":
                    pass
                case "half":
                    self.send(200, b'{"choices": [{"mess', length=5000)
                case int():
                    self.send(found, json.dumps({"error": {"message": f"this is a {found}"}}).encode())
                case bytes():
                    self.send(200, found)
                case Reply():
                    self.send(200, json.dumps(said(found, body)).encode())

        def send(self, status: int, content: bytes, length: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length or len(content)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # the client has gone

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            over.set()
            http.shutdown()
            thread.join()


def said(reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
    def entry(token: str, p: float) -> dict[str, Any]:
        return {"token": token, "logprob": math.log(p), "bytes": None}

    logprobs = None
    if reply.steps and body.get("logprobs"):
        content = [
            {**entry(token, among[token]), "top_logprobs": [entry(t, p) for t, p in among.items()]}
            for token, among in reply.steps
        ]
        logprobs = {"content": content, "refusal": None}
    message = {"role": "assistant", "content": reply.text, "refusal": reply.refusal}
    choice = {"index": 0, "message": message, "finish_reason": reply.finish, "logprobs": logprobs}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
