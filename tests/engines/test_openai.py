"""The client against a mock server in this process: what it reads, and how it fails."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stages.engines import Ballot
from stages.engines import openai as engine
from stages.errors import AnswerError, ConfigError, ServerError

CHAT = Ballot([{"role": "user", "content": "q"}], ("System1", "System2"))
TEXT = Ballot("q", (" one", " many"))


def chat_answer(body: dict) -> dict:
    """System, then 1 with probability 0.2 and 2 with 0.8, as a server with constrained decoding gives it."""
    tokens = [("System", {"System": 0.0}), ("2", {"2": math.log(0.8), "1": math.log(0.2)})][: body["max_tokens"]]
    content = [{"token": t, "top_logprobs": [{"token": k, "logprob": v} for k, v in a.items()]} for t, a in tokens]
    return {"choices": [{"logprobs": {"content": content}}]}


def text_answer(body: dict) -> dict:
    return {
        "choices": [{"logprobs": {"tokens": [" one"], "top_logprobs": [{" one": math.log(0.75), " many": math.log(0.25)}]}}]
    }


def usual(path: str, body: dict) -> tuple[int, dict | str]:
    return 200, chat_answer(body) if "messages" in body else text_answer(body)


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable]:
    """Start a server that answers by a function; returns its base_url and the list of requests it will have seen."""
    servers = []
    monkeypatch.setattr(engine.time, "sleep", lambda s: None)

    def start(answer=usual):
        seen: list[dict] = []

        class Handler(BaseHTTPRequestHandler):
            def _reply(self, code: int, body: dict | str) -> None:
                text = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                self._reply(200, {"data": [{"id": "judge"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append(body)
                self._reply(*answer(self.path, body))

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(url: str, *ballots: Ballot, model: str | None = None) -> dict[int, float]:
    with engine.Client(url, model, "", 4) as client:
        return {i: choice.shares[1] for i, choice in client.choose(list(ballots))}


def test_chat_and_completion(serve):
    url, seen = serve()
    assert ask(url, CHAT, TEXT, CHAT) == pytest.approx({0: 0.8, 1: 0.25, 2: 0.8})
    assert all(body["structured_outputs"]["choice"] in (["System1", "System2"], [" one", " many"]) for body in seen)


def test_it_learns_how_many_tokens_it_needs(serve):
    url, seen = serve()
    with engine.Client(url, None, "", 1) as client:
        list(client.choose([CHAT] * 5))
    assert [body["max_tokens"] for body in seen] == [1, 2, 2, 2, 2, 2]


def test_a_server_that_fails_for_a_while_is_asked_again(serve):
    failures = iter([503, 500])

    def answer(path, body):
        code = next(failures, 200)
        return (code, "busy") if code != 200 else usual(path, body)

    url, seen = serve(answer)
    assert ask(url, TEXT) == pytest.approx({0: 0.25})
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (lambda p, b: (500, "no"), ServerError, "does not answer: 500 no"),
        (lambda p, b: (401, "key?"), ConfigError, "refused: 401 key"),
        (lambda p, b: (200, "<html>"), ServerError, "does not answer: JSONDecodeError"),
        (lambda p, b: (200, {"choices": []}), AnswerError, "gave no readable choice between"),
        (lambda p, b: (200, {"choices": [{"logprobs": None}]}), AnswerError, "gave no readable choice between"),
        (
            lambda p, b: (200, {"choices": [{"logprobs": {"tokens": ["x"], "top_logprobs": [{"x": 0.0}]}}]}),
            AnswerError,
            "do not differ within 8 tokens",
        ),
    ],
    ids=["500", "401", "html", "empty", "null", "garbage"],
)
def test_faults_are_named(serve, answer, error, text):
    url, _ = serve(answer)
    with pytest.raises(error, match=text):
        ask(url, TEXT)


def test_no_server(monkeypatch):
    monkeypatch.setattr(engine.time, "sleep", lambda s: None)
    with pytest.raises(ServerError, match="does not answer: ConnectError"):
        engine.Client("http://127.0.0.1:9", None, "", 1)


def test_another_model_than_asked_for(serve):
    url, _ = serve()
    with pytest.raises(ConfigError, match="serves judge, not jury"):
        ask(url, TEXT, model="jury")
