"""The client against a mock server: what it reads, what it asks, and how it fails."""

import asyncio
import gzip
import json
import math
import re
import signal
import threading
import time
from dataclasses import replace
from email.utils import formatdate

import pytest
from conftest import wait_for
from mock_server import Mock, probability, serve, with_logprobs

from stages.config import ModelSection, ServerSection
from stages.engines import ChoiceRequest, ChoiceResult, EngineSpec, Failure, GenerateRequest, Sampling, vllm
from stages.engines.openai import client, session, transport
from stages.engines.openai.choices import parse_word
from stages.engines.openai.client import Client
from stages.engines.openai.transport import Transport
from stages.errors import AnswerError, ConfigError, ServerError

CHAT = ChoiceRequest([{"role": "user", "content": "Answer System1 or System2."}], ("System1", "System2"))
TEXT = ChoiceRequest("q", (" one", " many"))
QUICK = ServerSection(concurrency=4, timeout_s=0.5, stall_s=5)
ONE_BY_ONE = QUICK.model_copy(update={"concurrency": 1})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Back-off without its seconds; returns the list of those it would have taken."""
    waited: list[float] = []

    async def brief(seconds: float) -> None:
        waited.append(seconds)
        await asyncio.sleep(min(seconds, 0.01))

    monkeypatch.setattr(session, "_pause", brief)
    return waited


def connect(*mocks: Mock, model: str | None = None, server: ServerSection = QUICK) -> Client:
    return Client(Transport(tuple(mock.url for mock in mocks), "", server), model)


def ask(mock: Mock, *ballots: ChoiceRequest, **how: object) -> dict:
    """What a server, started for them, answers to these."""
    with serve(mock):
        return dict(connect(mock, **how).choose_words(ballots))


@pytest.mark.parametrize(("ballot", "text"), [(CHAT, CHAT.text[0]["content"]), (TEXT, "q")])
def test_probabilities_of_words_and_their_mass(ballot, text):
    found = ask(Mock(), ballot, replace(ballot, measure_mass=True))
    assert [found[i].probabilities[1] for i in (0, 1)] == pytest.approx([probability(text)] * 2)
    assert found[0].mass == -1 and found[1].mass == pytest.approx(0.004)


def test_it_learns_how_many_tokens_it_needs():
    ask(mock := Mock(), *[CHAT] * 4, server=ServerSection(concurrency=1))
    assert [body["max_tokens"] for body in mock.bodies] == [1, 1, 2, 2, 2, 2]
    choices = [body["structured_outputs"]["choice"] for body in mock.bodies]
    assert choices == [["zebra", "quartz"], *[["System1", "System2"]] * 5]


@pytest.mark.parametrize(("top_k", "asked"), [(0, -1), (50, 50)])
def test_top_k_is_always_said(top_k, asked):
    """vLLM would take the one of the model's generation_config."""
    answer = ("body", {"choices": [{"token_ids": [5], "finish_reason": "stop"}]})
    with serve(Mock(lambda n, path, body: answer)) as mock:
        list(connect(mock).generate([GenerateRequest([1])], Sampling(4, (), 1.0, top_k=top_k)))
    assert [body["top_k"] for body in mock.bodies] == [asked]


def test_the_least_probability_is_read_from_the_prompts_own_tokens():
    def token(id, probability):
        return {str(id): {"logprob": math.log(probability), "rank": 1, "decoded_token": "x"}}

    tokens = [None, token(7, 0.1), token(5, 0.6), token(6, 0.3)]

    def answer(given):
        return ("body", {"choices": [{"text": "", "finish_reason": "length", "prompt_logprobs": given}]})

    bodies = []
    with serve(Mock(lambda n, path, body: bodies.append(body) or answer(tokens))) as mock:
        least = dict(connect(mock).least_probabilities([([3, 7], [5, 6]), ([3, 7, 5, 6], [])]))
    assert least == {0: pytest.approx(0.3), 1: 1.0}
    assert bodies[0]["prompt"] == [3, 7, 5, 6] and bodies[0]["prompt_logprobs"] == 0
    for given in (None, [], tokens[:3], [*tokens[:3], None], [*tokens[:3], token(9, 0.3)]):
        faulty = Mock(lambda n, path, body, given=given: answer(given))
        wrong = pytest.raises(AnswerError, match="no log-probabilities of the prompt's tokens")
        with serve(faulty) as mock, wrong:
            list(connect(mock).least_probabilities([([3, 7], [5, 6])]))


