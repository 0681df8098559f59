"""The client against a mock server: what it reads, what it asks, which replies it refuses, how it fails."""

import json
import math
import signal
import threading
import traceback
from dataclasses import replace

import pytest
from conftest import wait_for
from mock_server import OF_CHOICES, OF_REPLIES, Mock, probability, serve, with_logprobs

from stages.config import ModelSection, ServerSection
from stages.engines import ChoiceRequest, EngineSpec, Failure, GenerateRequest, Sampling, openai, vllm
from stages.engines.openai import Client
from stages.engines.reply_checks import UNREADABLE, choice_probabilities, parse_reply, parse_word
from stages.errors import ConfigError, ServerError
from stages.models.load_errors import load_config, max_positions

WORDS = ("System1", "System2")
CHAT = ChoiceRequest([{"role": "user", "content": "Answer System1 or System2."}], WORDS)
TEXT = ChoiceRequest("q", (" one", " many"))
QUICK = ServerSection(concurrency=4, timeout_s=0.5)
ONE_BY_ONE = QUICK.model_copy(update={"concurrency": 1})


@pytest.fixture(autouse=True)
def brief_pauses(monkeypatch):
    monkeypatch.setattr(openai, "PAUSE_S", 0)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


def connect(mock: Mock, server: ServerSection = QUICK, key: str = "") -> Client:
    return Client(mock.url, key, server, "judge")


def ask(mock: Mock, *ballots: ChoiceRequest, **how: object) -> list:
    """What a server, started for them, answers to these."""
    with serve(mock):
        return [answer for _, answer in sorted(connect(mock, **how).choose_words(ballots))]


def first(*faults):
    """These faults for the first requests, in turn."""
    remaining = iter(faults)
    return lambda n, path, body: next(remaining, None)


@pytest.mark.parametrize("constrains", [True, False])
def test_a_server_is_told_whether_the_voter_thinks_if_it_can_constrain(constrains):
    """Others, OpenAI's for one, refuse fields that they do not know."""
    for most, thinks in ((0, False), (9, True)):
        ask(mock := Mock(constrains=constrains), replace(CHAT, max_thinking_tokens=most))
        told = mock.bodies[-1].get("chat_template_kwargs", {}).get("enable_thinking")
        assert told is (thinks if constrains else None)


@pytest.mark.parametrize(("ballot", "text"), [(CHAT, CHAT.text[0]["content"]), (TEXT, "q")])
def test_probabilities_of_words(ballot, text):
    (answer,) = ask(Mock(), ballot)
    assert answer.probabilities[1] == pytest.approx(probability(text))


def test_a_completion_is_its_token_ids_and_top_k_is_always_said():
    """vLLM would take the one of the model's generation_config."""
    reply = ("body", {"choices": [{"token_ids": [5], "finish_reason": "stop"}]})
    with serve(Mock(lambda n, path, body: reply)) as mock:
        ((_, completion),) = connect(mock).generate([GenerateRequest([1])], Sampling(4, (), 1.0))
    assert completion.ids == [5] and completion.complete and [body["top_k"] for body in mock.bodies] == [-1]


REFUSES = lambda n, path, body: "structured_outputs" in body and ("status", (400, {}, "unknown"))  # noqa: E731


@pytest.mark.parametrize("fault", [None, REFUSES], ids=["ignores", "400"])
def test_a_server_that_does_not_constrain_is_read(fault):
    (choice,) = ask(Mock(fault, constrains=False), CHAT)
    assert choice.probabilities == ((0.0, 1.0) if probability(CHAT.text[0]["content"]) > 0.5 else (1.0, 0.0))
    assert choice.text.startswith("**System")


@pytest.mark.parametrize(
    "faults",
    [
        [("body", {"choices": [{"message": {"content": "zebra"}, "logprobs": None}]})],
        [("body", "{"), ("status", (429, {}, "busy"))],
        [None, ("body", with_logprobs([("Sure", {"Sure": -0.1})], chat=True))],
    ],
    ids=["without log-probabilities", "unreadable, busy", "another word"],
)
def test_an_odd_reply_does_not_change_how_all_are_asked(faults):
    """Votes would be read from words, and kept beside those that are probabilities."""
    answers = ask(Mock(first(*faults)), *[CHAT] * 3, server=ONE_BY_ONE)
    two = probability(CHAT.text[0]["content"])
    assert [answer.probabilities[1] for answer in answers] == pytest.approx([two] * 3)


