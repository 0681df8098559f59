"""The gateway before a server: which model answers, with which system message, and what passes unchanged."""

import asyncio
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest
from conftest import wait_for
from mock_server import Mock, serve

from stages import serve as serve_
from stages.engines.chats import CHAT, ModePrompt, in_mode, question
from stages.engines.connections import Connections
from stages.engines.gateway import MAX_BODY, Gateway
from stages.engines.mode_choice import ModeChoice
from stages.errors import ServerError

uvicorn = pytest.importorskip("uvicorn")


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


async def _vote(example, post):
    if "stalled" in example.prompt:
        await asyncio.sleep(60)
    if "reply" in example.prompt:
        return [(await post("completions", {"prompt": "vote"}))["vote"]]
    return [0.91234 if "hard" in example.prompt else 0.1]


def _mode_of(vote):
    return "fast" if vote is not None and vote < 0.5 else "slow"


def _gateway(
    upstream: str, key: str = "", exit_error=lambda: None, origins=(), choice: ModeChoice | None = None
) -> Gateway:
    modes = {"fast": ModePrompt(), "slow": ModePrompt("Think.")}
    choice = choice or ModeChoice(_vote, _mode_of)
    return Gateway(upstream, modes, choice, exit_error, key, "server's own", origins)


@contextmanager
def _before(upstream: str, *settings, **more):
    """A client of a gateway before a server, on a port of its own."""
    gateway = _gateway(upstream, *settings, **more)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        gateway.app(), http=Connections(200).protocol, log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    assert wait_for(lambda: server.started)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def served():
    mock = Mock()
    mock.models = [{"id": name} for name in ("base", "fast", "slow", "router")]
    with serve(mock), _before(mock.url.removesuffix("/v1")) as client:
        yield mock, client


@pytest.mark.parametrize(("text", "mode", "vote"), [("hard", "slow", "0.9123"), ("easy", "fast", "0.1000")])
def test_auto_is_answered_in_the_mode_of_its_vote(served, text, mode, vote):
    mock, client = served
    reply = client.post(CHAT, json={"model": "auto", "messages": [_user(text)]})
    assert reply.status_code == 200 and mock.bodies[-1]["model"] == mode
    assert (reply.headers["x-lorapar-mode"], reply.headers["x-lorapar-system2"]) == (mode, vote)


def test_a_chat_gets_the_system_message_of_its_mode_unless_it_has_one(served):
    mock, client = served
    own = [[{"role": role, "content": "Be brief."}, _user("b")] for role in ("system", "developer")]
    for mode, messages in (("slow", [_user("a")]), *(("slow", chat) for chat in own), ("fast", [_user("c")])):
        client.post(CHAT, json={"model": mode, "messages": messages})
    think = {"role": "system", "content": "Think."}
    asked = [body["messages"] for body in mock.bodies]
    assert asked == [[think, _user("a")], *own, [_user("c")]]


@pytest.mark.parametrize(
    ("path", "content", "field"),
    [
        ("/v1/messages", {"messages": [_user("a")]}, "system"),
        ("/v1/responses", {"input": "a"}, "instructions"),
        ("/v1/responses", {"input": [_user("a")]}, "instructions"),
    ],
)
def test_other_chats_get_it_too(path, content, field):
    changed = in_mode(content, path, ModePrompt("Think.", {"enable_thinking": True}))
    assert (changed[field], changed["chat_template_kwargs"]) == ("Think.", {"enable_thinking": True})
    own = in_mode({**content, "chat_template_kwargs": {"a": 1}}, path, ModePrompt(None, {"a": 0, "b": 2}))
    assert own["chat_template_kwargs"] == {"a": 1, "b": 2}
    assert in_mode({**content, field: "Be brief."}, path, ModePrompt("Think."))[field] == "Be brief."


def test_a_system_message_among_the_inputs_is_one():
    content = {"input": [{"role": "developer", "content": "Be brief."}, _user("a")]}
    assert in_mode(content, "/v1/responses", ModePrompt("Think.")) == content


