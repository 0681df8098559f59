"""The classify stage against a server that fails by script.

No vote is lost and none is asked twice without need, or it says why.
"""

import json
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import LORAPAR, ROOT, config_file
from mock_server import Mock, classify, serve, system_of, voting

from stages.config import ServerSection
from stages.errors import AnswerError, ConfigError, ServerError
from stages.records import read_jsonl, read_labels

ROWS = 60


@pytest.fixture
def config(tiny, tmp_path):
    return voting(tmp_path, tiny, ROWS)


@pytest.fixture(autouse=True)
def brief_pauses(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.05)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.05)


def report_in(artifact) -> dict[str, Any]:
    """What it says of the voter."""
    return json.loads((artifact.path / "report.json").read_text())["voters"]["judge/role_play"]


def votes_in(config) -> Counter:
    """How often each ballot is in the journal."""
    (path,) = (Path(config.runs_dir) / "votes").glob("*.jsonl")
    return Counter(row["question"] for _, row in read_jsonl(path) if "question" in row)


def test_no_vote_is_lost_and_labels_are_as_without_faults(config, tiny, tmp_path_factory):
    """torture/test_servers.py tries more faults, at random."""
    faults = (
        ("reset", None),
        ("status", (429, {"Retry-After": "1"}, "slow down")),
        ("body", b"\xff\x00 not json"),
    )
    with serve(Mock()) as healthy:
        undisturbed = system_of(classify(voting(tmp_path_factory.mktemp("healthy"), tiny, ROWS)(healthy.url)))
    with serve(Mock(lambda n, path, body: faults[n % 3] if 20 <= n < 45 else None)) as mock:
        given = config(mock.url)
        artifact = classify(given)
    assert system_of(artifact) == undisturbed and set(undisturbed) == {1, 2}
    assert set(votes_in(given).values()) == {1} and len(votes_in(given)) == ROWS + 32
    report = report_in(artifact)
    assert report["valid"] == ROWS and not report["failed"]


def test_one_question_that_always_fails_stops_no_other(config):
    def always(n, path, body):
        return ("status", (500, {}, "boom")) if "Question 7?" in str(body) else None

    failed = r"could not answer 1 of 92 questions; first \w+: server_error: 500 boom"
    with serve(Mock(always)) as mock:
        with pytest.raises(AnswerError, match=failed):
            classify(config(mock.url, max_failed=0.0))
        before = len(mock.log)
        artifact = classify(config(mock.url))
        assert all("Question 7?" in key or "Hello" in key for key in mock.log[before:] if "Question" in key)
        assert Counter(system_of(artifact))[None] == 1
        assert report_in(artifact)["failed"] == {"server_error": 1}
        mock.fault = None
        assert None not in system_of(classify(config(mock.url), force=True))


def test_many_bad_answers_end_it_early(config):
    def broken(n, path, body):
        return ("status", (500, {}, "boom")) if "Question" in str(body) and n > 30 else None

    failed = pytest.raises(AnswerError, match="could not answer 1[1-9] of 92 questions")
    with serve(Mock(broken)) as mock, failed:
        classify(config(mock.url))
    assert len(votes_in(config(mock.url))) > 10


def test_answers_that_are_no_label_are_a_class_of_their_own(config, monkeypatch):
    with serve(Mock(constrains=False, say="I would rather not say.")) as mock:
        with pytest.raises(AnswerError, match="(16|2[0-9]) of 92 answers are none of its words") as caught:
            classify(config(mock.url))
        assert "'I would rather not say.'" in str(caught.value)
        monkeypatch.setattr("stages.labelling.votes.MAX_INVALID", 1.0)
        artifact = classify(config(mock.url))
    assert set(system_of(artifact)) == {None} and report_in(artifact)["invalid"] == ROWS


@pytest.mark.parametrize(
    ("fault", "error", "code", "text"),
    [
        (("status", (401, {}, "who are you")), ConfigError, 78, "refused: 401 who are you"),
        (("hang", 10), ServerError, 69, "gave no answer in 4 s|does not answer: no answer in 1 s"),
    ],
    ids=["401", "hang"],
)
def test_a_server_that_is_gone_keeps_what_it_gave(config, fault, error, code, text):
    with serve(Mock(lambda n, path, body: fault if n > 60 else None)) as mock:
        with pytest.raises(error, match=text) as caught:
            classify(config(mock.url))
        assert caught.value.exit_code == code
        kept = len(votes_in(config(mock.url)))
        assert kept >= 40
        mock.fault, before = None, len(mock.log)
        classify(config(mock.url))
        # A set: on a busy machine one of them may miss its deadline of a second and be tried again.
        asked = {key for key in mock.log[before:] if "Question" in key or "question" in key}
    assert len(asked) <= ROWS + 32 - kept + 3  # and what finds out about the server


def test_voters_at_several_servers_run_side_by_side(config):
    at: dict[str, list[float]] = {"a": [], "b": []}

    def slow(name):
        return lambda n, path, body: (at[name].append(time.monotonic()), time.sleep(0.05))[1]

    with serve(Mock(slow("a"))) as one, serve(Mock(slow("b"), weights="b")) as two:
        voter = {"model": "judge", "base_url": one.url, "persona": "judge", "name": "a"}
        other = {**voter, "base_url": two.url, "name": "b"}
        artifact = classify(config(one.url, voters=[voter, {**other, "model": "jury"}]))
        with pytest.raises(ConfigError, match="a and b have one model and persona, but other URLs"):
            classify(config(one.url, voters=[voter, other]))
    votes = read_labels(artifact.path / "labels.jsonl")[0].votes
    # A request may be sent again where the machine is slow.
    assert list(votes) == ["a", "b"] and len(set(one.log)) == len(set(two.log)) > ROWS
    middle = {name: sorted(times)[len(times) // 2] for name, times in at.items()}
    assert middle["a"] < max(at["b"]) and middle["b"] < max(at["a"])  # half done before the other ends


@pytest.mark.slow
def test_kill_at_any_moment_repeats_no_more_than_what_was_in_flight(tiny, tmp_path):
    """kill -9 of the stage at ten moments, then the same command: each ballot once in the journal."""
    with serve(Mock(lambda n, path, body: time.sleep(0.02))) as mock:
        given = voting(tmp_path, tiny, 1500)(mock.url)
        given = given.model_copy(update={"server": ServerSection(concurrency=8)})
        start = [*LORAPAR, "classify", str(config_file(given, tmp_path))]
        kills = 0
        for seconds in (0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6):
            child = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.DEVNULL)
            time.sleep(seconds)
            kills += child.poll() is None
            child.send_signal(signal.SIGKILL)
            child.wait()
        subprocess.run(start, check=True, cwd=ROOT, capture_output=True)
        asked = Counter(key for key in mock.log if re.search(r"Question \d", key))
    ballots = votes_in(given)
    assert set(ballots.values()) == {1} and len(ballots) == 1532
    repeats = sum(asked.values()) - len(asked)
    assert kills >= 5 and repeats <= kills * 9  # eight in flight, and the question that finds out about words
