"""An OpenAI-compatible server for tests, whose faults follow a script, and runs whose voter asks it."""

import hashlib
import json
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from conftest import make_steps

from stages.config import Config
from stages.pipeline.resolve import load, resolved
from stages.records import read_labels, write_jsonl
from stages.store.artifacts import Artifact

Fault = Callable[[int, str, dict[str, Any]], tuple[str, Any] | None]
"""From the number of the question, the path and the body to what goes wrong, if anything."""


def probability(text: str, weights: str = "") -> float:
    """Of System 2, from the text of the prompt alone: the same on every server with these weights."""
    return 0.05 + 0.9 * hashlib.sha256((weights + text).encode()).digest()[0] / 255


class Mock:
    """A model served under a name.

    `log` has every question that reached it, `bodies` the requests, `headers` those of the last one.
    """

    def __init__(
        self, fault: Fault | None = None, constrains: bool = True, weights: str = "", say: str | None = None
    ) -> None:
        self.fault, self.constrains, self.weights, self.say = fault, constrains, weights, say
        self.log: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: Mapping[str, str] = {}
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        chat = "messages" in body
        text = "\n".join(m["content"] for m in body["messages"]) if chat else str(body["prompt"])
        words = body.get("structured_outputs", {}).get("choice") if self.constrains else None
        if words is None:
            said = self.say or f"{self.weights} is what it says"
            if chat and "Answer System1 or System2" in text and self.say is None:
                said = f"**System {1 + (probability(text, self.weights) > 0.5)}**"
            return {"choices": [{"message": {"content": said}} if chat else {"text": said}]}
        two = probability(text, self.weights)
        common = len(words[0]) - len(words[0].rstrip("1")) and words[0].rstrip("1")
        steps = [(common, {common: 0.0})] if common else []
        rest = [word.removeprefix(common or "") for word in words]
        steps.append((rest[two > 0.5], {rest[0]: math.log(1 - two), rest[1]: math.log(two)}))
        return with_logprobs(steps[: body["max_tokens"]], chat)


def with_logprobs(steps: list[tuple[str, dict[str, float]]], chat: bool) -> dict[str, Any]:
    """A reply of these tokens, each with the log-probabilities of its alternatives."""
    tokens, alternatives = zip(*steps, strict=True)
    text = "".join(tokens)
    if not chat:
        return {"choices": [{"text": text, "logprobs": {"tokens": tokens, "top_logprobs": alternatives}}]}
    content = [
        {"token": t, "top_logprobs": [{"token": k, "logprob": v} for k, v in a.items()]} for t, a in steps
    ]
    return {"choices": [{"message": {"content": text}, "logprobs": {"content": content}}]}


OF_REPLIES: list[dict[str, Any]] = [
    *({"model": name} for name in ("other", "m-large", "M", 7)),
    {"error": {}}, {"refusal": "no"}, {"status": "failed"}, {"object": "chat.completion.chunk"},
    {"object": "error"}, *({"usage": {"completion_tokens": number}} for number in (0, 7, 99)),
]  # fmt: skip
"""Fields that say of a reply that it is none, beside a choice that can be read."""
OF_CHOICES: list[dict[str, Any]] = [
    *({"index": index} for index in (1, False, 0.0, None)),
    *({"finish_reason": reason} for reason in ("abort", "ERROR", "cancelled", "content_filter")),
    {"stop_reason": "error"}, {"error": "overloaded"}, {"refusal": "no"}, {"status": "failed"},
    {"logprobs": None}, {"delta": {}}, {"message": None}, {"message": {"content": "A", "refusal": "no"}},
    *({"message": {"content": text}} for text in ("B", "Syst\u0435m1", "\ud800")),
    {"message": {"tool_calls": [{}]}}, {"token_ids": [*range(99)]},
]  # fmt: skip
"""The same of a choice."""


@contextmanager
def serve(mock: Mock) -> Iterator[Mock]:
    """Run it in this process; `mock.url` is its base URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"data": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = json.dumps([body.get("messages") or body.get("prompt")])
            with mock.lock:
                mock.log.append(key)
                mock.bodies.append(body)
                mock.headers = self.headers
                number = len(mock.log) - 1
            fault = mock.fault(number, self.path, body) if mock.fault else None
            whole = json.dumps(mock.reply(self.path, body)).encode()
            self._answer(*(fault or ("body", whole)), whole)

        def _answer(self, kind: str, detail: Any, whole: bytes) -> None:
            if kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            elif kind == "hang":
                time.sleep(detail)
                self.close_connection = True
            elif kind == "status":
                code, headers, text = detail
                self._send(code, text, headers)
            elif kind == "truncated":
                self._send(200, whole[: len(whole) // 2], {"Content-Length": len(whole)})
                self.close_connection = True
            elif kind == "body":
                self._send(200, detail)
            elif kind == "twice":
                self._send(200, whole)
                self._send(200, whole)

        def _send(self, code: int, body: Any, headers: dict[str, Any] | None = None) -> None:
            text = body if isinstance(body, bytes | str) else json.dumps(body)
            data = text.encode() if isinstance(text, str) else text
            self.send_response(code)
            usual = {"Content-Length": len(data), "Content-Type": "application/json"}
            for name, value in (usual | (headers or {})).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, *_: object) -> None: ...

    with Server(("127.0.0.1", 0), Handler) as server:
        mock.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield mock
        finally:
            server.shutdown()


def voting(folder: Path, tiny: Path, number: int) -> Callable[..., Config]:
    """A function from the URL of a server to a config with so many rows, on which it votes."""
    rows = [{"question": f"Question {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(number)]
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "config.yaml").write_text(
        f"{{run: faults, model: {{name: {tiny}}}, data: {{path: {folder}/rows.jsonl}}, "
        "server: {concurrency: 8, timeout_s: 1}, eval: {targets: [base]}}\n"
    )

    def make(url: str, runs: str = "runs", **classify: object) -> Config:
        voter = {"model": "judge", "base_url": url, "persona": "role_play"}
        section = json.dumps({"voters": [voter], "accept_weak": True, **classify})
        return load(folder / "config.yaml", [f"runs_dir={folder / runs}", f"classify={section}"])

    return make


def classify(config: Config, force: bool = False) -> Artifact:
    """The labels of the rows, made now if they are not there."""
    return make_steps(resolved(config), "classify:train", force=force)["classify:train"][0]


def system_of(artifact: Artifact) -> list[int | None]:
    return [row.system for row in read_labels(artifact.path / "labels.jsonl")]
