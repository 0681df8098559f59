"""The gateway before a server: which model answers, with which system message, and what passes unchanged."""

import pytest
from mock_server import Mock, serve

from stages.engines.gateway import Gateway, question

testclient = pytest.importorskip("starlette.testclient")

CHAT = "/v1/chat/completions"


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


@pytest.fixture
def served():
    """A mock server, a client of the gateway before it, and the questions that were voted on."""
    asked = []

    def decide(example):
        asked.append(example)
        return ("slow", 0.91234) if "hard" in example.prompt else ("fast", None)

    mock = Mock()
    mock.models = [{"id": name} for name in ("base", "fast", "slow", "router")]
    with serve(mock):
        gateway = Gateway(
            mock.url.removesuffix("/v1"), {"fast": None, "slow": "Think."}, decide, "router", lambda: None
        )
        with testclient.TestClient(gateway.app()) as client:
            yield mock, client, asked


@pytest.mark.parametrize(("text", "mode", "vote"), [("hard", "slow", "0.9123"), ("easy", "fast", "none")])
def test_auto_is_answered_in_the_mode_of_its_vote(served, text, mode, vote):
    mock, client, asked = served
    reply = client.post(CHAT, json={"model": "auto", "messages": [_user(text)]})
    assert reply.status_code == 200
    assert (reply.headers["x-lorapar-mode"], reply.headers["x-lorapar-system2"]) == (mode, vote)
    assert [example.prompt for example in asked] == [text]
    assert mock.bodies[-1]["model"] == mode


def test_a_chat_gets_the_system_message_of_its_mode_unless_it_has_one(served):
    mock, client, asked = served
    client.post(CHAT, json={"model": "slow", "messages": [_user("a")]})
    own = [{"role": "system", "content": "Be brief."}, _user("b")]
    client.post(CHAT, json={"model": "slow", "messages": own})
    client.post(CHAT, json={"model": "fast", "messages": [_user("c")]})
    client.post(CHAT, json={"model": "base", "messages": [_user("d")]})
    think = {"role": "system", "content": "Think."}
    assert [body["messages"] for body in mock.bodies] == [
        [think, _user("a")],
        own,
        [_user("c")],
        [_user("d")],
    ]
    assert asked == []


def test_other_requests_pass_unchanged(served):
    mock, client, _ = served
    reply = client.post("/v1/completions", json={"model": "base", "prompt": "x", "n": 3})
    assert mock.bodies == [{"model": "base", "prompt": "x", "n": 3}] and "x-lorapar-mode" not in reply.headers
    assert reply.json() == mock.reply("/v1/completions", mock.bodies[0])


def test_models_are_those_of_the_server_and_auto_without_the_hidden_one(served):
    _, client, _ = served
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [
        "base",
        "fast",
        "slow",
        "auto",
    ]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"model": "auto", "prompt": "x"}, "model auto answers chats"),
        (CHAT, {"model": "auto"}, "model auto answers chats"),
        (CHAT, {"model": "auto", "messages": []}, "ends with a message of the user"),
        (CHAT, {"model": "auto", "messages": [{"role": "assistant", "content": "x"}]}, "ends with a message"),
        (CHAT, {"model": "router", "messages": [_user("x")]}, "there is no model router here"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_in_the_form_of_openai(served, path, body, message):
    mock, client, _ = served
    reply = client.post(path, json=body)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"] and mock.bodies == []


def test_a_server_that_is_gone_is_said():
    gateway = Gateway("http://127.0.0.1:1", {}, None, "router", lambda: None)
    with testclient.TestClient(gateway.app()) as client:
        reply = client.post(CHAT, json={"model": "base", "messages": [_user("x")]})
    assert reply.status_code == 502 and "does not answer: ConnectError" in reply.json()["error"]["message"]


def test_a_question_is_the_last_message_after_earlier_turns_whatever_its_form():
    parts = {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "image_url"}, 3]}
    messages = [{"role": "system", "content": "s"}, _user("a"), {"role": "assistant", "content": "b"}, parts]
    example = question(CHAT, {"messages": messages})
    assert (example.prompt, example.turns) == ("c", [["a", "b"]])


def test_paths_of_the_server_s_own_pass(served):
    _, client, _ = served
    assert client.post("/tokenize", json={"model": "base", "prompt": "a b"}).json() == {"count": 2}
