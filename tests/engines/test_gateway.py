"""The gateway before a server: which model answers, with which system message, and what passes unchanged."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from conftest import wait_for
from mock_server import Mock, serve

from stages.engines.gateway import CHAT, Gateway, question
from stages.errors import ServerError

uvicorn = pytest.importorskip("uvicorn")


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _decide(example):
    if "stalled" in example.prompt:
        raise ServerError("no answer in 3 s")
    return ("slow", 0.91234) if "hard" in example.prompt else ("fast", None)


@contextmanager
def _before(upstream: str, key: str = "", exit_error=lambda: None):
    """A client of a gateway before a server, on a port of its own."""
    gateway = Gateway(upstream, {"fast": None, "slow": "Think."}, _decide, exit_error, key)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(gateway.app(), log_level="warning", timeout_graceful_shutdown=1))
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


@pytest.mark.parametrize(("text", "mode", "vote"), [("hard", "slow", "0.9123"), ("easy", "fast", "none")])
def test_auto_is_answered_in_the_mode_of_its_vote(served, text, mode, vote):
    mock, client = served
    reply = client.post(CHAT, json={"model": "auto", "messages": [_user(text)]})
    assert reply.status_code == 200 and mock.bodies[-1]["model"] == mode
    assert (reply.headers["x-lorapar-mode"], reply.headers["x-lorapar-system2"]) == (mode, vote)


def test_a_chat_gets_the_system_message_of_its_mode_unless_it_has_one(served):
    mock, client = served
    own = [[{"role": role, "content": "Be brief."}, _user("b")] for role in ("system", "developer")]
    for mode, messages in (
        ("slow", [_user("a")]),
        ("slow", own[0]),
        ("slow", own[1]),
        ("fast", [_user("c")]),
    ):
        client.post(CHAT, json={"model": mode, "messages": messages})
    client.post("/v1/messages", json={"model": "slow", "system": "Be brief.", "messages": [_user("d")]})
    think = {"role": "system", "content": "Think."}
    asked = [body["messages"] for body in mock.bodies]
    assert asked == [[think, _user("a")], *own, [_user("c")], [_user("d")]]


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
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"model": "auto", "prompt": "x"}, 400, "model auto answers chats"),
        (CHAT, {"model": "auto"}, 400, "model auto answers chats"),
        (CHAT, {"model": "auto", "messages": []}, 400, "needs a user message"),
        (
            CHAT,
            {"model": "base", "messages": [_user("x")]},
            400,
            "unknown model 'base'; choose from fast, slow",
        ),
        (CHAT, {"model": "router", "messages": [_user("x")]}, 400, "unknown model 'router'"),
        (CHAT, {"model": ["x"], "messages": [_user("x")]}, 400, "unknown model ['x']"),
        (CHAT, {"model": "auto", "messages": [_user("stalled")]}, 502, "ServerError no answer in 3 s"),
        ("/v1/load_lora_adapter", {"lora_name": "x"}, 404, "unknown endpoint /v1/load_lora_adapter"),
    ],
)
def test_what_cannot_be_served_is_refused_in_the_form_of_openai(served, path, body, status, message):
    mock, client = served
    reply = client.post(path, json=body)
    assert (reply.status_code, mock.bodies) == (status, [])
    assert message in reply.json()["error"]["message"]


def test_a_key_is_asked_for_and_not_passed_on():
    mock = Mock()
    with serve(mock), _before(mock.url.removesuffix("/v1"), key="secret") as client:
        assert client.get("/v1/models").status_code == 401
        wrong = client.get("/v1/models", headers={"Authorization": "Bearer Secret"})
        assert wrong.status_code == 401 and "secret" not in wrong.text
        body = {"model": "fast", "prompt": "x"}
        right = client.post("/v1/completions", json=body, headers={"Authorization": "Bearer secret"})
        assert right.status_code == 200 and mock.bodies == [body]
        assert not {"authorization", "x-api-key"} & mock.headers.keys()
        as_anthropic = client.post("/v1/completions", json=body, headers={"x-api-key": "secret"})
        assert as_anthropic.status_code == 200 and not {"authorization", "x-api-key"} & mock.headers.keys()
        wrong = client.post("/v1/completions", json=body, headers={"x-api-key": "Secret"})
        assert wrong.status_code == 401


def test_a_server_that_is_gone_is_said():
    with _before("http://127.0.0.1:1") as client:
        for reply in (client.get("/v1/models"), client.post(CHAT, json={"model": "fast", "messages": []})):
            assert reply.status_code == 502 and "ConnectError" in reply.json()["error"]["message"]


def test_a_server_that_cannot_list_its_models_is_said():
    mock = Mock()
    mock.models = None
    with serve(mock), _before(mock.url.removesuffix("/v1")) as client:
        assert client.get("/v1/models").status_code == 502


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
        threads = [
            threading.Thread(
                target=lambda: httpx.post(
                    f"{str(client.base_url).rstrip('/')}/v1/completions", json=body, timeout=60
                )
            )
            for _ in range(120)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(mock.bodies) == 120 and not together.broken


def test_a_question_is_the_last_of_the_user_after_earlier_turns_whatever_its_form():
    parts = {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "image_url"}, 3]}
    messages = [{"role": "system", "content": "s"}, _user("a"), {"role": "assistant", "content": "b"}, parts]
    example = question(CHAT, {"messages": messages})
    assert (example.prompt, example.turns) == ("c", [["a", "b"]])
    tool = [*messages, {"role": "assistant", "content": None}, {"role": "tool", "content": "3"}]
    assert question(CHAT, {"messages": tool}) == example


def test_a_server_that_ended_ends_the_gateway():
    gateway = Gateway("http://127.0.0.1:1", {"fast": None}, _decide, lambda: ServerError("it ended"))
    started = []
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(ServerError, match="it ended"):
        gateway.run(listener, lambda: started.append(True))
    assert started == [True]