def refusal(code: int):
    return lambda n, path, body: ("status", (code, {}, "unknown")) if "structured_outputs" in body else None


@pytest.mark.parametrize("fault", [None, refusal(400), refusal(422)], ids=["ignores", "400", "422"])
def test_a_server_that_does_not_constrain_is_read(fault):
    (choice,) = ask(Mock(fault, constrains=False), CHAT).values()
    assert choice.probabilities == ((0.0, 1.0) if probability(CHAT.text[0]["content"]) > 0.5 else (1.0, 0.0))
    assert choice.text.startswith("**System")


def test_a_server_that_is_busy_at_first_is_not_taken_for_one_that_cannot_constrain():
    """The question that met it fails, and is asked again by the next run; the others get probabilities."""
    faults = iter([("status", (429, {}, "busy")), ("status", (503, {}, "starting"))] * (session.TRIES // 2))
    mock = Mock(lambda n, path, body: next(faults, None) if "structured_outputs" in body else None)
    found = ask(mock, *[CHAT] * 3, server=ONE_BY_ONE)
    assert isinstance(found[0], Failure) and found[0].reason == "server_error"
    two = probability(CHAT.text[0]["content"])
    assert [found[i].probabilities[1] for i in (1, 2)] == pytest.approx([two, two])


def test_a_server_that_wants_other_words_is_asked_in_these():
    """OpenAI's reasoning models, which take neither temperature nor max_tokens."""

    def strict(n, path, body):
        if path.endswith("/completions") and not path.endswith("/chat/completions"):
            return ("status", (404, {}, "no such path"))
        for name, instead in (("max_tokens", "Use 'max_completion_tokens' instead."), ("temperature", "")):
            if name in body:
                return ("status", (400, {}, f"Unsupported parameter: '{name}'. {instead}"))
        return ("status", (400, {}, "Unknown parameter: 'x'")) if "structured_outputs" in body else None

    with serve(Mock(strict, constrains=False)) as mock:
        client = connect(mock, model="judge")
        assert client.fingerprint()
        found = dict(client.choose_words([CHAT] * 3))
    assert all(choice.probabilities in ((0.0, 1.0), (1.0, 0.0)) for choice in found.values())


@pytest.mark.parametrize(
    ("listed", "asked"),
    [
        ([{"id": "*"}], "gpt-4o"),
        ([{"id": "openai/*"}], "openai/gpt-4o"),
        ([{"id": "judge"}], "judge"),
        (None, "judge"),  # it has no list, and is believed to know the name
    ],
)
def test_what_a_gateway_lists(listed, asked):
    with serve(Mock()) as mock:
        mock.models = listed
        assert connect(mock, model=asked).model == asked
        if listed and listed[0]["id"] != "*":
            with pytest.raises(ConfigError, match=f"serves {re.escape(listed[0]['id'])}, not another"):
                connect(mock, model="another")


def test_a_thought_is_not_the_answer():
    ballot = ChoiceRequest(CHAT.text, CHAT.words, max_thinking_tokens=100, temperature=0.6, seed=7)
    (choice,) = ask(Mock(say="<think>System1? No.</think>\n\nSystem2"), ballot).values()
    assert choice.probabilities == (0.0, 1.0)


WORDS = ("System1", "System2")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("system 2.", 1), ("**System2**", 1), ("Final answer: System 2", 1),
        ("It needs several steps.\n\nSystem2\n", 1), ("System1\nBecause it is recall.", 0),
        ("<think>System1 or System2</think>System2", 1), ("<think>System2 is", None), ("", None),
        ("System1\nSystem2", None), ("System12", None), ("1", None), ('{"system": "System2"}', None),
    ],
)  # fmt: skip
def test_a_word_is_read_strictly(text, found):
    assert parse_word(text, WORDS) == found