def test_other_requests_pass_unchanged(served):
    mock, client = served
    reply = client.post("/v1/completions", json={"model": "fast", "prompt": "x", "n": 3})
    assert mock.bodies == [{"model": "fast", "prompt": "x", "n": 3}]
    assert reply.json() == mock.reply("/v1/completions", mock.bodies[0])
    assert client.post("/tokenize", json={"model": "fast", "prompt": "a b"}).json() == {"count": 2}


def test_the_models_are_the_modes(served):
    _, client = served
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["fast", "slow", "auto"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"model": "auto", "prompt": "x"}, "model auto answers chats"),
        (CHAT, {"model": "auto", "messages": []}, "needs a user message"),
        (CHAT, {"model": "base", "messages": []}, "unknown model 'base'; choose from fast, slow"),
        (CHAT, {"model": ["x"], "messages": [_user("x")]}, "unknown model ['x']"),
        (CHAT, {"messages": [_user("x")]}, "no model is named; choose from fast, slow, auto"),
        (CHAT, [1], "the body is no JSON object"),
        ("/v1/load_lora_adapter", {"lora_name": "x"}, "unknown endpoint /v1/load_lora_adapter"),
    ],
)
def test_what_cannot_be_served_is_refused_in_the_form_of_openai(served, path, body, message):
    mock, client = served
    reply = client.post(path, json=body)
    assert (reply.status_code, mock.bodies) == (404 if "lora_name" in body else 400, [])
    assert message in reply.json()["error"]["message"]


def test_a_key_is_asked_for_and_not_passed_on():
    mock, body = Mock(), {"model": "fast", "prompt": "x"}
    right = [{"Authorization": "Bearer secret"}, {"Authorization": "bearer secret"}, {"x-api-key": "secret"}]
    wrong = [{}, {"Authorization": "Bearer Secret"}, {"x-api-key": "Secret"}]
    with serve(mock), _before(mock.url.removesuffix("/v1"), key="secret") as client:
        for headers in right + wrong:
            reply = client.post("/v1/completions", json=body, headers=headers)
            assert reply.status_code == (200 if headers in right else 401) and "secret" not in reply.text
            assert mock.headers["authorization"] == "Bearer server's own" and "x-api-key" not in mock.headers
        assert client.get("/v1/models").status_code == 401 and client.get("/health").status_code == 200
    assert mock.bodies == [body] * 3


def test_a_server_that_is_gone_or_cannot_list_its_models_is_said(served):
    mock, client = served
    mock.models = None
    assert client.get("/v1/models").status_code == 502
    with _before("http://127.0.0.1:1") as client:
        for reply in (client.get("/v1/models"), client.post(CHAT, json={"model": "fast", "messages": []})):
            assert reply.status_code == 502 and "does not answer" in reply.json()["error"]["message"]


def test_a_client_that_leaves_ends_its_request():
    """The server sees the connection close long before its answer is due."""
    seen = []
    listener = socket.create_server(("127.0.0.1", 0))

    def answer_never() -> None:
        connection, _ = listener.accept()
        connection.settimeout(60)
        request = b""
        while b"the end" not in request:
            request += connection.recv(65536)
        seen.append((connection.recv(1), time.monotonic()))
        connection.close()

    thread = threading.Thread(target=answer_never)
    thread.start()
    with _before(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json={"model": "fast", "messages": [_user("the end")]}, timeout=0.5)
        left = time.monotonic()
        thread.join(50)
    listener.close()
    [(data, at)] = seen
    assert data == b"" and at - left < 40


