"""Replies are believed after their shape: every odd one is an unreadable answer, none is taken or crashes."""

import copy
import json
import math

import pytest

from stages.engines.openai.client import Client
from stages.engines.openai.replies import ReplyChoice, TokenCount, parse_models

CHAT = {
    "model": "m",
    "choices": [
        {
            "index": 0, "finish_reason": "stop", "message": {"content": "A"},
            "logprobs": {"content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": -0.1}]}]},
        }
    ],
}  # fmt: skip
TEXT = {
    "model": "m",
    "choices": [
        {
            "index": 0, "finish_reason": "stop", "text": "A", "token_ids": [5, 7],
            "logprobs": {"tokens": ["A"], "top_logprobs": [{"A": -0.1, "B": -9999.0}]},
        }
    ],
}  # fmt: skip


def client(*replies: dict) -> Client:
    """One that asks for `m`, beside which the server lists `n`, and has had these replies."""
    found = Client.__new__(Client)
    found.model, found._reply_name = "m", None
    found._listed = parse_models([{"id": "m"}, {"id": "n"}])
    for reply in replies:
        found._reply_choice(reply)
    return found


def read(reply: object) -> ReplyChoice:
    return client(TEXT)._reply_choice(reply)


def test_both_kinds_are_read():
    for reply in (CHAT, TEXT):
        choice = read(reply)
        assert choice.content == "A" and choice.tokens[0][0] == "A" and choice.tokens[0][1]["A"] == -0.1
    assert read(TEXT).completion.ids == [5, 7] and read(TEXT | {"model": None}) == read(TEXT)
    assert TokenCount.model_validate({"count": 7}).count == 7
    listed = [{"id": "m", "max_model_len": 9}, {"id": "n"}]
    for reply in (listed, {"data": listed}):
        assert {name: entry.max_model_len for name, entry in parse_models(reply).items()} == {"m": 9, "n": 0}


def changed(reply: dict, path: str, value: object) -> dict:
    """The reply with the value at a path; NaN and the like come as a server may write them."""
    found = copy.deepcopy(reply)
    *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = found
    for part in above:
        place = place[part]
    place[last] = value
    return json.loads(json.dumps(found))


NUMBERS = [math.nan, math.inf, -math.inf, 9e-4, 1e300, None, "-0.1", False, [], {}]
ODD = [
    (CHAT, "choices.0.logprobs.content.0.top_logprobs", [{"token": t, "logprob": 0.0} for t in "AB"]),
    (CHAT, "choices.0.logprobs.content.0.token", "B"),
    (TEXT, "choices.0.logprobs.top_logprobs.0", {"A": 0, "B": 0}),
    (TEXT, "choices.0.logprobs.top_logprobs.0", {"A": -0.1, "B": -0.1}),
    (TEXT, "choices.0.logprobs.top_logprobs.0", {"B": -0.1, "C": -3.0}),
    *((CHAT, "choices.0.logprobs.content.0.top_logprobs.0.logprob", value) for value in NUMBERS),
    *((TEXT, "choices.0.logprobs.top_logprobs.0.A", value) for value in NUMBERS),
    *((reply, "model", value) for reply in (CHAT, TEXT) for value in ("other", 7, ["m"])),
    *((reply, "choices.0.index", value) for reply in (CHAT, TEXT) for value in (1, -1, None, "zero")),
    *((reply, "choices", value) for reply in (CHAT, TEXT) for value in (None, [], {}, [None], "A")),
    (TEXT, "choices", 2 * TEXT["choices"]),
    *((TEXT, "choices.0.token_ids", value) for value in (None, "ab", [-1], [2**40], [None], [1.5])),
    *((TEXT, "choices.0.logprobs", value) for value in (None, [], "x", {"tokens": ["A"]}, {"content": [{}]})),
    *((reply, "choices.0.finish_reason", "abort") for reply in (CHAT, TEXT)),  # vLLM's, when it shuts down
    *((TEXT, "choices.0.finish_reason", value) for value in ("ABORT", "aborted", "cancelled", "timeout")),
    *((reply, "error", {"message": "overloaded"}) for reply in (CHAT, TEXT)),
    (CHAT, "object", "chat.completion.chunk"),
    (TEXT, "choices.0.logprobs.top_logprobs.0", {"A": -2.0, "B": -0.2}),  # greedy, it would have taken B
    *((CHAT, "choices.0.message", value) for value in (None, [], "A", {"content": 7}, {"content": ["A"]})),
    (CHAT, "choices.0.message.content", "because \ud800"),  # no file could hold it
]  # fmt: skip


@pytest.mark.parametrize(("reply", "path", "value"), ODD, ids=str)
def test_an_odd_reply_is_none(reply, path, value):
    odd = changed(reply, path, value)
    with pytest.raises(ValueError):
        choice = read(odd)
        assert (choice.content, choice.tokens, choice.completion if reply is TEXT else 0) is None


@pytest.mark.parametrize(
    "reply", [None, [7], "m", 7, {"data": None}, {"data": [{}]}, {"data": [{"id": "m", "max_model_len": -1}]}]
)
def test_an_odd_list_of_models_is_none(reply):
    with pytest.raises(ValueError):
        parse_models(reply)
    for reader in (read, TokenCount.model_validate):
        with pytest.raises(ValueError):
            reader(reply)


def test_a_gateway_may_have_a_name_of_its_own_for_the_model():
    """From the first reply on, and not one that is another model's."""
    alias = TEXT | {"model": "m-2024-08-06"}
    assert client(alias)._reply_choice(alias) == client(alias)._reply_choice(TEXT)
    for before in ([], [TEXT], [alias]):
        with pytest.raises(ValueError, match="the reply is by n, not by m"):
            client(*before)._reply_choice(TEXT | {"model": "n"})
    with pytest.raises(ValueError, match="the reply is by m-2024-08-06, not by m"):
        client(TEXT)._reply_choice(alias)


@pytest.mark.parametrize(
    ("listed", "taken"),
    [
        ([{"id": "m"}, {"id": "m-2024-08-06"}], True),  # OpenAI's aliases
        ([{"id": "m", "root": "/m"}, {"id": "m-2024-08-06", "root": "/m"}], True),
        ([{"id": "m", "root": "/m"}, {"id": "m-large", "root": "/large"}], False),
        ([{"id": "m"}, {"id": "m-large"}], False),
        ([{"id": "m", "root": "/m"}, {"id": "first", "root": "/m"}], True),  # vLLM's --served-model-name
    ],
)
def test_a_listed_name_may_stand_for_the_model(listed, taken):
    found = client()
    found._listed = parse_models(listed)
    reply = TEXT | {"model": listed[1]["id"]}
    if taken:
        assert found._reply_choice(reply) == client()._reply_choice(TEXT)
    else:
        with pytest.raises(ValueError, match="not by m"):
            found._reply_choice(reply)


def test_two_tokens_of_one_text_count_together():
    """A letter and the byte that writes it, as in vocabularies with a fallback to bytes."""
    top = [{"token": "A", "logprob": math.log(p)} for p in (0.5, 0.25)] + [{"token": "B", "logprob": -2.0}]
    ((_, alternatives),) = read(changed(CHAT, "choices.0.logprobs.content.0.top_logprobs", top)).tokens
    assert alternatives == {"A": pytest.approx(math.log(0.75)), "B": -2.0}