@pytest.mark.parametrize("tokens", [[], [("Sure", {"Sure": -0.1})]])
def test_odd_alternatives_are_asked_for_again_and_teach_nothing(tokens):
    """Such a reply in the middle costs one question more, and no more tokens for all that follow."""
    faults = iter([None, None, ("body", with_logprobs(tokens, chat=True))])
    mock = Mock(lambda n, path, body: next(faults, None))
    found = ask(mock, *[TEXT] * 4, server=ONE_BY_ONE)
    assert [choice.probabilities[1] for choice in found.values()] == pytest.approx([probability("q")] * 4)
    assert [body["max_tokens"] for body in mock.bodies[1:]] == [1] * 5


def test_one_odd_reply_to_the_first_question_does_not_change_how_all_are_asked():
    """Votes would be read from words, and kept beside those that are probabilities."""
    faults = iter([("body", {"choices": [{"message": {"content": "zebra"}, "logprobs": None}]})])
    (choice,) = ask(Mock(lambda n, path, body: next(faults, None)), CHAT).values()
    assert choice.probabilities[1] == pytest.approx(probability(CHAT.text[0]["content"]))


def test_failures_of_a_while_are_tried_again(no_waiting):
    """And no cookie is kept of a server that gives one."""
    busy = ("status", (503, {"Retry-After": "0.5", "Set-Cookie": "a=b"}, "busy"))
    faults = iter([busy, ("reset", None), ("truncated", None), ("body", "<html>")])
    with serve(Mock(lambda n, path, body: next(faults, None))) as mock:
        client = connect(mock)
        assert isinstance(dict(client.choose_words([TEXT]))[0], ChoiceResult)
    assert client.transport.retried == 4 and no_waiting[1] == pytest.approx(0.5, abs=0.1)
    assert "cookie" not in mock.headers and mock.headers["accept-encoding"] == "identity"


ALTERNATIVES = {" one": math.log(0.99), " many": math.log(0.01)}
SURE = json.dumps(with_logprobs([(" one", ALTERNATIVES)], chat=True))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        *((("status", (code, {}, SURE)), "unreadable") for code in (202, 302)),
        (("status", (200, {"Content-Encoding": "gzip"}, gzip.compress(SURE.encode()))), "unreadable"),
        (("body", " " * session.MAX_REPLY + SURE), "unreadable"),
        (("status", (500, {}, "boom")), "server_error"),
        (("body", "<html>"), "unreadable"),
        (("body", {"choices": [{"logprobs": None}]}), "unreadable"),
        (("status", (400, {}, "This model's maximum context length is 10 tokens")), "too_long"),
        (("status", (400, {}, "filtered")), "refused"),
        (("drip", 0.05), "timeout"),
    ],
    ids=["202", "302", "gzip", "long", "500", "html", "null", "length", "filter", "drip"],
)
def test_one_bad_question_stops_no_other(fault, reason, monkeypatch):
    """Others must be answered all the while that one runs out of time."""
    monkeypatch.setattr(session, "TRIES", 2)
    server = QUICK.model_copy(update={"concurrency": 2})
    number = 60 if reason == "timeout" else 4
    ballots = [ChoiceRequest("bad" if i == 3 else f"q{i}", TEXT.words) for i in range(number)]
    mock = Mock(lambda n, path, body: fault if body["prompt"] == "bad" else time.sleep(0.02))
    found = ask(mock, *ballots, server=server)
    assert [i for i, one in found.items() if isinstance(one, Failure)] == [3]
    assert found[3].reason == reason and len(found) == len(ballots)


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (("status", (401, {}, "key?")), ConfigError, "refused: 401 key"),
        (("status", (404, {}, "no such path")), ConfigError, "refused: 404"),
        (("reset", None), ServerError, "does not answer: ReadError|does not answer: RemoteProtocolError"),
        (("hang", 1), ServerError, "does not answer: no answer in 0.5 s"),
        (("hang", 1.01), ServerError, "gave no answer in 0.6 s"),  # but lists its models all the while
    ],
    ids=["401", "404", "reset", "hang", "stall"],
)
def test_faults_of_a_server_are_named(fault, error, text, monkeypatch):
    monkeypatch.setattr(session, "TRIES", 2)
    server = ServerSection(timeout_s=60, stall_s=0.6) if fault[1] == 1.01 else QUICK
    with pytest.raises(error, match=text):
        ask(mock := Mock(lambda n, path, body: fault), TEXT, server=server)
    with pytest.raises(ServerError, match="does not answer: ConnectError"):
        list(connect(mock).choose_words([TEXT]))  # it is gone


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3", 3), ("-1", 0), ("soon", 0), ("", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00 +9999999999999999", 0), (formatdate(2_000_000_030, usegmt=True), 30),
    ],
)  # fmt: skip
def test_retry_after_in_all_its_forms(text, seconds, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000)
    assert session.retry_after_seconds(text) == seconds


