"""The client against a mock server: what it reads, what it asks, and how it fails."""

import json
import math

import pytest
from mock_server import with_logprobs

from stages.config import ModelSection, ServerSection
from stages.engines import ChoiceRequest, EngineSpec, vllm
from stages.engines.openai import client
from stages.errors import ConfigError

CHAT = ChoiceRequest([{"role": "user", "content": "Answer System1 or System2."}], ("System1", "System2"))
TEXT = ChoiceRequest("q", (" one", " many"))
QUICK = ServerSection(concurrency=4, timeout_s=0.5)
ONE_BY_ONE = QUICK.model_copy(update={"concurrency": 1})


def refusal(code: int):
    return lambda n, path, body: ("status", (code, {}, "unknown")) if "structured_outputs" in body else None


WORDS = ("System1", "System2")


ALTERNATIVES = {" one": math.log(0.99), " many": math.log(0.01)}
SURE = json.dumps(with_logprobs([(" one", ALTERNATIVES)], chat=True))


def test_a_key_with_a_letter_that_no_key_has_is_not_shown(monkeypatch):
    served = EngineSpec("openai", ModelSection(name="m"), None, ("http://localhost:1/v1",), "MY_KEY")
    monkeypatch.setenv("MY_KEY", "sk-\u201csecret\u201d")
    with pytest.raises(ConfigError, match="the key in MY_KEY has characters") as caught:
        client.open_engine(served, QUICK, print).__enter__()
    assert "secret" not in f"{caught.value} {caught.value.hint}"


def test_a_key_for_servers_is_not_handed_to_our_own(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("VLLM_OTHER", "kept")
    made = vllm._environment(None, "its own")
    assert made["VLLM_API_KEY"] == "its own" and made["VLLM_OTHER"] == "kept"
