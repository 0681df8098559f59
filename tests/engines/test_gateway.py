"""The gateway before a server: which model answers, with which system message, and what passes unchanged."""

import asyncio
import json
import math
import socket

import pytest

from stages import serve as serve_

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


def _fast_reply(probability: float, streamed: bool) -> bytes:
    """A chat's answer of two tokens, the second of this probability."""
    logprobs = [{"content": [{"token": "4", "logprob": math.log(p)}]} for p in (1.0, probability)]
    if streamed:
        parts = [{"choices": [{"index": 0, "delta": {"content": "quick"}, "logprobs": p}]} for p in logprobs]
        return "".join(f"data: {json.dumps(part)}\n\n" for part in parts).encode() + b"data: [DONE]\n\n"
    told = {"content": [*logprobs[0]["content"], *logprobs[1]["content"]]}
    return json.dumps({"choices": [{"index": 0, "message": {"content": "quick"}, "logprobs": told}]}).encode()


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