def test_requests_spread_over_servers_and_a_dead_one_costs_nothing():
    """While one is gone, its list of models too, a bad question stops no other."""
    bad = ("status", (500, {}, "boom"))
    with serve(Mock()) as one, serve(Mock(lambda n, path, body: bad if "bad" in str(body) else None)) as two:
        client = connect(one, two, model="judge")
        list(client.choose_words(ChoiceRequest(f"q{i}", TEXT.words) for i in range(40)))
        assert abs(len(one.log) - len(two.log)) <= 2
        one.fault = lambda n, path, body: ("reset", None)
        found = dict(client.choose_words([ChoiceRequest(q, TEXT.words) for q in ("a", "bad", *"cdefgh")]))
    assert [i for i, choice in found.items() if isinstance(choice, Failure)] == [1] and len(found) == 8


def test_no_more_is_asked_than_a_kill_may_lose():
    """However long the caller takes with an answer: a journal's disk may be slow."""
    with serve(Mock()) as mock:
        client, seen = connect(mock), []
        before = len(mock.log)
        for number, _ in enumerate(client.choose_words([TEXT] * 20)):
            time.sleep(0.03)
            seen.append(len(mock.log) - before - number)
    # One more finds out about the words.
    assert len(seen) == 20 and max(seen) <= QUICK.concurrency + 1


@pytest.mark.parametrize(
    ("grows", "settings", "seconds", "most"),
    [
        (True, {}, 0.001, transport.MOST_REQUESTS),
        (True, {}, 0.2, transport.REQUESTS),  # more than a twentieth of its 2 seconds
        (True, {"concurrency": 4}, 0.001, 4),
        (False, {}, 0.001, transport.REQUESTS),
    ],
)
def test_a_server_of_our_own_is_asked_more_at_a_time_while_it_is_quick(grows, settings, seconds, most):
    now = [0, 0]

    async def ask(session, item):
        now[0] += 1
        now[1] = max(now)
        at_last = number / 2 < item and seconds < 0.1  # all that are there at once
        await asyncio.sleep(0.02 if at_last else seconds)
        now[0] -= 1
        return item

    number = 200 if seconds > 0.1 or settings else 2400
    server = ServerSection(timeout_s=2, **settings)
    sender = Transport(("http://127.0.0.1:1",), "", server, grows=grows)
    answers = dict(sender.each(range(number), ask))
    assert answers == {i: i for i in range(number)} and now[1] == most


def test_unlike_servers_of_one_model_are_noticed():
    with serve(Mock(constrains=False)) as one, serve(Mock(weights="other", constrains=False)) as two:
        with pytest.raises(ConfigError, match="serve different models as judge"):
            connect(one, two, model="judge").fingerprint()
        assert connect(one, one, model="judge").fingerprint()
        one.fault = lambda n, path, body: None if "chat" in path else ("status", (503, {}, "busy"))
        with pytest.raises(AnswerError, match="503 busy"):  # and its chats are not taken for another model's
            connect(one, model="judge").fingerprint()


