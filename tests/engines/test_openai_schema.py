"""Replies are believed after their shape: every odd one is an unreadable answer, none is taken or crashes."""

import copy
import json
import math

import pytest

from stages.engines.openai.choices import choice_probabilities
from stages.engines.openai.identity import Identity
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


def identity(*replies: dict) -> Identity:
    """That of `m`, beside which the server lists `n`, after these replies."""
    asked = Identity.__new__(Identity)
    asked.model, asked._reply_name = "m", None
    asked._listed = parse_models([{"id": "m"}, {"id": "n"}])
    for reply in replies:
        asked.choice_of(reply)
    return asked


def read(reply: object) -> ReplyChoice:
    return identity(TEXT).choice_of(reply)


def test_both_kinds_are_read():
    for reply in (CHAT, TEXT):
        choice = read(reply)
        assert choice.content == "A" and choice.tokens[0][0] == "A" and choice.tokens[0][1][0] == ("A", -0.1)
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
    *((CHAT, "object", value) for value in ("chat.completion.chunk", "error")),
    *((TEXT, "choices.0.finish_reason", value) for value in ("content_filter", "FAILED")),
    (TEXT, "usage", {"prompt_tokens": 0, "completion_tokens": 0}),
    *((CHAT, "choices.0.message.refusal", value) for value in ("I cannot", ["no"])),
    (CHAT, "choices.0.message.tool_calls", [{"function": {}}]),
    *((reply, path, "B") for reply, path in ((CHAT, "choices.0.message.content"), (TEXT, "choices.0.text"))),
    (CHAT, "choices.0.logprobs.content.0.logprob", -0.7),  # and -0.1 among its alternatives
    *((TEXT, "choices.0.logprobs.token_logprobs", value) for value in ([-0.7], [-0.1, -0.1])),
    (TEXT, "choices.0.logprobs.top_logprobs.0", {"A": math.log(0.71), "B": math.log(0.3)}),
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
    assert identity(alias).choice_of(alias) == identity(alias).choice_of(TEXT)
    for before in ([], [TEXT], [alias]):
        with pytest.raises(ValueError, match="the reply is by n, not by m"):
            identity(*before).choice_of(TEXT | {"model": "n"})
    with pytest.raises(ValueError, match="the reply is by m-2024-08-06, not by m"):
        identity(TEXT).choice_of(alias)


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
    asked = identity()
    asked._listed = parse_models(listed)
    reply = TEXT | {"model": listed[1]["id"]}
    if taken:
        assert asked.choice_of(reply) == identity().choice_of(TEXT)
    else:
        with pytest.raises(ValueError, match="not by m"):
            asked.choice_of(reply)


BEHIND = [("A", 0.7), ("A", 0.1), ("A.", 0.1), ("A!", 0.05), ("A?", 0.03)]


@pytest.mark.parametrize(
    ("likeliest", "found"),
    [
        ([("A", 0.7), ("B", 0.3)], (0.7, 0.3)),
        ([("A", 1.0), ("B", 1e-9), ("!", 0.0)], (1.0, 1e-9)),
        ([("A", 0.03), ("B", 0.01), *((text, 0.02) for text in "xyz")], (0.75, 0.25)),  # no constraint
        (BEHIND, (0.98, 0.02)),  # B has what is left
        ([(text, share / 2) for text, share in BEHIND], (0.49 / 0.505, 0.015 / 0.505)),  # or what "A?" has
        ([("A", 1.0)], None),
        ([("A", 0.7)], None),
        ([("A", 1.0), ("B", 0.0), ("!", 0.0)], None),  # masked, though the constraint allows it
        ([("A", 0.7), ("Β", 0.3)], None),  # a Greek letter
        ([("Β", 0.7), ("B", 0.3)], None),
        ([("A", 0.6), *((text, 0.1) for text in "xyzv")], None),
        ([("A", 0.7**1.44), ("B", 0.3**1.44), ("!", 0.0)], None),  # of logarithms to base 2
        ([("A", 0.99**1.44), ("B", 0.01**1.44)], None),
    ],
)  # fmt: skip
def test_a_probability_that_is_missing_is_none(likeliest, found):
    """vLLM gives at least five alternatives, those that the constraint forbids with -9999."""
    top = [{"token": text, "logprob": math.log(share) if share else -9999.0} for text, share in likeliest]
    tokens = [{"token": likeliest[0][0], "top_logprobs": top}]
    choice = ReplyChoice.model_validate({"logprobs": {"content": tokens}})
    if found is None:
        with pytest.raises(ValueError):
            choice_probabilities(choice, ("A", "B"), 1)
    else:
        assert choice_probabilities(choice, ("A", "B"), 1) == pytest.approx(found)


def test_a_token_that_fits_both_words_decides_nothing():
    """And a letter and its byte, which a completion names once, may miss some probability."""
    first = {"on": math.log(0.9), "onl": math.log(0.1)}
    then = {"e": math.log(0.6), "ly": math.log(0.3)}  # and 0.1 for another token of the text "e"
    logprobs = {"tokens": ["on", "e"], "top_logprobs": [first, then]}
    choice = ReplyChoice.model_validate({"text": "one", "logprobs": logprobs})
    assert choice_probabilities(choice, ("one", "only"), 2) == pytest.approx((2 / 3, 1 / 3))