def test_more_requests_than_a_pool_of_connections_run_at_once():
    together = threading.Barrier(120, timeout=60)
    mock = Mock(lambda n, path, body: together.wait() and None)
    with serve(mock), _before(mock.url.removesuffix("/v1")) as client:
        body = {"model": "fast", "prompt": "x"}
        url = client.base_url.join("/v1/completions")
        with ThreadPoolExecutor(120) as pool:
            list(pool.map(lambda _: httpx.post(url, json=body, timeout=60), range(120)))
    assert len(mock.bodies) == 120 and not together.broken


def test_a_question_is_the_last_of_the_user_after_earlier_turns_whatever_its_form():
    parts = {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "image_url"}, 3]}
    messages = [{"role": "system", "content": "s"}, _user("a"), {"role": "assistant", "content": "b"}, parts]
    example = question(CHAT, {"messages": messages})
    assert (example.prompt, example.turns) == ("c", [["a", "b"]])
    tool = [*messages, {"role": "assistant", "content": None}, {"role": "tool", "content": "3"}]
    assert question(CHAT, {"messages": tool}) == example


def test_a_server_that_ended_ends_the_gateway():
    gateway = _gateway("http://127.0.0.1:1", exit_error=lambda: ServerError("it ended"))
    started = []
    with serve_.listener("127.0.0.1", 0) as bound, pytest.raises(ServerError, match="it ended"):
        gateway.run(bound, lambda: started.append(True))
    assert started == [True]


def test_a_body_that_is_too_long_is_not_read():
    with _before("http://127.0.0.1:1", "secret") as client:
        body = b"x" * (MAX_BODY + 1)
        assert client.post(CHAT, content=body).status_code == 401
        assert client.post(CHAT, content=body, headers={"x-api-key": "secret"}).status_code == 413


def test_a_header_that_is_too_long_ends_the_connection():
    with _before("http://127.0.0.1:1") as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000)
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""


def test_connections_that_send_nothing_make_room_for_others(served):
    _, client = served
    address = (client.base_url.host, client.base_url.port)
    idle = [socket.create_connection(address, timeout=60) for _ in range(300)]  # of 200
    try:
        for connection in idle:
            with suppress(OSError):
                connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert client.get("/v1/models").status_code == 200
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("failure", ["stalled", "reply"])
def test_without_votes_auto_is_slow_at_once_and_the_log_says_so_once(served, caplog, monkeypatch, failure):
    monkeypatch.setattr("stages.engines.mode_choice.VOTE_S", 0.3)
    _, client = served
    started = time.monotonic()
    for _ in range(9):
        reply = client.post(CHAT, json={"model": "auto", "messages": [_user(failure)]})
        assert (reply.headers["x-lorapar-mode"], reply.headers["x-lorapar-system2"]) == ("slow", "none")
    assert time.monotonic() - started < 30
    assert sum("auto gets no votes" in record.message for record in caplog.records) == 1


def _fast_reply(probability: float, streamed: bool) -> bytes:
    """A chat's answer of two tokens, the second of this probability."""
    logprobs = [{"content": [{"token": "4", "logprob": math.log(p)}]} for p in (1.0, probability)]
    if streamed:
        parts = [{"choices": [{"index": 0, "delta": {"content": "quick"}, "logprobs": p}]} for p in logprobs]
        return "".join(f"data: {json.dumps(part)}\n\n" for part in parts).encode() + b"data: [DONE]\n\n"
    told = {"content": [*logprobs[0]["content"], *logprobs[1]["content"]]}
    return json.dumps({"choices": [{"index": 0, "message": {"content": "quick"}, "logprobs": told}]}).encode()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("text", "probability", "mode", "signal"),
    [
        ("easy", 0.9, "fast", "0.1000"),
        ("easy", 0.05, "slow", "0.5250"),  # the mean with a vote of .1
        ("hard", 0.9, "slow", "0.5062"),
        ("easy", None, "slow", "none"),
    ],
)
def test_in_a_cascade_an_unsure_answer_is_never_seen(text, probability, mode, signal, streamed):
    """The fast answer comes as it was asked for, without probabilities unless these were, too."""
    mock, choice = Mock(), ModeChoice(_vote, _mode_of, cascade=True)
    fast = _fast_reply(probability, streamed) if probability else b'{"choices": [{"logprobs": null}]}'
    mock.fault = lambda number, path, body: ("body", fast) if body["model"] == "fast" else None
    chat = {"model": "auto", "messages": [_user(text)], "stream": streamed}
    with serve(mock), _before(mock.url.removesuffix("/v1"), choice=choice) as client:
        for asked in ({}, {"logprobs": True}):
            reply = client.post(CHAT, json={**chat, **asked})
            told = reply.headers
            assert (told["x-lorapar-mode"], told["x-lorapar-system2"]) == (mode, signal)
            assert mock.bodies[-1]["model"] == mode and ("quick" in reply.text) == (mode == "fast")
            if mode == "fast" and asked:
                assert reply.content == fast
            elif mode == "fast":
                assert told["content-type"].startswith(
                    "text/event-stream" if streamed else "application/json"
                )
                assert 'logprob"' not in reply.text and reply.text.count("data: ") == (3 if streamed else 0)
        assert client.post("/v1/messages", json=chat).status_code == 400