@pytest.mark.parametrize(("words", "fits"), [(4088, True), (4089, False)])
def test_what_is_too_long_is_not_sent(words, fits):
    ballot = ChoiceRequest("long " * words, TEXT.words)
    (found,) = ask(mock := Mock(), ballot, server=ServerSection()).values()
    sent = [key for key in mock.log if "long" in key and len(json.loads(key)[0]) > 100]
    assert isinstance(found, ChoiceResult) is fits and bool(sent) is fits
    if not fits:
        assert (found.reason, found.detail) == ("too_long", "4089 tokens, and judge has room for 4088")


def test_a_key_with_a_letter_that_no_key_has_is_not_shown(monkeypatch):
    served = EngineSpec("openai", ModelSection(name="m"), None, ("http://localhost:1/v1",), "MY_KEY")
    monkeypatch.setenv("MY_KEY", "sk-\u201csecret\u201d")
    with pytest.raises(ConfigError, match="the key in MY_KEY has characters") as caught:
        client.open_engine(served, QUICK, print).__enter__()
    assert "secret" not in f"{caught.value} {caught.value.hint}"


def test_a_key_that_a_server_repeats_is_not_shown(monkeypatch):
    """In a list of models, in refusals, and in answers, which are kept; also as JSON may write it."""
    monkeypatch.setattr(session, "TRIES", 1)
    key, said = "sk-s3/cr+t", []
    with serve(Mock(constrains=False, say=f"{key} is wrong")) as mock:
        listed, transport = mock.models, Transport((mock.url,), key, QUICK)
        ((_, choice),) = Client(transport, None).choose_words([CHAT])
        said.append(choice.text)
        mock.models = [{"id": f"judge {key}"}]
        with pytest.raises(ConfigError, match="serves judge [*]{3}, not judge"):
            Client(transport, "judge")
        mock.models = listed
        for echo in (key, r"sk-s3\/cr\u002Bt"):
            for fault in (("status", (401, {}, echo)), ("body", f'{{"choices": "{echo}"}}')):
                mock.fault = lambda n, path, body, fault=fault: fault
                try:
                    said += dict(Client(transport, "judge").choose_words([TEXT])).values()
                except ConfigError as error:
                    said.append(error)
    assert len(said) == 5 and all("***" in str(text) and "s3" not in str(text) for text in said), said
    assert mock.headers["authorization"] == f"Bearer {key}"


def test_no_proxy_is_asked_for_a_server_of_this_machine(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080/")
    Transport(("http://127.0.0.1:80/v1", "http://localhost/v1"), "", ServerSection())._client()
    with pytest.raises(ConfigError, match="the proxy that the environment names cannot be used"):
        Transport(("http://example.org/v1",), "", ServerSection())._client()


def test_a_key_for_servers_is_not_handed_to_our_own(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("VLLM_OTHER", "kept")
    made = vllm._environment(None, "its own")
    assert made["VLLM_API_KEY"] == "its own" and made["VLLM_OTHER"] == "kept"


def test_a_signal_at_any_moment_ends_what_is_asked():
    """Its exception is neither lost in a task nor turned into another one, and no thread stays."""

    class Told(BaseException):
        pass

    def told(*_: object) -> None:
        raise Told

    usual = signal.signal(signal.SIGALRM, told)
    try:
        with serve(Mock()) as mock:
            served = threading.active_count()
            for moment in range(1, 60, 4):
                client = connect(mock)
                with pytest.raises(Told):
                    signal.setitimer(signal.ITIMER_REAL, moment / 1000)
                    for _ in range(1000):
                        list(client.choose_words([TEXT] * 8))
            ended = wait_for(lambda: threading.active_count() <= served)
            assert ended, [thread.name for thread in threading.enumerate()]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