def test_what_fails_for_good_is_a_failure_of_its_item_and_teaches_nothing():
    busy = Mock(first(*[("status", (503, {}, "starting"))] * openai.TRIES))
    answers = ask(busy, *[CHAT] * 2, server=ONE_BY_ONE)
    assert answers[0] == Failure("server_error", "503 starting") and answers[1].probabilities[1] > 0
    too_long = ("status", (400, {}, "exceeds the context length"))
    for fault, reason in ((too_long, "too_long"), (("body", "{"), "unreadable")):
        mock = Mock(lambda n, path, body, fault=fault: fault if "other" in str(body) else None)
        answers = ask(mock, TEXT, replace(TEXT, text="other"), TEXT)
        assert [isinstance(answer, Failure) and answer.reason for answer in answers] == [False, reason, False]


def test_a_server_that_does_not_answer_is_named():
    with serve(Mock()) as mock, pytest.raises(ServerError, match="does not answer: no answer in 0.5 s"):
        mock.fault = lambda n, path, body: ("hang", 1)
        list(connect(mock).choose_words([TEXT]))
    mock.url = "http://127.0.0.1:1/v1"
    with pytest.raises(ServerError, match="127.0.0.1:1/v1 does not answer"):
        list(connect(mock).choose_words([TEXT]))


def test_a_key_that_a_server_repeats_is_not_shown():
    """In refusals, and in answers, which are kept; also as JSON may write it."""
    key, said = "sk-s3/cr+t", []
    with serve(Mock(constrains=False, say=f"{key} is wrong")) as mock:
        ((_, choice),) = connect(mock, key=key).choose_words([CHAT])
        said.append(choice.text)
        for echo in (key, r"sk-s3\/cr\u002Bt"):
            mock.fault = lambda n, path, body, echo=echo: ("status", (401, {}, echo))
            with pytest.raises(ConfigError, match="refused: 401") as caught:
                list(connect(mock, key=key).choose_words([TEXT]))
            said.append(str(caught.value))
    assert all("***" in text and "s3" not in text for text in said), said
    assert mock.headers["authorization"] == f"Bearer {key}"


def test_a_key_is_neither_shown_for_its_letters_nor_handed_to_our_own_server(monkeypatch):
    served = EngineSpec("openai", ModelSection(name="m"), None, "http://localhost:1/v1", "MY_KEY")
    monkeypatch.setenv("MY_KEY", "sk-\u201csecret\u201d")
    with pytest.raises(ConfigError, match="the key in MY_KEY has characters") as caught:
        openai.open_engine(served, QUICK, print).__enter__()
    assert "secret" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.filterwarnings("error")
def test_a_signal_at_any_moment_ends_what_is_asked():
    """Its exception is neither lost in a task nor turned into another one, and no thread stays."""

    class Told(BaseException):
        pass

    def told(_: int, frame: object) -> None:
        if any(inner.f_code.co_name == "__del__" for inner, _ in traceback.walk_stack(frame)):
            signal.setitimer(signal.ITIMER_REAL, 0.001)  # Python would drop the exception
            return
        raise Told

    usual = signal.signal(signal.SIGALRM, told)
    try:
        with serve(Mock()) as mock:
            list(connect(mock).choose_words([TEXT]))  # a library breaks on a signal while it is imported
            served = threading.active_count()
            for moment in range(1, 200, 20):
                with pytest.raises(Told):
                    signal.setitimer(signal.ITIMER_REAL, moment / 1000)
                    for _ in range(1000):
                        list(connect(mock).choose_words([TEXT] * 8))
            assert wait_for(lambda: threading.active_count() <= served)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("**Final answer: System 2.**", 1), ("System1\nBecause it is recall.", 0),
        ("<think>System1 or System2</think>System2", 1), ("<think>System2 is", None),
        ("System1\nSystem2", None), ("System12", None),
    ],
)  # fmt: skip
def test_a_word_is_read_strictly(text, index):
    assert parse_word(text, WORDS) == index


REPLY = {
    "id": "chatcmpl-0123456789abcdef", "model": "m", "object": "chat.completion", "error": None,
    "usage": {"completion_tokens": 1},
    "choices": [
        {
            "index": 0, "finish_reason": "stop", "stop_reason": None, "message": {"content": "A"},
            "logprobs": {"content": [{"token": "A", "top_logprobs": [{"token": "A", "logprob": -0.1}]}]},
        }
    ],
}  # fmt: skip
CHOICE = REPLY["choices"][0]


def alternatives(*likeliest: tuple[str, object]) -> dict:
    top = [{"token": text, "logprob": logprob} for text, logprob in likeliest]
    return {"logprobs": {"content": [{"token": likeliest[0][0], "top_logprobs": top}]}}