def test_in_a_cascade_the_server_s_refusal_is_told():
    mock, choice = Mock(), ModeChoice(_vote, _mode_of, cascade=True)
    mock.fault = lambda *_: ("status", (400, {}, '{"error": "too long"}'))
    with serve(mock), _before(mock.url.removesuffix("/v1"), choice=choice) as client:
        reply = client.post(CHAT, json={"model": "auto", "messages": [_user("easy")]})
    assert (reply.status_code, reply.text, len(mock.bodies)) == (400, '{"error": "too long"}', 1)


def test_half_an_emoji_is_no_reason_to_refuse(served):
    _, client = served
    body = b'{"model": "auto", "messages": [{"role": "user", "content": "hard \\ud83d"}]}'
    assert client.post(CHAT, content=body).headers["x-lorapar-mode"] == "slow"


def test_pages_of_an_origin_may_ask_if_it_is_named():
    asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    for origins, allowed in (((), None), (("http://page",), "http://page")):
        with _before("http://127.0.0.1:1", origins=origins) as client:
            reply = client.options(CHAT, headers=asked)
            assert reply.headers.get("access-control-allow-origin") == allowed


def test_connections_wait_for_nothing():
    """Without this a request on a connection that was used before takes 40 ms."""
    with serve_.listener("127.0.0.1", 0) as bound:
        assert bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


ENDING = """
import sys
from stages.engines.chats import ModePrompt
from stages.engines.gateway import Gateway
from stages.engines.mode_choice import ModeChoice
from stages.serve import listener

async def votes(example, post):
    return [0.9]

choice = ModeChoice(votes, lambda signal: "slow")
gateway = Gateway(sys.argv[1], {"slow": ModePrompt()}, choice, lambda: None)
with listener("127.0.0.1", 0) as bound:
    gateway.run(bound, lambda: print(bound.getsockname()[1], flush=True))
"""


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP"))]
)
def test_a_signal_ends_it_with_a_stream_open_and_without_a_traceback(name):
    with socket.create_server(("127.0.0.1", 0)) as upstream:
        upstream.settimeout(60)
        url = f"http://127.0.0.1:{upstream.getsockname()[1]}"
        child = subprocess.Popen(
            [sys.executable, "-c", ENDING, url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        port = int(child.stdout.readline())
        with (
            socket.create_connection(("127.0.0.1", port)),
            socket.create_connection(("127.0.0.1", port)) as s,
        ):
            body = b'{"model": "slow"}'
            s.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n%s" % (CHAT.encode(), body))
            connection, _ = upstream.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
                received = b""
                while b"hello" not in received:
                    received += s.recv(65536)
                child.send_signal(signal.Signals[name])
                _, said = child.communicate(timeout=60)
    assert child.returncode == 0 and "Traceback" not in said and said == ""
