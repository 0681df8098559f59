"""`lorapar serve`: its front before a server, asked by OpenAI's client; and what the command refuses."""

import asyncio
import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("uvicorn")
import openai
from conftest import ROOT

from stages import serve
from stages.config import PromptSection
from stages.errors import ServerError

FAST = PromptSection(by_system={1: "At once."}, chat_template_kwargs_by_system={1: {"think": False, "n": 1}})
USER = {"role": "user", "content": "What is 3 + 4?"}


class Upstream(BaseHTTPRequestHandler):
    """In place of vLLM: it lists the base, too, and answers with what it was asked."""

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": name} for name in ("base", "fast", "slow")]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = "delta" if asked.get("stream") else "message"
        self.answer({"choices": [{"index": 0, key: {"content": json.dumps(asked)}}]}, key == "delta")

    def answer(self, reply, streamed=False):
        self.send_response(200 if self.headers["Authorization"] == "Bearer inner" else 401)
        self.send_header("Content-Type", "text/event-stream" if streamed else "application/json")
        self.end_headers()
        text = json.dumps(reply)
        self.wfile.write((f"data: {text}\n\ndata: {text}\n\ndata: [DONE]\n\n" if streamed else text).encode())


def test_openai_s_client_gets_both_modes_until_the_server_ends(monkeypatch):
    upstream, ready, gone = ThreadingHTTPServer(("127.0.0.1", 0), Upstream), threading.Event(), []
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    modes, address = {"fast": (FAST, 1), "slow": (PromptSection(), 2)}, f"127.0.0.1:{upstream.server_port}/v1"
    app, bound = serve.application(f"http://{address}", "inner", modes, "outer"), serve.bind("127.0.0.1", 0)
    serving = serve.run(app, bound, lambda: gone[0] if gone else None, ready.set)
    front = threading.Thread(target=lambda: gone.append(pytest.raises(ServerError, asyncio.run, serving)))
    front.start()
    assert ready.wait(60)
    port = bound.getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="outer", max_retries=0)

    def ask(model: str, *messages: dict, **more) -> dict:
        reply = client.chat.completions.create(model=model, messages=messages, **more)
        return json.loads(reply.choices[0].message.content)

    assert [model.id for model in client.models.list()] == ["fast", "slow"]
    assert ask("fast", USER, extra_body={"chat_template_kwargs": {"n": 2}}) == {
        "model": "fast", "messages": [{"role": "system", "content": "At once."}, USER],
        "chat_template_kwargs": {"think": False, "n": 2},
    }  # fmt: skip
    own = {"role": "system", "content": "Slowly."}
    assert ask("fast", own, USER)["messages"] == [own, USER]
    assert ask("slow", USER, seed=3) == {"model": "slow", "messages": [USER], "seed": 3}
    parts = client.chat.completions.create(model="slow", messages=[USER], stream=True)
    assert [json.loads(part.choices[0].delta.content)["stream"] for part in parts] == [True, True]
    with pytest.raises(openai.BadRequestError, match="unknown model 'auto'; choose from fast, slow"):
        ask("auto", USER)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="guess").models.list()
    monkeypatch.setattr(serve, "MAX_BODY", 2**10)
    with pytest.raises(openai.APIStatusError, match="a request may have"):
        ask("slow", {"role": "user", "content": "?" * 2**10})
    with pytest.raises(ServerError, match=f"--port {port}: .*in use"):
        serve.bind("127.0.0.1", port)
    gone.append(ServerError("the server ended"))
    front.join(60)
    assert "the server ended" in str(gone[1].value)


def test_the_command_says_what_is_lacking(smoke_flags, lorapar, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for vllm, message, *options in (
        (None, "lorapar serve needs vLLM, which is not installed"),
        (object(), "--host 0.0.0.0 would let anyone ask", "--host", "0.0.0.0"),
        (object(), "sft is missing"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda n, spec=vllm: spec if n == "vllm" else find(n))
        done = lorapar("serve", ROOT / "configs/smoke.yaml", *smoke_flags, *options)
        assert done.code in (66, 78) and message in done.err and "hint:" in done.err