ODD = [
    *(REPLY | {"choices": choices} for choices in (None, [], [None], [CHOICE, CHOICE])),
    *(REPLY | change for change in OF_REPLIES), *(REPLY | {"choices": [CHOICE | c]} for c in OF_CHOICES),
    *(
        REPLY | {"choices": [CHOICE | alternatives(*likeliest)]}
        for likeliest in (
            *([("A", value)] for value in (math.nan, math.inf, 9e-4, None, "-0.1", False)),
            [("A", 0.0), ("B", 0.0)], [("A", -2.0), ("B", -0.2)],
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("reply", ODD, ids=str)
def test_an_odd_reply_is_none(reply):
    with pytest.raises(UNREADABLE):
        parsed = parse_reply(json.dumps(reply), "m", 8)
        assert (parsed.text, parsed.tokens) is None


def test_what_is_no_odd_reply_is_read():
    whole = json.dumps(REPLY)
    reply = parse_reply(whole.replace('"m"', '"m-2024-08-06"'), "owner/m", 1)
    assert reply.text == "A" and reply.tokens == [("A", [("A", -0.1)])]
    with pytest.raises(ValueError, match="a field stands twice"):
        parse_reply(whole.replace('"model": "m"', '"model": "m", "model": "m"'), "m", 1)


def test_a_reply_that_was_seen_before_is_refused():
    """And a short id, such as Ollama's, is drawn again by chance."""
    for id, reason in (("chatcmpl-7", None), ("chatcmpl-0123456789abcdef", "unreadable")):
        reply = with_logprobs([(" one", {" one": math.log(0.9), " many": math.log(0.1)})], chat=False)
        mock = Mock(lambda n, path, body, reply=reply, id=id: ("body", {"id": id, **reply}) if n else None)
        answers = ask(mock, *[TEXT] * 2)
        assert getattr(answers[1], "reason", None) == reason


@pytest.mark.parametrize(
    ("likeliest", "expected"),
    [
        ([("A", 0.7), ("B", 0.3)], (0.7, 0.3)),
        ([("A", 0.03), ("B", 0.01), *((text, 0.02) for text in "xyz")], (0.75, 0.25)),  # no constraint
        ([("A", 0.7), ("A", 0.1), ("A.", 0.1), ("A!", 0.05), ("A?", 0.03)], (0.98, 0.02)),  # B: what is left
        ([("A", 0.7)], None),
        ([("A", 1.0), ("B", 0.0), ("!", 0.0)], None),  # masked, though the constraint allows it
        ([("A", 0.7), ("Β", 0.3)], None),  # a Greek letter
        ([("A", 0.6), *((text, 0.1) for text in "xyzv")], None),
        ([("A", 0.7**1.44), ("B", 0.3**1.44), ("!", 0.0)], None),  # of logarithms to base 2
    ],
)  # fmt: skip
def test_a_probability_that_is_missing_is_none(likeliest, expected):
    """vLLM gives at least five alternatives, those that the constraint forbids with -9999."""
    logprobs = alternatives(*((text, math.log(share) if share else -9999.0) for text, share in likeliest))
    reply = parse_reply(json.dumps({"choices": [CHOICE | logprobs]}), "m", 1)
    if expected is None:
        with pytest.raises(ValueError):
            choice_probabilities(reply, ("A", "B"))
    else:
        assert choice_probabilities(reply, ("A", "B")) == pytest.approx(expected)


LOG = """\
(EngineCore pid=9) ERROR 11-29 06:41:45 [core.py:1] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-29 06:41:45 [core.py:1] torch.OutOfMemoryError: CUDA is full.
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.
(APIServer pid=7) WARNING 11-29 06:41:45 [utils.py:2] This can cause errors like `OSError: [Errno 24] no`.
"""


def test_the_last_error_in_a_log_of_vllm_is_the_cause(tmp_path):
    (tmp_path / "log").write_text(LOG)
    assert vllm.last_error(tmp_path / "log") == "torch.OutOfMemoryError: CUDA is full."
    (tmp_path / "log").write_text(LOG.splitlines()[-1])
    assert vllm.last_error(tmp_path / "log") == "no error in its log"


@pytest.mark.parametrize(("given", "length"), [(2048, 2048), ("auto", None), (-1, None)])
def test_lengths_as_vllm_reads_them(tiny, given, length):
    model, server = ModelSection(name=str(tiny)), ServerSection(vllm={"max_model_len": given})
    assert vllm.context_length(model, server) == (length or max_positions(load_config(model)))
